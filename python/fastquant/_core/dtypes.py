"""Quantized dtypes: `torch.quint8` and the like where this torch has them, plain ones elsewhere.

A config may name either, `torch.quint8` or `torch.uint8`: both mean 8 unsigned bits. What the
package evaluates of these names, it evaluates here, so it works on a torch that has dropped them.
"""

from __future__ import annotations

from typing import Any

import torch

_PLAIN_BY_NAME: dict[str, torch.dtype] = {
    quantized: getattr(torch, plain)
    for quantized, plain in (
        ("quint8", "uint8"),
        ("qint8", "int8"),
        ("qint32", "int32"),
        ("quint4x2", "uint4"),
        ("quint2x4", "uint2"),
    )
}


QUANTIZED_NAMES = tuple(_PLAIN_BY_NAME)


def quantized_dtype(name: str) -> torch.dtype:
    """The dtype `torch.<name>`, such as `quint8`; the plain one where torch has none so called."""
    dtype: torch.dtype = getattr(torch, name, _PLAIN_BY_NAME[name])
    return dtype


QUINT8 = quantized_dtype("quint8")
QINT8 = quantized_dtype("qint8")
QINT32 = quantized_dtype("qint32")
QUINT4X2 = quantized_dtype("quint4x2")
QUINT2X4 = quantized_dtype("quint2x4")

PLAIN: dict[torch.dtype, torch.dtype] = {
    quantized_dtype(name): plain for name, plain in _PLAIN_BY_NAME.items()
}
"""The plain dtype of each quantized one; of itself, where torch has no quantized dtypes."""


def torch_quantized_dtype(dtype: Any) -> Any:
    """The dtype of torch's quantized tensors of these integers; anything else as it is."""
    return _OF_PLAIN.get(dtype, dtype)


# Two bits a value have no ops.
_OF_PLAIN = {plain: quantized for quantized, plain in PLAIN.items() if quantized != QUINT2X4}


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the integers of a quantized dtype; any other dtype as it is."""
    return PLAIN.get(dtype, dtype)


def is_quantized_dtype(dtype: torch.dtype) -> bool:
    """Whether this is the dtype of torch's own quantized tensors: `torch.quint8`, and so on."""
    return plain_dtype(dtype) != dtype


def is_torch_quantized(x: Any) -> bool:
    """Whether `x` is one of torch's own quantized tensors, as from `torch.quantize_per_tensor`."""
    return isinstance(x, torch.Tensor) and bool(getattr(x, "is_quantized", False))


def _names_of(quantized: torch.dtype) -> tuple[torch.dtype, ...]:
    return tuple({quantized: None, plain_dtype(quantized): None})


# The dtypes that mean the same thing.
INT8 = _names_of(QINT8)
UINT8 = _names_of(QUINT8)
INT32 = _names_of(QINT32)
UINT4 = _names_of(QUINT4X2)
UINT2 = _names_of(QUINT2X4)

RANGES: dict[torch.dtype, tuple[int, int]] = {
    **dict.fromkeys(INT8, (-128, 127)),
    **dict.fromkeys(UINT8, (0, 255)),
    **dict.fromkeys(INT32, (-(2**31), 2**31 - 1)),
    **dict.fromkeys(UINT4, (0, 15)),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
}
"""The least and the largest integer of each dtype that has them."""
