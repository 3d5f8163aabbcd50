"""Hypothesis strategies for calls of every op, for comparing two implementations of them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import oracle
from fastquant._core.schemes import NonFinite, Scheme
from fastquant._native import ops, routes
from fastquant._native import reference as reference_ops
from fastquant._native.settings import FusedSettings
from strategies import (
    FLOATS,
    LAYOUTS,
    qparams,
    quant_ranges,
    random_values,
    seeds,
    shapes,
    tensors,
    with_axis,
)

INF = math.inf
IGNORE, RAISE, PROPAGATE = NonFinite
AFFINE, SYMMETRIC, FLOAT_QPARAMS = Scheme

Call = tuple[str, tuple[Any, ...]]

sizes = st.sampled_from([200, 3000, 20_000]).flatmap(lambda most: shapes(max_numel=most))
inputs = tensors(shapes=sizes, nonfinite=True)
finite_inputs = tensors(shapes=sizes)
policies = st.sampled_from([IGNORE, IGNORE, RAISE, PROPAGATE])
averaging = st.sampled_from([None, 0.01, 0.5, 1.0])
flags = st.tuples(
    st.booleans(), st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.bool])
).map(lambda flag: torch.tensor([flag[0]]).to(flag[1]))


@st.composite
def statistics(draw: st.DrawFn, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """min_val, max_val and nonfinite_count: unobserved, or with a range in some channels."""
    shape = () if channels is None else (channels,)
    dtype = draw(st.sampled_from((torch.float32, *FLOATS)))
    generator = torch.Generator().manual_seed(draw(seeds))
    middle = torch.randn(shape, generator=generator)
    width = torch.rand(shape, generator=generator)
    seen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    low = torch.where(seen, middle - width, INF).to(dtype)
    high = torch.where(seen, middle + width, -INF).to(dtype)
    return low, high, torch.tensor([draw(st.integers(0, 3))])


@st.composite
def schemes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """quant_min, quant_max, scheme, symmetric_zero_point."""
    scheme = draw(st.sampled_from([AFFINE, SYMMETRIC, FLOAT_QPARAMS]))
    return *draw(quant_ranges()), scheme, draw(st.sampled_from([0, 3]))


def eps(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([torch.finfo(torch.float32).eps], dtype=dtype)


def _buffer_shape(axis: int | None, channels: int) -> int | None:
    return None if axis is None else channels


@st.composite
def observe_minmax_(draw: st.DrawFn) -> Call:
    x, axis, channels = draw(with_axis(inputs))
    state = draw(statistics(_buffer_shape(axis, channels)))
    return "observe_minmax_", (x, *state, axis, draw(averaging), draw(policies))


@st.composite
def _observing(draw: st.DrawFn, per_tensor: bool = False) -> tuple[Tensor, tuple[Any, ...]]:
    """x, and the arguments of `observe_qparams_` from min_val on."""
    x, axis, channels = (draw(inputs), None, 1) if per_tensor else draw(with_axis(inputs))
    low, high, count = draw(statistics(_buffer_shape(axis, channels)))
    quant_min, quant_max, scheme, symmetric = draw(schemes())
    scale, zero_point = draw(qparams(channels, quant_min, quant_max))
    if scheme == FLOAT_QPARAMS:
        zero_point = zero_point.to(torch.float32)
    buffers = (low, high, scale, zero_point, count, eps())
    settings = (axis, draw(averaging), quant_min, quant_max, scheme, symmetric, draw(policies))
    return x, (*buffers, *settings)


@st.composite
def observe_qparams_(draw: st.DrawFn) -> Call:
    x, rest = draw(_observing())
    return "observe_qparams_", (x, draw(flags), *rest)


@st.composite
def fused(draw: st.DrawFn) -> Call:
    x, rest = draw(_observing())
    name = draw(
        st.sampled_from(["fused_observe_fake_quantize", "fused_observe_fake_quantize_with_mask"])
    )
    return name, (x, draw(flags), draw(flags), *rest)


bounds = st.sampled_from([(-INF, INF), (0.0, INF), (0.0, 6.0), (-0.3, 0.3), (-INF, 1e6)])


def _lying_otherwise(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.mT.contiguous().mT


@st.composite
def add_observe_fake_quantize(draw: st.DrawFn) -> Call:
    a, rest = draw(_observing(per_tensor=True))
    values = a.reshape(-1).flip(0).reshape(a.shape) * draw(st.sampled_from([1, -0.5]))
    b = torch.empty_like(a).copy_(values)
    if draw(st.integers(0, 3)) == 0:
        b = _lying_otherwise(b)
    of_tensor = FusedSettings(draw(flags), draw(flags), *rest).per_tensor()
    return "add_observe_fake_quantize", (a, b, *draw(bounds), *of_tensor)


@st.composite
def fake_quantize(draw: st.DrawFn) -> Call:
    x, axis, channels = draw(with_axis(inputs))
    quant_range = draw(quant_ranges())
    scale, zero_point = draw(qparams(channels, *quant_range))
    scale = scale.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64])))
    if draw(st.integers(0, 9)) == 0:  # a scale that is no normal number
        scale[draw(st.integers(0, channels - 1)) if channels else 0 :] = 1e-40
    enabled = draw(st.one_of(st.none(), flags))
    name = draw(st.sampled_from(["fake_quantize", "fake_quantize_with_mask"]))
    return name, (x, scale, zero_point, enabled, axis, *quant_range)


@st.composite
def fake_quantize_backward(draw: st.DrawFn) -> Call:
    grad = torch.empty_like(x := draw(inputs)).copy_(x)
    if draw(st.booleans()):  # away from where an allocation begins
        memory = torch.empty(grad.numel() + 1, dtype=grad.dtype)
        grad = memory[1:].as_strided(grad.size(), grad.stride(), 1).copy_(x)
    words = (grad.numel() + 63) // 64
    generator = torch.Generator().manual_seed(draw(seeds))
    mask = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=generator)
    return "fake_quantize_backward", (grad, mask)


@st.composite
def quantize_per_channel(draw: st.DrawFn) -> Call:
    weights = tensors(st.just(torch.float32), sizes, nonfinite=True)
    x, axis, channels = draw(with_axis(weights.filter(lambda x: x.dim() > 0), True))
    scale, _ = draw(qparams(channels, -128, 127))
    scale = scale.to(draw(st.sampled_from([torch.float32, torch.float64])))
    quant_range = draw(st.sampled_from([(-128, 127), (-127, 127), (-8, 7), (0, 15)]))
    return "quantize_per_channel", (x, scale, axis, *quant_range)


@st.composite
def learnable(draw: st.DrawFn) -> Call:
    # Not always: a NaN makes the gradient of its scale NaN, whatever the others are.
    x, axis, channels = draw(with_axis(st.one_of(finite_inputs, finite_inputs, inputs)))
    quant_range = draw(quant_ranges())
    scale, zero_point = draw(qparams(channels, *quant_range, zero_point_dtypes=(torch.float32,)))
    settings = (axis, *quant_range, draw(st.sampled_from([1.0, 0.125])))
    if draw(st.booleans()):
        return "learnable_fake_quantize", (x, scale, zero_point, *settings)
    grad = torch.cos(x * 3)
    if draw(st.booleans()):
        grad = torch.empty_like(x).copy_(grad)
    return "learnable_fake_quantize_backward", (grad, x, scale, zero_point, *settings)


def bn_weights(channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Factors of either sign, every third of them zero."""
    values = random_values((channels,), dtype, seed)
    values[::3] = 0.0
    return values


