"""What the application's own `env.py` calls: it runs the migrations on the connection that it is handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection, MetaData

from shardlib_ops.reshard.schema.revision import VERSION_SCHEMA, VERSION_TABLE

__all__ = ["ATTRIBUTE", "Handed", "run_migrations"]

ATTRIBUTE: Final = "shardlib"
"""Key in `Config.attributes` under which `Handed` stands."""


class Handed:
    """What a run of shardlib hands to `env.py`.

    Attributes:
        connection: to one shard, not in a transaction; None: only tell the SQL.
        used: whether `run_migrations` was called.
    """

    def __init__(self, connection: Connection | None) -> None:
        self.connection, self.used = connection, False


def run_migrations(target_metadata: MetaData | None = None, **options: Any) -> bool:
    """Run the migrations, if it is shardlib that asks for them. To be called in `env.py`::

        from shardlib_ops.schema import run_migrations

        if not run_migrations(target_metadata):
            ...  # what the file did before: Alembic was started by itself

    Args:
        target_metadata: as `context.configure` takes it.
        options: further options of `context.configure`. Which connection and which version table is shardlib's to say.

    Returns:
        whether it has run them; False if `alembic` was started by itself.
    """
    from alembic import context

    handed: Handed | None = context.config.attributes.get(ATTRIBUTE)
    if handed is None:
        return False
    handed.used = True
    options |= {
        "target_metadata": target_metadata,
        "version_table": VERSION_TABLE,
        "version_table_schema": VERSION_SCHEMA,
    }
    configure: Callable[..., None] = context.configure
    if handed.connection is None:
        configure(dialect_name="postgresql", literal_binds=True, **options)
    else:
        configure(connection=handed.connection, **options)
    with context.begin_transaction():
        context.run_migrations()
    return True
