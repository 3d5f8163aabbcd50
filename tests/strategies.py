"""Hypothesis strategies for what the library takes: tensors of every dtype, layout and range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

dtypes = st.sampled_from(FLOATS)

# --------------------------------------------------------------------------------- values

# Standard normal numbers in, numbers of the range out. Each stays within fp16.
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda t: t,
    "positive": lambda t: t.abs() + 0.5,
    "negative": lambda t: -t.abs() - 0.5,
    "constant": lambda t: torch.full_like(t, 1.3),
    "zero": torch.zeros_like,
    "integers": lambda t: (t * 5).round(),
    "tiny": lambda t: t * 1e-6,
    "large": lambda t: t.clamp(-6, 6) * 1e4,
    "outliers": lambda t: t * 10.0 ** (t.abs() * 1.2).clamp(max=3),
}


def random_values(
    shape: Sequence[int], dtype: torch.dtype, seed: int, kind: str = "normal"
) -> Tensor:
    """Contiguous values of a range in RANGES, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return RANGES[kind](torch.randn(tuple(shape), generator=generator, dtype=torch.float64)).to(
        dtype
    )


def _sprinkled(values: Tensor, seed: int, share: float) -> Tensor:
    """Some of the values replaced with NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype)
    chosen = kinds[torch.randint(0, 3, values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < share, chosen, values)


# --------------------------------------------------------------------------------- layouts


def _channels_last(values: Tensor, _: int) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if values.dim() not in formats:
        return values.contiguous()
    return values.contiguous(memory_format=formats[values.dim()])


def _permuted(values: Tensor, seed: int) -> Tensor:
    order = torch.randperm(values.dim(), generator=torch.Generator().manual_seed(seed)).tolist()
    back = [order.index(d) for d in range(values.dim())]
    return values.permute(order).contiguous().permute(back)


def _sliced(values: Tensor, seed: int) -> Tensor:
    """Every other element of a larger tensor, along one axis."""
    if values.dim() == 0:
        return torch.stack([values, values])[1]
    axis = seed % values.dim()
    shape = list(values.shape)
    shape[axis] = 2 * shape[axis] + 1
    larger = torch.full(shape, 7.0, dtype=values.dtype)
    index = [slice(None)] * values.dim()
    index[axis] = slice(1, None, 2)
    larger[tuple(index)] = values
    return larger[tuple(index)]


def _offset(values: Tensor, _: int) -> Tensor:
    """Contiguous, but one element away from where the allocation begins."""
    memory = torch.empty(values.numel() + 1, dtype=values.dtype)
    memory[1:] = values.reshape(-1)
    return memory[1:].view(values.shape)


def _expanded(values: Tensor, seed: int) -> Tensor:
    """One element along an axis, repeated without memory of its own."""
    if values.numel() == 0 or values.dim() == 0:
        return values
    axis = seed % values.dim()
    return values.narrow(axis, 0, 1).expand(values.shape)


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda values, _: values.contiguous(),
    "channels_last": _channels_last,
    "permuted": _permuted,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}

# --------------------------------------------------------------------------------- tensors

seeds = st.integers(0, 2**31 - 1)


@st.composite
def shapes(
    draw: st.DrawFn, min_dims: int = 0, max_dims: int = 5, max_numel: int = 8192
) -> tuple[int, ...]:
    """Shapes of few dimensions; now and then an empty one, or a long axis among short ones."""
    dims = draw(st.integers(min_dims, max_dims))
    shape = [draw(st.integers(1, 5)) for _ in range(dims)]
    if dims:
        axis = draw(st.integers(0, dims - 1))
        shape[axis] = draw(st.sampled_from([0, 1, 2, 7, 16, 31, 32, 33, 64, 65, 130, 1000]))
        while math.prod(shape) > max_numel:
            shape[axis] //= 2
    return tuple(shape)


any_shape = shapes()


@st.composite
def tensors(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[torch.dtype] = dtypes,
    shapes: st.SearchStrategy[Sequence[int]] = any_shape,
    kinds: Sequence[str] = tuple(RANGES),
    layouts: Sequence[str] = tuple(LAYOUTS),
    nonfinite: bool = False,
) -> Tensor:
    """A floating tensor; with `nonfinite`, now and then one that holds NaN and infinities."""
    seed = draw(seeds)
    values = random_values(draw(shapes), draw(dtypes), seed, draw(st.sampled_from(kinds)))
    if nonfinite:
        values = _sprinkled(values, seed, draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])))
    return LAYOUTS[draw(st.sampled_from(layouts))](values, seed)


any_tensor = tensors()


@st.composite
def with_axis(
    draw: st.DrawFn,
    tensors: st.SearchStrategy[Tensor] = any_tensor,
    per_channel: bool | None = None,
) -> tuple[Tensor, int | None, int]:
    """A tensor, a channel axis (None per tensor) and how many channels that makes."""
    x = draw(tensors.filter(lambda x: x.dim() > 0) if per_channel else tensors)
    if per_channel is None:
        per_channel = x.dim() > 0 and draw(st.booleans())
    if not per_channel:
        return x, None, 1
    axis = draw(st.integers(-x.dim(), x.dim() - 1))
    return x, axis, x.shape[axis]


@st.composite
def streams(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[torch.dtype] = dtypes,
    shapes: st.SearchStrategy[Sequence[int]] = any_shape,
    max_size: int = 4,
    nonfinite: bool = False,
) -> list[Tensor]:
    """Tensors of one dtype and shape, each of a range and layout of its own."""
    dtype, shape = st.just(draw(dtypes)), st.just(draw(shapes))
    return draw(st.lists(tensors(dtype, shape, nonfinite=nonfinite), min_size=1, max_size=max_size))


@st.composite
def quant_ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Both ends of a quantized range that holds 0."""
    return draw(
        st.sampled_from(
            [
                (-128, 127),
                (0, 255),
                (-127, 127),
                (0, 127),
                (-64, 63),
                (0, 15),
                (-8, 7),
                (0, 1),
                (-32768, 32767),
                (0, 65535),
            ]
        )
    )


@st.composite
def qparams(
    draw: st.DrawFn,
    channels: int,
    quant_min: int,
    quant_max: int,
    zero_point_dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64, torch.float32),
) -> tuple[Tensor, Tensor]:
    """A scale and zero point for each channel."""
    generator = torch.Generator().manual_seed(draw(seeds))
    exponent = draw(st.integers(-20, 6))
    scale = torch.rand(channels, generator=generator) + 0.5
    if draw(st.booleans()):  # powers of two make exact ties
        scale = torch.ones(channels)
    scale = scale * 2.0**exponent
    zero_point = torch.randint(quant_min, quant_max + 1, (channels,), generator=generator)
    dtype = draw(st.sampled_from(zero_point_dtypes))
    if dtype.is_floating_point:
        return scale, zero_point.to(dtype) + torch.rand(channels, generator=generator).to(dtype)
    return scale, zero_point.to(dtype)
