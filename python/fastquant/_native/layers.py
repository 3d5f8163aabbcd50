"""Layers that compute with a weight that they are given, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import Gradients
from .ownership import is_sole_owner, learn_counts

__all__ = ["Layer", "Linear", "with_weight"]


class Layer(Protocol):
    """What a layer does with its weight."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        needed: list[bool],
        reuse: bool = False,
    ) -> Gradients:
        """Of x, weight and bias, where needed, by functions that have gradients themselves.

        With `reuse`, grad may become the gradient of x.
        """


class Linear(NamedTuple):
    """A linear layer, of inputs with two dimensions."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        needed: list[bool],
        reuse: bool = False,
    ) -> Gradients:
        return (
            grad.mm(weight) if needed[0] else None,
            grad.t().mm(x) if needed[1] else None,
            grad.sum(0) if needed[2] else None,
        )


class _LayerWithWeight(torch.autograd.Function):
    """What the layer makes of x, with the gradients of x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        # What torch's convolutions save, so that a checkpoint may compute it again by those.
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        learn_counts()
        return layer(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reuse = is_sole_owner(grad)
        x, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        return *ctx.layer.gradients(grad, x, weight, needed, reuse), None


def with_weight(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the layer makes of x, weight and bias in `dtype`, which may be autocast's."""
    bias = None if bias is None else bias.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        return layer(x, weight, bias)
    y: Tensor = _LayerWithWeight.apply(x, weight, bias, layer)  # type: ignore[no-untyped-call]
    return y
