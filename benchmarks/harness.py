"""What the benchmarks share: inputs, targets, the rows of a benchmark, and the command line.

A benchmark is a file with a function `measure(suite)`, which adds rows to the suite, and ends
with `main(measure)`. Every row times its cases in interleaved rounds. A function of the cases'
times, computed in each round, gives the row's value; the row shows its median and quartiles.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastquant.bench.machine import usable_cores
from fastquant.bench.timing import Case as Case
from fastquant.bench.timing import Rounds as Rounds
from fastquant.bench.timing import Summary, threads_set_to
from fastquant.bench.timing import time_rounds as time_rounds
from rows import OURS as OURS
from rows import THEIRS as THEIRS
from rows import Row, Store, header, line, targets_of

# An activation of a convolutional network.
INPUT = (1, 64, 56, 56)


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Normally distributed numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    return values.to(dtype=dtype, memory_format=memory_format)


def describe(x: Tensor) -> str:
    """Dtype, shape and layout in a few letters."""
    names = {
        torch.float32: "fp32",
        torch.float64: "fp64",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
    }
    layout = "" if x.is_contiguous() else " channels_last"
    return f"{names[x.dtype]} {list(x.shape)}{layout}"


# ----------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What a row's value is to be."""

    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float) -> Target:
    return Target(bound, at_least=True)


def at_most(bound: float) -> Target:
    return Target(bound, at_least=False)


# -------------------------------------------------------------------------------------- rows

Run = Callable[[], object]

# A row's number, from the seconds that each case took in one round.
Value = Callable[[dict[str, float]], float]


@dataclass
class Suite:
    """The rows of one benchmark, printed as they come."""

    name: str
    rounds: int
    threads: int
    patience: float = 2.0
    rows: list[Row] = field(default_factory=list)
    keep: Callable[[Row], None] | None = None  # is given each row

    def add(
        self,
        work: str,
        input: str,
        cases: Mapping[str, Case | Run],
        value: Value,
        unit: str,
        target: Target | None = None,
        most_rounds: int | None = None,
    ) -> None:
        """Time cases and add a row.

        Args:
            work: what is done.
            input: what it is done to.
            cases: what to time, by name; `fastquant` and `torch.ao` have columns of their own.
            value: of the seconds that each case took in one round.
            unit: of the value, one of those that rows.py can write.
            target: what the value is to be.
            most_rounds: fewer rounds than asked for, where a call takes long.
        """
        whole = {
            name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()
        }
        rounds = min(self.rounds, most_rounds or self.rounds)
        timed = time_rounds(whole, rounds, patience=self.patience)
        self.add_rounds(work, input, timed, value, unit, target)

    def compare(
        self,
        work: str,
        input: str,
        ours: Case | Run,
        theirs: Case | Run | None,
        target: Target | None = None,
        most_rounds: int | None = None,
    ) -> None:
        """Add a row: how many times as fast as torch.ao; only our time where torch.ao fails."""
        if theirs is None:
            self.add(work, input, {OURS: ours}, lambda t: t[OURS] * 1e6, "µs", None, most_rounds)
        else:
            cases = {OURS: ours, THEIRS: theirs}
            self.add(work, input, cases, lambda t: t[THEIRS] / t[OURS], "x", target, most_rounds)

    def bf16_against_fp32(self, work: str, x: Tensor, build: Callable[[Tensor], Case]) -> None:
        """Add a row: how much faster bf16 is than fp32 of the same shape, in fastquant."""
        half = x.to(torch.bfloat16)
        cases = {OURS: build(half), "fp32": build(x)}
        self.add(
            f"{work}, bf16 against fp32",
            describe(half),
            cases,
            lambda t: t["fp32"] / t[OURS],
            "x",
            at_least(1),
        )

    def add_rounds(
        self,
        work: str,
        input: str,
        timed: Rounds,
        value: Value,
        unit: str,
        target: Target | None = None,
    ) -> None:
        """Add a row of what was timed elsewhere, one number per case and round."""
        seconds = timed.seconds
        values = [
            value(dict(zip(seconds, numbers, strict=True)))
            for numbers in zip(*seconds.values(), strict=True)
        ]
        times = {
            name: {**vars(Summary.of(numbers)), "best": min(numbers)}
            for name, numbers in seconds.items()
        }
        kept = (len(values), timed.undisturbed)
        self._append(work, input, times, Summary.of(values), unit, target, kept)

    def add_value(
        self, work: str, input: str, value: float, unit: str, target: Target | None = None
    ) -> None:
        """Add a row whose value is not derived from times."""
        self._append(work, input, {}, Summary.of([value]), unit, target, (1, 1))

    def _append(
        self,
        work: str,
        input: str,
        times: dict[str, dict[str, float]],
        value: Summary,
        unit: str,
        target: Target | None,
        rounds: tuple[int, int],
    ) -> None:
        row = {
            "benchmark": self.name,
            "work": work,
            "input": input,
            "threads": self.threads,
            "rounds": rounds[0],
            "undisturbed": rounds[1],
            "seconds": times,
            "value": vars(value),
            "unit": unit,
            "target": None if target is None else vars(target),
            "met": None if target is None else target.is_met(value.median),
        }
        self.rows.append(row)
        print(line(row), flush=True)
        if self.keep is not None:
            self.keep(row)


