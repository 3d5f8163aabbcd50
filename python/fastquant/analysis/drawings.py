"""The page's drawings, as inline SVG whose colours its style sheet gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .text import significant

if TYPE_CHECKING:
    from .result import OutputReport, WeightReport

WIDTH, HEIGHT = 420, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 4, 4, 6, 24
# More channels than this are drawn in groups.
_MOST_CHANNELS = 256


class _Scale:
    """Maps values linearly to coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if not low < high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high = low, high
        self._start, self._factor = start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self.low) * self._factor, 1)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def _svg(what: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def histogram(output: OutputReport, name: str) -> str:
    """A layer's values, counted, and a pair of lines for each range to clip them to."""
    counts = output.histogram
    width = output.high - output.low
    x = _Scale(output.low - 0.06 * width, output.high + 0.06 * width, _LEFT, WIDTH - _RIGHT)
    # Logarithmic: the tails, which are what clipping is about, hold few of the values.
    heights = [math.log1p(count) for count in counts]
    y = _Scale(0, max(heights, default=1) or 1, HEIGHT - _BOTTOM, _TOP)
    step = width / max(len(counts), 1)
    outline = [f"M{x(output.low)} {y(0)}"]
    for index, height in enumerate(heights):
        outline.append(f"V{y(height)}H{x(output.low + (index + 1) * step)}")
    outline.append(f"V{y(0)}Z")
    parts = [f'<path class="counts" d="{"".join(outline)}"/>', _axis(x, y(0))]
    ranges = [(clipping.method, clipping.low, clipping.high) for clipping in output.clippings]
    if output.clip_low is not None and output.clip_high is not None:
        ranges.insert(0, ("use", output.clip_low, output.clip_high))
    for method, low, high in ranges:
        ends = [end for end in (low, high) if x.holds(end)]
        if ends:
            path = "".join(f"M{x(end)} {_TOP}V{y(0)}" for end in ends)
            parts.append(f'<path class="line {method}" d="{path}"/>')
    spoken = ", ".join(
        f"{'range in use' if method == 'use' else method} {significant(low)} to {significant(high)}"
        for method, low, high in ranges
    )
    return _svg(
        f"Histogram of the output of {name}, from {significant(output.low)} to "
        f"{significant(output.high)}, counts on a logarithmic scale; {spoken}",
        parts,
    )


def _axis(x: _Scale, y: float) -> str:
    ticks = [x.low, x.high]
    if x.low < 0 < x.high:
        ticks.append(0.0)
    anchors = {x.low: "start", x.high: "end", 0.0: "middle"}
    texts = "".join(
        f'<text x="{x(tick)}" y="{y + 16}" text-anchor="{anchors[tick]}">'
        f"{significant(tick) if tick else '0'}</text>"
        for tick in ticks
        if tick or not _near(x, 0.0)
    )
    zero = f"M{x(0)} {y}v4" if x.holds(0) else ""
    return f'<path class="axis" d="M{_LEFT} {y}H{WIDTH - _RIGHT}{zero}"/>{texts}'


def _near(x: _Scale, value: float) -> bool:
    """Whether a label at this value would touch those of the ends."""
    return min(x(value) - x(x.low), x(x.high) - x(value)) < 60


def channels(weight: WeightReport, name: str) -> str:
    """The range of each output channel of a weight, one vertical stroke for each."""
    pairs = list(zip(weight.channel_low, weight.channel_high, strict=True))
    group = -(-len(pairs) // _MOST_CHANNELS)
    pairs = [
        (min(low for low, _ in some), max(high for _, high in some))
        for some in (pairs[start : start + group] for start in range(0, len(pairs), group))
    ]
    y = _Scale(min(weight.low, 0), max(weight.high, 0), HEIGHT - _BOTTOM, _TOP)
    x = _Scale(0, len(pairs), _LEFT, WIDTH - _RIGHT)
    stroke = max(1.0, min(12.0, 0.7 * (WIDTH - _LEFT - _RIGHT) / len(pairs)))
    path = "".join(
        f"M{x(index + 0.5)} {y(low)}V{y(high) - 0.5:.1f}" for index, (low, high) in enumerate(pairs)
    )
    each = "each output channel" if group == 1 else f"each group of {group} output channels"
    return _svg(
        f"Weight of {name}: smallest and largest value of {each}, from {significant(weight.low)} "
        f"to {significant(weight.high)}",
        [
            f'<path class="channels" stroke-width="{stroke:.1f}" d="{path}"/>',
            f'<path class="axis" d="M{_LEFT} {y(0)}H{WIDTH - _RIGHT}"/>',
            f'<text x="{_LEFT}" y="{HEIGHT - 6}">channel 0</text>',
            f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">'
            f"{len(weight.channel_low) - 1}</text>",
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{significant(weight.low)} … {significant(weight.high)}</text>",
        ],
    )


def swatch(method: str) -> str:
    """A piece of a method's line, for a legend."""
    return (
        '<svg class="swatch" viewBox="0 0 36 8" aria-hidden="true">'
        f'<path class="line {method}" d="M0 4H36"/></svg>'
    )
