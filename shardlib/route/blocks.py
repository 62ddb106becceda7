"""Blocks: the table instances of a statement whose rows are joined, as `shape` builds them."""

# ruff: noqa: SLF001 - of its own class
from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy.sql.elements import ClauseElement, ColumnClause
from sqlalchemy.sql.selectable import FromClause

from shardlib.route.env import Env, Instance, Node
from shardlib.route.trace import Rendered

__all__ = ["Block", "Names"]


class Names:
    """The FROM lists that a column can refer to: the nearest first."""

    def __init__(self, outer: Names | None) -> None:
        self.outer = outer
        self._instances: dict[FromClause, Instance] = {}

    def add(self, source: FromClause, instance: Instance) -> None:
        """Make an instance visible. An annotated table or alias equals the plain one."""
        self._instances[source] = instance

    def node_of(self, element: ClauseElement) -> Node | None:
        """Return the node of a column, or None when it is not one of a visible instance."""
        if not isinstance(element, ColumnClause) or element.is_literal or element.table is None:
            return None
        names: Names | None = self
        while names is not None:
            instance = names._instances.get(element.table)
            if instance is not None:
                return instance, element.name if instance.table is not None else element.key
            names = names.outer
        return None


@dataclass(eq=False, slots=True)
class Block:
    """Instances whose rows are joined.

    Attributes:
        env: what holds for its rows.
        outer: for a correlated block, the one around it.
        name: how a message speaks of it.
        sharded: instances of sharded tables.
        nested: correlated blocks inside.
        units: blocks of their own in its FROM lists, each with the environment it stands in.
        selects: SELECTs of it whose rows are made in one go, with what each of them sees.
        parts: the SELECTs of a UNION or the like; then the block has no instances of its own.
        merge: why the shards' rows of the block cannot be put together, as far as its form tells.
    """

    env: Env
    outer: Block | None = None
    sharded: list[Instance] = field(default_factory=list)
    nested: list[Block] = field(default_factory=list)
    units: list[tuple[Block, Env]] = field(default_factory=list)
    selects: list[tuple[Rendered, Env, Names]] = field(default_factory=list)
    parts: list[Block] = field(default_factory=list)
    merge: str | None = None
