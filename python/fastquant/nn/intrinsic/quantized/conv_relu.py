"""Convolutions fused with ReLU."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ... import intrinsic as nni
from ...quantized import Conv1d, Conv2d, Conv3d
from .. import qat as nniqat


class ConvReLU1d(Conv1d):
    """`Conv1d` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.ConvReLU1d, nniqat.ConvBnReLU1d)


class ConvReLU2d(Conv2d):
    """`Conv2d` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nni.ConvReLU2d,
        nniqat.ConvReLU2d,
        nniqat.ConvBnReLU2d,
    )


class ConvReLU3d(Conv3d):
    """`Conv3d` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (
        nni.ConvReLU3d,
        nniqat.ConvReLU3d,
        nniqat.ConvBnReLU3d,
    )
