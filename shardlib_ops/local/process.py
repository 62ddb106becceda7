"""Processes of this machine: who runs, starting one for another account, freezing and killing a whole family.

Needs nothing but the standard library, since the watchdog starts with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

__all__ = [
    "Account",
    "Daemon",
    "Server",
    "account",
    "children_of",
    "free_shared_memory",
    "kill_all",
    "running_in",
    "started_at",
    "wait_until",
]

_PROC: Final = Path("/proc")
_LINUX: Final = sys.platform.startswith("linux")
_POLL_S: Final = 0.01
_GONE_S: Final = 10.0
"""A killed process that has not vanished by then is stuck in the kernel."""
_TOOLS: Final = frozenset({"cp", "etcd", "initdb", "pg_basebackup", "pg_resetwal", "pg_rewind", "postgres"})
"""What a cluster runs with its folder among the arguments."""


class Account(NamedTuple):
    """The account servers run as, when it is not the caller's own."""

    name: str
    uid: int
    gid: int


def account() -> Account | None:
    """`nobody` for root, as whom PostgreSQL refuses to run; None (the caller's own) for anybody else."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def as_account(owner: Account | None, command: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """A command, and arguments of `subprocess`, so that it runs as an account.

    By `setpriv` where there is one: `subprocess` starts a program by vfork unless it has to change the user itself,
    and a child made by a full fork crashes now and then if gRPC (the etcd client) is at work in this process.
    """
    if owner is None:
        return list(command), {}
    if (setpriv := shutil.which("setpriv")) is not None:
        change = [setpriv, f"--reuid={owner.uid}", f"--regid={owner.gid}", "--clear-groups", "--"]
        return [*change, *command], {}
    return list(command), {"user": owner.uid, "group": owner.gid, "extra_groups": []}


def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    """Poll a condition until it holds (True) or `within_s` seconds are over (False)."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


class _Row(NamedTuple):
    pid: int
    parent: int
    zombie: bool
    started: str


def _row(pid: int) -> _Row | None:
    if not _LINUX:
        return next(iter(_ps("-p", str(pid))), None)
    try:
        # The command's name, in parentheses, may itself hold blanks and parentheses.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return _Row(pid, int(fields[1]), fields[0] in "ZX", fields[19])


def _table() -> list[_Row]:
    if not _LINUX:
        return _ps("-ax")
    rows = (_row(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdecimal())
    return [row for row in rows if row is not None]


def _ps(*which: str) -> list[_Row]:
    command = ["ps", *which, "-o", "pid=,ppid=,stat=,lstart="]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=_GONE_S, check=False).stdout
    rows = (line.split(None, 3) for line in shown.splitlines())
    return [_Row(int(pid), int(parent), stat.startswith("Z"), start) for pid, parent, stat, start in rows]


def started_at(pid: int) -> str | None:
    """When a process started: an opaque text, other for a later one with its number; None if it ended."""
    row = _row(pid)
    return None if row is None or row.zombie else row.started


def children_of(pid: int) -> list[int]:
    """The living direct children of a process."""
    return [row.pid for row in _table() if row.parent == pid and not row.zombie]


def running_in(directory: Path) -> list[int]:
    """The servers and their tools that were started on a folder or something below it."""
    place = str(directory)
    found = []
    for row in _table():
        if row.zombie or row.pid == os.getpid():
            continue
        arguments = _arguments(row.pid)
        if not arguments or Path(arguments[0]).name not in _TOOLS:
            continue
        if any(one == place or one.startswith(place + "/") for one in arguments[1:]):
            found.append(row.pid)
    return found


def _arguments(pid: int) -> list[str]:
    if not _LINUX:
        command = ["ps", "-ww", "-p", str(pid), "-o", "args="]
        return subprocess.run(command, capture_output=True, text=True, timeout=_GONE_S, check=False).stdout.split()
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="surrogateescape").split("\0")
    except OSError:
        return []


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(pid, number)


