"""What makes `convert` quick: no weight is copied to be quantized, none packed to be replaced."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._native.ops import quantize_per_channel
from .._torch import ao
from .._torch.ao import nni, nniq, nnq
from .._torch.hooks import has_hooks_of_its_own
from .._torch.private import per_channel_quantized, without_derivatives
from ..utils import get_qparam_dict
from .checks import Classes, has_qconfig, is_swapped_whole

_Module = TypeVar("_Module", bound=nn.Module)

# Modules that quantize and pack one weight, and keep nothing else of their float counterpart.
_PACKING = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear)
# Modules that keep a scale and a zero point.
_SCALED = (nnq.Quantize, nnq.QFunctional)


def from_float(target: Any, mod: nn.Module, use_precomputed_fake_quant: bool) -> nn.Module:
    """`target.from_float`, with the arguments that it takes."""
    if getattr(target, "_IS_REFERENCE", False):
        observer: nn.Module = mod.qconfig.weight()  # type: ignore[union-attr, operator]
        observer(mod.weight)
        return target.from_float(mod, get_qparam_dict(observer))  # type: ignore[no-any-return]
    lean = _lean(target)
    swapped: nn.Module
    if not use_precomputed_fake_quant and _is_calibrated(target, mod):
        swapped = _from_calibrated(lean, mod)
    elif _takes_precomputed(target):
        swapped = lean.from_float(mod, use_precomputed_fake_quant=use_precomputed_fake_quant)
    else:
        swapped = lean.from_float(mod)
    if type(swapped) is lean:
        swapped.__class__ = target
    return swapped


@functools.cache
def _takes_precomputed(target: Any) -> bool:
    return "use_precomputed_fake_quant" in inspect.signature(target.from_float).parameters


# What convolutions and linear layers become without training, which is what is converted most.
_CALIBRATED = {
    **{getattr(nnq, name): getattr(nn, name) for name in ("Conv1d", "Conv2d", "Conv3d", "Linear")},
    **{
        getattr(nniq, name): getattr(nni, name)
        for name in ("ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
    },
}


def _is_calibrated(target: Any, mod: nn.Module) -> bool:
    """Whether `_from_calibrated` does what `target.from_float` would."""
    observer: Any = mod._modules.get("activation_post_process")
    return (
        type(mod) is _CALIBRATED.get(target)
        and observer is not None
        and observer.dtype != torch.float
        and not any(hasattr(m, "weight_fake_quant") for m in (mod, _layer(mod)))
    )


def _layer(mod: Any) -> Any:
    """What has the weight."""
    return mod[0] if isinstance(mod, ao.FusedModule) else mod


def _from_calibrated(lean: Any, mod: Any) -> nn.Module:
    """What torch's `from_float` makes of a float module, by a quicker way to its weight."""
    layer = _layer(mod)
    observer = layer.qconfig.weight()
    observer(layer.weight)
    if observer.dtype != torch.qint8:
        raise AssertionError(
            f"the weight of a {lean.__name__} is torch.qint8, and its observer {observer.dtype}"
        )
    swapped: Any
    if issubclass(lean, nnq.Linear):
        swapped = lean(layer.in_features, layer.out_features)
    else:
        swapped = lean(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
            *(layer.padding, layer.dilation, layer.groups, layer.bias is not None),
            layer.padding_mode,
        )
    swapped.set_weight_bias(quantize_weight(layer.weight.float(), observer), layer.bias)
    scale, zero_point = mod.activation_post_process.calculate_qparams()
    swapped.scale, swapped.zero_point = float(scale), int(zero_point)
    return swapped  # type: ignore[no-any-return]


def quantize_weight(weight: Tensor, observer: Any) -> Tensor:
    """`weight` as torch's modules quantize it, which take it an element at a time.

    Args:
        weight: fp32.
        observer: has seen it.
    """
    axis = getattr(observer, "ch_axis", -1)
    if (
        observer.qscheme == torch.per_channel_symmetric
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and 0 <= axis < weight.dim()
    ):
        scales, zero_points = observer.calculate_qparams()
        if scales.shape == weight.shape[axis : axis + 1] and not zero_points.any():
            # A fake-quantizer has its range from its observer.
            limits = getattr(observer, "activation_post_process", observer)
            low, high = max(limits.quant_min, -128), min(limits.quant_max, 127)
            # What torch makes of integers is contiguous.
            integers = quantize_per_channel(weight.detach().contiguous(), scales, axis, low, high)
            return per_channel_quantized(integers, scales, zero_points, axis)  # type: ignore[no-any-return]
    quantized: Tensor = ao.quantize_weight(weight, observer)  # type: ignore[no-untyped-call]
    return quantized


