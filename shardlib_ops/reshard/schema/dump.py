"""What `pg_dump` says about a database, taken apart into its entries, and run again in another one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg
from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from shardlib.dsn import scrub
from shardlib.topology import Shard
from shardlib_ops.reshard.connect import is_passing
from shardlib_ops.reshard.program import Program, find_pg_dump, run
from shardlib_ops.reshard.world import Blocked, Failure, Lost

__all__ = ["Entry", "apply", "dump"]

Section = Literal["pre-data", "post-data"]

OURS: Final = ("shardlib", "shardlib_catalog")
"""Schemas that belong to one shard and never travel."""

_DUMP_S: Final = 300.0
_LOCK_WAIT: Final = "10s"
_HEAD: Final = re.compile(rb"^--\n-- Name: (.*); Type: (.*); Schema: (.*); Owner:.*\n--\n", re.MULTILINE)
_END: Final = b"\n--\n-- PostgreSQL database dump complete\n--\n"
_SETTINGS: Final = (
    "SET LOCAL check_function_bodies = off; SET LOCAL standard_conforming_strings = on; SET LOCAL search_path = '';"
    " SET LOCAL xmloption = content; SET LOCAL client_min_messages = warning; SET LOCAL row_security = off"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a dump makes.

    Attributes:
        name: as `pg_dump` calls it.
        type: such as `TABLE`, `INDEX`, `FK CONSTRAINT`.
        schema: `-` without one.
        text: its statements.
    """

    name: str
    type: str
    schema: str
    text: bytes

    def __str__(self) -> str:
        return f"{self.type} {self.name}" if self.schema == "-" else f"{self.type} {self.schema}.{self.name}"


async def dump(shard: Shard, section: Section, *, server_version: int, application: str, owners: bool) -> list[Entry]:
    """How everything in a shard's database is made, without rows and without what belongs to the shard itself.

    Args:
        shard: whose primary is asked.
        section: `pre-data` (types, tables, functions, ...) or `post-data` (indexes, constraints, triggers, ...).
        server_version: of the server, as libpq gives it.
        application: `application_name` of the program's connection.
        owners: whether to keep the owners; else everything belongs to the role that makes it.

    Raises:
        Failure: there is no program for it, or it refused.
        Blocked: somebody holds a lock on a table that it must read.
        Lost: the server does not answer.
    """
    program = await find_pg_dump(server_version)
    environment, target = _connection(program, shard, application)
    command = [
        str(program.path), f"--section={section}", "--no-password", "--no-tablespaces", "--no-publications",
        "--no-subscriptions", "--no-security-labels", "--encoding=UTF8", f"--lock-wait-timeout={_LOCK_WAIT}",
        *(f"--exclude-schema={name}" for name in OURS), *([] if owners else ["--no-owner"]), f"--dbname={target}",
    ]  # fmt: skip
    try:
        code, out, errors = await run(command, environment, timeout_s=_DUMP_S)
    except TimeoutError:
        raise Blocked(f"pg_dump of shard {shard.name!r} did not end within {_DUMP_S:g} s") from None
    except OSError as error:
        raise Failure(f"{program.path} cannot be run: {error}") from error
    if code != 0:
        raise _refused(shard, program, scrub(errors.decode(errors="replace").strip(), shard.primary.reveal()))
    return entries(out)


def _refused(shard: Shard, program: Program, message: str) -> Exception:
    told = f"{program.path} of shard {shard.name!r}: {'; '.join(message.splitlines())}"
    if "connection to server" in message or "server closed the connection" in message:
        return Lost(told)
    if "canceling statement due to" in message:
        return Blocked(f"{told}; end the transaction that holds the lock")
    return Failure(f"{told}; the role of the shard's DSN must be able to read all its tables")


def _connection(program: Program, shard: Shard, application: str) -> tuple[dict[str, str], str]:
    """The program's environment and the rest of the DSN, which holds no secret: others can read arguments.

    Raises:
        Failure: a secret that cannot be handed over.
    """
    given = conninfo_to_dict(shard.primary.conninfo(connect_timeout=10, application_name=application))
    names = {
        option.keyword.decode(): (None if option.envvar is None else option.envvar.decode(), option.dispchar == b"*")
        for option in Conninfo.get_defaults()
    }
    environment, rest = program.environment(), {}
    for keyword, value in given.items():
        variable, secret = names.get(keyword, (None, False))
        if variable:
            environment[variable] = str(value)
        elif secret:
            raise Failure(
                f"the DSN of shard {shard.name!r} holds {keyword!r}, which cannot be handed to pg_dump unseen; "
                "use a key file without a password"
            )
        else:
            rest[keyword] = value
    return environment, make_conninfo("", **rest)


def entries(text: bytes) -> list[Entry]:
    """A plain dump taken apart. What stands before the first entry and after the last, for psql alone, is left out."""
    body = text[: text.rfind(_END)] if _END in text else text
    heads = list(_HEAD.finditer(body))
    ends = [*(head.start() for head in heads[1:]), len(body)][: len(heads)]
    found = []
    for head, end in zip(heads, ends, strict=True):
        name, kind, schema = (part.decode() for part in head.groups())
        if content := body[head.end() : end].strip():
            found.append(Entry(name, kind, schema, content))
    return found


def travels(entry: Entry) -> bool:
    """Whether an entry is the application's: not what shardlib hangs on its tables, nor what only an owner may do."""
    if entry.type == "TRIGGER" and b"EXECUTE FUNCTION shardlib." in entry.text:
        return False
    return not (entry.type == "COMMENT" and entry.name.startswith("EXTENSION "))


async def apply(conn: AsyncConnection[Any], shard: Shard, listed: Iterable[Entry]) -> list[str]:
    """Make everything that a dump lists. The caller has begun the transaction.

    A foreign key that the rows do not fulfil now, since tables are copied one after the other, is added NOT VALID: it
    holds for what is written from now on.

    Returns:
        the foreign keys that were added so.

    Raises:
        Failure: the server refuses one; the message names it.
    """
    await conn.execute(_SETTINGS.encode())
    loose = []
    for entry in listed:
        if not travels(entry):
            continue
        try:
            if entry.type == "FK CONSTRAINT":
                try:
                    async with conn.transaction():
                        await conn.execute(entry.text)
                except pg.ForeignKeyViolation:
                    await conn.execute(entry.text.rstrip().removesuffix(b";") + b" NOT VALID")
                    loose.append(str(entry))
            else:
                await conn.execute(entry.text)
        except psycopg.Error as error:
            raise explained(error, shard, entry) from error
    return loose


def explained(error: psycopg.Error, shard: Shard, entry: Entry) -> Exception:
    """A refusal as the job tells it. Loss of the connection, and of the job, stay what they are."""
    state = error.sqlstate or ""
    if not state or state.startswith(("08", "57", "53", "SL")):
        return error
    if is_passing(error):
        return Blocked(f"shard {shard.name!r} cannot make {entry} now: {error.diag.message_primary or error}")
    return Failure(
        f"shard {shard.name!r} refuses {entry}: {scrub(str(error).strip(), shard.primary.reveal())}; {_way_out(state)}"
    )


def _way_out(state: str) -> str:
    if state in ("42P07", "42710", "42P06", "42723", "42701"):
        return "drop it there, since everything is made anew with the tables, or make all the tables there yourself"
    if state in ("0A000", "58P01", "22023"):
        return "install on the target's server what the source's has (extensions above all)"
    if state == "42704":
        return "create there what it names (roles are not copied)"
    if state == "42501":
        return "give the role of the shard's DSN that right"
    return "make the tables there yourself and start the job again"
