"""What the demo says: chapters, the code that runs, and whether what it found is right."""

from __future__ import annotations

import ast
import inspect
import io
import logging
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Final

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

__all__ = ["Teller", "Trimmed"]

_INDENT: Final = 3
_BAR_WIDTH: Final = 40
_LOG_LENGTH: Final = 110


class Teller:
    """Prints the story and keeps what is to be summed up.

    Args:
        console: where to print. One that is no terminal gets whole lines and nothing that moves.

    Attributes:
        checks: what was checked, and whether it was so, in order.
        summary: whatever else the machine-readable summary says.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._chapters = 0
        self._plain = console.options.ascii_only
        self.checks: list[tuple[str, bool]] = []
        self.summary: dict[str, object] = {}

    @property
    def plain(self) -> bool:
        """Whether only ASCII can be shown."""
        return self._plain

    @property
    def all_right(self) -> bool:
        """Whether no check has failed."""
        return all(holds for _, holds in self.checks)

    def title(self, name: str, what: str) -> None:
        """The first line."""
        self._console.print(Text(name, style="bold") + Text(f"  {what}"))

    def chapter(self, title: str) -> None:
        """Begin the next part."""
        self._chapters += 1
        self._console.print()
        self._console.print(Text(f"{self._chapters}  {title}", style="bold cyan"))

    def say(self, text: str, style: str = "") -> None:
        """A sentence or a few."""
        self._indented(Text(text, style=style))

    def step(self, text: str) -> None:
        """What comes next in a chapter."""
        self._console.print()
        self._indented(Text(text, style="bold"))

    def found(self, text: str) -> None:
        """What came out."""
        self._marked("->" if self._plain else "→", text, "cyan")

    def expect(self, error: Exception | None, what: str) -> None:
        """Show an error that was meant to come, and check that it came."""
        if error is not None:
            self._marked("->" if self._plain else "→", f"{type(error).__name__}: {error}", "yellow")
        self.check(what, error is not None)

    def check(self, what: str, holds: bool) -> None:
        """Say whether something is as it must be, and remember it."""
        self.checks.append((what, holds))
        if self._plain:
            mark = "ok" if holds else "WRONG"
        else:
            mark = "✓" if holds else "✗"
        self._marked(mark, what if holds else f"NOT SO: {what}", "green" if holds else "bold red")

    def code(self, shown: Callable[..., object] | type) -> None:
        """A class, or the body of a function, just as it runs."""
        text = Syntax("", "python", theme="ansi_dark").highlight(source_of(shown))
        text.rstrip()
        # Rich would cut a line that is too long for the terminal.
        text.no_wrap, text.overflow = False, "fold"
        self._console.print(Padding(text, (0, 0, 0, _INDENT + 2), expand=False))

    def table(self, columns: Mapping[str, str], rows: list[list[str]]) -> None:
        """A table; `columns` gives each heading its justification."""
        shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        for heading, justify in columns.items():
            shown.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
        for row in rows:
            shown.add_row(*map(Text, row))
        self._console.print(Padding(shown, (0, 0, 0, _INDENT), expand=False))

    def bars(self, values: Mapping[str, int], unit: str) -> None:
        """A bar for each value, the largest across the whole width."""
        total, largest = sum(values.values()), max(values.values(), default=0)
        rows = []
        for name, value in values.items():
            length = round(_BAR_WIDTH * value / largest) if largest else 0
            share = f"{100 * value / total:.1f} %" if total else ""
            rows.append([name, ("#" if self._plain else "█") * length, f"{value:,}", share])
        self.table({"": "left", " " * _BAR_WIDTH: "left", unit: "right", "share": "right"}, rows)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """While something takes a moment."""
        if self._console.is_terminal:
            with self._console.status(Text(text)):
                yield
        else:
            self.say(text)
            yield

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that moves on a terminal and is nothing elsewhere. Call what it gives with how much is done."""
        bar = Progress(
            TextColumn(" " * (_INDENT - 1)), TextColumn("{task.description}", markup=False),
            BarColumn(_BAR_WIDTH), TextColumn("{task.completed:,} of {task.total:,}", markup=False),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        with bar:
            task = bar.add_task(text, total=total)
            yield lambda done: bar.update(task, completed=done)

    @contextmanager
    def hearing(self, logger: str) -> Iterator[None]:
        """Print what a logger warns of as part of the story, once each."""
        handler = _Heard(self)
        named = logging.getLogger(logger)
        named.addHandler(handler)
        try:
            yield
        finally:
            named.removeHandler(handler)

    def _indented(self, text: Text) -> None:
        self._console.print(Padding(text, (0, 0, 0, _INDENT), expand=False))

    def _marked(self, mark: str, text: str, style: str) -> None:
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(overflow="fold")
        row.add_row(Text(mark, style=style), Text(text))
        self._console.print(Padding(row, (0, 0, 0, _INDENT), expand=False))


class Trimmed(io.TextIOBase):
    """A text file in front of another that leaves out blanks at the end of lines, with which Rich fills its boxes."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the file itself: Rich asks whether it can show more than ASCII."""
        return str(getattr(self._file, "encoding", None) or "utf-8")

    def write(self, text: str) -> int:
        """Write whole lines, as Rich does."""
        self._file.write(re.sub(r"[ \t]+(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        """Flush the file, unless it is closed: Python flushes once more when this object goes."""
        if not self._file.closed:
            self._file.flush()

    def isatty(self) -> bool:
        """It is none, and neither is the file."""
        return False


class _Heard(logging.Handler):
    def __init__(self, teller: Teller) -> None:
        super().__init__(logging.WARNING)
        self._teller = teller
        self._before: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._before:
            self._before.add(message)
            self._teller.say(f"log: {textwrap.shorten(message, _LOG_LENGTH, placeholder=' ...')}", style="dim")


def source_of(shown: Callable[..., object] | type) -> str:
    """The source of a class, or of a function's body: without docstrings at its head."""
    source = textwrap.dedent(inspect.getsource(shown))
    (definition,) = ast.parse(source).body
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        raise TypeError(f"{shown!r} is neither a class nor a function")
    lines, head = source.splitlines(), definition.body[0]
    after = (head.end_lineno or head.lineno) if ast.get_docstring(definition) else head.lineno - 1
    body = textwrap.dedent("\n".join(lines[after:])).strip("\n")
    if not isinstance(definition, ast.ClassDef):
        return body
    return f"{lines[definition.lineno - 1]}\n{textwrap.indent(body, '    ')}"
