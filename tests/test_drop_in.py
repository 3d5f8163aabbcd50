"""Whole programs, generated, under torch.ao.quantization and with the import swapped.

Each example is a program that composes what users compose: pieces of models, configs of any kind of
factory, observers of their own, hooks, replaced methods, saving, loading, converting. It runs under
torch.ao, and under fastquant or its patch, step by step; all that a user can see must be the same,
but for what `DELIBERATE` names, which docs/differences.md explains.

`FASTQUANT_DROP_IN_EXAMPLES=2000 pytest tests/test_drop_in.py` searches longer, and elsewhere each
time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastquant import QuantizationError
from programs import DTYPES, NONFINITE, PATCHABLE, Program, Seen, Step, World
from strategies import RANGES
from users_code import FORMS, FUSABLE, OVERRIDES, PIECES, WITHOUT_KEYWORDS, Config, Observer, Piece

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------- deliberate differences


@dataclass(frozen=True)
class Difference:
    """Where two worlds differ: at which step, in what, at which path of it, and how."""

    step: Step
    what: str  # raised, output, log, modules, tensors or state
    path: str
    theirs: Any
    ours: Any


Excuse = Callable[[Program, Difference], bool]


def _parts(program: Program) -> set[str]:
    return {piece.kind for piece in program.pieces}


def _configs(program: Program) -> list[Config]:
    """Those that are in use."""
    other = any("other_config" in piece.done for piece in program.pieces + program.before)
    return [program.config, program.other_config] if other else [program.config]


def _observers(program: Program) -> list[Observer]:
    found = []
    for config in _configs(program):
        found += [o for o in (config.activation, config.weight) if o is not None]
    return found + [o.inner for o in found if o.inner is not None]


def _trains_batch_norm(program: Program) -> bool:
    return program.mode == "qat" and bool(
        _parts(program) & {"conv_bn", "conv_bn_relu", "linear_bn"}
    )


def _learns(program: Program) -> bool:
    return any(o.base == "_LearnableFakeQuantize" for o in _observers(program))


def _uses_fused_op(program: Program) -> bool:
    return any(o.base == "FusedMovingAvgObsFakeQuantize" for o in _observers(program)) or any(
        config.name in ("qat x86", "qat qnnpack") for config in _configs(program)
    )


def _torch_cannot_pickle(program: Program, found: Difference) -> bool:
    return (
        found.what == "raised"
        and found.step.do == "pickle"
        and "Can't pickle local object" in str(found.theirs)
    )


def _thinned(found: Difference) -> bool:
    """Whether our log lacks repetitions only."""
    rest = iter(found.theirs)
    return set(found.ours) == set(found.theirs) and all(event in rest for event in found.ours)


def _torch_cannot_trace(program: Program, found: Difference) -> bool:
    return (
        found.what == "raised"
        and found.step.do in ("trace", "symbolic_trace")
        and (found.theirs is not None or "cannot record" in str(found.ours))
    )


def _backward_hooks_and_traces(program: Program, found: Difference) -> bool:
    return found.step.do == "trace" and "backward hooks" in str(found.ours)


def _fused_hooks_not_doubled(program: Program, found: Difference) -> bool:
    """torch.ao leaves the first part's pre-hooks and the last one's hooks on copies of them."""
    if not program.fuse or not any(
        piece.kind in FUSABLE and {"hook_on_first", "hook_on_last"} & set(piece.done)
        for piece in program.pieces
    ):
        return False
    if found.what == "modules" and found.path.endswith(("hooks", "pre_hooks")):
        return set(found.theirs) - set(found.ours) <= {"inner hook", "inner pre-hook"}
    return found.what == "log" and _without_inner(found.theirs) == _without_inner(found.ours)


def _without_inner(log: tuple[str, ...]) -> list[str]:
    return [event for event in log if not event.startswith("inner")]


def _hooks_on_lstm_stay(program: Program, found: Difference) -> bool:
    """torch.ao drops the hooks of modules that it replaces by observed ones of several parts."""
    if not any(
        piece.kind == "lstm" and {"hook_on_first", "hook_on_last"} & set(piece.done)
        for piece in program.pieces + program.before
    ):
        return False
    if found.what == "modules" and found.path.endswith(("hooks", "pre_hooks")):
        return set(found.ours) - set(found.theirs) <= {"inner hook", "inner pre-hook"}
    rest = iter(found.ours)
    return (
        found.what == "log"
        and all(event in rest for event in found.theirs)
        and _without_inner(found.ours) == _without_inner(found.theirs)
    )


def _bad_input_in_words(program: Program, found: Difference) -> bool:
    words = ("x must", "must have one element for each of the")
    refused = isinstance(found.ours, (TypeError, ValueError)) and any(
        text in str(found.ours) for text in words
    )
    unprepared = "have a qconfig but no observer" in str(found.ours)
    if unprepared and program.prepare == "whole":
        return True  # torch.ao gives convolutions inside of it a scale of 1
    return found.what == "raised" and found.theirs is not None and (refused or unprepared)


def _loaded_whole(program: Program, found: Difference) -> bool:
    """Of an observer whose state lacks a part, the other part is not loaded, nor its qparams."""
    names = ("min_val", "max_val", "scale", "zero_point", "histogram", "enabled", "eps")
    return (
        found.step.do == "reload"
        and "partly" in found.step.what
        and found.what == "state"
        and found.path.endswith(names)
    )


def _channels_known_at_once(program: Program, found: Difference) -> bool:
    """A weight's per-channel statistics have their size before they have seen anything."""
    if program.mode != "qat":
        return False
    if found.what == "raised":
        sizes = ("broadcast shape", "length of scales", "not consistent with input tensor")
        return found.ours is None and any(words in str(found.theirs) for words in sizes)
    theirs, ours = found.theirs, found.ours
    if found.step.do == "repr":
        return True
    return (
        isinstance(theirs, Tensor)
        and isinstance(ours, Tensor)
        and theirs.numel() <= 1
        and ours.dim() == 1
        and any(
            bool((theirs == value).all() and (ours == value).all())
            for value in (math.inf, -math.inf, 1, 0)
        )
    )


