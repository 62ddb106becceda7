"""The picture that the demo leaves: an SVG of panels, one below the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from shardlib_ops.demo.clients import Sample

__all__ = ["Panel", "Picture", "drawing", "latency_panel", "spread_panel", "unevenness"]

_LEFT: Final = 110
_BAR: Final = 460
_RIGHT: Final = 170
_WIDTH: Final = _LEFT + _BAR + _RIGHT
_TOP: Final = 70
_ROW: Final = 34
_BOTTOM: Final = 46
_PLOT: Final = 180
_DARK: Final = "#1f2933"
_PALE: Final = "#616e7c"
_MARK: Final = "#c2571a"
_FILL: Final = "#2f6f9f"
_BAND: Final = "#f6dfd1"


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of the picture: what is drawn in it, from 0 down to its height."""

    title: str
    height: float
    parts: tuple[str, ...]


class Picture:
    """The file, written anew with each panel that is added; its folder is made.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._panels: list[Panel] = []

    def add(self, panel: Panel) -> None:
        """Add a panel at the bottom, and write the file."""
        self._panels.append(panel)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(drawing(self._panels), encoding="utf-8")


def unevenness(values: Mapping[str, int]) -> float:
    """The largest value over the mean: 1.0 is perfectly even. 1.0 too if there is nothing."""
    total = sum(values.values())
    return max(values.values()) * len(values) / total if total else 1.0


def drawing(panels: Sequence[Panel]) -> str:
    """The text of an SVG file.

    Args:
        panels: at least one, from the top down.
    """
    height = sum(panel.height for panel in panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}"',
        f' height="{height:g}" font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>{escape('; '.join(panel.title for panel in panels))}</title>",
        f'<rect width="{_WIDTH}" height="{height:g}" fill="#ffffff"/>',
    ]
    y = 0.0
    for panel in panels:
        lines += [f'<g transform="translate(0 {y:g})">', *panel.parts, "</g>"]
        y += panel.height
    return "\n".join([*lines, "</svg>"]) + "\n"


def spread_panel(title: str, values: Mapping[str, int]) -> Panel:
    """How evenly rows are spread: a bar for each shard, and a line at their mean.

    Args:
        title: its first line.
        values: rows of each shard; at least one shard.
    """
    largest, total = max(values.values()), sum(values.values())
    scale = _BAR / largest if largest else 0.0
    parts = _head(title, f"{total:,} rows; the fullest shard has {unevenness(values):.3f} times the mean")
    for number, (name, value) in enumerate(values.items()):
        y, length = _TOP + _ROW * number, value * scale
        share = f"{value:,}  ({100 * value / total:.1f} %)" if total else "0"
        parts += [
            _text(_LEFT - 12, y + 20, name, _DARK, 'text-anchor="end"'),
            f'<rect x="{_LEFT}" y="{y + 4}" width="{length:.1f}" height="22" rx="3" fill="{_FILL}"/>',
            _text(_LEFT + length + 12, y + 20, share, _DARK),
        ]
    mean, end = _LEFT + total / len(values) * scale, _TOP + _ROW * len(values)
    line = f'x1="{mean:.1f}" y1="{_TOP - 2}" x2="{mean:.1f}" y2="{end + 4}"'
    parts += [
        f'<line {line} stroke="{_MARK}" stroke-width="1.5" stroke-dasharray="5 4"/>',
        _text(mean, end + 22, f"mean {total / len(values):,.0f}", _MARK, 'text-anchor="middle"'),
    ]
    return Panel(title, end + _BOTTOM, tuple(parts))


def latency_panel(title: str, samples: Iterable[Sample], closed: float, switched: float, around_s: float) -> Panel:
    """How long transactions took around a switch: a point for each, at the moment when it began.

    Args:
        title: its first line.
        samples: those that began too early or too late are left out.
        closed: when the moving keys were closed, by the monotonic clock, in seconds.
        switched: when they were open again.
        around_s: seconds that are shown before and after that.
    """
    began, ended = closed - around_s, switched + around_s
    shown = sorted((each for each in samples if began <= each.began <= ended), key=lambda each: each.moving)
    top = max((each.ms for each in shown), default=1.0)
    across, bottom = _BAR + _RIGHT - 30, _TOP + _PLOT

    def x(moment: float) -> float:
        return _LEFT + (moment - began) / (ended - began) * across

    longest = max((each.ms for each in shown if each.moving), default=0.0)
    parts = _head(
        title,
        f"{len(shown):,} transactions; moving keys were closed for {(switched - closed) * 1000:.0f} ms, "
        f"and the longest transaction on them took {longest:.0f} ms",
    )
    band = f'x="{x(closed):.1f}" y="{_TOP}" width="{max(1.0, x(switched) - x(closed)):.1f}" height="{_PLOT}"'
    parts.append(f'<rect {band} fill="{_BAND}"/>')
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * _PLOT
        parts += [
            f'<line x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + across}" y2="{y:g}" stroke="#e4e7eb"/>',
            _text(_LEFT - 12, y + 5, f"{top * share:.0f} ms" if top >= 10 else f"{top * share:.1f} ms", _PALE,
                  'text-anchor="end"'),
        ]  # fmt: skip
    for each in shown:
        fill = _MARK if each.moving else _FILL
        parts.append(
            f'<circle cx="{x(each.began):.1f}" cy="{bottom - each.ms / top * _PLOT:.1f}" r="2" fill="{fill}"/>'
        )
    below = bottom + 22
    parts += [
        _text(_LEFT, below, f"-{around_s:g} s", _PALE),
        _text(_LEFT + across, below, f"+{around_s:g} s", _PALE, 'text-anchor="end"'),
        _text((x(closed) + x(switched)) / 2, below, "the switch", _PALE, 'text-anchor="middle"'),
        _text(_LEFT + across * 0.2, below, "keys that move", _MARK, 'text-anchor="middle"'),
        _text(_LEFT + across * 0.8, below, "keys that stay", _FILL, 'text-anchor="middle"'),
    ]
    return Panel(title, bottom + _BOTTOM, tuple(parts))


def _head(title: str, below: str) -> list[str]:
    return [_text(20, 30, title, _DARK, 'font-size="17" font-weight="600"'), _text(20, 52, below, _PALE)]


def _text(x: float, y: float, content: str, color: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" fill="{color}" {more}>{escape(content)}</text>'
