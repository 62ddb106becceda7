"""`shardlib-ops manager`: the control plane by HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from shardlib_ops.cli import serving

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from shardlib_ops.serving.shell import App
    from shardlib_ops.settings import Settings

__all__ = ["app"]

THREADS: Final = 64

app = typer.Typer(no_args_is_help=True, help="The control plane by HTTP.")


@app.callback()
def _group() -> None:
    """The control plane by HTTP."""


@app.command()
def serve(
    catalog: serving.Catalog = None,
    config: serving.Config = None,
    host: serving.Host = None,
    port: Annotated[int | None, typer.Option(help="Port (8081); 0 takes a free one.", show_default=False)] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics (9091); -1 serves none.", show_default=False)
    ] = None,
    docs: serving.Docs = False,
    dev: serving.Dev = False,
    print_config: serving.PrintConfig = False,
) -> None:
    """Serve shards and jobs until SIGTERM or Ctrl-C; requests that run then are finished first.

    Tokens are checked with SHARDLIB_JWT_SECRET, SHARDLIB_JWT_KEY_FILE or SHARDLIB_JWKS_URL: without one of them the
    server does not start. Any number of managers may serve one cluster. Jobs are run by `resharder run`.
    """
    settings = serving.settings_of(
        "manager", catalog, config, host=host, port=port, metrics_port=metrics_port, docs=docs, dev=dev
    )
    serving.run("manager", settings, _made, print_config=print_config)


def _made(settings: Settings) -> tuple[App, CollectorRegistry]:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from shardlib_ops.api import create_app

    # Of asyncio's own few threads, some servers that do not answer would take all, and nobody could read any more.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="shardlib-manager"))
    api = create_app(settings)
    return api, api.state.registry
