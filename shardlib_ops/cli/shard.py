"""`shardlib-ops shard`: the shards of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import given, moving, reach, render

if TYPE_CHECKING:
    from shardlib_ops.client.views import ShardView

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The shards of a cluster.")


@app.command()
@reach.reaches
def create(
    name: Annotated[str, typer.Argument(help="A name that no shard of the cluster has.")],
    primary: Annotated[str, typer.Option(metavar="DSN", help=f"Its primary. {given.REFERENCE}")],
    way: reach.Way,
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="DSN", help=f"A replica; as often as there are. {given.REFERENCE}", show_default=False),
    ] = None,
    vnode_count: Annotated[int, typer.Option(help="Virtual nodes: its weight when ranges are dealt.")] = 256,
    as_json: given.AsJson = False,
) -> None:
    """Add a shard that owns nothing yet; `reshard` gives it ranges, and the tables with them."""
    with way.asking() as ask:
        made = ask(
            ask.client.create_shard(
                given.shard(name, "name"), primary_endpoint=primary, replicas=replica or [], vnode_count=vnode_count
            )
        )
    _show_one(made, as_json=as_json)


@app.command("list")
@reach.reaches
def list_(way: reach.Way, as_json: given.AsJson = False) -> None:
    """Show every shard."""
    with way.asking() as ask:
        found = ask(ask.client.shards())
    if as_json:
        render.document(found)
        return
    rows = [
        (
            one.id, one.name, one.state, one.primary, one.vnode_count, one.vnodes_owned, f"{one.share_of_all:.1%}",
            ", ".join(map(str, one.jobs)),
        )
        for one in found.shards
    ]  # fmt: skip
    render.table(("id", "shard", "state", "primary", "weight", "virtual nodes", "of all keys", "jobs"), rows)


@app.command()
@reach.reaches
def show(shard: given.ShardName, way: reach.Way, as_json: given.AsJson = False) -> None:
    """Show one shard."""
    with way.asking() as ask:
        found = ask(ask.client.shard(given.shard(shard)))
    _show_one(found, as_json=as_json)


@app.command()
@reach.reaches
def delete(shard: given.ShardName, way: reach.Way, yes: given.Yes = False, as_json: given.AsJson = False) -> None:
    """Take a shard that owns nothing out of the cluster. Its server and its rows are left as they are."""
    with way.asking() as ask:
        found = ask(ask.client.shard(given.shard(shard)))
        given.agreed(f"Take shard {found.name!r} ({found.primary}) out of the cluster?", yes=yes)
        ask(ask.client.delete_shard(found.id))
    if as_json:
        render.document({"id": found.id, "name": found.name, "deleted": True})
    else:
        render.console().print(f"shard {found.name} ({found.id}) is no longer in the cluster", markup=False)


@app.command()
@reach.reaches
def promote(
    shard: given.ShardName,
    way: reach.Way,
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
        way,
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
@reach.reaches
def add_replica(
    shard: given.ShardName,
    endpoint: Annotated[str, typer.Argument(metavar="DSN", help=f"The replica. {given.REFERENCE}")],
    way: reach.Way,
    as_json: given.AsJson = False,
) -> None:
    """Tell the cluster of a replica, after it is seen to follow the shard's primary."""
    with way.asking() as ask:
        found = ask(ask.client.add_replica(given.shard(shard), endpoint))
    _show_one(found, as_json=as_json)


@app.command("remove-replica")
@reach.reaches
def remove_replica(
    shard: given.ShardName,
    endpoint: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The replica, or its DSN without a password.")],
    way: reach.Way,
    as_json: given.AsJson = False,
) -> None:
    """Take a replica off the cluster's list. The server is left as it is."""
    with way.asking() as ask:
        found = ask(ask.client.remove_replica(given.shard(shard), endpoint))
    _show_one(found, as_json=as_json)


moving.drain(app)


def _show_one(found: ShardView, *, as_json: bool) -> None:
    if as_json:
        render.document(found)
        return
    said = {
        "shard": f"{found.name} ({found.id})",
        "state": found.state,
        "primary": found.primary,
        "replicas": ", ".join(found.replicas) or "none",
        "weight": f"{found.vnode_count} virtual nodes",
        "owns": f"{found.vnodes_owned} virtual nodes, {found.share_of_all:.1%} of all keys",
        "jobs": ", ".join(map(str, found.jobs)) or "none",
    }
    render.facts(said)
