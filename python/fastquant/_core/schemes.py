"""Quantization schemes, policies and dtypes, with the codes that the ops take for them."""

from __future__ import annotations

from typing import Literal

import torch

Nonfinite = Literal["ignore", "raise", "propagate"]

NONFINITE_CODES: dict[str, int] = {"ignore": 0, "raise": 1, "propagate": 2}

SCHEME_CODES: dict[torch.qscheme, int] = {
    torch.per_tensor_affine: 0,
    torch.per_channel_affine: 0,
    torch.per_tensor_symmetric: 1,
    torch.per_channel_symmetric: 1,
    torch.per_channel_affine_float_qparams: 2,
}

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What histograms can be kept in: counts stall in anything narrower, at 256 in bf16.
WIDE = (torch.float32, torch.float64)

_UINT8 = (torch.quint8, torch.uint8)


def symmetric_zero_point(
    dtype: torch.dtype, quant_min: int, quant_max: int, has_customized_qrange: bool
) -> int:
    """Zero point of a symmetric scheme: the middle of an unsigned dtype, 0 of a signed one.

    A customized range of an 8-bit unsigned dtype has its own middle, rounded down. These are
    the rules of torch.ao.quantization's `UniformQuantizationObserverBase`.
    """
    if dtype in _UINT8:
        return (quant_min + quant_max) // 2 if has_customized_qrange else 128
    return 2**15 if dtype == torch.uint16 else 0
