"""How close do CUDA kernels come to the memory bandwidth, and how do they compare with torch.ao?

    python benchmarks/gpu.py --json benchmarks/results/gpu-NAME.json    # needs a CUDA GPU

The limits are measured in the same rounds: reading is the faster of `torch.sum` and
`torch.amax`, copying is `Tensor.copy_`. Large tensors are timed on the device, by events around
several calls; small calls and whole models by the clock, around many calls and one wait.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant
from fastquant import bench
from fastquant._native import ops, routes
from fastquant._native.folded_weight import fold_weight, with_gradients
from fastquant._native.settings import FusedSettings
from fastquant.nn.qat.plain import fused_on_cuda, settings_of_one_op
from harness import (
    OURS,
    THEIRS,
    Rounds,
    Run,
    Suite,
    Target,
    at_least,
    at_most,
    describe,
    normal,
    parser,
    run_benchmarks,
)

GPU = torch.device("cuda")
INF = float("inf")

# 256 MB in fp32 and in bf16: as images, and as rows of channels.
LARGE = {torch.float32: (64, 64, 128, 128), torch.bfloat16: (128, 64, 128, 128)}
SMALL = ((2, 8), (1, 64, 56, 56))  # two dimensions at least, for torch.ao's per-channel observers

# --------------------------------------------------------------------------------- timing


def device_seconds(run: Run, calls: int = 10) -> float:
    """Seconds that one call takes on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / calls


