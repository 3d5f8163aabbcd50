"""The analysis as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .._version import __version__
from . import drawings
from .text import number, percent, reasons, significant, sizes, summary, verdict

if TYPE_CHECKING:
    from .result import Analysis, LayerReport, OutputReport

_FOLDER = Path(__file__).parent
_RANKED = 15


def html(analysis: Analysis) -> str:
    """The page."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    name = escape(analysis.model)
    ranked = analysis.ranked()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: what quantization did</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}: what quantization did</h1>
</header>
<main>
{_summary(analysis)}
{_ranking(ranked)}
<h2 id="layers">Layers</h2>
<p>A row for each quantized layer. The head of a column sorts by it; a layer's name leads to its
histogram. All ratios are signal over error, in dB: the more, the better; 6 dB are one bit.</p>
<label hidden>Show only <input id="filter" type="search" placeholder="name or class"></label>
<p id="spoken" class="faint" role="status"></p>
{_table(ranked)}
<h2>Each layer</h2>
{"".join(_detail(rank, layer) for rank, layer in enumerate(ranked, start=1))}
</main>
<footer>
<p class="faint">Made by fastquant {__version__} in {number(analysis.seconds)} s.</p>
</footer>
<script>{script}</script>
</body>
</html>
"""


# --- summary ----------------------------------------------------------------------------------


def _summary(analysis: Analysis) -> str:
    tiles = [
        (f"{number(analysis.sqnr)} dB", "output, signal over error: " + verdict(analysis.sqnr))
    ]
    if analysis.float_metric is not None and analysis.quantized_metric is not None:
        before, after = analysis.float_metric, analysis.quantized_metric
        tiles.append(
            (f"{significant(before, 4)} → {significant(after, 4)}", "metric, float → quantized")
        )
    if analysis.layers:
        tiles.append(
            (analysis.ranked()[0].name or "the model itself", "the layer that does most damage")
        )
    float_bytes = sum(layer.float_bytes for layer in analysis.layers)
    quantized_bytes = sum(layer.quantized_bytes for layer in analysis.layers)
    tiles.append((sizes(float_bytes, quantized_bytes), "weights and outputs, float → quantized"))
    timed = [layer for layer in analysis.layers if layer.float_ms and layer.quantized_ms]
    if timed:
        before = sum(layer.float_ms or 0 for layer in timed)
        after = sum(layer.quantized_ms or 0 for layer in timed)
        tiles.append(
            (f"{number(before, 2)} → {number(after, 2)} ms", "time of the layers, float → int8")
        )
    items = "".join(
        f"<li><b>{escape(b)}</b><small>{escape(small)}</small></li>" for b, small in tiles
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary(analysis))
    return f'<ul class="tiles">{items}</ul>\n{lines}'


def _ranking(ranked: Sequence[LayerReport]) -> str:
    """Bars, the longer the more damage: the loss against a ratio at which nothing is seen."""
    shown = [layer for layer in ranked[:_RANKED] if layer.damage < math.inf]
    if not shown:
        return ""
    # The error's amplitude over the signal's, in percent of it.
    errors = [
        min(10 ** (-layer.damage / 20), 10.0) if layer.damage > -math.inf else 10.0
        for layer in shown
    ]
    most = max(errors)
    rows = "".join(
        f'<tr><td class="text">{_link(rank, layer)}</td><td>{number(layer.damage)} dB</td>'
        f'<td class="room"><span style="width:{100 * error / most:.1f}%"></span></td></tr>'
        for rank, (layer, error) in enumerate(zip(shown, errors, strict=True), start=1)
    )
    alone = shown[0].sensitivity is not None
    what = (
        "The error of the model's output with this layer alone quantized"
        if alone
        else "The error of the layer's own output, its input in float"
    )
    return (
        f"<h2>Where the damage is done</h2>\n<p>{what}: the longer, the worse. The number is the "
        f'ratio of signal to error.</p>\n<table class="ranking"><tbody>{rows}</tbody></table>'
    )


# --- table ------------------------------------------------------------------------------------


class _Column(NamedTuple):
    head: str
    hint: str
    value: Callable[[LayerReport], float | None]
    shown: Callable[[float | None], str]


def _of_output(field: str) -> Callable[[LayerReport], float | None]:
    return lambda layer: getattr(layer.output, field, None)


def _of_weight(field: str) -> Callable[[LayerReport], float | None]:
    return lambda layer: getattr(layer.weight, field, None)


def _of_sensitivity(field: str) -> Callable[[LayerReport], float | None]:
    return lambda layer: getattr(layer.sensitivity, field, None)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


_COLUMNS = (
    _Column(
        "only this, dB",
        "Model's output with this layer alone quantized",
        _of_sensitivity("only_sqnr"),
        number,
    ),
    _Column(
        "all but this, dB",
        "Model's output with all layers but this one quantized",
        _of_sensitivity("without_sqnr"),
        number,
    ),
    _Column(
        "only this, metric",
        "The metric with this layer alone quantized",
        _of_sensitivity("only_metric"),
        significant,
    ),
    _Column(
        "all but this, metric",
        "The metric with all layers but this one quantized",
        _of_sensitivity("without_metric"),
        significant,
    ),
    _Column("own, dB", "The layer's output, its input in float", _of_output("sqnr"), number),
    _Column(
        "so far, dB",
        "The layer's output with all layers quantized",
        _of_output("accumulated_sqnr"),
        number,
    ),
    _Column("weight, dB", "The weight", _of_weight("sqnr"), number),
    _Column(
        "clipped",
        "Share of the output beyond the range in use",
        _of_output("clipped_share"),
        percent,
    ),
    _Column(
        "levels",
        "Share of the integers that occur in the output",
        _of_output("levels_used"),
        percent,
    ),
    _Column("scale", "Step of the output's integers", _of_output("scale"), significant),
    _Column("zero point", "Integer of zero in the output", _of_output("zero_point"), _whole),
    _Column(
        "dead",
        "Channels that hold one value only, in float already",
        _of_output("dead_channels"),
        _whole,
    ),
    _Column(
        "lost",
        "Channels that hold one value only once quantized",
        _of_output("lost_channels"),
        _whole,
    ),
    _Column("non-finite", "NaN and infinite values of the output", _of_output("nonfinite"), _whole),
    _Column(
        "float, ms", "Time of the float layer", lambda layer: layer.float_ms, lambda v: number(v, 3)
    ),
    _Column(
        "int8, ms",
        "Time of the converted layer",
        lambda layer: layer.quantized_ms,
        lambda v: number(v, 3),
    ),
    _Column(
        "kB",
        "Weight and output for a batch, quantized",
        lambda layer: layer.quantized_bytes / 1000,
        number,
    ),
)


def _link(rank: int, layer: LayerReport) -> str:
    return f'<a href="#layer-{rank}">{escape(layer.name or "the model itself")}</a>'


def _table(ranked: Sequence[LayerReport]) -> str:
    columns = [
        column for column in _COLUMNS if any(column.value(layer) is not None for layer in ranked)
    ]
    heads = [
        '<th scope="col" class="text"><button type="button">layer</button></th>',
        '<th scope="col" aria-sort="ascending">'
        '<button type="button" title="Most damage first">rank</button></th>',
        '<th scope="col" class="text"><button type="button">class</button></th>',
    ]
    heads += [
        f'<th scope="col"><button type="button" title="{escape(column.hint, quote=True)}">'
        f"{escape(column.head)}</button></th>"
        for column in columns
    ]
    rows = []
    for rank, layer in enumerate(ranked, start=1):
        cells = [
            f'<th scope="row">{_link(rank, layer)}</th>',
            f'<td data-value="{rank}">{rank}</td>',
            f'<td class="text">{escape(layer.kind)}</td>',
        ]
        for column in columns:
            value = column.value(layer)
            cells.append(f'<td data-value="{_sortable(value)}">{escape(column.shown(value))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="wide" role="region" aria-label="Table of layers" tabindex="0">'
        f'<table class="layers"><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _sortable(value: float | None) -> str:
    """A value as JavaScript's Number reads it; NaN where there is none."""
    if value is None or math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(float(value))


