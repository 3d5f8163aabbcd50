"""The ops that observe: ranges and histograms, beside the reference and torch.ao."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import observer as torch_observer

from fastquant import _C
from fastquant._native import ops
from fastquant._native import reference as reference_ops
from op_calls import (
    IGNORE,
    INF,
    PROPAGATE,
    RAISE,
    assert_as_reference,
    assert_same,
    averaging,
    called,
    channel_histograms,
    counter,
    policies,
    unobserved,
)
from strategies import (
    FLOATS,
    RANGES,
    random_values,
    seeds,
    shapes,
    streams,
    with_axis,
)

float32 = st.just(torch.float32)


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


@given(channel_histograms())
@settings(max_examples=40)
def test_histograms_of_channels_as_reference(stream: list[tuple[str, tuple[Any, ...]]]) -> None:
    ours, reference = (tuple(t.clone() for t in stream[0][1][1:5]) for _ in range(2))
    for name, (x, *_, axis, rate, policy) in stream:
        outcomes = []
        for op, state in ((getattr(ops, name), ours), (reference_ops.OPS[name], reference)):
            try:
                op(x, *state, axis, rate, policy)
                outcomes.append(True)
            except RuntimeError:
                outcomes.append(False)
        assert outcomes[0] == outcomes[1]
        assert_same(ours[1:], reference[1:])
        # Masses are added up in fp64, in an order of each one's own.
        tolerance = torch.finfo(ours[0].dtype).eps
        torch.testing.assert_close(ours[0], reference[0], rtol=tolerance, atol=1e-9)


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
