"""Linear layers and convolutions: an int8 weight, an int32 bias, and the ONNX op between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._native.half_weights import unpack_half
from .._native.ops import unpack_weight
from .grids import Grid, Output, RealOutput, node

_LARGEST = 2**31 - 1
_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def with_integer_bias(
    values: Tensor, scales: Tensor, bias: Tensor, x_scale: float, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A weight's int8 values and scales, and the bias as int32 in units of `scales * x_scale`.

    Runtimes that compute in integers add the bias to the sums of products. Where a channel's scale
    is so small that its bias is beyond int32, the channel gets a larger one, if its weights are
    worth little beside that bias: as they are in channels that training has switched off.

    Args:
        values: int8, the output channels first.
        scales: one, or one for each channel.
        bias: floating.
        x_scale: of the layer's input.
        scale: of its output.

    Returns:
        None if the output would differ from that of the floating bias by half a step or more.
    """
    old = scales.to(torch.float64).expand(len(bias))
    rows = values.reshape(len(bias), -1).to(torch.float64)
    largest_sum = rows.abs().sum(1) * 255
    least = bias.abs().to(torch.float64) / (x_scale * (_LARGEST - largest_sum).clamp(min=1.0))
    new = old
    if (least > old).any():
        new = torch.maximum(old, least).to(torch.float32).to(torch.float64) * (1 + 2**-20)
        scaled = (rows * (old / new)[:, None]).round()
        moved = (rows * old[:, None] - scaled * new[:, None]).abs().sum(1) * 255 * x_scale
        if (moved > scale / 4).any():
            return None
        values, scales = scaled.to(torch.int8).reshape(values.shape), new.to(torch.float32)
        new = scales.to(torch.float64)
    unit = new * x_scale
    if (unit >= scale).any():
        return None
    return values, scales, (bias.to(torch.float64) / unit).round().to(torch.int32)


