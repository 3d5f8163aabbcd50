"""`analyze`: what quantization did to a model, layer by layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._core.batches import checked_data, run_batch, to_device
from .._torch import ao
from ..quantize import convert
from ..utils import _assert_and_get_unique_device
from .alignment import aligned, copy_on_same_weights
from .errors import RUN_ERRORS, AnalysisError, first_line
from .measuring import Measuring, bytes_of_weight, first, weight_report
from .metrics import Metric, score
from .reading import is_prepared, left_out, read
from .result import Analysis, LayerReport
from .sensitivity import sensitivities
from .simulation import FLOAT, QUANTIZED, Simulation
from .timing import times

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Subject:
    """The models and data of an analysis, checked.

    Attributes:
        simulation: the float model, whose layers can be quantized one by one.
        quantized: what the user gave, in eval mode; a copy.
        data: batches, on the models' device; can be walked over again.
        run: runs a model on a batch.
    """

    simulation: Simulation
    quantized: nn.Module
    data: Sequence[Any] | Iterable[Any]
    run: Forward

    @classmethod
    def of(
        cls,
        float_model: nn.Module,
        quantized: nn.Module,
        data: Iterable[Any],
        batches: int | None,
        forward: Forward | None,
    ) -> Subject:
        """Check what the user gave, and make the simulation.

        Raises:
            TypeError: an argument has a wrong type.
            AnalysisError: it has the right one and cannot be analysed.
        """
        for name, model in (("float_model", float_model), ("quantized", quantized)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
        if is_prepared(float_model):
            raise AnalysisError(
                "float_model has observers: pass the model as it was before prepare, which "
                "leaves it as it is unless called with inplace=True"
            )
        if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int)):
            raise TypeError(f"batches must be an int or None, got {type(batches).__name__}")
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        if forward is not None and not callable(forward):
            raise TypeError(
                f"forward must be callable as forward(model, batch), got {type(forward).__name__}"
            )
        with ao.quiet():
            quantized = copy_on_same_weights(quantized).eval()
        layers = read(quantized)
        walked = _Batches(data, batches, _assert_and_get_unique_device(float_model))
        run = forward or run_batch
        batch = first(walked)
        runs = [lambda model: run(model, batch)]
        # The order of calls, which is all that is asked for, shows with one sample as well.
        sample = _sample(batch) if forward is None else None
        if sample is not None:
            runs.insert(0, lambda model: _tried(model, sample))
        model = aligned(float_model, quantized, runs)
        return cls(Simulation(model, layers), quantized, walked, run)


def _sample(batch: Any) -> Tensor | None:
    """The first of several inputs; None where it is not clear how to take it."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return x[:1] if type(x) is Tensor and x.dim() > 2 and len(x) > 1 else None


def _tried(model: nn.Module, x: Tensor) -> None:
    with suppress(*RUN_ERRORS):  # a forward may take batches of one size only
        model(x)


class _Batches:
    """A user's data, cut after a number of batches and moved to a device."""

    def __init__(self, data: Iterable[Any], batches: int | None, device: torch.device | None):
        iterator = checked_data(data)
        # What can be walked over only once is kept: each measure needs it anew.
        self._data = list(islice(iterator, batches)) if iterator is data else data
        self._batches = batches
        self._device = device

    def __iter__(self) -> Any:
        for batch in islice(self._data, self._batches):
            yield to_device(batch, self._device)

    def __len__(self) -> int:
        """How many there are, by a walk over the data where it does not say."""
        try:
            known = len(self._data)  # type: ignore[arg-type]
        except TypeError:
            known = sum(1 for _ in islice(self._data, self._batches))
        return known if self._batches is None else min(known, self._batches)


