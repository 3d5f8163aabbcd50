"""The command line of `python -m fastquant.bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch

from .errors import BenchError
from .int8 import INT8_QCONFIGS, Int8Report, run_int8
from .measure import MODES, run
from .models import BUILT_IN, load_inputs, load_model, parse_input
from .report import Report


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


at_least_one.__name__ = "number, at least 1,"  # argparse's messages name the type


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastquant.bench",
        description="Time a model in float, and prepared or converted by fastquant and by "
        "torch.ao, and check that both observe the same ranges.",
        epilog="Exit status: 0; 1 where the ranges differ; 2 where the model cannot be measured.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="small_cnn",
        help=f"{', '.join(BUILT_IN)} (the last two need torchvision), or module:callable, "
        "which is called without arguments and returns a float torch.nn.Module. A model with a "
        "fuse_model method is fused first. Default: small_cnn",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--input",
        action="append",
        metavar="SIZES[:DTYPE]",
        help="an example input, as in 8x3x224x224 or 16x128:int64: normally distributed, or "
        "zeros and ones; repeat it for each argument",
    )
    given.add_argument(
        "--inputs",
        metavar="MODULE:CALLABLE",
        help="called without arguments; returns the example input: a tensor, a tuple of "
        "arguments or a dict of keyword arguments",
    )
    parser.add_argument(
        "--mode",
        choices=(*MODES, "int8"),
        default="calibrate",
        help="calibrate: a forward in eval mode; qat: a training step; int8: a forward of the "
        "model that convert makes, natively and of torch.ao's modules. Default: calibrate",
    )
    parser.add_argument(
        "--qconfig",
        choices=INT8_QCONFIGS,
        default="x86",
        help="default: x86; native needs --mode int8",
    )
    parser.add_argument("--threads", type=at_least_one, help="default: torch's own number")
    parser.add_argument("--rounds", type=at_least_one, default=10, help="default: 10")
    parser.add_argument("--top", type=at_least_one, default=10, help="layers shown; default: 10")
    parser.add_argument(
        "--json", metavar="FILE", help="write all results to FILE; - for standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _inputs_of(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    if options.inputs is not None:
        return load_inputs(options.inputs)
    if options.input is not None:
        return tuple(parse_input(spec) for spec in options.input)
    if options.model in BUILT_IN:
        return (parse_input(BUILT_IN[options.model][1]),)
    raise BenchError("a model of your own needs --input or --inputs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `python -m fastquant.bench`, which prints or writes its report.

    Args:
        argv: its arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 1 where the two libraries observed different ranges.

    Raises:
        SystemExit: 2 after an error message in one line, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        report = _measured(options)
        if options.json is not None:
            _write_json(report, options.json, argv)
    except BenchError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    print(report.table(options.top), file=sys.stderr if options.json == "-" else sys.stdout)
    return 1 if isinstance(report, Report) and report.same_ranges is False else 0


def _measured(options: argparse.Namespace) -> Report | Int8Report:
    model, inputs = load_model(options.model), _inputs_of(options)
    settings: dict[str, Any] = {
        "name": options.model,
        "qconfig": options.qconfig,
        "threads": options.threads,
        "rounds": options.rounds,
        "progress": not options.quiet,
    }
    if options.mode == "int8":
        return run_int8(model, inputs, **settings)
    if options.qconfig == "native":
        raise BenchError("--qconfig native needs --mode int8: torch.ao has no such config")
    return run(model, inputs, mode=options.mode, **settings)


def _write_json(report: Report | Int8Report, path: str, argv: Sequence[str] | None) -> None:
    words = sys.argv[1:] if argv is None else argv
    result = {
        "command": shlex.join(["python", "-m", "fastquant.bench", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **report.as_dict(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise BenchError(f"cannot write {path!r}", error) from error
