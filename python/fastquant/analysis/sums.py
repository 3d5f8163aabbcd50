"""Measures that add up over batches: the error of a tensor, and the values that it holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._core.dtypes import is_torch_quantized
from .._native import ops
from .._quantized.tensor import QuantizedTensor, parts
from .._torch.private import tree_leaves
from ..utils import is_per_channel
from .errors import AnalysisError
from .grids import Grid

HISTOGRAM_BINS = 2048


class ErrorSums:
    """What signal-to-noise ratio and cosine of two streams of tensors are computed from."""

    def __init__(self) -> None:
        # As the op observe_error_ adds them.
        self._sums: Tensor | None = None

    def add(
        self, reference: Tensor, other: Tensor, grid: Grid | None = None, used: Tensor | None = None
    ) -> None:
        """Count a tensor and what became of it; elements that are not finite are left out.

        Args:
            reference: floating.
            other: floating, or quantized with one scale.
            grid: what `other` is rounded to first; one that `counts`.
            used: where to note which integers of the grid the reference takes, if given.
        """
        reference = reference.detach().float()
        if self._sums is None:
            self._sums = torch.zeros(5, dtype=torch.float64, device=reference.device)
        settings: tuple[float | None, int, int, int] = (None, 0, 0, 0)
        integers = as_integers(other)
        if integers is not None:
            values, scale, zero_point = integers
            settings = (scale, zero_point, 0, 0)
        else:
            values = other.detach().float()
            if grid is not None:
                settings = (float(grid.scale), int(grid.zero_point), grid.quant_min, grid.quant_max)
        counts = reference.new_empty(0, dtype=torch.uint8) if used is None else used
        ops.observe_error_(reference, values, *settings, self._sums, counts)

    def _sum(self, which: int) -> float:
        return 0.0 if self._sums is None else float(self._sums[which])

    @property
    def elements(self) -> float:
        """How many pairs were counted."""
        return self._sum(0)

    @property
    def signal(self) -> float:
        """The sum of the reference's squares."""
        return self._sum(1)

    @property
    def noise(self) -> float:
        """The sum of the error's squares."""
        return self._sum(2)

    @property
    def clipped(self) -> int:
        """How many of the reference's elements were beyond the grid, where integers were noted."""
        return int(self._sum(4))

    @property
    def noise_ratio(self) -> float:
        """Power of the error over power of the reference; NaN where nothing was counted."""
        if self.elements == 0:
            return math.nan
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal else math.inf

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite where there is no error."""
        return decibels(self.noise_ratio)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, as vectors; NaN where nothing was counted."""
        if self.elements == 0:
            return math.nan
        shared = self._sum(3)
        other = self.signal + 2 * shared + self.noise
        norm = math.sqrt(self.signal) * math.sqrt(max(other, 0.0))
        if norm == 0:
            return 1.0 if self.signal == other else 0.0
        return max(-1.0, min(1.0, (self.signal + shared) / norm))


def decibels(noise_ratio: float) -> float:
    """A signal-to-noise ratio in dB, from noise over signal."""
    if math.isnan(noise_ratio):
        return math.nan
    if noise_ratio == 0:
        return math.inf
    return -10 * math.log10(noise_ratio) if noise_ratio < math.inf else -math.inf


