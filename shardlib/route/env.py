"""Where an equality holds: environments of facts, and classes of columns that are equal in them.

A *node* is one column of one table instance (a table used twice is two instances). An *environment* stands for a set
of rows: those of a SELECT after its joins and WHERE, or those in which the nullable side of an outer join is not
NULL. A *fact* is an equality that holds for every row of its environment. The environment of a nullable side has the
one around it as its parent: whatever holds for all rows holds there too, while a fact from the ON clause of the
outer join holds only where that side is present.

Every fact is strict (it is never true of NULL), so a fact that names a column of a nullable side says that this side
is present, and the facts of that side hold as well. This is the usual simplification of an outer join whose NULL
rows are filtered away.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sqlalchemy import Table
from sqlalchemy.sql.selectable import FromClause

from shardlib.route.needs import TableKey
from shardlib.route.values import Formula, atoms_of

__all__ = ["Classes", "Env", "Instance", "Node"]


@dataclass(eq=False, slots=True)
class Instance:
    """One use of a table, subquery or function in a FROM list."""

    source: FromClause
    env: Env
    table: Table | None = None
    key: TableKey | None = None
    """Set for a sharded table only."""
    shows: dict[str, Node] = field(default_factory=dict)
    """For a subquery: the column inside that an output column is, row by row, NULL or not."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes of the shard key, in order."""
        return tuple((self, name) for name in self.key.key_names) if self.key is not None else ()


Node = tuple[Instance, str]


@dataclass(eq=False, slots=True)
class Env:
    """Facts that hold for a set of rows."""

    parent: Env | None = None
    equal: list[tuple[Node, Node]] = field(default_factory=list)
    formulas: list[Formula] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    """Subqueries that are present in each of its rows."""
    implied: list[Env] = field(default_factory=list)
    """Environments of the rows inside those subqueries that its own rows come from."""

    def holds_in(self, other: Env) -> bool:
        """Whether each row of the other environment is one of this one (is it `other` or around it)."""
        env: Env | None = other
        while env is not None:
            if env is self:
                return True
            env = env.parent
        return False

    def _around(self) -> Iterator[Env]:
        env: Env | None = self
        while env is not None:
            yield env
            env = env.parent

    def classes(self) -> Classes:
        """Close over the environments whose facts hold here, and put equal columns together."""
        seen: dict[Env, None] = dict.fromkeys(self._around())
        todo = list(seen)
        while todo:
            for env in todo.pop()._implies():
                for other in env._around():
                    if other not in seen:
                        seen[other] = None
                        todo.append(other)
        return Classes(seen)

    def _implies(self) -> Iterator[Env]:
        """Environments that hold because the facts here are strict: they name columns that are not NULL."""
        yield from self.implied
        named: list[Node] = [node for pair in self.equal for node in pair]
        named += [node for formula in self.formulas for atom in atoms_of(formula, certain=True) for node in atom.nodes]
        for node in named:
            inner: Node | None = node
            while inner is not None:
                yield inner[0].env
                inner = inner[0].shows.get(inner[1])


class Classes:
    """Columns that are equal in an environment: union-find over nodes."""

    def __init__(self, envs: Iterable[Env]) -> None:
        self._up: dict[Node, Node] = {}
        self.envs = tuple(envs)
        self.formulas: tuple[Formula, ...] = tuple(f for env in self.envs for f in env.formulas)
        for env in self.envs:
            for left, right in env.equal:
                self._up[self.find(left)] = self.find(right)
            for instance in env.instances:
                for name, inner in instance.shows.items():
                    self._up[self.find((instance, name))] = self.find(inner)

    def find(self, node: Node) -> Node:
        """Return the node that stands for all those equal to this one."""
        root = node
        while (up := self._up.get(root, root)) != root:
            root = up
        while node != root:
            self._up[node], node = root, self._up.get(node, root)
        return root

    def same_key(self, one: Instance, other: Instance) -> bool:
        """Whether two instances of sharded tables always meet with one key."""
        ours, theirs = one.nodes, other.nodes
        return len(ours) == len(theirs) and all(self.find(a) == self.find(b) for a, b in zip(ours, theirs, strict=True))
