"""The gradients of the ops, each stated once, for eager mode, torch.func and compilers.

Compilers trace the gradient that is registered with an op. Eager calls do not take that one, since
the way to it through the dispatcher costs several times what an autograd.Function does; and
torch.func transforms only a Function whose context is set up apart from its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import ops
from .fast_calls import may_skip_dispatcher


def _with_gradients(
    op: ops.Op, save: Callable[..., None], gradients: Callable[..., Any], name: str = ""
) -> ops.Op:
    """`op` as a function with gradients; those are registered with the op `name`, too, if given."""

    class WithGradients(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(save)
        backward = staticmethod(gradients)

    if name:
        torch.library.register_autograd(f"fastquant::{name}", gradients, setup_context=save)
    function: ops.Op = WithGradients.apply
    return function


# ----------------------------------------------------------------- straight-through estimate


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    ctx.save_for_backward(mask)
    ctx.stride = y.stride()


def _straight_through(ctx: Any, grad: Tensor) -> Tensor:
    """The straight-through estimate, https://arxiv.org/abs/1308.3432."""
    (mask,) = ctx.saved_tensors
    gradient = _differentiable_mask if grad.requires_grad and torch.is_grad_enabled() else _masked
    result: Tensor = gradient(grad, mask, ctx.stride)
    return result


def _masked(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
    # The mask has its bits in the order of the output's memory.
    if grad.stride() != stride:
        grad = grad.new_empty_strided(grad.size(), stride).copy_(grad)
    if may_skip_dispatcher(grad):
        gradient = torch.empty_like(grad)
        if _C.fake_quantize_backward(grad, mask, gradient):
            return gradient
    result: Tensor = ops.fake_quantize_backward(grad, mask)
    return result


def _save_mask_of_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.stride = inputs
    ctx.save_for_backward(mask)


# The gradient as a function of the incoming one, for gradients of gradients.
_differentiable_mask = _with_gradients(
    _masked, _save_mask_of_gradient, lambda ctx, grad: (_straight_through(ctx, grad), None, None)
)


class _StraightThrough(torch.autograd.Function):
    """Gives a result that was made of x, with its mask, the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        _save_mask(ctx, (x, made), made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _straight_through(ctx, grad), None


with_straight_through: ops.Op = _StraightThrough.apply


def _gradients_of_fake_quantize(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _straight_through(ctx, grad), *(None,) * 6


fake_quantize_with_mask = _with_gradients(
    ops.fake_quantize_with_mask,
    _save_mask,
    _gradients_of_fake_quantize,
    "fake_quantize_with_mask",
)


# ------------------------------------------------------------------ learned scale, zero point


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.settings = inputs
    ctx.save_for_backward(x, scale, zero_point)


@torch.autograd.function.once_differentiable
def _gradients_of_learnable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    gradients = ops.learnable_fake_quantize_backward(grad, x, scale, zero_point, *ctx.settings)
    return *gradients, *(None,) * 4


learnable_fake_quantize = _with_gradients(
    ops.learnable_fake_quantize,
    _save_inputs,
    _gradients_of_learnable,
    "learnable_fake_quantize",
)
