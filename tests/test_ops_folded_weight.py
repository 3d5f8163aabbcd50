"""Weights folded with batch norm: the ops against the reference and against single torch ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import op_calls
from fastquant import _C
from fastquant._native import ops
from fastquant._native import reference as reference_ops
from op_calls import (
    AFFINE,
    IGNORE,
    PROPAGATE,
    RAISE,
    SYMMETRIC,
    assert_same,
    counter,
    eps,
    flag,
    unobserved,
)
from strategies import FLOATS, random_values


@pytest.mark.parametrize("kind", ["observe_folded_weight_", "fold_weight"])
@given(st.data())
def test_ops_as_reference(kind: str, any_isa: list[str], data: st.DataObject) -> None:
    _C.set_isa(data.draw(st.sampled_from(any_isa)))
    name, args = data.draw(op_calls.SINGLE_CALLS[kind]())
    got = op_calls.outcome(getattr(ops, name), op_calls.own_arguments(name, args))
    expected = op_calls.outcome(reference_ops.OPS[name], op_calls.own_arguments(name, args))
    op_calls.assert_same_outcome(name, got, expected)


def arguments(
    weight: Tensor,
    axis: int | None,
    *,
    observes: bool = True,
    quantizes: bool = True,
    quant_range: tuple[int, int] = (-128, 127),
    scheme: int = SYMMETRIC,
    nonfinite: int = IGNORE,
) -> list[Any]:
    """The arguments from bn_weight on; every third bn_weight is zero, some are negative."""
    channels = weight.shape[0]
    bn_weight = op_calls.bn_weights(channels, weight.dtype, 1)
    bn_std = random_values((channels,), weight.dtype, 2, "positive")
    n = 1 if axis is None else channels
    buffers = [*unobserved(n), torch.ones(n), torch.zeros(n, dtype=torch.int32), counter(), eps()]
    flags = (flag(observes), flag(quantizes))
    return [bn_weight, bn_std, *flags, *buffers, axis, 0.01, *quant_range, scheme, 0, nonfinite]


def in_steps(weight: Tensor, args: list[Any]) -> Tensor:
    """The same with one op for each step, and with their gradients."""
    bn_weight, bn_std, *settings = args
    shape = (-1, *(1,) * (weight.dim() - 1))
    s = (bn_weight / bn_std).view(shape)
    zeros = s == 0
    s = s.masked_fill(zeros, 1.0)
    scaled = (weight * s).masked_fill(zeros, 0.0)
    ops.observe_qparams_(scaled.detach(), settings[0], *settings[2:])
    qparams = (settings[4], settings[5], settings[1], settings[8], *settings[10:12])
    quantized, _ = ops.fake_quantize_with_mask(scaled, *qparams)
    return torch.where(zeros, weight, quantized / s)


def copied(args: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


SHAPES = [(6, 5, 3, 3), (64, 16, 3, 3), (20, 1, 3, 3), (9, 100), (4, 3, 1300), (3, 2, 2, 2, 2)]
GRIDS = [(-128, 127), (0, 15), (-32767, 32767), (-(2**31), 2**31 - 1)]


@pytest.mark.parametrize("quant_range", GRIDS)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_folding_has_the_bits_of_the_single_steps(
    dtype: torch.dtype, axis: int | None, quant_range: tuple[int, int]
) -> None:
    for shape in SHAPES:
        weight = random_values(shape, dtype, 0)
        if len(shape) == 4:
            weight = weight.to(memory_format=torch.channels_last)
        args = arguments(weight, axis, quant_range=quant_range, scheme=AFFINE)
        steps = copied(args)
        folded, fold = ops.observe_folded_weight_(weight, *args)
        assert_same(folded, in_steps(weight, steps))
        assert_same(args, steps)
        assert_same(ops.fold_weight(weight, fold, *quant_range), folded)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("nonfinite", [IGNORE, RAISE, PROPAGATE])
def test_nonfinite_weights_are_dealt_with_as_in_single_steps(
    axis: int | None, nonfinite: int
) -> None:
    weight = torch.randn(6, 5, 3, 3)
    weight[0, 0] = float("inf")  # its bn_weight is zero: it takes no part
    weight[1, 1] = float("nan")
    weight[2, 2] = float("-inf")
    weight[4] = 3e38  # overflows, unless divided by more than it is multiplied by
    args = arguments(weight, axis, nonfinite=nonfinite)
    args[0][4], args[1][4] = 2.0, 0.5
    before, steps = copied(args), copied(args)
    if nonfinite == RAISE:
        with pytest.raises(RuntimeError):
            ops.observe_folded_weight_(weight, *args)
        assert_same(args, before)
        return
    folded, _ = ops.observe_folded_weight_(weight, *args)
    assert_same(folded, in_steps(weight, steps))
    assert_same(args, steps)
    assert folded[1, 1].isnan().all()
    assert args[8].item() == (0 if nonfinite == PROPAGATE else 9 + 9 + 45)


@pytest.mark.parametrize(("observes", "quantizes"), [(False, True), (True, False), (False, False)])
def test_what_is_off_is_left_out(observes: bool, quantizes: bool) -> None:
    weight = torch.randn(6, 5, 3, 3)
    args = arguments(weight, 0, observes=observes, quantizes=quantizes)
    args[6].fill_(0.001)  # most products are out of range
    before = copied(args)
    folded, fold = ops.observe_folded_weight_(weight, *args)
    assert torch.equal(folded, weight) == (not quantizes)
    assert torch.equal(args[4], before[4]) == (not observes)
    grad = torch.randn_like(weight)
    of_weight, of_bn_weight = ops.fold_weight_backward(grad, weight, fold, -128, 127)
    assert torch.equal(of_weight, grad) == (not quantizes)
    assert of_bn_weight.any() == quantizes


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_single_steps(shape: tuple[int, ...], axis: int | None) -> None:
    weight = random_values(shape, torch.float64, 0, "outliers").requires_grad_()
    args = arguments(weight, axis)
    args[2].zero_()
    args[6].fill_(0.01)  # so that some products are out of range
    args[0].requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(in_steps(weight, args), (weight, args[0]), grad)
    with torch.no_grad():
        _, fold = ops.observe_folded_weight_(weight, *args)
        got = ops.fold_weight_backward(grad, weight, fold, -128, 127)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert (expected[0] == 0).any()
    assert (got[1] == 0).eq(args[0] == 0).all()


def test_a_sum_over_many_weights_is_as_exact_as_in_double() -> None:
    weight = torch.randn(2, 300, 11, 11)
    args = arguments(weight, 0)
    args[0].fill_(0.7)
    _, fold = ops.observe_folded_weight_(weight, *args)
    grad = torch.randn_like(weight)
    _, got = ops.fold_weight_backward(grad, weight, fold, -128, 127)
    _, exact = ops.fold_weight_backward(grad.double(), weight.double(), fold.double(), -128, 127)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, torch.ones(5)),
        (1, torch.ones(6, dtype=torch.float64)),
        (4, torch.zeros(5)),
        (7, torch.zeros(6)),
        (10, 1),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(index: int, value: Any) -> None:
    weight = torch.randn(6, 5, 3, 3)
    args = arguments(weight, 0)
    args[index] = value
    before = copied(args)
    for op in (ops.observe_folded_weight_, reference_ops.OPS["observe_folded_weight_"]):
        with pytest.raises(RuntimeError):
            op(weight, *args)
        assert_same(args, before)
