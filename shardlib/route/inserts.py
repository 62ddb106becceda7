"""INSERT: the key of every row, known before any server is asked."""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Table, literal_column, select
from sqlalchemy.dialects.postgresql.dml import OnConflictDoUpdate
from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.elements import BindParameter, ClauseElement

from shardlib.errors import ShardKeyChanged, ShardKeyRequired, UnsupportedCrossShardQuery, UnsupportedOperation
from shardlib.route.merging import inside, walk
from shardlib.route.needs import Describe, Needs, Scope
from shardlib.route.place import KeyPlan, inserted_from
from shardlib.route.plans import GENERATED, Given, Parameters, keys_of, plan_of
from shardlib.route.target import GIVE_VALUE, MISSING, Target, grouped, key_of_row, sets_of
from shardlib.route.values import Supplied

__all__ = ["inserted"]

_ROWS = "an INSERT of rows for several shards"


def inserted(statement: Insert, target: Target, parameters: Parameters, describe: Describe) -> Needs:
    """Decide which shard keys an INSERT needs; see `extract.needs_of`."""
    _check_conflict(statement, target)
    sets = sets_of(parameters)
    if statement.select is not None:
        if sets and (len(sets) > 1 or not isinstance(parameters, Mapping)):
            raise UnsupportedOperation("INSERT from SELECT takes one set of parameters", "run it once for each")
        needs = _from_select(statement, target, sets[0] if sets else {}, describe)
    else:
        needs = _from_rows(statement, target, sets)
    return _with_subqueries(needs, statement, sets, describe)


def _from_rows(statement: Insert, target: Target, sets: Sequence[Given]) -> Needs:
    rows: dict[bytes, list[int]] = {}
    listed = list(_listed(statement, target))
    if listed:
        given = sets[0] if sets else {}
        if len(sets) > 1 or any(GENERATED.fullmatch(name) for name in given):
            raise UnsupportedOperation(
                "an INSERT with several rows in values() takes no further rows", "give all rows in one place"
            )
        for index, row in enumerate(listed):
            rows.setdefault(key_of_row(target, row, given, f"row {index}"), []).append(index)
        return Needs(Scope.KEYED, tuple(rows), True, (target.table,), _ROWS, grouped(rows))
    fixed: dict[Any, Any] = dict(statement._values or {})
    for index, given in enumerate(sets or ({},)):
        row = {**fixed, **given}
        rows.setdefault(key_of_row(target, row, given, f"row {index}"), []).append(index)
    many = len(sets) > 1 or (target.mapped and bool(sets))  # of a mapped class: SQLAlchemy's bulk insert, even of one
    return Needs(
        Scope.KEYED,
        tuple(rows),
        True,
        (target.table,),
        _ROWS if len(rows) > 1 else None,
        grouped(rows) if many else None,
    )


def _listed(statement: Insert, target: Target) -> Iterator[Mapping[Any, Any]]:
    for group in statement._multi_values:
        for row in group:
            if isinstance(row, Mapping):
                yield row
            else:
                yield dict(zip(target.table.c.keys(), row, strict=False))


def _check_conflict(statement: Insert, target: Target) -> None:
    clause = statement._post_values_clause
    if clause is None:
        return
    for element in walk((clause,)):
        if not isinstance(element, OnConflictDoUpdate):
            continue
        for position in range(len(target.columns)):
            value = target.find(element.update_values_to_set, position)
            if value is not MISSING:
                shown = value.effective_value if isinstance(value, BindParameter) else str(value)
                raise ShardKeyChanged(target.table.fullname, "that of the row in conflict", shown)


