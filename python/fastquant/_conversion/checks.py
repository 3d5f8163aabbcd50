"""What can be told to be wrong with a model before it is prepared or converted."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import type_before_parametrizations

from .._core.dtypes import QUINT8
from .._core.ranges import has_seen_nothing
from .._torch.ao import named, nnq
from .._torch.private import BatchNorm, Dropout
from ..fake_quantize import FakeQuantizeBase
from ..nn import quantized as native
from ..nn.intrinsic import _FusedModule
from ..observer import _is_activation_post_process
from ..quantization_mappings import (
    DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS,
    DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS,
    DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS,
    DEFAULT_QAT_MODULE_MAPPINGS,
    DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS,
    DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
    MADE_FROM_OBSERVER,
    get_default_qconfig_propagation_list,
)
from ..utils import (
    QuantizationError,
    has_no_children_ignoring_parametrizations,
    is_per_channel,
)
from .plan import Classes, Entry, How, Plan, has_qconfig


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Layer names for a message, the first few of them if there are many."""
    names = [name or "the model itself" for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def warn_user(message: str) -> None:
    """Warn at the line of the user's that called into the package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_PACKAGE = str(Path(__file__).parent.parent)


# --- before preparing -------------------------------------------------------------------------


def warn_of_training_mode(model: nn.Module) -> None:
    """Warn of what makes a model prepared for calibration come out wrong."""
    modules = dict(model.named_modules())
    observers = [m for m in modules.values() if _is_activation_post_process(m)]
    trains = any(isinstance(m, FakeQuantizeBase) for m in observers)
    calibrates = not trains and any(hasattr(m, "min_val") for m in observers)
    # Their output in training mode is not their output in eval mode.
    mode_dependent = (BatchNorm, Dropout)
    training = [name for name, m in modules.items() if isinstance(m, mode_dependent) and m.training]
    if calibrates and training:
        warn_user(
            "prepare: the model is in training mode, so calibration would update batch norms "
            f"and drop activations at random ({listed(training)}); call model.eval() first, "
            "or prepare_qat to train"
        )
    fused_for_qat = [
        name
        for name, m in modules.items()
        if has_qconfig(m)
        and isinstance(m, _FusedModule)
        and type(m) in DEFAULT_QAT_MODULE_MAPPINGS
        and type(m) not in DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    ]
    if fused_for_qat:
        warn_user(
            f"prepare: {listed(fused_for_qat)} were fused for training and convert leaves them "
            "floating; use prepare_qat, or fuse with fuse_modules in eval mode"
        )


def warn_of_transposed(model: nn.Module) -> None:
    """Warn of transposed convolutions whose config trains, and is then refused by convert."""
    names = []
    for path, module in model.named_modules():
        make = getattr(getattr(module, "qconfig", None), "weight", None)
        if isinstance(module, _FLOAT_TRANSPOSED) and make is not None:
            qscheme = getattr(make(), "qscheme", None)
            if qscheme is not None and is_per_channel(qscheme):
                names.append(path)
    if names:
        warn_user(
            f"prepare_qat: transposed convolutions are trained with weights in float, and convert "
            f"takes no per-channel config for them: {listed(names)}. Give them one with a single "
            "scale for the weight, such as fastquant.default_qat_qconfig, at the latest before "
            "convert"
        )


_FLOAT_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_initialized(function: str, model: nn.Module) -> None:
    """Raise QuantizationError for lazy layers that would stay unprepared when they are called."""
    configured = _configured(model)
    lazy = uninitialized(model, get_default_qconfig_propagation_list())
    paths = [path for path in lazy if _inherits(path, configured)]
    if paths:
        raise QuantizationError(
            f"{function}: the parameters of these layers have no size yet: {listed(paths)}. Lazy "
            "layers get it when they are called first: run the model once, then prepare it"
        )


def uninitialized(model: nn.Module, classes: Collection[Any]) -> list[str]:
    """The paths of lazy layers that were not called yet and will be of one of the classes."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, LazyModuleMixin)
        and module.cls_to_become in classes
        and module.has_uninitialized_params()  # type: ignore[misc]
    ]


def warn_of_unknown_names(model: nn.Module, names: Iterable[Any]) -> None:
    """Warn of names that are given a meaning, and are no submodule's."""
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    unknown = [repr(name) for name in names if isinstance(name, str) and name not in known]
    if unknown:
        warn_user(
            f"{type(model).__name__} has no submodules of these names, so what is said of them has "
            f"no effect: {listed(unknown)}. model.named_modules() lists the names that it has"
        )


# --- before swapping --------------------------------------------------------------------------


