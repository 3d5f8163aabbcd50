"""Convolutions on quantized tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._core.errors import QuantizationError
from ..._native.ops import quantized_conv, quantized_conv_transpose
from ..._quantized import calls
from ...quantized_tensor import made, parts
from .. import qat as nnqat
from ..intrinsic import qat as nniqat
from .weighted import PackedWeight, Weighted

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_SHAPES = {1: "(N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}


def _tuple(name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """One integer for each dimension, of one or of several."""
    given = value if isinstance(value, Iterable) else repeat(value, dims)
    try:
        values = tuple(operator.index(v) for v in given)  # also numpy's integers
    except TypeError:
        values = ()
    if len(values) != dims or any(v < least for v in values):
        raise QuantizationError(
            f"{name} must be an integer of at least {least}, or {dims} of them, got {value!r}"
        )
    return values


class ConvGeometry(PackedWeight):
    """What all convolutions share; `_DIMS` is the number of their spatial dimensions."""

    _DIMS: ClassVar[int]

    def _init(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        output_padding: Any,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
    ) -> None:
        nn.Module.__init__(self)
        dims = self._DIMS
        if groups < 1 or in_channels < 1 or out_channels < 1:
            raise QuantizationError(
                "in_channels, out_channels and groups must be at least 1, got "
                f"{in_channels}, {out_channels} and {groups}"
            )
        if in_channels % groups or out_channels % groups:
            raise QuantizationError(
                "in_channels and out_channels must be divisible by groups, got "
                f"{in_channels}, {out_channels} and {groups}"
            )
        if padding_mode not in (("zeros",) if self._TRANSPOSED else _PADDING_MODES):
            raise QuantizationError(
                f"padding_mode must be one of {', '.join(map(repr, _PADDING_MODES))} "
                f"('zeros' where transposed), got {padding_mode!r}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _tuple("kernel_size", kernel_size, dims, 1)
        self.stride = _tuple("stride", stride, dims, 1)
        self.dilation = _tuple("dilation", dilation, dims, 1)
        self.output_padding = _tuple("output_padding", output_padding, dims, 0)
        self.padding = padding if isinstance(padding, str) else _tuple("padding", padding, dims, 0)
        self.transposed = self._TRANSPOSED
        self.groups = groups
        self.padding_mode = padding_mode
        self._set_padding()
        channels = (out_channels, in_channels)
        first, second = reversed(channels) if self.transposed else channels
        shape = (first, second // groups, *self.kernel_size)
        self._init_weight(shape, out_channels if bias else None, device)

    def _set_padding(self) -> None:
        """Decide what the kernel pads, and what is padded before it is called.

        A kernel pads with zeros, and by the same number on both sides.
        """
        if isinstance(self.padding, tuple):
            sides = [(p, p) for p in self.padding]
        else:
            if self.padding not in ("same", "valid"):
                raise QuantizationError(
                    f"padding must be integers, 'same' or 'valid', got {self.padding!r}"
                )
            if self.padding == "same" and any(step != 1 for step in self.stride):
                raise QuantizationError(f"padding='same' needs stride 1, got {self.stride}")
            totals = [
                d * (k - 1) if self.padding == "same" else 0
                for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
            sides = [(total // 2, total - total // 2) for total in totals]
        uneven = any(before != after for before, after in sides)
        before_call = self.padding_mode != "zeros" or uneven
        # As F.pad takes it: the last dimension first.
        self._padded_before = [n for pair in reversed(sides) for n in pair] if before_call else None
        self._padded_by_kernel = [0 if before_call else before for before, _ in sides]

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if inherited := super().extra_repr():
            text += f", {inherited}"
        for name, usual in (("padding", 0), ("dilation", 1), ("output_padding", 0)):
            value = getattr(self, name)
            if value != (usual,) * self._DIMS:
                text += f", {name}={value!r}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self._bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def _require_shape(self, values: Tensor) -> None:
        if values.dim() != self._DIMS + 2 or values.shape[1] != self.in_channels:
            raise ValueError(
                f"{self._get_name()} takes an input of shape {_SHAPES[self._DIMS]} with "
                f"C = {self.in_channels}, got shape {list(values.shape)}"
            )


def padded(values: Tensor, sides: list[int], mode: str, zero_point: int) -> Tensor:
    if mode == "zeros":
        return F.pad(values, sides, value=zero_point)
    return F.pad(values, sides, mode=mode)


class OrdinaryGeometry(ConvGeometry):
    """What convolutions share that are not transposed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self._init(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, 0, groups, bias),
            *(padding_mode, device),
        )

    @classmethod
    def _like(cls, layer: Any) -> Any:
        return cls(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
            *(layer.padding, layer.dilation, layer.groups, layer.bias is not None),
            layer.padding_mode,
            device=layer.weight.device,
        )


