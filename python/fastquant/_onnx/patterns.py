"""What each op on quantized tensors is in ONNX.

A pattern is a module for one call of an op. It keeps the call's constants, and its forward takes
the other tensors. Most patterns are a floating op between DequantizeLinear and QuantizeLinear,
which runtimes fuse; where integers only move, it is the op on the integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.errors import QuantizationError
from .._native.reference.quantized import LINEAR, NEAREST, NEAREST_EXACT, nearest
from .._quantized.calls import UNBOUNDED
from .grids import Grid, Output, node
from .layers import Conv, ConvTranspose, DynamicLinear, HalfLinear, Linear

Function = Callable[..., Tensor]


class _Pattern(nn.Module):
    """A floating function between the integers of its inputs and those of its output."""

    def __init__(self, function: Function, y: Output, *inputs: Grid) -> None:
        super().__init__()
        self._function, self.y, self.inputs = function, y, nn.ModuleList(inputs)

    def _real(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [grid.real(x) for grid, x in zip(self.inputs, tensors, strict=True)]  # type: ignore[operator]

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.y(self._function(*self._real(tensors)))  # type: ignore[no-any-return]


def _output(
    x: Tensor, scale: float, zero_point: int, low: float = -UNBOUNDED, high: float = UNBOUNDED
) -> Output:
    return Output(scale, zero_point, low, high, x.dtype)


def _of_one(x: Tensor, function: Function, x_scale: float, x_zero_point: int, *y: Any) -> _Pattern:
    """A function of a tensor whose result has the scale, zero point and bounds `y`."""
    return _Pattern(function, _output(x, *y), Grid(x_scale, x_zero_point, x.dtype))


def _of_integers(x: Tensor, function: Function, zero_point: int = 0) -> _Pattern:
    """A function that computes the same of integers as of the real numbers they stand for.

    Their scale is then of no account, and the zero point only where something is padded.
    """
    return _of_one(x, function, 1.0, zero_point, 1.0, zero_point)


def _of_two(function: Function) -> Callable[..., nn.Module]:
    def pattern(
        x: Tensor,
        a_scale: float,
        a_zero_point: int,
        b_scale: float,
        b_zero_point: int,
        **output: Any,
    ) -> nn.Module:
        grids = (Grid(a_scale, a_zero_point, x.dtype), Grid(b_scale, b_zero_point, x.dtype))
        return _Pattern(function, _output(x, **output), *grids)

    return pattern


class _Cat(_Pattern):
    def __init__(self, dim: int, moves_only: bool, y: Output, *inputs: Grid) -> None:
        super().__init__(torch.cat, y, *inputs)
        self._dim, self._moves_only = dim, moves_only

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        if self._moves_only:
            return self.y.bounded(torch.cat(list(tensors), self._dim))
        return self.y(torch.cat(self._real(tensors), self._dim))  # type: ignore[no-any-return]


def _cat(
    x: Sequence[Tensor],
    scales: Sequence[float],
    zero_points: Sequence[int],
    dim: int,
    scale: float,
    zero_point: int,
    low: float,
    high: float,
) -> nn.Module:
    qparams = list(zip(scales, zero_points, strict=True))
    moves_only = all(pair == (scale, zero_point) for pair in qparams)
    grids = [Grid(*pair, x[0].dtype) for pair in qparams]
    return _Cat(dim, moves_only, _output(x[0], scale, zero_point, low, high), *grids)


class _Quantize(Grid):
    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x.to(torch.float32))


def _quantize(
    x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, channels_last: bool
) -> nn.Module:
    return _Quantize(scale, zero_point, dtype)


class _Dequantize(Grid):
    real_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x).to(self.real_dtype)


def _dequantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> nn.Module:
    pattern = _Dequantize(scale, zero_point, x.dtype)
    pattern.real_dtype = dtype
    return pattern


class _Lookup(nn.Module):
    """A table of 256 results, in the order of the integers' bits as unsigned numbers."""

    table: Tensor

    def __init__(self, x: Tensor, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        # Gather counts negative indices from the end, where the bits of negative int8 belong.
        index = x.to(torch.int32)
        return node("Gather", (self.table, index), x.shape, self.table.dtype, {"axis": 0})


# --- pooling ----------------------------------------------------------------------------------


class _Images(nn.Module):
    """A function of images whose input may lack the dimension of the batch."""

    def __init__(self, dims: int, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._dims, self.inner = dims, inner

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == self._dims + 1:
            return self.inner(x.unsqueeze(0)).squeeze(0)
        return self.inner(x)


def _pooled_size(n: Any, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> Any:
    """How many windows there are along a dimension, as torch counts them."""
    room = n + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    size = (room + stride - 1) // stride + 1
    # The last window must begin within the input or the padding before it.
    return size - 1 if (size - 1) * stride >= n + padding else size


def _pool(
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    **attributes: int,
) -> Tensor:
    """MaxPool or AveragePool of a tensor that has a dimension of the batch."""
    spans = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    sizes = [_pooled_size(*span, ceil_mode) for span in spans]
    of_op: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(stride), **attributes}
    of_op |= {"pads": [*padding, *padding], "ceil_mode": int(ceil_mode)}
    if any(step != 1 for step in dilation):
        of_op["dilations"] = list(dilation)
    return node(op, (x,), (*x.shape[:2], *sizes), x.dtype, of_op)


def _max_pool(x: Tensor, kernel_size: Sequence[int], **others: Any) -> nn.Module:
    def pool(x: Tensor) -> Tensor:
        return _pool("MaxPool", x, kernel_size, **others)

    return _Images(len(kernel_size), pool)


def _avg_pool(
    x: Tensor,
    x_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> nn.Module:
    dims, ones = len(kernel_size), [1] * len(kernel_size)

    def padded(x: Tensor, whole_windows: bool) -> Tensor:
        """x with its padding, and with what the last windows need beyond that."""
        sides: list[Any] = []
        spans = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        for n, kernel, step, before in reversed(list(spans)):
            after: Any = before
            if whole_windows:
                windows = _pooled_size(n, kernel, step, before, 1, True)
                after = max((windows - 1) * step + kernel - n - before, before)
            sides += [before, after]
        return F.pad(x, sides) if any(side != 0 for side in sides) else x

    def pool(x: Tensor) -> Tensor:
        pads, ceil, include = padding, ceil_mode, count_include_pad
        if ceil_mode and (count_include_pad or divisor_override is not None):
            # Runtimes differ in what they count of windows that reach beyond the padding.
            x = padded(x, whole_windows=divisor_override is not None)
            pads, include = [0] * dims, False
            ceil = divisor_override is None
        include = include or divisor_override is not None
        arguments = (kernel_size, stride, pads, ones, ceil)
        y = _pool("AveragePool", x, *arguments, count_include_pad=int(include))
        return y if divisor_override is None else y * (math.prod(kernel_size) / divisor_override)

    return _Images(dims, _of_integers(x, pool, x_zero_point))


def _global_average(x: Tensor) -> Tensor:
    """The mean of each channel; runtimes have a quantized kernel for it by this name."""
    return node("GlobalAveragePool", (x,), (*x.shape[:2], *[1] * (x.dim() - 2)))


def _adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> nn.Module:
    def pool(x: Tensor) -> Tensor:
        given = x.shape[2:]
        if all(size == 1 for size in output_size):
            return _global_average(x)
        if not all(isinstance(n, int) for n in given):
            raise QuantizationError(
                f"adaptive average pooling to {list(output_size)} has no ONNX form for sizes that "
                "are dynamic, since its windows depend on them"
            )
        if all(n % size == 0 for n, size in zip(given, output_size, strict=True)):
            window = [n // size for n, size in zip(given, output_size, strict=True)]
            none, one = [0] * len(window), [1] * len(window)
            return _pool("AveragePool", x, window, window, none, one, False)
        for axis, (n, size) in enumerate(zip(given, output_size, strict=True), 2):
            shares = torch.zeros(n, size)
            for i in range(size):
                first, last = i * n // size, -((i + 1) * n // -size)
                shares[first:last, i] = 1 / (last - first)
            x = (x.transpose(axis, -1) @ shares).transpose(axis, -1)
        return x

    return _Images(len(output_size), _of_integers(x, pool))


def _mean(x: Tensor, dim: Sequence[int], keepdim: bool) -> nn.Module:
    axes = sorted(d % max(x.dim(), 1) for d in dim) if dim else list(range(x.dim()))

    def mean(x: Tensor) -> Tensor:
        if x.dim() > 2 and axes == list(range(2, x.dim())):
            return _global_average(x) if keepdim else _global_average(x).flatten(1)
        return x.mean(axes, keepdim) if axes else x

    return _of_integers(x, mean)


# --- interpolation ----------------------------------------------------------------------------

_MODES: dict[int, Sequence[str]] = {
    LINEAR: ("linear", "bilinear", "trilinear"),
    NEAREST: ("nearest",) * 3,
    NEAREST_EXACT: ("nearest-exact",) * 3,
}


class _Chosen(nn.Module):
    """Which pixel each output takes, dimension by dimension."""

    def __init__(self, indices: Sequence[Tensor]) -> None:
        super().__init__()
        for i, index in enumerate(indices):
            self.register_buffer(f"index_{i}", index)

    def forward(self, x: Tensor, output_size: Sequence[int]) -> Tensor:
        indices = list(self.buffers())
        for axis, index in enumerate(indices, x.dim() - len(indices)):
            x = x.index_select(axis, index)
        return x


class _Resized(_Pattern):
    def forward(self, x: Tensor, output_size: Sequence[int]) -> Tensor:  # type: ignore[override]
        return self.y(self._function(*self._real([x]), output_size))  # type: ignore[no-any-return]


def _interpolate(
    x: Tensor, output_size: Sequence[Any], ratios: Sequence[Any], mode: int, align_corners: bool
) -> nn.Module:
    given, dims = x.shape[2:], len(output_size)
    sizes = list(zip(given, output_size, ratios, strict=True))
    is_static = all(isinstance(n, int) for n in (*given, *output_size))
    if is_static and mode != LINEAR:
        cpu = torch.device("cpu")
        return _Chosen([nearest(n, outputs, ratio, mode, cpu) for n, outputs, ratio in sizes])
    # What the ratio is by the sizes need not be stated.
    by_ratio = mode != LINEAR or not align_corners
    by_ratio &= all(isinstance(ratio, float) for ratio in ratios)
    if by_ratio and is_static:
        by_ratio = any(abs(ratio - n / outputs) > 1e-9 for n, outputs, ratio in sizes)
    options: dict[str, Any] = {"mode": _MODES[mode][dims - 1]}
    if mode == LINEAR:
        options["align_corners"] = align_corners

    def resize(x: Tensor, output_size: Sequence[int]) -> Tensor:
        if by_ratio:
            factors = [1 / ratio for ratio in ratios]
            return F.interpolate(x, scale_factor=factors, **options)
        return F.interpolate(x, list(output_size), **options)

    return _Resized(resize, _output(x, 1.0, 0), Grid(1.0, 0, x.dtype))


# --- norms ------------------------------------------------------------------------------------


class _Affine(nn.Module):
    """A factor and an addend for each channel."""

    factor: Tensor
    addend: Tensor

    def __init__(self, factor: Tensor, addend: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)
        self.register_buffer("addend", addend)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return x * self.factor.reshape(shape) + self.addend.reshape(shape)


def _batch_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    **output: Any,
) -> nn.Module:
    factor = 1 / (running_var.double() + eps).sqrt()
    if weight is not None:
        factor = factor * weight.double()
    addend = -running_mean.double() * factor
    if bias is not None:
        addend = addend + bias.double()
    affine = _Affine(factor.float(), addend.float())
    return _Pattern(affine, _output(x, **output), Grid(x_scale, x_zero_point, x.dtype))


class _Norm(nn.Module):
    """A norm of torch with weight and bias, if there are any."""

    def __init__(
        self, norm: Callable[..., Tensor], weight: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self._norm = norm
        self.register_buffer("weight", None if weight is None else weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.bias)


def _group_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    **output: Any,
) -> nn.Module:
    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)

    inner = _Norm(norm, weight, bias)
    return _Pattern(inner, _output(x, **output), Grid(x_scale, x_zero_point, x.dtype))


def _layer_norm(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    **output: Any,
) -> nn.Module:
    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, list(normalized_shape), weight, bias, eps)

    inner = _Norm(norm, weight, bias)
    return _Pattern(inner, _output(x, **output), Grid(x_scale, x_zero_point, x.dtype))


def _softmax(x: Tensor, x_scale: float, dim: int, scale: float, zero_point: int) -> nn.Module:
    def softmax(x: Tensor) -> Tensor:
        return F.softmax(x, dim)

    # What is added to all inputs does not matter.
    return _of_one(x, softmax, x_scale, 0, scale, zero_point)


PATTERNS: Mapping[str, Callable[..., nn.Module]] = {
    "dequantize": _dequantize,
    "dynamic_linear": DynamicLinear,
    "half_linear": HalfLinear,
    "lookup": _Lookup,
    "quantize": _quantize,
    "quantized_adaptive_avg_pool": _adaptive_avg_pool,
    "quantized_add": _of_two(torch.add),
    "quantized_avg_pool": _avg_pool,
    "quantized_batch_norm": _batch_norm,
    "quantized_cat": _cat,
    "quantized_conv": Conv,
    "quantized_conv_transpose": ConvTranspose,
    "quantized_group_norm": _group_norm,
    "quantized_interpolate": _interpolate,
    "quantized_layer_norm": _layer_norm,
    "quantized_linear": Linear,
    "quantized_max_pool": _max_pool,
    "quantized_mean": _mean,
    "quantized_mul": _of_two(torch.mul),
    "quantized_softmax": _softmax,
}
"""By the name of an op, what makes the pattern of a call.

It takes the op's first tensor, which may have no data, and the op's constants by their names.
"""
TAKES_FOUR_BITS = ("quantized_conv", "quantized_conv_transpose", "quantized_linear")
"""Those that also take `four_bits`."""
