"""Functions of one element, as tables of what they make of the 256 integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _C
from .._native.fast_calls import nothing_intervenes
from .._torch.compiling import constant_in_graphs
from .._torch.private import dispatch_modes
from . import calls
from .tensor import QuantizedTensor, dtype_and_device, is_dynamo_compiling

# By name, because names are what a graph's guards compare.
_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "elu": F.elu,
    "gelu": lambda x, approximate: F.gelu(x, approximate=approximate),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "threshold": F.threshold,
}


def _table(
    function: str,
    constants: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
    x_scale: float,
    x_zero_point: int,
    scale: float,
    zero_point: int,
) -> Tensor:
    """The output's integer for each of the input's 256, computed in fp64 and rounded once."""
    integers = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64)
    y = _FUNCTIONS[function]((integers - x_zero_point) * x_scale, *constants)
    limits = torch.iinfo(dtype)
    levels = (y / scale).round() + zero_point
    return levels.clamp(limits.min, limits.max).to(dtype).to(device)


_KEPT = 1024
_kept_table = constant_in_graphs(lru_cache(maxsize=_KEPT)(_table))
# By the same but dtype and device: the latest table, and the zero point of what it makes. To ask a
# quantized tensor for its dtype and device takes longer than to look its elements up.
_latest: dict[Any, tuple[Tensor, int]] = {}

_uses_tables = ContextVar("_uses_tables", default=True)


@contextmanager
def without_tables() -> Iterator[None]:
    """Functions are computed in floating point meanwhile: for graphs that other runtimes will run.

    They know the functions by name, and have faster kernels for them than for tables.
    """
    token = _uses_tables.set(False)
    try:
        yield
    finally:
        _uses_tables.reset(token)


def applied(
    function: str,
    input: Any,
    scale: float,
    zero_point: int,
    *constants: Any,
    zero_point_of_int8: int | None = None,
) -> QuantizedTensor:
    """A function of each element, as integers with this scale and zero point.

    The table is made once for each input's scale and zero point.
    """
    alone = nothing_intervenes() and _uses_tables.get() and type(input) is QuantizedTensor
    if alone:
        x_qparams = (input._scale, input._zero_point)
        key = (function, constants, x_qparams, scale, zero_point, zero_point_of_int8)
        known = _latest.get(key)
        if known is not None:
            # None for an input of another dtype, or one on another device.
            result: QuantizedTensor | None = _C.lookup(input, known[0], scale, known[1])
            if result is not None:
                return result
    dtype, device = dtype_and_device(input)
    if dtype == torch.int8 and zero_point_of_int8 is not None:
        zero_point = zero_point_of_int8
    if not is_dynamo_compiling() and not _uses_tables.get():
        y = _FUNCTIONS[function](calls.dequantize(input), *constants)
        return calls.quantize(y, scale, zero_point, dtype)
    # What is made while a mode is active, such as export's, may be no real tensor.
    make = _kept_table if is_dynamo_compiling() or not dispatch_modes() else _table
    qparams = (input._scale, input._zero_point, scale, zero_point)
    table = make(function, constants, dtype, device, *qparams)
    if alone:
        if len(_latest) >= _KEPT:
            _latest.clear()
        _latest[key] = (table, zero_point)
    return calls.lookup(input, table, scale, zero_point)
