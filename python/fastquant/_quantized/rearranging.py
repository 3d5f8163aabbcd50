"""Moving elements of quantized tensors: shapes, indexing, joining, copying, devices.

The integers move as in any tensor, and scale and zero point stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import ops
from .._torch.private import ignoring_overrides
from . import calls
from .tensor import (
    CHANGES_CLASS,
    HANDLERS,
    Handler,
    QuantizedTensor,
    add_property,
    as_integer_dtype,
    functions_named,
    handles,
    integers_of,
    is_dynamo_compiling,
    is_quantized,
    like,
    made,
    not_supported,
    on_integers,
    parts,
    require_quantized,
)

# --- one tensor from one tensor -------------------------------------------------------------


def _moving(function: Callable[..., Any]) -> Handler:
    # Functions in Python may call methods of the class that they get.
    on_ordinary = isinstance(function, FunctionType) or not CHANGES_CLASS
    name = function.__name__
    is_method = function is getattr(Tensor, name, None)

    def move(input: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or on_ordinary or type(input) is not QuantizedTensor:
            integers = integers_of(input)
            # torch.compile does not trace methods of Tensor that are called as functions.
            call = getattr(integers, name) if is_method else functools.partial(function, integers)
            moved = call(*args, **kwargs)
            return made(moved, input._scale, input._zero_point)
        with ignoring_overrides():  # a sixth of the time that integers_of(input) takes
            moved = function(input, *args, **kwargs)
        if moved is not input:
            # As made() does; each call counts here.
            moved.__class__ = QuantizedTensor
            moved._scale, moved._zero_point = input._scale, input._zero_point
        return moved

    return move


def _moving_to_several(function: Callable[..., Any]) -> Handler:
    on_ordinary = isinstance(function, FunctionType) or not CHANGES_CLASS

    def move(input: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or on_ordinary or type(input) is not QuantizedTensor:
            moved = function(integers_of(input), *args, **kwargs)
            return type(moved)([like(input, values) for values in moved])
        with ignoring_overrides():
            moved = function(input, *args, **kwargs)
        for values in moved:
            values.__class__ = QuantizedTensor
            values._scale, values._zero_point = input._scale, input._zero_point
        return moved

    return move


def _moving_in_place(function: Callable[..., Any]) -> Handler:
    call = on_integers(function)

    def move(input: Any, *args: Any, **kwargs: Any) -> QuantizedTensor:
        moved = call(input, *args, **kwargs)
        if not isinstance(input, Tensor):
            input._integers = moved
        return input  # type: ignore[no-any-return]

    return move


def _shaped_like(function: Callable[..., Any]) -> Handler:
    """For functions that read the shape of another tensor, quantized or not."""

    def move(input: QuantizedTensor, other: Any) -> QuantizedTensor:
        return like(
            input,
            function(integers_of(input), integers_of(other) if is_quantized(other) else other),
        )

    return move


_WAYS: tuple[tuple[Callable[[Any], Handler], tuple[str, ...]], ...] = (
    (
        _moving,
        (
            *("flatten", "reshape", "permute", "transpose", "swapaxes", "swapdims", "t", "ravel"),
            *("movedim", "moveaxis", "adjoint", "select", "narrow", "index_select", "gather"),
            *(
                "take",
                "masked_select",
                "take_along_dim",
                "unsqueeze",
                "squeeze",
                "expand",
                "unfold",
            ),
            *("broadcast_to", "repeat", "repeat_interleave", "tile", "roll", "flip", "fliplr"),
            *("flipud", "rot90", "unflatten", "as_strided", "diagonal", "clone", "detach"),
            *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
            *("contiguous", "cpu", "cuda", "pin_memory", "share_memory_", "__getitem__", "unfold"),
            *("atleast_1d", "atleast_2d", "atleast_3d"),
        ),
    ),
    (
        _moving_to_several,
        ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "hsplit", "vsplit"),
    ),
    (
        _moving_in_place,
        (
            *("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_"),
            "resize_",
        ),
    ),
    (_shaped_like, ("expand_as", "view_as", "reshape_as")),
)
# Functions whose results hold elements of their input, and nothing else.
MOVES: set[Any] = set()
for _way, _names in _WAYS:
    for _name in _names:
        for _function in functions_named(_name):
            # Tensor.unfold takes windows along a dimension, F.unfold makes columns of patches.
            if _function is not F.unfold:
                handles(_function)(_way(_function))
                MOVES.add(_function)


# By methods, because torch.compile cannot make another class of an attribute of a graph's input.
for _name in ("mT", "mH"):
    add_property(_name, lambda self: self.transpose(-2, -1))
for _name in ("T", "H"):
    add_property(_name, lambda self: self.permute(*reversed(range(self.dim()))))
add_property("data", lambda self: self.detach())


def _check_same_dtype(input: QuantizedTensor, dtype: Any, function: Any) -> None:
    try:
        same = as_integer_dtype(dtype) == input.dtype
    except TypeError:
        same = False
    if not same:
        raise not_supported(function, f" of dtype {input.dtype} to make them {dtype}")


_reshape = HANDLERS[Tensor.reshape]


MOVES.add(Tensor.view)


@handles(Tensor.view)
def _view(input: QuantizedTensor, *shape: Any, **kwargs: Any) -> QuantizedTensor:
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        _check_same_dtype(input, kwargs["dtype"] if kwargs else shape[0], Tensor.view)
        return input
    # Outputs of layers are in channels_last, which a model that views them need not know.
    return _reshape(input, *shape, **kwargs)  # type: ignore[no-any-return]


_to_on_integers = on_integers(Tensor.to)


@handles(Tensor.to)
def _to(input: QuantizedTensor, *args: Any, dtype: Any = None, **kwargs: Any) -> QuantizedTensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    given = [arg for arg in args if isinstance(arg, torch.dtype)]
    for each in (*given, *([] if dtype is None else [dtype])):
        _check_same_dtype(input, each, Tensor.to)
    args = tuple(arg for arg in args if not isinstance(arg, torch.dtype))
    moved = _to_on_integers(input, *args, **kwargs) if args or kwargs else input
    return input if moved is input else like(input, moved)


@handles(Tensor.type)
def _type(input: QuantizedTensor, dtype: Any = None, **kwargs: Any) -> Any:
    return integers_of(input).type() if dtype is None else _to(input, dtype)


@handles(Tensor.type_as, plain_first=True)
def _type_as(input: Any, other: Any) -> Any:
    if not (is_quantized(input) and is_quantized(other)):
        raise not_supported(Tensor.type_as, " together with ordinary ones")
    return _to(input, other)


@handles(Tensor.__iter__)
def _iter(input: QuantizedTensor) -> Iterator[Tensor]:
    if input.dim() == 0:
        raise TypeError("iteration over a 0-d tensor")
    return iter(input.unbind(0))


@handles(Tensor.requires_grad_)
def _requires_grad_(input: QuantizedTensor, requires_grad: bool = True) -> QuantizedTensor:
    if requires_grad:
        raise RuntimeError("quantized tensors hold integers, which have no gradients")
    return input


@handles(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout)
def _dropout(
    input: QuantizedTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> QuantizedTensor:
    if training and p > 0:
        raise not_supported(F.dropout, " in training (model.eval() switches it off)")
    return input


# --- one tensor from several ----------------------------------------------------------------


def _into(out: Any, x: QuantizedTensor) -> QuantizedTensor:
    """`out`, made equal to x in shape, integers, scale and zero point."""
    require_quantized(out, "out")
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of the result, {x.dtype}, got {out.dtype}")
    if out.shape != x.shape:
        out.resize_(x.shape)
    return _copy_(out, x)


@handles(*functions_named("cat"), torch.concat, torch.concatenate)
def _cat(
    tensors: Sequence[Any], dim: int = 0, *, axis: int | None = None, out: Any = None
) -> QuantizedTensor:
    """With scale and zero point of the first, as torch does with its quantized tensors."""
    if out is not None:
        return _into(out, _cat(tensors, dim, axis=axis))
    dim = dim if axis is None else axis
    first = tensors[0]
    require_quantized(first, "tensors[0]")
    rest = (dim, first._scale, first._zero_point, -calls.UNBOUNDED, calls.UNBOUNDED)
    joined: QuantizedTensor | None = calls.cat_without_op(tensors, *rest)
    if joined is not None:
        return joined
    for i, x in enumerate(tensors):
        require_quantized(x, f"tensors[{i}]")
    if len({x.dtype for x in tensors}) > 1:
        raise TypeError(
            "torch.cat takes quantized tensors of one dtype, got "
            + " and ".join(sorted({str(x.dtype) for x in tensors}))
        )
    return calls.cat(tensors, *rest)


@handles(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0, *, out: Any = None) -> QuantizedTensor:
    # Workers of a DataLoader stack batches in shared memory, which they give as `out`.
    for i, x in enumerate(tensors):
        require_quantized(x, f"tensors[{i}]")
    return _cat([x.unsqueeze(dim) for x in tensors], dim, out=out)


@handles(torch.hstack)
def _hstack(tensors: Sequence[Any]) -> QuantizedTensor:
    tensors = [x.reshape(1) if x.dim() == 0 else x for x in tensors]
    return _cat(tensors, 0 if tensors[0].dim() == 1 else 1)


@handles(torch.vstack, torch.row_stack)
def _vstack(tensors: Sequence[Any]) -> QuantizedTensor:
    return _cat([x if x.dim() > 1 else x.reshape(1, -1) for x in tensors], 0)


@handles(torch.dstack)
def _dstack(tensors: Sequence[Any]) -> QuantizedTensor:
    tensors = [x if x.dim() > 1 else x.reshape(1, -1) for x in tensors]
    return _cat([x if x.dim() > 2 else x.unsqueeze(-1) for x in tensors], 2)


def _several_shapes(function: Callable[..., Any]) -> Handler:
    def move(*tensors: Any, **kwargs: Any) -> Any:
        if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
            tensors = tuple(tensors[0])
        values = [integers_of(x) if is_quantized(x) else x for x in tensors]
        moved = zip(tensors, function(*values, **kwargs), strict=True)
        return tuple(like(x, v) if is_quantized(x) else v for x, v in moved)

    return move


for _function in (torch.broadcast_tensors, torch.meshgrid):
    handles(_function, plain_first=True)(_several_shapes(_function))

# --- values from elsewhere ------------------------------------------------------------------


def level(x: QuantizedTensor, real: float) -> int:
    """The integer that stands for a real number."""
    if isinstance(real, Tensor):
        if real.numel() != 1:
            raise not_supported(Tensor.clamp, f" with a bound of shape {list(real.shape)}")
        real = real.item()
    if real != real:
        raise ValueError("NaN stands for no integer of a quantized tensor")
    info = torch.iinfo(x.dtype)
    # Limited before it is rounded, because infinity, and what overflows to it, has no integer.
    steps = min(max(real / x._scale, -512.0), 512.0)
    return min(max(round(steps) + x._zero_point, info.min), info.max)


def _levels(x: QuantizedTensor, other: Any) -> Any:
    """The integers of x's scale and zero point that stand for what `other` holds."""
    if is_quantized(other):
        if parts(other)[1:] == parts(x)[1:] and other.dtype == x.dtype:
            return integers_of(other)
        other = other.dequantize()
    if isinstance(other, Tensor):
        return ops.quantize(other, x._scale, x._zero_point, x.dtype, False)
    return level(x, other)


