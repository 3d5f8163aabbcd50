"""The analysis as Markdown and as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Analysis, LayerReport

_SHOWN = 20


def number(value: float | None, digits: int = 1) -> str:
    """A number for people; a dash for one that was not measured."""
    return _formatted(value, f".{digits}f")


def significant(value: float | None, digits: int = 3) -> str:
    """A number by its leading digits, for values of any magnitude."""
    return _formatted(value, f".{digits}g")


def _formatted(value: float | None, form: str) -> str:
    # Format specifications write infinities as "inf" and "-inf", too.
    return "-" if value is None or math.isnan(value) else format(value, form)


def percent(share: float | None) -> str:
    """A share in percent."""
    if share is None:
        return "-"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


_UNITS = (("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def size(count: int) -> str:
    """A number of bytes."""
    unit, factor = _unit(count)
    return f"{number(count / factor, _digits(unit))} {unit}"


def sizes(before: int, after: int) -> str:
    """Two numbers of bytes in one unit, to be compared."""
    unit, factor = _unit(max(before, after))
    digits = _digits(unit)
    return f"{number(before / factor, digits)} → {number(after / factor, digits)} {unit}"


def _unit(count: int) -> tuple[str, float]:
    return next(((unit, factor) for unit, factor in _UNITS if count >= factor), _UNITS[-1])


def _digits(unit: str) -> int:
    return 0 if unit == "B" else 1


def summary(analysis: Analysis) -> list[str]:
    """What to know in a few sentences."""
    quality = verdict(analysis.sqnr)
    lines = [
        f"The quantized model's output has {number(analysis.sqnr)} dB signal-to-quantization-noise "
        f"ratio (cosine {number(analysis.cosine, 5)}): {quality}."
    ]
    if analysis.float_metric is not None and analysis.quantized_metric is not None:
        lines.append(
            f"Metric: {significant(analysis.float_metric, 5)} in float, "
            f"{significant(analysis.quantized_metric, 5)} quantized."
        )
    if analysis.layers:
        worst = analysis.ranked()[0]
        why = "; ".join(reasons(worst))
        what = (
            "quantized alone, it leaves the model's output"
            if worst.sensitivity is not None
            else "its own output has"
        )
        lines.append(
            f"Most damage is done by {worst.name} ({worst.kind}): {what} "
            f"{number(worst.damage)} dB{f'; {why}' if why else ''}."
        )
    before = sum(layer.float_bytes for layer in analysis.layers)
    after = sum(layer.quantized_bytes for layer in analysis.layers)
    if after:
        lines.append(
            f"Weights and outputs of the {len(analysis.layers)} quantized layers take "
            f"{size(after)} instead of {size(before)}."
        )
    lines.append(f"Measured on {analysis.samples} samples in {analysis.batches} batches.")
    return [*lines, *analysis.notes]


def verdict(sqnr: float) -> str:
    """A signal-to-quantization-noise ratio in words."""
    for least, words in ((30, "close to the float model"), (20, "small differences")):
        if sqnr >= least:
            return words
    return "clear differences" if sqnr >= 10 else "little of the float model's output is left"


def reasons(layer: LayerReport) -> list[str]:
    """What stands out in a layer's measures, in words."""
    found = []
    output, weight = layer.output, layer.weight
    if output is not None:
        if output.nonfinite:
            found.append(f"{output.nonfinite} of its values are NaN or infinite")
        if output.clipped_share > 0.01:
            found.append(f"{percent(output.clipped_share)} of its output is clipped")
        if output.lost_channels:
            found.append(
                f"{output.lost_channels} of {output.channels} channels hold one value only once "
                "they are quantized"
            )
        if output.levels_used is not None and output.levels_used < 0.15:
            found.append(f"its output uses {percent(output.levels_used)} of the levels")
        if output.bits is not None and output.bits < 8:
            found.append(f"its output has {output.bits} bits")
    if weight is not None:
        if weight.bits is not None and weight.bits < 8:
            found.append(f"its weight has {weight.bits} bits")
        if weight.sqnr < 25:
            found.append(f"its weight keeps {number(weight.sqnr)} dB")
        if weight.nonfinite:
            found.append(f"{weight.nonfinite} of its weights are NaN or infinite")
    return found


_COLUMNS = (
    "rank", "layer", "kind", "alone → output dB", "all but it dB", "own dB", "accumulated dB",
    "weight dB", "clipped", "levels", "scale", "ms float → int8",
)  # fmt: skip


def _rows(layers: Sequence[LayerReport]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for rank, layer in enumerate(layers, start=1):
        output, weight, sensitivity = layer.output, layer.weight, layer.sensitivity
        rows.append(
            (
                str(rank),
                layer.name or "the model itself",
                layer.kind,
                number(None if sensitivity is None else sensitivity.only_sqnr),
                number(None if sensitivity is None else sensitivity.without_sqnr),
                number(None if output is None else output.sqnr),
                number(None if output is None else output.accumulated_sqnr),
                number(None if weight is None else weight.sqnr),
                percent(None if output is None else output.clipped_share),
                percent(None if output is None else output.levels_used),
                significant(None if output is None else output.scale),
                f"{number(layer.float_ms, 2)} → {number(layer.quantized_ms, 2)}",
            )
        )
    return rows


def markdown(analysis: Analysis) -> str:
    """A summary and a table, worst layers first."""
    lines = [f"# {analysis.model}", "", *(f"- {line}" for line in summary(analysis)), ""]
    lines += [_markdown_row(_COLUMNS), "|---:|---|---|" + "---:|" * (len(_COLUMNS) - 3)]
    lines += [_markdown_row(row) for row in _rows(analysis.ranked())]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def terminal(analysis: Analysis) -> str:
    """A summary and the worst layers, in columns."""
    ranked = analysis.ranked()
    rows = [_COLUMNS, *_rows(ranked[:_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [analysis.model, "", *summary(analysis), ""]
    for row in rows:
        cells = [
            cell.ljust(width) if 1 <= column <= 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if len(ranked) > _SHOWN:
        lines.append(f"… and {len(ranked) - _SHOWN} more layers")
    return "\n".join(lines)
