"""Plans: what the analysis of a statement's structure found, kept for the next statement of the same structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from sqlalchemy import Table
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.util import LRUCache

from shardlib.errors import UnsupportedOperation
from shardlib.route.functions import calls_of
from shardlib.route.needs import Describe
from shardlib.route.place import Extra, KeyPlan, place
from shardlib.route.shape import Shape
from shardlib.route.trace import trace
from shardlib.route.values import Supplied

__all__ = ["GENERATED", "Given", "Parameters", "Plan", "check_names", "keys_of", "plan_of"]

Given = Mapping[str, Any]
Parameters = Given | Sequence[Given] | None

GENERATED = re.compile(r".*_m?\d+")
"""Names that SQLAlchemy's compiler gives to parameters."""
PLANS_MAX = 1000
_PLANS: LRUCache[Any, Plan] = LRUCache(PLANS_MAX)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a statement's structure.

    Attributes:
        raw: it reads system tables, which are different on every shard.
        keys: how the keys follow from the values; None when a sharded table has no key.
        tables: the sharded tables met.
        merge: see `Needs.merge`.
        writes: data-modifying CTEs inside; a plan with some is not kept.
        names: keys of the parameters, as far as the analysed statement has them.
        extra: keys of the rows that an INSERT makes of a SELECT, if bound.
        calls: see `Needs.calls`.
    """

    raw: bool
    keys: tuple[KeyPlan, ...] | None
    tables: tuple[Table, ...] = ()
    merge: str | None = None
    writes: tuple[UpdateBase, ...] = ()
    extra: KeyPlan | None = None
    names: frozenset[str] = frozenset()
    calls: tuple[str, ...] = ()


def plan_of(
    statement: ClauseElement,
    cache_key: CacheKey | None,
    describe: Describe,
    rows: Callable[[], SelectBase],
    extra: Extra | None = None,
) -> tuple[Plan, Given]:
    """Return the plan of a statement, and the values it carries by name (`statement.params(...)`).

    Args:
        statement: what the cache key is of.
        cache_key: its structure; None for one that is not kept.
        describe: tells how a table is placed.
        rows: makes the SELECT to analyse; asked for only when no plan is kept.
        extra: see `place`.
    """
    kept = None if cache_key is None else (ref(describe), cache_key.key)  # weakly, for it holds an engine
    if kept is not None and cache_key is not None:
        found = _PLANS.get(kept)
        if found is not None:
            return found, cache_key.params or {}
    select = rows()
    traced = trace(select, cache_key)
    shape = Shape(traced, describe)
    top = shape.top(select)
    tables, writes = tuple(shape.tables), tuple(shape.writes)
    if shape.unknown is not None:
        if tables or writes:
            raise UnsupportedOperation(
                f"{shape.unknown!r}, which is neither sharded nor a reference table, is read with sharded tables",
                "read it apart, in a session pinned to a shard key: engine.session(key)",
            )
        plan = Plan(raw=True, keys=())
    else:
        calls = calls_of((select, *traced.selects()))
        if calls and not tables and not writes:
            plan = Plan(raw=True, keys=())  # a function of the user's may read sharded tables
        else:
            placed = place(top, shape.predicates, extra)
            plan = Plan(False, placed.plans, tables, placed.merge, writes, placed.extra, traced.keys, calls)
    if kept is not None and not writes:
        _PLANS[kept] = plan
    return plan, traced.collected if cache_key is None else cache_key.params or {}


def check_names(given: Given, cache_key: CacheKey | None, plan: Plan, also: Container[str] = ()) -> None:
    """Refuse values given by names that SQLAlchemy's compiler makes up: what they mean cannot be told beforehand.

    Args:
        given: the values by name.
        cache_key: that of the statement, with its parameters.
        plan: that of the statement.
        also: other names with a meaning.

    Raises:
        UnsupportedOperation: such a name.
    """
    known = plan.names if cache_key is None else {parameter.key for parameter in cache_key.bindparams}
    for name in given:
        if name not in known and name not in also and GENERATED.fullmatch(name):
            raise UnsupportedOperation(
                f"the parameter {name!r} has a name that is made up when the statement is rendered",
                "name the parameter with bindparam(), and give its value by that name",
            )


def keys_of(plans: Iterable[KeyPlan], supplied: Supplied) -> tuple[bytes, ...]:
    """Return the unique keys of some plans, in order of first appearance."""
    return tuple(dict.fromkeys(key for plan in plans for key in plan.keys(supplied)))
