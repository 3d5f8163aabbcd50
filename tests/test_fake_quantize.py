"""Fake-quantizers beside torch.ao's: same outputs, gradients, statistics and qparams."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.ao.quantization.fake_quantize as torch_fake_quantize
import torch.ao.quantization.observer as torch_observer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastquant as fq
from fastquant import fake_quantize, observer
from fastquant.fake_quantize import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
)
from fastquant.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from fastquant.utils import QuantizationError
from oracle import (
    PER_CHANNEL,
    PER_TENSOR,
    assert_runs_same,
    assert_same,
    assert_same_state,
    assert_unchanged,
    configs,
    make_both,
    observed,
    quiet,
    rounded_past,
    run,
    snapshot,
)
from strategies import FLOATS

OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
)
DEFAULTS = [name for name in torch_fake_quantize.__all__ if name.startswith(("default", "fused"))]


def runs(theirs: Any, x: Tensor) -> bool:
    """Whether torch.ao's takes `x`, which it has two reasons not to that are no fault of `x`."""
    tried = copy.deepcopy(theirs)
    try:
        run(tried, x)
    except AssertionError:
        if rounded_past(tried.activation_post_process):
            return False
        raise
    except RuntimeError as error:
        # Per channel it refuses the fixed zero point of some symmetric configurations.
        if "`zero_point` must be between `quant_min` and `quant_max`" in str(error):
            return False
        raise
    return True


def assert_qparams_are_calculated(module: Any) -> None:
    scale, zero_point = module.calculate_qparams()
    assert_same(module.scale, scale)
    assert_same(module.zero_point, zero_point.to(module.zero_point.dtype))


# ------------------------------------------------------------------------------- FakeQuantize


@given(data=st.data())
@settings(max_examples=100)
def test_fake_quantize_is_torchs(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(OBSERVERS[:4]))  # the histogram's runs with the defaults
    per_channel = "PerChannel" in name
    config = data.draw(configs(PER_CHANNEL if per_channel else PER_TENSOR))
    # torch computes 32-bit values in floats, which cannot tell neighbours apart; we in doubles.
    assume(config["dtype"] not in (torch.qint32, torch.int32))
    if per_channel:
        config["ch_axis"] = data.draw(st.integers(0, 1))
    if "Moving" in name:
        config["averaging_constant"] = data.draw(st.sampled_from((0.01, 1)))
    both = make_both(
        lambda **kw: FakeQuantize(getattr(observer, name), **kw),
        lambda **kw: torch_fake_quantize.FakeQuantize(getattr(torch_observer, name), **kw),
        **config,
    )
    if both is None:
        return
    ours, theirs = both
    assert ours.zero_point.dtype == theirs.zero_point.dtype
    stream = data.draw(observed(ch_axis=config.get("ch_axis"), max_size=3))
    for x in stream:
        if not runs(theirs, x):
            run(ours, x)
            return
        assert_runs_same(ours, theirs, x)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("observing", [True, False])
def test_defaults_run_as_torchs(name: str, observing: bool) -> None:
    """The fused ones as torch's unfused: torch's fused op has qparams of its own."""
    factory = getattr(torch_fake_quantize, name)
    with quiet():
        if factory.p.func is torch_fake_quantize.FusedMovingAvgObsFakeQuantize:
            theirs: Any = torch_fake_quantize.FakeQuantize(**factory.p.keywords)
        else:
            theirs = factory()
    ours = getattr(fake_quantize, name)()
    torch.manual_seed(0)
    for i in range(3):
        assert_runs_same(ours, theirs, torch.randn(6, 5, 4) * (i + 1))
    if not observing:
        for module in (ours, theirs):
            module.disable_observer()
    assert_runs_same(ours, theirs, torch.randn(6, 5, 4) * 9)
    assert_same(ours.scale, theirs.scale)
    assert_same(ours.zero_point, theirs.zero_point)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_floating_dtype_goes_in_and_comes_out(
    make: Any, dtype: torch.dtype, per_channel: bool
) -> None:
    kwargs: dict[str, Any] = {"quant_min": 0, "quant_max": 255}
    if per_channel:
        kwargs |= {
            "observer": MovingAveragePerChannelMinMaxObserver,
            "ch_axis": 1,
            "qscheme": torch.per_channel_affine,
        }
    ours, reference = make(**kwargs), make(**kwargs)
    x = torch.randn(4, 3, 5).to(dtype)
    (y, grad), (expected, expected_grad) = run(ours, x), run(reference, x.float())
    assert y.dtype == grad.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=0)
    assert_same(grad != 0, expected_grad != 0)
    assert_same_state(ours, reference)


