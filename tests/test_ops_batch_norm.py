"""Batch norm, activation, observing, fake-quantizing as one: the reference, torch, truth."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import batch_norm_calls
import oracle
from batch_norm_calls import GEOMETRIES, Case, case_of
from fastquant import _C
from fastquant._native import ops, routes
from fastquant._native.settings import FusedSettings
from op_calls import AFFINE, IGNORE, INF, RAISE, counter, eps, flag, unobserved
from strategies import FLOATS, LAYOUTS, random_values

BOUNDS = {"none": (-INF, INF), "relu": (0.0, INF), "relu6": (0.0, 6.0)}


def as_reference(case: Case) -> None:
    batch_norm_calls.assert_as_reference(lambda name: getattr(ops, name), case)


@given(batch_norm_calls.cases())
def test_cases_as_reference(case: Case) -> None:
    as_reference(case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "layout"), GEOMETRIES)
def test_geometries_as_reference(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    for case in batch_norm_calls.cases_of_geometry(shape, layout, dtype):
        as_reference(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_far_from_zero_as_reference(layout: str) -> None:
    as_reference(batch_norm_calls.far_from_zero(layout))


# Every way of walking over memory: rows in parts, short rows together, columns in whole and in
# overlapping vectors, in one block of vectors and in several, and columns so few that several rows
# count as one, with rows that are left and without, or too few rows for that.
WALKS = [
    ((4, 3, 2_500), "contiguous"),
    ((2, 3, 5_000), "contiguous"),
    ((40, 5, 49), "contiguous"),
    ((9, 7, 3, 3), "contiguous"),
    ((300, 48), "contiguous"),
    ((300, 41), "contiguous"),
    ((300, 3), "contiguous"),
    ((1_500, 2), "contiguous"),
    ((1_280, 17), "contiguous"),
    ((7, 6), "contiguous"),
    ((5, 24, 9, 9), "channels_last"),
    ((70, 150), "contiguous"),
    ((3, 1_050), "contiguous"),
]


def made_by(case: Case) -> list[Tensor]:
    args = case.observing()
    norm, quantizer = ops.observe_batch_norm_(*args)
    y = ops.batch_norm_fake_quantize(*case.values(norm, quantizer))
    gradients = ops.batch_norm_fake_quantize_backward(*case.backward(norm, quantizer))
    return [norm, quantizer, y, *gradients, *(a for a in args if isinstance(a, Tensor))]


def assert_same_bytes(got: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.stride() == theirs.stride()
        flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs))
        assert torch.equal(*flat)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "layout"), WALKS)
def test_every_instruction_set_gives_the_same_bytes(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, any_isa: list[str]
) -> None:
    for case in batch_norm_calls.cases_of_geometry(shape, layout, dtype):
        if case.nonfinite == RAISE:
            continue
        _C.set_isa("scalar")
        expected = made_by(case)
        for isa in any_isa:
            _C.set_isa(isa)
            assert_same_bytes(made_by(case), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "layout"), WALKS)
def test_the_gradient_may_take_the_place_of_the_incoming_one(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, any_isa: list[str]
) -> None:
    for case in batch_norm_calls.cases_of_geometry(shape, layout, dtype):
        if case.nonfinite == RAISE:
            continue
        norm, quantizer = ops.observe_batch_norm_(*case.observing())
        grad, *others = case.backward(norm, quantizer)
        grad = torch.empty_like(case.x).copy_(grad)
        of_channels = [torch.empty_like(case.weight) for _ in range(2)]
        for isa in any_isa:
            _C.set_isa(isa)
            expected = ops.batch_norm_fake_quantize_backward(grad, *others)
            place = grad.clone()
            results = (place, *of_channels)
            assert _C.batch_norm_fake_quantize_backward(place, *others, *results)
            assert_same_bytes([place], [expected[0]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 40, 40, 40), "contiguous"),
        ((8, 40, 40, 40), "channels_last"),
        ((2, 1, 300_000), "contiguous"),
        ((600, 400, 2), "contiguous"),
        ((3, 40, 70, 70), "contiguous"),
        ((67, 8, 41, 41), "channels_last"),
    ],
)
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(
    shape: tuple[int, ...], layout: str, training: bool
) -> None:
    case = case_of(LAYOUTS[layout](random_values(shape, torch.float32, 0), 0), training=training)
    torch.set_num_threads(1)
    expected = made_by(case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bytes(made_by(case), expected)


# --------------------------------------------------------------------------- truth and torch


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mean", "deviation"), [(0, 1), (1e4, 1e-1), (1e5, 1), (1e6, 10), (-1e6, 1)]
)
def test_batch_statistics_are_exact_however_large_the_mean(
    mean: float, deviation: float, layout: str
) -> None:
    values = random_values((16, 24, 20, 20), torch.float64, 0) * deviation + mean
    x = LAYOUTS[layout](values.float(), 0)
    case = case_of(x, observe=False)
    norm, _ = ops.observe_batch_norm_(*case.observing())
    wide = x.double().transpose(0, 1).reshape(24, -1)
    var, true_mean = torch.var_mean(wide, 1, correction=0)
    digits = torch.finfo(torch.float32).eps
    assert ((norm[0] - true_mean).abs() <= digits * (true_mean.abs() + var.sqrt())).all()
    torch.testing.assert_close(norm[1].double(), (var + 1e-5).rsqrt(), rtol=2 * digits, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_constant_channel_has_no_variance(layout: str) -> None:
    x = LAYOUTS[layout](torch.full((5, 20, 7, 7), 0.1), 0)
    case = case_of(x)
    running = (args := case.observing())[3:5]
    norm, _ = ops.observe_batch_norm_(*args)
    assert (norm[0] == 0.1).all()
    torch.testing.assert_close(norm[1], torch.full((20,), 1e-5**-0.5))
    torch.testing.assert_close(running[1], 0.9 * case.running_var)


class Layer(NamedTuple):
    """What a layer of batch norm, activation and fake-quantizer has, and a gradient for it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    running_mean: Tensor
    running_var: Tensor
    settings: FusedSettings


