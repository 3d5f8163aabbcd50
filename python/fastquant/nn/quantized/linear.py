"""Fully connected layers on quantized tensors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..._core.dtypes import INT8, QINT8
from ..._core.errors import QuantizationError
from ..._native.ops import quantized_linear
from ..._quantized import calls
from ..._torch.private import AttentionLinear
from ...quantized_tensor import made, parts
from .. import qat as nnqat
from ..intrinsic import qat as nniqat
from .weighted import Weighted


class Linear(Weighted):
    """`torch.nn.Linear` with an int8 weight, from quantized tensors to quantized tensors.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        bias_: whether there is a bias.
        dtype: of the weight: torch.qint8, as torch.ao has it, or torch.int8, which is the same.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        AttentionLinear,
        nnqat.Linear,
        nniqat.LinearBn1d,
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_: bool = True,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__()
        if dtype not in INT8:
            raise QuantizationError(f"dtype must be torch.qint8 or torch.int8, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self._init_weight((out_features, in_features), out_features if bias_ else None)

    @classmethod
    def _like(cls, layer: Any) -> Any:
        return cls(layer.in_features, layer.out_features, layer.bias is not None)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def extra_repr(self) -> str:
        bias = ", bias=False" if self._bias is None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{super().extra_repr()}{bias}"
        )

    def _computed(self, input: Any, dtype: torch.dtype | None = None) -> Any:
        """The output's integers; with a floating dtype, its real values."""
        values, scale, zero_point = parts(input)
        if values.dim() == 0 or values.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._get_name()} takes an input of {self.in_features} features in its last "
                f"dimension, got shape {list(values.shape)}"
            )
        return quantized_linear(
            values, scale, zero_point, *self._arguments(), dtype or values.dtype
        )

    def _arguments(self) -> tuple[Any, ...]:
        """What the op takes between the zero point of its input and the dtype of its output."""
        buffers = self._buffers
        return (
            buffers["_packed_weight"],
            buffers["weight_scale"],
            buffers["_bias"],
            self.out_features,
            self.scale,
            self.zero_point,
            self._LOW,
            self._HIGH,
        )

    def forward(self, x: Any) -> Any:
        output = calls.linear(x, self.in_features, *self._arguments())
        if output is not None:
            return output
        return made(self._computed(x), self.scale, self.zero_point)
