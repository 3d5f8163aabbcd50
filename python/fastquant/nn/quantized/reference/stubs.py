"""Stubs of reference models, whose tensors are floating and have the values of quantized ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...float_functional import FXFloatFunctional
from .. import stubs
from ..stubs import DeQuantize

__all__ = ["DeQuantize", "FloatFunctional", "Quantize"]


class Quantize(stubs.Quantize):
    """Gives a tensor the values that it has once quantized; the result is floating."""

    def forward(self, X: Tensor) -> Any:  # noqa: N803 (the name is torch.ao's)
        return super().forward(X).dequantize()


class FloatFunctional(FXFloatFunctional):
    """Operations on floating tensors, whose observer has gone."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed FloatFunctional becomes."""
        return cls()
