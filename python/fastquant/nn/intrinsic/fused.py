"""Float modules that stand for two or three modules in a row, which quantization takes as one.

They are the package's own; where torch.ao exists, `fastquant.nn.intrinsic` has torch.ao's instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..._core.errors import QuantizationError


class _FusedModule(nn.Sequential):
    """What all fused modules are, the training ones too."""

    # The classes of the parts that a module is made of; subclasses of these are no such parts.
    _PARTS: ClassVar[tuple[type[nn.Module], ...]] = ()


def _checked(module: _FusedModule, *parts: nn.Module) -> tuple[nn.Module, ...]:
    kinds = tuple(map(type_before_parametrizations, parts))
    if kinds != module._PARTS:
        accepted, given = (", ".join(cls.__name__ for cls in c) for c in (module._PARTS, kinds))
        raise QuantizationError(f"{type(module).__name__} is made of {accepted}; got {given}")
    return parts


class _ConvReLU(_FusedModule):
    def __init__(self, conv: nn.Module, relu: nn.Module) -> None:
        super().__init__(*_checked(self, conv, relu))


class _ConvBn(_FusedModule):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__(*_checked(self, conv, bn))


class _ConvBnReLU(_FusedModule):
    def __init__(self, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> None:
        super().__init__(*_checked(self, conv, bn, relu))


class _BNReLU(_FusedModule):
    def __init__(self, batch_norm: nn.Module, relu: nn.Module) -> None:
        super().__init__(*_checked(self, batch_norm, relu))


class ConvReLU1d(_ConvReLU):
    """A `Conv1d` and a `ReLU`."""

    _PARTS = (nn.Conv1d, nn.ReLU)


class ConvReLU2d(_ConvReLU):
    """A `Conv2d` and a `ReLU`."""

    _PARTS = (nn.Conv2d, nn.ReLU)


class ConvReLU3d(_ConvReLU):
    """A `Conv3d` and a `ReLU`."""

    _PARTS = (nn.Conv3d, nn.ReLU)


class ConvBn1d(_ConvBn):
    """A `Conv1d` and a `BatchNorm1d`, for quantization-aware training."""

    _PARTS = (nn.Conv1d, nn.BatchNorm1d)


class ConvBn2d(_ConvBn):
    """A `Conv2d` and a `BatchNorm2d`, for quantization-aware training."""

    _PARTS = (nn.Conv2d, nn.BatchNorm2d)


class ConvBn3d(_ConvBn):
    """A `Conv3d` and a `BatchNorm3d`, for quantization-aware training."""

    _PARTS = (nn.Conv3d, nn.BatchNorm3d)


class ConvBnReLU1d(_ConvBnReLU):
    """A `Conv1d`, a `BatchNorm1d` and a `ReLU`, for quantization-aware training."""

    _PARTS = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU)


class ConvBnReLU2d(_ConvBnReLU):
    """A `Conv2d`, a `BatchNorm2d` and a `ReLU`, for quantization-aware training."""

    _PARTS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class ConvBnReLU3d(_ConvBnReLU):
    """A `Conv3d`, a `BatchNorm3d` and a `ReLU`, for quantization-aware training."""

    _PARTS = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)


class BNReLU2d(_BNReLU):
    """A `BatchNorm2d` and a `ReLU`."""

    _PARTS = (nn.BatchNorm2d, nn.ReLU)


class BNReLU3d(_BNReLU):
    """A `BatchNorm3d` and a `ReLU`."""

    _PARTS = (nn.BatchNorm3d, nn.ReLU)


class LinearReLU(_FusedModule):
    """A `Linear` and a `ReLU`."""

    _PARTS = (nn.Linear, nn.ReLU)

    def __init__(self, linear: nn.Module, relu: nn.Module) -> None:
        super().__init__(*_checked(self, linear, relu))


class LinearBn1d(_FusedModule):
    """A `Linear` and a `BatchNorm1d`, for quantization-aware training."""

    _PARTS = (nn.Linear, nn.BatchNorm1d)

    def __init__(self, linear: nn.Module, bn: nn.Module) -> None:
        super().__init__(*_checked(self, linear, bn))


class LinearLeakyReLU(_FusedModule):
    """A `Linear` and a `LeakyReLU`."""

    _PARTS = (nn.Linear, nn.LeakyReLU)

    def __init__(self, linear: nn.Module, leaky_relu: nn.Module) -> None:
        super().__init__(*_checked(self, linear, leaky_relu))


class LinearTanh(_FusedModule):
    """A `Linear` and a `Tanh`."""

    _PARTS = (nn.Linear, nn.Tanh)

    def __init__(self, linear: nn.Module, tanh: nn.Module) -> None:
        super().__init__(*_checked(self, linear, tanh))


class ConvAdd2d(_FusedModule):
    """A convolution, and the sum of its result and another tensor.

    Args:
        conv: `Conv2d`.
        add: a module or function that adds two tensors.
    """

    def __init__(self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(conv)
        self.add = add

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """The convolution of `x1`, plus `x2`."""
        return self.add(self[0](x1), x2)


class ConvAddReLU2d(_FusedModule):
    """A convolution, the sum of its result and another tensor, and an activation.

    Args:
        conv: `Conv2d`.
        add: a module or function that adds two tensors.
        relu: `ReLU`.
    """

    def __init__(
        self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor], relu: nn.Module
    ) -> None:
        super().__init__(conv)
        self.add = add
        self.relu = relu

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """ReLU of the convolution of `x1`, plus `x2`."""
        return self.relu(self.add(self[0](x1), x2))  # type: ignore[no-any-return]
