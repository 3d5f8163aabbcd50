"""Layers on floating tensors, which they quantize to uint8 by their range at each call.

Scales and zero points are those that torch.ao's dynamic layers choose. NaN and infinities have no
part in a range: the outputs of a row that holds one (of convolutions, of an image) are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..half_weights import unpack_half
from .basics import _check
from .quantized import (
    _channels_last,
    multiplied_and_added,
    quantize,
    quantized_conv,
    quantized_conv_transpose,
    quantized_linear,
)

# torch's smallest scale, which is fp32.
_LEAST_SCALE = torch.tensor(6.1e-5)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _inverse_is_infinite(scale: float) -> bool:
    return bool((1.0 / torch.tensor(scale, dtype=torch.float32)).isinf())


def dynamic_qparams(low: float, high: float, reduce_range: bool) -> tuple[float, int]:
    """The scale and zero point for uint8; with `reduce_range`, for its lower half."""
    levels = 127 if reduce_range else 255
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / levels
    if _inverse_is_infinite(scale):
        scale = 0.1
    least = float(_LEAST_SCALE)
    if scale < least:
        amplifier = float(_LEAST_SCALE / torch.tensor(scale, dtype=torch.float32))
        scale = least
        if low == 0.0:
            high = _fp32(least * levels)
        elif high == 0.0:
            low = -_fp32(least * levels)
        else:
            low, high = _fp32(low * amplifier), _fp32(high * amplifier)
    from_low, from_high = -low / scale, levels - high / scale
    zero_point = from_low if -abs(low / scale) < levels - abs(high / scale) else from_high
    return scale, round(min(max(zero_point, 0.0), float(levels)))


def _quantized(x: Tensor, reduce_range: bool) -> tuple[Tensor, float, int]:
    _check(x.is_floating_point(), "x must be a floating tensor")
    if x.dtype == torch.float64:
        x = x.to(torch.float32)
    finite = x[x.isfinite()]
    low, high = (float(v) for v in finite.aminmax()) if finite.numel() else (0.0, 0.0)
    scale, zero_point = dynamic_qparams(low, high, reduce_range)
    return quantize(x, scale, zero_point, torch.uint8, False), scale, zero_point


def _dynamic(
    layer: Callable[..., Tensor],
    x: Tensor,
    sample_dims: int,
    args: tuple[Any, ...],
    relu: bool,
    reduce_range: bool,
) -> Tensor:
    """The floating output of a layer on quantized tensors.

    Args:
        layer: takes x, scale, zero point, args, and what its output shall be.
        x: floating.
        sample_dims: so many dimensions of a sample come last.
        args: weight and settings.
        relu: whether negative outputs become 0.
        reduce_range: as for `dynamic_qparams`.
    """
    bf16 = x.dtype == torch.bfloat16
    low = 0.0 if relu else -math.inf
    output = (1.0, 0, low, math.inf, torch.bfloat16 if bf16 else torch.float32)
    y = layer(*_quantized(x, reduce_range), *args, *output)
    dims = tuple(range(-sample_dims, 0))
    infinite = ~x.to(torch.float32).isfinite()
    return torch.where(infinite.any(dims, keepdim=True), math.nan, y).to(x.dtype)


def dynamic_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    relu: bool,
    reduce_range: bool,
) -> Tensor:
    args = (packed_weight, weight_scale, bias, out_features)
    return _dynamic(quantized_linear, x, 1, args, relu, reduce_range)


def half_linear(
    x: Tensor, packed_weight: Tensor, bias: Tensor | None, out_features: int, relu: bool
) -> Tensor:
    """A float16 weight on fp32 rows: products are added one after the other, each rounded once."""
    _check(
        x.dtype == torch.float32 and packed_weight.dtype == torch.float16,
        "x must be fp32, packed_weight fp16",
    )
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weight = unpack_half(packed_weight, out_features).float()
    y = x.new_zeros((rows.shape[0], out_features))
    for k in range(rows.shape[1]):
        y = multiplied_and_added(rows[:, k, None], weight[:, k], y)
    y = y + (0.0 if bias is None else bias)
    y = torch.where(y < 0, 0.0, y) if relu else y
    return y.reshape(*x.shape[:-1], out_features)


def dynamic_conv(x: Tensor, *args: Any) -> Tensor:
    y = _dynamic(quantized_conv, x, x.dim() - 1, args[:-1], False, args[-1])
    return _channels_last(y)


def dynamic_conv_transpose(x: Tensor, *args: Any) -> Tensor:
    y = _dynamic(quantized_conv_transpose, x, x.dim() - 1, args[:-1], False, args[-1])
    return _channels_last(y)


# --- recurrent layers -----------------------------------------------------------------------------

# Of x^2, the lowest power first: x * P(x^2) / Q(x^2) is tanh(x) up to 9.02, where fp32 has 1.
_P = ("0x1p0", "0x1.120442p-3", "0x1.c9f856p-9", "0x1.59555ep-16", "0x1.c9a3c2p-27")
_Q = ("0x1p0", "0x1.de576ap-2", "0x1.a7df24p-6", "0x1.5841d8p-12", "0x1.a0b85cp-21")


def _polynomial(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    *rest, last = (float.fromhex(c) for c in coefficients)
    y = torch.full_like(x, last)
    for c in reversed(rest):
        y = multiplied_and_added(y, x, c)
    return y


def _tanh(x: Tensor) -> Tensor:
    """tanh with the kernels' operations, each rounded once."""
    x = x.clamp(-9.02, 9.02)
    square = x * x
    return (x * _polynomial(square, _P) / _polynomial(square, _Q)).clamp(-1.0, 1.0)