@handles(Tensor.__setitem__, plain_first=True)
def _setitem(input: Any, index: Any, value: Any) -> None:
    if not is_quantized(input):
        raise not_supported(Tensor.__setitem__, " to put into ordinary ones")
    integers_of(input)[index] = _levels(input, value)


@handles(Tensor.copy_, plain_first=True)
def _copy_(input: Any, src: Any, non_blocking: bool = False) -> QuantizedTensor:
    """Takes the scale and zero point of a quantized source, as torch's quantized tensors do."""
    if not is_quantized(input):
        raise not_supported(Tensor.copy_, " to copy into ordinary ones")
    if is_quantized(src) and src.dtype == input.dtype:
        integers_of(input).copy_(integers_of(src), non_blocking)
        input._scale, input._zero_point = src._scale, src._zero_point
    else:
        integers_of(input).copy_(_levels(input, src), non_blocking)
    return input  # type: ignore[no-any-return]


@handles(*functions_named("fill_"))
def _fill_(input: QuantizedTensor, value: Any) -> QuantizedTensor:
    integers_of(input).fill_(_levels(input, value))
    return input


@handles(*functions_named("zero_"))
def _zero_(input: QuantizedTensor) -> QuantizedTensor:
    return _fill_(input, 0.0)


@handles(Tensor.masked_fill, torch.masked_fill)
def _masked_fill(input: QuantizedTensor, mask: Tensor, value: Any) -> QuantizedTensor:
    return like(input, integers_of(input).masked_fill(mask, _levels(input, value)))


