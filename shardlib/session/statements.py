"""From a statement to the shards it runs on: what a session does before SQLAlchemy executes anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Executable, Result, TextClause
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.schema import DDLElement
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.visitors import iterate

from shardlib.errors import InvalidTopology, ShardKeyRequired, UnsupportedCrossShardQuery, UnsupportedOperation
from shardlib.route.consistency import Consistency
from shardlib.route.extract import needs_of
from shardlib.route.needs import Describe, Needs, Scope
from shardlib.session.core import Core, Needed
from shardlib.session.defaults import with_defaults
from shardlib.session.fanout import FanOut
from shardlib.session.unit import Leg
from shardlib.shard.connection import FAN_OUT, OWNED_ONLY, ShardConnection
from shardlib.topology import Topology

if TYPE_CHECKING:
    from shardlib.session.session import ShardedSession

__all__ = ["check_core", "keyless_write", "pinned_needs", "refuse_raw", "route_statement"]


def route_statement(session: ShardedSession, state: ORMExecuteState) -> Result[Any] | None:
    """Choose the shards of a statement. None means that SQLAlchemy goes on, on the one shard that was chosen.

    Raises:
        ShardKeyRequired, ShardKeyMismatch, ShardKeyChanged, InvalidShardKey: the statement's keys do not fit.
        UnsupportedCrossShardQuery: the answer over several shards would need a merge.
        CrossShardTransaction: it would write on a second shard.
        StaleTopology, ShardUnavailable, PoolTimeout: see `Unit.hold`.
    """
    if "bind" in state.bind_arguments:
        return None  # one leg of a statement that was routed before, or the user's own choice
    options = state.execution_options
    if (word := options.get("consistency")) is not None:
        Consistency.of(word)
    described = session._core.described  # noqa: SLF001
    state.statement, state.parameters = with_defaults(state.statement, state.parameters, described)
    if session._pin is not None:  # noqa: SLF001
        needs = pinned_needs(state.statement, state.parameters, session._core.described)  # noqa: SLF001
        legs = _pinned(session, needs, bool(options.get("all_shards")))
    else:
        needs = needs_of(state.statement, state.parameters, session._core.described)  # noqa: SLF001
        if needs.calls:
            _check_calls(needs, options.get("row_functions", ()))
        legs = _unpinned(session, needs, bool(options.get("all_shards")), _order_is_per_parent(state))
    if _meets_hidden(needs, legs) and any(leg.connection.hidden for leg in legs):
        state.update_execution_options(**{OWNED_ONLY: True})
    if needs.per_key_rows:  # with none at all, any shard finds nothing to do
        return _rows_by_shard(session, state, needs.per_key_rows)
    if len(legs) == 1:
        state.bind_arguments["bind"] = legs[0].connection.engine
        return None
    if needs.writes:
        return _on_each(session, state, legs, _synchronized(state, len(legs)))
    for leg in legs:
        session._enlist(leg)  # noqa: SLF001 - sent on all of them at once, so each needs its savepoint before
    with FanOut(session._core.waits, [leg.connection for leg in legs]) as fan_out:  # noqa: SLF001
        return _on_each(None, state, legs, [{FAN_OUT: fan_out}] * len(legs))


def _on_each(
    writes: ShardedSession | None, state: ORMExecuteState, legs: list[Leg], options: list[dict[str, Any]]
) -> Result[Any]:
    results: list[Result[Any]] = []
    with writes._whole(results) if writes is not None else nullcontext():  # noqa: SLF001
        for leg, own in zip(legs, options, strict=True):
            bind = {"bind": leg.connection.engine}
            results.append(state.invoke_statement(bind_arguments=bind, execution_options=own))
    return _merged(results)


def _synchronized(state: ORMExecuteState, legs: int) -> list[dict[str, Any]]:
    """How each shard's part of an UPDATE or DELETE brings the session's objects up to date.

    Evaluating the criteria does it for all objects at once, whatever shard they are of: only the first part may.
    """
    how = state.execution_options.get("synchronize_session", "auto")
    if how == "auto":
        return [{"synchronize_session": "fetch"}] * legs
    if how == "evaluate":
        return [{}] + [{"synchronize_session": False}] * (legs - 1)
    return [{}] * legs


def _merged(results: list[Result[Any]]) -> Result[Any]:
    merged: Any = results[0].merge(*results[1:])
    if not merged._yield_per:  # noqa: SLF001 - which refuses unique()
        merged.iterator = _kept(merged.iterator)
    return merged  # type: ignore[no-any-return]


def _kept(rows: Iterable[Any]) -> Iterator[Any]:
    """Keep the rows until the last one is read, as one result of SQLAlchemy does.

    `unique()` tells objects apart by their `id()`, which a collected object would leave to another.
    """
    kept = []
    for row in rows:
        kept.append(row)
        yield row


def _order_is_per_parent(state: ORMExecuteState) -> bool:
    # A loader of a relationship sorts the rows of each parent, and all rows of one parent are on one shard.
    return state.is_relationship_load


def _pinned(session: ShardedSession, needs: Needs, all_shards: bool) -> list[Leg]:
    """In a pinned session everything runs on the key's shard; a SELECT without a key reads that whole shard."""
    pin, core = session._pin, session._core  # noqa: SLF001
    assert pin is not None  # noqa: S101 - for the type checker
    if needs.scope is Scope.KEYED:
        session._check_pin(needs.keys, "a statement")  # noqa: SLF001
    if needs.scope is Scope.SCAN and needs.writes and not all_shards:
        raise keyless_write(needs, "of every key that shares the shard")

    def wants(topology: Topology) -> Needed:
        needed = core.places(topology, (pin,))
        if needs.scope is not Scope.SCAN:
            return needed
        return {shard_id: topology.scan_gates(shard_id) for shard_id in needed}

    legs = session._hold(wants, write=needs.writes)  # noqa: SLF001
    if needs.scope is Scope.RAW and all_shards:
        refuse_raw(legs[0].connection)
    return legs


