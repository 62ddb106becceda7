"""What the tables hold: rows and a checksum of each, as the shards' own servers compute them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy import Table, Text, cast, func, select

from shardlib import ShardedEngine
from shardlib.errors import InvalidTopology
from shardlib_ops.demo.models import Base

__all__ = ["Content", "contents"]


@dataclass(frozen=True, slots=True)
class Content:
    """Of one table.

    Attributes:
        rows: how many.
        checksum: sum of a 64-bit hash of each row with all its columns, modulo 2**64: their order does not count.
    """

    rows: int
    checksum: int

    @property
    def hex(self) -> str:
        """The checksum as it is shown."""
        return f"{self.checksum:016x}"

    def __add__(self, other: Content) -> Content:
        return Content(self.rows + other.rows, (self.checksum + other.checksum) % 2**64)


def contents(engine: ShardedEngine, one_key_each: Sequence[str]) -> dict[str, Content]:
    """Rows and checksums by table: of all shards together, and for a reference table those of each of them.

    Args:
        engine: of the cluster.
        one_key_each: a key of each shard that has any.

    Raises:
        InvalidTopology: a reference table is not the same everywhere.
    """
    tables = Base.metadata.sorted_tables

    def of_shard(key: str) -> dict[str, Content]:
        return {table.name: _content(engine, key, table) for table in tables}

    with ThreadPoolExecutor(len(one_key_each)) as pool:
        parts = list(pool.map(of_shard, one_key_each))
    found: dict[str, Content] = {}
    for table in tables:
        of_table = [part[table.name] for part in parts]
        if not table.info.get("reference"):
            found[table.name] = sum(of_table, Content(0, 0))
        elif len(set(of_table)) == 1:
            found[table.name] = of_table[0]
        else:
            raise InvalidTopology(f"the shards differ in {table.name}: {of_table}", "this is a fault: report it")
    return found


def _content(engine: ShardedEngine, key: str, table: Table) -> Content:
    row = cast(func.row(*table.columns), Text)
    query = select(func.count(), func.sum(func.hashtextextended(row, 0))).select_from(table)
    with engine.session(key) as session:
        rows, checksum = session.execute(query).one()
    return Content(rows, int(checksum or 0) % 2**64)
