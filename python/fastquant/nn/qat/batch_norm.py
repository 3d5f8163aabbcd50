"""Training with batch norm folded in, without passes over activations that weights can spare.

torch.ao's QAT modules of a convolution (or linear layer) and its batch norm quantize the weight
as inference will see it, scaled by s = gamma / sqrt(running_var + eps), and undo the scaling on
the output: bn(conv(x, q(w s)) / s + b), after https://arxiv.org/abs/1806.08342, section 3.2.2.
Undone on the output it costs a pass over the activations forward, and about seven backward for
the gradient of s. A convolution is linear in its weight, so bn(conv(x, q(w s) / s) + b) is the
same function, with the same gradients, up to rounding; its passes are over weights.

The modules stay torch.ao's, so that any convert, checkpoint or pickle takes them. What changes is
the method of their class that does this, and only for modules whose weight is quantized by a
fake-quantize of fastquant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._native.fast_calls import has_plain_gradients
from ..._torch.ao import conv_bn_base, nniqat
from ...fake_quantize import FakeQuantizeBase

_Forward = Callable[[Any, Tensor], Tensor]


# Autograd's own gradients of a product and a quotient take twice as many passes over the weight.


class _Scaled(torch.autograd.Function):
    """weight * scale, with one scale for each of the weight's channels."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return weight * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, scale = ctx.saved_tensors
        return grad * scale, _sum_of_products(grad, weight)


class _Unscaled(torch.autograd.Function):
    """weight / scale, likewise."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        unscaled = weight / scale
        ctx.save_for_backward(scale, unscaled)
        return unscaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        scale, unscaled = ctx.saved_tensors
        return grad / scale, -_sum_of_products(grad, unscaled) / scale


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Of each channel, the first axis."""
    return (a * b).sum(tuple(range(1, a.dim())), keepdim=True)


_scaled: Callable[[Tensor, Tensor], Tensor] = _Scaled.apply
_unscaled: Callable[[Tensor, Tensor], Tensor] = _Unscaled.apply


def _as_inference_sees_it(module: Any) -> Tensor:
    """The weight, quantized as scaled by the batch norm's running statistics, then unscaled."""
    bn, weight = module.bn, module.weight
    if bn.running_var is None:
        raise AssertionError(f"{type(module).__name__} needs the running statistics of its bn")
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    scale = scale.reshape(-1, *(1,) * (weight.dim() - 1))
    if scale.requires_grad and has_plain_gradients():
        return _unscaled(module.weight_fake_quant(_scaled(weight, scale)), scale)
    unscaled: Tensor = module.weight_fake_quant(weight * scale) / scale
    return unscaled


def _conv_bn(module: Any, x: Tensor) -> Tensor:
    weight = _as_inference_sees_it(module)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    result: Tensor = module.bn(module._conv_forward(x, weight, bias))
    return result


def _linear_bn(module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.bn(F.linear(x, _as_inference_sees_it(module), module.bias))
    return result


def _replace(cls: type, name: str, forward: _Forward) -> None:
    """Use `forward` in the place of a method, for modules with a fake-quantize of ours."""
    theirs: _Forward | None = vars(cls).get(name)
    if theirs is None:
        return  # a torch that does it some other way

    @functools.wraps(theirs)
    def method(self: Any, x: Tensor) -> Tensor:
        ours = FakeQuantizeBase in type(self.weight_fake_quant).__mro__
        return forward(self, x) if ours else theirs(self, x)

    setattr(cls, name, method)


_replace(conv_bn_base, "_forward_approximate", _conv_bn)
_replace(nniqat.LinearBn1d, "forward", _linear_bn)
