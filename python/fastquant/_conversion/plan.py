"""The plan of a conversion: which modules are swapped, for what, and why others are not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..nn.intrinsic import _FusedModule
from ..qconfig import _is_dynamic

Classes: TypeAlias = Mapping[Any, Any]
"""A class to swap in, by the class that it replaces."""


class How(Enum):
    """How a module's replacement is made."""

    CUSTOM = "target.from_observed(module)"
    FLOAT = "target.from_float(module)"
    REFERENCE = "target.from_float(module, qparams of the weight)"
    SKIPPED = "not at all"


class Entry(NamedTuple):
    """One place of a model whose module has a class to swap in.

    Attributes:
        path: dotted name in the model, `""` for the model itself.
        owner: the module that has it as a child; None for the model itself.
        name: the child's name there.
        module: what is there before the conversion.
        target: the class to swap in.
        how: the way from `module` to `target`.
        reason: why it is skipped.
    """

    path: str
    owner: nn.Module | None
    name: str
    module: nn.Module
    target: Any
    how: How
    reason: str = ""


class Plan:
    """What a conversion will do to a model; checks, warnings, copying and swapping all read it.

    Args:
        function: what the user called, for messages.
        model: what is converted.
        mapping: class to swap in by class, made by `from_float`.
        custom: the same, made by `from_observed`; goes first.
        dynamic: the same as `mapping` for modules whose config is for dynamic quantization.
        closed: classes whose modules, if they have a config, prepare what is in them themselves.

    Attributes:
        entries: the model itself first, if its class has one to swap in; then what is below, in
            the order of swapping: a module comes after the modules that it contains.
    """

    def __init__(
        self,
        function: str,
        model: nn.Module,
        mapping: Classes,
        custom: Classes,
        dynamic: Classes = MappingProxyType({}),
        closed: Collection[Any] = (),
    ) -> None:
        self.function = function
        self.model = model
        self._mapping = mapping
        self._custom = custom
        self._dynamic = dynamic
        self._closed = closed
        self.entries: list[Entry] = []
        if type_before_parametrizations(model) in mapping:
            self._add("", None, "", model)
        self._add_below(model, "", set())

    def for_copy(self, model: nn.Module) -> Plan:
        """The plan for a copy of the model.

        It is made anew, from the same rules, because a module may copy itself as it likes.
        """
        return Plan(self.function, model, self._mapping, self._custom, self._dynamic, self._closed)

    def swaps(self) -> Iterator[Entry]:
        """The entries that are not skipped."""
        return (entry for entry in self.entries if entry.how is not How.SKIPPED)

    def first_places(self) -> Iterator[Entry]:
        """One entry for each module below the model, though it may be in several places."""
        seen = set()
        for entry in self.entries:
            if entry.owner is not None and id(entry.module) not in seen:
                seen.add(id(entry.module))
                yield entry

    def _add_below(self, module: nn.Module, path: str, seen: set[int]) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            child_path = f"{path}.{name}" if path else name
            if id(child) not in seen:
                seen.add(id(child))
                if not self._is_swapped_whole(child):
                    self._add_below(child, child_path, seen)
            self._add(child_path, module, name, child)

    def _add(self, path: str, owner: nn.Module | None, name: str, module: nn.Module) -> None:
        mapping = self._mapping
        if type_before_parametrizations(module) in self._dynamic and has_qconfig(module):
            mapping = self._dynamic if _is_dynamic(module.qconfig) else mapping
        target, how = look_up(module, mapping, self._custom)
        if how is None:
            return
        reason = ""
        if owner is None:
            how, reason = How.SKIPPED, "only submodules are swapped"
        elif not has_qconfig(module):
            how, reason = How.SKIPPED, "it has no qconfig"
        elif type(owner) is nn.MultiheadAttention:
            how, reason = How.SKIPPED, "its weight is read, and it is not called"
        self.entries.append(Entry(path, owner, name, module, target, how, reason))

    def _is_swapped_whole(self, module: nn.Module) -> bool:
        """Whether a module is swapped without its submodules being swapped first."""
        kind = type_before_parametrizations(module)
        if kind in self._closed and has_qconfig(module):
            return True
        return issubclass(kind, _FusedModule) or kind in self._custom


def look_up(module: nn.Module, mapping: Classes, custom: Classes) -> tuple[Any, How | None]:
    """The class to swap in for a module's class, and how; (None, None) where there is none."""
    kind = type_before_parametrizations(module)
    if kind in custom:
        return custom[kind], How.CUSTOM
    if kind not in mapping:
        return None, None
    target = mapping[kind]
    return target, How.REFERENCE if getattr(target, "_IS_REFERENCE", False) else How.FLOAT


def has_qconfig(module: nn.Module) -> bool:
    """Whether the module is to be quantized."""
    return getattr(module, "qconfig", None) is not None
