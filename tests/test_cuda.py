"""The CUDA kernels on a GPU: the CPU's results, nothing waited for, graphs, streams, launches.

`pytest -m cuda` runs these alone. Without a GPU, test_cuda_emulation.py runs the same kernels.
"""

from __future__ import annotations

import copy
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batch_norm_calls
import fastquant
import op_calls
from fastquant._native import ops
from fastquant._native import reference as reference_ops
from fastquant._native.settings import FusedSettings
from fastquant.nn.qat.plain import fused_on_cuda
from op_calls import IGNORE, INF, PROPAGATE, RAISE, SINGLE_CALLS, Call, eps, fused_args, minmax_args
from strategies import FLOATS, random_values


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of torch"
    why_not: str | None = fastquant.build_info()["cuda"]["why_not"]
    return why_not


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_why_not() is not None, reason=str(_why_not())),
]

GPU = torch.device("cuda")

# Under compute-sanitizer everything takes longer.
SANITIZED = os.environ.get("FASTQUANT_SANITIZED") == "1"
GEOMETRIES = op_calls.GEOMETRIES[:: 3 if SANITIZED else 1]
BATCH_NORM_GEOMETRIES = batch_norm_calls.GEOMETRIES[:: 3 if SANITIZED else 1]
OFFSETS = op_calls.OFFSETS[:: 5 if SANITIZED else 1]


# --------------------------------------------------------------------------------- helpers


def on_gpu(x: Tensor, device: torch.device = GPU) -> Tensor:
    return op_calls.moved(x, device)


def on_gpu_all(args: tuple[Any, ...], device: torch.device = GPU) -> tuple[Any, ...]:
    return op_calls.all_moved(args, device)


