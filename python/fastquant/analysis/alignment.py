"""A copy of the float model whose modules have the names of the quantized model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._conversion.checks import listed
from ..fuse_modules import fuse_modules
from ..quantize import _remove_qconfig
from ..utils import QuantizationError
from .errors import AnalysisError
from .reading import CUSTOM, is_prepared

Run = Callable[[nn.Module], object]


def aligned(float_model: nn.Module, quantized: nn.Module, runs: Sequence[Run]) -> nn.Module:
    """A copy of the float model in eval mode, fused as the quantized model is.

    Args:
        float_model: stays as it is.
        quantized: prepared or converted.
        runs: run a model on some data, the last one on enough to reach all layers.

    Raises:
        AnalysisError: it cannot be fused alike.
    """
    model = copy_on_same_weights(float_model).eval()
    _fuse_as(model, quantized, runs)
    for name, module in quantized.named_modules():
        if isinstance(module, CUSTOM) and is_prepared(module):
            observed = copy.deepcopy(module).eval()
            _remove_qconfig(observed)
            model.set_submodule(name, observed)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            # torch removes the parameter's property from the class, which copies share.
            module.__class__ = _copy_of_class(type(module))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    return model


def copy_on_same_weights(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own in the model's memory, which nothing writes into."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter
    }
    return copy.deepcopy(model, memo)


def _copy_of_class(cls: type) -> type:
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, members)


def _fuse_as(model: nn.Module, quantized: nn.Module, runs: Sequence[Run]) -> None:
    """Fuse, in place, what is an Identity in the quantized model and not in this one."""
    theirs = dict(quantized.named_modules())
    fused_away = {
        name
        for name, module in model.named_modules()
        if isinstance(theirs.get(name), nn.Identity) and not isinstance(module, nn.Identity)
    }
    if not fused_away:
        return
    for run in runs:
        groups = _groups(_order_of_calls(model, run), fused_away)
        missed = fused_away.difference(*groups)
        if not missed:
            break
    if missed:
        raise AnalysisError(
            f"the quantized model was fused where the float one was not, in {listed(missed)}, "
            "which data does not reach in the float model; fuse the float model likewise"
        )
    try:
        fuse_modules(model, groups, inplace=True)
    except (QuantizationError, NotImplementedError, AttributeError) as error:
        raise AnalysisError(
            f"the float model cannot be fused as the quantized one was ({error}); pass it fused"
        ) from error


def _groups(order: Iterable[str], fused_away: Collection[str]) -> list[list[str]]:
    """Each module that others were fused into, with these, by the order of calls."""
    groups: dict[str, list[str]] = {}
    root = ""
    for name in order:
        if name not in fused_away:
            root = name
        elif root and name not in groups.setdefault(root, [root]):
            groups[root].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _order_of_calls(model: nn.Module, run: Run) -> list[str]:
    """Names of the modules without children, in the order in which they are called."""
    order: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):

            def note(*_: Any, name: str = name) -> None:
                order.append(name)

            handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return order
