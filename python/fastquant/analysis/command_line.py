"""The command line of `python -m fastquant.analysis`."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from .._core.batches import checked_data
from .._core.schemes import RangeMethodName
from ..bench.command_line import Parser, at_least_one
from ..bench.errors import BenchError
from ..bench.measure import QCONFIGS
from ..bench.models import load_model, load_object
from ..bench.steps import fused
from ..calibrate import calibrate
from ..fake_quantize import set_range_method
from ..qconfig import get_default_qconfig
from ..quantize import prepare
from .analyzing import analyze
from .errors import AnalysisError
from .result import Analysis


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastquant.analysis",
        description="Quantize a model after calibration, and report what that did to each of its "
        "layers.",
        epilog="Exit status: 0; 1 where the output is worse than --least; 2 where the model cannot "
        "be analysed.",
    )
    parser.add_argument(
        "model",
        help="module:callable, which is called without arguments and returns a float "
        "torch.nn.Module. A model with a fuse_model method is fused; submodules whose qconfig is "
        "None stay in float. Or a built-in model of fastquant.bench",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="MODULE:LOADER",
        help="batches, as for fastquant.calibrate: an iterable, or a callable that returns one",
    )
    parser.add_argument(
        "--metric",
        metavar="MODULE:CALLABLE",
        help="called with a model; returns a number, such as its accuracy",
    )
    parser.add_argument("--qconfig", choices=QCONFIGS, default="x86", help="default: x86")
    parser.add_argument(
        "--range-method",
        choices=get_args(RangeMethodName),
        default="l2",
        help="how ranges are read from histograms; default: l2",
    )
    parser.add_argument("--batches", type=at_least_one, help="default: all")
    parser.add_argument(
        "--no-sensitivity",
        action="store_true",
        help="leave out how much each layer matters to the output, which takes two forwards each",
    )
    parser.add_argument("--threads", type=at_least_one, help="default: torch's own number")
    parser.add_argument("--html", metavar="FILE", help="write a page to look at")
    parser.add_argument("--json", metavar="FILE", help="write all results")
    parser.add_argument("--markdown", metavar="FILE", help="write a summary and a table")
    parser.add_argument(
        "--least",
        type=float,
        metavar="DB",
        help="exit with status 1 if the output's ratio of signal to error is less",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _data(spec: str) -> Any:
    found = load_object(spec, "data")
    if not callable(found) or hasattr(type(found), "__iter__"):
        return found
    torch.manual_seed(0)
    try:
        return found()
    except Exception as error:
        raise BenchError(f"data {spec!r} fails", error) from error


def _run(options: argparse.Namespace) -> Analysis:
    model = load_model(options.model).eval()
    data = _data(options.data)
    if checked_data(data) is data:
        data = list(data)  # walked over several times
    metric = None if options.metric is None else load_object(options.metric, "metric")
    configured = fused(model, "calibrate").eval()
    for module in configured.modules():
        if getattr(module, "qconfig", None) is not None:
            del module.qconfig
    configured.qconfig = get_default_qconfig(options.qconfig)  # type: ignore[assignment]
    prepared: nn.Module = prepare(copy.deepcopy(configured), inplace=True)
    set_range_method(prepared, options.range_method)
    calibrate(prepared, data, batches=options.batches, progress=not options.quiet)
    return analyze(
        model,
        prepared,
        data,
        metric=metric,
        sensitivity=not options.no_sensitivity,
        batches=options.batches,
        name=options.model,
        progress=not options.quiet,
    )


def _write(analysis: Analysis, options: argparse.Namespace) -> None:
    if options.html is not None:
        analysis.to_html(options.html)
    if options.json is not None:
        analysis.to_json(options.json)
    if options.markdown is not None:
        analysis.to_markdown(options.markdown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        analysis = _run(options)
        _write(analysis, options)
    except (AnalysisError, BenchError, OSError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    print(analysis)
    if options.least is not None and not analysis.sqnr >= options.least:
        print(f"\nThe output has less than {options.least:g} dB.", file=sys.stderr)
        return 1
    return 0
