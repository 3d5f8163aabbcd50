"""The ops that quantize: fake-quantize, fused with observing, learnable, and of weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import op_calls
from fastquant import _C
from fastquant._native import ops, routes
from fastquant._native import reference as reference_ops
from op_calls import (
    AFFINE,
    FLOAT_QPARAMS,
    IGNORE,
    INF,
    PROPAGATE,
    SYMMETRIC,
    assert_as_reference,
    assert_same,
    averaging,
    bits_of,
    called,
    counter,
    eps,
    flag,
    fused_arguments,
    fused_by_route,
    in_memory_order,
    policies,
    unobserved,
)
from strategies import (
    FLOATS,
    LAYOUTS,
    qparams,
    quant_ranges,
    random_values,
    streams,
    tensors,
    with_axis,
)

float32 = st.just(torch.float32)


@given(st.data(), quant_ranges(), st.sampled_from([None, False, True]))
def test_fake_quantize_as_reference(
    data: st.DataObject, quant_range: tuple[int, int], on: bool | None
) -> None:
    x, axis, channels = data.draw(with_axis(tensors(nonfinite=True)))
    scale, zero_point = data.draw(qparams(channels, *quant_range))
    enabled = None if on is None else flag(on)
    args = (x, scale, zero_point, enabled, axis, *quant_range)
    assert_as_reference("fake_quantize", *args)
    assert_as_reference("fake_quantize_with_mask", *args)
    y, mask = ops.fake_quantize_with_mask(*args)
    assert y.stride() == torch.empty_like(x).stride()
    assert_as_reference("fake_quantize_backward", torch.randn_like(y), mask)


def torch_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int
) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis % x.dim(), low, high)


@given(
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    quant_ranges(),
)
def test_fake_quantize_as_torch(
    data: st.DataObject, dtype: torch.dtype, quant_range: tuple[int, int]
) -> None:
    x, axis, channels = data.draw(with_axis(tensors(st.just(dtype))))
    scale, zero_point = data.draw(qparams(channels, *quant_range, (torch.int32,)))
    # Beyond int64's range torch's conversion is undefined, see below.
    bound = min(2.0**60 * min(scale.tolist(), default=1.0), torch.finfo(dtype).max)
    x = x.clamp(-bound, bound).requires_grad_()
    expected = torch_fake_quantize(x, scale, zero_point, axis, *quant_range)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)

    for y in (
        routes.fake_quantize(x, scale, zero_point, None, axis, *quant_range),
        ops.fake_quantize_with_mask(x, scale, zero_point, None, axis, *quant_range)[0],
    ):
        assert_same(y.detach(), expected.detach())
        (got,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(got, expected_grad, rtol=0, atol=0)
    with torch.no_grad():
        assert_same(
            routes.fake_quantize(x, scale, zero_point, None, axis, *quant_range), expected.detach()
        )


def test_float_zero_points_as_torch() -> None:
    # torch's own build may fuse x / scale + zero_point into one rounding, which tips the very
    # few elements that lie within rounding of a tie.
    x = random_values((64, 1000), torch.float32, 0) * 3
    scale, zero_point = torch.rand(64) * 0.1 + 0.01, torch.rand(64) * 200
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 255)
    y = ops.fake_quantize(x, scale, zero_point, None, 0, 0, 255)
    assert (y != expected).float().mean() < 1e-4
    assert ((y - expected).abs() <= scale[:, None] * 1.0001).all()


def test_fp64_keeps_its_precision() -> None:
    x = random_values((1000,), torch.float64, 0)
    scale, zero_point = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([3])
    y = ops.fake_quantize(x, scale, zero_point, None, None, -128, 127)
    exact = ((x * (1 / scale)).round() + 3).clamp(-128, 127) - 3
    assert_same(y, exact * scale)
    # torch gives a result of fp32 precision.
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -128, 127)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zero_point_dtype", [torch.int32, torch.int64, torch.float32])
def test_values_beyond_the_range_saturate(
    dtype: torch.dtype, zero_point_dtype: torch.dtype
) -> None:
    # torch.fake_quantize sends +inf, and what overflows int64, to the lower end.
    x = torch.tensor([INF, 6e4, 1.0, 0.0, -6e4, -INF], dtype=dtype)
    scale, zero_point = torch.tensor([2.0**-60]), torch.tensor([3], dtype=zero_point_dtype)
    y, mask = ops.fake_quantize_with_mask(x, scale, zero_point, None, None, -8, 7)
    steps = y.double() / 2.0**-60 + 3
    if dtype == torch.float16:  # which cannot hold the steps themselves
        assert (y == 0).all()
    else:
        assert steps.tolist() == [7, 7, 7, 3, -8, -8]
    assert bits_of(mask, 6) == [0, 0, 0, 1, 0, 0]


# Per tensor, in long rows, in rows shorter than a vector, and a tensor shorter than one.
NAN_CASES = [((300,), None), ((3, 200), 0), ((40, 7), 1), ((3,), None)]


@pytest.mark.parametrize("zero_point_dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(("shape", "axis"), NAN_CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays_nan_and_its_gradient_passes(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    axis: int | None,
    zero_point_dtype: torch.dtype,
    any_isa: list[str],
) -> None:
    x = random_values(shape, dtype, 0)
    x.view(-1)[::3] = math.nan
    x.view(-1)[1::7] = INF
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = (
        torch.full((channels,), 0.125),
        torch.zeros(channels, dtype=zero_point_dtype),
    )
    for isa in any_isa:
        _C.set_isa(isa)
        for y in (
            ops.fake_quantize(x, scale, zero_point, None, axis, -50, 50),
            ops.learnable_fake_quantize(x, scale, zero_point.float(), axis, -50, 50, 1.0),
        ):
            assert_same(y.isnan(), x.isnan())
            assert_same(y[x == INF], torch.full_like(y[x == INF], 6.25))
        leaf = x.clone().requires_grad_()
        y = routes.fake_quantize(leaf, scale, zero_point, None, axis, -50, 50)
        grad = torch.full_like(x, 2.0)
        grad.view(-1)[::5] = math.nan
        y.backward(grad)
        # Masking is a product: a NaN from above is never lost.
        expected = torch.where(x.isfinite() & (x.abs() < 6.3) | x.isnan() | grad.isnan(), grad, 0.0)
        assert_same(leaf.grad, expected)


@pytest.mark.parametrize(("shape", "axis"), NAN_CASES)
def test_fused_ops_keep_nan_and_leave_it_out_of_the_range(
    shape: tuple[int, ...], axis: int | None, any_isa: list[str]
) -> None:
    x = random_values(shape, torch.float32, 0)
    x.view(-1)[::3] = math.nan
    for isa in any_isa:
        _C.set_isa(isa)
        channels = 1 if axis is None else x.shape[axis]
        low, high = unobserved(channels)
        scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
        state, count = (low, high, scale, zero_point), counter()
        y, mask = ops.fused_observe_fake_quantize_with_mask(
            *(x, flag(True), flag(True), *state, count, eps()),
            *(axis, None, 0, 255, AFFINE, 0, IGNORE),
        )
        assert_same(y.isnan(), x.isnan())
        assert all(bits_of(mask, x.numel()))
        assert count == x.isnan().sum()
        assert all(t.isfinite().all() for t in state)


@pytest.mark.parametrize("axis", [None, 0])
def test_nan_makes_the_gradient_of_its_learnable_scale_nan(
    axis: int | None, any_isa: list[str]
) -> None:
    x = random_values((3, 40), torch.float32, 0)
    x[1, 7] = math.nan
    channels = 1 if axis is None else 3
    scale, zero_point = torch.full((channels,), 0.1), torch.zeros(channels)
    for isa in any_isa:
        _C.set_isa(isa)
        dx, dscale, dzero_point = ops.learnable_fake_quantize_backward(
            torch.ones_like(x), x, scale, zero_point, axis, -50, 50, 1.0
        )
        assert dx[1, 7] == 1
        assert dscale.isnan().tolist() == ([True] if axis is None else [False, True, False])
        assert dzero_point.isfinite().all()


@pytest.mark.parametrize("quant_range", [(-(2**31), 2**31 - 1), (-(2**23), 2**23 - 1)])
def test_wide_quantized_ranges_as_torch(quant_range: tuple[int, int]) -> None:
    x = random_values((1000,), torch.float32, 0) * 1e3
    for scale, zero_point in [(1e-6, 0), (1e-3, 7), (0.37, -100000)]:
        s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
        expected = torch.fake_quantize_per_tensor_affine(x, s, z, *quant_range)
        assert_same(ops.fake_quantize(x, s, z, None, None, *quant_range), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_mask_lies_as_the_result_does(layout: str, axis: int | None) -> None:
    x = LAYOUTS[layout](random_values((3, 5, 7, 2), torch.float32, 0), 1)
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.full((channels,), 0.01), torch.zeros(channels, dtype=torch.int32)
    y, mask = ops.fake_quantize_with_mask(x, scale, zero_point, None, axis, -50, 50)
    assert mask.dtype == torch.uint8
    assert mask.numel() == 8 * math.ceil(x.numel() / 64)
    inside = torch.empty_like(y, dtype=torch.bool).copy_(x.abs() / 0.01 < 50.4)
    assert bits_of(mask, x.numel()) == in_memory_order(inside).int().tolist()
    assert 0 < sum(bits_of(mask, x.numel())) < x.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout: str) -> None:
    x = random_values((2, 3, 4, 5), torch.float32, 0).contiguous(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    grad = LAYOUTS[layout](random_values((2, 3, 4, 5), torch.float32, 1), 2)
    results = []
    for fake_quantize in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -99, 99),
        lambda x: routes.fake_quantize(x, scale, zero_point, None, None, -99, 99),
    ):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(fake_quantize(leaf), leaf, grad)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradients_of_gradients() -> None:
    x = random_values((50,), torch.float32, 0)
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    results = []
    for fake_quantize in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -99, 99),
        lambda x: routes.fake_quantize(x, scale, zero_point, None, None, -99, 99),
    ):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(fake_quantize(leaf**2).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((first**3).sum(), leaf)[0])
    assert_same(results[1], results[0])
    assert results[0].abs().sum() > 0


def test_a_flag_that_is_off_gives_x_back() -> None:
    x = random_values((7,), torch.float32, 0)
    scale, zero_point = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
    for dtype in (torch.uint8, torch.int64, torch.int32, torch.bool):
        off, on = flag(False, dtype), flag(True, dtype)
        assert routes.fake_quantize(x, scale, zero_point, off, None, -8, 7) is x
        assert routes.fake_quantize(x, scale, zero_point, on, None, -8, 7) is not x
        y = ops.fake_quantize(x, scale, zero_point, off, None, -8, 7)
        assert_same(y, x)
        assert y.data_ptr() != x.data_ptr()


@given(
    st.data(),
    streams(nonfinite=True),
    averaging,
    quant_ranges(),
    st.sampled_from([AFFINE, SYMMETRIC, FLOAT_QPARAMS]),
    policies,
    st.booleans(),
    st.booleans(),
)
def test_fused_as_reference(
    data: st.DataObject,
    stream: list[Tensor],
    constant: float | None,
    quant_range: tuple[int, int],
    scheme: int,
    policy: int,
    observe: bool,
    quantize: bool,
) -> None:
    _, axis, channels = data.draw(with_axis(st.just(stream[0])))
    if 0 in stream[0].shape:
        axis, channels = None, 1
    zero_point_dtype = torch.float32 if scheme == FLOAT_QPARAMS else torch.int32
    state = [
        *unobserved(channels),
        torch.ones(channels),
        torch.zeros(channels, dtype=zero_point_dtype),
        counter(),
    ]
    settings = (eps(), axis, constant, *quant_range, scheme, 1, policy)
    if policy == PROPAGATE:  # what follows from an infinite range is nobody's concern
        stream = [x.nan_to_num(0.0, 1.0, -1.0) for x in stream]
    for x in stream:
        args = (x, flag(observe), flag(quantize), *state, *settings)
        assert_as_reference("fused_observe_fake_quantize", *args)
        assert_as_reference("fused_observe_fake_quantize_with_mask", *args)
        assert_as_reference("observe_qparams_", x, flag(observe), *state, *settings)
        _, (_, _, _, *state), _ = called(ops.fused_observe_fake_quantize, args)
        state = state[:5]


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_fused_is_its_three_steps(channels: int | None, quantize: bool, needs_grad: bool) -> None:
    args = fused_arguments(channels, quantize=quantize)
    low, high = unobserved(channels)
    axis = args[8]
    for seed in range(3):
        x = random_values((3, 50), torch.float32, seed).requires_grad_(needs_grad)
        y = fused_by_route(x, *args)
        ops.observe_minmax_(x.detach(), low, high, counter(), axis, 0.1, IGNORE)
        scale, zero_point = ops.choose_qparams(low, high, eps(), -128, 127, AFFINE, 0)
        assert_same(args[2:6], [low, high, scale, zero_point])
        if not quantize:
            assert y is x
            continue
        expected = ops.fake_quantize(x.detach(), scale, zero_point, None, axis, -128, 127)
        assert_same(y.detach(), expected)
        assert y.requires_grad == needs_grad
        if needs_grad:
            grad = torch.randn_like(y)
            (got,) = torch.autograd.grad(y, x, grad)
            steps = routes.fake_quantize(x, scale, zero_point, None, axis, -128, 127)
            assert_same(got, torch.autograd.grad(steps, x, grad)[0])


def test_fused_without_observing_leaves_every_buffer() -> None:
    args = fused_arguments(observe=False)
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    for x in (torch.randn(9), torch.full((3,), math.nan), torch.randn(9, requires_grad=True)):
        fused_by_route(x, *args)
    assert_same([a for a in args if isinstance(a, Tensor)], before)


@given(st.data(), quant_ranges().filter(lambda r: r[1] < 2**14))
def test_learnable_as_reference(data: st.DataObject, quant_range: tuple[int, int]) -> None:
    x, axis, channels = data.draw(with_axis(tensors()))
    scale, zero_point = data.draw(qparams(channels, *quant_range, (torch.float32,)))
    settings = (axis, *quant_range, 0.25)
    assert_as_reference("learnable_fake_quantize", x, scale, zero_point, *settings)
    grad = torch.randn_like(x)
    args = (grad, x, scale, zero_point, *settings)
    got = ops.learnable_fake_quantize_backward(*args)
    expected = reference_ops.learnable_fake_quantize_backward(*args)
    assert_same(got[0], expected[0])
    for ours, theirs, bound in zip(got[1:], expected[1:], sum_bounds(*args), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ((ours - theirs).abs() <= 1e-5 * bound).all()


def sum_bounds(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """Sums of the sizes of what the gradients of scale and zero point are sums of."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    s, z = (t.double().reshape(shape) for t in (scale, zero_point))
    low, high, factor = settings
    steps = (x.double() / s).abs().clamp(max=2.0 * (high - low)) + z.abs() + high - low
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    sums = []
    for size in (steps, s.expand(x.shape)):
        terms = grad.double().abs() * size * factor + 1e-30
        sums.append((terms.sum(dims) if dims else terms).reshape(-1))
    return sums[0], sums[1]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("quant_range", [(-128, 127), (0, 255), (0, 15)])
