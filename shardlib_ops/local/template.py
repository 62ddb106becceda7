"""Data folders of PostgreSQL: `initdb` once for each version and set of options, then copies of that."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from shardlib.errors import InvalidArgument
from shardlib_ops.local import places
from shardlib_ops.local.binaries import Postgres
from shardlib_ops.local.process import Account

__all__ = ["INCLUDED", "SUPERUSER", "clone", "template"]

SUPERUSER: Final = "postgres"
INCLUDED: Final = "shardlib.conf"
"""Settings of one server, read after `postgresql.conf` and written anew at each start."""
_OPTIONS: Final = (
    f"--username={SUPERUSER}", "--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums",
    "--no-sync", "--no-instructions",
)  # fmt: skip
_FORMAT: Final = 1
"""Raised when what this file makes of an `initdb` changes."""
_CLIENTS: Final = """\
# The socket folder is closed to every account but the server's own and root.
local all,replication all trust
host all,replication all 127.0.0.1/32 scram-sha-256
"""


def template(postgres: Postgres, owner: Account | None, timeout_s: float) -> Path:
    """The cached data folder of a PostgreSQL version; concurrent starters make it once.

    It belongs to the account that servers run as. It has no WAL: `clone` gives each copy its own.
    """
    root = places.cache() / "templates"
    places.make(root, 0o755)
    if owner is not None and (closed := places.blocked_at(root, owner)) is not None:
        raise InvalidArgument(
            "SHARDLIB_CACHE",
            str(root),
            f"{closed} is closed to {owner.name}, as whom servers run that root starts",
        )
    what = (postgres.version, *_OPTIONS, _CLIENTS, _FORMAT, owner)
    target = root / hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    if target.exists():
        return target
    with places.locked(root / f"{target.name}.lock"):
        if not target.exists():
            building = target.with_suffix(".new")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(mode=0o700)
            if owner is not None:
                os.chown(building, owner.uid, owner.gid)
            postgres.run("initdb", f"--pgdata={building}", *_OPTIONS, home=root, owner=owner, timeout_s=timeout_s)
            _prepare(building)
            building.rename(target)
    return target


def _prepare(data: Path) -> None:
    with (data / "postgresql.conf").open("a") as settings:
        settings.write(f"\ninclude_if_exists = '{INCLUDED}'\n")
    (data / "pg_hba.conf").write_text(_CLIENTS)
    for segment in (data / "pg_wal").iterdir():
        if segment.is_file():
            segment.unlink()


def clone(postgres: Postgres, source: Path, target: Path, owner: Account | None, timeout_s: float) -> None:
    """Copy a template to a new data folder, with a system identifier of its own.

    Without that, PostgreSQL could not tell a server of one shard from that of another: `pg_rewind` or a
    standby pointed at the wrong primary would go ahead.
    """
    # cp shares the blocks where the file system can, which shutil cannot do.
    subprocess.run(["cp", "-a", str(source), str(target)], check=True, capture_output=True, timeout=timeout_s)
    control = target / "global" / "pg_control"
    with control.open("r+b") as file:
        # The first field of pg_control in every version; pg_resetwal renews the checksum and the WAL.
        file.write((secrets.randbits(62) | 1 << 62).to_bytes(8, sys.byteorder))
    postgres.run("pg_resetwal", "--force", f"--pgdata={target}", home=target, owner=owner, timeout_s=timeout_s)
