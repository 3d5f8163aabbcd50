"""Which class of torch.ao a class of ours stands in for."""

from __future__ import annotations

import types

from torch import nn

from .._core.errors import PATH_IN_MODEL

# A class of ours by the torch.ao class that it stands in for.
COUNTERPARTS: dict[type, type] = {}


def subclasshook(cls: type, candidate: type) -> bool | types.NotImplementedType:
    for base in candidate.__mro__:
        ours = COUNTERPARTS.get(base)
        if ours is not None and cls in ours.__mro__:
            return True
    return NotImplemented  # type: ignore[no-any-return]


def scriptable(module: nn.Module, cls: type | None = None) -> nn.Module:
    """torch.ao's module with the same state, which is what TorchScript compiles.

    Its tensors are the same, so what either observes the other has seen.

    Args:
        module: an observer or fake-quantizer of fastquant's.
        cls: fastquant's class to take the counterpart of; the module's own.

    Raises:
        NotImplementedError: the module's class is a user's.
        RuntimeError: the module is in a prepared model. To let torch find that hooks cannot be
            scripted would be too late: by then it has put what this returns into the model.
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
    # State of ours that torch.ao does not know.
    for name in twin._non_persistent_buffers_set:
        del twin._buffers[name]
    twin._non_persistent_buffers_set.clear()
    return twin