def _takes_any_dtype(program: Program, found: Difference) -> bool:
    words = ("expected scalar type Float", "Scale must be Float or BFloat16")
    return (
        program.mode == "qat"
        and found.what == "raised"
        and found.ours is None
        and any(text in str(found.theirs) for text in words)
    )


def _wrong_shapes_refused(program: Program, found: Difference) -> bool:
    """A user put a per-tensor observer in the place of one per channel, or the reverse."""
    return (
        any(step.what == "swap" for step in program.steps)
        and found.what == "raised"
        and found.theirs is None
        and "does not fit: size mismatch" in str(found.ours)
    )


def _dtype_kept(program: Program, found: Difference) -> bool:
    """torch.ao's histograms take over the loaded tensors of their range, in whatever dtype."""
    theirs, ours = found.theirs, found.ours
    return (
        any(step.do == "narrow" for step in program.steps)
        and found.path.endswith(("min_val", "max_val"))
        and isinstance(theirs, Tensor)
        and isinstance(ours, Tensor)
        and theirs.dtype != ours.dtype
        and torch.equal(theirs.to(ours.dtype), ours)
    )


def _unobserved_channels(program: Program, found: Difference) -> bool:
    """torch.ao takes the infinite ends of channels that were never observed for a wrong range."""
    return (
        found.what == "raised"
        and found.ours is None
        and isinstance(found.theirs, AssertionError)
        and "min tensor([inf" in str(found.theirs)
    )


def _saved_once(program: Program, found: Difference) -> bool:
    return found.what == "log" and found.step.do == "observer_state" and _thinned(found)


def _scale_of_one_element(program: Program, found: Difference) -> bool:
    return (
        found.step.do == "convert" and found.ours is None and isinstance(found.theirs, IndexError)
    )


def _histograms_reset(program: Program, found: Difference) -> bool:
    return (found.step.do, found.step.what, found.ours) == ("tweak", "reset", None) and isinstance(
        found.theirs, NotImplementedError
    )


def _layer_named(program: Program, found: Difference) -> bool:
    """Where torch.ao raises too, whatever it raises."""
    return found.theirs is not None and isinstance(found.ours, QuantizationError)


def _fused_asks_its_observer(program: Program, found: Difference) -> bool:
    if found.what != "log" or not _uses_fused_op(program):
        return False
    rest = iter(found.ours)
    more = [event for event in found.ours if event not in found.theirs or "MovingAverage" in event]
    return all(event in rest for event in found.theirs) and all(
        "MovingAverage" in event or "calculate_qparams" in event for event in more
    )


def _observers_hook_left(program: Program, found: Difference) -> bool:
    return (
        found.step.do == "convert"
        and found.path.endswith("pre_hooks")
        and found.theirs == [*found.ours, "_observer_forward_pre_hook"]
    )


def _hooked_once(program: Program, found: Difference) -> bool:
    if program.shared != "attribute":
        return False
    if found.what == "modules" and found.path.endswith(("hooks", "pre_hooks")):
        hook = "_observer_forward_hook"
        once = list(dict.fromkeys(found.theirs))
        return found.ours in (once, [name for name in once if name != hook])
    if found.what == "log":
        return _thinned(found)
    return found.what == "tensors"  # one module names its tensors once


