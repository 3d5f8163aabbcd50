"""What an argument may be: one check for each, whoever takes it.

`check_…` raises for an argument of a constructor or function that does not fit. Every error is
a QuantizationError, which is a ValueError, or a TypeError for what is of the wrong kind.

`…_error` says why an op has refused its tensors. Ops check little and say it tersely; callers
let an op fail first and come here for the words, so a call that goes well pays for no checks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Proxy

from .dtypes import RANGES, is_torch_quantized
from .errors import QuantizationError
from .schemes import (
    FLOATING,
    NONFINITE_CODES,
    QUANTIZED,
    RANGE_METHOD_CODES,
    SCHEME_CODES,
    WIDE,
    NonFinitePolicy,
    Scheme,
)

# Quantized values that range methods search among.
MOST_LEVELS = 2**16

# --------------------------------------------------------------------------------------------
# Arguments of constructors and functions


def _listed(accepted: Iterable[object]) -> str:
    return ", ".join(map(str, accepted))


def check_nonfinite(nonfinite: str) -> int:
    """The code of a policy for NaN and infinities."""
    if not isinstance(nonfinite, str) or nonfinite not in NONFINITE_CODES:
        raise QuantizationError(
            f"nonfinite must be one of {_listed(map(repr, NONFINITE_CODES))}, got {nonfinite!r}"
        )
    return NONFINITE_CODES[nonfinite]


def check_range_method(range_method: str) -> int:
    """The code of a method that chooses a range."""
    if not isinstance(range_method, str) or range_method not in RANGE_METHOD_CODES:
        raise QuantizationError(
            f"range_method must be one of {_listed(map(repr, RANGE_METHOD_CODES))}, "
            f"got {range_method!r}"
        )
    return RANGE_METHOD_CODES[range_method]


def check_percentile(percentile: float) -> None:
    """How many percent of the values a range is to hold."""
    wanted = "more than 0 and at most 100"
    _check_number("percentile", percentile, math.nextafter(0, 1), 100, wanted)


def check_searched_grid(method: str, quant_min: int, quant_max: int, scheme: int) -> None:
    """Quantized values that a method can choose a range for."""
    if scheme == Scheme.FLOAT_QPARAMS:
        raise QuantizationError(
            f"range method {method!r} takes affine and symmetric qschemes, "
            "got torch.per_channel_affine_float_qparams"
        )
    levels = quant_max - quant_min + 1
    if levels > MOST_LEVELS and method in ("mse", "entropy"):
        raise QuantizationError(
            f"range method {method!r} takes at most {MOST_LEVELS} quantized values (16 bits), got "
            f"{levels}: quant_min={quant_min}, quant_max={quant_max}"
        )


def check_qscheme(qscheme: torch.qscheme) -> int:
    """The code of a quantization scheme."""
    if not isinstance(qscheme, torch.qscheme) or qscheme not in SCHEME_CODES:
        raise QuantizationError(f"qscheme must be one of {_listed(SCHEME_CODES)}, got {qscheme!r}")
    return SCHEME_CODES[qscheme]


def check_dtype(dtype: torch.dtype) -> None:
    """A quantized dtype for which scale and zero point can be chosen."""
    if dtype not in QUANTIZED:
        raise QuantizationError(f"dtype must be one of {_listed(QUANTIZED)}, got {dtype!r}")


def check_eps(eps: float) -> None:
    """The smallest scale: 0 or more, as in torch.ao; a scale of 0 is never made from it."""
    _check_number("eps", eps, 0, math.inf, "finite and not negative")


def check_averaging_constant(averaging_constant: float) -> None:
    """The weight of the newest tensor in a moving average."""
    _check_number("averaging_constant", averaging_constant, 0, 1, "between 0 and 1")


def _check_number(name: str, value: float, least: float, most: float, wanted: str) -> None:
    try:
        fits = least <= value <= most and value < math.inf
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not fits:
        raise QuantizationError(f"{name} must be {wanted}, got {value}")


def check_integer(name: str, value: int, least: int | None = None) -> int:
    """`value` as a plain integer: torch.ao takes any number, so 255.0 is 255."""
    if type(value) is not int:
        try:
            whole = int(value) if isinstance(value, float) else operator.index(value)
        except (TypeError, ValueError, OverflowError):
            whole = None
        if whole is None or whole != value:
            raise TypeError(f"{name} must be an integer, got {value!r}")
        value = whole
    if least is not None and value < least:
        raise QuantizationError(f"{name} must be at least {least}, got {value}")
    return value


def check_quantized_range(quant_min: int, quant_max: int, *, holds_zero: bool) -> tuple[int, int]:
    """Both ends of a quantized range.

    Args:
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        holds_zero: whether 0 must be among the values, as torch.ao asks of ranges for which
            scale and zero point are chosen.
    """
    low, high = check_integer("quant_min", quant_min), check_integer("quant_max", quant_max)
    if low >= high:
        problem = "quant_min must be less than quant_max"
    elif holds_zero and not low <= 0 <= high:
        problem = "the quantization range must include 0"
    else:
        return low, high
    raise QuantizationError(f"{problem}, got quant_min={quant_min}, quant_max={quant_max}")


def check_fits_dtype(quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
    """A quantized range that `dtype` can hold."""
    try:
        limits = torch.iinfo(dtype)
        low, high = limits.min, limits.max
    except TypeError:  # torch knows no limits of uint4
        check_dtype(dtype)
        if dtype not in RANGES:
            raise QuantizationError(
                f"quant_min and quant_max need an integer dtype, got {dtype}"
            ) from None
        low, high = RANGES[dtype]
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if not low <= value <= high:
            raise QuantizationError(
                f"{name} out of bound: {dtype} holds {low} to {high}, got {value}"
            )


# --------------------------------------------------------------------------------------------
# Tensors that an op has refused


def input_error(x: object, name: str = "x") -> Exception | None:
    """Why `x` cannot be observed or fake-quantized at all; None where it can."""
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):  # torch.fx.symbolic_trace: nothing is known of it
            return None
        return TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        accepted = ", ".join(map(str, FLOATING))
        return TypeError(f"{name} must have a floating dtype ({accepted}), got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        return TypeError(f"{name} must be a dense tensor (layout torch.strided), got {got}")
    return None


def as_floating(x: object, dtype: torch.dtype) -> Tensor | None:
    """`x` in `dtype`, where its own is one of real numbers that no op takes; None anywhere else.

    Those are integers, truth values and fp8 numbers. torch.ao's observers of ranges convert them.
    """
    if (
        not isinstance(x, Tensor)
        or x.dtype in FLOATING
        or x.is_complex()
        or is_torch_quantized(x)
        or x.layout != torch.strided
        or x.is_nested
    ):
        return None
    return x.detach().to(dtype)


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


def nonfinite_error(x: Tensor, nonfinite: NonFinitePolicy) -> Exception | None:
    """Why `x` is refused under this policy; None where every element is finite."""
    count = x.numel() - int(x.isfinite().sum())
    return nonfinite_refusal(x, count, nonfinite) if count else None


def nonfinite_refusal(x: Tensor, count: int, nonfinite: NonFinitePolicy = "raise") -> ValueError:
    """The error for an x of which `count` elements are refused."""
    return ValueError(
        f"x has {count} non-finite elements (NaN or infinity) of {x.numel()}, which cannot be "
        f"observed under nonfinite={nonfinite!r}; nonfinite='ignore' leaves them out"
    )
