"""Where tensors become quantized, and where they become floating again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._core.errors import QuantizationError
from ..._quantized.calls import quantize
from .observed import INTEGERS, qparams_and_dtype
from .scaled import Scaled, check_qparams


class Quantize(Scaled):
    """Quantizes floating tensors; those of images become channels_last, as the layers read them.

    Args:
        scale: of the output.
        zero_point: of the output.
        dtype: torch.uint8 or torch.int8; torch.quint8 and torch.qint8, as torch.ao has them, are
            the same.
        factory_kwargs: accepted as torch.ao accepts it; nothing here depends on it.
    """

    def __init__(
        self, scale: Any, zero_point: Any, dtype: torch.dtype, factory_kwargs: Any = None
    ) -> None:
        super().__init__()
        if dtype not in INTEGERS:
            raise QuantizationError(f"dtype must be torch.uint8 or torch.int8, got {dtype}")
        self.dtype = INTEGERS[dtype]
        self._set_qparams(scale, zero_point)

    def _set_qparams(self, scale: Any, zero_point: Any) -> None:
        limits = torch.iinfo(self.dtype)
        check_qparams(scale, zero_point, limits.min, limits.max)
        super()._set_qparams(scale, zero_point)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"

    def forward(self, X: Tensor) -> Any:  # noqa: N803 (the name is torch.ao's)
        return quantize(X, self.scale, self.zero_point, self.dtype)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Quantize:
        """What an observed QuantStub becomes."""
        return cls(*qparams_and_dtype(mod))


class DeQuantize(nn.Module):
    """Gives the real values of a quantized tensor; floating tensors stay as they are."""

    def forward(self, Xq: Any) -> Tensor:  # noqa: N803 (the name is torch.ao's)
        return Xq.dequantize()  # type: ignore[no-any-return]

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> DeQuantize:
        """What a DeQuantStub becomes."""
        return cls()
