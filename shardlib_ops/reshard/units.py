"""Sizes and durations as people read and write them. Pure."""

from __future__ import annotations

import re
from typing import Final

from shardlib.errors import InvalidArgument

__all__ = ["duration", "parse_size", "size"]

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_STEP: Final = 1024


def size(count: float) -> str:
    """Bytes, such as `12.5 MiB`."""
    amount = float(count)
    for unit in _UNITS[:-1]:
        if amount < _STEP:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _STEP
    return f"{amount:.1f} {_UNITS[-1]}"


def parse_size(option: str, text: str) -> int:
    """Bytes of `16GiB`, `16GB`, `16G` or `17179869184`; units are powers of 1024, as in PostgreSQL.

    Raises:
        InvalidArgument: it is something else, or 0.
    """
    found = _SIZE.fullmatch(text.strip())
    count = 0
    if found is not None:
        power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
        count = round(float(found[1]) * _STEP**power)
    if count < 1:
        raise InvalidArgument(option, text, "a size such as 16GiB, 500MiB or a number of bytes")
    return count


def duration(seconds: float) -> str:
    """Such as `0.4 s`, `52 s`, `3 min 20 s`, `5 h 02 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
