"""The rows that a leg's target starts from: copied under a snapshot whose place in the stream of changes is known."""

from shardlib_ops.reshard.copy.chunks import Chunk, chunks_of
from shardlib_ops.reshard.copy.empty import empty_half_copied
from shardlib_ops.reshard.copy.keys import Key, collect_keys, leg_keys
from shardlib_ops.reshard.copy.snapshot import ExportedSnapshot, export_snapshot
from shardlib_ops.reshard.copy.transfer import CHUNK_BYTES, Copied, copy_tables

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "Copied",
    "ExportedSnapshot",
    "Key",
    "chunks_of",
    "collect_keys",
    "copy_tables",
    "empty_half_copied",
    "export_snapshot",
    "leg_keys",
]
