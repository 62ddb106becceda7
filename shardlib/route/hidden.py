"""Leaving out rows that a shard holds but does not own: what a statement without one key reads while rows move.

A job's key table on a shard, `shardlib.job_7_keys (k, more)`, names the keys whose rows there are hidden: copies that
arrive before the switch, old ones that stay after it. The compiler below renders a statement as SQLAlchemy's does,
and adds `NOT EXISTS (SELECT FROM shardlib.job_7_keys ...)` for each occurrence of a sharded table: to the WHERE where
the table's rows are joined plainly, and to the ON of an outer join whose nullable side it is on, since there a row
left out must become NULLs. PostgreSQL plans both as anti-joins, and the tables stay what they are (for FOR UPDATE, a
GROUP BY of the primary key, system columns). Only the sides of a FULL JOIN, which no condition makes smaller, are
read through a subselect.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Boolean, ColumnElement, Table, and_
from sqlalchemy.dialects.postgresql.psycopg import PGCompiler_psycopg
from sqlalchemy.sql.dml import Delete, Update
from sqlalchemy.sql.elements import _truncated_label
from sqlalchemy.sql.selectable import AliasedReturnsRows, FromClause, FromGrouping, Join, Select

from shardlib.errors import ShardKeyRequired, UnsupportedOperation
from shardlib.key import describe
from shardlib.key.columns import type_name
from shardlib.key.sql import key_text

__all__ = ["OwnedOnlyCompiler"]

_Write = TypeVar("_Write", Update, Delete)

_BYTES: Final = 'COLLATE pg_catalog."default"'
"""Keys are told apart by their bytes, also where a column's own collation takes two as equal: that of a database never
does, and the key table's index is by it."""


class _Owned(ColumnElement[bool]):
    """The condition that a row of a table is none of those hidden on this shard. Made and rendered in one compilation.

    Args:
        columns: those of the shard key, of the table or alias meant, in the order of the key.
    """

    __visit_name__ = "shardlib_owned"
    inherit_cache = False
    type = Boolean()

    def __init__(self, columns: Sequence[ColumnElement[Any]]) -> None:
        self.columns = columns


class _Subselect(FromGrouping[Any]):
    """A table or alias that is read through a subselect with the condition."""

    __visit_name__ = "shardlib_subselect"
    inherit_cache = False

    def __init__(self, element: FromClause, owned: _Owned) -> None:
        super().__init__(element)
        self.owned = owned


