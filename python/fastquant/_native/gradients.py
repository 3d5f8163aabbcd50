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
from .fast_calls import is_grad_enabled, may_skip_dispatcher
from .ownership import is_sole_owner, learn_counts
from .reference import batch_norm
from .reference.convolution import convolution_backward as differentiable_backward

_empty_like = torch.empty_like
# Elements of a gradient from which on its memory is worth being used again.
_LARGE = 32768
# Returns a result that was made already, with a gradient.
_Attach = Callable[..., Tensor]


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


def _without_transforms(function: type[torch.autograd.Function]) -> _Attach:
    """`function.apply` for tensors that torch.func has not wrapped, without looking for wrappers.

    The look takes as long as half of the rest.
    """
    plain: _Attach = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return plain


# ----------------------------------------------------------------- straight-through estimate


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    ctx.save_for_backward(mask)
    ctx.stride = y.stride()


def _straight_through(ctx: Any, grad: Tensor, reuse: bool = False) -> Tensor:
    """The straight-through estimate, https://arxiv.org/abs/1308.3432.

    With `reuse`, grad may become the result.
    """
    (mask,) = ctx.saved_tensors
    if grad.requires_grad and is_grad_enabled():
        result: Tensor = _differentiable_mask(grad, mask, ctx.stride)
        return result
    return _masked(grad, mask, ctx.stride, reuse)


def _masked(grad: Tensor, mask: Tensor, stride: tuple[int, ...], reuse: bool = False) -> Tensor:
    # The mask has its bits in the order of the output's memory.
    if grad.stride() != stride:
        if grad.is_sparse:  # of an embedding's weight: it stays sparse, as torch.ao's does
            ones = torch.empty_strided(grad.size(), stride, dtype=grad.dtype, device=grad.device)
            return grad * ops.fake_quantize_backward(ones.fill_(1.0), mask)  # type: ignore[no-any-return]
        grad = grad.new_empty_strided(grad.size(), stride).copy_(grad)
    if may_skip_dispatcher(grad):
        gradient = grad if reuse else _empty_like(grad)
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
        learn_counts()
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Of a small gradient the question takes longer than an allocation.
        reuse = grad.numel() >= _LARGE and is_sole_owner(grad)
        return _straight_through(ctx, grad, reuse), None


with_straight_through: _Attach = _StraightThrough.apply
with_straight_through_plain = _without_transforms(_StraightThrough)


class _StraightThroughSum(torch.autograd.Function):
    """Gives a result that was made of the sum of a and b, with its mask, the gradients of both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        _save_mask(ctx, (a, b, made), made)
        learn_counts()
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        reuse = is_sole_owner(grad)
        gradient = _straight_through(ctx, grad, reuse)
        return gradient, gradient, None


with_straight_through_sum: _Attach = _StraightThroughSum.apply
with_straight_through_sum_plain = _without_transforms(_StraightThroughSum)


def _gradients_of_fake_quantize(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _straight_through(ctx, grad), *(None,) * 6


fake_quantize_with_mask = _with_gradients(
    ops.fake_quantize_with_mask,
    _save_mask,
    _gradients_of_fake_quantize,
    "fake_quantize_with_mask",
)


# ------------------------------------------------------------ batch norm and fake-quantize


def _save_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, norm, quantizer, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, norm, quantizer)
    ctx.bias_dtype = bias.dtype


def _gradients_of_x_weight_bias(
    ctx: Any, grad: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """With `reuse`, grad may become the gradient of x."""
    x, weight, norm, quantizer = ctx.saved_tensors
    if is_grad_enabled() and any(t.requires_grad for t in (grad, x, weight)):
        training, *clamping = ctx.settings
        with torch.no_grad():
            _, passes = batch_norm.quantized(x, norm, quantizer, *clamping)
        made = batch_norm.differentiable_gradients(grad, passes, x, weight, norm, training)
    else:
        args = (grad, x, norm, quantizer, *ctx.settings)
        if may_skip_dispatcher(grad, x):
            of_bias = weight.new_empty(weight.size(), dtype=ctx.bias_dtype)
            of_x = grad if reuse and grad.stride() == x.stride() else _empty_like(x)
            made = (of_x, _empty_like(weight), of_bias)
            if _C.batch_norm_fake_quantize_backward(*args, *made):
                return made
        made = ops.batch_norm_fake_quantize_backward(*args)
    of_x, of_weight, of_bias = made
    return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype)


class _BatchNorm(torch.autograd.Function):
    """Gives a result that was made of x, weight and bias their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, y: tuple[Tensor], inputs: tuple[Any, ...]
    ) -> Tensor:
        _save_batch_norm(ctx, (x, weight, bias, *inputs), y[0])
        learn_counts()
        return y[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reuse = is_sole_owner(grad)
        return *_gradients_of_x_weight_bias(ctx, grad, reuse), None, None


with_batch_norm_gradients: _Attach = _BatchNorm.apply
with_batch_norm_gradients_plain = _without_transforms(_BatchNorm)


def _gradients_of_batch_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients_of_x_weight_bias(ctx, grad), *(None,) * 7


batch_norm_fake_quantize = _with_gradients(
    ops.batch_norm_fake_quantize,
    _save_batch_norm,
    _gradients_of_batch_norm,
    "batch_norm_fake_quantize",
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


# ------------------------------------------------------------------------------ convolution


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradients_of_convolution(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    backward = ops.convolution_backward
    if is_grad_enabled() and any(t.requires_grad for t in (grad, x, weight)):
        backward = differentiable_backward
    grad_x, grad_weight = backward(grad, x, weight, ctx.stride, of_x, of_weight)
    return (
        grad_x if of_x else None,
        grad_weight if of_weight else None,
        grad.sum((0, 2, 3)) if ctx.has_bias and of_bias else None,
        None,
    )


torch.library.register_autograd(
    "fastquant::convolution", _gradients_of_convolution, setup_context=_save_convolution
)