weights = st.one_of(
    tensors(shapes=shapes(min_dims=2, max_numel=3000)),
    tensors(shapes=shapes(min_dims=2, max_numel=20_000), nonfinite=True),
)


@st.composite
def observe_folded_weight_(draw: st.DrawFn) -> Call:
    weight = draw(weights)
    channels, axis = weight.shape[0], draw(st.sampled_from([None, 0, -weight.dim()]))
    low, high, count = draw(statistics(_buffer_shape(axis, channels)))
    quant_min, quant_max = draw(quant_ranges())
    integers = (torch.int32, torch.int64)
    scale, zero_point = draw(
        qparams(1 if axis is None else channels, quant_min, quant_max, zero_point_dtypes=integers)
    )
    if low.dtype != torch.float64:
        low, high = low.float(), high.float()
    scheme = (draw(st.sampled_from([AFFINE, SYMMETRIC])), draw(st.sampled_from([0, 3])))
    bn = (
        bn_weights(channels, weight.dtype, draw(seeds)),
        random_values((channels,), weight.dtype, draw(seeds), "positive"),
    )
    buffers = (draw(flags), draw(flags), low, high, scale, zero_point, count, eps())
    settings = (axis, draw(averaging), quant_min, quant_max, *scheme, draw(policies))
    return "observe_folded_weight_", (weight, *bn, *buffers, *settings)


