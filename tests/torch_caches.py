"""Work of torch's that no test is about, done once or not at all: it takes most of their time.

Each function is called once the module that it is given has been imported, and not before, since
importing these takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from types import ModuleType
from typing import Any

import torch


def _find_decomposing_operators_once(utils: ModuleType) -> None:
    """Export looks for all operators that decompose, for each namespace and step anew."""
    original = utils._materialize_cpp_cia_ops
    seen: list[str] = []

    def materialize() -> None:
        found = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if found != seen:
            original()
            seen[:] = found

    utils._materialize_cpp_cia_ops = materialize  # type: ignore[attr-defined]


def _translate_onnx_functions_once(registration: ModuleType) -> None:
    """Each export to ONNX parses the sources of all functions that translate operators."""
    registry_of = functools.cache(registration.ONNXRegistry.from_torchlib)
    default = registration.ONNXRegistry().opset_version

    def from_torchlib(opset_version: int = default) -> Any:
        known, registry = registry_of(opset_version), registration.ONNXRegistry()
        registry._opset_version = known.opset_version
        # Lists of its own: an export may add what its caller brings.
        registry.functions = {name: list(found) for name, found in known.functions.items()}
        return registry

    registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


def _do_not_measure_guards(guards: ModuleType) -> None:
    """For a log, Dynamo measures each graph's guards, with the processor's caches emptied."""
    guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]


def _do_not_log_side_effects(config: ModuleType) -> None:
    """Dynamo formats the stack of every assignment in a graph for a log."""
    if hasattr(config, "side_effect_replay_policy"):
        config.side_effect_replay_policy = "silent"


_PATCHES = {
    "torch._export.utils": _find_decomposing_operators_once,
    "torch.onnx._internal.exporter._registration": _translate_onnx_functions_once,
    "torch._dynamo.guards": _do_not_measure_guards,
    "torch._dynamo.config": _do_not_log_side_effects,
}


def use() -> None:
    """Patch those of the modules that have been imported since the last call."""
    for name in list(_PATCHES):
        if name in sys.modules:
            with contextlib.suppress(AttributeError):  # another torch may have it elsewhere
                _PATCHES.pop(name)(sys.modules[name])
