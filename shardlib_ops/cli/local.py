"""`shardlib-ops local`: a cluster of real servers on this machine, for trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import render

if TYPE_CHECKING:
    from shardlib_ops.local.detached import Status

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Real PostgreSQL and etcd servers on this machine.")

_NOT_RUNNING = 3

Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the cluster; one in the cache if left out.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _folder(given: Path | None) -> Path:
    from shardlib_ops.local.detached import default_directory

    return given.absolute() if given is not None else default_directory()


@app.command()
def up(
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 2,
    replicas: Annotated[int, typer.Option(help="Replicas of each shard.")] = 0,
    synchronous: Annotated[bool, typer.Option("--synchronous", help="A commit waits for one replica.")] = False,
    etcd_members: Annotated[int, typer.Option(help="Members of the catalog: 1 or 3.")] = 1,
    hash_function: Annotated[str, typer.Option(help="murmur3 or xxhash.")] = "murmur3",
    vnode_count: Annotated[int, typer.Option(help="Virtual nodes of each shard.")] = 256,
    durable: Annotated[bool, typer.Option("--durable", help="Servers call fsync.")] = False,
    directory: Folder = None,
    pg_bin: Annotated[
        Path | None, typer.Option(help="Folder of other PostgreSQL programs.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that each server has to start.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Start a cluster that runs until `local down`, or start the one in the folder again with its data."""
    import shlex

    from shardlib.errors import InvalidArgument
    from shardlib_ops.local import detached, registry

    folder = _folder(directory)
    if (owner := registry.owner_of(folder)) is not None:
        this = "" if directory is None else f" --dir {shlex.quote(str(directory))}"
        raise InvalidArgument(
            "dir", str(folder),
            f"a cluster runs in it already (process {owner}); see it with `{render.program()} local status{this}`, "
            f"stop and remove it with `{render.program()} local down{this}`",
        )  # fmt: skip
    options = {
        "shards": shards,
        "replicas": replicas,
        "synchronous": synchronous,
        "etcd_members": etcd_members,
        "hash_function": hash_function,
        "vnode_count": vnode_count,
        "durable": durable,
        "pg_bin": None if pg_bin is None else str(pg_bin.absolute()),
    }
    found = detached.up(folder, options, timeout)
    _show(found, as_json=as_json)


@app.command()
def status(
    directory: Folder = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Show DSNs with their passwords.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the cluster; the exit code is 3 if it does not run."""
    from shardlib_ops.local import detached

    folder = _folder(directory)
    found = detached.status(folder, reveal=reveal)
    if found is not None:
        _show(found, as_json=as_json)
    elif as_json:
        render.document({"running": False, "directory": str(folder)})
    else:
        render.console().print(f"no cluster in {folder}; start one with: {render.program()} local up", markup=False)
    if found is None or not found.running:
        raise typer.Exit(_NOT_RUNNING)


@app.command()
def down(
    directory: Folder = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the data for a later `local up`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the cluster and remove its folder."""
    from shardlib_ops.local import detached

    folder = _folder(directory)
    ran = detached.down(folder, keep=keep)
    if as_json:
        render.document({"running": False, "directory": str(folder), "stopped": ran, "kept": keep and folder.exists()})
    else:
        render.console().print("stopped" if ran else f"no cluster ran in {folder}", markup=False)


def _show(found: Status, *, as_json: bool) -> None:
    if as_json:
        render.document(
            {
                "running": found.running,
                "directory": found.directory,
                "owner": found.owner,
                "url": found.url,
                "servers": found.servers,
                "etcd": found.etcd,
            }
        )
        return
    state = f"running (process {found.owner})" if found.running else "down"
    render.console().print(f"{state}, in {found.directory}\ncatalog: {found.url}\n", markup=False)
    keys = ("name", "shard", "role", "dsn")
    rows = [[*(one[key] for key in keys), "up" if one["listening"] else "down"] for one in found.servers]
    rows += [[one["name"], None, "catalog", one["url"], "up" if one["listening"] else "down"] for one in found.etcd]
    render.table(("server", "shard", "role", "address", "state"), rows)