def family_of(pid: int, number: signal.Signals | None = None) -> list[int]:
    """A process and its children, the process itself stopped first so that it starts no more of them.

    With `number`, that signal is sent to each child found, until a look finds no new one.
    """
    send([pid], signal.SIGSTOP)
    family = {pid}
    while new := set(children_of(pid)) - family:
        if number is not None:
            send(new, number)
        family |= new
    return sorted(family)


def kill_all(pids: Iterable[int], within_s: float = _GONE_S) -> bool:
    """SIGKILL processes and their children; whether all were gone within that time."""
    family = sorted({member for pid in pids for member in family_of(pid)})
    known = {pid: started_at(pid) for pid in family}
    send(family, signal.SIGKILL)

    def gone() -> bool:
        return all(start is None or started_at(pid) != start for pid, start in known.items())

    return wait_until(gone, within_s)


def free_shared_memory(data: Path) -> None:
    """Remove the System V shared memory segment that a killed PostgreSQL of that data folder left, if any."""
    try:
        segment = int((data / "postmaster.pid").read_text().splitlines()[6].split()[1])
    except (OSError, IndexError, ValueError):
        return  # it ended properly, or had not got that far
    libc = ctypes.CDLL(None, use_errno=True)
    # 0 is IPC_RMID on Linux and macOS; a segment that is gone already is fine.
    libc.shmctl(ctypes.c_int(segment), ctypes.c_int(0), None)


class Daemon:
    """One long-running child process, in a session of its own so that Ctrl-C in a terminal does not reach it.

    Args:
        name: for messages.
        command: program and arguments.
        log: file that receives its output, appended.
        environment: the whole environment of the process.
        owner: account it runs as; None for the caller's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        owner: Account | None,
    ) -> None:
        self.name, self.log = name, log
        self._command, self._environment, self._owner = list(command), dict(environment), owner
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process number while it runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs or before its first start."""
        return None if self._child is None else self._child.poll()

    def spawn(self) -> None:
        """Start it, unless it runs."""
        if self.pid is not None:
            return
        command, options = as_account(self._owner, self._command)
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(  # type: ignore[call-overload]
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                cwd=self.log.parent,
                start_new_session=True,
                **options,
            )

    def freeze(self) -> None:
        """SIGSTOP the process and all its children."""
        if (pid := self.pid) is not None:
            family_of(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT the process and all its children."""
        if (pid := self.pid) is not None:
            send([*children_of(pid), pid], signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the process and all its children, and wait until they are gone.

        Raises:
            TimeoutError: one of them is stuck in the kernel.
        """
        child, pid = self._child, self.pid
        if child is None or pid is None:
            return
        family = [member for member in family_of(pid) if member != pid]
        send([pid, *family], signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # told below, with the children
            child.wait(_GONE_S)
        if self.pid is not None or not kill_all(family):
            raise TimeoutError(f"{self.name} (process {pid}) is still there {_GONE_S:g} s after SIGKILL")

    def end(self, steps: Sequence[tuple[signal.Signals, float]]) -> None:
        """Ask it to end by signals of rising force, each with its time in seconds; at last SIGKILL."""
        for number, within_s in steps:
            child, pid = self._child, self.pid
            if child is None or pid is None:
                return
            self.thaw()
            send([pid], number)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the next step is stronger
                child.wait(within_s)
        self.kill()

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log, for messages."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class Server:
    """What every server of a cluster can be made to do. Its methods are idempotent, thread-safe and bounded in time.

    Args:
        daemon: its process.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Number of its (first) process; None while it is down."""
        return self._daemon.pid

    @property
    def running(self) -> bool:
        """Whether its processes exist; a paused server runs."""
        return self.pid is not None

    def kill(self) -> None:
        """SIGKILL all its processes and wait until they are gone. What it acknowledged is in its data folder."""
        with self._lock:
            self._daemon.kill()

    def pause(self) -> None:
        """SIGSTOP all its processes: it hangs, its connections stay open."""
        with self._lock:
            self._daemon.freeze()

    def resume(self) -> None:
        """SIGCONT all its processes."""
        with self._lock:
            self._daemon.thaw()
