"""Batch norms fused with ReLU."""

from __future__ import annotations

from typing import ClassVar

from ...quantized import BatchNorm2d, BatchNorm3d


class BNReLU2d(BatchNorm2d):
    """`BatchNorm2d` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0


class BNReLU3d(BatchNorm3d):
    """`BatchNorm3d` followed by ReLU."""

    _LOW: ClassVar[float] = 0.0
