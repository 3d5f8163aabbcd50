"""Which class of fastquant replaces which class of torch.ao."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from .._core.errors import PATH_IN_MODEL

# Maps a class of torch.ao to the class of fastquant that replaces it.
COUNTERPARTS: dict[type, type] = {}


def prefer_torch_ao(
    module: dict[str, Any], theirs: types.ModuleType | None, names: Iterable[str]
) -> None:
    """Replace classes and functions of a module by torch.ao's, where it has them.

    Users' code and torch.ao's own recognise such classes by their type. All of them are replaced or
    none, since they refer to each other. Pickles look for ours in this module, too.

    Args:
        module: the `globals()` of the module, which has ours.
        theirs: torch.ao's module; None where there is none.
        names: of the classes and functions.
    """
    names = tuple(names)
    for name in names:
        module[name].__module__ = module["__name__"]
    if all(hasattr(theirs, name) for name in names):
        module.update({name: getattr(theirs, name) for name in names})


def subclasshook(cls: type, candidate: type) -> bool | types.NotImplementedType:
    for base in candidate.__mro__:
        ours = COUNTERPARTS.get(base)
        if ours is not None and cls in ours.__mro__:
            return True
    return NotImplemented  # type: ignore[no-any-return]


def scriptable(module: nn.Module, cls: type | None = None) -> nn.Module:
    """torch.ao's module with the same state, which is what TorchScript compiles.

    Both modules share their tensors, so statistics that one observes appear in the other.

    Args:
        module: an observer or fake-quantizer of fastquant's.
        cls: fastquant's class whose counterpart to make; by default the module's class.

    Raises:
        NotImplementedError: a user defined the module's class, so torch.ao has no counterpart.
        RuntimeError: the module is in a prepared model. This check comes first,
            because torch finds that it cannot script the hooks only after it has put the module
            that this returns into the model.
    """
    if PATH_IN_MODEL in vars(module):
        raise RuntimeError(
            "prepared models cannot be scripted, for the hooks they have: use torch.jit.trace, or "
            "script the model that convert returns"
        )
    counterparts = {ours: theirs for theirs, ours in COUNTERPARTS.items()}
    theirs = counterparts.get(cls or type(module))
    if theirs is None or type(module) not in counterparts:
        raise NotImplementedError(
            f"{type(module).__name__} cannot be scripted: use torch.jit.trace, or script the "
            "model that convert returns"
        )
    twin: nn.Module = object.__new__(theirs)
    for name, value in vars(module).items():
        twin.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    # Attributes of fastquant's that torch.ao's class does not have.
    for name in twin._non_persistent_buffers_set:
        del twin._buffers[name]
    twin._non_persistent_buffers_set.clear()
    return twin
