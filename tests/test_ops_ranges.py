"""Ranges chosen from histograms by each method, and their errors, against other definitions."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastquant import functional as F
from fastquant._native.reference.ranges import Counts

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
@pytest.mark.parametrize(("bins", "levels"), [(2048, 128), (2048, 256), (1024, 256), (2001, 128)])
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
