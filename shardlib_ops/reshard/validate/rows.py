"""Rows are compared by what identifies them: on both sides with equal values, or on neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from psycopg import AsyncConnection, sql

from shardlib_ops.reshard.rows import TableShape
from shardlib_ops.reshard.stream.recent import RowList
from shardlib_ops.reshard.together import together
from shardlib_ops.reshard.validate.digest import Key, Row, array, ordered
from shardlib_ops.reshard.validate.sides import AT_ONCE

__all__ = ["differing_rows"]

_Side = tuple[AsyncConnection[Any], TableShape]
_Batch = Sequence[str]
"""For each column an array of its values, as a literal of PostgreSQL."""


async def differing_rows(here: _Side, there: _Side, row: Row, lists: Iterable[RowList]) -> tuple[int, list[Key]]:
    """Look up rows on both sides, each in a transaction that looks them up by an index.

    Args:
        here: the source, and the table there.
        there: the target.
        row: how a row is hashed.
        lists: the rows.

    Returns:
        How many rows there are, and keys of rows that differ: of the first batch that does.
    """
    found = 0
    for rows in lists:
        batches = list(_batches(rows))

        async def sums(conn: AsyncConnection[Any], shape: TableShape, rows: RowList, batches: Sequence[_Batch]) -> Any:
            query = sql.SQL("SELECT count(*), sum({}) FROM {}").format(row(ordered(shape)), _named(shape, rows))
            return [await (await conn.execute(query, batch)).fetchone() for batch in batches]

        # Each side goes its own pace.
        ours, theirs = await together([sums(*here, rows, batches), sums(*there, rows, batches)])
        found += sum(count for count, _ in theirs)
        for batch, mine, other in zip(batches, ours, theirs, strict=True):
            if mine != other:
                one, two = await together(_each(*side, row, rows, batch) for side in (here, there))
                wrong = {key for at in one.keys() | two.keys() for key in _unlike(one.get(at), two.get(at))}
                return found, sorted(wrong)
    return found, []


def _batches(rows: RowList) -> Iterable[_Batch]:
    for at in range(0, len(rows.rows), AT_ONCE):
        some = rows.rows[at : at + AT_ONCE]
        yield [array([value.decode() for value in values]) for values in zip(*some, strict=True)]


def _named(shape: TableShape, rows: RowList) -> sql.Composed:
    """The rows of a table `t` that are listed, with their place `x.n`."""
    types = {column.name: column.type for column in shape.columns}
    places = [sql.Identifier(f"c{at}") for at in range(len(rows.columns))]
    return sql.SQL("ROWS FROM ({}) WITH ORDINALITY AS x ({}, n) JOIN {} AS t ON {}").format(
        sql.SQL(", ").join([sql.SQL("unnest(%s::text[])")] * len(places)),
        sql.SQL(", ").join(places),
        shape.name,
        sql.SQL(" AND ").join(
            # A type's name comes from the server as it is to be written.
            sql.SQL("{} = x.{}::{}").format(sql.Identifier("t", name), place, sql.SQL(types[name]))
            for name, place in zip(rows.columns, places, strict=True)
        ),
    )


async def _each(
    conn: AsyncConnection[Any], shape: TableShape, row: Row, rows: RowList, batch: _Batch
) -> Mapping[int, tuple[int, Key]]:
    """Place in the batch -> (hash, shard key) of a row."""
    first, rest = shape.key_parts()
    query = sql.SQL("SELECT x.n, {}, {}, {} FROM {}").format(row(ordered(shape)), first, rest, _named(shape, rows))
    return {n: (total, (k, tuple(more))) for n, total, k, more in await (await conn.execute(query, batch)).fetchall()}


def _unlike(one: tuple[int, Key] | None, two: tuple[int, Key] | None) -> Iterable[Key]:
    return [] if one == two else [key for _, key in filter(None, (one, two))]
