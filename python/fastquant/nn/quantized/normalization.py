"""Normalizations of quantized tensors by their own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..._native import ops
from ...quantized_tensor import made, parts
from .observed import NoNativeFormError, output_qparams
from .scaled import Scaled


class _Norm(Scaled):
    """A norm whose weight and bias stay floating."""

    def _take(self, weight: Tensor | None, bias: Tensor | None) -> None:
        for name, value in (("weight", weight), ("bias", bias)):
            kept = None if value is None else nn.Parameter(value.detach().clone(), False)
            self.register_parameter(name, kept)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def _normalized(self, values: Tensor, scale: float, zero_point: int) -> Tensor:
        """The integers of the output, from those of the input and what they stand for."""
        raise NotImplementedError

    def forward(self, input: Any) -> Any:
        return made(self._normalized(*parts(input)), self.scale, self.zero_point)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed norm becomes."""
        return cls.from_reference(mod, *output_qparams(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        """What a float norm becomes, given the scale and zero point of its output."""
        raise NotImplementedError


class LayerNorm(_Norm, nn.LayerNorm):
    """`torch.nn.LayerNorm` on quantized tensors.

    Args:
        normalized_shape: the last dimensions, over which it normalizes.
        weight: floating, of that shape, or None.
        bias: likewise.
        scale: of the output.
        zero_point: of the output.
        eps: added to the variance.
        elementwise_affine: whether there are weight and bias.
        device: accepted as torch.ao accepts it; weight and bias stay where they are.
        dtype: likewise.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self._take(weight, bias)
        self._set_qparams(scale, zero_point)

    def _normalized(self, values: Tensor, scale: float, zero_point: int) -> Tensor:
        affine = (self.weight, self.bias, self.eps, self.scale, self.zero_point)
        shape = list(self.normalized_shape)
        y: Tensor = ops.quantized_layer_norm(values, scale, zero_point, shape, *affine)
        return y

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        return cls(
            *(mod.normalized_shape, mod.weight, mod.bias, float(scale), int(zero_point), mod.eps),
            mod.elementwise_affine,
        )


class GroupNorm(_Norm, nn.GroupNorm):
    """`torch.nn.GroupNorm` on quantized tensors.

    Args:
        num_groups: into which the channels are divided.
        num_channels: of the input.
        weight: floating, one for each channel, or None.
        bias: likewise.
        scale: of the output.
        zero_point: of the output.
        eps: added to the variance.
        affine: whether there are weight and bias.
        device: accepted as torch.ao accepts it; weight and bias stay where they are.
        dtype: likewise.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self._take(weight, bias)
        self._set_qparams(scale, zero_point)

    def _normalized(self, values: Tensor, scale: float, zero_point: int) -> Tensor:
        affine = (self.weight, self.bias, self.eps, self.scale, self.zero_point)
        y: Tensor = ops.quantized_group_norm(values, scale, zero_point, self.num_groups, *affine)
        return y

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        return cls(
            *(mod.num_groups, mod.num_channels, mod.weight, mod.bias, float(scale)),
            *(int(zero_point), mod.eps, mod.affine),
        )


class _InstanceNorm(_Norm):
    def __init__(
        self,
        num_features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if track_running_stats:
            raise NoNativeFormError("its running statistics have no quantized form")
        self._take(weight, bias)
        self._set_qparams(scale, zero_point)

    def _normalized(self, values: Tensor, scale: float, zero_point: int) -> Tensor:
        norm: Any = self
        affine = (norm.weight, norm.bias, norm.eps, self.scale, self.zero_point)
        channels = values.shape[1]  # each is a group of its own
        y: Tensor = ops.quantized_group_norm(values, scale, zero_point, channels, *affine)
        return y

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Any:
        return cls(
            *(mod.num_features, mod.weight, mod.bias, float(scale), int(zero_point), mod.eps),
            *(mod.momentum, mod.affine, mod.track_running_stats),
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` on quantized tensors; arguments as those of `GroupNorm`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` on quantized tensors; arguments as those of `GroupNorm`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` on quantized tensors; arguments as those of `GroupNorm`."""
