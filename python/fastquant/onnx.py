"""Export of models with fake-quantizers to ONNX, as QuantizeLinear and DequantizeLinear.

Needs `pip install onnx onnxscript`. Not imported by `import fastquant`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ._core.ranges import has_seen_nothing
from .fake_quantize import FakeQuantizeBase
from .observer import ObserverBase
from .utils import QuantizationError, is_per_channel

__all__ = ["export"]

# The first opset whose QuantizeLinear and DequantizeLinear have an axis.
_MINIMUM_OPSET = 13

_GRIDS = (torch.uint8, torch.int8)


def _grid(quant_min: int, quant_max: int) -> torch.dtype | None:
    """The 8-bit dtype that holds [quant_min, quant_max]."""
    for dtype in _GRIDS:
        limits = torch.iinfo(dtype)
        if limits.min <= quant_min <= quant_max <= limits.max:
            return dtype
    return None


class _QuantizeDequantize(nn.Module):
    """What a fake-quantizer does to a tensor with the scale and zero point it has now."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, name: str, source: Any) -> None:
        super().__init__()
        observer = source.activation_post_process
        quant_min, quant_max = int(observer.quant_min), int(observer.quant_max)
        dtype = _grid(quant_min, quant_max)
        if dtype is None:
            raise QuantizationError(
                f"{name} quantizes to {quant_min} … {quant_max}; ONNX export takes ranges within "
                "-128 … 127 or 0 … 255"
            )
        if source.qscheme == torch.per_channel_affine_float_qparams:
            raise QuantizationError(
                f"{name} has floating zero points ({source.qscheme}), which ONNX does not have"
            )
        if getattr(source, "is_dynamic", False):
            raise QuantizationError(
                f"{name} is dynamic: its range is that of each tensor, and cannot be exported "
                "as a constant"
            )
        per_channel = is_per_channel(source.qscheme)
        shape = (-1,) if per_channel else ()
        scale = source.scale.detach().clone().float().reshape(shape)
        zero_point = source.zero_point.detach().round().clamp(quant_min, quant_max).reshape(shape)
        self.axis = int(source.ch_axis) if per_channel else None
        self.name = name
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(dtype))
        # QuantizeLinear saturates at the ends of its dtype. For a narrower range x is clamped
        # first, to values that quantize to the ends exactly; the pair that runtimes look for
        # stays a pair.
        limits = torch.iinfo(dtype)
        self.narrow = (limits.min, limits.max) != (quant_min, quant_max)
        self.register_buffer("low", (quant_min - zero_point) * scale)
        self.register_buffer("high", (quant_max - zero_point) * scale)

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        attributes: Any = {}
        low, high = self.low, self.high
        if self.axis is not None:
            if self.scale.numel() != x.shape[self.axis]:
                raise QuantizationError(
                    f"{self.name} has {self.scale.numel()} scales for {x.shape[self.axis]} "
                    "channels: run the model before it is exported"
                )
            axis = self.axis % x.dim()
            attributes = {"axis": axis}
            along = (-1,) + (1,) * (x.dim() - axis - 1)
            low, high = low.reshape(along), high.reshape(along)
        if self.narrow:
            x = torch.minimum(torch.maximum(x, low), high)
        qparams = (self.scale, self.zero_point)
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, *qparams), attributes, dtype=self.zero_point.dtype, shape=x.shape
        )
        result = torch.onnx.ops.symbolic(
            "DequantizeLinear", (quantized, *qparams), attributes, dtype=x.dtype, shape=x.shape
        )
        return result.to(dtype)


def _frozen(name: str, module: nn.Module) -> nn.Module | None:
    """What takes the place of `module` in the exported model; None where it stays."""
    if isinstance(module, FakeQuantizeBase):
        source: Any = module
        if not bool(source.fake_quant_enabled):
            return nn.Identity()
        observer = source.activation_post_process
        if has_seen_nothing(observer) and bool(source.observer_enabled):
            raise QuantizationError(
                f"{name} has observed nothing yet: run the model before it is exported"
            )
        return _QuantizeDequantize(name, source)
    return nn.Identity() if isinstance(module, ObserverBase) else None


def _freeze(module: nn.Module, prefix: str, made: dict[int, nn.Module]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if id(child) not in made:
            made[id(child)] = frozen = _frozen(path, child) or child
            if frozen is child:
                _freeze(child, f"{path}.", made)
        setattr(module, name, made[id(child)])


def export(model: nn.Module, args: tuple[Any, ...], f: str | None = None, **options: Any) -> Any:
    """Export a model with fake-quantizers to ONNX as it evaluates now.

    Every fake-quantizer becomes QuantizeLinear and DequantizeLinear (int8 or uint8) with its
    present scale and zero point, behind a clamp where its range is narrower than its dtype.
    One that is disabled, and every observer, becomes nothing. `model` itself is not changed.
    Results differ from the model's own by one step of the grid where `x / scale`, which ONNX
    rounds, and `x * (1 / scale)`, which torch does, lie on two sides of a half.

    Args:
        model: from `prepare_qat`, or any module with fake-quantizers, after it has seen data.
        args: example inputs.
        f: file to write.
        options: of `torch.onnx.export`, as `dynamic_shapes` and `opset_version` (13 or newer).

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        QuantizationError: a fake-quantizer that has observed nothing, is dynamic, has floating
            zero points, or a range that no 8-bit dtype holds; its name is in the message.
        ImportError: onnx or onnxscript are not installed.
    """
    opset = options.get("opset_version")
    if opset is not None and opset < _MINIMUM_OPSET:
        raise ValueError(f"opset_version must be at least {_MINIMUM_OPSET}, got {opset}")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx and onnxscript ({error}): pip install onnx onnxscript"
        ) from error
    root = nn.Sequential(copy.deepcopy(model).eval())
    _freeze(root, "", {})
    return torch.onnx.export(root[0].eval(), args, f, dynamo=True, **options)
