"""Quantizes weights natively, to the integers that torch's modules get an element at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._native.ops import quantize_per_channel
from .._torch import ao
from .._torch.private import per_channel_quantized
from ..nn.quantized.observed import limits_of


def quantize_weight(weight: Tensor, observer: Any) -> Tensor:
    """`weight` as torch's modules quantize it, which take it an element at a time.

    Args:
        weight: fp32.
        observer: has seen it.
    """
    axis = getattr(observer, "ch_axis", -1)
    if (
        observer.qscheme == torch.per_channel_symmetric
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and 0 <= axis < weight.dim()
    ):
        scales, zero_points = observer.calculate_qparams()
        if scales.shape == weight.shape[axis : axis + 1] and not zero_points.any():
            low, high = limits_of(observer)
            # What torch makes of integers is contiguous.
            integers = quantize_per_channel(weight.detach().contiguous(), scales, axis, low, high)
            return per_channel_quantized(integers, scales, zero_points, axis)  # type: ignore[no-any-return]
    quantized: Tensor = ao.quantize_weight(weight, observer)  # type: ignore[no-untyped-call]
    return quantized
