"""What a server says of its own condition: ages of transaction ids, slots, room on its disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

__all__ = ["AGES", "PLACE", "SLOTS", "disk_usage"]

AGES: Final = "SELECT age(datfrozenxid), mxid_age(datminmxid) FROM pg_database WHERE datname = current_database()"
"""How old the oldest transaction id and the oldest multixact id of the database are."""

SLOTS: Final = """
    SELECT slot_name::text, active, wal_status,
           coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                         ELSE pg_current_wal_lsn() END, restart_lsn), 0)::float8
      FROM pg_replication_slots ORDER BY 1
"""
"""Each slot: name, whether somebody reads it, whether its WAL is still there, bytes of WAL that are kept for it."""

PLACE: Final = """
    SELECT CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('data_directory') END,
           current_setting('port')
"""
"""The data folder, if the role may know it, and the port."""


def disk_usage(folder: Path, port: int) -> Any:
    """The disk of a data folder, as `shutil.disk_usage` tells; None unless the server of this port runs in it here.

    PostgreSQL itself does not tell how much room is left. Blocks.
    """
    try:
        lines = (folder / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        return shutil.disk_usage(folder) if len(lines) > 3 and lines[3].strip() == str(port) else None
    except OSError:
        return None  # another machine, or not ours to look at
