"""Digests of the rows of some keys, computed by the server: equal digests mean equal rows.

For each table and bucket of keys: how many rows, and the sum of `hashtextextended` over the text of each row. A sum
finds a row that is there twice, which an exclusive or does not; the text of the whole row finds two rows that swapped a
value, which a sum of field hashes does not. The text is the same on both sides since the connections pin every setting
that changes it (`connect.SETTINGS`) and columns are named in one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.rows import TableShape

__all__ = ["BUCKETS", "KeyList", "digests", "key_digests", "load_keys"]

KeyList = Sequence[tuple[str, tuple[str, ...]]]
"""Shard keys as a key table holds them: (`k`, `more`)."""

BUCKETS: Final = 1024
_TEMP: Final = "shardlib_compared"
_LISTED: Final = "(SELECT x.k, x.more::text[] AS more FROM unnest(%s::text[], %s::text[]) AS x (k, more))"
_BUCKET: Final = f"hashtextextended(k.k, 0) & {BUCKETS - 1}"


async def load_keys(conn: AsyncConnection[Any], keys: Iterable[tuple[str, tuple[str, ...]]]) -> int:
    """A temporary table of keys for the queries of this transaction; how many.

    The caller has begun the transaction; the table goes with it.
    """
    await conn.execute(
        f"CREATE TEMPORARY TABLE {_TEMP} (k text NOT NULL, more text[] NOT NULL) ON COMMIT DROP".encode()
    )
    count = 0
    async with conn.cursor() as cursor, cursor.copy(f"COPY pg_temp.{_TEMP} FROM STDIN".encode()) as copy:
        for first, rest in keys:
            await copy.write_row((first, list(rest)))
            count += 1
    await conn.execute(f"ANALYZE pg_temp.{_TEMP}".encode())
    return count


async def digests(
    conn: AsyncConnection[Any], shapes: Sequence[TableShape], keys: KeyList | None = None
) -> dict[tuple[str, int], tuple[int, int]]:
    """(table, bucket) -> (rows, sum) of the rows of these keys, or of the loaded ones. Empty buckets are left out."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    listed = None if keys is None else ([first for first, _ in keys], [_array(rest) for _, rest in keys])
    source = sql.SQL("pg_temp.{}").format(sql.Identifier(_TEMP)) if keys is None else sql.SQL(_LISTED)
    for shape in shapes:
        query = sql.SQL(
            "SELECT {bucket}, count(*), sum(hashtextextended(ROW({columns})::text, 0))"
            " FROM {table} AS t JOIN {keys} AS k ON {matches} GROUP BY 1"
        ).format(
            bucket=sql.SQL(_BUCKET),
            columns=_ordered(shape),
            table=shape.name,
            keys=source,
            matches=shape.matches(),
        )
        cursor = await conn.execute(query, listed)
        for bucket, rows, total in await cursor.fetchall():
            found[shape.table.fullname, bucket] = (rows, int(total))
    return found


def _array(texts: Sequence[str]) -> str:
    """A literal of PostgreSQL's text[]."""
    quoted = ('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts)
    return "{" + ",".join(quoted) + "}"


async def key_digests(
    conn: AsyncConnection[Any], shape: TableShape, buckets: Sequence[int]
) -> Mapping[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Key -> (rows, sum) for the loaded keys of some buckets in one table."""
    query = sql.SQL(
        "SELECT k.k, k.more, count(*), sum(hashtextextended(ROW({columns})::text, 0))"
        " FROM {table} AS t JOIN pg_temp.{keys} AS k ON {matches} WHERE {bucket} = ANY(%s) GROUP BY 1, 2"
    ).format(
        bucket=sql.SQL(_BUCKET),
        columns=_ordered(shape),
        table=shape.name,
        keys=sql.Identifier(_TEMP),
        matches=shape.matches(),
    )
    cursor = await conn.execute(query, (list(buckets),))
    return {(first, tuple(rest)): (rows, int(total)) for first, rest, rows, total in await cursor.fetchall()}


def _ordered(shape: TableShape) -> sql.Composed:
    # By name: the two sides may have their columns in another order.
    names = sorted(column.name for column in shape.stored)
    return sql.SQL(", ").join(sql.Identifier("t", name) for name in names)
