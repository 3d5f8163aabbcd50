"""Histograms: counts, growing ranges, and the search for the range with the least error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.observer as torch_observer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastquant import observer
from fastquant._native import reference as reference_ops
from fastquant._native.routes import observe_histogram_ as observe_histogram
from fastquant.utils import QuantizationError
from oracle import (
    DTYPES,
    PER_TENSOR,
    assert_same,
    assert_same_qparams,
    assert_same_state,
    assert_usable_qparams,
    configs,
    feed,
    make_both,
    observed,
    quiet,
)


@given(data=st.data())
@settings(max_examples=40)
def test_histogram_observer_is_torchs(data: st.DataObject) -> None:
    config = data.draw(configs(PER_TENSOR))
    config["bins"] = data.draw(st.sampled_from((2048, 64)))
    both = make_both(observer.HistogramObserver, torch_observer.HistogramObserver, **config)
    if both is None:
        return
    ours, theirs = both
    stream = data.draw(observed(max_size=3))
    feed(both, stream)
    assert_same(ours.min_val, theirs.min_val)
    assert_same(ours.max_val, theirs.max_val)
    # torch resamples in floats that may put a share of a bin next door: by less than two bins
    # on average.
    assert float(ours.histogram.sum()) == pytest.approx(sum(x.numel() for x in stream))
    moved = (ours.histogram.cumsum(0) - theirs.histogram.cumsum(0)).abs().sum()
    assert float(moved) <= 2 * float(ours.histogram.sum())


@pytest.mark.parametrize("qscheme", PER_TENSOR)
@pytest.mark.parametrize("bins", [2048, 128])
def test_histogram_of_a_known_range_is_torchs_exactly(bins: int, qscheme: torch.qscheme) -> None:
    with quiet():
        theirs = torch_observer.HistogramObserver(bins=bins, qscheme=qscheme)
    ours = observer.HistogramObserver(bins=bins, qscheme=qscheme)
    torch.manual_seed(3)
    first = torch.randn(40, 50)
    feed((ours, theirs), [first, first * 0.5, first.relu()])
    assert_same_state(ours, theirs)
    assert_same_qparams(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_histogram_qparams_survive_a_growing_range(seed: int) -> None:
    torch.manual_seed(seed)
    stream = [torch.randn(2000) * (i + 1) + 0.1 * i for i in range(4)]
    with quiet():
        theirs = torch_observer.HistogramObserver()
    ours = observer.HistogramObserver()
    feed((ours, theirs), stream)
    (scale, zero_point), (their_scale, their_zero_point) = (
        ours.calculate_qparams(),
        theirs.calculate_qparams(),
    )
    assert_same(zero_point, their_zero_point)
    torch.testing.assert_close(scale, their_scale, rtol=1e-6, atol=0)


def test_a_histogram_has_no_place_for_nan() -> None:
    ours = observer.HistogramObserver(nonfinite="propagate")
    with pytest.raises(ValueError, match="non-finite"):
        ours(torch.tensor([1.0, float("nan")]))


def test_the_search_can_reckon_with_the_levels_in_use() -> None:
    """With 4 bits in use, a search for 16 levels must quantize with less error than for 256."""
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    errors = {}
    for levels in ("dtype", "range"):
        ours = observer.HistogramObserver(quant_min=0, quant_max=15, search_levels=levels)
        ours(x)
        scale, zero_point = ours.calculate_qparams()
        y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, 15)
        errors[levels] = float((x - y).square().mean())
    assert errors["range"] < 0.9 * errors["dtype"]


@pytest.mark.parametrize("search_levels", ["dtype", "range"])
@pytest.mark.parametrize("qscheme", PER_TENSOR)
@pytest.mark.parametrize(
    ("quant_min", "quant_max"), [(0, 15), (-8, 7), (0, 1), (-128, 127), (0, 65535), (-100, 0)]
)
@pytest.mark.parametrize("offset", [0.0, -3.0, 100.0])
def test_the_search_respects_the_quantized_range(
    quant_min: int, quant_max: int, qscheme: torch.qscheme, search_levels: Any, offset: float
) -> None:
    config = {"dtype": torch.int32, "quant_min": quant_min, "quant_max": quant_max}
    ours = observer.HistogramObserver(
        bins=256, qscheme=qscheme, search_levels=search_levels, **config
    )
    ours(torch.distributions.Laplace(offset, 1.0).sample((5_000,)))
    levels = quant_max - quant_min + 1 if search_levels == "range" else 2**32
    assert ours.dst_nbins == levels
    found = ours._non_linear_param_search()
    expected = reference_ops.search_histogram_range(
        ours.histogram, ours.min_val, ours.max_val, levels
    )
    for value, wanted in zip(found, expected, strict=True):
        assert_same(value, wanted)
    assert ours.min_val <= found[0] <= found[1] <= ours.max_val
    scale, zero_point = ours.calculate_qparams()
    assert 0 < float(scale) < torch.inf
    # A range on one side of zero is extended to it: a zero point never lies outside.
    assert quant_min <= int(zero_point) <= quant_max


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_floating_point])
def test_histogram_attributes_are_torchs(dtype: torch.dtype) -> None:
    with quiet():
        theirs = torch_observer.HistogramObserver(dtype=dtype, quant_min=0, quant_max=15)
    ours = observer.HistogramObserver(dtype=dtype, quant_min=0, quant_max=15)
    for name in ("bins", "dst_nbins", "upsample_rate", "quant_min", "quant_max"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_reset_histogram_starts_anew() -> None:
    with quiet():
        theirs = torch_observer.HistogramObserver(bins=32)
    ours = observer.HistogramObserver(bins=32)
    x = torch.randn(100)
    feed((ours, theirs), [torch.randn(50) * 9])
    for module in (ours, theirs):
        module.reset_histogram(x, x.min(), x.max())
    assert_same_state(ours, theirs)
    with pytest.raises(QuantizationError, match="one element"):
        ours.reset_histogram(x, x[:2], x[:2])


def test_non_linear_param_search_is_torchs() -> None:
    torch.manual_seed(1)
    with quiet():
        theirs = torch_observer.HistogramObserver()
    ours = observer.HistogramObserver()
    feed((ours, theirs), [torch.randn(3000) ** 3])
    for mine, expected in zip(
        ours._non_linear_param_search(), theirs._non_linear_param_search(), strict=True
    ):
        assert_same(mine, expected)


def test_what_overrides_the_search_or_the_choice_is_asked() -> None:
    def search(*_: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(-1.0), torch.tensor(1.0)

    def choose(*_: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([7.0]), torch.tensor([1])

    for name, function in (("_non_linear_param_search", search), ("_calculate_qparams", choose)):
        cls = type("Mine", (observer.HistogramObserver,), {name: function})
        of_instance = observer.HistogramObserver()
        setattr(of_instance, name, function)
        results = []
        for ours in (cls(), of_instance):
            ours(torch.randn(100))
            results.append(ours.calculate_qparams())
        theirs = torch_observer.HistogramObserver()
        setattr(theirs, name, function)
        with quiet():
            theirs(torch.randn(100))
            expected = theirs.calculate_qparams()
        for scale, zero_point in results:
            assert (float(scale), int(zero_point)) == (float(expected[0]), int(expected[1]))


def test_a_histogram_of_another_size_is_refused() -> None:
    ours = observer.HistogramObserver(bins=16)
    ours(torch.randn(9))
    ours.histogram = torch.ones(8)
    with pytest.raises(QuantizationError, match=r"bins=16.*got 8"):
        ours.calculate_qparams()


# ---------------------------------------------------------------------- many tensors, many elements


def test_a_histogram_grows_a_million_times_in_the_memory_it_has() -> None:
    module = observer.HistogramObserver(bins=16)
    state = [module.histogram, module.min_val, module.max_val, module.nonfinite_count]
    pointers = [t.data_ptr() for t in state]
    x = torch.tensor([-1e-3, 1e-3])
    values = x.numpy()
    low = high = 1e-3
    for i in range(1_000_000):
        # Each end by turns, from 1e-3 to 1e4.
        if i % 2:
            low *= 1.000033
            values[0] = -low
        else:
            high *= 1.000033
            values[1] = high
        observe_histogram(x, *state, 16, 0)
    assert [t.data_ptr() for t in state] == pointers
    assert float(module.max_val) > 1e4
    torch.testing.assert_close(float(module.histogram.sum()), 2e6, rtol=1e-3, atol=0)
    assert_usable_qparams(module)


def test_a_thousand_million_elements_in_one_bin_are_counted() -> None:
    """As fp32 counts them, which what a tensor adds must not be smaller than."""
    module = observer.HistogramObserver(bins=16)
    module(torch.tensor([0.0, 1.0]))
    x = torch.full((1_000_064,), 0.5)
    module.histogram[8] = 9.9e8
    before = float(module.histogram[8])
    for _ in range(10):
        module(x)
    # Multiples of 64, the distance of neighbours in fp32 there: exact.
    assert float(module.histogram[8]) == before + 10 * 1_000_064
    for _ in range(10):
        module(x[:1_000_001])
    torch.testing.assert_close(float(module.histogram[8]), before + 20_000_650, rtol=3e-7, atol=0)
    assert_usable_qparams(module)