@handles(Tensor.masked_fill_)
def _masked_fill_(input: QuantizedTensor, mask: Tensor, value: Any) -> QuantizedTensor:
    integers_of(input).masked_fill_(mask, _levels(input, value))
    return input


@handles(Tensor.new)
def _new(input: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    """Of a size or on a storage, with the scale and zero point of the input."""
    if any(isinstance(arg, (Tensor, list)) for arg in args):
        raise not_supported(Tensor.new, " to make them of other values")
    return like(input, integers_of(input).new(*args, **kwargs))


@handles(torch.empty_like)
def _empty_like(input: QuantizedTensor, *, dtype: Any = None, **kwargs: Any) -> QuantizedTensor:
    _check_same_dtype(input, dtype or input.dtype, torch.empty_like)
    return like(input, torch.empty_like(integers_of(input), **kwargs))


def _filled_like(input: QuantizedTensor, fill_value: float, **kwargs: Any) -> QuantizedTensor:
    return _fill_(_empty_like(input, **kwargs), fill_value)


handles(torch.full_like)(_filled_like)
handles(torch.zeros_like)(functools.partial(_filled_like, fill_value=0.0))
handles(torch.ones_like)(functools.partial(_filled_like, fill_value=1.0))

# --- padding --------------------------------------------------------------------------------


@handles(F.pad)
def _pad(
    input: QuantizedTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> QuantizedTensor:
    if mode == "constant":
        padded = F.pad(integers_of(input), pad, mode, level(input, value or 0.0))
    else:
        padded = F.pad(integers_of(input), pad, mode)
    return like(input, padded)
