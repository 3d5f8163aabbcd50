"""A linear layer whose input's range is that of each batch, as dynamic quantization has it."""

from __future__ import annotations

from typing import Any

from ...._core.errors import QuantizationError
from ....qconfig import _activation_is_memoryless
from .. import layers


class Linear(layers.Linear):
    """`torch.nn.Linear` with a fake-quantized weight, for training with dynamic quantization.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn has them.
        qconfig: its `weight` makes the fake-quantizer; its `activation` forgets earlier batches.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, qconfig, device, dtype)
        if not _activation_is_memoryless(qconfig):
            raise QuantizationError(
                "dynamic quantization-aware training needs an activation observer that forgets "
                "earlier batches: a moving average with averaging_constant=1, got "
                f"{qconfig.activation}"
            )
