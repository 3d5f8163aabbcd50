"""Activations on quantized tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._core.dtypes import is_torch_quantized
from ..._native.ops import quantize, quantized_softmax
from ..._quantized.calls import clamp
from ..._quantized.tables import applied
from ..._quantized.tensor import require_quantized
from ...quantized_tensor import made, parts
from .observed import output_qparams
from .scaled import Scaled


class _Elementwise(Scaled):
    """A function of one value: a table of its 256 results, made once for each input's scale."""

    def _applied(self, function: str, input: Any, *constants: float) -> Any:
        require_quantized(input)
        return applied(function, input, self.scale, self.zero_point, *constants)

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        """What the constructor takes after scale and zero point."""
        return ()

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed module becomes."""
        return cls(*output_qparams(mod), *cls._arguments(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        """What a float module becomes, given the scale and zero point of its output."""
        return cls(float(scale), int(zero_point), *cls._arguments(mod))

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"


class ReLU6(nn.ReLU):
    """`torch.nn.ReLU6` on quantized tensors; scale and zero point stay the input's.

    Args:
        inplace: whether the input's memory becomes the output's.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(inplace)

    def forward(self, input: Any) -> Any:
        require_quantized(input)
        zero_point = input._zero_point
        return clamp(input, zero_point, round(6.0 / input._scale) + zero_point, self.inplace)

    def _get_name(self) -> str:
        return "QuantizedReLU6"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> ReLU6:
        """What a ReLU6 becomes."""
        return cls(mod.inplace)


class Hardswish(_Elementwise, nn.Hardswish):
    """`torch.nn.Hardswish` on quantized tensors.

    Args:
        scale: of the output.
        zero_point: of the output.
        device: accepted as torch.ao accepts it; nothing here depends on it.
        dtype: likewise.
    """

    def __init__(
        self, scale: float, zero_point: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self._set_qparams(scale, zero_point)

    def forward(self, input: Any) -> Any:
        return self._applied("hardswish", input)


class ELU(_Elementwise, nn.ELU):
    """`torch.nn.ELU` on quantized tensors.

    Args:
        scale: of the output.
        zero_point: of the output.
        alpha: as `torch.nn.ELU` has it.
    """

    def __init__(self, scale: float, zero_point: int, alpha: float = 1.0) -> None:
        super().__init__(alpha)
        self._set_qparams(scale, zero_point)

    def forward(self, input: Any) -> Any:
        return self._applied("elu", input, self.alpha)

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        return (mod.alpha,)


class LeakyReLU(_Elementwise, nn.LeakyReLU):
    """`torch.nn.LeakyReLU` on quantized tensors.

    Args:
        scale: of the output.
        zero_point: of the output.
        negative_slope: as `torch.nn.LeakyReLU` has it.
        inplace: accepted as torch.ao accepts it; the output has memory of its own.
        device: likewise; nothing here depends on it.
        dtype: likewise.
    """

    def __init__(
        self,
        scale: float,
        zero_point: int,
        negative_slope: float = 1e-2,
        inplace: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(negative_slope, inplace)
        self._set_qparams(scale, zero_point)

    def forward(self, input: Any) -> Any:
        return self._applied("leaky_relu", input, self.negative_slope)

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        return mod.negative_slope, mod.inplace


class Sigmoid(_Elementwise, nn.Sigmoid):
    """`torch.nn.Sigmoid` on quantized tensors.

    Args:
        output_scale: of the output.
        output_zero_point: of the output.
    """

    def __init__(self, output_scale: float, output_zero_point: int) -> None:
        super().__init__()
        self._set_qparams(output_scale, output_zero_point)

    @property
    def output_scale(self) -> float:
        """`scale`, by torch.ao's name for it here."""
        return self.scale

    @property
    def output_zero_point(self) -> int:
        """`zero_point`, by torch.ao's name for it here."""
        return self.zero_point

    def forward(self, input: Any) -> Any:
        return self._applied("sigmoid", input)


class PReLU(_Elementwise):
    """`torch.nn.PReLU` on quantized tensors; its slopes stay floating.

    Args:
        output_scale: of the output.
        output_zero_point: of the output.
        num_parameters: 1, or the number of channels of the input.
    """

    weight: Tensor

    def __init__(
        self, output_scale: float, output_zero_point: int, num_parameters: int = 1
    ) -> None:
        super().__init__()
        self._set_qparams(output_scale, output_zero_point)
        self.num_parameters = num_parameters
        self.register_buffer("weight", torch.zeros(num_parameters))

    def set_weight(self, w: Tensor) -> None:
        """Set the slopes, floating or quantized."""
        slopes = w.dequantize() if is_torch_quantized(w) else w.detach()
        self.weight = slopes.to(torch.float32, copy=True).reshape(self.num_parameters)

    def forward(self, input: Any) -> Any:
        if self.num_parameters == 1 and not torch.compiler.is_compiling():
            return self._applied("leaky_relu", input, float(self.weight))
        y = F.prelu(input.dequantize(), self.weight)
        values = quantize(y, self.scale, self.zero_point, parts(input)[0].dtype, True)
        return made(values, self.scale, self.zero_point)

    @classmethod
    def _arguments(cls, mod: Any) -> tuple[Any, ...]:
        return (mod.num_parameters,)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed PReLU becomes."""
        made_of = super().from_float(mod)
        made_of.set_weight(mod.weight)
        return made_of

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        """What a float PReLU becomes, given the scale and zero point of its output."""
        made_of = super().from_reference(mod, scale, zero_point)
        made_of.set_weight(mod.weight)
        return made_of


class Softmax(Scaled, nn.Softmax):
    """`torch.nn.Softmax` on quantized tensors.

    Args:
        dim: along which the results sum to 1.
        scale: of the output.
        zero_point: of the output.
    """

    def __init__(self, dim: int | None = None, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__(dim)
        self._set_qparams(scale, zero_point)

    def _get_name(self) -> str:
        return "QuantizedSoftmax"

    def forward(self, input: Any) -> Any:
        values, scale, _ = parts(input)
        dim = self.dim
        if dim is None:
            dim = 0 if values.dim() in (0, 1, 3) else 1
            warnings.warn(f"Softmax without a dim is deprecated; it took {dim}", stacklevel=2)
        y = quantized_softmax(values, scale, dim, self.scale, self.zero_point)
        return made(y, self.scale, self.zero_point)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Softmax:
        """What an observed Softmax becomes."""
        return cls(mod.dim, *output_qparams(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Softmax:
        """What a float Softmax becomes, given the scale and zero point of its output."""
        return cls(mod.dim, float(scale), int(zero_point))