def check(plan: Plan) -> None:
    """Raise QuantizationError for modules that cannot be swapped, or not without wrong numbers."""
    _check_values(plan)
    _check_prepared(plan)
    refused = [
        f"{entry.path} ({reason})"
        for entry in plan.first_places()
        if entry.how is not How.SKIPPED and (reason := _wrong_when_quantized(entry)) is not None
    ]
    if refused:
        raise QuantizationError(
            f"{plan.function}: torch's quantized modules would give wrong numbers for "
            f"{listed(refused)}. Set qconfig = None on these modules to keep them floating"
        )


def _check_values(plan: Plan) -> None:
    """Raise if weights or ranges are to be read that have no values."""
    on_meta = [
        entry.path
        for entry in plan.first_places()
        if entry.how is not How.SKIPPED
        and entry.target in _READING_VALUES
        and any(x.is_meta for x in (*entry.module.parameters(), *entry.module.buffers()))
    ]
    if on_meta:
        raise QuantizationError(
            f"{plan.function}: the parameters or observers of these layers are on the meta device, "
            f"which keeps no values: {listed(on_meta)}. Accepted are other devices: use "
            "model.to_empty(device='cpu'), then load a state"
        )


def _check_prepared(plan: Plan) -> None:
    """Raise if modules that need an observer to be converted have a config and no observer."""
    model = plan.model
    # Where no module has an observer, prepare was never called and configs not handed down.
    prepared = any(map(has_observer, model.modules()))
    configured = {} if prepared else _configured(model)
    missing = [
        entry.path
        for entry in plan.first_places()
        if entry.how is not How.CUSTOM
        and entry.target in MADE_FROM_OBSERVER
        and not has_observer(entry.module)
        and (entry.how is not How.SKIPPED or _inherits(entry.path, configured))
    ]
    if missing:
        raise QuantizationError(
            f"{plan.function}: these modules have a qconfig but no observer: {listed(missing)}. "
            "Call prepare (or prepare_qat) and calibrate first; for dynamic quantization, which "
            "needs neither, use quantize_dynamic"
        )


_READING_VALUES = {
    target
    for mapping in (
        DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS,
        DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS,
        DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS,
        DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS,
        DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
    )
    for target in mapping.values()
}


def has_observer(module: nn.Module) -> bool:
    """Whether a module's output is observed, by whatever can choose qparams."""
    return hasattr(getattr(module, "activation_post_process", None), "calculate_qparams")


def _configured(model: nn.Module) -> dict[str, bool]:
    """For each path with a `qconfig` attribute, whether there is a config in it."""
    return {
        path: module.qconfig is not None
        for path, module in model.named_modules()
        if hasattr(module, "qconfig")
    }


def _inherits(path: str, configured: dict[str, bool]) -> bool:
    """Whether prepare would give a config to the module at `path`: the nearest one above counts."""
    while path and path not in configured:
        path = path.rpartition(".")[0]
    return configured.get(path, False)


def _wrong_when_quantized(entry: Entry) -> str | None:
    """Why the replacement would not compute what the module does; None where it would."""
    module: Any = entry.module
    if entry.target in named(nnq, "MultiheadAttention") and module.batch_first:
        return "batch_first=True mixes up heads and positions"
    if entry.target in _INSTANCE_NORMS and module.track_running_stats:
        return "track_running_stats=True has no effect"
    if entry.target not in _EMBEDDINGS:
        return None
    weight, is_bag = module.weight.detach(), entry.target in named(nnq, "EmbeddingBag")
    if is_bag and module.mode != "sum":
        return f"mode={module.mode!r} becomes a sum"
    if is_bag and module.padding_idx is not None and weight[module.padding_idx].any():
        return f"padding_idx={module.padding_idx} is added, and its row is not zero"
    if module.max_norm is not None:
        norms = torch.linalg.vector_norm(weight, module.norm_type, dim=1)
        # Rows that were looked up are as long as max_norm, up to rounding.
        if (norms > module.max_norm * 1.0001).any():
            return f"max_norm={module.max_norm} is not applied, and rows of the weight exceed it"
    return None


_EMBEDDINGS = named(nnq, "Embedding EmbeddingBag")
_INSTANCE_NORMS = named(nnq, "InstanceNorm1d InstanceNorm2d InstanceNorm3d")


def warn(plan: Plan) -> None:
    """Warn of what makes a statically quantized model come out wrong; once for each kind."""
    warn_of_root(plan)
    _warn_of_uncalibrated(plan)
    _warn_of_nonfinite(plan)
    _warn_of_float_input(plan)


