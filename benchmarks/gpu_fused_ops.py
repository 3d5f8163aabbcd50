"""Whether QAT modules should take one op for several steps on a GPU, as they do on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant
from fastquant._native import routes
from fastquant._native.folded_weight import fold_weight, with_gradients
from fastquant._native.settings import FusedSettings
from fastquant.nn.qat.plain import settings_of_one_op
from gpu_timing import Bench, Job
from harness import OURS, Run, Suite, at_least, at_most, normal

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


def quantizers(x: Tensor, what: str) -> tuple[nn.Module, nn.Module]:
    """Two of the same kind, on the device of x: for `activation` or `weight`."""
    make = getattr(fastquant.get_default_qat_qconfig("x86"), what)
    return make().to(x.device), make().to(x.device)


def forward_backward(run: Callable[..., Tensor], *inputs: Tensor) -> Run:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grad = torch.ones_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


class FusedOps:
    """Adds the rows."""

    def __init__(self, suite: Suite, bench: Bench) -> None:
        self._suite, self._bench = suite, bench

    def jobs(self) -> list[Job]:
        jobs = []
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                for measure, shapes in ((self._batch_norm, NORMALIZED), (self._addition, ADDED)):
                    for shape in shapes:
                        run = functools.partial(self._measure, measure, shape, dtype, layout)
                        jobs.append(Job(f"{measure.__name__}, {dtype}, {list(shape)}", run))
        run = functools.partial(self._measure, self._folded_weight, WEIGHT)
        return [*jobs, Job("folded weight", run)]

    def _measure(
        self,
        measure: Callable[[Tensor], None],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if self._bench.gpu.rehearses:
            shape = (2, 8, *shape[2:]) if measure == self._folded_weight else (2, 8, 7, 7)
        measure(normal(*shape, dtype=dtype, memory_format=layout).to(self._bench.device))

    def _against_steps(
        self,
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
        cases |= {"read": functools.partial(torch.amax, x), "copy": lambda: copied.copy_(x)}
        timed = self._bench.timed(cases, self._suite.rounds)
        add = functools.partial(self._suite.add_rounds, input=self._bench.describe(x), timed=timed)
        for other, what in ((STEPS, "its steps"), (FLOAT, "float")):
            if other in runs:
                value = functools.partial(lambda t, other: t[other] / t[OURS], other=other)
                add(f"{work}: against {what}", value=value, unit="x", target=at_least(1))
        add(
            f"{work}: against {reads} reads, {copies} copies",
            value=lambda t: t[OURS] / (reads * t["read"] + copies * t["copy"]),
            unit="of limit",
            target=at_most(1 / 0.85),
        )

    def _batch_norm(self, x: Tensor) -> None:
        """Forward reads x twice and writes y; backward reads it and the gradient twice."""
        channels, device = x.shape[1], x.device
        mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        weight = torch.rand(channels, device=device) + 0.5
        bias = torch.randn(channels, device=device) * 0.1
        fused, alone = quantizers(x, "activation")

        def in_float(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5))

        def as_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            statistics = (mean, var, True, 0.1, 1e-5)
            return routes.batch_norm_observe_fake_quantize(
                x, weight, bias, *statistics, *RELU, settings(fused)
            )

        runs = {OURS: as_one, STEPS: lambda *args: alone(in_float(*args)), FLOAT: in_float}
        self._against_steps("batch norm + ReLU + fake-quantize", runs, 4, 2, x, weight, bias)

    def _addition(self, a: Tensor) -> None:
        """Forward reads both twice and writes y; backward writes one gradient for both."""
        fused, alone = quantizers(a, "activation")
        runs = {
            OURS: lambda a, b: routes.add_observe_fake_quantize(a, b, *RELU, settings(fused)),
            STEPS: lambda a, b: alone(F.relu(a + b)),
            FLOAT: lambda a, b: F.relu(a + b),
        }
        self._against_steps("add + ReLU + fake-quantize", runs, 3, 2, a, a.flip(0))

    def _folded_weight(self, weight: Tensor) -> None:
        """Forward reads the weight twice and writes another; backward reads it and the gradient."""
        channels, device, eps = weight.shape[0], weight.device, 1e-5
        var = torch.ones(channels, device=device)
        gamma = torch.rand(channels, device=device) + 0.5
        fused, alone = quantizers(weight, "weight")
        for module in (fused, alone):
            module(weight)  # sets the size of its buffers

        def as_one(weight: Tensor, gamma: Tensor) -> Tensor:
            folded = fold_weight(weight, gamma, var, eps, settings(fused))
            return with_gradients(weight, gamma, folded)

        def in_steps(weight: Tensor, gamma: Tensor) -> Tensor:
            scale = (gamma / torch.sqrt(var + eps)).reshape(-1, 1, 1, 1)
            quantized: Tensor = alone(weight * scale) / scale
            return quantized

        runs = {OURS: as_one, STEPS: in_steps}
        self._against_steps("weight folded with batch norm", runs, 2, 2, weight, gamma)


def measure(suite: Suite, bench: Bench) -> None:
    """All rows of ops that do several steps."""
    bench.run(FusedOps(suite, bench).jobs())
