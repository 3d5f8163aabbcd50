"""What does a call cost beside its work, through torch's dispatcher or not, in cold caches?

All on 128 elements, where the call is nearly all there is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor

import fastquant
from fake_quant import forward_backward
from fastquant._native import fast_calls, routes
from harness import OURS, THEIRS, Case, Suite, describe, main, normal

THROUGH = "through the dispatcher"
# More than a second-level cache holds.
SWEPT = 1 << 20


def going(run: Callable[[], object], *, fast: bool) -> Case:
    """Round the dispatcher, or not."""

    def switch() -> None:
        fast_calls.fast_calls = fast

    return Case(run, before=switch)


def dispatcher(suite: Suite) -> None:
    """Only torch releases that export tensors through DLPack's C API let us go round it."""
    if not fast_calls.fast_calls:
        return
    x = normal(128)
    scale, zero_point = torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)
    low, high, count = torch.tensor(-1.0), torch.tensor(1.0), torch.zeros(1, dtype=torch.int64)
    histogram, fused = fastquant.HistogramObserver(), fastquant.FusedMovingAvgObsFakeQuantize()
    histogram(x)
    observe = (x, low, high, count, None, None, 0)
    works: dict[str, Callable[[], object]] = {
        "observe_minmax": lambda: routes.observe_minmax(*observe),
        "fake_quantize": lambda: routes.apply_fake_quantize(x, scale, zero_point, None, 0, 255),
        "FusedMovingAvgObsFakeQuantize": lambda: fused(x),
        "HistogramObserver.calculate_qparams": histogram.calculate_qparams,
    }
    for work, run in works.items():
        suite.add(
            f"{work}: round the dispatcher",
            describe(x),
            {OURS: going(run, fast=True), THROUGH: going(run, fast=False)},
            lambda t: t[THROUGH] / t[OURS],
            "x",
        )
    fast_calls.fast_calls = True


def cold(suite: Suite) -> None:
    """The same with caches that a large tensor has just been through, as in a model."""
    x, large = normal(128), normal(SWEPT)
    swept = torch.empty_like(large)
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)
    ours = fastquant.FusedMovingAvgObsFakeQuantize()
    theirs = torch_ao.FusedMovingAvgObsFakeQuantize()

    def sweep() -> Tensor:
        return torch.add(large, 1, out=swept)

    cases: dict[str, Callable[[], object]] = {
        OURS: forward_backward(ours, x).run,
        THEIRS: forward_backward(theirs, x).run,
        "x * 2": lambda: torch.autograd.grad(leaf * 2, leaf, gradient),
    }

    def after_sweep(run: Callable[[], object]) -> Callable[[], object]:
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
