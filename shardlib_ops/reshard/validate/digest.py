"""Digests of the rows of some keys, computed by the server: equal digests mean equal rows.

For each table and bucket of keys: how many rows, and the sum of a hash over each row as a whole. A sum finds a row that
is there twice, which an exclusive or does not; a hash of the whole row finds two rows that swapped a value, which a sum
of field hashes does not. The text of a row is the same on both sides since the connections pin every setting that
changes it (`connect.SETTINGS`) and columns are named in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.lines import binary_alike
from shardlib_ops.reshard.rows import TableShape

__all__ = [
    "BUCKETS",
    "Compared",
    "Key",
    "KeyList",
    "Keys",
    "Row",
    "digests",
    "key_digests",
    "listed",
    "load_keys",
    "row_hash",
]

Key = tuple[str, tuple[str, ...]]
"""A shard key as a key table holds it: (`k`, `more`)."""

KeyList = Sequence[Key]

Row = Callable[[sql.Composable], sql.Composed]
"""SQL of the hash of a row, a bigint, made of the columns of it."""

Compared = Sequence[tuple[TableShape, Row]]
"""The tables of one side, and how their rows are hashed."""

BUCKETS: Final = 1024
_TEMP: Final = "shardlib_compared"
_LISTED: Final = "(SELECT x.k, x.more::text[] AS more FROM unnest(%s::text[], %s::text[]) AS x (k, more))"
_BUCKET: Final = f"hashtextextended(k.k, 0) & {BUCKETS - 1}"
_LINES: Final = 10_000
_SEND_SINCE: Final = 18_00_00
_MAJOR: Final = 1_00_00


@dataclass(frozen=True, slots=True)
class Keys:
    """Whose rows are compared: a relation of (`k`, `more`) that has each key once, and the parameters in its SQL."""

    relation: sql.Composable
    parameters: tuple[Any, ...] = ()


def row_hash(origin: TableShape, sink: TableShape, versions: Sequence[int]) -> Row:
    """How rows of a table are hashed so that both sides agree.

    The binary form takes two thirds of the time of the text, and `hashbyteaextended` is there since PostgreSQL 18. It
    holds the OIDs of types that a user has defined, which differ from server to server.

    Args:
        origin: the table on one side.
        sink: and on the other.
        versions: of the servers, such as 180001.
    """
    same = len({version // _MAJOR for version in versions}) == 1
    if same and min(versions) >= _SEND_SINCE and binary_alike(origin.stored, sink.stored):
        return sql.SQL("hashbyteaextended(record_send(ROW({})), 0)").format
    return sql.SQL("hashtextextended(ROW({})::text, 0)").format


async def load_keys(conn: AsyncConnection[Any], keys: KeyList) -> Keys:
    """A temporary table of these keys, for the queries of this transaction.

    The caller has begun the transaction; the table goes with it.
    """
    await conn.execute(
        f"CREATE TEMPORARY TABLE {_TEMP} (k text NOT NULL, more text[] NOT NULL) ON COMMIT DROP".encode()
    )
    async with conn.cursor() as cursor, cursor.copy(f"COPY pg_temp.{_TEMP} FROM STDIN".encode()) as copy:
        # A call for each key would take longer than all the rest.
        for at in range(0, len(keys), _LINES):
            some = keys[at : at + _LINES]
            lines = [f"{_escaped(k)}\t{_escaped(_array(more)) if more else '{}'}\n" for k, more in some]
            await copy.write("".join(lines))
    await conn.execute(f"ANALYZE pg_temp.{_TEMP}".encode())
    return Keys(sql.SQL("pg_temp.{}").format(sql.Identifier(_TEMP)))


def listed(keys: KeyList) -> Keys:
    """A few keys that go along with each query."""
    return Keys(sql.SQL(_LISTED), ([first for first, _ in keys], [_array(rest) for _, rest in keys]))


async def digests(conn: AsyncConnection[Any], tables: Compared, keys: Keys) -> dict[tuple[str, int], tuple[int, int]]:
    """(table, bucket) -> (rows, sum) of the rows of these keys. Empty buckets are left out."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for shape, row in tables:
        query = sql.SQL("SELECT {bucket}, count(*), sum({row}) FROM {source} GROUP BY 1").format(
            bucket=sql.SQL(_BUCKET), row=row(_ordered(shape)), source=_rows_of(shape, keys)
        )
        cursor = await conn.execute(query, keys.parameters or None)
        for bucket, rows, total in await cursor.fetchall():
            found[shape.table.fullname, bucket] = (rows, int(total))
    return found


async def key_digests(
    conn: AsyncConnection[Any], shape: TableShape, row: Row, keys: Keys, buckets: Sequence[int]
) -> Mapping[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Key -> (rows, sum) for the keys of some buckets in one table."""
    query = sql.SQL(
        "SELECT k.k, k.more, count(*), sum({row}) FROM {source} WHERE {bucket} = ANY(%s) GROUP BY 1, 2"
    ).format(bucket=sql.SQL(_BUCKET), row=row(_ordered(shape)), source=_rows_of(shape, keys))
    cursor = await conn.execute(query, (*keys.parameters, list(buckets)))
    return {(first, tuple(rest)): (rows, int(total)) for first, rest, rows, total in await cursor.fetchall()}


def _rows_of(shape: TableShape, keys: Keys) -> sql.Composed:
    return sql.SQL("{} AS t JOIN {} AS k ON {}").format(shape.name, keys.relation, shape.matches())


def _ordered(shape: TableShape) -> sql.Composed:
    # By name: the two sides may have their columns in another order.
    names = sorted(column.name for column in shape.stored)
    return sql.SQL(", ").join(sql.Identifier("t", name) for name in names)


def _array(texts: Sequence[str]) -> str:
    """A literal of PostgreSQL's text[]."""
    quoted = ('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts)
    return "{" + ",".join(quoted) + "}"


def _escaped(text: str) -> str:
    """A field of text COPY."""
    return text.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
