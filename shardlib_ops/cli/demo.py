"""`shardlib-ops demo`: see shardlib work, on real servers and real data."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Annotated, cast

import typer

from shardlib_ops.cli import render

__all__ = ["demo"]

_PIPE_WIDTH = 1000
"""A pipe or a file has no width: no sentence is broken there."""


def demo(
    shards: Annotated[int, typer.Option(help="Number of shards, 2 to 16.")] = 3,
    replicas: Annotated[int, typer.Option(help="Replicas of each shard.")] = 0,
    rows: Annotated[
        int | None,
        typer.Option(help="Read at most that many flights, for a quick run: 1000 at least.", show_default=False),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the servers running until `shardlib-ops local down`.")
    ] = False,
    act: Annotated[
        str, typer.Option(metavar="1|2|all", help="1 asks the shards, 2 splits one while clients work.")
    ] = "all",
    output: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("demo-output"),
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and no story.")] = False,
) -> None:
    """Shard New York's flights of 2013 over real servers, ask them, and split one. Exit code 1: a check failed."""
    from rich.console import Console

    from shardlib_ops.cli import watch
    from shardlib_ops.demo.story import Options, tell
    from shardlib_ops.demo.teller import Teller, Trimmed

    options = Options(shards, replicas, rows, output, keep, act=act, program=render.program())
    # NO_COLOR and a terminal without colours are seen by Rich itself.
    console = Console(quiet=as_json, no_color=no_color or None, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
        console.file = cast("IO[str]", Trimmed(console.file))
    teller = Teller(console)
    tell(teller, options, lambda url, job: watch.follow(url, job, "nobody" if as_json else "people", console))
    if as_json:
        checks = [{"check": what, "ok": holds} for what, holds in teller.checks]
        render.document({"ok": teller.all_right, **teller.summary, "checks": checks})
    if not teller.all_right:
        raise typer.Exit(1)
