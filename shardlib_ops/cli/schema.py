"""`shardlib-ops schema`: the application's migrations on every shard."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from sqlalchemy import MetaData

    from shardlib_ops.schema import Applied, SchemaStatus

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The application's migrations on every shard.")

Config = Annotated[
    str, typer.Option("--config", "-c", envvar="ALEMBIC_CONFIG", help="Alembic's configuration.", metavar="PATH")
]
Metadata = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:ATTR", help="The application's MetaData, or its declarative base.", show_default=False
    ),
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for another process that changes the tables now.")]


@app.command()
def apply(
    catalog: given.CatalogUrl,
    revision: Annotated[str, typer.Argument(help="As Alembic names it.")] = "heads",
    config: Config = "alembic.ini",
    metadata: Metadata = None,
    parallel: Annotated[int, typer.Option(min=1, max=32, help="Shards at once, after the first.")] = 1,
    lock_timeout: Annotated[float, typer.Option(help="Seconds that one statement may wait for a lock.")] = 1.0,
    lock_wait: Annotated[float, typer.Option(help="Seconds that a shard is tried whose locks cannot be had.")] = 60.0,
    wait: Wait = 0.0,
    sql: Annotated[bool, typer.Option("--sql", help="Only print what would run.")] = False,
    as_json: given.AsJson = False,
) -> None:
    """Bring every shard to a revision. Stops at the first that refuses; run again, it goes on there."""
    if sql:
        _show_sql(given.lasting(catalog), config, revision, as_json=as_json)
        return
    from shardlib_ops.cli.watch import INTERRUPTED, until_signal
    from shardlib_ops.schema import SchemaManager

    async def told(shard: str, revisions: tuple[str, ...]) -> None:
        render.console(error=True).print(f"{shard}: at {', '.join(revisions)}", markup=False)

    async def run() -> Applied:
        async with SchemaManager(given.lasting(catalog), config=config) as manager:
            return await manager.apply(
                revision,
                metadata=_metadata(metadata),
                parallel=parallel,
                lock_timeout_s=lock_timeout,
                lock_wait_s=lock_wait,
                wait_s=wait,
                on_shard=told,
            )

    try:
        applied = until_signal(run())
    except KeyboardInterrupt:
        render.console(error=True).print("interrupted; run it again to go on where it was", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        render.document({name: list(getattr(applied, name)) for name in applied.__slots__})
        return
    said = {
        "revision": ", ".join(applied.target) or "none",
        "changed": ", ".join(applied.changed) or "none",
        "had it": ", ".join(applied.unchanged) or "none",
    }
    if applied.registered:
        said["new to the cluster"] = ", ".join(applied.registered)
    render.facts(said)
    _tell_unknown(applied.unknown)


@app.command()
def stamp(
    revision: Annotated[str, typer.Argument(help="As Alembic names it; `base` for none.")],
    catalog: given.CatalogUrl,
    shard: Annotated[
        list[str] | None, typer.Option(metavar="SHARD", help="Only this one; as often as wanted.", show_default=False)
    ] = None,
    config: Config = "alembic.ini",
    wait: Wait = 0.0,
    yes: given.Yes = False,
    as_json: given.AsJson = False,
) -> None:
    """Say that shards are at a revision already. Nothing else is changed there."""
    from shardlib_ops.schema import SchemaManager

    chosen = [given.shard(one) for one in shard or []]
    given.agreed(f"Say that {', '.join(chosen) or 'every shard'} is at revision {revision!r}?", yes=yes)
    with SchemaManager.sync(given.lasting(catalog), config=config) as manager:
        target = manager.stamp(revision, shards=chosen, wait_s=wait)
    if as_json:
        render.document({"target": list(target), "shards": chosen or None})
    else:
        render.console().print(f"{', '.join(chosen) or 'every shard'}: at {', '.join(target) or 'none'}", markup=False)


@app.command()
def status(
    catalog: given.CatalogUrl, config: Config = "alembic.ini", metadata: Metadata = None, as_json: given.AsJson = False
) -> None:
    """Show the revision of each shard, and where the shards' tables differ. The exit code is 1 if something does."""
    from shardlib_ops.schema import SchemaManager

    with SchemaManager.sync(given.lasting(catalog), config=config) as manager:
        found = manager.status(metadata=_metadata(metadata))
    half_done = found.change is not None and found.change.open
    fine = found.at_one_revision and not (found.drift or found.unlike_metadata or half_done)
    if as_json:
        render.document(_content(found, fine=fine))
    else:
        _show(found, config)
    if not fine:
        raise typer.Exit(1)


