"""How much each layer matters: quantized alone, and all quantized but it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .metrics import Metric
from .result import Sensitivity
from .simulation import FLOAT, QUANTIZED, Simulation
from .sums import OutputError


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
                    errors[name].add(reference, simulation.run(run, batch))
                advance()
    scores: dict[str, tuple[float | None, float | None]] = {}
    for name in simulation.sites:
        pair: list[float | None] = [None, None]
        if metric is not None:
            simulation.set(FLOAT)
            simulation.set(QUANTIZED, [name])
            pair[0] = simulation.score(metric, f"the model with only {name} quantized")
            advance()
            simulation.set(QUANTIZED)
            simulation.set(FLOAT, [name])
            pair[1] = simulation.score(metric, f"the model with all but {name} quantized")
            advance()
        scores[name] = (pair[0], pair[1])
    simulation.set(FLOAT)
    return {
        name: Sensitivity(only[name].sqnr, without[name].sqnr, *scores[name])
        for name in simulation.sites
    }
