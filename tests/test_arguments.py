"""Arguments that several functions and constructors take are judged alike by all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastquant as fq
from fastquant import functional as F

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Entry = Callable[[Any], Any]

PER_TENSOR = (fq.MinMaxObserver, fq.MovingAverageMinMaxObserver, fq.HistogramObserver)
PER_CHANNEL = (fq.PerChannelMinMaxObserver, fq.MovingAveragePerChannelMinMaxObserver)
AVERAGES = (fq.MovingAverageMinMaxObserver, fq.MovingAveragePerChannelMinMaxObserver)
FAKE_QUANTIZERS = (
    fq.FakeQuantize,
    fq.FusedMovingAvgObsFakeQuantize,
    fq.LearnableFakeQuantize,
)


def constructors(name: str, classes: Any = (*PER_TENSOR, *PER_CHANNEL)) -> dict[str, Entry]:
    """Observers that take the argument, and fake-quantizers that hand it on."""
    found: dict[str, Entry] = {}
    for cls in classes:
        found[cls.__name__] = lambda value, cls=cls: cls(**{name: value})
        for make in FAKE_QUANTIZERS:
            if cls in AVERAGES or make is not fq.FusedMovingAvgObsFakeQuantize:
                found[f"{make.__name__} {cls.__name__}"] = lambda value, cls=cls, make=make: make(
                    cls, **{name: value}
                )
    return found


def of_ranges(name: str) -> Entry:
    return lambda value: F.choose_qparams(X.min(), X.max(), **{name: value})


def of_tensors(name: str) -> dict[str, Entry]:
    return {
        "observe": lambda value: F.observe_minmax_(X, *F.minmax_state(), **{name: value}),
        "fused": lambda value: F.fused_observe_fake_quantize(
            X, *F.fake_quantize_state(), **{name: value}
        ),
    }


def merged(name: str) -> Entry:
    """Merging of states that claim to be of an observer with this argument."""

    def merge(value: Any) -> Any:
        states = []
        for _ in range(2):
            observer = fq.MovingAverageMinMaxObserver()
            observer(X)
            states.append(fq.observer.get_observer_state_dict(holder(observer)))
            recipe = states[-1]._metadata["activation_post_process"]["fastquant"]  # type: ignore[attr-defined]
            if name in ("quant_min", "quant_max"):
                recipe["scheme"][:2] = (-128, 127)
                recipe["scheme"][name == "quant_max"] = value
            else:
                recipe[name] = value
        return fq.merge(*states)

    return merge


def holder(observer: torch.nn.Module) -> torch.nn.Module:
    module = torch.nn.Module()
    module.activation_post_process = observer
    return module


def of_range_end(name: str) -> dict[str, Entry]:
    """`quant_min` or `quant_max`, the other end being as far away as int8's."""

    def ends(value: Any) -> dict[str, Any]:
        return {"quant_min": -128, "quant_max": 127, name: value}

    def one(cls: Any, value: Any) -> Any:
        return cls(dtype=torch.qint8, **ends(value))

    found: dict[str, Entry] = {
        cls.__name__: lambda value, cls=cls: one(cls, value) for cls in (*PER_TENSOR, *PER_CHANNEL)
    }
    for make in FAKE_QUANTIZERS:
        found[make.__name__] = lambda value, make=make: make(
            fq.MovingAverageMinMaxObserver, dtype=torch.qint8, **ends(value)
        )
    found["choose_qparams"] = lambda value: F.choose_qparams(
        X.min(), X.max(), dtype=torch.qint8, **ends(value)
    )
    found["fused"] = lambda value: F.fused_observe_fake_quantize(
        X, *F.fake_quantize_state(), dtype=torch.qint8, **ends(value)
    )
    found["merge"] = merged(name)
    return found


class Argument(NamedTuple):
    entries: Mapping[str, Entry]
    bad: Mapping[str, tuple[Any, type[Exception]]]
    good: tuple[Any, ...]


