"""What changed lately is compared: keys whole, and of those with too many rows what the stream was asked to change.

All rows of a changed key are compared, since that also finds a change which the stream has missed. Keys with very many
rows would take too long for it while writers wait, and are often those that are written all the time: of them those
rows are compared that the stream was asked to change, by what identifies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from psycopg import AsyncConnection

from shardlib_ops.reshard.stream.recent import RowList
from shardlib_ops.reshard.validate.digest import Key
from shardlib_ops.reshard.validate.heavy import Weight, by_index, weigh
from shardlib_ops.reshard.validate.rows import differing_rows
from shardlib_ops.reshard.validate.sides import AT_ONCE, Equal, Tables, compare_keys, given, hashes, named
from shardlib_ops.reshard.world import Mismatch

__all__ = ["compare_lately"]


async def compare_lately(
    here: AsyncConnection[Any],
    there: AsyncConnection[Any],
    tables: Tables,
    keys: Sequence[Key],
    lsn: str,
    *,
    changed: Mapping[str, Sequence[RowList] | None] | None,
    whole: int,
) -> Equal:
    """Compare keys that have changed; of those with too many rows, the rows that were changed.

    Args:
        here: the source, in a transaction.
        there: the target.
        tables: what is compared.
        keys: that changed.
        lsn: what they are read at.
        changed: the rows that were changed, by table, None of one for unknown; None: none are known.
        whole: how many rows of a table may be compared as rows of changed keys.
    """
    if changed is None:
        return await compare_keys(here, there, tables, given(here, keys), given(there, keys), lsn)
    found = 0
    weights = await weigh(there, tables.sink, keys, rows=whole)
    for some, weight in _alike(tables, weights):
        lists = changed.get(some.sink[0].table.fullname, ()) if weight.heavy else ()
        wanted = keys
        if lists is not None:
            # Where nothing identifies a row, a key of which one was changed is compared whole after all.
            bags = {_key(row) for rows in lists if not rows.unique for row in rows.rows}
            wanted = [key for key in keys if key not in weight.heavy or key in bags]
        for conn in (here, there):
            await by_index(conn, weight.indexed)
        for at in range(0, len(wanted), AT_ONCE):
            few = wanted[at : at + AT_ONCE]
            found += (await compare_keys(here, there, some, given(here, few), given(there, few), lsn)).rows
        if lists:
            found += await _compare_rows(here, there, some, lists)
    return Equal(lsn, len(keys), found)


def _alike(tables: Tables, weights: Mapping[str, Weight]) -> Iterator[tuple[Tables, Weight]]:
    """The tables, together where nothing sets them apart; one by itself in which some keys have too many rows."""
    for indexed in (False, True):
        light = Weight(indexed, frozenset())
        if pairs := [pair for pair in tables.pairs if weights[pair[1].table.fullname] == light]:
            yield Tables([origin for origin, _ in pairs], [sink for _, sink in pairs]), light
    for origin, sink in tables.pairs:
        if (weight := weights[sink.table.fullname]).heavy:
            yield Tables([origin], [sink]), weight


async def _compare_rows(
    here: AsyncConnection[Any], there: AsyncConnection[Any], tables: Tables, lists: Sequence[RowList]
) -> int:
    """Compare rows of the one table; how many there are."""
    (origin, sink), (row,) = next(iter(tables.pairs)), hashes(here, there, tables)
    for conn in (here, there):
        await by_index(conn, True)
    found, wrong = await differing_rows((here, origin), (there, sink), row, [rows for rows in lists if rows.unique])
    if wrong:
        raise Mismatch(
            f"source and target differ: table {sink.table.fullname!r}: rows that were changed lately, of keys "
            + named(wrong)
        )
    return found


def _key(row: Sequence[bytes]) -> Key:
    first, *rest = (part.decode() for part in row)
    return first, tuple(rest)