@st.composite
def fold_weight(draw: st.DrawFn) -> Call:
    weight = draw(weights)
    channels, quant_range = weight.shape[0], draw(quant_ranges())
    integers = (torch.int32, torch.int64)
    scale, zero_point = draw(qparams(channels, *quant_range, zero_point_dtypes=integers))
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    bn_std = random_values((channels,), compute, draw(seeds), "positive")
    s = bn_weights(channels, compute, draw(seeds))
    # s as the observing op has it: a number of the weight's dtype.
    rows = (s.to(weight.dtype), bn_std, scale, 1 / scale, zero_point)
    fold = torch.stack([row.to(compute) for row in rows])
    if draw(st.booleans()):
        return "fold_weight", (weight, fold, *quant_range)
    grad = torch.cos(weight * 3)
    if draw(st.booleans()):
        grad = torch.empty_like(weight).copy_(grad)
    return "fold_weight_backward", (grad, weight, fold, *quant_range)


@st.composite
def histograms(draw: st.DrawFn) -> list[Call]:
    """A stream of tensors for one histogram."""
    bins = draw(st.sampled_from([1, 2, 17, 256, 2048, 2048, 5000, 40_000]))
    rate = draw(st.sampled_from([1, 3, 16, 128]))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float64)))
    unobserved = (torch.tensor(INF, dtype=dtype), torch.tensor(-INF, dtype=dtype))
    state = (torch.zeros(bins, dtype=dtype), *unobserved, torch.zeros(1, dtype=torch.int64))
    stream = draw(st.lists(inputs, min_size=1, max_size=4))
    times = draw(st.sampled_from([1, 1, 2]))
    return [("observe_histogram_", (x, *state, rate, draw(policies), times)) for x in stream]


def histogram_settings(args: Sequence[Any]) -> tuple[Any, ...]:
    """What `observe_histogram_` takes after its buffers, for a comparison of CPU and CUDA kernels.

    Of NaN that are to be propagated the CPU's raises; to raise, CUDA's would wait for the device.
    """
    rate, policy, *times = args[5:]
    raises = policy == PROPAGATE and bool(args[0].isnan().any())
    return rate, IGNORE if raises else policy, *times


@st.composite
def channel_histograms(draw: st.DrawFn) -> list[Call]:
    """A stream of tensors for the histograms of their channels."""
    x, axis, channels = draw(with_axis(inputs.filter(lambda x: x.dim() > 0), True))
    bins, rate = draw(st.sampled_from([1, 17, 256])), draw(st.sampled_from([3, 16]))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float64)))
    ends = (torch.full((channels,), end, dtype=dtype) for end in (INF, -INF))
    state = (torch.zeros(channels, bins, dtype=dtype), *ends, torch.zeros(1, dtype=torch.int64))
    return [
        ("observe_channel_histograms_", (y, *state, axis, rate, draw(policies)))
        for y in (x, torch.empty_like(x).copy_(x * 2 - 1))
    ]


@st.composite
def search_histogram_range(draw: st.DrawFn) -> Call:
    bins = draw(st.sampled_from([1, 5, 16, 100, 2048]))
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["normal", "uniform", "sparse", "empty"]))
    values = torch.randn(20_000, generator=generator)
    histogram = {
        "normal": lambda: torch.histc(values, bins),
        "uniform": lambda: torch.rand(bins, generator=generator),
        "sparse": lambda: torch.rand(bins, generator=generator).gt(0.99).float(),
        "empty": lambda: torch.zeros(bins),
    }[kind]()
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    middle, width = draw(st.floats(-3, 3)), 10.0 ** draw(st.integers(-30, 30))
    low, high = middle - width, middle + width
    args = (histogram, torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype))
    return "search_histogram_range", (*args, draw(st.sampled_from([2, 16, 256, 65536])))


