"""Observers at the edges of what floats hold, and with models narrower than fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq
from fastquant import observer as ob
from oracle import assert_same, assert_same_state, assert_usable_qparams

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


@every_observer
@pytest.mark.parametrize("kind", TENSORS)
def test_extremes_give_sane_parameters(name: str, kind: str) -> None:
    module = OBSERVERS[name]()
    for _ in range(3):
        module(torch.tensor(TENSORS[kind]))
    assert_usable_qparams(module)


@every_observer
def test_a_range_may_grow_and_tensors_shrink_by_thirty_orders(name: str) -> None:
    module = OBSERVERS[name]()
    for factor in (1e-30, 1.0, 1e30, 1e-30):
        module(torch.linspace(-1, 1, 7) * factor)
        assert_usable_qparams(module)


@every_observer
@pytest.mark.parametrize("huge", [1e39, 1e300])
def test_numbers_beyond_fp32_saturate(name: str, huge: float) -> None:
    module = OBSERVERS[name]()
    for tensor in ([-huge, 1.0, huge], [huge] * 3, [-huge] * 3, [0.5, -2.0, 1.0]):
        module(torch.tensor(tensor, dtype=torch.float64))
        assert_usable_qparams(module)
        assert bool(module.min_val.isfinite().all())
    if name in ("minmax", "channels"):
        assert module.min_val.min() == -torch.finfo(torch.float32).max
        assert module.max_val.max() == torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after", "made so"])
@every_observer
def test_a_narrow_model_has_the_statistics_of_a_wide_one(
    name: str, dtype: torch.dtype, when: str
) -> None:
    made = {"factory_kwargs": {"dtype": dtype}} if when == "made so" and name == "minmax" else {}
    module, expected = OBSERVERS[name](**made), OBSERVERS[name]()
    if when == "before":
        module = nn.Sequential(module).to(dtype)[0]
    for i in range(300):
        # More than fp16 counts to, and steps that neither fp16 nor bf16 can take.
        x = torch.full((400,), 1.0 + i / 300).to(dtype)
        x[0] = -60000.0 * (i == 150)
        module(x)
        expected(x)
        if i == 100 and when == "after":
            module = nn.Sequential(module).to(dtype)[0]
    assert_same_state(module, expected)
    for actual, wanted in zip(
        module.calculate_qparams(), expected.calculate_qparams(), strict=True
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_fake_quantize_has_an_exact_scale(dtype: torch.dtype) -> None:
    for make in (fq.default_fused_act_fake_quant, fq.default_per_channel_weight_fake_quant):
        module, expected = make().to(dtype), make()
        x = (torch.randn(3, 4) * 1e-5).to(dtype)
        assert_same(module(x), expected(x))
        assert_same_state(module, expected)
        assert_same(module.scale, module.calculate_qparams()[0])
    fixed = fq.FixedQParamsFakeQuantize(ob.FixedQParamsObserver.with_args(scale=0.1, zero_point=3))
    assert float(fixed.to(dtype).scale) == pytest.approx(0.1, rel=1e-7)


@every_observer
def test_a_narrow_state_is_widened_also_where_it_is_assigned(name: str) -> None:
    written, module = OBSERVERS[name](), OBSERVERS[name]()
    written(torch.tensor([1.0, 2.0]))
    state = {k: v.half() for k, v in written.state_dict().items()}
    module.load_state_dict(state, assign=True)
    for _ in range(3000):
        module(torch.tensor([1.0, 1.5]))
    assert {b.dtype for b in module.state_dict().values()} == {torch.float32}
    assert_usable_qparams(module)
    if "histogram" in name:
        assert module.histogram.sum() == 6002


def test_a_narrow_state_of_a_fake_quantize_is_widened_where_it_is_assigned() -> None:
    written, module = fq.FakeQuantize(), fq.FakeQuantize()
    written(torch.tensor([1.0, 2.0]))
    state = {k: v.half() if v.is_floating_point() else v for k, v in written.state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert module.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_observer
def test_statistics_are_wide_whatever_the_default_dtype(name: str, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = OBSERVERS[name]()
    finally:
        torch.set_default_dtype(before)
    module(torch.randn(4, 5, dtype=dtype))
    assert {b.dtype for b in module.state_dict().values()} == {torch.float32}
    assert_usable_qparams(module)


INTEGERS_AND_FP8 = (
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
RANGE_OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("dtype", INTEGERS_AND_FP8)
def test_observers_of_ranges_take_integers_and_fp8_as_torch_ao(
    name: str, dtype: torch.dtype
) -> None:
    ours, theirs = getattr(ob, name)(), getattr(torch.ao.quantization, name)()
    large = 100 if dtype.itemsize < 4 else 2**24 + 1
    for values in ([[3, 1, 7], [0, 5, 6]], [[100, 2, 1], [4, 4, 4]], [[large, 0, 3], [1, 2, 0]]):
        x = torch.tensor(values).to(dtype)
        assert ours(x) is x
        theirs(x)
        assert_same_state(ours, theirs)
    assert ours(torch.empty(0, 3).to(dtype)).numel() == 0
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", INTEGERS_AND_FP8)
@pytest.mark.parametrize(
    "make", [ob.HistogramObserver, fq.FakeQuantize, fq.default_fused_wt_fake_quant]
)
def test_what_torch_ao_refuses_of_these_is_refused_in_words(make: Any, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3).to(dtype)
    with pytest.raises(TypeError, match=f"x must have a floating dtype .* got {dtype}"):
        make()(x)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_complex_numbers_have_no_range(name: str) -> None:
    """torch.ao drops the imaginary part."""
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        getattr(ob, name)()(torch.ones(2, 3) + 1j)


def test_fp8_infinities_and_nan_are_left_out() -> None:
    observer = ob.MinMaxObserver()
    observer(torch.tensor([1.0, float("inf"), float("nan"), -2.0]).to(torch.float8_e5m2))
    assert (float(observer.min_val), float(observer.max_val)) == (-2.0, 1.0)
    assert int(observer.nonfinite_count) == 2
