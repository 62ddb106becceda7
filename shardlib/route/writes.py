"""INSERT, UPDATE and DELETE: the keys of the rows they write.

An UPDATE or DELETE touches the rows that a SELECT with its condition would read, so that SELECT is analysed. An
INSERT names its rows; each must give its whole shard key, since its shard is chosen before the database sees it.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import literal_column, select
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.selectable import SelectBase

from shardlib.errors import ShardKeyChanged, UnsupportedOperation
from shardlib.route.inserts import inserted
from shardlib.route.merging import inside
from shardlib.route.needs import Describe, Needs, Scope
from shardlib.route.plans import Given, Parameters, Plan, check_names, keys_of, plan_of
from shardlib.route.target import MISSING, Target, grouped, key_of_row, known, sets_of
from shardlib.route.values import Supplied

__all__ = ["written"]


def written(statement: UpdateBase, parameters: Parameters, describe: Describe) -> Needs:
    """Decide which shard keys a write needs; see `extract.needs_of`."""
    target = Target(statement, describe)
    for cte in statement._independent_ctes:
        if isinstance(cte.element, UpdateBase):
            raise UnsupportedOperation(
                "a data-modifying CTE beside another write cannot be routed", "run them as two statements"
            )
    if isinstance(statement, Insert):
        return inserted(statement, target, parameters, describe)
    if not isinstance(statement, Update | Delete):
        raise UnsupportedOperation(f"this {type(statement).__name__} cannot be routed", "use insert, update or delete")
    many = parameters is not None and not isinstance(parameters, Mapping)
    if many and isinstance(statement, Update) and target.mapped and not statement._where_criteria:
        return _by_primary_key(statement, target, sets_of(parameters))
    return _changed(statement, target, parameters, describe)


# --- UPDATE and DELETE ---------------------------------------------------------------------------------------------


def _changed(statement: Update | Delete, target: Target, parameters: Parameters, describe: Describe) -> Needs:
    cache_key = statement._generate_cache_key()
    plan, own = plan_of(statement, cache_key, describe, lambda: _as_select(statement))
    if plan.raw or plan.writes:
        raise UnsupportedOperation(
            "a write that reads system tables, or holds a data-modifying CTE, cannot be routed",
            "run it in a session pinned to a shard key: engine.session(key)",
        )
    sets: Sequence[Given] = [{**own, **given} for given in sets_of(parameters)] or [own]
    if getattr(statement, "_post_criteria_clause", None) is not None:
        raise UnsupportedOperation("a syntax extension of a write is not understood", "leave it out")
    for given in sets:
        check_names(given, cache_key, plan, also=target.table.c.keys())
    tables = tuple(dict.fromkeys((target.table, *plan.tables)))
    extracted: Sequence[BindParameter[Any]] = () if cache_key is None else cache_key.bindparams
    rows: dict[bytes, list[int]] = {}
    together: dict[tuple[bytes, ...], None] = {}
    for index, given in enumerate(sets):
        supplied = Supplied(extracted, given)
        _check_set(statement, target, plan, cache_key, supplied)
        keys = keys_of(plan.keys or (), supplied)
        for key in keys:
            rows.setdefault(key, []).append(index)
        if plan.merge is not None and len(keys) > 1:
            together[keys] = None
    if plan.keys is None:
        return Needs(Scope.SCAN, (), True, tables, plan.merge, calls=plan.calls)
    if len(sets) == 1:
        return Needs(Scope.KEYED, tuple(rows), True, tables, plan.merge, calls=plan.calls)
    return Needs(Scope.KEYED, tuple(rows), True, tables, plan.merge, grouped(rows), tuple(together), plan.calls)


def _as_select(statement: Update | Delete) -> SelectBase:
    """The SELECT of the rows that an UPDATE or DELETE touches, with every expression it evaluates."""
    shown: list[Any] = [literal_column("1")]
    if isinstance(statement, Update):
        shown += [value for value in (statement._values or {}).values() if isinstance(value, ClauseElement)]
    shown += [column for column in statement._returning if next(inside((column,)), None) is not None]
    table: Any = statement.table
    rows = select(*shown).select_from(table._deannotate() if table._annotations else table)
    if statement._independent_ctes:
        rows = rows.add_cte(*statement._independent_ctes)
    return rows.where(*statement._where_criteria)


def _check_set(
    statement: Update | Delete, target: Target, plan: Plan, cache_key: CacheKey | None, supplied: Supplied
) -> None:
    """Refuse a SET of the shard key, unless it sets the key that the condition asks for."""
    if not isinstance(statement, Update):
        return
    new: dict[int, Any] = {}
    for position, column in enumerate(target.columns):
        value = target.find(statement._values or {}, position)
        if column.key in supplied.given and not _is_parameter(cache_key, column.key):
            value = supplied.given[column.key]
        if value is not MISSING:
            new[position] = known(value, supplied, cache_key)
    if not new:
        return
    shown = tuple(new.values()) if len(new) > 1 else next(iter(new.values()))
    rows = [row for keyed in plan.keys or () for row in keyed.rows(supplied)]
    if not rows:
        raise ShardKeyChanged(target.table.fullname, "whatever it is", shown)
    for row in rows:
        changed = tuple(new.get(position, value) for position, value in enumerate(row))
        if MISSING in changed or target.key.encode(changed) != target.key.encode(row):
            raise ShardKeyChanged(target.table.fullname, row if len(row) > 1 else row[0], shown)


def _is_parameter(cache_key: CacheKey | None, name: str) -> bool:
    return cache_key is not None and any(parameter.key == name for parameter in cache_key.bindparams)


def _by_primary_key(statement: Update, target: Target, sets: Sequence[Given]) -> Needs:
    """The ORM's bulk UPDATE: each parameter set names its row by primary key, which holds the shard key."""
    rows: dict[bytes, list[int]] = {}
    for index, given in enumerate(sets):
        rows.setdefault(key_of_row(target, given, {}, "a parameter set"), []).append(index)
    if any(target.find(statement._values or {}, position) is not MISSING for position in range(len(target.columns))):
        raise ShardKeyChanged(target.table.fullname, "whatever it is", "a value in values()")
    return Needs(Scope.KEYED, tuple(rows), True, (target.table,), None, grouped(rows))