# What docs/differences.md says, as far as programs reach it: (who is excused, why).
# Numbers of the first kind are compared closely instead of bit for bit.
CLOSE_NUMBERS: tuple[tuple[Callable[[Program], bool], str], ...] = (
    (_trains_batch_norm, "QAT undoes batch norm's scaling on the weight: the same up to rounding"),
    (_uses_fused_op, "the fused fake-quantize uses the qparams that calculate_qparams returns"),
    (_learns, "learnable fake-quantize has one zero point forward and backward"),
)
# After these differences a program goes on.
DELIBERATE: tuple[tuple[Excuse, str], ...] = (
    (
        _torch_cannot_pickle,
        "prepared models can be pickled; torch.ao's configs hold local functions",
    ),
    (_torch_cannot_trace, "torch.fx.symbolic_trace takes fake-quantizers whole"),
    (_backward_hooks_and_traces, "torch.jit.trace refuses a module that has a backward hook"),
    (_fused_hooks_not_doubled, "fusing moves hooks and does not double them"),
    (_hooks_on_lstm_stay, "a module that is swapped keeps its hooks, also an LSTM"),
    (_bad_input_in_words, "bad input, and a model that was not prepared, raise an error in words"),
    (_channels_known_at_once, "prepare_qat gives a weight's per-channel statistics their size"),
    (_takes_any_dtype, "fake-quantizers take fp16, bf16 and fp64"),
    (_wrong_shapes_refused, "states of wrong shapes are refused"),
    (_unobserved_channels, "a channel that was never observed gets scale 1 and zero point 0"),
    (_saved_once, "get_observer_state_dict asks each observer once for its state"),
    (
        _scale_of_one_element,
        "the fused fake-quantize takes a first scale of one element, observing",
    ),
    (_histograms_reset, "reset_min_max_vals works for histograms"),
    (_layer_named, "convert names the layer that cannot be converted, in an error of its own"),
    (_fused_asks_its_observer, "the fused fake-quantize's observer is called where that is seen"),
    (_observers_hook_left, "convert leaves no observer's pre-hook without its observer"),
    (_hooked_once, "a module of two parents is hooked once and stays one module"),
)


def _narrow_tensors_counted_in_fp32(program: Program, found: Difference) -> bool:
    narrow = any(step.what in ("half", "bfloat16") for step in program.steps)
    return narrow and found.what in ("output", "state") and found.path.endswith("histogram")


def _keyword_hooks_stay(program: Program, found: Difference) -> bool:
    """torch.ao registers hooks on the new module without `with_kwargs`."""
    return found.what == "raised" and WITHOUT_KEYWORDS in str(found.theirs)


def _fake_quantizer_stays_whole(program: Program, found: Difference) -> bool:
    """torch.ao takes the observer out of the fake-quantizer of a training module that it leaves."""
    if program.mode != "qat" or found.step.do != "convert":
        return False
    part = "weight_fake_quant.activation_post_process"
    kept = [key for key in found.ours if part not in key] if "keys" in found.path else None
    return kept == found.theirs


# After these it does not: the models' states differ.
ENDING: tuple[tuple[Excuse, str], ...] = (
    (_narrow_tensors_counted_in_fp32, "histograms of fp16 and bf16 tensors are counted in fp32"),
    (_dtype_kept, "loading keeps the dtype of a histogram's range"),
    (_keyword_hooks_stay, "hooks keep their options when a module is swapped"),
    (_fake_quantizer_stays_whole, "a training module that stays keeps its fake-quantizer whole"),
    (_loaded_whole, "of a state that is not whole nothing is loaded"),
)


def _saved_eps_is_loaded(program: Program, step: Step) -> bool:
    other_eps = any(o.form == "callable_args" for o in _observers(program))
    rounded = any(step.do in ("double", "narrow") for step in program.steps)
    return step.do == "observer_state" and (other_eps or rounded)


def _runs(program: Program, step: Step) -> list[str]:
    """Which tensors a step runs through a model that observes."""
    if step.do == "quantize":
        return [inner.what for inner in program.steps if inner.do == "run"]
    return [step.what] if step.do == "run" and step in program.steps else []


def _nonfinite_is_left_out(program: Program, step: Step) -> bool:
    return any(what in NONFINITE for what in _runs(program, step))


def _narrow_tensors_in_histograms(program: Program, step: Step) -> bool:
    histograms = any("static" in str(config.name) for config in _configs(program)) or any(
        o.base == "HistogramObserver" for o in _observers(program)
    )
    narrow = any(what in ("half", "bfloat16") for what in _runs(program, step))
    return step.do == "quantize" and narrow and histograms


def _statistics_stay_wide(program: Program, step: Step) -> bool:
    return step.do == "narrow" and step.what != "double"


