"""`patch_torch_ao`: fastquant in torch.ao.quantization's place, for code that cannot be edited."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch

from ._core.state import ActivationPostProcess
from ._torch import ao
from ._torch.counterparts import COUNTERPARTS, subclasshook
from ._torch.elsewhere import explain_missing_modules
from .fake_quantize import FakeQuantizeBase
from .observer import ObserverBase
from .quantization_mappings import DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
from .stubs import DeQuantStub, QuantStub

__all__ = ["Patch", "patch_torch_ao"]

# fastquant's modules and torch.ao.quantization's that hold the same names.
_TWINS = {
    "": ("",),
    "observer": ("observer",),
    "fake_quantize": ("fake_quantize", "_learnable_fake_quantize"),
    "qconfig": ("qconfig",),
    "qconfig_mapping": ("qconfig_mapping",),
    "quantization_mappings": ("quantization_mappings",),
    "quantize": ("quantize",),
    "fuse_modules": ("fuse_modules",),
    "fuser_method_mappings": ("fuser_method_mappings",),
}
# What these hold are markers and helpers, no implementations that a user picks.
_SHARED_MODULES = ("fastquant.stubs", "fastquant.utils", "fastquant.quant_type")
_PATCHED_PACKAGES = ("torch.ao.quantization", "torch.quantization")


def _twins() -> Iterator[tuple[str, Any, Any]]:
    """(name, fastquant's object, torch.ao's) for each name that both define, each its own."""
    for ours_name, theirs_names in _TWINS.items():
        ours_module = importlib.import_module(f"fastquant.{ours_name}".rstrip("."))
        for theirs_module in filter(None, map(_namespace, theirs_names)):
            for name, ours in vars(ours_module).items():
                theirs = vars(theirs_module).get(name)
                if (
                    not name.startswith("__")
                    and ours is not theirs
                    and _is_implementation(ours)
                    and _is_implementation(theirs)
                ):
                    yield name, ours, theirs


def _namespace(name: str) -> types.ModuleType | None:
    """torch.ao.quantization's submodule of this name; None where this torch has none."""
    with contextlib.suppress(ImportError):
        return ao.namespace(name)
    return None


def _is_implementation(value: Any) -> bool:
    """Whether a module's global is code or configuration of fastquant's or torch.ao's own."""
    if isinstance(value, (type, types.FunctionType)):
        return (
            value.__module__.startswith(("fastquant", "torch.ao.quantization"))
            and value.__module__ not in _SHARED_MODULES
        )
    return isinstance(value, (dict, set)) or type(value).__name__ in ("QConfig", "_PartialWrapper")


def introduce_to_torch_ao() -> None:
    """Make torch.ao and fastquant take each other's observers, fake-quantizers and stubs.

    This is all that importing fastquant does to others. Each of its observers and fake-quantizers
    becomes a virtual subclass of torch.ao's class of the same name, and that one of fastquant's.
    torch.ao's two tables of static quantization get entries for fastquant's stubs. The last finder
    of modules, which is asked where all others found nothing, explains what is not in fastquant.
    """
    bases: tuple[Any, ...] = (ActivationPostProcess, ObserverBase, FakeQuantizeBase)
    for base in bases:
        base.__subclasshook__ = classmethod(subclasshook)
    for _, ours, theirs in list(_twins()):
        if isinstance(ours, type) and issubclass(ours, bases):
            theirs.register(ours)
            COUNTERPARTS[theirs] = ours
    for table in ("STATIC", "REFERENCE_STATIC"):
        theirs = getattr(ao.mappings, f"DEFAULT_{table}_QUANT_MODULE_MAPPINGS", {})
        for stub in (QuantStub, DeQuantStub):
            theirs[stub] = DEFAULT_STATIC_QUANT_MODULE_MAPPINGS[stub]
    explain_missing_modules()


