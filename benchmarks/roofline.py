"""How close do kernels come to the machine's limits: one read, and one copy into warm memory?

    python benchmarks/roofline.py

The limits are measured in the same rounds: reading is `torch.sum`, the fastest read that torch
has; copying is `Tensor.copy_` into memory that has been written before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastquant
from fake_quant import activation_modules, forward, forward_backward
from harness import OURS, Suite, at_most, describe, main, normal
from observers import observe

SHAPES = ((1, 64, 56, 56), (8, 64, 56, 56), (64, 64, 56, 56))


def observers(axis: int | None) -> dict[str, Callable[[], nn.Module]]:
    if axis is None:
        return {
            "MinMaxObserver": fastquant.MinMaxObserver,
            "MovingAverageMinMaxObserver": fastquant.MovingAverageMinMaxObserver,
        }
    return {
        f"PerChannelMinMaxObserver, axis {axis}": lambda: fastquant.PerChannelMinMaxObserver(axis),
        f"MovingAveragePerChannel…, axis {axis}": lambda: (
            fastquant.MovingAveragePerChannelMinMaxObserver(ch_axis=axis)
        ),
    }


def reading(suite: Suite, x: Tensor, axis: int | None) -> None:
    for work, make in observers(axis).items():
        suite.add(
            f"{work}: against a read",
            describe(x),
            {OURS: observe(make(), x), "read": x.sum},
            lambda t: t[OURS] / t["read"],
            "of limit",
            at_most(1.3),
        )


def fused(suite: Suite, x: Tensor) -> None:
    copy = torch.empty_like(x)
    for work, make in activation_modules(fastquant).items():
        suite.add(
            f"{work}: against read + copy",
            describe(x),
            {OURS: forward(make(), x), "read": x.sum, "copy": lambda: copy.copy_(x)},
            lambda t: t[OURS] / (t["read"] + t["copy"]),
            "of limit",
            at_most(1.5),
        )


def with_backward(suite: Suite, x: Tensor) -> None:
    """Compared with `x * 2`, the least that autograd does: one read and one write each way."""
    leaf, gradient = x.detach().clone().requires_grad_(), torch.ones_like(x)
    for work, make in activation_modules(fastquant).items():
        suite.add(
            f"{work}: fwd + bwd against x * 2",
            describe(x),
            {
                OURS: forward_backward(make(), x),
                "x * 2": lambda: torch.autograd.grad(leaf * 2, leaf, gradient),
            },
            lambda t: t[OURS] / t["x * 2"],
            "of limit",
        )


def histogram(suite: Suite, x: Tensor, what: str) -> None:
    suite.add(
        f"HistogramObserver, {what}",
        describe(x),
        {OURS: observe(fastquant.HistogramObserver(), x)},
        lambda t: t[OURS] * 1e9 / x.numel(),
        "ns/element",
        at_most(0.8) if suite.threads == 1 else None,
    )


def measure(suite: Suite) -> None:
    for shape in SHAPES:
        x = normal(*shape)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        reading(suite, x, None)
        reading(suite, x, 1)
        reading(suite, channels_last, 1)
        fused(suite, x)
        fused(suite, channels_last)
        with_backward(suite, x)
        histogram(suite, x, "normal")
        histogram(suite, x.relu(), "after ReLU")


if __name__ == "__main__":
    main(measure)
