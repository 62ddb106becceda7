"""Digests of the rows of some keys, computed by the server: equal digests mean equal rows.

For each table and bucket of keys: how many rows, and the sum of a hash over each row as a whole. A sum finds a row that
is there twice, which an exclusive or does not; a hash of the whole row finds two rows that swapped a value, which a sum
of field hashes does not. The text of a row is the same on both sides since the connections pin every setting that
changes it (`connect.SETTINGS`) and columns are named in one order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

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
    "array",
    "digests",
    "key_digests",
    "listed",
    "load_keys",
    "ordered",
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
_LISTED: Final = (
    "(SELECT x.k, x.more::text[] AS more{values} FROM unnest(%s::text[], %s::text[]{more}) AS x (k, more{names}))"
)
_TEXTS: Final = frozenset({"text", "character varying"})
_NONE: Final = ("",) * 32
_BUCKET: Final = f"hashtextextended(k.k, 0) & {BUCKETS - 1}"
_LINES: Final = 10_000
_SEND_SINCE: Final = 18_00_00
_MAJOR: Final = 1_00_00


@dataclass(frozen=True, slots=True)
class Keys:
    """Whose rows are compared: a relation of (`k`, `more`) that has each key once, and the parameters in its SQL.

    Attributes:
        relation: its SQL.
        parameters: in their order.
        few: the keys, if they go along with each query.
    """

    relation: sql.Composable
    parameters: tuple[Any, ...] = ()
    few: KeyList = ()

    def of(self, shape: TableShape) -> tuple[sql.Composed, sql.Composed, tuple[Any, ...]]:
        """(the relation as `k`, the condition for rows `t` of a table, parameters of the relation).

        The text of a number or UUID leads to no index: few keys carry their values along as well.
        """
        relation, same = sql.SQL("{} AS k").format(self.relation), shape.matches()
        if not self.few:
            return relation, same, self.parameters
        bases = {column.name: column.base for column in shape.columns}
        names, types, values = [], [], []
        for place, part in enumerate(shape.table.key):
            column, base = sql.Identifier("t", part), bases[part]
            if base in _VALUES:
                kind, value = _VALUES[base]
                name = sql.Identifier(f"v{place}")
                texts = [key[0] if place == 0 else (*key[1], *_NONE)[place - 1] for key in self.few]
                same += sql.SQL(" AND {} = k.{}").format(column, name)
                names.append(name)
                types.append(sql.SQL(f", %s::{kind}[]"))
                values.append([value(text) for text in texts])
            elif place and base in _TEXTS:
                same += sql.SQL(' AND {} COLLATE pg_catalog."default" = k.more[{}]').format(column, place)
        more = sql.SQL("").join(sql.SQL(", {}").format(name) for name in names)
        relation = sql.SQL(_LISTED).format(more=sql.SQL("").join(types), names=more, values=more)
        return sql.SQL("{} AS k").format(relation), same, (*self.parameters, *values)


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
            lines = [f"{_escaped(k)}\t{_escaped(array(more)) if more else '{}'}\n" for k, more in some]
            await copy.write("".join(lines))
    await conn.execute(f"ANALYZE pg_temp.{_TEMP}".encode())
    return Keys(sql.SQL("pg_temp.{}").format(sql.Identifier(_TEMP)))


def listed(keys: KeyList) -> Keys:
    """A few keys that go along with each query."""
    relation = sql.SQL(_LISTED).format(more=sql.SQL(""), names=sql.SQL(""), values=sql.SQL(""))
    return Keys(relation, ([first for first, _ in keys], [array(rest) for _, rest in keys]), keys)


async def digests(conn: AsyncConnection[Any], tables: Compared, keys: Keys) -> dict[tuple[str, int], tuple[int, int]]:
    """(table, bucket) -> (rows, sum) of the rows of these keys. Empty buckets are left out."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for shape, row in tables:
        source, parameters = _rows_of(shape, keys)
        query = sql.SQL("SELECT {bucket}, count(*), sum({row}) FROM {source} GROUP BY 1").format(
            bucket=sql.SQL(_BUCKET), row=row(ordered(shape)), source=source
        )
        cursor = await conn.execute(query, parameters or None)
        for bucket, rows, total in await cursor.fetchall():
            found[shape.table.fullname, bucket] = (rows, int(total))
    return found


async def key_digests(
    conn: AsyncConnection[Any], shape: TableShape, row: Row, keys: Keys, buckets: Sequence[int]
) -> Mapping[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Key -> (rows, sum) for the keys of some buckets in one table."""
    source, parameters = _rows_of(shape, keys)
    query = sql.SQL(
        "SELECT k.k, k.more, count(*), sum({row}) FROM {source} WHERE {bucket} = ANY(%s) GROUP BY 1, 2"
    ).format(bucket=sql.SQL(_BUCKET), row=row(ordered(shape)), source=source)
    cursor = await conn.execute(query, (*parameters, list(buckets)))
    return {(first, tuple(rest)): (rows, int(total)) for first, rest, rows, total in await cursor.fetchall()}


def _rows_of(shape: TableShape, keys: Keys) -> tuple[sql.Composed, tuple[Any, ...]]:
    relation, same, parameters = keys.of(shape)
    # The keys come first: of a join the parameters stand in this order.
    return sql.SQL("{} JOIN {} AS t ON {}").format(relation, shape.name, same), parameters


def ordered(shape: TableShape) -> sql.Composed:
    """The columns of a row `t` that are hashed. By name: the two sides may have their columns in another order."""
    names = sorted(column.name for column in shape.stored)
    return sql.SQL(", ").join(sql.Identifier("t", name) for name in names)


def array(texts: Sequence[str]) -> str:
    """A literal of PostgreSQL's text[]."""
    quoted = ('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts)
    return "{" + ",".join(quoted) + "}"


def _escaped(text: str) -> str:
    """A field of text COPY."""
    return text.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")


def _number(text: str) -> int | None:
    """The number that this is the text of; None if none of PostgreSQL's whole numbers has it."""
    found = int(text) if _NUMBER.fullmatch(text) else None
    return found if found is not None and -(1 << 63) <= found < 1 << 63 else None


def _uuid(text: str) -> str | None:
    return text if _UUID.fullmatch(text) else None


_NUMBER: Final = re.compile(r"-?[0-9]{1,19}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_VALUES: Final[Mapping[str, tuple[LiteralString, Callable[[str], object]]]] = {
    "smallint": ("bigint", _number),
    "integer": ("bigint", _number),
    "bigint": ("bigint", _number),
    "uuid": ("uuid", _uuid),
}
"""Types of a key's column whose values are looked for by an index: the type to compare with, and a text's value."""
