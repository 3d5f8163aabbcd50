"""Linear layers fused with an activation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...._core.dtypes import QINT8
from ...._native.ops import quantize
from ....quantized_tensor import made, parts
from ... import intrinsic as nni
from ...quantized import Linear
from .. import qat as nniqat


class _FusedLinear(Linear):
    """`Linear` with torch.ao's name for the argument that fused layers call `bias`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)


class LinearReLU(_FusedLinear):
    """`Linear` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.LinearReLU, nniqat.LinearReLU)


class _LinearActivation(_FusedLinear):
    """A function of the layer's real result, which is then quantized."""

    def _activated(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Any) -> Any:
        dtype = parts(x)[0].dtype
        y = self._activated(self._computed(x, torch.float32))
        return made(
            quantize(y, self.scale, self.zero_point, dtype, False), self.scale, self.zero_point
        )


class LinearLeakyReLU(_LinearActivation):
    """`Linear` followed by LeakyReLU.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        negative_slope: as `torch.nn.LeakyReLU` has it.
        bias: whether there is a bias.
        dtype: of the weight.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.LinearLeakyReLU,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        negative_slope: float,
        bias: bool = True,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.negative_slope = negative_slope

    @classmethod
    def _like(cls, layer: Any) -> Any:
        # The slope is the other part's, which `from_float` and `from_reference` take over.
        return cls(layer.in_features, layer.out_features, 0.01, layer.bias is not None)

    def _activated(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, self.negative_slope, inplace=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        made_of = super().from_float(mod, use_precomputed_fake_quant)
        made_of.negative_slope = mod[1].negative_slope
        return made_of

    @classmethod
    def from_reference(cls, ref_module: Any, output_scale: float, output_zero_point: int) -> Any:
        made_of = super().from_reference(ref_module, output_scale, output_zero_point)
        made_of.negative_slope = ref_module[1].negative_slope
        return made_of


class LinearTanh(_LinearActivation):
    """`Linear` followed by tanh."""

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.LinearTanh,)

    def _activated(self, y: Tensor) -> Tensor:
        return y.tanh_()