def wall_seconds(run: Run, calls: int = 100) -> float:
    """Seconds per call of many in a row: to enqueue it or to run it, whichever takes longer."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def timed(
    cases: Mapping[str, Run], rounds: int, seconds: Callable[[Run], float] = device_seconds
) -> Rounds:
    """Interleaved rounds of all cases, after a warm-up."""
    for run in cases.values():
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(seconds(run))
    return Rounds(times, rounds)


# ------------------------------------------------------------------------- large tensors


def unobserved(channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = () if channels is None else (channels,)
    low, high = torch.full(shape, INF, device=GPU), torch.full(shape, -INF, device=GPU)
    return low, high, torch.zeros(1, dtype=torch.int64, device=GPU)


def against_reading(suite: Suite, work: str, x: Tensor, run: Run, target: Target) -> None:
    cases = {OURS: run, "sum": lambda: torch.sum(x), "amax": lambda: torch.amax(x)}
    suite.add_rounds(
        f"{work}: against a read",
        describe(x),
        timed(cases, suite.rounds),
        lambda t: t[OURS] / min(t["sum"], t["amax"]),
        "of limit",
        target,
    )


def against_copying(suite: Suite, work: str, x: Tensor, run: Run, reads: int, copies: int) -> None:
    copied = torch.empty_like(x)
    cases = {
        OURS: run,
        "sum": lambda: torch.sum(x),
        "amax": lambda: torch.amax(x),
        "copy": lambda: copied.copy_(x),
    }
    suite.add_rounds(
        f"{work}: against {reads} reads, {copies} copies",
        describe(x),
        timed(cases, suite.rounds),
        lambda t: t[OURS] / (reads * min(t["sum"], t["amax"]) + copies * t["copy"]),
        "of limit",
        at_most(1 / 0.85),
    )


def minmax(suite: Suite, x: Tensor, axis: int | None, what: str) -> None:
    state = unobserved(None if axis is None else x.shape[axis])
    run = functools.partial(ops.observe_minmax_, x, *state, axis, None, 0)
    against_reading(suite, what, x, run, at_most(1 / 0.85))


def histogram(suite: Suite, x: Tensor, what: str, fraction: float) -> None:
    """A histogram whose range no longer grows."""
    low, high, count = unobserved(None)
    counts = torch.zeros(2048, device=GPU)
    run = functools.partial(ops.observe_histogram_, x, counts, low, high, count, 16, 0)
    against_reading(suite, f"histogram of {what} values", x, run, at_most(1 / fraction))


def fake_quantize(suite: Suite, x: Tensor, axis: int | None, what: str) -> None:
    channels = 1 if axis is None else x.shape[axis]
    scale = torch.full((channels,), 0.02, device=GPU)
    zero_point = torch.full((channels,), 128, dtype=torch.int32, device=GPU)
    settings = (scale, zero_point, None, axis, 0, 255)
    run = functools.partial(ops.fake_quantize, x, *settings)
    with_mask = functools.partial(ops.fake_quantize_with_mask, x, *settings)
    against_copying(suite, f"fake-quantize, {what}", x, run, 0, 1)
    against_copying(suite, f"the same with mask, {what}", x, with_mask, 0, 1)
    _, mask = with_mask()
    backward = functools.partial(ops.fake_quantize_backward, x, mask)
    against_copying(suite, f"its gradient, {what}", x, backward, 0, 1)
    on = torch.ones(1, dtype=torch.uint8, device=GPU)
    state = unobserved(None if axis is None else channels)
    eps = torch.tensor([1e-7], device=GPU)
    fused = (on, on, *state[:2], scale, zero_point, state[2], eps, axis, 0.01, 0, 255, 0, 0, 0)
    run_fused = functools.partial(ops.fused_observe_fake_quantize_with_mask, x, *fused)
    against_copying(suite, f"fused, {what}", x, run_fused, 1, 1)


def large_tensors(suite: Suite) -> None:
    for dtype, shape in LARGE.items():
        x = normal(*shape, dtype=dtype).to(GPU)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        minmax(suite, x, None, "min/max per tensor")
        minmax(suite, x, 1, "min/max per channel")
        minmax(suite, channels_last, 1, "min/max per channel")
        histogram(suite, x, "normal", 0.5)
        histogram(suite, x.relu(), "rectified", 0.5)
        histogram(suite, torch.full_like(x, 1.5), "equal", 0.2)
        fake_quantize(suite, x, None, "per tensor")
        fake_quantize(suite, x, 1, "per channel")
        fake_quantize(suite, channels_last, 1, "per channel")


# ------------------------------------------------------- one op, or a module for each step

# Activations of MobileNetV2 and ResNet-18, and one of their weights.
NORMALIZED = ((32, 96, 112, 112), (32, 144, 56, 56), (32, 192, 28, 28))
ADDED = ((32, 64, 56, 56), (32, 256, 14, 14))
WEIGHT = (512, 512, 3, 3)
RELU = (0.0, math.inf)

STEPS, FLOAT = "steps", "float"


def settings(fake_quantizer: nn.Module) -> FusedSettings:
    """What an op takes in the place of a call of this fake-quantizer."""
    found = settings_of_one_op(fake_quantizer)
    assert found is not None
    return found


def activation_quantizer() -> nn.Module:
    module: nn.Module = fastquant.get_default_qat_qconfig("x86").activation()
    return module.to(GPU)


def forward_backward(run: Callable[..., Tensor], *inputs: Tensor) -> Run:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grad = torch.ones_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def against_steps(
    suite: Suite,
    work: str,
    runs: dict[str, Callable[..., Tensor]],
    reads: int,
    copies: int,
    *inputs: Tensor,
) -> None:
    """Forward and backward as one op: against a module for each step, float, and memory."""
    x = inputs[0].detach()
    copied = torch.empty_like(x)
    cases: dict[str, Run] = {name: forward_backward(run, *inputs) for name, run in runs.items()}
    cases |= {"read": lambda: torch.sum(x), "copy": lambda: copied.copy_(x)}
    timed_rounds = timed(cases, suite.rounds)
    for other, what in ((STEPS, "its steps"), (FLOAT, "float")):
        if other in runs:
            value = functools.partial(lambda t, other: t[other] / t[OURS], other=other)
            target = at_least(1)
            suite.add_rounds(
                f"{work}: against {what}", describe(x), timed_rounds, value, "x", target
            )
    suite.add_rounds(
        f"{work}: against {reads} reads, {copies} copies",
        describe(x),
        timed_rounds,
        lambda t: t[OURS] / (reads * t["read"] + copies * t["copy"]),
        "of limit",
        at_most(1 / 0.85),
    )


def batch_norm(suite: Suite, x: Tensor) -> None:
    """Forward reads x twice and writes y; backward reads it and the gradient twice."""
    channels = x.shape[1]
    mean, var = torch.zeros(channels, device=GPU), torch.ones(channels, device=GPU)
    weight = torch.rand(channels, device=GPU) + 0.5
    bias = torch.randn(channels, device=GPU) * 0.1
    fused, alone = activation_quantizer(), activation_quantizer()

    def in_float(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5))

    def as_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (mean, var, True, 0.1, 1e-5)
        return routes.batch_norm_observe_fake_quantize(
            x, weight, bias, *statistics, *RELU, settings(fused)
        )

    runs = {OURS: as_one, STEPS: lambda *args: alone(in_float(*args)), FLOAT: in_float}
    against_steps(suite, "batch norm + ReLU + fake-quantize", runs, 4, 2, x, weight, bias)


def addition(suite: Suite, a: Tensor) -> None:
    """Forward reads both twice and writes y; backward writes one gradient for both."""
    fused, alone = activation_quantizer(), activation_quantizer()
    runs = {
        OURS: lambda a, b: routes.add_observe_fake_quantize(a, b, *RELU, settings(fused)),
        STEPS: lambda a, b: alone(F.relu(a + b)),
        FLOAT: lambda a, b: F.relu(a + b),
    }
    against_steps(suite, "add + ReLU + fake-quantize", runs, 3, 2, a, a.flip(0))


def folded_weight(suite: Suite, weight: Tensor) -> None:
    """Forward reads the weight twice and writes another; backward reads it and the gradient."""
    channels = weight.shape[0]
    var, eps, gamma = torch.ones(channels, device=GPU), 1e-5, torch.rand(channels, device=GPU) + 0.5
    fused, alone = (fastquant.get_default_qat_qconfig("x86").weight().to(GPU) for _ in range(2))
    for module in (fused, alone):
        module(weight)  # sets the size of its buffers

    def as_one(weight: Tensor, gamma: Tensor) -> Tensor:
        return with_gradients(weight, gamma, fold_weight(weight, gamma, var, eps, settings(fused)))

    def in_steps(weight: Tensor, gamma: Tensor) -> Tensor:
        scale = (gamma / torch.sqrt(var + eps)).reshape(-1, 1, 1, 1)
        quantized: Tensor = alone(weight * scale) / scale
        return quantized

    runs = {OURS: as_one, STEPS: in_steps}
    against_steps(suite, "weight folded with batch norm", runs, 2, 2, weight, gamma)


def fused_ops(suite: Suite) -> None:
    """Whether QAT modules should take one op on this GPU, which they do on the CPU."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for shape in NORMALIZED:
                batch_norm(suite, normal(*shape, dtype=dtype, memory_format=layout).to(GPU))
            for shape in ADDED:
                addition(suite, normal(*shape, dtype=dtype, memory_format=layout).to(GPU))
    folded_weight(suite, normal(*WEIGHT).to(GPU))


