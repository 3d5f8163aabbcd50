"""The ops that observe, choose quantization parameters or fake-quantize one tensor."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._core.qparams import qparams_of_range, zero_point_dtype
from ..._core.schemes import FLOATING, WIDE, NonFinite
from ..settings import FusedSettings

INF = math.inf
# From here on fp32 cannot tell neighbouring integers apart.
_FP32_INTEGERS = 2**24


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 is computed in fp64, everything narrower in fp32; for buffers as for x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widest_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _check_input(x: Tensor, ch_axis: int | None, **buffers: Tensor) -> None:
    _check(x.dtype in FLOATING, f"x must have a floating dtype, got {x.dtype}")
    channels = 1
    if ch_axis is not None:
        _check(
            -x.dim() <= ch_axis < x.dim(), f"ch_axis={ch_axis} is out of range for {x.dim()}-d x"
        )
        channels = x.shape[ch_axis]
    for name, buffer in buffers.items():
        _check(
            buffer.numel() == channels,
            f"{name} must have {channels} element(s), got {buffer.numel()}",
        )
        _check(buffer.device == x.device, f"{name} must be on {x.device}, got {buffer.device}")


def _check_quant_range(quant_min: int, quant_max: int) -> None:
    _check(quant_min < quant_max, f"quant_min {quant_min} must be less than quant_max {quant_max}")


def _check_finite(refused: Tensor) -> None:
    if bool(refused):
        raise RuntimeError("x has non-finite elements")


def _kept_finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of which those that are finite are no larger than what `dtype` holds."""
    most = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return torch.where(values.isfinite(), values.clamp(-most, most), values)


def _along_channels(values: Tensor, x: Tensor, ch_axis: int | None) -> Tensor:
    """One value per tensor or channel, in a shape that broadcasts with x."""
    shape = [1] * x.dim()
    if ch_axis is not None:
        shape[ch_axis] = -1
    return values.reshape(shape)


def _rows_of_channels(x: Tensor, ch_axis: int | None) -> Tensor:
    """x in the dtype it is computed in, one row per tensor or channel. Not for empty x."""
    values = x.detach().to(_compute_dtype(x))
    if ch_axis is None:
        return values.reshape(1, -1)
    return values.movedim(ch_axis, 0).reshape(x.shape[ch_axis], -1)


# ------------------------------------------------------------------------------------- observe


