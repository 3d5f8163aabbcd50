"""Carries out a plan: makes each replacement and puts it in its place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .._core.dtypes import torch_quantized_dtype
from .._core.errors import ConversionError
from .._torch import ao
from .._torch.hooks import copy_forward_hooks, copy_forward_pre_hooks
from ..nn.quantized import FloatLayer
from ..nn.quantized.observed import NoNativeFormError
from ..observer import _is_activation_post_process
from ..quantization_mappings import DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS
from ..utils import QuantizationError, get_qparam_dict
from . import checks, quick
from .plan import Entry, How, Plan

_DYNAMIC = set(DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS.values())


def swap(plan: Plan, use_precomputed_fake_quant: bool = False) -> None:
    """Swap the modules of the plan's model, in place; one in several places stays one module.

    Raises:
        QuantizationError: a module cannot be swapped. It is named, the cause is chained, and a
            RuntimeError it is as well.
    """
    made: dict[int, nn.Module] = {}
    by_path: dict[str, Any] = {}
    left: dict[str, str] = {}
    with ao.quiet():
        shortcuts = quick.is_trusted()
        for entry in plan.swaps():
            key = id(entry.module)
            if key not in made:
                made[key] = by_path[entry.path] = replacement(
                    plan.function, entry, use_precomputed_fake_quant, shortcuts
                )
                if entry.target in _DYNAMIC and isinstance(made[key], FloatLayer):
                    left[entry.path] = by_path.pop(entry.path).reason
                    made[key] = entry.module  # its input is floating as it is
            if made[key] is not entry.module:
                assert entry.owner is not None
                entry.owner._modules[entry.name] = made[key]
        call_parts_of_encoders(plan.model)
        checks.warn_of_wrong_kernels(plan.function, by_path)
        checks.warn_of_float_layers(plan.function, by_path)
        checks.warn_of_layers_left(plan.function, left)


def call_parts_of_encoders(model: nn.Module) -> None:
    """Have torch.nn's encoders call their parts, and not give all weights to one op.

    They decide by the layers' weights, of which quantized modules have no tensors but methods. A
    padding mask makes them pass nested tensors to their layers, which only that op takes.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            callable(getattr(part, "weight", None))
            or hasattr(part, "activation_post_process")
            or hasattr(part, "weight_fake_quant")
            for part in encoder.modules()
        ):
            if isinstance(encoder, nn.TransformerEncoder):
                encoder.use_nested_tensor = False
            else:
                encoder.activation_relu_or_gelu = 0  # it is asked for by that op alone


def swap_in_copy(plan: Plan, use_precomputed_fake_quant: bool, remove_qconfig: bool) -> Any:
    """A copy of the plan's model, swapped; the model stays as it is.

    Args:
        plan: for the model.
        use_precomputed_fake_quant: as for `convert`.
        remove_qconfig: whether configs will be removed from the copy, which then has none of its
            own.
    """
    with ao.quiet():
        copied, finish = quick.copy_to_convert(plan, remove_qconfig)
    swap(plan.for_copy(copied), use_precomputed_fake_quant)
    finish()
    return copied


def replacement(
    function: str, entry: Entry, use_precomputed_fake_quant: bool, shortcuts: bool
) -> nn.Module:
    """What takes the place of the entry's module: on its device, with the user's hooks.

    Args:
        function: what the user called, for the error.
        entry: the module and what it becomes.
        use_precomputed_fake_quant: as for `convert`.
        shortcuts: whether `quick` may make it.

    Raises:
        QuantizationError: as for `swap`.
    """
    try:
        return _make(entry, use_precomputed_fake_quant, shortcuts)
    except Exception as error:
        target = entry.target
        name = f"{target.__module__}.{target.__qualname__}" if inspect.isclass(target) else target
        raise ConversionError(
            f"{function}: cannot convert {entry.path}: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. It is of class {type(entry.module).__name__}, and was to "
            f"become {name}; with qconfig = None it stays as it is"
        ) from error


def _make(entry: Entry, use_precomputed_fake_quant: bool, shortcuts: bool) -> nn.Module:
    module, target = entry.module, entry.target
    device = None
    made: nn.Module
    if shortcuts and entry.how is How.FLOAT and quick.can_make(target, module):
        made = quick.make(target, module, use_precomputed_fake_quant)
    else:
        device = _device(module)
        try:
            made = _made_by_target(entry, use_precomputed_fake_quant)
        except NoNativeFormError as error:
            if target in _DYNAMIC:
                return FloatLayer(module, None, str(error))
            made = FloatLayer.of(module, str(error))
    # What is in a FloatLayer keeps its hooks, and they see floating tensors as before.
    if made is not module and not isinstance(made, FloatLayer):
        copy_forward_pre_hooks(module, made)
        copy_forward_hooks(module, made)
    return made if device is None else made.to(device)


def _made_by_target(entry: Entry, use_precomputed_fake_quant: bool) -> Any:
    module, target = entry.module, entry.target
    if not re.match(r"torch\..*\bquantized\b", str(getattr(target, "__module__", ""))):
        return _call_target(entry, use_precomputed_fake_quant)
    with _in_dtypes_of_torch(module):
        return _call_target(entry, use_precomputed_fake_quant)


@contextmanager
def _in_dtypes_of_torch(module: nn.Module) -> Iterator[None]:
    """Have a module's observers name torch.quint8 for torch.uint8, and so on.

    Both are the same to a config, but torch's own modules know only the first.
    """
    before: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for part in module.modules():
            dtype = getattr(part, "dtype", None)
            if _is_activation_post_process(part) and torch_quantized_dtype(dtype) != dtype:
                replace(part, "dtype", torch_quantized_dtype(dtype))
            qconfig: Any = getattr(part, "qconfig", None)
            if getattr(qconfig, "weight", None) is not None and hasattr(qconfig, "_replace"):
                factory = partial(_observer, qconfig.weight)
                replace(part, "qconfig", qconfig._replace(weight=factory))
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _observer(weight: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a config makes for a weight, in the dtype that torch's modules know."""
    observer = weight(*args, **kwargs)
    dtype = getattr(observer, "dtype", None)
    if torch_quantized_dtype(dtype) != dtype:
        observer.dtype = torch_quantized_dtype(dtype)
    return observer


def _call_target(entry: Entry, use_precomputed_fake_quant: bool) -> Any:
    module, target = entry.module, entry.target
    if entry.how is How.CUSTOM:
        return target.from_observed(module)
    if entry.how is How.REFERENCE:
        observer: Any = module.qconfig.weight()  # type: ignore[union-attr, operator]
        observer(module.weight)
        return target.from_float(module, get_qparam_dict(observer))
    if "use_precomputed_fake_quant" in inspect.signature(target.from_float).parameters:
        return target.from_float(module, use_precomputed_fake_quant=use_precomputed_fake_quant)
    return target.from_float(module)


def _device(module: nn.Module) -> torch.device | None:
    """The device of a module's tensors; None where it has none, `meta` left out."""
    tensors = (t for ts in (module.parameters(), module.buffers()) for t in ts)
    devices = {tensor.device for tensor in tensors if tensor.device.type != "meta"}
    if len(devices) > 1:
        raise QuantizationError(
            f"its tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    return next(iter(devices), None)
