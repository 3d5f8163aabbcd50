"""How to quantize a module: factories of the observers of its activations and its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ._core.arguments import check_percentile, check_range_method
from ._core.dtypes import QINT8, QUINT8
from ._core.schemes import RangeMethodName
from .fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FusedMovingAvgObsFakeQuantize,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from .observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    NoopObserver,
    PerChannelMSEObserver,
    PlaceholderObserver,
    ReuseInputObserver,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from .utils import QuantizationError, is_per_channel

__all__ = [
    "QConfig",
    "QConfigAny",
    "QConfigDynamic",
    "default_activation_only_qconfig",
    "default_debug_qconfig",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_symmetric_qnnpack_qconfig",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_quint8_weight_qconfig",
    "default_reuse_input_qconfig",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_weight_only_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "get_default_qat_qconfig",
    "get_default_qat_qconfig_dict",
    "get_default_qconfig",
    "get_default_qconfig_dict",
    "per_channel_dynamic_qconfig",
    "qconfig_equals",
]

Factory: TypeAlias = Callable[..., Any]
"""What makes an observer or fake-quantizer: a class, what its `with_args` returns, any callable."""


class _Factories(NamedTuple):
    activation: Any
    weight: Any


class QConfig(_Factories):
    """How to quantize a module's activations and weights.

    Args:
        activation: makes the observer or fake-quantizer of the output: a class, what its
            `with_args` returns, or any other callable without arguments. Called once for each
            module. None where no module will need one.
        weight: the same for the weight.

    Raises:
        ValueError: an observer itself is given instead of what makes one.
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> QConfig:
        for name, factory in (("activation", activation), ("weight", weight)):
            _check_is_factory(cls.__name__, name, factory)
        return super().__new__(cls, activation, weight)


class QConfigDynamic(_Factories):
    """How to quantize a module dynamically. `QConfig` serves as well; torch.ao keeps both.

    Args:
        activation: as for `QConfig`.
        weight: as for `QConfig`.

    Raises:
        ValueError: an observer itself is given as weight instead of what makes one.
    """

    __slots__ = ()

    def __new__(cls, activation: Any = nn.Identity, weight: Any = nn.Identity) -> QConfigDynamic:
        _check_is_factory(cls.__name__, "weight", weight)
        return super().__new__(cls, activation, weight)


def _check_is_factory(config: str, name: str, factory: Any) -> None:
    if isinstance(factory, nn.Module):
        raise ValueError(
            f"{config} received an observer instance as {name} ({type(factory).__name__}); pass "
            "the class, or Class.with_args(...) to set its arguments"
        )


QConfigAny: TypeAlias = QConfig | None

# --- named configs ----------------------------------------------------------------------------

_histogram_qint8 = HistogramObserver.with_args(dtype=QINT8, reduce_range=False, eps=2**-12)
_moving_average_qint8 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=QINT8,
    reduce_range=False,
    eps=2**-12,
)
_float_placeholder = PlaceholderObserver.with_args(dtype=torch.float32)
_half_placeholder = PlaceholderObserver.with_args(dtype=torch.float16)
_float_noop = NoopObserver.with_args(dtype=torch.float32)

default_qconfig = QConfig(default_observer, default_weight_observer)
"""Static, min/max of activations and, per tensor, of weights."""

default_debug_qconfig = QConfig(default_debug_observer, default_weight_observer)
"""Records every activation, for debugging."""

default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
"""Static, weights per channel."""

default_quint8_weight_qconfig = QConfig(HistogramObserver, MinMaxObserver)
"""Static, unsigned weights, as PReLU needs them."""

default_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_weight_observer)
"""Dynamic, int8 weights per tensor."""

per_channel_dynamic_qconfig = QConfig(
    default_dynamic_quant_observer, default_per_channel_weight_observer
)
"""Dynamic, int8 weights per channel."""

float16_dynamic_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True), _half_placeholder
)
"""Dynamic, float16 weights."""

float16_static_qconfig = QConfig(_half_placeholder, _half_placeholder)
"""Activations and weights in float16."""

float_qparams_weight_only_qconfig = QConfig(
    default_placeholder_observer, default_float_qparams_observer
)
"""Weights only, 8 bits with a floating zero point: embeddings."""

float_qparams_weight_only_qconfig_4bit = QConfig(
    default_placeholder_observer, default_float_qparams_observer_4bit
)
"""Weights only, 4 bits with a floating zero point: embedding bags."""

default_weight_only_qconfig = QConfig(nn.Identity, default_weight_fake_quant)
"""QAT of weights alone."""