@st.composite
def choose_qparams(draw: st.DrawFn) -> Call:
    low, high, _ = draw(statistics(draw(st.sampled_from([None, 1, 3, 300]))))
    return "choose_qparams", (low, high, eps(low.dtype), *draw(schemes()))


SINGLE_CALLS: dict[str, Callable[[], st.SearchStrategy[Call]]] = {
    strategy.__name__: strategy
    for strategy in (
        observe_minmax_,
        observe_qparams_,
        fused,
        add_observe_fake_quantize,
        fake_quantize,
        fake_quantize_backward,
        quantize_per_channel,
        observe_folded_weight_,
        fold_weight,
        learnable,
        search_histogram_range,
        choose_qparams,
    )
}

# -------------------------------------------------------------------------------- geometries

# Shape, axis and layout: what is a case of its own for a GPU, by how many channels there are,
# how long their segments, how these lie on 16-byte boundaries, and how much there is to share.
GEOMETRIES: list[tuple[tuple[int, ...], int | None, str]] = [
    ((70_001,), None, "contiguous"),
    ((70_001,), None, "offset"),
    ((16_390,), None, "contiguous"),
    ((3,), None, "offset"),
    ((1, 70_000), 0, "contiguous"),
    ((2, 35_003), 0, "contiguous"),
    ((5, 7_001), 0, "offset"),
    ((7, 3, 1_001), 1, "contiguous"),
    ((40, 3, 400), 1, "contiguous"),
    ((33, 17, 49), 1, "contiguous"),
    ((64, 27), 0, "contiguous"),
    ((300, 9), 0, "offset"),
    ((2_100, 30), 0, "contiguous"),
    ((4_200, 5), 0, "contiguous"),
    ((600, 64), 1, "contiguous"),
    ((600, 64), 1, "offset"),
    ((900, 3), 1, "contiguous"),
    ((9_000, 5), 1, "contiguous"),
    ((500, 130), 1, "contiguous"),
    ((300, 520), 1, "contiguous"),
    ((20, 2_100), 1, "contiguous"),
    ((97, 65, 5), 1, "contiguous"),
    ((60, 64, 5), 1, "contiguous"),
    ((70, 40, 31), 1, "contiguous"),
    ((150, 2, 2), 1, "contiguous"),
    ((4, 24, 20, 20), 1, "channels_last"),
    ((2, 130, 5, 5), 1, "channels_last"),
    ((40, 30, 20), 1, "permuted"),
    ((40, 30, 20), 2, "sliced"),
    ((9, 50, 11), -1, "expanded"),
]


