"""What the commands that start an HTTP server have in common: their options, their settings, and the running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shardlib_ops.cli import given, render

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from shardlib_ops.serving.shell import App
    from shardlib_ops.settings import Settings

__all__ = ["Catalog", "Config", "Dev", "Docs", "Host", "PrintConfig", "run", "settings_of"]

Catalog = Annotated[
    str | None,
    typer.Option(envvar="SHARDLIB_CATALOG", help="URL of the catalog: etcd://... or postgresql://...?catalog=NAME."),
]
Config = Annotated[
    Path | None, typer.Option(envvar="SHARDLIB_CONFIG", help="A TOML file with settings.", show_default=False)
]
Host = Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).", show_default=False)]
Dev = Annotated[bool, typer.Option("--dev", help="Without keys: serve everybody as admin. Only on loopback.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the settings, secrets hidden, and end.")]
Docs = Annotated[bool, typer.Option("--docs", help="Also serve /openapi.json.")]

Section = Literal["manager", "gateway"]


def settings_of(section: Section, catalog: str | None, config: Path | None, **options: Any) -> Settings:
    """The settings of a server, its flags before the environment and the file.

    Args:
        section: which server.
        catalog: its URL, if it was given.
        config: the file, if it was given.
        options: of the section. What is None or False was not given; a `metrics_port` of -1 serves no metrics.

    Raises:
        InvalidArgument: an option with a wrong value.
    """
    from shardlib_ops.settings import load_settings

    no_metrics = options.get("metrics_port") == -1
    if no_metrics:
        options["metrics_port"] = None
    flags = {name: None if value is False else value for name, value in options.items()}
    settings = load_settings(config, {"catalog": catalog, section: flags})
    if no_metrics:
        server = getattr(settings, section).model_copy(update={"metrics_port": None})
        settings = settings.model_copy(update={section: server})
    return settings


def run(
    section: Section,
    settings: Settings,
    make: Callable[[Settings], tuple[App, CollectorRegistry]],
    *,
    print_config: bool = False,
) -> None:
    """Serve an application until SIGTERM or Ctrl-C, or print its settings.

    Args:
        section: which server.
        settings: from `settings_of`.
        make: the application, and what its `/metrics` tells.
        print_config: only print them.
    """
    from shardlib_ops.settings import print_settings

    if print_config:
        print(print_settings(settings), end="")
        return
    given.lasting(settings.catalog)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(section, settings, make))


async def _serve(
    section: Section, settings: Settings, make: Callable[[Settings], tuple[App, CollectorRegistry]]
) -> None:
    from shardlib_ops.serving.server import Listening, serve, stop_on_signals

    def ready(listening: Listening) -> None:
        more = "" if listening.metrics_url is None else f", metrics on {listening.metrics_url}/metrics"
        render.console(error=True).print(f"serving on {listening.url}{more}; stop it with Ctrl-C", markup=False)

    stop = asyncio.Event()
    app, metrics = make(settings)
    with stop_on_signals(stop):
        await serve(app, getattr(settings, section), stop=stop, limits=settings.limits, metrics=metrics, on_ready=ready)
