"""`run`: a model in float, prepared by fastquant and prepared by torch.ao, timed in turn."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import BenchError, attempt
from .layers import layer_costs
from .models import described
from .observed import TOLERANCE, Ranges, differences, first_ranges
from .report import FLOAT, OURS, THEIRS, Report
from .steps import Library, Step, fused, libraries
from .timing import Case, measuring, time_rounds

MODES = ("calibrate", "qat")
"""What :func:`run` can measure."""

QCONFIGS = ("x86", "fbgemm", "qnnpack", "onednn")
"""The backends whose default qconfigs :func:`run` can use."""


def run(
    model: nn.Module,
    inputs: Any,
    *,
    name: str | None = None,
    mode: str = "calibrate",
    qconfig: str = "x86",
    threads: int | None = None,
    rounds: int = 10,
    progress: bool = True,
) -> Report:
    """Measure a float model, as it is and prepared by fastquant and by torch.ao.

    The model itself is not changed. It is fused first where it has a `fuse_model` method (for
    mode "qat" one with a parameter `is_qat`). All of it gets one qconfig; submodules whose
    `qconfig` is None stay in float.

    Args:
        model: float model on the CPU.
        inputs: example input: a tensor, a tuple or list of positional arguments, or a mapping
            of keyword arguments.
        name: what the report calls the model.
        mode: "calibrate" measures a forward in eval mode without gradients; "qat" a training
            step (forward, backward, SGD).
        qconfig: backend whose default qconfig is used: "x86", "fbgemm", "qnnpack", "onednn".
        threads: torch's threads meanwhile; None leaves them as they are.
        rounds: how often everything is measured, interleaved.
        progress: show a progress bar on stderr.

    Returns:
        The times of all rounds, in seconds; `print(report.table())` shows them.

    Raises:
        BenchError: the model does not run on the input, or gets no observers.
        RuntimeError: torch.ao.quantization is patched, which leaves nothing to compare with.
        ValueError: mode or qconfig is not one of those above, or threads or rounds is below 1.
    """
    for argument, value, known in (("mode", mode, MODES), ("qconfig", qconfig, QCONFIGS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    with measuring(threads, rounds, progress) as bar:
        return _report(model, inputs, name or type(model).__name__, mode, qconfig, rounds, bar)


def _report(
    model: nn.Module, inputs: Any, name: str, mode: str, qconfig: str, rounds: int, bar: Any
) -> Report:
    comparison = _Comparison(model, inputs, mode, qconfig, bar)
    prepared = {key: step for key, step in comparison.steps.items() if key != FLOAT}
    bar.reset(total=rounds * (len(comparison.steps) + len(prepared)))
    bar.set_description("whole model")
    cases = {key: Case(step) for key, step in comparison.steps.items()}
    whole = time_rounds(cases, rounds, bar.update)
    bar.set_description("layer by layer")
    layers = layer_costs(prepared, rounds, bar.update)
    apart = comparison.apart
    different = [layer for layer, value in (apart or {}).items() if value > TOLERANCE[mode]]
    return Report(
        model=name,
        mode=mode,
        qconfig=qconfig,
        inputs=described(inputs),
        threads=torch.get_num_threads(),
        rounds=rounds,
        undisturbed=whole.undisturbed,
        seconds=whole.seconds,
        layers=layers,
        same_ranges=None if apart is None else not different,
        largest_difference=None if apart is None else max(apart.values()),
        differences=different,
        torch_ao_error=comparison.torch_ao_error,
    )


class _Comparison:
    """The models to compare, each after its first steps.

    ``steps``: by name, the float model's step, fastquant's, and torch.ao's unless it fails.
    ``apart``: by layer, how far the ranges that both observed are apart; None where torch.ao fails.
    ``torch_ao_error``: how it fails.
    """

    def __init__(self, model: nn.Module, inputs: Any, mode: str, qconfig: str, bar: Any) -> None:
        self._inputs, self._mode, self._qconfig = inputs, mode, qconfig
        model = copy.deepcopy(model).train(mode == "qat")
        self._base = attempt("the model's fuse_model fails", partial(fused, model, mode))
        # A prepared model is compared with the float model that a user would run otherwise: in
        # calibration the fused one; in training, where fused modules exist for QAT only, the model
        # as it was given.
        plain = copy.deepcopy(model if mode == "qat" else self._base)
        self.steps = {FLOAT: Step(plain, inputs, mode)}
        attempt("the model does not run on the input", self.steps[FLOAT])

        ours, theirs = libraries()
        bar.set_description(f"first step, {OURS}")
        ranges = self._add(ours)
        self.apart: dict[str, float] | None = None
        self.torch_ao_error: str | None = None
        bar.set_description(f"first step, {THEIRS}")
        try:
            self.apart = differences(ranges, self._add(theirs))
        except BenchError as error:
            self.torch_ao_error = str(error)

    def _add(self, library: Library) -> Ranges:
        """Prepare the model, take its first steps; what it observed."""
        prepared = attempt(
            f"{library.name} cannot prepare the model",
            partial(library.prepared, self._base, self._mode, self._qconfig),
        )
        step = Step(prepared, self._inputs, self._mode)
        ranges: Ranges = attempt(
            f"the model prepared by {library.name} does not run", partial(first_ranges, step)
        )
        if not ranges:
            raise BenchError("nothing in the model gets an observer: no layer to quantize")
        self.steps[library.name] = step
        return ranges