def assert_as_cpu(call: Call, device: torch.device = GPU) -> None:
    name, args = call
    op = getattr(ops, name)
    got = op_calls.outcome(op, on_gpu_all(args, device))
    expected = op_calls.outcome(op, op_calls.own_arguments(name, args))
    op_calls.assert_same_outcome(name, got, expected)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches_of(run: Callable[[], object]) -> int:
    """How many kernels, copies and fills a call starts."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_values(shape, dtype, seed).to(GPU)


# ---------------------------------------------------------------------------------- parity


def test_every_op_has_a_cuda_kernel() -> None:
    for name in reference_ops.OPS.keys() - reference_ops.ONLY_ON_CPU:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has_kernel(f"fastquant::{name}", "CUDA"), name


@pytest.mark.parametrize("kind", sorted(SINGLE_CALLS))
@settings(max_examples=200)
@given(st.data())
def test_ops_as_cpu(kind: str, data: st.DataObject) -> None:
    assert_as_cpu(data.draw(SINGLE_CALLS[kind]()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis", "layout"), GEOMETRIES)
def test_geometries_as_cpu(
    shape: tuple[int, ...], axis: int | None, layout: str, dtype: torch.dtype
) -> None:
    for call in op_calls.calls_of_geometry(shape, axis, layout, dtype):
        assert_as_cpu(call)


@pytest.mark.parametrize(("dtype", "offset"), OFFSETS)
@pytest.mark.parametrize(("shape", "axis", "layout"), op_calls.PLACED_GEOMETRIES)
def test_any_place_in_memory_as_cpu(
    shape: tuple[int, ...], axis: int | None, layout: str, dtype: torch.dtype, offset: int
) -> None:
    for call in op_calls.calls_of_placed(shape, axis, layout, dtype, offset):
        assert_as_cpu(call)


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 1), ((2, 0, 3), 2)])
def test_empty_tensors_as_cpu(shape: tuple[int, ...], axis: int | None) -> None:
    for call in op_calls.calls_of_geometry(shape, axis, "contiguous", torch.float32):
        assert_as_cpu(call)


def assert_batch_norm_as_reference(case: batch_norm_calls.Case) -> None:
    batch_norm_calls.assert_as_reference(lambda name: getattr(ops, name), case, on_gpu_all)


@settings(max_examples=200)
@given(batch_norm_calls.cases())
def test_batch_norm_as_reference(case: batch_norm_calls.Case) -> None:
    assert_batch_norm_as_reference(case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "layout"), BATCH_NORM_GEOMETRIES)
def test_batch_norm_geometries_as_reference(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    for case in batch_norm_calls.cases_of_geometry(shape, layout, dtype):
        assert_batch_norm_as_reference(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_far_from_zero_as_reference(layout: str) -> None:
    assert_batch_norm_as_reference(batch_norm_calls.far_from_zero(layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_batch_norm_as_reference(layout: str, dtype: torch.dtype) -> None:
    for case in batch_norm_calls.cases_of_geometry((32, 64, 112, 112), layout, dtype):
        assert_batch_norm_as_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis", "channels_last"),
    [
        ((32, 64, 112, 112), None, False),
        ((32, 64, 112, 112), 1, False),
        ((32, 64, 112, 112), 1, True),
        ((512, 4608), 0, False),
        ((8192, 1024), 1, False),
    ],
)
def test_large_tensors_as_cpu(
    shape: tuple[int, ...], axis: int | None, channels_last: bool, dtype: torch.dtype
) -> None:
    layout = "channels_last" if channels_last else "contiguous"
    for call in op_calls.calls_of_geometry(shape, axis, layout, dtype):
        assert_as_cpu(call)


def assert_histograms_as_cpu(calls: list[Call]) -> None:
    state = calls[0][1][1:5]
    ours = on_gpu_all(state)
    for name, args in calls:
        x, settings = args[0], op_calls.histogram_settings(args)
        op = getattr(ops, name)
        got = op_calls.outcome(op, (on_gpu(x), *ours, *settings))
        expected = op_calls.outcome(op, (x, *state, *settings))
        op_calls.assert_same_outcome(name, got, expected)


@settings(max_examples=200)
@given(op_calls.histograms())
def test_histograms_as_cpu(calls: list[Call]) -> None:
    assert_histograms_as_cpu(calls)


@pytest.mark.parametrize("kind", ["normal", "constant", "positive", "outliers"])
def test_histograms_of_large_tensors_as_cpu(kind: str) -> None:
    state = (torch.zeros(2048), torch.tensor(INF), torch.tensor(-INF))
    count = torch.zeros(1, dtype=torch.int64)
    stream = [random_values((5_000_003,), torch.float32, seed, kind) * seed for seed in (1, 2, 1)]
    assert_histograms_as_cpu([("observe_histogram_", (x, *state, count, 16, 0)) for x in stream])


@pytest.mark.parametrize("numel", [50, 400_000])
def test_nan_in_a_histogram_makes_its_range_nan(numel: int) -> None:
    histogram, low, high = torch.ones(64, device=GPU), *torch.tensor([-1.0, 1.0], device=GPU)
    count = torch.zeros(1, dtype=torch.int64, device=GPU)
    x = values(numel)
    x[7] = float("nan")
    with waiting_is_an_error():
        ops.observe_histogram_(x, histogram, low, high, count, 16, PROPAGATE)
    assert low.isnan()
    assert high.isnan()
    assert (histogram == 1).all()


def test_sums_are_the_same_every_time() -> None:
    x = values(100, 64, 30)
    for axis in (None, 0, 1):
        channels = 1 if axis is None else x.shape[axis]
        scale = torch.full((channels,), 0.05, device=GPU)
        args = (torch.cos(x), x, scale, scale * 66, axis, 0, 15, 0.3)
        first, *others = (ops.learnable_fake_quantize_backward(*args) for _ in range(20))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ----------------------------------------------------------------------------- very large


def _free_bytes() -> int:
    free: int = torch.cuda.mem_get_info()[0]
    return free


EDGE = 2**31
BEYOND = EDGE + 10  # divided by 3, too


@pytest.fixture
def beyond_31_bits() -> Iterator[Tensor]:
    # One process at a time, where pytest-xdist has several: together they might lack memory.
    with (Path(tempfile.gettempdir()) / "fastquant-much-memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _free_bytes() < 24 * 2**30:
            pytest.skip("needs 24 GiB of GPU memory")
        x = torch.zeros(BEYOND, dtype=torch.bfloat16, device=GPU)
        x[0], x[EDGE - 1], x[-2], x[-1] = 1.0, -3.0, float("inf"), 5.0
        yield x
        del x
        torch.cuda.empty_cache()


def test_ranges_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    x = beyond_31_bits
    low, high = torch.tensor([INF, -INF], device=GPU)
    count = torch.zeros(1, dtype=torch.int64, device=GPU)
    ops.observe_minmax_(x, low, high, count, None, None, IGNORE)
    assert (low.item(), high.item(), count.item()) == (-3.0, 5.0, 1)
    for shape, axis, lows, highs in (
        ((3, -1), 0, [0.0, 0.0, -3.0], [1.0, 0.0, 5.0]),
        ((-1, 3), 1, [0.0, -3.0, 0.0], [1.0, 0.0, 5.0]),
    ):
        low, high = torch.full((3,), INF, device=GPU), torch.full((3,), -INF, device=GPU)
        ops.observe_minmax_(x.view(shape), low, high, count, axis, None, IGNORE)
        assert (low.tolist(), high.tolist()) == (lows, highs)
    assert count.item() == 3


def test_histograms_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    histogram, low, high = torch.zeros(16, device=GPU), *torch.tensor([INF, -INF], device=GPU)
    count = torch.zeros(1, dtype=torch.int64, device=GPU)
    for times in (1, 2):
        ops.observe_histogram_(beyond_31_bits, histogram, low, high, count, 16, IGNORE)
        assert (low.item(), high.item(), count.item()) == (-3.0, 5.0, times)
        # fp32 holds a multiple of 256 or 512 here.
        assert histogram[6].item() == pytest.approx(times * (BEYOND - 4), abs=512)
        assert histogram[[0, 8, 15]].tolist() == [times] * 3


def test_fake_quantize_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    x = beyond_31_bits
    scale = torch.tensor([0.5], device=GPU)
    zero_point = torch.tensor([0], dtype=torch.int32, device=GPU)
    marked = [0, EDGE - 1, -2, -1]
    y, mask = ops.fake_quantize_with_mask(x, scale, zero_point, None, None, -4, 7)
    assert y[marked].tolist() == [1.0, -2.0, 3.5, 3.5]
    assert mask.numel() == (BEYOND + 63) // 64 * 8
    assert mask[EDGE // 8 - 1 :].tolist() == [0b0111_1111, 0b1111_1111, *[0] * 7]
    del y
    assert ops.fake_quantize_backward(x, mask)[marked[:2]].tolist() == [1.0, 0.0]
    del mask
    y = ops.fake_quantize(
        x.view(-1, 3), scale.expand(3).clone(), zero_point.expand(3).clone(), None, 1, -4, 7
    )
    assert y.view(-1)[marked].tolist() == [1.0, -2.0, 3.5, 3.5]


def test_fused_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    low, high = torch.tensor([INF], device=GPU), torch.tensor([-INF], device=GPU)
    scale, zero_point = torch.ones(1, device=GPU), torch.zeros(1, dtype=torch.int32, device=GPU)
    on = torch.ones(1, dtype=torch.uint8, device=GPU)
    count = torch.zeros(1, dtype=torch.int64, device=GPU)
    buffers = (on, on, low, high, scale, zero_point, count, eps().to(GPU))
    y = ops.fused_observe_fake_quantize(beyond_31_bits, *buffers, None, None, 0, 16, 0, 0, IGNORE)
    assert (low.item(), high.item(), count.item()) == (-3.0, 5.0, 1)
    assert (scale.item(), zero_point.item()) == (0.5, 6)
    assert y[[0, 1, EDGE - 1, -2, -1]].tolist() == [1.0, 0.0, -3.0, 5.0, 5.0]


def test_learnable_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    x = beyond_31_bits
    x[-2] = 0.0  # in place of infinity, whose gradient none of this is about
    scale, zero_point = torch.tensor([0.5], device=GPU), torch.tensor([2.0], device=GPU)
    settings = (scale, zero_point, None, -2, 9, 1.0)
    y = ops.learnable_fake_quantize(x, *settings)
    assert y[[0, 1, EDGE - 1, -1]].tolist() == [1.0, 0.0, -2.0, 3.5]
    grads = ops.learnable_fake_quantize_backward(y.fill_(1.0), x, *settings)
    assert grads[0][[0, 1, EDGE - 1, -1]].tolist() == [1.0, 1.0, 0.0, 0.0]
    # Outside: quant_min - zero_point and quant_max - zero_point; -scale for each.
    assert grads[1].item() == -4.0 + 7.0
    assert grads[2].item() == -0.5 * 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, -1), (-1, 3)])
def test_batch_norm_beyond_31_bits(
    beyond_31_bits: Tensor, shape: tuple[int, ...], training: bool
) -> None:
    x = beyond_31_bits.view(shape)
    beyond_31_bits[-2] = 2.0  # in place of infinity
    marked = [0, 1, EDGE - 1, BEYOND - 2, BEYOND - 1]
    channels = [i % 3 if len(shape) == 2 else i // (BEYOND // 3) for i in marked]
    case = batch_norm_calls.case_of(torch.zeros(2, 3), training=training, bounds=(-INF, INF))
    zeros, ones = torch.zeros(3), torch.ones(3)
    parameters = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
    _, *observing = on_gpu_all(replace(case, averaging_constant=None, **parameters).observing())
    norm, quantizer = ops.observe_batch_norm_(x, *observing)
    mean, _, gain, _ = norm[:, channels]
    expected = (beyond_31_bits[marked].float() - mean) * gain
    low, high = observing[11:13]
    assert (low.item(), high.item()) == (expected.min().item(), max(1.5, expected.max().item()))
    args = (norm, quantizer, training, -INF, INF, 0, 255)
    y = ops.batch_norm_fake_quantize(x, *observing[:2], *args)
    half_a_step = quantizer[0].item() / 2
    torch.testing.assert_close(
        y.view(-1)[marked].float(), expected, rtol=0.01, atol=half_a_step * 1.01
    )
    grad_x, grad_weight, grad_bias = ops.batch_norm_fake_quantize_backward(x, x, *args)
    assert grad_bias.sum().item() == 1 - 3 + 2 + 5
    products = beyond_31_bits[marked].double() * expected
    assert grad_weight.sum().item() == pytest.approx(products.sum().item(), rel=0.01)
    if not training:
        assert torch.equal(grad_x, x * norm[1, 0].to(x.dtype))


def test_sums_beyond_31_bits(beyond_31_bits: Tensor) -> None:
    x = beyond_31_bits
    _, *settings = fused_args(x[:1], None)
    bounds, of_tensor = (0.0, INF), FusedSettings(*settings)._replace(averaging_constant=None)
    y, mask = ops.add_observe_fake_quantize(x, x, *bounds, *of_tensor.per_tensor())
    assert (of_tensor.min_val.item(), of_tensor.max_val.item()) == (0.0, 10.0)
    assert y[EDGE - 1].item() == 0.0
    assert y[[0, -1]].tolist() == pytest.approx([2.0, 10.0], rel=0.02)
    assert mask.numel() == (BEYOND + 63) // 64 * 8
    assert mask[0].item() == 1
    assert mask[EDGE // 8 - 1].item() == 0


# ------------------------------------------------------------------------- modules, not waiting

MODULES: dict[str, Callable[[], nn.Module]] = {
    "MinMaxObserver": fastquant.MinMaxObserver,
    "MovingAverageMinMaxObserver": fastquant.MovingAverageMinMaxObserver,
    "PerChannelMinMaxObserver": fastquant.PerChannelMinMaxObserver,
    "MovingAveragePerChannelMinMaxObserver": fastquant.MovingAveragePerChannelMinMaxObserver,
    "HistogramObserver": fastquant.HistogramObserver,
    "FakeQuantize": fastquant.FakeQuantize,
    "FakeQuantize per channel": lambda: fastquant.FakeQuantize(
        observer=fastquant.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    ),
    "FusedMovingAvgObsFakeQuantize": fastquant.FusedMovingAvgObsFakeQuantize,
}


@pytest.mark.parametrize("numel", [10, 30_000])
@pytest.mark.parametrize("name", MODULES)
def test_modules_as_on_the_cpu_without_waiting(name: str, numel: int) -> None:
    ours, theirs = MODULES[name]().to(GPU), MODULES[name]()
    stream = [random_values((10, numel // 10, 3), torch.float32, seed) for seed in range(4)]
    # The first tensor of a per-channel module sets the size of its buffers.
    ours(stream[0].to(GPU))
    theirs(stream[0])
    for x in stream[1:]:
        moved = x.to(GPU)
        with waiting_is_an_error():
            y = ours(moved)
        assert torch.equal(y.cpu(), theirs(x))
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b), key
    for a, b in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_as_on_the_cpu_without_waiting(name: str) -> None:
    ours, theirs = MODULES[name]().to(GPU), MODULES[name]()
    x = random_values((10, 40, 3), torch.float32, 0)
    leaf, expected_leaf = x.to(GPU).requires_grad_(), x.clone().requires_grad_()
    ours(leaf)
    theirs(expected_leaf)
    with waiting_is_an_error():
        (ours(leaf * 1) * leaf.detach().cos()).sum().backward()
    (theirs(expected_leaf * 1) * x.cos()).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), expected_leaf.grad)


def test_flags_are_read_on_the_device() -> None:
    module = fastquant.FusedMovingAvgObsFakeQuantize().to(GPU)
    x = values(1000)
    module(x)
    before = [t.clone() for t in module.state_dict().values()]
    with waiting_is_an_error():
        module.disable_observer()
        quantized = module(x * 3)
        module.disable_fake_quant()
        same = module(x * 3)
    for was, is_now in zip(before[2:], list(module.state_dict().values())[2:], strict=True):
        assert torch.equal(was, is_now)
    assert not torch.equal(quantized, x * 3)
    assert torch.equal(same, x * 3)


def test_raising_waits_and_leaves_everything() -> None:
    x = values(50_000)
    x[17] = float("nan")
    state = [torch.tensor(v, device=GPU) for v in (-1.0, 1.0)]
    count = torch.zeros(1, dtype=torch.int64, device=GPU)
    with pytest.raises(RuntimeError, match="1 non-finite"):
        ops.observe_minmax_(x, *state, count, None, None, RAISE)
    assert [s.item() for s in state] == [-1.0, 1.0]


# ---------------------------------------------------------------------- launches and memory

X = (64, 96, 56, 56)
SMALL = (8, 16, 3, 3)


def histogram_args(x: Tensor) -> tuple[Any, ...]:
    histogram, low, high = torch.zeros(2048, device=GPU), *torch.tensor([INF, -INF], device=GPU)
    return x, histogram, low, high, torch.zeros(1, dtype=torch.int64, device=GPU), 16, IGNORE


@pytest.mark.parametrize("shape", [X, SMALL])
def test_launches(shape: tuple[int, ...]) -> None:
    small = shape == SMALL
    for x in (values(*shape), values(*shape).to(memory_format=torch.channels_last)):
        for axis in (None, 0, 1):
            minmax, fused = minmax_args(x, axis), fused_args(x, axis)
            assert launches_of(lambda args=minmax: ops.observe_minmax_(*args)) == 1
            for op in (
                ops.fused_observe_fake_quantize,
                ops.fused_observe_fake_quantize_with_mask,
            ):
                assert launches_of(lambda op=op, args=fused: op(*args)) == (1 if small else 2)
        args = histogram_args(x)
        assert launches_of(lambda args=args: ops.observe_histogram_(*args)) == (1 if small else 2)
        assert launches_of(lambda args=args: ops.search_histogram_range(*args[1:4], 256)) == 1


@pytest.mark.parametrize("shape", [X, SMALL])
@pytest.mark.parametrize("axis", [None, 1])
def test_launches_of_the_rest(shape: tuple[int, ...], axis: int | None) -> None:
    x = values(*shape)
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.ones(channels, device=GPU), torch.zeros(channels, device=GPU)
    args = (x, scale, zero_point.int(), None, axis, 0, 255)
    _, mask = ops.fake_quantize_with_mask(*args)
    learnable = (x, scale, zero_point, axis, 0, 255, 1.0)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (ops.fake_quantize, args),
        (ops.fake_quantize_with_mask, args),
        (ops.fake_quantize_backward, (x, mask)),
        (ops.learnable_fake_quantize, learnable),
        (ops.learnable_fake_quantize_backward, (x, *learnable)),
        (ops.choose_qparams, (-scale, scale, eps().to(GPU), 0, 255, 0, 0)),
        (ops.observe_qparams_, (x, *fused_args(x, axis)[2:])),
    ]
    for op, op_args in calls:
        assert launches_of(lambda op=op, op_args=op_args: op(*op_args)) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [X, SMALL])
def test_launches_of_fused_ops(shape: tuple[int, ...], training: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = values(*shape).to(memory_format=layout)
        case = batch_norm_calls.case_of(x, training=training)
        observing = on_gpu_all(case.observing()[1:])
        parameters = (1, 1 / 255, 0)
        norm, _ = ops.observe_batch_norm_(x, *observing)
        quantizer = torch.tensor(parameters, dtype=torch.float64, device=GPU)
        value_args = (x, *observing[:2], norm, quantizer, training, 0.0, INF, 0, 255)
        backward_args = (x, x, *value_args[3:])
        _, *settings = fused_args(x, None)
        sum_args = (x, x, 0.0, INF, *FusedSettings(*settings).per_tensor())
        calls: list[tuple[Callable[..., Any], tuple[Any, ...], int]] = [
            (ops.observe_batch_norm_, (x, *observing), 1),
            (ops.batch_norm_fake_quantize, value_args, 1),
            (ops.batch_norm_fake_quantize_backward, backward_args, 2 if training else 1),
            (ops.add_observe_fake_quantize, sum_args, 2),
        ]
        for op, args, expected in calls:
            assert launches_of(lambda op=op, args=args: op(*args)) == expected


@pytest.mark.parametrize("shape", [X, SMALL])
def test_nothing_is_allocated_besides_results(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], int]] = [
        (ops.observe_minmax_, minmax_args(x, None), 0),
        (ops.observe_minmax_, minmax_args(x, 1), 0),
        (ops.observe_histogram_, histogram_args(x), 0),
        (ops.fused_observe_fake_quantize, fused_args(x, None), 1),
        (ops.fused_observe_fake_quantize_with_mask, fused_args(x, 1), 2),
        (ops.observe_batch_norm_, (x, *on_gpu_all(batch_norm_calls.case_of(x).observing()[1:])), 2),
    ]
    for op, args, results in calls:
        op(*args)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        op(*args)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == results


# ---------------------------------------------------------------------------------- graphs


class Graph:
    """A call recorded once, to be replayed on new data."""

    def __init__(self, run: Callable[[Tensor], Any], x: Tensor) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = run(self._x)

    def __call__(self, x: Tensor) -> Any:
        self._x.copy_(x)
        self._graph.replay()
        return self._result


@pytest.mark.parametrize("numel", [1_000, 900_000])
@pytest.mark.parametrize("name", MODULES)
def test_graphs_of_modules_replay_on_new_data(name: str, numel: int) -> None:
    module = MODULES[name]().to(GPU)
    stream = [values(10, numel // 10, seed=seed) * (seed + 1) for seed in range(5)]
    module(stream[0])
    eager = copy.deepcopy(module)
    graph = Graph(module, stream[0])
    for x in stream:
        assert torch.equal(graph(x), eager(x))
        for (key, a), b in zip(
            module.state_dict().items(), eager.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), key


def test_one_graph_of_many_calls() -> None:
    shapes = [(1000,), (900_000,), (64, 30, 56, 56), (8, 300, 7, 7)]
    xs = [values(*shape) for shape in shapes]
    observers = [fastquant.MovingAverageMinMaxObserver().to(GPU) for _ in xs]
    channels = [fastquant.PerChannelMinMaxObserver(ch_axis=0).to(GPU) for _ in xs]
    histograms = [fastquant.HistogramObserver().to(GPU) for _ in xs]
    modules = [*observers, *channels, *histograms]
    for module, x in zip(modules, xs * 3, strict=True):
        module(x)
    expected = copy.deepcopy(modules)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for module, x in zip(modules, xs * 3, strict=True):
            module(x)
    for factor in (2.0, 1.5):
        for x in xs:
            x.mul_(factor)
        graph.replay()
        for module, x in zip(expected, xs * 3, strict=True):
            module(x)
        for module, other in zip(modules, expected, strict=True):
            for a, b in zip(module.buffers(), other.buffers(), strict=True):
                assert torch.equal(a, b)


def test_graphs_and_eager_calls_side_by_side() -> None:
    # All recorded on one stream, replayed on several while others run: none may share tickets.
    xs = [values(2_000_000, seed=seed) * (seed + 1) for seed in range(6)]
    histograms = [fastquant.HistogramObserver().to(GPU) for _ in xs]
    expected = [fastquant.HistogramObserver().to(GPU) for _ in xs]
    for module, x in zip(expected, xs, strict=True):
        for _ in range(20):
            module(x)
    graphs = []
    for module, x in zip(histograms[:3], xs, strict=False):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            module(x)
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 3:
                    graphs[i].replay()
                else:
                    histograms[i](xs[i])
    torch.cuda.synchronize()
    for module, other in zip(histograms, expected, strict=True):
        assert torch.equal(module.histogram, other.histogram)
        assert torch.equal(module.min_val, other.min_val)


def test_streams_side_by_side() -> None:
    xs = [values(64, 30, 56, 56, seed=seed) * (seed + 1) for seed in range(8)]
    results = [minmax_args(x, 1) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(10):
        torch.cuda.synchronize()
        for args, stream in zip(results, streams, strict=True):
            with torch.cuda.stream(stream):
                ops.observe_minmax_(*args[:5], None, IGNORE)
    torch.cuda.synchronize()
    for x, (_, low, high, *_) in zip(xs, results, strict=True):
        assert torch.equal(low, x.amin((0, 2, 3)))
        assert torch.equal(high, x.amax((0, 2, 3)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = fastquant.QuantStub()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(32, 10)
        self.dequant = fastquant.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.relu2(self.conv2(x)).mean((2, 3))
        result: Tensor = self.dequant(self.fc(x))
        return result


@pytest.fixture
def same_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN chooses the same kernels, eager and recorded: bins are those of equal numbers."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize("backend", ["fbgemm", "x86", "qnnpack"])
def test_graphs_of_prepared_models(backend: str) -> None:
    model = Net().eval()
    model.qconfig = fastquant.get_default_qconfig(backend)
    model = fastquant.fuse_modules(model, [["conv1", "bn1", "relu1"], ["conv2", "relu2"]])
    model = fastquant.prepare(model).to(GPU)
    batches = [values(8, 3, 32, 32, seed=seed) * (1 + seed) for seed in range(4)]
    with torch.no_grad():
        model(batches[0])
        eager = copy.deepcopy(model)
        with waiting_is_an_error():
            eager(batches[0])
        graph = Graph(model, batches[0])
        graph(batches[0])
        for x in batches[1:]:
            torch.testing.assert_close(graph(x), eager(x))
    for (key, a), b in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        if isinstance(a, Tensor):
            # A count moves to the next bin where the last bit of an activation differs.
            tolerance = {"rtol": 0.01, "atol": 2.0} if key.endswith("histogram") else {}
            torch.testing.assert_close(
                a, b, **tolerance, msg=lambda text, key=key: f"{key}\n{text}"
            )


class Residual(nn.Module):
    """Blocks with batch norm, with and without ReLU, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = fastquant.QuantStub()
        self.conv1 = nn.Conv2d(3, 16, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.sum = torch.ao.nn.quantized.FloatFunctional()
        self.fc = nn.Linear(16, 10)
        self.dequant = fastquant.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.sum.add_relu(x, self.bn2(self.conv2(x)))
        result: Tensor = self.dequant(self.fc(x.mean((2, 3))))
        return result


FUSIONS = {
    Net: [["conv1", "bn1", "relu1"], ["conv2", "relu2"]],
    Residual: [["conv1", "bn1", "relu1"], ["conv2", "bn2"]],
}


def prepared_for_training(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model: Any = cls().train()
    model.qconfig = fastquant.get_default_qat_qconfig("fbgemm")
    model = fastquant.fuse_modules_qat(model, FUSIONS[cls])
    prepared: nn.Module = fastquant.prepare_qat(model).to(GPU)
    return prepared


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize("fuses", [False, True], ids=["steps", "one_op"])
@pytest.mark.parametrize("cls", FUSIONS)
def test_graphs_of_qat_steps(cls: type[nn.Module], fuses: bool) -> None:
    model = prepared_for_training(cls)
    batches = [values(8, 3, 32, 32, seed=seed) for seed in range(4)]
    target = torch.arange(8, device=GPU)

    def step_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            with fused_on_cuda() if fuses else nullcontext():
                loss = nn.functional.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            return loss

        return step

    model(batches[0])  # sets the size of per-channel buffers
    eager_model = copy.deepcopy(model)
    step, eager_step = step_of(model), step_of(eager_model)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batches[0])
    torch.cuda.synchronize()
    for _ in range(3):
        eager_step(batches[0])
    with waiting_is_an_error():
        eager_step(batches[0])
    graph = Graph(step, batches[0])
    graph(batches[0])
    for x in batches[1:]:
        torch.testing.assert_close(graph(x), eager_step(x), rtol=1e-3, atol=1e-4)
    for a, b in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cls", FUSIONS)
def test_one_op_trains_as_its_steps_do(
    cls: type[nn.Module], layout: torch.memory_format, autocast: torch.dtype | None
) -> None:
    models = [prepared_for_training(cls).to(memory_format=layout) for _ in range(2)]
    outcomes = []
    for model, fuses in zip(models, (False, True), strict=True):
        for seed in range(3):
            x = values(8, 3, 32, 32, seed=seed).to(memory_format=layout)
            model.zero_grad()
            with (
                fused_on_cuda() if fuses else nullcontext(),
                torch.autocast("cuda", autocast, enabled=autocast is not None),
                waiting_is_an_error() if seed > 0 else nullcontext(),
            ):
                y = model(x)
            (y.float() * values(8, 10, seed=9)).sum().backward()
        tensors = (*model.parameters(), *model.buffers())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        outcomes.append([y.float(), *(t.float() for t in (*tensors, *gradients))])
    # A value near the middle between two quantized ones may go to either.
    share = 1e-2 if autocast is None else 5e-2
    for steps, one in zip(*outcomes, strict=True):
        size = steps.nan_to_num(posinf=0.0, neginf=0.0).abs().max().clamp(min=1e-3)
        torch.testing.assert_close(one / size, steps / size, rtol=0.0, atol=share)


def test_graphs_do_not_wait() -> None:
    args = (*minmax_args(values(100_000), None)[:6], RAISE)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="graph"), torch.cuda.graph(graph):
        ops.observe_minmax_(*args)