default_activation_only_qconfig = QConfig(default_fake_quant, nn.Identity)
"""QAT of activations alone."""

default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
"""QAT, weights per tensor."""

default_qat_qconfig_v2 = QConfig(default_fused_act_fake_quant, default_fused_wt_fake_quant)
"""QAT; one operation observes and fake-quantizes."""

default_dynamic_qat_qconfig = QConfig(default_dynamic_fake_quant, default_weight_fake_quant)
"""QAT for dynamic quantization."""

default_embedding_qat_qconfig = QConfig(_float_noop, default_embedding_fake_quant)
"""QAT of embeddings, 8 bits."""

default_embedding_qat_qconfig_4bit = QConfig(_float_noop, default_embedding_fake_quant_4bit)
"""QAT of embeddings, 4 bits."""

default_reuse_input_qconfig = QConfig(default_reuse_input_observer, NoopObserver)
"""For ops that keep their input's parameters, such as reshape; FX graph mode alone reads it."""

# XNNPACK's requantization scale must lie in [2**-32, 256); eps=2**-12 keeps it above the low
# end. Its weights are symmetric and leave out -128.
default_symmetric_qnnpack_qconfig = QConfig(_histogram_qint8, weight_observer_range_neg_127_to_127)
"""Static for QNNPACK and XNNPACK: signed, symmetric weights."""

default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    _histogram_qint8, per_channel_weight_observer_range_neg_127_to_127
)
"""Static for QNNPACK and XNNPACK: signed weights, symmetric per channel."""

default_symmetric_qnnpack_qat_qconfig = QConfig(
    _moving_average_qint8, fused_wt_fake_quant_range_neg_127_to_127
)
"""QAT for QNNPACK and XNNPACK: signed, symmetric weights."""

default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _moving_average_qint8, fused_per_channel_wt_fake_quant_range_neg_127_to_127
)
"""QAT for QNNPACK and XNNPACK: signed weights, symmetric per channel."""

_default_fp32_placeholder_qconfig = QConfig(_float_placeholder, _float_placeholder)
_default_quint8_placeholder_qconfig = QConfig(PlaceholderObserver.with_args(dtype=QUINT8), None)

# --- a config for each backend ----------------------------------------------------------------


class _Backend(NamedTuple):
    """What a backend's kernels need."""

    # One bit less for activations where the kernels' int16 sums could saturate; None leaves
    # the argument out in training, as torch.ao does for oneDNN.
    reduce_range: bool | None
    per_channel_weights: bool


_BACKENDS = {
    "fbgemm": _Backend(reduce_range=True, per_channel_weights=True),
    "x86": _Backend(reduce_range=True, per_channel_weights=True),
    "qnnpack": _Backend(reduce_range=False, per_channel_weights=False),
    "onednn": _Backend(reduce_range=None, per_channel_weights=True),
    # Kernels of this package, whose sums are exact.
    "native": _Backend(reduce_range=False, per_channel_weights=True),
}

# By version of the training configs: class of fake-quantizer, weights per tensor, per channel.
_QAT_VERSIONS: dict[int, tuple[type[FakeQuantize], Factory, Factory]] = {
    0: (FakeQuantize, default_weight_fake_quant, default_per_channel_weight_fake_quant),
    1: (
        FusedMovingAvgObsFakeQuantize,
        default_fused_wt_fake_quant,
        default_fused_per_channel_wt_fake_quant,
    ),
}


# By how their range is chosen: per tensor, per channel.
_WEIGHT_OBSERVERS: dict[str, tuple[Factory, Factory]] = {
    "minmax": (default_weight_observer, default_per_channel_weight_observer),
    "mse": (
        MSEObserver.with_args(dtype=QINT8, qscheme=torch.per_tensor_symmetric),
        PerChannelMSEObserver.with_args(dtype=QINT8, qscheme=torch.per_channel_symmetric),
    ),
}


def _backend(name: str) -> _Backend:
    if name not in _BACKENDS:
        raise QuantizationError(
            f"backend {name!r} is not supported; accepted: {', '.join(map(repr, _BACKENDS))}"
        )
    return _BACKENDS[name]


