"""What functions of torch do, in a simulated model, to tensors that converted layers would give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._native import ops
from .._quantized import comparing
from .._quantized import tensor as carrier
from .._quantized.rearranging import MOVES
from .._quantized.tensor import HANDLERS, QuantizedTensor, made
from .._torch import ao
from .errors import RUN_ERRORS
from .grids import Grid

# Attribute of a tensor: what a QuantizedTensor of the same values would have.
_GRID = "_simulated_grid"
# What the handlers in these files tell is the same for a floating tensor of the same values.
_SAME_IN_FLOAT = (carrier.__name__, comparing.__name__)

_Grid = tuple[float, int, torch.dtype]


def remember_grid(x: Tensor, grid: Grid) -> None:
    """Note that `x` was rounded to a grid, for the functions that it goes into next."""
    if grid.ch_axis is not None or grid.zero_point.is_floating_point():
        return
    for dtype in carrier.INTEGER_DTYPES:
        limits = torch.iinfo(dtype)
        if limits.min <= grid.quant_min and grid.quant_max <= limits.max:
            setattr(x, _GRID, (float(grid.scale), int(grid.zero_point), dtype))
            return


def copied(x: Tensor) -> Tensor:
    """A copy, on the same grid."""
    copy = x.clone()
    if hasattr(x, _GRID):
        setattr(copy, _GRID, getattr(x, _GRID))
    return copy


def _on_grids(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors on a grid among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _on_grids(value)
        elif hasattr(value, _GRID):
            yield value


class Between(TorchFunctionMode):
    """In this context, functions round tensors on a grid as converted models do between layers.

    In a converted model, pooling, means and the like work on integers, and what they give is
    rounded to the grid of their input. What has no such form there computes in float here.

    Args:
        model: whose forward is run in the context; what a DeQuantStub gives is on no grid.
        whole: modules that convert swaps whole. What goes on inside of them stays as it is.
    """

    def __init__(self, model: nn.Module, whole: Iterable[nn.Module]) -> None:
        super().__init__()
        self._depth = 0
        for module in whole:
            module.register_forward_pre_hook(self.begin)
            module.register_forward_hook(self.end)
        for module in model.modules():
            if isinstance(module, ao.DeQuantStub):
                module.register_forward_hook(self._leave_grid)

    def __enter__(self) -> Between:
        self._depth = 0  # whatever ended in an error before
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def begin(self, *_: Any) -> None:
        """From here on, functions belong to a layer, which rounds its output itself."""
        self._depth += 1

    def end(self, *_: Any) -> None:
        """The layer is done."""
        self._depth -= 1

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()

    def within(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that computes as the inside of a layer does."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._inside():
                return method(*args, **kwargs)

        return call

    def _leave_grid(self, module: nn.Module, args: Any, output: Any) -> Any:
        with self._inside():
            return output.view_as(output) if hasattr(output, _GRID) else output

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = () if self._depth else tuple(_on_grids((*args, *kwargs.values())))
        handler = HANDLERS.get(func) if given else None
        if handler is None or getattr(handler, "__module__", "") in _SAME_IN_FLOAT:
            return _unless_changed(given, func, args, kwargs)
        if func in MOVES:
            return _put_on_grid(func(*args, **kwargs), getattr(given[0], _GRID))
        quantized = {id(x): _quantized(x) for x in given}
        try:
            result = handler(*_replaced(args, quantized), **_replaced(kwargs, quantized))
        except RUN_ERRORS:
            return _unless_changed(given, func, args, kwargs)
        return _dequantized(result, {id(quantized[id(x)]): x for x in given})


def _unless_changed(given: Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives in float; what it changed in place is on no grid any more."""
    versions = [None if x.is_inference() else x._version for x in given]
    result = func(*args, **kwargs)
    for x, version in zip(given, versions, strict=True):
        if version is None or x._version != version:
            delattr(x, _GRID)
    return result


def _quantized(x: Tensor) -> QuantizedTensor:
    scale, zero_point, dtype = getattr(x, _GRID)
    return made(ops.quantize(x.detach(), scale, zero_point, dtype, False), scale, zero_point)


def _replaced(value: Any, quantized: dict[int, QuantizedTensor]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, quantized) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, quantized) for item in value)
    return quantized.get(id(value), value)


def _put_on_grid(result: Any, grid: _Grid) -> Any:
    for x in result if isinstance(result, (list, tuple)) else (result,):
        setattr(x, _GRID, grid)
    return result


def _dequantized(result: Any, originals: dict[int, Tensor]) -> Any:
    """A handler's result in float; where it is an argument, that was changed in place."""
    if type(result) in (list, tuple):
        return type(result)(_dequantized(item, originals) for item in result)
    if not isinstance(result, QuantizedTensor):
        return result
    real, original = result.dequantize(), originals.get(id(result))
    if original is not None:
        real = original.copy_(real)
    return _put_on_grid(real, (result._scale, result._zero_point, result.dtype))
