"""The range that a histogram's values are quantized to, by each method, and the error it makes.

Everything is in fp64 on the CPU, one channel at a time and one candidate at a time: these are the
definitions. docs/calibration.md explains them.

A histogram counts values in equal bins, and every method takes the values of a bin as spread
evenly over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.ranges import Range
from ..._core.schemes import RangeMethod, Scheme
from .basics import _compute_dtype, search_histogram_range

# The widths that the search for the least squared error tries, as shares of the whole range:
# k / 2048, of which neighbours differ by 1 in k or by 1/128, whichever is more.
WIDEST = 2048
_UNOBSERVED = (math.inf, -math.inf)
# How many values a quantized level must have on average for their divergence to mean anything.
VALUES_PER_LEVEL = 10
# The bin that holds 0 is a spike if it counts so many times what its neighbours do.
SPIKE = 4.0
# What counts as probability where there is none, in counts; that of MXNet and ONNX Runtime.
SMOOTHING = 1e-4
# Divergences that differ by less are equal: ONNX Runtime computes them in fp32.
RESOLUTION = 1e-6
# Where nothing diverges, rounding of the sums gives as much, which must not decide.
ROUNDING = 1e-12


class Grid(NamedTuple):
    """The integers that values are quantized to."""

    quant_min: int
    quant_max: int
    scheme: int
    symmetric_zero_point: int

    @property
    def steps(self) -> int:
        return self.quant_max - self.quant_min

    @property
    def symmetric_below(self) -> int:
        """How many levels lie below the zero point of a symmetric scheme."""
        return self.symmetric_zero_point - self.quant_min


class Counts(NamedTuple):
    """A histogram, fp64 `[bins]`, with something in it, over a range that is not a point."""

    counts: Tensor
    low: float
    high: float

    @property
    def width(self) -> float:
        bins = len(self.counts)
        return self.high / bins - self.low / bins

    @property
    def edges(self) -> Tensor:
        bins = len(self.counts)
        edges = self.low + self.width * torch.arange(bins + 1, dtype=torch.float64)
        edges[-1] = self.high
        return edges

    @property
    def total(self) -> float:
        return float(self.counts.sum())

    @property
    def bin_of_zero(self) -> int:
        """The bin that holds 0, or the nearest one."""
        position = -self.low / self.width
        return min(max(math.floor(position), 0), len(self.counts) - 1)


# --------------------------------------------------------------------------------------- error


def squared_error_below(
    x: Tensor, scale: float, below: int | Tensor, above: int | Tensor
) -> Tensor:
    """The integral of (y - Q(y))² from 0 to x.

    Q rounds to the nearest multiple of `scale` from `-below` to `above`. Each whole level
    contributes scale³ / 12, and the last one (x - its value)³ / 3.
    """
    level = torch.round(x / scale).clamp(torch.as_tensor(-below), torch.as_tensor(above))
    return level * (scale**3 / 12) + (x - level * scale) ** 3 / 3


def mean_squared_errors(histogram: Counts, scale: float, below: Tensor, steps: int) -> Tensor:
    """The error for each of some numbers of levels below 0, `[n]`."""
    below = below[:, None]
    errors = squared_error_below(histogram.edges, scale, below, steps - below).diff()
    return (histogram.counts * errors).sum(1) / (histogram.width * histogram.total)


def histogram_error(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The mean squared error of quantizing the values; NaN where there are none."""
    rows = histogram.detach().reshape(min_val.numel(), -1).to("cpu", torch.float64)
    errors = []
    for counts, low, high, s, z in zip(
        rows, *(_numbers(t) for t in (min_val, max_val, scale, zero_point)), strict=True
    ):
        total = float(counts.sum())
        if not (total > 0 and -math.inf < low <= high < math.inf):
            errors.append(math.nan)
        elif low == high:
            level = min(max(round(low / s) + z, quant_min), quant_max) - z
            errors.append((low - level * s) ** 2)
        else:
            of = Counts(counts, low, high)
            below = torch.tensor([z - quant_min])
            errors.append(float(mean_squared_errors(of, s, below, quant_max - quant_min)))
    return torch.tensor(errors, dtype=torch.float64, device=min_val.device).reshape(min_val.shape)


def _numbers(values: Tensor) -> list[float]:
    numbers: list[float] = values.detach().reshape(-1).to("cpu", torch.float64).tolist()
    return numbers


# ------------------------------------------------------------------------------------- methods

Ends = tuple[float, float]


def _whole(histogram: Counts, grid: Grid, percentile: float) -> Ends:
    return histogram.low, histogram.high


