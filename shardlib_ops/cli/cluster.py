"""`shardlib-ops cluster`: a cluster out of PostgreSQL servers that exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardlib.topology import Topology
    from shardlib_ops.manager.bootstrap import NewShard

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="A cluster out of PostgreSQL servers of your own.")

_VNODES = 256


@app.callback()
def _group() -> None:
    """A cluster out of PostgreSQL servers of your own."""


@app.command()
def create(
    catalog: given.CatalogUrl,
    shard: Annotated[
        list[str],
        typer.Option(metavar="NAME=DSN", help="A shard and the DSN of its primary; once for each shard, in order."),
    ],
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DSN", help="A replica of a shard; as often as there are.", show_default=False),
    ] = None,
    app_role: Annotated[
        list[str] | None,
        typer.Option(help="A role of an application, which gets what the fence asks of it.", show_default=False),
    ] = None,
    hash_function: Annotated[str, typer.Option(help="murmur3 or xxhash, for ever.")] = "murmur3",
    vnode_count: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]COUNT",
            help=f"Virtual nodes (the weight) of every shard, or of one. {_VNODES} if left out.",
            show_default=False,
        ),
    ] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Encrypt passwords in plain text; SHARDLIB_SECRET_KEY_FILE has the key.")
    ] = False,
    timeout: Annotated[int, typer.Option(help="Seconds to reach each server.")] = 10,
    as_json: given.AsJson = False,
) -> None:
    """Prepare databases as shards and publish the first topology in an empty catalog.

    Nothing is touched before every server was reached, and a failure takes back what was prepared. A password may be
    a reference (env:NAME, file:/path, exec:NAME), which is then what the catalog holds, or be encrypted.
    """
    from contextlib import closing

    from shardlib.catalog import open_catalog
    from shardlib.errors import InvalidArgument
    from shardlib_ops.manager.bootstrap import create_cluster

    given.lasting(catalog)
    if timeout < 1:
        raise InvalidArgument("timeout", timeout, "at least 1 second")
    shards = _shards(shard, replica or [], vnode_count or [], encrypt=encrypt)
    with closing(open_catalog(catalog, timeout_s=float(timeout))) as opened:
        made = create_cluster(
            opened, shards, hash_function=hash_function, app_roles=app_role or [], connect_timeout_s=timeout
        )
        _show(made, opened.safe_url, as_json=as_json)


def _shards(shards: list[str], replicas: list[str], counts: list[str], *, encrypt: bool) -> list[NewShard]:
    """What the options say of the shards.

    Raises:
        InvalidArgument: a shard that is not NAME=DSN or is named twice, an unknown name, or a count that is none.
            No message holds a DSN.
    """
    from shardlib.dsn import Dsn
    from shardlib.errors import InvalidArgument
    from shardlib_ops.manager.bootstrap import NewShard
    from shardlib_ops.manager.passwords import kept, plain_passwords

    rule = plain_passwords("encrypt" if encrypt else None)
    primaries: dict[str, Dsn] = {}
    for text in shards:
        name, dsn = given.named("shard", text)
        if name in primaries:
            raise InvalidArgument("shard", f"{name}=...", "each shard once; name its replicas with --replica")
        primaries[name] = kept(Dsn(dsn), rule, "shard")
    followers: dict[str, list[Dsn]] = {name: [] for name in primaries}
    for text in replicas:
        name, dsn = given.named("replica", text)
        followers[_known("replica", name, primaries)].append(kept(Dsn(dsn), rule, "replica"))
    weights = dict.fromkeys(primaries, _VNODES)
    # A count for all first, wherever it stands: one shard's own goes before it.
    for text in sorted(counts, key=lambda one: "=" in one):
        name, _, count = text.rpartition("=")
        if not count.isascii() or not count.isdigit():
            raise InvalidArgument("vnode_count", text, "a whole number, or NAME=number for one shard")
        for each in [_known("vnode_count", name, primaries)] if name else list(primaries):
            weights[each] = int(count)
    return [NewShard(name, dsn, followers[name], weights[name]) for name, dsn in primaries.items()]


def _known(option: str, name: str, shards: Mapping[str, object]) -> str:
    from shardlib.errors import InvalidArgument

    if name not in shards:
        raise InvalidArgument(option, name, f"the name of a --shard: {', '.join(shards)}")
    return name


def _show(made: Topology, catalog: str, *, as_json: bool) -> None:
    weights = made.ring.weights()
    if as_json:
        shards = [
            {
                "id": shard.id,
                "name": shard.name,
                "primary": str(shard.primary),
                "replicas": [str(each) for each in shard.replicas],
                "vnode_count": weights[shard.id],
            }
            for shard in made.shards
        ]
        render.document(
            {
                "catalog": catalog,
                "cluster_id": made.cluster_id,
                "version": made.version,
                "hash_function": made.hash_function,
                "shards": shards,
            }
        )
        return
    rows = [[shard.id, shard.name, shard.primary, len(shard.replicas), weights[shard.id]] for shard in made.shards]
    render.console().print(f"cluster {made.cluster_id}, in the catalog {catalog}\n", markup=False)
    render.table(("id", "shard", "primary", "replicas", "virtual nodes"), rows)
    render.console().print(
        "\nGive the URL of the catalog to ShardedEngine; its create_all makes the tables.", markup=False
    )
