"""What a condition says about columns and constants.

Only what is certain becomes a fact: conjuncts of the form column = column, column = value, column IN values (also
for tuples of columns), an OR whose every branch fixes the same columns, and column IN (SELECT column ...). All else
says nothing, which is safe: fewer facts mean more shards or a refusal, never a missing row.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.sql import operators, sqltypes
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Cast,
    ClauseElement,
    ClauseList,
    CollectionAggregate,
    Grouping,
    Null,
    Tuple,
    TypeCoerce,
)
from sqlalchemy.sql.selectable import ScalarSelect, SelectBase
from sqlalchemy.sql.type_api import TypeDecorator, TypeEngine

from shardlib.route.env import Env, Node
from shardlib.route.trace import Trace
from shardlib.route.values import (
    AllOf,
    AnyOf,
    Atom,
    Converted,
    Fixed,
    Formula,
    Listed,
    One,
    Parameter,
    Rows,
    Value,
)

__all__ = ["Predicates", "bare", "comparable", "same_transform"]

_TRANSFORMS = (TypeDecorator, sqltypes.Enum)
"""Types that store something else than the value given."""

_PADDED = (sqltypes.CHAR, sqltypes.NCHAR)
"""Types whose comparison takes no notice of blanks at the end: equal values may have different texts."""

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

NodeOf = Callable[[ClauseElement], Node | None]
OnSelect = Callable[[SelectBase, tuple[Node, ...], tuple[TypeEngine[Any], ...]], None]


def bare(element: ClauseElement) -> ClauseElement:
    """Strip parentheses."""
    inner: ClauseElement = element
    while isinstance(inner, Grouping):
        grouped: Any = inner.element
        inner = grouped
    return inner


def comparable(one: TypeEngine[Any], other: TypeEngine[Any]) -> bool:
    """Whether equal values of two column types have the same text, hence the same key bytes."""
    if isinstance(one, _TRANSFORMS) or isinstance(other, _TRANSFORMS):
        mark = one._static_cache_key
        return one is other or (isinstance(mark, tuple) and mark == other._static_cache_key)
    if one._type_affinity is not other._type_affinity:
        return False
    if isinstance(one, _PADDED) or isinstance(other, _PADDED):
        return False
    if isinstance(one, sqltypes.Numeric) and isinstance(other, sqltypes.Numeric):
        return (one.precision, one.scale) == (other.precision, other.scale)
    if isinstance(one, sqltypes.DateTime) and isinstance(other, sqltypes.DateTime):
        return one.timezone == other.timezone
    folds = [type(t).__name__ == "CITEXT" for t in (one, other)]
    return folds[0] == folds[1]


class Predicates:
    """Reads conditions of one statement into environments.

    `node_of` resolves a column in the scope at hand; `on_select` is told of `column IN (SELECT ...)` conjuncts,
    before the subquery itself is read.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def read(
        self,
        clauses: Iterable[ClauseElement],
        env: Env,
        node_of: NodeOf,
        on_select: OnSelect,
    ) -> None:
        """Add to an environment the facts that hold when all the clauses do."""
        for clause in clauses:
            self._conjunct(bare(clause), env, node_of, on_select)

    def _conjunct(
        self,
        clause: ClauseElement,
        env: Env,
        node_of: NodeOf,
        on_select: OnSelect,
    ) -> None:
        if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
            self.read(clause.clauses, env, node_of, on_select)
            return
        if isinstance(clause, BinaryExpression):
            left, right = bare(clause.left), bare(clause.right)
            if clause.operator is operators.eq:
                for a, b in _pairs(left, right):
                    self._equal_nodes(a, b, env, node_of)
            elif clause.operator is operators.in_op:
                nodes = _nodes(left, node_of)
                inner = right.element if isinstance(right, ScalarSelect) else right
                if nodes is not None and isinstance(inner, SelectBase):
                    items = left.clauses if isinstance(left, Tuple) else (left,)
                    on_select(inner, nodes, tuple(_type_of(bare(item)) for item in items))
        formula = self.formula(clause, env, node_of)
        if formula is not None:
            env.formulas.append(formula)

    @staticmethod
    def _equal_nodes(left: ClauseElement, right: ClauseElement, env: Env, node_of: NodeOf) -> None:
        a, b = node_of(left), node_of(right)
        if a is not None and b is not None and comparable(_type_of(left), _type_of(right)):
            env.equal.append((a, b))

    def formula(  # noqa: PLR0911 - one return a form of condition
        self, clause: ClauseElement, env: Env, node_of: NodeOf
    ) -> Formula | None:
        """Return what a condition says about constants; None when nothing."""
        clause = bare(clause)
        if isinstance(clause, BooleanClauseList):
            parts = [self.formula(part, env, node_of) for part in clause.clauses]
            known = tuple(part for part in parts if part is not None)
            if clause.operator is operators.and_:
                return AllOf(known) if known else None
            if clause.operator is operators.or_ and len(known) == len(parts):
                return AnyOf(known)
            return None
        if not isinstance(clause, BinaryExpression):
            return None
        left, right = bare(clause.left), bare(clause.right)
        if clause.operator is operators.eq:
            return self._equal_value(left, right, node_of) or self._equal_value(right, left, node_of)
        if clause.operator is operators.in_op:
            return self._in(left, right, node_of)
        if clause.operator is operators.is_ and isinstance(right, Null):
            return _is_null(left, env, node_of)
        return None

    def _equal_value(self, left: ClauseElement, right: ClauseElement, node_of: NodeOf) -> Formula | None:
        nodes = _nodes(left, node_of)
        if nodes is None:
            return None
        if isinstance(right, CollectionAggregate) and right.operator is operators.any_op and len(nodes) == 1:
            element = bare(right.element)
            if isinstance(element, BindParameter) and not isinstance(_type_of(left), _TRANSFORMS):
                return Atom(nodes, Listed(self._parameter(element), 1))
            return None
        row = self._row(right, len(nodes)) if self._fits(left, right) else None
        return None if row is None else Atom(nodes, One((row,)))

    def _in(self, left: ClauseElement, right: ClauseElement, node_of: NodeOf) -> Formula | None:
        nodes = _nodes(left, node_of)
        if nodes is None:
            return None
        source: Rows | None = None
        if isinstance(right, BindParameter):
            if not self._fits(left, right):
                return None
            source = Listed(self._parameter(right), len(nodes) if isinstance(left, Tuple) else 1)
        elif isinstance(right, ClauseList):
            rows = [self._row(bare(item), len(nodes)) for item in right.clauses]
            known = tuple(row for row, i in zip(rows, right.clauses, strict=True) if row and self._fits(left, bare(i)))
            source = One(known) if len(known) == len(rows) else None
        return None if source is None else Atom(nodes, source)

    def _row(self, element: ClauseElement, width: int) -> tuple[Value, ...] | None:
        items: Sequence[ClauseElement] = element.clauses if isinstance(element, Tuple) else (element,)
        values = tuple(value for item in items if (value := self.value(item)) is not None)
        return values if len(values) == len(items) == width else None

    def _fits(self, left: ClauseElement, right: ClauseElement) -> bool:
        """Whether a value reaches the database as it would for the column: through the same transformation."""
        columns: Sequence[ClauseElement] = left.clauses if isinstance(left, Tuple) else (left,)
        items: Sequence[ClauseElement] = right.clauses if isinstance(right, Tuple) else (right,)
        if len(columns) != len(items):
            return not any(isinstance(_type_of(column), _TRANSFORMS) for column in columns)
        return all(same_transform(_type_of(c), _type_of(bare(i))) for c, i in zip(columns, items, strict=True))

    def value(self, element: ClauseElement) -> Value | None:
        """Return where an expression's value comes from, or None when only the database knows it."""
        element = bare(element)
        if isinstance(element, BindParameter):
            return None if element.expanding else self._parameter(element)
        if isinstance(element, Null):
            return Fixed(None)
        if isinstance(element, TypeCoerce):
            return self.value(element.clause)
        if isinstance(element, Cast):
            convert = _conversion(element.type)
            value = self.value(element.clause)
            return None if convert is None or value is None else Converted(value, convert)
        return None

    def _parameter(self, parameter: BindParameter[Any]) -> Parameter:
        return Parameter(parameter, self._trace.index_of(parameter))


