"""QAT blocks of a convolution (or linear layer) and its batch norm, folded on the weight's side.

torch.ao's blocks quantize the weight as inference will see it, scaled by
s = gamma / sqrt(running_var + eps), and undo the scaling on the output:
bn(conv(x, q(w s)) / s + b), after https://arxiv.org/abs/1806.08342, section 3.2.2. Undone on the
output it costs a pass over the activations forward, and about seven backward for the gradient of
s. A convolution is linear in its weight, so bn(conv(x, q(w s) / s) + b) is the same function, with
the same gradients, up to rounding; its passes are over weights.

Where s is 0, as for a channel that was pruned by its gamma, the formula is 0 / 0, and torch.ao's
result is NaN. Here such a channel uses w itself: gamma makes the channel's output constant in any
case, and its gradient is the normalized output of the convolution, as without quantization, so
that training can bring the channel back.

`teach_torch_ao` replaces the two methods of torch.ao's classes that do the folding, for blocks
whose weight is quantized by a fake-quantizer of fastquant; others keep torch.ao's. The blocks stay
torch.ao's classes: its functions and users' code recognise them by their type. `prepare_qat` calls
it. In a process that unpickles a prepared model and never calls `prepare_qat`, torch.ao's own
methods run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._native.fast_calls import has_plain_gradients
from ..._native.routes import may_be_read
from ..._torch.ao import conv_bn_base, nniqat
from ..._torch.private import has_backward_hooks, is_called_plainly
from ...fake_quantize import FakeQuantize, FakeQuantizeBase

__all__ = ["before_batch_norm", "teach_torch_ao"]

_Forward = Callable[[Any, Tensor], Tensor]


def _zeros(scale: Tensor) -> Tensor | None:
    """Which scales are 0; None where it can be seen beforehand that none is."""
    # A list, since a model runs these few values through `in` faster than through an op.
    if type(scale) is Tensor and may_be_read(scale) and 0.0 not in scale.tolist():
        return None
    return scale == 0


def _divided(quantized: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensor:
    """quantized / scale; the weight where `zeros` says that the scale was 0 before it became 1."""
    return quantized / scale if zeros is None else torch.where(zeros, weight, quantized / scale)


class _Divided(torch.autograd.Function):
    """`_divided` with the gradients that autograd finds, in half as many passes over the weight."""

    @staticmethod
    def forward(
        ctx: Any, quantized: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor | None
    ) -> Tensor:
        result = _divided(quantized, weight, scale, zeros)
        ctx.save_for_backward(scale, result, zeros)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, result, zeros = ctx.saved_tensors
        of_weight = None
        if zeros is not None:
            of_weight = grad * zeros
            grad = grad.masked_fill(zeros, 0.0)
        of_quantized = grad / scale
        of_scale = None
        if ctx.needs_input_grad[2]:
            products = of_quantized * result
            of_scale = -products.sum(tuple(range(1, products.dim())), keepdim=True)
        return of_quantized, of_weight, of_scale, None


# As it was written, to notice another in its place.
_FORWARD: Any = FakeQuantize.forward


def _is_off(fake_quantizer: Any) -> bool:
    """Whether a call would return its argument and do nothing else, whoever might look on."""
    if (
        type(fake_quantizer).forward is not _FORWARD
        or not is_called_plainly(fake_quantizer)
        or has_backward_hooks(fake_quantizer)
    ):
        return False
    flags = fake_quantizer.observer_enabled, fake_quantizer.fake_quant_enabled
    return all(type(flag) is Tensor and may_be_read(flag) and not flag.item() for flag in flags)


def _weight_of_inference(module: Any) -> Tensor:
    """The weight, quantized as scaled by the batch norm's running statistics, then unscaled."""
    bn, weight, fake_quantizer = module.bn, module.weight, module.weight_fake_quant
    if bn.running_var is None:
        raise AssertionError(f"{type(module).__name__} needs the running statistics of its bn")
    plain = has_plain_gradients()
    if plain and _is_off(fake_quantizer):
        # (w s) / s is w.
        untouched: Tensor = weight
        return untouched
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    zeros = _zeros(scale)
    per_channel = (-1, *(1,) * (weight.dim() - 1))
    scale = scale.reshape(per_channel)
    if zeros is None:
        scaled = weight * scale
    else:
        zeros = zeros.reshape(per_channel)
        # One scale for product and quotient: a compiler may compute it again for the backward pass,
        # from running statistics that have moved, and only in both does that cancel out.
        scale = scale.masked_fill(zeros, 1.0)
        scaled = (weight * scale).masked_fill(zeros, 0.0)
    divided = _Divided.apply if plain else _divided
    result: Tensor = divided(fake_quantizer(scaled), weight, scale, zeros)
    return result


def before_batch_norm(module: Any, x: Tensor) -> Tensor:
    """What the block gives to its batch norm."""
    weight = _weight_of_inference(module)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    result: Tensor = module._conv_forward(x, weight, bias)
    return result


def _forward(module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.bn(before_batch_norm(module, x))
    return result


def _replace(cls: type, name: str) -> None:
    """Use `_forward` in the place of a method, for modules with a fake-quantizer of ours."""
    theirs: _Forward | None = vars(cls).get(name)
    if theirs is None:
        return  # a torch that does it some other way

    @functools.wraps(theirs)
    def method(self: Any, input: Tensor) -> Tensor:
        ours = FakeQuantizeBase in type(self.weight_fake_quant).__mro__
        return _forward(self, input) if ours else theirs(self, input)

    setattr(cls, name, method)


@functools.cache
def teach_torch_ao() -> None:
    """Have torch.ao's blocks fold on the weight's side, from now on in this process."""
    _replace(conv_bn_base, "_forward_approximate")
    _replace(nniqat.LinearBn1d, "forward")
