"""Residual additions in QAT: sum, ReLU, observing and fake-quantizing as one.

torch.ao's FloatFunctional adds two tensors, perhaps applies ReLU, and then calls the observer or
fake-quantizer that `prepare_qat` gave it. Each of these goes over the whole tensor by itself. One
op does it all where nothing could tell the difference: where the fake-quantizer is plain, the
tensors are alike, and no transform, mode or compiler has to see the single steps. Any other call
goes to torch.ao's own code.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch  # torch.jit.script looks torch's names up here, too, see `_shorten`
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from ..._native.fast_calls import is_compiling
from ..._native.routes import add_observe_fake_quantize
from ..._torch.ao import nnq
from ..._torch.private import is_altered
from .plain import is_fused_for, settings_per_tensor

__all__ = ["teach_float_functional"]

_PLAIN = (Tensor, Parameter)

# The functions that torch.ao's methods call. Tools that count operations replace them.
_ADD, _RELU = torch.add, F.relu

# The smallest result that each method's activation lets through.
_LOWEST = {"add": -math.inf, "add_relu": 0.0}


def _sum_as_one(functional: Any, x: Tensor, y: Tensor, lowest: float) -> Tensor | None:
    """What the method returns; None where torch.ao's own code is to do the work."""
    if is_compiling() or type(x) not in _PLAIN or type(y) not in _PLAIN or is_altered():
        return None
    if torch.add is not _ADD or F.relu is not _RELU:
        return None
    settings = settings_per_tensor(functional.activation_post_process)
    if settings is None or not is_fused_for(x):
        return None
    try:
        return add_observe_fake_quantize(x, y, lowest, math.inf, settings)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # nothing has changed, and torch.ao's own code will say what is wrong


def _shorten(cls: type, name: str, lowest: float) -> None:
    """Try `_sum_as_one` first where torch.ao's method of this name is called."""
    theirs: Callable[[Any, Tensor, Tensor], Tensor] | None = vars(cls).get(name)
    if getattr(theirs, "__globals__", None) is not vars(sys.modules[cls.__module__]):
        return  # somebody's own
    assert theirs is not None

    # torch.jit.script compiles the source of `theirs`, and looks its names up in this module.
    @functools.wraps(theirs)
    def method(self: Any, x: Tensor, y: Tensor) -> Tensor:
        result = _sum_as_one(self, x, y, lowest)
        return theirs(self, x, y) if result is None else result

    setattr(cls, name, method)


@functools.cache
def teach_float_functional() -> None:
    """Have torch.ao's FloatFunctional add in one op, from now on in this process."""
    for name, lowest in _LOWEST.items():
        _shorten(nnq.FloatFunctional, name, lowest)
