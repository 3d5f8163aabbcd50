"""Runs all benchmarks and stores the result with the machine's description.

python benchmarks/run_all.py                        # into benchmarks/results/<machine>.json
python benchmarks/run_all.py --only observers,roofline --json /tmp/quick.json
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import calls
import compile
import fake_quant
import histogram_search
import memory
import observers
import roofline
import threads
import whole_models
from harness import Measure, machine, measured, parser, save, targets_of

RESULTS = Path(__file__).parent / "results"

BENCHMARKS: dict[str, Measure] = {
    module.__name__: module.measure
    for module in (
        observers,
        fake_quant,
        histogram_search,
        roofline,
        threads,
        calls,
        memory,
        whole_models,
        compile,
    )
}


def result_name() -> str:
    """A file's name for this machine."""
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


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--only", type=chosen, default=list(BENCHMARKS), metavar="NAME[,NAME...]",
        help=f"of {', '.join(BENCHMARKS)}; default: all",
    )  # fmt: skip
    options = options_parser.parse_args()
    path = options.json or RESULTS / result_name()
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(options.only, 1):
        print(f"\n{name} ({number} of {len(options.only)})\n")
        rows += measured(name, BENCHMARKS[name], options)
        # What has been measured is kept, should a later benchmark fail.
        save(path, rows)
    print()
    print(targets_of(rows))
    print(f"stored in {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
