"""Residual additions in QAT: sum, ReLU, observing and fake-quantizing as one.

A FloatFunctional adds two tensors, perhaps applies ReLU, and then calls the observer or
fake-quantizer that `prepare_qat` gave it. Each of these goes over the whole tensor by itself. One
op does it all where nothing could tell the difference: where the fake-quantizer is plain, the
tensors are alike, and no transform, mode or compiler has to see the single steps. Any other call
goes on as its class has it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch  # torch.jit.script looks torch's names up here, too, see `_shorten`
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ..._native.fast_calls import is_compiling
from ..._native.routes import add_observe_fake_quantize
from ..._torch.private import is_altered
from ..float_functional import FloatFunctional
from .plain import is_fused_for, settings_per_tensor

__all__ = ["teach_float_functional"]

_PLAIN = (Tensor, Parameter)

# The functions that the methods call. Tools that count operations replace them.
_ADD, _RELU = torch.add, F.relu

# The smallest result that each method's activation lets through.
_LOWEST = {"add": -math.inf, "add_relu": 0.0}


def _sum_as_one(functional: Any, x: Tensor, y: Tensor, lowest: float) -> Tensor | None:
    """What the method returns; None where the method itself is to do the work."""
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
        return None  # nothing has changed, and the method itself will say what is wrong


def _shorten(cls: type[nn.Module], name: str, lowest: float) -> None:
    """Try `_sum_as_one` first where the class's method of this name is called."""
    steps: Callable[[Any, Tensor, Tensor], Tensor] = getattr(cls, name)
    if getattr(steps, "__globals__", None) is not getattr(cls.forward, "__globals__", ()):
        return  # a user has replaced the method

    # torch.jit.script compiles the source of `steps`, and looks its names up in this module.
    @functools.wraps(steps)
    def method(self: Any, x: Tensor, y: Tensor) -> Tensor:
        result = _sum_as_one(self, x, y, lowest)
        return steps(self, x, y) if result is None else result

    setattr(cls, name, method)


@functools.cache
def teach_float_functional() -> None:
    """Have FloatFunctional add in one op, from now on in this process."""
    for name, lowest in _LOWEST.items():
        _shorten(FloatFunctional, name, lowest)
