"""What users replace of observers and fake-quantizers runs, as it does in torch.ao."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import parametrize

import fastquant as fq
from oracle import assert_same, assert_same_state, quiet

OBSERVERS = {
    "MinMaxObserver": {},
    "MovingAverageMinMaxObserver": {"averaging_constant": 0.25},
    "PerChannelMinMaxObserver": {},
    "MovingAveragePerChannelMinMaxObserver": {"averaging_constant": 0.25},
    "HistogramObserver": {"bins": 64},
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 40, generator=generator) * (i + 1) for i in range(3)]


def observer_of(ns: ModuleType, name: str) -> Any:
    return getattr(ns, name)(**OBSERVERS[name])


def fake_quantizer_of(ns: ModuleType, name: str) -> Any:
    kwargs: dict[str, Any] = dict(OBSERVERS[name])
    if "PerChannel" in name:
        kwargs["qscheme"] = torch.per_channel_affine
    return ns.FakeQuantize(getattr(ns, name), quant_min=0, quant_max=255, **kwargs)


# ---------------------------------------------------------------- how each is replaced

Log = list[str]
Replacement = Callable[[Any, Log], Any]


def on_instance(method: str, change: Callable[[Any], Any]) -> Replacement:
    @contextmanager
    def replaced(module: Any, log: Log) -> Iterator[None]:
        original = getattr(module, method)

        def own(self: Any, *args: Any) -> Any:
            log.append(method)
            return change(original(*args))

        setattr(module, method, types.MethodType(own, module))
        yield

    return replaced


def on_class(method: str, change: Callable[[Any], Any], depth: int = 0) -> Replacement:
    """On the module's class, or on the base `depth` steps up that has the method."""

    @contextmanager
    def replaced(module: Any, log: Log) -> Iterator[None]:
        owners = [cls for cls in type(module).__mro__ if method in vars(cls)]
        owner = owners[min(depth, len(owners) - 1)]
        original = vars(owner)[method]

        def own(self: Any, *args: Any) -> Any:
            log.append(method)
            return change(original(self, *args))

        setattr(owner, method, own)
        try:
            yield
        finally:
            setattr(owner, method, original)

    return replaced


def by_subclass(method: str, change: Callable[[Any], Any]) -> Replacement:
    @contextmanager
    def replaced(module: Any, log: Log) -> Iterator[None]:
        base: Any = type(module)

        def own(self: Any, *args: Any) -> Any:
            log.append(method)
            return change(getattr(super(module.__class__, self), method)(*args))

        module.__class__ = type("Own", (base,), {method: own})
        yield

    return replaced


def by_hook(register: Callable[[Any, Any], Any], name: str) -> Replacement:
    @contextmanager
    def replaced(module: Any, log: Log) -> Iterator[None]:
        def hook(hooked: Any, *_: Any) -> None:
            if hooked is module:
                log.append(name)

        handle = register(module, hook)
        yield
        handle.remove()

    return replaced


def same(result: Any) -> Any:
    return result


