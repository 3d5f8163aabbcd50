"""Convolutions fused with the addition of another tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ...._native.ops import quantize
from ....quantized_tensor import made, parts
from ... import intrinsic as nni
from ...quantized import Conv2d


class ConvAdd2d(Conv2d):
    """`Conv2d`, to whose result a second input is added before it is quantized."""

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.ConvAdd2d,)

    def forward(self, input: Any, extra_input: Any) -> Any:  # type: ignore[override]
        dtype = parts(input)[0].dtype
        parts(extra_input, "extra_input")
        y = self._computed(input, torch.float32) + extra_input.dequantize()
        y = self._activated(y)
        return made(
            quantize(y, self.scale, self.zero_point, dtype, True), self.scale, self.zero_point
        )

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        return y


class ConvAddReLU2d(ConvAdd2d):
    """`ConvAdd2d` followed by ReLU."""

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.ConvAddReLU2d,)

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        return y.relu_()
