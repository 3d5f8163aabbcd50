"""What makes `convert` quick: no weight is copied to be quantized, none packed to be replaced."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from . import _torch_ao
from ._hooks import has_hooks_of_its_own
from ._model_checks import Classes, has_qconfig, is_swapped_whole
from ._torch_ao import nnq
from .utils import get_qparam_dict

_Module = TypeVar("_Module", bound=nn.Module)

# Modules that quantize and pack one weight, and keep nothing else of their float counterpart.
_PACKING = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear)


def from_float(target: Any, mod: nn.Module, use_precomputed_fake_quant: bool) -> nn.Module:
    """`target.from_float`, with the arguments that it takes."""
    if getattr(target, "_IS_REFERENCE", False):
        observer: nn.Module = mod.qconfig.weight()  # type: ignore[union-attr, operator]
        observer(mod.weight)
        return target.from_float(mod, get_qparam_dict(observer))  # type: ignore[no-any-return]
    lean = _lean(target)
    kwargs = {}
    if "use_precomputed_fake_quant" in inspect.signature(target.from_float).parameters:
        kwargs["use_precomputed_fake_quant"] = use_precomputed_fake_quant
    swapped: nn.Module = lean.from_float(mod, **kwargs)
    if type(swapped) is lean:
        swapped.__class__ = target
    return swapped


@functools.cache
def _lean(target: Any) -> Any:
    """A subclass that packs a weight of one element where `target` packs a random one.

    `from_float` makes a module of the right size, weight and all, and then gives it another
    weight; packing is what takes most of its time. `target` itself where that is not so.
    """
    if not _packs(target):
        return target

    class LeanConv(target):  # type: ignore[misc]
        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Any,
            stride: Any = 1,
            padding: Any = 0,
            dilation: Any = 1,
            groups: int = 1,
            *args: Any,
        ) -> None:
            super().__init__(1, 1, kernel_size, stride, padding, dilation, 1, *args)
            self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups

    class LeanLinear(target):  # type: ignore[misc]
        def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(1, 1, *args, **kwargs)
            self.in_features, self.out_features = in_features, out_features

    lean = LeanLinear if issubclass(target, nnq.Linear) else LeanConv
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
    model: _Module, mapping: Classes, custom: Classes
) -> tuple[_Module, Callable[[], None]]:
    """A deep copy, but for the weights and observers of modules that will be packed anew.

    Returns:
        The copy, and what to call when it has been converted: it gives parts of their own to such
        modules as something else still refers to.
    """
    shells = {id(module): _shell(module) for module in _only_read(model, mapping, custom)}
    copied = copy.deepcopy(model, dict(shells))
    remaining = weakref.WeakSet(shells.values())
    shells.clear()

    def settle() -> None:
        for module in remaining:
            module._parameters = copy.deepcopy(module._parameters)
            module._modules = copy.deepcopy(module._modules)

    return copied, settle


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
        and _packs(mapping.get(kind))
        # Not training modules, which observe their weight once more, and fold their batch norm;
        # nor what has modules of its own, which are swapped first.
        and (not parts or (issubclass(kind, _torch_ao.FusedModule) and parts <= {"0", "1"}))
        and "weight_fake_quant" not in module._modules
        and not has_hooks_of_its_own(module)
    )


def _shell(module: nn.Module) -> Any:
    """Another module of the same parts, which it can lose. Packing keeps the bias: it is new."""
    shell = type(module).__new__(type(module))
    shell.__dict__.update(
        (name, copy.copy(value) if isinstance(value, dict | set) else value)
        for name, value in vars(module).items()
    )
    if isinstance(module, _torch_ao.FusedModule):
        shell._modules["0"] = _shell(module._modules["0"])
    elif (bias := module._parameters.get("bias")) is not None:
        shell._parameters["bias"] = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return shell
