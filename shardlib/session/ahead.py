"""The short ways of a session: what most transactions are, with the server at work while SQLAlchemy is.

A transaction that is sure to be needed is begun a little before it is (`Core.begin_ahead`), and its answer read where
it is needed. Until then it belongs to nobody: a refusal is met where one always is, before anything has run.
"""

# ruff: noqa: SLF001 - these are parts of the session
from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from shardlib.errors import ShardlibError
from shardlib.route.quick import quick_key
from shardlib.session.core import Ahead
from shardlib.session.unit import Leg

if TYPE_CHECKING:
    from shardlib.session.session import ShardedSession

__all__ = ["ahead_of_flush", "quick_leg"]

_NONE_GIVEN: Final[Mapping[str, Any]] = {}


def quick_leg(
    session: ShardedSession, statement: Any, params: Any, *, bind_arguments: Any = None, execution_options: Any = None,
    _parent_execute_state: Any = None, **kw: Any,
) -> Leg | None:  # fmt: skip
    """Where a plain SELECT by key runs, as `route_statement` would choose it; None to have that choose.

    Args:
        session: whose statement it is.
        statement: given to `Session.execute`, like all that follows.
        params: the same.
        bind_arguments: the same.
        execution_options: the same.
        _parent_execute_state: set by SQLAlchemy for a statement that an event listener invokes.
        **kw: what makes no difference.

    Raises:
        ShardlibError: as `route_statement`.
    """
    del kw
    if _parent_execute_state is not None or (bind_arguments and "bind" in bind_arguments):
        return None
    if params and not isinstance(params, dict):
        return None
    found = quick_key(statement, params or _NONE_GIVEN, session._core.described)
    if found is None:
        return None
    for options in (session.execution_options, statement._execution_options, execution_options):
        if options and "consistency" in options:
            return None
    key = found[0]
    if session._pin is not None and key != session._pin:
        session._check_pin((key,), "a statement")
    if "_generate_cache_key" in statement.__dict__:
        return session._hold_key(key)
    return _hold_meanwhile(session, key, statement)


def _hold_meanwhile(session: ShardedSession, key: bytes, statement: Any) -> Leg:
    """Hold the key; while the server begins, a new statement makes its key for SQLAlchemy's cache, and keeps it."""
    ahead = None
    if session._ahead is None and _begins_next(session):
        session._ahead = ahead = session._core.begin_ahead(key)
    if ahead is None:
        return session._hold_key(key)
    try:
        statement._generate_cache_key()  # what compilation asks for first
        return session._hold_key(key)
    finally:
        session._ahead = None
        ahead.close()


def ahead_of_flush(session: ShardedSession) -> Ahead | None:
    """Begin the transaction that a flush will need, if that is plain to see and nobody can tell."""
    heard = session.dispatch
    if heard.before_flush or heard.after_transaction_create or not _begins_next(session):
        return None  # a listener may want a connection of its own, and be first
    key = session._pin
    if key is None and session._new:
        with suppress(ShardlibError):  # the flush itself will meet it
            key = session._instance_keys.key_of(next(iter(session._new.values())))
    return None if key is None else session._core.begin_ahead(key)


def _begins_next(session: ShardedSession) -> bool:
    """Whether the next connection that the session takes is the first of a transaction, and an ordinary one."""
    if session._core.waits.is_async or session.execution_options or session._options or session.in_nested_transaction():
        return False
    unit = session._unit
    return unit is None or not (unit.opening or (unit.legs and unit.transaction is session.get_transaction()))
