"""What a sharded session does as its transactions, savepoints and flushes end."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

__all__ = ["listen"]


def listen(kind: type[Session]) -> None:
    """Have all sessions of this class, and of its subclasses, do it."""
    event.listen(kind, "after_transaction_end", _ended, propagate=True)
    event.listen(kind, "after_flush", _flushed, propagate=True)
    event.listen(kind, "after_commit", _finish, propagate=True)
    event.listen(kind, "after_rollback", _resolve, propagate=True)


def _ended(session: Session, transaction: SessionTransaction) -> None:
    sharded: Any = session
    if transaction.nested:
        unit = sharded._now  # noqa: SLF001 - our own class
        for leg in unit.legs.values():
            leg.savepoint_ended()
        unit.savepoint_undone(transaction)  # of one that was kept, nothing is left to undo
    elif sharded.two_phase is not None and transaction.parent is None:
        sharded.two_phase.resolve()  # closing a session, as its `with` block does after an error, tells no rollback


def _flushed(session: Session, context: Any) -> None:
    sharded: Any = session
    if sharded._sent is not None:  # noqa: SLF001 - our own class
        sharded._check_sent()  # noqa: SLF001 - a refusal here undoes the flush, as any failure of it


def _finish(session: Session) -> None:
    sharded: Any = session
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        if sharded._unit is not None:  # noqa: SLF001 - our own class
            sharded._unit.savepoint_kept(savepoint)  # noqa: SLF001
        return
    if sharded.two_phase is not None:
        sharded.two_phase.finish()


def _resolve(session: Session) -> None:
    sharded: Any = session
    if sharded.two_phase is not None:
        sharded.two_phase.resolve()