class _Swap:
    """The swap itself, done once however many handles ask for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handles = 0
        self._swapped: list[tuple[types.ModuleType, str, Any, Any]] = []
        self._replacements: list[tuple[Any, Any]] = []
        self._seen: set[types.ModuleType] = set()

    @property
    def active(self) -> bool:
        return self._handles > 0

    def acquire(self) -> None:
        require_torch_ao("patch_torch_ao")
        with self._lock:
            if not self._handles:
                self._do()
            self._handles += 1

    def release(self) -> None:
        with self._lock:
            self._handles -= 1
            if not self._handles:
                self._undo()

    def _do(self) -> None:
        # Its modules derive values from ours if they are first imported under a patch.
        importlib.import_module("torch.ao.quantization.quantize_fx")
        self._replacements = [(theirs, ours) for _, ours, theirs in _twins()]
        new = {id(theirs): (theirs, ours) for theirs, ours in self._replacements}
        for module, name, value in _globals():
            self._seen.add(module)
            if id(value) in new:
                ours = new[id(value)][1]
                self._swapped.append((module, name, value, ours))
                setattr(module, name, ours)

    def _undo(self) -> None:
        for module, name, theirs, ours in self._swapped:
            # What somebody else has set meanwhile stays.
            if vars(module).get(name) is ours:
                setattr(module, name, theirs)
        # Modules imported while the patch was on took our names with them.
        old = {id(ours): theirs for theirs, ours in self._replacements}
        for module, name, value in _globals():
            if module not in self._seen and id(value) in old:
                setattr(module, name, old[id(value)])
        self._swapped.clear()
        self._replacements.clear()
        self._seen.clear()


def _globals() -> Iterator[tuple[types.ModuleType, str, Any]]:
    """Each global of each imported module of the patched packages."""
    for module_name, module in list(sys.modules.items()):
        if f"{module_name}.".startswith(tuple(f"{p}." for p in _PATCHED_PACKAGES)):
            for name, value in list(vars(module).items()):
                yield module, name, value


_swap = _Swap()


class Patch:
    """An active patch: `undo()` takes it back; as a context manager, leaving the block does."""

    def __init__(self) -> None:
        self._active = True
        _swap.acquire()

    @property
    def active(self) -> bool:
        """Whether this handle still holds the patch."""
        return self._active

    def undo(self) -> None:
        """Give torch.ao.quantization its names back, once the last active handle is undone."""
        if self._active:
            self._active = False
            _swap.release()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()


def patch_torch_ao() -> Patch:
    """Put fastquant's implementations into `torch.ao.quantization`, for code one cannot edit.

    Observers, fake-quantizers, qconfigs, defaults, mappings, fusing, prepare, convert and the
    rest of the eager interface are swapped by identity in every imported module of
    `torch.ao.quantization` and of its old alias `torch.quantization`. A module elsewhere that
    took a name before (`from torch.ao.quantization import prepare`) keeps torch's. Stubs and
    `utils` are not swapped; the TorchScript mode (`quantize_jit`) needs torch's own observers
    and does not work under a patch.

    Patches nest: names come back when the last handle is undone.

    Raises:
        ImportError: this torch has no torch.ao.quantization.

    Returns:
        A handle with `undo()`, also a context manager:

            with fastquant.patch_torch_ao():
                model = torchvision.models.quantization.resnet18(quantize=True)
    """
    return Patch()


def require_torch_ao(function: str) -> None:
    """Raise unless this torch has torch.ao.quantization, which the function is about."""
    if _namespace("") is None:
        raise ImportError(
            f"{function}: torch {torch.__version__} has no torch.ao.quantization; import fastquant "
            "in its place"
        )


def original() -> types.ModuleType:
    """torch.ao.quantization itself, to measure and compare with.

    Raises:
        RuntimeError: a patch is on, and its names are ours.
        ImportError: this torch has no torch.ao.quantization.
    """
    require_torch_ao("comparing with torch.ao")
    if _swap.active:
        raise RuntimeError(
            "torch.ao.quantization is patched with fastquant's implementations, so there is "
            "nothing to compare with: undo fastquant.patch_torch_ao() first"
        )
    return ao.namespace()
