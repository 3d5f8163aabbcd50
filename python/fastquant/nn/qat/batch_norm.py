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

The blocks of this package compute so; `blocks` has those of torch.ao do it, too, where their weight
is quantized by a fake-quantizer of fastquant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ..._native.fast_calls import is_called_alone
from ..._native.folded_weight import Folded, fold_weight, with_folded_weight, with_gradients
from ..._native.routes import may_be_read
from .convolution import convolve, layer_called_alone
from .plain import is_fused_for, is_plain, settings_of_one_op

__all__ = ["before_batch_norm"]


def _is_off(fake_quantizer: Any) -> bool:
    """Whether a plain fake-quantizer returns its argument and does nothing else."""
    flags = fake_quantizer.observer_enabled, fake_quantizer.fake_quant_enabled
    return all(type(flag) is Tensor and may_be_read(flag) and not flag.item() for flag in flags)


def _folded_in_steps(module: Any, weight: Tensor, gamma: Tensor, variance: Tensor) -> Tensor:
    """The folded weight by torch ops and a call of the fake-quantizer, whatever it does."""
    scale = gamma / torch.sqrt(variance + module.bn.eps)
    per_channel = (-1, *(1,) * (weight.dim() - 1))
    zeros = (scale == 0).reshape(per_channel)
    # One scale for product and quotient: a compiler may compute it again for the backward pass,
    # from running statistics that have moved, and only in both does that cancel out.
    scale = scale.reshape(per_channel).masked_fill(zeros, 1.0)
    scaled = (weight * scale).masked_fill(zeros, 0.0)
    return torch.where(zeros, weight, module.weight_fake_quant(scaled) / scale)


def _folded_by_op(
    module: Any, weight: Tensor, gamma: Tensor, variance: Tensor, dtype: torch.dtype | None
) -> Folded | None:
    """The folded weight by one op; None where only the single steps do what they should.

    dtype: what the layer computes in; the weight's own if None.
    """
    if torch.is_grad_enabled() and not gamma.requires_grad:
        # The op reads the weight again for its gradient. The single steps need it only for the
        # gradient of gamma: where gamma is frozen, the weight may change before backward.
        return None
    settings = settings_of_one_op(module.weight_fake_quant)
    if (
        settings is None
        or settings.ch_axis not in (None, 0, -weight.dim())
        or settings.zero_point.is_floating_point()
        or variance.requires_grad
        or not all(
            (type(t) is Tensor or type(t) is Parameter)
            and is_fused_for(t)
            and t.dtype == weight.dtype
            for t in (weight, gamma, variance)
        )
    ):
        return None
    try:
        return fold_weight(weight, gamma, variance, module.bn.eps, settings, dtype)
    except (RuntimeError, ValueError):
        return None  # The fake-quantizer says in words what is wrong, and in which layer.


def _bias(module: Any, x: Tensor) -> Tensor | None:
    bias: Tensor | None = module.bias
    return bias if bias is None or isinstance(module, nn.Linear) else bias.to(x.dtype)


def before_batch_norm(module: Any, x: Tensor) -> Tensor:
    """What the block gives to its batch norm."""
    bn, bias = module.bn, _bias(module, x)
    # Once each, since parametrizations compute them.
    weight, gamma, variance = module.weight, bn.weight, bn.running_var
    if variance is None:
        raise AssertionError(f"{type(module).__name__} needs the running statistics of its bn")
    alone = is_called_alone()
    # Where both are off, (w s) / s is w.
    if not (alone and is_plain(module.weight_fake_quant) and _is_off(module.weight_fake_quant)):
        layer, dtype = layer_called_alone(module, x, weight, bias)
        by_op = alone or torch.compiler.is_dynamo_compiling()
        folded = _folded_by_op(module, weight, gamma, variance, dtype) if by_op else None
        if folded is None:
            weight = _folded_in_steps(module, weight, gamma, variance)
        elif layer is not None:
            return with_folded_weight(layer, x, weight, gamma, bias, folded)
        else:
            weight = with_gradients(weight, gamma, folded)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return convolve(module, x, weight, bias)