def _type_of(element: ClauseElement) -> TypeEngine[Any]:
    kind: TypeEngine[Any] = getattr(element, "type", sqltypes.NULLTYPE)
    return kind


def same_transform(column: TypeEngine[Any], value: TypeEngine[Any]) -> bool:
    """Whether a value of one type reaches the database as it would in a column of the other."""
    if isinstance(column, _TRANSFORMS) or isinstance(value, _TRANSFORMS):
        return comparable(column, value)
    return True  # the key's encoder takes values of the column's own type only


def _pairs(left: ClauseElement, right: ClauseElement) -> list[tuple[ClauseElement, ClauseElement]]:
    if isinstance(left, Tuple) and isinstance(right, Tuple) and len(left.clauses) == len(right.clauses):
        return [(bare(a), bare(b)) for a, b in zip(left.clauses, right.clauses, strict=True)]
    return [(left, right)]


def _nodes(element: ClauseElement, node_of: NodeOf) -> tuple[Node, ...] | None:
    items: Sequence[ClauseElement] = element.clauses if isinstance(element, Tuple) else (element,)
    nodes = [node_of(bare(item)) for item in items]
    known = tuple(node for node in nodes if node is not None)
    return known if len(known) == len(nodes) else None


def _is_null(element: ClauseElement, env: Env, node_of: NodeOf) -> Formula | None:
    node = node_of(element)
    if node is None or node[0].key is None or node[1] not in node[0].key.key_names:
        return None
    # A shard key is never NULL in a row; where the row itself may be absent (an outer join), IS NULL asks for that.
    return Atom((node,), One(())) if node[0].env.holds_in(env) else None


def _conversion(target: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """The conversion of CAST(value AS target), for the few that Python does exactly as PostgreSQL."""
    if isinstance(target, (sqltypes.Enum, TypeDecorator, *_PADDED)):
        return None
    if isinstance(target, sqltypes.String) and target.length is None:
        return _as_text
    if isinstance(target, sqltypes.Integer):
        return _as_integer
    if isinstance(target, sqltypes.Uuid):
        return _as_uuid
    return None


def _as_text(value: Any) -> Any:
    return str(value) if type(value) in {int, UUID} else value


def _as_integer(value: Any) -> Any:
    return int(value) if type(value) is str and value.isascii() and value.isdecimal() else value


def _as_uuid(value: Any) -> Any:
    return UUID(value) if type(value) is str and _UUID.fullmatch(value) else value
