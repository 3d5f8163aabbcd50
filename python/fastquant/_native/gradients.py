"""The gradients of the ops, for eager, torch.func and compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._torch.private import below_autograd
from .fast_calls import goes_fast
from .ops import (
    Op,
    fake_quantize_backward,
    fake_quantize_with_mask,
    learnable_fake_quantize,
    learnable_fake_quantize_backward,
)

# Each gradient is here twice. Registered with the op, compilers can trace it; but that way
# through the dispatcher costs an eager call several times what a Function of one's own does.


class _MaskGradient(torch.autograd.Function):
    """The straight-through gradient as a function of the gradient, for gradients of gradients."""

    @staticmethod
    def forward(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
        return _masked(grad, mask, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.stride = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _straight_through(ctx, grad), None, None


_mask_gradient: Op = _MaskGradient.apply


def _masked(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
    if goes_fast():
        gradient = _C.mask_gradient(grad, mask, stride)
        if gradient is not None:
            return gradient
    # The mask has its bits in the order of the output's memory.
    if grad.stride() != stride:
        grad = grad.new_empty_strided(grad.size(), stride).copy_(grad)
    result: Tensor = fake_quantize_backward(grad, mask)
    return result


def _straight_through(ctx: Any, grad: Tensor) -> Tensor:
    """The straight-through estimate, https://arxiv.org/abs/1308.3432."""
    (mask,) = ctx.saved_tensors
    gradient = _mask_gradient if grad.requires_grad and torch.is_grad_enabled() else _masked
    result: Tensor = gradient(grad, mask, ctx.stride)
    return result


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    ctx.save_for_backward(mask)
    ctx.stride = y.stride()


def _fake_quantize_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _straight_through(ctx, grad), *(None,) * 6


def _save_learnable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.settings = inputs
    ctx.save_for_backward(x, scale, zero_point)


@torch.autograd.function.once_differentiable
def _learnable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    gradients = learnable_fake_quantize_backward(grad, x, scale, zero_point, *ctx.settings)
    return *gradients, *(None,) * 4


torch.library.register_autograd(
    "fastquant::fake_quantize_with_mask", _fake_quantize_gradients, setup_context=_save_mask
)
torch.library.register_autograd(
    "fastquant::learnable_fake_quantize", _learnable_gradients, setup_context=_save_learnable
)


class _StraightThrough(torch.autograd.Function):
    """Gives a result that was made of x, with a mask, the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        _save_mask(ctx, (x, made), made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _straight_through(ctx, grad), None


class _Learnable(torch.autograd.Function):
    """The op `learnable_fake_quantize` with the gradients of x, scale and zero point."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with below_autograd():
            y: Tensor = learnable_fake_quantize(*inputs)
        _save_learnable(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _learnable_gradients(ctx, *grads)
        return gradients


class _TransformableFakeQuantize(torch.autograd.Function):
    """The op `fake_quantize_with_mask` as torch.func transforms it; dearer."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = fake_quantize_with_mask(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save_mask(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _fake_quantize_gradients(ctx, *grads)


class _TransformableLearnable(torch.autograd.Function):
    """The op `learnable_fake_quantize` likewise."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        y: Tensor = learnable_fake_quantize(*inputs)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_learnable(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _learnable_gradients(ctx, *grads)
        return gradients


transformable_fake_quantize: Op = _TransformableFakeQuantize.apply
transformable_learnable: Op = _TransformableLearnable.apply
with_straight_through: Op = _StraightThrough.apply
learnable_with_gradients: Op = _Learnable.apply