def _with_subqueries(needs: Needs, statement: Insert, sets: Sequence[Given], describe: Describe) -> Needs:
    """Add the keys that subqueries in the values, in RETURNING or in ON CONFLICT need, each beside its row's."""
    listed = [_row_values(row) for group in statement._multi_values for row in group]
    common = _inner_keys(_common_values(statement), sets, describe)
    own = [_inner_keys(values, sets, describe) for values in listed]
    found = [inner for inner in (common, *own) if inner is not None]
    if not found:
        return needs
    keys = dict.fromkeys(needs.keys)
    tables = dict.fromkeys(needs.tables)
    for inner in found:
        keys.update(dict.fromkeys(key for each in inner.keys for key in each))
        tables.update(dict.fromkeys(inner.tables))
    together: dict[tuple[bytes, ...], None] = {}
    for key, positions in (needs.per_key_rows or {}).items():
        for position in positions:
            mine = [key]
            for beside in (common, own[position] if listed else None):
                if beside is not None:
                    mine += beside.keys[0 if listed else position]
            together[tuple(dict.fromkeys(mine))] = None
    why = "a subquery in the values of an INSERT"
    calls = tuple(dict.fromkeys((*needs.calls, *(name for inner in found for name in inner.calls))))
    return Needs(Scope.KEYED, tuple(keys), True, tuple(tables), why, needs.per_key_rows, tuple(together), calls)


@dataclass(frozen=True, slots=True)
class _Inner:
    """What subqueries need: their keys for each set of parameters, their tables, and `Needs.calls`."""

    keys: tuple[tuple[bytes, ...], ...]
    tables: tuple[Table, ...]
    calls: tuple[str, ...]


def _common_values(statement: Insert) -> list[Any]:
    values: list[Any] = [*(statement._values or {}).values(), *statement._returning]
    clause = statement._post_values_clause
    if clause is not None:
        for element in walk((clause,)):
            if isinstance(element, OnConflictDoUpdate):
                values += element.update_values_to_set.values()
                values.append(element.update_whereclause)
    return values


def _inner_keys(values: Iterable[Any], sets: Sequence[Given], describe: Describe) -> _Inner | None:
    found = [v for v in values if isinstance(v, ClauseElement) and next(inside((v,)), None) is not None]
    if not found:
        return None
    rows: Select[Any] = select(literal_column("1")).where(
        *(value.is_(None) for value in found if hasattr(value, "is_"))
    )
    plan, own = plan_of(rows, None, describe, lambda: rows)
    if plan.keys is None or plan.raw or plan.writes:
        raise UnsupportedCrossShardQuery(
            "a subquery in an INSERT has no shard key",
            "give it one in its condition, or read the value first",
        )
    if not plan.tables:
        return None
    keys = tuple(keys_of(plan.keys, Supplied((), {**own, **given})) for given in sets or ({},))
    return _Inner(keys, plan.tables, plan.calls)


def _row_values(row: Any) -> Sequence[Any]:
    return tuple(row.values()) if isinstance(row, Mapping) else tuple(row)


def _from_select(statement: Insert, target: Target, given: Given, describe: Describe) -> Needs:
    """INSERT ... SELECT: what is inserted must have keys that follow from constants, and so must what is read."""
    names = list(statement._select_names or ())
    places: list[int] = []
    for position, column in enumerate(target.columns):
        found = [i for i, name in enumerate(names) if name in target.names[position]]
        if not found:
            raise ShardKeyRequired(
                f"INSERT from SELECT leaves out the shard key '{target.table.fullname}.{column.key}'",
                GIVE_VALUE,
            )
        places.append(found[0])
    source: Any = statement.select
    plan, own = plan_of(
        source, None, describe, lambda: source, extra=inserted_from(target.table, target.key, tuple(places))
    )
    if plan.raw or plan.writes or plan.keys is None or plan.extra is None:
        raise ShardKeyRequired(
            f"INSERT into {target.table.fullname!r} from a SELECT that is not bound to a shard key",
            "give the key in the SELECT's condition and select it, or read the rows and insert them",
        )
    supplied = Supplied((), {**own, **given})
    plans: tuple[KeyPlan, ...] = (plan.extra, *plan.keys)
    tables = tuple(dict.fromkeys((target.table, *plan.tables)))
    return Needs(Scope.KEYED, keys_of(plans, supplied), True, tables, "INSERT from SELECT", calls=plan.calls)
