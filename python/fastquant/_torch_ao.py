"""The one module that imports `torch.ao`: everything the package shares with it.

Four things are shared: the quantized modules that `convert` swaps in, the hook functions that
feed observers (one object on both sides, so either side's convert removes them), markers that
FX graph mode recognises by class, and, through `patch_torch_ao`, the namespaces themselves.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.qat as nnqat
import torch.ao.nn.qat.dynamic as nnqatd
import torch.ao.nn.quantizable as nnquantizable
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.nn.quantized.reference as nnqr
import torch.ao.nn.sparse.quantized as nnsq
import torch.ao.nn.sparse.quantized.dynamic as nnsqd
from torch import nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule as FusedModule
from torch.ao.nn.intrinsic.qat.modules.conv_fused import _ConvBnNd as conv_bn_base
from torch.ao.nn.quantized.modules.utils import _quantize_weight as quantize_weight
from torch.ao.quantization import observer as _observer
from torch.ao.quantization import quantization_mappings as _mappings
from torch.ao.quantization.observer import (
    AffineQuantizedObserverBase,
    Granularity,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    TorchAODType,
    ZeroPointDomain,
    get_block_size,
)
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.ao.quantization.quantize import (
    _observer_forward_hook as observer_forward_hook,
)
from torch.ao.quantization.quantize import (
    _observer_forward_pre_hook as observer_forward_pre_hook,
)
from torch.ao.quantization.stubs import DeQuantStub, QuantStub, QuantWrapper
from torch.ao.quantization.utils import MatchAllNode, NodePattern, Pattern

__all__ = [
    "AffineQuantizedObserverBase",
    "DeQuantStub",
    "FusedModule",
    "Granularity",
    "MappingType",
    "MatchAllNode",
    "NodePattern",
    "Patch",
    "Pattern",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlaceholderObserver",
    "QConfigMapping",
    "QuantStub",
    "QuantWrapper",
    "TorchAODType",
    "ZeroPointDomain",
    "adopt",
    "conv_bn_base",
    "get_block_size",
    "nni",
    "nniq",
    "nniqat",
    "nniqd",
    "nnq",
    "nnqat",
    "nnqatd",
    "nnqd",
    "nnqr",
    "nnquantizable",
    "nnsq",
    "nnsqd",
    "observer_forward_hook",
    "observer_forward_pre_hook",
    "original",
    "patch_torch_ao",
    "quantize_weight",
    "quiet",
    "scriptable",
]

PlaceholderObserver = _observer.PlaceholderObserver

# --- warnings -------------------------------------------------------------------------------

_REPEATED_WARNINGS = (
    # Calls of torch.ao.quantization from inside torch.ao.nn (LSTM, MultiheadAttention).
    ("torch.ao.quantization is deprecated", DeprecationWarning),
    # Every quantized tensor that a swapped-in module creates.
    ("torch.quantize_per_tensor, torch.quantize_per_channel and other", UserWarning),
    # Every construction of a torch.ao observer that a user's QConfig holds.
    ("Please use quant_min and quant_max to specify the range", UserWarning),
    # Per layer; convert names the layers itself, once.
    ("must run observer before calling calculate_qparams", UserWarning),
    # fastquant's own, from a convert inside a convert under `patch_torch_ao`.
    ("convert: the observers of these layers have seen no data", UserWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from users the warnings that torch repeats for work they did not ask torch to do."""
    with warnings.catch_warnings():
        for message, category in _REPEATED_WARNINGS:
            warnings.filterwarnings("ignore", re.escape(message), category)
        yield


# --- counterparts -----------------------------------------------------------------------------

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


def _module(package: str, name: str) -> types.ModuleType:
    return importlib.import_module(f"{package}.{name}" if name else package)


def _twins() -> Iterator[tuple[str, Any, Any]]:
    """(name, fastquant's object, torch.ao's) for each name that both define, each its own."""
    for ours_name, theirs_names in _TWINS.items():
        ours_module = _module("fastquant", ours_name)
        for theirs_module in (_module("torch.ao.quantization", name) for name in theirs_names):
            for name, ours in vars(ours_module).items():
                theirs = vars(theirs_module).get(name)
                if (
                    not name.startswith("__")
                    and ours is not theirs
                    and _is_implementation(ours)
                    and _is_implementation(theirs)
                ):
                    yield name, ours, theirs


