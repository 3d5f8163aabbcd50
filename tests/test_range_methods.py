"""Ranges by other methods, also after a calibration: of observers, fake-quantizers, models."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.ao.quantization.observer as torch_observer
from torch import Tensor, nn

import fastquant
from fastquant import HistogramObserver, PerChannelHistogramObserver, QuantizationError
from fastquant import functional as F
from oracle import assert_same, quiet

METHODS = ("minmax", "l2", "mse", "percentile", "entropy")
OTHERS = [method for method in METHODS if method != "l2"]


def outliers(*shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


def observed(cls: Any = HistogramObserver, **config: Any) -> Any:
    observer = cls(bins=256, **config)
    for seed in range(3):
        observer(outliers(40, 3, 50, seed=seed))
    return observer


# ------------------------------------------------------------------------------------ observers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_a_method_may_be_chosen_before_or_after_calibration(
    method: Any, qscheme: torch.qscheme
) -> None:
    config = {"qscheme": qscheme, "quant_min": 0, "quant_max": 127}
    before, after = observed(range_method=method, **config), observed(**config)
    before_state = copy.deepcopy(after.state_dict())
    after.set_range_method(method)
    assert_same(dict(after.state_dict()), dict(before_state))
    assert_same(after.calculate_qparams(), before.calculate_qparams())
    low, high = after.calculate_range()
    assert low < 0 < high
    assert_same(
        after.calculate_qparams(),
        F.choose_qparams(low, high, dtype=torch.quint8, **config),
    )


def test_every_method_of_one_histogram_has_a_range_and_an_error_of_its_own() -> None:
    observer = observed()
    ranges = {method: observer.calculate_range(method) for method in METHODS}
    errors = {method: float(observer.calculate_error(*ranges[method])) for method in METHODS}
    for method in ("l2", "mse", "percentile"):
        assert len({float(high) for _, high in (ranges[method], ranges["minmax"])}) == 2
    assert min(errors, key=lambda method: errors[method]) == "mse"
    assert observer.range_method == "l2"
    assert float(observer.calculate_error()) == errors["l2"]
    assert_same(ranges["minmax"], (observer.min_val, observer.max_val))


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_the_one_that_values_have(method: Any) -> None:
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.3, 1.0).sample((100_000,))
    observer = HistogramObserver(range_method=method)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    y = F.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=255)
    measured = float((x - y).square().mean())
    assert float(observer.calculate_error()) == pytest.approx(measured, rel=0.02)


def test_a_lower_percentile_clips_more() -> None:
    observer = observed(range_method="percentile")
    assert observer.percentile == 99.99
    highs = [float(observer.calculate_range()[1])]
    for percentile in (99.9, 99, 90):
        highs.append(float(observer.calculate_range(percentile=percentile)[1]))
        observer.set_range_method("percentile", percentile)
        assert float(observer.calculate_range()[1]) == highs[-1]
        observer.set_range_method("percentile")
        assert observer.percentile == percentile
    assert highs == sorted(highs, reverse=True)
    assert len(set(highs)) == 4


@pytest.mark.parametrize("method", METHODS)
def test_states_are_torch_aos_whatever_the_method(method: Any) -> None:
    ours = observed(range_method=method)
    with quiet():
        theirs = torch_observer.HistogramObserver(bins=256)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    loaded = HistogramObserver(bins=256, range_method=method)
    loaded.load_state_dict(theirs.state_dict())
    assert_same(loaded.calculate_qparams(), ours.calculate_qparams())


@pytest.mark.parametrize("cls", [HistogramObserver, PerChannelHistogramObserver])
def test_copies_and_pickles_keep_the_method(cls: Any) -> None:
    ours = observed(cls, range_method="percentile", percentile=99.0)
    memory = io.BytesIO()
    torch.save(ours, memory)
    memory.seek(0)
    for copied in (copy.deepcopy(ours), torch.load(memory, weights_only=False)):
        assert (copied.range_method, copied.percentile) == ("percentile", 99.0)
        assert_same(copied.calculate_qparams(), ours.calculate_qparams())


def test_an_observer_of_an_earlier_version_has_the_method_it_had() -> None:
    ours = observed()
    expected = ours.calculate_qparams()
    del ours.__dict__["range_method"], ours.__dict__["percentile"]
    assert_same(ours.calculate_qparams(), expected)
    assert ours.calculate_range("percentile")[1] > 0


def test_a_users_search_is_l2() -> None:
    class Mine(HistogramObserver):
        def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
            return torch.tensor(-0.5), torch.tensor(0.25)

    mine = observed(Mine)
    assert tuple(map(float, mine.calculate_range("l2"))) == (-0.5, 0.25)
    assert mine.calculate_range("minmax")[1] == mine.max_val


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HistogramObserver(range_method="kl"), "range_method must be one of.*got 'kl'"),
        (lambda: HistogramObserver(percentile=0), "percentile must be more than 0 .*got 0"),
        (lambda: HistogramObserver(percentile=100.5), "at most 100, got 100.5"),
        (lambda: HistogramObserver(percentile=float("nan")), "percentile.*got nan"),
        (
            lambda: HistogramObserver(dtype=torch.qint32, range_method="mse"),
            "'mse' takes at most 65536 quantized values",
        ),
        (lambda: HistogramObserver().calculate_range(), "nothing was observed"),
        (lambda: observed().calculate_range("max"), "range_method"),
        (lambda: observed().calculate_range(percentile=101), "percentile"),
        (lambda: observed().set_range_method("percentile", -1), "percentile"),
        (
            lambda: PerChannelHistogramObserver(qscheme=torch.per_channel_affine_float_qparams),
            "affine and symmetric",
        ),
        (lambda: fastquant.set_range_method(nn.Linear(1, 1), "mse"), "no observer of the model"),
        (lambda: fastquant.get_default_qconfig(range_method="kl"), "range_method"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        call()


HISTOGRAM = (torch.ones(8), torch.tensor(-1.0), torch.tensor(1.0))
QPARAMS = (torch.tensor([0.1]), torch.tensor([3]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.histogram_range(*HISTOGRAM, method="kl"), ValueError, "range_method must be"),
        (lambda: F.histogram_range(*HISTOGRAM, percentile=0), ValueError, "percentile must be"),
        (lambda: F.histogram_range(*HISTOGRAM, levels=1), ValueError, "levels must be at least 2"),
        (
            lambda: F.histogram_range(*HISTOGRAM, method="mse", dtype=torch.qint32),
            ValueError,
            "'mse' takes at most 65536",
        ),
        (
            lambda: F.histogram_range(
                *HISTOGRAM, method="mse", qscheme=torch.per_channel_affine_float_qparams
            ),
            ValueError,
            "affine and symmetric qschemes",
        ),
        (lambda: F.histogram_range([1.0], *HISTOGRAM[1:]), TypeError, "histogram must be a tensor"),
        (
            lambda: F.histogram_range(HISTOGRAM[0].int(), *HISTOGRAM[1:]),
            TypeError,
            "histogram must have a floating dtype",
        ),
        (
            lambda: F.histogram_range(torch.ones(2, 2, 2), *HISTOGRAM[1:]),
            ValueError,
            r"\[channels, bins\], got shape \[2, 2, 2\]",
        ),
        (
            lambda: F.histogram_range(torch.ones(2, 8), *HISTOGRAM[1:], method="mse"),
            ValueError,
            "min_val must have 2 elements",
        ),
        (
            lambda: F.histogram_error(*HISTOGRAM, *QPARAMS, quant_min=5, quant_max=5),
            ValueError,
            "quant_min must be less than quant_max",
        ),
        (
            lambda: F.histogram_error(
                *HISTOGRAM, -QPARAMS[0], QPARAMS[1], quant_min=0, quant_max=5
            ),
            ValueError,
            "scale must be positive",
        ),
        (
            lambda: F.histogram_error(*HISTOGRAM, *QPARAMS, quant_min=0, quant_max=2),
            ValueError,
            "zero_point must lie between",
        ),
        (
            lambda: F.histogram_error(
                *HISTOGRAM, torch.ones(2), torch.zeros(2).int(), quant_min=0, quant_max=5
            ),
            ValueError,
            "scale must have one element",
        ),
    ],
)
def test_functions_name_what_does_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_histogram_of_nothing_has_no_error_and_no_range() -> None:
    nothing = (torch.zeros(8), torch.tensor(float("inf")), torch.tensor(-float("inf")))
    assert F.histogram_error(*nothing, *QPARAMS, quant_min=0, quant_max=5).isnan()
    for method in OTHERS:
        low, high = F.histogram_range(*nothing, method=method)
        assert (float(low), float(high)) == (float("inf"), -float("inf"))


@pytest.mark.parametrize("cls", [HistogramObserver, PerChannelHistogramObserver])
def test_observers_of_other_methods_compile(cls: Any) -> None:
    eager, compiled = cls(bins=32, range_method="mse"), cls(bins=32, range_method="mse")
    step = torch.compile(compiled, backend="eager")
    for seed in range(3):
        x = outliers(4, 30, seed=seed)
        eager(x)
        step(x)
    assert_same(dict(compiled.state_dict()), dict(eager.state_dict()))
    assert_same(compiled.calculate_qparams(), eager.calculate_qparams())


def test_a_percentile_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="percentile must be a number, got 'p99'"):
        HistogramObserver(percentile="p99")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- per channel


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ch_axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_are_observed_as_tensors_of_their_own(
    method: Any, ch_axis: int, dtype: torch.dtype
) -> None:
    config = {"bins": 64, "quant_min": 0, "quant_max": 15, "range_method": method}
    ours = PerChannelHistogramObserver(ch_axis=ch_axis, **config)
    shape = (5, 6, 7, 8)
    each = [HistogramObserver(**config) for _ in range(shape[ch_axis])]
    for seed in range(3):
        x = (outliers(*shape, seed=seed) * (seed + 1)).to(dtype)
        if seed == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        x[0, 0, 0, 0] = float("inf")
        assert ours(x) is x
        for observer, channel in zip(each, x.unbind(ch_axis), strict=True):
            observer(channel)
    for name in ("histogram", "min_val", "max_val"):
        assert_same(getattr(ours, name), torch.stack([getattr(o, name) for o in each]))
    assert int(ours.nonfinite_count) == sum(int(o.nonfinite_count) for o in each) == 3
    scale, zero_point = ours.calculate_qparams()
    theirs = [o.calculate_qparams() for o in each]
    assert_same(scale, torch.cat([s for s, _ in theirs]))
    assert_same(zero_point, torch.cat([z for _, z in theirs]))


def test_states_of_channels_are_loaded_and_saved_whole() -> None:
    ours, fresh = (
        observed(PerChannelHistogramObserver, ch_axis=1),
        PerChannelHistogramObserver(ch_axis=1, bins=256),
    )
    empty = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(ours.state_dict())
    assert_same(fresh.calculate_qparams(), ours.calculate_qparams())
    fresh(outliers(2, 3, 4))
    fresh.load_state_dict(empty)
    assert fresh.histogram.sum() == 0
    fresh(outliers(2, 3, 4))
    fresh.reset_min_max_vals()
    fresh(outliers(4, 5, 2))
    assert fresh.histogram.shape == (5, 256)
    broken = dict(ours.state_dict())
    broken["histogram"] = broken["histogram"][:2]
    with pytest.raises(RuntimeError, match=r"histogram.*needs.*3, 256"):
        fresh.load_state_dict(broken)
    assert fresh.histogram.shape == (5, 256)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3), "out of range"),
        (torch.randn(4, 2), "channels"),
        (torch.arange(12).reshape(4, 3), "floating"),
        (torch.tensor([[0.0, 1.0, float("nan")]]), "non-finite"),
    ],
)
def test_tensors_that_do_not_fit_the_channels_change_nothing(x: Tensor, message: str) -> None:
    ours = PerChannelHistogramObserver(ch_axis=1, bins=8, nonfinite="raise")
    ours(torch.randn(5, 3))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        ours(x)
    assert_same(dict(ours.state_dict()), dict(before))


def test_weights_may_be_observed_by_histograms_of_their_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(fastquant.QuantStub(), nn.Conv2d(3, 4, 3), fastquant.DeQuantStub()).eval()
    with torch.no_grad():
        model[1].weight[:, 0, 0, 0] = 4
    weight = fastquant.PerChannelHistogramObserver.with_args(
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        range_method="percentile",
        percentile=90,
    )
    model.qconfig = fastquant.QConfig(HistogramObserver.with_args(reduce_range=True), weight)
    prepared = fastquant.prepare(model)
    prepared(torch.randn(2, 3, 8, 8))
    converted = fastquant.convert(prepared)
    extremes = model[1].weight.detach().abs().amax((1, 2, 3)) / 127.5
    assert bool((converted[1].weight().q_per_channel_scales() < extremes / 2).all())


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_lose_less_by_mse(bits: int, per_channel: bool, symmetric: bool) -> None:
    weight = outliers(8, 3, 5, 5) * torch.logspace(-2, 2, 8)[:, None, None, None]
    kind = "per_channel" if per_channel else "per_tensor"
    config = {
        "dtype": torch.qint8,
        "qscheme": getattr(torch, f"{kind}_{'symmetric' if symmetric else 'affine'}"),
        "quant_min": -(2 ** (bits - 1)),
        "quant_max": 2 ** (bits - 1) - 1,
    }
    axis = {"ch_axis": 0} if per_channel else {}
    errors = []
    for name in ("MinMax", "MSE"):
        observer = getattr(fastquant, ("PerChannel" if per_channel else "") + f"{name}Observer")(
            **axis, **config
        )
        assert observer(weight) is weight
        scale, zero_point = observer.calculate_qparams()
        y = F.fake_quantize(
            weight,
            scale,
            zero_point,
            **axis,
            quant_min=config["quant_min"],
            quant_max=config["quant_max"],
        )
        lost = (weight - y).square().sum((1, 2, 3)) if per_channel else (weight - y).square().sum()
        errors.append(lost)
    # Scales are rounded to fp32.
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    assert errors[1].sum() < errors[0].sum() or bits == 8


def test_the_mse_of_several_tensors_holds_all_their_ranges() -> None:
    together, apart = fastquant.MSEObserver(), [fastquant.MSEObserver() for _ in range(2)]
    for seed, observer in enumerate(apart):
        x = outliers(500, seed=seed)
        x[3] = float("nan")
        together(x)
        observer(x)
    assert together.min_val == min(o.min_val for o in apart)
    assert together.max_val == max(o.max_val for o in apart)
    assert int(together.nonfinite_count) == 2
    together(torch.full((3,), float("inf")))
    assert int(together.nonfinite_count) == 5
    with pytest.raises(ValueError, match="non-finite"):
        fastquant.MSEObserver(nonfinite="raise")(torch.tensor([1.0, float("nan")]))
    channels = fastquant.PerChannelMSEObserver()
    channels(torch.randn(3, 4))
    with pytest.raises(ValueError, match="one element for each of the 4 channels"):
        channels(torch.randn(4, 4))


def test_a_config_takes_mse_for_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(fastquant.QuantStub(), nn.Linear(50, 20), fastquant.DeQuantStub()).eval()
    with torch.no_grad():
        layer[1].weight.copy_(outliers(20, 50) ** 3)
    losses = []
    for method in ("minmax", "mse"):
        layer.qconfig = fastquant.get_default_qconfig(weight_range_method=method)
        prepared = fastquant.prepare(layer)
        prepared(torch.randn(200, 50))
        weight = fastquant.convert(prepared)[1].weight().dequantize()
        losses.append(float((weight - layer[1].weight.detach()).square().mean()))
    assert losses[1] < losses[0]
    with pytest.raises(QuantizationError, match="weight_range_method"):
        fastquant.get_default_qconfig(weight_range_method="l2")  # type: ignore[arg-type]


def test_fake_quantizers_observe_by_mse() -> None:
    weight = outliers(4, 100)
    fake_quantize = fastquant.FakeQuantize(
        fastquant.PerChannelMSEObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    y = fake_quantize(weight)
    observer = fastquant.PerChannelMSEObserver(
        quant_min=-8, quant_max=7, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert_same(fake_quantize.scale, scale)
    assert_same(y, F.fake_quantize(weight, scale, zero_point, ch_axis=0, quant_min=-8, quant_max=7))


# ---------------------------------------------------------------------------------------- models


def prepared_model(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        fastquant.QuantStub(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), fastquant.DeQuantStub()
    ).eval()
    model.qconfig = fastquant.get_default_qconfig(**config)
    prepared: nn.Module = fastquant.prepare(model)
    for seed in range(3):
        prepared(outliers(2000, 8, seed=seed))
    return prepared


@pytest.mark.parametrize("method", METHODS)
def test_a_model_calibrated_once_gets_the_ranges_of_any_method(method: Any) -> None:
    once, anew = prepared_model(), prepared_model(range_method=method, percentile=99)
    names = fastquant.set_range_method(once, method, 99)
    assert names == [f"{i}.activation_post_process" for i in (0, 1, 3)]
    x = outliers(10, 8)
    assert_same(fastquant.convert(once)(x), fastquant.convert(anew)(x))


def test_where_one_observer_refuses_a_method_none_is_changed() -> None:
    model = prepared_model()
    model[3].activation_post_process.dtype = torch.qint32
    model[3].activation_post_process.quant_max = 2**31 - 1
    with pytest.raises(QuantizationError, match="65536"):
        fastquant.set_range_method(model, "mse")
    assert all(m.range_method == "l2" for m in model.modules() if isinstance(m, HistogramObserver))


def test_fake_quantizers_follow_the_method() -> None:
    fake_quantize = fastquant.FakeQuantize(HistogramObserver, quant_min=0, quant_max=255)
    fake_quantize(outliers(5000))
    before = fake_quantize.scale.clone()
    fastquant.set_range_method(nn.Sequential(fake_quantize), "percentile", 90)
    assert fake_quantize.scale < before
    assert_same((fake_quantize.scale,), fake_quantize.calculate_qparams()[:1])


@pytest.mark.parametrize("cls", [HistogramObserver, PerChannelHistogramObserver])
@pytest.mark.parametrize("method", OTHERS)
def test_merged_states_have_the_range_of_the_method(cls: Any, method: Any) -> None:
    per_channel = cls is PerChannelHistogramObserver
    config = {"quant_min": 0, "quant_max": 255, "range_method": method, "percentile": 99.0}
    if per_channel:
        config |= {"qscheme": torch.per_channel_affine, "ch_axis": 1}
    parts = [fastquant.FakeQuantize(cls, **config) for _ in range(2)]
    for seed, part in enumerate(parts):
        part(outliers(500, 3, seed=seed))
    merged = fastquant.merge(*parts)
    states = [nn.ModuleDict({"activation_post_process": p}) for p in parts]
    state = fastquant.merge(*map(fastquant.get_observer_state_dict, states))
    assert_same(state["activation_post_process.scale"], merged.scale)
    assert_same(merged.scale, merged.calculate_qparams()[0])
    assert int(merged.activation_post_process.histogram.sum()) == 3000
