"""`shardlib-ops config`: the settings that the commands and servers would work with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardlib_ops.cli import given, render

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The settings of the servers and commands.")


@app.callback()
def _group() -> None:
    """The settings of the servers and commands."""


@app.command()
def show(
    config: Annotated[
        Path | None, typer.Option(envvar="SHARDLIB_CONFIG", help="A TOML file with settings.", show_default=False)
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Print the settings of the file and the environment together, as TOML; secrets are shown as `***`."""
    import tomllib

    from shardlib_ops.settings import load_settings, print_settings

    said = print_settings(load_settings(config))
    if as_json:
        render.document(tomllib.loads(said))
    else:
        print(said, end="")
