"""``exec:NAME``: a password that a program prints, one that the environment of this process allows under that name.

A DSN of the catalog holds the name alone. Whoever writes the catalog can ask for a program that is allowed here, and
can neither name another one nor give it an argument.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from time import monotonic
from typing import Final

from shardlib.errors import InvalidArgument

__all__ = ["CACHE_VARIABLE", "COMMAND_PREFIX", "TIMEOUT_VARIABLE", "CommandFailed", "forget", "printed_by"]

_log = logging.getLogger("shardlib.secrets")

COMMAND_PREFIX: Final = "SHARDLIB_SECRET_COMMAND_"
TIMEOUT_VARIABLE: Final = "SHARDLIB_SECRET_TIMEOUT_S"
CACHE_VARIABLE: Final = "SHARDLIB_SECRET_CACHE_S"

TIMEOUT_S: Final = 10.0
CACHE_S: Final = 60.0
OUTPUT_MAX: Final = 8192
"""Most bytes that a program may print."""
FAILED_S: Final = 1.0
"""So long a failure is told again without another run; and a value younger than this is not forgotten."""
_KEEP_FROM_PROGRAMS: Final = ("SHARDLIB_SECRET_KEY",)

# One underscore at a time: settings of the servers have two in their names.
_NAME: Final = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")


class CommandFailed(InvalidArgument):
    """A program that is allowed gave no password this time; it may the next time."""


@dataclass(slots=True)
class _Kept:
    """What a program printed, or why it failed, and since when."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    command: str = field(default="", repr=False)
    password: str | None = field(default=None, repr=False)
    failure: str = ""
    since: float = 0.0


_kept: dict[str, _Kept] = {}
_kept_lock = threading.Lock()


def printed_by(name: str, environ: Mapping[str, str] | None = None) -> str:
    """The first line that the program of this name prints. Blocks until it has ended, within its time limit.

    The program is run once for all that wait for it, and its answer is kept for `SHARDLIB_SECRET_CACHE_S` seconds.

    Args:
        name: what stands behind ``exec:``.
        environ: where it is allowed; the environment of the process if left out.

    Raises:
        InvalidArgument: no program is allowed under that name, or a limit is no number.
        CommandFailed: it failed, hung, or printed nothing, too much, or what is no text. Never holds what it printed.
    """
    environ = os.environ if environ is None else environ
    reference = f"exec:{name}"
    if not _NAME.fullmatch(name):
        raise InvalidArgument("password", reference[:80], "exec:NAME, a name of letters, digits and single underscores")
    variable = f"{COMMAND_PREFIX}{name}"
    command = environ.get(variable, "")
    if not command.strip():
        raise InvalidArgument("password", reference, f"this process allows no such program: set {variable} to its path")
    argv = _split(reference, variable, command)
    timeout_s = _seconds(environ, TIMEOUT_VARIABLE, TIMEOUT_S, least=0.1)
    cache_s = _seconds(environ, CACHE_VARIABLE, CACHE_S, least=0.0)
    with _kept_lock:
        kept = _kept.setdefault(name, _Kept())
    began = monotonic()
    with kept.lock:
        now = monotonic()
        if kept.command == command and kept.since:
            # Also what came to be while this call waited for the lock: one run serves all that wait for it.
            if kept.password is not None and (now - kept.since < cache_s or kept.since >= began):
                return kept.password
            if kept.failure and (now - kept.since < FAILED_S or kept.since >= began):
                raise CommandFailed("password", reference, kept.failure)
        try:
            found = _line(_output(argv, timeout_s, environ))
        except _Failed as failed:
            failure = f"the program of {variable} {failed}"
            kept.command, kept.password, kept.failure, kept.since = command, None, failure, monotonic()
            _log.warning("%s gives no password: %s", reference, failure)
        else:
            kept.command, kept.password, kept.failure, kept.since = command, found, "", monotonic()
            return found
    raise CommandFailed("password", reference, failure)


def forget(name: str) -> None:
    """Run the program again the next time: a server refused what it printed. Nothing if it has only just printed it."""
    with _kept_lock:
        kept = _kept.get(name)
        if kept is not None and monotonic() - kept.since > FAILED_S:
            del _kept[name]


class _Failed(Exception):  # noqa: N818 - why, for the message of another one
    """What went wrong with a program, in words that hold nothing of what it printed."""


def _split(reference: str, variable: str, command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError:
        argv = []
    if not argv or not PurePath(argv[0]).is_absolute():
        raise InvalidArgument(
            "password", reference, f"{variable} is an absolute path of a program, and its arguments as a shell has them"
        )
    return argv


def _seconds(environ: Mapping[str, str], variable: str, default: float, *, least: float) -> float:
    text = environ.get(variable)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= 86_400:
        raise InvalidArgument(variable, text, f"{least:g} to 86400 seconds")
    return value


def _output(argv: list[str], timeout_s: float, environ: Mapping[str, str]) -> bytes:
    """What a program prints; it and its children are killed when they are late or print too much."""
    own = {key: value for key, value in environ.items() if key not in _KEEP_FROM_PROGRAMS}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it may hold the secret, and would be in somebody's log
            env=own,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise _Failed(f"cannot be started ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    deadline = monotonic() + timeout_s
    try:
        found = _read(process, deadline, timeout_s)
        try:
            code = process.wait(max(deadline - monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            raise _Failed(f"has not ended within {timeout_s:g} s") from None
        if code:
            raise _Failed(f"ended with {code}; run it by hand to see why")
        return found
    finally:
        # The whole group, also after it has ended: a child of it may hold on.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


def _read(process: subprocess.Popen[bytes], deadline: float, timeout_s: float) -> bytes:
    assert process.stdout is not None  # noqa: S101 - it was opened with a pipe
    descriptor, found = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left = deadline - monotonic()
            if left <= 0:
                raise _Failed(f"has not ended within {timeout_s:g} s")
            if not selector.select(left):
                continue
            part = os.read(descriptor, OUTPUT_MAX + 1)
            if not part:
                return found
            found += part
            if len(found) > OUTPUT_MAX:
                raise _Failed(f"prints more than {OUTPUT_MAX} bytes; a password is its first line")


def _line(output: bytes) -> str:
    text: str | None
    try:
        text = output.decode()
    except UnicodeDecodeError:
        text = None  # the error holds what was printed, and would be the context of ours
    if text is None or "\0" in text:
        raise _Failed("prints what is no UTF-8 text")
    lines = text.splitlines()
    if not lines or not lines[0]:
        raise _Failed("prints no first line")
    return lines[0]


def _after_fork() -> None:
    """A thread of the parent may have held a lock, and is not here to let it go."""
    global _kept, _kept_lock
    _kept, _kept_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
