"""QuantizeLinear and DequantizeLinear, and the scale and zero point that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._native.reference.quantized import levels

FOUR_BITS = "fastquant.four_bits"
"""Marks nodes whose integers are to be stored as int4 or uint4, which torch does not have."""


def node(
    op: str,
    inputs: Sequence[Tensor | None],
    shape: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    attributes: Mapping[str, Any] | None = None,
    four_bits: bool = False,
) -> Tensor:
    """The result of an ONNX op, which has this shape and dtype."""
    return torch.onnx.ops.symbolic(
        op,
        inputs,
        dict(attributes or {}),
        dtype=dtype,
        shape=shape,
        metadata_props={FOUR_BITS: "1"} if four_bits else None,
    )


class Grid(nn.Module):
    """The integers that stand for real numbers: their scale, zero point and dtype.

    Args:
        scale: one number, or a tensor of one for each channel.
        zero_point: likewise.
        dtype: of the integers.
        axis: of the channels, if there is a scale for each.
        four_bits: whether the integers fit 4 bits and are to be stored so.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float | Tensor,
        zero_point: int | Tensor,
        dtype: torch.dtype,
        axis: int | None = None,
        four_bits: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.four_bits = dtype, four_bits
        self._attributes = {} if axis is None else {"axis": axis}
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.as_tensor(zero_point).to(dtype))

    def integers(self, x: Tensor) -> Tensor:
        """The nearest integers to real numbers."""
        inputs = (x, self.scale, self.zero_point)
        attributes = (self._attributes, self.four_bits)
        return node("QuantizeLinear", inputs, x.shape, self.dtype, *attributes)

    def real(self, integers: Tensor) -> Tensor:
        """The real numbers that integers stand for."""
        inputs = (integers, self.scale, self.zero_point)
        attributes = (self._attributes, self.four_bits)
        return node("DequantizeLinear", inputs, integers.shape, torch.float32, *attributes)


class Output(Grid):
    """The grid of an op's result, with the bounds of an activation that is fused with the op.

    Runtimes fuse an op with the QuantizeLinear behind it. A bound that the dtype does not have by
    itself is therefore one of integers, behind that, and not of real numbers, before it.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(
        self, scale: float, zero_point: int, low: float, high: float, dtype: torch.dtype
    ) -> None:
        super().__init__(scale, zero_point, dtype)
        limits = torch.iinfo(dtype)
        lowest, highest = levels(low, high, scale, zero_point, dtype)
        self._is_bounded = (lowest, highest) != (limits.min, limits.max)
        if self._is_bounded:
            self.register_buffer("lowest", torch.tensor(lowest, dtype=dtype))
            self.register_buffer("highest", torch.tensor(highest, dtype=dtype))

    def forward(self, y: Tensor) -> Tensor:
        return self.bounded(self.integers(y))

    def bounded(self, integers: Tensor) -> Tensor:
        """Integers of this grid within its bounds."""
        if not self._is_bounded:
            return integers
        return node("Clip", (integers, self.lowest, self.highest), integers.shape, self.dtype)


class RealOutput(nn.Module):
    """The bounds of a result that stays real."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        limit = torch.finfo(torch.float32).max
        self._bounds = low if low > -limit else None, high if high < limit else None

    def forward(self, y: Tensor) -> Tensor:
        return y if self._bounds == (None, None) else y.clamp(*self._bounds)
