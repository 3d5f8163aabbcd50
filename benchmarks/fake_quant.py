"""How fast are fake-quantizers compared with torch.ao's: forward, and forward with backward?

python benchmarks/fake_quant.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import fastquant
from fastquant import bench
from harness import INPUT, Case, Suite, Target, at_least, at_most, describe, main, normal

PER_CHANNEL = {
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.qint8,
    "qscheme": torch.per_channel_symmetric,
}


def modules(ns: Any) -> dict[str, Callable[[], nn.Module]]:
    """Constructors, by the name that the rows give them."""
    fused, per_channel = ns.FusedMovingAvgObsFakeQuantize, ns.MovingAveragePerChannelMinMaxObserver
    return {
        "FakeQuantize, moving average": lambda: ns.FakeQuantize(ns.MovingAverageMinMaxObserver),
        "FusedMovingAvgObsFakeQuantize": lambda: fused(ns.MovingAverageMinMaxObserver),
        "Fused, per channel, axis 0": lambda: fused(per_channel, ch_axis=0, **PER_CHANNEL),
        "Fused, per channel, axis 1": lambda: fused(per_channel, ch_axis=1, **PER_CHANNEL),
    }


def activation_modules(ns: Any) -> dict[str, Callable[[], nn.Module]]:
    """Those whose channels are an activation's, not a weight's."""
    return {work: make for work, make in modules(ns).items() if not work.endswith("axis 0")}


TARGETS = {
    "FakeQuantize, moving average": at_least(25),
    "FusedMovingAvgObsFakeQuantize": at_least(22),
    "Fused, per channel, axis 0": at_least(20),
    "Fused, per channel, axis 1": at_least(20),
}


def forward(module: nn.Module, x: Tensor) -> Case:
    module(x)
    return Case(lambda: module(x))


def forward_backward(module: nn.Module, x: Tensor) -> Case:
    leaf = x.detach().clone().requires_grad_()
    gradient = torch.ones_like(leaf)

    def run() -> None:
        torch.autograd.grad(module(leaf), leaf, gradient)

    run()
    return Case(run)


PASSES: tuple[tuple[str, Callable[[nn.Module, Tensor], Case], Target | None], ...] = (
    ("forward", forward, None),
    ("forward + backward", forward_backward, at_least(12)),
)


def attempt(build: Callable[[nn.Module, Tensor], Case], make: Any, x: Tensor) -> Case | None:
    """None where torch.ao refuses the tensor."""
    try:
        return build(make(), x)
    except RuntimeError:
        return None


def against_torch_ao(suite: Suite) -> None:
    ours, theirs = modules(fastquant), modules(torch_ao)
    for work in ours:
        for x in (normal(64, 64, 7, 7) if work.endswith("axis 0") else normal(*INPUT), normal(128)):
            if x.dim() == 1 and "axis" in work:
                continue
            for what, build, target in PASSES:
                suite.compare(
                    f"{work}: {what}",
                    describe(x),
                    build(ours[work](), x),
                    attempt(build, theirs[work], x),
                    (target or TARGETS[work]) if x.dim() > 1 else None,
                )


def bf16(suite: Suite) -> None:
    for work, make in modules(fastquant).items():
        for what, build, _ in PASSES:
            suite.bf16_against_fp32(
                f"{work}: {what}",
                normal(*INPUT),
                lambda x, make=make, build=build: build(make(), x),
            )


def small_layer(suite: Suite) -> None:
    """A training step of one small layer with its batch norm: what surrounds the arithmetic."""
    float_layer = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).train()

    def prepared(ns: Any, enabled: bool) -> nn.Module:
        model = ns.fuse_modules_qat(nn.Sequential(float_layer), [["0.0", "0.1"]])
        model.qconfig = ns.get_default_qat_qconfig("x86")
        model = ns.prepare_qat(model)
        if not enabled:
            model.apply(ns.disable_fake_quant).apply(ns.disable_observer)
        return model

    x = normal(4, 8, 16, 16)
    for what, enabled, target in (("", True, None), (", all off", False, at_most(0.20))):
        cases = {
            key: Case(bench.Step(model, x, "qat"))
            for key, model in (
                ("float", float_layer),
                ("fastquant", prepared(fastquant, enabled)),
                ("torch.ao", prepared(torch_ao, enabled)),
            )
        }
        suite.add(
            f"Conv2d(8, 16, 3) with batch norm: QAT step{what}, over float",
            describe(x),
            cases,
            lambda t: t["fastquant"] / t["float"] - 1,
            "more",
            target,
        )


def measure(suite: Suite) -> None:
    against_torch_ao(suite)
    small_layer(suite)
    bf16(suite)


if __name__ == "__main__":
    main(measure)
