"""`shardlib-ops local`: a cluster of real servers on this machine, for trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def _typed(command: str, directory: Path | None, more: str = "") -> str:
    """A command of this group as it can be typed for the folder."""
    import shlex

    this = "" if directory is None else f" --dir {shlex.quote(str(directory))}"
    return f"{render.program()} local {command}{this}{more}"


@app.command()
def up(
    shards: Annotated[int | None, typer.Option(help="Number of shards; 2 if left out.", show_default=False)] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Replicas of each shard; none if left out.", show_default=False)
    ] = None,
    synchronous: Annotated[
        bool | None,
        typer.Option(
            "--synchronous/--asynchronous", help="Whether a commit waits for one replica.", show_default=False
        ),
    ] = None,
    etcd_members: Annotated[
        int | None, typer.Option(help="Members of the catalog: 1, or 3.", show_default=False)
    ] = None,
    hash_function: Annotated[str | None, typer.Option(help="murmur3, or xxhash.", show_default=False)] = None,
    vnode_count: Annotated[
        int | None, typer.Option(help="Virtual nodes of each shard; 256 if left out.", show_default=False)
    ] = None,
    durable: Annotated[
        bool | None, typer.Option("--durable/--not-durable", help="Whether servers call fsync.", show_default=False)
    ] = None,
    directory: Folder = None,
    pg_bin: Annotated[
        Path | None, typer.Option(help="Folder of other PostgreSQL programs.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that each server has to start.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Start a cluster that runs until `local down`, or start the one in the folder again with its data.

    A cluster that is started again is as it was: only options that it was made with may be given.
    """
    from shardlib.errors import InvalidArgument, InvalidTopology
    from shardlib_ops.local import detached, registry

    folder = _folder(directory)
    if (owner := registry.owner_of(folder)) is not None:
        raise InvalidArgument(
            "dir", str(folder),
            f"a cluster runs in it already (process {owner}); see it with `{_typed('status', directory)}`, "
            f"stop and remove it with `{_typed('down', directory)}`",
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
    said = {name: value for name, value in options.items() if value is not None}
    try:
        if what := detached.differing(folder, said):
            raise InvalidArgument(
                "dir", str(folder),
                f"a stopped cluster with other options is in it: {what}; start that one with "
                f"`{_typed('up', directory)}`, remove it with `{_typed('down', directory, ' --yes')}`, or name another "
                "folder with --dir",
            )  # fmt: skip
    except InvalidTopology as error:
        raise InvalidTopology(error.problem, f"remove it: `{_typed('down', directory, ' --yes')}`") from None
    found = detached.up(folder, said, timeout)
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
        render.console().print(f"no cluster in {folder}; start one with: {_typed('up', directory)}", markup=False)
    if found is None or not found.running:
        raise typer.Exit(_NOT_RUNNING)


@app.command()
def add(
    name: Annotated[
        str | None, typer.Argument(help="Of the server: letters, digits and -; one that is free if left out.")
    ] = None,
    replica_of: Annotated[
        str | None,
        typer.Option(metavar="SHARD", help="Make it a replica of this shard: its name or id.", show_default=False),
    ] = None,
    directory: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Start one more server: an empty one for a new shard, or a replica of a shard.

    Prints the DSN to give to `shard create` or `shard add-replica`, which make it known to the cluster. The DSN names
    the file that the password is in, and does not hold it.
    """
    from shardlib_ops.local import detached

    made = detached.add(_folder(directory), name, replica_of=replica_of)
    if replica_of is None:
        then = f"shard create NAME --primary {_quoted(made['reference'])}"
    else:
        then = f"shard add-replica {replica_of} {_quoted(made['reference'])}"
    _tell(made, then, as_json=as_json)


@app.command()
def rejoin(
    server: Annotated[
        str | None,
        typer.Argument(
            help="The server; left out in a --rejoin-command of `shard promote`, which tells it.", show_default=False
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Name or id of the shard; the one it was made for if left out.", show_default=False),
    ] = None,
    directory: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Make a server that no shard uses any more, such as an old primary, a replica. What it held is gone."""
    import os

    from shardlib.errors import InvalidArgument
    from shardlib_ops.local import detached

    folder = _folder(directory)
    if server is None:
        port, shard = os.environ.get("SHARDLIB_OLD_PORT"), shard or os.environ.get("SHARDLIB_SHARD")
        found = detached.status(folder)
        servers = () if found is None else found.servers
        server = next((str(one["name"]) for one in servers if str(one["port"]) == port), None)
        if server is None:
            raise InvalidArgument("server", port, "the name of a server of the cluster; `local status` lists them")
        detached.rejoin(folder, server, shard)
        return  # the promotion tells the cluster of it
    made = detached.rejoin(folder, server, shard)
    _tell(made, f"shard add-replica {shard or made['shard']} {_quoted(made['reference'])}", as_json=as_json)


@app.command()
def dsn(
    server: Annotated[str, typer.Argument(help="Name of a server, as `local status` shows it.")],
    directory: Folder = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the password itself, as psql needs it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the DSN of a server's superuser; it names the file that the password is in."""
    from shardlib_ops.local import detached

    found = detached.server(_folder(directory), server, reveal=reveal)
    shown = found["dsn" if reveal else "reference"]
    if as_json:
        render.document({"name": found["name"], "dsn": shown})
    else:
        print(shown)


@app.command()
def down(
    directory: Folder = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the data for a later `local up`.")] = False,
    yes: given.Yes = False,
    as_json: AsJson = False,
) -> None:
    """Stop the cluster and delete its folder, data included; --keep leaves the data.

    Asks before it deletes the data of a cluster that is stopped already.
    """
    from shardlib_ops.local import detached, registry

    folder = _folder(directory)
    runs, holds = registry.owner_of(folder) is not None, detached.holds(folder)
    if holds and not runs and not keep:
        given.agreed(f"Delete the data of the stopped cluster in {folder} (--yes does not ask)?", yes=yes)
    ran = detached.down(folder, keep=keep)
    kept = keep and folder.exists()
    if as_json:
        render.document(
            {
                "running": False,
                "directory": str(folder),
                "stopped": ran,
                "kept": kept,
                "deleted": holds and not folder.exists(),
            }
        )
        return
    said = "stopped" if ran else f"no cluster ran in {folder}"
    if kept and holds:
        said += f"; its data is left: {_typed('up', directory)}"
    elif holds:
        said += f"; its data in {folder} is deleted" + (" (--keep leaves it)" if ran else "")
    render.console().print(said, markup=False)


def _quoted(text: object) -> str:
    import shlex

    return shlex.quote(str(text))


def _tell(made: Mapping[str, object], then: str, *, as_json: bool) -> None:
    """Show a server that was made. Standard output holds its DSN alone, for a command in which it stands."""
    if as_json:
        render.document(dict(made))
        return
    render.console(error=True).print(
        f"server {made['name']} ({made['role']}) runs; tell the cluster of it: {render.program()} {then}", markup=False
    )
    print(made["reference"])


def _show(found: Status, *, as_json: bool) -> None:
    if as_json:
        render.document(
            {
                "running": found.running,
                "directory": found.directory,
                "owner": found.owner,
                "url": found.url,
                "topology": found.topology,
                "servers": found.servers,
                "etcd": found.etcd,
            }
        )
        return
    state = f"running (process {found.owner})" if found.running else "down"
    render.console().print(f"{state}, in {found.directory}\ncatalog: {found.url}\n", markup=False)
    rows = [
        [
            one["name"], one["shard"], one["role"], _named(found, one), one["dsn"],
            "up" if one["listening"] else "down",
        ]
        for one in found.servers
    ]  # fmt: skip
    rows += [[one["name"], None, None, None, one["url"], "up" if one["listening"] else "down"] for one in found.etcd]
    render.table(("server", "shard", "runs as", "in the catalog", "address", "state"), rows)
    old = [one for one in found.servers if found.topology is not None and one["role"] == "primary" and _left(one)]
    for one in old:
        render.console().print(
            f"\n{one['name']} is no server of shard {one['shard']} now, and takes no writes; make it a replica: "
            f"{render.program()} local rejoin {one['name']}",
            markup=False,
        )


def _left(one: Mapping[str, object]) -> bool:
    """Whether a server was made for a shard that does not use it now."""
    return one["shard"] is not None and one["named"] is None


def _named(found: Status, one: Mapping[str, object]) -> object:
    return "?" if found.topology is None else one["named"] or "-"