def _is_implementation(value: Any) -> bool:
    """Whether a module's global is code or configuration of fastquant's or torch.ao's own."""
    if isinstance(value, (type, types.FunctionType)):
        return (
            value.__module__.startswith(("fastquant", "torch.ao.quantization"))
            and value.__module__ not in _SHARED_MODULES
        )
    return isinstance(value, (dict, set)) or type(value).__name__ in ("QConfig", "_PartialWrapper")


# A class of ours by the torch.ao class that it stands in for.
_COUNTERPART: dict[type, type] = {}


def _subclasshook(cls: type, candidate: type) -> bool | types.NotImplementedType:
    for base in candidate.__mro__:
        ours = _COUNTERPART.get(base)
        if ours is not None and cls in ours.__mro__:
            return True
    return NotImplemented  # type: ignore[no-any-return]


def adopt(bases: Iterable[type], stubs: dict[Callable[..., Any], Any]) -> None:
    """Make torch.ao and fastquant take each other's observers, fake-quantizes and stubs.

    Args:
        bases: fastquant's abstract bases. Each class of fastquant below them becomes a virtual
            subclass of torch.ao's class of the same name, and that one of ours.
        stubs: quantized module by fastquant stub, for torch.ao's own convert.
    """
    bases = tuple(bases)
    for base in bases:
        base.__subclasshook__ = classmethod(_subclasshook)  # type: ignore[assignment,method-assign]
    for _, ours, theirs in list(_twins()):
        if isinstance(ours, type) and issubclass(ours, bases):
            theirs.register(ours)
            _COUNTERPART[theirs] = ours
    _mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS.update(stubs)
    _mappings.DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS.update(stubs)


IN_PREPARED_MODEL = "_is_in_prepared_model"


def scriptable(module: nn.Module, cls: type | None = None) -> nn.Module:
    """torch.ao's module with the same state, which is what TorchScript compiles.

    Its tensors are the same, so what either observes the other has seen.

    Args:
        module: an observer or fake-quantizer of fastquant's.
        cls: fastquant's class to take the counterpart of; the module's own.

    Raises:
        NotImplementedError: the module's class is a user's.
        RuntimeError: the module is in a prepared model. To let torch find that hooks cannot be
            scripted would be too late: by then it has put what this returns into the model.
    """
    if IN_PREPARED_MODEL in vars(module):
        raise RuntimeError(
            "prepared models cannot be scripted, for the hooks they have: use torch.jit.trace, or "
            "script the model that convert returns"
        )
    counterparts = {ours: theirs for theirs, ours in _COUNTERPART.items()}
    theirs = counterparts.get(cls or type(module))
    if theirs is None or type(module) not in counterparts:
        raise NotImplementedError(
            f"{type(module).__name__} cannot be scripted: use torch.jit.trace, or script the "
            "model that convert returns"
        )
    twin: nn.Module = object.__new__(theirs)
    for name, value in vars(module).items():
        twin.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    # State of ours that torch.ao does not know.
    for name in twin._non_persistent_buffers_set:
        del twin._buffers[name]
    twin._non_persistent_buffers_set.clear()
    return twin


# --- patching -----------------------------------------------------------------------------------


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

    Observers, fake-quantizes, qconfigs, defaults, mappings, fusing, prepare, convert and the
    rest of the eager interface are swapped by identity in every imported module of
    `torch.ao.quantization` and of its old alias `torch.quantization`. A module elsewhere that
    took a name before (`from torch.ao.quantization import prepare`) keeps torch's. Stubs and
    `utils` are not swapped; the TorchScript mode (`quantize_jit`) needs torch's own observers
    and does not work under a patch.

    Patches nest: names come back when the last handle is undone.

    Returns:
        A handle with `undo()`, also a context manager:

            with fastquant.patch_torch_ao():
                model = torchvision.models.quantization.resnet18(quantize=True)
    """
    return Patch()


def original() -> types.ModuleType:
    """torch.ao.quantization itself, to measure and compare with.

    Raises:
        RuntimeError: a patch is on, and its names are ours.
    """
    if _swap.active:
        raise RuntimeError(
            "torch.ao.quantization is patched with fastquant's implementations, so there is "
            "nothing to compare with: undo fastquant.patch_torch_ao() first"
        )
    return _module("torch.ao.quantization", "")
