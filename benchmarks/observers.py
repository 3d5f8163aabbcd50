"""How fast are observers compared with torch.ao's: min/max, moving average, per channel, histogram?

python benchmarks/observers.py
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor

import fastquant
from harness import INPUT, Case, Suite, Target, at_least, describe, main, normal

# Each tensor of the growing stream has a range this many times that of the one before.
GROWTH = 1.05
STREAM = 16


def observe(observer: Any, x: Tensor) -> Case:
    observer(x)
    return Case(lambda: observer(x))


def compare(
    suite: Suite, name: str, x: Tensor, target: Target | None, work: str = "", **kwargs: Any
) -> None:
    ours, theirs = (observe(getattr(ns, name)(**kwargs), x) for ns in (fastquant, torch_ao))
    suite.compare(work or name, describe(x), ours, theirs, target)


def per_tensor(suite: Suite) -> None:
    for name, whole, small in (
        ("MinMaxObserver", 3, 5),
        ("MovingAverageMinMaxObserver", 5, 8),
    ):
        compare(suite, name, normal(*INPUT), at_least(whole))
        compare(suite, name, normal(128), at_least(small))


def per_channel(suite: Suite) -> None:
    contiguous = normal(*INPUT)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    weight = normal(64, 64, 7, 7)
    for name in ("PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"):
        for x in (contiguous, channels_last):
            for axis in (0, 1, -1):
                fast = axis == 1 and x is contiguous
                work = f"{name}, axis {axis}"
                compare(suite, name, x, at_least(20 if fast else 8), work, ch_axis=axis)
        compare(suite, name, weight, at_least(8), f"{name}, axis 0", ch_axis=0)


def growing_stream(observer: Any, tensors: list[Tensor]) -> Case:
    """One run starts afresh and observes all tensors, each of which widens the range."""

    def run() -> None:
        observer.min_val.fill_(math.inf)
        observer.max_val.fill_(-math.inf)
        observer.histogram.zero_()
        for x in tensors:
            observer(x)

    return Case(run, parts=len(tensors))


def histogram(suite: Suite) -> None:
    x = normal(*INPUT)
    name = "HistogramObserver"
    target = at_least(14)
    compare(suite, name, x, target, "HistogramObserver, steady range")
    compare(suite, name, x.relu(), target, "HistogramObserver, steady range, after ReLU")
    compare(suite, name, normal(128), None, "HistogramObserver, steady range")
    tensors = [x * GROWTH**k for k in range(STREAM)]
    ours, theirs = (growing_stream(ns.HistogramObserver(), tensors) for ns in (fastquant, torch_ao))
    suite.compare("HistogramObserver, growing range", describe(x), ours, theirs, target)

    observers = [ns.HistogramObserver() for ns in (fastquant, torch_ao)]
    for observer in observers:
        observer(x)
    ours, theirs = (Case(observer.calculate_qparams) for observer in observers)
    suite.compare("HistogramObserver.calculate_qparams", "2048 bins", ours, theirs, at_least(100))


def bf16(suite: Suite) -> None:
    for name, kwargs in (
        ("MinMaxObserver", {}),
        ("MovingAverageMinMaxObserver", {}),
        ("PerChannelMinMaxObserver", {"ch_axis": 1}),
        ("HistogramObserver", {}),
    ):
        make = functools.partial(getattr(fastquant, name), **kwargs)
        suite.bf16_against_fp32(name, normal(*INPUT), lambda x, make=make: observe(make(), x))


def measure(suite: Suite) -> None:
    per_tensor(suite)
    per_channel(suite)
    histogram(suite)
    bf16(suite)


if __name__ == "__main__":
    main(measure)