def doubled(qparams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return qparams[0] * 2, qparams[1]


REPLACEMENTS: dict[str, Replacement] = {
    **{
        f"{how.__name__} {method}": how(method, change)
        for how in (on_instance, on_class, by_subclass)
        for method, change in (
            ("forward", same),
            ("calculate_qparams", doubled),
            ("_calculate_qparams", doubled),
        )
    },
    "on_base _calculate_qparams": on_class("_calculate_qparams", doubled, depth=9),
    "forward hook": by_hook(lambda m, hook: m.register_forward_hook(hook), "hook"),
    "forward pre-hook": by_hook(lambda m, hook: m.register_forward_pre_hook(hook), "hook"),
    "global hook": by_hook(lambda _, hook: register_module_forward_hook(hook), "hook"),
    "global pre-hook": by_hook(lambda _, hook: register_module_forward_pre_hook(hook), "hook"),
}


def logged(ns: ModuleType, run: Callable[[Any, Log], None], module: Any) -> tuple[Any, Log]:
    log: Log = []
    with quiet():
        run(module, log)
    return module, log


@pytest.mark.parametrize("when", ["from the start", "later"])
@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_replaced_of_a_fake_quantizer_s_observer_runs(
    name: str, how: str, when: str
) -> None:
    outcomes = []
    for ns in (tq, fq):
        module, log, outputs = fake_quantizer_of(ns, name), [], []
        with quiet():
            if when == "later":
                module(batches()[0])
            with REPLACEMENTS[how](module.activation_post_process, log):
                outputs = [module(x) for x in batches()]
        outcomes.append((module, log, outputs))
    (theirs, their_log, their_outputs), (ours, our_log, our_outputs) = outcomes
    assert our_log == their_log
    assert our_log
    for y, z in zip(our_outputs, their_outputs, strict=True):
        assert_same(y, z)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_replaced_of_an_observer_runs(name: str, how: str) -> None:
    outcomes = []
    for ns in (tq, fq):
        module, log = observer_of(ns, name), []
        with quiet(), REPLACEMENTS[how](module, log):
            for x in batches():
                module(x)
            outcomes.append((module, log, module.calculate_qparams()))
    (theirs, their_log, their_qparams), (ours, our_log, our_qparams) = outcomes
    assert our_log == their_log
    assert our_log
    for mine, expected in zip(our_qparams, their_qparams, strict=True):
        assert_same(mine, expected)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("how", [how for how in REPLACEMENTS if " _" not in how])
@pytest.mark.parametrize("name", ["MinMaxObserver", "PerChannelMinMaxObserver"])
def test_what_is_replaced_of_a_fake_quantizer_itself_runs(name: str, how: str) -> None:
    outcomes = []
    for ns in (tq, fq):
        module, log = fake_quantizer_of(ns, name), []
        with quiet(), REPLACEMENTS[how](module, log):
            outputs = [module(x) for x in batches()]
        outcomes.append((module, log, outputs))
    (theirs, their_log, their_outputs), (ours, our_log, our_outputs) = outcomes
    assert our_log == their_log
    for y, z in zip(our_outputs, their_outputs, strict=True):
        assert_same(y, z)
    assert_same_state(ours, theirs)


def test_a_per_channel_range_may_be_updated_by_a_subclass() -> None:
    """torch.ao's forward calls _forward, which subclasses may therefore override."""
    outcomes = []
    for ns in (tq, fq):

        class Own(ns.PerChannelMinMaxObserver):  # type: ignore[name-defined]
            def _forward(self, x_orig: Tensor) -> Tensor:
                return super()._forward(x_orig * 3)

        for module in (Own(), ns.FakeQuantize(Own, qscheme=torch.per_channel_affine)):
            for x in batches():
                module(x)
            outcomes.append(module)
    assert_same_state(outcomes[2], outcomes[0])
    assert_same_state(outcomes[3], outcomes[1])


@pytest.mark.parametrize("base", ["FakeQuantize", "FusedMovingAvgObsFakeQuantize"])
def test_the_first_tensor_of_a_subclass_is_seen_once(base: str) -> None:
    for ns in (tq, fq):
        calls = []

        class Own(getattr(ns, base)):  # type: ignore[misc]
            def forward(self, x: Tensor, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                return super().forward(x) + 100  # type: ignore[no-any-return]

        module = Own(
            observer=ns.MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        x = batches()[0]
        assert (module(x) - x).round().eq(100).all()
        assert len(calls) == 1


# --------------------------------------------------------------- attributes and tensors


def with_property(cls: Any, name: str) -> Any:
    def read(self: Any) -> Any:
        return self.__dict__["_" + name]

    def write(self: Any, value: Any) -> None:
        self.__dict__["_" + name] = value

    return type("Own", (cls,), {name: property(read, write)})


@pytest.mark.parametrize("name", list(OBSERVERS)[:4])
@pytest.mark.parametrize(
    "attribute", ["averaging_constant", "ch_axis", "quant_min", "quant_max", "qscheme", "dtype"]
)
def test_settings_may_be_properties(name: str, attribute: str) -> None:
    with quiet():
        theirs = observer_of(tq, name)
    if not hasattr(theirs, attribute):
        pytest.skip("it has no such setting")
    outcomes = []
    for ns in (tq, fq):
        own = with_property(getattr(ns, name), attribute)
        with quiet():
            module = ns.FakeQuantize(own, **OBSERVERS[name], qscheme=theirs.qscheme)
            for x in batches():
                module(x)
        outcomes.append(module)
    assert_same_state(outcomes[1], outcomes[0])


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def as_parameter(module: Any, name: str) -> None:
    value = getattr(module, name)
    delattr(module, name)
    setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))


def as_tensor(module: Any, name: str) -> None:
    value = getattr(module, name)
    delattr(module, name)
    setattr(module, name, value.clone())


def as_parametrized(module: Any, name: str) -> None:
    parametrize.register_parametrization(module, name, Halved(), unsafe=True)


@pytest.mark.parametrize("observing", [True, False])
@pytest.mark.parametrize("place", [as_parameter, as_tensor, as_parametrized])
@pytest.mark.parametrize("name", ["scale", "min_val", "max_val"])
@pytest.mark.parametrize("kind", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
def test_other_tensors_may_be_in_the_place_of_buffers(
    kind: str, name: str, place: Callable[[Any, str], None], observing: bool
) -> None:
    outcomes = []
    for ns in (tq, fq):
        module = fake_quantizer_of(ns, kind)
        first, *others = batches()
        module(first)
        place(module if name == "scale" else module.activation_post_process, name)
        if not observing:
            module.disable_observer()
        outcomes.append([*map(module, others), module.scale, *module.calculate_qparams()])
    for mine, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert_same(mine.detach(), expected.detach())


# -------------------------------------------------------------------- histogram's methods


def histograms(*tensors: Tensor) -> tuple[Any, Any]:
    ours, theirs = fq.HistogramObserver(bins=128), tq.HistogramObserver(bins=128)
    with quiet():
        for x in tensors or batches():
            ours(x)
            theirs(x)
    return ours, theirs


@pytest.mark.parametrize("name", ["min_val", "max_val"])
def test_a_plain_tensor_in_the_place_of_a_range_without_data_is_in_no_state(name: str) -> None:
    states = []
    for ns in (fq, tq):
        observer = ns.PerChannelMinMaxObserver()
        if ns is fq:
            observer._set_channels(3)  # as prepare_qat does
        value = getattr(observer, name)
        delattr(observer, name)
        setattr(observer, name, value)
        states.append(dict(observer.state_dict()))
    assert_same(*states)


@pytest.mark.parametrize("bins", [(0, 127), (3, 120), (60, 64), (0, 0)])
def test_the_error_of_a_range_is_torch_aos(bins: tuple[int, int]) -> None:
    ours, theirs = histograms()
    mine, expected = (o._compute_quantization_error(*bins) for o in (ours, theirs))
    assert mine == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_torch_aos() -> None:
    ours, theirs = histograms()
    begin, end, density = torch.randn(3, 50)
    assert_same(ours._get_norm(begin, end, density), theirs._get_norm(begin, end, density))


@pytest.mark.parametrize("update", [(-20.0, 20.0), (-9.0, 11.5)])
def test_histograms_are_moved_and_combined_as_torch_ao_does(update: tuple[float, float]) -> None:
    ours, theirs = histograms()
    low, high = map(torch.tensor, update)
    low, high = torch.minimum(low, ours.min_val), torch.maximum(high, ours.max_val)
    added = torch.arange(128.0)
    args = (ours.histogram, ours.min_val, ours.max_val)
    assert_same(
        ours._upscale_histogram(*args, low, high), theirs._upscale_histogram(*args, low, high)
    )
    assert_same(
        ours._combine_histograms(*args, added, low, high),
        theirs._combine_histograms(*args, added, low, high),
    )
    same_range = (added, ours.min_val, ours.max_val)
    assert_same(
        ours._combine_histograms(*args, *same_range), theirs._combine_histograms(*args, *same_range)
    )


def test_histograms_of_one_value_are_combined_as_torch_ao_does() -> None:
    ours, theirs = histograms(torch.full((7,), 2.0))
    args = (ours.histogram, ours.min_val, ours.max_val, torch.zeros(128))
    low, high = torch.tensor(-1.0), torch.tensor(5.0)
    assert_same(
        ours._combine_histograms(*args, low, high), theirs._combine_histograms(*args, low, high)
    )


def test_a_range_that_does_not_hold_the_old_one_is_refused() -> None:
    ours, _ = histograms()
    zero = torch.tensor(0.0)
    with pytest.raises(fq.QuantizationError, match="must hold the old one"):
        ours._combine_histograms(
            ours.histogram, ours.min_val, ours.max_val, ours.histogram, zero, ours.max_val
        )


def own_histogram(ns: ModuleType, method: str, log: Log) -> Any:
    """An observer whose method of this name notes that it ran, and calls the original."""

    def own(self: Any, *args: Any) -> Any:
        log.append(method)
        return getattr(ns.HistogramObserver, method)(self, *args)

    return type("Own", (ns.HistogramObserver,), {method: own})(bins=64)


@pytest.mark.parametrize(
    "method",
    [
        "_get_norm",
        "_compute_quantization_error",
        "_non_linear_param_search",
        "_upscale_histogram",
        "_combine_histograms",
        "reset_histogram",
    ],
)
def test_a_histograms_methods_run_where_they_are_overridden(method: str) -> None:
    outcomes = []
    for ns in (tq, fq):
        log: Log = []
        module = own_histogram(ns, method, log)
        with quiet():
            for x in [*batches(), *batches()]:  # the second time the range stays
                module(x)
            outcomes.append((module, log, module.calculate_qparams()))
    (theirs, their_log, their_qparams), (ours, our_log, our_qparams) = outcomes
    assert our_log
    if method not in ("_get_norm", "_compute_quantization_error"):
        # torch.ao's fp32 sums of errors may end the search elsewhere.
        assert our_log == their_log
    assert_same_state(ours, theirs)
    torch.testing.assert_close(our_qparams[0], their_qparams[0], rtol=0.05, atol=0)


def test_a_norm_of_ones_own_decides_the_search() -> None:
    class Width(fq.HistogramObserver):
        def _get_norm(self, delta_begin: Tensor, delta_end: Tensor, density: Tensor) -> Tensor:
            return density * (delta_end - delta_begin)

    class TheirWidth(tq.HistogramObserver):
        _get_norm = Width._get_norm

    torch.manual_seed(0)
    x = torch.randn(2000) ** 3
    outcomes = []
    for cls in (TheirWidth, Width, fq.HistogramObserver):
        module = cls(bins=256)
        with quiet():
            module(x)
            outcomes.append(module.calculate_qparams()[0])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0.01, atol=0)
    assert not torch.isclose(outcomes[1], outcomes[2], rtol=0.01)


@pytest.mark.parametrize("policy", ["ignore", "raise", "propagate"])
def test_policies_hold_where_a_histogram_is_updated_by_own_methods(policy: Any) -> None:
    class Own(fq.HistogramObserver):
        def _combine_histograms(self, *args: Tensor) -> Tensor:
            return super()._combine_histograms(*args)

    module, expected = (cls(nonfinite=policy) for cls in (Own, fq.HistogramObserver))
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    for o in (module, expected):
        o(torch.tensor([-1.0, 1.0]))
        if policy == "ignore":
            o(x)
        else:
            with pytest.raises(ValueError, match="non-finite"):
                o(x)
    assert_same_state(module, expected)
    assert_same(module.nonfinite_count, expected.nonfinite_count)


# ------------------------------------------------------------------- fixed scale, zero point


@pytest.mark.parametrize("how", ["on_instance forward", "forward hook", "global hook"])
def test_what_is_replaced_of_an_observer_of_fixed_qparams_runs(how: str) -> None:
    for ns in (tq, fq):
        module, log = ns.default_fixed_qparams_range_0to1_fake_quant(), []
        with quiet(), REPLACEMENTS[how](module.activation_post_process, log):
            module(torch.rand(5))
        assert len(log) == 1
