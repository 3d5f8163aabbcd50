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
from harness import INPUT, Case, Suite, Target, at_least, describe, main, normal

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


def measure(suite: Suite) -> None:
    against_torch_ao(suite)
    bf16(suite)


if __name__ == "__main__":
    main(measure)
