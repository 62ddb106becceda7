"""From the shape of a statement to a plan: which keys to look up, or why it cannot be routed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql.elements import Label
from sqlalchemy.types import TypeDecorator

from shardlib.errors import UnsupportedCrossShardQuery
from shardlib.route.blocks import Block
from shardlib.route.env import Env, Instance, Node
from shardlib.route.merging import merge_of
from shardlib.route.needs import TableKey
from shardlib.route.predicates import Predicates, comparable, same_transform
from shardlib.route.values import AllOf, Atom, One, Pruned, Supplied, assignments, coverage, pruned

__all__ = ["Extra", "KeyPlan", "Placed", "inserted_from", "place"]


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """How the keys of one table instance follow from the values of an execution."""

    tree: Pruned
    order: tuple[int, ...]
    """For each column of the key, its position in an assignment (equal columns share one)."""
    key: TableKey
    exact: bool
    """Whether values that are not equal in Python are not equal in SQL either."""

    def keys(self, supplied: Supplied) -> Iterator[bytes]:
        """Yield the key bytes that are possible.

        Raises:
            InvalidShardKey: a value that cannot be a shard key.
        """
        for row in self.rows(supplied):
            yield self.key.encode(row)

    def rows(self, supplied: Supplied) -> Iterator[tuple[Any, ...]]:
        """Yield the values of the key that are possible, in the order of its columns."""
        for row in assignments(self.tree, supplied, exact=self.exact):
            yield tuple(row[position] for position in self.order)


@dataclass(frozen=True, slots=True)
class Placed:
    """Whether a statement is keyed, and whether its rows can be put together."""

    plans: tuple[KeyPlan, ...] | None
    """None when some sharded table has no key: every shard is needed."""
    merge: str | None
    extra: KeyPlan | None = None


def place(top: Block, predicates: Predicates, extra: Extra | None = None) -> Placed:
    """Decide whether a statement is bound to keys, colocated, or neither.

    Bound: every instance of a sharded table has constants for its key, so the rows of other keys have no say.
    Colocated: the rows that meet always have one key, so each shard answers for its own rows.

    Args:
        top: the block of the statement.
        predicates: reads values in it.
        extra: makes one more instance, whose keys are looked up beside the others'.

    Raises:
        UnsupportedCrossShardQuery: neither.
    """
    made = extra(top, predicates) if extra is not None else None
    more = _bind(made) if made is not None else None
    instances = list(_sharded(top))
    plans = [_bind(instance) for instance in instances]
    apart = _apart(top, None)
    bound = tuple(plan for plan in plans if plan is not None)
    if len(bound) < len(plans):
        if apart is not None:
            raise UnsupportedCrossShardQuery(
                apart,
                "join them on every column of the shard key, or give each of them its shard key in the condition",
            )
        return Placed(None, _merge(top, top=True), more)
    if apart is None and instances and not top.parts and top.sharded:
        # All others are equal to the anchor wherever they meet it.
        anchor = _anchor(top)
        bound = tuple(p for i, p in zip(instances, plans, strict=True) if i is anchor and p is not None)
    return Placed(bound, apart or _merge(top, top=True), more)


def _sharded(block: Block) -> Iterator[Instance]:
    yield from block.sharded
    for inner in (*block.parts, *block.nested, *(unit for unit, _ in block.units)):
        yield from _sharded(inner)


def _bind(instance: Instance) -> KeyPlan | None:
    key, table = instance.key, instance.table
    if key is None or table is None:
        return None
    classes = instance.env.classes()
    columns = [classes.find(node) for node in instance.nodes]
    distinct = list(dict.fromkeys(columns))

    def position(node: Node) -> int | None:
        found = classes.find(node)
        return distinct.index(found) if found in distinct else None

    formula = AllOf(classes.formulas)
    if len(coverage(formula, position)) < len(distinct):
        return None
    tree = pruned(formula, position)
    if tree is None:
        return None
    types = [column.type for column in table.c if column.name in key.key_names]
    exact = not any(isinstance(kind, TypeDecorator) for kind in types)
    return KeyPlan(tree, tuple(distinct.index(column) for column in columns), key, exact)


Extra = Callable[[Block, Predicates], Instance | None]
"""Makes one more instance to look up keys for, in a finished block."""


def inserted_from(table: Table, key: TableKey, places: tuple[int, ...]) -> Extra:
    """Look up the key of the rows that a SELECT makes for a table, from the columns at these places."""

    def instance(top: Block, predicates: Predicates) -> Instance | None:
        if not top.selects or top.parts:
            return None
        rendered, env, names = top.selects[-1]
        made = Instance(table, Env(env), table, key)
        columns = list(rendered.select.selected_columns)
        for node, place in zip(made.nodes, places, strict=True):
            column = columns[place]
            shown = column.element if isinstance(column, Label) else column
            inner = names.node_of(shown)
            own = next(c for c in table.c if c.name == node[1])
            value = predicates.value(shown)
            if inner is not None and comparable(own.type, shown.type):
                made.env.equal.append((node, inner))
            elif value is not None and same_transform(own.type, shown.type):
                made.env.formulas.append(Atom((node,), One(((value,),))))
        return made

    return instance


def _anchor(block: Block) -> Instance | None:
    """An instance that every row of the block has: not one on a nullable side of an outer join."""
    if block.parts:
        later = block.parts[1:]
        recursive = bool(later) and all(part.outer is block.parts[0] for part in later)
        return _anchor(block.parts[0]) if recursive else None
    if block.outer is not None:
        return _anchor(block.outer)
    present = block.env.classes().envs
    for instance in block.sharded:
        if instance.env in present:
            return instance
    for unit, site in block.units:
        if site in present and (anchor := _anchor(unit)) is not None:
            return anchor
    return None


def _named(block: Block) -> str:
    instance = next(_sharded(block))
    return _name(instance)


def _name(instance: Instance) -> str:
    return repr(instance.table.fullname if instance.table is not None else instance.source.description)


def _apart(block: Block, around: Instance | None) -> str | None:
    """Say why the rows of a block may meet across shards; None when they never do."""
    if next(_sharded(block), None) is None:
        return None
    if block.parts:
        return next((why for part in block.parts if (why := _apart(part, around)) is not None), None) or (
            _unanchored(block)
        )
    anchor = _anchor(block)
    if anchor is None:
        only = [unit for unit, site in block.units if site in block.env.classes().envs]
        alone = len(only) == len(block.units) == 1 and not block.sharded and not block.nested
        if alone and only[0].parts:
            return _apart(only[0], None)
        return f"rows of {_named(block)} may be missing where rows that every shard holds are kept or counted"
    return _strays(block, anchor)


def _strays(block: Block, anchor: Instance) -> str | None:
    for instance in block.sharded:
        if instance is not anchor and not instance.env.classes().same_key(instance, anchor):
            return f"tables {_name(anchor)} and {_name(instance)} are not joined on their shard key"
    for unit, site in block.units:
        if next(_sharded(unit), None) is None:
            continue
        inner = _anchor(unit)
        if inner is None or not (inner is anchor or site.classes().same_key(inner, anchor)):
            return f"tables {_name(anchor)} and {_named(unit)} are not joined on their shard key"
        if (why := _apart(unit, None)) is not None:
            return why
    return next((why for nested in block.nested if (why := _apart(nested, anchor)) is not None), None)


def _unanchored(block: Block) -> str | None:
    """A part without a sharded table would come from every shard."""
    if any(next(_sharded(part), None) is None for part in block.parts):
        return f"{_named(block)} is put together with rows that every shard holds"
    return None


def _merge(block: Block, *, top: bool) -> str | None:
    """Say what of a colocated block needs a merge over shards; None when nothing does."""
    if next(_sharded(block), None) is None:
        return None
    if block.merge is not None and block.outer is None:
        return block.merge
    anchor = _anchor(block)
    if block.outer is None:
        for rendered, env, names in block.selects:
            last = rendered is block.selects[-1][0]
            why = merge_of(rendered.select, env.classes(), anchor, names.node_of, top=top and last)
            if why is not None:
                return why
    inner = (*block.parts, *block.nested, *(unit for unit, _ in block.units))
    return next((why for each in inner if (why := _merge(each, top=top and each in block.parts)) is not None), None)
