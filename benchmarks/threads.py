"""From which size on are several threads faster than one, and how much? fastquant alone.

    python benchmarks/threads.py --threads 2

Every number of threads in `--threads` above one is measured against one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastquant
from fake_quant import activation_modules, forward
from harness import Case, Suite, at_least, main, normal
from observers import observe

SIZES = (128, 4_096, 32_768, 65_536, 131_072, 200_704, 401_408, 1_605_632, 12_845_056)
LARGE = 1_600_000
# Equal times differ by this much from run to run.
NOISE = 0.05

# Makes the case of a tensor.
Build = Callable[[Tensor], Case]


def observing(make: Callable[[], nn.Module]) -> Build:
    return lambda x: observe(make(), x)


def quantizing(make: Callable[[], nn.Module]) -> Build:
    return lambda x: forward(make(), x)


WORK: dict[str, Build] = {
    "MinMaxObserver": observing(fastquant.MinMaxObserver),
    "PerChannelMinMaxObserver, axis 1": observing(
        lambda: fastquant.PerChannelMinMaxObserver(ch_axis=1)
    ),
    "HistogramObserver": observing(fastquant.HistogramObserver),
    **{work: quantizing(make) for work, make in activation_modules(fastquant).items()},
}


def with_threads(case: Case, threads: int) -> Case:
    def switch() -> None:
        torch.set_num_threads(threads)
        case.run()  # wakes the threads up

    return Case(case.run, before=switch)


def against_one(suite: Suite, work: str, case: Case, size: int) -> None:
    many = f"{suite.threads} threads"
    suite.add(
        f"{work}: {many} against one",
        f"fp32, {size:,} elements",
        {"one": with_threads(case, 1), many: with_threads(case, suite.threads)},
        lambda t: t["one"] / t[many],
        "x",
        at_least(1.7 if size >= LARGE else 1 - NOISE),
    )


def measure(suite: Suite) -> None:
    if suite.threads == 1:
        return
    for work, build in WORK.items():
        for size in SIZES:
            channels = 64 if size >= 64 * 64 else 2
            against_one(suite, work, build(normal(1, channels, size // channels)), size)


if __name__ == "__main__":
    main(measure)
