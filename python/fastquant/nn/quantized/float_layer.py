"""Layers that stay floating among quantized ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..._core.errors import QuantizationError
from ..._torch import ao
from ...quantized_tensor import is_quantized
from ..float_functional import FloatFunctional
from .observed import NoNativeFormError
from .stubs import Quantize


class FloatLayer(nn.Module):
    """A layer that computes in floating point: its inputs are dequantized, its outputs quantized.

    `convert` with `backend="native"` puts it around a layer that has no quantized form here.

    Args:
        module: the layer.
        quantize: quantizes each floating tensor that it returns; None leaves them floating.
        reason: why the layer has no quantized form.
    """

    def __init__(self, module: nn.Module, quantize: Quantize | None, reason: str = "") -> None:
        super().__init__()
        self.module = module
        self.quantize = quantize
        self.reason = reason

    def extra_repr(self) -> str:
        return self.reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = mapped(_dequantized, (args, kwargs))
        outputs = self.module(*args, **kwargs)
        if self.quantize is None:
            return outputs
        return mapped(self._quantized, outputs)

    def _quantized(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return self.quantize(value)  # type: ignore[misc]
        return value

    @classmethod
    def of(cls, module: nn.Module, reason: str) -> FloatLayer:
        """A layer around an observed module; nothing is quantized where no 8-bit observer is.

        Raises:
            QuantizationError: the module is a QuantStub or a FloatFunctional, which are there to
                give quantized tensors.
        """
        if isinstance(module, (ao.QuantStub, FloatFunctional)):
            raise QuantizationError(reason)
        try:
            output = Quantize.from_float(module)
        except NoNativeFormError:
            output = None
        return cls(module, output, reason)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of what is in tuples, lists and dicts, in the same structure."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = mapped(function, item)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(function, item) for item in value)
    return function(value)


def _dequantized(value: Any) -> Any:
    return value.dequantize() if is_quantized(value) else value