def _sigmoid(x: Tensor) -> Tensor:
    half = torch.full_like(x, 0.5)
    return multiplied_and_added(half, _tanh(x * half), half)


def _lstm_cell(from_x: Tensor, from_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    inward, forget, cell, outward = (from_x + from_h).chunk(4, -1)
    c = _sigmoid(forget) * c + _sigmoid(inward) * _tanh(cell)
    return _sigmoid(outward) * _tanh(c), c


def _gru_cell(from_x: Tensor, from_h: Tensor, h: Tensor) -> tuple[Tensor]:
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (
        t.chunk(3, -1) for t in (from_x, from_h)
    )
    candidate = _tanh(new_x + new_h * _sigmoid(reset_x + reset_h))
    return ((h - candidate) * _sigmoid(update_x + update_h) + candidate,)


def _recurrent(
    cell: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Any],
    gates: int,
    reverse: bool,
    reduce_range: bool,
) -> tuple[Tensor, ...]:
    """All hidden states, and the states after each sequence: the input is quantized as a whole."""
    states = [s.clone(memory_format=torch.contiguous_format) for s in states]
    h = states[0]
    width = gates * h.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    counts = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    _check(
        sum(counts) == len(rows)
        and all(a >= b for a, b in zip([len(h), *counts], [*counts, 1], strict=True))
        and (batch_sizes is not None or x.shape[1] == len(h)),
        f"batches of {counts} do not fit x and h",
    )
    settings: Any = (width, False, reduce_range)
    from_x = torch.split(dynamic_linear(rows, *weights[:3], *settings), counts)
    outputs: list[Any] = [None] * len(counts)
    for step in reversed(range(len(counts))) if reverse else range(len(counts)):
        n = counts[step]
        from_h = dynamic_linear(h[:n], *weights[3:], *settings)
        changed = cell(from_x[step], from_h, *(s[:n] for s in states))
        for state, new in zip(states, changed, strict=True):
            state[:n] = new
        outputs[step] = h[:n].clone()
    y = torch.cat(outputs) if outputs else rows.new_empty((0, h.shape[1]))
    return y.reshape(*x.shape[:-1], h.shape[1]), *states


def dynamic_lstm(
    x: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *weights, reverse, reduce_range = args
    return _recurrent(_lstm_cell, x, batch_sizes, (h, c), weights, 4, reverse, reduce_range)


def dynamic_gru(x: Tensor, batch_sizes: Tensor | None, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *weights, reverse, reduce_range = args
    return _recurrent(_gru_cell, x, batch_sizes, (h,), weights, 3, reverse, reduce_range)


DYNAMIC_OPS = (
    dynamic_linear,
    half_linear,
    dynamic_conv,
    dynamic_conv_transpose,
    dynamic_lstm,
    dynamic_gru,
)
