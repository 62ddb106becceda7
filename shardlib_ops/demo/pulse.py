"""How long transactions took from one moment to the next, as columns of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from shardlib_ops.demo.clients import Sample

__all__ = ["columns", "longest_of_each"]

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN: Final = " .:|#"


def longest_of_each(samples: Iterable[Sample], began: float, ended: float, count: int) -> list[float | None]:
    """The longest transaction that began in each part of a time, in milliseconds; None where none began.

    Args:
        samples: in any order; those outside are left out.
        began: start of the first part, by the monotonic clock, in seconds.
        ended: end of the last.
        count: number of parts, all equally long.
    """
    found: list[float | None] = [None] * count
    for sample in samples:
        part = int((sample.began - began) / (ended - began) * count)
        if sample.began >= began and part < count:
            found[part] = max(found[part] or 0.0, sample.ms)
    return found


def columns(values: Sequence[float | None], top: float, height: int, *, plain: bool) -> list[str]:
    """A column for each value, as lines of text from the top down; a value that is not 0 has at least a trace.

    Args:
        values: none is above `top`; None leaves its column empty.
        top: the value of a full column, more than 0.
        height: lines.
        plain: only ASCII.
    """
    marks = _PLAIN if plain else _EIGHTHS
    steps = len(marks) - 1
    filled = [max(1, round(value / top * height * steps)) if value else 0 for value in values]
    return [
        "".join(marks[min(steps, max(0, each - line * steps))] for each in filled) for line in range(height - 1, -1, -1)
    ]