# ------------------------------------------------------------------------------ command line

Measure = Callable[[Suite], None]


def _thread_counts(text: str) -> list[int]:
    counts = [int(word) for word in text.split(",")]
    if not counts or min(counts) < 1:
        raise ValueError
    return counts


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# argparse's messages name the type.
_thread_counts.__name__ = "list of thread counts"
_at_least_one.__name__ = "number, at least 1,"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--threads",
        type=_thread_counts,
        default=sorted({1, min(2, usable_cores())}),
        metavar="N[,N...]",
        help="torch's threads; everything is measured with each number. Default: 1,2",
    )
    result.add_argument(
        "--rounds", type=_at_least_one, default=40, help="interleaved rounds. Default: 40"
    )
    result.add_argument(
        "--patience",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="time to spend, for each row, on repeating disturbed rounds. Default: 2",
    )
    result.add_argument("--json", type=Path, metavar="OUT", help="write the results to OUT")
    return result


def _measure(
    name: str, measure: Measure, options: argparse.Namespace, keep: Callable[[Row], None]
) -> None:
    """Run a benchmark, for each number of threads."""
    print(header())
    for threads in options.threads:
        with warnings.catch_warnings(), threads_set_to(threads):
            # torch.ao warns of its deprecation at every step.
            warnings.simplefilter("ignore")
            measure(Suite(name, options.rounds, threads, options.patience, keep=keep))


def run_benchmarks(
    benchmarks: Mapping[str, Measure],
    options: argparse.Namespace,
    store: Path | None,
    kept: Sequence[Row] = (),
) -> None:
    """Run benchmarks as a command, and store their rows, after `kept`, where a path is given.

    One that fails keeps no other from its turn.
    """
    rows: list[Row] = []
    failed: list[str] = []
    stored = None if store is None else Store(store, kept)

    def keep(row: Row) -> None:
        rows.append(row)
        if stored is not None:
            # After each, so that no later failure, and no end of the time there is, loses any.
            stored.add(row)

    try:
        for number, (name, measure) in enumerate(benchmarks.items(), 1):
            if len(benchmarks) > 1:
                print(f"\n{name} ({number} of {len(benchmarks)})\n")
            try:
                _measure(name, measure, options, keep)
            except Exception:
                traceback.print_exc()
                failed.append(name)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"\n{targets_of(rows)}")
    if store is not None:
        print(f"stored in {store}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main(measure: Measure) -> None:
    """Run one benchmark as a command."""
    options = parser(sys.modules[measure.__module__].__doc__).parse_args()
    run_benchmarks({Path(sys.argv[0]).stem: measure}, options, options.json)