def warn_of_root(plan: Plan) -> None:
    """Warn where the model itself would have to be swapped."""
    for entry in plan.entries:
        if entry.owner is None and has_qconfig(entry.module):
            warn_user(staying(plan.function, entry.module))


def staying(function: str, model: nn.Module) -> str:
    """The message that a model is itself what would have to be swapped."""
    return (
        f"{function} swaps submodules, so the {type(model).__name__} that it was given stays as it "
        "is; put it into a module that calls it, such as QuantWrapper or nn.Sequential"
    )


def warn_of_lazy(model: nn.Module, spec: Mapping[Any, Any], mapping: Classes) -> None:
    """Warn of lazy layers that a `qconfig_spec` would have quantized after their first call."""
    asked = {key for key in mapping if spec.get(key) is not None}
    if lazy := uninitialized(model, asked):
        warn_user(
            f"quantize_dynamic: the parameters of {listed(lazy)} have no size yet, so these layers "
            "stay as they are. Lazy layers get it when they are called first: run the model once "
            "before"
        )


def warn_of_idle_spec(plan: Plan, spec: Iterable[Any], mapping: Classes) -> None:
    """Warn of keys of a `qconfig_spec` that ask for layers that have no dynamic form."""
    asked = set(spec)
    idle: dict[str, None] = {}
    swapped = [f"{entry.path}." for entry in plan.swaps()]
    for path, module in plan.model.named_modules():
        kind = type_before_parametrizations(module)
        if path and path in asked and not any(place.startswith(f"{path}.") for place in swapped):
            idle[f"{path!r} ({kind.__name__})"] = None
        is_leaf = has_no_children_ignoring_parametrizations(module)
        if kind in asked and kind not in mapping and is_leaf:
            idle[kind.__name__] = None
    if idle:
        warn_user(
            f"quantize_dynamic: in qconfig_spec, {listed(idle)} has no effect: there is no "
            "dynamically quantized class for it in the mapping, so these layers stay as they are"
        )


def uncalibrated(plan: Plan, functionals: bool = False) -> list[str]:
    """The paths of modules that will get a scale from an observer that has seen no data.

    Args:
        plan: of the conversion.
        functionals: whether to list instances of FloatFunctional, too. One that only multiplies by
            scalars, as MultiheadAttention's, observes nothing.
    """
    paths = []
    for entry in plan.first_places():
        if entry.how is How.CUSTOM:
            # A module of the user's own, or torch's LSTM: its observers are inside.
            observed = entry.module.named_modules(prefix=entry.path)
        elif entry.how is How.FLOAT and entry.target in MADE_FROM_OBSERVER:
            observed = iter([(entry.path, entry.module)])
        else:
            continue
        paths += [
            path
            for path, module in observed
            if (functionals or not isinstance(module, native.FloatFunctional))
            and not _is_activation_post_process(module)  # a fake-quantizer, which has an observer
            and _is_uncalibrated(module)
        ]
    return paths


def _warn_of_uncalibrated(plan: Plan) -> None:
    names = uncalibrated(plan)
    if names:
        warn_user(
            f"{plan.function}: the observers of these layers have seen no data: {listed(names)}. "
            "They get scale 1 and zero point 0; run data through the prepared model first"
        )


def _is_uncalibrated(module: nn.Module) -> bool:
    """Whether a module's observer has seen nothing."""
    observer = getattr(module, "activation_post_process", None)
    if not _is_activation_post_process(observer):
        return False
    return has_seen_nothing(getattr(observer, "activation_post_process", observer))


def _warn_of_nonfinite(plan: Plan) -> None:
    counts = nonfinite_counts(plan.model)
    names = [f"{layer} ({count})" for layer, count in counts.items() if count]
    if names:
        warn_user(
            f"{plan.function}: the observers of these layers met NaN or infinite values, which "
            f"were left out of the statistics: {listed(names)}"
        )


def nonfinite_counts(model: nn.Module) -> dict[str, int]:
    """Layer name → non-finite values that its observers have left out so far."""
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        if "nonfinite_count" in module._buffers:
            parts = path.split(".")
            while parts and parts[-1] == "activation_post_process":
                parts.pop()
            layer = ".".join(parts) or "the model itself"
            counts[layer] = counts.get(layer, 0) + int(module.nonfinite_count)
    return counts


