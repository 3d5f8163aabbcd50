"""Fully connected layers that quantize their input at each call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...._core.dtypes import QINT8
from ...._native.half_weights import pack_half, unpack_half
from ...._native.ops import dynamic_linear, half_linear
from ...._quantized import calls
from ...._quantized.tensor import check_floating
from ...._torch.private import AttentionLinear
from ... import intrinsic as nni
from ...qat import dynamic as nnqatd
from .weighted import DynamicWeighted, check_weight_dtype


class Linear(DynamicWeighted):
    """`torch.nn.Linear` with an int8 weight, which quantizes its input at each call.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        bias_: whether there is a bias.
        dtype: of the weight: torch.qint8, or torch.int8, which is the same; or torch.float16, with
            which nothing else is quantized.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        AttentionLinear,
        nni.LinearReLU,
        nnqatd.Linear,
    )
    _RELU: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_: bool = True,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__()
        self.weight_dtype = check_weight_dtype(dtype)
        self.in_features = in_features
        self.out_features = out_features
        self._init_weight((out_features, in_features), out_features if bias_ else None)

    @classmethod
    def _like(cls, layer: Any) -> Any:
        return cls(layer.in_features, layer.out_features, layer.bias is not None)

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{super().extra_repr()}"
        )

    def _pack_half(self, weight: Tensor) -> Tensor:
        return pack_half(weight)

    def _unpack_half(self, packed: Tensor) -> Tensor:
        return unpack_half(packed, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        buffers = self._buffers
        if self.weight_dtype == torch.float16:
            return self._floating(x)
        args = (
            buffers["_packed_weight"],
            buffers["weight_scale"],
            buffers["_bias"],
            self.out_features,
        )
        y = calls.dynamic_linear(x, self.in_features, *args, self._RELU, self.reduce_range)
        if y is None:
            self._require_shape(x)
            y = dynamic_linear(x, *args, self._RELU, self.reduce_range)
        return y  # type: ignore[no-any-return]

    def _require_shape(self, x: Any) -> None:
        check_floating(x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._get_name()} takes an input of {self.in_features} features in its last "
                f"dimension, got shape {list(x.shape)}"
            )

    def _floating(self, x: Tensor) -> Tensor:
        """The output with a float16 weight, computed in fp32."""
        self._require_shape(x)
        weight, bias = self._buffers["_packed_weight"], self._buffers["_bias"]
        y = half_linear(x.float(), weight, bias, self.out_features, self._RELU)
        return y.to(x.dtype)  # type: ignore[no-any-return]