def get_default_qconfig(
    backend: str = "x86",
    version: int = 0,
    *,
    range_method: RangeMethodName | None = None,
    percentile: float | None = None,
    weight_range_method: Literal["minmax", "mse"] = "minmax",
) -> QConfig:
    """The static config for a backend: histograms of activations, min/max of weights.

    Args:
        backend: `x86`, `fbgemm`, `qnnpack` or `onednn`; `native` for this package's own kernels.
        version: 0.
        range_method: how ranges of activations are chosen, see
            :func:`fastquant.functional.histogram_range`; :func:`fastquant.set_range_method`
            changes it in a prepared model. None: "l2", as in torch.ao.
        percentile: of the method of this name.
        weight_range_method: "minmax", or "mse" for the ranges of least squared error, see
            :class:`fastquant.MSEObserver`.

    Raises:
        QuantizationError: unknown backend, version or method; a percentile that is none.
    """
    needs = _backend(backend)
    if version != 0:
        raise QuantizationError(f"version {version!r} is not supported; accepted: 0")
    chosen: dict[str, Any] = {}
    if range_method is not None:
        check_range_method(range_method)
        chosen["range_method"] = range_method
    if percentile is not None:
        check_percentile(percentile)
        chosen["percentile"] = percentile
    if weight_range_method not in _WEIGHT_OBSERVERS:
        raise QuantizationError(
            f"weight_range_method must be 'minmax' or 'mse', got {weight_range_method!r}"
        )
    return QConfig(
        HistogramObserver.with_args(reduce_range=bool(needs.reduce_range), **chosen),
        _WEIGHT_OBSERVERS[weight_range_method][needs.per_channel_weights],
    )


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """The training config for a backend: moving averages of activations.

    Args:
        backend: `x86`, `fbgemm`, `qnnpack` or `onednn`; `native` for this package's own kernels.
        version: 0 observes and fake-quantizes one after the other, 1 in one operation.

    Raises:
        QuantizationError: unknown backend or version.
    """
    needs = _backend(backend)
    if version not in _QAT_VERSIONS:
        raise QuantizationError(f"version {version!r} is not supported; accepted: 0, 1")
    fake_quantize, per_tensor, per_channel = _QAT_VERSIONS[version]
    reduce = {} if needs.reduce_range is None else {"reduce_range": needs.reduce_range}
    return QConfig(
        fake_quantize.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, **reduce
        ),
        per_channel if needs.per_channel_weights else per_tensor,
    )


def get_default_qconfig_dict(backend: str = "x86", version: int = 0) -> dict[str, Any]:
    """`get_default_qconfig_mapping` as a dict, the form of FX graph mode's older interface."""
    from .qconfig_mapping import get_default_qconfig_mapping

    return get_default_qconfig_mapping(backend, version).to_dict()


def get_default_qat_qconfig_dict(backend: str = "x86", version: int = 1) -> dict[str, Any]:
    """`get_default_qat_qconfig_mapping` as a dict."""
    from .qconfig_mapping import get_default_qat_qconfig_mapping

    return get_default_qat_qconfig_mapping(backend, version).to_dict()


# --- checks and comparisons ---------------------------------------------------------------------
# Each takes configs and observers of torch.ao as well: configs and factories are told by their
# fields, and `isinstance` with a class of ours holds for torch.ao's of the same name.


def _assert_valid_qconfig(qconfig: Any, mod: nn.Module) -> None:
    """Raise unless `qconfig` is None or a config that fits `mod`."""
    if qconfig is None:
        return
    if not hasattr(qconfig, "_fields"):
        raise TypeError(
            f"the qconfig of a {type(mod).__name__} must be a QConfig or None, got "
            f"{type(qconfig).__name__}"
        )
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(mod, transposed) and getattr(qconfig, "weight", None) is not None:
        weight = qconfig.weight()
        # As in torch.ao, a per-channel fake-quantizer passes: it trains, though it cannot be
        # converted.
        qscheme: Any = getattr(weight, "qscheme", None)
        if is_per_channel(qscheme) and not isinstance(weight, FakeQuantizeBase):
            raise QuantizationError(
                f"{type(mod).__name__} takes no per-channel weight observer; give it a qconfig "
                "with a per-tensor one, e.g. by fastquant.set_qconfig(model, {nn."
                f"{type(mod).__name__}: fastquant.default_qconfig, '': …}})"
            )


