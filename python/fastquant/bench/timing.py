"""Timings that stand comparison: interleaved rounds, medians, spread; and on what machine."""

from __future__ import annotations

import gc
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _C
from .._version import __version__

# A block of calls this long drowns the clock's own cost, and ends before a scheduler takes the
# processor away, most of the time; one call may be longer.
_BLOCK_SECONDS = 0.001
_MOST_CALLS = 20_000


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        run: does the work once.
        before: called ahead of each block of runs, untimed.
        parts: how many equal pieces of work one run does; times are per piece.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    parts: int = 1


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of numbers that rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def _block(case: Case, calls: int) -> float:
    """Seconds that a piece of the case's work takes, over so many runs."""
    if case.before is not None:
        case.before()
    run = case.run
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / (calls * case.parts)


def _calls_per_block(case: Case) -> int:
    """How many runs fill a block; warms the case up on the way."""
    _block(case, 1)
    calls = 1
    while True:
        seconds = _block(case, calls) * calls * case.parts
        if seconds >= _BLOCK_SECONDS or calls >= _MOST_CALLS:
            return calls
        wanted = math.ceil(calls * _BLOCK_SECONDS / max(seconds, 1e-7))
        calls = min(max(wanted, calls + 1), calls * 20, _MOST_CALLS)


@dataclass(frozen=True)
class Rounds:
    """Seconds by case, one number for each round; how many rounds went by undisturbed."""

    seconds: dict[str, list[float]]
    undisturbed: int


def time_rounds(
    cases: Mapping[str, Case],
    rounds: int,
    on_block: Callable[[], object] = lambda: None,
    patience: float = 2.0,
) -> Rounds:
    """Time cases in rounds.

    A round runs a block of each case, one after the other, each round beginning with another
    one: whatever slows the machine down meets all of them. A round in which the scheduler took
    a processor away for other work, or before or after which the processors were slower than they
    can be, is repeated, as far as patience goes. Garbage collection waits meanwhile.

    Args:
        cases: what to time, by name.
        rounds: how many rounds, at least 1.
        on_block: called after each block, for progress: `rounds * len(cases)` times.
        patience: seconds to spend on disturbed rounds.

    Returns:
        The seconds that a piece of each case's work takes. Where the machine is too busy for
        `rounds` undisturbed rounds, disturbed ones make up the number.
    """
    calls = {name: _calls_per_block(case) for name, case in cases.items()}
    names = list(cases)
    undisturbed: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    with _no_garbage_collection():
        pace = _pace()
        while len(undisturbed) + len(disturbed) < rounds or (
            patience > 0 and len(undisturbed) < rounds
        ):
            number = len(undisturbed) + len(disturbed)
            first = number % len(names)
            seconds: dict[str, float] = {}
            start, preemptions = time.perf_counter(), _preemptions()
            for name in names[first:] + names[:first]:
                seconds[name] = _block(cases[name], calls[name])
                if number < rounds:
                    on_block()
            before, pace = pace, _pace()
            if _preemptions() == preemptions and max(before, pace) <= _FULL_PACE:
                undisturbed.append(seconds)
            else:
                disturbed.append(seconds)
                patience -= time.perf_counter() - start
    kept = (undisturbed + disturbed)[:rounds]
    return Rounds(
        {name: [seconds[name] for seconds in kept] for name in names},
        min(len(undisturbed), rounds),
    )


# At how many times the least time for the same work a processor counts as slow. It is where it
# shares its parts with others, as processors of virtual machines do; then by half and more.
_FULL_PACE = 1.15
_least: dict[int, float] = {}


def _pace() -> float:
    """Time of fixed arithmetic on all of torch's threads, over the least it has taken so far."""
    threads = torch.get_num_threads()
    x = torch.ones(threads * 32768)  # the least that torch gives a thread
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        x.exp()
        seconds = min(seconds, time.perf_counter() - start)
    least = _least[threads] = min(seconds, _least.get(threads, math.inf))
    return seconds / least


def _preemptions() -> int:
    """How often this process had to give a processor away, all threads together."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads_set_to(threads: int | None) -> Iterator[None]:
    """Give torch's operations this many threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def readable_time(seconds: float) -> str:
    """Three digits and a unit."""
    if math.isnan(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.{_decimals(seconds / size)}f} {unit}"
    return f"{seconds * 1e6:.{_decimals(seconds * 1e6)}f} µs"


def _decimals(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def machine() -> dict[str, Any]:
    """What a timing depends on: processor, cores, instruction set, versions."""
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "architecture": platform.machine(),
        "isa": _C.isa(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastquant": __version__,
    }


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()