# ----------------------------------------------------------------------------------- the fused


@given(data=st.data())
@settings(max_examples=60)
def test_fused_is_torchs_unfused(data: st.DataObject) -> None:
    per_channel = data.draw(st.booleans())
    name = f"MovingAverage{'PerChannel' if per_channel else ''}MinMaxObserver"
    config: dict[str, Any] = {
        "quant_min": -128,
        "quant_max": 127,
        "dtype": torch.qint8,
        "averaging_constant": data.draw(st.sampled_from((0.01, 1))),
        "qscheme": data.draw(st.sampled_from((PER_CHANNEL if per_channel else PER_TENSOR)[:2])),
    }
    if per_channel:
        config["ch_axis"] = data.draw(st.integers(0, 1))
    ours = FusedMovingAvgObsFakeQuantize(getattr(observer, name), **config)
    with quiet():
        theirs = torch_fake_quantize.FakeQuantize(getattr(torch_observer, name), **config)
    for x in data.draw(observed(ch_axis=config.get("ch_axis"))):
        if not runs(theirs, x):
            run(ours, x)
            return
        assert_runs_same(ours, theirs, x)
        assert_qparams_are_calculated(ours)
    for buffer in ("min_val", "max_val"):
        assert_same(
            getattr(ours.activation_post_process, buffer),
            getattr(theirs.activation_post_process, buffer),
        )


@pytest.mark.parametrize(
    "name", [n for n in DEFAULTS if getattr(torch_fake_quantize, n).p.func.__name__[:5] == "Fused"]
)
def test_fused_is_torchs_fused_to_within_a_quantum(name: str) -> None:
    with quiet():
        theirs: Any = getattr(torch_fake_quantize, name)()
    ours: Any = getattr(fake_quantize, name)()
    torch.manual_seed(0)
    for _ in range(3):
        x = torch.randn(8, 30)
        ours(x)
        theirs(x)
    for buffer in ("min_val", "max_val"):
        torch.testing.assert_close(
            getattr(ours.activation_post_process, buffer),
            getattr(theirs.activation_post_process, buffer),
        )
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0.01, atol=0)
    # Averages clip these few: compare what both can represent.
    inside = torch.randn(8, 30).clamp(-1, 1)
    ours.disable_observer()
    theirs.disable_observer()
    quantum = ours.scale.reshape(-1, 1) if ours.is_per_channel else ours.scale
    assert bool(((ours(inside) - theirs(inside)).abs() <= 1.01 * quantum).all())


def test_an_observe_only_phase_leaves_no_stale_qparams() -> None:
    ours = FusedMovingAvgObsFakeQuantize(quant_min=0, quant_max=255)
    x = torch.randn(5, 5)
    ours(x)
    ours.disable_fake_quant()
    for factor in (2, 3):
        assert_same(ours(factor * x), factor * x)
        assert_qparams_are_calculated(ours)


@pytest.mark.parametrize("ch_axis", [0, 1, 2, -1, -3])
def test_fused_takes_any_channel_axis(ch_axis: int) -> None:
    ours = FusedMovingAvgObsFakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=ch_axis,
    )
    x = torch.randn(3, 4, 5)
    y, _ = run(ours, x)
    assert ours.scale.shape == (x.shape[ch_axis],)
    scale, zero_point = ours.calculate_qparams()
    axis = ch_axis % 3
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis, -128, 127)
    assert_same(y, expected)


# ------------------------------------------------------------------------------------ the flags


@pytest.mark.parametrize("name", DEFAULTS)
def test_flags_set_by_hand_count(name: str) -> None:
    ours = getattr(fake_quantize, name)()
    x = torch.randn(4, 5)
    with quiet():
        ours(x)
    ours.observer_enabled[0] = 0
    before = snapshot(ours)
    with quiet():
        y = ours(10 * x)
    assert_unchanged(ours, before)
    assert not torch.equal(y, 10 * x)
    ours.fake_quant_enabled[0] = 0
    assert_same(ours(10 * x), 10 * x)
    ours.fake_quant_enabled[0] = 1
    assert_same(ours(10 * x), y)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_module_that_is_off_is_an_identity_that_learns_nothing(name: str) -> None:
    ours = getattr(fake_quantize, name)()
    ours.disable_observer()
    ours.disable_fake_quant()
    before = snapshot(ours)
    x = torch.randn(4, 5)
    y, grad = run(ours, x)
    assert_same(y, x)
    assert_same(grad, torch.arange(1.0, 21.0).reshape(4, 5))
    assert_unchanged(ours, before)


