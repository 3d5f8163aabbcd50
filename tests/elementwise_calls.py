"""Calls of the elementwise and pooling ops on quantized tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies import FLOATS, LAYOUTS, random_values, seeds, shapes, tensors

Call = tuple[str, tuple[Any, ...]]

INF = math.inf
DTYPES = (torch.uint8, torch.int8)
TORCHS = {torch.uint8: torch.quint8, torch.int8: torch.qint8}
UNBOUNDED = (-INF, INF)

dtypes = st.sampled_from(DTYPES)
bounds = st.sampled_from([UNBOUNDED, UNBOUNDED, (0.0, INF), (0.0, 6.0), (-1.0, 1.0)])
numels = st.sampled_from([200, 3000, 20_000])


def zero_points(dtype: torch.dtype) -> st.SearchStrategy[int]:
    info = torch.iinfo(dtype)
    return st.one_of(
        st.integers(info.min, info.max), st.sampled_from([info.min, info.max, info.max // 2])
    )


# Powers of two make exact ties; of these scales, none is more than 2^7 times another.
scales = st.builds(
    lambda e, m: 2.0**e * m, st.integers(-6, 0), st.sampled_from([1.0, 1.0, 1.1, 1.37])
)


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor."""

    values: Tensor
    scale: float
    zero_point: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.scale, self.zero_point))

    def real(self) -> Tensor:
        return (self.values.to(torch.float64) - self.zero_point) * self.scale

    def torchs(self) -> Tensor:
        """The same as a tensor of a quantized dtype of torch."""
        # What it was quantized from has every value; quantizing gives back each of them.
        scale = torch.tensor(self.scale, dtype=torch.float32).item()
        real = (self.values.to(torch.float32) - self.zero_point) * scale
        q = torch.quantize_per_tensor(real, scale, self.zero_point, TORCHS[self.values.dtype])
        assert torch.equal(q.int_repr(), self.values)
        return q


def random_bytes(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, tuple(shape), dtype=dtype, generator=generator)


@st.composite
def quantized(
    draw: st.DrawFn,
    dtype: torch.dtype,
    shapes: st.SearchStrategy[Sequence[int]],
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> Quantized:
    seed = draw(seeds)
    values = random_bytes(draw(shapes), dtype, seed)
    layout = LAYOUTS[draw(st.sampled_from(layouts))]
    return Quantized(layout(values, seed), draw(scales), draw(zero_points(dtype)))


sizes = numels.flatmap(lambda most: shapes(max_numel=most))
# Images of many channels, few of which fill no vector.
image_shapes = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 15, 16, 17, 64, 65, 130]),
    *[st.integers(1, 12)] * 2,
)
any_sizes = st.one_of(sizes, image_shapes)


@st.composite
def quantize(draw: st.DrawFn) -> Call:
    x = draw(tensors(st.sampled_from(FLOATS), any_sizes, nonfinite=True))
    dtype = draw(dtypes)
    return "quantize", (x, draw(scales), draw(zero_points(dtype)), dtype, draw(st.booleans()))


@st.composite
def dequantize(draw: st.DrawFn) -> Call:
    x = draw(quantized(draw(dtypes), any_sizes))
    return "dequantize", (*x, draw(st.sampled_from(FLOATS)))


@st.composite
def operands(draw: st.DrawFn) -> tuple[Quantized, Quantized]:
    """Two tensors that can be broadcast to one shape."""
    dtype, shape = draw(dtypes), draw(any_sizes)
    pair = []
    for whole in draw(
        st.sampled_from([(True, True), (True, False), (False, True), (False, False)])
    ):
        own = list(shape)
        if not whole:
            own = [draw(st.sampled_from([size, 1])) for size in shape]
            own = own[draw(st.integers(0, len(own))) :]
        pair.append(draw(quantized(dtype, st.just(own))))
    return pair[0], pair[1]


@st.composite
def of_two(draw: st.DrawFn) -> Call:
    a, b = draw(operands())
    name = draw(st.sampled_from(["quantized_add", "quantized_mul"]))
    return name, (*a, *b, draw(scales), draw(zero_points(a.values.dtype)), *draw(bounds))


