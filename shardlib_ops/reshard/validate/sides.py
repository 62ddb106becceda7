"""The rows of some keys on two connections are compared, by the server's digests of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.validate.digest import (
    Compared,
    Key,
    KeyList,
    Keys,
    Row,
    digests,
    key_digests,
    listed,
    load_keys,
    row_hash,
)
from shardlib_ops.reshard.world import Mismatch

__all__ = ["AT_ONCE", "Equal", "Tables", "compare_keys", "given", "hashes", "named"]

AT_ONCE: Final = 5_000
"""Keys, or rows, that go along with one query."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Equal:
    """The sides are equal.

    Attributes:
        lsn: of the source: changes of transactions that committed before it are covered.
        keys: how many keys were compared.
        rows: how many rows.
        left: how many rows the stream has changed since, as far as that is known.
    """

    lsn: str
    keys: int
    rows: int
    left: int = 0


@dataclass(frozen=True, slots=True)
class Tables:
    """The cluster's tables as they are on each side of a leg.

    Attributes:
        origin: at the source.
        sink: at the target, in the same order.
        shared_origin: whether other legs leave the source too, so that its key table holds their keys as well.
        shared_sink: whether others arrive at the target.
    """

    origin: Sequence[TableShape]
    sink: Sequence[TableShape]
    shared_origin: bool = False
    shared_sink: bool = False

    @property
    def pairs(self) -> Iterable[tuple[TableShape, TableShape]]:
        """Each table as it is on the two sides."""
        return zip(self.origin, self.sink, strict=True)


def given(conn: AsyncConnection[Any], keys: KeyList) -> Callable[[], Awaitable[Keys]]:
    """Finds out the keys for `compare_keys` that are known here already."""

    async def find() -> Keys:
        return listed(keys) if len(keys) <= AT_ONCE else await load_keys(conn, keys)

    return find


async def compare_keys(
    here: AsyncConnection[Any],
    there: AsyncConnection[Any],
    tables: Tables,
    ours: Callable[[], Awaitable[Keys]],
    theirs: Callable[[], Awaitable[Keys]],
    lsn: str,
) -> Equal:
    """Compare rows on two connections, each in a transaction.

    A key that one side lists and the other does not counts as one without rows there.

    Args:
        here: the source.
        there: the target.
        tables: what is compared.
        ours: finds out whose rows are wanted at the source.
        theirs: and at the target.
        lsn: what they are read at.
    """
    rows = hashes(here, there, tables)
    left, right = list(zip(tables.origin, rows, strict=True)), list(zip(tables.sink, rows, strict=True))

    async def of(
        conn: AsyncConnection[Any], find: Callable[[], Awaitable[Keys]], shapes: Compared
    ) -> tuple[Keys, dict[tuple[str, int], tuple[int, int]]]:
        keys = await find()
        return keys, await digests(conn, shapes, keys)

    # Each side goes its own pace.
    (our_keys, ours_by), (their_keys, theirs_by) = await together([of(here, ours, left), of(there, theirs, right)])
    if ours_by == theirs_by:
        found = await there.execute(
            sql.SQL("SELECT count(*) FROM {} AS k").format(their_keys.relation), their_keys.parameters
        )
        row = await found.fetchone()
        assert row is not None  # noqa: S101 - a count
        return Equal(lsn, row[0], sum(rows for rows, _ in theirs_by.values()))
    differ = sorted(at for at in ours_by.keys() | theirs_by.keys() if ours_by.get(at) != theirs_by.get(at))
    shapes = {a.table.fullname: (a, b, row) for a, b, row in zip(tables.origin, tables.sink, rows, strict=True)}
    told: list[str] = []
    for table in dict.fromkeys(name for name, _ in differ):
        buckets = [bucket for name, bucket in differ if name == table]
        origin, sink, row_of = shapes[table]
        mine = await key_digests(here, origin, row_of, our_keys, buckets)
        other = await key_digests(there, sink, row_of, their_keys, buckets)
        wrong = [key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)]
        counts = (sum(rows for rows, _ in mine.values()), sum(rows for rows, _ in other.values()))
        told.append(f"table {table!r}: {len(wrong)} keys ({counts[0]} rows here, {counts[1]} there): {named(wrong)}")
    raise Mismatch("source and target differ: " + "; ".join(told))


def hashes(here: AsyncConnection[Any], there: AsyncConnection[Any], tables: Tables) -> list[Row]:
    """How the rows of each table are hashed so that both sides agree."""
    versions = [conn.info.server_version for conn in (here, there)]
    return [row_hash(origin, sink, versions) for origin, sink in tables.pairs]


def named(keys: Sequence[Key]) -> str:
    """Some of these keys, for a message."""
    shown = [repr(key[0] if not key[1] else (key[0], *key[1])) for key in sorted(keys)[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(keys) > _SHOWN else "")
