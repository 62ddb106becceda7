"""The shape of a statement: which table instances meet, under which facts.

A *block* is a set of table instances whose rows are joined: a SELECT together with the subqueries in its FROM list
that only filter and group (their instances are counted as its own). A correlated subquery is a nested block: its
rows are looked at for one row of the block around it. A subquery in FROM that cuts or ranks rows (LIMIT, window
functions, DISTINCT ON, a plain aggregate, UNION) is a block of its own, a *unit*: conditions outside of it do not
reach into it.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import ClauseElement, Label
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    CTE,
    Alias,
    CompoundSelect,
    FromClause,
    FromGrouping,
    Join,
    Lateral,
    Select,
    SelectBase,
    SelectStatementGrouping,
    Subquery,
    TableClause,
    TableSample,
    TableValuedAlias,
    Values,
    _CompoundSelectKeyword,
)
from sqlalchemy.sql.type_api import TypeEngine

from shardlib.errors import UnsupportedOperation
from shardlib.route.blocks import Block, Names
from shardlib.route.env import Env, Instance, Node
from shardlib.route.merging import aggregates, check_on, cuts_rows, expressions_of, inside, row_order
from shardlib.route.needs import Describe
from shardlib.route.predicates import Predicates, comparable
from shardlib.route.trace import Trace

__all__ = ["Shape"]

_BLOCKS_MAX = 500
_SYSTEM_SCHEMAS = frozenset({"pg_catalog", "information_schema"})


@dataclass(frozen=True, slots=True)
class _Here:
    """Where the walk is: the block and environment that take what is found, the names in sight, the SELECT."""

    block: Block
    env: Env
    names: Names
    select: ClauseElement | None
    outside: Env | None
    """Environment of the rows around the block, which a subquery in FROM may still refer to."""


class Shape:
    """Walks the SELECTs of a trace and builds blocks, environments and facts."""

    def __init__(self, trace: Trace, describe: Describe) -> None:
        self._trace = trace
        self._describe = describe
        self.predicates = Predicates(trace)
        self.tables: dict[Table, None] = {}
        self.writes: dict[UpdateBase, None] = {}
        self.unknown: str | None = None
        """A system table, or one that is known by name only."""
        self._in: dict[int, tuple[tuple[Node, ...], tuple[TypeEngine[Any], ...]]] = {}
        self._carried: dict[CTE, tuple[dict[str, Node], Env | None]] = {}
        self._count = 0

    def top(self, statement: SelectBase) -> Block:
        """Build the block of a whole statement."""
        block = Block(Env())
        here = _Here(block, block.env, Names(None), None, None)
        self._unit(statement, here)
        return block

    # --- SELECTs -----------------------------------------------------------------------------------------------

    def _unit(self, statement: SelectBase, here: _Here) -> Names | None:
        """Fill a block whose rows are made by one statement; return the names inside, for a plain SELECT."""
        statement = _ungrouped(statement)
        if isinstance(statement, Select):
            return self._select(statement, here, standalone=True)
        if isinstance(statement, CompoundSelect):
            self._compound(statement, here)
            return None
        raise _not_understood(statement)

    def _compound(self, statement: CompoundSelect[Any], here: _Here) -> None:
        block = here.block
        block.merge = block.merge or _compound_merge(statement)
        self._with(statement)
        for part in statement.selects:
            inner = Block(Env(here.outside), outer=block.outer)
            block.parts.append(inner)
            self._unit(part, self._part(inner, statement, here))

    def _select(self, written: Select[Any], here: _Here, *, standalone: bool) -> Names:
        self._count += 1
        if self._count > _BLOCKS_MAX:
            raise UnsupportedOperation(
                f"the statement has more than {_BLOCKS_MAX} SELECTs",
                "run it in parts, or in a pinned session",
            )
        rendered = self._trace.rendered(written, here.select)
        names = here.names
        inside_here = _Here(here.block, here.env, names, rendered.select, here.outside)
        self._with(rendered.select)
        for source in rendered.froms:
            self._from(source, inside_here)
        self._read(rendered.select._where_criteria, inside_here)
        self._expressions(expressions_of(rendered.select), inside_here)
        if standalone:
            here.block.selects.append((rendered, here.env, names))
        return names

    def _with(self, statement: ClauseElement) -> None:
        for cte in getattr(statement, "_independent_ctes", ()):
            if isinstance(cte.element, UpdateBase):
                self.writes[cte.element] = None

    # --- FROM --------------------------------------------------------------------------------------------------

    def _from(self, source: FromClause, here: _Here) -> None:
        if isinstance(source, Join):
            self._join(source, here)
        elif isinstance(source, FromGrouping):
            self._from(source.element, here)
        elif isinstance(source, CTE):
            self._cte(source, here)
        elif isinstance(source, Lateral | Subquery) and isinstance(source.element, SelectBase):
            self._derived(source, source.element, here)
        elif isinstance(source, TableClause):
            self._table(source, source, here)
        elif isinstance(source, Alias | TableSample) and isinstance(source.element, FromClause):
            element: Any = source.element
            while isinstance(element, Alias | TableSample):
                element = element.element
            if isinstance(element, Subquery) and isinstance(element.element, SelectBase):
                self._derived(source, element.element, here)
                return
            if not isinstance(element, TableClause):
                raise _not_understood(source)
            self._table(source, element, here)
        elif isinstance(source, TableValuedAlias | FunctionElement | Values | Lateral):
            here.names.add(source, Instance(source, here.env))
            self._expressions((source.element,) if isinstance(source, Lateral) else (source,), here)
        else:
            raise _not_understood(source)

    def _table(self, source: FromClause, table: TableClause, here: _Here) -> None:
        instance = Instance(source, here.env)
        here.names.add(source, instance)
        if not isinstance(table, Table) or table.schema in _SYSTEM_SCHEMAS:
            self.unknown = table.fullname
            return
        plain: Table = table._deannotate(clone=False) if table._annotations else table
        instance.table = plain
        key = self._describe(plain)
        if not key.reference:
            instance.key = key
            here.block.sharded.append(instance)
            self.tables[plain] = None

    def _join(self, join: Join, here: _Here) -> None:
        left = right = on = here
        if join.full:
            # The ON clause holds only where both sides are present, which neither environment says.
            left, right, on = (_at(here, Env(here.env)) for _ in range(3))
        elif join.isouter:
            right = on = _at(here, Env(here.env))
        self._from(join.left, left)
        self._from(join.right, right)
        if join.onclause is not None:
            check_on(join.onclause)
            self._read((join.onclause,), on)
            self._expressions((join.onclause,), on)

    def _derived(self, source: FromClause, element: SelectBase, here: _Here) -> None:
        """A subquery in FROM: filtered from outside where that is the same, else a unit."""
        instance = Instance(source, here.env)
        here.names.add(source, instance)
        element = _ungrouped(element)
        opaque = not isinstance(element, Select) or cuts_rows(self._trace.rendered(element, here.select).select)
        if isinstance(source, Lateral):
            nested = Block(Env(here.env), outer=here.block)
            here.block.nested.append(nested)
            names = self._unit(element, _Here(nested, nested.env, Names(here.names), here.select, here.env))
            # A condition outside would reach through the link into the environment of the rows before the cut.
            if names is not None and not opaque:
                self._link(source, instance, names)
                here.env.implied.append(nested.env)
            return
        if opaque:
            unit = Block(Env(here.outside), outer=None)
            here.block.units.append((unit, here.env))
            names = self._unit(element, _Here(unit, unit.env, Names(here.names.outer), here.select, here.outside))
            if self._from_rows(element, here.select):
                here.env.implied.append(unit.env)
        else:
            inner = _Here(here.block, here.env, Names(here.names.outer), here.select, here.outside)
            names = self._unit(element, inner)
        if names is not None:
            self._link(source, instance, names)

    def _from_rows(self, element: SelectBase, parent: ClauseElement | None) -> bool:
        """Whether each row of a subquery comes from rows inside: not a plain aggregate, which is made even of none."""
        element = _ungrouped(element)
        if not isinstance(element, Select):
            return False
        rendered = self._trace.rendered(element, parent).select
        return bool(rendered._group_by_clauses) or not aggregates(rendered)

    def _link(self, source: FromClause, instance: Instance, names: Names) -> None:
        """Say that an output column of a subquery is the inner column it shows."""
        for column in source.c:
            inner = _shown(source, column)
            node = names.node_of(inner) if inner is not None else None
            if node is not None:
                instance.shows[column.key] = node
        instance.env.instances.append(instance)

    # --- CTEs --------------------------------------------------------------------------------------------------

    def _cte(self, cte: CTE, here: _Here) -> None:
        element: Any = cte.element
        carried = self._carried.get(_reference(cte))
        if carried is not None:  # the recursive part names the CTE it belongs to
            self._carry(cte, here, *carried)
        elif isinstance(element, UpdateBase):
            here.names.add(cte, Instance(cte, here.env))
            self.writes[element] = None
        elif cte.recursive and isinstance(element, CompoundSelect):
            self._recursive(cte, element, here)
        else:
            self._derived(cte, element, here)

    def _recursive(self, cte: CTE, statement: CompoundSelect[Any], here: _Here) -> None:
        """A recursive CTE: its first part, and further parts each bound to a row made before.

        A column is *carried* when each later part passes on the value that the first part gave it. By induction a
        carried column equals the first part's column along every chain of rows. Which columns are carried is found
        by assuming all and dropping those that are not, until nothing changes.
        """
        unit = Block(Env(here.outside), merge=_compound_merge(statement))
        here.block.units.append((unit, here.env))
        first, *later = statement.selects
        base = Block(Env(here.outside))
        names = self._unit(first, self._part(base, statement, here))
        base_env = base.env if self._from_rows(first, statement) else None
        keys = [column.key for column in cte.c]
        carried: dict[str, Node] = {}
        if names is not None:
            shown = self._outputs(first, statement, names)
            carried = {key: node for key, node in zip(keys, shown, strict=False) if node is not None}
        while True:
            parts, kept = [], dict(carried)
            self._carried[_reference(cte)] = carried, base_env
            for part in later:
                block = Block(Env(here.outside), outer=base)
                parts.append(block)
                names = self._unit(part, self._part(block, statement, here))
                shown = self._outputs(part, statement, names) if names is not None else []
                classes = block.env.classes()
                passed = {
                    key
                    for key, node in zip(keys, shown, strict=False)
                    if node is not None and key in kept and classes.find(node) == classes.find(kept[key])
                }
                kept = {key: node for key, node in kept.items() if key in passed}
            del self._carried[_reference(cte)]
            if kept == carried:
                break
            carried = kept
        unit.parts = [base, *parts]
        self._carry(cte, here, carried, base_env)

    @staticmethod
    def _carry(cte: CTE, here: _Here, carried: Mapping[str, Node], base: Env | None) -> None:
        instance = Instance(cte, here.env, shows=dict(carried))
        here.names.add(cte, instance)
        here.env.instances.append(instance)
        if base is not None:
            here.env.implied.append(base)

    @staticmethod
    def _part(block: Block, statement: ClauseElement, here: _Here) -> _Here:
        return _Here(block, block.env, Names(here.names.outer), statement, here.outside)

    def _outputs(self, part: SelectBase, parent: ClauseElement, names: Names) -> list[Node | None]:
        part = _ungrouped(part)
        if not isinstance(part, Select):
            return []
        select = self._trace.rendered(part, parent).select
        return [names.node_of(c.element if isinstance(c, Label) else c) for c in select.selected_columns]

    # --- conditions and expressions ----------------------------------------------------------------------------

    def _read(self, clauses: Iterable[ClauseElement], here: _Here) -> None:
        def on_select(inner: SelectBase, nodes: tuple[Node, ...], types: tuple[TypeEngine[Any], ...]) -> None:
            self._in[id(_ungrouped(inner))] = (nodes, types)

        self.predicates.read(clauses, here.env, here.names.node_of, on_select)

    def _expressions(self, expressions: Iterable[ClauseElement], here: _Here) -> None:
        """Walk expressions down to their subqueries, each a nested block."""
        for found in inside(expressions):
            self._nested(_ungrouped(found), here)

    def _nested(self, statement: SelectBase, here: _Here) -> None:
        nested = Block(Env(here.env), outer=here.block)
        here.block.nested.append(nested)
        inner = _Here(nested, nested.env, Names(here.names), here.select, here.env)
        if isinstance(statement, Select):
            equal = self._in.get(id(statement))
            names = self._select(statement, inner, standalone=False)
            rendered = self._trace.rendered(statement, here.select)
            if equal is not None and not cuts_rows(rendered.select):
                self._same(*equal, rendered.select, nested.env, names)
        else:
            self._unit(statement, inner)

    @staticmethod
    def _same(
        nodes: Sequence[Node], types: Sequence[TypeEngine[Any]], select: Select[Any], env: Env, names: Names
    ) -> None:
        """`nodes IN (SELECT columns ...)`: of the subquery only the rows equal to the nodes matter."""
        columns = [column.element if isinstance(column, Label) else column for column in select.selected_columns]
        if len(columns) != len(nodes):
            return
        for node, kind, column in zip(nodes, types, columns, strict=True):
            inner = names.node_of(column)
            if inner is not None and comparable(kind, column.type):
                env.equal.append((node, inner))


def _at(here: _Here, env: Env) -> _Here:
    return replace(here, env=env)


def _ungrouped(statement: SelectBase) -> SelectBase:
    while isinstance(statement, SelectStatementGrouping):
        statement = statement.element
    return statement


def _reference(cte: CTE) -> CTE:
    """The CTE that an alias, or a recursive restatement, stands for."""
    plain = cte._cte_alias if cte._cte_alias is not None else cte
    return plain._restates if plain._restates is not None else plain


def _shown(source: FromClause, column: ClauseElement) -> ClauseElement | None:
    """The expression inside a subquery that one of its output columns shows."""
    alias_of = source._cte_alias if isinstance(source, CTE) else None
    for _ in range(2 if alias_of is not None else 1):
        shown = getattr(column, "_proxies", None)
        if not shown:
            return None
        column = shown[0]
    return column.element if isinstance(column, Label) else column


def _compound_merge(statement: CompoundSelect[Any]) -> str | None:
    """Why the rows of a UNION or the like cannot be put together from the shards' (each part is judged apart)."""
    if statement.keyword is not _CompoundSelectKeyword.UNION_ALL:
        return str(statement.keyword.value)
    return row_order(statement)


def _not_understood(element: ClauseElement) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"this {type(element).__name__} in a statement cannot be routed",
        "run the statement in a session pinned to a shard key: engine.session(key)",
    )