class OutputError:
    """The error of a model's output: of all its floating tensors, each weighing the same."""

    def __init__(self) -> None:
        self._leaves: list[ErrorSums] = []

    def add(self, reference: Any, other: Any) -> None:
        """Count the float model's output for a batch, and another model's."""
        pairs = list(zip(floating(reference), floating(other), strict=False))
        if not pairs:
            raise AnalysisError(
                f"the model's output ({type(reference).__name__}) holds no floating tensor, so "
                "there is no error to measure; pass forward=lambda model, batch: ... that "
                "returns one"
            )
        self._leaves += [ErrorSums() for _ in pairs[len(self._leaves) :]]
        for sums, (a, b) in zip(self._leaves, pairs, strict=False):
            require_same_shape("the output of the model", a, b)
            sums.add(a, b)

    @property
    def sqnr(self) -> float:
        """In dB."""
        ratios = [sums.noise_ratio for sums in self._leaves]
        return decibels(sum(ratios) / len(ratios)) if ratios else math.nan

    @property
    def cosine(self) -> float:
        """Mean over the tensors."""
        cosines = [sums.cosine for sums in self._leaves]
        return sum(cosines) / len(cosines) if cosines else math.nan


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in a model's output; quantized ones are dequantized."""
    leaves = [as_float(leaf) for leaf in tree_leaves(output)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def as_float(x: Any) -> Any:
    """A quantized tensor, of whatever class, as a floating one; anything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    if callable(getattr(x, "dequantize", None)) and hasattr(x, "int_repr"):
        quantized = getattr(x, "is_quantized", True) or type(x) is not Tensor
        return x.dequantize() if quantized else x
    return x


def as_integers(x: Any) -> tuple[Tensor, float, int] | None:
    """Integers, scale and zero point of a quantized tensor of 8 bits, of whatever class."""
    if isinstance(x, QuantizedTensor):
        return parts(x)
    if not isinstance(x, Tensor) or not is_torch_quantized(x) or is_per_channel(x.qscheme()):
        return None
    values = x.int_repr()
    is_byte = values.element_size() == 1  # int32 where dtype is qint32
    return (values, x.q_scale(), x.q_zero_point()) if is_byte else None


def require_same_shape(what: str, a: Tensor, b: Tensor) -> None:
    """Raise AnalysisError, in which `what` names the tensor, for two of different shapes."""
    if a.shape != b.shape:
        raise AnalysisError(
            f"{what} has the shape {list(a.shape)} in the float model and {list(b.shape)} in the "
            "quantized one"
        )


class Values:
    """What a float tensor's values are, and what a grid makes of them."""

    def __init__(self, grid: Grid | None, ch_axis: int) -> None:
        self.grid = grid
        self.ch_axis = ch_axis
        self._elements = self._clipped = 0
        self._used: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.histogram: F.HistogramState | None = None
        self.channels: F.MinMaxState | None = None

    def add(self, x: Tensor) -> None:
        """Count a tensor."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        x = x.reshape(1) if x.dim() == 0 else x
        axis = self.ch_axis if -x.dim() <= self.ch_axis < x.dim() else -1
        channels = x.shape[axis]
        if self.channels is None or self.histogram is None:
            self.shape = tuple(x.shape)
            self.channels = F.minmax_state(channels, device=x.device)
            self.histogram = F.histogram_state(HISTOGRAM_BINS, device=x.device)
        if channels == self.channels.min_val.numel():
            F.observe_minmax_(x, *self.channels, ch_axis=axis % x.dim())
        else:  # such as the last axis of attention, as long as the input
            everything = F.minmax_state(1, device=x.device)
            F.observe_minmax_(x, *everything)
            self.channels.min_val.clamp_(max=everything.min_val)
            self.channels.max_val.clamp_(min=everything.max_val)
            self.channels.nonfinite_count.add_(everything.nonfinite_count)
        F.observe_histogram_(x, *self.histogram)

    def add_clipped(self, x: Tensor) -> None:
        """Count which elements of a tensor are beyond the grid."""
        if self.grid is not None:
            q = self.grid.integers(x.detach())
            outside = (q < self.grid.quant_min) | (q > self.grid.quant_max)
            self._elements += x.numel()
            self._clipped += int((outside & q.isfinite()).sum())

    def add_error(self, sums: ErrorSums, x: Tensor, other: Tensor) -> None:
        """Count the error of x rounded to the grid, and what the grid makes of x.

        Args:
            sums: to which the error is added; belongs to these values.
            x: floating.
            other: what is rounded: x, or what a quantized layer gives in its place.
        """
        grid = self.grid
        if grid is None or not grid.counts or other.dtype != torch.float32:
            sums.add(x, other if grid is None else grid.quantized(other))
            self.add_clipped(x)
            return
        if self._used is None:
            self._used = torch.zeros(grid.levels, dtype=torch.uint8, device=x.device)
        before = sums.clipped
        sums.add(x, other, grid, self._used)
        self._elements += x.numel()
        self._clipped += sums.clipped - before

    def clipped_share(self) -> float:
        """The share of elements more than half a step beyond the grid's ends."""
        return self._clipped / self._elements if self._elements else 0.0

    def levels_used(self) -> float | None:
        """The share of the grid's integers that occur; None where they are not counted."""
        return None if self._used is None else float(self._used.float().mean())

    def low(self) -> float:
        """The smallest value."""
        return math.nan if self.channels is None else float(self.channels.min_val.min())

    def high(self) -> float:
        """The largest value."""
        return math.nan if self.channels is None else float(self.channels.max_val.max())

    def dead_channels(self) -> int:
        """How many channels held one value only, or none."""
        if self.channels is None:
            return 0
        return int((self.channels.min_val >= self.channels.max_val).sum())

    def lost_channels(self) -> int:
        """How many more channels hold one value only after quantization."""
        if self.channels is None or self.grid is None or self.grid.ch_axis is not None:
            return 0
        low, high = (
            self.grid.integers(end).clamp(self.grid.quant_min, self.grid.quant_max)
            for end in (self.channels.min_val, self.channels.max_val)
        )
        return int(((low == high) & (self.channels.min_val < self.channels.max_val)).sum())

    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return 0 if self.channels is None else int(self.channels.nonfinite_count)
