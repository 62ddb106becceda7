"""An application's migrations, written into a folder: `alembic.ini`, `env.py`, and revisions one after another."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Migrations"]

_INI = """
[alembic]
script_location = %(here)s/migrations
"""
_ENV = """
from alembic import context

from shardlib_ops.schema import run_migrations

if not run_migrations():
    raise SystemExit("started by itself")
"""
_REVISION = '''
"""{revision}"""
import os
import time
from pathlib import Path

import sqlalchemy as sa
from alembic import context, op

revision = {revision!r}
down_revision = {before!r}


def upgrade():
{body}
'''


class Migrations:
    """The folder; each `add` is a revision after the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ini = str(folder / "alembic.ini")
        (folder / "migrations" / "versions").mkdir(parents=True)
        Path(self.ini).write_text(_INI)
        self.env(_ENV)
        self._last: str | None = None

    def env(self, text: str) -> None:
        (self.folder / "migrations" / "env.py").write_text(text)

    def add(self, revision: str, *lines: str) -> Path:
        """A revision, or another body for it; the lines are the body of its `upgrade`."""
        path = self.folder / "migrations" / "versions" / f"{revision}.py"
        if not path.exists():
            self._before = self._last
            self._last = revision
        body = "\n".join(f"    {line}" for line in lines) or "    pass"
        path.write_text(_REVISION.format(revision=revision, before=self._before, body=body))
        return path