class _ConvNd(OrdinaryGeometry, Weighted):
    def _computed(self, input: Any, dtype: torch.dtype | None = None) -> Any:
        """The output's integers; with a floating dtype, its real values."""
        values, scale, zero_point = parts(input)
        if values.dim() != self._DIMS + 2 or values.shape[1] != self.in_channels:
            self._require_shape(values)
        if self._padded_before is not None:
            values = padded(values, self._padded_before, self.padding_mode, zero_point)
        return quantized_conv(values, scale, zero_point, *self._arguments(), dtype or values.dtype)

    def _arguments(self) -> tuple[Any, ...]:
        """What the op takes between the zero point of its input and the dtype of its output."""
        buffers = self._buffers
        return (
            buffers["_packed_weight"],
            buffers["weight_scale"],
            buffers["_bias"],
            self._weight_shape,
            self.stride,
            self._padded_by_kernel,
            self.dilation,
            self.groups,
            self.scale,
            self.zero_point,
            self._LOW,
            self._HIGH,
        )

    def forward(self, input: Any) -> Any:
        if self._padded_before is None:
            output = calls.conv(input, *self._arguments())
            if output is not None:
                return output
        return made(self._computed(input), self.scale, self.zero_point)


class Conv1d(_ConvNd):
    """`torch.nn.Conv1d` with an int8 weight, from quantized tensors to quantized tensors.

    The input is `[N, in_channels, L]`. Arguments are those of torch.nn, every
    `padding_mode` included.
    """

    _DIMS = 1
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nniqat.ConvBn1d)


class Conv2d(_ConvNd):
    """`torch.nn.Conv2d` with an int8 weight, from quantized tensors to quantized tensors.

    The input is `[N, in_channels, H, W]`. Arguments are those of torch.nn, every
    `padding_mode` included.
    """

    _DIMS = 2
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Conv2d,
        nnqat.Conv2d,
        nniqat.ConvBn2d,
    )


class Conv3d(_ConvNd):
    """`torch.nn.Conv3d` with an int8 weight, from quantized tensors to quantized tensors.

    The input is `[N, in_channels, D, H, W]`. Arguments are those of torch.nn, every
    `padding_mode` included.
    """

    _DIMS = 3
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Conv3d,
        nnqat.Conv3d,
        nniqat.ConvBn3d,
    )


class TransposedGeometry(ConvGeometry):
    """What transposed convolutions share."""

    _TRANSPOSED = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self._init(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, output_padding),
            *(groups, bias, padding_mode, device),
        )

    @classmethod
    def _like(cls, layer: Any) -> Any:
        return cls(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
            *(layer.padding, layer.output_padding, layer.groups, layer.bias is not None),
            *(layer.dilation, layer.padding_mode),
            device=layer.weight.device,
        )


class _ConvTranspose(TransposedGeometry, Weighted):
    def forward(self, input: Any) -> Any:
        buffers = self._buffers
        args = (
            buffers["_packed_weight"],
            buffers["weight_scale"],
            buffers["_bias"],
            self._weight_shape,
            self.stride,
            self.padding,
            self.output_padding,
            self.dilation,
            self.groups,
            self.scale,
            self.zero_point,
            self._LOW,
            self._HIGH,
        )
        output = calls.conv_transpose(input, *args)
        if output is not None:
            return output
        values, scale, zero_point = parts(input)
        self._require_shape(values)
        values = quantized_conv_transpose(values, scale, zero_point, *args, values.dtype)
        return made(values, self.scale, self.zero_point)


class ConvTranspose1d(_ConvTranspose):
    """`torch.nn.ConvTranspose1d` with an int8 weight, on quantized tensors.

    The input is `[N, in_channels, L]`. Arguments are those of torch.nn.
    """

    _DIMS = 1
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d,)


class ConvTranspose2d(_ConvTranspose):
    """`torch.nn.ConvTranspose2d` with an int8 weight, on quantized tensors.

    The input is `[N, in_channels, H, W]`. Arguments are those of torch.nn.
    """

    _DIMS = 2
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose2d,)


class ConvTranspose3d(_ConvTranspose):
    """`torch.nn.ConvTranspose3d` with an int8 weight, on quantized tensors.

    The input is `[N, in_channels, D, H, W]`. Arguments are those of torch.nn.
    """

    _DIMS = 3
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose3d,)
