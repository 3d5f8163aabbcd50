"""The ops that choose scales and zero points, and that search histograms for a range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import observer as torch_observer

from fastquant._native import ops
from fastquant._native import reference as reference_ops
from op_calls import (
    AFFINE,
    FLOAT_QPARAMS,
    IGNORE,
    INF,
    SYMMETRIC,
    assert_as_reference,
    assert_same,
    counter,
    eps,
    unobserved,
)
from strategies import (
    FLOATS,
    RANGES,
    quant_ranges,
    random_values,
    seeds,
)

float32 = st.just(torch.float32)


def a_histogram(seed: int, bins: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    x = random_values((20000,), torch.float32, seed, kind)
    histogram, (low, high) = torch.zeros(bins), unobserved()
    reference_ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    return histogram, low, high


searches = pytest.mark.parametrize(
    ("bins", "levels"), [(2048, 256), (2048, 128), (128, 16), (64, 256), (500, 4)]
)

spread = pytest.mark.parametrize("kind", sorted(RANGES.keys() - {"constant", "zero"}))


@searches
@spread
def test_search_as_reference(kind: str, bins: int, levels: int) -> None:
    assert_as_reference("search_histogram_range", *a_histogram(bins, bins, kind), levels)


@pytest.mark.parametrize("bins", [1, 2, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_of_a_range_as_wide_as_numbers_go(bins: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    histogram = torch.ones(bins)
    for low, high in ((-most, 0.9 * most), (-4.2e38, 4.4e38)):
        if high > most:
            continue
        ends = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
        assert_as_reference("search_histogram_range", histogram, *ends, 16)
        found = ops.search_histogram_range(histogram, *ends, 16)
        assert all(bool(end.isfinite()) for end in found)


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_search_for_one_value_finds_it(kind: str) -> None:
    histogram, low, high = a_histogram(0, 64, kind)
    assert_as_reference("search_histogram_range", histogram, low, high, 16)
    assert_same(ops.search_histogram_range(histogram, low, high, 16), (low, high))


@given(
    st.lists(st.tuples(st.integers(0, 63), st.floats(0, 6)), max_size=5),
    st.sampled_from([0, 1000, 1984]),
)
def test_search_among_empty_bins_as_reference(few: list[tuple[int, float]], first: int) -> None:
    histogram = torch.zeros(2048)
    for place, digits in few:
        histogram[first + place] = round(10**digits)
    ends = torch.tensor(-1.0), torch.tensor(7.0)
    assert_as_reference("search_histogram_range", histogram, *ends, 256)


@searches
@spread
def test_search_as_torch_ao(kind: str, bins: int, levels: int) -> None:
    theirs = torch_observer.HistogramObserver(bins)
    theirs.dst_nbins = levels
    theirs.histogram, theirs.min_val, theirs.max_val = state = a_histogram(7, bins, kind)
    expected = theirs._non_linear_param_search()
    assert_same(ops.search_histogram_range(*state, levels), expected)


@pytest.mark.parametrize("factor", [1e-30, 1e30, 1e-38])
def test_search_answers_alike_at_any_scale(factor: float) -> None:
    # torch.ao's errors overflow or vanish here, and its answer is an empty range.
    histogram, low, high = a_histogram(0, 2048, "outliers")
    expected = ops.search_histogram_range(histogram, low, high, 256)
    found = ops.search_histogram_range(histogram, low * factor, high * factor, 256)
    width = float(high - low) / 2048
    for value, scaled in zip(expected, found, strict=True):
        assert abs(scaled.item() / factor - value.item()) < 3 * width


def test_search_of_the_widest_range() -> None:
    largest = torch.finfo(torch.float32).max
    histogram = torch.ones(128)
    low, high = ops.search_histogram_range(
        histogram, torch.tensor(-largest), torch.tensor(largest), 256
    )
    assert low.isfinite()
    assert high.isfinite()
    assert low < high


def range_of(seed: int, channels: int | None, magnitude: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = () if channels is None else (channels,)
    ends = torch.randn(2, *shape, generator=generator) * 10.0**magnitude
    return ends.amin(0), ends.amax(0)


channel_counts = st.sampled_from([None, 1, 3, 40])


@given(
    seeds,
    channel_counts,
    st.integers(-9, 9),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    quant_ranges(),
    st.sampled_from([AFFINE, SYMMETRIC, FLOAT_QPARAMS]),
)
def test_choose_qparams_as_reference(
    seed: int,
    channels: int | None,
    magnitude: int,
    dtype: torch.dtype,
    quant_range: tuple[int, int],
    scheme: int,
) -> None:
    if dtype == torch.float16:
        magnitude = max(-4, min(magnitude, 3))
    low, high = (t.to(dtype) for t in range_of(seed, channels, magnitude))
    if channels is not None and channels > 1:
        low[0], high[0] = INF, -INF
    assert_as_reference("choose_qparams", low, high, eps(dtype), *quant_range, scheme, 128)


SCHEMES = {
    torch.per_channel_affine: AFFINE,
    torch.per_channel_symmetric: SYMMETRIC,
    torch.per_channel_affine_float_qparams: FLOAT_QPARAMS,
}


@given(
    seeds,
    st.integers(-9, 9),
    quant_ranges(),
    st.sampled_from(list(SCHEMES)),
)
def test_choose_qparams_as_torch_ao(
    seed: int, magnitude: int, quant_range: tuple[int, int], qscheme: torch.qscheme
) -> None:
    dtype = torch.int16 if max(quant_range) <= 32767 else torch.uint16
    theirs = torch_observer.PerChannelMinMaxObserver(
        dtype=dtype, qscheme=qscheme, quant_min=quant_range[0], quant_max=quant_range[1]
    )
    theirs.min_val, theirs.max_val = low, high = range_of(seed, 5, magnitude)
    expected = theirs.calculate_qparams()
    middle = 2**15 if dtype == torch.uint16 else 0
    got = ops.choose_qparams(low, high, eps(), *quant_range, SCHEMES[qscheme], middle)
    assert_same(got, expected)


@pytest.mark.parametrize("quant_range", [(-(2**31), 2**31 - 1), (0, 2**31 - 1)])
@pytest.mark.parametrize("ends", [(-3.0, 0.0), (0.0, 3.0), (-1.0, 2.0)])
def test_choose_qparams_of_32_bits_stay_in_range(
    quant_range: tuple[int, int], ends: tuple[float, float]
) -> None:
    # torch.ao rounds through int32 here, which overflows.
    scale, zero_point = ops.choose_qparams(
        torch.tensor(ends[0]), torch.tensor(ends[1]), torch.tensor([1e-30]), *quant_range, AFFINE, 0
    )
    low, high = quant_range
    exact = low - round(ends[0] / ((ends[1] - ends[0]) / (high - low)))
    assert abs(zero_point.item() - max(low, min(exact, high))) <= 2**9
    assert scale.item() == pytest.approx((ends[1] - ends[0]) / (high - low))


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC, FLOAT_QPARAMS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_choose_qparams_without_a_least_scale(scheme: int, dtype: torch.dtype) -> None:
    low, high = (
        torch.tensor([0.0, -1.0, -0.0], dtype=dtype),
        torch.tensor([0.0, 1.0, 0.0], dtype=dtype),
    )
    args = (low, high, torch.zeros(1, dtype=dtype), 0, 255, scheme, 128)
    assert_as_reference("choose_qparams", *args)
    scale, _ = ops.choose_qparams(*args)
    assert scale[0] == scale[2] == 1
    assert 0 < scale[1] < 0.01


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC, FLOAT_QPARAMS])
def test_choose_qparams_of_nothing_observed(scheme: int) -> None:
    low, high = torch.tensor([INF, -1.0]), torch.tensor([-INF, 1.0])
    scale, zero_point = ops.choose_qparams(low, high, eps(), -128, 127, scheme, 5)
    assert scale[0] == 1
    assert zero_point[0] == 0
    assert scale[1] != 1


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC])
def test_choose_qparams_of_nan_stays_in_range(scheme: int) -> None:
    nan = torch.tensor([math.nan])
    scale, zero_point = ops.choose_qparams(nan, nan, eps(), -128, 127, scheme, 0)
    assert scale.isnan().all()
    assert -128 <= zero_point.item() <= 127
