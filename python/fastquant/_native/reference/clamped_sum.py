"""The sum of two tensors, its activation, observing and fake-quantize as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..settings import FusedSettings
from .basics import _check, _compute_dtype, _fake_quantized, _pack_bits, observe_qparams_


def _clamped(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """x between two bounds, and which elements gradients pass through.

    As with torch's ReLU and Hardtanh: not at the bounds, and where x is NaN. A bound is rounded to
    the dtype of x, and clamps nothing where it is infinite.
    """
    passes = torch.ones_like(x, dtype=torch.bool)
    for bound, clamp in ((low, torch.maximum), (high, torch.minimum)):
        limit = x.new_full((), bound, dtype=_compute_dtype(x)).to(x.dtype)
        clamped = clamp(x, limit)
        passes &= limit.isinf() | ~(clamped == limit)
        x = torch.where(limit.isinf(), x, clamped)
    return x, passes


def add_observe_fake_quantize(
    a: Tensor, b: Tensor, low: float, high: float, *args: Any
) -> tuple[Tensor, Tensor]:
    _check(a.shape == b.shape and a.dtype == b.dtype, "a and b must have the same shape and dtype")
    _check(a.device == b.device, f"b must be on {a.device}, got {b.device}")
    _check(low < high, f"low {low} must be less than high {high}")
    settings = FusedSettings.of_tensor(*args)
    x, passes = _clamped(torch.empty_like(a).copy_(a + b), low, high)
    observe_qparams_(x, *settings.to_observe())
    y, in_range = _fake_quantized(x, *settings.to_fake_quantize())
    return y, _pack_bits(in_range & passes, y)
