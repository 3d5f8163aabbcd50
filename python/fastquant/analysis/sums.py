"""Measures that add up over batches: the error of a tensor, and the values that it holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._torch.private import tree_leaves
from .errors import AnalysisError
from .grids import Grid

HISTOGRAM_BINS = 2048
# Elements of which dot products are taken at once: a megabyte and a half of three fp32 tensors.
_BLOCK = 1 << 17


class ErrorSums:
    """What signal-to-noise ratio and cosine of two streams of tensors are computed from."""

    def __init__(self) -> None:
        self.elements = 0
        self.signal = self.noise = self.other = self.product = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count a tensor and what became of it; elements that are not finite are left out."""
        a, b = reference.detach().float().flatten(), other.detach().float().flatten()
        sums = _products(a, b)
        if not math.isfinite(sum(sums)):
            finite = a.isfinite() & b.isfinite()
            sums = _products(a[finite].double(), b[finite].double())
        signal, noise, shared = sums
        self.elements += a.numel()
        self.signal += signal
        self.noise += noise
        # Of reference + error with itself, and with the reference.
        self.other += signal + 2 * shared + noise
        self.product += signal + shared

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
        norm = math.sqrt(self.signal) * math.sqrt(max(self.other, 0.0))
        if norm == 0:
            return 1.0 if self.signal == self.other else 0.0
        return max(-1.0, min(1.0, self.product / norm))


def _products(a: Tensor, b: Tensor) -> list[float]:
    """The dot products of the reference, the error, and both with each other.

    They are summed in fp64 over blocks, whose error stays in the cache and whose fp32 sums are
    short enough to be accurate.
    """
    error = torch.empty_like(a[:_BLOCK])
    products = []
    for x, y in zip(torch.split(a, _BLOCK), torch.split(b, _BLOCK), strict=True):
        e = torch.sub(y, x, out=error[: x.numel()])
        products += [torch.dot(x, x), torch.dot(e, e), torch.dot(x, e)]
    result: list[float] = torch.stack(products).double().reshape(-1, 3).sum(0).tolist()
    return result


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
        self._levels: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.histogram: F.HistogramState | None = None
        self.channels: F.MinMaxState | None = None

    def add(self, x: Tensor, integers: bool = True) -> None:
        """Count a tensor.

        Args:
            x: its values.
            integers: whether to count what the grid makes of it, too.
        """
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
        if integers and self.grid is not None:
            self._elements += x.numel()
            if self.grid.ch_axis is None:
                self._add_integers(x, self.grid)
            else:
                q = self.grid.integers(x)
                outside = (q < self.grid.quant_min) | (q > self.grid.quant_max)
                self._clipped += int((outside & q.isfinite()).sum())

    def _add_integers(self, x: Tensor, grid: Grid) -> None:
        """Count how often each integer occurs: in a histogram with a bin for each of them."""
        half = grid.scale.double() / 2
        low, high = (end.item() for end in (grid.ends()[0] - half, grid.ends()[1] + half))
        if self._levels is None:
            self._levels = torch.zeros(grid.levels, device=x.device)
        assert self.channels is not None
        if self.channels.min_val.min() < low or self.channels.max_val.max() > high:
            inside = x.clamp(low, high)
            changed = inside != x
            if self.nonfinite():
                changed &= x.isfinite()
            self._clipped += int(changed.sum())
            x = inside
        ends = torch.tensor([low, high], dtype=torch.float32, device=x.device)
        F.observe_histogram_(x, self._levels, ends[0], ends[1])

    def clipped_share(self) -> float:
        """The share of elements more than half a step beyond the grid's ends."""
        return self._clipped / self._elements if self._elements else 0.0

    def levels_used(self) -> float | None:
        """The share of the grid's integers that occur; None where they are not counted."""
        return None if self._levels is None else float((self._levels > 0).float().mean())

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
