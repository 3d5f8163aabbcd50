"""Resizing and resampling of quantized tensors, which keep scale and zero point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .tensor import QuantizedTensor, handles, integers_of, like


def _rounded(real: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.iinfo(dtype)
    return real.round().clamp(info.min, info.max).to(dtype)


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
    if mode.startswith("nearest") and values.dtype == torch.uint8:
        return like(input, F.interpolate(values, *rest))
    # The weights of each element add up to 1, so that a zero point stays what it is.
    return like(input, _rounded(F.interpolate(values.float(), *rest), values.dtype))


@handles(F.grid_sample)
def _grid_sample(
    input: QuantizedTensor, grid: Tensor, *args: Any, **kwargs: Any
) -> QuantizedTensor:
    zero_point = input._zero_point
    # Without the zero point, so that what lies outside is 0.
    sampled = F.grid_sample(integers_of(input).float() - zero_point, grid, *args, **kwargs)
    return like(input, _rounded(sampled + zero_point, input.dtype))