def _warn_of_float_input(plan: Plan) -> None:
    """Warn where modules that take quantized tensors come, and nothing that quantizes any.

    Nothing is said where a class that the mappings here do not know is swapped in: it may quantize.
    """
    targets = {e.path: e.target for e in plan.first_places() if e.how is not How.SKIPPED}
    takers = [path for path, target in targets.items() if target in MADE_FROM_OBSERVER]
    if (
        takers
        and set(targets.values()) <= _STATIC_TARGETS - set(_QUANTIZING)
        and not any(isinstance(module, _QUANTIZING) for module in plan.model.modules())
    ):
        warn_user(
            f"{plan.function}: the model has no QuantStub, and its quantized layers take only "
            f"quantized tensors: unless it is given such tensors, {takers[0]} will fail. Put a "
            "QuantStub where quantization begins and a DeQuantStub where it ends, or wrap the "
            "model in QuantWrapper"
        )


_QUANTIZING = (*named(nnq, "Quantize"), native.Quantize)
_STATIC_TARGETS = {
    *DEFAULT_STATIC_QUANT_MODULE_MAPPINGS.values(),
    *DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS.values(),
}


# --- after swapping ---------------------------------------------------------------------------

_TRANSPOSED: dict[type, Any] = {
    cls: function
    for name, function in (
        ("ConvTranspose1d", F.conv_transpose1d),
        ("ConvTranspose2d", F.conv_transpose2d),
        ("ConvTranspose3d", F.conv_transpose3d),
    )
    for cls in named(nnq, name)
}


def warn_of_wrong_kernels(function: str, made: Mapping[str, nn.Module]) -> None:
    """Warn of transposed convolutions that torch computes wrongly on this machine.

    Up to torch 2.13 at least, oneDNN's kernel, which the engine "x86" uses as well, gives wrong
    numbers where the numbers of input and output channels differ. So each is tried.

    Args:
        function: what the user called.
        made: the new modules by their path.
    """
    with torch.no_grad():
        wrong = [path for path, module in made.items() if _computes_something_else(module)]
    if wrong:
        warn_user(
            f"{function}: torch's quantized transposed convolution gives wrong numbers with "
            f"torch.backends.quantized.engine = {torch.backends.quantized.engine!r} for "
            f"{listed(wrong)}. Choose another engine, such as 'fbgemm', before the model is "
            "converted, and before it is loaded; or keep these layers floating by qconfig = None"
        )


def warn_of_float_layers(function: str, made: Mapping[str, nn.Module]) -> None:
    """Warn of layers that were to be quantized and have no native form.

    Args:
        function: what the user called.
        made: the new modules by their path.
    """
    kept = [
        f"{path} ({module.reason})"
        for path, module in made.items()
        if isinstance(module, native.FloatLayer)
    ]
    if kept:
        warn_user(
            f"{function}: these layers have no native quantized form and stay floating, between "
            f"dequantize and quantize: {listed(kept)}. Set qconfig = None on them, and stubs "
            "around them, to say so yourself"
        )


def warn_of_layers_left(function: str, reasons: Mapping[str, str]) -> None:
    """Warn of layers that were to be quantized, have no native form, and take floating inputs.

    Args:
        function: what the user called.
        reasons: why, by path.
    """
    if reasons:
        left = [f"{path} ({reason})" for path, reason in reasons.items()]
        warn_user(
            f"{function}: these layers have no native form and stay as they are: "
            f"{listed(left)}. Set qconfig = None on them to say so yourself"
        )


def _computes_something_else(module: Any) -> bool:
    """Whether a quantized transposed convolution's output is not that of its weight."""
    if type(module) not in _TRANSPOSED:
        return False
    sizes = (
        3 + 2 * padding // stride
        for padding, stride in zip(module.padding, module.stride, strict=True)
    )
    shape = (1, module.in_channels, *sizes)
    # Integers of 7 bits, which do not overflow in any kernel.
    values = torch.arange(math.prod(shape)).remainder(127).reshape(shape).float() - 40
    x = torch.quantize_per_tensor(values, 1.0, 40, QUINT8)
    scale, zero_point = module.scale, module.zero_point
    try:
        expected = _TRANSPOSED[type(module)](
            *(values, module.weight().dequantize(), module.bias(), module.stride, module.padding),
            *(module.output_padding, module.groups, module.dilation),
        )
        low, high = min(expected.min().item(), 0), max(expected.max().item(), 0)
        module.scale = (high - low) / 255 or 1.0
        module.zero_point = round(-low / module.scale)
        # Without its hooks, which are the user's.
        error = (module.forward(x).dequantize() - expected).abs().max().item()
    except RuntimeError:
        return False  # a call will say what is wrong
    finally:
        module.scale, module.zero_point = scale, zero_point
    # A right one is out by one step of the scale at most.
    return bool(error > (high - low) / 10)
