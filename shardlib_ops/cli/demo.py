"""`shardlib-ops demo`: see shardlib work, on real servers and real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardlib_ops.cli import render

__all__ = ["demo"]

_PIPE_WIDTH = 100


def demo(
    shards: Annotated[int, typer.Option(help="Number of shards, 2 to 16.")] = 3,
    replicas: Annotated[int, typer.Option(help="Replicas of each shard.")] = 0,
    rows: Annotated[
        int | None, typer.Option(help="Read at most that many flights, for a quick run.", show_default=False)
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the servers running until `shardlib-ops local down`.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("demo-output"),
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and no story.")] = False,
) -> None:
    """Shard New York's flights of 2013 over real servers and ask them; the exit code is 1 if a check fails."""
    from rich.console import Console

    from shardlib_ops.demo.story import Options, tell
    from shardlib_ops.demo.teller import Teller

    options = Options(shards, replicas, rows, output, keep)
    # NO_COLOR and a terminal without colours are seen by Rich itself.
    console = Console(quiet=as_json, no_color=no_color or None, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    teller = Teller(console)
    tell(teller, options)
    if as_json:
        checks = [{"check": what, "ok": holds} for what, holds in teller.checks]
        render.document({"ok": teller.all_right, **teller.summary, "checks": checks})
    if not teller.all_right:
        raise typer.Exit(1)
