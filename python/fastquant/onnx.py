"""Export of models with fake-quantizers to ONNX, as QuantizeLinear and DequantizeLinear.

Needs `pip install onnx onnxscript`. Not imported by `import fastquant`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ._core.ranges import has_seen_nothing
from ._torch.exporting import clamped_to_grid, onnx_dtype, traced_fake_quantize, traces_for_onnx
from .fake_quantize import FakeQuantizeBase
from .observer import ObserverBase
from .utils import QuantizationError, is_per_channel

__all__ = ["export"]

# The first opset whose QuantizeLinear and DequantizeLinear have an axis.
_MINIMUM_OPSET = 13


class _QuantizeDequantize(nn.Module):
    """What a fake-quantizer does to a tensor with the scale and zero point it has now."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, name: str, source: Any) -> None:
        super().__init__()
        observer = source.activation_post_process
        quant_min, quant_max = int(observer.quant_min), int(observer.quant_max)
        dtype = onnx_dtype(name, quant_min, quant_max)
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
        self.ends = (quant_min, quant_max)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis
        attributes: dict[str, Any] = {}
        if axis is not None:
            if self.scale.numel() != x.shape[axis]:
                raise QuantizationError(
                    f"{self.name} has {self.scale.numel()} scales for {x.shape[axis]} "
                    "channels: run the model before it is exported"
                )
            attributes = {"axis": axis % x.dim()}
        qparams = (self.scale, self.zero_point)
        if traces_for_onnx():
            return traced_fake_quantize(x, *qparams, axis, *self.ends)
        dtype = self.zero_point.dtype
        clamped = clamped_to_grid(x, *qparams, axis, *self.ends, dtype)
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", (clamped, *qparams), attributes, dtype=dtype, shape=x.shape
        )
        result = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (quantized, *qparams),
            attributes,
            dtype=clamped.dtype,
            shape=x.shape,
        )
        return result.to(x.dtype)


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
        options: those of `torch.onnx.export`, as `dynamic_shapes`, `opset_version` (13 or newer),
            and `dynamo=False` for its older exporter.

    Returns:
        The `torch.onnx.ONNXProgram`; None with `dynamo=False`.

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
    return torch.onnx.export(root[0].eval(), args, f, **{"dynamo": True, **options})
