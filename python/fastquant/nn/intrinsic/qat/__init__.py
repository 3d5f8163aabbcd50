"""Fused layers for quantization-aware training, under the names of torch.ao.nn.intrinsic.qat.

Where torch.ao exists they are its classes, otherwise those of the modules here.
"""

from __future__ import annotations

from torch import nn

from ...._torch import ao
from ...._torch.counterparts import prefer_torch_ao
from .with_batch_norm import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    LinearBn1d,
)
from .with_relu import ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU

__all__ = [
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearBn1d",
    "LinearReLU",
    "freeze_bn_stats",
    "update_bn_stats",
]

prefer_torch_ao(globals(), ao.nniqat, {*__all__} - {"freeze_bn_stats", "update_bn_stats"})

FOLDING = (ConvBn1d, ConvBn2d, ConvBn3d, LinearBn1d)
"""Layers with a batch norm, which is folded into the weight in the end; those with ReLU derive
from them."""


def freeze_bn_stats(mod: nn.Module) -> None:
    """Have a layer's batch norm use its running statistics and leave them: `model.apply(...)`.

    Modules without a batch norm of their own stay as they are.
    """
    if isinstance(mod, FOLDING):
        mod.freeze_bn_stats()


def update_bn_stats(mod: nn.Module) -> None:
    """Let a layer's batch norm learn from each batch again, as it does unless it was frozen."""
    if isinstance(mod, FOLDING):
        mod.update_bn_stats()
