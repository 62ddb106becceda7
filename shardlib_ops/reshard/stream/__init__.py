"""Changes of moving rows flow from the shard that serves them to the one that follows: slots, decoding, applying."""

from shardlib_ops.reshard.stream.apply import Key
from shardlib_ops.reshard.stream.budget import MAX_SLOT_WAL, watch_slot
from shardlib_ops.reshard.stream.decode import lsn_number, lsn_text
from shardlib_ops.reshard.stream.faults import (
    CannotFollow,
    Diverged,
    MalformedStream,
    SchemaChanged,
    SlotBlocked,
    SlotLost,
    SlotOverBudget,
    StreamStopped,
)
from shardlib_ops.reshard.stream.filter import mover
from shardlib_ops.reshard.stream.slot import (
    SlotState,
    create_publication,
    create_slot,
    drop_publication,
    drop_slot,
    slot_state,
    who_blocks_a_slot,
)
from shardlib_ops.reshard.stream.stream import NewKeys, Standstill, Stream

__all__ = [
    "MAX_SLOT_WAL",
    "CannotFollow",
    "Diverged",
    "Key",
    "MalformedStream",
    "NewKeys",
    "SchemaChanged",
    "SlotBlocked",
    "SlotLost",
    "SlotOverBudget",
    "SlotState",
    "Standstill",
    "Stream",
    "StreamStopped",
    "create_publication",
    "create_slot",
    "drop_publication",
    "drop_slot",
    "lsn_number",
    "lsn_text",
    "mover",
    "slot_state",
    "watch_slot",
    "who_blocks_a_slot",
]
