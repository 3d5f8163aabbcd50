"""Layers on quantized tensors: ordinary uint8 or int8 tensors with a scale and a zero point.

`real = (q - zero_point) * scale`. Products and sums of integers are exact; what follows them is
computed in fp32, each operation rounded once, so that kernels give the same integers. Outputs
saturate at the limits of their dtype; `low` and `high` bound them in real units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .basics import _check

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_last(x: Tensor) -> Tensor:
    """x with the strides of channels last, which torch lacks for one spatial dimension."""
    if x.dim() == 3:
        return _channels_last(x.unsqueeze(2)).squeeze(2)
    if x.dim() not in _LAST:
        return x.contiguous()
    # Not x.contiguous, which keeps any strides of dimensions of size 1.
    return torch.empty_like(x, memory_format=_LAST[x.dim()]).copy_(x)


def levels(
    low: float, high: float, scale: float, zero_point: int, dtype: torch.dtype
) -> tuple[int, int]:
    """The smallest and the largest integer that an output may have."""
    info = torch.iinfo(dtype)

    def level(bound: float) -> int:
        steps = bound / scale
        if math.isinf(steps):
            return info.min if steps < 0 else info.max
        return min(max(round(steps) + zero_point, info.min), info.max)

    return level(low), level(high)


def _requantized(
    y: Tensor, scale: float, zero_point: int, low: float, high: float, dtype: torch.dtype
) -> Tensor:
    """Integers of y, which is in units of scale: rounded half to even, and bounded."""
    lowest, highest = levels(low, high, scale, zero_point, dtype)
    return (y.round().clamp(lowest - zero_point, highest - zero_point) + zero_point).to(dtype)


def _centered(x: Tensor, zero_point: int) -> Tensor:
    _check(x.dtype in (torch.uint8, torch.int8), f"x must be uint8 or int8, got {x.dtype}")
    return x.to(torch.float64) - zero_point


def multiplied_and_added(x: Tensor, factor: Tensor, addend: Tensor | float) -> Tensor:
    """x * factor + addend for fp32 numbers, rounded once to fp32."""
    product = x.to(torch.float64) * factor.to(torch.float64)  # exact
    total = product + addend
    # What rounding this sum left out. If that is something, the last bit is made 1, towards it:
    # then rounding to fp32 cannot find a tie where there is none.
    part = total - product
    left_out = (product - (total - part)) + (addend - part)
    even = total.view(torch.int64) & 1 == 0
    beyond = torch.nextafter(total, torch.copysign(torch.full_like(total, math.inf), left_out))
    inexact = (left_out != 0) & left_out.isfinite()
    return torch.where(inexact & even, beyond, total).to(torch.float32)


def quantize(
    x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    inverse = (1.0 / torch.tensor(scale, dtype=torch.float32)).to(x.device)
    # torch.quantize_per_tensor adds the zero point before it rounds.
    y = multiplied_and_added(x.to(torch.float32), inverse, zero_point)
    info = torch.iinfo(dtype)
    q = y.round().nan_to_num(nan=math.inf).clamp(info.min, info.max)
    q = torch.empty_like(x, dtype=dtype).copy_(q)
    return _channels_last(q) if channels_last else q


def dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return (_centered(x, zero_point).to(torch.float32) * factor).to(dtype)


# The layout of packed weights, which csrc/cpu/quantized/packing.h describes.
_STEP, _LANES, _BLOCK = 4, 16, 64


def _rounded_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _weight_sizes(shape: Sequence[int], groups: int, transposed: bool) -> tuple[int, int, int, int]:
    """Output and input channels of a group, rows of the kernel, and taps in a row."""
    _check(len(shape) >= 2, f"a weight needs 2 dimensions or more, has {len(shape)}")
    _check(
        groups > 0 and shape[0] % groups == 0,
        f"{shape[0]} channels cannot be split into {groups} groups",
    )
    taps = math.prod(shape[2:])
    row_taps = 1 if transposed or len(shape) == 2 else shape[-1]
    channels = shape[0] // groups
    outputs, inputs = (shape[1], channels) if transposed else (channels, shape[1])
    return outputs, inputs, taps // row_taps, row_taps


def _is_depthwise(inputs: int, groups: int) -> bool:
    return groups > 1 and inputs == 1


def pack_weight(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    _check(weight.dtype == torch.int8, f"weight must be int8, got {weight.dtype}")
    outputs, inputs, rows, row_taps = _weight_sizes(weight.shape, groups, transposed)
    if _is_depthwise(inputs, groups):
        channels = groups * outputs
        w = F.pad(weight.reshape(channels, -1).t(), (0, _rounded_up(channels, _LANES) - channels))
        return w.reshape(-1).view(torch.uint8)
    if transposed:
        w = weight.reshape(groups, inputs, outputs, rows, row_taps).permute(0, 2, 3, 4, 1)
    else:
        w = weight.reshape(groups, outputs, inputs, rows, row_taps).permute(0, 1, 3, 4, 2)
    values = row_taps * inputs
    padded = _rounded_up(outputs, _LANES)
    w = F.pad(
        w.reshape(groups, outputs, rows, values),
        (0, _rounded_up(values, _STEP) - values, 0, 0, 0, padded - outputs),
    )
    sums = (
        w.sum(3, dtype=torch.int32).permute(2, 0, 1)
        if transposed
        else w.sum((2, 3), dtype=torch.int32)
    )
    w = w.reshape(groups, padded, -1, _STEP).transpose(1, 2)
    blocks = [block.reshape(groups, -1) for block in torch.split(w, _BLOCK, 2)]
    data = torch.cat(blocks, 1).reshape(-1).view(torch.uint8)
    return torch.cat([data, sums.reshape(-1).view(torch.uint8)])


def unpack_weight(packed: Tensor, shape: Sequence[int], groups: int, transposed: bool) -> Tensor:
    outputs, inputs, rows, row_taps = _weight_sizes(shape, groups, transposed)
    padded, values = _rounded_up(outputs, _LANES), row_taps * inputs
    row = _rounded_up(values, _STEP)
    steps = rows * row // _STEP
    size = groups * padded * steps * _STEP
    depthwise = _is_depthwise(inputs, groups)
    if depthwise:
        channels = groups * outputs
        expected = rows * row_taps * _rounded_up(channels, _LANES)
    else:
        expected = size + 4 * (rows if transposed else 1) * groups * padded
    _check(
        packed.numel() == expected,
        f"packed_weight has {packed.numel()} bytes, needs {expected}",
    )
    weight = packed.new_empty(list(shape), dtype=torch.int8)
    if depthwise:
        w = packed.view(torch.int8).reshape(rows * row_taps, -1)[:, :channels]
        return weight.copy_(w.t().reshape(list(shape)))
    data = packed[:size].view(torch.int8).reshape(groups, -1)
    widths = [min(_BLOCK, padded - first) for first in range(0, padded, _BLOCK)]
    blocks = torch.split(data, [steps * width * _STEP for width in widths], 1)
    w = torch.cat(
        [b.reshape(groups, steps, width, _STEP) for b, width in zip(blocks, widths, strict=True)], 2
    )
    w = w.transpose(1, 2).reshape(groups, padded, rows, row)[:, :outputs, :, :values]
    w = w.reshape(groups, outputs, rows, row_taps, inputs)
    w = w.permute(0, 4, 1, 2, 3) if transposed else w.permute(0, 1, 4, 2, 3)
    return weight.copy_(w.reshape(list(shape)))


def _output(
    acc: Tensor,
    x_scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    channel_axis: int,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:
    """The exact sums `acc`, scaled, with bias, as an output of a layer."""
    shape = [1] * acc.dim()
    shape[channel_axis] = -1
    unit = 1.0 if dtype.is_floating_point else scale
    factor = (weight_scale.to(torch.float64) * (x_scale / unit)).to(torch.float32)
    y = acc.to(torch.float32) * factor.reshape(shape)
    if bias is not None:
        y = y + (bias.to(torch.float64) * (1.0 / unit)).to(torch.float32).reshape(shape)
    if dtype.is_floating_point:
        return y.clamp(low, high).to(dtype)
    return _requantized(y, scale, zero_point, low, high, dtype)


def quantized_linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    *output: Any,
) -> Tensor:
    weight = unpack_weight(packed_weight, (out_features, x.shape[-1]), 1, False)
    acc = _centered(x, x_zero_point) @ weight.to(torch.float64).t()
    return _output(acc, x_scale, weight_scale, bias, -1, *output)


_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Any] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


def quantized_conv(
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
    weight = unpack_weight(packed_weight, weight_shape, groups, False).to(torch.float64)
    acc = _CONVOLUTIONS[x.dim()](
        _centered(x, x_zero_point), weight, None, stride, padding, dilation, groups
    )
    return _channels_last(_output(acc, x_scale, weight_scale, bias, 1, *output))


def quantized_conv_transpose(
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
    weight = unpack_weight(packed_weight, weight_shape, groups, True).to(torch.float64)
    acc = _TRANSPOSED[x.dim()](
        _centered(x, x_zero_point), weight, None, stride, padding, output_padding, groups, dilation
    )
    return _channels_last(_output(acc, x_scale, weight_scale, bias, 1, *output))


def _scaled(x: Tensor, ratio: float) -> Tensor:
    """x, which has whole numbers, times the fp32 value of `ratio`, rounded once.

    The ratio is kept finite: all but 0 is then out of an output's range all the same.
    """
    factor = torch.tensor(min(ratio, 2.0**100), dtype=torch.float32, device=x.device)
    return x.to(torch.float32) * factor


def result_of_two(a: Tensor, b: Tensor) -> Tensor:
    """An uninitialized result of an operation on two tensors, whose shapes are broadcast.

    It lies in memory as the first of the two that has its shape.
    """
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    for x in (a, b):
        if x.shape == shape:
            return torch.empty_like(x, dtype=a.dtype)
    return a.new_empty(shape)


def quantized_add(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
) -> Tensor:
    y = _scaled(_centered(a, a_zero_point), a_scale / scale) + _scaled(
        _centered(b, b_zero_point), b_scale / scale
    )
    return result_of_two(a, b).copy_(_requantized(y, scale, zero_point, low, high, a.dtype))


def quantized_mul(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
) -> Tensor:
    product = _centered(a, a_zero_point) * _centered(b, b_zero_point)
    y = _scaled(product, a_scale * b_scale / scale)
    return result_of_two(a, b).copy_(_requantized(y, scale, zero_point, low, high, a.dtype))


def quantized_cat(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    zero_points: Sequence[int],
    dim: int,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
) -> Tensor:
    parts = []
    for x, x_scale, x_zero_point in zip(tensors, scales, zero_points, strict=True):
        y = _scaled(_centered(x, x_zero_point), x_scale / scale)
        parts.append(_requantized(y, scale, zero_point, low, high, x.dtype))
    return torch.cat(parts, dim)


def lookup(x: Tensor, table: Tensor) -> Tensor:
    _check(table.numel() == 256, f"table must have 256 entries, got {table.numel()}")
    return torch.empty_like(x, dtype=table.dtype).copy_(table[x.view(torch.uint8).long()])


MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG_POOLS: dict[int, Any] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def as_pooled(x: Tensor, y: Tensor, dims: int) -> Tensor:
    """y with the dtype of x, and with channels last if x has a dimension of images."""
    y = y.to(x.dtype)
    return _channels_last(y) if x.dim() == dims + 2 else y.contiguous()


def quantized_max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    dims = len(kernel_size)
    y = MAX_POOLS[dims](x.to(torch.float32), kernel_size, stride, padding, dilation, ceil_mode)
    # A window of padding alone has no largest element.
    return as_pooled(x, y.clamp(min=torch.iinfo(x.dtype).min), dims)


def quantized_avg_pool(
    x: Tensor,
    x_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    dims = len(kernel_size)
    sizes = [list(kernel_size), list(stride), list(padding)]
    values = _centered(x, x_zero_point)
    if dims == 1:  # avg_pool1d knows no divisor_override
        values = values.unsqueeze(-2)
        sizes = [[1, *sizes[0]], [1, *sizes[1]], [0, *sizes[2]]]
    pool = _AVG_POOLS[max(dims, 2)]
    y = pool(values, *sizes, ceil_mode, count_include_pad, divisor_override).to(torch.float32)
    if dims == 1:
        y = y.squeeze(-2)
    q = _requantized(y, 1.0, x_zero_point, -math.inf, math.inf, x.dtype)
    return as_pooled(x, q, dims)


def _rounded_mean(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(torch.float32).round().to(dtype)


def quantized_adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    dims = len(output_size)
    y = _ADAPTIVE_AVG_POOLS[dims](x.to(torch.float64), list(output_size))
    return as_pooled(x, _rounded_mean(y, x.dtype), dims)


def quantized_mean(x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    y = x.to(torch.float64).mean(list(dim) or None, keepdim)
    return _rounded_mean(y, x.dtype).contiguous()


NEAREST, NEAREST_EXACT, LINEAR = range(3)  # modes of quantized_interpolate


def nearest(size: int, outputs: int, ratio: float, mode: int, device: torch.device) -> Tensor:
    """Which pixel each output takes, found in fp32 as torch does."""
    places = torch.arange(outputs, dtype=torch.float32, device=device)
    if mode == NEAREST_EXACT:
        places = places + 0.5
    found = places * torch.tensor(ratio, dtype=torch.float32, device=device)
    return found.to(torch.int64).clamp(max=size - 1)


def _linear(
    size: int, outputs: int, ratio: float, align_corners: bool, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The two pixels that each output takes, and their weights."""
    places = torch.arange(outputs, dtype=torch.float64, device=device)
    at = places * ratio if align_corners else ((places + 0.5) * ratio - 0.5).clamp(min=0.0)
    left = at.to(torch.int64).clamp(max=size - 1)
    part = (at - left).clamp(0.0, 1.0)
    weights = ((1.0 - part).to(torch.float32), part.to(torch.float32))
    return list(zip((left, (left + 1).clamp(max=size - 1)), weights, strict=True))