def layer_of(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", quantize: bool = True
) -> Layer:
    channels = shape[1]
    x = LAYOUTS[layout](random_values(shape, dtype, 0) * 2 + 0.5, 0).requires_grad_()
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight = random_values((channels,), parameters, 1).requires_grad_()
    bias = random_values((channels,), parameters, 2).requires_grad_()
    running = [random_values((channels,), parameters, 3), torch.ones(channels, dtype=parameters)]
    buffers = (*unobserved(dtype=parameters), torch.ones(1, dtype=parameters))
    settings = FusedSettings(
        *(flag(True), flag(quantize), *buffers, torch.zeros(1, dtype=torch.int32), counter()),
        *(eps(parameters), None, 0.01, 0, 127, AFFINE, 0, IGNORE),
    )
    return Layer(x, weight, bias, random_values(shape, dtype, 4), *running, settings)


def as_one(layer: Layer, training: bool, low: float, high: float) -> Tensor:
    statistics = (layer.running_mean, layer.running_var)
    how = (training, 0.1, 1e-5, low, high)
    return routes.batch_norm_observe_fake_quantize(
        layer.x, layer.weight, layer.bias, *statistics, *how, layer.settings
    )


def one_by_one(layer: Layer, training: bool, low: float, high: float) -> Tensor:
    statistics = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    y = F.batch_norm(layer.x, *statistics, training, 0.1, 1e-5)
    if high < INF:
        y = F.relu6(y)
    elif low > -INF:
        y = F.relu(y)
    return routes.fused_observe_fake_quantize(y, layer.settings)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_op_does_what_single_ones_do(
    dtype: torch.dtype, layout: str, activation: str, training: bool, quantize: bool
) -> None:
    shape = (8, 20, 13, 13)
    outcomes = []
    for run in (as_one, one_by_one):
        layer = layer_of(shape, dtype, layout, quantize)
        y = run(layer, training, *BOUNDS[activation])
        y.backward(layer.grad)
        outcomes.append((layer, y.detach()))
    (ours, y), (theirs, expected) = outcomes
    digits = torch.finfo(dtype).eps
    assert y.stride() == expected.stride()
    near = {"rtol": 50 * digits, "atol": 50 * digits}
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **near)
    for a, b in zip(ours.settings[2:5], theirs.settings[2:5], strict=True):
        torch.testing.assert_close(a, b, **near)
    assert torch.equal(ours.settings.zero_point, theirs.settings.zero_point)
    # A value close to the middle between two levels may take the other one, whose gradient is the
    # same but at the edges of the range.
    step = float(ours.settings.scale) if quantize else 0.0
    apart = (y - expected).abs()
    assert apart.max() <= 1.001 * step + 100 * digits
    assert (apart > 0.5 * step + 100 * digits).double().mean() <= 1e-3
    gradients = [(ours.x.grad, theirs.x.grad)]
    gradients += [(ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)]
    for got, wanted in gradients:
        assert got is not None
        assert wanted is not None
        error = (got - wanted).norm() / wanted.norm()
        assert error < 200 * digits, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_elements_are_computed_in_fp32(dtype: torch.dtype) -> None:
    layer = layer_of((8, 20, 13, 13), dtype)
    y = as_one(layer, True, 0.0, INF)
    y.backward(layer.grad)
    wide = layer_of((8, 20, 13, 13), torch.float32)
    wide = wide._replace(
        x=layer.x.detach().float().requires_grad_(), grad=layer.grad.float(), settings=wide.settings
    )
    expected = as_one(wide, True, 0.0, INF)
    expected.backward(wide.grad)
    assert y.dtype == layer.x.grad.dtype == dtype  # type: ignore[union-attr]
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    oracle.assert_same(y.detach(), expected.detach().to(dtype))
    oracle.assert_same(layer.x.grad, wide.x.grad.to(dtype))  # type: ignore[union-attr]
    oracle.assert_same(layer.weight.grad, wide.weight.grad)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", BOUNDS)