ARGUMENTS: dict[str, Argument] = {
    "eps": Argument(
        {
            **constructors("eps"),
            "choose_qparams": of_ranges("eps"),
            "fused": of_tensors("eps")["fused"],
        },
        {
            "negative": (-1e-9, ValueError),
            "nan": (math.nan, ValueError),
            "inf": (math.inf, ValueError),
            "text": ("1e-3", TypeError),
            "none": (None, TypeError),
        },
        (0, 0.0, 1e-12, 2**-12, 1),
    ),
    "averaging_constant": Argument(
        {
            **constructors("averaging_constant", AVERAGES),
            **of_tensors("averaging_constant"),
            "merge": merged("averaging_constant"),
        },
        {
            "negative": (-0.1, ValueError),
            "beyond 1": (1.5, ValueError),
            "nan": (math.nan, ValueError),
            "text": ("0.01", TypeError),
        },
        (0, 0.01, 1, 1.0),
    ),
    "nonfinite": Argument(
        {
            **constructors("nonfinite"),
            **of_tensors("nonfinite"),
            "histogram": lambda v: F.observe_histogram_(X, *F.histogram_state(8), nonfinite=v),
            "merge": merged("nonfinite"),
        },
        {
            "unknown": ("drop", ValueError),
            "none": (None, ValueError),
            "number": (0, ValueError),
            "unhashable": ([], ValueError),
        },
        ("ignore", "raise", "propagate"),
    ),
    "qscheme": Argument(
        {
            **constructors("qscheme", (*PER_TENSOR, *PER_CHANNEL)),
            "choose_qparams": of_ranges("qscheme"),
            "state": lambda v: F.fake_quantize_state(qscheme=v),
            "fused": of_tensors("qscheme")["fused"],
        },
        {"text": ("affine", ValueError), "none": (None, ValueError), "number": (1, ValueError)},
        (),
    ),
    "dtype": Argument(
        {
            **constructors("dtype"),
            "choose_qparams": of_ranges("dtype"),
            "fused": of_tensors("dtype")["fused"],
        },
        {"float": (torch.float32, ValueError), "text": ("int8", ValueError)},
        (torch.quint8, torch.uint8),
    ),
    "quant_min": Argument(
        of_range_end("quant_min"),
        {
            "above the other": (128, ValueError),
            "the other": (127, ValueError),
            "fraction": (-0.5, TypeError),
            "text": ("-8", TypeError),
            "without 0": (1, ValueError),
        },
        (-128, -8, 0, -127.0),
    ),
    "quant_max": Argument(
        of_range_end("quant_max"),
        {
            "below the other": (-129, ValueError),
            "fraction": (100.5, TypeError),
            "without 0": (-1, ValueError),
        },
        (127, 7, 100.0),
    ),
    "ch_axis": Argument(
        {
            **constructors("ch_axis", PER_CHANNEL),
            "observe": lambda v: F.observe_minmax_(X, *F.minmax_state(3), ch_axis=v),
            "fake_quantize": lambda v: F.fake_quantize(
                X, torch.ones(3), torch.zeros(3).int(), quant_min=0, quant_max=9, ch_axis=v
            ),
            "learnable": lambda v: F.learnable_fake_quantize(
                X, torch.ones(3), torch.zeros(3), quant_min=0, quant_max=9, ch_axis=v
            ),
        },
        {"fraction": (0.5, TypeError), "text": ("0", TypeError)},
        (0, -2, 0.0),
    ),
    "bins": Argument(
        {
            "HistogramObserver": lambda v: fq.HistogramObserver(bins=v),
            "FakeQuantize": lambda v: fq.FakeQuantize(fq.HistogramObserver, bins=v),
            "state": F.histogram_state,
        },
        {
            "zero": (0, ValueError),
            "negative": (-1, ValueError),
            "fraction": (1.5, TypeError),
            "text": ("8", TypeError),
            "none": (None, TypeError),
        },
        (1, 8),
    ),
    "channels": Argument(
        {
            "minmax_state": F.minmax_state,
            "fake_quantize_state": F.fake_quantize_state,
        },
        {"zero": (0, ValueError), "text": ("3", TypeError), "fraction": (1.5, TypeError)},
        (1, 3, None),
    ),
    "upsample_rate": Argument(
        {
            "histogram": lambda v: F.observe_histogram_(X, *F.histogram_state(8), upsample_rate=v),
            "merge": merged("upsample_rate"),
        },
        {"zero": (0, ValueError), "text": ("3", TypeError), "fraction": (1.5, TypeError)},
        (1, 16),
    ),
}
BAD = [
    pytest.param(name, *case, id=f"{name}-{label}")
    for name, argument in ARGUMENTS.items()
    for label, case in argument.bad.items()
]


@pytest.mark.parametrize(("name", "value", "kind"), BAD)
def test_a_bad_argument_is_refused_everywhere_and_in_the_same_words(
    name: str, value: Any, kind: type[Exception]
) -> None:
    said = {}
    for entry, call in ARGUMENTS[name].entries.items():
        with pytest.raises(ValueError if entry == "merge" else kind) as caught:
            call(value)
        said[entry] = str(caught.value).removeprefix(
            "cannot merge: what the state of activation_post_process says of its observer is "
            "wrong: "
        )
    assert len(set(said.values())) == 1, said
    (text,) = set(said.values())
    assert name in text or "the quantization range must include 0" in text
    assert str(value) in text


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_good_argument_is_taken_everywhere(name: str) -> None:
    for value in ARGUMENTS[name].good:
        for call in ARGUMENTS[name].entries.values():
            call(value)


@pytest.mark.parametrize("cls", [fq.MinMaxObserver, fq.PerChannelMinMaxObserver])
def test_what_means_a_number_is_kept_as_torch_ao_takes_it(cls: Any) -> None:
    """quant_min=-127.0 is -127: torch.ao takes both."""
    floats = cls(dtype=torch.qint8, quant_min=-127.0, quant_max=127.0)
    integers = cls(dtype=torch.qint8, quant_min=-127, quant_max=127)
    for observer in (floats, integers):
        observer(X)
    for got, expected in zip(floats.calculate_qparams(), integers.calculate_qparams(), strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype


def test_an_eps_of_zero_makes_no_scale_of_zero_anywhere() -> None:
    zero = torch.zeros(3)
    observer = fq.MinMaxObserver(eps=0)
    observer(zero)
    scales: list[Tensor] = [observer.calculate_qparams()[0], F.choose_qparams(zero, zero, eps=0)[0]]
    state = F.fake_quantize_state()
    F.fused_observe_fake_quantize(zero, *state, eps=0)
    scales.append(state.scale)
    scales.append(
        fq.utils.determine_qparams(
            *(zero[0], zero[0], 0, 255, torch.quint8, torch.tensor([0.0]), False)
        )[0]
    )
    for scale in scales:
        assert (scale == 1).all()
