"""Observe and fake-quantize tensors in a training loop of your own, without modules.

State is plain tensors that you keep: the `…_state` functions make them, functions whose name
ends in an underscore, and `fused_observe_fake_quantize`, change them in place.

    from fastquant import functional as F

    state = F.fake_quantize_state()
    for x in batches:
        y = F.fused_observe_fake_quantize(x, *state)   # differentiable
        ...

Shared by all functions: `x` is a tensor of fp32, fp64, fp16 or bf16, of any shape and memory
layout. `ch_axis` is None per tensor, else the axis that has quantization parameters of its own
for each index; negative axes count from the end. An empty `x` changes no statistic. Arguments
that do not fit raise TypeError or ValueError before anything is changed. A scale that is not
positive, or a zero point outside the quantized range, is found where they lie on the CPU; on
other devices, to look would be to wait for the device at every call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._core.arguments import (
    channel_error,
    check_averaging_constant,
    check_dtype,
    check_eps,
    check_integer,
    check_nonfinite,
    check_percentile,
    check_qscheme,
    check_quantized_range,
    check_range_method,
    check_searched_grid,
    input_error,
    nonfinite_error,
    width_error,
)
from ._core.dtypes import QUINT8
from ._core.qparams import symmetric_zero_point
from ._core.schemes import PER_CHANNEL, NonFinitePolicy, RangeMethodName, Scheme
from ._native import ops, routes
from ._native.settings import FusedSettings
from .utils import calculate_qmin_qmax

__all__ = [
    "FakeQuantizeState",
    "HistogramState",
    "MinMaxState",
    "add_observe_fake_quantize",
    "batch_norm_observe_fake_quantize",
    "choose_qparams",
    "fake_quantize",
    "fake_quantize_state",
    "fused_observe_fake_quantize",
    "histogram_error",
    "histogram_range",
    "histogram_state",
    "learnable_fake_quantize",
    "minmax_state",
    "observe_histogram_",
    "observe_minmax_",
]

_INF = math.inf
_EPS = torch.finfo(torch.float32).eps


# ---------------------------------------------------------------------------------------- state


class MinMaxState(NamedTuple):
    """The range of what was observed. Tensors of one element, or of one per channel.

    Attributes:
        min_val: smallest value, +inf where nothing was observed.
        max_val: largest value, -inf where nothing was observed.
        nonfinite_count: how many NaN and infinite elements were left out, int64 `[1]`.
    """

    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor


class HistogramState(NamedTuple):
    """The distribution of what was observed.

    Attributes:
        histogram: counts in equal bins between min_val and max_val, `[bins]`.
        min_val: smallest value, 0-dim, +inf where nothing was observed.
        max_val: largest value, 0-dim, -inf where nothing was observed.
        nonfinite_count: how many NaN and infinite elements were left out, int64 `[1]`.
    """

    histogram: Tensor
    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor


class FakeQuantizeState(NamedTuple):
    """A range, and the quantization parameters that follow from it.

    Attributes:
        min_val: smallest value, +inf where nothing was observed.
        max_val: largest value, -inf where nothing was observed.
        scale: step between neighbouring quantized values, in units of x.
        zero_point: the quantized value of 0.
        nonfinite_count: how many NaN and infinite elements were left out, int64 `[1]`.
    """

    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    nonfinite_count: Tensor


def _check_floating(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {dtype}")


def minmax_state(
    channels: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> MinMaxState:
    """An empty range for `observe_minmax_`.

    Args:
        channels: how many indices the channel axis has; None per tensor.
        dtype: floating dtype of the range.
        device: where it lies, which must be x's device.

    Returns:
        Range tensors that are 0-dim, or `[channels]`.

    Raises:
        TypeError: `dtype` is not floating, or `channels` no integer.
        ValueError: `channels` is not positive.
    """
    _check_floating("minmax_state's dtype", dtype)
    shape = () if channels is None else (check_integer("channels", channels, least=1),)
    return MinMaxState(
        torch.full(shape, _INF, dtype=dtype, device=device),
        torch.full(shape, -_INF, dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def histogram_state(
    bins: int = 2048,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> HistogramState:
    """An empty histogram for `observe_histogram_`.

    Args:
        bins: number of bins.
        dtype: fp32 or fp64, of the counts and the range.
        device: where they lie, which must be x's device.

    Returns:
        Counts `[bins]`, all zero, and a range of two 0-dim tensors.

    Raises:
        TypeError: `dtype` is another, or `bins` no integer.
        ValueError: `bins` is not positive.
    """
    counts = torch.zeros(check_integer("bins", bins, least=1), dtype=dtype, device=device)
    error = width_error({"histogram_state's dtype": counts})
    if error is not None:
        raise error
    return HistogramState(counts, *minmax_state(dtype=dtype, device=device))


def fake_quantize_state(
    channels: int | None = None,
    *,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> FakeQuantizeState:
    """An empty range, scale 1 and zero point 0 for `fused_observe_fake_quantize`.

    Args:
        channels: how many indices the channel axis has; None per tensor.
        qscheme: as given to `fused_observe_fake_quantize`; zero points are int32, and of `dtype`
            for torch.per_channel_affine_float_qparams.
        dtype: floating dtype of range and scale.
        device: where they lie, which must be x's device.

    Returns:
        Range tensors that are 0-dim, or `[channels]`; scale and zero point `[1]`, or `[channels]`.

    Raises:
        TypeError: `dtype` is not floating, or `channels` no integer.
        ValueError: `channels` is not positive, or `qscheme` is not a quantization scheme.
    """
    floating = check_qscheme(qscheme) == Scheme.FLOAT_QPARAMS
    min_val, max_val, nonfinite_count = minmax_state(channels, dtype=dtype, device=device)
    scale = torch.ones(min_val.numel(), dtype=dtype, device=device)
    zero_point = torch.zeros_like(scale, dtype=dtype if floating else torch.int32)
    return FakeQuantizeState(min_val, max_val, scale, zero_point, nonfinite_count)


# ---------------------------------------------------------------------------------------- checks


class _Grid(NamedTuple):
    """What ops need to know to choose scale and zero point, in their order."""

    quant_min: int
    quant_max: int
    scheme: int
    symmetric_zero_point: int


def _grid(
    dtype: torch.dtype, qscheme: torch.qscheme, quant_min: int | None, quant_max: int | None
) -> _Grid:
    scheme = check_qscheme(qscheme)
    check_dtype(dtype)
    if quant_min is None and quant_max is None:
        low, high = calculate_qmin_qmax(None, None, False, dtype, False)
        return _Grid(low, high, scheme, symmetric_zero_point(dtype, low, high, False))
    if quant_min is None or quant_max is None:
        raise ValueError(
            "quant_min and quant_max go together: give both or neither, "
            f"got {quant_min} and {quant_max}"
        )
    low, high = check_quantized_range(quant_min, quant_max, holds_zero=True)
    low, high = calculate_qmin_qmax(low, high, True, dtype, False)
    return _Grid(low, high, scheme, symmetric_zero_point(dtype, low, high, True))


def _checked_axis(ch_axis: int | None) -> int | None:
    return None if ch_axis is None else check_integer("ch_axis", ch_axis)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _readable(tensor: Tensor) -> bool:
    """Whether a look at its values costs no wait."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _check_scale(scale: Tensor) -> None:
    _require_tensor("scale", scale)
    _check_floating("scale", scale.dtype)
    if not _readable(scale):
        return
    if scale.numel() == 1:
        bad = not 0 < scale.item() < _INF
    else:
        bad = not bool(((scale > 0) & (scale < _INF)).all())
    if bad:
        raise ValueError(f"scale must be positive and finite, got {scale.tolist()}")


