"""Whether a backward function holds its incoming gradient alone, so that it may be overwritten.

A gradient is memory as large as the activation. Where nobody else can see it again, the gradient
that is computed from it can be written in its place, which saves an allocation of that size and its
page faults. torch's AccumulateGrad decides in the same way whether it may keep a gradient: by
reference counts. Here all of them must be as they are for a gradient that was just made:

- those of the tensor, where hooks on nodes, captured gradients and other branches of the graph
  show, and of its Python object, where hooks on tensors show, and whatever Python code keeps;
- those of its storage and of the storage's Python object, where views, detached tensors and
  exported arrays show.

Memory that torch has not allocated, that other processes can map, or that is shared until somebody
writes, may have other owners. Part of a larger storage would keep all of it alive.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from .._torch.private import (
    counts_owners,
    has_storage,
    is_copied_on_write,
    is_intercepted,
    storage_use_count,
    tensor_use_count,
)
from .fast_calls import is_compiling, is_grad_enabled

__all__ = ["is_sole_owner", "learn_counts"]

_Counts = tuple[int, int, int, int]


def _counts(grad: Tensor, expected: _Counts | None = None) -> _Counts | None:
    """References, each with those of this module's functions; None if not those that are expected.

    The first ones show most owners, and take a fraction of the time of the others.
    """
    of_tensor = sys.getrefcount(grad), tensor_use_count(grad)
    if expected is not None and of_tensor != expected[:2]:
        return None
    storage = grad.untyped_storage()
    return *of_tensor, sys.getrefcount(storage), storage_use_count(storage)


class _Probe(torch.autograd.Function):
    """Counts what a gradient has that nobody else holds, in the way of `is_sole_owner`."""

    found: _Counts | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _count(grad)
        return grad


def _count(grad: Tensor) -> None:
    _Probe.found = _counts(grad)


def learn_counts() -> None:
    """Find out which counts a gradient has that a backward function alone holds.

    They depend on the releases of Python and torch. To be called in a forward pass: it runs a
    backward pass of its own, once, at the first time that nothing else sees the ops. Debuggers and
    profilers written in Python may hold what is in the frames that they see, and would be counted.
    """
    if (
        _Probe.found is not None
        or not counts_owners
        or is_compiling()
        or is_intercepted()
        or sys.gettrace() is not None
        or sys.getprofile() is not None
    ):
        return
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        y: Tensor = _Probe.apply(x)  # type: ignore[no-untyped-call]
        # The gradient of neg is new. Autograd saves no tensor, which checkpoints would count.
        torch.autograd.grad(y.neg().sum(), x)


def is_sole_owner(grad: Tensor) -> bool:
    """Whether the caller, a backward function with `grad` as its argument, alone can see it."""
    return (
        not is_compiling()
        and _Probe.found is not None
        and type(grad) is Tensor
        and not is_grad_enabled()
        and not grad.requires_grad
        and has_storage(grad)
        and _counts(grad, _Probe.found) == _Probe.found
        and weakref.getweakrefcount(grad) == 0
        and _is_all_of_private_memory(grad)
        and not is_copied_on_write(grad)
    )


def _is_all_of_private_memory(grad: Tensor) -> bool:
    storage = grad.untyped_storage()
    return storage.resizable() and not storage.is_shared() and storage.nbytes() == grad.nbytes
