"""Sums, products and concatenations of quantized tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..._core.errors import QuantizationError
from ..._native.ops import lookup
from ..._quantized.calls import UNBOUNDED, add, cat, mul
from ...quantized_tensor import made, parts
from ..float_functional import FloatFunctional
from .observed import output_qparams
from .scaled import Scaled

__all__ = ["QFunctional"]


class QFunctional(Scaled):
    """What a FloatFunctional becomes: its operations on quantized tensors.

    `add`, `add_relu`, `mul`, `mul_relu`, `cat` and `cat_relu` give the module's scale and zero
    point. Those with a number (`add_scalar`, `mul_scalar`, …) give the input's, moved or scaled,
    as torch.ao's do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.zero_point = 1.0, 0

    def _get_name(self) -> str:
        return "QFunctional"

    def forward(self, x: Any) -> NoReturn:
        raise RuntimeError(
            "QFunctional has no forward: call one of its operations, such as add or cat"
        )

    def add(self, x: Any, y: Any) -> Any:
        """x + y"""
        return add(x, y, self.scale, self.zero_point, -UNBOUNDED, UNBOUNDED)

    def add_relu(self, x: Any, y: Any) -> Any:
        """relu(x + y)"""
        return add(x, y, self.scale, self.zero_point, 0.0, UNBOUNDED)

    def mul(self, x: Any, y: Any) -> Any:
        """x * y"""
        return mul(x, y, self.scale, self.zero_point, -UNBOUNDED, UNBOUNDED)

    def mul_relu(self, x: Any, y: Any) -> Any:
        """relu(x * y)"""
        return mul(x, y, self.scale, self.zero_point, 0.0, UNBOUNDED)

    def _concatenated(self, x: Sequence[Any], dim: int, low: float) -> Any:
        if not x:
            raise QuantizationError("cat needs at least one tensor, got none")
        return cat(x, dim, self.scale, self.zero_point, low, UNBOUNDED)

    def cat(self, x: Sequence[Any], dim: int = 0) -> Any:
        """torch.cat(x, dim)"""
        return self._concatenated(x, dim, -UNBOUNDED)

    def cat_relu(self, x: Sequence[Any], dim: int = 0) -> Any:
        """relu(torch.cat(x, dim))"""
        return self._concatenated(x, dim, 0.0)

    def add_scalar(self, x: Any, y: float) -> Any:
        """x + y: the zero point moves, and where it would leave its dtype, the scale grows."""
        return _plus(*parts(x, "x"), _finite(y))

    def add_scalar_relu(self, x: Any, y: float) -> Any:
        """relu(x + y)"""
        return _relu(*parts(_plus(*parts(x, "x"), _finite(y))))

    def mul_scalar(self, x: Any, y: float) -> Any:
        """x * y: the scale is multiplied, and the integers are reversed where y is negative."""
        return _times(*parts(x, "x"), _finite(y))

    def mul_scalar_relu(self, x: Any, y: float) -> Any:
        """relu(x * y)"""
        return _relu(*parts(_times(*parts(x, "x"), _finite(y))))

    def matmul(self, x: Any, y: Any) -> NoReturn:
        """Refused: there is no kernel for it."""
        raise NotImplementedError(
            "QFunctional.matmul has no quantized kernel: dequantize both tensors, multiply them "
            "with torch.matmul, and quantize the product"
        )

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> QFunctional:
        """What an observed FloatFunctional becomes."""
        if type(mod) is not FloatFunctional:
            raise TypeError(
                f"QFunctional.from_float takes a FloatFunctional, got {type(mod).__name__}"
            )
        made_of = cls()
        made_of._set_qparams(*output_qparams(mod))
        return made_of


def _finite(y: Any) -> float:
    number = float(y)
    if not math.isfinite(number):
        raise ValueError(f"y must be finite, since no scale would fit the result; got {number}")
    return number


def moved_qparams(
    scale: float, zero_point: int, number: float, dtype: torch.dtype
) -> tuple[float, int]:
    """Scale and zero point of x + number, from those of x: the zero point moves.

    Where it would leave its dtype, the scale grows: the range has 0 in it.
    """
    limits = torch.iinfo(dtype)
    moved = zero_point - round(number / scale)
    if limits.min <= moved <= limits.max:
        return scale, moved
    nearest = limits.min if moved < limits.min else limits.max
    farthest = limits.max if moved < limits.min else limits.min
    return scale * abs(farthest - moved) / (limits.max - limits.min), nearest


def multiplied_qparams(
    scale: float, zero_point: int, number: float, dtype: torch.dtype
) -> tuple[float, int]:
    """Scale and zero point of x * number, from those of x."""
    if number == 0:
        return 1.0, 0
    limits = torch.iinfo(dtype)
    # Where the number is negative, q becomes limits.max + limits.min - q.
    return scale * abs(number), zero_point if number > 0 else limits.max + limits.min - zero_point


def _plus(values: Tensor, scale: float, zero_point: int, number: float) -> Any:
    new_scale, new_zero_point = moved_qparams(scale, zero_point, number, values.dtype)
    if new_scale == scale:
        return made(values, scale, new_zero_point)
    limits = torch.iinfo(values.dtype)
    moved = zero_point - round(number / scale)
    integers = torch.arange(256, dtype=torch.uint8, device=values.device).view(values.dtype)
    sums = (integers.to(torch.float64) - float(moved)) * (scale / new_scale)
    table = (sums.round() + new_zero_point).clamp(limits.min, limits.max).to(values.dtype)
    return made(lookup(values, table), new_scale, new_zero_point)


def _times(values: Tensor, scale: float, zero_point: int, number: float) -> Any:
    qparams = multiplied_qparams(scale, zero_point, number, values.dtype)
    if number == 0:
        return made(torch.zeros_like(values), *qparams)
    return made(values if number > 0 else ~values, *qparams)


def _relu(values: Tensor, scale: float, zero_point: int) -> Any:
    return made(values.clamp(min=zero_point), scale, zero_point)
