"""What observers, fake-quantizers and functions share: codes of the ops, and errors in words.

The ops check little and say it tersely. Callers let an op fail first and come here to find
out why, so a call that goes well pays for no checks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .utils import QuantizationError

Nonfinite = Literal["ignore", "raise", "propagate"]

NONFINITE_CODES: dict[str, int] = {"ignore": 0, "raise": 1, "propagate": 2}

SCHEME_CODES: dict[torch.qscheme, int] = {
    torch.per_tensor_affine: 0,
    torch.per_channel_affine: 0,
    torch.per_tensor_symmetric: 1,
    torch.per_channel_symmetric: 1,
    torch.per_channel_affine_float_qparams: 2,
}

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What histograms can be kept in: counts stall in anything narrower, at 256 in bf16.
WIDE = (torch.float32, torch.float64)

_UINT8 = (torch.quint8, torch.uint8)


def symmetric_zero_point(
    dtype: torch.dtype, quant_min: int, quant_max: int, has_customized_qrange: bool
) -> int:
    """Zero point of a symmetric scheme: the middle of an unsigned dtype, 0 of a signed one.

    A customized range of an 8-bit unsigned dtype has its own middle, rounded down. These are
    the rules of torch.ao.quantization's `UniformQuantizationObserverBase`.
    """
    if dtype in _UINT8:
        return (quant_min + quant_max) // 2 if has_customized_qrange else 128
    return 2**15 if dtype == torch.uint16 else 0


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


class KeepsState(nn.Module):
    """A module that looks after its buffers.

    No conversion makes those in `_kept_precise` narrower than fp32, `half()` for one: ranges and
    scales are too large or too small for fp16 soon, and neither moving averages nor counts move in
    it once they are large beside what is added. A state loads whole or not at all.
    """

    _kept_precise: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in self._kept_precise}
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if (
                old is not None
                and new is not None
                and new.is_floating_point()
                and new.dtype not in WIDE
                and old.dtype in WIDE
            ):
                self._buffers[name] = old.to(new.device)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the buffers become the state's tensors.
        for key in (prefix + name for name in self._kept_precise):
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                state_dict[key] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_whole(self, load: Callable[[], None], *faults: list[str]) -> bool:
        """Run `load`; where it adds to `faults`, put back what buffers held, and return False."""
        before = [(k, b, b.clone()) for k, b in self._buffers.items() if b is not None]
        count = sum(map(len, faults))
        load()
        if sum(map(len, faults)) == count:
            return True
        for name, buffer, value in before:
            self._buffers[name] = buffer
            resize_buffer(self, name, value.shape).copy_(value)
        return False


def misfit(prefix: str, problem: str) -> str:
    """What `load_state_dict` is to say of the state of the module at `prefix`."""
    where = f" of {prefix[:-1]}" if prefix else ""
    return f"the state{where} does not fit: {problem}"


def qparams_error(saved: Mapping[str, object], per_channel: bool) -> str | None:
    """What is wrong with a saved scale and zero point; None where they can be loaded."""
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dim() > 1 or not (per_channel or value.numel() == 1):
            wanted = "one element per channel" if per_channel else "one element"
            return f"size mismatch for {name}: got shape {list(value.shape)}, needs {wanted}"
        if value.is_complex() or (name == "scale" and not value.is_floating_point()):
            return f"{name} must be of real numbers, scale of floating ones, got {value.dtype}"
        # As the buffers hold it, mostly.
        held = value.float() if name == "scale" else value
        if not value.is_meta and not bool(held.isfinite().all()):
            return f"{name} must be finite, got {value.tolist()}"
    scale, zero_point = saved.get("scale"), saved.get("zero_point")
    if isinstance(scale, Tensor) and not scale.is_meta and not bool((scale > 0).all()):
        return f"scale must be positive, got {scale.tolist()}"
    if (
        isinstance(scale, Tensor)
        and isinstance(zero_point, Tensor)
        and scale.numel() != zero_point.numel()
    ):
        return (
            "scale and zero_point must be of one size, got shapes "
            f"{list(scale.shape)} and {list(zero_point.shape)}"
        )
    return None


def resize_buffer(module: nn.Module, name: str, shape: Sequence[int]) -> Tensor:
    """Give a buffer of `module` another shape, in place where its storage allows that.

    Storage from `torch.load` does not. What the buffer holds afterwards is undefined.
    """
    buffer = module._buffers[name]
    assert buffer is not None
    if buffer.shape == tuple(shape):
        return buffer
    # An inference tensor could not be updated outside inference mode.
    with torch.inference_mode(False):
        if buffer.untyped_storage().resizable():
            buffer.resize_(shape)
        else:
            buffer = module._buffers[name] = buffer.new_empty(shape)
    return buffer


def refill_buffer(module: nn.Module, name: str, shape: Sequence[int], value: float) -> None:
    """Give a buffer another shape and one value; other threads see it before or after that."""
    buffer = module._buffers[name]
    assert buffer is not None
    with torch.inference_mode(False):
        buffer.data = torch.full(shape, value, dtype=buffer.dtype, device=buffer.device)


def nonfinite_error(x: Tensor, nonfinite: Nonfinite) -> Exception | None:
    """Why `x` is refused under this policy; None where every element is finite."""
    count = x.numel() - int(x.isfinite().sum())
    if not count:
        return None
    return ValueError(
        f"x has {count} non-finite elements (NaN or infinity) of {x.numel()}, which cannot be "
        f"observed under nonfinite={nonfinite!r}; nonfinite='ignore' leaves them out"
    )


def range_error(
    min_val: object,
    max_val: object,
    histogram: object = None,
    *,
    finite: bool = True,
    may_cross: bool = False,
) -> str | None:
    """What makes a saved range, and its histogram, no range; None where nothing does.

    Args:
        min_val: smallest values, one element or one per channel.
        max_val: largest values, likewise.
        histogram: counts over the range; None where there is no histogram.
        finite: whether NaN and infinities are wrong in a range that is not an unobserved one.
        may_cross: whether the ends may have passed each other, as moving averages of one value.
    """
    named = {"min_val": min_val, "max_val": max_val}
    if histogram is not None:
        named["histogram"] = histogram
    for name, value in named.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dtype not in FLOATING:
            return f"{name} must have a floating dtype, got {value.dtype}"
    assert isinstance(min_val, Tensor)
    assert isinstance(max_val, Tensor)
    if min_val.shape != max_val.shape or min_val.dim() > 1:
        return (
            "min_val and max_val must both be 0-dim, or 1-dim with as many channels, got shapes "
            f"{list(min_val.shape)} and {list(max_val.shape)}"
        )
    if min_val.is_meta or max_val.is_meta:
        return None
    right = (min_val == float("inf")) & (max_val == -float("inf"))
    right |= (
        (min_val.abs() < float("inf"))
        & (max_val.abs() < float("inf"))
        & ((min_val <= max_val) | may_cross)
    )
    if finite and not bool(right.all()):
        return (
            "min_val and max_val must be finite and in order, or inf and -inf where nothing was "
            f"observed, got {_first_few(min_val[~right])} and {_first_few(max_val[~right])}"
            + (f" at channels {_first_few((~right).nonzero())}" if right.dim() else "")
        )
    if isinstance(histogram, Tensor) and not histogram.is_meta:
        wrong = ~((histogram >= 0) & (histogram < float("inf")))
        if bool(wrong.any()):
            return f"histogram must hold counts of 0 or more, got {_first_few(histogram[wrong])}"
    return None


def _first_few(values: Tensor) -> list[float]:
    return values.flatten()[:5].tolist()


class Exclusion:
    """A lock for what threads must not do at once; a forked process starts with an open one."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


# Held while a buffer gets another size: observers that see their first tensor.
RESIZING = Exclusion()
