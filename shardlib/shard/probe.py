"""What a socket tells without a round trip, and how a forked child lets go of its parent's."""

from __future__ import annotations

import os
import select
import socket
from typing import Any, Final

from psycopg import OperationalError

__all__ = ["dead", "poller_of", "sever"]

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
