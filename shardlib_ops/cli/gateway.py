"""`shardlib-ops gateway`: SQL over HTTP for programs in other languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardlib_ops.cli import serving

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from shardlib_ops.serving.shell import App
    from shardlib_ops.settings import Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="SQL over HTTP for programs in other languages.")


@app.callback()
def _group() -> None:
    """SQL over HTTP for programs in other languages."""


@app.command()
def serve(
    catalog: serving.Catalog = None,
    config: serving.Config = None,
    host: serving.Host = None,
    port: Annotated[int | None, typer.Option(help="Port (8080); 0 takes a free one.", show_default=False)] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics (9090); -1 serves none.", show_default=False)
    ] = None,
    docs: serving.Docs = False,
    dev: Annotated[
        bool,
        typer.Option("--dev", help="Take any database role; without keys, serve everybody as admin. Only on loopback."),
    ] = False,
    print_config: serving.PrintConfig = False,
) -> None:
    """Serve statements until SIGTERM or Ctrl-C; requests that run then are finished first.

    Tokens are checked with SHARDLIB_JWT_SECRET, SHARDLIB_JWT_KEY_FILE or SHARDLIB_JWKS_URL: without one of them the
    server does not start. Nor does it if it comes to the shards as a superuser, or as another role that may do more
    than read and write rows. Any number of gateways may serve one cluster.
    """
    settings = serving.settings_of(
        "gateway", catalog, config, host=host, port=port, metrics_port=metrics_port, docs=docs, dev=dev
    )
    serving.run("gateway", settings, _made, print_config=print_config)


def _made(settings: Settings) -> tuple[App, CollectorRegistry]:
    from shardlib_ops.gateway import create_gateway

    gateway = create_gateway(settings)
    return gateway, gateway.registry
