"""Runs all benchmarks and stores the result with the machine's description.

python benchmarks/run_all.py                        # into benchmarks/results/<machine>.json
python benchmarks/run_all.py --only observers,roofline --json /tmp/quick.json

With --only, rows of other benchmarks that the file has of this machine and torch stay.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

import analysis
import batch_norm
import calls
import compile
import convolution
import export_models
import fake_quant
import histogram_search
import int8_dynamic
import int8_elementwise
import int8_embedding
import int8_layers
import int8_models
import memory
import observers
import onnx_models
import ranges
import roofline
import threads
import whole_models
from fastquant.bench.machine import machine
from harness import Measure, parser, run_benchmarks
from rows import Row, load

RESULTS = Path(__file__).parent / "results"

BENCHMARKS: dict[str, Measure] = {
    module.__name__: module.measure
    for module in (
        observers,
        fake_quant,
        batch_norm,
        histogram_search,
        ranges,
        roofline,
        threads,
        calls,
        memory,
        whole_models,
        compile,
        convolution,
        int8_dynamic,
        int8_elementwise,
        int8_embedding,
        int8_layers,
        int8_models,
        onnx_models,
        export_models,
        analysis,
    )
}


def result_name() -> str:
    """The name of this machine's file."""
    about = machine()
    cpu = re.sub(r"\((r|tm)\)", "", about["cpu"].lower())
    words = f"{cpu} {about['cores']} cores {about['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".json"


def chosen(names: str) -> list[str]:
    wanted = names.split(",")
    if not set(wanted) <= BENCHMARKS.keys():
        raise ValueError
    return wanted


chosen.__name__ = f"choice of {', '.join(BENCHMARKS)}"  # for argparse's message


def rows_of_others(path: Path, measured: Container[str]) -> list[Row]:
    """The rows that a stored result of this machine has of benchmarks that are not measured."""
    if not path.exists():
        return []
    stored, here = load(path), machine()
    if any(stored["machine"][key] != here[key] for key in ("cpu", "cores", "torch")):
        return []
    return [row for row in stored["rows"] if row["benchmark"] not in measured]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--only", type=chosen, default=list(BENCHMARKS), metavar="NAME[,NAME...]",
        help=f"of {', '.join(BENCHMARKS)}; default: all",
    )  # fmt: skip
    options = options_parser.parse_args()
    wanted = {name: BENCHMARKS[name] for name in options.only}
    path = options.json or RESULTS / result_name()
    kept = rows_of_others(path, wanted) if len(wanted) < len(BENCHMARKS) else []
    run_benchmarks(wanted, options, path, kept)


if __name__ == "__main__":
    main()
