"""Writes the README's table of measurements from a stored result.

python benchmarks/readme_table.py [RESULT.json]   # default: the newest in benchmarks/results

With --check it writes nothing, and fails where the README is not what it would write.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import OURS, ROOT, THEIRS, load, readable_time, target_text, value_text

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Row = dict[str, Any]


def newest() -> Path:
    results = sorted(
        (ROOT / "benchmarks" / "results").glob("*.json"), key=lambda path: load(path)["date"]
    )
    if not results:
        raise SystemExit("no stored result: run `make bench` first")
    return results[-1]


def beside_torch_ao(rows: list[Row]) -> list[str]:
    """Rows that are times as fast as torch.ao, a column for each number of threads."""
    threads = sorted({row["threads"] for row in rows})
    lines = [
        "| work | input | "
        + " | ".join(f"torch.ao, {n} thr. | fastquant | times as fast" for n in threads)
        + " |",
        "|---|---" + "|--:|--:|--:" * len(threads) + "|",
    ]
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row["unit"] == "x" and {OURS, THEIRS} == row["seconds"].keys():
            found.setdefault((row["work"], row["input"]), {})[row["threads"]] = row
    for (work, input), by_threads in found.items():
        cells = [work, input]
        for n in threads:
            row = by_threads[n]
            cells += [readable_time(row["seconds"][side]["median"]) for side in (THEIRS, OURS)]
            cells.append(value_text(row))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def whole_models(rows: list[Row]) -> list[str]:
    found = [row for row in rows if row["benchmark"] == "models" and row["unit"] == "more"]
    if not found:
        return []
    lines = ["| model | threads | time over float |", "|---|--:|--:|"]
    lines += [f"| {row['work']} | {row['threads']} | {value_text(row)} |" for row in found]
    return ["", "Whole models, batch 8 at 224 x 224:", "", *lines]


def section(path: Path) -> str:
    result = load(path)
    about, rows = result["machine"], result["rows"]
    missed = [row for row in rows if row["met"] is False]
    with_target = [row for row in rows if row["met"] is not None]
    lines = [
        "## Measured",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['isa'].upper()}; torch {about['torch']}, "
        f"fastquant {about['fastquant']}; {result['date'][:10]}. Medians of interleaved rounds, "
        f"through the public modules. `make bench` repeats it, "
        f"[benchmarks/](benchmarks/) holds all of it; `{Path('benchmarks/readme_table.py')}` "
        "writes this section.",
        "",
        *beside_torch_ao([row for row in rows if row["benchmark"] != "models"]),
        *whole_models(rows),
    ]
    if missed:
        lines += ["", f"{len(missed)} of {len(with_target)} targets are not met:", ""]
        lines += [
            f"- {row['work']}, {row['input']}, {row['threads']} threads: {value_text(row)}, "
            f"target {target_text(row).removesuffix(' NOT MET')}"
            for row in missed
        ]
    return "\n".join(lines)


def main() -> None:
    options_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options_parser.add_argument("result", type=Path, nargs="?")
    options_parser.add_argument("--check", action="store_true")
    options = options_parser.parse_args()
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{README} must hold {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{section(options.result or newest())}\n{END}{after}"
    if options.check:
        raise SystemExit(0 if wanted == text else "README's table is stale: run `make bench-table`")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
