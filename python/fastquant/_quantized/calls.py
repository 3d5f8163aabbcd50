"""Ops of layers on quantized tensors, called by the cheapest way: from tensors to a tensor.

Where nothing has to see a call, `_C` computes the result without torch's dispatcher, and makes its
tensor in a third of the time that torch takes. Otherwise, or where the arguments are unusual, the
op is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._native import ops
from .._native.fast_calls import (
    fast_calls,
    is_grad_enabled,
    may_skip_dispatcher,
    nothing_intervenes,
)
from .._torch.exporting import refuse_onnx_export
from .tensor import CHANGES_CLASS, QuantizedTensor, check_floating, integers_of, like, made, parts

# No bound of an output. Not infinity, which AOTInductor cannot store.
UNBOUNDED = torch.finfo(torch.float32).max


if fast_calls and CHANGES_CLASS:
    _C.set_up_quantized_calls(QuantizedTensor, torch.empty_strided, {"dtype": torch.float32})


def conv(input: Any, *args: Any) -> Any:
    """The op `quantized_conv` without its arguments of x and dtype; None where only that will do.

    Args: packed_weight, weight_scale, bias, weight_shape, stride, padding, dilation, groups, scale,
        zero_point, low, high.
    """
    return _C.quantized_conv(input, *args) if nothing_intervenes() else None


def conv_transpose(input: Any, *args: Any) -> Any:
    """The op `quantized_conv_transpose` without its arguments of x and dtype; None as above.

    Args: packed_weight, weight_scale, bias, weight_shape, stride, padding, output_padding,
        dilation, groups, scale, zero_point, low, high.
    """
    return _C.quantized_conv_transpose(input, *args) if nothing_intervenes() else None


def linear(input: Any, *args: Any) -> Any:
    """The op `quantized_linear` without its arguments of x and dtype; None as above.

    Args: in_features, which x must have; packed_weight, weight_scale, bias, out_features, scale,
        zero_point, low, high.
    """
    return _C.quantized_linear(input, *args) if nothing_intervenes() else None


def dynamic_linear(x: Any, *args: Any) -> Any:
    """The op `dynamic_linear`; None where only that will do, or x has not that many features.

    Args: in_features, then the op's after x.
    """
    if may_skip_dispatcher(x) and not (x.requires_grad and is_grad_enabled()):
        return _C.dynamic_linear(x, *args)
    return None


def add(x: Any, y: Any, scale: float, zero_point: int, low: float, high: float) -> QuantizedTensor:
    """clamp(x + y, low, high)"""
    if nothing_intervenes():
        result: QuantizedTensor | None = _C.quantized_add(x, y, scale, zero_point, low, high)
        if result is not None:
            return result
    values = ops.quantized_add(*parts(x, "x"), *parts(y, "y"), scale, zero_point, low, high)
    return made(values, scale, zero_point)


def mul(x: Any, y: Any, scale: float, zero_point: int, low: float, high: float) -> QuantizedTensor:
    """clamp(x * y, low, high)"""
    if nothing_intervenes():
        result: QuantizedTensor | None = _C.quantized_mul(x, y, scale, zero_point, low, high)
        if result is not None:
            return result
    values = ops.quantized_mul(*parts(x, "x"), *parts(y, "y"), scale, zero_point, low, high)
    return made(values, scale, zero_point)


def cat_without_op(tensors: Sequence[Any], *args: Any) -> Any:
    """`cat`; None where the op has to be called, or the tensors cannot be joined."""
    return _C.quantized_cat(tensors, *args) if nothing_intervenes() else None


def cat(
    tensors: Sequence[Any], dim: int, scale: float, zero_point: int, low: float, high: float
) -> QuantizedTensor:
    """clamp(torch.cat(tensors, dim), low, high)"""
    result: QuantizedTensor | None = cat_without_op(tensors, dim, scale, zero_point, low, high)
    if result is not None:
        return result
    given = [parts(x, f"tensors[{i}]") for i, x in enumerate(tensors)]
    values, scales, zero_points = (list(each) for each in zip(*given, strict=True))
    joined = ops.quantized_cat(values, scales, zero_points, dim, scale, zero_point, low, high)
    return made(joined, scale, zero_point)


def lookup(input: Any, table: Tensor, scale: float, zero_point: int) -> QuantizedTensor:
    """What a table has for each element: integers with this scale and zero point."""
    if nothing_intervenes():
        result: QuantizedTensor | None = _C.lookup(input, table, scale, zero_point)
        if result is not None:
            return result
    return made(ops.lookup(parts(input)[0], table), scale, zero_point)


def clamp(input: Any, lowest: int, highest: int, inplace: bool) -> QuantizedTensor:
    """The integers limited to [lowest, highest], with the scale and zero point of the input."""
    if nothing_intervenes():
        result: QuantizedTensor | None = _C.quantized_clamp(input, lowest, highest, inplace)
        if result is not None:
            return result
    values = integers_of(input)
    highest = min(highest, torch.iinfo(values.dtype).max)
    if inplace:
        values.clamp_(lowest, highest)
        return input  # type: ignore[no-any-return]
    return like(input, values.clamp(lowest, highest))


def quantize(input: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> QuantizedTensor:
    """input as integers; with its channels last, if it has three to five dimensions."""
    if nothing_intervenes():
        result: QuantizedTensor | None = _C.quantize(input, scale, zero_point, dtype == torch.int8)
        if result is not None:
            return result
    refuse_onnx_export()
    check_floating(input)
    return made(ops.quantize(input, scale, zero_point, dtype, True), scale, zero_point)


def dequantize(input: Any) -> Tensor:
    """The real numbers, in fp32."""
    if nothing_intervenes():
        real: Tensor | None = _C.dequantize(input)
        if real is not None:
            return real
    return ops.dequantize(*parts(input), torch.float32)  # type: ignore[no-any-return]


def max_pool(input: Any, *args: Any) -> Any:
    """The op `quantized_max_pool`; None where only that will do.

    Args: the number of dimensions, then torch's, each one number or one for each dimension.
    """
    return _C.quantized_max_pool(input, *args) if nothing_intervenes() else None


def avg_pool(input: Any, *args: Any) -> Any:
    """The op `quantized_avg_pool`, whose zero point is that of the input; the same."""
    return _C.quantized_avg_pool(input, *args) if nothing_intervenes() else None


def adaptive_avg_pool(input: Any, *args: Any) -> Any:
    """The op `quantized_adaptive_avg_pool`; the same."""
    return _C.quantized_adaptive_avg_pool(input, *args) if nothing_intervenes() else None


def embedding(packed: Tensor, dim: int, bits: int, indices: Any) -> Tensor | None:
    """The op `quantized_embedding`; None where only that will do."""
    if not nothing_intervenes() or type(indices) is not Tensor:
        return None
    y = torch.empty((*indices.shape, dim), dtype=torch.float32, device="cpu")
    return y if _C.quantized_embedding(packed, dim, bits, indices, y) else None


def embedding_bag(
    packed: Tensor,
    dim: int,
    bits: int,
    indices: Any,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mapping: Tensor | None,
    mode: int,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor | None:
    """The op `quantized_embedding_bag`; None as above."""
    if not nothing_intervenes() or not isinstance(indices, Tensor):
        return None
    if per_sample_weights is not None and per_sample_weights.is_neg():
        return None
    bags = (indices if offsets is None else offsets).shape
    if not bags:
        return None
    count = bags[0] - (offsets is not None and include_last_offset)
    y = torch.empty((max(count, 0), dim), dtype=torch.float32, device="cpu")
    done = _C.quantized_embedding_bag(
        *(packed, dim, bits, indices, offsets, per_sample_weights, mapping),
        *(mode, include_last_offset, padding_idx, y),
    )
    return y if done else None
