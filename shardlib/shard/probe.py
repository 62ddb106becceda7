"""What a connection's socket tells, and how to end a connection from outside."""

from __future__ import annotations

import os
import select
import socket
from time import monotonic
from traceback import clear_frames
from typing import Any, Final

from psycopg import Error, OperationalError
from psycopg.pq import ExecStatus

from shardlib.waits import Waits

__all__ = ["answers", "cut", "dead", "let_go", "poller_of", "sever"]

# Sent by a living server unasked: NoticeResponse, ParameterStatus, NotificationResponse. An ErrorResponse is
# its end.
_HARMLESS: Final = b"NSA"


def poller_of(pgconn: Any) -> select.poll:
    """A poll object that watches the connection's socket for something to read."""
    poller = select.poll()
    poller.register(pgconn.socket, select.POLLIN)
    return poller


def dead(pgconn: Any) -> bool:
    """Whether an idle connection, whose socket has something to read, can no longer be used.

    The server closed it (it was killed, restarted, or ended the session), or has said so, or, under TLS, said
    something that cannot be read without taking it in.
    """
    if pgconn.ssl_in_use:
        return True
    peeking = socket.socket(fileno=pgconn.socket)
    try:
        first = peeking.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peeking.detach()
    return not first or first not in _HARMLESS


def answers(pgconn: Any, waits: Waits, timeout_s: float) -> bool:
    """Whether the server answers an empty query within `timeout_s`. Begins no transaction."""
    deadline = monotonic() + timeout_s
    try:
        pgconn.send_query(b"")
        if pgconn.flush():  # six bytes: a full send buffer means that nobody reads at the other end
            return False
        while pgconn.is_busy():
            if not waits.readable(pgconn.socket, deadline - monotonic()):
                return False
            pgconn.consume_input()
        answered = False
        while (result := pgconn.get_result()) is not None:
            answered = result.status == ExecStatus.EMPTY_QUERY
        return answered
    except Error:
        return False


def cut(pgconn: Any) -> None:
    """End the conversation on a socket that somebody else may be waiting on, who gets an error at once."""
    try:
        its = socket.socket(fileno=pgconn.socket)
    except (Error, OSError):  # closed meanwhile
        return
    try:
        its.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more
        return
    finally:
        its.detach()


def let_go(error: BaseException) -> None:
    """Close the socket of an attempt that failed or was cancelled, now and not when the error is collected.

    A half-open login holds a slot of the server, and until its own time limit it holds up what waits for all
    sessions there, such as DROP DATABASE. The driver keeps it in the frames of the error's traceback.
    """
    clear_frames(error.__traceback__)
    if (pgconn := getattr(error, "pgconn", None)) is not None:
        pgconn.finish()


def sever(pgconn: Any) -> None:
    """Close a connection in a forked child so that the parent and its server notice nothing.

    The descriptor first becomes the end of a socket pair without the other end: libpq's farewell goes
    nowhere, the number stays libpq's own until libpq closes it, and whoever still holds the connection gets
    an error, not the parent's session.
    """
    try:
        descriptor = pgconn.socket
    except OperationalError:  # closed already
        return
    ours, theirs = socket.socketpair()
    theirs.close()
    os.dup2(ours.fileno(), descriptor, inheritable=False)
    ours.close()
    pgconn.finish()
