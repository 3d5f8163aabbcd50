"""What the benchmarks share: the command line, rows with targets, the table, the JSON.

A benchmark is a file with a function `measure(suite)`, which adds rows to the suite, and ends
with `main(measure)`. Every row times its cases in interleaved rounds and boils them down to one
number, computed for each round; the row shows their median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastquant.bench.machine import machine as machine
from fastquant.bench.timing import Case as Case
from fastquant.bench.timing import Rounds as Rounds
from fastquant.bench.timing import Summary, threads_set_to
from fastquant.bench.timing import readable_time as readable_time
from fastquant.bench.timing import time_rounds as time_rounds

OURS, THEIRS = "fastquant", "torch.ao"
FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent

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


# How the values of rows are written.
_UNITS: dict[str, Callable[[float], str]] = {
    # times as fast as
    "x": lambda v: f"{v:.1f}x" if v >= 9.995 else f"{v:.2f}x",
    # of the time that the machine takes at least
    "of limit": lambda v: f"{v:.2f} of limit",
    "ns/element": lambda v: f"{v:.3f} ns/element",
    # time beyond another's
    "more": lambda v: f"{v:+.0%}",
    "bits/element": lambda v: f"{v:.2f} bits/element",
    "KiB": lambda v: f"{v:.0f} KiB",
    "µs": lambda v: readable_time(v * 1e-6),
}


# A row's number, from the seconds that each case took in one round.
Value = Callable[[dict[str, float]], float]


@dataclass
class Suite:
    """The rows of one benchmark, printed as they come."""

    name: str
    rounds: int
    threads: int
    patience: float = 2.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        work: str,
        input: str,
        cases: Mapping[str, Case | Callable[[], object]],
        value: Value,
        unit: str,
        target: Target | None = None,
    ) -> None:
        """Time cases and add a row.

        Args:
            work: what is done.
            input: to what.
            cases: what to time, by name; `fastquant` and `torch.ao` have columns of their own.
            value: of the seconds that each case took in one round.
            unit: of the value, one of those the table knows.
            target: what the value is to be.
        """
        whole = {
            name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()
        }
        timed = time_rounds(whole, self.rounds, patience=self.patience)
        self.add_rounds(work, input, timed, value, unit, target)

    def add_rounds(
        self,
        work: str,
        input: str,
        timed: Rounds,
        value: Value,
        unit: str,
        target: Target | None = None,
    ) -> None:
        """Add a row of what was timed elsewhere, one number for each round."""
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
        """Add a row whose value is no time."""
        self._append(work, input, {}, Summary.of([value]), unit, target, (1, 1))

    def compare(
        self,
        work: str,
        input: str,
        ours: Case | Callable[[], object],
        theirs: Case | Callable[[], object] | None,
        target: Target | None = None,
    ) -> None:
        """Add a row of how many times as fast as torch.ao's; alone where torch.ao cannot."""
        if theirs is None:
            self.add(work, input, {OURS: ours}, lambda t: t[OURS] * 1e6, "µs")
        else:
            cases = {OURS: ours, THEIRS: theirs}
            self.add(work, input, cases, lambda t: t[THEIRS] / t[OURS], "x", target)

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
        print(_line(row), flush=True)


_WIDTHS = (46, 34, 7, 10, 10, 28, 18)


def _cells(row: dict[str, Any]) -> list[str]:
    write = _UNITS[row["unit"]]
    value = row["value"]
    text = write(value["median"])
    if row["rounds"] > 1:
        number = [write(value[end]).split(" ")[0] for end in ("low", "high")]
        text += f" ({number[0]} to {number[1]})"
    times = [
        readable_time(row["seconds"].get(name, {}).get("median", math.nan))
        for name in (OURS, THEIRS)
    ]
    return [row["work"], row["input"], str(row["threads"]), *times, text, target_text(row)]


def target_text(row: dict[str, Any]) -> str:
    """A row's target and whether it is met."""
    target = row["target"]
    if target is None:
        return ""
    sign = "≥" if target["at_least"] else "≤"
    bound = _UNITS[row["unit"]](target["bound"]).split(" ")[0]
    return f"{sign} {bound} {'met' if row['met'] else 'NOT MET'}"


def value_text(row: dict[str, Any]) -> str:
    """A row's value with its unit."""
    return _UNITS[row["unit"]](row["value"]["median"])


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{c:<{w}}" for c, w in zip(_cells(row), _WIDTHS, strict=True)).rstrip()


def header() -> str:
    names = ("work", "input", "threads", OURS, THEIRS, "value (quartiles)", "target")
    return "  ".join(f"{name:<{w}}" for name, w in zip(names, _WIDTHS, strict=True)).rstrip()


def targets_of(rows: Sequence[dict[str, Any]]) -> str:
    """How many targets are met, and which are not."""
    with_target = [row for row in rows if row["target"] is not None]
    missed = [row for row in with_target if not row["met"]]
    lines = [f"{len(with_target) - len(missed)} of {len(with_target)} targets met"]
    lines += [_line(row) for row in missed]
    disturbed = sum(2 * row["undisturbed"] < row["rounds"] for row in rows)
    if disturbed:
        lines.append(
            f"in {disturbed} of {len(rows)} rows, other processes disturbed most of the rounds"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------
# Results


def contents(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows with all that is needed to understand and repeat them."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "machine": machine(),
        "rows": list(rows),
    }


def load(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        SystemExit: there is none, in words.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    if result.get("format") != FORMAT:
        raise SystemExit(f"{path} holds no benchmark results of format {FORMAT}")
    return result


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents(rows), indent=1) + "\n")


# --------------------------------------------------------------------------------------------
# Command line

Measure = Callable[[Suite], None]


def _thread_counts(text: str) -> list[int]:
    counts = [int(word) for word in text.split(",")]
    if not counts or min(counts) < 1:
        raise ValueError
    return counts


_thread_counts.__name__ = "list of thread counts"  # for argparse's message


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result.add_argument(
        "--threads",
        type=_thread_counts,
        default=sorted({1, min(2, cores or 1)}),
        metavar="N[,N...]",
        help="torch's threads; everything is measured with each. Default: 1,2",
    )
    result.add_argument("--rounds", type=int, default=40, help="interleaved rounds. Default: 40")
    result.add_argument(
        "--patience",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="to spend, for each row, on rounds that other processes disturb. Default: 2",
    )
    result.add_argument("--json", type=Path, metavar="OUT", help="write the results to OUT")
    return result


def measured(name: str, measure: Measure, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of a benchmark, for each number of threads."""
    rows: list[dict[str, Any]] = []
    print(header())
    for threads in options.threads:
        with warnings.catch_warnings(), threads_set_to(threads):
            # torch.ao is deprecated, and says so at every step.
            warnings.simplefilter("ignore")
            suite = Suite(name, options.rounds, threads, options.patience)
            measure(suite)
            rows += suite.rows
    return rows


def main(measure: Measure) -> None:
    """Run one benchmark as a command."""
    module = sys.modules[measure.__module__]
    options = parser(module.__doc__).parse_args()
    if options.rounds < 1:
        raise SystemExit("--rounds must be at least 1")
    try:
        rows = measured(Path(sys.argv[0]).stem, measure, options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print()
    print(targets_of(rows))
    if options.json is not None:
        save(options.json, rows)
