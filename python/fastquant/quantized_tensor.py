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
    check_floating,
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


def floating(x: Any) -> Tensor:
    """The real values of a quantized tensor, of this package or torch's; others as they are."""
    return x.dequantize() if getattr(x, "is_quantized", False) else x  # type: ignore[no-any-return]


def quantize_per_tensor(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    dtype: torch.dtype = torch.uint8,
) -> QuantizedTensor:
    """x as integers with one scale and one zero point, as torch.quantize_per_tensor does it.

    Args:
        x: a floating-point tensor of any shape.
        scale: the step between neighbouring integers, in units of x; positive and finite.
        zero_point: the integer that stands for 0.
        dtype: torch.uint8 or torch.int8, or the quantized dtype of these integers.

    Returns:
        `clamp(round(x / scale) + zero_point)`, a tensor of x's shape.

    Raises:
        TypeError: x is not floating, or `dtype` is another.
        ValueError: a scale that is not positive and finite, or a zero point that `dtype` lacks.
    """
    check_floating(x)
    dtype = as_integer_dtype(dtype)
    if isinstance(zero_point, Tensor):
        zero_point = zero_point.item()  # type: ignore[assignment]
    check_qparams(float(scale), zero_point, dtype)  # type: ignore[arg-type]
    scale, zero_point = float(scale), int(zero_point)
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
        x: a floating-point tensor of any shape.
        scales: one for each channel, in units of x; positive and finite.
        zero_points: the integer that stands for 0, one for each channel.
        axis: the dimension that counts channels.
        dtype: torch.uint8 or torch.int8, or the quantized dtype of these integers.

    Returns:
        The integers, in a tensor of x's shape; layers take such a tensor as their weight.

    Raises:
        TypeError: x is not floating, or `dtype` is another.
        ValueError: as for `quantize_per_tensor`, or not one scale and zero point for each channel.
        IndexError: x has no such axis.
    """
    check_floating(x)
    dtype = as_integer_dtype(dtype)
    info = torch.iinfo(dtype)
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis must be a dimension of x, which has {x.dim()}, got {axis}")
    for name, given in (("scales", scales), ("zero_points", zero_points)):
        if given.shape != (x.shape[axis],):
            raise ValueError(
                f"{name} must have one element for each of the {x.shape[axis]} channels, got shape "
                f"{list(given.shape)}"
            )
    for scale, zero_point in zip(scales.tolist(), zero_points.tolist(), strict=True):
        check_qparams(scale, zero_point, dtype)
    shape = [1] * x.dim()
    shape[axis] = -1
    levels = (x / scales.reshape(shape)).round() + zero_points.reshape(shape)
    values = levels.clamp(info.min, info.max).to(dtype)
    return PerChannelQuantizedTensor(values, scales, zero_points, axis)
