"""Weights of reference modules: floating, with the scale and zero point that quantize them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...._core.dtypes import QUINT8, RANGES, UINT4, plain_dtype
from ...._core.errors import QuantizationError
from ...._native.ops import quantize
from ....quantized_tensor import PerChannelQuantizedTensor, made

PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)

# What a module has that is told nothing about its weight.
UNKNOWN: Mapping[str, Any] = {
    "qscheme": torch.per_tensor_affine,
    "dtype": QUINT8,
    "scale": 1.0,
    "zero_point": 0,
}

# Scale and zero point of a weight that stays floating.
_NONE = torch.empty(0)


class Grid(NamedTuple):
    """The values that a quantized weight can have.

    Attributes:
        qscheme: None for a weight that stays floating.
        dtype: of the integers, or a floating one.
        scale, zero_point: tensors, of one element or one for each channel.
        axis: of the channels.
        limits: the least and the largest integer, where not all of the dtype's are used.
        is_decomposed: whether quantized weights are plain integers.
    """

    qscheme: torch.qscheme | None
    dtype: torch.dtype
    scale: Tensor
    zero_point: Tensor
    axis: int
    limits: tuple[int, int] | None
    is_decomposed: bool

    def _along_channels(self, tensor: Tensor, dims: int) -> Tensor:
        shape = [1] * dims
        if self.qscheme in PER_CHANNEL:
            shape[self.axis] = -1
        return tensor.reshape(shape)

    def integers(self, weight: Tensor) -> Tensor:
        """The weight's integers, as torch's quantized tensors have them."""
        if self.dtype not in RANGES:
            raise QuantizationError(f"there are no weights of {self.dtype} and {self.qscheme}")
        dtype = torch.uint8 if self.dtype in UINT4 else plain_dtype(self.dtype)
        is_of_bytes = dtype in (torch.uint8, torch.int8) and self.dtype not in UINT4
        if self.qscheme not in PER_CHANNEL and is_of_bytes and not self.is_decomposed:
            values: Tensor = quantize(
                weight.contiguous(), float(self.scale), int(self.zero_point), dtype, False
            )
            return values
        scale, zero_point = (
            self._along_channels(t, weight.dim()) for t in (self.scale, self.zero_point)
        )
        levels = weight * (1.0 / scale)
        if self.is_decomposed:
            levels = levels.round() + zero_point
        else:  # as torch's quantized tensors have it: a tie goes to the even sum
            levels = (levels + zero_point).round()
        return levels.clamp(*(self.limits or RANGES[self.dtype])).to(dtype)

    def values(self, weight: Tensor) -> Tensor:
        """The weight as its integers have it."""
        if self.qscheme is None:
            return weight
        scale, zero_point = (
            self._along_channels(t, weight.dim()) for t in (self.scale, self.zero_point)
        )
        integers = self.integers(weight)
        # As fp32 holds them: integers of 32 bits would lose their last ones.
        difference = integers.to(torch.int64) - zero_point
        return difference.to(torch.float32) * scale

    def quantized(self, weight: Tensor) -> Any:
        """The weight as a quantized tensor of this package.

        Its integers where there is none, which is so for other than 8 bits and for zero points that
        are no integers, and where it is decomposed. For a floating dtype, the weight in that.
        """
        if self.dtype.is_floating_point:
            return weight.to(self.dtype)
        integers = self.integers(weight)
        if (
            self.is_decomposed
            or self.zero_point.is_floating_point()
            or integers.dtype not in (torch.uint8, torch.int8)
            or self.dtype in UINT4
        ):
            return integers
        if self.qscheme in PER_CHANNEL:
            return PerChannelQuantizedTensor(integers, self.scale, self.zero_point, self.axis)
        return made(integers, float(self.scale), int(self.zero_point))


def add_grid(
    module: nn.Module, name: str, qparams: Mapping[str, Any], device: Any, *, always: bool
) -> None:
    """Give a module the attributes and buffers of one weight's grid.

    Args:
        module: gets `<name>_qscheme`, `<name>_dtype` and so on.
        name: of the weight.
        qparams: as `fastquant.utils.get_qparam_dict` returns them.
        device: of the buffers.
        always: have buffers also where the weight stays floating.
    """
    qscheme, dtype = qparams["qscheme"], qparams["dtype"]
    if qscheme not in (None, torch.per_tensor_affine, *PER_CHANNEL):
        raise QuantizationError(
            f"qscheme of {name} must be None, torch.per_tensor_affine, torch.per_channel_affine or "
            f"torch.per_channel_affine_float_qparams, got {qscheme}"
        )
    setattr(module, f"{name}_qscheme", qscheme)
    setattr(module, f"{name}_dtype", dtype)
    is_quantized = dtype in RANGES
    if qscheme is None and not always:
        return
    given = qparams if is_quantized else UNKNOWN
    axis = given["axis"] if is_quantized and qscheme in PER_CHANNEL else 0
    for what, value, kind in (
        ("scale", given["scale"], torch.float),
        ("zero_point", given["zero_point"], torch.int),
        ("axis", axis, torch.int),
    ):
        tensor = (
            value.detach().clone()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=kind, device=device)
        )
        module.register_buffer(f"{name}_{what}", tensor)
    setattr(module, f"{name}_axis_int", int(axis))


def grid_of(module: Any, name: str) -> Grid:
    """The grid of a module's weight."""
    low = getattr(module, f"{name}_quant_min", None)
    high = getattr(module, f"{name}_quant_max", None)
    return Grid(
        qscheme=getattr(module, f"{name}_qscheme"),
        dtype=getattr(module, f"{name}_dtype"),
        scale=getattr(module, f"{name}_scale", _NONE),
        zero_point=getattr(module, f"{name}_zero_point", _NONE),
        axis=getattr(module, f"{name}_axis_int", 0),
        limits=None if low is None or high is None else (low, high),
        is_decomposed=module.is_decomposed,
    )