# --- each layer -------------------------------------------------------------------------------


def _detail(rank: int, layer: LayerReport) -> str:
    name = layer.name or "the model itself"
    found = reasons(layer)
    note = f'<p class="stands-out">{escape("; ".join(found))}</p>' if found else ""
    return (
        f'<details id="layer-{rank}"{" open" if rank == 1 else ""}><summary><b>{escape(name)}</b>'
        f'<span class="faint">{escape(layer.kind)}, {number(layer.damage)} dB</span></summary>'
        f"{note}"
        f'<div class="inside">{_output(layer, name)}{_weight(layer, name)}</div>'
        "</details>\n"
    )


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in pairs
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _shape(sizes: Sequence[int]) -> str:
    return " \u00d7 ".join(map(str, sizes))


def _output(layer: LayerReport, name: str) -> str:
    output = layer.output
    if output is None:
        return ""
    facts = [
        ("shape, first batch", _shape(output.shape)),
        ("values in float", f"{significant(output.low)} to {significant(output.high)}"),
    ]
    if output.clip_low is not None:
        facts += [
            ("integers", f"{output.bits} bits, {percent(output.levels_used)} of them occur"),
            ("clipped", percent(output.clipped_share)),
        ]
    facts += [
        (
            "alone: signal over error, cosine",
            f"{number(output.sqnr)} dB, {number(output.cosine, 5)}",
        ),
        (
            "with all layers quantized",
            f"{number(output.accumulated_sqnr)} dB, {number(output.accumulated_cosine, 5)}",
        ),
        (
            "channels",
            f"{output.channels}: {output.dead_channels} dead, {output.lost_channels} lost",
        ),
    ]
    return (
        f"<section><h3>Output</h3>{drawings.histogram(output, name)}{_methods(output)}</section>"
        f"<section><h3>Measures</h3>{_facts(facts)}</section>"
    )


