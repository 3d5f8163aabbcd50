"""The classes of quantized tensors, and how a function of torch finds what to do with one.

A quantized tensor is an ordinary uint8 or int8 tensor, its values, with a scale and a zero point:
`real = (value - zero_point) * scale`. Handlers, in the other files of this folder, say what a
function of torch does with it. What has no handler raises an error: that function would take the
integers for the numbers they stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.dtypes import INT8, UINT8, plain_dtype
from .._torch.compiling import outside_graphs, when_compiling
from .._torch.private import (
    ask_subclasses_in_graphs,
    find_in_tuples_in_graphs,
    ignoring_overrides,
    is_compiler_at_work,
    is_exporting,
    override_in_graphs,
    torch_release,
)

is_dynamo_compiling = torch.compiler.is_dynamo_compiling

Handler = Callable[..., Any]
_Function = TypeVar("_Function", bound=Handler)

# What to call, by the function of torch. A class attribute, such as x.shape, has its getter here.
HANDLERS: dict[Any, Handler] = {}
# Handlers whose first argument may be an ordinary tensor, if another one is quantized.
_TAKES_PLAIN_FIRST: set[Handler] = set()

INTEGER_DTYPES = (torch.uint8, torch.int8)


def _name_of(function: Any) -> str:
    """How users would write the function."""
    name = getattr(function, "__name__", None) or str(function)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    module = getattr(function, "__module__", None) or ""
    if type(function).__name__.startswith("OpOverload"):
        return f"torch.ops.{function}"
    if module in ("torch", "torch.functional"):
        return f"torch.{name}"
    if module and getattr(F, name, None) is function:
        return f"torch.nn.functional.{name}"
    return f"Tensor.{name}"


_ARITHMETIC = {
    **dict.fromkeys(("add", "add_", "__radd__", "sub", "sub_", "rsub", "__rsub__"), "add"),
    **dict.fromkeys(("mul", "mul_", "multiply"), "mul"),
    **dict.fromkeys(("matmul", "mm", "bmm", "__rmatmul__"), "matmul"),
}


def not_supported(function: Any, why: str = "") -> NotImplementedError:
    """The error for a function that has no meaning on quantized tensors, or none yet."""
    name = _name_of(function)
    remedy = ""
    method = _ARITHMETIC.get(name.rpartition(".")[2])
    if method is not None:
        remedy = (
            f"give the model a fastquant.nn.quantized.FloatFunctional, whose {method}() gets a "
            "scale and a zero point of its own for the result when the model is converted; or "
        )
    return NotImplementedError(
        f"{name} does not take quantized tensors{why}: {remedy}call it with x.dequantize(), the "
        "real numbers, or with x.int_repr(), the integers that stand for them; a layer can stand "
        "between a DeQuantStub and a QuantStub"
    )


class _Integers:
    """The attribute `_integers`, which tensors that are made in a graph have as their own.

    torch.compile reads it of a graph's input; elsewhere, integers_of(x) takes less time. Of a
    property, torch.compile would trace the code.

    The same tensor each time, as long as it still is what `x` holds: torch.compile compares the
    addresses of a graph's inputs, and the next tensor could get that of one which nobody keeps.
    """

    def __get__(self, x: QuantizedTensor, owner: Any) -> Tensor:
        values, known = integers_of(x), x.__dict__.get("_integers_of_input")
        if known is not None and known.is_set_to(values):
            return known  # type: ignore[no-any-return]
        x.__dict__["_integers_of_input"] = values
        return values


if torch_release < (2, 13):
    # Dynamo would compile what reads a graph's inputs, whose graph would read its input, and so on.
    outside_graphs(_Integers, "__get__", "it is read before a graph runs")


class QuantizedTensor(Tensor):
    """Integers with one scale and one zero point: `real = (value - zero_point) * scale`.

    A torch.Tensor of dtype uint8 or int8 to the code between quantized modules. What rearranges
    elements, compares them, pools or pads works as with torch's quantized tensors; other functions
    of torch raise an error.

    Args:
        values: the integers, uint8 or int8. They are shared, not copied.
        scale: positive.
        zero_point: within the range of the dtype.
    """

    _integers = _Integers()
    _scale: float
    _zero_point: int

    def __new__(cls, values: Tensor, scale: float, zero_point: int) -> QuantizedTensor:
        check_integers(values)
        check_qparams(scale, zero_point, values.dtype)
        return made(values.detach(), float(scale), int(zero_point))

    def __init__(self, values: Tensor, scale: float, zero_point: int) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What a function of torch returns for arguments of which one is quantized."""
        handler = HANDLERS.get(func)
        if handler is None:
            raise not_supported(func)
        first = args[0] if args else None
        plain = not isinstance(first, _CLASSES) and isinstance(first, Tensor)
        if plain and handler not in _TAKES_PLAIN_FIRST:
            raise not_supported(func, " together with ordinary ones")
        return handler(*args, **kwargs) if kwargs else handler(*args)


