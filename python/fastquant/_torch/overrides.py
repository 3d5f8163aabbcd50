"""Detects what users have replaced in a module: methods, buffers, attributes, hooks.

A shortcut (one op in place of several methods, buffers read without `Module.__getattr__`) may be
taken only where it gives the same result as the full code. Users set methods on instances, patch
them on classes, make attributes properties, put parameters in the place of buffers and add hooks,
per module or global. Every shortcut checks for that here at each call, and does so in Python:
comparing a method of a class takes the interpreter 10 ns, a third of what it would take through C.
Plain settings (`ch_axis`, `quant_min`) need no such check: they are read as ordinary attributes, so
properties work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .compiling import constant_in_graphs
from .private import is_exporting

_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling

# Names under which modules here keep tensors and modules.
_KEPT = frozenset(
    (
        "activation_post_process",
        "eps",
        "fake_quant_enabled",
        "histogram",
        "max_val",
        "min_val",
        "nonfinite_count",
        "observer_enabled",
        "scale",
        "zero_point",
    )
)


@constant_in_graphs
def keeps_tensors_plainly(cls: Any) -> bool:
    """Whether reading an instance's `_buffers[name]` gives the same as its attribute `name`.

    False where the class has a property of that name or its own `__getattr__`. A class that passes
    stores itself in `_read_plainly`. A subclass inherits that entry, which is not the subclass
    itself, and so is checked anew.

    A property that is put on the class later goes unnoticed, for to look for it at each call would
    take as long as reading the buffers. (No new instance can be made of such a class, since
    register_buffer refuses the name.)
    """
    if cls._read_plainly is cls or is_exporting():  # export has a __getattr__ of its own
        return True
    plain = (
        cls.__getattribute__ is object.__getattribute__
        and cls.__getattr__ is nn.Module.__getattr__
        and not any(_KEPT & vars(base).keys() for base in cls.__mro__)
    )
    if plain:
        cls._read_plainly = cls
    return plain


def reader(*names: str) -> Callable[[Any], Any]:
    """A function that reads tensors of a module: what its attributes of these names are.

    It takes a tenth of the time of reading buffers as attributes.
    """
    items = operator.itemgetter(*names)

    def read(module: nn.Module) -> Any:
        cls: Any = type(module)
        # Dynamo can trace attributes, but not itemgetter.
        if not _is_traced_by_dynamo() and (cls._read_plainly is cls or keeps_tensors_plainly(cls)):
            try:
                return items(module._buffers)
            except KeyError:
                pass  # a parameter, a parametrization or a plain tensor has replaced a buffer
        return [getattr(module, name) for name in names]

    return read


class Written:
    """Methods of a class, recorded when this object is made, to detect replacements later."""

    def __init__(self, cls: type, *names: str) -> None:
        self._methods = [(name, getattr(cls, name)) for name in names]

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether the module, its class or a base class has replaced one of these methods."""
        own, cls = module.__dict__, type(module)
        for name, method in self._methods:  # any() takes 0.3 µs longer
            if getattr(cls, name) is not method or name in own:
                return True
        return False
