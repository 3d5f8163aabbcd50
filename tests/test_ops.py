"""Every op against the reference, against torch's own, and on every instruction set."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import observer as torch_observer
from torch.utils._python_dispatch import TorchDispatchMode

import op_calls
import oracle
from fastquant import _C
from fastquant._native import fast_calls, ops, routes
from fastquant._native import reference as reference_ops
from strategies import (
    FLOATS,
    LAYOUTS,
    RANGES,
    qparams,
    quant_ranges,
    random_values,
    seeds,
    shapes,
    streams,
    tensors,
    with_axis,
)

INF = math.inf
EPS = torch.finfo(torch.float32).eps
IGNORE, RAISE, PROPAGATE = 0, 1, 2
AFFINE, SYMMETRIC, FLOAT_QPARAMS = 0, 1, 2

policies = st.sampled_from([IGNORE, RAISE, PROPAGATE])
averaging = st.sampled_from([None, 0.01, 0.5, 1.0])
float32 = st.just(torch.float32)


# ------------------------------------------------------------------------------- helpers


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


def eps(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([EPS], dtype=dtype)


assert_same = partial(oracle.assert_same, strides=True)


def called(op: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[Tensor], bool]:
    """The results, the arguments as the call left them, and whether it raised."""
    # What an op may change is contiguous; a copy of anything else might not lie as it does.
    own = [a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in args]
    try:
        results = op(*own)
    except RuntimeError:
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


def test_cpu_kernels_are_native() -> None:
    for name in reference_ops.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastquant::{name}", "CPU"), name


# ------------------------------------------------------------------------------- min/max


@given(
    st.data(),
    streams(nonfinite=True),
    st.sampled_from(FLOATS),
    averaging,
    policies,
)
def test_observe_minmax_as_reference(
    data: st.DataObject,
    stream: list[Tensor],
    buffer_dtype: torch.dtype,
    constant: float | None,
    policy: int,
) -> None:
    _, axis, channels = data.draw(with_axis(st.just(stream[0])))
    shape = None if axis is None and data.draw(st.booleans()) else channels
    low, high = unobserved(shape, buffer_dtype)
    count = counter()
    for x in stream:
        assert_as_reference("observe_minmax_", x, low, high, count, axis, constant, policy)
        _, (_, low, high, count), _ = called(
            ops.observe_minmax_, (x, low, high, count, axis, constant, policy)
        )


TORCH_MINMAX = {
    (False, None): torch_observer.MinMaxObserver,
    (False, 0.01): torch_observer.MovingAverageMinMaxObserver,
    (True, None): torch_observer.PerChannelMinMaxObserver,
    (True, 0.01): torch_observer.MovingAveragePerChannelMinMaxObserver,
}


@pytest.mark.parametrize(("per_channel", "constant"), TORCH_MINMAX)
@given(data=st.data())
def test_observe_minmax_as_torch_ao(
    per_channel: bool, constant: float | None, data: st.DataObject
) -> None:
    # torch.ao's per-channel observers fail for one dimension.
    full = shapes(min_dims=2 if per_channel else 0).filter(lambda shape: 0 not in shape)
    stream = data.draw(streams(float32, full))
    _, axis, channels = data.draw(with_axis(st.just(stream[0]), per_channel))
    if per_channel:
        theirs = TORCH_MINMAX[per_channel, constant](ch_axis=axis)
    else:
        theirs = TORCH_MINMAX[per_channel, constant]()
    low, high = unobserved(channels if per_channel else None)
    for x in stream:
        theirs(x)
        ops.observe_minmax_(x, low, high, counter(), axis, constant, IGNORE)
        assert_same(low, theirs.min_val)
        assert_same(high, theirs.max_val)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [None, 1])
def test_nonfinite_policies(dtype: torch.dtype, axis: int | None) -> None:
    x = torch.tensor([[1.0, -2.0], [math.nan, INF], [3.0, -INF]], dtype=dtype)
    channels = None if axis is None else 2

    low, high, count = *unobserved(channels), counter()
    ops.observe_minmax_(x, low, high, count, axis, None, IGNORE)
    assert low.tolist() == (-2.0 if axis is None else [1.0, -2.0])
    assert high.tolist() == (3.0 if axis is None else [3.0, -2.0])
    assert count.item() == 3

    before = [t.clone() for t in (low, high, count)]
    with pytest.raises(RuntimeError):
        ops.observe_minmax_(x, low, high, count, axis, None, RAISE)
    assert_same([low, high, count], before)

    low, high, count = *unobserved(channels), counter()
    ops.observe_minmax_(x, low, high, count, axis, None, PROPAGATE)
    assert_same(low, x.float().amin(axis if axis is None else 0))
    assert_same(high, x.float().amax(axis if axis is None else 0))
    assert count.item() == 0


@pytest.mark.parametrize("constant", [None, 0.01])
def test_what_holds_no_finite_element_changes_no_range(constant: float | None) -> None:
    low, high, count = torch.tensor([1.0, INF]), torch.tensor([2.0, -INF]), counter()
    x = torch.tensor([[math.nan, INF, -INF], [math.nan, math.nan, INF]])
    ops.observe_minmax_(x, low, high, count, 0, constant, IGNORE)
    assert low.tolist() == [1.0, INF]
    assert high.tolist() == [2.0, -INF]
    assert count.item() == 6


# ----------------------------------------------------------------------------- histogram


@given(
    streams(nonfinite=True),
    st.sampled_from([torch.float32, torch.float32, torch.float64]),
    st.sampled_from([1, 7, 64, 2048]),
    st.sampled_from([1, 16]),
    policies,
)
def test_observe_histogram_as_reference(
    stream: list[Tensor], buffer_dtype: torch.dtype, bins: int, rate: int, policy: int
) -> None:
    def fresh() -> tuple[Tensor, ...]:
        return torch.zeros(bins, dtype=buffer_dtype), *unobserved(dtype=buffer_dtype), counter()

    ours, reference = fresh(), fresh()
    for x in stream:
        outcomes = []
        for op, state in (
            (ops.observe_histogram_, ours),
            (reference_ops.observe_histogram_, reference),
        ):
            try:
                op(x, *state, rate, policy)
                outcomes.append(True)
            except RuntimeError:
                outcomes.append(False)
        assert outcomes[0] == outcomes[1]
        assert_same(ours[1:], reference[1:])
        # Masses are added up in fp64, in an order of each one's own.
        tolerance = torch.finfo(buffer_dtype).eps
        torch.testing.assert_close(ours[0], reference[0], rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_first_histogram_is_torch_histc(kind: str, dtype: torch.dtype) -> None:
    x = random_values((50, 101), dtype, 0, kind)
    histogram, (low, high) = torch.zeros(2048), unobserved()
    ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    computed = x if dtype == torch.float64 else x.float()
    assert_same(low, computed.min().float())
    assert_same(high, computed.max().float())
    assert_same(histogram, torch.histc(computed, 2048).float())


@given(
    seeds,
    st.sampled_from(FLOATS),
    st.sampled_from([1, 64, 2048]),
    st.sampled_from([130, 8191, 8193, 30_000]),
    st.sampled_from(["ends", "inside", "low", "high"]),
    st.sampled_from([1.0, 1.0, 1e-45, 1e-39, 1e-20, 1e30]),
    st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.95, 1.0]), min_size=1, max_size=4),
)
def test_counts_are_torchs_where_one_value_prevails(
    any_isa: list[str],
    seed: int,
    dtype: torch.dtype,
    bins: int,
    size: int,
    where: str,
    scale: float,
    shares: list[float],
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(size, dtype=torch.float64) * scale
    x = x.abs() if where in ("ends", "low") else -x.abs() if where == "high" else x
    for part, share in zip(x.chunk(len(shares)), shares, strict=False):
        part[torch.rand(part.numel()) < share] = 0.0
    if where == "ends":
        x = x.clamp(max=scale)
    x = x.to(dtype)
    computed = x if dtype == torch.float64 else x.float()
    assume(0 < computed.max() - computed.min() < INF)
    expected = torch.histc(computed, bins).double()
    ends = [end.double() for end in (computed.min(), computed.max())]
    for isa in any_isa:
        _C.set_isa(isa)
        state = [torch.zeros(bins, dtype=torch.float64), *unobserved(dtype=torch.float64)]
        for times in (1, 2):
            ops.observe_histogram_(x, *state, counter(), 16, IGNORE)
            assert_same(state, [expected * times, *ends])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 3, 2048, 3000])
@pytest.mark.parametrize("low", [-1.0, 0.0, -0.7, 1e6, -1e-38, 1e-300])
@pytest.mark.parametrize("width", [1.0, 0.1, 3e8, 1e-37, 1e-42])
def test_counts_are_torchs_on_the_borders_of_bins(
    any_isa: list[str], dtype: torch.dtype, bins: int, low: float, width: float
) -> None:
    borders = low + width * torch.arange(bins + 1, dtype=torch.float64) / bins
    x = borders.to(dtype)
    x = torch.cat([torch.nextafter(x, x - 1), x, torch.nextafter(x, x + 1)])
    expected = torch.histc(x, bins).double()
    for isa in any_isa:
        _C.set_isa(isa)
        state = [torch.zeros(bins, dtype=torch.float64), *unobserved(dtype=torch.float64)]
        ops.observe_histogram_(x, *state, counter(), 16, IGNORE)
        assert_same(state[0], expected)


@pytest.mark.parametrize("outlier", [-9.0, 9.0, INF, -INF, math.nan])
@pytest.mark.parametrize("position", [0, 8191, 8192, -1])
@pytest.mark.usefixtures("threads")
def test_one_element_beyond_the_range_so_far(
    any_isa: list[str], outlier: float, position: int
) -> None:
    first = random_values((300_005,), torch.float32, 3).clamp(-3, 3)
    second = first.flip(0)
    second[position] = outlier
    expected = [torch.zeros(2048), *unobserved(), counter()]
    for x in (first, second):
        reference_ops.observe_histogram_(x, *expected, 16, IGNORE)
    for isa in any_isa:
        for threads in (1, 3):
            _C.set_isa(isa)
            torch.set_num_threads(threads)
            state = [torch.zeros(2048), *unobserved(), counter()]
            for x in (first, second):
                ops.observe_histogram_(x, *state, 16, IGNORE)
            assert_same(state[1:], expected[1:])
            torch.testing.assert_close(state[0], expected[0], rtol=1e-6, atol=1e-9)


def test_a_range_between_the_numbers_of_the_elements_type_grows() -> None:
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (0.1, 0.3))
    x = torch.tensor([0.1, 0.2, 0.3])  # fp32's 0.3 is more than 0.3
    ops.observe_histogram_(x, torch.zeros(8, dtype=torch.float64), low, high, counter(), 16, IGNORE)
    assert low == 0.1
    assert high == x[2].double()


@given(
    streams(float32, shapes(min_dims=1).filter(lambda shape: 0 not in shape)),
    st.sampled_from([128, 2048]),
)
def test_histogram_of_a_stream_as_torch_ao(stream: list[Tensor], bins: int) -> None:
    theirs = torch_observer.HistogramObserver(bins)
    histogram, (low, high) = torch.zeros(bins), unobserved()
    elements = 0
    for x in stream:
        theirs(x)
        ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
        elements += x.numel()
        assert_same(low, theirs.min_val)
        assert_same(high, theirs.max_val)
        # torch.linspace rounds in a way of its own at each vector length, so a part that lies
        # on a boundary may fall on the other side of it; nothing is lost either way.
        torch.testing.assert_close(histogram.sum().item(), float(elements), rtol=1e-5, atol=0)
        difference = (histogram.cumsum(0) - theirs.histogram.cumsum(0)).abs().max()
        assert difference <= elements * 0.02


def test_histogram_of_a_growing_range_keeps_every_count() -> None:
    histogram, (low, high) = torch.zeros(256, dtype=torch.float64), unobserved(dtype=torch.float64)
    elements = 0
    for power in range(-8, 9):
        x = random_values((1000,), torch.float32, power + 8) * 10.0**power
        ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
        elements += x.numel()
        torch.testing.assert_close(histogram.sum().item(), float(elements), rtol=1e-12, atol=0)


@pytest.mark.parametrize("times", [1, 2, 3])
@given(st.data())
def test_a_histogram_that_counts_often_is_as_many_histograms(
    times: int, data: st.DataObject
) -> None:
    stream = data.draw(streams(float32, shapes(), nonfinite=True))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    # Beyond where fp32 tells whole numbers apart, too.
    start = torch.full((40,), data.draw(st.sampled_from([0.0, 2.0**24 - 3, 0.25])), dtype=dtype)
    low, high = data.draw(st.sampled_from([(INF, -INF), (-1.0, 1.5)]))
    at_once, one_by_one = (
        (start.clone(), torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype))
        for _ in range(2)
    )
    for x in stream:
        assert_as_reference("observe_histogram_", x, *at_once, counter(), 16, IGNORE, times)
        ops.observe_histogram_(x, *at_once, counter(), 16, IGNORE, times)
        for _ in range(times):
            ops.observe_histogram_(x, *one_by_one, counter(), 16, IGNORE)
        assert_same(at_once, one_by_one)


@pytest.mark.parametrize("bins", [2048, 256, 33])
def test_histograms_of_growing_ranges_are_torch_aos(bins: int) -> None:
    for seed in range(30):
        theirs = torch_observer.HistogramObserver(bins)
        histogram, (low, high) = torch.zeros(bins), unobserved()
        for k in range(3):
            x = random_values((2000,), torch.float32, 3 * seed + k) * (1 + 0.3 * k) + seed / 30
            theirs(x)
            ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
        assert_same(histogram, theirs.histogram)
        found = ops.search_histogram_range(histogram, low, high, 256)
        assert_same(found, theirs._non_linear_param_search())


@pytest.mark.parametrize("bins", [1, 7, 8, 31, 33, 1000, 2047, 2048, 5000])
def test_search_takes_shares_of_torchs_total(bins: int) -> None:
    # Of counts that fp32 cannot add up, so that the order of its additions decides.
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        histogram = torch.rand(bins, generator=generator) * 1e6
        args = (histogram, torch.tensor(-1.0), torch.tensor(2.0), 256)
        assert_same(ops.search_histogram_range(*args), reference_ops.search_histogram_range(*args))


def test_histogram_of_one_value_moves_to_the_value_s_bin() -> None:
    histogram, (low, high) = torch.zeros(10), unobserved()
    ops.observe_histogram_(torch.full((6,), 2.5), histogram, low, high, counter(), 16, IGNORE)
    assert histogram.sum() == 6
    ops.observe_histogram_(torch.tensor([0.0, 10.0]), histogram, low, high, counter(), 16, IGNORE)
    assert histogram.tolist() == [1, 0, 6, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("value", [3e38, 1e30, 1e-40, 0.0, 16777216.0])
def test_histogram_of_extreme_ranges(value: float) -> None:
    histogram, (low, high) = torch.zeros(128), unobserved()
    x = torch.tensor([-value, value / 2, value])
    for _ in range(2):
        ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    ops.observe_histogram_(torch.full((4,), value), histogram, low, high, counter(), 16, IGNORE)
    assert histogram.sum() == 10
    assert low.isfinite()
    assert high.isfinite()


def assert_refused_when_narrow(op: Any, which: int, dtype: torch.dtype) -> None:
    state = [torch.zeros(8), *unobserved(), counter()]
    state[which] = state[which].to(dtype)
    before = [t.clone() for t in state]
    with pytest.raises(RuntimeError, match="must be float32 or float64"):
        op(torch.randn(5), *state, 16, IGNORE)
    assert_same(state, before)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_histograms_too_narrow_to_count_in_are_refused(which: int, dtype: torch.dtype) -> None:
    assert_refused_when_narrow(ops.observe_histogram_, which, dtype)
    assert_refused_when_narrow(reference_ops.observe_histogram_, which, dtype)


# ----------------------------------------------------------------------- narrower buffers

HUGE = {torch.float64: 1e300, torch.float32: 3e38, torch.float16: 65504.0, torch.bfloat16: 3e38}


def is_narrower(buffer_dtype: torch.dtype, x_dtype: torch.dtype) -> bool:
    return HUGE[x_dtype] > torch.finfo(buffer_dtype).max


@pytest.mark.parametrize("constant", [None, 0.5, 1.0])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("policy", [IGNORE, RAISE, PROPAGATE])
@pytest.mark.parametrize(
    ("x_dtype", "buffer_dtype"), [(a, b) for a in FLOATS for b in FLOATS if is_narrower(b, a)]
)
def test_ranges_saturate_at_what_their_buffers_hold(
    x_dtype: torch.dtype, buffer_dtype: torch.dtype, policy: int, axis: int | None, constant: Any
) -> None:
    huge, most = HUGE[x_dtype], torch.finfo(buffer_dtype).max
    low, high = unobserved(None if axis is None else 2, buffer_dtype)
    for row in ([-huge, huge], [huge, -huge]):
        x = torch.tensor([row, row], dtype=x_dtype)
        args = (x, low, high, counter(), axis, constant, policy)
        assert_as_reference("observe_minmax_", *args)
        ops.observe_minmax_(*args)
        assert (low == -most).all()
        assert (high == most).all()


@pytest.mark.parametrize("infinity", [INF, -INF])
def test_infinities_propagate_into_narrower_buffers(infinity: float) -> None:
    low, high = unobserved()
    x = torch.tensor([0.0, infinity], dtype=torch.float64)
    ops.observe_minmax_(x, low, high, counter(), None, None, PROPAGATE)
    assert {float(low), float(high)} == {0.0, infinity}


@pytest.mark.parametrize("dtype", FLOATS)
def test_averages_move_across_the_whole_range(dtype: torch.dtype) -> None:
    """From one end to the other is further than the largest number."""
    most = torch.finfo(dtype).max
    low, high = unobserved(dtype=dtype)
    for end in (most, -most, most):
        args = (torch.full((3,), end, dtype=dtype), low, high, counter(), None, 0.25, IGNORE)
        assert_as_reference("observe_minmax_", *args)
        ops.observe_minmax_(*args)
    expected = (most * 0.5) * 0.75 + most * 0.25
    torch.testing.assert_close(float(low), expected, rtol=1e-2, atol=0)
    assert_same(low, high)


@pytest.mark.parametrize("bins", [7, 2048])
@pytest.mark.parametrize("policy", [IGNORE, RAISE, PROPAGATE])
def test_a_histogram_counts_what_is_beyond_its_range_at_the_ends(bins: int, policy: int) -> None:
    most = torch.finfo(torch.float32).max
    ours = [torch.zeros(bins), *unobserved(), counter()]
    reference = [t.clone() for t in ours]
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 1e300, 1e38):
        x = torch.randn(300_001, dtype=torch.float64, generator=generator) * factor
        for op, state in ((ops, ours), (reference_ops, reference)):
            op.observe_histogram_(x, *state, 16, policy)
        assert_same(ours[1:], reference[1:])
        torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-6)
    assert_same(ours[1:3], [torch.tensor(-most), torch.tensor(most)])
    assert ours[0].sum() == 900_003
    # Half of the second tensor at each end.
    assert float(ours[0][0]) > 149_000
    assert float(ours[0][-1]) > 149_000


# -------------------------------------------------------------------------------- search


def a_histogram(seed: int, bins: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    x = random_values((20000,), torch.float32, seed, kind)
    histogram, (low, high) = torch.zeros(bins), unobserved()
    reference_ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    return histogram, low, high


searches = pytest.mark.parametrize(
    ("bins", "levels"), [(2048, 256), (2048, 128), (128, 16), (64, 256), (500, 4)]
)
spread = pytest.mark.parametrize("kind", sorted(RANGES.keys() - {"constant", "zero"}))


@searches
@spread
def test_search_as_reference(kind: str, bins: int, levels: int) -> None:
    assert_as_reference("search_histogram_range", *a_histogram(bins, bins, kind), levels)


@pytest.mark.parametrize("bins", [1, 2, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_of_a_range_as_wide_as_numbers_go(bins: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    histogram = torch.ones(bins)
    for low, high in ((-most, 0.9 * most), (-4.2e38, 4.4e38)):
        if high > most:
            continue
        ends = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
        assert_as_reference("search_histogram_range", histogram, *ends, 16)
        found = ops.search_histogram_range(histogram, *ends, 16)
        assert all(bool(end.isfinite()) for end in found)


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_search_for_one_value_finds_it(kind: str) -> None:
    histogram, low, high = a_histogram(0, 64, kind)
    assert_as_reference("search_histogram_range", histogram, low, high, 16)
    assert_same(ops.search_histogram_range(histogram, low, high, 16), (low, high))


@searches
@spread
def test_search_as_torch_ao(kind: str, bins: int, levels: int) -> None:
    theirs = torch_observer.HistogramObserver(bins)
    theirs.dst_nbins = levels
    theirs.histogram, theirs.min_val, theirs.max_val = state = a_histogram(7, bins, kind)
    expected = theirs._non_linear_param_search()
    assert_same(ops.search_histogram_range(*state, levels), expected)


@pytest.mark.parametrize("factor", [1e-30, 1e30, 1e-38])
def test_search_answers_alike_at_any_scale(factor: float) -> None:
    # torch.ao's errors overflow or vanish here, and its answer is an empty range.
    histogram, low, high = a_histogram(0, 2048, "outliers")
    expected = ops.search_histogram_range(histogram, low, high, 256)
    found = ops.search_histogram_range(histogram, low * factor, high * factor, 256)
    width = float(high - low) / 2048
    for value, scaled in zip(expected, found, strict=True):
        assert abs(scaled.item() / factor - value.item()) < 3 * width


def test_search_of_the_widest_range() -> None:
    largest = torch.finfo(torch.float32).max
    histogram = torch.ones(128)
    low, high = ops.search_histogram_range(
        histogram, torch.tensor(-largest), torch.tensor(largest), 256
    )
    assert low.isfinite()
    assert high.isfinite()
    assert low < high


# ------------------------------------------------------------------------------- qparams


def range_of(seed: int, channels: int | None, magnitude: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = () if channels is None else (channels,)
    ends = torch.randn(2, *shape, generator=generator) * 10.0**magnitude
    return ends.amin(0), ends.amax(0)


channel_counts = st.sampled_from([None, 1, 3, 40])


@given(
    seeds,
    channel_counts,
    st.integers(-9, 9),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    quant_ranges(),
    st.sampled_from([AFFINE, SYMMETRIC, FLOAT_QPARAMS]),
)
def test_choose_qparams_as_reference(
    seed: int,
    channels: int | None,
    magnitude: int,
    dtype: torch.dtype,
    quant_range: tuple[int, int],
    scheme: int,
) -> None:
    if dtype == torch.float16:
        magnitude = max(-4, min(magnitude, 3))
    low, high = (t.to(dtype) for t in range_of(seed, channels, magnitude))
    if channels is not None and channels > 1:
        low[0], high[0] = INF, -INF
    assert_as_reference("choose_qparams", low, high, eps(dtype), *quant_range, scheme, 128)


SCHEMES = {
    torch.per_channel_affine: AFFINE,
    torch.per_channel_symmetric: SYMMETRIC,
    torch.per_channel_affine_float_qparams: FLOAT_QPARAMS,
}


@given(
    seeds,
    st.integers(-9, 9),
    quant_ranges(),
    st.sampled_from(list(SCHEMES)),
)
def test_choose_qparams_as_torch_ao(
    seed: int, magnitude: int, quant_range: tuple[int, int], qscheme: torch.qscheme
) -> None:
    dtype = torch.int16 if max(quant_range) <= 32767 else torch.uint16
    theirs = torch_observer.PerChannelMinMaxObserver(
        dtype=dtype, qscheme=qscheme, quant_min=quant_range[0], quant_max=quant_range[1]
    )
    theirs.min_val, theirs.max_val = low, high = range_of(seed, 5, magnitude)
    expected = theirs.calculate_qparams()
    middle = 2**15 if dtype == torch.uint16 else 0
    got = ops.choose_qparams(low, high, eps(), *quant_range, SCHEMES[qscheme], middle)
    assert_same(got, expected)


@pytest.mark.parametrize("quant_range", [(-(2**31), 2**31 - 1), (0, 2**31 - 1)])
@pytest.mark.parametrize("ends", [(-3.0, 0.0), (0.0, 3.0), (-1.0, 2.0)])
def test_choose_qparams_of_32_bits_stay_in_range(
    quant_range: tuple[int, int], ends: tuple[float, float]
) -> None:
    # torch.ao rounds through int32 here, which overflows.
    scale, zero_point = ops.choose_qparams(
        torch.tensor(ends[0]), torch.tensor(ends[1]), torch.tensor([1e-30]), *quant_range, AFFINE, 0
    )
    low, high = quant_range
    exact = low - round(ends[0] / ((ends[1] - ends[0]) / (high - low)))
    assert abs(zero_point.item() - max(low, min(exact, high))) <= 2**9
    assert scale.item() == pytest.approx((ends[1] - ends[0]) / (high - low))


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC, FLOAT_QPARAMS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_choose_qparams_without_a_least_scale(scheme: int, dtype: torch.dtype) -> None:
    low, high = (
        torch.tensor([0.0, -1.0, -0.0], dtype=dtype),
        torch.tensor([0.0, 1.0, 0.0], dtype=dtype),
    )
    args = (low, high, torch.zeros(1, dtype=dtype), 0, 255, scheme, 128)
    assert_as_reference("choose_qparams", *args)
    scale, _ = ops.choose_qparams(*args)
    assert scale[0] == scale[2] == 1
    assert 0 < scale[1] < 0.01


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC, FLOAT_QPARAMS])
def test_choose_qparams_of_nothing_observed(scheme: int) -> None:
    low, high = torch.tensor([INF, -1.0]), torch.tensor([-INF, 1.0])
    scale, zero_point = ops.choose_qparams(low, high, eps(), -128, 127, scheme, 5)
    assert scale[0] == 1
    assert zero_point[0] == 0
    assert scale[1] != 1


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC])
def test_choose_qparams_of_nan_stays_in_range(scheme: int) -> None:
    nan = torch.tensor([math.nan])
    scale, zero_point = ops.choose_qparams(nan, nan, eps(), -128, 127, scheme, 0)
    assert scale.isnan().all()
    assert -128 <= zero_point.item() <= 127


# ------------------------------------------------------------------------- fake-quantize


@given(st.data(), quant_ranges(), st.sampled_from([None, False, True]))
def test_fake_quantize_as_reference(
    data: st.DataObject, quant_range: tuple[int, int], on: bool | None
) -> None:
    x, axis, channels = data.draw(with_axis(tensors(nonfinite=True)))
    scale, zero_point = data.draw(qparams(channels, *quant_range))
    enabled = None if on is None else flag(on)
    args = (x, scale, zero_point, enabled, axis, *quant_range)
    assert_as_reference("fake_quantize", *args)
    assert_as_reference("fake_quantize_with_mask", *args)
    y, mask = ops.fake_quantize_with_mask(*args)
    assert y.stride() == torch.empty_like(x).stride()
    assert_as_reference("fake_quantize_backward", torch.randn_like(y), mask)


def torch_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int
) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis % x.dim(), low, high)


@given(
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    quant_ranges(),
)
def test_fake_quantize_as_torch(
    data: st.DataObject, dtype: torch.dtype, quant_range: tuple[int, int]
) -> None:
    x, axis, channels = data.draw(with_axis(tensors(st.just(dtype))))
    scale, zero_point = data.draw(qparams(channels, *quant_range, (torch.int32,)))
    # Beyond int64's range torch's conversion is undefined, see below.
    bound = min(2.0**60 * min(scale.tolist(), default=1.0), torch.finfo(dtype).max)
    x = x.clamp(-bound, bound).requires_grad_()
    expected = torch_fake_quantize(x, scale, zero_point, axis, *quant_range)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)

    for y in (
        routes.apply_fake_quantize(x, scale, zero_point, axis, *quant_range),
        ops.fake_quantize_with_mask(x, scale, zero_point, None, axis, *quant_range)[0],
    ):
        assert_same(y.detach(), expected.detach())
        (got,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(got, expected_grad, rtol=0, atol=0)
    with torch.no_grad():
        assert_same(
            routes.apply_fake_quantize(x, scale, zero_point, axis, *quant_range), expected.detach()
        )


def test_float_zero_points_as_torch() -> None:
    # torch's own build may fuse x / scale + zero_point into one rounding, which tips the very
    # few elements that lie within rounding of a tie.
    x = random_values((64, 1000), torch.float32, 0) * 3
    scale, zero_point = torch.rand(64) * 0.1 + 0.01, torch.rand(64) * 200
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 255)
    y = ops.fake_quantize(x, scale, zero_point, None, 0, 0, 255)
    assert (y != expected).float().mean() < 1e-4
    assert ((y - expected).abs() <= scale[:, None] * 1.0001).all()


def test_fp64_keeps_its_precision() -> None:
    x = random_values((1000,), torch.float64, 0)
    scale, zero_point = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([3])
    y = ops.fake_quantize(x, scale, zero_point, None, None, -128, 127)
    exact = ((x * (1 / scale)).round() + 3).clamp(-128, 127) - 3
    assert_same(y, exact * scale)
    # torch gives a result of fp32 precision.
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -128, 127)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zero_point_dtype", [torch.int32, torch.int64, torch.float32])
def test_values_beyond_the_range_saturate(
    dtype: torch.dtype, zero_point_dtype: torch.dtype
) -> None:
    # torch.fake_quantize sends +inf, and what overflows int64, to the lower end.
    x = torch.tensor([INF, 6e4, 1.0, 0.0, -6e4, -INF], dtype=dtype)
    scale, zero_point = torch.tensor([2.0**-60]), torch.tensor([3], dtype=zero_point_dtype)
    y, mask = ops.fake_quantize_with_mask(x, scale, zero_point, None, None, -8, 7)
    steps = y.double() / 2.0**-60 + 3
    if dtype == torch.float16:  # which cannot hold the steps themselves
        assert (y == 0).all()
    else:
        assert steps.tolist() == [7, 7, 7, 3, -8, -8]
    assert bits_of(mask, 6) == [0, 0, 0, 1, 0, 0]


# Per tensor, in long rows, in rows shorter than a vector, and a tensor shorter than one.
NAN_CASES = [((300,), None), ((3, 200), 0), ((40, 7), 1), ((3,), None)]


@pytest.mark.parametrize("zero_point_dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(("shape", "axis"), NAN_CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays_nan_and_its_gradient_passes(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    axis: int | None,
    zero_point_dtype: torch.dtype,
    any_isa: list[str],
) -> None:
    x = random_values(shape, dtype, 0)
    x.view(-1)[::3] = math.nan
    x.view(-1)[1::7] = INF
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = (
        torch.full((channels,), 0.125),
        torch.zeros(channels, dtype=zero_point_dtype),
    )
    for isa in any_isa:
        _C.set_isa(isa)
        for y in (
            ops.fake_quantize(x, scale, zero_point, None, axis, -50, 50),
            ops.learnable_fake_quantize(x, scale, zero_point.float(), axis, -50, 50, 1.0),
        ):
            assert_same(y.isnan(), x.isnan())
            assert_same(y[x == INF], torch.full_like(y[x == INF], 6.25))
        leaf = x.clone().requires_grad_()
        y = routes.apply_fake_quantize(leaf, scale, zero_point, axis, -50, 50)
        grad = torch.full_like(x, 2.0)
        grad.view(-1)[::5] = math.nan
        y.backward(grad)
        # Masking is a product: a NaN from above is never lost.
        expected = torch.where(x.isfinite() & (x.abs() < 6.3) | x.isnan() | grad.isnan(), grad, 0.0)
        assert_same(leaf.grad, expected)


@pytest.mark.parametrize(("shape", "axis"), NAN_CASES)
def test_fused_ops_keep_nan_and_leave_it_out_of_the_range(
    shape: tuple[int, ...], axis: int | None, any_isa: list[str]
) -> None:
    x = random_values(shape, torch.float32, 0)
    x.view(-1)[::3] = math.nan
    for isa in any_isa:
        _C.set_isa(isa)
        channels = 1 if axis is None else x.shape[axis]
        low, high = unobserved(channels)
        scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
        state, count = (low, high, scale, zero_point), counter()
        y, mask = ops.fused_observe_fake_quantize_with_mask(
            *(x, flag(True), flag(True), *state, count, eps()),
            *(axis, None, 0, 255, AFFINE, 0, IGNORE),
        )
        assert_same(y.isnan(), x.isnan())
        assert all(bits_of(mask, x.numel()))
        assert count == x.isnan().sum()
        assert all(t.isfinite().all() for t in state)


@pytest.mark.parametrize("axis", [None, 0])
def test_nan_makes_the_gradient_of_its_learnable_scale_nan(
    axis: int | None, any_isa: list[str]
) -> None:
    x = random_values((3, 40), torch.float32, 0)
    x[1, 7] = math.nan
    channels = 1 if axis is None else 3
    scale, zero_point = torch.full((channels,), 0.1), torch.zeros(channels)
    for isa in any_isa:
        _C.set_isa(isa)
        dx, dscale, dzero_point = ops.learnable_fake_quantize_backward(
            torch.ones_like(x), x, scale, zero_point, axis, -50, 50, 1.0
        )
        assert dx[1, 7] == 1
        assert dscale.isnan().tolist() == ([True] if axis is None else [False, True, False])
        assert dzero_point.isfinite().all()


@pytest.mark.parametrize("quant_range", [(-(2**31), 2**31 - 1), (-(2**23), 2**23 - 1)])
def test_wide_quantized_ranges_as_torch(quant_range: tuple[int, int]) -> None:
    x = random_values((1000,), torch.float32, 0) * 1e3
    for scale, zero_point in [(1e-6, 0), (1e-3, 7), (0.37, -100000)]:
        s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
        expected = torch.fake_quantize_per_tensor_affine(x, s, z, *quant_range)
        assert_same(ops.fake_quantize(x, s, z, None, None, *quant_range), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_mask_lies_as_the_result_does(layout: str, axis: int | None) -> None:
    x = LAYOUTS[layout](random_values((3, 5, 7, 2), torch.float32, 0), 1)
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.full((channels,), 0.01), torch.zeros(channels, dtype=torch.int32)
    y, mask = ops.fake_quantize_with_mask(x, scale, zero_point, None, axis, -50, 50)
    assert mask.dtype == torch.uint8
    assert mask.numel() == 8 * math.ceil(x.numel() / 64)
    inside = torch.empty_like(y, dtype=torch.bool).copy_(x.abs() / 0.01 < 50.4)
    assert bits_of(mask, x.numel()) == in_memory_order(inside).int().tolist()
    assert 0 < sum(bits_of(mask, x.numel())) < x.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout: str) -> None:
    x = random_values((2, 3, 4, 5), torch.float32, 0).contiguous(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    grad = LAYOUTS[layout](random_values((2, 3, 4, 5), torch.float32, 1), 2)
    results = []
    for fake_quantize in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -99, 99),
        lambda x: routes.apply_fake_quantize(x, scale, zero_point, None, -99, 99),
    ):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(fake_quantize(leaf), leaf, grad)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradients_of_gradients() -> None:
    x = random_values((50,), torch.float32, 0)
    scale, zero_point = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    results = []
    for fake_quantize in (
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -99, 99),
        lambda x: routes.apply_fake_quantize(x, scale, zero_point, None, -99, 99),
    ):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(fake_quantize(leaf**2).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((first**3).sum(), leaf)[0])
    assert_same(results[1], results[0])
    assert results[0].abs().sum() > 0


def test_a_flag_that_is_off_gives_x_back() -> None:
    x = random_values((7,), torch.float32, 0)
    scale, zero_point = torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)
    for dtype in (torch.uint8, torch.int64, torch.int32, torch.bool):
        off, on = flag(False, dtype), flag(True, dtype)
        assert routes.apply_fake_quantize(x, scale, zero_point, None, -8, 7, off) is x
        assert routes.apply_fake_quantize(x, scale, zero_point, None, -8, 7, on) is not x
        y = ops.fake_quantize(x, scale, zero_point, off, None, -8, 7)
        assert_same(y, x)
        assert y.data_ptr() != x.data_ptr()


# ---------------------------------------------------------------------------------- fused


@given(
    st.data(),
    streams(nonfinite=True),
    averaging,
    quant_ranges(),
    st.sampled_from([AFFINE, SYMMETRIC, FLOAT_QPARAMS]),
    policies,
    st.booleans(),
    st.booleans(),
)
def test_fused_as_reference(
    data: st.DataObject,
    stream: list[Tensor],
    constant: float | None,
    quant_range: tuple[int, int],
    scheme: int,
    policy: int,
    observe: bool,
    quantize: bool,
) -> None:
    _, axis, channels = data.draw(with_axis(st.just(stream[0])))
    if 0 in stream[0].shape:
        axis, channels = None, 1
    zero_point_dtype = torch.float32 if scheme == FLOAT_QPARAMS else torch.int32
    state = [
        *unobserved(channels),
        torch.ones(channels),
        torch.zeros(channels, dtype=zero_point_dtype),
        counter(),
    ]
    settings = (eps(), axis, constant, *quant_range, scheme, 1, policy)
    if policy == PROPAGATE:  # what follows from an infinite range is nobody's concern
        stream = [x.nan_to_num(0.0, 1.0, -1.0) for x in stream]
    for x in stream:
        args = (x, flag(observe), flag(quantize), *state, *settings)
        assert_as_reference("fused_observe_fake_quantize", *args)
        assert_as_reference("fused_observe_fake_quantize_with_mask", *args)
        assert_as_reference("observe_qparams_", x, flag(observe), *state, *settings)
        _, (_, _, _, *state), _ = called(ops.fused_observe_fake_quantize, args)
        state = state[:5]


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


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_fused_is_its_three_steps(channels: int | None, quantize: bool, needs_grad: bool) -> None:
    args = fused_arguments(channels, quantize=quantize)
    low, high = unobserved(channels)
    axis = args[8]
    for seed in range(3):
        x = random_values((3, 50), torch.float32, seed).requires_grad_(needs_grad)
        y = routes.apply_fused(x, *args)
        ops.observe_minmax_(x.detach(), low, high, counter(), axis, 0.1, IGNORE)
        scale, zero_point = ops.choose_qparams(low, high, eps(), -128, 127, AFFINE, 0)
        assert_same(args[2:6], [low, high, scale, zero_point])
        if not quantize:
            assert y is x
            continue
        expected = ops.fake_quantize(x.detach(), scale, zero_point, None, axis, -128, 127)
        assert_same(y.detach(), expected)
        assert y.requires_grad == needs_grad
        if needs_grad:
            grad = torch.randn_like(y)
            (got,) = torch.autograd.grad(y, x, grad)
            steps = routes.apply_fake_quantize(x, scale, zero_point, axis, -128, 127)
            assert_same(got, torch.autograd.grad(steps, x, grad)[0])


def test_fused_without_observing_leaves_every_buffer() -> None:
    args = fused_arguments(observe=False)
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    for x in (torch.randn(9), torch.full((3,), math.nan), torch.randn(9, requires_grad=True)):
        routes.apply_fused(x, *args)
    assert_same([a for a in args if isinstance(a, Tensor)], before)


# ------------------------------------------------------------------------------ learnable


@given(st.data(), quant_ranges().filter(lambda r: r[1] < 2**14))
def test_learnable_as_reference(data: st.DataObject, quant_range: tuple[int, int]) -> None:
    x, axis, channels = data.draw(with_axis(tensors()))
    scale, zero_point = data.draw(qparams(channels, *quant_range, (torch.float32,)))
    settings = (axis, *quant_range, 0.25)
    assert_as_reference("learnable_fake_quantize", x, scale, zero_point, *settings)
    grad = torch.randn_like(x)
    args = (grad, x, scale, zero_point, *settings)
    got = ops.learnable_fake_quantize_backward(*args)
    expected = reference_ops.learnable_fake_quantize_backward(*args)
    assert_same(got[0], expected[0])
    for ours, theirs, bound in zip(got[1:], expected[1:], sum_bounds(*args), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ((ours - theirs).abs() <= 1e-5 * bound).all()


def sum_bounds(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """Sums of the sizes of what the gradients of scale and zero point are sums of."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    s, z = (t.double().reshape(shape) for t in (scale, zero_point))
    low, high, factor = settings
    steps = (x.double() / s).abs().clamp(max=2.0 * (high - low)) + z.abs() + high - low
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    sums = []
    for size in (steps, s.expand(x.shape)):
        terms = grad.double().abs() * size * factor + 1e-30
        sums.append((terms.sum(dims) if dims else terms).reshape(-1))
    return sums[0], sums[1]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("quant_range", [(-128, 127), (0, 255), (0, 15)])
