"""Weights are quantized and packed as torch does it, and faster."""

from __future__ import annotations

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.nn.quantized.modules.utils import _quantize_weight as torch_quantize_weight

import fastquant as fq
from fastquant import _C
from fastquant._conversion.weights import quantize_weight
from oracle import assert_same
from zoo import (
    STATIC_CASES,
    STATIC_QCONFIGS,
    Stubbed,
)

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = float("inf"), float("nan")


@settings(max_examples=60)
@given(st.data())
def test_weights_are_quantized_as_torch_does_it(any_isa: list[str], data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple))
    low, high = data.draw(st.sampled_from([(-128, 127), (-127, 127), (-8, 7)]))
    factory = data.draw(
        st.sampled_from([fq.PerChannelMinMaxObserver, tq.PerChannelMinMaxObserver])
    ).with_args(
        ch_axis=data.draw(st.integers(0, len(shape) - 1)),
        dtype=torch.qint8,
        qscheme=data.draw(st.sampled_from([torch.per_channel_symmetric, torch.per_channel_affine])),
        quant_min=low,
        quant_max=high,
    )
    observer = factory()
    weight = torch.randn(
        shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    )
    observer(weight)
    # Ties, values beyond the range, and those that are no numbers.
    every = weight.flatten().clone()
    every[::3] = torch.round(every[::3] * 64) / 64 * 1.5
    every[1::7], every[2::11], every[3::11], every[4::13] = NAN, INF, -INF, 1e30
    weight = every.reshape(shape)
    if len(shape) == 4 and observer.ch_axis == 0 and data.draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    for isa in any_isa:
        _C.set_isa(isa)
        got, expected = (
            quantize_weight(weight, observer),
            torch_quantize_weight(weight, observer),
        )
        assert got.dtype == expected.dtype
        assert got.qscheme() == expected.qscheme()
        assert got.q_per_channel_axis() == expected.q_per_channel_axis()
        for part in ("int_repr", "q_per_channel_scales", "q_per_channel_zero_points"):
            assert_same(getattr(got, part)(), getattr(expected, part)())


@pytest.mark.torch_ao
@pytest.mark.parametrize("threads_used", [1, 2])
def test_large_weights_are_quantized_as_torch_does_it(threads_used: int, threads: None) -> None:
    torch.set_num_threads(threads_used)
    observer = fq.default_per_channel_weight_observer()
    weight = torch.randn(129, 1031)
    observer(weight)
    got, expected = quantize_weight(weight, observer), torch_quantize_weight(weight, observer)
    assert torch.equal(got.int_repr(), expected.int_repr())


def test_packed_biases_need_gradients_where_torchs_do() -> None:
    case = STATIC_CASES["conv_net"]
    ours, theirs = (
        [
            module.bias().requires_grad
            for module in ns.convert(case.calibrated(ns, STATIC_QCONFIGS["x86"])).modules()
            if isinstance(module, (nnq.Conv2d, nnq.Linear)) and module.bias() is not None
        ]
        for ns in (fq, tq)
    )
    assert ours == theirs
    assert ours


class Learning(fq.PerChannelMinMaxObserver):
    """Takes a gradient as it observes."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.detach().clone().requires_grad_()
        (y * y).sum().backward()
        assert_same(y.grad, 2 * y.detach())
        return super().forward(x)


def test_observers_of_weights_can_take_gradients() -> None:
    model = Stubbed(fq, nn.Linear(4, 4))
    weight = Learning.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    model.qconfig = fq.QConfig(fq.default_observer, weight)
    prepared = fq.prepare(model.eval())
    prepared(torch.randn(2, 4))
    assert any(isinstance(module, nnq.Linear) for module in fq.convert(prepared).modules())