def _check_zero_point(zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    _require_tensor("zero_point", zero_point)
    if zero_point.is_floating_point() or not _readable(zero_point):
        return
    if zero_point.numel() == 1:
        bad = not quant_min <= zero_point.item() <= quant_max
    else:
        bad = not bool(((zero_point >= quant_min) & (zero_point <= quant_max)).all())
    if bad:
        raise ValueError(
            f"zero_point must lie between quant_min {quant_min} and quant_max {quant_max}, "
            f"got {zero_point.tolist()}"
        )


def _check_axis(qscheme: torch.qscheme, ch_axis: int | None) -> None:
    per_channel = qscheme in PER_CHANNEL
    if per_channel != (ch_axis is not None):
        raise ValueError(
            f"{qscheme} needs ch_axis"
            if per_channel
            else f"{qscheme} does not go with ch_axis={ch_axis}: give a per_channel qscheme"
        )


def _count_or_throwaway(nonfinite_count: Tensor | None, x: Tensor) -> Tensor:
    if nonfinite_count is None:
        device = x.device if isinstance(x, Tensor) else None
        return torch.zeros(1, dtype=torch.int64, device=device)
    return nonfinite_count


def _explained(
    error: Exception,
    x: object,
    ch_axis: int | None,
    buffers: dict[str, Tensor],
    nonfinite: NonFinitePolicy = "ignore",
) -> Exception:
    """Why an op refused its arguments, in words; `error` itself where there is nothing to add."""
    cause = input_error(x)
    if cause is not None or not isinstance(x, Tensor):
        return cause or error
    for name, buffer in buffers.items():
        if not isinstance(buffer, Tensor):
            return TypeError(f"{name} must be a tensor, got {type(buffer).__name__}")
    cause = channel_error(x, ch_axis, dict(buffers))
    if cause is None and nonfinite != "ignore":
        cause = nonfinite_error(x, nonfinite)
    for name, buffer in buffers.items():
        if cause is None and not buffer.is_contiguous():
            cause = ValueError(f"{name} must be contiguous, got strides {buffer.stride()}")
    return cause or error


# Python's errors for what is no tensor at all, and the dispatcher's for everything else.
_REFUSALS = (AttributeError, RuntimeError, TypeError)


# --------------------------------------------------------------------------------------- observe


def observe_minmax_(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor | None = None,
    *,
    ch_axis: int | None = None,
    averaging_constant: float | None = None,
    nonfinite: NonFinitePolicy = "ignore",
) -> None:
    """Fold the smallest and largest value of `x` into a range, in place.

    The arithmetic is that of torch.ao.quantization's MinMaxObserver and
    MovingAverageMinMaxObserver, and their per-channel relatives.

    Args:
        x: what to observe.
        min_val: floating, one element per tensor or per channel, on x's device.
        max_val: as `min_val`.
        nonfinite_count: int64 `[1]`, which grows by the number of elements left out.
        ch_axis: channel axis; None per tensor.
        averaging_constant: c of the moving average `min_val + c * (x.min() - min_val)`; None
            keeps the smallest and largest value ever.
        nonfinite: what to do about NaN and infinities: "ignore" leaves them out and counts them,
            "raise" raises ValueError, "propagate" lets them into the range.

    Raises:
        TypeError: `x` or a buffer is no tensor, or not floating.
        ValueError: `ch_axis` is out of range; a buffer has not one element per channel, or lies
            on another device; `x` has non-finite elements under "raise".
    """
    policy = check_nonfinite(nonfinite)
    ch_axis = _checked_axis(ch_axis)
    if averaging_constant is not None:
        check_averaging_constant(averaging_constant)
    try:
        _check_floating("min_val", min_val.dtype)
        _check_floating("max_val", max_val.dtype)
        count = _count_or_throwaway(nonfinite_count, x)
        routes.observe_minmax_(x, min_val, max_val, count, ch_axis, averaging_constant, policy)
    except _REFUSALS as error:
        buffers = {"min_val": min_val, "max_val": max_val}
        raise _explained(error, x, ch_axis, buffers, nonfinite) from None


def observe_histogram_(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor | None = None,
    *,
    upsample_rate: int = 16,
    nonfinite: NonFinitePolicy = "ignore",
) -> None:
    """Count the elements of `x` in a histogram that grows with the range of values, in place.

    What was counted before is spread over the new bins when the range grows, as
    torch.ao.quantization's HistogramObserver does it.

    Args:
        x: what to observe.
        histogram: fp32 or fp64 `[bins]`, on x's device.
        min_val: fp32 or fp64, one element: where the first bin begins.
        max_val: fp32 or fp64, one element: where the last bin ends.
        nonfinite_count: int64 `[1]`, which grows by the number of elements left out.
        upsample_rate: into how many parts an old bin is cut to be spread over new ones.
        nonfinite: what to do about NaN and infinities: "ignore" leaves them out and counts them,
            "raise" raises ValueError, "propagate" leaves infinities out and raises for NaN.

    Raises:
        TypeError: `x` or a buffer is no tensor, or not floating.
        ValueError: a buffer has the wrong size or lies on another device; `upsample_rate` is not
            positive; `x` has elements that `nonfinite` refuses.
    """
    policy = check_nonfinite(nonfinite)
    upsample_rate = check_integer("upsample_rate", upsample_rate, least=1)
    try:
        count = _count_or_throwaway(nonfinite_count, x)
        routes.observe_histogram_(x, histogram, min_val, max_val, count, upsample_rate, policy, 1)
    except _REFUSALS as error:
        if isinstance(x, Tensor) and isinstance(histogram, Tensor) and histogram.numel() == 0:
            raise ValueError("histogram must have at least one bin") from None
        buffers = {"min_val": min_val, "max_val": max_val}
        cause = width_error({"histogram": histogram, **buffers})
        raise cause or _explained(error, x, None, buffers, nonfinite) from None


def _check_histogram(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, more: dict[str, Tensor] | None = None
) -> None:
    """A histogram, `[bins]` or `[channels, bins]`, and what it needs one of per channel."""
    per_channel = {"min_val": min_val, "max_val": max_val, **(more or {})}
    for name, buffer in {"histogram": histogram, **per_channel}.items():
        _require_tensor(name, buffer)
        if name != "zero_point":
            _check_floating(name, buffer.dtype)
    if histogram.dim() not in (1, 2) or histogram.numel() == 0:
        raise ValueError(
            "histogram must have at least one bin, in shape [bins] or [channels, bins], got shape "
            f"{list(histogram.shape)}"
        )
    channels = 1 if histogram.dim() == 1 else histogram.shape[0]
    for name, buffer in per_channel.items():
        if buffer.numel() != channels:
            wanted = "one element" if histogram.dim() == 1 else f"{channels} elements"
            raise ValueError(f"{name} must have {wanted}, got shape {list(buffer.shape)}")


def histogram_range(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    *,
    method: RangeMethodName = "l2",
    percentile: float = 99.99,
    levels: int | None = None,
    dtype: torch.dtype = QUINT8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The range that a histogram's values are best clipped to before they are quantized.

    docs/calibration.md explains the methods and says which to use when. In short:

    - "l2": the range of smallest expected squared error that the search of torch.ao.quantization's
      HistogramObserver finds (after caffe2's
      NormMinimization::NonlinearQuantizationParamsSearch). Its result need not hold 0, to which
      `choose_qparams` extends it. All other methods' do.
    - "minmax": everything.
    - "mse": the scale and zero point of smallest expected squared error, of all on a fine grid.
    - "percentile": leaves out the smallest and the largest `(100 - percentile) / 2` percent, or
      the `100 - percentile` percent of largest size if symmetric.
    - "entropy": where quantized values diverge least, in the sense of Kullback and Leibler, from
      the values themselves (Migacz, 2017), with the definition of ONNX Runtime.

    Args:
        histogram: counts in equal bins, floating, `[bins]` or `[channels, bins]`.
        min_val: floating, one element per tensor or channel: where the first bin begins.
        max_val: floating, likewise: where the last bin ends.
        method: "minmax", "l2", "mse", "percentile" or "entropy".
        percentile: of the method of this name, more than 0 and at most 100.
        levels: number of quantized values that "l2" reckons with; `quant_max - quant_min + 1` if
            None.
        dtype: quantized dtype, which says the range of integers where none is given.
        qscheme: affine or symmetric, per tensor or per channel.
        quant_min: smallest integer; with `quant_max`, or not at all.
        quant_max: largest integer; at most 2**16 - 1 above the smallest.

    Returns:
        Both ends of the range in min_val's dtype, 0-dim, or one per channel for a histogram
        `[channels, bins]`. inf and -inf where nothing was observed.

    Raises:
        TypeError: an argument is no tensor, or not floating.
        ValueError: `levels` is less than 2; a tensor has the wrong size; an unknown method, a
            percentile that is none, a `qscheme` with float parameters, or a range of integers
            that is empty or wider than 16 bits.
    """
    code = check_range_method(method)
    check_percentile(percentile)
    grid = _grid(dtype, qscheme, quant_min, quant_max)
    if levels is None:
        levels = grid.quant_max - grid.quant_min + 1
    levels = check_integer("levels", levels, least=2)
    _check_histogram(histogram, min_val, max_val)
    if method == "l2" and histogram.dim() == 1:
        low, high = ops.search_histogram_range(histogram, min_val, max_val, levels)
        return low, high
    check_searched_grid(method, *grid[:3])
    settings = (code, percentile, levels, *grid)
    shape = min_val.shape if histogram.dim() == 2 else ()
    ends = (min_val.reshape(shape), max_val.reshape(shape))
    return routes.histogram_range(histogram, *ends, *settings)


def histogram_error(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The mean squared error of quantizing a histogram's values, which clips and rounds them.

    The values of a bin are taken as spread evenly over it. What `choose_qparams` makes of a range
    from `histogram_range` thus shows what error each of its methods gives.

    Args:
        histogram: counts in equal bins, floating, `[bins]` or `[channels, bins]`.
        min_val: floating, one element per tensor or channel: where the first bin begins.
        max_val: floating, likewise: where the last bin ends.
        scale: floating, likewise.
        zero_point: likewise, between `quant_min` and `quant_max`.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.

    Returns:
        The mean of `(x - fake_quantize(x))²` in fp64, 0-dim or one per channel; NaN where nothing
        was observed.

    Raises:
        TypeError: an argument is no tensor, or not floating.
        ValueError: a tensor has the wrong size; `quant_min >= quant_max`; a scale that is not
            positive and finite; an integer zero point outside the range.
    """
    quant_min, quant_max = check_quantized_range(quant_min, quant_max, holds_zero=False)
    _check_histogram(histogram, min_val, max_val, {"scale": scale, "zero_point": zero_point})
    _check_scale(scale)
    _check_zero_point(zero_point, quant_min, quant_max)
    shape = min_val.shape if histogram.dim() == 2 else ()
    ends = (min_val.reshape(shape), max_val.reshape(shape))
    return routes.histogram_error(histogram, *ends, scale, zero_point, quant_min, quant_max)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    *,
    dtype: torch.dtype = QUINT8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    quant_min: int | None = None,
    quant_max: int | None = None,
    eps: float = _EPS,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a range, as torch.ao.quantization's observers choose them.

    Affine: `scale = (max - min) / (quant_max - quant_min)` of the range extended to hold 0, and
    `zero_point = quant_min - round(min / scale)`. Symmetric: `scale = max(-min, max) /
    ((quant_max - quant_min) / 2)`, and 0 or the middle of an unsigned range. Float qparams:
    `scale = (max - min) / (quant_max - quant_min)`, `zero_point = -min / scale`.

    Args:
        min_val: floating; +inf where nothing was observed.
        max_val: floating, of min_val's size; -inf where nothing was observed.
        dtype: quantized dtype, which says the range of integers where none is given.
        qscheme: torch.per_tensor_affine, torch.per_tensor_symmetric, their per-channel relatives
            or torch.per_channel_affine_float_qparams.
        quant_min: smallest integer; with `quant_max`, or not at all.
        quant_max: largest integer.
        eps: smallest scale.

    Returns:
        The scale in min_val's dtype, and the zero point: int32 for affine schemes, int64 for
        symmetric ones, min_val's dtype for float qparams. Both `[min_val.numel()]`; 1 and 0
        where nothing was observed.

    Raises:
        TypeError: `min_val` or `max_val` is no tensor, or not floating.
        ValueError: they differ in size; an empty range of integers; an unknown `qscheme`.
    """
    grid = _grid(dtype, qscheme, quant_min, quant_max)
    for name, buffer in (("min_val", min_val), ("max_val", max_val)):
        _require_tensor(name, buffer)
        _check_floating(name, buffer.dtype)
    if min_val.numel() != max_val.numel():
        raise ValueError(
            f"min_val and max_val must be of one size, got shapes {list(min_val.shape)} and "
            f"{list(max_val.shape)}"
        )
    smallest = _smallest_scale(eps, min_val)
    scale, zero_point = ops.choose_qparams(min_val, max_val, smallest, *grid)
    return scale, zero_point


def _smallest_scale(eps: float, like: Tensor) -> Tensor:
    check_eps(eps)
    return like.new_full((1,), eps)


# --------------------------------------------------------------------------------- fake-quantize


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    *,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
) -> Tensor:
    """Round `x` to what quantization would make of it: quantize, then dequantize.

    `y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale`; with
    a floating zero point, `round(x / scale + zero_point)` instead. Values beyond the range,
    infinities too, come out as its ends; NaN stays NaN, where torch makes a number of it. Bit-equal
    to torch.fake_quantize_per_tensor_affine and torch.fake_quantize_per_channel_affine otherwise.

    The gradient is the straight-through estimate (https://arxiv.org/abs/1308.3432): that of y
    where x was in the range or NaN, 0 elsewhere. None flows to scale and zero point; for that, see
    `learnable_fake_quantize`.

    Args:
        x: what to fake-quantize.
        scale: floating, one element per tensor or per channel, on x's device; or a number.
        zero_point: integer or floating, as many elements; or an integer.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        ch_axis: channel axis; None per tensor.

    Returns:
        A new tensor like x.

    Raises:
        TypeError: `x` is no tensor, or not floating.
        ValueError: `quant_min >= quant_max`; a scale that is not positive and finite; an integer
            zero point outside the range; `ch_axis` out of range; not one scale and zero point
            per channel, or on another device than x.
    """
    quant_min, quant_max = check_quantized_range(quant_min, quant_max, holds_zero=False)
    ch_axis = _checked_axis(ch_axis)
    error = input_error(x)
    if error is not None:
        raise error
    if not isinstance(scale, Tensor):
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = torch.tensor([float(scale)], dtype=precision, device=x.device)
    if not isinstance(zero_point, Tensor):
        zero_point = check_integer("zero_point", zero_point)
        zero_point = torch.tensor([zero_point], dtype=torch.int32, device=x.device)
    _check_scale(scale)
    _check_zero_point(zero_point, quant_min, quant_max)
    try:
        return routes.fake_quantize(x, scale, zero_point, None, ch_axis, quant_min, quant_max)
    except _REFUSALS as refusal:
        buffers = {"scale": scale, "zero_point": zero_point}
        raise _explained(refusal, x, ch_axis, buffers) from None


def fused_observe_fake_quantize(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor | None = None,
    *,
    dtype: torch.dtype = QUINT8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    quant_min: int | None = None,
    quant_max: int | None = None,
    ch_axis: int | None = None,
    averaging_constant: float | None = 0.01,
    eps: float = _EPS,
    observe: bool | Tensor = True,
    quantize: bool | Tensor = True,
    nonfinite: NonFinitePolicy = "ignore",
) -> Tensor:
    """One step of quantization-aware training: observe `x`, then fake-quantize it.

    The same as `observe_minmax_`, `choose_qparams` and `fake_quantize` one after the other, in
    one pass through native code. Differentiable with respect to `x` as `fake_quantize` is. The
    tensors after `x` are a `FakeQuantizeState`, and change in place.

    Args:
        x: what to observe and fake-quantize.
        min_val: floating, one element per tensor or per channel, on x's device.
        max_val: as `min_val`.
        scale: floating, as many elements.
        zero_point: integer, floating for float qparams; as many elements.
        nonfinite_count: int64 `[1]`, which grows by the number of elements left out.
        dtype: quantized dtype, which says the range of integers where none is given.
        qscheme: how to choose scale and zero point, see `choose_qparams`; a per-channel one goes
            with `ch_axis`, a per-tensor one without.
        quant_min: smallest integer; with `quant_max`, or not at all.
        quant_max: largest integer.
        ch_axis: channel axis; None per tensor.
        averaging_constant: of the moving average, see `observe_minmax_`; None keeps extremes.
        eps: smallest scale.
        observe: whether to update range, scale and zero point. A tensor, integer `[1]` on x's
            device, is not waited for.
        quantize: whether to fake-quantize, likewise.
        nonfinite: what to do about NaN and infinities when observing, see `observe_minmax_`.

    Returns:
        A new tensor like x; not quantizing, `x` or a copy of it.

    Raises:
        TypeError: `x` or a buffer is no tensor, or of the wrong dtype.
        ValueError: an empty range of integers; `qscheme` and `ch_axis` do not go together;
            `ch_axis` out of range; a buffer that has not one element per channel, or lies on
            another device; `x` has non-finite elements under "raise".
    """
    grid = _grid(dtype, qscheme, quant_min, quant_max)
    ch_axis = _checked_axis(ch_axis)
    constants = _checked_constants(grid, qscheme, ch_axis, averaging_constant, nonfinite)
    buffers = {"min_val": min_val, "max_val": max_val, "scale": scale, "zero_point": zero_point}
    try:
        settings = _fused_settings(x, observe, quantize, buffers, nonfinite_count, eps, *constants)
        return routes.fused_observe_fake_quantize(x, settings)
    except _REFUSALS as error:
        raise _explained(error, x, ch_axis, buffers, nonfinite) from None


def add_observe_fake_quantize(
    a: Tensor,
    b: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor | None = None,
    *,
    low: float = -_INF,
    high: float = _INF,
    dtype: torch.dtype = QUINT8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    quant_min: int | None = None,
    quant_max: int | None = None,
    averaging_constant: float | None = 0.01,
    eps: float = _EPS,
    observe: bool | Tensor = True,
    quantize: bool | Tensor = True,
    nonfinite: NonFinitePolicy = "ignore",
) -> Tensor:
    """`fused_observe_fake_quantize` of the sum of two tensors, clamped to [low, high].

    For residual connections: the sum, its activation (`low=0` for ReLU, `low=0, high=6` for ReLU6)
    and the step of quantization-aware training in one op where `a` and `b` have the same shape,
    dtype and memory layout. Differentiable with respect to both; no gradient passes an element that
    was clamped or lies on a bound, as with torch's ReLU. The tensors after `b` are a
    `FakeQuantizeState`, per tensor, and change in place.

    Args:
        a: one summand.
        b: the other, whatever torch.add takes.
        min_val: floating, one element, on a's device.
        max_val: as `min_val`.
        scale: floating, one element.
        zero_point: integer, one element.
        nonfinite_count: int64 `[1]`, which grows by the number of elements left out.
        low: lower bound of the activation, -inf for none.
        high: upper bound of the activation, inf for none.
        dtype: quantized dtype, which says the range of integers where none is given.
        qscheme: how to choose scale and zero point, see `choose_qparams`; a per-tensor one.
        quant_min: smallest integer; with `quant_max`, or not at all.
        quant_max: largest integer.
        averaging_constant: of the moving average, see `observe_minmax_`; None keeps extremes.
        eps: smallest scale.
        observe: whether to update range, scale and zero point. A tensor, integer `[1]` on a's
            device, is not waited for.
        quantize: whether to fake-quantize, likewise.
        nonfinite: what to do about NaN and infinities in the clamped sum when observing, see
            `observe_minmax_`.

    Returns:
        A new tensor like `a + b`.

    Raises:
        TypeError: `a`, `b` or a buffer is no tensor, or of the wrong dtype.
        ValueError: `low` is not less than `high`; an empty range of integers; a per-channel
            `qscheme`; a buffer that has not one element, or lies on another device; the clamped sum
            has non-finite elements under "raise".
        RuntimeError: torch.add does not take `a` and `b`.
    """
    for name, tensor in (("a", a), ("b", b)):
        error = input_error(tensor, name)
        if error is not None:
            raise error
    _check_bounds(low, high)
    grid = _grid(dtype, qscheme, quant_min, quant_max)
    constants = _checked_constants(grid, qscheme, None, averaging_constant, nonfinite)
    buffers = {"min_val": min_val, "max_val": max_val, "scale": scale, "zero_point": zero_point}
    try:
        settings = _fused_settings(a, observe, quantize, buffers, nonfinite_count, eps, *constants)
        return routes.add_observe_fake_quantize(a, b, low, high, settings)
    except _REFUSALS as refusal:
        x = routes.clamped((a + b).detach(), low, high)
        raise _explained(refusal, x, None, buffers, nonfinite) from None


def _check_bounds(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low must be less than high, got low={low} and high={high}")


def _checked_constants(
    grid: _Grid,
    qscheme: torch.qscheme,
    ch_axis: int | None,
    averaging_constant: float | None,
    nonfinite: NonFinitePolicy,
) -> tuple[float | None, ...]:
    """What follows `eps` in the arguments of the fused ops."""
    _check_axis(qscheme, ch_axis)
    policy = check_nonfinite(nonfinite)
    if averaging_constant is not None:
        check_averaging_constant(averaging_constant)
    return (ch_axis, averaging_constant, *grid, policy)


def _fused_settings(
    x: Tensor,
    observe: bool | Tensor,
    quantize: bool | Tensor,
    buffers: dict[str, Tensor],
    nonfinite_count: Tensor | None,
    eps: float,
    *rest: float | None,
) -> FusedSettings:
    """The arguments of the fused ops; `rest`: those after `eps`."""
    for name in ("min_val", "max_val", "scale"):
        _check_floating(name, buffers[name].dtype)
    flags = (_flag(observe, x), _flag(quantize, x))
    count = _count_or_throwaway(nonfinite_count, x)
    smallest = _smallest_scale(eps, buffers["min_val"])
    return FusedSettings._make((*flags, *buffers.values(), count, smallest, *rest))


def _flag(value: bool | Tensor, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), int(value), dtype=torch.uint8, device=x.device)


def _batch_norm_error(x: Tensor, training: bool, channels: dict[str, Tensor]) -> Exception | None:
    """What does not fit batch norm, in words; None where all fits."""
    for name, tensor in channels.items():
        if not isinstance(tensor, Tensor):
            return TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            return TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if not 2 <= x.dim() <= 5:
        return ValueError(f"x must have 2 to 5 dimensions, got shape {list(x.shape)}")
    error = channel_error(x, 1, channels)
    if error is None and training and x.numel() == x.shape[1]:
        error = ValueError(
            "batch statistics need more than one value per channel: give more than one, or "
            f"training=False, got shape {list(x.shape)}"
        )
    return error


def batch_norm_observe_fake_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    bn_eps: float = 1e-5,
    low: float = -_INF,
    high: float = _INF,
    dtype: torch.dtype = QUINT8,
    qscheme: torch.qscheme = torch.per_tensor_affine,
    quant_min: int | None = None,
    quant_max: int | None = None,
    averaging_constant: float | None = 0.01,
    eps: float = _EPS,
    observe: bool | Tensor = True,
    quantize: bool | Tensor = True,
    nonfinite: NonFinitePolicy = "ignore",
) -> Tensor:
    """Batch norm, activation, and a step of quantization-aware training per tensor, as one.

    With mean and variance of each channel (axis 1), of the batch in training and else the running
    ones, the result is

        fake_quantize(clamp((x - mean) * weight / sqrt(var + bn_eps) + bias, low, high))

    which equals `torch.nn.functional.batch_norm`, the activation and `fused_observe_fake_quantize`
    one after the other, up to rounding, in a third of their passes over memory. The map of a
    channel is monotone, so that its smallest and largest element tell the range that is observed.
    Differentiable with respect to `x`, `weight` and `bias`, with the gradients of
    https://arxiv.org/abs/1502.03167, section 3, and straight through the fake-quantizer.
    `running_mean`, `running_var` (in training) and the tensors after them, which are a
    `FakeQuantizeState`, change in place.

    Args:
        x: `[N, C]` to `[N, C, D, H, W]`, of any memory layout.
        weight: floating `[C]`, batch norm's gamma.
        bias: floating `[C]`, batch norm's beta.
        running_mean: floating `[C]`; in training becomes
            `(1 - momentum) * running_mean + momentum * mean`.
        running_var: floating `[C]`; likewise, with the unbiased variance.
        min_val: floating, one element, on x's device.
        max_val: as `min_val`.
        scale: floating, one element.
        zero_point: integer, one element.
        nonfinite_count: int64 `[1]`, which grows by the number of elements left out.
        training: whether to normalize by the statistics of the batch. In training, a channel with
            a NaN or an infinity becomes NaN as a whole.
        momentum: of the running statistics.
        bn_eps: what batch norm adds to the variance.
        low: what the activation clamps to: 0 for ReLU, -inf for none.
        high: likewise: 6 for ReLU6, inf for none.
        dtype: quantized dtype, which says the range of integers where none is given.
        qscheme: torch.per_tensor_affine or torch.per_tensor_symmetric, see `choose_qparams`.
        quant_min: smallest integer; with `quant_max`, or not at all.
        quant_max: largest integer.
        averaging_constant: of the moving average, see `observe_minmax_`; None keeps extremes.
        eps: smallest scale.
        observe: whether to update range, scale and zero point. A tensor, integer `[1]` on x's
            device, is not waited for.
        quantize: whether to fake-quantize, likewise.
        nonfinite: what to do about NaN and infinities of the activation when observing, see
            `observe_minmax_`.

    Returns:
        A new tensor like x.

    Raises:
        TypeError: `x` or another argument is no tensor, or of the wrong dtype.
        ValueError: `x` has fewer than 2 or more than 5 dimensions, or in training one value per
            channel; a tensor has not one element per channel (`weight` to `running_var`) or one
            element (the others), or lies on another device; an empty range of integers; a
            per-channel `qscheme`; `low` is not below `high`; x has non-finite elements under
            "raise". Nothing has changed then.
    """
    _check_bounds(low, high)
    grid = _grid(dtype, qscheme, quant_min, quant_max)
    constants = _checked_constants(grid, qscheme, None, averaging_constant, nonfinite)
    error = input_error(x) or _batch_norm_error(
        x,
        training,
        {
            "weight": weight,
            "bias": bias,
            "running_mean": running_mean,
            "running_var": running_var,
        },
    )
    if error is not None:
        raise error
    buffers = {"min_val": min_val, "max_val": max_val, "scale": scale, "zero_point": zero_point}
    try:
        if zero_point.is_floating_point():
            raise TypeError(f"zero_point must have an integer dtype, got {zero_point.dtype}")
        settings = _fused_settings(x, observe, quantize, buffers, nonfinite_count, eps, *constants)
        how = (training, momentum, bn_eps, float(low), float(high), settings)
        return routes.batch_norm_observe_fake_quantize(
            x, weight, bias, running_mean, running_var, *how
        )
    except _REFUSALS as refusal:
        raise _explained(refusal, x, None, buffers, nonfinite) from None


def learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    grad_factor: float = 1.0,
) -> Tensor:
    """Fake-quantize with a scale and zero point that learn (LSQ).

    Forward as `fake_quantize`, with the zero point rounded and brought into the range.
    Gradients (https://openreview.net/pdf?id=rkgO66VKDS, LSQ+ for the zero point), where y is the
    result and g its gradient: x gets g where it was in the range, else 0. Scale gets the sum of
    `g * (y - x) / scale` in the range, `g * (quant_min - zero_point)` below and
    `g * (quant_max - zero_point)` above. Zero point gets the sum of `-g * scale` outside. Both
    are multiplied with `grad_factor`.

    Args:
        x: what to fake-quantize.
        scale: floating, one element per tensor or per channel, on x's device.
        zero_point: floating, as many elements.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        ch_axis: channel axis; None per tensor.
        grad_factor: LSQ's g, `1 / sqrt(x.numel() * quant_max)` in the paper.

    Returns:
        A new tensor like x.

    Raises:
        TypeError: an argument is no tensor, or not floating.
        ValueError: `quant_min >= quant_max`; a scale that is not positive and finite; `ch_axis`
            out of range; not one scale and zero point per channel, or on another device than x.
    """
    quant_min, quant_max = check_quantized_range(quant_min, quant_max, holds_zero=False)
    ch_axis = _checked_axis(ch_axis)
    error = input_error(x)
    if error is not None:
        raise error
    _check_scale(scale)
    _require_tensor("zero_point", zero_point)
    _check_floating("zero_point", zero_point.dtype)
    try:
        return routes.learnable_fake_quantize(
            x, scale, zero_point, ch_axis, quant_min, quant_max, grad_factor
        )
    except _REFUSALS as refusal:
        buffers = {"scale": scale, "zero_point": zero_point}
        raise _explained(refusal, x, ch_axis, buffers) from None
