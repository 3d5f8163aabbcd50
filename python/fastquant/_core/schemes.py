"""Quantization schemes and policies, with the codes that ops take for them; kinds of dtypes."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import torch

from .dtypes import INT8, INT32, QINT8, QINT32, QUINT4X2, QUINT8, UINT4, UINT8


class Scheme(IntEnum):
    """How scale and zero point follow from a range; `enum class Scheme` in C++."""

    AFFINE = 0
    SYMMETRIC = 1
    FLOAT_QPARAMS = 2


class NonFinite(IntEnum):
    """What observing does about NaN and infinities; `enum class NonFinite` in C++."""

    IGNORE = 0
    RAISE = 1
    PROPAGATE = 2


class RangeMethod(IntEnum):
    """How a range is chosen from a histogram; `enum class RangeMethod` in C++."""

    MINMAX = 0
    L2 = 1
    MSE = 2
    PERCENTILE = 3
    ENTROPY = 4


NonFinitePolicy = Literal["ignore", "raise", "propagate"]
"""The names by which users choose a policy."""

RangeMethodName = Literal["minmax", "l2", "mse", "percentile", "entropy"]
"""The names by which users choose a method."""

# Plain integers: torch's dispatcher takes 0.5 µs longer to read a member of an enum.
NONFINITE_CODES: dict[str, int] = {policy.name.lower(): policy.value for policy in NonFinite}

RANGE_METHOD_CODES: dict[str, int] = {m.name.lower(): m.value for m in RangeMethod}

SCHEME_CODES: dict[torch.qscheme, int] = {
    torch.per_tensor_affine: Scheme.AFFINE.value,
    torch.per_channel_affine: Scheme.AFFINE.value,
    torch.per_tensor_symmetric: Scheme.SYMMETRIC.value,
    torch.per_channel_symmetric: Scheme.SYMMETRIC.value,
    torch.per_channel_affine_float_qparams: Scheme.FLOAT_QPARAMS.value,
}

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = tuple(qscheme for qscheme in SCHEME_CODES if qscheme not in PER_TENSOR)

# What the ops take as x.
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What histograms can be kept in: counts stall in anything narrower, at 256 in bf16.
WIDE = (torch.float32, torch.float64)

# What observers can choose a scale and zero point for.
QUANTIZED = tuple(
    dict.fromkeys(
        (
            *(QINT8, QUINT8, QUINT4X2, QINT32),
            *(*INT8, *UINT8, *UINT4, torch.int16, *INT32),
            *(torch.float8_e5m2, torch.float8_e4m3fn, torch.uint16),
        )
    )
)
