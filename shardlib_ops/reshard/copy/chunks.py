"""How a table is cut into chunks. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Chunk", "chunks_of"]


class Chunk(NamedTuple):
    """Blocks `first` to `stop`, exclusive, of a table; without `stop`, all from `first` on."""

    first: int
    stop: int | None

    def condition(self, alias: str = "t") -> str:
        """SQL: the row lies in these blocks."""
        begin = f"{alias}.ctid >= '({self.first},0)'"
        return begin if self.stop is None else f"{begin} AND {alias}.ctid < '({self.stop},0)'"


def chunks_of(blocks: int, total_bytes: int, chunk_bytes: int, *, block_bytes: int = 8192) -> tuple[Chunk, ...]:
    """Cut a table of `blocks` blocks into chunks of about `chunk_bytes`, the last of which is open at its end.

    Args:
        blocks: length of the table itself.
        total_bytes: of the table with what is stored beside it (TOAST), which belongs to the rows.
        chunk_bytes: wanted size of a chunk; at least one block is in each.
        block_bytes: of the server.
    """
    per_block = max(block_bytes, total_bytes // max(1, blocks))
    step = max(1, chunk_bytes // per_block)
    firsts = range(0, max(1, blocks), step)
    stops: list[int | None] = [*firsts[1:], None]
    return tuple(Chunk(first, stop) for first, stop in zip(firsts, stops, strict=True))