def _zero_gamma_is_finite(program: Program, step: Step) -> bool:
    done = {deed for piece in program.pieces for deed in piece.done}
    trains = bool(_runs(program, step)) or step.do in ("average", "convert")
    return trains and _trains_batch_norm(program) and "zero_gamma" in done


def _fused_calls_changed_observer(program: Program, step: Step) -> bool:
    calling = ("run", "convert", "quantize", "average", "trace", "symbolic_trace")
    return step.do in calling and any(
        o.base == "FusedMovingAvgObsFakeQuantize" and o.inner is not None and o.inner.override
        for o in _observers(program)
    )


def _fused_reads_no_scale(program: Program, step: Step) -> bool:
    """Without data, torch.ao's fused op reads the scales of channels beyond its only one."""
    steps = program.steps[: program.steps.index(step)] if step in program.steps else ()
    return (
        _uses_fused_op(program)
        and (step.do, step.what) == ("toggle", "disable_observer")
        and not any(earlier.do in ("run", "average") for earlier in steps)
    )


def _pre_hook_has_no_observer(program: Program, step: Step) -> bool:
    """torch.ao leaves a memoryless observer's pre-hook on the module that it has converted."""
    memoryless = any(
        o.base == "PlaceholderObserver" or ("averaging_constant", 1.0) in o.options
        for o in _observers(program)
    )
    return step.do == "convert" and step.what == "keep_qconfig" and memoryless


def _shared_name_is_swapped(program: Program, step: Step) -> bool:
    swapping = {"static": "convert", "qat": "prepare", "dynamic": "quantize_dynamic"}
    return program.shared == "name" and step.do in (swapping[program.mode], "quantize")


def _shared_is_observed_once(program: Program, step: Step) -> bool:
    return (
        program.shared == "attribute"
        and step.do in ("prepare", "quantize")
        and not all(config.name in ("default_qconfig",) for config in _configs(program))
    )


# After these steps, a program's models differ.
WORLDS_PART: tuple[tuple[Callable[[Program, Step], bool], str], ...] = (
    (_shared_name_is_swapped, "a module that a parent holds under two names is swapped under both"),
    (_saved_eps_is_loaded, "load_observer_state_dict loads eps; torch.ao's resets it"),
    (_pre_hook_has_no_observer, "convert leaves no observer's pre-hook without its observer"),
    (_shared_is_observed_once, "a module of two parents is observed once"),
    (_nonfinite_is_left_out, "NaN and infinities are left out of statistics, and NaN stays NaN"),
    (_narrow_tensors_in_histograms, "histograms of fp16 and bf16 tensors are counted in fp32"),
    (_statistics_stay_wide, "statistics and scales stay in fp32"),
    (_zero_gamma_is_finite, "a batch norm weight of zero gives finite results"),
    (_fused_reads_no_scale, "a channel that was never observed gets scale 1 and zero point 0"),
    (_fused_calls_changed_observer, "the fused fake-quantize calls an observer that was changed"),
)

# ------------------------------------------------------------------------------------- comparison


def compatible(ours: Exception, theirs: Exception) -> bool:
    """Whether an `except` clause written for torch.ao's exception catches ours."""
    return isinstance(ours, type(theirs))


def same_number(ours: Any, theirs: Any, closely: bool) -> bool:
    if isinstance(theirs, Tensor):
        if not (
            isinstance(ours, Tensor) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ):
            return False
        if not closely:
            return torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7))
        if theirs.dtype == torch.bool or not theirs.numel():
            return torch.equal(ours, theirs)
        a, b = ours.double(), theirs.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        return bool((a - b).abs().max() <= 0.15 * b.abs().max() + 1e-3)
    if isinstance(theirs, float) and isinstance(ours, float) and closely:
        return abs(ours - theirs) <= 0.15 * abs(theirs)
    return type(ours) is type(theirs) and bool(ours == theirs or (closely and type(ours) is int))


def compare(ours: Any, theirs: Any, path: str, closely: bool) -> Iterator[tuple[str, Any, Any]]:
    """The paths at which two values differ, with both."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if list(ours) != list(theirs):
            yield f"{path} keys", list(theirs), list(ours)
        for key in theirs:
            if key in ours:
                yield from compare(
                    ours[key], theirs[key], f"{path}.{key}" if path else key, closely
                )
    elif isinstance(theirs, tuple) and isinstance(ours, tuple) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from compare(a, b, f"{path}[{i}]", closely)
    elif not same_number(ours, theirs, closely):
        yield path, theirs, ours


def _without_reads(program: Program, log: list[str]) -> tuple[str, ...]:
    """A log without global hooks' notes that a parametrized buffer was read, as often as it was."""
    if not any(step.what.startswith("parametrized") for step in program.steps):
        return tuple(log)
    return tuple(e for e in log if not e.endswith(("of ParametrizationList", "of Identity")))


