"""Models with fake-quantizers or observers as they compute in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._conversion.plan import Plan
from .._core.errors import QuantizationError
from .._core.ranges import has_seen_nothing
from .._torch.exporting import (
    clamped_to_grid,
    integer_limits,
    onnx_dtype,
    traced_fake_quantize,
    traces_for_onnx,
)
from .._torch.hooks import add_observer_hook, copy_forward_hooks, copy_forward_pre_hooks
from ..fake_quantize import FakeQuantizeBase
from ..nn.intrinsic.qat import FOLDING
from ..nn.quantized.observed import layer_of, weight_observer
from ..nn.quantized.weighted import Weighted
from ..observer import ObserverBase
from ..utils import is_per_channel
from .grids import Grid


class QuantizeDequantize(nn.Module):
    """What a fake-quantizer does to a tensor with the scale and zero point it has now.

    Args:
        name: of the fake-quantizer, for messages.
        limits: what has its range of integers: an observer.
        source: what has its scheme and axis.
        scale: now.
        zero_point: now.
        opset: for which it is exported; None for any.
    """

    def __init__(
        self,
        name: str,
        limits: Any,
        source: Any,
        scale: Tensor,
        zero_point: Tensor,
        opset: int | None,
    ) -> None:
        super().__init__()
        quant_min, quant_max = int(limits.quant_min), int(limits.quant_max)
        dtype, four_bits = onnx_dtype(name, quant_min, quant_max, opset)
        if source.qscheme == torch.per_channel_affine_float_qparams:
            raise QuantizationError(
                f"{name} has floating zero points ({source.qscheme}), which ONNX does not have"
            )
        per_channel = is_per_channel(source.qscheme)
        shape = (-1,) if per_channel else ()
        scale = scale.detach().clone().float().reshape(shape)
        zero_point = zero_point.detach().round().clamp(quant_min, quant_max).reshape(shape)
        self.axis = int(source.ch_axis) if per_channel else None
        self.name = name
        self.ends = (quant_min, quant_max)
        self.grid = Grid(scale, zero_point, dtype, self.axis, four_bits)

    def forward(self, x: Tensor) -> Tensor:
        axis, grid = self.axis, self.grid
        if axis is not None and grid.scale.numel() != x.shape[axis]:
            raise QuantizationError(
                f"{self.name} has {grid.scale.numel()} scales for {x.shape[axis]} "
                "channels: run the model before it is exported"
            )
        qparams = (grid.scale, grid.zero_point)
        if traces_for_onnx():
            return traced_fake_quantize(x, *qparams, axis, *self.ends)
        limits = integer_limits(grid.dtype, grid.four_bits)
        clamped = clamped_to_grid(x, *qparams, axis, *self.ends, limits)
        return grid.real(grid.integers(clamped)).to(x.dtype)


def _require_observed(name: str, observer: Any) -> None:
    if has_seen_nothing(observer):
        raise QuantizationError(
            f"{name} has observed nothing yet: run the model before it is exported"
        )


def of_fake_quantizer(name: str, source: Any, opset: int | None) -> nn.Module:
    """What takes the place of a fake-quantizer."""
    if not bool(source.fake_quant_enabled):
        return nn.Identity()
    observer = source.activation_post_process
    if bool(source.observer_enabled):
        _require_observed(name, observer)
    if getattr(source, "is_dynamic", False):
        raise QuantizationError(
            f"{name} is dynamic: its range is that of each tensor, and cannot be exported as a "
            "constant"
        )
    return QuantizeDequantize(name, observer, source, source.scale, source.zero_point, opset)


def integers_of_observer(observer: Any) -> tuple[int, int] | None:
    """The range of integers that an observer or fake-quantizer is for; None for other observers."""
    limits = getattr(observer, "activation_post_process", observer)
    ends = getattr(limits, "quant_min", None), getattr(limits, "quant_max", None)
    if None in ends or not hasattr(limits, "qscheme"):
        return None
    return int(ends[0]), int(ends[1])  # type: ignore[arg-type]


def _of_observer(name: str, observer: Any, opset: int | None) -> nn.Module:
    """What takes the place of a layer's observer: nothing for one of floating dtypes."""
    if integers_of_observer(observer) is None:
        return nn.Identity()
    _require_observed(name, observer)
    scale, zero_point = observer.calculate_qparams()
    return QuantizeDequantize(name, observer, observer, scale, zero_point, opset)


def freeze(module: nn.Module, opset: int | None, observers: bool) -> None:
    """Put what ONNX has in the place of a module's fake-quantizers and observers.

    Args:
        module: is changed.
        opset: for which it is exported; None for any.
        observers: whether those of layers quantize; otherwise they become nothing, as others do.
    """
    made: dict[int, nn.Module] = {}

    def replace(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if id(child) in made:
                pass
            elif isinstance(child, FakeQuantizeBase):
                made[id(child)] = of_fake_quantizer(path, child, opset)
            elif isinstance(child, ObserverBase):
                quantizes = observers and name == "activation_post_process"
                made[id(child)] = _of_observer(path, child, opset) if quantizes else nn.Identity()
            else:
                made[id(child)] = child
                replace(child, f"{path}.")
            setattr(module, name, made[id(child)])

    replace(module, "")


def quantize_weights(plan: Plan, opset: int | None) -> None:
    """Have the layers of a prepared model compute with quantized weights, batch norms folded in.

    Args:
        plan: of the model's conversion to native modules; the model is changed.
        opset: for which it is exported; None for any.
    """
    made: dict[int, nn.Module] = {}
    for entry in plan.swaps():
        if not (isinstance(entry.target, type) and issubclass(entry.target, Weighted)):
            continue
        module: Any = entry.module
        if id(module) not in made:
            made[id(module)] = _with_quantized_weight(entry.path, module, opset)
        assert entry.owner is not None
        entry.owner._modules[entry.name] = made[id(module)]


def _with_quantized_weight(path: str, module: Any, opset: int | None) -> nn.Module:
    fake_quantizer = getattr(module, "weight_fake_quant", None)
    if isinstance(module, FOLDING):
        made = module.to_float().eval()
        weight = of_fake_quantizer(f"{path}.weight_fake_quant", fake_quantizer, opset)
        observer = getattr(module, "activation_post_process", None)
        if observer is not None:
            made.activation_post_process = observer
            add_observer_hook(made, pre_hook=False)
        copy_forward_pre_hooks(module, made)
        copy_forward_hooks(module, made)
    elif fake_quantizer is None:
        made, layer = module, layer_of(module)
        observer = weight_observer(module, layer.weight, False)
        weight = _of_observer(f"{path}.weight", observer, opset)
    else:
        return module  # type: ignore[no-any-return]
    parametrize.register_parametrization(layer_of(made), "weight", weight, unsafe=True)
    return made
