"""Observers: modules that watch tensors go by and say how to quantize them.

Every observer of `torch.ao.quantization.observer` under its own name, with its constructor,
attributes and `state_dict`. A call to one that keeps statistics is one op, which updates the
observer's buffers where they lie; nothing is read back from the device.
"""

from __future__ import annotations

import warnings
from abc import ABC as ABC  # code takes it from here, as from torch.ao's module of this name
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ._core.arguments import (
    as_floating,
    channel_error,
    check_averaging_constant,
    check_dtype,
    check_eps,
    check_integer,
    check_nonfinite,
    check_percentile,
    check_qscheme,
    check_range_method,
    check_searched_grid,
    input_error,
    nonfinite_error,
    width_error,
)
from ._core.dtypes import QINT8, QUINT4X2, QUINT8, is_quantized_dtype
from ._core.errors import naming_its_layer
from ._core.factories import _PartialWrapper as _PartialWrapper
from ._core.factories import _with_args as _with_args
from ._core.factories import _with_callable_args as _with_callable_args
from ._core.locks import RESIZING
from ._core.qparams import symmetric_zero_point
from ._core.ranges import UNOBSERVED, is_observed, is_unobserved, range_error
from ._core.schemes import (
    NONFINITE_CODES,
    SCHEME_CODES,
    WIDE,
    NonFinitePolicy,
    RangeMethodName,
    Scheme,
)
from ._core.state import (
    ActivationPostProcess,
    does_not_fit,
    eps_error,
    qparams_error,
    refill,
    resized,
    save_replaced,
)
from ._native.ops import choose_qparams, search_histogram_range
from ._native.reference.basics import (
    moved_histogram,
    quantization_error,
    range_of_least_error,
    squared_norm,
)
from ._native.routes import (
    histogram_error,
    histogram_qparams,
    histogram_range,
    least_error_range,
    observe_channel_histograms_,
    observe_histogram_,
    observe_minmax_,
)
from ._torch.ao import (
    AffineQuantizedObserverBase,
    Granularity,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    TorchAODType,
    ZeroPointDomain,
    get_block_size,
)
from ._torch.counterparts import scriptable
from ._torch.overrides import Written, reader
from ._torch.private import dispatch_modes, is_called_plainly
from ._torch.stand_ins import _is_observer_script_module, _is_per_channel_script_obs_instance
from .utils import (
    QuantizationError,
    calculate_qmin_qmax,
    is_per_channel,
    is_per_tensor,
    validate_qmin_qmax,
)

__all__ = [
    "AffineQuantizedObserverBase",
    "FixedQParamsObserver",
    "Granularity",
    "HistogramObserver",
    "MSEObserver",
    "MappingType",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "PerAxis",
    "PerBlock",
    "PerChannelHistogramObserver",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "TorchAODType",
    "UniformQuantizationObserverBase",
    "ZeroPointDomain",
    "default_affine_fixed_qparams_observer",
    "default_debug_observer",
    "default_dynamic_quant_observer",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_float_qparams_observer",
    "default_float_qparams_observer_4bit",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_reuse_input_observer",
    "default_symmetric_fixed_qparams_observer",
    "default_weight_observer",
    "get_block_size",
    "get_observer_state_dict",
    "load_observer_state_dict",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
]

is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_EPS = torch.finfo(torch.float32).eps
_SYMMETRIC = Scheme.SYMMETRIC.value

# --------------------------------------------------------------------------------------------
# Constructors with some arguments given


# --------------------------------------------------------------------------------------------
# Bases


class ObserverBase(ActivationPostProcess):
    """Base of all observers.

    `forward(x)` updates statistics and returns `x`; `calculate_qparams()` turns them into
    scale and zero point.

    Args:
        dtype: quantized dtype that the observed tensor is to get.
        is_dynamic: whether the range is to be measured anew at each call of the final model.
    """

    dtype: torch.dtype
    is_dynamic: bool

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = is_dynamic

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Update the statistics with `x`; returns `x` itself."""

    @abstractmethod
    def calculate_qparams(self, *args: Any, **kwargs: Any) -> Any:
        """Scale and zero point of what was observed."""

    with_args = classmethod(_with_args)
    with_callable_args = classmethod(_with_callable_args)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


def _factory(factory_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    checked: dict[str, Any] = nn.factory_kwargs(factory_kwargs)  # type: ignore[no-untyped-call]
    if checked.get("dtype", torch.get_default_dtype()) not in WIDE:
        checked["dtype"] = torch.float32
    return checked


class UniformQuantizationObserverBase(ObserverBase):
    """Base of the observers that choose the scale and zero point of a uniform grid.

    Args:
        dtype: quantized dtype: qint8, quint8, quint4x2, qint32, int8, uint8, int16, int32,
            uint16, float8_e5m2 or float8_e4m3fn.
        qscheme: per tensor or per channel, affine or symmetric; or per channel, affine with
            float zero points.
        reduce_range: leave out one bit of an 8-bit dtype, for kernels that may overflow.
        quant_min: smallest quantized value; the dtype's, unless both ends are given.
        quant_max: largest quantized value; the dtype's, unless both ends are given.
        factory_kwargs: `device` and `dtype` of the buffers, which are fp32 at least.
        eps: smallest scale.
        is_dynamic: whether the range is to be measured anew at each call of the final model.

    Raises:
        QuantizationError: a dtype, qscheme or quantized range that is not supported, or an `eps`
            that is negative or not finite.
    """

    # Versions of the state: 2 made eps a buffer; 3 made the unobserved range of
    # HistogramObserver 0-dim and renamed the per-channel min_vals, max_vals.
    _version = 3
    _kept_precise = ("eps", "histogram", "min_val", "max_val")

    eps: Tensor

    def __init__(
        self,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        check_qscheme(qscheme)
        check_dtype(dtype)
        check_eps(eps)
        super().__init__(dtype=dtype, is_dynamic=is_dynamic, **kwargs)
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.register_buffer("eps", torch.tensor([eps], **_factory(factory_kwargs)))
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        if quant_min is not None and quant_max is not None:
            quant_min = check_integer("quant_min", quant_min)
            quant_max = check_integer("quant_max", quant_max)
            self._validate_qmin_qmax(quant_min, quant_max)
        self.quant_min, self.quant_max = calculate_qmin_qmax(
            quant_min, quant_max, self.has_customized_qrange, dtype, reduce_range
        )

    def _validate_qmin_qmax(self, quant_min: int, quant_max: int) -> None:
        validate_qmin_qmax(quant_min, quant_max)

    def _scheme(self) -> tuple[int, int, int, int]:
        """What the ops need: quant_min, quant_max, code of the scheme, symmetric zero point.

        Worked out at each call, since code out there changes these attributes as it goes.
        """
        quant_min, quant_max = self.quant_min, self.quant_max
        scheme = SCHEME_CODES[self.qscheme]
        if scheme != _SYMMETRIC:
            return quant_min, quant_max, scheme, 0
        middle = symmetric_zero_point(self.dtype, quant_min, quant_max, self.has_customized_qrange)
        return quant_min, quant_max, scheme, middle

    def _calculate_qparams(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range, both 1-D with one element per tensor or channel.

        Args:
            min_val: smallest value seen, 0-dim or `[channels]`.
            max_val: largest value seen, like `min_val`.

        Returns:
            The scale in the range's dtype; the zero point as int64 (symmetric), int32 (affine)
            or in the scale's dtype (float qparams). ([1.0], [0]) and a warning where nothing
            was observed.

        Raises:
            QuantizationError: a range that is no range: min above max, NaN or infinite.
        """
        if not is_observed(min_val, max_val, self._is_average, stacklevel=3):
            device = min_val.device
            return torch.tensor([1.0], device=device), torch.tensor([0], device=device)
        scale, zero_point = choose_qparams(min_val, max_val, self.eps, *self._scheme())
        return scale, zero_point

    def _is_average(self) -> bool:
        """Whether the range is one of moving averages."""
        return getattr(self, "averaging_constant", None) is not None

    def reset_min_max_vals(self) -> None:
        """Forget what was observed."""
        raise NotImplementedError(f"{type(self).__name__} has no range to reset")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        if local_metadata.get("version", 1) < 2:
            # A state without eps was written when this was the only one.
            state_dict.setdefault(prefix + "eps", torch.tensor([_EPS]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


_ObserverBase = UniformQuantizationObserverBase


_statistics = reader("min_val", "max_val", "nonfinite_count")
_histogram_and_range = reader("histogram", "min_val", "max_val", "nonfinite_count")
_histogram_range_and_eps = reader("histogram", "min_val", "max_val", "eps")


class _RangeObserver(UniformQuantizationObserverBase):
    """Keeps a range: buffers `min_val` and `max_val`, +inf and -inf where nothing was observed.

    Per tensor they are 0-dim. Per channel they are `[channels]`, and `[0]` until the first
    tensor comes. A third buffer, `nonfinite_count` (int64 `[1]`), counts the elements that were
    left out under `nonfinite="ignore"`. It is in no state, and starts at zero when one is loaded.
    """

    _counters = ("nonfinite_count",)
    _per_channel: ClassVar[bool] = False

    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor

    def __init__(
        self,
        *,
        qscheme: torch.qscheme,
        is_dynamic: bool,
        factory_kwargs: dict[str, Any] | None = None,
        nonfinite: NonFinitePolicy = "ignore",
        **kwargs: Any,
    ) -> None:
        check_qscheme(qscheme)
        cls = type(self).__name__
        fits, granularity = (
            (is_per_channel, "per-channel") if self._per_channel else (is_per_tensor, "per-tensor")
        )
        if not fits(qscheme):
            raise NotImplementedError(f"{cls} takes {granularity} qschemes only, got {qscheme}")
        if is_dynamic and not self._measures_anew():
            raise NotImplementedError(f"{cls} cannot be dynamic: it remembers earlier tensors")
        check_nonfinite(nonfinite)
        super().__init__(
            qscheme=qscheme, is_dynamic=is_dynamic, factory_kwargs=factory_kwargs, **kwargs
        )
        self.nonfinite: NonFinitePolicy = nonfinite
        factory = _factory(factory_kwargs)
        shape = (0,) if self._per_channel else ()
        for name, unobserved in UNOBSERVED:
            self.register_buffer(name, torch.full(shape, unobserved, **factory))
        self._register_counter(factory.get("device"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A module that torch.ao pickled, read while its classes are patched to be ours.
        self.__dict__.setdefault("nonfinite", "ignore")
        if "nonfinite_count" not in self._buffers:
            self._register_counter(self.eps.device)

    def _register_counter(self, device: torch.device | None) -> None:
        count = torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("nonfinite_count", count, persistent=False)

    def _measures_anew(self) -> bool:
        """Whether the range is that of the last tensor alone, as dynamic quantization needs."""
        return True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range, both 1-D, one element per tensor or channel.

        Returns:
            The scale in the dtype of the range; the zero point as int64 (symmetric), int32
            (affine) or in the scale's dtype (float qparams). ([1.0], [0]) and a warning where
            nothing was observed.

        Raises:
            QuantizationError: the minimum lies above the maximum, or is NaN or infinite.
        """
        return self._calculate_qparams(self.min_val, self.max_val)

    def reset_min_max_vals(self) -> None:
        """Forget what was observed."""
        shape = (0,) if self._per_channel else self.min_val.shape
        for name, unobserved in UNOBSERVED:
            resized(self, name, shape).fill_(unobserved)
        self.nonfinite_count.zero_()

    def _observe_channels(self, channels: int, *args: Any) -> Any:
        """Call `_observe` for a first tensor, with room for so many channels in the buffers.

        They keep it only if the tensor is not refused.
        """
        if is_dynamo_compiling():
            self._set_channels(channels)
            return self._observe(*args)
        with RESIZING:
            first = self.max_val.numel() == 0  # and no other thread's tensor came before
            if first:
                self._set_channels(channels)
            try:
                return self._observe(*args)
            except Exception:
                if first:
                    self._set_channels(0)
                raise

    def _observe(self, *args: Any) -> Any:
        """Observe a tensor; see the subclasses."""
        raise NotImplementedError

    def _set_channels(self, channels: int) -> None:
        """Give the buffers room for so many channels, with nothing observed as yet."""
        # max_val comes last: once it has elements, the others have, too.
        for name, unobserved in UNOBSERVED:
            refill(self, name, (channels,), unobserved)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _explained(self, error: Exception, x: Any) -> Exception | None:
        """Why the op refused `x`, in words; None where `x` is empty, and nothing is wrong."""
        if isinstance(error, ValueError):  # says so already
            return error
        cause = input_error(x)
        if cause is None and x.numel() == 0:
            return None
        axis = getattr(self, "ch_axis", None) if self._per_channel else None
        cause = cause or channel_error(x, axis, {n: getattr(self, n) for n, _ in UNOBSERVED})
        if cause is None and self.nonfinite != "ignore":
            cause = nonfinite_error(x, self.nonfinite)
        return cause or error

    def _recipe(self) -> dict[str, Any]:
        """What :func:`fastquant.merge` has to know of the observer of a saved state."""
        return {
            "averaging_constant": self.__dict__.get("averaging_constant"),
            "levels": self.__dict__.get("dst_nbins", 0),
            "nonfinite": self.nonfinite,
            # Plain numbers: torch.load refuses classes it does not know.
            "scheme": list(map(int, self._scheme())),
            "upsample_rate": self.__dict__.get("upsample_rate", 1),
        }

    def _has_only_room(self) -> bool:
        """Whether a range per channel has its size already, with nothing observed as yet."""
        low, high = self.min_val, self.max_val
        return (
            self._per_channel
            and low.numel() > 0
            and not (low.is_meta or dispatch_modes())
            and is_unobserved(low, high)
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._has_only_room():
            # As torch.ao's, which have no size before the first tensor; its moving averages take
            # any range of another size for an observed one.
            for name, _ in UNOBSERVED:
                if prefix + name in destination:  # a plain tensor in its place is in no state
                    destination[prefix + name] = destination[prefix + name].new_empty(0)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["fastquant"] = self._recipe()

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
        """Load a state whole or, where it is not whole or not sound, not at all."""
        for name, unobserved in UNOBSERVED:
            key, old_key = prefix + name, prefix + name + "s"
            if old_key in state_dict:
                state_dict.setdefault(key, state_dict.pop(old_key))
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.shape == (0,):
                # Nothing was observed: the range keeps its size.
                state_dict[key] = value.new_full(getattr(self, name).shape, unobserved)
        if self._per_channel:
            # torch.ao does not ask for it here.
            state_dict.setdefault(prefix + "eps", self.eps)
        own = self._buffers.keys() | self._parameters.keys()
        names = [name for name in ("histogram", "min_val", "max_val") if name in own]
        statistics: dict[str, Any] = {
            name: state_dict[prefix + name] for name in names if prefix + name in state_dict
        }
        if len(statistics) == len(names):
            problem = self._state_error(statistics) or eps_error(state_dict.get(prefix + "eps"))
            if problem is not None:
                error_msgs.append(does_not_fit(prefix, problem))
                return

        def load() -> None:
            if self._per_channel:
                for name, value in statistics.items():
                    resized(self, name, value.shape)
            super(_RangeObserver, self)._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

        self._load_whole(load, missing_keys, error_msgs)

    def _state_error(self, statistics: Mapping[str, Any]) -> str | None:
        """What is wrong with saved statistics; None where they fit this observer."""
        held = dict(statistics)
        for name, value in statistics.items():
            buffer: Tensor = getattr(self, name)
            if not isinstance(value, Tensor):
                return f"{name} must be a tensor, got {type(value).__name__}"
            if self._per_channel:
                fits, shape = value.dim() == buffer.dim(), "[channels]"
            else:
                fits = value.shape == buffer.shape or (value.numel() == buffer.numel() == 1)
                shape = str(list(buffer.shape))
            if not fits:
                return f"size mismatch for {name}: got shape {list(value.shape)}, needs {shape}"
            if value.is_floating_point():
                # What is beyond a narrower buffer is not finite there.
                held[name] = value.to(buffer.dtype)
        if not held.keys() >= {"min_val", "max_val"}:
            return None  # plain tensors in their place, which no state has
        finite = self.nonfinite != "propagate"
        return range_error(**held, finite=finite, may_cross=self._is_average())


# --------------------------------------------------------------------------------------------
# Min/max


class _MinMax(_RangeObserver):
    """The smallest and largest value, running or as moving averages, per tensor or per channel.

    Which of these it is, instances say: by an attribute `ch_axis` they are per channel, by an
    attribute `averaging_constant` moving averages.
    """

    def __init__(
        self, *, dtype: torch.dtype, qscheme: torch.qscheme, reduce_range: bool, **kwargs: Any
    ) -> None:
        # torch.ao takes torch.uint8, which is also what QUINT8 is where torch has no quint8.
        is_quint8 = dtype == QUINT8 and is_quantized_dtype(dtype)
        if reduce_range and is_quint8 and SCHEME_CODES.get(qscheme) == Scheme.SYMMETRIC:
            raise NotImplementedError("reduce_range does not go with a symmetric quint8 range")
        super().__init__(dtype=dtype, qscheme=qscheme, reduce_range=reduce_range, **kwargs)

    def _observe(self, x: Tensor, ch_axis: int | None, averaging_constant: float | None) -> Tensor:
        """Update the range with `x` (real numbers, any shape and layout); returns `x` itself.

        Integers and fp8 numbers are converted to the dtype of the range, as in torch.ao.

        Raises:
            TypeError: `x` is no tensor, not dense, or complex.
            ValueError: no such channel axis, another number of channels or another device
                than before, or a non-finite element under `nonfinite="raise"`. The range
                keeps what it had.
        """
        min_val, max_val, nonfinite_count = _statistics(self)
        # max_val is resized last: once it has elements, min_val has too.
        if ch_axis is not None and max_val.numel() == 0:
            return self._observe_first(x, ch_axis, averaging_constant)
        # A graph catches no error of an op, which runs later.
        converted = as_floating(x, min_val.dtype) if is_dynamo_compiling() else None
        if converted is not None:
            self._observe(converted, ch_axis, averaging_constant)
            return x
        policy = NONFINITE_CODES[self.nonfinite]
        try:
            observe_minmax_(
                x, min_val, max_val, nonfinite_count, ch_axis, averaging_constant, policy
            )
        except (RuntimeError, TypeError, ValueError) as error:
            converted = as_floating(x, min_val.dtype)
            if converted is not None:
                self._observe(converted, ch_axis, averaging_constant)
                return x
            cause = self._explained(error, x)
            if cause is not None:
                raise naming_its_layer(self, cause) from None
        return x

    def _observe_first(self, x: Tensor, ch_axis: int, averaging_constant: float | None) -> Tensor:
        """The same for the first tensor, whose channels give the range its size."""
        converted = as_floating(x, self.min_val.dtype)
        if converted is not None:
            self._observe_first(converted, ch_axis, averaging_constant)
            return x
        error = input_error(x)
        if error is not None:
            raise naming_its_layer(self, error)
        if x.numel() == 0:
            return x
        error = channel_error(x, ch_axis, {})
        if error is not None:
            raise naming_its_layer(self, error)
        return self._observe_channels(x.shape[ch_axis], x, ch_axis, averaging_constant)  # type: ignore[no-any-return]


class MinMaxObserver(_MinMax):
    """The smallest and largest value of all tensors seen.

    With `lo = min(min_val, 0)`, `hi = max(max_val, 0)` and `n = quant_max - quant_min`, an
    affine scheme has `scale = (hi - lo) / n` and `zero_point = quant_min - round(lo / scale)`;
    a symmetric one `scale = max(-lo, hi) / (n / 2)` and its zero point mid-range. The scale is
    at least `eps`. Formulas of torch.ao.quantization.observer.MinMaxObserver.

    Args:
        nonfinite: what to do with NaN and infinities: "ignore" leaves them out and counts them
            in the buffer `nonfinite_count`; "raise" refuses the tensor; "propagate" lets them
            into the range as torch.ao does.

    The other arguments are those of :class:`UniformQuantizationObserverBase`. The range is
    per tensor: buffers `min_val` and `max_val` are 0-dim.

    Raises:
        NotImplementedError: a per-channel qscheme, or `reduce_range` of a symmetric quint8.
        QuantizationError: a dtype, quantized range or policy that is not supported.
    """

    def __init__(
        self,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        nonfinite: NonFinitePolicy = "ignore",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            eps=eps,
            is_dynamic=is_dynamic,
            nonfinite=nonfinite,
            **kwargs,
        )

    def forward(self, x_orig: Tensor) -> Tensor:
        """Extend the range to hold `x_orig` (any shape and layout); returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it lies on another device, or has a non-finite element under
                `nonfinite="raise"`. The range keeps what it had.
        """
        return self._observe(x_orig, None, None)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Moving averages of each tensor's smallest and largest value.

    The first tensor sets the range; each later one moves it by
    `min_val += averaging_constant * (min(x) - min_val)`, and `max_val` likewise.

    Args:
        averaging_constant: weight of the newest tensor; 1 keeps no memory.

    The other arguments are those of :class:`MinMaxObserver`; `is_dynamic` needs an
    `averaging_constant` of 1.

    Raises:
        NotImplementedError: a per-channel qscheme, `reduce_range` of a symmetric quint8, or a
            dynamic observer with a memory.
        QuantizationError: a dtype, quantized range or policy that is not supported.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        check_averaging_constant(averaging_constant)
        self.averaging_constant = averaging_constant
        super().__init__(
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            **kwargs,
        )

    def forward(self, x_orig: Tensor) -> Tensor:
        """Move the averages by `x_orig` (any shape and layout); returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it lies on another device, or has a non-finite element under
                `nonfinite="raise"`. The averages keep what it had.
        """
        return self._observe(x_orig, None, self.averaging_constant)

    def _measures_anew(self) -> bool:
        return self.averaging_constant == 1


class PerChannelMinMaxObserver(_MinMax):
    """The smallest and largest value of each channel.

    Formulas as in :class:`MinMaxObserver`, for each channel by itself. With float qparams,
    `scale = (max_val - min_val) / n` (1 where that is at most `eps`) and
    `zero_point = -min_val / scale`.

    Args:
        ch_axis: axis of the channels; negative counts from the end.

    The other arguments are those of :class:`MinMaxObserver`. Buffers `min_val` and `max_val`
    are `[channels]`, and `[0]` before the first tensor.

    Raises:
        NotImplementedError: a per-tensor qscheme, `reduce_range` of a symmetric quint8, or
            `is_dynamic`.
        QuantizationError: a dtype, quantized range or policy that is not supported.
    """

    _per_channel = True

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        nonfinite: NonFinitePolicy = "ignore",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            eps=eps,
            is_dynamic=is_dynamic,
            nonfinite=nonfinite,
            **kwargs,
        )
        self.ch_axis = check_integer("ch_axis", ch_axis)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Extend each channel's range to hold `x_orig`; returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it has no such channel axis, another number of channels than before or a
                non-finite element under `nonfinite="raise"`, or lies on another device. The
                ranges keep what it had.
        """
        return self._forward(x_orig)

    def _forward(self, x_orig: Tensor) -> Tensor:
        # What torch.ao's forward calls, and a subclass may therefore override.
        return self._observe(x_orig, self.ch_axis, None)

    def _measures_anew(self) -> bool:
        return False


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Moving averages of the smallest and largest value of each channel.

    As :class:`MovingAverageMinMaxObserver`, for each channel by itself.

    Args:
        averaging_constant: weight of the newest tensor; 1 keeps no memory.
        ch_axis: axis of the channels; negative counts from the end.

    The other arguments, and what is raised, are those of :class:`PerChannelMinMaxObserver`.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ch_axis=ch_axis,
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            **kwargs,
        )
        check_averaging_constant(averaging_constant)
        self.averaging_constant = averaging_constant

    def forward(self, x_orig: Tensor) -> Tensor:
        """Move each channel's averages by `x_orig`; returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it has no such channel axis, another number of channels than before or a
                non-finite element under `nonfinite="raise"`, or lies on another device. The
                averages keep what it had.
        """
        return self._observe(x_orig, self.ch_axis, self.averaging_constant)


# --------------------------------------------------------------------------------------------
# Least squared error


class _LeastErrorRange(_MinMax):
    """Takes from each tensor, not its extremes, but the range it is quantized to with least error.

    The search is for one tensor, and so for weights: of activations, which come batch by batch, a
    histogram keeps what it needs.
    """

    def _observe_least_error(self, x: Tensor, ch_axis: int | None) -> Tensor:
        """Extend the range to hold that of `x`; returns `x` itself."""
        error = input_error(x)
        if error is None and isinstance(x, Tensor) and x.numel() == 0:
            return x
        own = {} if self.max_val.numel() == 0 else {n: getattr(self, n) for n, _ in UNOBSERVED}
        error = error or channel_error(x, ch_axis, own)
        if error is None and self.nonfinite == "raise":
            error = nonfinite_error(x, self.nonfinite)
        if error is not None:
            raise naming_its_layer(self, error)
        config = self._scheme()
        check_searched_grid("mse", *config[:3])
        if self.nonfinite == "propagate" and not bool(x.isfinite().all()):
            return self._observe(x, ch_axis, None)
        low, high = least_error_range(x, ch_axis, *config)
        left_out = self.nonfinite_count + (~x.isfinite()).sum()
        self._observe(torch.stack([low, high], 1), None if ch_axis is None else 0, None)
        self.nonfinite_count.copy_(left_out)
        return x


class MSEObserver(_LeastErrorRange, MinMaxObserver):
    """The range to which a weight is quantized with the least squared error.

    A grid of scales is tried, and every zero point if affine; each error is that of the weight's
    own values. The range of several tensors holds those of all of them. The arguments, buffers and
    errors are those of :class:`MinMaxObserver`; torch.ao has no such observer.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        """Extend the range to hold the best one for `x_orig`; returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it lies on another device, or has a non-finite element under
                `nonfinite="raise"`. The range keeps what it had.
        """
        return self._observe_least_error(x_orig, None)


class PerChannelMSEObserver(_LeastErrorRange, PerChannelMinMaxObserver):
    """As :class:`MSEObserver`, for each channel of a weight by itself.

    The arguments, buffers and errors are those of :class:`PerChannelMinMaxObserver`, but for float
    qparams, which it refuses when it observes; torch.ao has no such observer.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        """Extend each channel's range to hold the best one for it; returns `x_orig` itself.

        Raises:
            TypeError: `x_orig` is no tensor, not dense, or complex.
            ValueError: it has no such channel axis, another number of channels than before or a
                non-finite element under `nonfinite="raise"`, or lies on another device. The
                ranges keep what it had.
        """
        return self._observe_least_error(x_orig, self.ch_axis)


# --------------------------------------------------------------------------------------------
# Histogram


class _HistogramObserver(_RangeObserver):
    """Keeps a histogram, per tensor or per channel, and chooses a part of its span as the range.

    Buffer `histogram`: `[bins]`, or `[channels, bins]`, of counts over the span from `min_val` to
    `max_val`.
    """

    histogram: Tensor
    # Observers pickled by earlier versions, and by torch.ao, have none of their own.
    range_method: RangeMethodName = "l2"
    percentile: float = 99.99

    def __init__(
        self,
        *,
        bins: int,
        search_levels: Literal["dtype", "range"],
        range_method: RangeMethodName,
        percentile: float,
        factory_kwargs: dict[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        bins = check_integer("bins", bins, least=1)
        if search_levels not in ("dtype", "range"):
            raise QuantizationError(
                f"search_levels must be 'dtype' or 'range', got {search_levels!r}"
            )
        super().__init__(factory_kwargs=factory_kwargs, **kwargs)
        self.bins = bins
        shape = (0, bins) if self._per_channel else (bins,)
        self.register_buffer("histogram", torch.zeros(shape, **_factory(factory_kwargs)))
        # As torch.ao registers them: the order in which state_dict lists them.
        for name, _ in UNOBSERVED:
            self._buffers[name] = self._buffers.pop(name)
        if search_levels == "range":
            self.dst_nbins = self.quant_max - self.quant_min + 1
        elif self.dtype.is_floating_point:
            raise QuantizationError(
                f"{type(self).__name__} takes integer dtypes only, got {self.dtype}"
            )
        else:
            self.dst_nbins = 2 ** torch.iinfo(self.dtype).bits
        # Each bin counts as this many when a histogram is resampled onto a wider span.
        self.upsample_rate = 16
        self.set_range_method(range_method, percentile)

    def _measures_anew(self) -> bool:
        return False

    def set_range_method(
        self, range_method: RangeMethodName, percentile: float | None = None
    ) -> None:
        """Choose the range by this method from now on, also if values were observed before.

        Args:
            range_method: "minmax", "l2", "mse", "percentile" or "entropy".
            percentile: how many percent of the values the range of the method of this name holds;
                None leaves it as it is.

        Raises:
            QuantizationError: an unknown method, or one that does not go with the quantized
                range; a percentile that is not more than 0 and at most 100.
        """
        check_range_method(range_method)
        check_searched_grid(range_method, *self._scheme()[:3])
        if percentile is not None:
            check_percentile(percentile)
            self.percentile = percentile
        self.range_method = range_method

    def calculate_range(
        self, range_method: RangeMethodName | None = None, percentile: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The range that a method chooses, which holds 0.

        Args:
            range_method: "minmax", "l2", "mse", "percentile" or "entropy"; None for the
                observer's own.
            percentile: of the method of this name; None for the observer's own.

        Returns:
            Both ends, like `min_val` and `max_val`.

        Raises:
            QuantizationError: nothing was observed; a method or percentile that is not supported.
        """
        method = self.range_method if range_method is None else range_method
        percentile = self.percentile if percentile is None else percentile
        code = check_range_method(method)
        check_percentile(percentile)
        config = self._scheme()
        check_searched_grid(method, *config[:3])
        histogram, min_val, max_val, _ = _histogram_range_and_eps(self)
        if is_unobserved(min_val, max_val):
            raise QuantizationError("there is no range: nothing was observed")
        if method == "l2" and (found := self._found_by_users_search()) is not None:
            low, high = found
            return low.clamp(max=0), high.clamp(min=0)
        settings = (code, float(percentile), self.dst_nbins, *config)
        return histogram_range(histogram, min_val, max_val, *settings)

    def calculate_error(
        self, min_val: Tensor | None = None, max_val: Tensor | None = None
    ) -> Tensor:
        """The mean squared error of quantizing the observed values to a range.

        The values of a bin are taken as spread evenly over it; the error is that of clipping and
        that of rounding to the integers from `quant_min` to `quant_max`.

        Args:
            min_val: where the range begins; None for the range of :meth:`calculate_range`.
            max_val: where it ends.

        Returns:
            The error in fp64, like `min_val`; NaN where nothing was observed.
        """
        if min_val is None or max_val is None:
            min_val, max_val = self.calculate_range()
        config = self._scheme()
        scale, zero_point = choose_qparams(min_val, max_val, self.eps, *config)
        ends = (self.min_val, self.max_val)
        return histogram_error(self.histogram, *ends, scale, zero_point, *config[:2])

    def _found_by_users_search(self) -> tuple[Tensor, Tensor] | None:
        """What the search for "l2" finds where a user has replaced a part of it."""
        return None

    def _recipe(self) -> dict[str, Any]:
        method = {"range_method": self.range_method, "percentile": float(self.percentile)}
        return super()._recipe() | method

    def reset_min_max_vals(self) -> None:
        """Forget what was observed."""
        super().reset_min_max_vals()
        if self._per_channel:
            refill(self, "histogram", (0, self.bins), 0.0)
        self.histogram.zero_()

    def _explained(self, error: Exception, x: Any) -> Exception | None:
        cause = super()._explained(error, x)
        if cause is not error:
            return cause
        kept = ("histogram", "min_val", "max_val")
        return width_error({name: getattr(self, name) for name in kept}) or error


class HistogramObserver(_HistogramObserver):
    """A histogram of all values seen, for a range that clips outliers where that pays.

    The histogram spans the smallest to the largest value; when a tensor goes beyond, the
    counts so far are resampled onto the new span. `calculate_qparams` chooses a part of the span
    by `range_method`, which may be changed at any time: see :meth:`set_range_method` and, for all
    observers of a model, :func:`fastquant.set_range_method`. By default it searches for the
    clipping range of least expected squared quantization error: the non-linear search of
    Caffe2's norm minimization, as in torch.ao.quantization.observer.HistogramObserver.

    Args:
        bins: number of bins.
        range_method: "minmax", "l2", "mse", "percentile" or "entropy"; see
            :func:`fastquant.functional.histogram_range`.
        percentile: how many percent of the values the range of the method of this name holds.
        search_levels: how many quantized values "l2" reckons with: "dtype", as many as the
            dtype has (as torch.ao does, also where `quant_min`, `quant_max` or
            `reduce_range` leave fewer); "range", `quant_max - quant_min + 1`.
        nonfinite: as in :class:`MinMaxObserver`.

    The other arguments are those of :class:`UniformQuantizationObserverBase`. Buffers:
    `histogram` (`[bins]`), `min_val` and `max_val` (0-dim). A tensor is counted in integers and
    then added, so a bin in fp32 is exact up to 2**24 counts and from there on rounds each
    addition to 24 bits: it stops only at 2**24 times what a tensor adds to it.

    Raises:
        NotImplementedError: a per-channel qscheme, or `is_dynamic`.
        QuantizationError: a dtype, quantized range, policy, method or percentile that is not
            supported.
    """

    # How often a tensor counts: twice where torch.ao would call a fused module's observer twice.
    _times: int = 1

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        nonfinite: NonFinitePolicy = "ignore",
        search_levels: Literal["dtype", "range"] = "dtype",
        range_method: RangeMethodName = "l2",
        percentile: float = 99.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            bins=bins,
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            eps=eps,
            is_dynamic=is_dynamic,
            nonfinite=nonfinite,
            search_levels=search_levels,
            range_method=range_method,
            percentile=percentile,
            **kwargs,
        )

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count the elements of `x_orig` (floating, any shape and layout); returns it itself.

        Raises:
            TypeError: `x_orig` is no tensor or not floating.
            ValueError: it lies on another device, or has a non-finite element under
                `nonfinite="raise"`. The histogram keeps what it had.
        """
        own, cls = self.__dict__, type(self)
        if (
            cls._combine_histograms is not _COMBINE
            or cls._upscale_histogram is not _UPSCALE
            or cls.reset_histogram is not _RESET
            or "_combine_histograms" in own
            or "_upscale_histogram" in own
            or "reset_histogram" in own
        ):
            for _ in range(self._times):
                self._forward_in_steps(x_orig)
            return x_orig
        histogram, min_val, max_val, nonfinite_count = _histogram_and_range(self)
        policy = NONFINITE_CODES[self.nonfinite]
        try:
            observe_histogram_(
                x_orig,
                histogram,
                min_val,
                max_val,
                nonfinite_count,
                self.upsample_rate,
                policy,
                self._times,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            cause = self._explained(error, x_orig)
            if cause is not None:
                raise naming_its_layer(self, cause) from None
        return x_orig

    def _forward_in_steps(self, x_orig: Tensor) -> None:
        """The same by the methods that torch.ao's forward calls, whatever they do."""
        error = input_error(x_orig)
        if error is not None:
            raise naming_its_layer(self, error)
        x = x_orig.detach().to(self.histogram.dtype)
        finite = x.isfinite()
        if not bool(finite.all()):
            # Infinities never enter a histogram, and NaN raises where torch's would.
            refused = x if self.nonfinite == "raise" else x[x.isnan()]
            if self.nonfinite != "ignore" and refused.numel():
                raise nonfinite_error(refused, self.nonfinite) or AssertionError
            self.nonfinite_count += (~finite).sum()
            x = x[finite]
        if x.numel() == 0:
            return
        low, high = x.aminmax()
        if is_unobserved(self.min_val, self.max_val):
            self.reset_histogram(x, low, high)
            return
        new_min, new_max = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        counts = torch.histc(x, self.bins, min=float(new_min), max=float(new_max))
        old_range = (self.min_val, self.max_val)
        if (new_min, new_max) == old_range:
            self.histogram.add_(counts)
            return
        self.histogram.copy_(
            self._combine_histograms(self.histogram, *old_range, counts, new_min, new_max)
        )
        self.min_val.copy_(new_min)
        self.max_val.copy_(new_max)

    def _combine_histograms(
        self,
        orig_hist: Tensor,
        orig_min: Tensor,
        orig_max: Tensor,
        update_hist: Tensor,
        update_min: Tensor,
        update_max: Tensor,
    ) -> Tensor:
        """The sum of two histograms, over the range of the second, which holds the first's."""
        if bool(update_min > orig_min) or bool(update_max < orig_max):
            raise QuantizationError(
                f"the new range, {float(update_min)} to {float(update_max)}, must hold the old "
                f"one, {float(orig_min)} to {float(orig_max)}"
            )
        ranges = (orig_min, orig_max, update_min, update_max)
        if bool(orig_min == orig_max) or (orig_min, orig_max) == (update_min, update_max):
            return self._moved(orig_hist, *ranges) + update_hist
        return self._upscale_histogram(orig_hist, *ranges) + update_hist

    def _upscale_histogram(
        self,
        histogram: Tensor,
        orig_min: Tensor,
        orig_max: Tensor,
        update_min: Tensor,
        update_max: Tensor,
    ) -> Tensor:
        """The histogram over its range in the bins of another range, which holds its own."""
        return self._moved(histogram, orig_min, orig_max, update_min, update_max)

    def _moved(self, histogram: Tensor, *ranges: Tensor) -> Tensor:
        low, high, new_low, new_high = (t.reshape(()).double() for t in ranges)
        settings = (self.upsample_rate, histogram.dtype)
        moved = moved_histogram(histogram.double(), low, high, new_low, new_high, *settings)
        return moved.to(histogram.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range that the method chooses, both `[1]`.

        Their dtypes are those of :meth:`MinMaxObserver.calculate_qparams`.

        Raises:
            QuantizationError: the histogram does not have `bins` bins, or the span is no range.
        """
        histogram, min_val, max_val, eps = _histogram_range_and_eps(self)
        if not is_observed(min_val, max_val, self._is_average, stacklevel=2):
            device = min_val.device
            return torch.tensor([1.0], device=device), torch.tensor([0], device=device)
        if self.bins != histogram.numel():
            raise QuantizationError(
                f"histogram must have bins={self.bins} elements, got {histogram.numel()}"
            )
        if self.range_method != "l2":
            return self._calculate_qparams(*self.calculate_range())
        if _steps_of_qparams.is_replaced(self):
            return self._calculate_qparams(*self._non_linear_param_search())
        settings = (eps, self.dst_nbins, *self._scheme())
        return histogram_qparams(histogram, min_val, max_val, *settings)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_replaced(self, ("min_val", "max_val"), destination, prefix)

    def _found_by_users_search(self) -> tuple[Tensor, Tensor] | None:
        return self._non_linear_param_search() if _steps_of_qparams.is_replaced(self) else None

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """The clipping range (min, max) of least expected quantization error."""
        if _steps_of_search.is_replaced(self):
            counts = self.histogram.to("cpu", torch.float32)
            return range_of_least_error(
                counts, self.min_val, self.max_val, self._compute_quantization_error
            )
        new_min, new_max = search_histogram_range(
            self.histogram, self.min_val, self.max_val, self.dst_nbins
        )
        return new_min, new_max

    def _compute_quantization_error(self, next_start_bin: int, next_end_bin: int) -> float:
        """The expected error of a range from the first to the last of these bins."""
        bin_width = (self.max_val.item() - self.min_val.item()) / self.bins
        return quantization_error(
            self.histogram, bin_width, self.dst_nbins, next_start_bin, next_end_bin, self._get_norm
        )

    def _get_norm(self, delta_begin: Tensor, delta_end: Tensor, density: Tensor) -> Tensor:
        """The error of values that lie from `delta_begin` to `delta_end` off a quantized one."""
        return squared_norm(delta_begin, delta_end, density)

    def reset_histogram(self, x: Tensor, min_val: Tensor, max_val: Tensor) -> None:
        """Start anew: `x` counted over the span from `min_val` to `max_val` (one element each)."""
        if min_val.numel() != 1 or max_val.numel() != 1:
            raise QuantizationError(
                "min_val and max_val must have one element, got shapes "
                f"{list(min_val.shape)} and {list(max_val.shape)}"
            )
        low, high = float(min_val), float(max_val)
        counts = torch.histc(x.detach().to(self.histogram.dtype), self.bins, min=low, max=high)
        self.min_val.fill_(low)
        self.max_val.fill_(high)
        self.histogram.copy_(counts)


class PerChannelHistogramObserver(_HistogramObserver):
    """A histogram of each channel, for ranges that clip outliers channel by channel.

    As :class:`HistogramObserver`, which has the same methods of choosing a range; torch.ao has no
    such observer.

    Args:
        ch_axis: axis of the channels; negative counts from the end.

    The other arguments are those of :class:`HistogramObserver`. Buffers: `histogram`
    (`[channels, bins]`), `min_val` and `max_val` (`[channels]`), with 0 channels before the first
    tensor.

    Raises:
        NotImplementedError: a per-tensor qscheme, or `is_dynamic`.
        QuantizationError: a dtype, quantized range, policy, method or percentile that is not
            supported.
    """

    _per_channel = True

    def __init__(
        self,
        ch_axis: int = 0,
        bins: int = 2048,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        *,
        nonfinite: NonFinitePolicy = "ignore",
        search_levels: Literal["dtype", "range"] = "dtype",
        range_method: RangeMethodName = "l2",
        percentile: float = 99.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            bins=bins,
            dtype=dtype,
            qscheme=qscheme,
            reduce_range=reduce_range,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            eps=eps,
            is_dynamic=is_dynamic,
            nonfinite=nonfinite,
            search_levels=search_levels,
            range_method=range_method,
            percentile=percentile,
            **kwargs,
        )
        self.ch_axis = check_integer("ch_axis", ch_axis)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count the elements of `x_orig` (floating, any shape and layout); returns it itself.

        Raises:
            TypeError: `x_orig` is no tensor or not floating.
            ValueError: no such channel axis, another number of channels or another device than
                before, or a non-finite element under `nonfinite="raise"`. The histograms keep
                what they had.
        """
        error = input_error(x_orig)
        if error is not None:
            raise naming_its_layer(self, error)
        if x_orig.numel() == 0:
            return x_orig
        try:
            if self.max_val.numel() == 0:
                self._observe_first(x_orig)
            else:
                self._observe(x_orig)
        except (RuntimeError, TypeError, ValueError) as refusal:
            cause = self._explained(refusal, x_orig)
            raise naming_its_layer(self, cause or refusal) from None
        return x_orig

    def _observe(self, x: Tensor) -> None:
        buffers = _histogram_and_range(self)
        policy = NONFINITE_CODES[self.nonfinite]
        observe_channel_histograms_(x, *buffers, self.ch_axis, self.upsample_rate, policy)

    def _observe_first(self, x: Tensor) -> None:
        """The same for the first tensor, whose channels give the histograms their number."""
        error = channel_error(x, self.ch_axis, {})
        if error is not None:
            raise error
        self._observe_channels(x.shape[self.ch_axis], x)

    def _set_channels(self, channels: int) -> None:
        refill(self, "histogram", (channels, self.bins), 0.0)
        super()._set_channels(channels)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range that the method chooses, both `[channels]`.

        Their dtypes are those of :meth:`MinMaxObserver.calculate_qparams`.

        Raises:
            QuantizationError: a histogram does not have `bins` bins, or a span is no range.
        """
        if is_unobserved(self.min_val, self.max_val):
            return self._calculate_qparams(self.min_val, self.max_val)
        return self._calculate_qparams(*self.calculate_range())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "histogram"
        if self._has_only_room() and key in destination:
            destination[key] = destination[key].new_empty(0, self.bins)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        histogram = state_dict.get(prefix + "histogram")
        if isinstance(histogram, Tensor) and histogram.shape == (0, self.bins):
            # Nothing was observed: the histograms keep their number.
            state_dict[prefix + "histogram"] = histogram.new_zeros(self.histogram.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _state_error(self, statistics: Mapping[str, Any]) -> str | None:
        histogram, low = (statistics.get(name) for name in ("histogram", "min_val"))
        if isinstance(histogram, Tensor) and isinstance(low, Tensor):
            needed = (low.numel(), self.bins)
            if histogram.shape != needed:
                return (
                    f"size mismatch for histogram: got shape {list(histogram.shape)}, needs "
                    f"{list(needed)}"
                )
        return super()._state_error(statistics)


# What torch.ao's methods call on the observer, and users therefore replace.
_steps_of_search = Written(HistogramObserver, "_compute_quantization_error", "_get_norm")
_steps_of_qparams = Written(
    HistogramObserver,
    "_calculate_qparams",
    "_non_linear_param_search",
    "_compute_quantization_error",
    "_get_norm",
)
# Those of forward by themselves: a call of a small tensor takes no longer than a loop over names.
_COMBINE: Any = HistogramObserver._combine_histograms
_UPSCALE: Any = HistogramObserver._upscale_histogram
_RESET: Any = HistogramObserver.reset_histogram


# --------------------------------------------------------------------------------------------
# Observers that keep no range


class FixedQParamsObserver(ObserverBase):
    """Observes nothing: the scale and zero point are given.

    Args:
        scale: the scale; buffer `scale`, float32 `[1]`.
        zero_point: the zero point; buffer `zero_point`, int32 `[1]`.
        dtype: quantized dtype.
        qscheme: quantization scheme, per tensor.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.

    Raises:
        NotImplementedError: `is_dynamic`.
    """

    _kept_precise = ("scale",)

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = QUINT8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
        **kwargs: Any,
    ) -> None:
        if is_dynamic:
            raise NotImplementedError("FixedQParamsObserver cannot be dynamic")
        super().__init__(dtype=dtype, is_dynamic=is_dynamic, **kwargs)
        self.qscheme = qscheme
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale and zero point: the buffers themselves."""
        return self.scale, self.zero_point

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = ("scale", "zero_point")
        problem = qparams_error(
            {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}, False
        )
        if problem is not None:
            args[-1].append(does_not_fit(prefix, problem))
            return
        load = partial(super()._load_from_state_dict, state_dict, prefix, *args)
        self._load_whole(load, args[2], args[4])


@dataclass(frozen=True, slots=True)
class Kind:
    """What calling an observer and asking it for qparams comes to.

    Attributes:
        calculate_qparams: the method that answers.
        per_channel: whether a range is kept for each channel.
        is_average: whether it is one of moving averages.
        is_fixed: whether nothing is observed.
    """

    calculate_qparams: Any
    per_channel: bool = False
    is_average: bool = False
    is_fixed: bool = False


# By the forward of the observer's class. As everything here, these are the methods as they were
# written, to notice where a user has replaced them.
_OF_RANGE = _RangeObserver.calculate_qparams
_QPARAMS: Any = UniformQuantizationObserverBase._calculate_qparams
_FORWARD: Any = PerChannelMinMaxObserver._forward
_KINDS: dict[Any, Kind] = {
    MinMaxObserver.forward: Kind(_OF_RANGE),
    MovingAverageMinMaxObserver.forward: Kind(_OF_RANGE, is_average=True),
    PerChannelMinMaxObserver.forward: Kind(_OF_RANGE, per_channel=True),
    MovingAveragePerChannelMinMaxObserver.forward: Kind(
        _OF_RANGE, per_channel=True, is_average=True
    ),
    FixedQParamsObserver.forward: Kind(FixedQParamsObserver.calculate_qparams, is_fixed=True),
}


def plain_kind(observer: Any) -> Kind | None:
    """The kind of an observer that is as it was written, so that one op can do its work.

    None for all other observers, and where anything of it was replaced.
    """
    own, cls = observer.__dict__, type(observer)
    kind = _KINDS.get(cls.forward)
    if (
        kind is None
        or not is_called_plainly(observer)
        or cls.calculate_qparams is not kind.calculate_qparams
        or "calculate_qparams" in own
    ):
        return None
    if kind.is_fixed:
        return kind
    if (
        cls._calculate_qparams is not _QPARAMS
        or "_calculate_qparams" in own
        or (kind.per_channel and (cls._forward is not _FORWARD or "_forward" in own))
    ):
        return None
    return kind


class _UnobservingObserver(ObserverBase):
    """Stands where an observer is expected and has no range to quantize by."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            f"{type(self).__name__} observes no range: it has no scale and zero point to calculate"
        )


class PlaceholderObserver(_UnobservingObserver):
    """Observes nothing; carries a configuration to the module that will be quantized.

    For dtypes without a range (float16) and for dynamic quantization.

    Args:
        dtype: quantized dtype.
        custom_op_name: name of the op this is for, where that op needs no observer.
        compute_dtype: deprecated spelling of `is_dynamic`.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        qscheme: quantization scheme; per tensor, affine by default.
        eps: smallest scale.
        is_dynamic: whether the range is to be measured anew at each call of the final model.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        if compute_dtype is not None:
            warnings.warn("compute_dtype is deprecated: give is_dynamic=True", stacklevel=2)
        super().__init__(dtype=dtype, is_dynamic=is_dynamic or compute_dtype is not None)
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.eps = _EPS if eps is None else eps
        self.custom_op = custom_op_name

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


class RecordingObserver(_UnobservingObserver):
    """Keeps a copy of every tensor it sees, in `tensor_val`; for debugging.

    Args:
        dtype: quantized dtype.
    """

    def __init__(self, dtype: torch.dtype = QUINT8) -> None:
        super().__init__(dtype=dtype)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Keep a detached copy of `x`; returns `x` itself."""
        # Detached: a record must not keep the graphs of all steps alive.
        self.tensor_val.append(x.detach().clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """The recorded tensors, oldest first."""
        return self.tensor_val


class NoopObserver(_UnobservingObserver):
    """Observes nothing; carries a dtype to the module that will be quantized.

    Args:
        dtype: quantized dtype.
        custom_op_name: name of the op this is for, where that op needs no observer.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype=dtype)
        self.custom_op = custom_op_name


class ReuseInputObserver(_UnobservingObserver):
    """Marks an op whose output is to share its input's observer, as a reshape's; FX only."""

    def __init__(self) -> None:
        super().__init__(QUINT8)


# --------------------------------------------------------------------------------------------
# Which modules observe, and their state


def _is_activation_post_process(module: object) -> bool:
    """Whether `module` is an observer or fake-quantizer, fastquant's or torch.ao's."""
    return isinstance(
        module, (ActivationPostProcess, AffineQuantizedObserverBase)
    ) or _is_observer_script_module(module, "quantization.observer")


def _names_observer(mod: nn.Module) -> str:
    """What is in the name of every entry of `mod.state_dict()` that belongs to an observer."""
    scripted = isinstance(mod, torch.jit.ScriptModule)
    return "observer" if scripted else "activation_post_process"


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Any]:
    """The entries of `mod.state_dict()` that belong to observers.

    The names are those of `mod`'s modules, so :func:`load_observer_state_dict` loads them into
    another model that was prepared alike, and :func:`fastquant.merge` combines those of several.
    """
    part = _names_observer(mod)
    state = mod.state_dict()
    result = OrderedDict((key, value) for key, value in state.items() if part in key)
    result._metadata = state._metadata  # type: ignore[attr-defined]
    return result


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, Any]) -> None:
    """Load what :func:`get_observer_state_dict` returned into the observers of `mod`.

    Observers of which `obs_dict` has no entry keep their state; `obs_dict` is not changed.

    Raises:
        RuntimeError: some entries of an observer are missing, do not fit it, or are no
            statistics (NaN, a minimum above its maximum, negative counts); each is named, and
            every observer keeps the state it had.
    """
    state = dict(obs_dict)
    metadata = getattr(obs_dict, "_metadata", {})
    missing: list[str] = []
    errors: list[str] = []
    loaded: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for name, module in mod.named_modules():
        prefix = f"{name}." if name else ""
        # A weight's fake-quantize has no entry of its own, for its name is no observer's: there its
        # observer has.
        entries = (key.removeprefix(prefix) for key in state if key.startswith(prefix))
        if not (_is_activation_post_process(module) and any("." not in entry for entry in entries)):
            continue
        loaded.append((module, {k: v.clone() for k, v in module.state_dict().items()}))
        scripted = _is_per_channel_script_obs_instance(module)
        load = module._load_from_state_dict_script if scripted else module._load_from_state_dict
        cast(Any, load)(state, prefix, metadata.get(name, {}), True, missing, [], errors)
    part = _names_observer(mod)
    missing = sorted({key for key in missing if part in key})
    if missing:
        errors.append(f"missing keys: {', '.join(missing)}")
    if errors:
        for module, before in reversed(loaded):
            _put_back(module, before)
        raise RuntimeError("cannot load the state of the observers: " + "; ".join(errors))


def _put_back(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give a module back the state it had, sizes included."""
    for key, value in before.items():
        path, _, name = key.rpartition(".")
        resized(module.get_submodule(path), name, value.shape).copy_(value)


# --------------------------------------------------------------------------------------------
# Defaults

default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
"""Activations in 7 bits, min/max; for static quantization while debugging."""

default_placeholder_observer = PlaceholderObserver
"""For quantization to float16."""

default_debug_observer = RecordingObserver
"""Keeps every tensor."""

default_weight_observer = MinMaxObserver.with_args(dtype=QINT8, qscheme=torch.per_tensor_symmetric)
"""Weights in int8, symmetric."""

weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(
    dtype=QINT8,
    qscheme=torch.per_tensor_symmetric,
    quant_min=-127,
    quant_max=127,
    eps=2**-12,
)
"""Weights in int8, symmetric, without -128."""

default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
"""Activations in 7 bits, by histogram; for static quantization."""

default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=QINT8, qscheme=torch.per_channel_symmetric
)
"""Weights in int8, symmetric, per channel."""

per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(
    dtype=QINT8,
    qscheme=torch.per_channel_symmetric,
    quant_min=-127,
    quant_max=127,
    eps=2**-12,
)
"""Weights in int8, symmetric, per channel, without -128."""

default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=QUINT8, quant_min=0, quant_max=255, is_dynamic=True
)
"""Activations of dynamically quantized modules."""

default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=QUINT8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
"""Embedding weights in 8 bits, with float zero points."""

default_float_qparams_observer_4bit = PerChannelMinMaxObserver.with_args(
    dtype=QUINT4X2, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
"""Embedding weights in 4 bits, with float zero points."""

default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128, dtype=QUINT8, quant_min=0, quant_max=255
)
"""Outputs known to lie in [-1, 1], as of tanh."""

default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0, dtype=QUINT8, quant_min=0, quant_max=255
)
"""Outputs known to lie in [0, 1], as of a sigmoid."""

# Older names of the same.
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer

default_reuse_input_observer = ReuseInputObserver
"""For ops like reshape, whose output has the input's values."""
