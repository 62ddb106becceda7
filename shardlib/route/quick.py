"""The short way: a SELECT of one table whose condition gives the whole shard key by equality.

This is what `select(Order).where(Order.tenant_id == x)`, `Session.get`, a refresh and most lazy loads come to. Only
what is plainly so is taken; anything else is left to the full analysis.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper, RelationshipProperty
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, ClauseElement
from sqlalchemy.sql.selectable import Select
from sqlalchemy.sql.sqltypes import Enum
from sqlalchemy.types import TypeDecorator

from shardlib.route.needs import Describe, Needs, Scope, TableKey

__all__ = ["quick_key", "quick_needs"]

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

    __slots__ = ("columns", "encode", "positions", "tables", "width")

    def __init__(self, table: Table, key: TableKey) -> None:
        self.encode = key.encode
        self.tables = (table,)
        self.width = len(key.key_names)
        self.columns = frozenset(hash(column) for column in table.c)
        by_name = {column.name: column for column in table.c}
        self.positions = {hash(by_name[name]): index for index, name in enumerate(key.key_names)}


_SINGLES: WeakKeyDictionary[Table | Mapper[Any], tuple[ref[Describe], _Single | None]] = WeakKeyDictionary()
"""With what described them, held weakly: it holds an engine."""


def quick_needs(statement: Any, given: Mapping[str, Any], describe: Describe) -> Needs | None:
    """Return what a plain keyed SELECT needs, or None when the full analysis must look at it."""
    found = quick_key(statement, given, describe)
    return None if found is None else Needs(Scope.KEYED, (found[0],), False, found[1])


def quick_key(  # noqa: PLR0911 - each return leaves it to the full analysis
    statement: Any, given: Mapping[str, Any], describe: Describe
) -> tuple[bytes, tuple[Table, ...]] | None:
    """Return the key of a plain keyed SELECT and the table that it reads, or None for the full analysis."""
    if type(statement) is not Select:
        return None
    own = statement.__dict__
    if not (own.keys() <= _PLAIN) or own.get("_with_options") or own.get("_params") or own.get("_order_by"):
        return None
    # A lazy load adds one that keeps its reverse relationship lazy; the relationship is what it is kept under.
    hooks = own.get("_compile_state_funcs")
    if hooks and not all(isinstance(key, RelationshipProperty) for _, key in hooks):
        return None
    columns, criteria = own["_raw_columns"], own.get("_where_criteria")
    if len(columns) != 1 or not criteria:
        return None
    single = _single(columns[0], describe)
    if single is None:
        return None
    values: list[Any] = [_UNSET] * single.width
    for clause in criteria:
        if clause.__class__ is BinaryExpression:
            if not _take(clause, single, values, given):
                return None
            continue
        for part in _conjuncts(clause):
            if not _take(part, single, values, given):
                return None
    for value in values:
        if value is _UNSET or value is None:
            return None
    return single.encode(tuple(values)), single.tables


_UNSET = object()


def _conjuncts(clause: ClauseElement) -> Sequence[ClauseElement]:
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        return clause.clauses
    return (clause,)


def _take(  # noqa: PLR0911 - each return leaves it to the full analysis
    clause: ClauseElement, single: _Single, values: list[Any], given: Mapping[str, Any]
) -> bool:
    """Take the value of a key column out of a conjunct; False when it is not a plain comparison."""
    if not isinstance(clause, BinaryExpression) or clause.operator not in _COMPARISONS:
        return False
    column, parameter = clause.left, clause.right
    if isinstance(column, BindParameter):
        column, parameter = parameter, column
    if not isinstance(parameter, BindParameter):
        return False
    its = hash(column)
    position = single.positions.get(its)
    if position is None:
        return its in single.columns
    if clause.operator is not operators.eq:
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
    if mapper is None:
        if column._annotations:
            return None
    elif not isinstance(mapper, Mapper):
        return None  # an alias
    read = column if mapper is None else mapper
    found = _SINGLES.get(read)
    if found is None or found[0]() is not describe:
        single = None
        table: Any = column if mapper is None else mapper.local_table if _is_plain(mapper) else None
        if isinstance(table, Table) and not table._annotations:
            key = describe(table)
            single = None if key.reference else _Single(table, key)
        found = _SINGLES[read] = (ref(describe), single)
    return found[1]


def _is_plain(mapper: Mapper[Any]) -> bool:
    """Whether a mapper reads its one table and nothing else, whatever its loaders do."""
    return (
        not mapper.inherits
        and mapper.polymorphic_on is None
        and isinstance(mapper.local_table, Table)
        and mapper.persist_selectable is mapper.local_table
        and not any(relationship.lazy in {"joined", False} for relationship in mapper.relationships)
        and all(isinstance(column, Column) for prop in mapper.column_attrs for column in prop.columns)
    )