class ExportedQuantizedTensor:
    """What a QuantizedTensor is while torch.export traces: the same, but no torch.Tensor.

    Non-strict export replaces tensors with fake ones, and has no fake for a subclass.
    """

    __slots__ = ("_integers", "_scale", "_zero_point")

    def __init__(self, values: Tensor, scale: float, zero_point: int) -> None:
        self._integers, self._scale, self._zero_point = values, scale, zero_point

    __torch_function__ = QuantizedTensor.__torch_function__

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("__"):
            raise not_supported(getattr(Tensor, name))
        raise AttributeError(f"'QuantizedTensor' object has no attribute {name!r}")


def _refusing(function: Any) -> Any:
    def operator(*_: Any) -> Any:
        raise not_supported(function)

    return operator


# Python looks for operators at the class. Handlers that are registered replace these.
for _name in ("add", "sub", "mul", "matmul", "div", "pow"):
    for _prefix in ("", "r", "i"):
        _operator = "truediv" if _name == "div" else _name
        setattr(
            ExportedQuantizedTensor,
            f"__{_prefix}{_operator}__",
            _refusing(getattr(Tensor, _name)),
        )
setattr(ExportedQuantizedTensor, "__neg__", _refusing(Tensor.neg))  # noqa: B010

_CLASSES: tuple[type, ...] = (QuantizedTensor, ExportedQuantizedTensor)


def _changes_class() -> bool:
    """Whether an ordinary tensor can be made a quantized one by setting its class."""
    try:
        torch.empty(0, dtype=torch.uint8).__class__ = QuantizedTensor
    except TypeError:
        return False
    return True


CHANGES_CLASS = _changes_class()


def made(values: Tensor, scale: float, zero_point: int) -> QuantizedTensor:
    """A quantized tensor of these values, which nothing checks.

    `values` itself becomes it, so it must be a tensor that nothing else uses.
    """
    x: Any
    if is_exporting():
        x = ExportedQuantizedTensor(values, scale, zero_point)
    elif is_dynamo_compiling() or type(values) is not Tensor or not CHANGES_CLASS:
        x = values.as_subclass(QuantizedTensor)
        x._integers, x._scale, x._zero_point = values, scale, zero_point
    else:
        # To make a second tensor on the same memory takes three times as long as all this.
        x = values
        x.__class__ = QuantizedTensor
        x._scale, x._zero_point = scale, zero_point
    return x  # type: ignore[no-any-return]


def integers_of(x: Any) -> Tensor:
    """The integers as an ordinary tensor on the same memory."""
    if is_dynamo_compiling() or not isinstance(x, QuantizedTensor):
        return x._integers  # type: ignore[no-any-return]
    with ignoring_overrides():
        return Tensor.as_subclass(x, Tensor)


_get_dtype, _get_device = (getattr(Tensor, name).__get__ for name in ("dtype", "device"))


def dtype_and_device(x: Any) -> tuple[torch.dtype, torch.device]:
    """Both of a quantized tensor, in less time than its attributes take."""
    if is_dynamo_compiling() or not isinstance(x, QuantizedTensor):
        return x.dtype, x.device
    with ignoring_overrides():
        return _get_dtype(x), _get_device(x)


def like(x: QuantizedTensor, values: Tensor) -> QuantizedTensor:
    """A quantized tensor with the scale and zero point of `x`."""
    return made(values, x._scale, x._zero_point)


def parts(x: Any, what: str = "input") -> tuple[Tensor, float, int]:
    """Values, scale and zero point of a quantized tensor; `what` names it in the error."""
    require_quantized(x, what)
    return integers_of(x), x._scale, x._zero_point


def on_integers(function: Handler) -> Handler:
    """What a function makes of a quantized tensor's integers: ordinary tensors, or x itself."""
    # Functions in Python may call methods of the class that they get.
    in_python = isinstance(function, FunctionType)

    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or in_python or not isinstance(input, QuantizedTensor):
            return function(integers_of(input), *args, **kwargs)
        with ignoring_overrides():  # a sixth of the time that integers_of(input) takes
            return function(input, *args, **kwargs)

    return call


