"""What commands print: one JSON document with `--json`, tables and lines for people otherwise."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "document", "facts", "failure", "program", "table"]

_PIPE_WIDTH = 240
_PROGRAM = "shardlib-ops"
_SHELL = (
    (", or `resume_promotion`", ""),
    ("`resume_promotion`", "`shard promote --resume`"),
    ("`promote_replica`", "`shard promote`"),
    ("`check_promotion`", "`shard promote --check`"),
    ("`remove_replica`", "`shard remove-replica`"),
    ("`list_jobs`", "`reshard list`"),
)
"""What errors call by the name of a method, and the command of it, each in the order in which it is replaced."""


def console(*, error: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    from rich.console import Console

    found = Console(stderr=error, highlight=False, soft_wrap=True)
    if not found.is_terminal:
        # A pipe has no width: a cut address would be of no use to who reads it.
        found.width = _PIPE_WIDTH
    return found


def program() -> str:
    """How to type this program so that it is found from here, as it was started: often it is not on PATH."""
    started = Path(sys.argv[0])
    if started.name != _PROGRAM:
        return f"{shlex.quote(sys.executable)} -m shardlib_ops.cli.main"
    on_path = shutil.which(_PROGRAM)
    if on_path is not None and Path(on_path).absolute() == started.absolute():
        return _PROGRAM
    here, absolute = Path.cwd(), started.absolute()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute))


def document(content: object) -> None:
    """Print one JSON document; what a client has told can be in it."""
    import msgspec

    print(json.dumps(msgspec.to_builtins(content, enc_hook=str), indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table; cells are shown as text, never read as markup."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console().print(shown)


def facts(said: Mapping[str, object]) -> None:
    """Print one line for each fact, the values under each other."""
    width = max(map(len, said), default=0)
    for what, value in said.items():
        console().print(f"{what:<{width}}  {value}", markup=False)


def failure(error: Exception, *, as_json: bool) -> None:
    """Print an error: its type and text, in the words of the shell, without a traceback."""
    said = _in_shell(error)
    if as_json:
        content: dict[str, Any] = {"error": type(error).__name__, "message": said}
        document(content)
        return
    from rich.text import Text

    out = console(error=True)
    out.print(Text(f"{type(error).__name__}: ", style="bold red") + Text(said))
    sys.stderr.flush()


def _in_shell(error: Exception) -> str:
    """The text of an error, which speaks of methods and arguments, with the commands and options that are meant."""
    from shardlib.errors import InvalidArgument

    said = str(error)
    for python, shell in _SHELL:
        said = said.replace(python, shell)
    if isinstance(error, InvalidArgument) and said.startswith(f"{error.name}="):
        option = "--" + error.name.removesuffix("_s").replace("_", "-")
        if any(one == option or one.startswith(f"{option}=") for one in sys.argv):
            said = f"{option} {said.removeprefix(f'{error.name}=')}"
    return said
