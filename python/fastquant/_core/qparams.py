"""Scale and zero point of a range: the formulas, in torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import UINT8
from .schemes import Scheme

_SYMMETRIC, _FLOAT_QPARAMS = Scheme.SYMMETRIC.value, Scheme.FLOAT_QPARAMS.value


def symmetric_zero_point(
    dtype: torch.dtype, quant_min: int, quant_max: int, has_customized_qrange: bool
) -> int:
    """Zero point of a symmetric scheme: the middle of an unsigned dtype, 0 of a signed one.

    A customized range of an 8-bit unsigned dtype has its own middle, rounded down. These are
    the rules of torch.ao.quantization's `UniformQuantizationObserverBase`.
    """
    if dtype in UINT8:
        return (quant_min + quant_max) // 2 if has_customized_qrange else 128
    return 2**15 if dtype == torch.uint16 else 0


def zero_point_dtype(min_val: Tensor, scheme: int) -> torch.dtype:
    """What observers give zero points, as torch.ao's do."""
    if scheme == _FLOAT_QPARAMS:
        return min_val.dtype
    return torch.int64 if scheme == _SYMMETRIC else torch.int32


def qparams_of_range(
    low: Tensor,
    high: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    """torch.ao.quantization's formulas, in the precision of the range.

    Args:
        low: smallest values, floating.
        high: largest values, likewise.
        eps: smallest scale, one element.
        quant_min: smallest quantized value.
        quant_max: largest quantized value, above `quant_min`.
        scheme: a Scheme.
        symmetric_zero_point: the zero point of a symmetric scheme.

    Returns:
        The scale, and the zero point: int64, floating for float qparams.
    """
    levels = quant_max - quant_min
    wide = torch.float64 if low.dtype == torch.float64 else torch.float32

    def divided(width: Tensor, steps: float) -> Tensor:
        # By a tensor: for a number, some devices multiply with the reciprocal instead. A wide
        # one: fp16 and bf16 do not hold every number of steps.
        return (width / width.new_full((), steps, dtype=wide)).to(width.dtype)

    if scheme == _FLOAT_QPARAMS:
        scale = divided(high - low, levels)
        scale = torch.where(scale > eps, scale, 1.0)
        return scale, -low / scale
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme == _SYMMETRIC:
        scale = torch.maximum(divided(torch.maximum(-low, high), levels / 2), eps)
        zero_point = torch.full_like(low, symmetric_zero_point, dtype=torch.int64)
    else:
        scale = torch.maximum(divided(high - low, levels), eps)
        steps = torch.round(low / scale).nan_to_num(0.0).to(torch.int64)
        zero_point = (quant_min - steps).clamp(quant_min, quant_max)
    # With eps=0, a range of nothing but zeros would have a scale of zero.
    return torch.where(scale == 0, 1.0, scale), zero_point