# --------------------------------------------------------------------------------- devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_x_not_the_current_one() -> None:
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for shape, axis, layout in op_calls.GEOMETRIES[::4]:
            for call in op_calls.calls_of_geometry(shape, axis, layout, torch.float32):
                assert_as_cpu(call, other)
        assert torch.cuda.current_device() == 0


def test_the_environment_switches_the_kernels_off() -> None:
    code = (
        "import torch, fastquant\n"
        "x = torch.tensor([-3.0, 0.1, 5.0], device='cuda')\n"
        "print(fastquant.build_info()['cuda']['loaded'])\n"
        "print(fastquant.FusedMovingAvgObsFakeQuantize().cuda()(x).tolist())"
    )
    said = [
        subprocess.run(
            (sys.executable, "-c", code),
            text=True,
            capture_output=True,
            check=True,
            env={**os.environ, "FASTQUANT_CUDA_KERNELS": setting},
        ).stdout.splitlines()
        for setting in ("0", "1")
    ]
    assert [lines[0] for lines in said] == ["False", "True"]
    assert said[0][1] == said[1][1]


def test_buffers_elsewhere_are_refused() -> None:
    x = values(100)
    args = minmax_args(x, None)
    with pytest.raises(RuntimeError, match="device"):
        ops.observe_minmax_(x, args[1].cpu(), *args[2:])