class _Layer(nn.Module):
    """A layer between the integers of its input and those, or the real numbers, of its output.

    Its arguments are the op's, by name, but for x, which is a tensor of its input's shape and
    dtype, and `four_bits`: whether a weight that fits is to be stored as int4.
    """

    values: Tensor
    bias: Tensor | None

    def __init__(
        self,
        x: Tensor,
        values: Tensor,
        four_bits: bool,
        x_scale: float,
        x_zero_point: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        low: float,
        high: float,
        dtype: torch.dtype,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.x = Grid(x_scale, x_zero_point, x.dtype)
        self.y: nn.Module
        fitting = None
        if dtype.is_floating_point:
            self.y = RealOutput(low, high)
        else:
            self.y = Output(scale, zero_point, low, high, dtype)
            if bias is not None and axis == 0:
                fitting = with_integer_bias(values, weight_scale, bias, x_scale, scale)
        if fitting is not None:
            values, weight_scale, bias = fitting
        self.register_buffer("values", values)
        self.register_buffer("bias", bias)
        fits = four_bits and int(values.min()) >= -8 and int(values.max()) <= 7
        self.weight_grid = _grid(weight_scale, torch.int8, axis, fits)
        self.bias_grid = None
        if fitting is not None:
            unit = weight_scale.to(torch.float64) * x_scale
            self.bias_grid = _grid(unit, torch.int32, 0, False)

    def real_weight(self) -> Tensor:
        return self.weight_grid.real(self.values)

    def real_bias(self) -> Tensor | None:
        if self.bias is None or self.bias_grid is None:
            return self.bias
        return self.bias_grid.real(self.bias)


def _grid(scales: Tensor, dtype: torch.dtype, axis: int, four_bits: bool) -> Grid:
    if scales.numel() == 1:
        return Grid(scales.reshape(()), 0, dtype, None, four_bits)
    return Grid(scales, torch.zeros(scales.shape, dtype=dtype), dtype, axis, four_bits)


class Conv(_Layer):
    """The op `quantized_conv`."""

    def __init__(
        self,
        x: Tensor,
        *,
        packed_weight: Tensor,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        **others: Any,
    ) -> None:
        super().__init__(x, unpack_weight(packed_weight, weight_shape, groups, False), **others)
        self._arguments = (stride, padding, dilation, groups)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.real_weight(), self.real_bias()
        conv = _CONVOLUTIONS[x.dim() - 2]
        y: Tensor = self.y(conv(self.x.real(x), weight, bias, *self._arguments))
        return y


class ConvTranspose(_Layer):
    """The op `quantized_conv_transpose`, for which runtimes have float kernels only."""

    channel_scale: Tensor

    def __init__(
        self,
        x: Tensor,
        *,
        packed_weight: Tensor,
        weight_scale: Tensor,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        **others: Any,
    ) -> None:
        weight = unpack_weight(packed_weight, weight_shape, groups, True)
        # DequantizeLinear has a scale for each index along an axis: here, one for a channel of each
        # group.
        scales_outputs = weight_scale.numel() == groups * weight_shape[1] > weight_shape[1]
        scale = torch.ones(1) if scales_outputs else weight_scale
        super().__init__(x, weight, weight_scale=scale, axis=1, **others)
        self._scales_outputs = scales_outputs
        if scales_outputs:
            ones = [1] * (weight.dim() - 2)
            self.register_buffer("channel_scale", weight_scale.reshape(-1, *ones))
        self._arguments = (stride, padding, output_padding, groups, dilation)

    def forward(self, x: Tensor) -> Tensor:
        conv = _TRANSPOSED[x.dim() - 2]
        bias = None if self._scales_outputs else self.bias
        y = conv(self.x.real(x), self.real_weight(), bias, *self._arguments)
        if self._scales_outputs:
            y = y * self.channel_scale
            if self.bias is not None:
                y = y + self.bias.reshape(self.channel_scale.shape)
        result: Tensor = self.y(y)
        return result


class Linear(_Layer):
    """The op `quantized_linear`."""

    def __init__(
        self, x: Tensor, *, packed_weight: Tensor, out_features: int, **others: Any
    ) -> None:
        shape = (out_features, x.shape[-1])
        super().__init__(x, unpack_weight(packed_weight, shape, 1, False), **others)

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs = self.values.shape
        # Gemm, which has a bias and is what runtimes fuse, takes matrices.
        rows = x if x.dim() == 2 else x.reshape(-1, inputs)
        operands = (self.x.real(rows), self.real_weight(), self.real_bias())
        y: Tensor = self.y(
            node("Gemm", operands, (rows.shape[0], outputs), attributes={"transB": 1})
        )
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], outputs)


class DynamicLinear(nn.Module):
    """The op `dynamic_linear`, whose input gets a scale at each call: one of all 8 bits."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        x: Tensor,
        packed_weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        relu: bool,
        reduce_range: bool,
    ) -> None:
        super().__init__()
        weight = unpack_weight(packed_weight, (out_features, x.shape[-1]), 1, False)
        self.register_buffer("values", weight.t().contiguous())
        self.register_buffer("scale", weight_scale)
        self.register_buffer("bias", bias)
        self._relu = relu

    def forward(self, x: Tensor) -> Tensor:
        integers, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x.to(torch.float32),),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, (), ()),
        )
        shape = (*x.shape[:-1], self.values.shape[1])
        sums = node("MatMulInteger", (integers, self.values, zero_point), shape, torch.int32)
        y = sums.to(torch.float32) * (scale * self.scale)
        if self.bias is not None:
            y = y + self.bias
        return (y.relu() if self._relu else y).to(x.dtype)


class HalfLinear(nn.Module):
    """A linear layer whose weight is stored as float16, and widened where it is used."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, x: Tensor, packed_weight: Tensor, bias: Tensor | None, out_features: int, relu: bool
    ) -> None:
        super().__init__()
        self.register_buffer("weight", unpack_half(packed_weight, out_features))
        self.register_buffer("bias", bias)
        self._relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.float(), self.bias)
        return y.relu() if self._relu else y
