"""Why the rows of several shards, put together, are not yet the answer."""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.dialects.postgresql.ext import DistinctOnClause
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    AbstractTextClause,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    ElementList,
    FunctionFilter,
    Grouping,
    Label,
    Over,
    TextClause,
    UnaryExpression,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CompoundSelect, FromClause, Select, SelectBase

from shardlib.errors import UnsupportedOperation
from shardlib.route.env import Classes, Instance, Node
from shardlib.route.functions import AGGREGATES, known

__all__ = ["aggregates", "check_on", "cuts_rows", "expressions_of", "inside", "merge_of", "row_order", "walk"]

_EXTENSION_POINTS = ("_post_select_clause", "_pre_columns_clause", "_post_criteria_clause", "_post_body_clause")
_FRAGMENT = re.compile(
    r"\b(select|from|table|values|with|or|union|except|intersect|insert|update|delete)\b|;|--|/\*", re.IGNORECASE
)

_CUTS = re.compile(
    r"\b(distinct|limit|offset|fetch|order|group|having|over|window|within|filter|rollup|cube|grouping)\b",
    re.IGNORECASE,
)
"""Words of a text fragment that may turn the rows of a SELECT into others, or cut them."""

_PERHAPS = "a function that may be an aggregate"


def _check_text(text: str) -> None:
    """A text fragment is not understood; only one that cannot read a table or loosen a condition may pass."""
    found = _FRAGMENT.search(text)
    if found is not None:
        raise UnsupportedOperation(
            f"the text fragment {text[:60]!r} holds {found[0]!r}, so what it touches cannot be told",
            "write it with SQLAlchemy's expressions, or run it in a session pinned to a shard key: engine.session(key)",
        )


def expressions_of(select: Select[Any]) -> Iterator[ClauseElement]:
    """Yield every expression of a SELECT outside of its FROM list."""
    # A table or subquery among the columns stands for its columns; it is in the FROM list as well.
    yield from (column for column in select._raw_columns if _is_expression(column))
    yield from select._where_criteria
    yield from select._having_criteria
    yield from select._order_by_clauses
    yield from select._group_by_clauses
    yield from select._distinct_on
    for clause in (select._limit_clause, select._offset_clause, select._fetch_clause):
        if clause is not None:
            yield clause
    for extension in _extensions(select):
        if not isinstance(extension, DistinctOnClause):
            raise UnsupportedOperation(
                f"the syntax extension {type(extension).__name__} is not understood",
                "run the statement in a session pinned to a shard key: engine.session(key)",
            )
        yield extension
    for fragment, _ in (*select._prefixes, *select._suffixes):
        yield fragment
    for hint in _hints(select):
        _check_text(hint)


def _hints(select: Select[Any]) -> Iterator[str]:
    yield from select._hints.values()
    yield from (text for _, text in select._statement_hints)


def _is_expression(column: Any) -> bool:
    return isinstance(column, ColumnElement) or not isinstance(column, FromClause)


def _extensions(select: Select[Any]) -> Iterator[ClauseElement]:
    """Clauses added with `Select.ext()`."""
    for name in _EXTENSION_POINTS:
        clause = getattr(select, name)
        if isinstance(clause, ElementList):
            yield from clause.clauses
        elif clause is not None:
            yield clause


def _distinct_on(select: Select[Any]) -> bool:
    return bool(select._distinct_on) or any(isinstance(c, DistinctOnClause) for c in _extensions(select))


def check_on(clause: ClauseElement) -> None:
    """See that text in an ON clause, which may stand at the end of a statement, adds no clause of its own.

    Raises:
        UnsupportedOperation: it may.
    """
    for element in walk((clause,)):
        if isinstance(element, TextClause) and (found := _CUTS.search(element.text)) is not None:
            raise UnsupportedOperation(
                f"the text fragment {element.text[:60]!r} of an ON clause holds {found[0]!r}, which may belong to the "
                "statement around it",
                "write it with SQLAlchemy's expressions, or run it in a session pinned to a shard key: "
                "engine.session(key)",
            )


def inside(expressions: Iterable[ClauseElement]) -> Iterator[SelectBase]:
    """Walk expressions and yield the outermost subqueries.

    Raises:
        UnsupportedOperation: a text fragment that could touch anything.
    """
    for element in walk(expressions):
        if isinstance(element, SelectBase):
            yield element
        elif isinstance(element, TextClause):
            _check_text(element.text)
        elif isinstance(element, AbstractTextClause):
            _check_text(f"select {type(element).__name__}")
        elif isinstance(element, ColumnClause) and element.is_literal:
            _check_text(element.name)


def walk(expressions: Iterable[ClauseElement]) -> Iterator[ClauseElement]:
    """Every element of some expressions, in order, not looking into subqueries or tables."""
    todo: list[Any] = list(expressions)[::-1]
    while todo:
        element = todo.pop()
        yield element
        if not isinstance(element, SelectBase | ColumnClause):
            todo.extend(reversed(list(element.get_children())))


