"""A torch without torch.ao, quantized dtypes and tensors, for every process of a test run.

`make test-alone` puts this folder on PYTHONPATH, so that Python runs this file when it starts. As
soon as torch is imported, everything below is taken away from it: importing it raises
ModuleNotFoundError, reading it AttributeError.

Some callers still get it. torch's own modules use torch.ao themselves, in many places: torch.nn and
torch.quantization when torch is imported, Inductor and torch.export for their ops on quantized
tensors, torch.save for the table of dtypes. A torch that drops torch.ao will have dropped these
uses, and until then torch cannot run without it. Likewise torchvision, which imports torch.ao for
its quantizable models. torch.serialization gets nothing: it imports what a file that somebody loads
names.

Test modules compare fastquant with torch.ao. They can import it, and get what skips the test that
uses it. Where they name a quantized dtype, they get the plain one of the same integers.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

MODULES = (
    *("torch.ao", "torch.quantization"),
    *("torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantizable", "torch.nn.quantized"),
)
# Each with the plain dtype of the same integers.
DTYPES = {
    "quint8": "uint8",
    "qint8": "int8",
    "qint32": "int32",
    "quint4x2": "uint4",
    "quint2x4": "uint2",
}
FUNCTIONS = (
    *("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_channel"),
    *("_empty_affine_quantized", "_empty_per_channel_affine_quantized"),
    *("_make_per_tensor_quantized_tensor", "_make_per_channel_quantized_tensor"),
)
TESTS = str(Path(__file__).parent.parent)


# No generator at each call: Dynamo, where it meets an import, cannot trace one.
HIDDEN = tuple([f"{name}." for name in MODULES])


def is_hidden(module: str) -> bool:
    return f"{module}.".startswith(HIDDEN)


def may_see(caller: dict[str, Any]) -> bool:
    """Whether code with these globals gets what is hidden."""
    name = str(caller.get("__name__"))
    return name.split(".")[0] in ("torch", "torchvision") and name not in (
        "torch.serialization",
        "torch._weights_only_unpickler",
    )


def is_test(caller: dict[str, Any]) -> bool:
    """Whether these are the globals of a test module, or of a module that tests share."""
    return caller.get("__name__") != "__main__" and str(caller.get("__file__")).startswith(TESTS)


# --- what test modules get ------------------------------------------------------------------


def skip(what: str) -> NoReturn:
    import pytest

    pytest.skip(f"compares with {what}, and there is no torch.ao", allow_module_level=True)


class Missing:
    """Something of torch.ao's, by its path: what it is used for in a test skips the test."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _used(self, *args: Any, **kwargs: Any) -> Any:
        if "PYTEST_CURRENT_TEST" in os.environ:
            skip(self._path)
        return Missing(self._path)

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            self._used()
            return ()
        if name.startswith(("__", "pytest", "_pytest")):
            raise AttributeError(name)
        return Missing(f"{self._path}.{name}")._used()

    def _needed(self, *args: Any, **kwargs: Any) -> NoReturn:
        skip(self._path)

    __call__ = __getitem__ = __or__ = __ror__ = _used
    __dir__ = __iter__ = __len__ = __mro_entries__ = __instancecheck__ = __subclasscheck__ = _needed


# --- taking away ----------------------------------------------------------------------------


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
        wanted = (path, *[f"{path}.{attribute}" for attribute in fromlist or ()])
        if not any(map(is_hidden, wanted)):
            return import_module(name, globals, locals, fromlist, level)
        if is_test(caller):
            return Missing(path) if fromlist and is_hidden(path) else torch
        if not may_see(caller):
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
        if name in attributes:
            caller = sys._getframe(1).f_globals
            if may_see(caller):
                return attributes[name]
            if is_test(caller):
                if name in DTYPES:
                    return getattr(module, DTYPES[name])
                return Missing(f"{module.__name__}.{name}")
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
