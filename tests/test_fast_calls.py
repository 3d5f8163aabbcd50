"""Calls round the dispatcher: the results of the ops, and nothing that intercepts ops missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batch_norm_calls
import op_calls
from fastquant._native import fast_calls, folded_weight, ops, routes
from fastquant._native.settings import FusedSettings
from op_calls import (
    IGNORE,
    assert_same,
    called,
    counter,
    eps,
    fused_arguments,
    fused_by_route,
    unobserved,
)
from strategies import (
    random_values,
)

float32 = st.just(torch.float32)

NO_GRADIENT = torch.zeros(0)


def with_gradient(function: Callable[..., Tensor], x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The result, and what it makes of a gradient."""
    leaf = x.detach().clone() if x.is_contiguous() else x.detach()
    y = function(leaf.requires_grad_(), *args)
    (gradient,) = torch.autograd.grad(y, leaf, torch.cos(y.detach() * 3))
    return y.detach(), gradient


def without_gradient(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    return function(*args), NO_GRADIENT


def folded_weight_of(weight: Tensor, bn_weight: Tensor, bn_var: Tensor, *settings: Any) -> Tensor:
    folded = folded_weight.fold_weight(weight, bn_weight, bn_var, 0.0, FusedSettings(*settings))
    return folded_weight.with_gradients(weight, bn_weight, folded)


ROUND_AND_THROUGH: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "fused": (fused_by_route, op_calls.fused),
    "fake_quantize": (
        routes.fake_quantize,
        op_calls.fake_quantize,
    ),
    "folded weight": (folded_weight_of, op_calls.observe_folded_weight_),
}


@pytest.mark.parametrize("kind", ROUND_AND_THROUGH)
@pytest.mark.parametrize("run", [with_gradient, without_gradient])
@given(st.data())
def test_round_the_dispatcher_or_through_it_is_the_same(
    kind: str, run: Callable[..., Any], data: st.DataObject
) -> None:
    function, calls = ROUND_AND_THROUGH[kind]
    _, args = data.draw(calls())
    outcomes = []
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_calls, "fast_calls", fast and fast_calls.fast_calls)
            outcomes.append(called(lambda *own: run(function, *own), args))
    assert_same(outcomes[0], outcomes[1])


@given(op_calls.search_histogram_range(), op_calls.schemes())
def test_histogram_qparams_are_those_of_the_range_found(
    call: Any, config: tuple[int, int, int, int]
) -> None:
    _, (histogram, low, high, levels) = call
    smallest = eps(low.dtype)
    found = ops.search_histogram_range(histogram, low, high, levels)
    expected = ops.choose_qparams(*found, smallest, *config)
    got = routes.histogram_qparams(histogram, low, high, smallest, levels, *config)
    assert_same(got, expected)


def test_a_counter_that_nothing_can_be_kept_in_is_refused_and_changes_nothing() -> None:
    x = torch.tensor([1.0, math.nan])
    for dtype in (torch.int16, torch.uint8, torch.bool):
        args = fused_arguments()
        args[6] = counter().to(dtype)
        low, high, *_ = args[2:]
        for call in (
            lambda args=args: fused_by_route(x, *args),
            lambda args=args: routes.observe_minmax_(
                x, args[2], args[3], args[6], None, 0.1, IGNORE
            ),
        ):
            with pytest.raises(RuntimeError):
                call()
            assert_same([low, high], unobserved())


@pytest.mark.parametrize("run", [with_gradient, without_gradient])
def test_qparams_that_lie_in_memory_as_their_negatives(run: Callable[..., Any]) -> None:
    x, zero_point = random_values((9,), torch.float32, 0), torch.tensor([3], dtype=torch.int32)
    scale = torch.tensor([0.1])
    negated = torch._neg_view(-scale)
    assert negated.is_neg()
    results = [
        run(lambda x, s: routes.fake_quantize(x, s, zero_point, None, None, -9, 9), x, s)
        for s in (scale, negated)
    ]
    assert_same(*results)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_default_device_elsewhere_changes_nothing(needs_grad: bool) -> None:
    args, expected_args = fused_arguments(3), fused_arguments(3)
    x = random_values((3, 70), torch.float32, 0).requires_grad_(needs_grad)
    run = with_gradient if needs_grad else without_gradient
    expected = run(fused_by_route, x, *expected_args)
    with torch.device("meta"):
        y, gradient = run(fused_by_route, x, *args)
    assert_same((y, gradient, args), (*expected, expected_args))


@pytest.mark.parametrize("run", [with_gradient, without_gradient])
@given(batch_norm_calls.cases())
def test_batch_norm_round_the_dispatcher_or_through_it_is_the_same(
    run: Callable[..., Any], case: batch_norm_calls.Case
) -> None:
    def by_route(x: Tensor, *args: Any) -> Tensor:
        batch_norm, buffers, config = args[:9], args[9:17], args[17:]
        settings = FusedSettings(*buffers, None, *config)
        return routes.batch_norm_observe_fake_quantize(x, *batch_norm, settings)

    outcomes = []
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_calls, "fast_calls", fast and fast_calls.fast_calls)
            outcomes.append(called(partial(run, by_route), case.observing()))
    (got, arguments, raised), (expected, expected_arguments, expected_raised) = outcomes
    assert raised == expected_raised
    assert_same(arguments, expected_arguments)
    if not raised:
        assert_same(got, expected)