class HostReads(TorchDispatchMode):
    """Counts the values that a call reads on the host: on a GPU, it waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(module: nn.Module) -> int:
    """In a call that is not the first."""
    x = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0))
    with quiet():
        module(x)
        with HostReads() as reads:
            module(x)
    return reads.count


@pytest.mark.parametrize(
    ("make", "observing", "off"),
    [
        ((lambda ns: ns.FakeQuantize()), 0, 0),
        ((lambda ns: ns.FakeQuantize(ns.MinMaxObserver)), 0, 0),
        ((lambda ns: ns.FusedMovingAvgObsFakeQuantize()), 0, 0),
        ((lambda ns: ns.default_per_channel_weight_fake_quant()), 0, 0),
        # The flag, and both ends of the range.
        ((lambda ns: ns.default_histogram_fake_quant()), 3, 1),
    ],
)
def test_what_is_read_on_the_host(make: Any, observing: int, off: int) -> None:
    ours, theirs = make(fq), make(torch.ao.quantization)
    assert host_reads(ours) == observing <= host_reads(theirs)
    for module in (ours, theirs):
        module.disable_observer()
    assert host_reads(ours) == off <= host_reads(theirs)


def test_switches_act_on_both_libraries() -> None:
    with quiet():
        model = nn.Sequential(
            fake_quantize.default_fake_quant(),
            torch_fake_quantize.default_fake_quant(),
            nn.Linear(2, 2),
        )
    for switches in (fake_quantize, torch_fake_quantize):
        for name, flag in (("observer", "observer_enabled"), ("fake_quant", "fake_quant_enabled")):
            for verb, expected in (("disable", 0), ("enable", 1)):
                model.apply(getattr(switches, f"{verb}_{name}"))
                assert [int(getattr(model[i], flag)) for i in range(2)] == [expected] * 2


def test_a_model_of_ones_own_may_have_a_method_of_that_name() -> None:
    class Model(nn.Module):
        def enable_observer(self) -> None:
            raise AssertionError("not a fake-quantizer")

    Model().apply(fake_quantize.enable_observer)


# ------------------------------------------------------------------ other observers, subclasses


class Doubling(MovingAverageMinMaxObserver):
    """A user's observer: twice the range."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self._calculate_qparams(2 * self.min_val, 2 * self.max_val)


def test_a_users_observer_is_asked() -> None:
    x = torch.randn(9)
    for make in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        ours, plain = make(Doubling), make()
        ours(x)
        plain(x)
        torch.testing.assert_close(ours.scale, 2 * plain.scale)


def test_a_users_fake_quantize_is_asked() -> None:
    class Fixed(FakeQuantize):
        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return torch.tensor([0.5]), torch.tensor([3])

    ours = Fixed()
    assert_same(ours(torch.tensor([0.3, 1.1])), torch.tensor([0.5, 1.0]))
    assert_same(ours.zero_point, torch.tensor([3], dtype=torch.int32))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_observer_fire(register: str) -> None:
    ours, plain = FakeQuantize(), FakeQuantize()
    seen = []
    handle = getattr(ours.activation_post_process, register)(lambda *args: seen.append(args))
    x = torch.randn(9)
    assert_same(ours(x), plain(x))
    assert_same_state(ours, plain)
    handle.remove()
    ours(x)
    assert len(seen) == 1


@pytest.mark.parametrize("make", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_torchs_observers_fit_in_ours(make: Any) -> None:
    with quiet():
        ours = make(torch_observer.MovingAverageMinMaxObserver, quant_min=0, quant_max=127)
    plain = make(MovingAverageMinMaxObserver, quant_min=0, quant_max=127)
    for _ in range(2):
        assert_runs_same(ours, plain, torch.randn(9))
    assert_same_state(ours, plain)


def test_our_observers_fit_in_torchs() -> None:
    for name in OBSERVERS:
        with quiet():
            theirs = torch_fake_quantize.FakeQuantize(getattr(observer, name))
        ours = FakeQuantize(getattr(observer, name))
        for _ in range(2):
            assert_runs_same(theirs, ours, torch.randn(3, 9))
        assert_same_state(ours, theirs)
    with quiet():
        torch_fake_quantize.FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver)(
            torch.randn(3)
        )


def test_a_per_channel_observer_calibrated_alone_sizes_the_rest() -> None:
    ours = FakeQuantize(PerChannelMinMaxObserver, qscheme=torch.per_channel_affine)
    x = torch.randn(4, 3)
    ours.activation_post_process(2 * x)
    y = ours(x)
    assert ours.scale.shape == (4,)
    assert_qparams_are_calculated(ours)
    assert y.shape == x.shape


