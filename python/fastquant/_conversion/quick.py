"""A short cut through a conversion: nothing is copied that is only read, weights are packed once.

`convert` deep-copies a model, and torch's `from_float` makes a quantized module with a weight of
its own, packs that, observes and quantizes the real one, and packs that too. For the layers that
models have most, the same modules are made here at a fraction of the time.

All of it leans on how torch builds `nn.Module` and its quantized modules. `is_trusted` checks
that torch is built so; where it is not, models are deep-copied and `target.from_float` is called.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .._core.dtypes import INT8, QINT8, is_torch_quantized
from .._torch.ao import named, nniq, nniqd, nnq, nnqd
from .._torch.hooks import has_hooks_of_its_own
from .._torch.private import AttentionLinear, without_derivatives
from ..nn import intrinsic as nni
from ..nn import qat as nnqat
from ..nn.intrinsic import qat as nniqat
from ..nn.quantized.observed import folded, layer_of, weight_observer
from ..quantization_mappings import (
    DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS,
    DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS,
)
from .plan import Entry, How, Plan
from .weights import quantize_weight

# What becomes what: float modules first, then the training ones.
_SOURCES: dict[type, tuple[type, ...]] = {
    target: sources
    for package, name, sources in (
        (nnq, "Conv1d", (nn.Conv1d, nniqat.ConvBn1d)),
        (nnq, "Conv2d", (nn.Conv2d, nniqat.ConvBn2d, nnqat.Conv2d)),
        (nnq, "Conv3d", (nn.Conv3d, nniqat.ConvBn3d, nnqat.Conv3d)),
        (nnq, "Linear", (nn.Linear, AttentionLinear, nniqat.LinearBn1d, nnqat.Linear)),
        (nniq, "ConvReLU1d", (nni.ConvReLU1d, nniqat.ConvBnReLU1d)),
        (nniq, "ConvReLU2d", (nni.ConvReLU2d, nniqat.ConvBnReLU2d, nniqat.ConvReLU2d)),
        (nniq, "ConvReLU3d", (nni.ConvReLU3d, nniqat.ConvBnReLU3d, nniqat.ConvReLU3d)),
        (nniq, "LinearReLU", (nni.LinearReLU, nniqat.LinearReLU)),
        (nnqd, "Linear", (nn.Linear, AttentionLinear)),
        (nniqd, "LinearReLU", (nni.LinearReLU,)),
    )
    for target in named(package, name)
}
_DYNAMIC = named(nnqd, "Linear")
_LINEAR = (*named(nnq, "Linear"), *_DYNAMIC)
_TRAINED = {
    source
    for source in itertools.chain(*_SOURCES.values())
    if source in vars(nnqat).values() or source in vars(nniqat).values()
}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, AttentionLinear)
# Modules that keep a scale and a zero point; made by from_float, which reads an observer.
_SCALED = named(nnq, "Quantize QFunctional")
# What modules of this package are made of, they copy.
_NATIVE = {
    *DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS.values(),
    *DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS.values(),
}


# --- whether torch is as this module knows it ---------------------------------------------------


def is_trusted() -> bool:
    """Whether torch builds its modules as known here, and nobody has replaced their methods."""
    return _is_built_as_known() and _methods() == _KNOWN_METHODS


_CLASSES = {cls for target in (*_SOURCES, *_SCALED) for cls in target.__mro__[:-1]}
_MAKING = ("__init__", "__setstate__", "_init", "from_float", "get_qconv", "set_weight_bias")


def _methods() -> list[Any]:
    """What decides how quantized modules are made, wherever it is defined."""
    return [vars(cls).get(name) for cls in _CLASSES for name in _MAKING]


_KNOWN_METHODS = _methods()


@functools.cache
def _is_built_as_known() -> bool:
    """Whether modules made here have the attributes of those that torch's constructors make.

    And whether torch's methods were its own when this module was imported.
    """

    def attributes(module: nn.Module) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, dict) else (type(value), str(value))
            for name, value in vars(module).items()
        }

    for method in _KNOWN_METHODS:
        if not getattr(method, "__module__", "torch.").startswith("torch."):
            return False
    target: Any
    for target in _SOURCES:

        class Unpacked(target):  # type: ignore[misc]
            """Packing takes 20 ms where it has not been used in the process."""

            def set_weight_bias(self, weight: Tensor, bias: Tensor | None) -> None:
                pass

        try:
            weight = torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, QINT8)
            theirs: Any = Unpacked(1, 1) if issubclass(target, _LINEAR) else Unpacked(1, 1, 1)
            ours = _quantized_layer(Unpacked, theirs, weight, None)
        except Exception:
            return False
        if attributes(ours) != attributes(theirs):
            return False
    return True


# --- making quantized modules -------------------------------------------------------------------


def can_make(target: Any, module: nn.Module) -> bool:
    """Whether `make` gives what `target.from_float` would."""
    if not _is_known(target, module):
        return False
    layer = layer_of(module)
    if issubclass(target, _DYNAMIC):
        # torch has a default where there is no observer for the weight.
        observes = getattr(layer.qconfig, "weight", None) is not None
    else:
        observer = module._modules.get("activation_post_process")
        observes = getattr(observer, "dtype", torch.float) != torch.float
    return (
        observes
        and (isinstance(layer, nn.Linear) or _has_usual_geometry(layer))
        and _is_on_cpu(module)
    )


def _is_known(target: Any, module: nn.Module) -> bool:
    """Whether `module` is a layer as float models or training have it, and becomes a `target`."""
    if not isinstance(target, type) or type(module) not in _SOURCES.get(target, ()):
        return False
    if type(module) in _TRAINED:
        return "weight_fake_quant" in module._modules
    layer = layer_of(module)
    # A fused one may be parametrized; and AdaRound gives float layers a fake-quantizer.
    return type(layer) in _LAYERS and not any(
        hasattr(part, "weight_fake_quant") for part in (module, layer)
    )


def _has_usual_geometry(conv: Any) -> bool:
    """Whether a constructor would take a convolution's settings as they are."""
    dims = conv.weight.dim() - 2
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return conv.padding_mode in ("zeros", "reflect") and all(
        type(size) is tuple and len(size) == dims for size in sizes
    )