def differences(program: Program, step: Step, ours: Seen, theirs: Seen) -> Iterator[Difference]:
    closely = any(excused(program) for excused, _ in CLOSE_NUMBERS)
    if (ours.raised is None) != (theirs.raised is None) or (
        ours.raised is not None
        and theirs.raised is not None
        and not compatible(ours.raised, theirs.raised)
    ):
        yield Difference(step, "raised", "", theirs.raised, ours.raised)
        return
    if theirs.raised is not None:
        return
    for what in ("log", "modules", "tensors", "output", "state"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if what == "log":
            a, b = _without_reads(program, a), _without_reads(program, b)
            if a != b:
                yield Difference(step, what, "", b, a)
            continue
        if what == "tensors":
            a = {k: v for k, v in a.items() if not k.endswith("nonfinite_count")}
        for path, their_part, our_part in compare(a, b, "", closely):
            if closely and (
                step.do in ("repr", "qparams")
                or path.startswith("[1]")
                or path.endswith(("scale", "zero_point", "histogram"))
            ):
                continue  # gradients are zero or not, and zero points far apart, by the last bit
            yield Difference(step, what, path, their_part, our_part)


# A program goes on after these have raised.
HARMLESS = ("adopt", "copy", "pickle", "qparams", "repr", "symbolic_trace", "trace")


def run(program: Program) -> list[Difference]:
    """Run a program in two worlds, step by step, up to the first step at which they differ."""
    theirs = World("ao", program)
    ours = World("patched" if program.patched else "fast", program)
    for step in program.trace():
        theirs.before, ours.before = theirs.model, ours.model
        seen = [world.do(step, other) for world, other in ((theirs, ours), (ours, theirs))]
        if any(part(program, step) for part, _ in WORLDS_PART):
            if seen[1].raised is not None and seen[0].raised is None:
                return [Difference(step, "raised", "", None, seen[1].raised)]
            break
        found = list(differences(program, step, seen[1], seen[0]))
        faults = [
            difference
            for difference in found
            if not any(excused(program, difference) for excused, _ in (*DELIBERATE, *ENDING))
        ]
        if faults:
            return faults
        if any(excused(program, difference) for difference in found for excused, _ in ENDING):
            break
        if step.do not in HARMLESS and any(each.raised is not None for each in seen):
            break
    return []


# ------------------------------------------------------------------------------------- programs


def sometimes(strategy: st.SearchStrategy[Any], default: Any = None) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(default), st.just(default), strategy)


seeds = st.integers(0, 99)
forms = st.sampled_from(tuple(FORMS))
CHANNELS = ("PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver")


@st.composite
def options(draw: st.DrawFn, base: str) -> tuple[tuple[str, Any], ...]:
    """Arguments of one of the library's observers."""
    symmetric = draw(st.booleans())
    granularity = "per_channel" if base in CHANNELS else "per_tensor"
    chosen: dict[str, Any] = {
        "qscheme": getattr(torch, f"{granularity}_{'symmetric' if symmetric else 'affine'}")
    }
    if base.startswith("Moving"):
        chosen["averaging_constant"] = draw(st.sampled_from((0.01, 0.3, 1.0)))
    if base == "HistogramObserver":
        chosen["bins"] = draw(st.sampled_from((16, 64, 256)))
    return tuple(chosen.items())


def ranges(signed: bool) -> st.SearchStrategy[tuple[tuple[str, Any], ...]]:
    """Dtype and quantized range."""
    if signed:
        extra = st.sampled_from(((), (("quant_min", -127), ("quant_max", 127))))
        dtype = torch.qint8
    else:
        extra = st.sampled_from(
            ((), (("reduce_range", True),), (("quant_min", 0), ("quant_max", 127)))
        )
        dtype = torch.quint8
    return extra.map(lambda more: (("dtype", dtype), *more))


@st.composite
def observers(draw: st.DrawFn, weight: bool) -> Observer:
    """Of an activation or a weight; a user's in every kind of way."""
    bases = ["MinMaxObserver", "MovingAverageMinMaxObserver", "HistogramObserver"]
    if weight:
        bases = ["MinMaxObserver", *CHANNELS]
    else:
        bases += ["Peak", "RunningMean", "ThreeSigma", "PlaceholderObserver", "NoopObserver"]
    base = draw(st.sampled_from(bases))
    if base in OVERRIDES:
        override = draw(sometimes(st.sampled_from(tuple(OVERRIDES[base]))))
        chosen = draw(options(base)) + draw(ranges(weight))
    else:
        override, chosen = None, ()
    return Observer(base, override, chosen, draw(forms))


