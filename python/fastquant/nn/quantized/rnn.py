"""Recurrent layers and attention, whose parts are quantized modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...quantized_tensor import is_quantized, quantize_per_tensor
from .. import quantizable


def in_class(cls: Any, module: nn.Module) -> Any:
    """A module of another class that has all that this one has."""
    made: Any = cls.__new__(cls)
    vars(made).update(
        (name, value.copy() if isinstance(value, dict) else value)
        for name, value in vars(module).items()
    )
    return made


class LSTM(quantizable.LSTM):
    """A quantizable LSTM; its linear layers, sums and products are native modules."""

    def forward(self, x: Any, hidden: Any = None) -> Any:
        if hidden is None and is_quantized(x):
            quantized = quantize_per_tensor(self._zeros(x), 1.0, 0, x.dtype)
            hidden = [(quantized, quantized)] * self.num_layers
        return super().forward(x, hidden)

    def _zeros(self, x: Any) -> torch.Tensor:
        """The hidden or cell state of each layer before the first step on `x`."""
        sizes = [x.shape[0 if self.batch_first else 1], self.hidden_size]
        if self.bidirectional:
            sizes.insert(0, 2)
        return torch.zeros(sizes, device=x.device)

    def _get_name(self) -> str:
        return "QuantizedLSTM"

    @classmethod
    def from_float(  # type: ignore[override]
        cls, mod: Any, use_precomputed_fake_quant: bool = False
    ) -> Any:
        """What an observed LSTM becomes, once its parts are quantized modules."""
        return in_class(cls, mod)


class MultiheadAttention(quantizable.MultiheadAttention):
    """A quantizable attention; its linear layers are native modules."""

    def _get_name(self) -> str:
        return "QuantizedMultiheadAttention"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed attention becomes, once its parts are quantized modules."""
        made = in_class(cls, mod)
        # The linear layers hold these, and layers around this one look whether there are any.
        made.in_proj_weight = made.in_proj_bias = None
        return made
