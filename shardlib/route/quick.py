"""The short way: a SELECT of one table whose condition gives the whole shard key by equality.

This is what `select(Order).where(Order.tenant_id == x)`, `Session.get`, a refresh and most lazy loads come to. Only
what is plainly so is taken; anything else is left to the full analysis.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper, RelationshipProperty
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, ClauseElement
from sqlalchemy.sql.selectable import Select
from sqlalchemy.sql.sqltypes import Enum
from sqlalchemy.types import TypeDecorator

from shardlib.route.needs import Describe, Needs, Scope, TableKey

__all__ = ["quick_needs"]

_PLAIN = frozenset(
    {
        "_raw_columns", "_where_criteria", "_propagate_attrs", "_label_style", "_compile_options", "_execution_options",
        "_generate_cache_key", "_with_options", "_params", "_is_clone_of", "_memoized_keys", "dialect_options",
        "_order_by", "_compile_state_funcs",
    }
)  # fmt: skip
"""Attributes of a SELECT that has neither joins nor order, groups, limits, CTEs or hints."""
_TRANSFORMS = (TypeDecorator, Enum)
"""Types that store something else than the value given; a value of another type is stored as it is."""
_COMPARISONS = frozenset({operators.eq, operators.ne, operators.lt, operators.le, operators.gt, operators.ge})


class _Single:
    """A table that can be read the short way: the columns by hash, which annotated columns share with plain ones."""

    __slots__ = ("columns", "key", "positions", "tables", "width")

    def __init__(self, table: Table, key: TableKey) -> None:
        self.key = key
        self.tables = (table,)
        self.width = len(key.key_names)
        self.columns = frozenset(hash(column) for column in table.c)
        by_name = {column.name: column for column in table.c}
        self.positions = {hash(by_name[name]): index for index, name in enumerate(key.key_names)}


_SINGLES: WeakKeyDictionary[Table, tuple[Describe, _Single | None]] = WeakKeyDictionary()
_MAPPERS: WeakKeyDictionary[Mapper[Any], bool] = WeakKeyDictionary()


def quick_needs(  # noqa: PLR0911 - each return leaves it to the full analysis
    statement: Any, given: Mapping[str, Any], describe: Describe
) -> Needs | None:
    """Return what a plain keyed SELECT needs, or None when the full analysis must look at it."""
    if type(statement) is not Select:
        return None
    own = statement.__dict__
    if not (own.keys() <= _PLAIN) or own.get("_with_options") or own.get("_params") or own.get("_order_by"):
        return None
    # A lazy load adds one that keeps its reverse relationship lazy; the relationship is what it is kept under.
    if not all(isinstance(key, RelationshipProperty) for _, key in own.get("_compile_state_funcs", ())):
        return None
    columns = own["_raw_columns"]
    if len(columns) != 1 or "_where_criteria" not in own:
        return None
    single = _single(columns[0], describe)
    if single is None:
        return None
    values: list[Any] = [_UNSET] * single.width
    for clause in _conjuncts(own["_where_criteria"]):
        if not _take(clause, single, values, given):
            return None
    if _UNSET in values or None in values:
        return None
    return Needs(Scope.KEYED, (single.key.encode(tuple(values)),), False, single.tables)


_UNSET = object()


def _conjuncts(clauses: tuple[ClauseElement, ...]) -> Iterator[ClauseElement]:
    for clause in clauses:
        if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
            yield from clause.clauses
        else:
            yield clause


def _take(  # noqa: PLR0911 - each return leaves it to the full analysis
    clause: ClauseElement, single: _Single, values: list[Any], given: Mapping[str, Any]
) -> bool:
    """Take the value of a key column out of a conjunct; False when it is not a plain comparison."""
    if not isinstance(clause, BinaryExpression) or clause.operator not in _COMPARISONS:
        return False
    column, parameter = clause.left, clause.right
    if isinstance(column, BindParameter):
        column, parameter = parameter, column
    if not isinstance(parameter, BindParameter) or hash(column) not in single.columns:
        return False
    position = single.positions.get(hash(column))
    if position is None or clause.operator is not operators.eq:
        return True
    if parameter.expanding or values[position] is not _UNSET:
        return False
    kind = parameter.type
    if kind is not column.type and (isinstance(kind, _TRANSFORMS) or isinstance(column.type, _TRANSFORMS)):
        return False
    if given:
        if parameter.key not in given:
            return False  # it may be given by its rendered name
        values[position] = given[parameter.key]
    elif parameter.required:
        return False
    else:
        values[position] = parameter.effective_value
    return True


def _single(column: Any, describe: Describe) -> _Single | None:
    """What is known of the table that a SELECT's only element is; None when it is something else."""
    if not isinstance(column, Table):
        return None
    mapper = column._annotations.get("parententity")
    if mapper is not None and not (isinstance(mapper, Mapper) and _plain_mapper(mapper)):
        return None
    table: Any = mapper.local_table if mapper is not None else column
    found = _SINGLES.get(table)
    if found is None or found[0] != describe:
        single = None
        if isinstance(table, Table) and not table._annotations:
            key = describe(table)
            single = None if key.reference else _Single(table, key)
        found = _SINGLES[table] = (describe, single)
    return found[1]


def _plain_mapper(mapper: Mapper[Any]) -> bool:
    """Whether a mapper reads its one table and nothing else, whatever its loaders do."""
    found = _MAPPERS.get(mapper)
    if found is None:
        found = _MAPPERS[mapper] = (
            not mapper.inherits
            and mapper.polymorphic_on is None
            and isinstance(mapper.local_table, Table)
            and mapper.persist_selectable is mapper.local_table
            and not any(relationship.lazy in {"joined", False} for relationship in mapper.relationships)
            and all(isinstance(column, Column) for prop in mapper.column_attrs for column in prop.columns)
        )
    return found
