"""What users write around a library of eager quantization: observers, factories, pieces of models.

Each observer here is a class to be made of one library's: `user_class` makes it. Hooks and
overrides note in `LOG` that they ran.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastquant.nn.quantized as nnq

# ------------------------------------------------------------------------- what users' code reports

# What hooks and overrides of the running step have noted.
LOG: list[str] = []


def note(event: str) -> None:
    LOG.append(event)


def class_name(module: object) -> str:
    """The class's name: users' classes without their world's, torch.ao.nn's with their module."""
    cls = type(module)
    name = cls.__name__.removesuffix("_ao").removesuffix("_fast").removesuffix("_patched")
    return f"{cls.__module__}.{name}" if cls.__module__.startswith("torch.ao.nn") else name


class Hook:
    """A forward hook or pre-hook that notes its call and, where asked, changes what passes."""

    def __init__(self, label: str, factor: float | None = None) -> None:
        self.label = label
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, *output: Any) -> Any:
        note(f"{self.label} of {class_name(module)}")
        if self.factor is None:
            return None
        return output[0] * self.factor if output else (inputs[0] * self.factor, *inputs[1:])


WITHOUT_KEYWORDS = "a hook that was registered with_kwargs was called without them"


class HookWithKeywords(Hook):
    """The same, registered with `with_kwargs`."""

    def __call__(self, module: nn.Module, inputs: Any, *rest: Any) -> Any:
        if not (rest and isinstance(rest[0], dict)):
            raise TypeError(WITHOUT_KEYWORDS)
        keywords, *output = rest
        note(f"{sorted(keywords)}")
        changed = super().__call__(module, inputs, *output)
        return changed if output or changed is None else (changed, keywords)


# --------------------------------------------------------------------------------- users' observers


def _power_of_two(scale: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


def _own_forward(base: Any) -> Any:
    class OwnForward(base):
        def forward(self, x: Tensor) -> Tensor:
            note("forward")
            return super().forward(x * 2)

    return OwnForward


def _clipped(base: Any) -> Any:
    class Clipped(base):
        def forward(self, x_orig: Tensor) -> Tensor:
            note("forward")
            super().forward(x_orig.clamp(-1, 1))
            return x_orig

    return Clipped


def _from_scratch(base: Any) -> Any:
    class FromScratch(base):
        def forward(self, x_orig: Tensor) -> Tensor:
            note("forward")
            low, high = torch.aminmax(x_orig.detach())
            self.min_val.copy_(torch.min(low, self.min_val))
            self.max_val.copy_(torch.max(high, self.max_val))
            return x_orig

    return FromScratch


def _power_of_two_scale(base: Any) -> Any:
    class PowerOfTwo(base):
        def calculate_qparams(self) -> Any:
            note("calculate_qparams")
            scale, *rest = super().calculate_qparams()
            return (_power_of_two(scale), *rest)

    return PowerOfTwo


def _inner_qparams(base: Any) -> Any:
    class InnerQParams(base):
        def _calculate_qparams(self, min_val: Tensor, max_val: Tensor) -> Any:
            note("_calculate_qparams")
            return super()._calculate_qparams(min_val * 2, max_val)

    return InnerQParams


def _annealed(base: Any) -> Any:
    class Annealed(base):
        @property
        def averaging_constant(self) -> float:
            return self._constant * 2

        @averaging_constant.setter
        def averaging_constant(self, value: float) -> None:
            self._constant = value

    return Annealed


def _own_axis(base: Any) -> Any:
    class OwnAxis(base):
        ch_axis = property(lambda self: 1, lambda self, value: None)

    return OwnAxis


def _own_range(base: Any) -> Any:
    class OwnRange(base):
        quant_min = property(lambda self: self.low + 1, lambda self, v: setattr(self, "low", v))

    return OwnRange


def _own_buffer(base: Any) -> Any:
    class OwnBuffer(base):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    return OwnBuffer


def _called(base: Any) -> Any:
    class Called(base):
        def __call__(self, *args: Any) -> Any:
            note("__call__")
            return super().__call__(*args)

    return Called


def _own_loading(base: Any) -> Any:
    class OwnLoading(base):
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            note("_load_from_state_dict")
            state.pop(prefix + "more", None)
            super()._load_from_state_dict(state, prefix, *args)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "more"] = torch.ones(1)

    return OwnLoading


def _extra_state(base: Any) -> Any:
    class ExtraState(base):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

        def get_extra_state(self) -> int:
            return self.calls

        def set_extra_state(self, state: int) -> None:
            note("set_extra_state")
            self.calls = state

    return ExtraState


def _fourth_power(base: Any) -> Any:
    class FourthPower(base):
        def _get_norm(self, begin: Tensor, end: Tensor, density: Tensor) -> Tensor:
            if "_get_norm" not in LOG:  # how often depends on the search
                note("_get_norm")
            return density * (end**4 + begin**4)

    return FourthPower


def _coarse_search(base: Any) -> Any:
    class CoarseSearch(base):
        def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
            note("_non_linear_param_search")
            ends = range(0, self.bins // 2, max(1, self.bins // 8))
            errors = [self._compute_quantization_error(i, self.bins - 1 - i) for i in ends]
            width = (self.max_val - self.min_val) / self.bins
            i = ends[errors.index(min(errors))]
            return self.min_val + width * i, self.max_val - width * i

    return CoarseSearch


def _own_combination(base: Any) -> Any:
    class OwnCombination(base):
        def _combine_histograms(self, old: Tensor, *rest: Any) -> Tensor:
            note("_combine_histograms")
            return super()._combine_histograms(old * 0.5, *rest)

    return OwnCombination


def _own_upscaling(base: Any) -> Any:
    class OwnUpscaling(base):
        def _upscale_histogram(self, histogram: Tensor, *rest: Any) -> Tensor:
            note("_upscale_histogram")
            return super()._upscale_histogram(histogram, *rest).flip(0)

    return OwnUpscaling


_ANY = {
    "own_forward": _own_forward,
    "clipped": _clipped,
    "power_of_two": _power_of_two_scale,
    "inner_qparams": _inner_qparams,
    "own_range": _own_range,
    "own_buffer": _own_buffer,
    "called": _called,
    "own_loading": _own_loading,
    "extra_state": _extra_state,
}
_HISTOGRAM = {
    "fourth_power": _fourth_power,
    "coarse_search": _coarse_search,
    "own_combination": _own_combination,
    "own_upscaling": _own_upscaling,
}
OVERRIDES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "MinMaxObserver": {**_ANY, "from_scratch": _from_scratch},
    "MovingAverageMinMaxObserver": {**_ANY, "annealed": _annealed, "from_scratch": _from_scratch},
    "PerChannelMinMaxObserver": {**_ANY, "own_axis": _own_axis},
    "MovingAveragePerChannelMinMaxObserver": {
        **_ANY,
        "annealed": _annealed,
        "own_axis": _own_axis,
    },
    "HistogramObserver": {**_ANY, **_HISTOGRAM},
    "FakeQuantize": {
        name: _ANY[name]
        for name in (
            "own_forward",
            "power_of_two",
            "own_buffer",
            "called",
            "own_loading",
            "extra_state",
        )
    },
    "FusedMovingAvgObsFakeQuantize": {name: _ANY[name] for name in ("own_forward", "own_buffer")},
}


def _peak(ns: Any) -> Any:
    class Peak(nn.Module):
        """An observer that derives from nn.Module alone."""

        dtype = torch.quint8

        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.peak = 0.0

        def forward(self, x: Tensor) -> Tensor:
            note("Peak")
            self.peak = max(self.peak, x.detach().abs().max().item())
            return x

        def calculate_qparams(self) -> Any:
            return torch.tensor([max(self.peak, 0.1) / 127]), torch.tensor([128])

    return Peak


def _running_mean(ns: Any) -> Any:
    class RunningMean(ns.ObserverBase):
        """An observer that derives from ObserverBase alone."""

        def __init__(self, dtype: torch.dtype = torch.quint8, **kwargs: Any) -> None:
            super().__init__(dtype=dtype, is_dynamic=False)
            self.qscheme = torch.per_tensor_affine
            self.quant_min, self.quant_max = 0, 255
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            note("RunningMean")
            self.mean += x.detach().abs().mean()
            return x

        def calculate_qparams(self, **kwargs: Any) -> Any:
            return self.mean.clamp(min=0.1) / 64, torch.tensor([100], dtype=torch.int32)

    return RunningMean


def _three_sigma(ns: Any) -> Any:
    class ThreeSigma(ns.observer.UniformQuantizationObserverBase):
        """An observer with the library's arithmetic and statistics of its own."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.register_buffer("min_val", torch.tensor(0.0))
            self.register_buffer("max_val", torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            note("ThreeSigma")
            if not x.numel():
                return x
            sigma = x.detach().square().mean().sqrt()
            self.min_val.copy_(-3 * sigma)
            self.max_val.copy_(3 * sigma)
            return x

        def calculate_qparams(self) -> Any:
            return self._calculate_qparams(self.min_val, self.max_val)

    return ThreeSigma


def _own_fake_quantize(ns: Any) -> Any:
    class OwnFakeQuantize(ns.FakeQuantizeBase):
        """A fake-quantizer with a forward of its own."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.dtype, self.qscheme = torch.quint8, torch.per_tensor_affine
            self.register_buffer("scale", torch.tensor([0.05]))
            self.register_buffer("zero_point", torch.tensor([128], dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            note("OwnFakeQuantize")
            if not self.fake_quant_enabled:
                return x
            rounded = (x / self.scale).round().clamp(-128, 127) * self.scale
            return x + (rounded - x).detach()

        def calculate_qparams(self) -> Any:
            return self.scale, self.zero_point

    return OwnFakeQuantize


WRITTEN: dict[str, Callable[[Any], Any]] = {
    "Peak": _peak,
    "RunningMean": _running_mean,
    "ThreeSigma": _three_sigma,
    "OwnFakeQuantize": _own_fake_quantize,
}

# ------------------------------------------------------------------------------- factories, configs


@dataclass(frozen=True)
class Observer:
    """How an observer or fake-quantizer of a config is made.

    `form` is the kind of callable that the config holds; `inner` makes a fake-quantizer's observer.
    """

    base: str = "MinMaxObserver"
    override: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    form: str = "with_args"
    inner: Observer | None = None


@dataclass(frozen=True)
class Config:
    """A qconfig: one of the library's by name, or an activation's and a weight's observer."""

    name: str | None = "default_qconfig"
    activation: Observer | None = None
    weight: Observer | None = None


@dataclass
class DataclassFactory:
    cls: Any
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.cls(**self.kwargs)


class SlotsFactory:
    __slots__ = ("cls", "kwargs")

    def __init__(self, cls: Any, kwargs: dict[str, Any]) -> None:
        self.cls, self.kwargs = cls, kwargs

    def __call__(self) -> Any:
        return self.cls(**self.kwargs)

    def make(self) -> Any:
        return self.cls(**self.kwargs)


class EqualFactory(SlotsFactory):
    """Defines equality and therefore no hash."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualFactory) and self.cls is other.cls

    __hash__ = None  # type: ignore[assignment]


def _twelfth() -> float:
    return 2.0**-12


FORMS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "with_args": lambda cls, kwargs: (
        cls.with_args(**kwargs) if hasattr(cls, "with_args") else functools.partial(cls, **kwargs)
    ),
    "class": lambda cls, kwargs: functools.partial(cls, **kwargs) if kwargs else cls,
    "partial": lambda cls, kwargs: functools.partial(cls, **kwargs),
    "lambda": lambda cls, kwargs: lambda: cls(**kwargs),
    "dataclass": DataclassFactory,
    "slots": SlotsFactory,
    "equal": EqualFactory,
    "method": lambda cls, kwargs: SlotsFactory(cls, kwargs).make,
    "twice": lambda cls, kwargs: (
        cls.with_args(**kwargs).with_args(**kwargs)
        if hasattr(cls, "with_args")
        else functools.partial(functools.partial(cls, **kwargs), **kwargs)
    ),
    "callable_args": lambda cls, kwargs: (
        cls.with_args(**kwargs).with_callable_args(eps=_twelfth)
        if hasattr(cls, "with_callable_args")
        else functools.partial(cls, **kwargs)
    ),
}


_CLASSES: dict[tuple[str, str, str], type] = {}


def _home_of_learnable(ns: Any) -> Any:
    """torch.ao has the class in a module of its own, ours is with the other fake-quantizers."""
    return ns.fake_quantize if ns.__name__ == "fastquant" else ns._learnable_fake_quantize


def user_class(world: str, ns: Any, base: str, override: str | None) -> Any:
    """The library's class, or a user's made of it, which pickle finds in this module."""
    if base == "_LearnableFakeQuantize":
        return getattr(_home_of_learnable(ns), base)
    if base not in WRITTEN and override is None:
        return getattr(ns, base)
    key = (world, base, override or "")
    if key not in _CLASSES:
        if base in WRITTEN:
            made = WRITTEN[base](ns)
        else:
            made = OVERRIDES[base][override or ""](getattr(ns, base))
        made.__name__ = made.__qualname__ = f"{made.__name__}{base}_{world}"
        made.__module__ = __name__
        globals()[made.__name__] = made
        _CLASSES[key] = made
    return _CLASSES[key]


def factory(world: str, ns: Any, observer: Observer | None) -> Any:
    """What a qconfig holds for this observer."""
    if observer is None:
        return None
    kwargs = dict(observer.options)
    if observer.inner is not None:
        inner = observer.inner
        kwargs["observer"] = user_class(world, ns, inner.base, inner.override)
        kwargs.update(inner.options)
    return FORMS[observer.form](user_class(world, ns, observer.base, observer.override), kwargs)


# --------------------------------------------------------------------------------- pieces of models


class Rectify(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class OwnLinear(nn.Linear):
    """A subclass, which the libraries leave floating."""


class Doubled(nn.Module):
    """A parametrization: the weight is twice what is stored."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Residual(nn.Module):
    def __init__(self, body: nn.Module, op: str) -> None:
        super().__init__()
        self.body = body
        self.op = op
        self.functional = nnq.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        if self.op in ("add_scalar", "mul_scalar"):
            return getattr(self.functional, self.op)(self.body(x), 0.5)
        if self.op == "cat":
            return self.functional.cat([x, self.body(x)], 1)[:, : x.shape[1]]
        return getattr(self.functional, self.op)(x, self.body(x))


class Island(nn.Module):
    """A floating layer between quantized ones."""

    def __init__(self, ns: Any, body: nn.Module) -> None:
        super().__init__()
        self.dequant = ns.DeQuantStub()
        self.body = body
        self.body.qconfig = None
        self.quant = ns.QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.quant(self.body(self.dequant(x)))


class Block(nn.Module):
    """A user's module, called with a keyword."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.act = nn.ReLU()

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        x = self.act(self.body(x))
        return self.body(x) if twice else x


class LSTM(nn.Module):
    """Over the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1))[0].squeeze(1)


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        result = self.cell(x)
        return result[0] if isinstance(result, tuple) else result


