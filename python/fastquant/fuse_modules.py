"""Replace runs of float modules by fused ones, in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ._torch.hooks import copy_forward_hooks, copy_forward_pre_hooks
from .fuser_method_mappings import fuse_conv_bn, fuse_conv_bn_relu, get_fuser_method
from .utils import QuantizationError, _parent_name, check_is_module, getattr_from_fqn

__all__ = [
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_known_modules",
    "fuse_modules",
    "fuse_modules_qat",
    "get_fuser_method",
]

_Module = TypeVar("_Module", bound=nn.Module)
Fuser = Callable[..., Sequence[nn.Module]]


def _get_module(model: nn.Module, submodule_key: str) -> nn.Module:
    try:
        module = getattr_from_fqn(model, submodule_key)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Module):
        raise QuantizationError(
            f"{submodule_key!r} names no submodule of {type(model).__name__}, so it cannot be fused"
        )
    return module


def _set_module(model: nn.Module, submodule_key: str, module: nn.Module) -> None:
    parent, name = _parent_name(submodule_key)
    setattr(getattr_from_fqn(model, parent) if parent else model, name, module)


def fuse_known_modules(
    mod_list: Sequence[nn.Module],
    is_qat: bool,
    additional_fuser_method_mapping: Mapping[tuple[Any, ...], Any] | None = None,
) -> list[nn.Module]:
    """Fuse consecutive modules: the first becomes the fused one, the others identities.

    Fused are convolution, transposed convolution or linear with batch norm; convolution with
    batch norm and ReLU; convolution, linear or batch norm (2d, 3d) with ReLU.

    Forward pre-hooks of the first module and forward hooks of the last one move to the fused
    module, order and flags kept. Other hooks stay where they are, for as long as the module
    that they are on is part of the fused one.

    Raises:
        QuantizationError: no fused module exists for these types, or they do not fit together.
    """
    if not mod_list:
        raise QuantizationError("mod_list must hold the modules to fuse, got an empty list")
    first, last = mod_list[0], mod_list[-1]
    types = tuple(type_before_parametrizations(module) for module in mod_list)
    fuser_method = get_fuser_method(types, additional_fuser_method_mapping)
    # Hooks are removed before fusing: a fuser may copy a module, and a hook that was both copied
    # and moved would run twice.
    pre_hooks, hooks = dict(first._forward_pre_hooks), dict(last._forward_hooks)
    moved = nn.Module()
    copy_forward_pre_hooks(first, moved)
    copy_forward_hooks(last, moved)
    first._forward_pre_hooks.clear()
    last._forward_hooks.clear()
    try:
        fused = fuser_method(is_qat, *mod_list)
    except BaseException:
        first._forward_pre_hooks.update(pre_hooks)
        last._forward_hooks.update(hooks)
        raise
    copy_forward_pre_hooks(moved, fused)
    copy_forward_hooks(moved, fused)
    identities = [nn.Identity() for _ in mod_list[1:]]
    for identity in identities:
        identity.training = first.training
    return [fused, *identities]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []


def _runs_of_names(modules_to_fuse: Any) -> list[list[str]]:
    """`modules_to_fuse` as a list of lists of names.

    Raises:
        QuantizationError: it is neither a list of names nor a list of such lists, or one is empty.
    """
    given = _listed(modules_to_fuse)
    runs = [given] if all(isinstance(name, str) for name in given) else list(map(_listed, given))
    if not all(run and all(isinstance(name, str) for name in run) for run in runs):
        raise QuantizationError(
            'modules_to_fuse must be a list of dotted names, as ["conv", "bn"], or a list of such '
            f"lists, none of them empty; got {modules_to_fuse!r}"
        )
    return runs


def _fuse_modules(
    model: _Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    is_qat: bool,
    inplace: bool = False,
    fuser_func: Fuser = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> _Module:
    check_is_module("fuse_modules_qat" if is_qat else "fuse_modules", model)
    runs = _runs_of_names(modules_to_fuse)
    additional = (fuse_custom_config_dict or {}).get("additional_fuser_method_mapping", {})
    if not inplace:
        model = copy.deepcopy(model)
    for names in runs:
        modules = [_get_module(model, name) for name in names]
        try:
            fused = fuser_func(modules, is_qat, additional)
        except AssertionError as error:
            raise QuantizationError(f"cannot fuse {', '.join(names)}: {error}") from error
        for name, module in zip(names, fused, strict=True):
            _set_module(model, name, module)
    return model


def fuse_modules(
    model: _Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Fuser = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> _Module:
    """Fuse runs of modules for inference.

    Args:
        model: in eval mode.
        modules_to_fuse: dotted names of consecutive modules, or several such lists.
        inplace: change `model` itself instead of a copy.
        fuser_func: `fuser_func(modules, is_qat, additional_mapping)`, returning as many modules
            as it was given.
        fuse_custom_config_dict: `{"additional_fuser_method_mapping": {types: method}}`, where
            `method(is_qat, *modules)` returns the fused module.

    Returns:
        The model, each run replaced by its fused module and identities.

    Raises:
        QuantizationError: a name is no submodule, or a run cannot be fused.
    """
    return _fuse_modules(
        model, modules_to_fuse, False, inplace, fuser_func, fuse_custom_config_dict
    )


def fuse_modules_qat(
    model: _Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Fuser = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> _Module:
    """Fuse runs of modules for quantization-aware training; otherwise as `fuse_modules`."""
    return _fuse_modules(model, modules_to_fuse, True, inplace, fuser_func, fuse_custom_config_dict)
