"""From a statement and its parameters to the shard keys it needs.

Three ways, from the fastest: a SELECT of one table whose condition gives the whole shard key is read as it stands; a
statement whose structure was seen before is answered from its kept plan, looking up values only; the rest is analysed
(`trace`, `shape`, `place`). The structure is SQLAlchemy's own cache key, which SQLAlchemy computes anyway to find the
compiled SQL and keeps on the statement: two statements with one key are rendered as the same SQL.
"""

# The structure of a statement is in attributes that SQLAlchemy's own compiler reads; a test checks those used here.
# ruff: noqa: SLF001
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import StatementLambdaElement
from sqlalchemy.sql.selectable import SelectBase, TextualSelect

from shardlib.errors import UnsupportedCrossShardQuery, UnsupportedOperation
from shardlib.key import describe as describe_table
from shardlib.route.needs import Describe, Needs, Scope
from shardlib.route.plans import Given, Parameters, Plan, check_names, keys_of, plan_of
from shardlib.route.quick import quick_needs
from shardlib.route.values import Supplied
from shardlib.route.writes import written

__all__ = ["needs_of"]

_RAW = Needs(Scope.RAW)


def needs_of(  # noqa: PLR0911 - one return a kind of statement
    statement: Executable, parameters: Parameters = None, describe: Describe = describe_table
) -> Needs:
    """Decide which shard keys a statement needs.

    Args:
        statement: anything that `Session.execute` or `Connection.execute` takes.
        parameters: those given at execution: one mapping, a sequence of them, or None.
        describe: tells how a table is placed.

    Raises:
        ShardKeyRequired: a row to write, or a table met, has no shard key.
        ShardKeyChanged: a write would change the shard key of a row.
        InvalidShardKey: a value that cannot be a shard key.
        UnsupportedCrossShardQuery: tables that would meet across shards.
        UnsupportedOperation: a write to a reference table, or a statement that cannot be understood.
    """
    given: Given = {}
    if parameters and not isinstance(statement, UpdateBase):
        if not isinstance(parameters, Mapping) and len(parameters) > 1:
            raise UnsupportedOperation(
                f"this {type(statement).__name__} with {len(parameters)} sets of parameters cannot be routed",
                "run it once for each set",
            )
        given = parameters if isinstance(parameters, Mapping) else parameters[0]
    found = quick_needs(statement, given, describe)
    if found is not None:
        return found
    if isinstance(statement, StatementLambdaElement):
        return needs_of(statement._resolved, parameters, describe)
    if isinstance(statement, FromStatement):
        return needs_of(statement.element, parameters, describe)
    if isinstance(statement, TextualSelect):
        return _RAW
    if isinstance(statement, SelectBase):
        return _read(statement, given, describe)
    if isinstance(statement, Insert | Update | Delete):
        return written(statement, parameters, describe)
    if isinstance(statement, FunctionElement):
        return _read(statement.select(), given, describe)
    return _RAW


def _read(statement: SelectBase, given: Given, describe: Describe) -> Needs:
    cache_key = statement._generate_cache_key()
    plan, own = plan_of(statement, cache_key, describe, lambda: statement)
    if plan.raw:
        return _RAW
    if given:
        check_names(given, cache_key, plan)
    if own:
        given = {**own, **given}
    extracted: Sequence[BindParameter[Any]] = () if cache_key is None else cache_key.bindparams
    if plan.writes:
        return _with_writes(plan, Supplied(extracted, given), describe)
    if plan.keys is None:
        return Needs(Scope.SCAN, (), False, plan.tables, plan.merge, calls=plan.calls)
    if not plan.tables:
        return Needs(Scope.REFERENCE)
    keys = keys_of(plan.keys, Supplied(extracted, given))
    return Needs(Scope.KEYED, keys, False, plan.tables, plan.merge, calls=plan.calls)


def _with_writes(plan: Plan, supplied: Supplied, describe: Describe) -> Needs:
    inner = [written(write, supplied.given, describe) for write in plan.writes]
    if plan.keys is None or any(needs.scope is not Scope.KEYED for needs in inner):
        raise UnsupportedCrossShardQuery(
            "a data-modifying CTE, or what reads beside it, has no shard key",
            "give each part its shard key, or run the parts as statements of their own",
        )
    keys = dict.fromkeys(keys_of(plan.keys, supplied))
    tables = dict.fromkeys(plan.tables)
    for needs in inner:
        keys.update(dict.fromkeys(needs.keys))
        tables.update(dict.fromkeys(needs.tables))
    calls = tuple(dict.fromkeys((*plan.calls, *(name for needs in inner for name in needs.calls))))
    return Needs(Scope.KEYED, tuple(keys), True, tuple(tables), "a data-modifying CTE", calls=calls)