class Scaled(nn.Module):
    """A user's float module, which a custom config maps to the two classes below."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2


class ObservedScaled(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2

    @classmethod
    def from_float(cls, module: Any) -> Any:
        note("from_float")
        observed = cls(module.linear)
        observed.qconfig = module.qconfig
        return observed


class QuantizedScaled(nn.Module):
    def __init__(self, linear: nn.Module, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.scale, self.zero_point = float(scale), int(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.dequantize()) * 2
        return torch.quantize_per_tensor(y, self.scale, self.zero_point, torch.quint8)

    @classmethod
    def from_observed(cls, observed: Any) -> Any:
        note("from_observed")
        return cls(observed.linear, *observed.activation_post_process.calculate_qparams())


CUSTOM = {
    "float_to_observed_custom_module_class": {Scaled: ObservedScaled},
    "observed_to_quantized_custom_module_class": {ObservedScaled: QuantizedScaled},
}


def _norm(norm: Any) -> Any:
    """A batch norm with something in it."""
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return norm


def _parametrized(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def _conv(**kwargs: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


_COMMON: dict[str, Callable[[Any], nn.Module]] = {
    "relu": lambda ns: nn.ReLU(),
    "sigmoid": lambda ns: nn.Sigmoid(),
    "tanh": lambda ns: nn.Tanh(),
    "hardswish": lambda ns: nn.Hardswish(),
    "leaky": lambda ns: nn.LeakyReLU(0.1),
    "elu": lambda ns: nn.ELU(),
    "relu6": lambda ns: nn.ReLU6(),
    "dropout": lambda ns: nn.Dropout(0.3),
    "identity": lambda ns: nn.Identity(),
    "scripted": lambda ns: torch.jit.script(Rectify()),
    "traced": lambda ns: torch.jit.trace(Rectify(), torch.randn(2, 4)),
}
# By how many dimensions a model's tensors have: pieces that keep their shape.
PIECES: dict[str, dict[str, Callable[[Any], nn.Module]]] = {
    "rows": {
        "linear": lambda ns: nn.Linear(6, 6),
        "linear_relu": lambda ns: nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        "linear_bn": lambda ns: nn.Sequential(nn.Linear(6, 6), _norm(nn.BatchNorm1d(6))),
        "no_bias": lambda ns: nn.Linear(6, 6, bias=False),
        "own_linear": lambda ns: OwnLinear(6, 6),
        "layer_norm": lambda ns: nn.LayerNorm(6),
        "parametrized": lambda ns: _parametrized(nn.Linear(6, 6)),
        "weight_norm": lambda ns: parametrizations.weight_norm(nn.Linear(6, 6)),
        "spectral_norm": lambda ns: parametrizations.spectral_norm(nn.Linear(6, 6)),
        "old_weight_norm": lambda ns: nn.utils.weight_norm(nn.Linear(6, 6)),
        "add": lambda ns: Residual(nn.Linear(6, 6), "add"),
        "add_relu": lambda ns: Residual(nn.Linear(6, 6), "add_relu"),
        "mul": lambda ns: Residual(nn.Linear(6, 6), "mul"),
        "cat": lambda ns: Residual(nn.Linear(6, 6), "cat"),
        "add_scalar": lambda ns: Residual(nn.Linear(6, 6), "add_scalar"),
        "mul_scalar": lambda ns: Residual(nn.ReLU(), "mul_scalar"),
        "block": lambda ns: Block(nn.Linear(6, 6)),
        "nested": lambda ns: nn.Sequential(
            nn.ModuleDict({"a": nn.Linear(6, 6)})["a"], nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        ),
        "island": lambda ns: Island(ns, nn.Linear(6, 6)),
        "lstm": lambda ns: LSTM(),
        "scripted_linear": lambda ns: torch.jit.script(nn.Linear(6, 6)),
        "scaled": lambda ns: Scaled(),
        **_COMMON,
    },
    "image": {
        "conv": lambda ns: _conv(),
        "conv_relu": lambda ns: nn.Sequential(_conv(), nn.ReLU()),
        "conv_bn": lambda ns: nn.Sequential(_conv(), _norm(nn.BatchNorm2d(4))),
        "conv_bn_relu": lambda ns: nn.Sequential(
            _conv(bias=False), _norm(nn.BatchNorm2d(4)), nn.ReLU()
        ),
        "bn": lambda ns: _norm(nn.BatchNorm2d(4)),
        "bn_relu": lambda ns: nn.Sequential(_norm(nn.BatchNorm2d(4)), nn.ReLU()),
        "depthwise": lambda ns: _conv(groups=4),
        "transposed": lambda ns: nn.ConvTranspose2d(4, 4, 3, padding=1),
        "reflect": lambda ns: _conv(padding_mode="reflect"),
        "group_norm": lambda ns: nn.GroupNorm(2, 4),
        "instance_norm": lambda ns: nn.InstanceNorm2d(4, affine=True),
        "pool": lambda ns: nn.MaxPool2d(3, stride=1, padding=1),
        "parametrized": lambda ns: _parametrized(_conv()),
        "weight_norm": lambda ns: parametrizations.weight_norm(_conv()),
        "add": lambda ns: Residual(_conv(), "add"),
        "add_relu": lambda ns: Residual(nn.Sequential(_conv(), nn.ReLU()), "add_relu"),
        "cat": lambda ns: Residual(_conv(), "cat"),
        "block": lambda ns: Block(_conv()),
        "island": lambda ns: Island(ns, _conv()),
        **_COMMON,
    },
    "dynamic": {
        "linear": lambda ns: nn.Linear(6, 6),
        "linear_relu": lambda ns: nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        "lstm": lambda ns: LSTM(),
        "gru": lambda ns: Cell(nn.GRU(6, 6, num_layers=2)),
        "lstm_cell": lambda ns: Cell(nn.LSTMCell(6, 6)),
        "gru_cell": lambda ns: Cell(nn.GRUCell(6, 6)),
        "rnn_cell": lambda ns: Cell(nn.RNNCell(6, 6)),
        "parametrized": lambda ns: _parametrized(nn.Linear(6, 6)),
        "own_linear": lambda ns: OwnLinear(6, 6),
        "block": lambda ns: Block(nn.Linear(6, 6)),
        "scripted": lambda ns: torch.jit.script(Rectify()),
        "relu": lambda ns: nn.ReLU(),
    },
}
PIECES["tokens"] = {
    "linear": PIECES["dynamic"]["linear"],
    "linear_relu": PIECES["dynamic"]["linear_relu"],
    "relu": _COMMON["relu"],
    "scripted": _COMMON["scripted"],
    "block": PIECES["dynamic"]["block"],
}
FUSABLE = {
    "linear_relu": ("0", "1"),
    "linear_bn": ("0", "1"),
    "conv_relu": ("0", "1"),
    "conv_bn": ("0", "1"),
    "conv_bn_relu": ("0", "1", "2"),
    "bn_relu": ("0", "1"),
}


@dataclass(frozen=True)
class Piece:
    """A part of a model and what its author did to it before it was prepared."""

    kind: str = "linear"
    done: tuple[str, ...] = ()


def _forward_noted(self: Any, *args: Any) -> Any:
    note(f"{class_name(self)}.forward")
    return type(self).forward(self, *args)


def do_to_piece(module: nn.Module, deed: str, config: Any) -> None:
    if deed == "skip":
        module.qconfig = None
    elif deed == "other_config":
        module.qconfig = config
    elif deed == "hook":
        module.register_forward_hook(Hook("hook"))
    elif deed == "hook_that_changes":
        module.register_forward_hook(Hook("changing hook", 1.5))
    elif deed == "pre_hook":
        module.register_forward_pre_hook(Hook("pre-hook"))
    elif deed == "first_hook":
        module.register_forward_hook(Hook("first hook", 0.5), prepend=True)
    elif deed == "first_pre_hook":
        module.register_forward_pre_hook(Hook("first pre-hook"), prepend=True)
    elif deed == "hook_with_keywords":
        module.register_forward_hook(HookWithKeywords("keyword hook", 1.5), with_kwargs=True)
    elif deed == "pre_hook_with_keywords":
        pre_hook = HookWithKeywords("keyword pre-hook", 1.5)
        module.register_forward_pre_hook(pre_hook, with_kwargs=True)
    elif deed == "always_called_hook":
        module.register_forward_hook(Hook("always called hook"), always_call=True)
    elif deed == "zero_gamma":
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.weight.data[1] = 0
    elif deed == "hook_on_first":
        next(module.children(), module).register_forward_pre_hook(Hook("inner pre-hook"))
    elif deed == "hook_on_last":
        (list(module.children()) or [module])[-1].register_forward_hook(Hook("inner hook"))
    elif deed == "method":
        module.forward = types.MethodType(_forward_noted, module)
    elif deed == "frozen":
        module.requires_grad_(False)
    elif deed == "training":
        module.train(not module.training)
    else:
        raise AssertionError(deed)


def do_to_block(block: Any, deed: str) -> None:
    """Something that users do to a QAT block of a convolution or linear layer with batch norm."""
    if deed == "norm's hook":
        block.bn.register_forward_hook(Hook("norm's hook"))
    elif deed == "norm's hook that changes":
        block.bn.register_forward_hook(Hook("norm's changing hook", 0.5))
    elif deed == "norm's pre_hook":
        block.bn.register_forward_pre_hook(Hook("norm's pre-hook"))
    elif deed == "norm's backward hook":
        block.bn.register_full_backward_hook(Hook("norm's backward hook"))
    elif deed == "norm's method":
        block.bn.forward = types.MethodType(_forward_noted, block.bn)
    elif deed == "mean of all batches":
        block.bn.momentum = None
    elif deed == "not tracked":
        block.bn.track_running_stats = False
    elif deed == "backward hook":
        block.register_full_backward_hook(Hook("block's backward hook"))
    elif deed == "slow path":
        block._enable_slow_path_for_better_numerical_stability = True
    else:
        raise AssertionError(deed)


def do_to_observer(ns: Any, observer: Any, what: str) -> None:
    """Something that users do to an observer or fake-quantizer that is in a model."""
    if what == "forward":
        observer.forward = types.MethodType(_forward_noted, observer)
    elif what == "forward_ignores":

        def ignores(x: Tensor) -> Tensor:
            note("ignored")
            return x

        observer.forward = ignores
    elif what == "calculate_qparams":
        original = observer.calculate_qparams

        def rounded(*args: Any) -> Any:
            note("rounded")
            scale, *rest = original(*args)
            return (_power_of_two(scale), *rest)

        observer.calculate_qparams = rounded
    elif what == "hook":
        observer.register_forward_hook(Hook("observer's hook"))
    elif what == "hook_that_changes":
        observer.register_forward_hook(Hook("observer's changing hook", 0.5))
    elif what == "pre_hook":
        observer.register_forward_pre_hook(Hook("observer's pre-hook"))
    elif what == "backward_hook":
        observer.register_full_backward_hook(Hook("observer's backward hook"))
    elif what == "saving_hook":
        observer.register_state_dict_post_hook(Hook("saving hook"))
    elif what == "loading_hook":
        observer.register_load_state_dict_pre_hook(Hook("loading pre-hook"))
        observer.register_load_state_dict_post_hook(Hook("loading hook"))
    elif what == "quant_max":
        observer.quant_max = observer.quant_max // 2
    elif what == "averaging_constant":
        observer.averaging_constant = 0.5
    elif what == "reset":
        observer.reset_min_max_vals()
    elif what == "subclass":
        observer.__class__ = type(
            type(observer).__name__, (type(observer),), {"forward": _super_forward}
        )
    elif what == "swap":
        if hasattr(observer, "activation_post_process"):
            observer.activation_post_process = ns.MinMaxObserver()
    else:
        # A buffer in another form.
        form, name = what.split()
        value = getattr(observer, name).clone()
        if form == "parameter":
            setattr(observer, name, nn.Parameter(value, requires_grad=False))
        elif form == "plain":
            delattr(observer, name)
            setattr(observer, name, value)
        elif form == "parametrized":
            parametrize.register_parametrization(observer, name, nn.Identity())
        else:
            raise AssertionError(what)


def _super_forward(self: Any, x: Tensor) -> Tensor:
    note("subclass")
    return type(self).__mro__[1].forward(self, x)
