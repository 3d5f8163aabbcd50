"""A torch without torch.ao, quantized dtypes and tensors, for every process of a test run.

`make test-alone` puts this folder on PYTHONPATH, so that Python runs this file when it starts. As
soon as torch is imported, everything below is taken away from it: importing it raises
ModuleNotFoundError, reading it AttributeError.

Two kinds of callers still get it. torch's own modules use torch.ao themselves, in many places:
torch.nn and torch.quantization when torch is imported, Inductor and torch.export for their ops on
quantized tensors, torch.save for the table of dtypes. A torch that drops torch.ao will have dropped
these uses, and until then torch cannot run without it. Likewise torchvision, which imports torch.ao
for its quantizable models. What asks torch.serialization is an exception: it imports what a file
that somebody loads names.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

MODULES = (
    *("torch.ao", "torch.quantization"),
    *("torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantizable", "torch.nn.quantized"),
)
DTYPES = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
FUNCTIONS = (
    *("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_channel"),
    *("_empty_affine_quantized", "_empty_per_channel_affine_quantized"),
    *("_make_per_tensor_quantized_tensor", "_make_per_channel_quantized_tensor"),
)


def is_hidden(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{name}." for name in MODULES))


def may_see(caller: Any) -> bool:
    """Whether code of this module gets what is hidden."""
    return (
        isinstance(caller, str)
        and caller.split(".")[0] in ("torch", "torchvision")
        and caller not in ("torch.serialization", "torch._weights_only_unpickler")
    )


class _Hidden(MetaPathFinder):
    """Finds none of the hidden modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if is_hidden(fullname):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def hide(torch: Any) -> None:
    """Take all of it away from a torch that has just been imported."""
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if is_hidden(name)}
    finder = _Hidden()
    sys.meta_path.insert(0, finder)

    kept: dict[ModuleType, dict[str, Any]] = {torch: {}, torch.nn: {}}
    for name in MODULES:
        owner, _, attribute = name.rpartition(".")
        kept[torch if owner == "torch" else torch.nn][attribute] = modules[name]
    kept[torch].update((name, getattr(torch, name)) for name in (*DTYPES, *FUNCTIONS))
    for module, attributes in kept.items():
        for name in attributes:
            vars(module).pop(name, None)
        _answer(module, attributes)

    import_module, depth = builtins.__import__, 0

    def import_(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        nonlocal depth
        caller = globals or {}
        # `from ..ao import x` in torch.nn.modules has the level 2.
        package = str(caller.get("__package__")).rsplit(".", level - 1)[0] if level else ""
        path = ".".join(filter(None, (package, name)))
        wanted = (path, *(f"{path}.{attribute}" for attribute in fromlist or ()))
        if not may_see(caller.get("__name__")) or not any(map(is_hidden, wanted)):
            return import_module(name, globals, locals, fromlist, level)
        if not depth:
            sys.modules.update(modules)
            sys.meta_path.remove(finder)
        depth += 1
        try:
            return import_module(name, globals, locals, fromlist, level)
        finally:
            depth -= 1
            if not depth:
                sys.meta_path.insert(0, finder)
                for hidden in filter(is_hidden, list(sys.modules)):
                    modules[hidden] = sys.modules.pop(hidden)

    builtins.__import__ = import_


def _answer(module: Any, attributes: dict[str, Any]) -> None:
    """Have a module give these attributes to those who may see them."""
    otherwise = vars(module).get("__getattr__")

    def answer(name: str) -> Any:
        if name in attributes and may_see(sys._getframe(1).f_globals.get("__name__")):
            return attributes[name]
        if name in attributes or otherwise is None:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return otherwise(name)

    module.__getattr__ = answer


class _AfterTorch(MetaPathFinder):
    """Finds torch once, and hides after it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                hide(module)

            loader.exec_module = exec_module
        return spec


if os.environ.get("FASTQUANT_ALONE") == "1":
    sys.meta_path.insert(0, _AfterTorch())
