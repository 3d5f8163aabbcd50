"""Layers with a fake-quantized weight, followed by ReLU.

They are the package's own; where torch.ao exists, `fastquant.nn.intrinsic.qat` has torch.ao's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ... import intrinsic as nni
from ...qat import layers


class _WithReLU(layers.Trained):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))

    def to_float(self) -> nn.Module:
        """The fused module without fake-quantizing; its parameters share memory with this one's."""
        made: Any = self._FLOAT_MODULE
        fused: nn.Module = made(self._float_layer(), nn.ReLU())
        return fused.train(self.training)


class ConvReLU1d(_WithReLU, layers.Conv1d, nni._FusedModule):
    """`nn.qat.Conv1d` followed by ReLU."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvReLU1d


class ConvReLU2d(_WithReLU, layers.Conv2d, nni._FusedModule):
    """`nn.qat.Conv2d` followed by ReLU."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvReLU2d


class ConvReLU3d(_WithReLU, layers.Conv3d, nni._FusedModule):
    """`nn.qat.Conv3d` followed by ReLU."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvReLU3d


class LinearReLU(_WithReLU, layers.Linear, nni._FusedModule):
    """`nn.qat.Linear` followed by ReLU."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.LinearReLU
