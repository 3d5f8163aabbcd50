"""The ops quantize and dequantize of the namespace `quantized_decomposed`, in which exported
programs say what is quantized: whoever has registered them, else this file.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import Library

from . import ao, private

_SCHEMAS = {
    "quantize_per_tensor": "(Tensor input, float scale, int zero_point, int quant_min, "
    "int quant_max, ScalarType dtype) -> Tensor",
    "dequantize_per_tensor": "(Tensor input, float scale, int zero_point, int quant_min, "
    "int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
    "quantize_per_channel": "(Tensor input, Tensor scales, Tensor zero_points, int axis, "
    "int quant_min, int quant_max, ScalarType dtype) -> Tensor",
    "dequantize_per_channel": "(Tensor input, Tensor scales, Tensor? zero_points, int axis, "
    "int quant_min, int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
}


def _quantize_per_tensor(
    input: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    levels = torch.round(input.to(torch.float32) * (1.0 / scale)) + zero_point
    return levels.clamp(quant_min, quant_max).to(dtype)


def _dequantize_per_tensor(
    input: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    return (input.to(out_dtype) - zero_point) * scale


def _along(axis: int, x: Tensor) -> list[int]:
    """The shape in which one value for each channel is broadcast over x."""
    return [-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())]


def _quantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = _along(axis, input)
    levels = torch.round(input.to(torch.float32) * (1.0 / scales.reshape(shape)))
    return (levels + zero_points.reshape(shape)).clamp(quant_min, quant_max).to(dtype)


def _dequantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    shape = _along(axis, input)
    levels = input.to(out_dtype)
    if zero_points is not None:
        levels = levels - zero_points.reshape(shape)
    return (levels * scales.reshape(shape)).to(out_dtype)


IMPLEMENTATIONS = {
    "quantize_per_tensor": _quantize_per_tensor,
    "dequantize_per_tensor": _dequantize_per_tensor,
    "quantize_per_channel": _quantize_per_channel,
    "dequantize_per_channel": _dequantize_per_channel,
}


def _are_registered() -> bool:
    namespace = torch.ops.quantized_decomposed
    return all(hasattr(namespace, name) for name in _SCHEMAS)


def _registered_elsewhere() -> bool:
    """Whether torch registers the ops when it is asked to: with torch.ao, or with Inductor."""
    if _are_registered():
        return True
    for register in (ao.register_decomposed_ops, private.register_decomposed_ops):
        try:
            register()
        except ImportError:
            continue
        if _are_registered():
            return True
    return False


@cache
def own_library() -> Library:
    """A library that defines the ops, for a torch that has none."""
    library: Any = cast(Any, Library)("quantized_decomposed", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, IMPLEMENTATIONS[name], "CompositeExplicitAutograd")
    return library  # type: ignore[no-any-return]


@cache
def ops() -> Any:
    """The namespace `torch.ops.quantized_decomposed`, with its ops."""
    if not _registered_elsewhere():
        own_library()
    return torch.ops.quantized_decomposed
