"""The CUDA ops and kernels, compiled for the CPU and run thread by thread, against the CPU's own.

What takes a real GPU is in test_cuda.py; what this shows and what not, in
`tests/native/cuda_emulation/emulation.h`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import batch_norm_calls
import cuda_emulation
import op_calls
from cuda_emulation import Emulation
from fastquant._native import ops
from fastquant._native import reference as reference_ops
from op_calls import IGNORE, INF, PROPAGATE, RAISE, SINGLE_CALLS, Call, eps, fused_args, minmax_args
from strategies import FLOATS, LAYOUTS, random_values

pytestmark = pytest.mark.skipif(
    cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not())
)


CPU = torch.device("cpu")

# Under sanitizers everything takes longer, and when looked over for races.
SANITIZED = bool(cuda_emulation.FLAGS) or cuda_emulation.RACES
EXAMPLES = 4 if SANITIZED else 20
GEOMETRIES = op_calls.GEOMETRIES[:: 4 if SANITIZED else 1]
BATCH_NORM_GEOMETRIES = batch_norm_calls.GEOMETRIES[:: 3 if SANITIZED else 1]
OFFSETS = op_calls.OFFSETS[:: 3 if SANITIZED else 1]


@pytest.fixture(scope="module")
def library() -> Emulation:
    return Emulation(cuda_emulation.build())


@pytest.fixture
def emulation(library: Emulation) -> Iterator[Emulation]:
    library.reset()
    yield library
    library.reset()


def assert_as_cpu(emulation: Emulation, call: Call) -> None:
    name, args = call
    got = op_calls.outcome(emulation.op(name), op_calls.all_moved(args, CPU))
    expected = op_calls.outcome(getattr(ops, name), op_calls.own_arguments(name, args))
    op_calls.assert_same_outcome(name, got, expected)


# ------------------------------------------------------------------------------ results


def test_every_op_has_a_cuda_kernel(emulation: Emulation) -> None:
    for name in reference_ops.OPS.keys() - reference_ops.ONLY_ON_CPU:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has_kernel(f"fastquant_emulated::{name}", "CPU"), name


@pytest.mark.parametrize("kind", sorted(SINGLE_CALLS))
@settings(max_examples=EXAMPLES)
@given(st.data(), st.sampled_from([1, 4, 132]))
def test_ops_as_cpu(
    emulation: Emulation, kind: str, data: st.DataObject, multiprocessors: int
) -> None:
    emulation.multiprocessors(multiprocessors)
    assert_as_cpu(emulation, data.draw(SINGLE_CALLS[kind]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis", "layout"), GEOMETRIES)
def test_geometries_as_cpu(
    emulation: Emulation,
    shape: tuple[int, ...],
    axis: int | None,
    layout: str,
    dtype: torch.dtype,
) -> None:
    for call in op_calls.calls_of_geometry(shape, axis, layout, dtype):
        assert_as_cpu(emulation, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("shape", "axis", "layout"), GEOMETRIES[::4])
def test_geometries_of_other_dtypes_as_cpu(
    emulation: Emulation,
    shape: tuple[int, ...],
    axis: int | None,
    layout: str,
    dtype: torch.dtype,
) -> None:
    for call in op_calls.calls_of_geometry(shape, axis, layout, dtype):
        assert_as_cpu(emulation, call)


def placements() -> list[tuple[Any, ...]]:
    """Every offset of small tensors; of large ones, which take long, a third of them each."""
    large = [g for g in op_calls.PLACED_GEOMETRIES if math.prod(g[0]) > 5000]
    return [
        (*geometry, *offset)
        for geometry in op_calls.PLACED_GEOMETRIES
        for i, offset in enumerate(OFFSETS)
        if geometry not in large or (large.index(geometry) + i) % 3 == 0
    ]


@pytest.mark.parametrize(("shape", "axis", "layout", "dtype", "offset"), placements())
def test_any_place_in_memory_as_cpu(
    emulation: Emulation,
    shape: tuple[int, ...],
    axis: int | None,
    layout: str,
    dtype: torch.dtype,
    offset: int,
) -> None:
    for call in op_calls.calls_of_placed(shape, axis, layout, dtype, offset):
        assert_as_cpu(emulation, call)


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 1), ((2, 0, 3), 2)])
def test_empty_tensors_as_cpu(
    emulation: Emulation, shape: tuple[int, ...], axis: int | None
) -> None:
    for call in op_calls.calls_of_geometry(shape, axis, "contiguous", torch.float32):
        assert_as_cpu(emulation, call)


@settings(max_examples=EXAMPLES)
@given(batch_norm_calls.cases(), st.sampled_from([1, 4, 132]))
def test_batch_norm_as_reference(
    emulation: Emulation, case: batch_norm_calls.Case, multiprocessors: int
) -> None:
    emulation.multiprocessors(multiprocessors)
    batch_norm_calls.assert_as_reference(emulation.op, case)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        (*geometry, dtype)
        for dtype, every in zip(FLOATS, (1, 4, 4, 1), strict=True)
        for geometry in BATCH_NORM_GEOMETRIES[::every]
    ],
)
def test_batch_norm_geometries_as_reference(
    emulation: Emulation, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    for case in batch_norm_calls.cases_of_geometry(shape, layout, dtype):
        batch_norm_calls.assert_as_reference(emulation.op, case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_far_from_zero_as_reference(emulation: Emulation, layout: str) -> None:
    batch_norm_calls.assert_as_reference(emulation.op, batch_norm_calls.far_from_zero(layout))


def test_batch_norm_without_channels_as_reference(emulation: Emulation) -> None:
    case = batch_norm_calls.case_of(torch.zeros(1, 0), 0)
    batch_norm_calls.assert_as_reference(emulation.op, case)


@pytest.mark.parametrize("policy", [IGNORE, PROPAGATE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranges_saturate_as_on_the_cpu(
    emulation: Emulation, dtype: torch.dtype, policy: int
) -> None:
    x = torch.tensor([[1e300, -1e300, INF], [1.0, -1e300, -INF]], dtype=torch.float64)
    for axis, channels in ((None, 1), (0, 2), (1, 3)):
        low, high = (torch.full((channels,), end, dtype=dtype) for end in (INF, -INF))
        args = (x, low, high, torch.zeros(1, dtype=torch.int64), axis, None, policy)
        assert_as_cpu(emulation, ("observe_minmax_", args))


def assert_histograms_as_cpu(
    emulation: Emulation, calls: list[Call], capturing: bool = False
) -> None:
    state = calls[0][1][1:5]
    ours = tuple(t.clone() for t in state)
    for name, args in calls:
        x, settings = args[0], op_calls.histogram_settings(args)
        _, policy, *_ = settings
        emulation.capturing(capturing and policy != RAISE)
        got = op_calls.outcome(emulation.op(name), (x, *ours, *settings))
        expected = op_calls.outcome(getattr(ops, name), (x, *state, *settings))
        op_calls.assert_same_outcome(name, got, expected)


@settings(max_examples=EXAMPLES)
@given(op_calls.histograms(), st.booleans())
def test_histograms_as_cpu(emulation: Emulation, calls: list[Call], capturing: bool) -> None:
    assert_histograms_as_cpu(emulation, calls, capturing)


@pytest.mark.parametrize("numel", [300, 40_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "factors",
    [
        (1e-30, 1.0, 1e30),  # a range that grows beyond all measure
        (1.0, 3e37, 7e37),  # wider than fp32 can compute with
        (0.0, 0.0, 1.0),  # one value first
        (1.0, 1.3, 1.0, 5.0),
        (1.0, 1e300, 1e38, 1e300),  # beyond fp32
    ],
)
def test_histograms_of_extreme_ranges_as_cpu(
    emulation: Emulation, numel: int, dtype: torch.dtype, factors: tuple[float, ...]
) -> None:
    for bins, rate in ((2048, 16), (100, 7)):
        state = [torch.zeros(bins), torch.tensor(INF), torch.tensor(-INF)]
        count = torch.zeros(1, dtype=torch.int64)
        stream = [random_values((numel,), dtype, seed) * f for seed, f in enumerate(factors)]
        calls = [("observe_histogram_", (x + 1000, *state, count, rate, IGNORE)) for x in stream]
        assert_histograms_as_cpu(emulation, calls)


@pytest.mark.parametrize("numel", [50, 40_000])
def test_nan_in_a_histogram_makes_its_range_nan(emulation: Emulation, numel: int) -> None:
    # To raise, as the CPU does, would be to wait for the device.
    histogram, low, high = torch.ones(64), torch.tensor(-1.0), torch.tensor(1.0)
    count = torch.zeros(1, dtype=torch.int64)
    x = torch.randn(numel)
    x[7] = float("nan")
    for _ in range(2):
        emulation.op("observe_histogram_")(x, histogram, low, high, count, 16, PROPAGATE)
        assert low.isnan()
        assert high.isnan()
        assert (histogram == 1).all()
        x = torch.randn(numel)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_sums_do_not_depend_on_the_order_of_threads(emulation: Emulation, axis: int | None) -> None:
    x = torch.randn(300, 130)
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.full((channels,), 0.05), torch.full((channels,), 3.3)
    args = (torch.cos(x), x, scale, zero_point, axis, 0, 15, 0.3)
    first, *others = (emulation.op("learnable_fake_quantize_backward")(*args) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_does_not_depend_on_the_order_of_threads(
    emulation: Emulation, layout: str
) -> None:
    case = batch_norm_calls.case_of(LAYOUTS[layout](torch.randn(20, 24, 9, 9), 0))

    def outcome() -> list[Tensor]:
        args = case.observing()
        made = emulation.op("observe_batch_norm_")(*args)
        gradients = emulation.op("batch_norm_fake_quantize_backward")(*case.backward(*made))
        return [*made, *gradients, *(a for a in args if isinstance(a, Tensor))]

    first, *others = (outcome() for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------- launches

X = torch.randn(64, 96, 12, 12)  # more than one block's worth
SMALL = torch.randn(8, 16, 3, 3)
CHANNELS_LAST = X.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("x", [X, SMALL, CHANNELS_LAST], ids=["large", "small", "channels_last"])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_launches_of_observing(emulation: Emulation, x: Tensor, axis: int | None) -> None:
    assert emulation.launches("observe_minmax_", *minmax_args(x, axis)) == 1


@pytest.mark.parametrize("op", ["", "_with_mask"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("x", "expected"), [(X, 2), (SMALL, 1), (CHANNELS_LAST, 2)])
def test_launches_of_fused(
    emulation: Emulation, op: str, axis: int | None, x: Tensor, expected: int
) -> None:
    args = fused_args(x, axis)
    assert emulation.launches("fused_observe_fake_quantize" + op, *args) == expected


@pytest.mark.parametrize(("x", "expected"), [(X, 2), (SMALL, 1)])
def test_launches_of_histograms(emulation: Emulation, x: Tensor, expected: int) -> None:
    low, high = torch.tensor(INF), torch.tensor(-INF)
    args = (torch.zeros(2048), low, high, torch.zeros(1, dtype=torch.int64), 16, IGNORE)
    assert emulation.launches("observe_histogram_", x, *args) == expected
    assert emulation.launches("observe_histogram_", x * 2, *args) == expected
    assert emulation.launches("search_histogram_range", *args[:3], 256) == 1


def test_launches_of_the_rest(emulation: Emulation) -> None:
    for axis in (None, 1):
        channels = 1 if axis is None else X.shape[axis]
        scale, zero_point = torch.ones(channels), torch.zeros(channels)
        args = (X, scale, zero_point.int(), None, axis, 0, 255)
        assert emulation.launches("fake_quantize", *args) == 1
        _, mask = emulation.op("fake_quantize_with_mask")(*args)
        assert emulation.launches("fake_quantize_backward", X, mask) == 1
        learnable = (X, scale, zero_point, axis, 0, 255, 1.0)
        assert emulation.launches("learnable_fake_quantize", *learnable) == 1
        assert emulation.launches("learnable_fake_quantize_backward", X, *learnable) == 1
    assert (
        emulation.launches("choose_qparams", torch.zeros(9), X[0, 0, 0, :9], eps(), 0, 9, 0, 0) == 1
    )


@pytest.mark.parametrize("x", [X, SMALL, CHANNELS_LAST], ids=["large", "small", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_launches_of_batch_norm(emulation: Emulation, x: Tensor, training: bool) -> None:
    case = batch_norm_calls.case_of(x, training=training)
    assert emulation.launches("observe_batch_norm_", *case.observing()) == 1
    made = emulation.op("observe_batch_norm_")(*case.observing())
    assert emulation.launches("batch_norm_fake_quantize", *case.values(*made)) == 1
    backward = "batch_norm_fake_quantize_backward"
    assert emulation.launches(backward, *case.backward(*made)) == (2 if training else 1)


def test_nothing_is_launched_for_nothing(emulation: Emulation) -> None:
    empty = torch.empty(0, 3)
    assert emulation.launches("observe_minmax_", *minmax_args(empty, 1)) == 0
    scale, zero_point = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    assert emulation.launches("fake_quantize", empty, scale, zero_point, None, 1, 0, 255) == 0


# --------------------------------------------------------------------------------- graphs


def test_ops_in_a_graph_have_tickets_of_their_own(emulation: Emulation) -> None:
    # The emulation has 64 of them; then graphs have to clear some.
    emulation.capturing(True)
    x = X[:, :4].contiguous()
    for _ in range(16):
        for axis in (None, 1):
            assert_as_cpu(emulation, ("observe_minmax_", minmax_args(x, axis)))
    emulation.capturing(False)
    assert_as_cpu(emulation, ("observe_minmax_", minmax_args(X, 1)))


def test_graphs_do_not_wait(emulation: Emulation) -> None:
    emulation.capturing(True)
    with pytest.raises(RuntimeError, match="graph"):
        emulation.op("observe_minmax_")(*minmax_args(X, None, RAISE))


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.arange(12).reshape(3, 4)},
        {0: torch.randn(4, 4)},
        {1: torch.full((2,), INF)},
        {2: torch.full((4,), -INF)},
        {1: torch.full((3,), INF, device="meta")},
        {3: torch.zeros(1, dtype=torch.int32)},
        {4: 2},
    ],
)
def test_what_does_not_fit_is_refused(emulation: Emulation, change: dict[int, Any]) -> None:
    args = list(minmax_args(torch.randn(3, 4), 0))
    for position, value in change.items():
        args[position] = value
    before = [a.clone() for a in args[1:4]]
    with pytest.raises(RuntimeError):
        emulation.op("observe_minmax_")(*args)
    for was, is_now in zip(before, args[1:4], strict=True):
        assert was.is_meta or torch.equal(was, is_now)