class _DeviceOf:
    """Returns `factory_kwargs` with the device that a module is on at the time of the call.

    An object instead of a closure, so that prepared models can be copied and pickled.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> dict[str, torch.device] | None:
        device = None
        for tensors in (self.module.parameters(), self.module.buffers()):
            for tensor in tensors:
                device = tensor.device
                # What a layer on the meta device has got to observe its weight may lie elsewhere.
                if device.type != "meta":
                    return {"device": device}
        return None if device is None else {"device": device}


_accepts_factory_kwargs: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _takes_factory_kwargs(factory: Any) -> bool:
    """Whether what a factory makes takes `factory_kwargs`, which is found out by making one."""

    def tried() -> bool:
        try:
            factory.with_args(factory_kwargs=None)()
        except (AttributeError, TypeError):
            return False
        return True

    # Every module of a model asks, mostly of the same two factories. The answer is kept for what
    # is equal to nothing but itself: what others are equal to may change.
    compares: Any = type(factory).__eq__
    if compares is not object.__eq__:
        return tried()
    try:
        takes = _accepts_factory_kwargs.get(factory)
        if takes is None:
            takes = _accepts_factory_kwargs[factory] = tried()
    except TypeError:  # no weak reference to it is possible
        return tried()
    return takes


def _on_device_of(factory: Any, module: nn.Module) -> Any:
    """`factory`, making its product on the module's device where that can be asked for.

    Any callable may be a factory, and None is one that is never called. `with_args` and
    `with_callable_args` are what observers' classes have, and what these return.
    """
    bound = getattr(factory, "callable_args", {}).get("factory_kwargs")
    if not (isinstance(bound, _DeviceOf) or _takes_factory_kwargs(factory)):
        return factory
    try:
        return factory.with_callable_args(factory_kwargs=_DeviceOf(module))
    except AttributeError:  # as FakeQuantize, which has `with_args` alone
        return factory


def _add_module_to_qconfig_obs_ctr(qconfig: Any, module: nn.Module | None) -> Any:
    """The same config, its observers made on the device that `module` has at that time."""
    if module is None or qconfig is None or qconfig._fields != ("activation", "weight"):
        return qconfig
    return QConfig(_on_device_of(qconfig.activation, module), _on_device_of(qconfig.weight, module))


def _partial_of(factory: Any) -> partial[Any] | None:
    wrapped = getattr(factory, "p", None)
    return wrapped if isinstance(wrapped, partial) else None


def _obs_or_fq_ctr_equals(obs_or_fq1: Any, obs_or_fq2: Any) -> bool:
    """Whether two factories make the same thing."""
    if _partial_of(obs_or_fq1) is not None and _partial_of(obs_or_fq2) is not None:
        return _partial_wrapper_equals(obs_or_fq1, obs_or_fq2)
    return bool(obs_or_fq1 == obs_or_fq2)


def _partial_wrapper_equals(obs_or_fq1: Any, obs_or_fq2: Any) -> bool:
    """Whether two results of `with_args` make the same thing."""
    p1, p2 = obs_or_fq1.p, obs_or_fq2.p
    # partial objects compare by identity, also the one that `observer=` may hold.
    return bool(
        _obs_or_fq_ctr_equals(p1.func, p2.func)
        and p1.args == p2.args
        and p1.keywords.keys() == p2.keywords.keys()
        and all(_obs_or_fq_ctr_equals(value, p2.keywords[k]) for k, value in p1.keywords.items())
    )


def qconfig_equals(q1: Any, q2: Any) -> bool:
    """Whether two configs, either of them possibly None, ask for the same."""
    if q1 is None or q2 is None:
        return q1 is q2
    if not all(hasattr(q, name) for q in (q1, q2) for name in ("activation", "weight")):
        return bool(q1 == q2)
    return _obs_or_fq_ctr_equals(q1.activation, q2.activation) and _obs_or_fq_ctr_equals(
        q1.weight, q2.weight
    )


def _is_memoryless(activation: Any) -> bool:
    """Whether an observer, or that of a fake-quantizer, remembers no earlier batch."""
    if isinstance(activation, FakeQuantizeBase):
        activation = getattr(activation, "activation_post_process", activation)
    return bool(getattr(activation, "averaging_constant", None) == 1)


def _activation_is_memoryless(qconfig: Any) -> bool:
    """Whether the config's activation ranges are those of the last batch alone.

    That is a moving average with constant 1, as quantization-aware training for dynamic
    quantization uses it: the observer then looks at a module's input.
    """
    return _is_memoryless(qconfig.activation())


def _is_dynamic(qconfig: Any) -> bool:
    """Whether a config is for modules that quantize their input at each call, or never do."""
    activation = qconfig.activation()
    if getattr(activation, "is_dynamic", False) or _is_memoryless(activation):
        return True
    return getattr(qconfig.weight(), "dtype", None) == torch.float16


def _is_reuse_input_qconfig(qconfig: Any) -> bool:
    """Whether the config says to keep the input's parameters."""
    return (
        qconfig is not None
        and isinstance(qconfig.activation(), ReuseInputObserver)
        and isinstance(qconfig.weight(), NoopObserver)
    )
