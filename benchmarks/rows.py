"""Rows of results: as text for people, and as JSON in a file.

A row says what was done to which input, how long each case took, and the one number that this
comes to, with the target it was built for where there is one.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastquant.bench.machine import machine
from fastquant.bench.timing import readable_time

OURS, THEIRS = "fastquant", "torch.ao"
ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1

Row = dict[str, Any]

# How values are written, by their unit.
_UNITS: dict[str, Callable[[float], str]] = {
    # times as fast as the other case
    "x": lambda v: f"{v:.1f}x" if v >= 9.995 else f"{v:.2f}x",
    # multiple of the least time that the machine allows
    "of limit": lambda v: f"{v:.2f} of limit",
    "ns/element": lambda v: f"{v:.3f} ns/element",
    # time beyond the other case's
    "more": lambda v: f"{v:+.0%}",
    # multiple of the time of one
    "calibrations": lambda v: f"{v:.2f} calibrations",
    "forwards": lambda v: f"{v:.2f} forwards",
    "bits/element": lambda v: f"{v:.2f} bits/element",
    "KiB": lambda v: f"{v:.0f} KiB",
    "µs": lambda v: readable_time(v * 1e-6),
}

# ------------------------------------------------------------------------------------- text

_COLUMNS = {
    "work": 46,
    "input": 34,
    "threads": 7,
    OURS: 10,
    THEIRS: 10,
    "value (quartiles)": 28,
    "target": 18,
}


def _aligned(cells: Sequence[str]) -> str:
    return "  ".join(f"{c:<{w}}" for c, w in zip(cells, _COLUMNS.values(), strict=True)).rstrip()


def header() -> str:
    """The line above the rows."""
    return _aligned(list(_COLUMNS))


def line(row: Row) -> str:
    """A row as one line."""
    write = _UNITS[row["unit"]]
    value = row["value"]
    text = write(value["median"])
    if row["rounds"] > 1:
        low, high = (write(value[end]).split(" ")[0] for end in ("low", "high"))
        text += f" ({low} to {high})"
    times = [
        readable_time(row["seconds"].get(name, {}).get("median", math.nan))
        for name in (OURS, THEIRS)
    ]
    return _aligned(
        [row["work"], row["input"], str(row["threads"]), *times, text, target_text(row)]
    )


def value_text(row: Row) -> str:
    """A row's value with its unit."""
    return _UNITS[row["unit"]](row["value"]["median"])


def target_text(row: Row) -> str:
    """A row's target and whether it is met."""
    target = row["target"]
    if target is None:
        return ""
    sign = "≥" if target["at_least"] else "≤"
    bound = _UNITS[row["unit"]](target["bound"]).split(" ")[0]
    return f"{sign} {bound} {'met' if row['met'] else 'NOT MET'}"


def mostly_disturbed(rows: Sequence[Row]) -> int:
    """In how many rows other processes disturbed most of the rounds."""
    return sum(2 * row["undisturbed"] < row["rounds"] for row in rows)


def targets_of(rows: Sequence[Row]) -> str:
    """How many targets are met, and which are not."""
    with_target = [row for row in rows if row["target"] is not None]
    missed = [row for row in with_target if not row["met"]]
    lines = [f"{len(with_target) - len(missed)} of {len(with_target)} targets met"]
    lines += [line(row) for row in missed]
    disturbed = mostly_disturbed(rows)
    if disturbed:
        lines.append(
            f"in {disturbed} of {len(rows)} rows, other processes disturbed most of the rounds"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ files


def load(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        SystemExit: the file holds none; the message says why.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    if result.get("format") != FORMAT:
        raise SystemExit(f"{path} holds no benchmark results of format {FORMAT}")
    return result


class Store:
    """A file of rows, with all that is needed to understand and repeat them.

    It holds every row as soon as that is added, whenever the process is ended.
    """

    def __init__(self, path: Path, kept: Sequence[Row] = ()) -> None:
        self._path = path
        about = {
            "format": FORMAT,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
            "machine": machine(),
        }
        self._begin = json.dumps(about, indent=1).removesuffix("\n}") + ',\n "rows": [\n'
        # As text, since writing them anew for each row takes longer than measuring one on a GPU.
        self._rows = [self._text(row) for row in kept]

    @staticmethod
    def _text(row: Row) -> str:
        return textwrap.indent(json.dumps(row, indent=1), "  ")

    def add(self, row: Row) -> None:
        """Store one row more."""
        self._rows.append(self._text(row))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(self._begin + ",\n".join(self._rows) + "\n ]\n}\n")
        partial.replace(self._path)