class OwnedOnlyCompiler(PGCompiler_psycopg):
    """SQLAlchemy's compiler for psycopg; what it renders sees and changes only rows that the shard owns.

    The dialect's `hidden_jobs` are the jobs whose rows are left out. An INSERT of rows is rendered as ever.
    """

    # -- where the condition goes --------------------------------------------------------------------------------

    def _compose_select_body(
        self, text: str, select: Select[Any], compile_state: Any, inner_columns: Any, froms: Sequence[FromClause],
        *args: Any,
    ) -> str:  # fmt: skip
        # With the FROM list as it is rendered here, after correlation.
        where: list[_Owned] = []
        froms = [_owned_in(source, where) for source in froms]
        if where:
            select = select.where(*where)
        return super()._compose_select_body(text, select, compile_state, inner_columns, froms, *args)  # type: ignore[no-any-return,no-untyped-call]

    def visit_update(self, update_stmt: Update, *args: Any, **kw: Any) -> str:
        """Leave out rows of the target that are hidden."""
        return super().visit_update(_owned_target(update_stmt), *args, **kw)

    def visit_delete(self, delete_stmt: Delete, *args: Any, **kw: Any) -> str:
        """Leave out rows of the target that are hidden."""
        return super().visit_delete(_owned_target(delete_stmt), *args, **kw)  # type: ignore[no-any-return,no-untyped-call]

    def update_from_clause(
        self, update_stmt: Update, from_table: Any, extra_froms: Sequence[FromClause], *args: Any, **kw: Any
    ) -> str:
        """Leave out rows of the other tables that are hidden."""
        extra_froms = _owned_beside(update_stmt, extra_froms)
        return super().update_from_clause(update_stmt, from_table, extra_froms, *args, **kw)  # type: ignore[no-any-return,no-untyped-call]

    def delete_extra_from_clause(
        self, delete_stmt: Delete, from_table: Any, extra_froms: Sequence[FromClause], *args: Any, **kw: Any
    ) -> str:
        """Leave out rows of the other tables that are hidden."""
        extra_froms = _owned_beside(delete_stmt, extra_froms)
        return super().delete_extra_from_clause(delete_stmt, from_table, extra_froms, *args, **kw)  # type: ignore[no-any-return,no-untyped-call]

    # -- how it is rendered --------------------------------------------------------------------------------------

    def visit_shardlib_owned(self, owned: _Owned, **kw: Any) -> str:
        """Render the condition, on each key table."""
        dialect: Any = self.dialect
        kw["include_table"] = True
        first, *others = (
            f"({key_text(self.process(column, **kw), type_name(column.type))})::text" for column in owned.columns
        )
        more = f"ARRAY[{', '.join(others)}] {_BYTES}" if others else "'{}'::text[]"
        return " AND ".join(
            f"NOT EXISTS (SELECT FROM shardlib.job_{job:d}_keys AS shardlib_{job:d} "
            f"WHERE shardlib_{job:d}.k = {first} {_BYTES} AND shardlib_{job:d}.more = {more})"
            for job in dialect.hidden_jobs
        )

    def visit_shardlib_subselect(self, subselect: _Subselect, **kw: Any) -> str:
        """Render a side of a FULL JOIN."""
        source: Any = subselect.element
        name = source.name
        if isinstance(source, Table):
            if self.preparer.schema_for_object(source):
                raise UnsupportedOperation(
                    f"while rows of {source.fullname!r} move, it cannot take part in a FULL JOIN by its name",
                    "give it another one: aliased(), or table.alias()",
                )
        elif isinstance(name, _truncated_label):
            name = self._truncated_identifier("alias", name)
        inner = source._compiler_dispatch(self, **{**kw, "asfrom": True})
        condition = self.process(subselect.owned)
        return f"(SELECT * FROM {inner} WHERE {condition}) AS {self.preparer.quote(name)}"


def _owned_in(source: FromClause, into: list[_Owned] | None) -> FromClause:
    """A part of a FROM list as it must be rendered; conditions on its rows are added to `into`.

    Args:
        source: a table, an alias, a join, or anything else, which is left as it is.
        into: conditions of the WHERE, or of the ON of the outer join whose nullable side this is; None under a
            FULL JOIN.
    """
    if isinstance(source, Join):
        on: list[_Owned] = []
        if source.full:
            left_into = right_into = None
        elif source.isouter:
            left_into, right_into = into, on
        else:
            left_into = right_into = on if into is None else into
        left, right = _owned_in(source.left, left_into), _owned_in(source.right, right_into)
        if left is source.left and right is source.right and not on:
            return source
        onclause: Any = source.onclause
        return Join(left, right, and_(onclause, *on), isouter=source.isouter, full=source.full)
    if isinstance(source, FromGrouping):
        inner = _owned_in(source.element, into)
        return source if inner is source.element else FromGrouping(inner)
    owned = _owned(source)
    if owned is None:
        return source
    if into is None:
        return _Subselect(source, owned)
    into.append(owned)
    return source


def _owned_target(statement: _Write) -> _Write:
    """An UPDATE or DELETE that leaves out rows of its target. Always a copy: `_owned_beside` adds to it."""
    owned = _owned(statement.table)
    return statement._generate() if owned is None else statement.where(owned)


def _owned_beside(statement: Update | Delete, froms: Sequence[FromClause]) -> list[FromClause]:
    """The other tables of a write. Their conditions go to its WHERE, which SQLAlchemy renders after them."""
    where: list[_Owned] = []
    shown = [_owned_in(source, where) for source in froms]
    statement._where_criteria += tuple(where)
    return shown


def _owned(source: Any) -> _Owned | None:
    """The condition for a sharded table, or an alias or sample of one; None for anything else."""
    table = source
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    if not isinstance(table, Table):
        return None
    plain: Any = table._deannotate() if table._annotations else table
    try:
        spec = describe(plain)
    except ShardKeyRequired:  # a system table, which only a pinned session may read
        return None
    return None if spec.reference else _Owned([source.c[key] for key in spec.column_keys])
