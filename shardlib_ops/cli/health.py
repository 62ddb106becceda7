"""`shardlib-ops health`: the process that watches the servers, what it has seen, and maintenance."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, reach, render

if TYPE_CHECKING:
    from shardlib_ops.health.controller import HealthController

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="How the shards and their servers are.")
maintenance = typer.Typer(no_args_is_help=True, help="A shard whose servers are worked on: looks go on.")
app.add_typer(maintenance, name="maintenance")

Reason = Annotated[str, typer.Option(help="Why; it is shown with the shard.", show_default=False)]


@app.command()
def run(
    catalog: given.CatalogUrl,
    interval: Annotated[float, typer.Option(help="Seconds from one look at a shard to the next.")] = 0.5,
    deadline: Annotated[float, typer.Option(help="Seconds for one answer of a server.")] = 1.0,
    failures: Annotated[int, typer.Option(help="Looks in a row that fail before a shard is called worse.")] = 3,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics on 127.0.0.1; 0 takes a free one.", show_default=False)
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Watch every server of every shard until Ctrl-C or SIGTERM, and publish how the shards are.

    Any number of them may run: all look, and one is elected to publish. Each line of the log is what has changed.
    """
    from shardlib_ops.cli.watch import until_signal
    from shardlib_ops.health.controller import HealthController

    given.lasting(catalog)

    async def serve() -> None:
        controller = HealthController(catalog, interval_s=interval, deadline_s=deadline, failures=failures)
        async with controller, _served(controller, metrics_port) as url:
            where = "" if url is None else f", metrics on {url}/metrics"
            render.console(error=True).print(f"watching{where}; stop it with Ctrl-C", markup=False)
            await controller.run()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        until_signal(serve())
    except KeyboardInterrupt:
        pass  # how it is meant to end
    if as_json:
        render.document({"stopped": True})
    else:
        render.console(error=True).print("stopped", markup=False)


@app.command()
def status(catalog: given.CatalogUrl, as_json: given.AsJson = False) -> None:
    """Show how the shards were when their controller published that last. The exit code is 1 unless all are healthy."""
    from shardlib.catalog import open_catalog
    from shardlib_ops.health.model import Health
    from shardlib_ops.health.publish import HealthStore

    with closing(open_catalog(given.lasting(catalog))) as opened:
        topology, found = opened.load(), HealthStore(opened).all()
    shards = [found[shard.id] for shard in topology.shards if shard.id in found]
    missing = [shard.name for shard in topology.shards if shard.id not in found]
    if as_json:
        render.document({"shards": shards, "not_seen": missing})
    else:
        rows = [
            (one.name, one.status.value, "up" if one.primary_up else "down", one.replicas_up, one.sentence, one.at)
            for one in shards
        ]
        render.table(("shard", "status", "primary", "replicas up", "what was seen", "at"), rows)
        if missing:
            render.console().print(f"not seen yet: {', '.join(missing)}; is `health run` running?", markup=False)
    if missing or any(one.status is not Health.HEALTHY for one in shards):
        raise typer.Exit(1)


@maintenance.command()
@reach.reaches
def on(shard: given.ShardName, way: reach.Way, reason: Reason = "", as_json: given.AsJson = False) -> None:
    """Let nothing be done to a shard by itself, until `off`."""
    _set(shard, way, reason, on=True, as_json=as_json)


@maintenance.command()
@reach.reaches
def off(shard: given.ShardName, way: reach.Way, reason: Reason = "", as_json: given.AsJson = False) -> None:
    """End the maintenance of a shard."""
    _set(shard, way, reason, on=False, as_json=as_json)


def _set(text: str, way: reach.Way, reason: str, *, on: bool, as_json: bool) -> None:
    from datetime import UTC, datetime

    from shardlib.catalog import open_catalog
    from shardlib_ops.audit import Actor, Audit, open_audit
    from shardlib_ops.client.direct import os_user
    from shardlib_ops.health.model import Maintenance
    from shardlib_ops.health.publish import HealthStore

    catalog = way.catalog_for("health maintenance")
    wanted = Maintenance(on=on, by=os_user(), reason=reason, at=datetime.now(UTC).isoformat(timespec="seconds"))

    async def audited() -> str:
        with closing(open_catalog(catalog)) as opened:
            audit = Audit(open_audit(way.audit, opened))
            try:
                actor = Actor(subject=wanted.by, via="cli")
                details = {"on": on, "reason": reason}
                async with audit.attempt(actor, "health.maintenance", given.shard(text), details):
                    found = (await asyncio.to_thread(opened.load)).shard(text)
                    await asyncio.to_thread(HealthStore(opened).set_maintenance, found.id, wanted)
            finally:
                await audit.close()
        return found.name

    name = asyncio.run(audited())
    if as_json:
        render.document({"shard": name, "maintenance": on, "by": wanted.by, "reason": reason})
    else:
        render.console().print(f"maintenance of shard {name} is {'on' if on else 'off'}", markup=False)


@asynccontextmanager
async def _served(controller: HealthController, port: int | None) -> AsyncIterator[str | None]:
    """While the body runs, a controller's metrics are served; yields where."""
    if port is None:
        yield None
        return
    from prometheus_client import CollectorRegistry, Metric
    from prometheus_client.parser import text_string_to_metric_families

    from shardlib_ops.serving.metrics import MetricsApp
    from shardlib_ops.serving.server import listen
    from shardlib_ops.settings import ServerSettings

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return iter(text_string_to_metric_families(controller.metrics()))

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    told = MetricsApp(registry)

    async def served(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "lifespan":
            await told(scope, receive, send)
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async with listen(served, ServerSettings(port=port, metrics_port=None, shutdown_s=1)) as (listening, _):
        yield listening.url
