"""Calls of the ops of layers that quantize their input at each call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from elementwise_calls import Call
from fastquant._native import ops
from fastquant._native.half_weights import pack_half
from fastquant._native.reference import OPS
from layer_calls import in_layout, random_weight, scales_of_layer, weight_scales
from strategies import seeds

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("normal", "positive", "negative", "tiny", "huge", "zeros", "nonfinite")


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "positive":
        x = x.abs() + 0.5
    elif kind == "negative":
        x = -x.abs() - 0.5
    elif kind == "tiny":
        x = x * 1e-5
    elif kind == "huge":
        x = x * (1e37 if dtype != torch.float16 else 1e4)
    elif kind == "zeros":
        x = x * 0
    elif kind == "nonfinite":
        x.view(-1)[seed % x.numel()] = (math.nan, math.inf, -math.inf)[seed % 3]
    return x.to(dtype)


def packed(shape: tuple[int, ...], seed: int, groups: int = 1, transposed: bool = False) -> Tensor:
    made: Tensor = OPS["pack_weight"](random_weight(shape, seed), groups, transposed)
    return made


@st.composite
def linears(draw: st.DrawFn) -> Call:
    inputs = draw(st.sampled_from([1, 3, 4, 16, 17, 70, 256]))
    channels = draw(st.sampled_from([1, 3, 16, 17, 40, 64, 100, 130]))
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 5), (7,), (30,)]))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(FLOATS))
    x = values((*leading, inputs), kind, dtype, draw(seeds))
    weight = packed((channels, inputs), draw(seeds))
    flags = (draw(st.booleans()), draw(st.booleans()))
    return "dynamic_linear", (x, weight, *draw(scales_of_layer(channels)), channels, *flags)


@st.composite
def convolutions(draw: st.DrawFn) -> Call:
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2]))
    inputs, channels = draw(st.sampled_from([(1, 2), (3, 5), (4, 16), (17, 20)]))
    kernel, spatial = [draw(st.sampled_from([1, 2, 3]))] * dims, [draw(st.integers(3, 7))] * dims
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(FLOATS))
    x = values((2, groups * inputs, *spatial), kind, dtype, draw(seeds))
    if dtype == torch.float32 and draw(st.booleans()):
        x = in_layout(x, "part")
    elif dims > 1 and draw(st.booleans()):
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        x = x.contiguous(memory_format=last)
    split = (groups * inputs, channels) if transposed else (groups * channels, inputs)
    shape = (*split, *kernel)
    stride, padding = [draw(st.integers(1, 2))] * dims, [draw(st.integers(0, 1))] * dims
    more = [[0] * dims] if transposed else []
    args = (list(shape), stride, padding, *more, [1] * dims, groups, draw(st.booleans()))
    weight = packed(shape, draw(seeds), groups, transposed)
    name = "dynamic_conv_transpose" if transposed else "dynamic_conv"
    return name, (x, weight, *draw(scales_of_layer(groups * channels)), *args)


@st.composite
def half_linears(draw: st.DrawFn) -> Call:
    inputs = draw(st.sampled_from([1, 3, 16, 17, 70, 256]))
    channels = draw(st.sampled_from([1, 3, 4, 17, 40]))
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 5), (9,)]))
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "huge"]))
    x = values((*leading, inputs), kind, torch.float32, draw(seeds))
    weight = values((channels, inputs), "normal", torch.float16, draw(seeds))
    bias = torch.randn(channels) if draw(st.booleans()) else None
    return "half_linear", (x, pack_half(weight), bias, channels, draw(st.booleans()))


def recurrent_args(
    gates: int,
    x: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    hidden: int,
    scales: tuple[Any, Any],
    reverse: bool = False,
    reduce_range: bool = True,
) -> tuple[Any, ...]:
    """Arguments of `dynamic_lstm` (4 gates) or `dynamic_gru` (3)."""
    width, inputs = gates * hidden, x.shape[-1]
    states = [values((batch, hidden), "normal", torch.float32, k) for k in range(gates - 2)]
    of_x, of_h = packed((width, inputs), 1), packed((width, hidden), 2)
    weights = (of_x, *scales[0], of_h, *scales[1])
    return x, batch_sizes, *states, *weights, reverse, reduce_range


@st.composite
def recurrent(draw: st.DrawFn) -> Call:
    gates = draw(st.sampled_from([3, 4]))
    inputs, hidden = draw(st.sampled_from([(1, 1), (3, 5), (20, 16), (17, 33), (8, 40)]))
    counts = sorted(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)), reverse=True)
    is_packed = draw(st.booleans())
    shape = (sum(counts), inputs) if is_packed else (len(counts), counts[0], inputs)
    batch_sizes = torch.tensor(counts) if is_packed else None
    x = values(shape, draw(st.sampled_from(KINDS)), torch.float32, draw(seeds))
    scales = (draw(scales_of_layer(gates * hidden)), draw(scales_of_layer(gates * hidden)))
    flags = (draw(st.booleans()), draw(st.booleans()))
    args = recurrent_args(gates, x, batch_sizes, counts[0], hidden, scales, *flags)
    return ("dynamic_gru", "dynamic_lstm")[gates - 3], args


layers = st.one_of(linears(), half_linears(), convolutions(), recurrent())


def samples() -> Iterator[Call]:
    """Layers that are large enough for several threads, and for several parts of their input."""
    for kind in ("normal", "nonfinite"):
        for rows, inputs, channels in ((1, 1024, 1000), (70, 515, 330), (600, 260, 40)):
            x = values((rows, inputs), kind, torch.float32, 3)
            weight = ops.pack_weight(random_weight((channels, inputs), 1), 1, False)
            scales = (weight_scales(channels, 2), torch.ones(channels))
            yield "dynamic_linear", (x, weight, *scales, channels, False, True)
    for rows, channels in ((1, 1000), (75, 330), (300, 130)):
        x = values((rows, 260), "normal", torch.float32, 3)
        weight = pack_half(values((channels, 260), "normal", torch.float16, 5))
        yield "half_linear", (x, weight, torch.ones(channels), channels, False)
    for gates in (3, 4):
        # What the input gives for the gates is computed for some steps at once.
        x = values((12, 40, 130), "normal", torch.float32, 3)
        scales = (weight_scales(1, 2), torch.ones(gates * 200))
        args = recurrent_args(gates, x, None, 40, 200, (scales, scales), gates == 3)
        yield ("dynamic_gru", "dynamic_lstm")[gates - 3], args
    x = values((3, 64, 56, 56), "normal", torch.float32, 4)
    weight = ops.pack_weight(random_weight((64, 64, 3, 3), 1), 1, False)
    scales = (weight_scales(64, 2), torch.ones(64))
    yield "dynamic_conv", (x, weight, *scales, [64, 64, 3, 3], [1, 1], [1, 1], [1, 1], 1, False)