def is_quantized(x: Any) -> bool:
    """Whether x is a quantized tensor of this package."""
    return isinstance(x, _CLASSES)


def require_quantized(x: Any, what: str = "input") -> None:
    """Raise an error that names what is not a quantized tensor."""
    if isinstance(x, _CLASSES):
        return
    if isinstance(x, PerChannelQuantizedTensor):
        found = "a tensor with a scale for each channel, which only weights have"
    elif isinstance(x, Tensor):
        found = f"an ordinary tensor of dtype {x.dtype}"
    else:
        found = f"{type(x).__name__}"
    raise TypeError(
        f"{what} must be a quantized tensor, got {found}; a QuantStub at the start of the "
        "quantized part of the model makes one, as fastquant.quantized_tensor.quantize_per_tensor "
        "does"
    )


def as_integer_dtype(dtype: Any) -> torch.dtype:
    """uint8 or int8, also for torch's quantized dtypes of the same integers."""
    if dtype in INT8 or dtype in UINT8:
        return plain_dtype(dtype)
    raise TypeError(f"dtype must be torch.uint8 or torch.int8, got {dtype}")


def check_floating(x: Any) -> None:
    """Raise an error unless x is a tensor that can be quantized."""
    if not isinstance(x, Tensor) or is_quantized(x) or not x.is_floating_point():
        found = f"one of {x.dtype}" if type(x) is Tensor else type(x).__name__
        raise TypeError(f"x must be an ordinary floating-point tensor, got {found}")


def check_integers(values: Any) -> None:
    if not isinstance(values, Tensor) or values.dtype not in INTEGER_DTYPES or is_quantized(values):
        raise TypeError(
            "values must be an ordinary tensor of dtype torch.uint8 or torch.int8, got "
            + (f"one of {values.dtype}" if type(values) is Tensor else type(values).__name__)
        )


def check_qparams(scale: float, zero_point: int, dtype: torch.dtype) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    info = torch.iinfo(dtype)
    if int(zero_point) != zero_point or not info.min <= zero_point <= info.max:
        raise ValueError(
            f"zero_point must be an integer from {info.min} to {info.max} for {dtype}, got "
            f"{zero_point}"
        )


# --- registering handlers -------------------------------------------------------------------


def handles(*functions: Any, plain_first: bool = False) -> Callable[[_Function], _Function]:
    """Decorator: what these functions of torch do with a quantized tensor.

    Those that are methods or properties of Tensor become ones of quantized tensors: to call them so
    takes half as long as to have torch find out that they are overridden.
    """

    def register(handler: _Function) -> _Function:
        for function in functions:
            HANDLERS[function] = handler
            name = getattr(function, "__name__", "")
            if function is getattr(Tensor, name, None):
                for cls in _CLASSES:
                    setattr(cls, name, handler)
        if plain_first:
            _TAKES_PLAIN_FIRST.add(handler)
        return handler

    return register


def functions_named(name: str) -> list[Any]:
    """Method of Tensor, function of torch, of F: those that exist."""
    places = (Tensor, torch, F)
    found = (getattr(place, name) for place in places if hasattr(place, name))
    return [function for function in found if callable(function)]  # torch.cpu is a module


@when_compiling
def _find_out_in_graphs() -> None:
    """Make graphs call handlers, or raise errors, for functions that they would let through.

    Graphs call these with the integers, whether or not a tensor's class overrides the function.
    """
    functions: list[Any] = [F.sigmoid, F.tanh, F.hardsigmoid, F.hardswish]
    for place in (torch, F):
        names = (name for name in dir(place) if name.endswith("_") and name[0] != "_")
        functions += (getattr(place, name) for name in names)
    names_like = ("rand_like", "randn_like", "randint_like", "fill", "as_strided", "normal")
    ask_subclasses_in_graphs([*functions, *(getattr(torch, name) for name in names_like)])
    override_in_graphs(_CLASSES)
    find_in_tuples_in_graphs(_CLASSES)


def add_property(name: str, getter: Callable[[Any], Any]) -> None:
    for cls in _CLASSES:
        setattr(cls, name, property(getter))


# --- what there is to know about one --------------------------------------------------------