@st.composite
def cat(draw: st.DrawFn) -> Call:
    dtype = draw(dtypes)
    shape = list(draw(any_sizes.filter(len)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    layouts = [draw(st.sampled_from(tuple(LAYOUTS)))] if draw(st.booleans()) else tuple(LAYOUTS)
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        shape[dim] = draw(st.sampled_from([0, 1, 3, 16, 33]))
        tensors.append(draw(quantized(dtype, st.just(tuple(shape)), layouts)))
    scale, zero_point = draw(scales), draw(zero_points(dtype))
    if draw(st.booleans()):  # the first keeps its integers
        scale, zero_point = tensors[0].scale, tensors[0].zero_point
    values, their_scales, their_zero_points = (
        list(column) for column in zip(*tensors, strict=True)
    )
    return "quantized_cat", (
        values,
        their_scales,
        their_zero_points,
        dim,
        scale,
        zero_point,
        *draw(bounds),
    )


@st.composite
def lookup(draw: st.DrawFn) -> Call:
    x = draw(quantized(draw(dtypes), any_sizes))
    seed, dtype = draw(seeds), draw(st.sampled_from([*DTYPES, torch.float32]))
    if dtype.is_floating_point:
        return "lookup", (x.values, random_values((256,), dtype, seed))
    return "lookup", (x.values, random_bytes((256,), dtype, seed))


@st.composite
def pooled(draw: st.DrawFn, dims: int, with_images: bool | None = None) -> Quantized:
    """A tensor to pool along its last `dims` dimensions."""
    most = {1: 40, 2: 14, 3: 6}[dims]
    shape = [draw(st.integers(2, most)) for _ in range(dims)]
    shape.insert(0, draw(st.sampled_from([1, 3, 16, 31, 64, 70])))
    if with_images or (with_images is None and draw(st.booleans())):
        shape.insert(0, draw(st.integers(1, 3)))
    return draw(quantized(draw(dtypes), st.just(tuple(shape))))


@st.composite
def sliding(draw: st.DrawFn) -> Call:
    """Max and average pooling."""
    dims = draw(st.integers(1, 3))
    x = draw(pooled(dims))
    spatial = x.values.shape[-dims:]
    kernel = [draw(st.integers(1, min(size, 4))) for size in spatial]
    stride = [draw(st.integers(1, 3)) for _ in spatial]
    padding = [draw(st.integers(0, size // 2)) for size in kernel]
    ceil_mode = draw(st.booleans())
    if draw(st.booleans()):
        dilation = [
            draw(st.integers(1, 2)) if d * 2 < size else 1
            for d, size in zip(kernel, spatial, strict=True)
        ]
        return "quantized_max_pool", (x.values, kernel, stride, padding, dilation, ceil_mode)
    divisor = draw(st.sampled_from([None, None, 3, 100]))
    settings = (kernel, stride, padding, ceil_mode, draw(st.booleans()), divisor)
    return "quantized_avg_pool", (x.values, x.zero_point, *settings)


@st.composite
def adaptive(draw: st.DrawFn) -> Call:
    dims = draw(st.integers(1, 3))
    x = draw(pooled(dims))
    output_size = [draw(st.sampled_from([1, 1, 2, 3, 7])) for _ in range(dims)]
    return "quantized_adaptive_avg_pool", (x.values, output_size)


@st.composite
def mean(draw: st.DrawFn) -> Call:
    x = draw(quantized(draw(dtypes), any_sizes.filter(math.prod))).values
    axes = draw(st.lists(st.integers(0, max(x.dim() - 1, 0)), unique=True)) if x.dim() else []
    dim = [axis - x.dim() if draw(st.booleans()) else axis for axis in axes]
    return "quantized_mean", (x, dim, draw(st.booleans()))


def ratio_of(size: int, outputs: int, align_corners: bool, scale: float | None) -> float:
    """How many pixels of the input one of the output stands for."""
    if align_corners:
        return (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    return size / outputs if scale is None else 1 / scale


@st.composite
def interpolate(draw: st.DrawFn) -> Call:
    dims = draw(st.integers(1, 3))
    x = draw(pooled(dims)).values
    align_corners, scaled = draw(st.booleans()), draw(st.booleans())
    outputs, ratios = [], []
    for size in x.shape[-dims:]:
        scale = draw(st.sampled_from([0.4, 1.0, 1.7, 2.0])) if scaled else None
        outputs.append(draw(st.integers(1, 9)) if scale is None else max(int(size * scale), 1))
        ratios.append(ratio_of(size, outputs[-1], align_corners, scale))
    mode = draw(st.integers(0, 2))
    return "quantized_interpolate", (x, outputs, ratios, mode, align_corners)


def _parameters(draw: st.DrawFn, shape: Sequence[int]) -> list[Tensor | None]:
    """A weight and a bias, or neither."""
    if draw(st.booleans()):
        return [None, None]
    seed, dtype = draw(seeds), draw(st.sampled_from([torch.float32, torch.float64]))
    return [random_values(shape, dtype, seed + k) for k in range(2)]


epsilons = st.sampled_from([1e-5, 1e-3])


@st.composite
def norm_of_channels(draw: st.DrawFn) -> Call:
    dtype = draw(dtypes)
    channels = draw(st.sampled_from([1, 2, 6, 16, 33, 64, 70]))
    more = draw(st.lists(st.integers(0, 9), max_size=3))
    x = draw(quantized(dtype, st.just((draw(st.integers(0, 3)), channels, *more))))
    affine = _parameters(draw, (channels,))
    output = (draw(scales), draw(zero_points(dtype)))
    if draw(st.booleans()):
        mean = random_values((channels,), torch.float32, draw(seeds))
        var = random_values((channels,), torch.float32, draw(seeds), "positive")
        settings = (*affine, mean, var, draw(epsilons), *output, *draw(bounds))
        return "quantized_batch_norm", (*x, *settings)
    groups = draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    return "quantized_group_norm", (*x, groups, *affine, draw(epsilons), *output)


@st.composite
def layer_norm(draw: st.DrawFn) -> Call:
    dtype = draw(dtypes)
    x = draw(quantized(dtype, any_sizes.filter(len)))
    shape = list(x.values.shape[-draw(st.integers(1, x.values.dim())) :])
    affine = _parameters(draw, shape)
    output = (draw(scales), draw(zero_points(dtype)))
    return "quantized_layer_norm", (*x, shape, *affine, draw(epsilons), *output)


@st.composite
def softmax(draw: st.DrawFn) -> Call:
    dtype = draw(dtypes)
    x = draw(quantized(dtype, any_sizes.filter(len)))
    dim = draw(st.integers(-x.values.dim(), x.values.dim() - 1))
    return "quantized_softmax", (x.values, x.scale, dim, 1 / 256, torch.iinfo(dtype).min)


elementwise = st.one_of(quantize(), dequantize(), of_two(), cat(), lookup())
pooling = st.one_of(sliding(), adaptive(), mean(), interpolate())
norms = st.one_of(norm_of_channels(), layer_norm(), softmax())


def samples(channels: int = 20) -> Iterator[Call]:
    """A few calls of each op, on images with that many channels."""
    for k, dtype in enumerate(DTYPES):
        info = torch.iinfo(dtype)
        real = random_values((2, channels, 7, 5), torch.float32, k)
        middle = info.max - 120
        a, b = (random_bytes(real.shape, dtype, seed) for seed in (k, k + 1))
        a = a.contiguous(memory_format=torch.channels_last)
        bounds = (0.0, INF)
        yield "quantize", (real, 0.03, middle, dtype, True)
        yield "quantize", (real, 0.03, middle, dtype, False)
        yield "dequantize", (a, 0.03, middle, torch.float32)
        yield "quantized_add", (a, 0.03, middle, b, 0.02, info.min, 0.04, info.min, *bounds)
        yield "quantized_mul", (a, 0.03, middle, b[:, :, :1], 0.02, 5, 0.04, middle, *bounds)
        yield "quantized_cat", ([a, a], [0.03, 0.04], [middle, 5], 1, 0.03, middle, *UNBOUNDED)
        yield "lookup", (a, random_bytes((256,), dtype, 9))
        yield "quantized_max_pool", (a, [3, 3], [2, 2], [1, 1], [1, 1], False)
        yield "quantized_avg_pool", (a, middle, [2, 2], [2, 2], [0, 0], True, False, None)
        yield "quantized_adaptive_avg_pool", (a, [1, 1])
        yield "quantized_mean", (a, [2, 3], True)
        yield "quantized_interpolate", (a, [11, 9], [7 / 11, 5 / 9], 0, False)
        yield "quantized_interpolate", (a, [11, 9], [6 / 10, 4 / 8], 2, True)
        w, v = (random_values((channels,), torch.float32, seed, "positive") for seed in (1, 2))
        output = (0.04, middle)
        yield "quantized_batch_norm", (a, 0.03, 5, w, None, v, v, 1e-5, *output, *bounds)
        yield "quantized_group_norm", (a, 0.03, 5, channels, w, v, 1e-5, *output)
        yield "quantized_layer_norm", (a, 0.03, 5, [7, 5], None, None, 1e-5, *output)
        yield "quantized_softmax", (a, 0.03, 1, 1 / 256, info.min)