@st.composite
def fake_quantizers(draw: st.DrawFn, weight: bool) -> Observer:
    inner_bases = ["MovingAverageMinMaxObserver", "MinMaxObserver"]
    if weight:
        inner_bases += CHANNELS
    else:
        inner_bases += ["HistogramObserver"]
    base = draw(
        st.sampled_from(
            ("FakeQuantize", "FakeQuantize", "FusedMovingAvgObsFakeQuantize")
            if weight
            else (
                "FakeQuantize",
                "FakeQuantize",
                "FusedMovingAvgObsFakeQuantize",
                "OwnFakeQuantize",
            )
        )
    )
    if base == "OwnFakeQuantize":
        return Observer(base, None, (), draw(forms))
    if draw(sometimes(sometimes(st.just(True)))):
        base = "_LearnableFakeQuantize"
    inner = draw(st.sampled_from(inner_bases))
    if base == "FusedMovingAvgObsFakeQuantize":
        inner = "MovingAveragePerChannelMinMaxObserver" if inner in CHANNELS else inner_bases[0]
    override = draw(sometimes(st.sampled_from(tuple(OVERRIDES.get(base, (None,))))))
    inner_override = draw(sometimes(st.sampled_from(tuple(OVERRIDES[inner]))))
    chosen = draw(options(inner))
    if base == "_LearnableFakeQuantize" and inner in CHANNELS:
        chosen = (*chosen, ("channel_len", draw(st.sampled_from((4, 6)))))
    limits = (-128, 127) if weight else (0, 255)
    dtype = torch.qint8 if weight else torch.quint8
    return Observer(
        base,
        override,
        (("quant_min", limits[0]), ("quant_max", limits[1]), ("dtype", dtype)),
        draw(forms.filter(lambda form: form != "callable_args")),
        Observer(inner, inner_override, chosen),
    )


NAMED = {
    "static": ("default_qconfig", "static x86", "static qnnpack", "default_per_channel_qconfig"),
    "qat": ("qat x86 0", "qat qnnpack 0", "qat x86", "default_qat_qconfig"),
    "dynamic": (
        "default_dynamic_qconfig",
        "default_per_channel_qconfig",
        "default_float_qparams_qconfig",
    ),
}


@st.composite
def configs(draw: st.DrawFn, mode: str) -> Config:
    if mode == "dynamic" or draw(st.booleans()):
        return Config(draw(st.sampled_from(NAMED[mode])))
    make = fake_quantizers if mode == "qat" else observers
    weight = make(weight=True)
    if mode == "static":
        weight = st.one_of(weight, weight, weight, st.none())
    return Config(None, draw(make(weight=False)), draw(weight))


DEEDS = (
    "hook",
    "pre_hook",
    "skip",
    "method",
    "other_config",
    "hook_that_changes",
    "hook_on_first",
    "hook_on_last",
    "frozen",
    "first_hook",
    "first_pre_hook",
    "hook_with_keywords",
    "pre_hook_with_keywords",
    "always_called_hook",
    "zero_gamma",
)
# What is done to modules of a prepared model.
CHANGES = (*(deed for deed in DEEDS if deed not in ("other_config", "zero_gamma")), "method")


@st.composite
def pieces(draw: st.DrawFn, family: str, mode: str) -> Piece:
    kinds = list(PIECES[family])
    if mode == "qat":
        # torch's group norm crashes in the backward pass of channels-last tensors.
        kinds = [kind for kind in kinds if kind not in ("bn_relu", "group_norm")]
    kind = draw(st.sampled_from(kinds))
    done = draw(st.lists(st.sampled_from(DEEDS), max_size=2, unique=True))
    if kind in ("scripted", "traced", "scripted_linear"):
        done = [deed for deed in done if deed in ("skip", "other_config")]
    return Piece(kind, tuple(done))


BLOCK_CHANGES = (
    "norm's hook",
    "norm's hook that changes",
    "norm's pre_hook",
    "norm's backward hook",
    "norm's method",
    "mean of all batches",
    "not tracked",
    "backward hook",
    "slow path",
)
TWEAKS = (
    "hook",
    "pre_hook",
    "forward",
    "calculate_qparams",
    "forward_ignores",
    "hook_that_changes",
    "quant_max",
    "averaging_constant",
    "reset",
    "subclass",
    "swap",
    "backward_hook",
    "saving_hook",
    "loading_hook",
    "parameter min_val",
    "parameter scale",
    "parameter zero_point",
    "parameter eps",
    "plain max_val",
    "plain scale",
    "parametrized scale",
    "parametrized min_val",
)
TOGGLES = ("disable_observer", "enable_observer", "disable_fake_quant", "enable_fake_quant")
LEARNING = ("enable_param_learning", "enable_static_estimate", "enable_static_observation")
MODES = ("eval", "train", "freeze_bn", "update_bn")


