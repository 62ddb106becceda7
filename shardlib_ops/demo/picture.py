"""A picture of how evenly the ring spread the rows: an SVG of a bar for each shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from xml.sax.saxutils import escape

__all__ = ["spread_svg", "unevenness"]

_LEFT: Final = 110
_BAR: Final = 460
_RIGHT: Final = 170
_TOP: Final = 70
_ROW: Final = 34
_BOTTOM: Final = 46
_DARK: Final = "#1f2933"
_PALE: Final = "#616e7c"
_MARK: Final = "#c2571a"


def unevenness(values: Mapping[str, int]) -> float:
    """The largest value over the mean: 1.0 is perfectly even. 1.0 too if there is nothing."""
    total = sum(values.values())
    return max(values.values()) * len(values) / total if total else 1.0


def spread_svg(title: str, values: Mapping[str, int]) -> str:
    """The picture as the text of an SVG file: a bar for each value, and a line at their mean.

    Args:
        title: its first line.
        values: rows of each shard; at least one shard.
    """
    largest, total = max(values.values()), sum(values.values())
    scale = _BAR / largest if largest else 0.0
    width, height = _LEFT + _BAR + _RIGHT, _TOP + _ROW * len(values) + _BOTTOM
    uneven = f"{total:,} rows; the fullest shard has {unevenness(values):.3f} times the mean"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        ' font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(20, 30, title, _DARK, 'font-size="17" font-weight="600"'),
        _text(20, 52, uneven, _PALE),
    ]
    for number, (name, value) in enumerate(values.items()):
        y, length = _TOP + _ROW * number, value * scale
        share = f"{value:,}  ({100 * value / total:.1f} %)" if total else "0"
        parts += [
            _text(_LEFT - 12, y + 20, name, _DARK, 'text-anchor="end"'),
            f'<rect x="{_LEFT}" y="{y + 4}" width="{length:.1f}" height="22" rx="3" fill="#2f6f9f"/>',
            _text(_LEFT + length + 12, y + 20, share, _DARK),
        ]
    mean, end = _LEFT + total / len(values) * scale, _TOP + _ROW * len(values)
    line = f'x1="{mean:.1f}" y1="{_TOP - 2}" x2="{mean:.1f}" y2="{end + 4}"'
    parts += [
        f'<line {line} stroke="{_MARK}" stroke-width="1.5" stroke-dasharray="5 4"/>',
        _text(mean, end + 22, f"mean {total / len(values):,.0f}", _MARK, 'text-anchor="middle"'),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, content: str, color: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{color}" {more}>{escape(content)}</text>'
