"""What quantized modules have in common: the scale and zero point of their output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._core.errors import QuantizationError


def _number(name: str, value: Any) -> Any:
    """`value`, which may be a tensor or an array of one element, as a Python number."""
    if isinstance(value, (int, float)):
        return value
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (RuntimeError, TypeError, ValueError):
        pass
    raise QuantizationError(f"{name} must be a number, got {value!r}")


def _checked_scale(value: Any) -> float:
    scale = float(_number("scale", value))
    if not (math.isfinite(scale) and scale > 0):
        raise QuantizationError(f"scale must be finite and greater than 0, got {scale}")
    return scale


def _checked_zero_point(value: Any, lowest: int, highest: int) -> int:
    zero_point = _number("zero_point", value)
    if not (lowest <= zero_point <= highest and zero_point == int(zero_point)):
        raise QuantizationError(
            f"zero_point must be an integer from {lowest} to {highest}, got {zero_point}"
        )
    return int(zero_point)


def check_qparams(scale: Any, zero_point: Any, lowest: int = -128, highest: int = 255) -> None:
    """Raise unless these can be a quantized tensor's."""
    _checked_scale(scale)
    _checked_zero_point(zero_point, lowest, highest)


class NotScriptable(nn.Module):
    """A module that torch.jit.script refuses in words, not with a line that it cannot read."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise QuantizationError(
            f"torch.jit.script does not take {type(self).__module__}.{type(self).__name__}: give "
            "the model to torch.export.export or torch.compile, or convert it with "
            "backend='torch.ao'"
        )


class KeepsDtypes(NotScriptable):
    """A module whose tensors keep their dtype: what belongs to int8 values is not rounded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {
            name: tensor.detach()
            for name, tensor in (*self._parameters.items(), *self._buffers.items())
            if tensor is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None and tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        return self


class Scaled(KeepsDtypes):
    """A module whose output has a scale and a zero point of its own, as Python numbers.

    In a state_dict they are tensors: `scale`, float64, and `zero_point`, int64.
    """

    scale: float
    zero_point: int

    def __setattr__(self, name: str, value: Any) -> None:
        # Here, so that no call of the module has to check them.
        if name == "scale":
            value = _checked_scale(value)
        elif name == "zero_point":
            value = _checked_zero_point(value, -128, 255)
        super().__setattr__(name, value)

    def _set_qparams(self, scale: Any, zero_point: Any) -> None:
        check_qparams(scale, zero_point)
        self.scale, self.zero_point = scale, zero_point

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor(self.scale, dtype=torch.float64)
        destination[prefix + "zero_point"] = torch.tensor(self.zero_point)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        scale = state_dict.pop(prefix + "scale", None)
        zero_point = state_dict.pop(prefix + "zero_point", None)
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            if value is None:
                missing_keys.append(prefix + name)
        try:
            if isinstance(zero_point, Tensor):
                zero_point = zero_point.item()
            self._set_qparams(
                self.scale if scale is None else float(scale),
                self.zero_point if zero_point is None else zero_point,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        own = f"scale={self.scale}, zero_point={self.zero_point}"
        inherited = super().extra_repr()
        return f"{inherited}, {own}" if inherited else own
