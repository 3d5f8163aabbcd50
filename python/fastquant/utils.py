"""Helpers shared by observers, configs and model passes: quantized ranges, dtypes, qparams."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._core.arguments import check_quantized_range
from ._core.dtypes import INT8, INT32, PLAIN, RANGES, UINT2, UINT4, UINT8
from ._core.errors import QuantizationError as QuantizationError
from ._core.qparams import qparams_of_range, symmetric_zero_point
from ._core.ranges import is_unobserved, warn_of_unobserved
from ._core.schemes import PER_CHANNEL, PER_TENSOR, SCHEME_CODES, Scheme
from ._torch.ao import MatchAllNode, NodePattern, Pattern
from .quant_type import QuantType

if TYPE_CHECKING:
    from .qconfig import QConfig

__all__ = [
    "DEPRECATION_WARNING",
    "MatchAllNode",
    "NodePattern",
    "Pattern",
    "QuantizationError",
    "activation_dtype",
    "activation_is_dynamically_quantized",
    "activation_is_int8_quantized",
    "activation_is_int32_quantized",
    "activation_is_statically_quantized",
    "calculate_qmin_qmax",
    "check_min_max_valid",
    "determine_qparams",
    "get_combined_dict",
    "get_qconfig_dtypes",
    "get_qparam_dict",
    "get_quant_type",
    "get_swapped_custom_module_class",
    "getattr_from_fqn",
    "has_no_children_ignoring_parametrizations",
    "is_per_channel",
    "is_per_tensor",
    "op_is_int8_dynamically_quantized",
    "to_underlying_dtype",
    "validate_qmin_qmax",
    "weight_dtype",
    "weight_is_quantized",
    "weight_is_statically_quantized",
]

DEPRECATION_WARNING = (
    "torch.ao.quantization is deprecated in torch; fastquant keeps its eager-mode interface."
)
"""Kept because code imports the name. fastquant itself emits no deprecation warning."""


_K = TypeVar("_K")
_V = TypeVar("_V")

_FLOAT8 = (torch.float8_e5m2, torch.float8_e4m3fn)
_STATIC_ACTIVATION = frozenset(
    (*INT8, *UINT8, *INT32, torch.int16, torch.float16, *_FLOAT8),
)
_QUANTIZED_WEIGHT = frozenset(
    (*INT8, *UINT8, torch.int32, torch.int16, torch.float16, *UINT4, *_FLOAT8),
)
_INTEGER_LIKE = frozenset(
    (*INT8, *UINT8, *INT32, torch.int16, *UINT4, *_FLOAT8),
)

# torch.ao gives every other dtype four unsigned bits.
_FOUR_BIT_RANGE = (0, 15)

_UNDERLYING_DTYPE = {
    **PLAIN,
    # Two or four values share a byte.
    **dict.fromkeys((*UINT4, *UINT2), torch.uint8),
    **{
        dtype: dtype
        for dtype in (
            torch.uint8,
            torch.int8,
            torch.uint16,
            torch.int16,
            torch.int32,
            torch.float8_e5m2,
            torch.float8_e4m3fn,
        )
    },
}


def get_combined_dict(
    default_dict: Mapping[_K, _V], additional_dict: Mapping[_K, _V]
) -> dict[_K, _V]:
    """A new dict with the entries of both; `additional_dict` wins where a key is in both."""
    return {**default_dict, **additional_dict}


def is_per_tensor(qscheme: torch.qscheme) -> bool:
    """Whether `qscheme` has one scale and zero point for the whole tensor.

    These are `torch.per_tensor_affine` and `torch.per_tensor_symmetric`.
    """
    return qscheme in PER_TENSOR


def is_per_channel(qscheme: torch.qscheme) -> bool:
    """Whether `qscheme` has one scale and zero point per channel.

    These are `torch.per_channel_affine`, `torch.per_channel_symmetric` and
    `torch.per_channel_affine_float_qparams`.
    """
    return qscheme in PER_CHANNEL


def getattr_from_fqn(obj: Any, fqn: str) -> Any:
    """The attribute of `obj` at the dotted path `fqn`, such as "layer1.0.conv.weight".

    Raises:
        AttributeError: a part of the path does not exist.
    """
    return functools.reduce(getattr, fqn.split("."), obj)


def to_underlying_dtype(qdtype: torch.dtype) -> torch.dtype:
    """The plain dtype that stores the values of a quantized dtype.

    For `torch.quint8` it is `torch.uint8`, for a plain integer or fp8 dtype that dtype itself, and
    for dtypes of 4 and 2 bits `torch.uint8`, whose bytes then hold several values.

    Raises:
        QuantizationError: `qdtype` stores no quantized values.
    """
    if qdtype not in _UNDERLYING_DTYPE:
        raise QuantizationError(
            f"Unsupported dtype: {qdtype}; accepted: {', '.join(map(str, _UNDERLYING_DTYPE))}"
        )
    return _UNDERLYING_DTYPE[qdtype]


def observes_no_range(observer: Any) -> bool:
    """Whether this is a `PlaceholderObserver` or `NoopObserver`, fastquant's or torch.ao's.

    Only they have the name of an op that needs no observer.
    """
    return hasattr(observer, "custom_op")


def get_qparam_dict(observer_or_fake_quant: Any) -> dict[str, Any]:
    """The quantization parameters of an observer or fake-quantize, as reference modules take them.

    Keys: `qscheme` (affine where the observer's is symmetric: quantized tensors have no other)
    and `dtype`; unless the observer has no qscheme, also `scale`, `zero_point`, `axis` (per
    channel), `quant_min` and `quant_max` (where the observer has them).

    Raises:
        RuntimeError: the observer's qscheme is unknown.
    """
    source = observer_or_fake_quant
    qscheme = getattr(source, "qscheme", None)
    if not qscheme or observes_no_range(source):
        return {"qscheme": None, "dtype": source.dtype}
    qparams: dict[str, Any] = {"dtype": source.dtype}
    if is_per_tensor(qscheme):
        qparams["qscheme"] = torch.per_tensor_affine
    elif is_per_channel(qscheme):
        symmetric = qscheme == torch.per_channel_symmetric
        qparams["qscheme"] = torch.per_channel_affine if symmetric else qscheme
        qparams["axis"] = source.ch_axis
    else:
        raise RuntimeError(f"Unrecognized qscheme: {qscheme}")
    qparams["scale"], qparams["zero_point"] = source.calculate_qparams()
    for name in ("quant_min", "quant_max"):
        if hasattr(source, name):
            qparams[name] = getattr(source, name)
    return qparams


def get_swapped_custom_module_class(
    custom_module: nn.Module,
    custom_module_class_mapping: Mapping[QuantType, Mapping[type, type]],
    qconfig: QConfig,
) -> type:
    """The class that `custom_module` is swapped for under `qconfig`.

    Args:
        custom_module: module whose exact type is looked up.
        custom_module_class_mapping: for each kind of quantization, original class to new class.
        qconfig: its dtypes say which kind of quantization it is, see :func:`get_quant_type`.

    Raises:
        QuantizationError: the mapping has no entry for the module's type.
    """
    class_mapping = custom_module_class_mapping.get(get_quant_type(qconfig), {})
    if type(custom_module) not in class_mapping:
        raise QuantizationError(
            f"did not find the class to swap {type(custom_module)} for in {class_mapping}"
        )
    return class_mapping[type(custom_module)]


def _observers(qconfig: QConfig | None, purpose: str) -> tuple[Any, Any]:
    if qconfig is None:
        raise QuantizationError(f"qconfig must be provided to determine {purpose}, got None")
    return qconfig.activation(), qconfig.weight()


def activation_dtype(qconfig: QConfig | None) -> torch.dtype:
    """The dtype that `qconfig` gives activations: that of the observer which it makes for them.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    if qconfig is None:
        raise QuantizationError("qconfig must be provided to determine activation dtype, got None")
    return cast(torch.dtype, qconfig.activation().dtype)


def weight_dtype(qconfig: QConfig | None) -> torch.dtype:
    """The dtype that `qconfig` gives weights: that of the observer which it makes for them.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    if qconfig is None:
        raise QuantizationError("qconfig must be provided to determine weight dtype, got None")
    return cast(torch.dtype, qconfig.weight().dtype)


def activation_is_statically_quantized(qconfig: QConfig | None) -> bool:
    """Whether activations get a quantized dtype, with scale and zero point fixed ahead.

    float16 and fp8 dtypes count as quantized, 4-bit dtypes do not, as in torch.ao.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return activation_dtype(
        qconfig
    ) in _STATIC_ACTIVATION and not activation_is_dynamically_quantized(qconfig)


def activation_is_dynamically_quantized(qconfig: QConfig | None) -> bool:
    """Whether activations are quantized by ranges measured at each call (`is_dynamic`).

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return get_qconfig_dtypes(qconfig)[2]


def activation_is_int8_quantized(qconfig: QConfig | None) -> bool:
    """Whether activations get an 8-bit integer dtype, signed or unsigned.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return activation_dtype(qconfig) in (*INT8, *UINT8)


def activation_is_int32_quantized(qconfig: QConfig | None) -> bool:
    """Whether activations get a 32-bit integer dtype, `torch.qint32` or `torch.int32`.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return activation_dtype(qconfig) in INT32


def weight_is_quantized(qconfig: QConfig | None) -> bool:
    """Whether weights get a quantized dtype; float16, fp8 and 4-bit dtypes count as such.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return weight_dtype(qconfig) in _QUANTIZED_WEIGHT


def weight_is_statically_quantized(qconfig: QConfig | None) -> bool:
    """Whether weights get an 8-bit integer dtype, signed or unsigned.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    return weight_dtype(qconfig) in (*INT8, *UINT8)


def op_is_int8_dynamically_quantized(qconfig: QConfig | None) -> bool:
    """Whether an op has int8 weights and activations quantized to 8 unsigned bits at each call.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    act_dtype, wt_dtype, is_dynamic = get_qconfig_dtypes(qconfig)
    return act_dtype in UINT8 and wt_dtype in INT8 and is_dynamic


def get_qconfig_dtypes(qconfig: QConfig | None) -> tuple[torch.dtype, torch.dtype, bool]:
    """The dtypes of a qconfig.

    Returns:
        The activation's dtype, the weight's, and whether the activation is quantized by ranges
        measured at each call.

    Raises:
        QuantizationError: `qconfig` is None.
    """
    activation, weight = _observers(qconfig, "dtypes")
    return activation.dtype, weight.dtype, getattr(activation, "is_dynamic", False)


def get_quant_type(qconfig: QConfig | None) -> QuantType:
    """The kind of quantization that a qconfig asks for.

    With an integer, fp8 or float16 weight it is `DYNAMIC` where the activation `is_dynamic`;
    otherwise `STATIC` where both are float16 or both are integer or fp8, and `WEIGHT_ONLY` where
    only the weight is integer or fp8.

    Raises:
        QuantizationError: no qconfig, or a combination of dtypes that is not supported.
    """
    activation, weight = _observers(qconfig, "quant type")
    if weight.dtype in _INTEGER_LIKE or weight.dtype == torch.float16:
        if getattr(activation, "is_dynamic", False):
            return QuantType.DYNAMIC
        if weight.dtype == torch.float16:
            if activation.dtype == torch.float16:
                return QuantType.STATIC
        else:
            static = activation.dtype in _INTEGER_LIKE
            return QuantType.STATIC if static else QuantType.WEIGHT_ONLY
    raise QuantizationError(
        f"unrecognized dtype combination: activation({activation.dtype}), weight({weight.dtype})"
    )


def check_min_max_valid(min_val: Tensor, max_val: Tensor) -> bool:
    """Whether the range has been observed; warns where it has not.

    Args:
        min_val: smallest value seen, 0-dim, `[1]` or `[channels]`; empty, or infinite and 0-dim,
            where nothing was observed.
        max_val: largest value seen, like `min_val`.

    Raises:
        QuantizationError: a minimum lies above its maximum.
    """
    scalar = min_val.dim() == 0 or max_val.dim() == 0
    if min_val.numel() == 0 or max_val.numel() == 0 or (scalar and is_unobserved(min_val, max_val)):
        warn_of_unobserved(stacklevel=2)
        return False
    if bool((min_val > max_val).any()):
        raise QuantizationError(f"min {min_val} should be less than max {max_val}")
    return True


def calculate_qmin_qmax(
    quant_min: int | None,
    quant_max: int | None,
    has_customized_qrange: bool,
    dtype: torch.dtype,
    reduce_range: bool,
) -> tuple[int, int]:
    """The quantized range in use: the customized one or the dtype's; `reduce_range` drops a bit.

    As in torch.ao, `reduce_range` halves a customized range whatever its dtype, and a default
    range only where it has 8 bits.

    Args:
        quant_min: smallest quantized value of a customized range; else not used.
        quant_max: largest quantized value of a customized range; else not used.
        has_customized_qrange: whether the two above are the range.
        dtype: quantized dtype; any that has no range of its own counts as 4 unsigned bits.
        reduce_range: leave out one bit, for kernels whose sums may overflow.

    Returns:
        The smallest and the largest quantized value.

    Raises:
        QuantizationError: a customized range is empty or wider than its dtype.
    """
    if has_customized_qrange:
        if quant_min is None or quant_max is None:
            raise QuantizationError(
                f"a customized range needs both ends, got quant_min={quant_min}, "
                f"quant_max={quant_max}"
            )
        bits = 8 if dtype in INT8 else 32 if dtype in INT32 else None
        if bits is not None and not 0 < quant_max - quant_min + 1 <= 2**bits:
            raise QuantizationError(
                "quantization range should be positive and not exceed the maximum bit range "
                f"(={2**bits}), got quant_min={quant_min}, quant_max={quant_max} for {dtype}"
            )
        reduce = reduce_range
    else:
        quant_min, quant_max = RANGES.get(dtype, _FOUR_BIT_RANGE)
        reduce = reduce_range and dtype in (*INT8, *UINT8)
    return (quant_min // 2, quant_max // 2) if reduce else (quant_min, quant_max)


def validate_qmin_qmax(quant_min: int, quant_max: int) -> None:
    """Check a customized quantized range: not empty, and zero representable.

    Raises:
        QuantizationError: the range excludes 0 or is empty.
    """
    check_quantized_range(quant_min, quant_max, holds_zero=True)


def determine_qparams(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    eps: Tensor,
    has_customized_qrange: bool,
    qscheme: torch.qscheme = torch.per_tensor_affine,
) -> tuple[Tensor, Tensor]:
    """Scale (float64) and zero point (int64) of a range, one element per channel.

    The formulas are those of :class:`fastquant.observer.MinMaxObserver` and, for float
    parameters, :class:`fastquant.observer.PerChannelMinMaxObserver`.

    Args:
        min_val: smallest value seen, 0-dim or `[channels]`, floating.
        max_val: largest value seen, like `min_val`.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        dtype: quantized dtype; an unsigned symmetric one has its zero point mid-range.
        eps: smallest scale, `[1]`.
        has_customized_qrange: whether the range is not the dtype's own.
        qscheme: affine, symmetric or affine with floating parameters.

    Returns:
        Scale and zero point, `[1]` or `[channels]`, on the device of `min_val`. Where nothing was
        observed, a warning and ([1.0], [0]), in float32 and int64 as in torch.ao.

    Raises:
        QuantizationError: a minimum lies above its maximum.
    """
    if not check_min_max_valid(min_val, max_val):
        device = min_val.device
        return torch.tensor([1.0], device=device), torch.tensor([0], device=device)
    # Unlike torch.ao's observers, this function of torch.ao does not put the zero point of
    # uint16 in the middle of the range.
    middle = symmetric_zero_point(dtype, quant_min, quant_max, has_customized_qrange)
    scale, zero_point = qparams_of_range(
        min_val,
        max_val,
        eps.to(min_val.device),
        quant_min,
        quant_max,
        SCHEME_CODES.get(qscheme, Scheme.AFFINE),
        middle if dtype in UINT8 else 0,
    )
    return scale.reshape(-1).to(torch.float64), zero_point.reshape(-1).to(torch.int64)


def has_no_children_ignoring_parametrizations(module: nn.Module) -> bool:
    """Whether the module has no submodules but the parametrizations of its own parameters."""
    children = module._modules.keys()
    return not children or (is_parametrized(module) and set(children) == {"parametrizations"})


def check_is_module(function: str, model: object) -> None:
    """Raise TypeError unless `model` is a module; `function` is what the user called."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: the model must be a torch.nn.Module, got {type(model).__name__}"
        )


def _parent_name(target: str) -> tuple[str, str]:
    """Split a dotted path into (parent path, name)."""
    parent, _, name = target.rpartition(".")
    return parent, name


def _get_path_of_module(root: nn.Module, submodule: nn.Module) -> str | None:
    """The dotted path of `submodule` in `root`, None where it is not there."""
    return next((name for name, module in root.named_modules() if module is submodule), None)


def _assert_and_get_unique_device(module: nn.Module) -> torch.device | None:
    """The one device of a module, None where it has no tensors; `meta` is ignored beside another.

    Raises:
        QuantizationError: the module is on several devices; the message names them.
    """
    devices = {t.device for ts in (module.parameters(), module.buffers()) for t in ts}
    if len(devices) > 1:
        devices.discard(torch.device("meta"))
    if len(devices) > 1:
        raise QuantizationError(
            "a module to be quantized must lie on one device, got "
            + ", ".join(sorted(map(str, devices)))
        )
    return next(iter(devices), None)