def _of_integers(name: str) -> Callable[[Any], Any]:
    get = getattr(Tensor, name).__get__

    def attribute(self: Any) -> Any:
        if is_dynamo_compiling() or not isinstance(self, QuantizedTensor):
            return getattr(integers_of(self), name)
        with ignoring_overrides():
            return get(self)

    return attribute


_names = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "grad", "grad_fn"),
    *("requires_grad", "is_leaf", "retains_grad", "output_nr", "names", "is_sparse", "is_nested"),
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_mkldnn", "_version", "_base"),
)
_PROPERTIES = [name for name in _names if hasattr(Tensor, name)]
for _name in _PROPERTIES:
    add_property(_name, _of_integers(_name))


def _is_quantized(self: Any) -> bool:
    # Compilers, which ask in order to imitate a graph's input, know nothing but torch's own
    # quantized dtypes. In the code that they trace, is_dynamo_compiling is True.
    return (
        is_dynamo_compiling()
        or not is_compiler_at_work()
        or isinstance(self, ExportedQuantizedTensor)
    )


add_property("is_quantized", _is_quantized)


_METHODS = (
    *("size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset"),
    *("element_size", "get_device", "is_floating_point", "is_complex", "is_shared", "is_pinned"),
    *("is_inference", "is_conj", "is_neg", "data_ptr", "untyped_storage", "is_contiguous"),
    # torch.compile asks these of a graph's inputs.
    *("__len__", "_is_view", "is_coalesced", "_is_zerotensor", "_dimI", "_dimV"),
)
for _name in _METHODS:
    handles(*functions_named(_name))(on_integers(getattr(Tensor, _name)))


@handles(Tensor.is_same_size, plain_first=True)
def _is_same_size(input: Any, other: Any) -> bool:
    return bool(input.shape == other.shape)


@handles(Tensor.is_signed, torch.is_signed)
def _is_signed(input: QuantizedTensor) -> bool:
    return integers_of(input).dtype == torch.int8


@handles(Tensor.q_scale, torch.q_scale)
def _q_scale(input: QuantizedTensor) -> float:
    return input._scale


@handles(Tensor.q_zero_point, torch.q_zero_point)
def _q_zero_point(input: QuantizedTensor) -> int:
    return input._zero_point


@handles(Tensor.qscheme)
def _qscheme(input: QuantizedTensor) -> torch.qscheme:
    return torch.per_tensor_affine


@handles(Tensor.int_repr, torch.int_repr)
def _int_repr(input: QuantizedTensor) -> Tensor:
    return integers_of(input).clone()


# --- printing, copying, saving --------------------------------------------------------------


def _printed(x: Any, qparams: str) -> str:
    real = repr(x.dequantize()).removeprefix("tensor(").removesuffix(")")
    return f"QuantizedTensor({real}, size={tuple(x.shape)}, dtype={x.dtype}, {qparams})"


@handles(Tensor.__repr__)
def _repr(self: QuantizedTensor, *, tensor_contents: Any = None) -> str:
    return _printed(self, f"scale={self._scale}, zero_point={self._zero_point}")


@handles(Tensor.__format__)
def _format(self: QuantizedTensor, spec: str) -> str:
    return format(self.item() if self.dim() == 0 else repr(self), spec)


@handles(Tensor.__hash__)
def _hash(self: QuantizedTensor) -> int:
    return id(self)


@handles(Tensor.__dir__)
def _dir(self: QuantizedTensor) -> list[str]:
    return sorted({*dir(type(self)), *vars(self)})


@handles(Tensor.__deepcopy__)
def _deepcopy(self: QuantizedTensor, memo: dict[int, Any]) -> QuantizedTensor:
    if id(self) not in memo:
        memo[id(self)] = like(self, copy.deepcopy(integers_of(self), memo))
    return memo[id(self)]  # type: ignore[no-any-return]


@handles(Tensor.__reduce_ex__)
def _reduce_ex(self: QuantizedTensor, protocol: Any) -> tuple[Any, ...]:
    return QuantizedTensor, (integers_of(self), self._scale, self._zero_point)


# --- weights --------------------------------------------------------------------------------