def test_gradients_are_those_of_the_function(activation: str, training: bool) -> None:
    layer = layer_of((3, 4, 3, 2), torch.float64, quantize=False)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given_ = layer._replace(x=x, weight=weight, bias=bias)
        return as_one(given_, training, *BOUNDS[activation])

    if training:
        layer.running_mean.requires_grad_(False)
    inputs = (layer.x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_give_the_same_gradients() -> None:
    layer = layer_of((4, 6, 5, 5), torch.float32)
    expected = torch.autograd.grad(as_one(layer, True, 0.0, INF).square().sum(), layer.x)[0]

    def loss(x: Tensor) -> Tensor:
        parameters = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
        return as_one(layer._replace(x=x, **parameters), True, 0.0, INF).square().sum()

    got = torch.func.grad(loss)(layer.x.detach())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_to_one_graph() -> None:
    outcomes = []
    for run in (as_one, torch.compile(as_one, fullgraph=True, backend="aot_eager")):
        layer = layer_of((4, 6, 5, 5), torch.float32)
        y = run(layer, True, 0.0, INF)
        y.backward(layer.grad)
        made = [y.detach(), layer.x.grad, layer.weight.grad, layer.bias.grad]
        outcomes.append([*made, layer.running_mean, layer.running_var, *layer.settings[2:7]])
    oracle.assert_same(outcomes[1], outcomes[0])


def test_what_needs_no_gradient_gets_none() -> None:
    layer = layer_of((4, 6, 5), torch.float32)
    frozen = layer._replace(x=layer.x.detach(), bias=layer.bias.detach())
    as_one(frozen, False, 0.0, INF).backward(layer.grad)
    assert layer.x.grad is None
    assert layer.bias.grad is None
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert not as_one(layer, True, 0.0, INF).requires_grad


# ------------------------------------------------------------------- states and non-finite values


def test_flags_switch_observing_and_fake_quantizing() -> None:
    layer = layer_of((4, 6, 5, 5), torch.float32)
    settings = layer.settings
    settings.observer_enabled.zero_()
    y = as_one(layer, True, 0.0, INF)
    assert settings.min_val == INF
    assert not torch.equal(layer.running_var, torch.ones(6))
    assert torch.equal(y, y.round().clamp(0, 127))  # by the scale of 1 that was there
    settings.observer_enabled.fill_(1)
    settings.fake_quant_enabled.zero_()
    y = as_one(layer, True, 0.0, INF)
    assert settings.min_val == 0
    assert settings.max_val == y.max()
    assert y.unique().numel() > 150


def test_running_statistics_stay_in_evaluation() -> None:
    layer = layer_of((4, 6, 5, 5), torch.float32)
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    as_one(layer, False, 0.0, INF)
    oracle.assert_same([layer.running_mean, layer.running_var], before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nan_makes_its_channel_nan_in_training(layout: str) -> None:
    values = random_values((4, 6, 5, 5), torch.float32, 0)
    values[1, 2, 3, 4] = math.nan
    values[2, 5, 0, 0] = INF
    case = case_of(LAYOUTS[layout](values, 0))
    args = case.observing()
    norm, quantizer = ops.observe_batch_norm_(*args)
    y = ops.batch_norm_fake_quantize(*case.values(norm, quantizer))
    assert y.isnan().all((0, 2, 3)).tolist() == [False, False, True, False, False, True]
    assert y.isnan().sum() == args[16] == 2 * 4 * 25
    finite = torch.isfinite(norm[0])
    clean = case_of(LAYOUTS[layout](values[:, finite], 0))
    clean_args = clean.observing()
    clean_args = (clean.x, *(a[finite] for a in args[1:3]), *(r[:4] for r in clean_args[3:5]))
    clean_args = (*clean_args, *clean.observing()[5:])
    ops.observe_batch_norm_(*clean_args)
    oracle.assert_same(args[12:16], clean_args[12:16])  # range, scale and zero point


def test_refused_elements_change_nothing() -> None:
    for training, layout in itertools.product((True, False), ("contiguous", "channels_last")):
        values = random_values((4, 6, 5, 5), torch.float32, 0)
        values[0, 0, 0, 0] = INF
        case = case_of(LAYOUTS[layout](values, 0), training=training, nonfinite=RAISE)
        args = case.observing()
        with pytest.raises(RuntimeError, match="non-finite"):
            ops.observe_batch_norm_(*args)
        oracle.assert_same(list(args[3:5]), [case.running_mean, case.running_var])
        oracle.assert_same(list(args[12:17]), list(case.buffers()))


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("index", "value"),
    {
        "an integer tensor": (0, torch.ones(4, 6, 5, dtype=torch.int64)),
        "one dimension": (0, torch.ones(6)),
        "six dimensions": (0, torch.ones(2, 6, 1, 1, 1, 2)),
        "another number of channels": (0, torch.ones(4, 5, 5)),
        "one value per channel": (0, torch.ones(1, 6, 1)),
        "weights of another size": (1, torch.ones(5)),
        "running statistics of another size": (4, torch.ones(7)),
        "a zero point that is not whole": (15, torch.zeros(1)),
        "a range per channel": (12, torch.zeros(6)),
    }.values(),
)
def test_what_does_not_fit_is_refused_and_changes_nothing(index: int, value: Tensor) -> None:
    args: list[Any] = list(case_of(torch.randn(4, 6, 5)).observing())
    args[index] = value
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    with pytest.raises(RuntimeError):
        ops.observe_batch_norm_(*args)
    oracle.assert_same([a for a in args if isinstance(a, Tensor)], before)


def test_a_tensor_without_channels_is_not_refused() -> None:
    as_reference(case_of(torch.zeros(1, 0)))


def test_an_empty_batch_changes_no_statistic() -> None:
    case = case_of(torch.randn(0, 6, 5, 5))
    args = case.observing()
    made = ops.observe_batch_norm_(*args)
    oracle.assert_same(list(args[3:5]), [case.running_mean, case.running_var])
    oracle.assert_same(list(args[12:14]), [case.min_val, case.max_val])
    assert ops.batch_norm_fake_quantize(*case.values(*made)).shape == case.x.shape
    of_x, of_weight, of_bias = ops.batch_norm_fake_quantize_backward(*case.backward(*made))
    assert of_x.shape == case.x.shape
    assert not of_weight.any()
    assert not of_bias.any()
