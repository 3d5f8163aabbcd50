"""Quantized tensors: integers with a scale and a zero point, on ordinary uint8 and int8 tensors.

They are what travels between quantized modules, in place of torch's tensors of quantized dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._native import ops
from ._quantized.tensor import (
    PerChannelQuantizedTensor,
    QuantizedTensor,
    as_integer_dtype,
    check_qparams,
    is_quantized,
    made,
    parts,
)

__all__ = [
    "PerChannelQuantizedTensor",
    "QuantizedTensor",
    "is_quantized",
    "made",
    "parts",
    "quantize_per_channel",
    "quantize_per_tensor",
]


def _check_floating(x: Any) -> None:
    if not isinstance(x, Tensor) or is_quantized(x) or not x.is_floating_point():
        found = f"one of {x.dtype}" if type(x) is Tensor else type(x).__name__
        raise TypeError(f"x must be an ordinary floating-point tensor, got {found}")


def quantize_per_tensor(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    dtype: torch.dtype = torch.uint8,
) -> QuantizedTensor:
    """x as integers with one scale and one zero point, as torch.quantize_per_tensor does it.

    Args:
        x: a floating-point tensor.
        scale: positive.
        zero_point: the integer that stands for 0.
        dtype: torch.uint8 or torch.int8.
    """
    _check_floating(x)
    dtype = as_integer_dtype(dtype)
    scale, zero_point = float(scale), int(zero_point)
    check_qparams(scale, zero_point, dtype)
    return made(ops.quantize(x, scale, zero_point, dtype, False), scale, zero_point)


def quantize_per_channel(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    axis: int,
    dtype: torch.dtype = torch.int8,
) -> PerChannelQuantizedTensor:
    """x as integers with a scale and a zero point for each channel.

    Args:
        x: a floating-point tensor.
        scales, zero_points: one for each channel.
        axis: the dimension that counts channels.
        dtype: torch.uint8 or torch.int8.
    """
    _check_floating(x)
    dtype = as_integer_dtype(dtype)
    info = torch.iinfo(dtype)
    shape = [1] * x.dim()
    shape[axis] = -1
    levels = (x / scales.reshape(shape)).round() + zero_points.reshape(shape)
    values = levels.clamp(info.min, info.max).to(dtype)
    return PerChannelQuantizedTensor(values, scales, zero_points, axis)