def test_empty_tensors_pass() -> None:
    for name in DEFAULTS:
        ours = getattr(fake_quantize, name)()
        with quiet():
            assert ours(torch.empty(0, 3)).shape == (0, 3)
            ours(torch.randn(2, 3))
            assert ours(torch.empty(2, 0)).shape == (2, 0)


# --------------------------------------------------------------------------------- fixed qparams


def test_fixed_qparams_stay_fixed() -> None:
    with quiet():
        theirs = torch_fake_quantize.default_fixed_qparams_range_neg1to1_fake_quant()
    ours = fake_quantize.default_fixed_qparams_range_neg1to1_fake_quant()
    for factor in (0.3, 3.0):
        assert_runs_same(ours, theirs, torch.randn(5, 5) * factor)
    assert_same_state(ours, theirs)
    for mine, expected in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert_same(mine, expected)


def test_fixed_qparams_need_their_observer() -> None:
    with pytest.raises(QuantizationError, match="FixedQParamsObserver, got MinMaxObserver"):
        FixedQParamsFakeQuantize(MinMaxObserver)
    with pytest.raises(QuantizationError, match="per-tensor"):
        FixedQParamsFakeQuantize(
            observer.FixedQParamsObserver.with_args(
                scale=1.0, zero_point=0, qscheme=torch.per_channel_affine
            )
        )
    with quiet():
        FixedQParamsFakeQuantize(torch_observer.default_fixed_qparams_range_0to1_observer)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], "x must be a tensor, got list"),
        (torch.arange(6).reshape(2, 3), "floating dtype.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), "floating dtype.*got torch.bool"),
    ],
)
def test_what_cannot_be_quantized_is_refused(name: str, warm: bool, x: Any, message: str) -> None:
    ours = getattr(fake_quantize, name)()
    if warm:
        with quiet():
            ours(torch.randn(2, 3))
    before = snapshot(ours)
    with pytest.raises(TypeError, match=message):
        ours(x)
    assert_unchanged(ours, before)


@pytest.mark.parametrize("name", [n for n in DEFAULTS if "per_channel" in n or "embedding" in n])
def test_another_number_of_channels_is_refused(name: str) -> None:
    ours = getattr(fake_quantize, name)()
    with pytest.raises(ValueError, match="0-dim"):
        ours(torch.tensor(1.0))
    ours(torch.randn(4, 3))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="min_val must have one element for each of the 5 channel"):
        ours(torch.randn(5, 3))
    assert_unchanged(ours, before)


@pytest.mark.parametrize("observer_class", [MinMaxObserver, PerChannelMinMaxObserver])
@pytest.mark.parametrize("warm", [False, True])
def test_a_refused_tensor_leaves_everything_as_it_was(observer_class: Any, warm: bool) -> None:
    ours = FakeQuantize(observer_class, nonfinite="raise")
    if warm:
        ours(torch.randn(2, 3))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="1 non-finite"):
        ours(torch.tensor([[1.0, float("nan"), 2.0], [1.0, 3.0, 2.0]]))
    assert_unchanged(ours, before)
    ours.disable_observer()
    ours.disable_fake_quant()
    ours(torch.tensor([[float("nan")]]))


def test_non_finite_values_do_not_reach_the_scale() -> None:
    ours = FakeQuantize(MovingAverageMinMaxObserver)
    ours(torch.tensor([1.0, float("nan"), float("inf"), -1.0]))
    assert float(ours.scale) == pytest.approx(2 / 255)
    assert int(ours.activation_post_process.nonfinite_count) == 2


def test_an_unobserved_per_channel_module_says_so() -> None:
    ours = fake_quantize.default_per_channel_weight_fake_quant()
    ours.disable_observer()
    with pytest.raises(ValueError, match="scale must have one element for each of the 4 channels"):
        ours(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quant_min": 5, "quant_max": 4}, "less than quant_max"),
        ({"quant_min": -1, "quant_max": 4}, "quant_min out of bound: torch.quint8 holds 0 to 255"),
        ({"quant_min": 0, "quant_max": 256}, "quant_max out of bound"),
        ({"quant_min": 0, "quant_max": 0}, "quant_min"),
        ({"quant_min": 0, "quant_max": 7, "dtype": torch.float8_e5m2}, "integer dtype"),
    ],
)
def test_bad_quantized_ranges_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        FakeQuantize(MinMaxObserver, **kwargs)
    with pytest.raises(AssertionError):
        FakeQuantize(MinMaxObserver, **kwargs)