def analyze(
    float_model: nn.Module,
    quantized: nn.Module,
    data: Iterable[Any],
    *,
    metric: Metric | None = None,
    sensitivity: bool = True,
    timing: bool = True,
    batches: int | None = None,
    sensitivity_batches: int = 1,
    forward: Forward | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Analysis:
    """Measure what quantization did to a model and to each of its layers.

    The models are not changed. The float model may be unfused where the quantized one is fused.
    Each quantized layer alone is computed in float, with rounded weights and outputs. What the
    whole model gives, and its layers in it, is that of the converted model; a prepared one is
    converted for that, to native kernels, where they can run it.

    Args:
        float_model: the model before prepare.
        quantized: prepared by fastquant or torch.ao and calibrated, or converted from that.
        data: batches, as for `fastquant.calibrate`. Data that can be walked over only once, as a
            generator, is kept in memory.
        metric: called with a model, returns a number, such as its accuracy. It is called twice
            for each layer, and with the float and the quantized model.
        sensitivity: whether to measure how much each layer matters to the model's output, by two
            forwards for each layer.
        timing: whether to time the layers, of prepared models by converting a copy.
        batches: use only this many batches of `data`.
        sensitivity_batches: how many batches to measure sensitivity on.
        forward: `forward(model, batch)` returns the model's output for a batch; by default as
            for `fastquant.calibrate`.
        name: what reports call the model; by default its class.
        progress: show a progress bar on stderr.

    Returns:
        The analysis, whose `ranked()` has the layer that does most damage first.

    Raises:
        TypeError: an argument has a wrong type.
        AnalysisError: there is no data, the model was not prepared or not calibrated, a layer is
            never reached, the metric returns no number, or the models' shapes differ.
    """
    started = time.perf_counter()
    if metric is not None and not callable(metric):
        raise TypeError(f"metric must be callable as metric(model), got {type(metric).__name__}")
    if isinstance(sensitivity_batches, bool) or not isinstance(sensitivity_batches, int):
        raise TypeError(
            f"sensitivity_batches must be an int, got {type(sensitivity_batches).__name__}"
        )
    if sensitivity_batches < 1:
        raise ValueError(f"sensitivity_batches must be at least 1, got {sensitivity_batches}")
    subject = Subject.of(float_model, quantized, data, batches, forward)
    simulation, walked, run = subject.simulation, subject.data, subject.run
    notes = [
        f"{part} was not measured: its quantized layers have no counterparts in the float module. "
        "Pass the prepared model to see them"
        for part in left_out(quantized)
    ]
    with torch.no_grad():
        converted = _converted(subject, notes)
        may_fail = converted is not subject.quantized
        measuring = Measuring(simulation, converted, run, may_fail)
        with tqdm(walked, "measuring", unit="batch", disable=not progress, leave=False) as bar:
            measuring.walk(bar)
        if measuring.failure is not None:
            notes.append(_SIMULATED.format(measuring.failure))
            converted = None
        found = {}
        if sensitivity:
            few = list(islice(walked, sensitivity_batches))
            steps = 2 * len(simulation.sites) * (len(few) + (metric is not None))
            with tqdm(
                total=steps, desc="sensitivity", unit="run", disable=not progress, leave=False
            ) as bar:
                found = sensitivities(simulation, few, run, metric, bar.update)
        float_metric = quantized_metric = None
        if metric is not None:
            simulation.set(FLOAT)
            float_metric = score(metric, simulation.model, "the float model")
            simulation.set(QUANTIZED)
            which = "the quantized model"
            if converted is None:
                quantized_metric = simulation.score(metric, which)
            else:
                quantized_metric = score(metric, converted, which)
            simulation.set(FLOAT)
        float_ms, quantized_ms = _times(subject, notes) if timing else ({}, {})
    layers = []
    for site_name, site in simulation.sites.items():
        weight_bytes, output_bytes = bytes_of_weight(site), measuring.bytes_of_output(site_name)
        layers.append(
            LayerReport(
                name=site_name,
                kind=site.way.kind,
                calls=measuring.calls(site_name),
                weight=weight_report(site),
                output=measuring.output(site_name),
                sensitivity=found.get(site_name),
                float_ms=float_ms.get(site_name),
                quantized_ms=quantized_ms.get(site_name),
                float_bytes=weight_bytes[0] + output_bytes[0],
                quantized_bytes=weight_bytes[1] + output_bytes[1],
            )
        )
    return Analysis(
        model=name or type(float_model).__name__,
        layers=tuple(layers),
        sqnr=measuring.error.sqnr,
        cosine=measuring.error.cosine,
        float_metric=float_metric,
        quantized_metric=quantized_metric,
        batches=measuring.batches,
        samples=measuring.samples,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


_SIMULATED = (
    "The converted model could not be run, so that its outputs were simulated, in float with "
    "rounded values: {}"
)


def _converted(subject: Subject, notes: list[str]) -> nn.Module | None:
    """The model whose outputs are compared with the float one's; None to simulate it.

    Of a prepared model, that is what convert makes of it for the native kernels, where all layers
    have eight bits as these do.
    """
    model = subject.quantized
    if not is_prepared(model):
        return model
    ways = (site.way for site in subject.simulation.sites.values())
    grids = [grid for way in ways for grid in (way.weight_grid, way.output) if grid is not None]
    if not grids or not all(grid.fills_a_byte for grid in grids):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(model, backend="native")
    except RUN_ERRORS as error:
        notes.append(_SIMULATED.format(first_line(error)))
        return None


def _times(subject: Subject, notes: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the layers in float, and converted."""
    batch = first(subject.data)
    names = list(subject.simulation.sites)
    converted = subject.quantized
    float_ms = times(subject.simulation.model, names, lambda model: subject.run(model, batch))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_prepared(converted):
                converted = convert(converted)
            quantized_ms = times(converted, names, lambda model: subject.run(model, batch))
    except RUN_ERRORS as error:
        notes.append(f"The quantized layers were not timed: {first_line(error)}")
        quantized_ms = {}
    return float_ms, quantized_ms
