"""`shardlib-ops ring`: who owns how much, and what is moving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import reach, render
from shardlib_ops.cli.given import AsJson

if TYPE_CHECKING:
    from shardlib_ops.manager.ring import RingView

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Who owns how much of the ring.")


@app.callback()
def _group() -> None:
    """Who owns how much of the ring."""


@app.command()
@reach.reaches
def show(
    way: reach.Way,
    ranges: Annotated[bool, typer.Option("--ranges", help="Also every token range; --json always has them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show each shard's part of the ring, the gates, and what is moving."""
    with way.asking() as ask:
        found = ask(ask.client.ring())
    if as_json:
        render.document(found)
        return
    _show(found)
    if ranges:
        render.console().print()
        rows = [(first, last, shard.name) for shard in found.shards for first, last in shard.ranges]
        render.table(("first token", "last token", "shard"), sorted(rows))


def _show(found: RingView) -> None:
    names = {shard.id: shard.name for shard in found.shards}
    render.facts(
        {
            "cluster": found.cluster_id,
            "topology": f"version {found.version}",
            "hash function": found.hash_function,
            "virtual nodes": found.virtual_nodes,
        }
    )
    render.console().print()
    owned = [
        (one.name, one.vnode_count, one.vnodes_owned, len(one.ranges), f"{one.share_of_all:.2%}")
        for one in found.shards
    ]
    render.table(("shard", "weight", "virtual nodes", "ranges", "of all tokens"), owned)
    render.console().print()
    gates = [
        (
            one.number,
            names.get(one.shard, one.shard),
            "all others" if one.share_of_all is None else one.ranges,
            "" if one.share_of_all is None else f"{one.share_of_all:.2%}",
        )
        for one in found.gates
    ]
    render.table(("gate", "shard", "ranges", "of all tokens"), gates)
    render.console().print()
    if not found.moves:
        render.console().print("nothing is moving", markup=False)
        return
    moves = [
        (
            one.job,
            f"{names.get(one.source, one.source)} -> {names.get(one.target, one.target)}",
            one.state,
            one.ranges,
            f"{one.share_of_all:.2%}",
        )
        for one in found.moves
    ]
    render.table(("job", "from -> to", "state", "ranges", "of all tokens"), moves)
