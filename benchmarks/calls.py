"""What does a call itself cost: through torch's dispatcher or around it, in warm or cold caches?

    python benchmarks/calls.py

Everything runs on 128 elements, where the call takes nearly all of the time.
"""

from __future__ import annotations

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor

import fastquant
from fake_quant import forward_backward
from fastquant._native import fast_calls, routes
from harness import OURS, THEIRS, Case, Run, Suite, describe, main, normal

THROUGH = "through the dispatcher"
# Elements of a tensor that fills the second-level cache and more.
SWEPT = 1 << 20


def calling(run: Run, *, fast: bool) -> Case:
    """Around the dispatcher (fast), or through it."""

    def switch() -> None:
        fast_calls.fast_calls = fast

    return Case(run, before=switch)


def dispatcher(suite: Suite) -> None:
    """Needs a torch whose tensors can be reached through DLPack's C API; nothing otherwise."""
    if not fast_calls.fast_calls:
        return
    x = normal(128)
    scale, zero_point = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
    low, high, count = torch.tensor(-1.0), torch.tensor(1.0), torch.zeros(1, dtype=torch.int64)
    histogram, fused = fastquant.HistogramObserver(), fastquant.FusedMovingAvgObsFakeQuantize()
    histogram(x)
    observe = (x, low, high, count, None, None, 0)
    works: dict[str, Run] = {
        "observe_minmax": lambda: routes.observe_minmax_(*observe),
        "fake_quantize": lambda: routes.fake_quantize(x, scale, zero_point, None, None, 0, 255),
        "FusedMovingAvgObsFakeQuantize": lambda: fused(x),
        "HistogramObserver.calculate_qparams": histogram.calculate_qparams,
    }
    for work, run in works.items():
        suite.add(
            f"{work}: round the dispatcher",
            describe(x),
            {OURS: calling(run, fast=True), THROUGH: calling(run, fast=False)},
            lambda t: t[THROUGH] / t[OURS],
            "x",
        )
    fast_calls.fast_calls = True


def cold(suite: Suite) -> None:
    """Calls right after a large tensor has swept the caches, as happens in a model."""
    x, large = normal(128), normal(SWEPT)
    swept = torch.empty_like(large)
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)
    ours = fastquant.FusedMovingAvgObsFakeQuantize()
    theirs = torch_ao.FusedMovingAvgObsFakeQuantize()

    def sweep() -> Tensor:
        return torch.add(large, 1, out=swept)

    cases: dict[str, Run] = {
        OURS: forward_backward(ours, x).run,
        THEIRS: forward_backward(theirs, x).run,
        "x * 2": lambda: torch.autograd.grad(leaf * 2, leaf, gradient),
    }

    def after_sweep(run: Run) -> Run:
        def both() -> None:
            sweep()
            run()

        return both

    for name, run in cases.items():
        whose = "Fused" if name == OURS else f"{name},"
        suite.add(
            f"{whose} forward + backward, warm caches", describe(x), {name: run},
            lambda t: next(iter(t.values())) * 1e6, "µs",
        )  # fmt: skip
        suite.add(
            f"{whose} forward + backward, cold caches", describe(x),
            {"both": after_sweep(run), "sweep": sweep},
            lambda t: (t["both"] - t["sweep"]) * 1e6, "µs",
        )  # fmt: skip


def measure(suite: Suite) -> None:
    dispatcher(suite)
    cold(suite)


if __name__ == "__main__":
    main(measure)
