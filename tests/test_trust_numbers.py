"""Numbers at the edge of what floats hold, and values that are no numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq
from fastquant import observer as ob
from oracle import assert_same, quiet

BIG, TINY = 3e38, 1e-45
TENSORS = {
    "huge": [-BIG, BIG],
    "huge positive": [BIG, BIG],
    "denormal": [-TINY, TINY],
    "one denormal": [TINY],
    "constant": [1.3] * 5,
    "zeros": [0.0] * 5,
    "one element": [-7.0],
}
OBSERVERS = {
    "minmax": ob.MinMaxObserver,
    "average": ob.MovingAverageMinMaxObserver,
    "channels": ob.PerChannelMinMaxObserver,
    "histogram": ob.HistogramObserver,
    "histogram by range": lambda: ob.HistogramObserver(
        quant_min=0, quant_max=15, search_levels="range"
    ),
}
every_observer = pytest.mark.parametrize("name", OBSERVERS)


def assert_sane(module: Any) -> None:
    scale, zero_point = module.calculate_qparams()
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert bool(((zero_point >= module.quant_min) & (zero_point <= module.quant_max)).all())


@every_observer
@pytest.mark.parametrize("kind", TENSORS)
def test_extremes_give_sane_parameters(name: str, kind: str) -> None:
    module = OBSERVERS[name]()
    for _ in range(3):
        module(torch.tensor(TENSORS[kind]))
    assert_sane(module)


@every_observer
def test_a_range_may_grow_and_tensors_shrink_by_thirty_orders(name: str) -> None:
    module = OBSERVERS[name]()
    for factor in (1e-30, 1.0, 1e30, 1e-30):
        module(torch.linspace(-1, 1, 7) * factor)
        assert_sane(module)


def test_a_histogram_grows_often_in_the_memory_it_has() -> None:
    module = ob.HistogramObserver(bins=16)
    pointer = module.histogram.data_ptr()
    for i in range(3000):
        module(torch.tensor([-(1.001**i), 1.002**i]))
    assert module.histogram.data_ptr() == pointer
    torch.testing.assert_close(float(module.histogram.sum()), 6000.0)
    assert_sane(module)


def test_a_thousand_million_elements_in_one_bin_are_counted() -> None:
    module = ob.HistogramObserver(bins=16)
    module(torch.tensor([0.0, 1.0]))
    x = torch.full((1_000_000,), 0.5)
    module.histogram[8] = 9.9e8
    for _ in range(10):
        module(x)
    torch.testing.assert_close(float(module.histogram[8]), 1e9, rtol=1e-6, atol=0)
    assert_sane(module)


def test_convert_names_layers_and_counts_what_was_left_out_once() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(3, 3)).eval()
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    with quiet():
        prepared(torch.tensor([[1.0, 2.0, float("nan")]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fq.convert(prepared)
    messages = [str(w.message) for w in caught if "NaN or infinite" in str(w.message)]
    assert len(messages) == 1
    assert "0 (1)" in messages[0]
    assert "1 (3)" in messages[0]


def test_fused_qparams_are_those_of_the_range_whatever_came_before() -> None:
    module = fq.default_fused_act_fake_quant()

    def check() -> None:
        scale, zero_point = module.calculate_qparams()
        assert_same(module.scale, scale)
        assert_same(module.zero_point, zero_point.int())

    for observing, quantizing in ((True, False), (False, True), (True, True), (False, False)):
        module.enable_observer(observing)
        module.enable_fake_quant(quantizing)
        if not observing and module.activation_post_process.max_val.isinf():
            continue
        module(torch.randn(20) * 3)
        check()
    state = module.state_dict()
    module = fq.default_fused_act_fake_quant()
    module.load_state_dict(state)
    check()