def widths() -> Iterator[float]:
    """The shares of the whole range that the search tries, from 1 down."""
    k = WIDEST
    while k > 0:
        yield k / WIDEST
        k -= max(1, k // 128)


def _least_squared_error(histogram: Counts, grid: Grid, percentile: float) -> Ends:
    """The range of the scale and zero point of least squared error, of all on a grid."""

    def errors(scale: float, below: Tensor) -> Tensor:
        return mean_squared_errors(histogram, scale, below, grid.steps)

    return _best_of_grid(errors, histogram.low, histogram.high, grid)


def _best_of_grid(
    errors: Callable[[float, Tensor], Tensor], low: float, high: float, grid: Grid
) -> Ends:
    """The range whose quantization has the least error.

    The scales are those of the whole range (made to hold 0) times `widths()`; the zero points are
    all of an affine scheme's, or the one of a symmetric scheme. Of equal errors, the first.

    Args:
        errors: the error of a scale, for each of some numbers of levels below 0.
        low: the smallest value.
        high: the largest value.
        grid: the integers.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    symmetric = grid.scheme == Scheme.SYMMETRIC
    if symmetric:
        whole = max(-low, high) / (grid.steps / 2)
        candidates = torch.tensor([grid.symmetric_below])
    else:
        whole = high / grid.steps - low / grid.steps
        # Of values on one side of 0, no levels are needed on the other.
        fewest, most = (grid.steps if high == 0 else 0), (0 if low == 0 else grid.steps)
        candidates = torch.arange(fewest, most + 1)
    best, ends = math.inf, (low, high)
    for share in widths():
        scale = share * whole
        # Few at a time: each has an error for every bin.
        for some in torch.split(candidates, 256):
            of_some = errors(scale, some)
            error = float(of_some.min())
            if error < best:
                below = int(some[of_some.argmin()])
                half, above = scale * (grid.steps / 2), grid.steps - below
                best = error
                ends = (-half, half) if symmetric else (-below * scale, above * scale)
    return ends


def least_error_range(
    x: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    grid = Grid(quant_min, quant_max, scheme, symmetric_zero_point)
    rows = x.detach().reshape(1, -1) if ch_axis is None else x.detach().movedim(ch_axis, 0)
    lows, highs = (x.new_full((len(rows),), end, dtype=_compute_dtype(x)) for end in _UNOBSERVED)
    for i, row in enumerate(rows):
        values = row[row.isfinite()].to("cpu", torch.float64)
        if not values.numel():
            continue
        low, high = float(values.min()), float(values.max())

        def errors(scale: float, below: Tensor, values: Tensor = values) -> Tensor:
            below = below[:, None]
            levels = torch.round(values / scale).clamp(-below, grid.steps - below)
            return (values - levels * scale).square().sum(1)

        # There is nothing to choose where all is 0.
        lows[i], highs[i] = _best_of_grid(errors, low, high, grid) if low or high else (0.0, 0.0)
    return lows, highs


def _below(histogram: Counts, x: float) -> float:
    """How many values lie below x."""
    position = (x - histogram.low) / histogram.width
    bin = min(max(math.floor(position), 0), len(histogram.counts) - 1)
    whole = float(histogram.counts[:bin].sum())
    return whole + float(histogram.counts[bin]) * min(max(position - bin, 0.0), 1.0)


def _percentile(histogram: Counts, grid: Grid, percentile: float) -> Ends:
    """The range that leaves out the smallest and largest `(100 - percentile) / 2` percent.

    For a symmetric scheme, that which leaves out the `100 - percentile` percent of largest size.
    """
    low, high = histogram.low, histogram.high
    kept = percentile / 100
    if kept == 1:
        return low, high
    edges = histogram.edges.tolist()
    if grid.scheme == Scheme.SYMMETRIC:
        points = sorted({0.0, *map(abs, edges)})

        def within(x: float) -> float:
            return _below(histogram, x) - _below(histogram, -x)

        reach = _crossing(points, within, kept * histogram.total)
        return -reach, reach
    out = (1 - kept) / 2 * histogram.total

    def below(x: float) -> float:
        return _below(histogram, x)

    return _crossing(edges, below, out), _crossing(edges, below, histogram.total - out)


def _crossing(points: list[float], count: Callable[[float], float], wanted: float) -> float:
    """Where a count that is linear between the points first reaches a number."""
    left, reached = points[0], count(points[0])
    for point in points[1:]:
        here = count(point)
        if here >= wanted and here > reached:
            return left + (point - left) * max(0.0, (wanted - reached) / (here - reached))
        left, reached = point, here
    return points[-1]


def _entropy(histogram: Counts, grid: Grid, percentile: float) -> Ends:
    """The range in which quantized values diverge least from the values themselves.

    The candidates reach equally far to both sides of the bin that holds 0, as far as there are
    bins. For each, P is the part of the histogram in it, with what lies beyond added to its ends,
    and Q is what `levels` equal groups of its bins keep of it. The divergence is that of Kullback
    and Leibler, of Q from P. Of equal ones, the smallest range is taken.
    """
    whole = (histogram.low, histogram.high)
    levels, bins = grid.steps + 1, len(histogram.counts)
    if histogram.total < VALUES_PER_LEVEL * levels:
        return whole
    counts, zero = without_spike(histogram), histogram.bin_of_zero
    if grid.scheme == Scheme.SYMMETRIC:
        # As many bins on both sides, so that groups are as wide as levels.
        longest = max(zero, bins - 1 - zero)
        padding = (longest - zero, longest - (bins - 1 - zero))
        counts, zero = torch.nn.functional.pad(counts, padding), longest
        shift = padding[0]
    else:
        shift = 0
    best, ends = math.inf, whole
    for reach in range(max(zero, len(counts) - 1 - zero) + 1):
        start, end = max(zero - reach, 0), min(zero + reach + 1, len(counts))
        if end - start < levels:
            continue
        divergence = divergence_of(counts, start, end, levels)
        if divergence < best * (1 - RESOLUTION) - ROUNDING:
            best = divergence
            low = histogram.low + histogram.width * (start - shift)
            high = histogram.low + histogram.width * (end - shift)
            ends = (max(low, whole[0]), min(high, whole[1]))
    return ends


def without_spike(histogram: Counts) -> Tensor:
    """The counts, where the bin that holds 0 has as many as the larger of its neighbours.

    Only where it has SPIKE times as many or more, as after ReLU: all of these are the number 0,
    which is always quantized without an error, and no part of the distribution.
    """
    counts, zero = histogram.counts, histogram.bin_of_zero
    if not histogram.low <= 0 <= histogram.high:
        return counts
    neighbours = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
    beside = max(map(float, neighbours), default=0.0)
    if counts[zero] < SPIKE * beside:
        return counts
    counts = counts.clone()
    counts[zero] = beside
    return counts


def divergence_of(counts: Tensor, start: int, end: int, levels: int) -> float:
    """How far Q diverges from P for the bins from start to end, which are `levels` or more.

    As ONNX Runtime's `HistogramCollector.get_entropy_threshold` defines it (after Migacz, 8-bit
    inference with TensorRT, GTC 2017, by way of MXNet): every group has the same whole number of
    bins, and the last also counts what is left; a bin of Q is what its group has, divided by how
    many of its bins are not empty in P, and rounded down.
    """
    inside = counts[start:end]
    p = inside.clone()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    if not bool(p.any()):
        return math.inf
    size = (end - start) // levels
    groups = levels * size
    in_groups = inside[:groups].reshape(levels, size).sum(1)
    in_groups[-1] += inside[groups:].sum()
    filled = (p[:groups] != 0).reshape(levels, size).sum(1)
    each = torch.where(filled > 0, (in_groups / filled.clamp(min=1)).floor(), 0.0)
    q = torch.zeros_like(p)
    q[:groups] = each.repeat_interleave(size)
    if not bool(q.any()):
        return math.inf
    p, q = (torch.where(t == 0, SMOOTHING, t) for t in (p, q))
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


_METHODS: dict[int, Callable[[Counts, Grid, float], Ends]] = {
    RangeMethod.MINMAX: _whole,
    RangeMethod.MSE: _least_squared_error,
    RangeMethod.PERCENTILE: _percentile,
    RangeMethod.ENTROPY: _entropy,
}


def histogram_range(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    method: int,
    percentile: float,
    search_levels: int,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    rows = histogram.detach().reshape(min_val.numel(), -1)
    grid = Grid(quant_min, quant_max, scheme, symmetric_zero_point)
    unobserved = ~Range(min_val, max_val).observed.reshape(-1)
    lows, highs = min_val.detach().clone().reshape(-1), max_val.detach().clone().reshape(-1)
    for i, counts in enumerate(rows):
        if unobserved[i]:
            continue
        if method == RangeMethod.L2:
            found = search_histogram_range(counts, lows[i], highs[i], search_levels)
            lows[i], highs[i] = found[0].clamp(max=0), found[1].clamp(min=0)
            continue
        low, high = float(lows[i]), float(highs[i])
        if low < high and float(counts.sum()) > 0:
            of = Counts(counts.to("cpu", torch.float64), low, high)
            low, high = _METHODS[method](of, grid, percentile)
            if low == high == 0:
                # Next to everything is 0: what is not lies in the bins next to it, at the nearest.
                low, high = (max(of.low, -of.width), min(of.high, of.width))
        lows[i], highs[i] = min(low, 0.0), max(high, 0.0)
    return lows.reshape(min_val.shape), highs.reshape(max_val.shape)