# -------------------------------------------------------------------------- small calls

# Each with how many times as fast as torch.ao's a call has to be.
MODULES: dict[str, tuple[Callable[[Any], nn.Module], float]] = {
    "MinMaxObserver": (lambda library: library.MinMaxObserver(), 3),
    "MovingAverageMinMaxObserver": (lambda library: library.MovingAverageMinMaxObserver(), 3),
    "PerChannelMinMaxObserver": (lambda library: library.PerChannelMinMaxObserver(), 3),
    "HistogramObserver": (lambda library: library.HistogramObserver(), 10),
    "FakeQuantize": (lambda library: library.FakeQuantize(), 5),
    "FusedMovingAvgObsFakeQuantize": (lambda library: library.FusedMovingAvgObsFakeQuantize(), 3),
}


def small_calls(suite: Suite) -> None:
    for work, (make, factor) in MODULES.items():
        for shape in SMALL:
            x = normal(*shape).to(GPU)
            ours, theirs = make(fastquant).to(GPU), make(torch_ao).to(GPU)
            cases: dict[str, Run] = {
                OURS: lambda ours=ours, x=x: ours(x),
                THEIRS: lambda theirs=theirs, x=x: theirs(x),
            }
            suite.add_rounds(
                work,
                describe(x),
                timed(cases, suite.rounds, wall_seconds),
                lambda t: t[THEIRS] / t[OURS],
                "x",
                at_least(factor),
            )


# --------------------------------------------------------------------------- whole models


