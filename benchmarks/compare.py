"""Compares two stored results, row by row.

    python benchmarks/compare.py BEFORE.json AFTER.json

Times are fastquant's medians. A row is called faster or slower where the quartiles of the two
results do not overlap.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastquant.bench.timing import readable_time
from rows import OURS, load, value_text

Key = tuple[str, str, str, int]


def by_key(path: Path) -> dict[Key, dict[str, Any]]:
    return {
        (row["benchmark"], row["work"], row["input"], row["threads"]): row
        for row in load(path)["rows"]
    }


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    if after["low"] > before["high"]:
        return "slower"
    if after["high"] < before["low"]:
        return "faster"
    return ""


def line(key: Key, before: dict[str, Any], after: dict[str, Any]) -> str:
    benchmark, work, input, threads = key
    times = [row["seconds"].get(OURS) for row in (before, after)]
    if None in times:
        change = ""
        shown = [value_text(before), value_text(after)]
        words = "" if before["value"] == after["value"] else "changed"
    else:
        shown = [readable_time(time["median"]) for time in times]
        change = f"{times[1]['median'] / times[0]['median']:.2f}x"
        words = verdict(*times)
    return (
        f"{benchmark:<17}{work:<48}  {input:<32}{threads:>3}"
        f"{shown[0]:>20}{shown[1]:>20}{change:>8}  {words}"
    ).rstrip()


def main() -> None:
    options_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options_parser.add_argument("before", type=Path)
    options_parser.add_argument("after", type=Path)
    options = options_parser.parse_args()
    before, after = by_key(options.before), by_key(options.after)
    for path in (options.before, options.after):
        result = load(path)
        about = result["machine"]
        print(
            f"{path}: {result['date']}, {about['cpu']}, {about['cores']} cores, {about['isa']}, "
            f"torch {about['torch']}, fastquant {about['fastquant']}"
        )
    print()
    print(
        f"{'benchmark':<17}{'work':<48}  {'input':<32}{'thr':>3}{'before':>20}{'after':>20}"
        f"{'time':>8}"
    )
    for key in before:
        if key in after:
            print(line(key, before[key], after[key]))
    for which, keys in (
        (options.before, before.keys() - after.keys()),
        (options.after, after.keys() - before.keys()),
    ):
        if keys:
            print(f"{len(keys)} rows only in {which}")


if __name__ == "__main__":
    main()
