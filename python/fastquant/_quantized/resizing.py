"""Resizing and resampling of quantized tensors, which keep scale and zero point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import ops
from .._native.reference.quantized import LINEAR, NEAREST, NEAREST_EXACT
from .tensor import QuantizedTensor, handles, integers_of, like


def _rounded(real: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    return real.round().clamp(info.min, info.max).to(dtype)


# How many spatial dimensions a mode is for, 0 for any, and its code.
_MODES = {
    "nearest": (0, NEAREST),
    "nearest-exact": (0, NEAREST_EXACT),
    "linear": (1, LINEAR),
    "bilinear": (2, LINEAR),
    "trilinear": (3, LINEAR),
}


def _ratio(size: int, outputs: int, align_corners: bool, scale: float | None) -> float:
    """How many pixels of the input one of the output stands for."""
    if align_corners:
        return (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    return size / outputs if scale is None else 1.0 / scale


def _output_size(
    given: Sequence[int], size: Any, scale_factor: Any
) -> tuple[list[int], Sequence[float | None]]:
    """The sizes of the output, and the scales to them where those are what the call gives."""
    if (size is None) == (scale_factor is None):
        raise ValueError("F.interpolate takes either size or scale_factor")
    value = scale_factor if size is None else size
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(given)
    if len(values) != len(given):
        raise ValueError(
            f"F.interpolate takes one number or {len(given)} for an input of {len(given)} spatial "
            f"dimensions, got {value}"
        )
    if size is not None:
        return values, [None] * len(given)
    return [math.floor(n * scale) for n, scale in zip(given, values, strict=True)], values


@handles(F.interpolate)
def _interpolate(
    input: QuantizedTensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> QuantizedTensor:
    values = integers_of(input)
    rest = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    dims = values.dim() - 2
    if antialias or mode not in _MODES or _MODES[mode][0] not in (0, dims):
        # The weights of each element add up to 1, so that a zero point stays what it is.
        return like(input, _rounded(F.interpolate(values.float(), *rest), values.dtype))
    shape, scales = _output_size(values.shape[2:], size, scale_factor)
    if recompute_scale_factor:
        scales = [None] * dims
    sizes = zip(values.shape[2:], shape, scales, strict=True)
    ratios = [_ratio(n, outputs, bool(align_corners), scale) for n, outputs, scale in sizes]
    code = _MODES[mode][1]
    y = ops.quantized_interpolate(values, list(shape), ratios, code, bool(align_corners))
    return like(input, y)


@handles(F.grid_sample)
def _grid_sample(
    input: QuantizedTensor, grid: Tensor, *args: Any, **kwargs: Any
) -> QuantizedTensor:
    zero_point = input._zero_point
    # Without the zero point, so that what lies outside is 0.
    sampled = F.grid_sample(integers_of(input).float() - zero_point, grid, *args, **kwargs)
    return like(input, _rounded(sampled + zero_point, input.dtype))
