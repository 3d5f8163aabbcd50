"""What a range is, observed or not, and that everything that asks gets the same answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import utils as torch_utils

import fastquant as fq
from fastquant import utils
from fastquant.observer import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from oracle import assert_same

INF, NAN = math.inf, math.nan

# One step of a moving average, from a range of two neighbouring numbers, that ends crossed.
CONSTANT, LOW, HIGH, NEXT = 0.01, 0.0032284555025398731, 0.0032284560147672892, 0.81441635


def crossed_average(**kwargs: Any) -> MovingAverageMinMaxObserver:
    observer = MovingAverageMinMaxObserver(CONSTANT, **kwargs)
    observer(torch.tensor([LOW, HIGH]))
    observer(torch.full((3,), NEXT))
    assert observer.min_val > observer.max_val
    return observer


def quantize_stub_with(observer: nn.Module, **range_of: Tensor) -> nn.Module:
    """A prepared model whose input is watched by an observer with this range."""
    model = nn.Sequential(fq.QuantStub()).eval()
    model.qconfig = fq.QConfig(lambda: observer, fq.default_weight_observer)  # type: ignore[assignment]
    prepared = fq.prepare(model)
    stub: Any = prepared[0]
    for name, value in range_of.items():
        stub.activation_post_process.register_buffer(name, value)
    return prepared


def warnings_of(call: Callable[[], Any]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return "\n".join(str(w.message) for w in caught)


def test_averages_that_crossed_by_rounding_have_a_scale() -> None:
    scale, zero_point = crossed_average().calculate_qparams()
    ordered = MinMaxObserver()
    ordered(torch.tensor(crossed_average().max_val.item()))
    expected, _ = ordered.calculate_qparams()
    assert_same(scale, expected)
    assert zero_point.item() == 0


@pytest.mark.torch_ao
def test_convert_does_not_say_that_a_crossed_average_saw_no_data() -> None:
    crossed = crossed_average()
    prepared = quantize_stub_with(
        MovingAverageMinMaxObserver(), min_val=crossed.min_val, max_val=crossed.max_val
    )
    converted: list[Any] = []
    assert "seen no data" not in warnings_of(lambda: converted.append(fq.convert(prepared)))
    assert_same(converted[0][0].scale, crossed.calculate_qparams()[0])
    fresh = quantize_stub_with(MovingAverageMinMaxObserver())
    assert "seen no data: 0" in warnings_of(lambda: fq.convert(fresh))


def test_a_crossed_average_is_saved_loaded_and_merged() -> None:
    crossed = crossed_average()
    loaded = MovingAverageMinMaxObserver()
    loaded.load_state_dict(crossed.state_dict())
    assert_same(loaded.min_val, crossed.min_val)
    merged = fq.merge(crossed, loaded)
    assert_same(merged.max_val, crossed.max_val)
    states = [
        fq.get_observer_state_dict(quantize_stub_with(module)) for module in (crossed, loaded)
    ]
    key = "0.activation_post_process.min_val"
    assert_same(fq.merge(*states)[key], crossed.min_val)


@pytest.mark.parametrize(
    ("low", "high"), [(2.0, 1.0), (NAN, 1.0), (0.0, NAN), (-INF, 1.0), (0.0, INF), (INF, 0.0)]
)
@pytest.mark.parametrize("cls", [MinMaxObserver, MovingAverageMinMaxObserver])
def test_what_is_no_range_is_refused_by_everything(cls: Any, low: float, high: float) -> None:
    observer = cls()
    observer.min_val.fill_(low)
    observer.max_val.fill_(high)
    with pytest.raises(fq.QuantizationError, match="cannot quantize a range"):
        observer.calculate_qparams()
    with pytest.raises(RuntimeError, match="must be finite and in order"):
        cls().load_state_dict(observer.state_dict())
    states = [
        fq.get_observer_state_dict(quantize_stub_with(module)) for module in (observer, cls())
    ]
    with pytest.raises(ValueError, match="must be finite and in order"):
        fq.merge(*states)


def test_only_averages_may_cross() -> None:
    crossed = crossed_average()
    observer = MinMaxObserver()
    observer.min_val, observer.max_val = crossed.min_val, crossed.max_val
    with pytest.raises(fq.QuantizationError, match="minimum above its maximum"):
        observer.calculate_qparams()
    with pytest.raises(RuntimeError, match="finite and in order"):
        MinMaxObserver().load_state_dict(observer.state_dict())


def test_each_channel_has_its_own_answer() -> None:
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([[1.0, 2.0], [NAN, INF], [-3.0, 4.0]]))
    with pytest.warns(UserWarning, match=r"channels \[1\] never had a finite value"):
        scale, zero_point = observer.calculate_qparams()
    assert scale[1] == 1
    assert zero_point[1] == 0
    observer.min_val[2] = 5.0
    with pytest.raises(fq.QuantizationError, match=r"at channels \[2\]"):
        observer.calculate_qparams()


@pytest.mark.parametrize("make", [MinMaxObserver, PerChannelMinMaxObserver])
def test_a_warning_of_nothing_observed_points_to_the_caller(make: Any) -> None:
    for observer in (make(), fq.HistogramObserver()):
        with pytest.warns(UserWarning, match="must run observer") as caught:
            observer.calculate_qparams()
        assert [w.filename for w in caught] == [__file__]


numbers = st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2**-23, 3e38, -3e38, INF, -INF, NAN])


@given(
    st.lists(st.tuples(numbers, numbers), max_size=3),
    st.booleans(),
)
def test_check_min_max_valid_says_what_torchs_does(
    ranges: list[tuple[float, float]], scalar: bool
) -> None:
    low, high = (torch.tensor([pair[end] for pair in ranges]) for end in (0, 1))
    if scalar and ranges:
        low, high = low[0], high[0]

    def answer(check: Callable[[Tensor, Tensor], bool]) -> bool | str:
        try:
            return check(low, high)
        except AssertionError:
            return "refused"

    said: list[Any] = []
    texts = [
        warnings_of(lambda check=check: said.append(answer(check)))  # type: ignore[misc]
        for check in (utils.check_min_max_valid, torch_utils.check_min_max_valid)
    ]
    assert said[0] == said[1]
    assert texts[0] == texts[1]
