"""Convolutions of one element; depthwise and 3x3 ones, which are padded by half their kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _geometry(x: Tensor, weight: Tensor, stride: int) -> tuple[Any, ...]:
    """What torch's functions take after the bias."""
    kernel = weight.shape[-1]
    groups = x.shape[1] // weight.shape[1]
    return (stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), groups


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return torch.convolution(x, weight, bias, *_geometry(x, weight, stride)).contiguous()


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients that are needed; the others are empty."""
    needed = [of_x, of_weight, False]
    backward = torch.ops.aten.convolution_backward.default
    gradients = backward(grad, x, weight, None, *_geometry(x, weight, stride), needed)
    grad_x, grad_weight = (
        gradient.contiguous() if is_needed else x.new_empty(0)
        for gradient, is_needed in zip(gradients[:2], needed, strict=False)
    )
    return grad_x, grad_weight
