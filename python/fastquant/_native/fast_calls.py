"""Whether an op may be called without torch's dispatcher: whether nothing there has to see it.

For a small tensor the dispatcher takes longer than the work (benchmarks/calls.py). The question
is asked here, once for each call, and in Python: most of its parts take the interpreter 10 to
20 ns, which is no more than C would need to ask back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _C
from .._torch.private import (
    dispatch_modes,
    exchange_api,
    function_modes,
    innermost_transform,
    is_intercepted,
    is_tracing,
    takes_forward_derivatives,
)

is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled
_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling


def is_transformed() -> bool:
    """Whether torch.func transforms, or forward-mode derivatives are taken (and refused)."""
    return innermost_transform() is not None or takes_forward_derivatives()


def is_called_alone() -> bool:
    """Whether nothing but autograd takes part in the ops that are called.

    Nothing transforms, traces or compiles, and there are no modes.
    """
    return not (
        is_compiling() or dispatch_modes() or function_modes() or is_transformed() or is_tracing()
    )


def _set_up_fast_calls() -> bool:
    """Let `_C` reach the memory of tensors, where this torch has what that takes."""
    if exchange_api is None:
        return False
    try:
        _C.set_up_fast_calls(exchange_api, Tensor, Parameter)
    except RuntimeError:
        return False
    return True


# Off in torch releases without DLPack's C exchange API; benchmarks and tests switch it off, too.
fast_calls = _set_up_fast_calls()


def nothing_intervenes() -> bool:
    """Whether `_C` may be called, as far as that does not depend on the arguments."""
    # Dynamo must not see what follows its own question.
    return not _is_traced_by_dynamo() and fast_calls and not is_intercepted()


def may_skip_dispatcher(x: Any, *others: Any) -> bool:
    """Whether `_C` may be called with these values, which nothing may then intercept.

    False while Dynamo traces, and for anything but plain tensors that do not keep the negatives of
    their values in memory. What `_C` sees by itself (devices, dtypes, layouts) is left to it: it
    returns None where it cannot do the work.
    """
    if (
        _is_traced_by_dynamo()  # first: Dynamo must not see what follows
        or not fast_calls
        or (type(x) is not Tensor and type(x) is not Parameter)
        or x.is_neg()
        or is_intercepted()
    ):
        return False
    for other in others:  # all() takes 0.2 µs longer
        if (type(other) is not Tensor and type(other) is not Parameter) or other.is_neg():
            return False
    return True
