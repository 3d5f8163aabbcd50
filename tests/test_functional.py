"""The functions for training loops of one's own: values, gradients, and errors in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import fake_quantize as torch_fake_quantize
from torch.ao.quantization import observer as torch_observer

from fastquant import functional as F
from fastquant.utils import QuantizationError
from oracle import assert_same
from strategies import FLOATS, quant_ranges, random_values, shapes, streams, with_axis

INF = math.inf
float32 = st.just(torch.float32)
full_shapes = shapes().filter(lambda shape: 0 not in shape)


# ---------------------------------------------------------------------------------- state


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_state_begins_with_nothing_observed(channels: int | None, dtype: torch.dtype) -> None:
    shape = () if channels is None else (channels,)
    for state in (
        F.minmax_state(channels, dtype=dtype),
        F.fake_quantize_state(channels, dtype=dtype),
    ):
        assert state.min_val.dtype == state.max_val.dtype == dtype
        assert state.min_val.shape == state.max_val.shape == shape
        assert (state.min_val == INF).all()
        assert (state.max_val == -INF).all()
        assert state.nonfinite_count.tolist() == [0]
    assert state.scale.tolist() == [1.0] * (channels or 1)
    assert state.zero_point.tolist() == [0] * (channels or 1)
    assert state.zero_point.dtype == torch.int32
    if dtype not in (torch.float32, torch.float64):
        with pytest.raises(TypeError, match=f"float32 or torch.float64, got {dtype}"):
            F.histogram_state(64, dtype=dtype)
        return
    histogram = F.histogram_state(64, dtype=dtype)
    assert histogram.histogram.shape == (64,)
    assert histogram.histogram.dtype == dtype
    assert histogram.histogram.sum() == 0


def test_float_qparams_have_float_zero_points() -> None:
    state = F.fake_quantize_state(2, qscheme=torch.per_channel_affine_float_qparams)
    assert state.zero_point.dtype == torch.float32


# -------------------------------------------------------------------------------- observe


@given(streams(float32, full_shapes), st.data())
def test_observe_minmax_is_the_extremes_of_all_that_was_seen(
    stream: list[Tensor], data: st.DataObject
) -> None:
    _, axis, channels = data.draw(with_axis(st.just(stream[0])))
    state = F.minmax_state(None if axis is None else channels)
    for x in stream:
        F.observe_minmax_(x, *state, ch_axis=axis)
    everything = torch.stack(stream)
    dims = [d for d in range(everything.dim()) if axis is None or d != axis % stream[0].dim() + 1]
    assert_same(state.min_val, everything.amin(dims))
    assert_same(state.max_val, everything.amax(dims))


def test_observe_minmax_moves_averages() -> None:
    state = F.minmax_state()
    for value in (10.0, 20.0):
        F.observe_minmax_(torch.tensor([-value, value]), *state, averaging_constant=0.25)
    assert state.min_val == -12.5
    assert state.max_val == 12.5


def test_the_count_of_what_was_left_out_may_be_left_out() -> None:
    state = F.minmax_state()
    x = torch.tensor([1.0, math.nan, INF])
    F.observe_minmax_(x, state.min_val, state.max_val)
    assert state.min_val == state.max_val == 1
    assert state.nonfinite_count == 0
    F.observe_minmax_(x, *state)
    assert state.nonfinite_count == 2
    F.observe_minmax_(x, *state, nonfinite="propagate")
    assert state.min_val.isnan()


def test_histogram_and_its_range() -> None:
    state = F.histogram_state()
    theirs = torch_observer.HistogramObserver()
    for seed in range(3):
        x = random_values((5000,), torch.float32, seed, "outliers")
        F.observe_histogram_(x, *state)
        theirs(x)
    assert state.histogram.sum() == 15000
    low, high = F.histogram_range(*state[:3])
    assert state.min_val <= low < high <= state.max_val
    assert high - low < state.max_val - state.min_val
    scale, zero_point = F.choose_qparams(low, high)
    expected_scale, expected_zero_point = theirs.calculate_qparams()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert zero_point.item() == expected_zero_point.item()
    narrow = F.histogram_range(*state[:3], levels=16)
    assert narrow[1] - narrow[0] < high - low


# -------------------------------------------------------------------------------- qparams


QSCHEMES = {
    torch.per_tensor_affine: torch_observer.MinMaxObserver,
    torch.per_tensor_symmetric: torch_observer.MinMaxObserver,
    torch.per_channel_affine: torch_observer.PerChannelMinMaxObserver,
    torch.per_channel_symmetric: torch_observer.PerChannelMinMaxObserver,
    torch.per_channel_affine_float_qparams: torch_observer.PerChannelMinMaxObserver,
}
QDTYPES = [
    torch.quint8,
    torch.qint8,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.quint4x2,
]


@pytest.mark.parametrize("qscheme", QSCHEMES)
@pytest.mark.parametrize("dtype", QDTYPES)
@pytest.mark.parametrize("quant_range", [None, (0, 15)])
def test_choose_qparams_as_torch_ao(
    qscheme: torch.qscheme, dtype: torch.dtype, quant_range: tuple[int, int] | None
) -> None:
    given_range = (
        {}
        if quant_range is None
        else dict(zip(("quant_min", "quant_max"), quant_range, strict=True))
    )
    theirs = QSCHEMES[qscheme](dtype=dtype, qscheme=qscheme, **given_range)
    x = random_values((3, 50), torch.float32, 0) + 0.5
    theirs(x)
    got = F.choose_qparams(
        theirs.min_val, theirs.max_val, dtype=dtype, qscheme=qscheme, **given_range
    )
    for ours, expected in zip(got, theirs.calculate_qparams(), strict=True):
        assert_same(ours.double(), expected.double())


def test_choose_qparams_keeps_the_scale_above_eps() -> None:
    zero = torch.tensor(0.0)
    assert F.choose_qparams(zero, zero)[0] == torch.finfo(torch.float32).eps
    assert F.choose_qparams(zero, zero, eps=0.125)[0] == 0.125


# -------------------------------------------------------------------------- fake-quantize


@given(streams(float32, full_shapes, max_size=1), st.data(), quant_ranges())
def test_fake_quantize_as_torch(
    stream: list[Tensor], data: st.DataObject, quant_range: tuple[int, int]
) -> None:
    x, axis, channels = data.draw(with_axis(st.just(stream[0])))
    low, high = quant_range
    scale = torch.linspace(0.01, 0.1, channels)
    zero_point = torch.arange(channels, dtype=torch.int32) % (high - low) + low
    x = x.requires_grad_()
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    else:
        expected = torch.fake_quantize_per_channel_affine(
            x, scale, zero_point, axis % x.dim(), low, high
        )
    y = F.fake_quantize(x, scale, zero_point, quant_min=low, quant_max=high, ch_axis=axis)
    assert_same(y, expected)
    grad = torch.randn_like(expected)
    assert_same(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quantize_takes_numbers(dtype: torch.dtype) -> None:
    x = random_values((40,), dtype, 0)
    y = F.fake_quantize(x, 0.25, 3, quant_min=0, quant_max=15)
    expected = ((x.double() / 0.25).round() + 3).clamp(0, 15).sub(3).mul(0.25).to(dtype)
    assert_same(y, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_on_the_grid_stays(dtype: torch.dtype) -> None:
    x = torch.arange(-8, 8, dtype=dtype) * 0.5
    y = F.fake_quantize(x, 0.5, 0, quant_min=-8, quant_max=7)
    assert_same(y, x)
    assert y.data_ptr() != x.data_ptr()


# ---------------------------------------------------------------------------------- fused


FUSED = {
    torch.per_tensor_affine: {"dtype": torch.quint8},
    torch.per_tensor_symmetric: {"dtype": torch.qint8},
    torch.per_channel_symmetric: {"dtype": torch.qint8, "ch_axis": 0},
    torch.per_channel_affine: {"dtype": torch.quint8, "ch_axis": 1},
    torch.per_channel_affine_float_qparams: {"dtype": torch.quint8, "ch_axis": 0},
}


@pytest.mark.parametrize("qscheme", FUSED)
def test_fused_as_torch_ao_fake_quantize(qscheme: torch.qscheme) -> None:
    settings = FUSED[qscheme]
    axis = settings.get("ch_axis")
    moving_average = (
        torch_observer.MovingAverageMinMaxObserver
        if axis is None
        else torch_observer.MovingAveragePerChannelMinMaxObserver
    )
    theirs = torch_fake_quantize.FakeQuantize(moving_average, qscheme=qscheme, **settings)
    channels = None if axis is None else (4, 30)[axis]
    state = F.fake_quantize_state(channels, qscheme=qscheme)
    for seed in range(4):
        x = random_values((4, 30), torch.float32, seed).requires_grad_()
        expected = theirs(x)
        y = F.fused_observe_fake_quantize(x, *state, qscheme=qscheme, **settings)
        assert_same(state.scale, theirs.scale)
        assert_same(state.zero_point, theirs.zero_point)
        assert_same(y, expected)
        grad = torch.randn_like(expected)
        assert_same(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_fused_does_what_is_switched_on(as_tensor: bool) -> None:
    def switch(on: bool) -> bool | Tensor:
        return torch.tensor([on]) if as_tensor else on

    x = random_values((20,), torch.float32, 0)
    state = F.fake_quantize_state()
    y = F.fused_observe_fake_quantize(x, *state, observe=switch(False), quantize=switch(False))
    assert_same(y, x)
    assert state.min_val == INF
    y = F.fused_observe_fake_quantize(x, *state, quantize=switch(False))
    assert_same(y, x)
    assert_same(state.min_val, x.min())
    before = [t.clone() for t in state]
    y = F.fused_observe_fake_quantize(x * 2, *state, observe=switch(False))
    assert_same(list(state), before)
    expected = F.fake_quantize(x * 2, state.scale, state.zero_point, quant_min=0, quant_max=255)
    assert_same(y, expected)


def test_a_training_loop_without_modules() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(256, 8), torch.randn(4, 8)
    targets = inputs @ weight.T
    learned = torch.zeros(4, 8, requires_grad=True)
    activation_state = F.fake_quantize_state()
    weight_state = F.fake_quantize_state(4, qscheme=torch.per_channel_symmetric)
    optimizer = torch.optim.SGD([learned], lr=0.2)
    for _ in range(60):
        x = F.fused_observe_fake_quantize(inputs, *activation_state)
        w = F.fused_observe_fake_quantize(
            learned,
            *weight_state,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            averaging_constant=1.0,
        )
        loss = (x @ w.T - targets).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 < targets.pow(2).mean()


ACTIVATIONS = {
    "none": ({}, lambda x: x),
    "relu": ({"low": 0.0}, torch.relu),
    "relu6": ({"low": 0, "high": 6}, torch.nn.functional.relu6),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 30), (30,)])
def test_a_sum_is_quantized_as_its_steps(activation: str, shape: tuple[int, ...]) -> None:
    bounds, function = ACTIVATIONS[activation]
    settings = {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8, "eps": 1e-3}
    ours, theirs = F.fake_quantize_state(), F.fake_quantize_state()
    for seed in range(3):
        a = random_values((4, 30), torch.float32, seed, "outliers").requires_grad_()
        b = random_values(shape, torch.float32, seed + 9, "outliers").requires_grad_()
        y = F.add_observe_fake_quantize(a, b, *ours, **bounds, **settings)
        expected = F.fused_observe_fake_quantize(function(a + b), *theirs, **settings)
        assert_same(y, expected)
        assert_same(list(ours), list(theirs))
        grad = torch.randn_like(expected)
        gradients = (torch.autograd.grad(result, (a, b), grad) for result in (y, expected))
        assert_same(next(gradients), next(gradients))


def test_a_sum_is_observed_and_quantized_as_switched_on() -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.0, 1.0])
    state = F.fake_quantize_state()
    off = {"observe": False, "quantize": torch.tensor([0])}
    assert F.add_observe_fake_quantize(a, b, *state, low=0.0, **off).tolist() == [2.0, 0.0]
    assert state.max_val == -INF
    assert F.add_observe_fake_quantize(a, b, *state, quantize=False).tolist() == [2.0, -3.0]
    assert (state.min_val, state.max_val) == (-3.0, 2.0)


def batch_norm_of(channels: int) -> list[Tensor]:
    """weight, bias, running_mean and running_var."""
    tensors = [random_values((channels,), torch.float32, seed) for seed in range(3)]
    return [*tensors, torch.ones(channels)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(16, 5), (4, 5, 30), (4, 5, 7, 7), (3, 5, 4, 4, 4)])
def test_batch_norm_is_quantized_as_its_steps(
    shape: tuple[int, ...], training: bool, activation: str
) -> None:
    bounds, function = ACTIVATIONS[activation]
    settings = {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8, "eps": 1e-3}
    ours, theirs = F.fake_quantize_state(), F.fake_quantize_state()
    batch_norm, expected_batch_norm = batch_norm_of(5), batch_norm_of(5)
    near = {"rtol": 1e-5, "atol": 1e-6}
    for seed in range(3):
        x = random_values(shape, torch.float32, seed)
        y = F.batch_norm_observe_fake_quantize(
            x, *batch_norm, *ours, training=training, momentum=0.2, **bounds, **settings
        )
        weight, bias, *running = expected_batch_norm
        normalized = torch.nn.functional.batch_norm(x, *running, weight, bias, training, 0.2)
        expected = F.fused_observe_fake_quantize(function(normalized), *theirs, **settings)
        torch.testing.assert_close(batch_norm, expected_batch_norm, **near)
        torch.testing.assert_close(list(ours), list(theirs), **near)
        apart = (y - expected).abs() / theirs.scale
        assert apart.max() < 1.01
        assert (apart > 0.01).double().mean() < 0.01


BATCH_NORM_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "integers": ({"x": torch.ones(4, 3).int()}, TypeError, "x must have a floating dtype"),
    "one dimension": ({"x": torch.ones(3)}, ValueError, r"2 to 5 dimensions, got shape \[3\]"),
    "one value": (
        {"x": torch.ones(1, 3, 1, 1)},
        ValueError,
        r"more than one value per channel.* got shape \[1, 3, 1, 1\]",
    ),
    "channels": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight must have one element for each of the 3 channels of x .*got shape \[4\]",
    ),
    "device": (
        {"running_var": torch.ones(3, device="meta")},
        ValueError,
        "running_var must be on x's device, cpu, got meta",
    ),
    "no statistics": ({"running_mean": None}, TypeError, "running_mean must be a tensor"),
    "integer bias": ({"bias": torch.ones(3).int()}, TypeError, "bias must have a floating dtype"),
    "range": ({"max_val": torch.zeros(3)}, ValueError, "max_val must have one element"),
    "zero point": ({"zero_point": torch.zeros(1)}, TypeError, "zero_point must have an integer"),
    "bounds": ({"low": 1.0, "high": 1.0}, ValueError, "low must be less than high"),
    "qscheme": ({"qscheme": torch.per_channel_affine}, ValueError, "needs ch_axis"),
    "non-finite": ({"x": torch.tensor([[INF, 1, 1], [1, 2, 3]])}, ValueError, "non-finite"),
}


@pytest.mark.parametrize(("change", "error", "message"), BATCH_NORM_ERRORS.values())
def test_batch_norm_says_what_does_not_fit_and_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    given_ = dict(zip(names, batch_norm_of(3), strict=True))
    given_ |= {"x": X.t().contiguous(), "nonfinite": "raise", **F.fake_quantize_state()._asdict()}
    given_ |= change
    tensors = [t for t in given_.values() if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        F.batch_norm_observe_fake_quantize(**given_)
    assert_same(tensors, before)


# ------------------------------------------------------------------------------ learnable


def test_learnable_gradients_are_lsq_s() -> None:
    x = torch.tensor([-9.0, -0.9, 0.3, 9.0]).requires_grad_()
    scale, zero_point = torch.tensor([0.5]).requires_grad_(), torch.tensor([1.2]).requires_grad_()
    y = F.learnable_fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, grad_factor=0.5)
    assert y.tolist() == [-4.5, -1.0, 0.5, 3.0]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    inside = (-1.0 + 0.9) / 0.5 + (0.5 - 0.3) / 0.5
    assert scale.grad.item() == pytest.approx(0.5 * (inside + (-8 - 1) + (7 - 1)))
    assert zero_point.grad.item() == pytest.approx(0.5 * (-0.5 - 0.5))


def test_a_learnable_scale_learns() -> None:
    x = random_values((1000,), torch.float32, 0)
    scale = torch.tensor([0.05]).requires_grad_()
    zero_point = torch.tensor([8.0])
    optimizer = torch.optim.SGD([scale], lr=0.5)
    losses = []
    for _ in range(40):
        y = F.learnable_fake_quantize(x, scale, zero_point, quant_min=0, quant_max=15)
        loss = (y - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("dtype", FLOATS)
def test_learnable_takes_every_dtype(dtype: torch.dtype) -> None:
    x = random_values((3, 40), dtype, 0).requires_grad_()
    scale = torch.full((3,), 0.25, requires_grad=True)
    zero_point = torch.zeros(3, requires_grad=True)
    y = F.learnable_fake_quantize(x, scale, zero_point, quant_min=-4, quant_max=3, ch_axis=0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert scale.grad.dtype == zero_point.grad.dtype == torch.float32
    assert (scale.grad != 0).all()


# ------------------------------------------------------------------------------ bad input

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def observe(x: Any = X, channels: int | None = None, **kwargs: Any) -> None:
    state = kwargs.pop("state", F.minmax_state(channels))
    F.observe_minmax_(x, *state, **kwargs)


def count(x: Any = X, **kwargs: Any) -> None:
    state = kwargs.pop("state", F.histogram_state(8))
    F.observe_histogram_(x, *state, **kwargs)


def quantize(x: Any = X, scale: Any = 0.1, zero_point: Any = 0, **kwargs: Any) -> Tensor:
    return F.fake_quantize(x, scale, zero_point, **{"quant_min": -8, "quant_max": 7, **kwargs})


def fused(x: Any = X, channels: int | None = None, **kwargs: Any) -> Tensor:
    state = kwargs.pop("state", F.fake_quantize_state(channels))
    return F.fused_observe_fake_quantize(x, *state, **kwargs)


def add(a: Any = X, b: Any = X, **kwargs: Any) -> Tensor:
    state = kwargs.pop("state", F.fake_quantize_state())
    return F.add_observe_fake_quantize(a, b, *state, **kwargs)


def learn(x: Any = X, scale: Any = None, zero_point: Any = None, **kwargs: Any) -> Tensor:
    scale = torch.tensor([0.1]) if scale is None else scale
    zero_point = torch.tensor([0.0]) if zero_point is None else zero_point
    return F.learnable_fake_quantize(
        x, scale, zero_point, **{"quant_min": -8, "quant_max": 7, **kwargs}
    )


def on_meta(state: Any) -> Any:
    return type(state)(*(t.to("meta") for t in state))


BAD = {
    # what x is
    "a list": (lambda: observe([1.0]), TypeError, "x must be a tensor, got list"),
    "none": (lambda: fused(None), TypeError, "x must be a tensor, got NoneType"),
    "a number": (lambda: quantize(1.0), TypeError, "x must be a tensor, got float"),
    "an array": (lambda: learn(X.numpy()), TypeError, "x must be a tensor, got ndarray"),
    "a string": (lambda: count("x"), TypeError, "x must be a tensor, got str"),
    "integers": (lambda: observe(X.long()), TypeError, "floating dtype .*got torch.int64"),
    "booleans": (lambda: quantize(X > 0), TypeError, "floating dtype .*got torch.bool"),
    "complex": (lambda: fused(X + 0j), TypeError, "floating dtype .*got torch.complex64"),
    "bytes": (lambda: count(X.byte()), TypeError, "floating dtype .*got torch.uint8"),
    "learn integers": (lambda: learn(X.int()), TypeError, "floating dtype .*got torch.int32"),
    "a sum with a number": (lambda: add(X, 1.0), TypeError, "b must be a tensor, got float"),
    "a sum of integers": (lambda: add(X.int(), X), TypeError, "a must have a floating dtype"),
    "a sum of other shapes": (lambda: add(X, X[:2]), RuntimeError, "must match the size"),
    "bounds that cross": (
        lambda: add(low=6, high=0),
        ValueError,
        "low must be less than high, got low=6 and high=0",
    ),
    "a bound that is none": (lambda: add(high=math.nan), ValueError, "got low=-inf and high=nan"),
    "a sum per channel": (
        lambda: add(qscheme=torch.per_channel_affine),
        ValueError,
        "needs ch_axis",
    ),
    "a sum's scales": (
        lambda: add(state=F.fake_quantize_state(3)),
        ValueError,
        r"min_val must have one element, got shape \[3\]",
    ),
    "a sum's device": (
        lambda: add(state=on_meta(F.fake_quantize_state())),
        ValueError,
        "min_val must be on x's device, cpu, got meta",
    ),
    "a sum that is not finite": (
        lambda: add(torch.full((3,), INF), X[0, :3], nonfinite="raise"),
        ValueError,
        "3 non-finite elements",
    ),
    # axes and channels
    "axis": (
        lambda: observe(channels=3, ch_axis=2),
        ValueError,
        r"ch_axis=2 is out of range for x of shape \[3, 4\]: accepted are -2 to 1",
    ),
    "quantize axis": (
        lambda: quantize(scale=torch.ones(3), zero_point=torch.zeros(3).int(), ch_axis=-3),
        ValueError,
        "ch_axis=-3 is out of range",
    ),
    "0-dim axis": (lambda: observe(torch.tensor(1.0), 1, ch_axis=0), ValueError, "0-dim"),
    "learn axis": (lambda: learn(ch_axis=5), ValueError, "ch_axis=5 is out of range"),
    "channels": (
        lambda: observe(channels=4, ch_axis=0),
        ValueError,
        r"min_val must have one element for each of the 3 channels .*got shape \[4\]",
    ),
    "fused channels": (
        lambda: fused(channels=4, ch_axis=0, qscheme=torch.per_channel_affine),
        ValueError,
        "min_val must have one element for each of the 3 channels",
    ),
    "scales": (
        lambda: quantize(scale=torch.ones(4), zero_point=torch.zeros(4).int(), ch_axis=0),
        ValueError,
        "scale must have one element for each of the 3 channels",
    ),
    "zero points": (
        lambda: quantize(scale=torch.ones(3), zero_point=torch.zeros(4).int(), ch_axis=0),
        ValueError,
        "zero_point must have one element for each of the 3 channels",
    ),
    "many scales per tensor": (
        lambda: quantize(scale=torch.ones(3), zero_point=torch.zeros(3).int()),
        ValueError,
        r"scale must have one element, got shape \[3\]",
    ),
    "learn scales": (
        lambda: learn(scale=torch.ones(2), zero_point=torch.zeros(2), ch_axis=1),
        ValueError,
        "scale must have one element for each of the 4 channels",
    ),
    # buffers
    "min_val is no tensor": (
        lambda: F.observe_minmax_(X, 0.0, torch.tensor(0.0)),
        TypeError,
        "min_val must be a tensor, got float",
    ),
    "integer range": (
        lambda: F.observe_minmax_(X, torch.tensor(0), torch.tensor(0)),
        TypeError,
        "min_val must have a floating dtype, got torch.int64",
    ),
    "max_val": (
        lambda: F.observe_minmax_(X, torch.tensor(INF), torch.tensor([-INF, -INF])),
        ValueError,
        r"max_val must have one element, got shape \[2\]",
    ),
    "device": (
        lambda: observe(state=on_meta(F.minmax_state())),
        ValueError,
        "min_val must be on x's device, cpu, got meta",
    ),
    "fused device": (
        lambda: fused(state=on_meta(F.fake_quantize_state())),
        ValueError,
        "min_val must be on x's device, cpu, got meta",
    ),
    "strides": (
        lambda: F.observe_minmax_(X, torch.full((6,), INF)[::2], torch.full((3,), -INF), ch_axis=0),
        ValueError,
        "min_val must be contiguous",
    ),
    "no bins": (
        lambda: F.observe_histogram_(X, torch.zeros(0), torch.tensor(INF), torch.tensor(-INF)),
        ValueError,
        "histogram must have at least one bin",
    ),
    "histogram of integers": (
        lambda: F.observe_histogram_(
            X, torch.zeros(4).int(), torch.tensor(INF), torch.tensor(-INF)
        ),
        TypeError,
        "histogram must be torch.float32 or torch.float64, got torch.int32",
    ),
    "upsample_rate": (
        lambda: count(upsample_rate=0),
        ValueError,
        "upsample_rate must be at least 1",
    ),
    # ranges, scales, schemes
    "empty range": (
        lambda: quantize(quant_min=7, quant_max=7),
        ValueError,
        "quant_min must be less than quant_max, got quant_min=7, quant_max=7",
    ),
    "learn empty range": (
        lambda: learn(quant_min=7, quant_max=-8),
        ValueError,
        "quant_min must be less than quant_max, got quant_min=7, quant_max=-8",
    ),
    "fused empty range": (
        lambda: fused(quant_min=9, quant_max=3),
        ValueError,
        "quant_min must be less than quant_max",
    ),
    "half a range": (lambda: fused(quant_max=3), ValueError, "quant_min and quant_max go together"),
    "scale 0": (lambda: quantize(scale=0.0), ValueError, "scale must be positive .*got"),
    "scale -1": (lambda: quantize(scale=-1.0), ValueError, "scale must be positive"),
    "scale nan": (lambda: quantize(scale=math.nan), ValueError, "scale must be positive"),
    "scale inf": (lambda: quantize(scale=INF), ValueError, "scale must be positive and finite"),
    "a scale": (
        lambda: quantize(
            scale=torch.tensor([1, 0.0, 1]), zero_point=torch.zeros(3).int(), ch_axis=0
        ),
        ValueError,
        "scale must be positive",
    ),
    "learn scale": (lambda: learn(scale=torch.zeros(1)), ValueError, "scale must be positive"),
    "integer scale": (
        lambda: quantize(scale=torch.ones(1).int()),
        TypeError,
        "scale must have a floating dtype",
    ),
    "zero point": (
        lambda: quantize(zero_point=8),
        ValueError,
        "zero_point must lie between quant_min -8 and quant_max 7",
    ),
    "a zero point": (
        lambda: quantize(scale=torch.ones(3), zero_point=torch.tensor([0, -9, 0]), ch_axis=0),
        ValueError,
        "zero_point must lie between",
    ),
    "fractional zero point": (
        lambda: quantize(zero_point=0.5),
        TypeError,
        "zero_point must be an integer, got 0.5",
    ),
    "learn integer zero point": (
        lambda: learn(zero_point=torch.zeros(1).int()),
        TypeError,
        "zero_point must have a floating dtype",
    ),
    "scheme and axis": (
        lambda: fused(qscheme=torch.per_channel_affine),
        ValueError,
        "per_channel_affine needs ch_axis",
    ),
    "axis and scheme": (
        lambda: fused(channels=3, ch_axis=0),
        ValueError,
        "per_tensor_affine does not go with ch_axis=0",
    ),
    "no scheme": (
        lambda: F.choose_qparams(X.min(), X.max(), qscheme="affine"),
        ValueError,
        "qscheme must be one of .*got 'affine'",
    ),
    "sizes": (
        lambda: F.choose_qparams(torch.zeros(2), torch.ones(3)),
        ValueError,
        r"one size, got shapes \[2\] and \[3\]",
    ),
    "eps": (lambda: fused(eps=-0.5), ValueError, "eps must be finite and not negative"),
    "levels": (
        lambda: F.histogram_range(*F.histogram_state()[:3], levels=1),
        ValueError,
        "levels must be at least 2",
    ),
    "range of many": (
        lambda: F.histogram_range(torch.ones(4), torch.zeros(2), torch.ones(2)),
        ValueError,
        "min_val must have one element",
    ),
    # state and policies
    "channels of state": (lambda: F.minmax_state(0), ValueError, "channels must be at least 1"),
    "bins of state": (lambda: F.histogram_state(0), ValueError, "bins must be at least 1"),
    "dtype of state": (lambda: F.minmax_state(dtype=torch.int8), TypeError, "floating dtype"),
    "policy": (
        lambda: observe(nonfinite="drop"),
        ValueError,
        "nonfinite must be one of 'ignore', 'raise', 'propagate', got 'drop'",
    ),
    "non-finite": (
        lambda: observe(torch.tensor([1.0, math.nan, INF]), nonfinite="raise"),
        ValueError,
        "2 non-finite elements .*of 3",
    ),
    "fused non-finite": (
        lambda: fused(torch.tensor([1.0, math.nan]), nonfinite="raise"),
        ValueError,
        "1 non-finite elements",
    ),
    "counted non-finite": (
        lambda: count(torch.tensor([1.0, -INF]), nonfinite="raise"),
        ValueError,
        "1 non-finite elements",
    ),
    "nan in a histogram": (
        lambda: count(torch.tensor([1.0, math.nan]), nonfinite="propagate"),
        ValueError,
        "1 non-finite elements",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_words(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) in (error, QuantizationError), "raised by fastquant, not by torch"
    assert not re.search(r"\.cpp|\.h:", str(caught.value))


def test_what_is_refused_changes_nothing() -> None:
    state = F.fake_quantize_state(3, qscheme=torch.per_channel_affine)
    settings: dict[str, Any] = {"qscheme": torch.per_channel_affine, "nonfinite": "raise"}
    F.fused_observe_fake_quantize(X, *state, ch_axis=0, **settings)
    histogram = F.histogram_state(8)
    F.observe_histogram_(X, *histogram)
    before = [t.clone() for t in (*state, *histogram)]
    nonfinite = X.clone()
    nonfinite[1, 1] = math.nan
    for x, axis in ((nonfinite, 0), (X, 1), (X, 2), (X.long(), 0), (X[:2], 0), ("x", 0)):
        with pytest.raises((ValueError, TypeError)):
            F.fused_observe_fake_quantize(x, *state, ch_axis=axis, **settings)
        with pytest.raises((ValueError, TypeError)):
            F.observe_minmax_(x, *state[:2], ch_axis=axis, nonfinite="raise")
    for x in (nonfinite, X.long(), "x"):
        with pytest.raises((ValueError, TypeError)):
            F.observe_histogram_(x, *histogram, nonfinite="raise")
    assert_same([*state, *histogram], before)


# ------------------------------------------------------------------------------ compiling


def test_functions_compile_to_one_graph() -> None:
    def step(x: Tensor, scale: Tensor, zero_point: Tensor, *state: Tensor) -> Tensor:
        y = F.fused_observe_fake_quantize(x, *state)
        F.observe_minmax_(y, *state[:2])
        y = F.fake_quantize(y, 0.5, 1, quant_min=0, quant_max=15)
        low, _ = F.choose_qparams(*state[:2])
        return F.learnable_fake_quantize(y, scale, zero_point, quant_min=0, quant_max=7) + low

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (step, compiled):
        state = F.fake_quantize_state()
        leaves = [random_values((30,), torch.float32, 0), torch.tensor([0.3]), torch.tensor([2.2])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = run(*leaves, *state)
        outcomes.append([y.detach(), *state, *torch.autograd.grad(y.sum(), leaves)])
    assert_same(outcomes[1], outcomes[0])
