"""The catalog's own connection to PostgreSQL: one at a time, every statement ends by its deadline."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextvars import ContextVar
from math import ceil
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg.abc import PQGenConn
from psycopg.conninfo import conninfo_to_dict

from shardlib.catalog.store import Deadline
from shardlib.dsn import Dsn, hopeless, said_once, scrub
from shardlib.errors import CatalogUnavailable, InvalidArgument
from shardlib.secrets.command import CommandFailed

__all__ = ["Door", "Link"]

_PAUSE_FIRST_S: Final = 0.05
_PAUSE_MAX_S: Final = 0.5
_inherited: list[object] = []
"""Connections of the parent process: a forked child keeps them, so that they are never closed under the
parent.
"""
T = TypeVar("T")
Row = tuple[Any, ...]


class _Attempts:
    """The hosts that are still to be tried, and when that is over: a silent one must leave time for the others."""

    def __init__(self, deadline: Deadline, hosts: int) -> None:
        self.deadline, self.hosts = deadline, hosts

    def share(self) -> Deadline:
        """Until when the next one may take."""
        seconds = self.deadline.left() / max(1, self.hosts)
        self.hosts -= 1
        return Deadline(seconds)


_attempts: ContextVar[_Attempts] = ContextVar("_attempts")


class Link(psycopg.Connection[Row]):
    """A connection whose every wait ends by `deadline`: a server that is stopped keeps its sockets open for ever."""

    deadline = Deadline(0.0)

    @classmethod
    def opened(cls, conninfo: str, deadline: Deadline) -> Self:
        """Connect by `deadline`, but for the look-up of names; `connect_timeout` is for each host, and 2 s at least.

        Raises:
            psycopg.Error: no host let it in.
        """
        hosts = str(conninfo_to_dict(conninfo).get("host") or "").count(",") + 1
        token = _attempts.set(_Attempts(deadline, hosts))
        try:
            link = cls.connect(conninfo, autocommit=True, prepare_threshold=None, connect_timeout=_whole(deadline))
        finally:
            _attempts.reset(token)
        link.deadline = deadline
        return link

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        # What psycopg calls for each address of each host.
        return (yield from _bounded(super()._connect_gen(conninfo), _attempts.get().share()))

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Run a generator of psycopg as its parent does, and break off when the deadline has passed."""
        return super().wait(_bounded(gen, self.deadline), *args, **kwargs)

    def cut(self) -> None:
        """Break whatever the connection waits for, from another thread."""
        try:
            with socket.socket(fileno=os.dup(self.fileno())) as twin:
                twin.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            pass  # it is closed or broken already


def _whole(deadline: Deadline) -> int:
    """Its seconds as libpq takes them."""
    return max(2, ceil(deadline.left()))


def _bounded(gen: Generator[Any, Any, T], deadline: Deadline) -> Generator[Any, Any, T]:
    # psycopg resumes a generator that waits with "nothing is ready" several times a second.
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and deadline.passed():
                gen.close()
                raise psycopg.OperationalError("no answer in time")
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


class Door:
    """Runs statements on a connection that is opened when it is needed and dropped when it fails.

    All statements are autocommitted and unprepared, so that PgBouncer may stand in between.
    """

    def __init__(self, dsn: Dsn) -> None:
        self.safe_url = dsn.safe()
        self._dsn = dsn
        self._resolved = ""
        """What the last connection was opened with, its secret included."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._closed = False

    def open(self, deadline: Deadline) -> Link:
        """A connection of the caller's own.

        Raises:
            CatalogUnavailable: it cannot be opened; final if its password is a reference that leads nowhere.
        """
        if self._closed:
            raise CatalogUnavailable(self.safe_url, "this catalog object was closed")
        given = conninfo_to_dict(self._dsn.reveal())
        options: dict[str, object] = {
            "application_name": "shardlib-catalog",
            # Only a primary has the newest head; with several hosts this finds it.
            "target_session_attrs": given.get("target_session_attrs", "read-write"),
        }
        try:
            self._resolved = self._dsn.conninfo(**options)
            return Link.opened(self._resolved, deadline)
        except InvalidArgument as error:
            passing = isinstance(error, CommandFailed)
            reason = f"password {error.value}: {error.allowed}"
            raise CatalogUnavailable(self.safe_url, reason, not passing) from None
        except psycopg.Error as error:
            raise self.unavailable(error) from None

    def run(
        self,
        statement: str,
        values: Sequence[object] | Mapping[str, object],
        deadline: Deadline,
        *,
        again: bool = True,
    ) -> list[Row]:
        """Run one statement and return its rows, in binary form.

        Args:
            statement: with psycopg's placeholders.
            values: for the placeholders.
            deadline: covers every try.
            again: whether it may be run anew after a failure whose outcome is unknown.

        Raises:
            CatalogUnavailable: no answer by the deadline; with `again=False` it may have happened.
        """
        pause_s = _PAUSE_FIRST_S
        while True:
            try:
                return self._once(statement, values, deadline)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                if not again or self._closed or deadline.left() <= pause_s:
                    raise self.unavailable(error) from None
            except psycopg.Error as error:
                raise self.unavailable(error) from None
            except CatalogUnavailable as error:
                if error.final or self._closed or deadline.left() <= pause_s:
                    raise
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(_PAUSE_MAX_S, pause_s * 2)

    def _once(self, statement: str, values: Sequence[object] | Mapping[str, object], deadline: Deadline) -> list[Row]:
        if not self._lock.acquire(timeout=deadline.left()):
            raise CatalogUnavailable(self.safe_url, "other calls of this process hold the connection")
        try:
            if self._link is None or self._link.closed:
                self._link = None
                self._link = self.open(deadline)
            link = self._link
            link.deadline = deadline
            try:
                return rows(link, statement, values)
            except psycopg.errors.Error as error:
                if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
                    self._link = None
                    link.close()
                raise
        finally:
            self._lock.release()

    def unavailable(self, error: psycopg.Error) -> CatalogUnavailable:
        """The error for a caller, without secrets. One that the server would give again is final."""
        text = scrub(said_once(str(error)), self._dsn.reveal(), self._resolved) or type(error).__name__
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return CatalogUnavailable(self.safe_url, f"{text} (let the role: {self._grants(text)})", True)
        return CatalogUnavailable(self.safe_url, text, hopeless(error))

    def _grants(self, denied: str) -> str:
        """What an administrator has to say so that the role may do what it was denied."""
        role = f'"{self._dsn.user}"' if self._dsn.user else "it"
        if "for database" in denied:
            return f'GRANT CREATE ON DATABASE "{self._dsn.dbname}" TO {role}, to make the tables'
        return (
            f"GRANT USAGE ON SCHEMA shardlib_catalog TO {role}; "
            f"GRANT SELECT ON ALL TABLES IN SCHEMA shardlib_catalog TO {role}, to follow the topology; to change it, "
            "INSERT, UPDATE and DELETE on them and USAGE on its sequence as well"
        )

    def after_fork(self) -> None:
        """In a forked child: put the parent's connection aside, untouched."""
        _inherited.append(self._link)
        self._reset()

    def close(self) -> None:
        """Close the connection; idempotent. A statement under way is broken off."""
        self._closed = True
        link = self._link
        if link is not None:
            link.cut()
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None


def rows(link: Link, statement: str, values: Sequence[object] | Mapping[str, object]) -> list[Row]:
    """The rows of one statement, none for one that returns nothing."""
    with link.cursor(binary=True) as cursor:
        cursor.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []
