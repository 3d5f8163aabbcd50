"""Fake-quantizers: modules that round tensors to a quantized grid while a model trains.

Every fake-quantizer of `torch.ao.quantization.fake_quantize` under its own name, with its
constructor, buffers and `state_dict`. With one of the min/max observers, a call is one op:
it observes, updates scale and zero point, and fake-quantizes, each as far as enabled; the
flags are read where they lie, on the device.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ._core.arguments import (
    channel_count,
    channel_error,
    check_fits_dtype,
    check_integer,
    check_quantized_range,
    input_error,
    nonfinite_error,
)
from ._core.dtypes import QINT8, QUINT4X2, QUINT8
from ._core.errors import naming_its_layer
from ._core.locks import RESIZING
from ._core.ranges import has_seen_nothing
from ._core.schemes import NONFINITE_CODES, NonFinitePolicy, RangeMethodName
from ._core.state import (
    ActivationPostProcess,
    does_not_fit,
    qparams_error,
    refill,
    resized,
    save_replaced,
)
from ._native.graphs import may_be_run_in_graphs, run_in_graph
from ._native.routes import (
    fake_quantize,
    fused_observe_fake_quantize,
    learnable_fake_quantize,
)
from ._native.settings import FusedSettings
from ._torch.counterparts import scriptable
from ._torch.exporting import traces_for_onnx
from ._torch.overrides import keeps_tensors_plainly, reader
from ._torch.private import is_exporting
from ._torch.stand_ins import _is_fake_quant_script_module
from .observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    _is_activation_post_process,
    _with_args,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    plain_kind,
)
from .utils import QuantizationError, is_per_channel, is_per_tensor

__all__ = [
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "default_affine_fixed_qparams_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "set_range_method",
]

_is_compiling = torch.compiler.is_compiling
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
# Makes a NamedTuple in half the time that its own constructor takes.
_tuple = tuple.__new__

# How the key of a module's extra state ends.
_EXTRA_STATE = "_extra_state"

_Self = TypeVar("_Self", bound="_LearnableFakeQuantize")

_qparams = reader("scale", "zero_point", "fake_quant_enabled")


def _is_per_channel(qscheme: torch.qscheme) -> bool:
    return is_per_channel(qscheme)


def _is_per_tensor(qscheme: torch.qscheme) -> bool:
    return is_per_tensor(qscheme)


def _is_symmetric_quant(qscheme: torch.qscheme) -> bool:
    return qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def _is_float_qparams(qscheme: torch.qscheme) -> bool:
    return qscheme == torch.per_channel_affine_float_qparams


class FakeQuantizeBase(ActivationPostProcess):
    """Base of all fake-quantizers.

    Two buffers of one integer say what a call does, non-zero for on: `observer_enabled` and
    `fake_quant_enabled`. Set them by the methods below or by hand; they may lie on any device.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    # NCCL, which replicates buffers in DDP, has no bool.
    _flag_dtype: ClassVar[torch.dtype] = torch.uint8

    def __init__(self) -> None:
        super().__init__()
        for name in ("fake_quant_enabled", "observer_enabled"):
            self._register_flag(name, True)

    def _register_flag(self, name: str, on: bool) -> None:
        self.register_buffer(name, torch.tensor([int(on)], dtype=self._flag_dtype))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Observe and fake-quantize `x`, as far as the flags say; returns a tensor like `x`."""

    @abstractmethod
    def calculate_qparams(self, *args: Any, **kwargs: Any) -> Any:
        """Scale and zero point of what was observed."""

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Fake-quantize from now on, or leave tensors as they are."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Leave tensors as they are from now on."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe from now on, or keep scale and zero point as they are."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Keep scale and zero point as they are from now on."""
        self.enable_observer(False)

    with_args = classmethod(_with_args)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


class FakeQuantize(FakeQuantizeBase):
    """Observe a tensor, then round it to the quantized grid that its range asks for.

    The output is `(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) *
    scale`, in the dtype of `x`; the gradient passes straight through where `x` lies in the
    grid's range and is zero elsewhere (torch.fake_quantize_per_tensor_affine).

    Args:
        observer: constructor of the observer.
        quant_min: smallest quantized value; the observer's own, unless both ends are given.
        quant_max: largest quantized value; the observer's own, unless both ends are given.
        is_dynamic: whether this stands for quantization with a range measured at each call.
        observer_kwargs: further arguments of the observer.

    Buffers: `scale` (float32), `zero_point` (int32; float32 for float qparams), one element
    per tensor or, from the first tensor on, per channel. Submodule `activation_post_process`:
    the observer.

    Raises:
        QuantizationError: a quantized range that is empty or that the dtype does not hold, or
            an observer that is neither per tensor nor per channel.
    """

    _kept_precise = ("scale", "zero_point")

    scale: Tensor
    zero_point: Tensor
    activation_post_process: Any

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None and quant_max is not None:
            quant_min, quant_max = check_quantized_range(quant_min, quant_max, holds_zero=False)
            # A partial observer may know its dtype.
            given = getattr(getattr(observer, "p", None), "keywords", {})
            dtype = given.get("dtype", observer_kwargs.get("dtype", QUINT8))
            check_fits_dtype(quant_min, quant_max, dtype)
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        made = observer(**observer_kwargs, is_dynamic=is_dynamic)
        self.activation_post_process = made
        self.quant_min = made.quant_min
        self.quant_max = made.quant_max
        self.is_dynamic = made.is_dynamic
        self.dtype = made.dtype
        self.qscheme = made.qscheme
        self.ch_axis = getattr(made, "ch_axis", -1)
        if not (is_per_channel(self.qscheme) or is_per_tensor(self.qscheme)):
            raise QuantizationError(
                f"qscheme must be per tensor or per channel, got {self.qscheme}"
            )
        self.is_per_channel = is_per_channel(self.qscheme)
        zero_point_dtype = torch.float32 if _is_float_qparams(self.qscheme) else torch.int32
        self.register_buffer("scale", torch.tensor([1.0], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([0], dtype=zero_point_dtype))
        may_be_run_in_graphs(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        may_be_run_in_graphs(self)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what was observed."""
        qparams: tuple[Tensor, Tensor] = self.activation_post_process.calculate_qparams()
        return qparams

    def forward(self, x: Tensor) -> Tensor:
        """Observe and fake-quantize `x` (floating, any shape and layout), as far as enabled.

        Raises:
            TypeError: `x` is no tensor or not floating.
            ValueError: no such channel axis, another number of channels or another device
                than before, or a non-finite element under `nonfinite="raise"`. Statistics,
                scale and zero point keep what they had.
        """
        settings = self._settings_of_one_op()
        if settings is None:
            if is_dynamo_compiling() and self._lacks_channels(x):
                self._set_channels(channel_count(x, self._axis()))
                return FakeQuantize.forward(self, x)
            return self._forward_in_steps(x)
        try:
            return fused_observe_fake_quantize(x, settings)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            kept = ("min_val", "max_val", "scale", "zero_point")
            cause = self._explained(error, x, {name: getattr(settings, name) for name in kept})
            if cause is not None:
                raise naming_its_layer(self, cause) from None
            return x

    def _settings_of_one_op(self) -> FusedSettings | None:
        """The arguments for the op that does all of a call; None where it takes several steps.

        It does where somebody replaced a method or more that a step calls, where the observer is
        none of the min/max observers, and where the first tensor has yet to give the buffers their
        sizes.
        """
        observer: Any = self._modules["activation_post_process"]
        kind = plain_kind(observer)
        cls: Any = type(self)
        its_cls = type(observer)
        # The entries change while a graph is traced, so it must not guard on them.
        has_entries = not is_dynamo_compiling()
        if (
            kind is None
            or kind.is_fixed
            or kind.per_channel != self.is_per_channel
            or cls.calculate_qparams is not _CALCULATE_QPARAMS
            or "calculate_qparams" in self.__dict__
            # Asked here, too, since two calls take 0.1 µs.
            or not ((has_entries and cls._read_plainly is cls) or keeps_tensors_plainly(cls))
            or not (
                (has_entries and its_cls._read_plainly is its_cls) or keeps_tensors_plainly(its_cls)
            )
        ):
            return None
        ch_axis = averaging_constant = None
        own, its = self._buffers, observer._buffers
        if kind.per_channel:
            ch_axis = self.ch_axis
            if observer.ch_axis != ch_axis:
                return None
        if kind.is_average:
            averaging_constant = observer.averaging_constant
        quant_min, quant_max, scheme, symmetric_zero_point = observer._scheme()
        try:
            scale: Any = own["scale"]
            min_val: Any = its["min_val"]
            if kind.per_channel and min_val.numel() != scale.numel():
                return None
            return _tuple(
                FusedSettings,
                (
                    own["observer_enabled"],
                    own["fake_quant_enabled"],
                    min_val,
                    its["max_val"],
                    scale,
                    own["zero_point"],
                    its["nonfinite_count"],
                    its["eps"],
                    ch_axis,
                    averaging_constant,
                    quant_min,
                    quant_max,
                    scheme,
                    symmetric_zero_point,
                    NONFINITE_CODES[observer.nonfinite],
                ),
            )
        except KeyError:
            return None  # a parameter, a parametrization or a plain tensor is in the place of one

    def _forward_in_steps(self, x: Tensor) -> Tensor:
        """The same by the methods that torch.ao's forward calls, whatever they do."""
        error = input_error(x)
        if error is not None:
            raise naming_its_layer(self, error)
        if isinstance(x, Proxy) and self.observer_enabled:
            raise TypeError(
                f"torch.fx.symbolic_trace cannot record how {type(self).__name__} observes with a "
                f"{type(self.activation_post_process).__name__}: call disable_observer() first"
            )
        if _is_compiling() and not is_exporting():
            run_in_graph(self, "_observe_in_steps", x)
        else:
            self._observe_in_steps(x)
        return self._fake_quantize(x)

    def _observe_in_steps(self, x: Tensor) -> None:
        if traces_for_onnx():
            return
        # A flag on the meta device has no value; shapes are all that counts there.
        enabled = self.observer_enabled
        if not enabled.is_meta and enabled:
            self.activation_post_process(x.detach())
            scale, zero_point = self.calculate_qparams()
            # scale is resized last: once it has elements for all channels, zero_point has too.
            for name, value in (("zero_point", zero_point), ("scale", scale)):
                buffer = getattr(self, name)
                if buffer.shape != value.shape:
                    with RESIZING:
                        refill(self, name, value.shape, 1 if name == "scale" else 0)
                    buffer = getattr(self, name)
                buffer.copy_(value)

    def _lacks_channels(self, x: Tensor) -> bool:
        """Whether `x` is the first tensor of a module that keeps a range for each channel."""
        observer, axis = self.activation_post_process, self._axis()
        return (
            axis is not None
            and isinstance(observer, PerChannelMinMaxObserver)
            and observer.max_val.numel() == 0
            and input_error(x) is None
            and x.numel() > 0
            and channel_error(x, axis, {}) is None
        )

    def _set_channels(self, channels: int) -> None:
        """Give what is kept for each channel its size, with nothing observed as yet.

        `prepare_qat` does so for weights: then graphs, traces and copies that are made before the
        first batch have every buffer in its final size.
        """
        observer = self.activation_post_process
        if self._axis() is None or not isinstance(observer, PerChannelMinMaxObserver):
            return
        if observer.max_val.numel() == 0:
            observer._set_channels(channels)
        for name, value in (("zero_point", 0), ("scale", 1)):
            if getattr(self, name).numel() != channels:
                refill(self, name, (channels,), value)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        observer = self.activation_post_process
        scale, zero_point, enabled = _qparams(self)
        levels = (observer.quant_min, observer.quant_max)
        try:
            return fake_quantize(x, scale, zero_point, enabled, self._axis(), *levels)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            cause = self._explained(error, x, {"scale": scale, "zero_point": zero_point})
            if cause is not None:
                raise naming_its_layer(self, cause) from None
            return x

    def _explained(
        self, error: Exception, x: Any, buffers: Mapping[str, Tensor | None]
    ) -> Exception | None:
        """Why the op refused `x`, in words; None where `x` is empty, and nothing is wrong."""
        if isinstance(error, ValueError):  # says so already
            return error
        cause = input_error(x)
        if cause is None and x.numel() == 0:
            return None
        cause = cause or channel_error(x, self._axis(), buffers)
        nonfinite: NonFinitePolicy = getattr(self.activation_post_process, "nonfinite", "ignore")
        if cause is None and nonfinite != "ignore":
            cause = nonfinite_error(x, nonfinite)
        return cause or error

    def _axis(self) -> int | None:
        return self.ch_axis if self.is_per_channel else None

    # What extra_repr shows, in torch.ao's order.
    _shown: ClassVar[tuple[str, ...]] = (
        *("fake_quant_enabled", "observer_enabled", "quant_min", "quant_max"),
        *("dtype", "qscheme", "ch_axis", "scale", "zero_point"),
    )

    def extra_repr(self) -> str:
        of_observer = ("quant_min", "quant_max", "reduce_range")
        return ", ".join(
            f"{name}={getattr(self.activation_post_process if name in of_observer else self, name)}"
            for name in self._shown
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_replaced(self, ("scale", "zero_point"), destination, prefix)
        observer = self.activation_post_process
        if (
            isinstance(observer, PerChannelMinMaxObserver)
            and observer._has_only_room()
            and bool((self.scale == 1).all())
            and bool((self.zero_point == 0).all())
        ):
            # As torch.ao's, which have one element before the first tensor.
            for name in ("scale", "zero_point"):
                destination[prefix + name] = destination[prefix + name][:1].clone()

    def _saved_before_the_first_tensor(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a state has one scale because nothing was observed, where there are several."""
        names = ("scale", "zero_point", "activation_post_process.min_val")
        sizes = [
            value.numel() if isinstance(value := state_dict.get(prefix + name), Tensor) else -1
            for name in names
        ]
        return sizes == [1, 1, 0] and self.scale.numel() > 1

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state whole, the observer's with it, or not at all."""
        of_observer = f"{prefix}activation_post_process."
        observers = {
            key.removeprefix(of_observer): value
            for key, value in state_dict.items()
            if key.startswith(of_observer)
        }
        if self._saved_before_the_first_tensor(state_dict, prefix):
            for name in ("scale", "zero_point"):
                value = state_dict[prefix + name]
                state_dict[prefix + name] = value.expand(getattr(self, name).shape).clone()
        saved = {
            name: state_dict[prefix + name]
            for name in ("scale", "zero_point")
            if prefix + name in state_dict
        }

        def load() -> None:
            problem = qparams_error(saved, self.is_per_channel)
            if problem is not None:
                error_msgs.append(does_not_fit(prefix, problem))
                return
            for name, value in saved.items():
                resized(self, name, value.shape)
            super(FakeQuantize, self)._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

        # What is missing or wrong with the observer's part, it says itself, in its turn.
        assign = local_metadata.get("assign_to_params_buffers", False)
        accepted = self._observer_takes(observers, assign)
        if self._load_whole(load, missing_keys, error_msgs, wanted=accepted):
            return
        if observers and accepted:
            # It is to stay as it is, too.
            own = self.activation_post_process.state_dict(keep_vars=True)
            state_dict.update({of_observer + name: value for name, value in own.items()})

    def _observer_takes(self, state: Mapping[str, Any], assign: bool) -> bool:
        """Whether the observer can load its part of a state, or there is none.

        The copy that tries has no hooks and no extra state: users' code is called once, when the
        observer itself loads.
        """
        observer = self.activation_post_process
        loads = type(observer)._load_from_state_dict
        if not state or not loads.__module__.startswith("fastquant."):
            return True
        trial = copy.deepcopy(observer)
        trial._load_state_dict_pre_hooks.clear()
        trial._load_state_dict_post_hooks.clear()
        own = {key: value for key, value in state.items() if not key.endswith(_EXTRA_STATE)}
        try:
            missing = trial.load_state_dict(own, strict=False, assign=assign).missing_keys
        except RuntimeError:
            return False
        return all(key.endswith(_EXTRA_STATE) for key in missing)


# The methods as written here, to notice where a user has replaced them.
_FORWARD: Any = FakeQuantize.forward
_CALCULATE_QPARAMS: Any = FakeQuantize.calculate_qparams


class FixedQParamsFakeQuantize(FakeQuantize):
    """Fake-quantize with a given scale and zero point, per tensor.

    Args:
        observer: constructor of a :class:`FixedQParamsObserver`.

    Raises:
        QuantizationError: another observer, or one that is not per tensor.
    """

    _shown = (
        *("fake_quant_enabled", "observer_enabled", "scale", "zero_point"),
        *("dtype", "quant_min", "quant_max", "qscheme"),
    )

    def __init__(self, observer: Callable[..., Any]) -> None:
        super().__init__(observer=observer)
        made = self.activation_post_process
        if not isinstance(made, FixedQParamsObserver):
            raise QuantizationError(
                f"{type(self).__name__}'s observer must be a FixedQParamsObserver, "
                f"got {type(made).__name__}"
            )
        if not is_per_tensor(self.qscheme):
            raise QuantizationError(
                f"{type(self).__name__} takes per-tensor qschemes only, got {self.qscheme}"
            )
        self._observer_ctr = observer
        self.scale = made.scale
        self.zero_point = made.zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale and zero point."""
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x` (floating, any shape and layout), where enabled.

        Raises:
            TypeError: `x` is no tensor or not floating.
            ValueError: `x` lies on another device than the scale.
        """
        if FakeQuantize.forward is not _FORWARD:  # a user's, which subclasses inherit
            return FakeQuantize.forward(self, x)
        kind = plain_kind(self.activation_post_process)
        if (
            kind is None
            or not kind.is_fixed
            or type(self).calculate_qparams is not _QPARAMS_OF_FIXED
            or "calculate_qparams" in self.__dict__
        ):
            return self._forward_in_steps(x)
        return self._fake_quantize(x)


_QPARAMS_OF_FIXED: Any = FixedQParamsFakeQuantize.calculate_qparams


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """:class:`FakeQuantize` with a moving-average min/max observer.

    Always one op a call. Scale and zero point are those of `calculate_qparams`, also after a
    phase that only observed; any `ch_axis` and floating dtype will do.

    Args:
        observer: constructor of the observer, a moving-average one.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        observer_kwargs: further arguments of the observer.

    The flags are int64 here, as in torch.ao.

    Raises:
        QuantizationError: another observer, or a quantized range that the dtype does not hold.
    """

    _flag_dtype = torch.int64
    _shown = (*FixedQParamsFakeQuantize._shown, "reduce_range")

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        made = self.activation_post_process
        if not isinstance(
            made, (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver)
        ):
            raise QuantizationError(
                f"{type(self).__name__}'s observer must be a MovingAverageMinMaxObserver or "
                f"MovingAveragePerChannelMinMaxObserver, got {type(made).__name__}"
            )
        self.is_symmetric_quant = _is_symmetric_quant(made.qscheme)

    # As in torch.ao: methods that a user sets on FakeQuantize do not change this class.
    forward = FakeQuantize.forward
    calculate_qparams = FakeQuantize.calculate_qparams

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.ao's fused op has a scale and zero point of its own.
        return scriptable(self, FakeQuantize)


class _LearnableFakeQuantize(FakeQuantizeBase):
    """Fake-quantize with a scale and zero point that are learned by gradient descent.

    Learned Step Size Quantization (Esser et al., https://arxiv.org/abs/1902.08153), as in
    torch.ao.quantization._learnable_fake_quantize. It starts in static estimation: an
    observer sets scale and zero point. `enable_param_learning` hands them to the optimizer.

    Args:
        observer: constructor of the observer.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        scale: first scale.
        zero_point: first zero point.
        channel_len: number of channels; -1 for per tensor.
        use_grad_scaling: divide the gradients of scale and zero point by
            `sqrt(x.numel() * quant_max)`.
        observer_kwargs: further arguments of the observer.

    Parameters: `scale`, `zero_point`, float32 with one element or `channel_len`. Flags as in
    :class:`FakeQuantizeBase`, with `static_enabled` for the observer, and `learning_enabled`.

    Raises:
        QuantizationError: a quantized range that is empty or that the dtype does not hold, or
            a channel_len that is no number of channels.
    """

    static_enabled: Tensor
    learning_enabled: Tensor
    eps: Tensor
    activation_post_process: Any

    def __init__(
        self,
        observer: Callable[..., Any],
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        use_grad_scaling: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        quant_min, quant_max = check_quantized_range(quant_min, quant_max, holds_zero=False)
        if channel_len != -1:
            channel_len = check_integer("channel_len (-1 for per tensor)", channel_len, least=1)
        made = observer(**{**observer_kwargs, "quant_min": quant_min, "quant_max": quant_max})
        check_fits_dtype(quant_min, quant_max, made.dtype)
        count = 1 if channel_len == -1 else channel_len
        self.scale = nn.Parameter(torch.full((count,), float(scale)))
        self.zero_point = nn.Parameter(torch.full((count,), float(zero_point)))
        self.activation_post_process = made
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.use_grad_scaling = use_grad_scaling
        self.dtype = made.dtype
        self.qscheme = made.qscheme
        self.ch_axis = getattr(made, "ch_axis", -1)
        self.bitwidth = (quant_max - quant_min + 1).bit_length() - 1
        self._register_flag("static_enabled", True)
        self._register_flag("learning_enabled", False)
        self.register_buffer("eps", torch.tensor([torch.finfo(torch.float32).eps]))

    def enable_param_learning(self: _Self) -> _Self:
        """Learn scale and zero point, observe no more, and fake-quantize."""
        return self._set_mode(learning=True, fake_quant=True, observer=False)

    def enable_static_estimate(self: _Self) -> _Self:
        """Take scale and zero point from the observer, and fake-quantize."""
        return self._set_mode(learning=False, fake_quant=True, observer=True)

    def enable_static_observation(self: _Self) -> _Self:
        """Take scale and zero point from the observer, and leave tensors as they are."""
        return self._set_mode(learning=False, fake_quant=False, observer=True)

    def _set_mode(self: _Self, *, learning: bool, fake_quant: bool, observer: bool) -> _Self:
        self.toggle_qparam_learning(learning)
        self.toggle_fake_quant(fake_quant)
        return self.toggle_observer_update(observer)

    def toggle_observer_update(self: _Self, enabled: bool = True) -> _Self:
        """Whether scale and zero point come from the observer."""
        self.static_enabled.fill_(int(enabled))
        return self

    def enable_observer(self, enabled: bool = True) -> None:
        """Take scale and zero point from the observer from now on, or no more."""
        self.toggle_observer_update(enabled)

    def toggle_qparam_learning(self: _Self, enabled: bool = True) -> _Self:
        """Whether scale and zero point take gradients."""
        self.learning_enabled.fill_(int(enabled))
        self.scale.requires_grad_(enabled)
        self.zero_point.requires_grad_(enabled)
        return self

    def toggle_fake_quant(self: _Self, enabled: bool = True) -> _Self:
        """Whether tensors are fake-quantized."""
        self.fake_quant_enabled.fill_(int(enabled))
        return self

    def observe_quant_params(self) -> None:
        """Print scale and zero point."""
        print(f"{type(self).__name__} Scale: {self.scale.detach()}")
        print(f"{type(self).__name__} Zero Point: {self.zero_point.detach()}")

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale, at least `eps`, and the zero point, rounded into the range, as int64."""
        scale = self.scale.data.clamp_(min=self.eps)
        zero_point = self.zero_point.data.round().clamp(self.quant_min, self.quant_max).long()
        return scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x` (floating, any shape and layout), as far as enabled.

        Raises:
            TypeError: `x` is no tensor or not floating.
            ValueError: no such channel axis, or another number of channels than `channel_len`.
        """
        ch_axis = self.ch_axis if is_per_channel(self.qscheme) else None
        error = input_error(x) or channel_error(
            x, ch_axis, {"scale": self.scale, "zero_point": self.zero_point}
        )
        if error is not None:
            raise naming_its_layer(self, error)
        if not traces_for_onnx():
            self._update_qparams(x)
        if not self.fake_quant_enabled:
            return x
        # LSQ's g = 1 / sqrt(N * Qp).
        scaling = (max(x.numel(), 1) * self.quant_max) ** -0.5 if self.use_grad_scaling else 1.0
        y: Tensor = learnable_fake_quantize(
            x, self.scale, self.zero_point, ch_axis, self.quant_min, self.quant_max, scaling
        )
        return y

    def _update_qparams(self, x: Tensor) -> None:
        # The parameters' `.data` changes, and not they: where the module is called twice in a
        # step, the first call's graph must stay valid.
        scale, zero_point = self.scale.data, self.zero_point.data
        if self.static_enabled:
            observer = self.activation_post_process
            observer(x.detach())
            new_scale, new_zero_point = observer.calculate_qparams()
            scale.copy_(new_scale)
            zero_point.copy_(new_zero_point)
        else:
            scale.clamp_(min=self.eps)
        if _is_symmetric_quant(self.qscheme) and self.fake_quant_enabled:
            zero_point.zero_()


LearnableFakeQuantize = _LearnableFakeQuantize


# --------------------------------------------------------------------------------------------
# Switches for model.apply


def _is_fake_quant(mod: object) -> bool:
    # torch.ao's fake-quantizers are virtual subclasses of ours.
    return isinstance(mod, FakeQuantizeBase) or _is_fake_quant_script_module(mod)


def disable_fake_quant(mod: Any) -> None:
    """`model.apply(disable_fake_quant)`: fake-quantizers leave tensors as they are."""
    if _is_fake_quant(mod):
        mod.disable_fake_quant()


def enable_fake_quant(mod: Any) -> None:
    """`model.apply(enable_fake_quant)`: fake-quantizers round tensors."""
    if _is_fake_quant(mod):
        mod.enable_fake_quant()


def disable_observer(mod: Any) -> None:
    """`model.apply(disable_observer)`: fake-quantizers keep their scale and zero point."""
    if _is_fake_quant(mod):
        mod.disable_observer()


def enable_observer(mod: Any) -> None:
    """`model.apply(enable_observer)`: fake-quantizers follow the range of their tensors."""
    if _is_fake_quant(mod):
        mod.enable_observer()


# --------------------------------------------------------------------------------------------
# The observers inside


def is_range_observer(module: nn.Module) -> bool:
    """Whether a module keeps statistics that can be merged."""
    return (
        _is_activation_post_process(module)
        and not isinstance(module, FakeQuantizeBase)
        and all(isinstance(getattr(module, name, None), Tensor) for name in ("min_val", "max_val"))
    )


def refresh_qparams(module: nn.Module) -> None:
    """Update scale and zero point of a fake-quantizer that takes them from its observer."""
    observer = getattr(module, "activation_post_process", None)
    if not isinstance(observer, nn.Module) or not is_range_observer(observer):
        return
    if has_seen_nothing(observer):
        return
    if isinstance(module, LearnableFakeQuantize):
        if module.static_enabled:
            scale, zero_point = observer.calculate_qparams()  # type: ignore[operator]
            module.scale.data.copy_(scale)
            module.zero_point.data.copy_(zero_point)
    elif isinstance(module, FakeQuantize) or (
        isinstance(module, FakeQuantizeBase) and hasattr(module, "scale")
    ):
        scale, zero_point = module.calculate_qparams()
        resized(module, "scale", scale.shape).copy_(scale)
        resized(module, "zero_point", zero_point.shape).copy_(zero_point)


def set_range_method(
    model: nn.Module, range_method: RangeMethodName, percentile: float | None = None
) -> list[str]:
    """Choose the ranges of a prepared model's histograms by another method.

    One calibration serves every method: a histogram keeps what all of them need. Scale and zero
    point of fake-quantizers are updated. Observers without a histogram stay as they are.

        fastquant.calibrate(prepared, data)
        for method in ("l2", "mse", "percentile", "entropy"):
            fastquant.set_range_method(prepared, method)
            evaluate(fastquant.convert(prepared))

    Args:
        model: a prepared model or a part of one, before or after calibration.
        range_method: "minmax", "l2", "mse", "percentile" or "entropy"; see
            :func:`fastquant.functional.histogram_range`.
        percentile: how many percent of the values the range of the method of this name holds;
            None leaves it as it is, 99.99 at first.

    Returns:
        The names of the observers that changed.

    Raises:
        QuantizationError: `model` has no observer with a histogram; an unknown method, or one that
            does not go with an observer's quantized range; a percentile that is not more than 0
            and at most 100. All observers are as before.
    """
    modules = dict(model.named_modules())
    # Not torch.ao's, though they are virtual subclasses of ours.
    observers: dict[str, Any] = {n: m for n, m in modules.items() if hasattr(m, "set_range_method")}
    before = [(o, o.range_method, o.percentile) for o in observers.values()]
    if not observers:
        raise QuantizationError(
            f"range method {range_method!r} needs histograms, and no observer of the model keeps "
            "one; give it a qconfig with fastquant.HistogramObserver, as "
            "fastquant.get_default_qconfig() has"
        )
    try:
        for observer in observers.values():
            observer.set_range_method(range_method, percentile)
    except QuantizationError:
        for observer, *settings in before:
            observer.range_method, observer.percentile = settings
        raise
    with torch.no_grad():
        for module in modules.values():
            if getattr(module, "activation_post_process", None) in observers.values():
                refresh_qparams(module)
    return list(observers)


# --------------------------------------------------------------------------------------------
# Defaults

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=QUINT8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
"""Activations."""

default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_tensor_symmetric,
    reduce_range=False,
)
"""Weights."""

default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    is_dynamic=True,
    dtype=QUINT8,
    averaging_constant=1,
)
"""Activations of modules that will be quantized dynamically."""

default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
"""Outputs known to lie in [-1, 1], as of tanh."""

default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
"""Outputs known to lie in [0, 1], as of a sigmoid."""

# Older names of the same.
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant

default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_channel_symmetric,
    reduce_range=False,
    ch_axis=0,
)
"""Weights, per channel."""

default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    dtype=QUINT8,
    quant_min=0,
    quant_max=255,
    ch_axis=0,
    averaging_constant=1,
)
"""Embedding weights in 8 bits, with float zero points; memoryless."""

default_embedding_fake_quant_4bit = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
    dtype=QUINT4X2,
    averaging_constant=1,
)
"""Embedding weights in 4 bits, with float zero points; memoryless."""

default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver,
    quant_min=0,
    quant_max=255,
    dtype=QUINT8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
"""Activations, by histogram."""

default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=QUINT8,
)
"""Activations, in 8 bits."""

default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_tensor_symmetric,
)
"""Weights."""

default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_channel_symmetric,
)
"""Weights, per channel."""

fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-127,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_tensor_symmetric,
    eps=2**-12,
)
"""Weights without -128."""

fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-127,
    quant_max=127,
    dtype=QINT8,
    qscheme=torch.per_channel_symmetric,
    eps=2**-12,
)
"""Weights without -128, per channel."""