def _methods(output: OutputReport) -> str:
    rows = []
    if output.clip_low is not None and output.clip_high is not None:
        rows.append(("use", "in use", output.clip_low, output.clip_high, output.sqnr))
    rows += [(c.method, c.method, c.low, c.high, c.sqnr) for c in output.clippings]
    if not rows:
        return '<p class="faint">The output stays floating.</p>'
    cells = "".join(
        f'<tr><th scope="row">{drawings.swatch(method)}{shown}</th><td>{significant(low)}</td>'
        f"<td>{significant(high)}</td><td>{number(sqnr)} dB</td></tr>"
        for method, shown, low, high, sqnr in rows
    )
    return (
        '<table><thead><tr><th scope="col" class="text">range</th><th scope="col">from</th>'
        '<th scope="col">to</th><th scope="col">signal over error</th></tr></thead>'
        f"<tbody>{cells}</tbody></table>"
        '<p class="faint">Counts on a logarithmic scale; ends beyond the values have no line. The '
        "methods' ratios are of rounding and clipping this output alone.</p>"
    )


def _weight(layer: LayerReport, name: str) -> str:
    weight = layer.weight
    if weight is None:
        return ""
    scale = "-"
    axis = "a scale per channel" if weight.ch_axis is not None else "one scale"
    if weight.scale is not None:
        low, high = weight.scale
        scale = significant(low) if low == high else f"{significant(low)} to {significant(high)}"
    kind = "floating" if weight.bits is None else f"{weight.bits} bits, {axis}"
    facts = [
        ("shape", _shape(weight.shape)),
        ("stored as", kind),
        ("scale", scale),
        ("signal over error, cosine", f"{number(weight.sqnr)} dB, {number(weight.cosine, 5)}"),
        ("clipped", percent(weight.clipped_share)),
        ("integers that occur", percent(weight.levels_used)),
    ]
    return (
        f"<section><h3>Weight, by output channel</h3>{drawings.channels(weight, name)}"
        f"{_facts(facts)}</section>"
    )
