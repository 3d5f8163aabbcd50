"""What can be told to be wrong with a model before work on it begins.

Functions named `warn_…` are called by those that users call, and point their warnings there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._core.ranges import has_seen_nothing
from .._torch import ao
from .._torch.ao import nnq
from .._torch.private import BatchNorm, Dropout
from ..fake_quantize import FakeQuantizeBase
from ..observer import _is_activation_post_process
from ..quantization_mappings import (
    DEFAULT_QAT_MODULE_MAPPINGS,
    DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
    MADE_FROM_OBSERVER,
)
from ..utils import QuantizationError

Classes: TypeAlias = Mapping[Any, Any]
"""A class to swap in, by the class that it stands for."""


def has_qconfig(module: nn.Module) -> bool:
    """Whether the module is to be quantized."""
    return getattr(module, "qconfig", None) is not None


def is_swapped_whole(module: nn.Module, custom: Classes) -> bool:
    """Whether a module is swapped without its submodules being swapped first."""
    kind = type_before_parametrizations(module)
    return issubclass(kind, ao.FusedModule) or kind in custom


def _listing(names: Iterable[str], limit: int = 10) -> str:
    """Names for a message, the first few of them if there are many."""
    names = [name or "the model itself" for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def warn_of_training_mode(model: nn.Module) -> None:
    """Warn of what makes a model prepared for calibration come out wrong."""
    modules = dict(model.named_modules())
    observers = [m for m in modules.values() if _is_activation_post_process(m)]
    trains = any(isinstance(m, FakeQuantizeBase) for m in observers)
    calibrates = not trains and any(hasattr(m, "min_val") for m in observers)
    moody = (BatchNorm, Dropout)
    training = [name for name, m in modules.items() if isinstance(m, moody) and m.training]
    if calibrates and training:
        warnings.warn(
            "prepare: the model is in training mode, so calibration would update batch norms "
            f"and drop activations at random ({_listing(training)}); call model.eval() first, "
            "or prepare_qat to train",
            stacklevel=3,
        )
    fused_for_qat = [
        name
        for name, m in modules.items()
        if has_qconfig(m)
        and isinstance(m, ao.FusedModule)
        and type(m) in DEFAULT_QAT_MODULE_MAPPINGS
        and type(m) not in DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    ]
    if fused_for_qat:
        warnings.warn(
            f"prepare: {_listing(fused_for_qat)} were fused for training and convert leaves them "
            "floating; use prepare_qat, or fuse with fuse_modules in eval mode",
            stacklevel=3,
        )


def _to_be_swapped(
    module: nn.Module, mapping: Classes, custom: Classes, path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """(path, submodule) for each that `convert` looks up, whether it has a config or not."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if not is_swapped_whole(child, custom):
            yield from _to_be_swapped(child, mapping, custom, child_path)
        kind = type_before_parametrizations(child)
        if kind in custom or kind in mapping:
            yield child_path, child


def check_prepared(model: nn.Module, mapping: Classes, custom: Classes) -> None:
    """Raise if modules that need an observer to be converted have a config and no observer."""
    configured = [path for path, module in model.named_modules() if has_qconfig(module)]
    # No observer anywhere: prepare was never called, so nobody has handed configs down yet.
    handed_down = any(_is_activation_post_process(module) for module in model.modules())
    missing = [
        path
        for path, module in _to_be_swapped(model, mapping, custom)
        if mapping.get(type_before_parametrizations(module)) in MADE_FROM_OBSERVER
        and not hasattr(getattr(module, "activation_post_process", None), "calculate_qparams")
        and (
            has_qconfig(module)
            or (not handed_down and any(not c or path.startswith(f"{c}.") for c in configured))
        )
    ]
    if missing:
        raise QuantizationError(
            f"convert: these modules have a qconfig but no observer: {_listing(missing)}. Call "
            "prepare (or prepare_qat) and calibrate first; for dynamic quantization, which "
            "needs neither, use quantize_dynamic"
        )


def warn_of_root(model: nn.Module, mapping: Classes, function: str) -> None:
    if type_before_parametrizations(model) in mapping and has_qconfig(model):
        warnings.warn(
            f"{function} swaps submodules, so the {type(model).__name__} that it was given stays "
            "as it is; wrap it, e.g. in QuantWrapper or nn.Sequential",
            stacklevel=3,
        )


def warn_of_uncalibrated(model: nn.Module, mapping: Classes, custom: Classes) -> None:
    """Warn once of all layers whose observer has seen nothing."""
    names = []
    for path, module in _to_be_swapped(model, mapping, custom):
        if not has_qconfig(module):
            continue
        if type_before_parametrizations(module) in custom:
            # A module of the user's own, or torch's LSTM: its observers are inside.
            observed = module.named_modules(prefix=path)
        elif mapping[type_before_parametrizations(module)] in MADE_FROM_OBSERVER:
            observed = iter([(path, module)])
        else:
            continue
        names += [
            name
            for name, m in observed
            # One that only multiplies by scalars, as MultiheadAttention's, observes nothing.
            if not isinstance(m, nnq.FloatFunctional) and _is_uncalibrated(m)
        ]
    if names:
        warnings.warn(
            f"convert: the observers of these layers have seen no data: {_listing(names)}. They "
            "get scale 1 and zero point 0; run data through the prepared model first",
            stacklevel=3,
        )


def _is_uncalibrated(module: nn.Module) -> bool:
    """Whether a module's observer holds an empty range."""
    observer = getattr(module, "activation_post_process", None)
    if not _is_activation_post_process(observer):
        return False
    return has_seen_nothing(getattr(observer, "activation_post_process", observer))


def nonfinite_counts(model: nn.Module) -> dict[str, int]:
    """Layer name → non-finite values that its observers have left out so far."""
    counts: dict[str, int] = {}
    for name, buffer in model.named_buffers():
        *path, leaf = name.split(".")
        if leaf == "nonfinite_count":
            while path and path[-1] == "activation_post_process":
                path.pop()
            layer = ".".join(path) or "the model itself"
            counts[layer] = counts.get(layer, 0) + int(buffer)
    return counts


def warn_of_nonfinite(model: nn.Module) -> None:
    """Warn once of all layers whose observers have left out NaN or infinities."""
    names = [f"{layer} ({count})" for layer, count in nonfinite_counts(model).items() if count]
    if names:
        warnings.warn(
            "convert: the observers of these layers met NaN or infinite values, which were left "
            f"out of the statistics: {_listing(names)}",
            stacklevel=3,
        )
