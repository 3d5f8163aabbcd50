"""What an analysis found, as frozen values that can be sorted, written and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from . import page, text


@dataclass(frozen=True)
class Clipping:
    """One way to choose a layer's range from the histogram of its values.

    Attributes:
        method: its name.
        low: smallest value that is not clipped.
        high: largest.
        sqnr: what rounding and clipping would leave of the output, in dB.
    """

    method: str
    low: float
    high: float
    sqnr: float


@dataclass(frozen=True)
class WeightReport:
    """What became of a layer's weight.

    Attributes:
        shape: its shape.
        bits: of the integers; None for a floating dtype.
        ch_axis: the axis of its scales; None for one scale.
        scale: smallest and largest scale; None for a floating dtype.
        zero_point: smallest and largest zero point.
        low: smallest value.
        high: largest value.
        channel_low: smallest value of each output channel.
        channel_high: largest value of each output channel.
        clipped_share: share of elements beyond the integers' range.
        levels_used: share of integers that occur.
        dead_channels: output channels whose weights are all equal.
        nonfinite: NaN and infinite elements.
        sqnr: signal-to-quantization-noise ratio in dB.
        cosine: of the angle between the float and the quantized weight.
    """

    shape: tuple[int, ...]
    bits: int | None
    ch_axis: int | None
    scale: tuple[float, float] | None
    zero_point: tuple[float, float] | None
    low: float
    high: float
    channel_low: tuple[float, ...]
    channel_high: tuple[float, ...]
    clipped_share: float
    levels_used: float | None
    dead_channels: int
    nonfinite: int
    sqnr: float
    cosine: float


@dataclass(frozen=True)
class OutputReport:
    """What became of a layer's output.

    Attributes:
        shape: of the first one.
        bits: of the integers; None where the output stays floating.
        scale: step between neighbouring values.
        zero_point: the integer of 0.
        low: smallest value in float.
        high: largest value in float.
        clip_low: smallest value that the integers hold.
        clip_high: largest value that the integers hold.
        clipped_share: share of elements beyond these two.
        levels_used: share of integers that occur.
        channels: how many channels it has.
        dead_channels: those with one value only, in float already.
        lost_channels: those with one value only once they are quantized.
        nonfinite: NaN and infinite elements in float.
        sqnr: signal-to-quantization-noise ratio in dB, of the layer alone: its input in float.
        cosine: likewise.
        accumulated_sqnr: the same with all layers before it quantized as well.
        accumulated_cosine: likewise.
        histogram: how many values in each of equal bins between `low` and `high`.
        clippings: what each range method would choose.
    """

    shape: tuple[int, ...]
    bits: int | None
    scale: float | None
    zero_point: float | None
    low: float
    high: float
    clip_low: float | None
    clip_high: float | None
    clipped_share: float
    levels_used: float | None
    channels: int
    dead_channels: int
    lost_channels: int
    nonfinite: int
    sqnr: float
    cosine: float
    accumulated_sqnr: float
    accumulated_cosine: float
    histogram: tuple[float, ...]
    clippings: tuple[Clipping, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How much a layer matters to the output of the model.

    Attributes:
        only_sqnr: of the model's output with this layer alone quantized, in dB.
        without_sqnr: with all layers but this one quantized.
        only_metric: the user's metric with this layer alone quantized.
        without_metric: with all but this one.
    """

    only_sqnr: float
    without_sqnr: float
    only_metric: float | None = None
    without_metric: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model.
        kind: class of the quantized module.
        calls: how often it was called in one batch.
        weight: None for layers without a quantized weight.
        output: None for outputs that hold no floating tensor.
        sensitivity: None where it was not asked for.
        float_ms: least time of a forward of the float layer, in milliseconds; None where it
            was not measured.
        quantized_ms: of the converted layer.
        float_bytes: of its weight, and of its output for one batch, in float.
        quantized_bytes: the same, quantized.
    """

    name: str
    kind: str
    calls: int
    weight: WeightReport | None
    output: OutputReport | None
    sensitivity: Sensitivity | None
    float_ms: float | None
    quantized_ms: float | None
    float_bytes: int
    quantized_bytes: int

    @property
    def damage(self) -> float:
        """The signal-to-noise ratio in dB that the layer's rank goes by: the lower, the worse.

        That of the model's output with this layer alone quantized, where sensitivity was
        measured; else that of the layer's own output.
        """
        if self.sensitivity is not None:
            return _worst_if_nan(self.sensitivity.only_sqnr)
        if self.output is not None and not math.isnan(self.output.sqnr):
            return self.output.sqnr
        return self.weight.sqnr if self.weight is not None else math.inf


def _worst_if_nan(value: float) -> float:
    return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Analysis:
    """What quantization did to a model.

    Attributes:
        model: what the report calls it.
        layers: in the order of the model's definition.
        sqnr: signal-to-quantization-noise ratio of the model's output, in dB.
        cosine: of the angle between the float and the quantized output.
        float_metric: the user's metric of the float model.
        quantized_metric: the user's metric of the quantized model.
        batches: how many were run.
        samples: sum of the batches' first dimensions.
        seconds: how long the analysis took.
        notes: what a reader should know: what was not measured, and why.
    """

    model: str
    layers: tuple[LayerReport, ...]
    sqnr: float
    cosine: float
    float_metric: float | None
    quantized_metric: float | None
    batches: int
    samples: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise KeyError(f"no layer {name!r} was analysed; there are {known}")

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def ranked(self) -> tuple[LayerReport, ...]:
        """The layers, the one that does most damage first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.damage))

    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each layer, worst first, as `pandas.DataFrame` takes them.

        Keys of weight and output begin with `weight_` and `output_`; values per channel,
        histograms and clippings are left out.
        """
        return [{"rank": rank, **_flat(layer)} for rank, layer in enumerate(self.ranked(), start=1)]

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, written to `path` where one is given.

        Infinite and undefined numbers are the strings "Infinity", "-Infinity" and "NaN".
        """
        return _written(json.dumps(_plain(self), indent=1) + "\n", path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A summary and a table of the layers, worst first, written to `path` where given."""
        return _written(text.markdown(self), path)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page: summary, layers, histograms; returns its path."""
        path = Path(path)
        path.write_text(page.html(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return text.terminal(self)


def _written(content: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(content, encoding="utf-8")
    return content


def _plain(value: Any) -> Any:
    """Frozen values as dicts and lists that JSON can hold."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


_TOO_LONG = ("channel_low", "channel_high", "histogram", "clippings")


def _flat(layer: LayerReport) -> dict[str, Any]:
    record: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "damage": layer.damage}
    parts: tuple[tuple[str, Any, type], ...] = (
        ("", layer.sensitivity, Sensitivity),
        ("output_", layer.output, OutputReport),
        ("weight_", layer.weight, WeightReport),
    )
    for prefix, part, kind in parts:
        record |= {
            prefix + field.name: getattr(part, field.name, None)
            for field in fields(kind)
            if field.name not in _TOO_LONG
        }
    for name in ("calls", "float_ms", "quantized_ms", "float_bytes", "quantized_bytes"):
        record[name] = getattr(layer, name)
    return record