def as_resized(x: Tensor, y: Tensor, dims: int) -> Tensor:
    """y with the dtype of x; contiguous if x is, else as pools return it."""
    return y.to(x.dtype).contiguous() if x.is_contiguous() else as_pooled(x, y, dims)


def quantized_interpolate(
    x: Tensor, output_size: Sequence[int], ratios: Sequence[float], mode: int, align_corners: bool
) -> Tensor:
    dims = len(output_size)
    axes = range(x.dim() - dims, x.dim())
    given = list(zip(axes, output_size, ratios, strict=True))
    if mode != LINEAR:
        y = x
        for axis, outputs, ratio in given:
            y = y.index_select(axis, nearest(x.shape[axis], outputs, ratio, mode, x.device))
        return as_resized(x, y, dims)
    places = [_linear(x.shape[d], n, ratio, align_corners, x.device) for d, n, ratio in given]
    values = x.to(torch.float32)
    total = None
    for rows in itertools.product(*places[:-1]):
        row, weight = values, torch.ones((), device=x.device)
        for axis, (index, of_row) in zip(axes, rows, strict=False):
            row = row.index_select(axis, index)
            weight = weight * of_row.reshape([-1] + [1] * (x.dim() - 1 - axis))
        left, right = (row.index_select(-1, index) * w for index, w in places[-1])
        mixed = (left + right) * weight
        total = mixed if total is None else total + mixed
    assert total is not None
    return as_resized(x, total.round(), dims)


QUANTIZED_OPS = (
    quantize,
    dequantize,
    pack_weight,
    unpack_weight,
    quantized_linear,
    quantized_conv,
    quantized_conv_transpose,
    quantized_add,
    quantized_mul,
    quantized_cat,
    lookup,
    quantized_max_pool,
    quantized_avg_pool,
    quantized_adaptive_avg_pool,
    quantized_mean,
    quantized_interpolate,
)
