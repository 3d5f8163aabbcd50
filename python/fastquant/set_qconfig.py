"""Configs for parts of a model, by patterns of their names or by their classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .qconfig import QConfigAny, _assert_valid_qconfig
from .utils import QuantizationError, check_is_module

__all__ = ["set_qconfig"]


def set_qconfig(
    model: nn.Module, qconfigs: Mapping[str | re.Pattern[str] | type[nn.Module], QConfigAny]
) -> None:
    """Give submodules their `qconfig`, in place; the first entry that matches one wins.

        fastquant.set_qconfig(model, {
            r"head\\..*": None,                       # stays floating
            nn.Embedding: fastquant.float_qparams_weight_only_qconfig,
            "": fastquant.get_default_qconfig("x86"),  # the model, and so all the rest
        })

    As in `prepare`, a submodule that matches nothing gets what the module around it has. Call it
    before `prepare`.

    Args:
        model: float model.
        qconfigs: config, or None for floating, by regular expression or class. An expression has
            to match the whole dotted name, which is "" for the model itself; a class stands for
            its subclasses, too.

    Raises:
        TypeError: `model` is no module, a key is neither string, pattern nor class of modules, or
            a value no config.
        QuantizationError: an expression is none, an entry matches nothing, or a config does not
            fit its module. Then nothing was changed.
    """
    check_is_module("set_qconfig", model)
    if not isinstance(qconfigs, Mapping) or not qconfigs:
        raise TypeError(
            "qconfigs must be a mapping of patterns or classes to configs, not empty, got "
            f"{qconfigs!r}"
        )
    keys = [_matcher(key) for key in qconfigs]
    unmatched = dict.fromkeys(qconfigs)
    found: list[tuple[nn.Module, Any]] = []
    for name, module in model.named_modules():
        matching = [
            key for key, matches in zip(qconfigs, keys, strict=True) if matches(name, module)
        ]
        for key in matching:
            unmatched.pop(key, None)
        if matching:
            qconfig = qconfigs[matching[0]]
            _assert_valid_qconfig(qconfig, module)
            found.append((module, qconfig))
    if unmatched:
        shown = ", ".join(key.__name__ if isinstance(key, type) else repr(key) for key in unmatched)
        raise QuantizationError(
            f"set_qconfig: no submodule of {type(model).__name__} matches {shown}. A pattern has "
            "to match the whole name of a submodule, as in model.named_modules()"
        )
    for module, qconfig in found:
        module.qconfig = qconfig


def _matcher(key: Any) -> Any:
    """A function of a submodule's name and the submodule: whether the key is meant for it."""
    if isinstance(key, type) and issubclass(key, nn.Module):
        return lambda name, module: isinstance(module, key)
    if isinstance(key, str):
        try:
            key = re.compile(key)
        except re.error as error:
            raise QuantizationError(
                f"set_qconfig: {key!r} is no regular expression: {error}"
            ) from None
    if isinstance(key, re.Pattern):
        return lambda name, module: key.fullmatch(name) is not None
    raise TypeError(
        f"a key of qconfigs must be a pattern or a class of modules, got {type(key).__name__}"
    )