class TrainingStep:
    """A step of SGD that a CUDA graph can record; under autocast, if a dtype is given.

    `fuses`: whether QAT modules take one op for several steps.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        autocast: torch.dtype | None = None,
        fuses: bool = False,
    ) -> None:
        self._model, self._x, self._autocast, self._fuses = model, x, autocast, fuses
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def __call__(self) -> None:
        with fused_on_cuda() if self._fuses else contextlib.nullcontext():
            self._optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", self._autocast, enabled=self._autocast is not None):
                y = self._model(self._x)
            y.float().square().mean().backward()
            self._optimizer.step()

    def recorded(self) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        replay: Run = graph.replay
        return replay


def qat_models(name: str) -> tuple[nn.Module, Callable[[Any], nn.Module]]:
    """A float model for training on the GPU, and a function that has a library prepare it."""
    model = bench.fused(bench.torchvision_model(name).train(), "qat")

    def prepared(library: Any) -> nn.Module:
        own: Any = copy.deepcopy(model)
        own.qconfig = library.get_default_qat_qconfig("fbgemm")
        result: nn.Module = library.prepare_qat(own).to(GPU)
        return result

    return copy.deepcopy(model).to(GPU), prepared


def qat_steps(suite: Suite, name: str = "mobilenet_v2", batch: int = 32) -> None:
    model, prepared = qat_models(name)
    x = normal(batch, 3, 224, 224).to(GPU)
    models = {FLOAT: model, OURS: prepared(fastquant), THEIRS: prepared(torch_ao)}
    steps = {side: TrainingStep(own, x) for side, own in models.items()}
    rounds = min(suite.rounds, 10)
    input = f"{list(x.shape)}"
    few = functools.partial(wall_seconds, calls=5)
    suite.add_rounds(
        f"{name}: QAT step",
        input,
        timed(steps, rounds, few),
        lambda t: t[THEIRS] / t[OURS],
        "x",
        at_least(1.5),
    )
    graphs = {side: steps[side].recorded() for side in (FLOAT, OURS)}
    suite.add_rounds(
        f"{name}: QAT step as a graph, over float",
        input,
        timed(graphs, rounds, few),
        lambda t: t[OURS] / t[FLOAT] - 1,
        "more",
        at_most(0.10),
    )


def fused_qat_steps(suite: Suite, name: str = "mobilenet_v2", batch: int = 32) -> None:
    """Whether QAT modules should take one op on this GPU, by whole steps, eager and recorded."""
    rounds, few = min(suite.rounds, 10), functools.partial(wall_seconds, calls=5)
    for autocast in (None, torch.float16, torch.bfloat16):
        model, prepared = qat_models(name)
        # Mixed precision is fastest in channels_last.
        layout = torch.contiguous_format if autocast is None else torch.channels_last
        x = normal(batch, 3, 224, 224, memory_format=layout).to(GPU)
        models = {FLOAT: model, STEPS: prepared(fastquant), OURS: prepared(fastquant)}
        steps = {
            side: TrainingStep(own.to(memory_format=layout), x, autocast, side == OURS)
            for side, own in models.items()
        }
        what = "fp32" if autocast is None else f"{str(autocast).removeprefix('torch.')} autocast"
        ways: dict[str, Mapping[str, Run]] = {
            "": steps,
            " as a graph": {side: step.recorded() for side, step in steps.items()},
        }
        for way, runs in ways.items():
            work, times = f"{name}: QAT step{way}, {what}", timed(runs, rounds, few)
            for other, compared in ((STEPS, "its steps"), (FLOAT, FLOAT)):
                value = functools.partial(lambda t, other: t[other] / t[OURS], other=other)
                target = at_least(1)
                suite.add_rounds(
                    f"{work}: one op against {compared}", describe(x), times, value, "x", target
                )


def why_not() -> str | None:
    """What is missing."""
    if not torch.cuda.is_available():
        return "gpu.py needs an NVIDIA GPU and a CUDA build of torch; nothing was measured"
    reason: str | None = fastquant.build_info()["cuda"]["why_not"]
    return reason and f"gpu.py measures CUDA kernels, and there are none: {reason}"


def main() -> None:
    options = parser(__doc__).parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    options.threads = options.threads[:1]  # torch's threads make no difference to a GPU
    benchmarks = {
        f"{measure.__name__}, {torch.cuda.get_device_name()}": measure
        for measure in (large_tensors, small_calls, qat_steps, fused_ops, fused_qat_steps)
    }
    run_benchmarks(benchmarks, options, options.json)


if __name__ == "__main__":
    main()
