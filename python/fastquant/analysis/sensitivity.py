"""How much each layer matters: quantized alone, and all quantized but it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .errors import AnalysisError
from .result import Sensitivity
from .simulation import FLOAT, QUANTIZED, Simulation
from .sums import OutputError

Metric = Callable[[nn.Module], Any]


def score(metric: Metric, model: nn.Module, which: str) -> float:
    """A user's metric of a model, as a number.

    Args:
        metric: called with the model.
        model: in eval mode.
        which: names the model in an error.

    Raises:
        AnalysisError: it returns no number.
    """
    value = metric(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise AnalysisError(
            f"metric must return a number, and returned {value!r} for {which}"
        ) from None
    if math.isnan(number):
        raise AnalysisError(f"metric must return a number, and returned NaN for {which}")
    return number


def sensitivities(
    simulation: Simulation,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    metric: Metric | None,
    advance: Callable[[], object],
) -> dict[str, Sensitivity]:
    """The sensitivity of every layer, by two forwards of each batch and two calls of the metric.

    Both forwards take from the float model, or from the one with all layers quantized, what the
    layers before this one gave: it is the same.

    Args:
        simulation: is left with all layers in float.
        batches: inputs.
        run: runs a model on a batch.
        metric: of the user.
        advance: called after each forward and each call of the metric, for progress.
    """
    only = {name: OutputError() for name in simulation.sites}
    without = {name: OutputError() for name in simulation.sites}
    for batch in batches:
        reference: Any = None
        for state, other, errors in ((FLOAT, QUANTIZED, only), (QUANTIZED, FLOAT, without)):
            simulation.set(state)
            output, recording = simulation.record(run, batch)
            reference = output if state == FLOAT else reference
            for name in simulation.sites:
                known = recording.before(name)
                simulation.set(state)
                simulation.set(other, [name])
                simulation.set(FLOAT, known)
                with simulation.replaying(known):
                    errors[name].add(reference, run(simulation.model, batch))
                advance()
    scores: dict[str, tuple[float | None, float | None]] = {}
    for name in simulation.sites:
        pair: list[float | None] = [None, None]
        if metric is not None:
            simulation.set(FLOAT)
            simulation.set(QUANTIZED, [name])
            pair[0] = score(metric, simulation.model, f"the model with only {name} quantized")
            advance()
            simulation.set(QUANTIZED)
            simulation.set(FLOAT, [name])
            pair[1] = score(metric, simulation.model, f"the model with all but {name} quantized")
            advance()
        scores[name] = (pair[0], pair[1])
    simulation.set(FLOAT)
    return {
        name: Sensitivity(only[name].sqnr, without[name].sqnr, *scores[name])
        for name in simulation.sites
    }
