"""Timings that can be compared: interleaved rounds, medians, and their spread."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .disturbance import Watch

# Calls are timed in blocks of this length: long enough that reading the clock costs nothing in
# comparison, short enough that the scheduler rarely interrupts one. A single call may take longer.
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
    """Median and quartiles of one number per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Rounds:
    """Seconds by case, one number per round; and how many rounds other work left undisturbed."""

    seconds: dict[str, list[float]]
    undisturbed: int


def time_rounds(
    cases: Mapping[str, Case],
    rounds: int,
    on_block: Callable[[], object] = lambda: None,
    patience: float = 2.0,
) -> Rounds:
    """Time cases in rounds.

    A round runs one block of each case, one after the other; each round begins with another case.
    So whatever slows the machine down slows all cases alike. Rounds that other work disturbed are
    repeated until `patience` is used up. Garbage collection is off meanwhile.

    Args:
        cases: what to time, by name.
        rounds: how many rounds, at least 1.
        on_block: called after each block, for progress: `rounds * len(cases)` times.
        patience: seconds to spend on disturbed rounds.

    Returns:
        The seconds that a piece of each case's work takes. If the machine is too busy for `rounds`
        undisturbed rounds, disturbed ones make up the number.
    """
    calls = {name: _calls_per_block(case) for name, case in cases.items()}
    names = list(cases)
    undisturbed: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    with _no_garbage_collection():
        watch = Watch()
        while len(undisturbed) + len(disturbed) < rounds or (
            patience > 0 and len(undisturbed) < rounds
        ):
            number = len(undisturbed) + len(disturbed)
            first = number % len(names)
            seconds: dict[str, float] = {}
            start = time.perf_counter()
            watch.start()
            for name in names[first:] + names[:first]:
                seconds[name] = _block(cases[name], calls[name])
                if number < rounds:
                    on_block()
            if watch.undisturbed():
                undisturbed.append(seconds)
            else:
                disturbed.append(seconds)
                patience -= time.perf_counter() - start
    kept = (undisturbed + disturbed)[:rounds]
    return Rounds(
        {name: [seconds[name] for seconds in kept] for name in names},
        min(len(undisturbed), rounds),
    )


def _block(case: Case, calls: int) -> float:
    """Seconds that one piece of the case's work takes, over this many runs."""
    if case.before is not None:
        case.before()
    run = case.run
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / (calls * case.parts)


def _calls_per_block(case: Case) -> int:
    """How many runs fill a block; finding out warms the case up."""
    _block(case, 1)
    calls = 1
    while True:
        seconds = _block(case, calls) * calls * case.parts
        if seconds >= _BLOCK_SECONDS or calls >= _MOST_CALLS:
            return calls
        wanted = math.ceil(calls * _BLOCK_SECONDS / max(seconds, 1e-7))
        calls = min(max(wanted, calls + 1), calls * 20, _MOST_CALLS)


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
    """Give torch's operations this many threads in here; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def measuring(threads: int | None, rounds: int, progress: bool) -> Iterator[Any]:
    """What a measurement of a model happens in: its threads, no warnings, and a progress bar.

    Warnings of torch.ao and of the model are not a benchmark's subject; what `convert` warns of,
    its report says.

    Raises:
        ValueError: threads or rounds is below 1.
    """
    for argument, number in (("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise ValueError(f"{argument} must be at least 1, got {number}")
    with (
        warnings.catch_warnings(),
        threads_set_to(threads),
        tqdm(total=None, desc="float model", unit="step", disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore")
        yield bar


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
