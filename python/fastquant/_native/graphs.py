"""Python in a compiled graph: an op that runs a module's own methods."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .._core.locks import Exclusion

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
    """Let :func:`run_in_graph` find a module: called for each that is made, copied or unpickled."""
    _MODULES[id(module)] = module


def run_in_graph(module: nn.Module, method: str, x: Tensor) -> None:
    """While compiling: have the graph call `module.method(x)`, in Python and as it is, each time.

    For methods that a graph cannot hold, since they branch on a flag or call an observer of the
    user's own. They may change the values of buffers, but neither their sizes nor anything else
    that the graph knows.
    """
    # Calling id(module) makes Dynamo guard on this module.
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
