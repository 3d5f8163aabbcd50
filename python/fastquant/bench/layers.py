"""What each layer's observers cost inside whole steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .observed import observers_of
from .report import OURS, THEIRS, Layer
from .steps import Step
from .timing import Summary


class _LayerClock:
    """Adds up the time that each observer of a model takes in one step."""

    def __init__(self, model: nn.Module) -> None:
        self._observers = observers_of(model)
        self.kinds = {name: type(module).__name__ for name, module in self._observers.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In here, `forward` of every observer is timed, from zero."""
        self.calls.clear()
        self.seconds.clear()
        for name, observer in self._observers.items():
            # An attribute of the instance hides the class's method. Hooks would cost a call more.
            observer.forward = self._timed(name, observer.forward)
        try:
            yield
        finally:
            for observer in self._observers.values():
                del observer.forward

    def _timed(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, Tensor):
                self.shapes.setdefault(name, tuple(x.shape))
            start = time.perf_counter()
            result = forward(x, *args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            self.calls[name] += 1
            return result

        return timed


def layer_costs(
    steps: Mapping[str, Step], rounds: int, on_step: Callable[[], object]
) -> list[Layer]:
    """What each layer's observers cost, in `rounds` steps of every model; costliest first.

    Args:
        steps: a prepared model's step by the name of the library that prepared it.
        rounds: how many steps of each.
        on_step: called after each step, for progress.
    """
    clocks = {name: _LayerClock(step.model) for name, step in steps.items()}
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for name, step in steps.items():
            with clocks[name].running():
                step()
            for layer, cost in clocks[name].seconds.items():
                seconds[layer][name].append(cost)
            on_step()
    ours = clocks[OURS]
    layers = [
        Layer(
            name,
            ours.kinds[name],
            ours.shapes.get(name, ()),
            ours.calls[name],
            {library: Summary.of(costs) for library, costs in by_library.items()},
        )
        for name, by_library in seconds.items()
        if by_library.keys() == steps.keys()
    ]
    key = THEIRS if THEIRS in steps else OURS
    return sorted(layers, key=lambda layer: -layer.seconds[key].median)
