"""Norms and softmax of quantized tensors.

Statistics come from exact sums of integers. Elements are normalized in fp32, each operation
rounded once, with numbers that are computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .basics import _check
from .quantized import _centered, _channels_last, _requantized


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel of each image, or per channel, for the elements of x."""
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def _affine(weight: Tensor | None, bias: Tensor | None, count: int, x: Tensor) -> list[Tensor]:
    given = zip((weight, bias), (1.0, 0.0), strict=True)
    return [
        x.new_full((count,), otherwise, dtype=torch.float64) if t is None else t.to(torch.float64)
        for t, otherwise in given
    ]


def quantized_batch_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
) -> Tensor:
    w, b = _affine(weight, bias, x.shape[1], x)
    slope = w / (running_var.to(torch.float64) + eps).sqrt()
    gain = (slope * x_scale / scale).to(torch.float32)
    shift = ((b - running_mean.to(torch.float64) * slope) / scale).to(torch.float32)
    y = _centered(x, x_zero_point).to(torch.float32) * _spread(gain, x) + _spread(shift, x)
    return _channels_last(_requantized(y, scale, zero_point, low, high, x.dtype))


def _statistics(values: Tensor, x_scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """The mean of integers along the last dimension, and one over their standard deviation."""
    n = values.shape[-1]
    total, squares = values.sum(-1), (values * values).sum(-1)
    variance = (n * squares - total * total).to(torch.float64) / (float(n) * float(n))
    deviation = (variance * (x_scale * x_scale) + eps).sqrt()
    return total.to(torch.float64) / n, 1.0 / deviation


def _unsigned(x: Tensor, zero_point: int) -> tuple[Tensor, int]:
    """The same integers, counted from the least value of the dtype."""
    least = torch.iinfo(x.dtype).min
    return x.to(torch.int64) - least, zero_point - least


def quantized_group_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
) -> Tensor:
    images, channels = x.shape[:2]
    _check(channels % groups == 0, f"{channels} channels cannot be divided into {groups} groups")
    if x.numel() == 0:
        return _channels_last(torch.empty_like(x))
    values, middle = _unsigned(x, x_zero_point)
    grouped = values.reshape(images, groups, -1)
    mean, inverse = (
        t.repeat_interleave(channels // groups, 1) for t in _statistics(grouped, x_scale, eps)
    )
    w, b = _affine(weight, bias, channels, x)
    slope = w * inverse
    gain = (slope * x_scale / scale).to(torch.float32)
    shift = ((b - (mean - middle) * x_scale * slope) / scale).to(torch.float32)
    y = _centered(x, x_zero_point).to(torch.float32) * _spread(gain, x) + _spread(shift, x)
    return _channels_last(_requantized(y, scale, zero_point, -math.inf, math.inf, x.dtype))


def quantized_layer_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    zero_point: int,
) -> Tensor:
    dims = len(normalized_shape)
    _check(
        0 < dims <= x.dim() and tuple(x.shape[-dims:]) == tuple(normalized_shape),
        "normalized_shape must be the last sizes of x",
    )
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    n = math.prod(normalized_shape)
    values, middle = _unsigned(x, x_zero_point)
    rows = values.reshape(-1, n)
    mean, inverse = (t.unsqueeze(-1) for t in _statistics(rows, x_scale, eps))
    w, b = _affine(
        None if weight is None else weight.reshape(n),
        None if bias is None else bias.reshape(n),
        n,
        x,
    )
    center = (mean - middle).to(torch.float32)
    factor = (inverse * x_scale / scale).to(torch.float32)
    normal = ((rows - middle).to(torch.float32) - center) * factor
    y = normal * w.to(torch.float32) + (b / scale).to(torch.float32)
    q = _requantized(y, scale, zero_point, -math.inf, math.inf, x.dtype)
    return q.reshape(x.shape)


def quantized_softmax(x: Tensor, x_scale: float, dim: int, scale: float, zero_point: int) -> Tensor:
    result = torch.empty_like(x)
    if x.numel() == 0:
        return result
    # The exponentials are whole numbers, so that their sum does not depend on the order.
    steps = torch.arange(256, dtype=torch.float64, device=x.device)
    exponentials = ((-steps * x_scale).exp() * 2.0**30).round().to(torch.int64)
    values = x.to(torch.int64)
    parts = exponentials[values.amax(dim, keepdim=True) - values]
    total = parts.sum(dim, keepdim=True).to(torch.float64)
    y = parts.to(torch.float32) * (1.0 / (total * scale)).to(torch.float32)
    return result.copy_(_requantized(y, scale, zero_point, -math.inf, math.inf, x.dtype))


QUANTIZED_NORMS = (
    quantized_batch_norm,
    quantized_group_norm,
    quantized_layer_norm,
    quantized_softmax,
)
