"""Calls of the ops of linear layers and convolutions on quantized tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from elementwise_calls import DTYPES, INF, Call, bounds, random_bytes, zero_points
from fastquant._native import ops
from fastquant._native.reference import OPS
from strategies import seeds

OUTPUTS = (torch.uint8, torch.int8, torch.float32, torch.bfloat16)


def random_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    """Weights of all sizes, the least and the greatest included."""
    return random_bytes(shape, torch.int8, seed)


def weight_scales(channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=generator) * 0.01 + 1e-4


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Tensor, float, int]:
    """Values of eight bits or of seven, for which some instruction sets have other kernels."""
    dtype, eight = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    x = random_bytes(shape, dtype, draw(seeds))
    if not eight:
        x = x // 2 if dtype == torch.uint8 else x.bitwise_or(-128)
    return x, 0.02, draw(zero_points(dtype)) if eight else torch.iinfo(dtype).min + 100


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Any, ...]:
    """Scale, zero point, bounds and dtype of an output."""
    dtype = draw(st.sampled_from(OUTPUTS))
    zero_point = draw(zero_points(dtype)) if dtype in DTYPES else 0
    return draw(st.sampled_from([0.5, 3.7, 20.0])), zero_point, *draw(bounds), dtype


@st.composite
def scales_of_layer(draw: st.DrawFn, channels: int) -> tuple[Tensor, Tensor | None]:
    """Scales of the weights, for all channels or for each, and a bias."""
    seed = draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(channels, generator=generator) if draw(st.booleans()) else None
    return weight_scales(draw(st.sampled_from([1, channels])), seed), bias


@st.composite
def linears(draw: st.DrawFn) -> Call:
    inputs = draw(st.sampled_from([1, 3, 4, 16, 17, 70, 256]))
    channels = draw(st.sampled_from([1, 3, 16, 17, 40, 64, 100, 130]))
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 5), (7,), (30,)]))
    x, *quantization = draw(values((*leading, inputs)))
    packed = OPS["pack_weight"](random_weight((channels, inputs), draw(seeds)), 1, False)
    scales = draw(scales_of_layer(channels))
    return "quantized_linear", (x, *quantization, packed, *scales, channels, *draw(outputs()))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with the same values in another place: channels last, or a part of a larger tensor."""
    if layout == "channels last":
        return OPS["quantize"](x.float(), 1.0, 0, x.dtype, True)
    if layout == "part":
        return torch.stack([x, x], -1)[..., 1]
    return x


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False) -> Call:
    """In one to three dimensions; dense, grouped and depthwise."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 20]))
    inputs = draw(st.sampled_from([1, 3, 4, 6, 16, 17]))
    channels = draw(st.sampled_from([1, 2, 5, 16, 24, 70]))
    if groups == 20:
        inputs, channels = draw(st.sampled_from([(1, 1), (1, 2), (4, 4), (8, 8), (16, 16), (4, 8)]))

    def sizes(*choices: int) -> list[int]:
        return [draw(st.sampled_from(choices)) for _ in range(dims)]

    kernel = draw(st.sampled_from([[1] * dims, sizes(1, 2, 3, 5), [3] * dims]))
    stride, padding, dilation = sizes(1, 1, 2, 3), sizes(0, 1, 2), sizes(1, 1, 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        spatial = sizes(1, 3, 8)
        full = [(n - 1) * s + r for n, s, r in zip(spatial, stride, reach, strict=True)]
        padding = [min(p, (n - 1) // 2) for p, n in zip(padding, full, strict=True)]
    else:
        least = [r - 2 * p for r, p in zip(reach, padding, strict=True)]
        spatial = [max(a, b, 1) for a, b in zip(least, sizes(1, 4, 9, 13), strict=True)]
    x, *quantization = draw(values((draw(st.integers(1, 2)), groups * inputs, *spatial)))
    x = in_layout(x, draw(st.sampled_from(["contiguous", "channels last", "part"])))
    split = (groups * inputs, channels) if transposed else (groups * channels, inputs)
    shape = (*split, *kernel)
    packed = OPS["pack_weight"](random_weight(shape, draw(seeds)), groups, transposed)
    scales = draw(scales_of_layer(groups * channels))
    geometry: tuple[Any, ...] = (list(shape), stride, padding, dilation, groups)
    if transposed:
        more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        geometry = (list(shape), stride, padding, more, dilation, groups)
    name = "quantized_conv_transpose" if transposed else "quantized_conv"
    return name, (x, *quantization, packed, *scales, *geometry, *draw(outputs()))


layers = st.one_of(linears(), convolutions(), convolutions(), convolutions(transposed=True))


def samples() -> Iterator[Call]:
    """Layers that are large enough for several threads, and for several parts of their input."""
    output = (7.7, 100, 0.0, INF, torch.uint8)
    for rows, inputs, channels in ((1, 1024, 1000), (70, 515, 330), (300, 260, 40)):
        x = random_bytes((rows, inputs), torch.uint8, 0)
        packed = ops.pack_weight(random_weight((channels, inputs), 1), 1, False)
        scales = (weight_scales(channels, 2), torch.ones(channels))
        yield "quantized_linear", (x, 0.02, 120, packed, *scales, channels, *output)
    for size, shape, stride, groups in (
        (56, (64, 64, 3, 3), 1, 1),
        (7, (520, 130, 3, 3), 1, 1),
        (96, (32, 3, 3, 3), 2, 1),
        (97, (64, 3, 7, 7), 2, 1),
        (56, (130, 58, 1, 1), 1, 1),
        (28, (96, 24, 3, 3), 1, 4),
        (56, (96, 1, 3, 3), 1, 96),
        (28, (80, 4, 3, 3), 1, 20),
        (28, (144, 8, 3, 3), 2, 18),
        (14, (112, 16, 3, 3), 1, 7),
    ):
        x = random_bytes((2, shape[1] * groups, size, size), torch.uint8, 0)
        x = x.to(memory_format=torch.channels_last)
        packed = ops.pack_weight(random_weight(shape, 1), groups, False)
        scales = (weight_scales(shape[0], 2), torch.ones(shape[0]))
        sizes = ([n, n] for n in (stride, shape[-1] // 2, 1))
        geometry = (list(shape), *sizes, groups)
        yield "quantized_conv", (x, 0.02, 120, packed, *scales, *geometry, *output)