def calls_of_geometry(
    shape: tuple[int, ...], axis: int | None, layout: str, dtype: torch.dtype, seed: int = 0
) -> Iterator[Call]:
    """Calls of every op on tensors of that shape and layout, some with NaN and infinities."""
    values = random_values(shape, dtype, seed, "outliers")
    nonfinite_values = values.clone()
    nonfinite_values.view(-1)[:: max(7, values.numel() // 50)] = torch.tensor([INF]).to(dtype)
    nonfinite_values.view(-1)[-1:] = math.nan
    x, nonfinite = (LAYOUTS[layout](v, 1) for v in (values, nonfinite_values))
    channels = 1 if axis is None else x.shape[axis]
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator) * 0.1 + 0.01
    zero_point = torch.randint(0, 256, (channels,), generator=generator, dtype=torch.int32)
    on, off = torch.ones(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    low, high = torch.full((channels,), INF), torch.full((channels,), -INF)
    count = torch.zeros(1, dtype=torch.int64)
    for policy in (IGNORE, PROPAGATE):
        yield "observe_minmax_", (nonfinite, low, high, count, axis, None, policy)
    yield "observe_minmax_", (x, low - 1, high + 1, count, axis, 0.01, RAISE)
    buffers = (low, high, scale, zero_point, count, eps(), axis, 0.1, 0, 255, AFFINE, 0, IGNORE)
    for flags in ((on, on), (on, off), (off, on)):
        yield "fused_observe_fake_quantize_with_mask", (nonfinite, *flags, *buffers)
    yield "observe_qparams_", (x, on, *buffers)
    if axis is None:
        of_tensor = FusedSettings(on, on, *buffers).per_tensor()
        yield "add_observe_fake_quantize", (nonfinite, x, 0.0, 6.0, *of_tensor)
    for z in (zero_point, zero_point + 0.25):
        yield "fake_quantize_with_mask", (nonfinite, scale, z, None, axis, 0, 255)
    learnable = (scale, zero_point.float() + 0.3, axis, 0, 255, 0.5)
    yield "learnable_fake_quantize", (x, *learnable)
    grad = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(torch.cos(x))
    for g in (torch.empty_like(x).copy_(grad), grad):
        yield "learnable_fake_quantize_backward", (g, x, *learnable)


# Where tensors begin between 16-byte boundaries matters to each way of walking over them.
PLACED_GEOMETRIES: list[tuple[tuple[int, ...], int | None, str]] = [
    ((35_003,), None, "contiguous"),
    ((130,), None, "contiguous"),
    ((3, 11_001), 0, "contiguous"),
    ((90, 4, 100), 1, "contiguous"),
    ((40, 13), 0, "contiguous"),
    ((5, 6, 11), 1, "contiguous"),
    ((900, 24), 1, "contiguous"),
    ((300, 3, 5), 1, "permuted"),
    ((2, 24, 9, 9), 1, "channels_last"),
]
# Every offset between such boundaries, in elements.
OFFSETS = [(dtype, offset) for dtype in FLOATS for offset in range(16 // dtype.itemsize)]


def placed(x: Tensor, offset: int) -> Tensor:
    """x, which is dense, as it lies, that many elements from where its memory begins."""
    memory = torch.empty(x.numel() + offset, dtype=x.dtype)
    return memory.as_strided(x.size(), x.stride(), offset).copy_(x)


def calls_of_placed(
    shape: tuple[int, ...], axis: int | None, layout: str, dtype: torch.dtype, offset: int
) -> Iterator[Call]:
    """Calls of every op on tensors that begin there, gradients also elsewhere."""
    for name, args in calls_of_geometry(shape, axis, layout, dtype):
        for step in (0, 1) if name.endswith("backward") else (0,):
            yield (
                name,
                tuple(
                    placed(a, offset + i * step)
                    if isinstance(a, Tensor) and a.shape == shape
                    else a
                    for i, a in enumerate(args)
                ),
            )
    x = placed(LAYOUTS[layout](random_values(shape, dtype, 1), 1), offset)
    mask = random_values(((x.numel() + 63) // 64 * 8,), torch.float32, 2).mul(100).to(torch.uint8)
    yield "fake_quantize_backward", (x, placed(mask, offset))
    for low, high in ((INF, -INF), (-1.0, 2.0), (-50.0, 50.0)):
        state = (torch.zeros(300), torch.tensor(low), torch.tensor(high))
        yield "observe_histogram_", (x, *state, torch.zeros(1, dtype=torch.int64), 16, IGNORE)


# --------------------------------------------------------------------------------- comparing

# Sums in another order.
INEXACT = {
    "learnable_fake_quantize_backward": slice(1, 3),
    "fold_weight_backward": slice(1, 2),
    "batch_norm_fake_quantize_backward": slice(0, 3),
    "convolution": slice(0, 1),
    "convolution_backward": slice(0, 2),
}


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy of x as it lies: with its strides, and its distance from where its memory begins.

    Tensor.to keeps the strides only of tensors without gaps and overlaps.
    """
    elements = x.untyped_storage().nbytes() // x.element_size()
    memory = x.detach().as_strided((elements,), (1,), 0).to(device, copy=True)
    return memory.as_strided(x.size(), x.stride(), x.storage_offset())


def all_moved(args: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    return tuple(moved(a, device) if isinstance(a, Tensor) else a for a in args)


def own_arguments(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The same arguments, those that the op changes in memory of their own."""
    if not name.startswith(("observe", "fused", "add")):
        return tuple(args)
    inputs = 2 if name.startswith("add") else 1
    others = (a.clone() if isinstance(a, Tensor) else a for a in args[inputs:])
    return *args[:inputs], *others


# Results and arguments after a call, or what it raised.
Outcome = list[Tensor] | RuntimeError


def outcome(op: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    try:
        results = op(*args)
    except RuntimeError as error:
        return error
    results = () if results is None else results
    results = (results,) if isinstance(results, Tensor) else results
    return [*results, *(a for a in args if isinstance(a, Tensor))]


def assert_same_outcome(name: str, got: Outcome, expected: Outcome) -> None:
    if isinstance(got, RuntimeError) or isinstance(expected, RuntimeError):
        assert isinstance(got, RuntimeError) == isinstance(expected, RuntimeError), (got, expected)
        return
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        inexact = i in range(*INEXACT.get(name, slice(0)).indices(len(got)))
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if inexact else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            moved(ours, theirs.device),
            theirs,
            **tolerance,
            equal_nan=True,
            check_stride=True,
            msg=lambda text, i=i: f"{name}, tensor {i}\n{text}",
        )


EPS = torch.finfo(torch.float32).eps


def unobserved(channels: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shape = () if channels is None else (channels,)
    return [
        torch.full(shape, INF, dtype=dtype),
        torch.full(shape, -INF, dtype=dtype),
    ]


def counter() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def flag(on: bool, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.tensor([int(on)], dtype=dtype)


assert_same = partial(oracle.assert_same, strides=True)


def called(op: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[Tensor], bool]:
    """The results, the arguments as the call left them, and whether it raised."""
    # What an op may change is contiguous; a copy of anything else might not lie as it does.
    own = [a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in args]
    try:
        results = op(*own)
    except (RuntimeError, ValueError):  # in words, where the dispatcher was skipped
        return None, [a for a in own if isinstance(a, Tensor)], True
    return results, [a for a in own if isinstance(a, Tensor)], False


def assert_as_reference(name: str, *args: Any) -> None:
    results, arguments, raised = called(getattr(ops, name), args)
    expected_results, expected_arguments, expected_raised = called(reference_ops.OPS[name], args)
    assert raised == expected_raised
    assert_same(arguments, expected_arguments, f"arguments of {name}")
    if results is not None:
        assert_same(results, expected_results, f"results of {name}")


def bits_of(mask: Tensor, numel: int) -> list[int]:
    words = struct.unpack(f"<{mask.numel() // 8}Q", bytes(mask.tolist()))
    return [(words[i // 64] >> (i % 64)) & 1 for i in range(numel)]


def in_memory_order(x: Tensor) -> Tensor:
    """Elements of a tensor without gaps, as they lie."""
    return x.as_strided((x.numel(),), (1,))


def fused_by_route(x: Tensor, *settings: Any) -> Tensor:
    """The fused op as modules call it; its arguments are those of the op."""
    return routes.fused_observe_fake_quantize(x, FusedSettings(*settings))


def fused_arguments(
    channels: int | None = None, observe: bool = True, quantize: bool = True
) -> list[Any]:
    return [
        flag(observe),
        flag(quantize),
        *unobserved(channels),
        torch.ones(channels or 1),
        torch.zeros(channels or 1, dtype=torch.int32),
        counter(),
        eps(),
        None if channels is None else 0,
        0.1,
        -128,
        127,
        AFFINE,
        0,
        IGNORE,
    ]


def minmax_args(x: Tensor, axis: int | None, policy: int = IGNORE) -> tuple[Any, ...]:
    """Arguments of `observe_minmax_` that begin with x, on its device."""
    channels = None if axis is None else x.shape[axis]
    low, high, count = (t.to(x.device) for t in (*unobserved(channels), counter()))
    return x, low, high, count, axis, 0.1, policy


def fused_args(x: Tensor, axis: int | None) -> tuple[Any, ...]:
    """Arguments of `fused_observe_fake_quantize` that begin with x, on its device."""
    _, low, high, count, *_ = minmax_args(x, axis)
    scale = torch.ones_like(low).reshape(-1)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    on, smallest = flag(True).to(x.device), eps().to(x.device)
    buffers = (on, on, low, high, scale, zero_point, count, smallest)
    return x, *buffers, axis, 0.1, 0, 255, 0, 0, IGNORE
