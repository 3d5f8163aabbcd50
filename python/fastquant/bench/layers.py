"""What layers, or their observers, cost inside whole steps."""

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
    """Adds up the time that each of some modules takes in one step."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self.kinds = {name: type(module).__name__ for name, module in modules.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In here, `forward` of every module is timed, from zero."""
        self.calls.clear()
        self.seconds.clear()
        for name, module in self._modules.items():
            # An attribute of the instance hides the class's method. Hooks would cost a call more.
            module.forward = self._timed(name, module.forward)
        try:
            yield
        finally:
            for module in self._modules.values():
                del module.forward

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
    steps: Mapping[str, Step],
    rounds: int,
    on_step: Callable[[], object],
    modules_of: Callable[[nn.Module], Mapping[str, nn.Module]] = observers_of,
) -> list[Layer]:
    """What each layer's observers cost, in `rounds` steps of every model; costliest first.

    Args:
        steps: a model's step by the name of the library that prepared or converted it.
        rounds: how many steps of each.
        on_step: called after each step, for progress.
        modules_of: the modules of a model to time, by layer; by default its observers.
    """
    clocks = {name: _LayerClock(modules_of(step.model)) for name, step in steps.items()}
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
