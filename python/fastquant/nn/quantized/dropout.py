"""Dropout, which does nothing to quantized tensors."""

from __future__ import annotations

from typing import Any

from torch import nn


class Dropout(nn.Dropout):
    """Returns its input, in training mode, too: quantized models do not train."""

    def forward(self, input: Any) -> Any:
        return input

    def _get_name(self) -> str:
        return "QuantizedDropout"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Dropout:
        """What a Dropout becomes."""
        return cls(mod.p, mod.inplace)

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Dropout:
        """The same."""
        return cls(mod.p, mod.inplace)
