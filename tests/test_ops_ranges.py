"""Ranges chosen from histograms by each method, and their errors, against other definitions."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastquant import functional as F
from fastquant._core.schemes import RangeMethod, Scheme
from fastquant._native import ops
from fastquant._native import reference as reference_ops
from fastquant._native.reference.ranges import Counts, widths

INF = math.inf
METHODS = ("minmax", "l2", "mse", "percentile", "entropy")
SHAPES = ("normal", "laplace", "relu", "uniform", "gumbel", "student", "positive", "negative")


def values_of(shape: str, count: int = 100_003, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(count),
        "laplace": lambda: rng.laplace(size=count),
        "relu": lambda: np.maximum(rng.standard_normal(count), 0),
        "uniform": lambda: rng.uniform(-1, 1, count),
        "gumbel": lambda: rng.gumbel(size=count),
        "student": lambda: rng.standard_t(3, count),
        "positive": lambda: rng.gumbel(size=count) + 20,
        "negative": lambda: -rng.exponential(size=count) - 1,
    }[shape]()
    return values.astype(np.float32)


def histogram_of(x: np.ndarray[Any, Any], bins: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    low, high = float(x.min()), float(x.max())
    counts, _ = np.histogram(x, bins, range=(low, high))
    return torch.tensor(counts, dtype=torch.float32), torch.tensor(low), torch.tensor(high)


def symmetric_histogram_of(x: np.ndarray[Any, Any], bins: int) -> Any:
    reach = float(np.abs(x).max())
    return np.histogram(x, bins, range=(-reach, reach))


@pytest.mark.parametrize("shape", ["normal", "laplace", "gumbel", "uniform", "student"])
@pytest.mark.parametrize(("bins", "levels"), [(1024, 128), (1024, 256), (512, 256), (1001, 128)])
def test_entropy_finds_the_bin_that_onnxruntime_finds(shape: str, bins: int, levels: int) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    counts, edges = symmetric_histogram_of(values_of(shape), bins)
    edges = edges.astype(np.float32)
    ends = (edges[0], edges[-1])
    collector = calibrate.HistogramCollector("entropy", True, bins, levels, 99.99, "same")
    expected = collector.get_entropy_threshold((counts, edges, *ends, ends[1]), levels)
    found = F.histogram_range(
        torch.tensor(counts, dtype=torch.float32),
        *map(torch.tensor, ends),
        method="entropy",
        quant_min=0,
        quant_max=levels - 1,
    )
    width = (ends[1] - ends[0]) / bins
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(float(ours) - float(theirs)) <= 1.001 * width


def percentile_range(
    x: np.ndarray[Any, Any], percentile: float, symmetric: bool
) -> tuple[list[float], float]:
    """Both ends of the range, and the width of a bin."""
    histogram, low, high = histogram_of(x)
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    found = F.histogram_range(
        histogram, low, high, method="percentile", percentile=percentile, qscheme=qscheme
    )
    return [float(end) for end in found], (float(high) - float(low)) / 2048


PERCENTILES = [99.99, 99.9, 99.0, 90.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_finds_the_bin_that_onnxruntime_finds(
    shape: str, percentile: float, symmetric: bool
) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    x = values_of(shape)
    if symmetric:  # its histogram then is of absolute values
        x = np.abs(x)
    ours, width = percentile_range(x, percentile, symmetric)
    counts, edges = np.histogram(x, 2048, range=(x.min(), x.max()))
    collector = calibrate.HistogramCollector("percentile", symmetric, 2048, 128, percentile, "")
    # Symmetric ranges may go beyond the smallest value.
    collector.histogram_dict = {"x": (counts, edges, -x.max() if symmetric else x.min(), x.max())}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = collector.compute_percentile()["x"][:2]
    for our, their, sign in zip(ours, theirs, (-1, 1), strict=True):
        assert abs(our - sign * max(0.0, sign * float(their))) <= 1.01 * width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_finds_the_bin_that_numpy_finds(
    shape: str, percentile: float, symmetric: bool
) -> None:
    x = values_of(shape)
    ours, width = percentile_range(x, percentile, symmetric)
    if symmetric:
        reach = np.percentile(np.abs(x), percentile, method="inverted_cdf")
        ends = [-reach, reach]
    else:
        percentiles = [(100 - percentile) / 2, (100 + percentile) / 2]
        ends = np.percentile(x, percentiles, method="inverted_cdf")
    for our, end, sign in zip(ours, ends, (-1, 1), strict=True):
        assert abs(our - sign * max(0.0, sign * float(end))) <= 1.01 * width


def quantized(x: np.ndarray[Any, Any], scale: float, below: int, above: int) -> Any:
    return np.clip(np.round(x / scale), -below, above) * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_values_spread_over_their_bins(shape: str) -> None:
    histogram, low, high = histogram_of(values_of(shape), 50)
    counts = Counts(histogram.double(), float(low), float(high))
    edges = counts.edges.numpy()
    scale, zero_point = 0.037, 100
    spread = edges[:-1, None] + counts.width * (np.arange(20_000) + 0.5) / 20_000
    errors = (spread - quantized(spread, scale, zero_point, 255 - zero_point)) ** 2
    expected = (errors.mean(1) * histogram.numpy()).sum() / float(histogram.sum())
    error = F.histogram_error(
        histogram,
        low,
        high,
        torch.tensor([scale]).double(),
        torch.tensor([zero_point]),
        quant_min=0,
        quant_max=255,
    )
    assert math.isclose(float(error), expected, rel_tol=1e-5)


# -------------------------------------------------------------------- against plain definitions


@st.composite
def histograms(draw: st.DrawFn, most_bins: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    bins = draw(st.integers(1, most_bins))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["smooth", "sparse", "spike", "few", "nothing", "fractions"]))
    smooth = np.exp(-((np.linspace(-3, 3, bins) - rng.normal()) ** 2)) * 1000
    counts = {
        "smooth": lambda: rng.poisson(smooth),
        "sparse": lambda: rng.poisson(50, bins) * (rng.random(bins) < 0.1),
        "spike": lambda: rng.poisson(smooth) + 100_000 * (np.arange(bins) == bins // 3),
        "few": lambda: rng.poisson(0.05, bins),
        "nothing": lambda: np.zeros(bins),
        "fractions": lambda: smooth * rng.random(bins),
    }[kind]()
    middle = draw(st.sampled_from([0.0, 0.3, -0.5, 1.0, -1.0, 5.0, -5.0]))
    width = draw(st.sampled_from([0.0, 1.0, 1.0, 1.0]))
    unit = 10.0 ** draw(st.sampled_from([0, 0, 0, -30, 30]))
    ends = ((middle - width) * unit, (middle + width) * unit)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(counts, dtype=dtype), *(torch.tensor(e, dtype=dtype) for e in ends)


grids = st.sampled_from(
    [
        (0, 255, Scheme.AFFINE, 0),
        (0, 127, Scheme.AFFINE, 0),
        (-128, 127, Scheme.SYMMETRIC, 0),
        (-127, 127, Scheme.SYMMETRIC, 0),
        (0, 255, Scheme.SYMMETRIC, 128),
        (0, 15, Scheme.AFFINE, 0),
        (-8, 7, Scheme.SYMMETRIC, 0),
        (0, 3, Scheme.AFFINE, 0),
        (-2, 1, Scheme.SYMMETRIC, 0),
        (0, 1, Scheme.AFFINE, 0),
    ]
)


# Those whose reference tries many ranges on every bin.
SEARCHES = (RangeMethod.L2, RangeMethod.MSE)
percentiles = st.sampled_from([50.0, 90.0, 99.9, 100.0])


@given(histograms(), grids, percentiles)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("method", sorted({*RangeMethod} - {*SEARCHES}))
def test_kernels_as_reference(
    method: RangeMethod, histogram: Any, grid: tuple[int, ...], percentile: float
) -> None:
    assert_kernel_as_reference(method, histogram, grid, percentile)


@given(histograms(100), grids, percentiles)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("method", SEARCHES)
def test_kernels_that_search_as_reference(
    method: RangeMethod, histogram: Any, grid: tuple[int, ...], percentile: float
) -> None:
    assert_kernel_as_reference(method, histogram, grid, percentile)


def assert_kernel_as_reference(
    method: RangeMethod, histogram: Any, grid: tuple[int, ...], percentile: float
) -> None:
    args = (*histogram, method, percentile, 16, *grid)
    found = ops.histogram_range(*args)
    expected = reference_ops.OPS["histogram_range"](*args)
    if method == RangeMethod.MSE:  # of equally good ranges, rounding may choose another
        errors = [error_of_range(histogram, ends, grid) for ends in (found, expected)]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-12 * float(histogram[2] - histogram[1]) ** 2
        return
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(histogram[2].abs()))


@pytest.mark.parametrize("seed", range(20))
def test_of_ranges_that_lose_nothing_the_smallest_is_taken(seed: int) -> None:
    """Several have a level for each of their bins: their divergences are 0 but for rounding."""
    values = np.random.default_rng(seed).normal(-0.5, 0.22, 20_000 + 200 * seed)
    counts = np.histogram(values, 172, (-1.5, 0.5))[0]
    histogram = (torch.tensor(counts).float(), torch.tensor(-1.5), torch.tensor(0.5))
    args = (*histogram, RangeMethod.ENTROPY, 50.0, 16, -128, 127, Scheme.SYMMETRIC, 0)
    low, high = ops.histogram_range(*args)
    expected = reference_ops.OPS["histogram_range"](*args)
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])


def error_of_range(
    histogram: tuple[Tensor, Tensor, Tensor], ends: tuple[Tensor, Tensor], grid: tuple[int, ...]
) -> float:
    eps = torch.zeros(1, dtype=torch.float64)
    low, high = (end.double() for end in ends)
    scale, zero_point = ops.choose_qparams(low, high, eps, *grid)
    error = ops.histogram_error(*histogram, scale, zero_point, *grid[:2])
    return 0.0 if error.isnan() else float(error)


@given(histograms(), grids)
@settings(max_examples=60, deadline=None)
def test_errors_as_reference(histogram: Any, grid: tuple[int, ...]) -> None:
    scale = (histogram[2] - histogram[1]).reshape(1) / 20 + 1e-30
    zero_point = torch.tensor([(grid[0] + grid[1]) // 2])
    args = (*histogram, scale, zero_point, *grid[:2])
    expected = reference_ops.OPS["histogram_error"](*args)
    torch.testing.assert_close(ops.histogram_error(*args), expected, equal_nan=True)


def integrated_error(
    counts: np.ndarray[Any, Any], edges: np.ndarray[Any, Any], scale: float, below: int, above: int
) -> float:
    """The squared error, piece by piece between the edges of bins and the bounds of levels."""
    bounds = (np.arange(-below, above) + 0.5) * scale
    cuts = np.unique(np.concatenate([edges, bounds[(bounds > edges[0]) & (bounds < edges[-1])]]))
    begin, end = cuts[:-1], cuts[1:]
    middle = (begin + end) / 2
    level = np.clip(np.round(middle / scale), -below, above) * scale
    density = counts[np.searchsorted(edges, middle, side="right") - 1] / np.diff(edges)[0]
    return float((density * ((end - level) ** 3 - (begin - level) ** 3) / 3).sum())


@pytest.mark.parametrize("grid", [(0, 15), (0, 3), (-8, 7)])
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_the_least_of_all_on_the_grid(
    shape: str, qscheme: torch.qscheme, grid: tuple[int, int]
) -> None:
    histogram, low, high = (t.double() for t in histogram_of(values_of(shape), 40))
    counts, edges = histogram.numpy(), Counts(histogram, float(low), float(high)).edges.numpy()
    symmetric = qscheme == torch.per_tensor_symmetric
    steps = grid[1] - grid[0]
    zero_point = 0 if grid[0] < 0 else sum(grid) // 2
    whole = max(-edges[0], edges[-1], 0) * 2 if symmetric else max(edges[-1], 0) - min(edges[0], 0)
    best = (INF, 0.0, 0)
    for share in widths():
        scale = share * whole / steps
        for below in [zero_point - grid[0]] if symmetric else range(steps + 1):
            error = integrated_error(counts, edges, scale, below, steps - below)
            best = min(best, (error, scale, below), key=lambda candidate: candidate[0])
    _, scale, below = best
    found = F.histogram_range(
        histogram,
        low,
        high,
        method="mse",
        dtype=torch.qint8 if grid[0] < 0 else torch.quint8,
        qscheme=qscheme,
        quant_min=grid[0],
        quant_max=grid[1],
    )
    half = scale * steps / 2
    expected = (-half, half) if symmetric else (-below * scale, (steps - below) * scale)
    assert [float(end) for end in found] == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------- values themselves


def error_of_values(x: np.ndarray[Any, Any], scale: float, below: int, above: int) -> float:
    return float(np.square(x - quantized(x, scale, below, above)).sum())


@pytest.mark.parametrize("grid", [(0, 15), (0, 3), (-8, 7), (-127, 127)])
@pytest.mark.parametrize("scheme", [Scheme.AFFINE, Scheme.SYMMETRIC])
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_of_values_is_the_least_of_all_on_the_grid(
    shape: str, scheme: Scheme, grid: tuple[int, int]
) -> None:
    x = values_of(shape, 150).astype(np.float64)
    x[0] = 0
    symmetric, steps = scheme == Scheme.SYMMETRIC, grid[1] - grid[0]
    whole = 2 * np.abs(x).max() if symmetric else max(x.max(), 0) - min(x.min(), 0)
    best = (INF, 0.0, 0)
    for share in widths():
        scale = share * whole / steps
        for below in [-grid[0]] if symmetric else range(0, steps + 1, 1 if steps < 20 else 5):
            error = error_of_values(x, scale, below, steps - below)
            best = min(best, (error, scale, below), key=lambda candidate: candidate[0])
    low, high = ops.least_error_range(torch.tensor(x), None, *grid, scheme, 0)
    scale = float(high - low) / steps
    below = -grid[0] if symmetric else round(-float(low) / scale)
    found = error_of_values(x, scale, below, steps - below)
    assert found <= best[0] * (1 + 1e-9)
    if symmetric or steps < 20:
        assert scale == pytest.approx(best[1], rel=1e-12)
        assert below == best[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("scheme", [Scheme.AFFINE, Scheme.SYMMETRIC])
def test_kernel_of_values_as_reference(
    dtype: torch.dtype, axis: int | None, scheme: Scheme
) -> None:
    x = torch.tensor(values_of("student", 4 * 5 * 9)).reshape(4, 5, 9).to(dtype)
    x[0] = x[0].abs()
    x[1] = -x[1].abs()
    x[2, 2] = 0
    x[3, :, 7] = INF
    for args in ((x, axis, -8, 7, scheme, 0), (x.mT, axis, 0, 3, scheme, 1)):
        found = ops.least_error_range(*args)
        expected = reference_ops.OPS["least_error_range"](*args)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_values_that_are_not_there_have_no_range() -> None:
    x = torch.tensor([[INF, math.nan], [0.0, 0.0], [2.0, 2.0], [1e38, -3e38]])
    low, high = ops.least_error_range(x, 0, -8, 7, Scheme.AFFINE, 0)
    assert low.tolist()[:3] == [INF, 0, 0]
    assert high.tolist()[:3] == [-INF, 0, 2]
    assert -INF < low[3] < high[3] < INF
    low, high = ops.least_error_range(x[:, :0], 0, -8, 7, Scheme.AFFINE, 0)
    assert low.tolist() == [INF] * 4


# ------------------------------------------------------------------------- what all hold to


@given(histograms(2048), grids, st.floats(1e-3, 100))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("method", list(RangeMethod))
def test_ranges_hold_zero_and_are_neither_nan_nor_empty(
    method: RangeMethod, histogram: Any, grid: tuple[int, ...], percentile: float
) -> None:
    low, high = ops.histogram_range(*histogram, method, percentile, 256, *grid)
    assert -INF < low <= 0 <= high < INF
    assert low < high or (histogram[1] == histogram[2] == 0)
    assert low.dtype == histogram[1].dtype
    assert low.shape == histogram[1].shape
    scale, zero_point = ops.choose_qparams(low, high, torch.zeros(1), *grid)
    assert 0 < scale < INF
    assert grid[0] <= zero_point <= grid[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "qscheme", [torch.per_channel_affine, torch.per_channel_symmetric], ids=["affine", "symmetric"]
)
def test_channels_have_ranges_of_their_own(method: Any, qscheme: torch.qscheme) -> None:
    rows = [histogram_of(values_of(shape), 512) for shape in SHAPES]
    settings = {"method": method, "qscheme": qscheme, "dtype": torch.qint8}
    counts, lows, highs = (torch.stack(parts) for parts in zip(*rows, strict=True))
    unseen = (torch.zeros(1, 512), torch.tensor([INF]), torch.tensor([-INF]))
    counts, lows, highs = (
        torch.cat(pair) for pair in zip((counts, lows, highs), unseen, strict=True)
    )
    found = F.histogram_range(counts, lows, highs, **settings)
    assert found[0][-1] == INF
    assert found[1][-1] == -INF
    for i, row in enumerate(rows):
        low, high = F.histogram_range(*row, **settings)
        assert found[0][i] == low.clamp(max=0)
        assert found[1][i] == high.clamp(min=0)


def test_mse_is_never_worse_than_the_other_methods() -> None:
    for shape in SHAPES:
        histogram = histogram_of(values_of(shape))
        for grid in ((0, 255, Scheme.AFFINE, 0), (-8, 7, Scheme.SYMMETRIC, 0)):
            errors = {
                method: error_of_range(
                    histogram, ops.histogram_range(*histogram, method, 99.9, 256, *grid), grid
                )
                for method in RangeMethod
            }
            assert errors[RangeMethod.MSE] <= min(errors.values()) * 1.01, (shape, grid)


def test_entropy_ignores_the_zeros_of_relu() -> None:
    x = values_of("relu")
    with_zeros, without = histogram_of(x), histogram_of(np.append(x[x > 0], np.float32(0)))
    reaches = [
        float(F.histogram_range(*h, method="entropy", quant_min=0, quant_max=127)[1])
        for h in (with_zeros, without)
    ]
    assert reaches[0] == pytest.approx(reaches[1], abs=3 * float(with_zeros[2]) / 2048)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_entropy_of_few_values_clips_nothing(qscheme: torch.qscheme) -> None:
    x = values_of("laplace", 2000)
    low, high = F.histogram_range(*histogram_of(x), method="entropy", qscheme=qscheme)
    assert (float(low), float(high)) == (x.min(), x.max())


def test_entropy_of_as_many_levels_as_bins_clips_nothing() -> None:
    histogram = histogram_of(values_of("laplace"))
    found = F.histogram_range(
        *histogram, method="entropy", dtype=torch.int16, qscheme=torch.per_tensor_symmetric
    )
    assert found == histogram[1:]


def test_sixteen_bits_are_searched() -> None:
    for qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        histogram = histogram_of(values_of("student"))
        low, high = F.histogram_range(*histogram, method="mse", dtype=torch.int16, qscheme=qscheme)
        assert histogram[1] * 1.01 <= low < 0 < high <= -histogram[1].minimum(-histogram[2]) * 1.01
