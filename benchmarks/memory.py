"""How much memory does fake-quantize keep for backward, and a growing histogram take?

python benchmarks/memory.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastquant
from fake_quant import modules
from harness import INPUT, Suite, at_most, describe, main, normal

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def kept_bits(make: Callable[[], nn.Module], x: Tensor) -> float:
    """Bits per element that forward keeps for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = x.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make()(leaf)
    return sum(kept.values()) * 8 / x.numel()


def resident(what: str) -> float:
    """KiB that the process holds now (VmRSS), or its peak since the last reset (VmHWM)."""
    match = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return float(match[1])


def growth_kib(scales: list[float]) -> float:
    """Peak KiB beyond those held before, while a histogram observes ever wider tensors."""
    tensors = [normal(*INPUT) * scale for scale in scales]
    observer = fastquant.HistogramObserver()
    observer(tensors[0])  # what the first call loads does not count as growth
    CLEAR_REFS.write_text(RESET_PEAK)
    before = resident("VmRSS")
    for x in tensors[1:]:
        observer(x)
    return resident("VmHWM") - before


def measure(suite: Suite) -> None:
    x = normal(*INPUT)
    for work, make in modules(fastquant).items():
        suite.add_value(
            f"{work}: kept for backward",
            describe(x),
            kept_bits(make, x),
            "bits/element",
            at_most(1),
        )
    if CLEAR_REFS.exists():
        suite.add_value(
            "HistogramObserver: growing from 1e-30 to 1e30",
            describe(x),
            growth_kib([1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30]),
            "KiB",
            at_most(512),
        )


if __name__ == "__main__":
    main(measure)
