"""Pooling and means of quantized tensors, which keep scale and zero point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import ops
from . import calls
from .tensor import (
    Handler,
    QuantizedTensor,
    functions_named,
    handles,
    integers_of,
    like,
    not_supported,
)


def _tuple(value: Any, dims: int) -> list[int]:
    """One number for each dimension."""
    if not isinstance(value, (list, tuple)):
        return [value] * dims
    if len(value) not in (1, dims):
        raise ValueError(
            f"pooling along {dims} dimensions takes one number or {dims}, got {tuple(value)}"
        )
    return list(value) * dims if len(value) == 1 else list(value)


def _pooled(op: ops.Op, input: Any, dims: int, *args: Any) -> QuantizedTensor:
    """What an op of pooling makes of the input, which may lack the dimension of the batch."""
    values = integers_of(input)
    if values.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"pooling along {dims} dimensions takes a tensor with {dims + 1} or {dims + 2}, got "
            f"one of shape {list(values.shape)}"
        )
    return like(input, op(values, *args))


def _max_pool(dims: int) -> Handler:
    function = getattr(F, f"max_pool{dims}d")

    def pool(
        input: QuantizedTensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> QuantizedTensor:
        if return_indices:
            raise not_supported(function, " with return_indices=True")
        y: QuantizedTensor | None
        y = calls.max_pool(input, dims, kernel_size, stride, padding, dilation, ceil_mode)
        if y is not None:
            return y
        size = _tuple(kernel_size, dims)
        steps = _tuple(stride, dims) if stride or stride == 0 else size
        spans = (size, steps, _tuple(padding, dims), _tuple(dilation, dims))
        return _pooled(ops.quantized_max_pool, input, dims, *spans, ceil_mode)

    return pool


def _avg_pool(dims: int) -> Handler:
    def pool(
        input: QuantizedTensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> QuantizedTensor:
        rest = (ceil_mode, count_include_pad, divisor_override)
        y: QuantizedTensor | None = calls.avg_pool(input, dims, kernel_size, stride, padding, *rest)
        if y is not None:
            return y
        size = _tuple(kernel_size, dims)
        steps = _tuple(stride, dims) if stride or stride == 0 else size
        spans = (size, steps, _tuple(padding, dims))
        op = ops.quantized_avg_pool
        return _pooled(op, input, dims, input._zero_point, *spans, *rest)

    return pool


def _adaptive_avg_pool(dims: int) -> Handler:
    def pool(input: QuantizedTensor, output_size: Any) -> QuantizedTensor:
        y: QuantizedTensor | None = calls.adaptive_avg_pool(input, dims, output_size)
        if y is not None:
            return y
        sizes = _tuple(output_size, dims)
        if None in sizes:
            whole = input.shape[-dims:]
            sizes = [n if size is None else size for size, n in zip(sizes, whole, strict=True)]
        return _pooled(ops.quantized_adaptive_avg_pool, input, dims, sizes)

    return pool


for _dims in (1, 2, 3):
    # torch.compile sees the function behind F.max_pool2d, which has two, one with indices.
    handles(*functions_named(f"max_pool{_dims}d"), getattr(F, f"_max_pool{_dims}d"))(
        _max_pool(_dims)
    )
    handles(*functions_named(f"avg_pool{_dims}d"))(_avg_pool(_dims))
    handles(*functions_named(f"adaptive_avg_pool{_dims}d"))(_adaptive_avg_pool(_dims))


@handles(*functions_named("mean"))
def _mean(
    input: QuantizedTensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    axis: Any = None,
) -> QuantizedTensor:
    if dtype is not None:
        raise not_supported(Tensor.mean, f" with dtype={dtype}")
    dim = axis if dim is None else dim
    dims = list(range(input.dim())) if dim is None or dim == () else dim
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len({d % max(input.dim(), 1) for d in dims}) < len(dims):
        raise ValueError(f"dim must name each dimension once, got {dim}")
    return like(input, ops.quantized_mean(integers_of(input), dims, keepdim))


@handles(*functions_named("std"))
def _std(input: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    y = torch.std(input.dequantize(), *args, **kwargs)
    values = ops.quantize(y, input._scale, input._zero_point, input.dtype, False)
    return like(input, values)
