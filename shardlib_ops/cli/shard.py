"""`shardlib-ops shard`: the shards of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib.topology import Shard, Topology

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The shards of a cluster.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name that no shard of the cluster has.")],
    catalog: given.CatalogUrl,
    primary: Annotated[str, typer.Option(metavar="DSN", help="Its primary.")],
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="DSN", help="A replica; as often as there are.", show_default=False),
    ] = None,
    vnode_count: Annotated[int, typer.Option(help="Virtual nodes: its weight when ranges are dealt.")] = 256,
    as_json: given.AsJson = False,
) -> None:
    """Add a shard that owns nothing yet; `reshard` gives it ranges, and the tables with them."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        manager.create_shard(
            given.shard(name, "name"), primary_endpoint=primary, replicas=replica or [], vnode_count=vnode_count
        )
        _show_one(manager.topology(), name, as_json=as_json)


@app.command("list")
def list_(catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Show every shard."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        topology = manager.topology()
    found = [_content(topology, shard) for shard in topology.shards]
    if as_json:
        render.document({"cluster_id": topology.cluster_id, "version": topology.version, "shards": found})
        return
    keys = ("id", "name", "state", "primary", "vnode_count", "vnodes_owned")
    rows = [
        [*(one[key] for key in keys), f"{one['share_of_all']:.1%}", ", ".join(map(str, one["jobs"]))] for one in found
    ]
    render.table(("id", "shard", "state", "primary", "weight", "virtual nodes", "of all keys", "jobs"), rows)


@app.command()
def show(shard: given.ShardName, catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Show one shard."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        topology = manager.topology()
    _show_one(topology, given.shard(shard), as_json=as_json)


@app.command()
def delete(
    shard: given.ShardName, catalog: given.CatalogUrl, yes: given.Yes = False, as_json: given.AsJson = False
) -> None:
    """Take a shard that owns nothing out of the cluster. Its server and its rows are left as they are."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        found = manager.get_shard(given.shard(shard))
        given.agreed(f"Take shard {found.name!r} ({found.primary}) out of the cluster?", yes=yes)
        manager.delete_shard(found.id)
    if as_json:
        render.document({"id": found.id, "name": found.name, "deleted": True})
    else:
        render.console().print(f"shard {found.name} ({found.id}) is no longer in the cluster", markup=False)


@app.command()
def promote(
    shard: given.ShardName,
    catalog: given.CatalogUrl,
    replica: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The replica; left out: the one that is the least behind."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds that the shard may be closed.")] = 5.0,
    max_lag_bytes: Annotated[int, typer.Option(help="WAL that the replica may be behind at first.")] = 16 * 2**20,
    rejoin_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Run by the shell to make the old primary a replica; see the docs."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only tell what stands in the way.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Bring one to its end whose manager is gone.")] = False,
    yes: given.Yes = False,
    as_json: given.AsJson = False,
) -> None:
    """Let a replica become the primary, while applications go on. The old primary is fenced, and becomes a replica."""
    from shardlib_ops.cli.promoting import promote as run

    run(
        given.shard(shard),
        given.lasting(catalog),
        replica=replica,
        budget_s=budget,
        max_lag_bytes=max_lag_bytes,
        rejoin_command=rejoin_command,
        check=check,
        resume=resume,
        yes=yes,
        as_json=as_json,
    )


@app.command("add-replica")
def add_replica(
    shard: given.ShardName,
    endpoint: Annotated[str, typer.Argument(metavar="DSN", help="The replica.")],
    catalog: given.CatalogUrl,
    as_json: given.AsJson = False,
) -> None:
    """Tell the cluster of a replica, after it is seen to follow the shard's primary."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        found = manager.add_replica(given.shard(shard), endpoint)
        _show_one(manager.topology(), found.id, as_json=as_json)


@app.command("remove-replica")
def remove_replica(
    shard: given.ShardName,
    endpoint: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The replica, or its DSN.")],
    catalog: given.CatalogUrl,
    as_json: given.AsJson = False,
) -> None:
    """Take a replica off the cluster's list. The server is left as it is."""
    from shardlib_ops.manager.manager import Manager

    with Manager.sync(given.lasting(catalog)) as manager:
        found = manager.remove_replica(given.shard(shard), endpoint)
        _show_one(manager.topology(), found.id, as_json=as_json)


def _content(topology: Topology, shard: Shard) -> dict[str, Any]:
    from shardlib.ring.ranges import TOKEN_COUNT

    owned = sum(one.last - one.first + 1 for one in topology.ring.ranges_of(shard.id)) if _owns(topology, shard) else 0
    return {
        "id": shard.id,
        "name": shard.name,
        "state": shard.status.value,
        "primary": str(shard.primary),
        "replicas": [str(each) for each in shard.replicas],
        "vnode_count": shard.vnode_count,
        "vnodes_owned": topology.ring.weights().get(shard.id, 0),
        "share_of_all": owned / TOKEN_COUNT,
        "jobs": sorted({move.job for move in topology.moves if shard.id in (move.source, move.target)}),
    }


def _owns(topology: Topology, shard: Shard) -> bool:
    return shard.id in topology.ring.shard_ids


def _show_one(topology: Topology, name: str, *, as_json: bool) -> None:
    found = _content(topology, topology.shard(name))
    if as_json:
        render.document(found)
        return
    said = {
        "shard": f"{found['name']} ({found['id']})",
        "state": found["state"],
        "primary": found["primary"],
        "replicas": ", ".join(found["replicas"]) or "none",
        "weight": f"{found['vnode_count']} virtual nodes",
        "owns": f"{found['vnodes_owned']} virtual nodes, {found['share_of_all']:.1%} of all keys",
        "jobs": ", ".join(map(str, found["jobs"])) or "none",
    }
    render.facts(said)
