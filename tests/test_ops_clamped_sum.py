"""The op for the clamped sum of two tensors, observed and fake-quantized, and the way to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import op_calls
from fastquant import _C
from fastquant._core.schemes import NonFinite
from fastquant._native import fast_calls, ops, routes
from fastquant._native.settings import FusedSettings
from op_calls import (
    IGNORE,
    INF,
    RAISE,
    assert_as_reference,
    assert_same,
    bits_of,
    fused_arguments,
    fused_by_route,
    in_memory_order,
)
from strategies import FLOATS, LAYOUTS, random_values

BOUNDS = {"none": (-INF, INF), "relu": (0.0, INF), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
}


@given(op_calls.add_observe_fake_quantize())
def test_as_reference(any_isa: list[str], call: op_calls.Call) -> None:
    name, args = call
    for isa in any_isa:
        _C.set_isa(isa)
        assert_as_reference(name, *args)


def added(a: Tensor, b: Tensor, activation: str, settings: list[Any]) -> Tensor:
    return routes.add_observe_fake_quantize(a, b, *BOUNDS[activation], FusedSettings(*settings))


def in_steps(a: Tensor, b: Tensor, activation: str, settings: list[Any]) -> Tensor:
    return fused_by_route(ACTIVATIONS[activation](torch.add(a, b)), *settings)


def pair(dtype: torch.dtype, layout: str, seed: int, numel: int = 480) -> tuple[Tensor, Tensor]:
    values = (random_values((2, 3, 8, numel // 48), dtype, seed + k, "outliers") for k in range(2))
    a, b = (LAYOUTS[layout](v, 1) for v in values)
    return a, b


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("activation", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_op_is_add_activation_and_fused_op(
    dtype: torch.dtype,
    layout: str,
    activation: str,
    quantize: bool,
    skips: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_calls, "fast_calls", skips and fast_calls.fast_calls)
    ours, theirs = (fused_arguments(quantize=quantize) for _ in range(2))
    for seed in range(2):
        a, b = pair(dtype, layout, 2 * seed)
        leaves = [a.clone().requires_grad_(), b.clone().requires_grad_(seed == 0)]
        others = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
        y, expected = added(*leaves, activation, ours), in_steps(*others, activation, theirs)
        assert_same(y.detach(), expected.detach())
        assert_same(ours, theirs)
        needing, other_needing = ([t for t in ts if t.requires_grad] for ts in (leaves, others))
        grad = torch.empty_like(y).copy_(torch.arange(y.numel()).reshape(y.shape)).cos()
        assert_same(
            torch.autograd.grad(y, needing, grad),
            torch.autograd.grad(expected, other_needing, grad),
        )
        with torch.no_grad():
            assert_same(added(a, b, activation, ours), in_steps(a, b, activation, theirs))


@pytest.mark.parametrize("activation", BOUNDS)
def test_mask_of_what_is_not_quantized_clears_what_is_clamped(activation: str) -> None:
    a, b = pair(torch.float32, "permuted", 0)
    b[:, :, ::3] = -INF
    if activation in ("none", "relu"):  # torch keeps back the gradient of a NaN in Hardtanh
        a[:, :, ::5] = math.nan
    of_tensor = FusedSettings(*fused_arguments(quantize=False)).per_tensor()
    y, mask = ops.add_observe_fake_quantize(a, b, *BOUNDS[activation], *of_tensor)
    leaf = (a + b).requires_grad_()
    ACTIVATIONS[activation](leaf).sum().backward()
    assert leaf.grad is not None
    assert bits_of(mask, y.numel()) == in_memory_order(leaf.grad).tolist()
    assert_same(y, ACTIVATIONS[activation](a + b))


def test_infinities_that_are_clamped_take_part_in_the_range() -> None:
    a = torch.tensor([1.0, -INF, INF, math.nan, -2.0])
    b = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    arguments = fused_arguments()
    added(a, b, "relu", arguments)
    low, high, count = arguments[2], arguments[3], arguments[6]
    assert (low, high, count) == (0.0, 2.0, 2), "+inf and NaN are left out, -inf is 0"
    arguments = fused_arguments()
    added(a, b, "relu6", arguments)
    assert arguments[3] == 6.0
    assert arguments[6] == 1


def test_a_sum_too_large_for_its_dtype_is_left_out() -> None:
    a = torch.tensor([60000.0, 60000.0, -1.0], dtype=torch.float16)
    b = torch.tensor([60000.0, 1.0, 0.0], dtype=torch.float16)
    arguments = fused_arguments()
    y = added(a, b, "none", arguments)
    assert arguments[3] == 60000.0
    assert arguments[6] == 1
    assert y.isfinite().all()


@pytest.mark.parametrize("skips", [True, False])
def test_what_is_refused_changes_nothing(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_calls, "fast_calls", skips and fast_calls.fast_calls)
    arguments = [*fused_arguments()[:-1], RAISE]
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    with pytest.raises((RuntimeError, ValueError), match="non-finite"):
        added(torch.tensor([1.0, INF]), torch.ones(2), "none", arguments)
    assert_same([a for a in arguments if isinstance(a, Tensor)], before)
    added(torch.tensor([1.0, -INF]), torch.ones(2), "relu", arguments)
    assert arguments[6] == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(4, 1), torch.randn(3)),
        (torch.randn(4, 3), torch.randn(4, 3, dtype=torch.float64)),
        (torch.randn(4, 3), torch.randn(3, 4).t()),
        (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        (torch.randn(0, 3), torch.randn(0, 3)),
        (torch.randn(1, 6, 4)[:, :1], torch.randn(1, 6, 4)[:, :1]),
        (torch.randn(6, 4)[:, None], torch.randn(6, 4)[:, None]),
        (
            torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
        ),
        (
            torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
        ),
        (torch.randn(()), torch.randn(())),
        (torch.randn(5, 1).expand(5, 4), torch.randn(5, 1).expand(5, 4)),
    ],
)
def test_unlike_and_odd_tensors_are_added_as_torch_does(a: Tensor, b: Tensor) -> None:
    ours, theirs = fused_arguments(), fused_arguments()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    y, expected = added(*leaves, "relu", ours), in_steps(*leaves, "relu", theirs)
    assert_same(y.detach(), expected.detach())
    assert_same(ours, theirs)
    gradients = (torch.autograd.grad(result.sum(), leaves) for result in (y, expected))
    assert_same(next(gradients), next(gradients))


def test_the_op_refuses_tensors_that_differ_and_bounds_that_cross() -> None:
    of_tensor = FusedSettings(*fused_arguments()).per_tensor()
    x = torch.randn(3, 4)
    before = [t.clone() for t in of_tensor if isinstance(t, Tensor)]
    for bad in (
        (x, x[0], 0.0, 1.0),
        (x, x.double(), 0.0, 1.0),
        (x, x, 1.0, 1.0),
        (x, x, math.nan, 1.0),
        (x.long(), x.long(), 0.0, 1.0),
    ):
        with pytest.raises(RuntimeError):
            ops.add_observe_fake_quantize(*bad, *of_tensor)
    assert_same([t for t in of_tensor if isinstance(t, Tensor)], before)


def test_gradients_of_gradients() -> None:
    a, b = (torch.randn(40, requires_grad=True) for _ in range(2))

    def second(add: Callable[..., Tensor]) -> Any:
        y = add(a, b, "relu", fused_arguments())
        first = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), (a, b))]

    ours, theirs = ([t.detach() for t in second(add)] for add in (added, in_steps))
    assert_same(ours, theirs)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_compiles_to_one_graph(needs_grad: bool) -> None:
    def step(a: Tensor, b: Tensor, settings: list[Any]) -> Tensor:
        return added(a * 2, b, "relu", settings) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = fused_arguments(), fused_arguments()
    for seed in range(2):
        a, b = (t.requires_grad_(needs_grad) for t in pair(torch.float32, "contiguous", seed))
        y, expected = compiled(a, b, ours), step(a, b, theirs)
        assert_same(y.detach(), expected.detach())
        assert_same(ours, theirs)
        if needs_grad:
            assert_same(
                torch.autograd.grad(y.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b))
            )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("policy", [IGNORE, NonFinite.PROPAGATE])
@pytest.mark.parametrize("dtype", FLOATS)
@given(st.integers(0, 3))
def test_any_number_of_threads_observes_the_same(
    dtype: torch.dtype, policy: int, seed: int
) -> None:
    a, b = pair(dtype, "contiguous", seed, 300_000)
    if seed % 2:
        a.view(-1)[seed::100_003] = math.nan
        b.view(-1)[5 * seed :: 70_001] = INF
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments = [*fused_arguments()[:-1], policy]
        outcomes.append([added(a, b, "relu", arguments), *arguments])
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])
