"""Why an argument does not fit, in words.

The ops check little and say it tersely. Callers let an op fail first and come here to find
out why, so a call that goes well pays for no checks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import QuantizationError
from .schemes import FLOATING, NONFINITE_CODES, WIDE, Nonfinite


def check_nonfinite(nonfinite: str) -> None:
    """Raise QuantizationError unless `nonfinite` names a policy."""
    if nonfinite not in NONFINITE_CODES:
        raise QuantizationError(
            f"nonfinite must be one of {', '.join(map(repr, NONFINITE_CODES))}, got {nonfinite!r}"
        )


def input_error(x: object) -> Exception | None:
    """Why `x` cannot be observed or fake-quantized at all; None where it can."""
    if not isinstance(x, Tensor):
        return TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        accepted = ", ".join(map(str, FLOATING))
        return TypeError(f"x must have a floating dtype ({accepted}), got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        return TypeError(f"x must be a dense tensor (layout torch.strided), got {got}")
    return None


def channel_count(x: Tensor, ch_axis: int | None) -> int:
    """How many quantization parameters `x` has: one, or one per index of axis `ch_axis`.

    Raises:
        ValueError: `x` has no such axis.
    """
    if ch_axis is None:
        return 1
    if not -x.dim() <= ch_axis < x.dim():
        raise ValueError(
            f"ch_axis={ch_axis} is out of range for x of shape {list(x.shape)}: accepted are "
            f"{-x.dim()} to {x.dim() - 1}"
            if x.dim()
            else f"ch_axis={ch_axis} needs x to have at least one dimension, got a 0-dim tensor"
        )
    return x.shape[ch_axis]


def channel_error(
    x: Tensor, ch_axis: int | None, buffers: Mapping[str, Tensor | None]
) -> Exception | None:
    """What in `buffers` does not fit `x`: its axis, channel count, or device; None if all fits.

    Args:
        x: a floating tensor.
        ch_axis: channel axis, None per tensor.
        buffers: per name, a tensor that should have one element per tensor or per channel.
    """
    try:
        channels = channel_count(x, ch_axis)
    except ValueError as error:
        return error
    for name, buffer in buffers.items():
        if buffer is None:
            return ValueError(f"{name} must be a tensor, got None")
        if buffer.numel() != channels:
            wanted = (
                "one element"
                if ch_axis is None
                else f"one element for each of the {channels} channels of x "
                f"(shape {list(x.shape)}, ch_axis={ch_axis})"
            )
            return ValueError(f"{name} must have {wanted}, got shape {list(buffer.shape)}")
        if buffer.device != x.device:
            return ValueError(f"{name} must be on x's device, {x.device}, got {buffer.device}")
    return None


def width_error(buffers: Mapping[str, Tensor | None]) -> Exception | None:
    """Which of a histogram's buffers is too narrow for it; None where none is."""
    for name, buffer in buffers.items():
        if isinstance(buffer, Tensor) and buffer.dtype not in WIDE:
            return TypeError(f"{name} must be torch.float32 or torch.float64, got {buffer.dtype}")
    return None


def nonfinite_error(x: Tensor, nonfinite: Nonfinite) -> Exception | None:
    """Why `x` is refused under this policy; None where every element is finite."""
    count = x.numel() - int(x.isfinite().sum())
    if not count:
        return None
    return ValueError(
        f"x has {count} non-finite elements (NaN or infinity) of {x.numel()}, which cannot be "
        f"observed under nonfinite={nonfinite!r}; nonfinite='ignore' leaves them out"
    )