def test_learnable_as_torch(axis: int | None, quant_range: tuple[int, int]) -> None:
    # Where torch's backward pass agrees with its own forward pass: no negative zero point per
    # tensor (it takes the next integer), and nothing near a tie (it rounds the sum there).
    low, high = quant_range
    channels = {None: 1, 0: 4, 1: 500}[axis]
    scale = torch.rand(channels) * 0.05 + 0.02
    zero_point = torch.randint(0 if axis is None else low, high + 1, (channels,)).float()
    steps = torch.randint(2 * low - 50, 2 * high + 50, (4, 500)) + 0.8 * (torch.rand(4, 500) - 0.5)
    x = steps * scale.reshape((-1, 1) if axis == 0 else (1, -1))
    grad = random_values(x.shape, torch.float32, 1)
    if axis is None:
        theirs, where = torch._fake_quantize_learnable_per_tensor_affine, ()
    else:
        theirs, where = torch._fake_quantize_learnable_per_channel_affine, (axis,)
    results = []
    for op, axes in (
        (theirs, where),
        (ops.learnable_fake_quantize, (axis,)),
        (routes.apply_learnable_fake_quantize, (axis,)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        y = op(*leaves, *axes, low, high, 0.3)
        results.append((y.detach(), torch.autograd.grad(y, leaves, grad)))
    expected, expected_grads = results[0]
    for y, grads in results[1:]:
        assert_same(y, expected)
        assert_same(grads[0], expected_grads[0])
        torch.testing.assert_close(grads[1:], expected_grads[1:], rtol=1e-4, atol=1e-3)


def test_learnable_gradient_belongs_to_the_forward_pass() -> None:
    # torch rounds a fractional zero point in one way forward and in another backward.
    scale, zero_point = torch.tensor([0.5]), torch.tensor([-3.7])
    x = torch.linspace(-4, 4, 33)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    y = routes.apply_learnable_fake_quantize(*leaves, None, -8, 7, 1.0)
    dx, dscale, dzero_point = torch.autograd.grad(y.sum(), leaves)
    quantized = (x / 0.5).round() - 4
    inside = (quantized >= -8) & (quantized <= 7)
    assert_same(dx, inside.float())
    error = torch.where(inside, (y.detach() - x) / 0.5, (y.detach() / 0.5))
    torch.testing.assert_close(dscale, error.sum().reshape(1))
    torch.testing.assert_close(dzero_point, -0.5 * (~inside).sum().reshape(1))


def test_learnable_has_no_second_derivative() -> None:
    leaves = [torch.randn(9), torch.tensor([0.1]), torch.tensor([0.0])]
    leaves = [t.requires_grad_() for t in leaves]
    y = routes.apply_learnable_fake_quantize(*leaves, None, -8, 7, 1.0)
    (first,) = torch.autograd.grad((y**2).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("axis", [None, 1])
def test_learnable_of_an_empty_tensor_has_zero_gradients(axis: int | None) -> None:
    channels = 1 if axis is None else 3
    leaves = [
        torch.empty(0, 3).requires_grad_(),
        torch.full((channels,), 0.5).requires_grad_(),
        torch.full((channels,), 1.0).requires_grad_(),
    ]
    y = ops.learnable_fake_quantize(*leaves, axis, 0, 15, 1.0)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all((g == 0).all() for g in grads)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]


# ------------------------------------------------------------------------- quantized weights


@given(op_calls.quantize_per_channel())
def test_weights_as_reference(call: op_calls.Call) -> None:
    name, args = call
    assert_as_reference(name, *args)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_weights_as_torch_where_they_are_not_finite(any_isa: list[str]) -> None:
    x = random_values((6, 50), torch.float32, 0, "outliers")
    x[:, ::9], x[:, 1::9], x[:, 2::9], x[:, 3::9] = math.nan, INF, -INF, 3e38
    scale = torch.linspace(0.01, 1.0, 6)
    expected = torch.quantize_per_channel(
        x, scale, torch.zeros(6, dtype=torch.int64), 0, torch.qint8
    )
    for isa in any_isa:
        _C.set_isa(isa)
        got = ops.quantize_per_channel(x, scale, 0, -128, 127)
        assert_same(got, expected.int_repr())


@pytest.mark.parametrize(
    ("x", "scale", "settings"),
    [
        (torch.randn(3, 4).double(), torch.ones(3), (0, -128, 127)),
        (torch.randn(3, 4), torch.ones(2), (0, -128, 127)),
        (torch.randn(3, 4), torch.ones(3), (2, -128, 127)),
        (torch.randn(3, 4), torch.ones(3), (0, 0, 255)),
        (torch.randn(3, 4), torch.ones(3), (0, 7, -8)),
    ],
    ids=["fp64", "another number of channels", "no such axis", "not int8", "no range"],
)
def test_weights_that_do_not_fit_are_refused(x: Tensor, scale: Tensor, settings: Any) -> None:
    with pytest.raises(RuntimeError):
        ops.quantize_per_channel(x, scale, *settings)


# ------------------------------------------------------------------ every op, in every setting


def samples(
    dtype: torch.dtype = torch.float32, numel: int = 120, layout: str = "contiguous"
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments for each op, in a few variants."""
    values = random_values((4, numel // 20, 5), dtype, 0, "outliers")
    odd_values = values.clone()
    odd_values.view(-1)[::7] = math.nan
    x, odd = (LAYOUTS[layout](v, 1) for v in (values, odd_values))
    for axis in (None, 0, 1, -1):
        channels = 1 if axis is None else x.shape[axis]
        scale = torch.linspace(0.01, 0.02, channels)
        zero_point = torch.arange(channels, dtype=torch.int32) % 7
        state = [*unobserved(channels), scale.clone(), zero_point.clone(), counter(), eps()]
        for values in (x, odd):
            yield "observe_minmax_", (values, *unobserved(channels), counter(), axis, 0.1, IGNORE)
            settings = (axis, None, -128, 127, AFFINE, 0, IGNORE)
            yield "observe_qparams_", (values, flag(True), *state, *settings)
            fused = (values, flag(True), flag(True), *state, *settings)
            yield "fused_observe_fake_quantize", fused
            yield "fused_observe_fake_quantize_with_mask", fused
            for z in (zero_point, zero_point + 0.25):
                args = (values, scale, z, None, axis, -128, 127)
                yield "fake_quantize", args
                yield "fake_quantize_with_mask", args
        args = (scale, zero_point + 0.4, axis, -128, 127, 0.5)
        yield "learnable_fake_quantize", (x, *args)
        yield "learnable_fake_quantize_backward", (torch.cos(x), x, *args)
        if axis is not None and dtype == torch.float32:
            for values in (x, odd):
                yield "quantize_per_channel", (values, scale, axis, -127, 127)
    _, mask = ops.fake_quantize_with_mask(
        x, torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32), None, None, -128, 127
    )
    yield "fake_quantize_backward", (torch.empty_like(x).copy_(x.cos()), mask)
    histogram, (low, high) = torch.zeros(300), unobserved()
    yield "observe_histogram_", (odd, histogram, low, high, counter(), 16, IGNORE)
    reference_ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    yield "observe_histogram_", (odd * 3, histogram, low, high, counter(), 16, IGNORE)
    yield "search_histogram_range", (histogram, low, high, 256)
    yield "choose_qparams", (torch.randn(9) - 3, torch.randn(9) + 3, eps(), 0, 255, AFFINE, 0)


def outcome(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    results, arguments, raised = called(getattr(ops, name), args)
    assert not raised
    results = () if results is None else results
    return [*((results,) if isinstance(results, Tensor) else results), *arguments[1:]]


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bytes(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        if name == "learnable_fake_quantize_backward":  # sums in another order
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
        else:
            assert ours.stride() == theirs.stride()
            assert torch.equal(bytes_of(ours), bytes_of(theirs)), name


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_gives_the_same_bytes(
    dtype: torch.dtype, layout: str, any_isa: list[str]
) -> None:
    assert "scalar" in any_isa
    for name, args in samples(dtype, 1540, layout):
        _C.set_isa("scalar")
        expected = outcome(name, args)
        for isa in any_isa:
            _C.set_isa(isa)
            assert _C.isa() == isa
            assert_same_bytes(name, outcome(name, args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(dtype: torch.dtype) -> None:
    for name, args in samples(dtype, 280_040):
        torch.set_num_threads(1)
        expected = outcome(name, args)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for got, wanted in zip(outcome(name, args), expected, strict=True):
                assert torch.equal(bytes_of(got), bytes_of(wanted)), name


def test_large_tensors_as_reference() -> None:
    for name, args in samples(torch.float32, 280_040):
        if name not in ("learnable_fake_quantize_backward", "observe_histogram_"):
            assert_as_reference(name, *args)


class NeverWaits(TorchDispatchMode):
    """Refuses what would wait for a device: a look at a value, a size that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), name
        return func(*args, **(kwargs or {}))


def test_the_fallback_never_waits_for_the_device() -> None:
    for name, args in samples():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastquant::{name}", "CompositeExplicitAutograd"
        )
        if name != "search_histogram_range":
            with NeverWaits():
                _, _, raised = called(reference_ops.OPS[name], args)
            assert not raised


def test_set_isa_knows_its_names(any_isa: list[str]) -> None:
    with pytest.raises(ValueError, match="isas"):
        _C.set_isa("z80")
    assert _C.isa() in any_isa
    assert set(any_isa) <= set(_C.built_isas())


@pytest.mark.parametrize("name", sorted(reference_ops.OPS))
def test_opcheck(name: str) -> None:
    chosen = [args for sample, args in samples() if sample == name]
    chosen += [args for sample, args in samples(layout="permuted") if sample == name][:1]
    op = getattr(ops, name)
    for args in chosen[:: max(1, len(chosen) // 4)]:
        torch.library.opcheck(op, tuple(a.clone() if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("name", ["fake_quantize_with_mask", "learnable_fake_quantize"])
def test_opcheck_with_gradients(name: str) -> None:
    args = next(args for sample, args in samples() if sample == name)
    leaves = tuple(
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )
    if name == "fake_quantize_with_mask":
        leaves = (leaves[0], *args[1:])
    torch.library.opcheck(getattr(ops, name), leaves)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "values"),
    {
        "an integer tensor": ("x", torch.arange(12).reshape(3, 4)),
        "no such axis": ("axis", 2),
        "no such axis from the end": ("axis", -3),
        "another number of channels": ("x", torch.randn(4, 3)),
        "min_val of another size": ("low", torch.full((2,), INF)),
        "max_val of another size": ("high", torch.full((4,), -INF)),
    }.values(),
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: str, values: Any) -> None:
    given_ = {"x": torch.randn(3, 4), "axis": 0}
    given_["low"], given_["high"] = unobserved(3)
    given_[change] = values
    x, axis, low, high = (given_[k] for k in ("x", "axis", "low", "high"))
    scale, zero_point = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    buffers = [low, high, scale, zero_point, count := counter()]
    before = [b.clone() for b in buffers]
    settings = (eps(), axis, 0.1, -8, 7, AFFINE, 0, IGNORE)
    for call in (
        lambda: ops.observe_minmax_(x, low, high, count, axis, 0.1, IGNORE),
        lambda: ops.observe_qparams_(x, flag(True), *buffers, *settings),
        lambda: ops.fused_observe_fake_quantize(x, flag(True), flag(True), *buffers, *settings),
        lambda: routes.apply_fused(x, flag(True), flag(True), *buffers, *settings),
    ):
        with pytest.raises(RuntimeError):
            call()
        assert_same(buffers, before)


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_with_mask"])
def test_qparams_that_do_not_fit_are_refused(name: str) -> None:
    op, x = getattr(ops, name), torch.randn(3, 4)
    scale, zero_point = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    for bad in (
        (x, scale, zero_point, None, 1, -8, 7),
        (x, scale, zero_point, None, None, -8, 7),
        (x, scale, zero_point, None, 2, -8, 7),
        (x, scale[:2], zero_point, None, 0, -8, 7),
        (x, scale, zero_point[:2], None, 0, -8, 7),
        (x.long(), scale, zero_point, None, 0, -8, 7),
    ):
        with pytest.raises(RuntimeError):
            op(*bad)


# ------------------------------------------------------------------------- round the dispatcher

NO_GRADIENT = torch.zeros(0)


def with_gradient(function: Callable[..., Tensor], x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The result, and what it makes of a gradient."""
    leaf = x.detach().clone() if x.is_contiguous() else x.detach()
    y = function(leaf.requires_grad_(), *args)
    (gradient,) = torch.autograd.grad(y, leaf, torch.cos(y.detach() * 3))
    return y.detach(), gradient


def without_gradient(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    return function(*args), NO_GRADIENT


ROUND_AND_THROUGH: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "fused": (routes.apply_fused, op_calls.fused),
    "fake_quantize": (
        lambda x, scale, zero_point, enabled, axis, *quant_range: routes.apply_fake_quantize(
            x, scale, zero_point, axis, *quant_range, enabled
        ),
        op_calls.fake_quantize,
    ),
}


@pytest.mark.parametrize("kind", ROUND_AND_THROUGH)
@pytest.mark.parametrize("run", [with_gradient, without_gradient])
@given(st.data())
def test_round_the_dispatcher_or_through_it_is_the_same(
    kind: str, run: Callable[..., Any], data: st.DataObject
) -> None:
    function, calls = ROUND_AND_THROUGH[kind]
    _, args = data.draw(calls())
    outcomes = []
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_calls, "fast_calls", fast and fast_calls.fast_calls)
            outcomes.append(called(lambda *own: run(function, *own), args))
    assert_same(outcomes[0], outcomes[1])


@given(op_calls.search_histogram_range(), op_calls.schemes())
def test_histogram_qparams_are_those_of_the_range_found(
    call: Any, config: tuple[int, int, int, int]
) -> None:
    _, (histogram, low, high, levels) = call
    smallest = eps(low.dtype)
    found = ops.search_histogram_range(histogram, low, high, levels)
    expected = ops.choose_qparams(*found, smallest, *config)
    got = routes.histogram_qparams(histogram, low, high, smallest, levels, *config)
    assert_same(got, expected)


def test_a_counter_that_nothing_can_be_kept_in_is_refused_and_changes_nothing() -> None:
    x = torch.tensor([1.0, math.nan])
    for dtype in (torch.int16, torch.uint8, torch.bool):
        args = fused_arguments()
        args[6] = counter().to(dtype)
        low, high, *_ = args[2:]
        for call in (
            lambda args=args: routes.apply_fused(x, *args),
            lambda args=args: routes.observe_minmax(
                x, args[2], args[3], args[6], None, 0.1, IGNORE
            ),
        ):
            with pytest.raises(RuntimeError):
                call()
            assert_same([low, high], unobserved())


@pytest.mark.parametrize("run", [with_gradient, without_gradient])
def test_qparams_that_lie_in_memory_as_their_negatives(run: Callable[..., Any]) -> None:
    x, zero_point = random_values((9,), torch.float32, 0), torch.tensor([3], dtype=torch.int32)
    scale = torch.tensor([0.1])
    negated = torch._neg_view(-scale)
    assert negated.is_neg()
    results = [
        run(lambda x, s: routes.apply_fake_quantize(x, s, zero_point, None, -9, 9), x, s)
        for s in (scale, negated)
    ]
    assert_same(*results)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_default_device_elsewhere_changes_nothing(needs_grad: bool) -> None:
    args, expected_args = fused_arguments(3), fused_arguments(3)
    x = random_values((3, 70), torch.float32, 0).requires_grad_(needs_grad)
    run = with_gradient if needs_grad else without_gradient
    expected = run(routes.apply_fused, x, *expected_args)
    with torch.device("meta"):
        y, gradient = run(routes.apply_fused, x, *args)
    assert_same((y, gradient, args), (*expected, expected_args))


# ------------------------------------------------------------------------ autocast, compiling


def test_autocast_leaves_the_dtype_alone() -> None:
    layer = torch.nn.Linear(8, 8)
    args = fused_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = routes.apply_fused(layer(torch.randn(4, 8)), *args)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert args[2] < args[3]


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_fused_compiles_to_one_graph(needs_grad: bool, quantize: bool) -> None:
    def step(x: Tensor, args: list[Any]) -> Tensor:
        return routes.apply_fused(x * 2, *args) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_args, compiled_args = (fused_arguments(3, quantize=quantize) for _ in range(2))
    for seed in range(2):
        x = random_values((3, 20), torch.float32, seed).requires_grad_(needs_grad)
        expected, y = step(x, eager_args), compiled(x, compiled_args)
        assert_same(y.detach(), expected.detach())
        assert_same(compiled_args, eager_args)
        assert y.requires_grad == needs_grad
        if needs_grad:
            assert_same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_other_ops_compile_to_one_graph() -> None:
    def step(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ops.observe_minmax_(x, low, high, counter(), None, None, IGNORE)
        new_scale, new_zero_point = ops.choose_qparams(low, high, eps(), 0, 255, AFFINE, 0)
        y = routes.apply_fake_quantize(x, new_scale, new_zero_point, None, 0, 255, flag(True))
        return y + routes.apply_learnable_fake_quantize(x, scale, zero_point, None, 0, 15, 1.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (step, compiled):
        leaves = [random_values((30,), torch.float32, 0), torch.tensor([0.1]), torch.tensor([3.2])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        low, high = unobserved()
        y = run(*leaves, low, high)
        outcomes.append([y.detach(), low, high, *torch.autograd.grad(y.sum(), leaves)])
    assert_same(outcomes[1], outcomes[0])


def test_no_op_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, args in samples():
            outcome(name, args)
        x = torch.randn(9, requires_grad=True)
        low, high = unobserved()
        ops.observe_minmax_(x, low, high, counter(), None, None, IGNORE)
        assert not low.requires_grad
        routes.apply_fused(x, *fused_arguments()).sum().backward()