def _observed(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    nonfinite: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new min_val and max_val, how many elements took no part, and whether x is refused."""
    values = _rows_of_channels(x, ch_axis)
    finite = values.isfinite()
    skipped = (~finite).sum()
    if nonfinite == NonFinite.PROPAGATE:
        low, high = values.aminmax(dim=1)
    else:
        low = torch.where(finite, values, INF).amin(1)
        high = torch.where(finite, values, -INF).amax(1)
    nothing = ((low == INF) & (high == -INF)).reshape(min_val.shape)
    never = (min_val == INF) & (max_val == -INF)

    def updated(
        buffer: Tensor, current: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        compute = _compute_dtype(buffer)
        old = buffer.to(compute)
        held = _kept_finite(current, buffer.dtype)
        new = held.to(buffer.dtype).to(compute).reshape(buffer.shape)
        if averaging_constant is None:
            moved = extreme(old, new)
        else:
            step = old + averaging_constant * (new - old)
            # Where the way to go is longer than the largest number.
            far = (new - old).isinf() & old.isfinite() & new.isfinite()
            constant = old.new_full((), averaging_constant)
            step = torch.where(far, (1 - constant) * old + constant * new, step)
            moved = torch.where(never, new, step)
        return torch.where(nothing, buffer, moved.to(buffer.dtype))

    new_min = updated(min_val, low, torch.minimum)
    new_max = updated(max_val, high, torch.maximum)

    zero = torch.zeros_like(skipped)
    counted = skipped if nonfinite == NonFinite.IGNORE else zero
    refused = skipped if nonfinite == NonFinite.RAISE else zero
    return new_min, new_max, counted, refused


def observe_minmax_(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    nonfinite: int,
) -> None:
    if x.numel() == 0:
        return
    _check_input(x, ch_axis, min_val=min_val, max_val=max_val)
    new_min, new_max, counted, refused = _observed(
        x, min_val, max_val, ch_axis, averaging_constant, nonfinite
    )
    if nonfinite == NonFinite.RAISE:
        _check_finite(refused)
    min_val.copy_(new_min)
    max_val.copy_(new_max)
    nonfinite_count.add_(counted)


def observe_qparams_(
    x: Tensor,
    observer_enabled: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor,
    eps: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
    nonfinite: int,
) -> None:
    _check_quant_range(quant_min, quant_max)
    enabled = observer_enabled.reshape(()) != 0
    if x.numel() == 0:
        new_min, new_max, counted = min_val, max_val, torch.zeros_like(nonfinite_count)
    else:
        _check_input(
            x, ch_axis, min_val=min_val, max_val=max_val, scale=scale, zero_point=zero_point
        )
        new_min, new_max, counted, refused = _observed(
            x, min_val, max_val, ch_axis, averaging_constant, nonfinite
        )
        if nonfinite == NonFinite.RAISE:
            _check_finite(enabled & (refused > 0))
    new_scale, new_zero_point = _chosen_qparams(
        new_min, new_max, eps, quant_min, quant_max, scheme, symmetric_zero_point
    )
    for buffer, new in (
        (min_val, new_min),
        (max_val, new_max),
        (scale, new_scale),
        (zero_point, new_zero_point),
    ):
        buffer.copy_(torch.where(enabled, new.reshape(buffer.shape).to(buffer.dtype), buffer))
    nonfinite_count.add_(torch.where(enabled, counted, 0))


# ----------------------------------------------------------------------------------- histogram


def _bin_of(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Index of the bin of [low, high] that each value falls in, as torch.histc computes it."""
    low, high = low.to(values.dtype), high.to(values.dtype)
    point = low == high
    low, high = torch.where(point, low - 1, low), torch.where(point, high + 1, high)
    index = (values - low) * bins / (high - low)
    # Ranges too wide for this arithmetic, and points so far out that one more is no more.
    wide = _widest_dtype(values.device)
    values, low, high = (t.to(wide) / 2 for t in (values, low, high))
    wide_index = (values - low) / (high - low) * bins
    wide_index = torch.where(low == high, bins // 2, wide_index)
    fits = ((high - low) * 2 * bins).to(index.dtype).isfinite() & (low < high)
    index = torch.where(fits, index.to(wide), wide_index)
    return index.nan_to_num(0.0).clamp(0, bins - 1).to(torch.int64)


def _linspace(start: Tensor, end: Tensor, count: int) -> Tensor:
    """torch.linspace as torch's vectorized code has it, on every device and for every length.

    In fp32 each value is rounded once, as a fused multiply-add does: fp64 holds the product.
    """
    step = ((end - start) / (count - 1)).to(wide := _widest_dtype(start.device))
    k = torch.arange(count, device=start.device, dtype=wide)
    ascending, descending = start.to(wide) + step * k, end.to(wide) - step * (count - 1 - k)
    return torch.where(k < count // 2, ascending, descending).to(start.dtype)


def _resampled(
    histogram: Tensor, rate: int, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor
) -> Tensor:
    """The histogram of [low, high] in the bins of [new_low, new_high]; all finite.

    Each bin's count is spread evenly over `rate` parts, and a part goes to the bin that its
    middle falls in (torch.ao's HistogramObserver._upscale_histogram).
    """
    bins = histogram.numel()
    middles = _linspace(low, high, bins * rate + 1)[:-1] + 0.5 * ((high - low) / (bins * rate))
    edges = _linspace(new_low, new_high, bins + 1)
    index = torch.bucketize(middles, edges[1:-1], right=True)
    mass = (histogram / rate).repeat_interleave(rate)
    return torch.zeros_like(histogram).index_add_(0, index, mass)


def moved_histogram(
    old: Tensor,
    low: Tensor,
    high: Tensor,
    new_low: Tensor,
    new_high: Tensor,
    upsample_rate: int,
    compute: torch.dtype,
) -> Tensor:
    """The histogram of [low, high] as one of [new_low, new_high], which holds the old range.

    As it lies where that is the same range; all in one bin where all was one value; else
    resampled, in `compute`, the precision that torch would use, and where that overflows in the
    widest one. `old` and the range (0-dim) are in the widest dtype.
    """
    same = (low == new_low) & (high == new_high)
    point = _bin_of(low.reshape(1).to(torch.float32), new_low, new_high, old.numel())
    at_point = torch.zeros_like(old).index_add_(0, point, old.sum().reshape(1))
    ranges = (low, high, new_low, new_high)
    resampled = _resampled(old, upsample_rate, *ranges)
    if compute == torch.float32:
        narrow = [t.to(torch.float32) for t in ranges]
        fits = ((narrow[3] - narrow[2]) * old.numel()).isfinite()
        resampled = torch.where(fits, _resampled(old, upsample_rate, *narrow), resampled)
    return torch.where(same, old, torch.where(low == high, at_point, resampled))


def observe_histogram_(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    upsample_rate: int,
    nonfinite: int,
    times: int = 1,
) -> None:
    _check(times > 0, f"times must be positive, got {times}")
    _check(histogram.numel() > 0 and upsample_rate > 0, "a histogram needs bins")
    for name, buffer in (("histogram", histogram), ("min_val", min_val), ("max_val", max_val)):
        # Counts stall in anything narrower, at 256 in bf16.
        _check(buffer.dtype in WIDE, f"{name} must be float32 or float64")
    _check_input(x, None, min_val=min_val, max_val=max_val)
    if x.numel() == 0:
        return
    bins = histogram.numel()
    wide = _widest_dtype(x.device)
    values = _kept_finite(_rows_of_channels(x, None)[0], min_val.dtype)
    finite = values.isfinite()
    skipped = (~finite).sum()
    # Infinities never enter a histogram, and NaN raises where torch's would.
    if nonfinite == NonFinite.RAISE:
        _check_finite(skipped)
    elif nonfinite == NonFinite.PROPAGATE:
        _check_finite(values.isnan().any())

    low, high = min_val.reshape(()).to(wide), max_val.reshape(()).to(wide)
    first = (low == INF) | (high == -INF)
    new_low = torch.where(finite, values, INF).amin().to(wide)
    new_high = torch.where(finite, values, -INF).amax().to(wide)
    new_low = torch.where(first, new_low, torch.minimum(low, new_low))
    new_high = torch.where(first, new_high, torch.maximum(high, new_high))

    index = torch.where(finite, _bin_of(values, new_low, new_high, bins), bins)
    counts = torch.zeros(bins + 1, device=x.device, dtype=torch.int64)
    counts = counts.index_add_(0, index, torch.ones_like(index))[:bins].to(wide)

    kept = moved_histogram(
        histogram.to(wide), low, high, new_low, new_high, upsample_rate, _compute_dtype(histogram)
    )
    combined = torch.where(first, 0.0, kept)
    for _ in range(times):
        combined = (combined + counts).to(histogram.dtype).to(wide)

    nothing = ~finite.any()
    histogram.copy_(torch.where(nothing, histogram.to(wide), combined))
    min_val.copy_(torch.where(nothing, low, new_low).reshape(min_val.shape))
    max_val.copy_(torch.where(nothing, high, new_high).reshape(max_val.shape))
    if nonfinite == NonFinite.IGNORE:
        nonfinite_count.add_(skipped)


def observe_channel_histograms_(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    ch_axis: int,
    upsample_rate: int,
    nonfinite: int,
) -> None:
    _check_input(x, ch_axis, min_val=min_val, max_val=max_val)
    if nonfinite == NonFinite.RAISE:
        _check_finite((~x.isfinite()).any())
    elif nonfinite == NonFinite.PROPAGATE:
        _check_finite(x.isnan().any())
    rows = histogram.view(min_val.numel(), -1)
    for i, values in enumerate(x.unbind(ch_axis)):
        state = (rows[i], min_val[i], max_val[i], nonfinite_count)
        observe_histogram_(values, *state, upsample_rate, nonfinite)


def squared_norm(begin: Tensor, end: Tensor, density: Tensor) -> Tensor:
    """The integral of x² from begin to end, (end³ - begin³) / 3, times the density there."""
    return density * ((end * end * end - begin * begin * begin) / 3)


def quantization_error(
    histogram: Tensor,
    bin_width: float,
    levels: int,
    start_bin: int,
    end_bin: int,
    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = squared_norm,
) -> float:
    """Error of quantizing all values to `levels` levels that span the bins [start_bin, end_bin].

    Values are taken as spread evenly over their bin. The order of operations is torch.ao's, in
    fp32, for the same answer; the sum is the exact one.
    """
    width = bin_width * (end_bin - start_bin + 1) / levels
    if width == 0.0:
        return 0.0

    def integral(begin: Tensor | float, end: Tensor | float) -> Tensor:
        begin, end = (torch.as_tensor(t, dtype=torch.float32) for t in (begin, end))
        return norm(begin, end, density)

    def level_of(position: Tensor) -> Tensor:
        return torch.div(position, width, rounding_mode="floor").clamp(0, levels - 1)

    density = histogram / bin_width
    begin = (torch.arange(histogram.numel(), device=histogram.device) - start_bin) * bin_width
    end = begin + bin_width
    first, last = level_of(begin), level_of(end)
    error = integral(begin - (first + 0.5) * width, torch.full_like(begin, width / 2))
    error = error + (last - first - 1) * integral(-width / 2, width / 2)
    error = error + integral(-width / 2, end - (last * width + width / 2))
    return float(error.sum(dtype=_widest_dtype(error.device)))


def search_histogram_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, dst_nbins: int
) -> tuple[Tensor, Tensor]:
    counts = histogram.detach().to("cpu", torch.float32)
    # Errors are only compared with each other: a power of two changes none of their digits, and
    # keeps a width's cube within what fp32 holds.
    bins = histogram.numel()
    safe, _ = math.frexp(float(max_val) / bins - float(min_val) / bins)
    error = functools.partial(quantization_error, counts, safe, dst_nbins)
    return range_of_least_error(counts, min_val, max_val, error)


def range_of_least_error(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, error: Callable[[int, int], float]
) -> tuple[Tensor, Tensor]:
    """The search itself, by any error of a first and a last bin; `histogram` in fp32 on the CPU."""
    bins = histogram.numel()
    low, high = float(min_val), float(max_val)
    bin_width = high / bins - low / bins

    # Inexact in fp32, and torch.ao's bounds are shares of it.
    total = float(histogram.sum())
    below = histogram.cumsum(0, dtype=torch.float64).float()
    quantiles = torch.tensor(
        list(itertools.accumulate(itertools.repeat(1e-5, 100_001))), dtype=torch.float64
    )
    lefts = torch.searchsorted(below, (quantiles * total).float()).tolist()
    upper = torch.tensor(
        list(itertools.accumulate(itertools.repeat(-1e-5, 100_001), initial=1.0))[1:],
        dtype=torch.float64,
    )
    rights = (torch.searchsorted(below, (upper * total).float(), right=True) - 1).tolist()

    start_bin, end_bin, best = 0, bins - 1, INF
    taken_left = taken_right = 0
    alpha, beta = 0.0, 1.0
    while alpha < beta:
        left = min(max(lefts[taken_left], start_bin), end_bin)
        right = max(min(rights[taken_right], end_bin), start_bin)
        next_start, next_end = start_bin, end_bin
        if left - start_bin > end_bin - right:
            next_start, alpha, taken_left = left, float(quantiles[taken_left]), taken_left + 1
        else:
            next_end, beta, taken_right = right, float(upper[taken_right]), taken_right + 1
        if (next_start, next_end) == (start_bin, end_bin):
            continue
        found = error(next_start, next_end)
        if found > best:
            break
        start_bin, end_bin, best = next_start, next_end, found

    compute = _compute_dtype(min_val)
    base, top = min_val.reshape(()).to(compute), max_val.reshape(()).to(compute)
    width = (top - base) / bins
    # A single bin may be wider than the largest number.
    wide = torch.as_tensor(bin_width, dtype=torch.float64).to(width)
    width = torch.where(width.isfinite(), width, wide)
    new_min = base + width * start_bin if start_bin else base
    new_max = base + width * (end_bin + 1)
    new_max = torch.where(new_max.isfinite(), new_max, top)
    return new_min.to(min_val.dtype), new_max.to(max_val.dtype)


# ----------------------------------------------------------------------- quantization parameters


def _chosen_qparams(
    min_val: Tensor, max_val: Tensor, eps: Tensor, *config: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, in the dtype they are computed in."""
    _check(min_val.numel() == max_val.numel(), "min_val and max_val must be of one size")
    compute = _compute_dtype(min_val)
    low, high = min_val.reshape(-1).to(compute), max_val.reshape(-1).to(compute)
    unobserved = (low == INF) & (high == -INF)
    scale, zero_point = qparams_of_range(low, high, eps.to(compute), *config)
    return torch.where(unobserved, 1.0, scale), torch.where(unobserved, 0, zero_point)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    _check_quant_range(quant_min, quant_max)
    config = (quant_min, quant_max, scheme, symmetric_zero_point)
    scale, zero_point = _chosen_qparams(min_val, max_val, eps, *config)
    return scale.to(min_val.dtype), zero_point.to(zero_point_dtype(min_val, scheme))


# ------------------------------------------------------------------------------- fake-quantize


def _inverse(scale: Tensor) -> Tensor:
    """The reciprocal, in the scale's own precision as torch takes it."""
    return 1 / scale.to(_compute_dtype(scale))


def _rounded(
    values: Tensor,
    scale: Tensor,
    inverse: Tensor,
    zero_point: Tensor,
    float_zero_point: bool,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    """Fake-quantized values, and which of them gradients pass through.

    All in the dtype they are computed in; the parameters broadcast with the values.
    """
    _check_quant_range(quant_min, quant_max)
    compute, exact = values.dtype, _widest_dtype(values.device)
    if float_zero_point:
        quantized = torch.round(values * inverse + zero_point)
    else:
        quantized = torch.round(values * inverse) + zero_point
    if float_zero_point or max(-quant_min, quant_max) >= _FP32_INTEGERS:
        quantized, zero_point, scale = (t.to(exact) for t in (quantized, zero_point, scale))

    nan = values.isnan()
    in_range = (quantized >= quant_min) & (quantized <= quant_max) | nan
    clamped = torch.where(quantized.isnan(), quant_min, quantized.clamp(quant_min, quant_max))
    dequantized = ((clamped - zero_point) * scale).to(compute)
    return torch.where(nan, values, dequantized), in_range


def _fake_quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    """Fake-quantized x in a fresh tensor, and which of its elements gradients pass through."""
    _check_input(x, ch_axis, scale=scale, zero_point=zero_point)
    float_zero_point = zero_point.dtype.is_floating_point
    values = x.to(_compute_dtype(x))
    scale, inverse, zero_point = (
        _along_channels(t.to(values.dtype), x, ch_axis)
        for t in (scale, _inverse(scale), zero_point)
    )
    args = (scale, inverse, zero_point, float_zero_point, quant_min, quant_max)
    rounded, in_range = _rounded(values, *args)
    y = torch.empty_like(x).copy_(rounded)
    if enabled is None:
        return y, in_range
    on = enabled.reshape(()) != 0
    return y.copy_(torch.where(on, y, x)), in_range | ~on


def _pack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """One bit an element in the order of `like`'s memory, in whole little-endian 64-bit words."""
    n = like.numel()
    in_memory = torch.empty_like(like, dtype=torch.bool).copy_(bits).as_strided((n,), (1,))
    padded = torch.zeros(math.ceil(n / 64) * 64, device=like.device, dtype=torch.uint8)
    padded[:n] = in_memory
    weights = 2 ** torch.arange(8, device=like.device, dtype=torch.uint8)
    return (padded.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _unpack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pack_bits`: zeros and ones in the dtype and layout of `like`."""
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = ((mask[:, None] >> shifts) & 1).reshape(-1)[: like.numel()]
    unpacked = torch.empty_like(like)
    unpacked.as_strided((like.numel(),), (1,)).copy_(bits)
    return unpacked


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    return _fake_quantized(x, scale, zero_point, enabled, ch_axis, quant_min, quant_max)[0]


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    y, in_range = _fake_quantized(x, scale, zero_point, enabled, ch_axis, quant_min, quant_max)
    return y, _pack_bits(in_range, y)


def fake_quantize_backward(grad: Tensor, mask: Tensor) -> Tensor:
    _check(mask.numel() == 8 * math.ceil(grad.numel() / 64), "mask must have a bit per element")
    # A product, not a selection: the sign of zero, and NaN, come out as torch's.
    return grad * _unpack_bits(mask, grad)


def quantize_per_channel(
    x: Tensor, scale: Tensor, ch_axis: int, quant_min: int, quant_max: int
) -> Tensor:
    _check(x.dtype == torch.float32, f"x must be float32, got {x.dtype}")
    _check(-128 <= quant_min < quant_max <= 127, "quant_min and quant_max must be of int8")
    _check_input(x, ch_axis, scale=scale)
    steps = torch.round(x * _along_channels(_inverse(scale.to(torch.float32)), x, ch_axis))
    integers = steps.clamp(quant_min, quant_max).nan_to_num(0.0)
    return torch.empty_like(x, dtype=torch.int8).copy_(integers)


def fused_observe_fake_quantize_with_mask(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    settings = FusedSettings(*args)
    observe_qparams_(x, *settings.to_observe())
    return fake_quantize_with_mask(x, *settings.to_fake_quantize())


def fused_observe_fake_quantize(*args: Any) -> Tensor:
    return fused_observe_fake_quantize_with_mask(*args)[0]


# -------------------------------------------------------------------- learnable fake-quantize


def learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> Tensor:
    compute = _compute_dtype(x)
    rounded = zero_point.to(compute).round().clamp(quant_min, quant_max).to(torch.int64)
    return fake_quantize(x, scale, rounded, None, ch_axis, quant_min, quant_max)


def learnable_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_input(x, ch_axis, scale=scale, zero_point=zero_point)
    _check_quant_range(quant_min, quant_max)
    compute, exact = _compute_dtype(x), _widest_dtype(x.device)
    inverse = _along_channels(_inverse(scale).to(compute), x, ch_axis)
    s = _along_channels(scale.to(compute), x, ch_axis)
    z = _along_channels(zero_point.to(compute), x, ch_axis).round().clamp(quant_min, quant_max)
    values, dy = x.to(compute), grad.to(compute)

    quantized = torch.round(values * inverse) + z
    # NaN counts as inside, and makes the gradient of its scale NaN.
    in_range = ~((quantized < quant_min) | (quantized > quant_max))
    outside = torch.where(quantized < quant_min, quant_min - z, quant_max - z)
    slope = torch.where(in_range, ((quantized - z) * s - values) * inverse, outside)
    dscale = dy * slope * grad_factor
    dzero_point = torch.where(in_range, 0.0, dy * -1 * s * grad_factor)

    reduced = [d for d in range(x.dim()) if ch_axis is None or d != ch_axis % x.dim()]

    def total(per_element: Tensor, like: Tensor) -> Tensor:
        wide = per_element.to(exact)
        summed = wide.sum(reduced) if reduced else wide
        return torch.empty_like(like).copy_(summed.reshape(like.shape))

    dx = torch.empty_like(x).copy_(dy * in_range)
    return dx, total(dscale, scale), total(dzero_point, zero_point)
