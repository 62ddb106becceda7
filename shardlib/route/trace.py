"""What SQLAlchemy will really send: every SELECT of a statement as the compiler renders it.

A statement as the application wrote it says little about the SQL: joins follow relationships, loader options add
joins, inheritance adds tables, subqueries correlate by rules of their own. So the statement is compiled once by
SQLAlchemy's PostgreSQL compiler, and each SELECT is noted together with the FROM list that was rendered for it. The
text is thrown away. It is done once for each structure of statement; see `extract`.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.dialects.postgresql.base import PGCompiler, PGDialect
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.selectable import FromClause, Select

from shardlib.errors import UnsupportedOperation

__all__ = ["Rendered", "Trace", "trace"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One SELECT: as written, as rendered, with its FROM list after correlation."""

    written: Select[Any]
    select: Select[Any]
    froms: tuple[FromClause, ...]


class _Tracer(PGCompiler):
    """The PostgreSQL compiler, noting each SELECT it renders."""

    noted: dict[tuple[int, int], list[Rendered]] | None = None
    """By (the enclosing rendered SELECT, the SELECT as written), both by identity; 0 at the top."""
    _written: Select[Any] | None = None

    def visit_select(self, select_stmt: Select[Any], *args: Any, **kwargs: Any) -> str:
        self._written = select_stmt
        return super().visit_select(select_stmt, *args, **kwargs)  # type: ignore[no-any-return,no-untyped-call]

    def _setup_select_stack(self, select: Select[Any], *args: Any) -> list[FromClause]:
        written = self._written if self._written is not None else select
        parent = id(self.stack[-1]["selectable"]) if self.stack else 0
        froms: list[FromClause] = super()._setup_select_stack(select, *args)  # type: ignore[no-untyped-call]
        if self.noted is None:  # compilation runs inside the base class's constructor
            self.noted = {}
        self.noted.setdefault((parent, id(written)), []).append(Rendered(written, select, tuple(froms)))
        return froms


_DIALECT = PGDialect()  # type: ignore[no-untyped-call]


class Trace:
    """The SELECTs of one statement, and how its parameters are found."""

    def __init__(self, compiler: _Tracer, cache_key: CacheKey | None) -> None:
        self._noted = compiler.noted or {}
        self._by_written: dict[int, list[Rendered]] = {}
        for (_, written), found in self._noted.items():
            self._by_written.setdefault(written, []).extend(found)
        self.keys = frozenset(parameter.key for parameter in compiler.bind_names)
        """Keys of the parameters: the names by which values can be given."""
        self.collected: dict[str, Any] = dict(compiler._collected_params) if cache_key is None else {}
        """Values given with `statement.params(...)`, where no cache key holds them."""
        self._index: dict[BindParameter[Any], int] = {}
        match = compiler._cache_key_bind_match
        if cache_key is not None and match is not None:
            for index, original in enumerate(cache_key.bindparams):
                for copy in match[0][original]:
                    self._index[copy] = index

    def rendered(self, written: Select[Any], parent: ClauseElement | None) -> Rendered:
        """Return how a SELECT was rendered inside another one, as rendered (None: at the top).

        Raises:
            UnsupportedOperation: it was rendered more than once with different FROM lists.
        """
        found = self._noted.get((id(parent) if parent is not None else 0, id(written)))
        if found is None:
            found = self._by_written.get(id(written), [])
        if not found or any(other.froms != found[0].froms for other in found[1:]):
            raise UnsupportedOperation(
                "one select() object is used at several places of a statement with different FROM lists",
                "write it twice, or correlate it explicitly with .correlate()",
            )
        return found[0]

    def selects(self) -> Iterator[ClauseElement]:
        """Every SELECT as rendered: with what relationships, loader options and inheritance add."""
        for found in self._noted.values():
            yield from (rendered.select for rendered in found)

    def index_of(self, parameter: BindParameter[Any]) -> int | None:
        """Position of a parameter among the cache key's, or None when its value belongs to the structure."""
        return self._index.get(parameter)


def trace(statement: ClauseElement, cache_key: CacheKey | None) -> Trace:
    """Compile a statement and return its SELECTs as rendered.

    Args:
        statement: a SELECT, a UNION or the like; compiled, never run.
        cache_key: the key under which the result will be kept; its parameters can then be found by position.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the statement does not compile; running it would raise the same.
    """
    return Trace(_Tracer(_DIALECT, statement, cache_key=cache_key), cache_key)
