"""How long each layer's forward takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_ROUNDS = 5


def times(
    model: nn.Module, names: Iterable[str], run: Callable[[nn.Module], object]
) -> dict[str, float]:
    """The least time of each layer in a few forwards of a model, in milliseconds.

    A layer that is called several times counts as their sum. FloatFunctionals are not called as
    modules are, and are left out.

    Args:
        model: is run, and stays as it is.
        names: the layers.
        run: runs the model on a batch.
    """
    modules = dict(model.named_modules())
    took: dict[str, float] = {}
    best: dict[str, float] = {}
    started: dict[str, float] = {}
    handles = []
    for name in names:
        if name not in modules:
            continue

        def start(*_: Any, name: str = name) -> None:
            _wait(modules[name])
            started[name] = time.perf_counter()

        def stop(*_: Any, name: str = name) -> None:
            _wait(modules[name])
            took[name] = took.get(name, 0.0) + time.perf_counter() - started[name]

        handles.append(modules[name].register_forward_pre_hook(start))
        handles.append(modules[name].register_forward_hook(stop, prepend=True))
    try:
        with torch.no_grad():
            for _ in range(_ROUNDS):
                took.clear()
                run(model)
                for name, seconds in took.items():
                    best[name] = min(seconds, best.get(name, math.inf))
    finally:
        for handle in handles:
            handle.remove()
    return {name: seconds * 1000 for name, seconds in best.items()}


def _wait(module: nn.Module) -> None:
    if any(parameter.is_cuda for parameter in module.parameters()):
        torch.cuda.synchronize()