def _is_on_cpu(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(tensor is None or tensor.is_cpu for tensor in tensors) and all(
        child is None or _is_on_cpu(child) for child in module._modules.values()
    )


def make(target: Any, module: Any, use_precomputed_fake_quant: bool = False) -> nn.Module:
    """The quantized module that `target.from_float(module)` would make."""
    layer = layer_of(module)
    weight, bias = folded(module)
    observer = weight_observer(module, weight, use_precomputed_fake_quant)
    is_dynamic = issubclass(target, _DYNAMIC)
    if is_dynamic and observer.dtype == torch.float16:
        weight = weight.float()
    elif observer.dtype in INT8:
        weight = quantize_weight(weight.float(), observer)
    else:
        raise AssertionError(
            f"the observer of the weight must be for int8 (torch.qint8), and is for "
            f"{observer.dtype}"
        )
    made = _quantized_layer(target, layer, weight, bias)
    if not is_dynamic:
        scale, zero_point = module.activation_post_process.calculate_qparams()
        made.scale, made.zero_point = float(scale), int(zero_point)
    return made  # type: ignore[no-any-return]


def _quantized_layer(target: Any, layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A `target` with this weight, and otherwise with the settings of `layer`."""
    made: Any
    if issubclass(target, _LINEAR):
        # The constructor packs a weight of this size, which is soon packed.
        made = target(1, 1, dtype=QINT8 if is_torch_quantized(weight) else torch.float16)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        with without_derivatives():
            made.set_weight_bias(weight, bias)
        return made
    # As a copy or a pickle of one is made. Packing reads each channel's scale and zero point by an
    # op of its own, and autograd takes a large part of their time.
    made = target.__new__(target)
    nn.Module.__init__(made)
    with without_derivatives():
        made.__setstate__(
            (
                *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
                *(layer.padding, layer.dilation),
                # Not transposed, and without output padding.
                *(False, (0,) * len(layer.kernel_size)),
                *(layer.groups, layer.padding_mode, weight, bias),
                # Scale, zero point, training.
                *(1.0, 0, True),
            )
        )
    return made


# --- copying ------------------------------------------------------------------------------------


def copy_to_convert(plan: Plan, remove_qconfig: bool) -> tuple[Any, Callable[[], None]]:
    """A deep copy of the plan's model, but for what is only read of modules that are swapped.

    Those are shells: their weights and observers are the original's. Nor does the copy have
    configs of its own where `remove_qconfig` says that they will be removed.

    Returns:
        The copy, and what to call when it has been converted: shells that something other than
        the model still refers to get parts of their own.
    """
    if not is_trusted():
        return copy.deepcopy(plan.model), lambda: None
    memo: dict[int, Any] = {}
    if remove_qconfig:
        configs = (vars(module).get("qconfig") for module in plan.model.modules())
        memo.update((id(config), config) for config in configs)
    shells = {id(e.module): _shell(e.module, memo) for e in plan.first_places() if _is_only_read(e)}
    copied = _copy(plan.model, memo)
    remaining = weakref.WeakSet(shells.values())
    for key in shells:
        del memo[key]
    shells.clear()

    def finish() -> None:
        memo.update((id(shell), shell) for shell in remaining)
        for shell in list(remaining):
            vars(shell).update(copy.deepcopy(vars(shell), memo))

    return copied, finish


def _is_only_read(entry: Entry) -> bool:
    """Whether what the entry's module becomes keeps nothing of it."""
    module, target = entry.module, entry.target
    return (
        entry.how is How.FLOAT
        and (_is_known(target, module) or target in _SCALED or target in _NATIVE)
        # What has other modules in it may have some that are swapped first.
        and module._modules.keys() <= {"activation_post_process", *_parts(module)}
        and not has_hooks_of_its_own(module)
    )


def _parts(module: nn.Module) -> tuple[str, ...]:
    """The children that torch gives to a module, its observer aside."""
    if isinstance(module, nniqat.FOLDING):
        return ("weight_fake_quant", "bn")
    if type(module) in _TRAINED:
        return ("weight_fake_quant",)
    return ("0", "1") if isinstance(module, nni._FusedModule) else ()


def _shell(module: Any, memo: dict[int, Any]) -> Any:
    """A module of the same class whose attributes are the original's, where they are only read."""
    shell = memo[id(module)] = _shallow_copy(module)
    children = shell._modules
    if "0" in children:
        children["0"] = _shell(children["0"], memo)
    if "weight_fake_quant" in children:
        # It observes the weight once more, and a moving average moves.
        children["weight_fake_quant"] = _copy_observer(children["weight_fake_quant"], memo)
    observer = children.get("activation_post_process")
    if observer is not None and not _is_plain_observer(observer):
        children["activation_post_process"] = _copy(observer, memo)
    # Packed weights keep their bias.
    if (bias := module._parameters.get("bias")) is not None:
        shell._parameters["bias"] = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return shell


def _shallow_copy(module: Any) -> Any:
    """Another module with the same attributes, whose own dicts and sets can change."""
    cls: Any = type(module)
    copied = cls.__new__(cls)
    vars(copied).update(
        (name, value.copy() if isinstance(value, dict | set) else value)
        for name, value in vars(module).items()
    )
    return copied


def _copy_observer(observer: Any, memo: dict[int, Any]) -> Any:
    """A copy that can observe: of a plain one, its buffers alone."""
    if id(observer) in memo:
        return memo[id(observer)]
    if not _is_plain_observer(observer):
        return _copy(observer, memo)
    copied = memo[id(observer)] = _shallow_copy(observer)
    for name, buffer in observer._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.detach().clone()
    for name, child in observer._modules.items():
        copied._modules[name] = _copy_observer(child, memo)
    return copied


_IMMUTABLE = frozenset((bool, int, float, str, type(None), torch.dtype, torch.qscheme))
_PLAIN = _IMMUTABLE | {dict, OrderedDict, set, FunctionType}


def _is_plain_observer(observer: Any) -> bool:
    """Whether an observer or fake-quantizer is a library's own, in class and in attributes."""
    return (
        type(observer).__module__.startswith(("fastquant.", "torch.ao.quantization."))
        and not observer._parameters
        and not observer._forward_hooks
        and not observer._forward_pre_hooks
        # A bound method of the observer, for one, is not plain: a deep copy binds it to the copy.
        and all(type(v) in _PLAIN or k == "qconfig" for k, v in vars(observer).items())
        and all(child is not None and _is_plain_observer(child) for child in observer.children())
    )


def _copy(module: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, which spends most of its time on a module's empty dicts."""
    if module is None or id(module) in memo:
        return memo.get(id(module))
    cls: Any = type(module)
    if not _copies_as_its_attributes(cls) or hasattr(module, "__deepcopy__"):
        return copy.deepcopy(module, memo)
    copied = memo[id(module)] = cls.__new__(cls)
    for name, value in vars(module).items():
        kind = type(value)
        if name == "_modules":
            new = kind((key, _copy(child, memo)) for key, child in value.items())
        elif kind in (dict, OrderedDict, set) and not value:
            new = kind()
        elif kind in _IMMUTABLE:
            new = value
        else:
            new = copy.deepcopy(value, memo)
        vars(copied)[name] = new
    return copied


_COPYING = (
    *("__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__new__"),
    *("__reduce__", "__reduce_ex__", "__setstate__"),
)


@functools.cache
def _copies_as_its_attributes(cls: Any) -> bool:
    """Whether a deep copy is a new object with copies of its attributes, and nothing else."""
    return all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPYING)