def _unpinned(session: ShardedSession, needs: Needs, all_shards: bool, order_is_per_parent: bool) -> list[Leg]:
    core = session._core  # noqa: SLF001
    if needs.scope is Scope.RAW:
        raise ShardKeyRequired(
            "raw SQL names no shard key that could be read", "run it in a session pinned by engine.session(key)"
        )
    if needs.scope is Scope.KEYED and needs.keys:
        legs = session._hold(lambda topology: _places(core, topology, needs), write=needs.writes)  # noqa: SLF001
    elif needs.scope is not Scope.SCAN:  # reference tables, or criteria that no row can meet
        return session._hold(session._any_shard)  # noqa: SLF001
    else:
        if needs.writes and not all_shards:
            raise keyless_write(needs, "on every shard")
        legs = session._hold(_every_shard, write=needs.writes)  # noqa: SLF001
    if len(legs) > 1 and needs.merge and not (order_is_per_parent and needs.merge == "ORDER BY"):
        if needs.per_key_rows is None:
            raise UnsupportedCrossShardQuery(
                f"{needs.merge} over {len(legs)} shards would need their rows to be merged, which is not done yet",
                "name one shard key in the criteria, or run it for each shard in a session that a key of it pins, and "
                'put the parts together: "One answer from all shards" in docs/how-to/transactions.md',
            )
        _check_together(session, needs)
    return legs


def _check_together(session: ShardedSession, needs: Needs) -> None:
    """Refuse rows or parameter sets that meet rows of another shard, where all of them go each to its own."""
    topology = session._now.topology  # noqa: SLF001
    for keys in needs.together:
        shards = len(session._core.places(topology, keys))  # noqa: SLF001
        if shards > 1:
            raise UnsupportedCrossShardQuery(
                f"{needs.merge} over {shards} shards would need rows of one to be known on another",
                "read the value first and give it as a parameter, or keep what belongs together under one shard key",
            )


def _check_calls(needs: Needs, row_functions: Collection[str]) -> None:
    """Refuse a function of the application that may look at more than the row it is called for."""
    for name in needs.calls:
        if name not in row_functions:
            raise UnsupportedCrossShardQuery(
                f"the function {name}() may be an aggregate, or read rows of which other shards have a part",
                f"if it looks at its arguments only, say so: execution_options(row_functions=({name!r},)); else call "
                "it in a session pinned by engine.session(key), where it sees one shard",
            )


def pinned_needs(statement: Any, parameters: Any, describe: Describe) -> Needs:
    """What a statement needs on one shard that is chosen already: a SELECT that cannot be routed reads all of it.

    Raises:
        ShardlibError: as `needs_of`, for a write.
    """
    try:
        return needs_of(statement, parameters, describe)
    except (UnsupportedCrossShardQuery, UnsupportedOperation):
        if any(isinstance(part, UpdateBase) for part in iterate(statement)):
            raise
        return Needs(Scope.SCAN)


def check_core(
    session: ShardedSession, conn: Connection, statement: Any, parameters: Any, all_shards: bool,
    row_functions: Collection[str] = (),
) -> None:  # fmt: skip
    """Refuse a statement of Core, executed on a session's own connection, that belongs on another shard.

    Raises:
        ShardlibError: as for `session.execute`.
        UnsupportedOperation: it belongs elsewhere.
    """
    if not isinstance(statement, Executable) or isinstance(statement, TextClause | DDLElement):
        if all_shards and isinstance(conn, ShardConnection):
            refuse_raw(conn)
        return
    described = session._core.described  # noqa: SLF001
    if session._pin is not None:  # noqa: SLF001
        needs = pinned_needs(statement, parameters, described)
        legs = _pinned(session, needs, all_shards)
    else:
        needs = needs_of(statement, parameters, described)
        if needs.scope not in (Scope.KEYED, Scope.SCAN):
            return
        if needs.calls:
            _check_calls(needs, row_functions)
        legs = _unpinned(session, needs, all_shards, order_is_per_parent=False)
    if any(leg.connection is not conn for leg in legs):
        raise UnsupportedOperation(
            "a statement executed on the connection of one shard belongs on another",
            "give it to session.execute(), which chooses the shard",
        )
    if _meets_hidden(needs, legs):
        for leg in legs:
            leg.connection.owned_only()


