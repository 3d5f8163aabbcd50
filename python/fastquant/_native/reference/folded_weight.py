"""A weight quantized as inference will see it, scaled by its batch norm, and then unscaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..settings import FusedSettings
from .basics import (
    _along_channels,
    _check,
    _check_input,
    _compute_dtype,
    _inverse,
    _rounded,
    _widest_dtype,
    observe_qparams_,
)

# A weight's output channels.
_CHANNELS = 0


def _check_weight(weight: Tensor, **buffers: Tensor) -> None:
    _check(weight.dim() >= 2, f"weight must have at least 2 dimensions, got {weight.dim()}")
    _check_input(weight, _CHANNELS, **buffers)


def observe_folded_weight_(
    weight: Tensor, bn_weight: Tensor, bn_std: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    settings = FusedSettings(*args)
    _check_weight(weight, bn_weight=bn_weight, bn_std=bn_std)
    for name, tensor in (("bn_weight", bn_weight), ("bn_std", bn_std)):
        _check(tensor.dtype == weight.dtype, f"{name} must be {weight.dtype}, as weight is")
    axis = settings.ch_axis
    _check(axis is None or axis % weight.dim() == _CHANNELS, "ch_axis must be None or 0")
    _check(not settings.zero_point.is_floating_point(), "zero_point must have an integer dtype")
    _check_input(weight, axis, scale=settings.scale, zero_point=settings.zero_point)
    s = bn_weight / bn_std
    product = weight * _along_channels(s, weight, _CHANNELS)
    product = product.masked_fill(_along_channels(s == 0, weight, _CHANNELS), 0.0)
    observe_qparams_(product, *settings.to_observe())
    quantized = (settings.fake_quant_enabled.reshape(()) != 0) & (s != 0)
    scale, zero_point = settings.scale, settings.zero_point
    rows = (torch.where(quantized, s, 0.0), bn_std, scale, _inverse(scale), zero_point)
    compute = _compute_dtype(weight)
    fold = torch.stack([row.reshape(-1).to(compute).expand(s.shape) for row in rows])
    return fold_weight(weight, fold, settings.quant_min, settings.quant_max), fold


def _folded(
    weight: Tensor, fold: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight and its quantized product with s, both computed, and the masks that go with them.

    Returns the product, what it is quantized to, whether it is in the quantized range, and where
    the weight stays as it is.
    """
    _check_weight(weight)
    _check(fold.shape == (5, weight.shape[_CHANNELS]), "fold must have five values per channel")
    s, _, scale, inverse, zero_point = (_along_channels(row, weight, _CHANNELS) for row in fold)

    def stored(x: Tensor) -> Tensor:
        return x.to(weight.dtype).to(fold.dtype)

    product = stored(weight.to(fold.dtype) * s)
    quantized, in_range = _rounded(product, scale, inverse, zero_point, False, quant_min, quant_max)
    return product, stored(quantized), in_range, s == 0


def fold_weight(weight: Tensor, fold: Tensor, quant_min: int, quant_max: int) -> Tensor:
    _, quantized, _, kept = _folded(weight, fold, quant_min, quant_max)
    s = _along_channels(fold[0], weight, _CHANNELS)
    return torch.empty_like(weight).copy_(torch.where(kept, weight, quantized / s))


def fold_weight_backward(
    grad: Tensor, weight: Tensor, fold: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    product, quantized, in_range, kept = _folded(weight, fold, quant_min, quant_max)
    s, bn_std = fold[0], fold[1]
    # A product, not a selection: the sign of zero, and NaN, come out as torch's.
    grad_weight = torch.empty_like(weight).copy_(grad * (in_range | kept))
    # The derivative of q(w s) / s by s, which is (w - q(w s) / s) / s where the quantized value
    # follows w s, and -q(w s) / s / s where it does not.
    error = torch.where(in_range, product, 0.0) - quantized
    terms = grad.to(fold.dtype) * (error / _along_channels(s, weight, _CHANNELS))
    terms = torch.where(kept, 0.0, terms).to(_widest_dtype(weight.device))
    total = terms.sum(tuple(range(1, weight.dim()))) / s / bn_std
    return grad_weight, torch.where(s == 0, 0.0, total).to(weight.dtype)
