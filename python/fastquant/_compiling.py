"""What torch.compile has to be told, told when it is there.

Importing torch._dynamo takes longer than importing torch, and most programs never compile. So
`when_compiling` puts off until then whatever needs it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ._qparams import Exclusion

_DYNAMO = "torch._dynamo"


class _AfterDynamo(MetaPathFinder):
    """Steps in where torch._dynamo is imported, for as long as that takes."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DYNAMO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for task in self.tasks:
                    task()

            loader.exec_module = exec_module
        return spec


_after_dynamo = _AfterDynamo()


def when_compiling(task: Callable[[], None]) -> Callable[[], None]:
    """Run `task` once torch._dynamo is imported, which may be now. Usable as a decorator."""
    if _DYNAMO in sys.modules:
        task()
        return task
    if _after_dynamo not in sys.meta_path:
        sys.meta_path.insert(0, _after_dynamo)
    _after_dynamo.tasks.append(task)
    return task


def outside_graphs(owner: type, method: str, reason: str) -> None:
    """Keep a method of a class out of compiled graphs; `reason` is what users read."""

    def disable() -> None:
        disabled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
            vars(owner)[method], reason=reason
        )
        setattr(owner, method, disabled)

    when_compiling(disable)


# ------------------------------------------------------------------ Python in a compiled graph

FIRST_FORWARD_IN_GRAPH = (
    "the first tensor of a per-channel observer sets the size of its buffers; run the module once "
    "before you compile it with fullgraph=True"
)

_MODULES: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
# Held while a module has lent buffers.
_LENDING = Exclusion()

_library: Any = torch.library.Library("fastquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("run_module_(Tensor x, Tensor(a!)[] buffers, int module, str method) -> ()")


def may_be_run_in_graphs(module: nn.Module) -> None:
    """Let :func:`run_in_graph` find a module; for each that is made, copied or unpickled."""
    _MODULES[id(module)] = module


def run_in_graph(module: nn.Module, method: str, x: Tensor) -> None:
    """While compiling: have the graph call `module.method(x)`, in Python and as it is, each time.

    For methods that do what no graph can hold, such as to ask a flag or to call an observer that
    somebody has written. All they may change are buffers, and none of these in size.
    """
    # To ask for the id ties the graph to this module.
    _run_module(x.detach(), list(module.buffers()), id(module), method)


def _run_module_now(x: Tensor, buffers: list[Tensor], module_id: int, method: str) -> None:
    module = _MODULES[module_id]
    with _LENDING:
        # As `buffers()` has them, each once, and where they are kept.
        places: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}
        for owner in module.modules():
            for name, own in owner._buffers.items():
                if own is not None:
                    places.setdefault(own, []).append((owner._buffers, name))
        # The graph's buffers may be copies of the module's, and stay as they are on an error.
        for held, kept in zip(buffers, places.values(), strict=True):
            lent = held.clone()
            for owned, name in kept:
                owned[name] = lent
        try:
            getattr(module, method)(x)
            results = [owned[name] for (owned, name), *_ in places.values()]
        finally:
            for own, kept in places.items():
                for owned, name in kept:
                    owned[name] = own
    if any(held.shape != result.shape for held, result in zip(buffers, results, strict=True)):
        raise RuntimeError(FIRST_FORWARD_IN_GRAPH)
    for held, result in zip(buffers, results, strict=True):
        held.copy_(result)


_library.impl("run_module_", torch.no_grad()(_run_module_now), "CompositeExplicitAutograd")
torch.library.register_fake("fastquant::run_module_", lambda *_: None)
_run_module = torch.ops.fastquant.run_module_.default
