"""What each op returns where tensors have no values: shapes and dtypes, for compilers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._core.qparams import zero_point_dtype
from .._torch.private import require_dtypes_kept_by_aot_inductor
from .ops import Op
from .quantized_shapes import FAKE_KERNELS as _QUANTIZED
from .reference.basics import _compute_dtype


def _checked(kernel: Op) -> Op:
    """A fake kernel also runs where only some tensors are on the meta device: refuse that."""

    @functools.wraps(kernel)
    def fake(*args: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"tensors lie on different devices: {', '.join(map(str, devices))}")
        if any(isinstance(arg, torch.dtype) for arg in args):
            require_dtypes_kept_by_aot_inductor()
        return kernel(*args)

    return fake


def _changes_in_place(*_: Any) -> None:
    return None


def empty_mask(x: Tensor) -> Tensor:
    """Memory for one bit of each element of x, in whole 64-bit words."""
    return x.new_empty((x.numel() + 63) // 64 * 8, dtype=torch.uint8)


def _empty_like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _empty_int8(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def _empty_with_mask(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_mask(x)


def _empty_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, dst_nbins: int
) -> tuple[Tensor, Tensor]:
    return min_val.new_empty(()), max_val.new_empty(())


def _empty_chosen_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(min_val), torch.empty_like(max_val)


def _empty_range_of_values(x: Tensor, ch_axis: int | None, *_: Any) -> tuple[Tensor, Tensor]:
    channels = 1 if ch_axis is None else x.shape[ch_axis]
    ends = x.new_empty((2, channels), dtype=_compute_dtype(x))
    return ends[0].clone(), ends[1].clone()


def _empty_error(histogram: Tensor, min_val: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(min_val, dtype=torch.float64)


def _empty_qparams(
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    n = min_val.numel()
    dtype = zero_point_dtype(min_val, scheme)
    return min_val.new_empty(n), min_val.new_empty(n, dtype=dtype)


def empty_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Memory for the results of `observe_batch_norm_`."""
    norm = x.new_empty((4, x.shape[1]), dtype=_compute_dtype(x))
    return norm, x.new_empty(3, dtype=torch.float64)


def _empty_batch_norm_gradients(
    grad: Tensor, x: Tensor, norm: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    channels = norm.shape[1]
    return torch.empty_like(x), norm.new_empty(channels), norm.new_empty(channels)


def empty_folded(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Memory for a folded weight and the values that it is folded with."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    fold = weight.new_empty((5, weight.shape[0]), dtype=compute)
    return torch.empty_like(weight, dtype=dtype), fold


def _empty_folded_and_fold(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_folded(weight)


def _empty_gradients_of_folded(grad: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _empty_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    images, _, height, width = x.shape
    rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
    return x.new_empty((images, weight.shape[0], rows, columns))


def _empty_gradients_of_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else 0), x.new_empty(weight.shape if of_weight else 0)


def _empty_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)


_FAKE_KERNELS: dict[str, Op] = {
    "observe_minmax_": _changes_in_place,
    "observe_histogram_": _changes_in_place,
    "observe_channel_histograms_": _changes_in_place,
    "observe_error_": _changes_in_place,
    "observe_qparams_": _changes_in_place,
    "search_histogram_range": _empty_range,
    "histogram_range": _empty_chosen_range,
    "least_error_range": _empty_range_of_values,
    "histogram_error": _empty_error,
    "choose_qparams": _empty_qparams,
    "fake_quantize": _empty_like_first,
    "fake_quantize_with_mask": _empty_with_mask,
    "fake_quantize_backward": _empty_like_first,
    "quantize_per_channel": _empty_int8,
    "fused_observe_fake_quantize": _empty_like_first,
    "fused_observe_fake_quantize_with_mask": _empty_with_mask,
    "observe_batch_norm_": empty_norm,
    "batch_norm_fake_quantize": _empty_like_first,
    "batch_norm_fake_quantize_backward": _empty_batch_norm_gradients,
    "add_observe_fake_quantize": _empty_with_mask,
    "observe_folded_weight_": _empty_folded_and_fold,
    "fold_weight": _empty_like_first,
    "fold_weight_backward": _empty_gradients_of_folded,
    "convolution": _empty_convolution,
    "convolution_backward": _empty_gradients_of_convolution,
    "learnable_fake_quantize": _empty_like_first,
    "learnable_fake_quantize_backward": _empty_gradients,
}
for _name, _op in (_FAKE_KERNELS | _QUANTIZED).items():
    torch.library.register_fake(f"fastquant::{_name}", _checked(_op))