def test_the_dtype_of_a_partial_observer_decides_the_range() -> None:
    partial = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    assert FakeQuantize(partial, quant_min=-128, quant_max=127).quant_min == -128
    with pytest.raises(QuantizationError, match="out of bound"):
        FakeQuantize(partial, quant_min=0, quant_max=255)


def test_fused_needs_a_moving_average() -> None:
    for other in (MinMaxObserver, HistogramObserver):
        with pytest.raises(QuantizationError, match="MovingAverageMinMaxObserver"):
            FusedMovingAvgObsFakeQuantize(other)


# -------------------------------------------------------------------- the same names as torch.ao

CLASSES = [
    n for n in torch_fake_quantize.__all__ if inspect.isclass(getattr(torch_fake_quantize, n))
]


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_take_what_torchs_take(name: str) -> None:
    def parameters(cls: type) -> list[tuple[str, Any]]:
        # Defaults are classes of either library: compare their names.
        return [
            (p.name, getattr(p.default, "__name__", p.default))
            for p in inspect.signature(cls).parameters.values()
        ]

    assert parameters(getattr(fake_quantize, name)) == parameters(
        getattr(torch_fake_quantize, name)
    )


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        (n, s)
        for n in dir(torch_fake_quantize)
        if n.startswith("_is_") and "script" not in n
        for s in (*PER_TENSOR, *PER_CHANNEL)
    ],
)
def test_private_predicates_are_torchs(name: str, scheme: torch.qscheme) -> None:
    assert getattr(fake_quantize, name)(scheme) == getattr(torch_fake_quantize, name)(scheme)


def described(value: Any) -> Any:
    """A default in terms that do not depend on the library."""
    if hasattr(value, "p"):
        return described(value.p.func), {k: described(v) for k, v in value.p.keywords.items()}
    return value.__name__ if inspect.isclass(value) else value


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_torchs(name: str) -> None:
    ours, theirs = getattr(fake_quantize, name), getattr(torch_fake_quantize, name)
    assert described(ours) == described(theirs)
    with quiet():
        mine, expected = ours(), theirs()
    assert_same_state(mine, expected)

    def attributes(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in vars(module).items() if not k.startswith("_")}

    assert attributes(mine) == attributes(expected)
    assert repr(mine) == repr(expected)


# ----------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", [n for n in DEFAULTS if "histogram" not in n])
@pytest.mark.parametrize("gradient", [False, True])
def test_fake_quantizers_leave_a_compiled_graph_whole(name: str, gradient: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    ours = getattr(fake_quantize, name)()
    ours(torch.randn(3, 4))
    eager = copy.deepcopy(ours)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 3.0):
        x = torch.randn(3, 4) * scale
        if gradient:
            assert_runs_same(compiled, eager, x)
        else:
            assert_same(compiled(x), eager(x))
    assert_same_state(ours, eager)
    # Flags are read where the graph runs, not where it was traced.
    for module in (ours, eager):
        module.disable_observer()
        module.disable_fake_quant()
    before = snapshot(ours)
    x = torch.randn(3, 4) * 9
    assert_same(compiled(x), x)
    assert_unchanged(ours, before)


def test_fused_qparams_are_those_of_the_range_whatever_came_before() -> None:
    module = fq.default_fused_act_fake_quant()

    def check() -> None:
        scale, zero_point = module.calculate_qparams()
        assert_same(module.scale, scale)
        assert_same(module.zero_point, zero_point.int())

    for observing, quantizing in ((True, False), (False, True), (True, True), (False, False)):
        module.enable_observer(observing)
        module.enable_fake_quant(quantizing)
        if not observing and module.activation_post_process.max_val.isinf():
            continue
        module(torch.randn(20) * 3)
        check()
    state = module.state_dict()
    module = fq.default_fused_act_fake_quant()
    module.load_state_dict(state)
    check()


@pytest.mark.parametrize("method", ["forward", "calculate_qparams"])
def test_a_method_set_on_the_class_is_for_the_classes_it_is_for_in_torch(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(library: Any) -> list[str]:
        calls: list[str] = []
        original = getattr(library.FakeQuantize, method)

        def noted(self: Any, *args: Any) -> Any:
            calls.append(type(self).__name__)
            return original(self, *args)

        monkeypatch.setattr(library.FakeQuantize, method, noted)
        for name in ("default_fused_act_fake_quant", "default_symmetric_fixed_qparams_fake_quant"):
            getattr(library, name)()(torch.linspace(-1, 1, 9))
        library.FakeQuantize()(torch.linspace(-1, 1, 9))
        return calls

    assert called(fake_quantize) == called(torch_fake_quantize)