RELOADS = (
    "",
    "other",
    "same other",
    "lax",
    "lax other",
    "lax partly same",
    "partly same",
    "lax partly",
    "assign",
    "assign other",
    "emptied",
    "assign meta",
    "emptied meta",
)


@st.composite
def steps(draw: st.DrawFn, mode: str) -> Step:
    do = draw(
        st.sampled_from(
            (
                *("run", "run", "run", "tweak", "tweak", "qparams", "reload", "pickle", "copy"),
                *("toggle", "observer_state", "adopt", "double", "repr", "trace"),
                *("symbolic_trace", "average", "change", "change", "narrow", "learn"),
                *(("change_block", "change_block") if mode == "qat" else ()),
            )
        )
    )
    what, target = "", 0
    if do == "run":
        # Sums of gradients go by layout: their last bits may differ.
        layouts = () if mode == "qat" else ("channels_last",)
        what = draw(st.sampled_from((*RANGES, "empty", "one", *layouts, *NONFINITE, *DTYPES)))
    elif do == "tweak":
        what = draw(st.sampled_from(TWEAKS))
        target = draw(st.integers(0, 5))
    elif do == "toggle":
        what = draw(st.sampled_from((*TOGGLES, *MODES) if mode == "qat" else TOGGLES))
    elif do == "reload":
        what = draw(st.sampled_from(RELOADS))
        target = draw(st.integers(0, 1))
    elif do == "observer_state":
        what = draw(st.sampled_from(("", "other")))
    elif do == "change":
        what = draw(st.sampled_from(CHANGES))
        target = draw(st.integers(0, 5))
    elif do == "change_block":
        what = draw(st.sampled_from(BLOCK_CHANGES))
        target = draw(st.integers(0, 2))
    elif do == "learn":
        what = draw(st.sampled_from(LEARNING))
    elif do == "narrow":
        what = draw(st.sampled_from(tuple(DTYPES)))
    elif do == "average":
        target = draw(st.integers(0, 1))
    return Step(do, what, target, draw(seeds) if do == "run" else 0)


