"""Which layers to leave in float, or at more bits, to reach a target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .._conversion.checks import listed
from .analyzing import Forward, Subject
from .errors import AnalysisError
from .metrics import Metric
from .reading import is_prepared, read
from .simulation import FLOAT, QUANTIZED, Simulation
from .sums import OutputError

_WIDER = 2


@dataclass(frozen=True)
class Assignment:
    """What a search found.

    Attributes:
        kept: layers to leave in float, or at more bits; the most damaging first.
        score: what the model then reaches: the metric, or the SQNR of its output in dB.
        quantized_score: what it reaches with all layers quantized.
        target: what was asked for.
        evaluations: how many assignments were tried.
        qconfigs: None, or the wider config, for each layer that is kept, by a pattern of its
            name: what `fastquant.set_qconfig` takes.
    """

    kept: tuple[str, ...]
    score: float
    quantized_score: float
    target: float
    evaluations: int
    qconfigs: dict[str, Any]


def search(
    float_model: nn.Module,
    prepared: nn.Module,
    data: Iterable[Any],
    target: float,
    *,
    metric: Metric | None = None,
    wider: nn.Module | None = None,
    batches: int = 1,
    forward: Forward | None = None,
    progress: bool = True,
) -> Assignment:
    """Find few layers to leave in float, or at more bits, so that the model reaches a target.

    Layers are ranked by the damage that each does alone. The shortest row of the most damaging ones
    that reaches the target is found by bisection; then each of them, the least damaging first, is
    quantized again where the target is reached without it.

    Args:
        float_model: the model before prepare.
        prepared: prepared and calibrated.
        data: batches, as for `analyze`.
        target: least SQNR of the model's output in dB, or least metric.
        metric: called with a model, returns a number; the more, the better.
        wider: the same model, prepared with more bits and calibrated; layers are then set to its
            configs instead of being left in float.
        batches: how many batches of `data` to use.
        forward: as for `analyze`.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: an argument has a wrong type.
        AnalysisError: as for `analyze`; or the target is out of reach.
    """
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise TypeError(f"target must be a number, got {type(target).__name__}")
    if metric is not None and not callable(metric):
        raise TypeError(f"metric must be callable as metric(model), got {type(metric).__name__}")
    if isinstance(prepared, nn.Module) and not is_prepared(prepared):
        raise AnalysisError("search needs a prepared model, which has a config for each layer")
    subject = Subject.of(float_model, prepared, data, batches, forward)
    if wider is not None:
        _add_wider(subject.simulation, wider)
    with torch.no_grad(), tqdm(desc="searching", unit="run", disable=not progress) as bar:
        found = _Search(subject, metric, wider is not None, bar.update).run(float(target))
    configs = dict((wider if wider is not None else prepared).named_modules())
    qconfigs = {
        re.escape(name): None if wider is None else getattr(configs[name], "qconfig", None)
        for name in found.kept
    }
    return replace(found, qconfigs=qconfigs)


def _add_wider(simulation: Simulation, wider: nn.Module) -> None:
    layers = read(wider)
    missing = [name for name in simulation.sites if name not in layers]
    if missing:
        raise AnalysisError(f"wider lacks {listed(missing)}, which the prepared model has")
    for name, site in simulation.sites.items():
        site.add_way(layers[name])


class _Search:
    """Tries assignments of a model's layers."""

    def __init__(
        self,
        subject: Subject,
        metric: Metric | None,
        is_wider: bool,
        advance: Callable[[], object],
    ) -> None:
        self._simulation = subject.simulation
        self._run = subject.run
        self._batches = list(islice(subject.data, None))
        self._metric = metric
        self._state = _WIDER if is_wider else FLOAT
        self._advance = advance
        self._tried: dict[frozenset[str], float] = {}
        self._simulation.set(FLOAT)
        self._references = [subject.run(subject.simulation.model, b) for b in self._batches]

    def _sqnr(self) -> float:
        """Of the model as it is set."""
        error = OutputError()
        for batch, reference in zip(self._batches, self._references, strict=True):
            error.add(reference, self._simulation.run(self._run, batch))
        self._advance()
        return error.sqnr

    def _score(self, kept: Sequence[str]) -> float:
        """What the model reaches with these layers kept and all others quantized."""
        key = frozenset(kept)
        if key not in self._tried:
            self._simulation.set(QUANTIZED)
            self._simulation.set(self._state, kept)
            if self._metric is None:
                self._tried[key] = self._sqnr()
            else:
                which = f"the model without {listed(kept)} quantized" if kept else "the model"
                self._tried[key] = self._simulation.score(self._metric, which)
                self._advance()
        return self._tried[key]

    def _damage(self, name: str) -> float:
        self._simulation.set(FLOAT)
        self._simulation.set(QUANTIZED, [name])
        return self._sqnr()

    def run(self, target: float) -> Assignment:
        """The search; the configs are left out."""
        start = self._score(())
        ranked: list[str] = []
        kept: list[str] = []
        if start < target:
            damages = {name: self._damage(name) for name in self._simulation.sites}
            ranked = sorted(damages, key=damages.__getitem__)
            best = self._score(ranked)
            if best < target:
                how = "at more bits" if self._state == _WIDER else "in float"
                raise AnalysisError(
                    f"target {target:g} is out of reach: with all layers {how} it is {best:g}"
                )
            kept = ranked[: self._shortest(ranked, target)]
            for name in reversed(kept.copy()):
                without = [other for other in kept if other != name]
                if self._score(without) >= target:
                    kept = without
        reached = self._score(kept)
        self._simulation.set(FLOAT)
        return Assignment(tuple(kept), reached, start, target, len(self._tried), {})

    def _shortest(self, ranked: Sequence[str], target: float) -> int:
        """How many of the first layers to keep; that many do reach the target."""
        few, enough = 0, len(ranked)
        while enough - few > 1:
            middle = (few + enough) // 2
            if self._score(ranked[:middle]) >= target:
                enough = middle
            else:
                few = middle
        return enough
