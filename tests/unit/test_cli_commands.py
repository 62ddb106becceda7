"""What holds for every command: it has a help, `--json`, and asks for no secret on the command line unsaid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from shardlib_ops.cli.main import app

# Servers print a log, a token or an environment, and nothing that a program would read as a document.
WITHOUT_JSON = {"manager serve", "gateway serve"}
MAY_HOLD_A_PASSWORD = {"catalog", "primary", "target", "audit"}


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, one in group.commands.items():
        where = f"{path} {name}".strip()
        if hasattr(one, "commands"):
            yield from commands(one, where)
        else:
            yield where, one


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", ALL)
def test_a_command_has_a_help_and_json(name: str) -> None:
    command = ALL[name]
    assert (command.help or "").strip()
    options = {option for parameter in command.params for option in parameter.opts}
    assert name in WITHOUT_JSON or "--json" in options


@pytest.mark.parametrize("name", ALL)
def test_no_secret_is_an_option_unsaid(name: str) -> None:
    for parameter in ALL[name].params:
        assert parameter.name not in {"token", "password", "secret"}
        if name.startswith(("shard ", "ring ", "reshard ")) and parameter.name in MAY_HOLD_A_PASSWORD:
            assert "env:NAME" in (parameter.help or ""), parameter.name