def refuse_raw(conn: ShardConnection) -> None:
    """Refuse raw SQL that means every row of a shard while the shard holds rows that are not its own.

    Raises:
        UnsupportedOperation: it does; nothing can be added to text that would leave them out.
    """
    if conn.hidden:
        raise UnsupportedOperation(
            f"raw SQL over all rows of shard {conn.shard_id!r} would meet rows that job {conn.hidden[0]} moves, which "
            "are on two shards",
            "write it with SQLAlchemy's expressions, which leave them out, or wait until the job is over",
        )


def keyless_write(needs: Needs, where: str) -> ShardKeyRequired:
    """The refusal of an UPDATE or DELETE whose criteria name no shard key."""
    return ShardKeyRequired(
        f"the statement would change rows of {', '.join(t.fullname for t in needs.tables)} {where}",
        "name the shard key in its criteria, or mean it: execution_options(all_shards=True)",
    )


def _meets_hidden(needs: Needs, legs: list[Leg]) -> bool:
    """Whether a statement may meet rows that a shard holds but does not own.

    One that names keys of several shards may: each of them is asked for all the keys.
    """
    return needs.scope is Scope.SCAN or (len(legs) > 1 and not needs.per_key_rows)


def _places(core: Core, topology: Topology, needs: Needs) -> Needed:
    needed = core.places(topology, needs.keys)
    if topology.moves and len(needed) > 1 and not needs.per_key_rows:
        return {i: (*gates, *(-job for job in topology.hidden_on(i))) for i, gates in needed.items()}
    return needed


def _every_shard(topology: Topology) -> Needed:
    needed = {shard.id: topology.scan_gates(shard.id) for shard in topology.owners()}
    if not needed:
        raise InvalidTopology("no shard owns any tokens", "give the cluster a shard")
    return needed


def _rows_by_shard(
    session: ShardedSession, state: ORMExecuteState, rows: Mapping[bytes, tuple[int, ...]]
) -> Result[Any]:
    """Several rows or parameter sets: each goes to the shard of its key, in one statement a shard."""
    groups = session._by_leg({key: list(positions) for key, positions in rows.items()})  # noqa: SLF001
    results: list[Result[Any]] = []
    whole = state.parameters
    with session._whole(results):  # noqa: SLF001
        for leg, positions in groups:
            statement = state.statement
            if len(groups) > 1:
                # Parameters given to invoke_statement are laid over these, set by set: so these must be the ones.
                statement, state.parameters = _only(statement, whole, positions)
            with session._in_bulk(leg, flushing=False):  # noqa: SLF001
                results.append(state.invoke_statement(statement, bind_arguments={"bind": leg.connection.engine}))
    state.parameters = whole
    if len(results) == 1:
        return results[0]
    if getattr(state.statement, "_sort_by_parameter_order", False):
        return _in_order(results, [positions for _, positions in groups])
    return _merged(results)


def _in_order(results: list[Result[Any]], positions: list[list[int]]) -> Result[Any]:
    """The rows of several results in the order of the parameter sets that they answer."""
    frozen = [result.freeze() for result in results]
    rows = [list(part._rewrite_rows()) for part in frozen]  # noqa: SLF001 - no public way
    if any(len(part) != len(places) for part, places in zip(rows, positions, strict=True)):
        raise UnsupportedOperation(
            "rows of several shards cannot be sorted by parameter order when some sets gave none (ON CONFLICT)",
            "leave sort_by_parameter_order away, or return the key and sort by it",
        )
    placed: dict[int, Any] = {
        place: row
        for part, places in zip(rows, positions, strict=True)
        for place, row in zip(places, part, strict=True)
    }
    return frozen[0].with_new_rows([placed[place] for place in sorted(placed)])()


def _only(statement: Any, parameters: Any, positions: list[int]) -> tuple[Any, Any]:
    """The statement for these of its rows: of its parameter sets, or of its `values([...])`."""
    if isinstance(parameters, list | tuple):
        return statement, [parameters[i] for i in positions]
    rows = [row for part in statement._multi_values for row in part]  # noqa: SLF001 - SQLAlchemy has no public way
    narrowed = statement._generate()  # noqa: SLF001
    narrowed._multi_values = ([rows[i] for i in positions],)  # noqa: SLF001
    return narrowed, parameters