def _functions(select: Select[Any]) -> Iterator[str]:
    """What may turn rows into fewer, or look across them: a reason for each."""
    columns = (column for column in select._raw_columns if _is_expression(column))
    for element in walk((*columns, *select._having_criteria, *select._order_by_clauses)):
        if isinstance(element, Over):
            yield "a window function"
        elif isinstance(element, FunctionFilter | WithinGroup | aggregate_order_by):
            yield "an aggregate"
        elif isinstance(element, FunctionElement):
            name = str(getattr(element, "name", type(element).__name__)).lower()
            if name in AGGREGATES:
                yield f"the aggregate {name}()"
            elif not known(element):
                yield _PERHAPS
        elif isinstance(element, TextClause) and "(" in element.text:
            yield "a text fragment with a call (it may be an aggregate)"
        elif isinstance(element, ColumnClause) and element.is_literal and "(" in element.name:
            yield "a literal column with a call (it may be an aggregate)"


def _not_seen_through(select: Select[Any]) -> str | None:
    """Return what of a SELECT may turn its rows into others, or cut them, where SQLAlchemy does not say so."""
    for column in select._raw_columns:
        shown: Any = column
        while isinstance(shown, Label | Grouping):
            shown = shown.element
        if isinstance(shown, UnaryExpression) and shown.operator is operators.distinct_op:
            return "DISTINCT"
        if isinstance(shown, FunctionElement) and str(getattr(shown, "name", "")).lower() == "distinct":
            return "DISTINCT"  # func.distinct(x) is no function to PostgreSQL
    texts = list(_hints(select))
    for element in walk(expressions_of(select)):
        if isinstance(element, TextClause):
            texts.append(element.text)
        elif isinstance(element, ColumnClause) and element.is_literal:
            texts.append(element.name)
        elif _renders_itself(type(element)):
            return f"the element {type(element).__name__} of the application (it may be an aggregate)"
    found = next((word for text in texts if (word := _CUTS.search(text)) is not None), None)
    return None if found is None else f"a text fragment with {found[0].upper()}"


def _renders_itself(kind: type[ClauseElement]) -> bool:
    """Whether a class of elements is the application's own, and compiled by a function of its own (`@compiles`)."""
    return any(
        ("_compiler_dispatcher" in vars(base) or "__visit_name__" in vars(base))
        and not base.__module__.startswith("sqlalchemy.")
        for base in kind.__mro__
    )


def row_order(select: Select[Any] | CompoundSelect[Any]) -> str | None:
    """Return why a statement's own order or cut needs a merge."""
    if select._limit_clause is not None or select._fetch_clause is not None:
        return "LIMIT"
    if select._offset_clause is not None:
        return "OFFSET"
    return "ORDER BY" if len(select._order_by_clauses) else None


def cuts_rows(select: Select[Any]) -> bool:
    """Whether a condition on the output of a subquery cannot be put inside of it."""
    if row_order(select) in {"LIMIT", "OFFSET"} or _distinct_on(select) or _not_seen_through(select):
        return True
    if "a window function" in _functions(select):
        return True
    return not select._group_by_clauses and aggregates(select)


def aggregates(select: Select[Any]) -> bool:
    """Whether a SELECT may make one row of all, even of none, when it has no GROUP BY."""
    reasons = set(_functions(select)) - {"a window function"}
    return bool(reasons) or bool(select._having_criteria) or _not_seen_through(select) is not None


def merge_of(  # noqa: PLR0911 - one return a reason
    select: Select[Any],
    classes: Classes,
    anchor: Instance | None,
    node_of: Callable[[ClauseElement], Node | None],
    *,
    top: bool,
) -> str | None:
    """Return why the shards' rows of a SELECT cannot be put together, or None when they can.

    Groups (and distinct rows) that hold the shard key live on one shard each, so their aggregates are right there.

    Args:
        select: as rendered.
        classes: equal columns in it.
        anchor: an instance of a sharded table whose key every row has; None when no column shows it.
        node_of: resolves its columns.
        top: whether the order of the rows reaches the reader.
    """
    order = row_order(select)
    if order is not None and (top or order != "ORDER BY"):
        return order
    key = {classes.find(node) for node in anchor.nodes} if anchor is not None else None

    def holds_key(columns: Iterable[ClauseElement]) -> bool:
        plain = (column.element if isinstance(column, Label) else column for column in columns)
        return key is not None and key <= {
            classes.find(node) for column in plain if (node := node_of(column)) is not None
        }

    if _distinct_on(select):
        return "DISTINCT ON"
    if (unseen := _not_seen_through(select)) is not None:
        return unseen
    if select._distinct and not holds_key(select.selected_columns):
        return "DISTINCT"
    if select._group_by_clauses:
        if not holds_key(select._group_by_clauses):
            return "GROUP BY"
        return "a window function" if "a window function" in _functions(select) else None
    if select._having_criteria:
        return "HAVING"
    return next((why for why in _functions(select) if why != _PERHAPS), None)  # `Needs.calls` tells of the others
