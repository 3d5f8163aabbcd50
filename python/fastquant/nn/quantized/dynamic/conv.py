"""Convolutions that quantize their input at each call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...._core.errors import QuantizationError
from ...._native.ops import dynamic_conv, dynamic_conv_transpose
from ...._quantized.tensor import check_floating
from ..conv import ConvGeometry, OrdinaryGeometry, TransposedGeometry, padded
from .weighted import DynamicWeighted


class _DynamicConv(ConvGeometry, DynamicWeighted):
    """What these convolutions share.

    Unlike torch.ao's, which quantize their output to the scale of their input, they return what
    they compute.
    """

    def __init__(self, *args: Any, reduce_range: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduce_range = reduce_range

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def take(self, weight: Tensor, bias: Tensor | None, observer: Any) -> None:
        if observer.dtype == torch.float16:
            raise QuantizationError("weights of convolutions must be int8, got float16")
        super().take(weight, bias, observer)

    def _weights(self, input: Tensor) -> tuple[Any, ...]:
        """Packed weight, scales, bias and shape, for an input of the right shape."""
        check_floating(input)
        self._require_shape(input)
        buffers = self._buffers
        names = ("_packed_weight", "weight_scale", "_bias")
        return *(buffers[name] for name in names), self._weight_shape


class _Conv(_DynamicConv, OrdinaryGeometry):
    def forward(self, input: Tensor, reduce_range: bool | None = None) -> Tensor:
        weights = self._weights(input)
        if self._padded_before is not None:
            input = padded(input, self._padded_before, self.padding_mode, 0)
        geometry = (self.stride, self._padded_by_kernel, self.dilation, self.groups)
        reduced = self.reduce_range if reduce_range is None else reduce_range
        return dynamic_conv(input, *weights, *geometry, reduced)  # type: ignore[no-any-return]


class _ConvTranspose(_DynamicConv, TransposedGeometry):
    def forward(self, input: Tensor, reduce_range: bool | None = None) -> Tensor:
        weights = self._weights(input)
        geometry = (self.stride, self.padding, self.output_padding, self.dilation, self.groups)
        reduced = self.reduce_range if reduce_range is None else reduce_range
        return dynamic_conv_transpose(input, *weights, *geometry, reduced)  # type: ignore[no-any-return]


class Conv1d(_Conv):
    """`torch.nn.Conv1d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 1
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d,)


class Conv2d(_Conv):
    """`torch.nn.Conv2d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 2
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)


class Conv3d(_Conv):
    """`torch.nn.Conv3d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 3
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv3d,)


class ConvTranspose1d(_ConvTranspose):
    """`torch.nn.ConvTranspose1d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 1
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d,)


class ConvTranspose2d(_ConvTranspose):
    """`torch.nn.ConvTranspose2d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 2
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose2d,)


class ConvTranspose3d(_ConvTranspose):
    """`torch.nn.ConvTranspose3d` with an int8 weight, which quantizes its input at each call."""

    _DIMS = 3
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose3d,)