@functools.cache
def _lean(target: Any) -> Any:
    """A subclass that packs quickly, and not the weight that its constructor makes up.

    `from_float` makes a module of the right size, weight and all, and then gives it another
    weight; packing is what takes most of its time. `target` itself where that is not so.
    """
    if not _packs(target):
        return target

    class Lean(target):  # type: ignore[misc]
        def set_weight_bias(self, w: Tensor, b: Tensor | None) -> None:
            if "scale" in vars(self):  # which constructors set last
                # Packing reads each scale and zero point by an op of its own, and autograd takes
                # a large part of their time.
                with without_derivatives():
                    super().set_weight_bias(w, b)

    class LeanLinear(Lean):
        def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(1, 1, *args, **kwargs)
            self.in_features, self.out_features = in_features, out_features

    lean = LeanLinear if issubclass(target, nnq.Linear) else Lean
    lean.__name__ = target.__name__  # for torch's messages
    return lean


def _packs(target: Any) -> bool:
    """Whether `target` is one of torch.ao's own convolutions or linear layers."""
    return (
        isinstance(target, type)
        and issubclass(target, _PACKING)
        and target.__module__.startswith("torch.ao.nn.")
    )


def copy_to_convert(
    model: _Module, mapping: Classes, custom: Classes, remove_qconfig: bool
) -> tuple[_Module, Callable[[], None]]:
    """A deep copy, but for the weights and observers of modules that will be made anew.

    Nor does it have configs of its own where `remove_qconfig` says that they will be removed.

    Returns:
        The copy, and what to call when it has been converted: it gives parts of their own to such
        modules as something else still refers to.
    """
    shells = {id(module): _shell(module) for module in _only_read(model, mapping, custom)}
    memo: dict[int, Any] = dict(shells)
    if remove_qconfig:
        configs = (vars(module).get("qconfig") for module in model.modules())
        memo.update((id(config), config) for config in configs)
    copied = _copy(model, memo)
    remaining = weakref.WeakSet(shells.values())
    shells.clear()

    def settle() -> None:
        for module in remaining:
            module._parameters = copy.deepcopy(module._parameters)
            module._modules = copy.deepcopy(module._modules)

    return copied, settle


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
        elif kind in (dict, OrderedDict) and not value:
            new = kind()
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


def _only_read(module: nn.Module, mapping: Classes, custom: Classes) -> Iterator[nn.Module]:
    """What is below `module` and is swapped for what `convert` reads off it, in its order."""
    for child in module._modules.values():
        if child is None:
            continue
        if _is_only_read(child, mapping, custom):
            yield child
        elif not is_swapped_whole(child, custom):
            yield from _only_read(child, mapping, custom)


def _is_only_read(module: nn.Module, mapping: Classes, custom: Classes) -> bool:
    kind = type_before_parametrizations(module)
    parts = module._modules.keys() - {"activation_post_process"}
    return (
        has_qconfig(module)
        and kind not in custom
        and kind is type(module)
        and (mapping.get(kind) in _SCALED or _packs(mapping.get(kind)))
        # Not training modules, which observe their weight once more, and fold their batch norm;
        # nor what has modules of its own, which are swapped first.
        and (not parts or (issubclass(kind, ao.FusedModule) and parts <= {"0", "1"}))
        and "weight_fake_quant" not in module._modules
        and not has_hooks_of_its_own(module)
    )


def _shell(module: nn.Module) -> Any:
    """Another module of the same parts, which it can lose. Packing keeps the bias: it is new."""
    shell = type(module).__new__(type(module))
    shell.__dict__.update(
        (name, value.copy() if isinstance(value, dict | set) else value)
        for name, value in vars(module).items()
    )
    if isinstance(module, ao.FusedModule):
        shell._modules["0"] = _shell(module._modules["0"])
    elif (bias := module._parameters.get("bias")) is not None:
        shell._parameters["bias"] = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return shell
