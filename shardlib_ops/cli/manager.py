"""`shardlib-ops manager`: the HTTP API of the control plane."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from shardlib_ops.settings import Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The HTTP API of the control plane.")


@app.callback()
def _group() -> None:
    """The HTTP API of the control plane."""


@app.command()
def serve(
    catalog: Annotated[
        str | None,
        typer.Option(
            envvar="SHARDLIB_CATALOG", help="URL of the catalog: etcd://... or postgresql://...?catalog=NAME."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="SHARDLIB_CONFIG", help="A TOML file with settings.", show_default=False)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port (8081); 0 takes a free one.", show_default=False)] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics (9091); -1 serves none.", show_default=False)
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Also serve /openapi.json and /docs.")] = False,
    dev: Annotated[
        bool, typer.Option("--dev", help="Without keys: serve everybody as admin. Only on loopback.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings, secrets hidden, and end.")
    ] = False,
) -> None:
    """Serve the API until SIGTERM or Ctrl-C; requests that run then are finished first.

    Tokens are checked with SHARDLIB_JWT_SECRET, SHARDLIB_JWT_KEY_FILE or SHARDLIB_JWKS_URL: without one of them the
    server does not start. Any number of managers may serve one cluster.
    """
    from shardlib_ops.settings import load_settings, print_settings

    section: dict[str, Any] = {
        "host": host, "port": port, "metrics_port": metrics_port, "docs": docs or None, "dev": dev or None,
    }  # fmt: skip
    flags: dict[str, Any] = {"catalog": catalog, "manager": {**section}}
    if metrics_port == -1:
        flags["manager"]["metrics_port"] = None
    settings = load_settings(config, flags)
    if metrics_port == -1:
        settings = settings.model_copy(update={"manager": settings.manager.model_copy(update={"metrics_port": None})})
    if print_config:
        print(print_settings(settings), end="")
        return
    given.lasting(settings.catalog)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from shardlib_ops.api import create_app
    from shardlib_ops.serving.server import Listening, serve, stop_on_signals

    def ready(listening: Listening) -> None:
        more = "" if listening.metrics_url is None else f", metrics on {listening.metrics_url}/metrics"
        render.console(error=True).print(f"serving on {listening.url}{more}; stop it with Ctrl-C", markup=False)

    stop = asyncio.Event()
    api = create_app(settings)
    with stop_on_signals(stop):
        await serve(
            api, settings.manager, stop=stop, limits=settings.limits, metrics=api.state.registry, on_ready=ready
        )