def _content(found: SchemaStatus, *, fine: bool) -> dict[str, Any]:
    import msgspec

    shards = [
        {"id": one.id, "name": one.name, "revision": list(one.revision), "tables": one.tables, "error": one.error}
        for one in found.shards
    ]
    return {
        "fine": fine,
        "heads": list(found.heads),
        "shards": shards,
        "drift": list(found.drift),
        "unlike_metadata": list(found.unlike_metadata),
        "unknown": list(found.unknown),
        "not_compared": list(found.not_compared),
        "change": None if found.change is None else msgspec.to_builtins(found.change),
    }


def _show(found: SchemaStatus, config: str) -> None:
    rows = []
    for one in found.shards:
        revision = ", ".join(one.revision) or ("none" if one.tables else "none, and no tables")
        newest = "" if not found.heads or one.error else ("newest" if one.revision == found.heads else "behind")
        rows.append([one.id, one.name, "unknown" if one.error else revision, one.error or newest])
    render.table(("id", "shard", "revision", ""), rows)
    out = render.console()
    newest = ", ".join(found.heads) or f"unknown: there is no {config} here"
    out.print(f"\nnewest: {newest}", markup=False)
    if found.change is not None and found.change.open:
        out.print(f"half done: {found.change}; `schema apply` goes on", markup=False)
    for title, lines in (
        ("the shards differ:", found.drift),
        ("not as the metadata says:", found.unlike_metadata),
        ("not compared:", found.not_compared),
    ):
        if lines:
            out.print(f"\n{title}", markup=False)
        for line in lines:
            out.print(f"- {line}", markup=False, soft_wrap=True)
    _tell_unknown(found.unknown)


def _tell_unknown(tables: Sequence[str]) -> None:
    if tables:
        render.console(error=True).print(
            f"\nthe cluster does not know the tables {', '.join(tables)}: no statement is routed to them, and no job "
            "moves their rows. Tell it with `--metadata MODULE:ATTR`, or by engine.register(metadata)",
            markup=False,
        )


def _show_sql(catalog: str, config: str, revision: str, *, as_json: bool) -> None:
    from shardlib_ops.schema import SchemaManager

    with SchemaManager.sync(catalog, config=config) as manager:
        scripts = manager.sql(revision)
    if as_json:
        found = [{"shards": list(one.shards), "start": list(one.start), "sql": one.sql} for one in scripts]
        render.document({"scripts": found})
        return
    for one in scripts:
        print(f"-- shards {', '.join(one.shards)}, at {', '.join(one.start) or 'no revision'}")
        print(one.sql or "-- nothing to do")
        print()


def _metadata(text: str | None) -> MetaData | None:
    """The MetaData that `MODULE:ATTR` names.

    Raises:
        InvalidArgument: there is none.
    """
    from sqlalchemy import MetaData

    from shardlib.errors import InvalidArgument

    if text is None:
        return None
    module, _, attribute = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidArgument("metadata", text, f"MODULE:ATTR, such as shop.models:Base ({error})") from None
    found = getattr(found, "metadata", found)
    if not isinstance(found, MetaData):
        raise InvalidArgument("metadata", text, "a MetaData, or a class that has one")
    return found
