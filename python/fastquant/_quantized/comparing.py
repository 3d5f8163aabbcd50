"""Comparing and ordering quantized tensors.

A scale is positive, so integers of one tensor are ordered as the real numbers that they stand for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tensor import (
    Handler,
    QuantizedTensor,
    functions_named,
    handles,
    integers_of,
    is_quantized,
    like,
    parts,
)

# --- element by element ---------------------------------------------------------------------


def _real(x: Any) -> Any:
    return x.dequantize() if is_quantized(x) else x


def _comparing(compare: Callable[[Any, Any], Any]) -> Handler:
    def of_real_numbers(input: Any, other: Any) -> Any:
        return compare(_real(input), _real(other))

    return of_real_numbers


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _functions = (*functions_named(_name), getattr(Tensor, f"__{_name}__"))
    handles(*_functions, plain_first=True)(_comparing(getattr(operator, _name)))


@handles(*functions_named("equal"), plain_first=True)
def _equal(input: Any, other: Any) -> bool:
    """Whether values, scales and zero points are equal."""
    if not (is_quantized(input) and is_quantized(other)):
        return False
    values, *qparams = parts(input)
    other_values, *other_qparams = parts(other)
    return (
        values.dtype == other_values.dtype
        and qparams == other_qparams
        and torch.equal(values, other_values)
    )


# --- the whole tensor -----------------------------------------------------------------------


def _choosing(function: Callable[..., Any]) -> Handler:
    """For functions that return some of the elements, with or without their indices."""

    def choose(input: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        chosen = function(integers_of(input), *args, **kwargs)
        if isinstance(chosen, Tensor):
            return like(input, chosen)
        values, indices = chosen
        return type(chosen)((like(input, values), indices))

    return choose


def _indexing(function: Callable[..., Any]) -> Handler:
    def index(input: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        return function(integers_of(input), *args, **kwargs)

    return index


for _name in ("max", "min", "amax", "amin", "sort", "topk", "msort", "median", "kthvalue"):
    for _function in functions_named(_name):
        handles(_function)(_choosing(_function))
for _name in ("argmax", "argmin", "argsort"):
    for _function in functions_named(_name):
        handles(_function)(_indexing(_function))

# --- one element ----------------------------------------------------------------------------


def _converting(convert: Callable[[Any], Any]) -> Handler:
    return lambda input: convert(input.dequantize())


for _name, _convert in (("item", Tensor.item), ("__float__", float), ("__int__", int)):
    handles(getattr(Tensor, _name))(_converting(_convert))
handles(Tensor.__bool__)(_converting(bool))
