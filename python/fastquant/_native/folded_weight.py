"""Layers whose weight is folded with the batch norm that follows: q(w s) / s in the place of w.

Autograd keeps the weight itself and five values per channel. From them the backward pass makes the
folded weight once more, in one pass. To keep it would take as much memory as a model's weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._core.arguments import nonfinite_refusal
from .._torch.private import below_autograd
from . import gradients, ops
from .fake_kernels import empty_folded
from .fast_calls import may_skip_dispatcher
from .layers import Layer
from .ownership import is_sole_owner, learn_counts
from .settings import FusedSettings

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Folded(NamedTuple):
    """A folded weight without gradients, and what its backward pass needs."""

    weight: Tensor
    fold: Tensor
    quant_min: int
    quant_max: int


def fold_weight(
    weight: Tensor,
    bn_weight: Tensor,
    running_var: Tensor,
    bn_eps: float,
    settings: FusedSettings,
    dtype: torch.dtype | None = None,
) -> Folded:
    """Observe w s, where s = bn_weight / sqrt(running_var + bn_eps), and make q(w s) / s.

    dtype: what q(w s) / s is rounded to at last; the weight's own if None.

    Raises:
        RuntimeError, ValueError: the op refuses its arguments. No buffer has changed.
    """
    if is_dynamo_compiling():
        # The op changes its arguments, so it has no gradient and takes none that need one.
        bn_std = torch.sqrt(running_var + bn_eps)
        args = (weight.detach(), bn_weight.detach(), bn_std, *settings)
        folded, fold = ops.observe_folded_weight_(*args)
        return Folded(folded, fold, settings.quant_min, settings.quant_max)
    with below_autograd():
        # By torch's op, since its square root is not always rounded correctly: s then has the same
        # bits as where single steps take the place of the op.
        bn_std = torch.sqrt(running_var + bn_eps)
        quant_range = settings.quant_min, settings.quant_max
        if may_skip_dispatcher(weight, bn_weight, bn_std):
            folded, fold = empty_folded(weight, dtype)
            made = Folded(folded, fold, *quant_range)
            done = _C.observe_folded_weight_(weight, bn_weight, bn_std, settings, folded, fold)
            if done is True:
                return made
            if done:
                raise nonfinite_refusal(weight, done)
        folded, fold = ops.observe_folded_weight_(weight, bn_weight, bn_std, *settings)
        if dtype is not None:
            folded = folded.to(dtype)
    return Folded(folded, fold, *quant_range)


def _folded_again(weight: Tensor, fold: Tensor, quant_min: int, quant_max: int) -> Tensor:
    if may_skip_dispatcher(weight, fold):
        folded = torch.empty_like(weight)
        if _C.fold_weight(weight, fold, quant_min, quant_max, folded):
            return folded
    result: Tensor = ops.fold_weight(weight, fold, quant_min, quant_max)
    return result


def _gradients(
    grad: Tensor, weight: Tensor, fold: Tensor, quant_min: int, quant_max: int, *, reuse: bool
) -> tuple[Tensor, Tensor]:
    """Of weight and bn_weight. With `reuse`, grad may become the gradient of the weight."""
    if may_skip_dispatcher(weight, fold, grad):
        of_bn_weight = weight.new_empty(weight.shape[0])
        of_weight = grad if reuse and grad.dtype == weight.dtype else torch.empty_like(weight)
        args = (grad, weight, fold, quant_min, quant_max, of_weight, of_bn_weight)
        if _C.fold_weight_backward(*args):
            return of_weight, of_bn_weight
    result: tuple[Tensor, Tensor] = ops.fold_weight_backward(
        grad, weight, fold, quant_min, quant_max
    )
    return result


def _differentiable(
    weight: Tensor, bn_weight: Tensor, fold: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """The folded weight made by ops that have gradients of gradients."""
    shape = (-1, *(1,) * (weight.dim() - 1))
    kept = (fold[0] == 0).reshape(shape)
    s = (bn_weight / fold[1].to(weight.dtype)).reshape(shape).masked_fill(kept, 1.0)
    product = (weight * s).masked_fill(kept, 0.0)
    scale, zero_point = fold[2], fold[4].to(torch.int64)
    quantized, _ = gradients.fake_quantize_with_mask(
        product, scale, zero_point, None, 0, quant_min, quant_max
    )
    return torch.where(kept, weight, quantized / s)


def _differentiable_gradients(
    folded: Tensor, weight: Tensor, bn_weight: Tensor, needed: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Of weight and bn_weight, where needed, as functions that have gradients themselves."""
    inputs = [t for t, needs in zip((weight, bn_weight), needed, strict=True) if needs]
    found = iter(torch.autograd.grad(folded, inputs, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needs else None for needs in needed)


class _FoldedWeight(torch.autograd.Function):
    """Gives the folded weight the gradients of weight and bn_weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bn_weight: Tensor, folded: Folded) -> Tensor:
        ctx.save_for_backward(weight, bn_weight, folded.fold)
        ctx.quant_range = folded.quant_min, folded.quant_max
        if is_dynamo_compiling():
            # Dynamo of torch 2.10 loses an input that is returned as it is.
            return folded.weight.view_as(folded.weight)
        return folded.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bn_weight, fold = ctx.saved_tensors
        if torch.is_grad_enabled():
            folded = _differentiable(weight, bn_weight, fold, *ctx.quant_range)
            needed = ctx.needs_input_grad[:2]
            return *_differentiable_gradients(folded, weight, bn_weight, needed, grad), None
        return *_gradients(grad, weight, fold, *ctx.quant_range, reuse=False), None


def with_gradients(weight: Tensor, bn_weight: Tensor, folded: Folded) -> Tensor:
    """The folded weight, for whatever a layer does with it."""
    if not torch.is_grad_enabled():
        return folded.weight
    y: Tensor = _FoldedWeight.apply(weight, bn_weight, folded)  # type: ignore[no-untyped-call]
    return y


# --------------------------------------------------------------------------------------- layers


class _LayerWithFoldedWeight(torch.autograd.Function):
    """What the layer makes of x, with the gradients of x, weight, bn_weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bn_weight: Tensor,
        bias: Tensor | None,
        folded: Folded,
        layer: Layer,
    ) -> Tensor:
        # Under autocast a layer keeps its weight in autocast's dtype in float training, too.
        kept = None if folded.weight.dtype == weight.dtype else folded.weight
        ctx.save_for_backward(x, weight, bn_weight, folded.fold, kept)
        ctx.quant_range, ctx.layer = (folded.quant_min, folded.quant_max), layer
        learn_counts()
        return layer(x, folded.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reuse = is_sole_owner(grad)
        x, weight, bn_weight, fold, kept = ctx.saved_tensors
        of_x, of_weight, of_bn_weight, of_bias, *_ = ctx.needs_input_grad
        differentiable = torch.is_grad_enabled()
        if differentiable:
            folded = _differentiable(weight, bn_weight, fold, *ctx.quant_range).to(x.dtype)
        elif kept is not None:
            folded = kept
        elif of_x:
            folded = _folded_again(weight, fold, *ctx.quant_range)
        else:
            folded = weight  # its own gradient needs only its shape
        needed = [of_x, of_weight or of_bn_weight, of_bias]
        grad_x, grad_folded, grad_bias = ctx.layer.gradients(grad, x, folded, needed, reuse)
        of_parameters: tuple[Tensor | None, ...] = (None, None)
        if differentiable and grad_folded is not None:
            of_parameters = _differentiable_gradients(
                folded, weight, bn_weight, (of_weight, of_bn_weight), grad_folded
            )
        elif grad_folded is not None:
            del folded
            # Nobody else has this gradient.
            of_parameters = _gradients(grad_folded, weight, fold, *ctx.quant_range, reuse=True)
        return grad_x, *of_parameters, grad_bias, None, None


def with_folded_weight(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bias: Tensor | None,
    folded: Folded,
) -> Tensor:
    """What the layer makes of x with the folded weight, which autograd does not keep.

    It computes in the dtype of the folded weight, as autocast would.
    """
    dtype = folded.weight.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return layer(x, folded.weight, bias)
    inputs = (x, weight, bn_weight, bias, folded, layer)
    y: Tensor = _LayerWithFoldedWeight.apply(*inputs)  # type: ignore[no-untyped-call]
    return y
