"""Quantizes weights for torch's modules, natively where it can: torch goes element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._core.dtypes import QINT8
from .._native.ops import quantize_per_channel
from .._torch.private import per_channel_quantized
from ..nn.quantized.observed import limits_of
from ..utils import is_per_channel


def quantize_weight(weight: Tensor, observer: Any) -> Tensor:
    """`weight` as one of torch's quantized tensors, by the scales that its observer has chosen.

    Args:
        weight: fp32.
        observer: has seen it.
    """
    scales, zero_points = observer.calculate_qparams()
    if not is_per_channel(observer.qscheme):
        scale, zero_point = float(scales), int(zero_points)
        weight = _clamped(weight, observer, scales, zero_points)
        return torch.quantize_per_tensor(weight, scale, zero_point, QINT8)
    axis = observer.ch_axis
    low, high = limits_of(observer)
    if (
        observer.qscheme == torch.per_channel_symmetric
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and 0 <= axis < weight.dim()
        and scales.shape == weight.shape[axis : axis + 1]
        and not zero_points.any()
    ):
        # What torch makes of integers is contiguous.
        integers = quantize_per_channel(weight.detach().contiguous(), scales, axis, low, high)
        return per_channel_quantized(integers, scales, zero_points, axis)  # type: ignore[no-any-return]
    shape = [-1 if i == axis % weight.dim() else 1 for i in range(weight.dim())]
    weight = _clamped(weight, observer, scales.reshape(shape), zero_points.reshape(shape))
    if observer.qscheme == torch.per_channel_affine_float_qparams:
        scales, zero_points = scales.float(), zero_points.float()
    else:
        scales, zero_points = scales.double(), zero_points.long()
    return torch.quantize_per_channel(weight, scales, zero_points, axis, QINT8)


def _clamped(weight: Tensor, observer: Any, scales: Tensor, zero_points: Tensor) -> Tensor:
    """`weight` within what the least and the largest integer stand for, if int8 holds more."""
    low, high = limits_of(observer)
    if (low, high) == (-128, 127):
        return weight
    bounds = ((low - zero_points) * scales, (high - zero_points) * scales)
    return weight.clamp(*(bound.to(weight.dtype) for bound in bounds))
