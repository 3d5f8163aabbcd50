"""What the ops of quantized layers return where tensors have no values, for compilers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference.quantized import (
    MAX_POOLS,
    _channels_last,
    as_pooled,
    as_resized,
    pack_weight,
    result_of_two,
)


def _quantize(
    x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    q = torch.empty_like(x, dtype=dtype)
    return _channels_last(q) if channels_last else q


def _dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _pack_weight(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    # The size of the packed weight depends on nothing but the shape.
    return torch.empty_like(pack_weight(weight, groups, transposed))


def _unpack_weight(packed: Tensor, shape: Sequence[int], groups: int, transposed: bool) -> Tensor:
    return packed.new_empty(list(shape), dtype=torch.int8)


def _linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    *output: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=output[-1])


def _conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *output: Any,
) -> Tensor:
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return _channels_last(x.new_empty((x.shape[0], weight_shape[0], *sizes), dtype=output[-1]))


def _conv_transpose(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *output: Any,
) -> Tensor:
    sizes = [
        (size - 1) * s - 2 * p + d * (k - 1) + more + 1
        for size, k, s, p, more, d in zip(
            x.shape[2:], weight_shape[2:], stride, padding, output_padding, dilation, strict=True
        )
    ]
    channels = weight_shape[1] * groups
    return _channels_last(x.new_empty((x.shape[0], channels, *sizes), dtype=output[-1]))


def _binary(a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, *_: Any) -> Tensor:
    return result_of_two(a, b)


def _cat(tensors: Sequence[Tensor], scales: Any, zero_points: Any, dim: int, *_: Any) -> Tensor:
    return torch.cat(list(tensors), dim)


def _lookup(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=table.dtype)


def _max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    values = x.new_empty(x.shape, dtype=torch.float32)
    pool = MAX_POOLS[len(kernel_size)]
    y = pool(values, kernel_size, stride, padding, dilation, ceil_mode)
    return as_pooled(x, y, len(kernel_size))


def _avg_pool(
    x: Tensor,
    x_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    *_: Any,
) -> Tensor:
    values = x.new_empty(x.shape, dtype=torch.float32)
    pools: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
    y = pools[len(kernel_size)](values, kernel_size, stride, padding, ceil_mode)
    return as_pooled(x, y, len(kernel_size))


def _adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    kept = x.shape[: x.dim() - len(output_size)]
    return as_pooled(x, x.new_empty((*kept, *output_size)), len(output_size))


def _mean(x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    y = x.new_empty(x.shape, dtype=torch.float32).mean(list(dim) or None, keepdim)
    return x.new_empty(y.shape)


def _interpolate(x: Tensor, output_size: Sequence[int], *_: Any) -> Tensor:
    kept = x.shape[: x.dim() - len(output_size)]
    return as_resized(x, x.new_empty((*kept, *output_size)), len(output_size))


def _norm_of_channels(x: Tensor, *_: Any) -> Tensor:
    return _channels_last(torch.empty_like(x))


def _layer_norm(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _softmax(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _dynamic_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    *_: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _half_linear(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None, out_features: int, *_: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _dynamic_conv(x: Tensor, *args: Any) -> Tensor:
    return _conv(x, 1.0, 0, *args[:-1], x.dtype)


def _dynamic_conv_transpose(x: Tensor, *args: Any) -> Tensor:
    return _conv_transpose(x, 1.0, 0, *args[:-1], x.dtype)


def _lstm(x: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor, *_: Any) -> Any:
    return *_gru(x, batch_sizes, h), c.new_empty(c.shape)


def _gru(x: Tensor, batch_sizes: Tensor | None, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], h.shape[1])), h.new_empty(h.shape)


def _embedding(packed: Tensor, dim: int, bits: int, indices: Tensor) -> Tensor:
    return packed.new_empty((*indices.shape, dim), dtype=torch.float32)


def _embedding_bag(
    packed: Tensor,
    dim: int,
    bits: int,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mapping: Tensor | None,
    mode: int,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return packed.new_empty((bags, dim), dtype=torch.float32)


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "pack_weight": _pack_weight,
    "unpack_weight": _unpack_weight,
    "quantized_linear": _linear,
    "quantized_conv": _conv,
    "quantized_conv_transpose": _conv_transpose,
    "quantized_add": _binary,
    "quantized_mul": _binary,
    "quantized_cat": _cat,
    "lookup": _lookup,
    "quantized_max_pool": _max_pool,
    "quantized_avg_pool": _avg_pool,
    "quantized_adaptive_avg_pool": _adaptive_avg_pool,
    "quantized_mean": _mean,
    "quantized_interpolate": _interpolate,
    "quantized_batch_norm": _norm_of_channels,
    "quantized_group_norm": _norm_of_channels,
    "quantized_layer_norm": _layer_norm,
    "quantized_softmax": _softmax,
    "dynamic_linear": _dynamic_linear,
    "half_linear": _half_linear,
    "dynamic_conv": _dynamic_conv,
    "dynamic_conv_transpose": _dynamic_conv_transpose,
    "dynamic_lstm": _lstm,
    "dynamic_gru": _gru,
    "quantized_embedding": _embedding,
    "quantized_embedding_bag": _embedding_bag,
}