PREPARATIONS = (
    "one_call",
    "propagated",
    "wrapped_leaves",
    "allow_list",
    "whole",
    "no_custom",
    "custom",
)
CONVERSIONS = {
    "static": ("convert", "inplace", "keep_qconfig", "reference", "mapping"),
    "qat": ("convert", "inplace", "keep_qconfig", "precomputed"),
    "dynamic": (
        *("convert", "inplace", "float16", "linear", "names", "dict", "nothing"),
        *("quint8", "quint4x2", "qint32"),
    ),
}
AFTERWARDS = (
    Step("run"),
    Step("run", "large", seed=3),
    Step("pickle"),
    Step("copy"),
    Step("reload", "same other"),
    Step("reload", "other"),
    Step("run", "nan", seed=4),
    Step("run", "infinite", seed=5),
    Step("run", "half", seed=6),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    mode = draw(st.sampled_from(("static", "static", "qat", "qat", "dynamic")))
    families = ("dynamic", "dynamic", "tokens") if mode == "dynamic" else ("rows", "image")
    family = draw(st.sampled_from(families))
    wrapper = draw(sometimes(st.just(True), False))
    then = draw(st.lists(st.sampled_from(AFTERWARDS), max_size=2))
    program = Program(
        mode=mode,
        family=family,
        pieces=tuple(draw(st.lists(pieces(family, mode), min_size=1, max_size=3))),
        before=()
        if wrapper
        else tuple(draw(sometimes(st.lists(pieces(family, mode), max_size=1), []))),
        container="sequential"
        if wrapper
        else draw(st.sampled_from(("sequential", "list", "dict"))),
        wrapper=wrapper,
        shared=None if wrapper else draw(sometimes(st.sampled_from(("attribute", "name")))),
        fuse=draw(st.sampled_from((True, True, False))),
        config=draw(configs(mode)),
        other_config=draw(configs(mode)),
        inplace=draw(st.booleans()),
        prepare=draw(sometimes(st.sampled_from(PREPARATIONS), "plain")),
        patched_class=draw(sometimes(sometimes(st.sampled_from(PATCHABLE)))),
        global_hooks=draw(sometimes(st.just(True), False)),
        steps=() if mode == "dynamic" else (*draw(st.lists(steps(mode), max_size=5)),),
        convert=draw(st.sampled_from(CONVERSIONS[mode])),
        then=(Step("run", seed=9), *then, *([Step("run", seed=8)] if then else [])),
        patched=draw(st.booleans()),
    )
    if any(excused(program) for excused, _ in CLOSE_NUMBERS):
        # A batch that hardly varies, or training that diverges, makes rounding errors large.
        steady = [replace(step, what="") if step.do == "run" else step for step in program.steps]
        program = replace(program, steps=tuple(steady))
    return program


EXAMPLES = int(os.environ.get("FASTQUANT_DROP_IN_EXAMPLES", "50"))


def report(found: list[Difference]) -> str:
    return "\n".join(
        f"{d.step}: {d.what} {d.path}\n  torch.ao: {d.theirs!r}\n  ours: {d.ours!r}"
        for d in found[:5]
    )


_PER_CHANNEL = Observer("PerChannelMinMaxObserver", "own_forward", (("dtype", torch.qint8),))
_AVERAGE = Observer("MovingAverageMinMaxObserver", "annealed", (("averaging_constant", 0.25),))
_RUNS = (Step("run"), Step("run", seed=1))
_PLAIN_WEIGHT = Observer("MinMaxObserver", None, (("dtype", torch.qint8),))


def _static(activation: Observer, weight: Observer | None = _PLAIN_WEIGHT) -> Config:
    return Config(None, activation, weight)


# Small programs that each told the libraries apart once.
ONCE_TOLD_APART = (
    *(Program(config=_static(Observer(form=form))) for form in ("dataclass", "equal", "slots")),
    Program(config=_static(Observer(), None)),
    Program(mode="qat", config=_static(Observer("OwnFakeQuantize", form="class"))),
    Program(pieces=(Piece("scripted_linear"),)),
    Program(pieces=(Piece(), Piece("linear", ("skip",))), config=_static(Observer("Peak"))),
    Program(config=_static(Observer(), _PER_CHANNEL)),
    Program(config=_static(_AVERAGE), steps=_RUNS),
    Program(config=_static(Observer("HistogramObserver", "fourth_power"))),
    Program(config=_static(Observer("HistogramObserver", "coarse_search"))),
    Program(mode="qat", config=Config("qat x86 0"), global_hooks=True),
    Program(
        config=Config("static qnnpack"),
        patched_class=("UniformQuantizationObserverBase", "_calculate_qparams"),
    ),
    *(
        Program(
            mode="qat", config=Config("qat x86 0"), steps=(*_RUNS, Step("tweak", what, 1), *_RUNS)
        )
        for what in ("calculate_qparams", "forward", "parameter min_val", "parametrized min_val")
    ),
    *(
        Program(config=Config("static x86"), steps=(Step("tweak", what), *_RUNS))
        for what in ("parameter eps", "plain max_val", "parametrized min_val")
    ),
    *(
        Program(mode="qat", config=Config("qat x86 0"), steps=(Step("tweak", what), *_RUNS))
        for what in ("parameter scale", "plain scale")
    ),
    Program(config=Config("static x86"), steps=(*_RUNS, Step("adopt"), *_RUNS), patched=True),
    Program(pieces=(Piece("linear_relu"),), config=Config("static x86"), steps=_RUNS),
    Program(steps=(Step("run"), Step("reload", "lax partly same"))),
    Program(
        mode="qat",
        pieces=(Piece("sigmoid"),),
        config=Config("qat x86"),
        steps=(Step("repr"),),
    ),
    Program(mode="qat", config=Config("qat x86 0"), steps=(Step("run"), Step("observer_state"))),
    Program(mode="qat", config=Config("qat x86"), steps=(Step("symbolic_trace"),)),
    Program(
        mode="qat",
        pieces=(Piece("sigmoid"),),
        config=Config("qat x86 0"),
        patched_class=("FakeQuantize", "forward"),
    ),
)


@pytest.mark.parametrize("change", BLOCK_CHANGES)
@pytest.mark.parametrize("kind", ["conv_bn", "conv_bn_relu", "linear_bn"])
def test_changes_of_blocks_that_train_batch_norm_are_heard(kind: str, change: str) -> None:
    family = "rows" if kind == "linear_bn" else "image"
    steps = (*_RUNS, Step("change_block", change), *_RUNS)
    config = Config("qat x86 0")
    found = run(Program("qat", family, pieces=(Piece(kind),), config=config, steps=steps))
    assert not found, report(found)


@pytest.mark.parametrize("index", range(len(ONCE_TOLD_APART)))
def test_programs_that_once_told_the_libraries_apart_no_longer_do(index: int) -> None:
    found = run(ONCE_TOLD_APART[index])
    assert not found, report(found)


@settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 50)
@given(program=programs())
def test_a_program_cannot_tell_the_libraries_apart(program: Program) -> None:
    found = run(program)
    assert not found, report(found)
