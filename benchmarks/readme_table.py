"""Writes what the README and docs/ say of measurements, from a stored result.

    python benchmarks/readme_table.py [RESULT.json]   # default: the one with the most measurements

The results are in benchmarks/results, a file for each machine. One is shown in full; of the others,
docs/measurements.md shows whole models. With --check it writes nothing, and fails where a page
differs from what it would write.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastquant.bench.timing import readable_time
from rows import OURS, ROOT, THEIRS, Row, load, mostly_disturbed, value_text

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
QAT_PAGE = ROOT / "docs" / "qat.md"
TABLES_PAGE = ROOT / "docs" / "measurements.md"
# The pages on exported models, and the benchmarks that time these.
EXPORT_PAGES = {
    ROOT / "docs" / "onnx.md": "onnx_models",
    ROOT / "docs" / "export.md": "export_models",
}

SIDES = (OURS, THEIRS)
# torch.ao's engines, where each is timed; the better one counts.
ENGINES = ("fbgemm", "onednn")

# The models of the README's first figures, as the rows name them and as people write them.
HEADLINE = {"mobilenet_v2": "MobileNetV2", "resnet18": "ResNet-18"}

# The benchmarks whose rows TABLES_PAGE shows, under their titles; the others answer more special
# questions.
TABLES = {
    "Observers": ("observers", "ranges"),
    "Fake-quantize": ("fake_quant", "batch_norm"),
    "Int8 layers": ("int8_layers",),
    "Int8 elementwise operations": ("int8_elementwise",),
}


def stored_results() -> list[Path]:
    """All stored results, the one with the most measurements first; of equals, the newest."""

    def order(path: Path) -> tuple[int, str]:
        result = load(path)
        return len(result["rows"]), result["date"]

    results = sorted(RESULTS.glob("*.json"), key=order, reverse=True)
    if not results:
        raise SystemExit("no stored result: run `make bench` first")
    return results


def compared_with_torch_ao(rows: list[Row]) -> list[str]:
    """The rows that compare with torch.ao, with three columns for each number of threads."""
    threads = sorted({row["threads"] for row in rows})
    if not rows:
        return []
    lines = [
        "| work | input | "
        + " | ".join(f"torch.ao, {n} thr. | fastquant | times as fast" for n in threads)
        + " |",
        "|---|---" + "|--:|--:|--:" * len(threads) + "|",
    ]
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["work"], row["input"]), {})[row["threads"]] = row
    for (work, input), by_threads in found.items():
        cells = [work, input]
        for n in threads:
            if n not in by_threads:
                cells += [""] * 3
                continue
            row = by_threads[n]
            theirs = min(t["median"] for side, t in row["seconds"].items() if side != OURS)
            cells += [readable_time(t) for t in (theirs, row["seconds"][OURS]["median"])]
            cells.append(value_text(row))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def whole_models(rows: list[Row]) -> list[str]:
    """What whole models cost beyond float, QAT first, with a column for each number of threads."""
    if not rows:
        return []
    threads = sorted({row["threads"] for row in rows})
    found: dict[str, dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: "QAT step" not in row["work"]):
        found.setdefault(row["work"], {})[row["threads"]] = value_text(row)
    titles = [f"{n} thread{'s' * (n > 1)}" for n in threads]
    lines = [f"| model | {' | '.join(titles)} |", "|---" + "|--:" * len(threads) + "|"]
    for work, by_threads in found.items():
        lines.append(f"| {work} | {' | '.join(by_threads.get(n, '') for n in threads)} |")
    return [
        "Training and calibration, batch 8 at 224 x 224: time, or peak memory, beyond the float "
        "model's.",
        "",
        *lines,
        "",
    ]


def headline(rows: list[Row]) -> str:
    """What a QAT step costs, in a sentence; on one thread, so that it is about the work itself."""
    found = {
        row["work"]: value_text(row)
        for row in rows
        if row["benchmark"] == "whole_models" and row["threads"] == 1
    }
    sides = []
    for side in ("QAT step over float", "QAT step, torch.ao's"):
        values = {model: found.get(f"{name}: {side}") for name, model in HEADLINE.items()}
        if None in values.values():
            return ""
        sides.append(", ".join(f"{model} {value}" for model, value in values.items()))
    return wrapped(
        "**Time of a training step with quantization (QAT), beyond that of a step in float: "
        f"{sides[0]}. With torch.ao: {sides[1]}.** Batch 8 at 224 x 224, one thread; "
        "[Measured](#measured) has more."
    )


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def fused_ops(result: dict[str, Any]) -> str:
    """What QAT's fused ops take, compared with the same work by others, a line for each input."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in result["rows"]:
        if row["benchmark"] == "batch_norm":
            work, _, other = row["work"].partition(", against ")
            found.setdefault((work, row["input"], row["threads"]), {})[other or THEIRS] = row
    if not found:
        return ""
    lines = [
        "| forward + backward | input | threads | time | torch.ao | modules | float | memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (work, input, threads), rows in found.items():
        seconds = next(iter(rows.values()))["seconds"][OURS]["median"]
        values = [
            value_text(rows[other]).removesuffix(" of limit") if other in rows else ""
            for other in (THEIRS, "modules", "float", "memory")
        ]
        cells = [work, input, str(threads), readable_time(seconds), *values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def int8_models(rows: list[Row]) -> list[str]:
    """How many times as fast native int8 models are, with a column for each number of threads."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if (
            row["benchmark"] == "int8_models"
            and row["unit"] == "x"
            and "convert" not in row["work"]
        ):
            found.setdefault((row["work"], row["input"]), {})[row["threads"]] = row
    if not found:
        return []
    threads = sorted({n for by_threads in found.values() for n in by_threads})
    titles = [f"time, {n} thr. | times as fast" for n in threads]
    lines = [
        "Native int8 models: time of a forward, and how many times as fast it is as torch.ao's "
        "int8 model (engine x86), or as what the row names.",
        "",
        f"| model | input | {' | '.join(titles)} |",
        "|---|---" + "|--:|--:" * len(threads) + "|",
    ]
    for (work, input), by_threads in found.items():
        cells = [work, input]
        for n in threads:
            row = by_threads.get(n)
            time = readable_time(row["seconds"][OURS]["median"]) if row else ""
            cells += [time, value_text(row) if row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def filled(lines: list[str]) -> str:
    return "\n".join(line if line.startswith("|") else wrapped(line) for line in lines)


def machine_text(result: dict[str, Any]) -> str:
    about = result["machine"]
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['isa'].upper()}; torch {about['torch']}, "
        f"fastquant {about['fastquant']}; {result['date'][:10]}. Each time is the median of "
        "interleaved rounds of calls to the public modules."
    )


def summary(result: dict[str, Any]) -> str:
    """The README's: what HEADLINE's models cost, on one thread, beside torch.ao."""
    lines = [
        f"{machine_text(result)} One thread; images of 224 x 224, 8 in a batch.",
        "",
        "| | " + " | ".join(f"{name} | torch.ao's" for name in HEADLINE.values()) + " |",
        "|---" + "|--:|--:" * len(HEADLINE) + "|",
    ]
    found = {
        (row["work"], row["input"]): row
        for row in result["rows"]
        if row["threads"] == 1 and row["benchmark"] in ("whole_models", "int8_models")
    }
    for title, ours, theirs in (
        ("time of a QAT step", "QAT step over float", "QAT step, torch.ao's"),
        (
            "peak memory of a QAT step",
            "peak memory of a QAT step over float",
            "peak memory of a QAT step, torch.ao's",
        ),
        (
            "time of a calibration step",
            "calibration forward over float",
            "calibration forward, torch.ao's",
        ),
    ):
        cells = [
            value_text(row) if (row := found.get((f"{model}: {work}", "[8, 3, 224, 224]"))) else ""
            for model in HEADLINE
            for work in (ours, theirs)
        ]
        lines.append(f"| {title}, over float | {' | '.join(cells)} |")
    cells = []
    for model in HEADLINE:
        row = found.get((f"{model}, int8", "[1, 3, 224, 224]"))
        cells += [readable_time(row["seconds"][side]["median"]) if row else "" for side in SIDES]
    lines += [f"| time of an int8 forward, one image | {' | '.join(cells)} |", ""]
    met = [row["met"] for row in result["rows"] if row["met"] is not None]
    lines.append(
        "[docs/measurements.md](docs/measurements.md) has other models and another processor, two "
        "threads, single observers, operations and layers. `make bench` repeats all measurements. "
        f"{sum(met)} of {len(met)} targets are met; [docs/performance.md](docs/performance.md) "
        "explains what limits the others."
    )
    return filled(lines)


def stored_name(path: Path) -> str:
    """How pages name a stored result."""
    path = path.resolve()
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def tables_of_models(rows: list[Row]) -> list[str]:
    """Training, calibration and int8 forwards of whole models."""
    whole = [row for row in rows if row["benchmark"] == "whole_models" and row["unit"] == "more"]
    return [*whole_models(whole), *int8_models(rows)]


def tables(path: Path, result: dict[str, Any]) -> str:
    """Whole models, then what is compared with torch.ao, a table for each subject."""
    rows = result["rows"]
    disturbed = mostly_disturbed(rows)
    lines = [
        f"{machine_text(result)} The stored result, `{stored_name(path)}`, holds {len(rows)} "
        "measurements, among them thread scaling and the machine's own limits."
        + (
            f" Other processes disturbed most of the rounds of {disturbed} measurements: their "
            "times may be too long."
            if disturbed
            else ""
        ),
        "",
    ]
    if models := tables_of_models(rows):
        lines += ["## Whole models", "", *models]
    for title, benchmarks in TABLES.items():
        compared = [
            row
            for row in rows
            if row["benchmark"] in benchmarks
            and row["unit"] == "x"
            and row["seconds"].keys() in ({OURS, THEIRS}, {OURS, *ENGINES})
        ]
        if compared:
            lines += [f"## {title}", "", *compared_with_torch_ao(compared), ""]
    return filled(lines).rstrip("\n")


def other_machines(paths: Sequence[Path]) -> str:
    """Whole models as other machines have measured them."""
    lines = []
    for path in paths:
        result = load(path)
        if models := tables_of_models(result["rows"]):
            lines += [f"{machine_text(result)} Stored in `{stored_name(path)}`.", "", *models]
    return filled(lines).rstrip("\n")


def exported_models(result: dict[str, Any], benchmark: str) -> str:
    """What other runtimes take for exported models, beside float there and native int8."""
    times: dict[tuple[str, int], dict[str, str]] = {}
    for row in result["rows"]:
        if row["benchmark"] == benchmark and row["unit"] == "µs":
            model, case = row["work"].split(": ")
            times.setdefault((model, row["threads"]), {})[case] = value_text(row)
    if not times:
        return ""
    columns = list(dict.fromkeys(case for of_model in times.values() for case in of_model))
    lines = [
        f"{machine_text(result)} One image of 224 x 224.",
        "",
        f"| model | threads | {' | '.join(columns)} |",
        "|---|--:|" + "--:|" * len(columns),
    ]
    for (model, threads), of_model in times.items():
        name, kind = model.split(", ")
        cells = [f"{HEADLINE[name]}, {kind}", str(threads), *(of_model[case] for case in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return filled(lines)


def between_markers(page: Path, text: str, name: str, contents: str) -> str:
    """The page's text with `contents` between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page} must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{contents}\n{end}{after}"


def main() -> None:
    options_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options_parser.add_argument("result", type=Path, nargs="?")
    options_parser.add_argument("--check", action="store_true")
    options = options_parser.parse_args()
    path = options.result or stored_results()[0]
    others = [other for other in stored_results() if not other.samefile(path)]
    result = load(path)
    pages = {
        README: {"headline": headline(result["rows"]), "bench": summary(result)},
        QAT_PAGE: {"bench": fused_ops(result)},
        TABLES_PAGE: {"bench": tables(path, result), "others": other_machines(others)},
    }
    for page, benchmark in EXPORT_PAGES.items():
        if exported := exported_models(result, benchmark):
            pages[page] = {"bench": exported}
    for page, parts in pages.items():
        text = wanted = page.read_text()
        for name, contents in parts.items():
            wanted = between_markers(page, wanted, name, contents)
        if options.check and wanted != text:
            raise SystemExit(f"{page.name} is stale: run `python benchmarks/readme_table.py`")
        if not options.check:
            page.write_text(wanted)


if __name__ == "__main__":
    main()