def test_learnable_as_torch(axis: int | None, quant_range: tuple[int, int]) -> None:
    # Where torch's backward pass agrees with its own forward pass: no negative zero point per
    # tensor (it takes the next integer), and nothing near a tie (it rounds the sum there).
    low, high = quant_range
    channels = {None: 1, 0: 4, 1: 500}[axis]
    scale = torch.rand(channels) * 0.05 + 0.02
    zero_point = torch.randint(0 if axis is None else low, high + 1, (channels,)).float()
    steps = torch.randint(2 * low - 50, 2 * high + 50, (4, 500)) + 0.8 * (torch.rand(4, 500) - 0.5)
    x = steps * scale.reshape((-1, 1) if axis == 0 else (1, -1))
    grad = random_values(x.shape, torch.float32, 1)
    if axis is None:
        theirs, where = torch._fake_quantize_learnable_per_tensor_affine, ()
    else:
        theirs, where = torch._fake_quantize_learnable_per_channel_affine, (axis,)
    results = []
    for op, axes in (
        (theirs, where),
        (ops.learnable_fake_quantize, (axis,)),
        (routes.learnable_fake_quantize, (axis,)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        y = op(*leaves, *axes, low, high, 0.3)
        results.append((y.detach(), torch.autograd.grad(y, leaves, grad)))
    expected, expected_grads = results[0]
    for y, grads in results[1:]:
        assert_same(y, expected)
        assert_same(grads[0], expected_grads[0])
        torch.testing.assert_close(grads[1:], expected_grads[1:], rtol=1e-4, atol=1e-3)


def test_learnable_gradient_belongs_to_the_forward_pass() -> None:
    # torch rounds a fractional zero point in one way forward and in another backward.
    scale, zero_point = torch.tensor([0.5]), torch.tensor([-3.7])
    x = torch.linspace(-4, 4, 33)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    y = routes.learnable_fake_quantize(*leaves, None, -8, 7, 1.0)
    dx, dscale, dzero_point = torch.autograd.grad(y.sum(), leaves)
    quantized = (x / 0.5).round() - 4
    inside = (quantized >= -8) & (quantized <= 7)
    assert_same(dx, inside.float())
    error = torch.where(inside, (y.detach() - x) / 0.5, (y.detach() / 0.5))
    torch.testing.assert_close(dscale, error.sum().reshape(1))
    torch.testing.assert_close(dzero_point, -0.5 * (~inside).sum().reshape(1))


def test_learnable_has_no_second_derivative() -> None:
    leaves = [torch.randn(9), torch.tensor([0.1]), torch.tensor([0.0])]
    leaves = [t.requires_grad_() for t in leaves]
    y = routes.learnable_fake_quantize(*leaves, None, -8, 7, 1.0)
    (first,) = torch.autograd.grad((y**2).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("axis", [None, 1])
def test_learnable_of_an_empty_tensor_has_zero_gradients(axis: int | None) -> None:
    channels = 1 if axis is None else 3
    leaves = [
        torch.empty(0, 3).requires_grad_(),
        torch.full((channels,), 0.5).requires_grad_(),
        torch.full((channels,), 1.0).requires_grad_(),
    ]
    y = ops.learnable_fake_quantize(*leaves, axis, 0, 15, 1.0)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all((g == 0).all() for g in grads)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]


@given(op_calls.quantize_per_channel())
def test_weights_as_reference(call: op_calls.Call) -> None:
    name, args = call
    assert_as_reference(name, *args)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_weights_as_torch_where_they_are_not_finite(any_isa: list[str]) -> None:
    x = random_values((6, 50), torch.float32, 0, "outliers")
    x[:, ::9], x[:, 1::9], x[:, 2::9], x[:, 3::9] = math.nan, INF, -INF, 3e38
    scale = torch.linspace(0.01, 1.0, 6)
    expected = torch.quantize_per_channel(
        x, scale, torch.zeros(6, dtype=torch.int64), 0, torch.qint8
    )
    for isa in any_isa:
        _C.set_isa(isa)
        got = ops.quantize_per_channel(x, scale, 0, -128, 127)
        assert_same(got, expected.int_repr())


@pytest.mark.parametrize(
    ("x", "scale", "settings"),
    [
        (torch.randn(3, 4).double(), torch.ones(3), (0, -128, 127)),
        (torch.randn(3, 4), torch.ones(2), (0, -128, 127)),
        (torch.randn(3, 4), torch.ones(3), (2, -128, 127)),
        (torch.randn(3, 4), torch.ones(3), (0, 0, 255)),
        (torch.randn(3, 4), torch.ones(3), (0, 7, -8)),
    ],
    ids=["fp64", "another number of channels", "no such axis", "not int8", "no range"],
)
def test_weights_that_do_not_fit_are_refused(x: Tensor, scale: Tensor, settings: Any) -> None:
    with pytest.raises(RuntimeError):
        ops.quantize_per_channel(x, scale, *settings)