class PerChannelQuantizedTensor(Tensor):
    """Integers with a scale and a zero point for each channel: the weight of a quantized module.

    It can be printed, compared, copied, moved, and turned into its integers or the real numbers.
    """

    _integers: Tensor
    _scales: Tensor
    _zero_points: Tensor
    _axis: int

    def __new__(
        cls, values: Tensor, scales: Tensor, zero_points: Tensor, axis: int
    ) -> PerChannelQuantizedTensor:
        check_integers(values)
        x = values.detach().as_subclass(cls)
        x._integers, x._scales, x._zero_points = values.detach(), scales, zero_points
        x._axis = range(values.dim())[axis]
        return x

    def __init__(self, values: Tensor, scales: Tensor, zero_points: Tensor, axis: int) -> None:
        pass

    def int_repr(self) -> Tensor:
        return self._integers.clone()

    def dequantize(self) -> Tensor:
        shape = [1] * self._integers.dim()
        shape[self._axis] = -1
        centered = self._integers.to(torch.float32) - self._zero_points.reshape(shape)
        return (centered * self._scales.reshape(shape)).to(torch.float32)

    def q_per_channel_scales(self) -> Tensor:
        return self._scales

    def q_per_channel_zero_points(self) -> Tensor:
        return self._zero_points

    def q_per_channel_axis(self) -> int:
        return self._axis

    def qscheme(self) -> torch.qscheme:
        if self._zero_points.is_floating_point():
            return torch.per_channel_affine_float_qparams
        return torch.per_channel_affine

    def detach(self) -> PerChannelQuantizedTensor:
        return self

    data = property(detach)

    def equal(self, other: Any) -> bool:
        """Whether values, scales and zero points are equal."""
        if type(other) is not type(self) or self._axis != other._axis:
            return False
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return all(mine.dtype == its.dtype and torch.equal(mine, its) for mine, its in pairs)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._integers, self._scales, self._zero_points

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return _printed(
            self,
            f"scale={self._scales.tolist()}, zero_point={self._zero_points.tolist()}, "
            f"axis={self._axis}",
        )

    def __eq__(self, other: object) -> Any:
        return self.dequantize() == (other.dequantize() if isinstance(other, Tensor) else other)

    def __ne__(self, other: object) -> Any:
        return ~(self == other)

    def __hash__(self) -> int:
        return id(self)

    def clone(self, *args: Any, **kwargs: Any) -> PerChannelQuantizedTensor:
        values = self._integers.clone(*args, **kwargs)
        return type(self)(values, self._scales.clone(), self._zero_points.clone(), self._axis)

    def _with(self, values: Tensor) -> PerChannelQuantizedTensor:
        """These values, with this tensor's scales and zero points where the values are."""
        if values.dtype != self.dtype:
            raise TypeError(
                f"a quantized tensor stays {self.dtype}, got {values.dtype}: x.dequantize() "
                "returns the real numbers"
            )
        scales, zero_points = (x.to(values.device) for x in (self._scales, self._zero_points))
        return type(self)(values, scales, zero_points, self._axis)

    def __deepcopy__(self, memo: dict[int, Any]) -> PerChannelQuantizedTensor:
        return type(self)(*copy.deepcopy(self.__reduce_ex__(2)[1], memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (*self._tensors(), self._axis)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        method = getattr(func, "__name__", "")
        if method in ("clone", "equal", *_METHODS) and func is getattr(torch, method, None):
            named = dict(kwargs or {})
            x, *others = args or (named.pop("input"),)
            if type(x) is cls:
                return getattr(x, method)(*others, **named)
        if func in (torch.equal, Tensor.equal):
            return False  # x has other scales, or none
        raise not_supported(func, " with a scale for each channel")


def _of_values(name: str) -> Callable[..., PerChannelQuantizedTensor]:
    def method(self: PerChannelQuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        return self._with(getattr(self._integers, name)(*args, **kwargs))

    return method


for _name in ("contiguous", "to", "cpu", "cuda"):
    setattr(PerChannelQuantizedTensor, _name, _of_values(_name))
for _name in _PROPERTIES:
    setattr(PerChannelQuantizedTensor, _name, property(_of_integers(_name)))
for _name in _METHODS:
    setattr(PerChannelQuantizedTensor, _name, on_integers(getattr(Tensor, _name)))
setattr(PerChannelQuantizedTensor, "is_quantized", property(lambda self: True))  # noqa: B010

# Pickles and users' imports say where the classes are for users.
for _class in (QuantizedTensor, ExportedQuantizedTensor, PerChannelQuantizedTensor):
    _class.__module__ = "fastquant.quantized_tensor"
# For torch.load(weights_only=True): to make one checks the arguments and runs nothing else.
torch.serialization.add_safe_globals([QuantizedTensor, PerChannelQuantizedTensor])
