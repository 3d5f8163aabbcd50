"""Whether a call may go round the dispatcher: whether nothing is there that would see it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _C
from .._torch import private
from .._torch.private import is_tracing, takes_forward_derivatives

is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled


def is_transformed() -> bool:
    """Whether torch.func transforms, or forward-mode derivatives are taken (and refused)."""
    return private.innermost_transform() is not None or takes_forward_derivatives()


def has_plain_gradients() -> bool:
    """Whether gradients are taken, and by autograd alone: nothing transforms, traces, compiles."""
    return is_grad_enabled() and not is_compiling() and not is_transformed() and not is_tracing()


def _set_up_fast_calls() -> bool:
    """Let `_C` reach tensors without the dispatcher, where torch has what that takes."""
    if private.exchange_api is None:
        return False
    try:
        _C.set_up_fast_calls(
            private.exchange_api,
            (Tensor, torch.nn.Parameter),
            # What intercepts ops has to see them: modes (fake tensors, export, a default device),
            # the transforms of torch.func, torch.jit.trace, the profiler.
            (
                private.dispatch_modes,
                private.function_modes,
                private.innermost_transform,
                is_tracing,
                private.is_profiling,
            ),
            Tensor.is_neg,
            torch.empty_like,
            functools.partial(torch.empty, dtype=torch.uint8, device=torch.device("cpu")),
        )
    except RuntimeError:
        return False
    return True


# Whether plain CPU tensors go round the dispatcher (benchmarks/calls.py: what that saves).
fast_calls = _set_up_fast_calls()


def goes_fast() -> bool:
    """Whether the functions of `_C` may be tried; they say None, with nothing done, where not.

    What they cannot ask for themselves is asked here: they must not be seen while compiling, and
    torch keeps the level of forward-mode derivatives in Python.
    """
    return fast_calls and not is_compiling() and not takes_forward_derivatives()
