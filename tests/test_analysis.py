"""What `fastquant.analysis.analyze` measures, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
from analysis_cases import QCONFIG, data, float_net, of, prepared_of, with_bits
from fastquant.analysis import Analysis, AnalysisError, analyze, search
from oracle import quiet
from zoo import QAT_QCONFIGS, STATIC_CASES, STATIC_QCONFIGS, Case, Residual, Stubbed

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(case: Case) -> list[Tensor]:
    return [case.inputs(seed)[0] for seed in range(3)]


# --- of every kind of model -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prepared", "converted", "native"])
@pytest.mark.parametrize("name", STATIC_CASES)
def test_every_kind_of_layer_is_measured(name: str, how: str) -> None:
    case = STATIC_CASES[name]
    quantized = case.calibrated(fq, STATIC_QCONFIGS["minmax"], fuse=bool(case.fusable))
    with quiet():
        if how == "converted":
            quantized = fq.convert(quantized)
        elif how == "native":
            quantized = fq.convert(quantized, backend="native")
    analysis = of(case.make(fq), quantized, batches(case))
    assert analysis.layers
    # torch's transposed convolutions give wrong numbers on some machines, as convert warns.
    is_right = (name, how) != ("transposed", "converted")
    for layer in analysis:
        assert layer.calls > 0
        assert layer.output is not None
        assert layer.output.sqnr > 15, layer.name
        assert layer.output.accumulated_sqnr > 15 or not is_right, layer.name
        assert layer.sensitivity is not None
        if layer.weight is not None:
            assert layer.weight.sqnr > 25
            assert layer.weight.bits == 8
    assert analysis.sqnr > 20 or not is_right


@pytest.mark.parametrize("name", [n for n, case in STATIC_CASES.items() if case.trains])
def test_models_of_qat_are_measured(name: str) -> None:
    case = STATIC_CASES[name]
    trained = case.trained(fq, QAT_QCONFIGS["x86"], fuse=bool(case.fusable))
    with quiet():
        converted = fq.convert(trained)
    pair = [of(case.make(fq), model, batches(case)) for model in (trained, converted)]
    assert pair[0].sqnr == pytest.approx(pair[1].sqnr, abs=4.5)
    for layer in pair[1]:
        if layer.name in {other.name for other in pair[0]} and layer.weight is not None:
            assert layer.weight.sqnr == pytest.approx(pair[0][layer.name].weight.sqnr, abs=0.5)


@pytest.mark.parametrize("name", [*STATIC_CASES, "pooling"])
def test_a_report_on_a_prepared_model_shows_what_the_converted_one_does(name: str) -> None:
    if name == "pooling":
        model, prepared, inputs = float_net(), prepared_of(float_net()), data()
    else:
        case = STATIC_CASES[name]
        model, inputs = case.make(fq), batches(case)
        prepared = case.calibrated(fq, STATIC_QCONFIGS["minmax"], fuse=bool(case.fusable))
    with quiet():
        converted = fq.convert(prepared, backend="native")
    before, after = (of(model, quantized, inputs) for quantized in (prepared, converted))
    # The float model of an observed LSTM adds up in another order than torch's.
    assert before.sqnr == pytest.approx(after.sqnr, abs=1e-3)
    for layer in after:
        found = before[layer.name].output
        assert found.accumulated_sqnr == pytest.approx(layer.output.accumulated_sqnr, abs=1e-3)
        assert found.sqnr == pytest.approx(layer.output.sqnr, abs=0.01)


class Between(nn.Module):
    """Two convolutions, with a function of torch between the second and the end."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.conv(self.quant(x)))
        return self.dequant(x).exp()


def relu_in_place(x: Tensor) -> Tensor:
    nn.functional.relu_(x)
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg_pool": lambda x: nn.functional.avg_pool2d(x, 3),
    "adaptive": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "interpolate": lambda x: nn.functional.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "moved, then pooled": lambda x: x.permute(0, 2, 3, 1).mean(3).unsqueeze(1),
    "parts": lambda x: torch.cat([part.mean(2) for part in x.chunk(2, 1)], 1),
    "sigmoid": torch.sigmoid,
    "hardtanh": lambda x: nn.functional.hardtanh(x, -0.305, 0.305),
    "in place": lambda x: relu_in_place(x).mean((2, 3)),
    "padded": lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=0.123),
    "module": nn.Sequential(nn.AvgPool2d(2), nn.GELU()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers_round_in_the_simulation_as_when_converted(name: str) -> None:
    torch.manual_seed(0)
    model = Between(FUNCTIONS[name]).eval()
    model.qconfig = QCONFIG
    if name == "module":
        model.function.qconfig = None
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, data(), progress=False)
        converted = fq.convert(prepared, backend="native")
        # What is searched is simulated.
        simulated = search(model, prepared, data(), -100.0, progress=False).score
    assert simulated == pytest.approx(of(model, converted, data()).sqnr, abs=0.05)


def test_the_metric_of_a_prepared_model_is_that_of_the_converted_one() -> None:
    classes: list[str] = []

    def metric(model: Any) -> float:
        classes.append(type(model.conv1).__module__)
        return 1.0

    of(float_net(), prepared_of(float_net()), data(), metric=metric, sensitivity=False)
    assert "quantized" in classes[-1]


class Adding(nn.Module):
    """Adds quantized tensors without a FloatFunctional, which only a prepared model can."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.linear, self.dequant = fq.QuantStub(), nn.Linear(6, 6), fq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(x + self.linear(x))


def test_a_prepared_model_whose_converted_one_fails_is_simulated_with_a_note() -> None:
    model = Adding().eval()
    model.qconfig = QCONFIG
    inputs = [torch.randn(8, 6) for _ in range(3)]
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, inputs, progress=False)
    analysis = of(model, prepared, inputs)
    assert any("converted model could not be run" in note for note in analysis.notes)
    assert 30 < analysis.sqnr < 60
    assert [layer.name for layer in analysis] == ["quant", "linear"]
    assert all(30 < layer.output.accumulated_sqnr < 60 for layer in analysis)


class Fixed(nn.Module):
    """Takes batches of one size, and its second layer sees only large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.first, self.relu1 = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.second, self.relu2 = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.first(self.quant(x)))
        if len(x) > 1:
            x = self.relu2(self.second(x))
        return self.dequant(x).reshape(4, -1)


def test_unfused_models_may_need_whole_batches() -> None:
    model = Fixed().eval()
    fused = fq.fuse_modules(model, [["first", "relu1"], ["second", "relu2"]])
    analysis = of(model, prepared_of(fused), data())
    assert [layer.name for layer in analysis] == ["quant", "first", "second"]
    assert analysis.sqnr > 30


def test_models_that_torch_ao_prepared_and_converted_are_measured() -> None:
    import torch.ao.quantization as tq

    model = float_net()
    configured = copy.deepcopy(model)
    with quiet():
        configured.qconfig = tq.get_default_qconfig("fbgemm")
        prepared = tq.prepare(configured)
        for batch in data():
            prepared(batch)
        converted = tq.convert(prepared)
    for quantized in (prepared, converted):
        analysis = of(model, quantized, data())
        assert [layer.name for layer in analysis] == ["quant", "conv1", "conv2", "conv3", "fc"]
        assert analysis.sqnr > 20


def test_dynamic_models_are_measured() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with quiet():
        quantized = fq.quantize_dynamic(model)
    analysis = of(model, quantized, [torch.randn(8, 6) for _ in range(3)])
    assert [layer.name for layer in analysis] == ["0", "2"]
    assert all(layer.weight.sqnr > 30 and layer.output.sqnr > 30 for layer in analysis)
    assert analysis.sqnr > 30


def test_the_models_stay_as_they_are() -> None:
    model = float_net().train()
    prepared = prepared_of(model)
    states = [copy.deepcopy(m.state_dict()) for m in (model, prepared)]
    training = [m.training for m in model.modules()]
    of(model, prepared, data(), metric=lambda m: 1.0)
    for m, state in zip((model, prepared), states, strict=True):
        assert m.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items())
    assert [m.training for m in model.modules()] == training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_parametrized_model_stays_as_it_is() -> None:
    case = STATIC_CASES["parametrized"]
    model = case.make(fq)
    expected = model(batches(case)[0])
    prepared = case.calibrated(fq, STATIC_QCONFIGS["minmax"])
    of(model, prepared, batches(case), sensitivity=False)
    assert torch.equal(model(batches(case)[0]), expected)


def test_layers_that_change_their_input_in_place_are_measured() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    model.eval().qconfig = fq.default_qconfig
    inputs = [torch.randn(16, 6) for _ in range(4)]
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, inputs, progress=False)
    analysis = of(model, prepared, inputs)
    assert analysis["1"].output.low < 0
    assert analysis["1"].output.accumulated_sqnr > 25


# --- the numbers ------------------------------------------------------------------------------


def sqnr(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def test_the_measures_of_a_layer_are_what_their_names_say() -> None:
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.bias[1] = 0.25
    model = nn.Sequential(fq.QuantStub(), linear).eval()
    model.qconfig = fq.default_qconfig
    inputs = [torch.randn(64, 8)]
    with quiet():
        prepared = fq.prepare(model)
        prepared(inputs[0] / 2)  # what comes later is clipped
    layer = of(model, prepared, inputs)["1"]

    observer = fq.default_weight_observer()
    observer(linear.weight)
    scale, zero_point = observer.calculate_qparams()
    weight = torch.fake_quantize_per_tensor_affine(
        linear.weight, float(scale), int(zero_point), -128, 127
    )
    assert layer.weight.sqnr == pytest.approx(sqnr(linear.weight, weight), abs=1e-3)
    assert layer.weight.scale == (float(scale), float(scale))
    assert layer.weight.dead_channels == 1
    assert layer.weight.levels_used == (weight / scale).round().unique().numel() / 256
    assert layer.weight.channel_low == tuple(linear.weight.amin(1).tolist())

    scale, zero_point = prepared[1].activation_post_process.calculate_qparams()
    scale, zero_point = float(scale), int(zero_point)
    exact = linear(inputs[0])
    low, high = (0 - zero_point) * scale, (255 - zero_point) * scale  # with reduce_range: the dtype
    out = torch.fake_quantize_per_tensor_affine(
        nn.functional.linear(inputs[0], weight, linear.bias), scale, zero_point, 0, 255
    )
    output = layer.output
    assert output.sqnr == pytest.approx(sqnr(exact, out), abs=1e-3)
    cosine = nn.functional.cosine_similarity(exact.flatten(), out.flatten(), 0)
    assert output.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert (output.scale, output.zero_point) == (scale, zero_point)
    assert (output.clip_low, output.clip_high) == pytest.approx((low, high))
    outside = (exact < low - scale / 2) | (exact > high + scale / 2)
    assert output.clipped_share == pytest.approx(float(outside.float().mean()))
    used = ((exact / scale).round() + zero_point).clamp(0, 255).unique().numel()
    assert output.levels_used == used / 256
    assert (output.low, output.high) == (float(exact.min()), float(exact.max()))
    assert (output.channels, output.dead_channels) == (4, 1)
    assert sum(output.histogram) == exact.numel()


def test_errors_of_large_outputs_are_summed_accurately() -> None:
    """As fp32 sums of so many squares, they would be off by more than 1e-4 of themselves."""
    model = nn.Sequential(fq.QuantStub(), fq.DeQuantStub())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1_234_567, generator=generator)
    configured = copy.deepcopy(model)
    configured.qconfig = QCONFIG
    with quiet():
        prepared = fq.prepare(configured)
        prepared(x)
    output = of(model, prepared, [x], sensitivity=False, timing=False)["0"].output
    levels = ((x / output.scale).round() + output.zero_point).clamp(0, 255)
    rounded = (levels.double() - output.zero_point) * output.scale
    assert output.sqnr == pytest.approx(sqnr(x, rounded), abs=2e-5)


def test_a_range_that_is_too_narrow_shows_as_clipping() -> None:
    model = float_net()
    prepared = prepared_of(model)
    observer: Any = prepared.conv2.activation_post_process
    observer.histogram.zero_()
    observer.reset_min_max_vals()
    prepared.conv2(torch.zeros(1, 8, 4, 4))
    analysis = of(model, prepared, data())
    assert analysis["conv2"].output.clipped_share > 0.05
    assert analysis["conv1"].output.clipped_share < 0.05


def test_channels_that_quantization_makes_constant_are_counted() -> None:
    conv = nn.Conv2d(1, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 1e-4, 0.0]).reshape(3, 1, 1, 1))
    model = nn.Sequential(fq.QuantStub(), conv).eval()
    model.qconfig = QCONFIG
    inputs = [torch.rand(4, 1, 6, 6)]
    with quiet():
        prepared = fq.prepare(model)
        prepared(inputs[0])
    output = of(model, prepared, inputs)["1"].output
    assert (output.channels, output.dead_channels, output.lost_channels) == (3, 1, 1)


def test_nonfinite_values_are_counted_and_left_out() -> None:
    model = float_net()
    prepared = prepared_of(model)
    spoilt = data()
    spoilt[0][0, 0, 0, 0] = math.nan
    spoilt[0][0, 0, 0, 1] = math.inf
    analysis = of(model, prepared, spoilt)
    assert analysis["quant"].output.nonfinite == 2
    assert analysis["quant"].output.sqnr > 30


def test_error_accumulates_from_layer_to_layer() -> None:
    analysis = of(float_net(), prepared_of(float_net()), data())
    first, last = analysis["quant"].output, analysis["conv3"].output
    assert first.sqnr == first.accumulated_sqnr
    assert last.accumulated_sqnr < last.sqnr - 1


def test_layers_that_share_a_weight_are_quantized_one_by_one() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[2].weight = model[1].weight
    model.qconfig = fq.default_qconfig
    inputs = [torch.randn(8, 6)]
    with quiet():
        prepared = fq.prepare(model)
        prepared(inputs[0])
    analysis = of(model, prepared, inputs)
    alone = {layer.name: layer.sensitivity.only_sqnr for layer in analysis}
    assert alone["1"] != alone["2"]


def test_a_module_called_twice_counts_both_calls() -> None:
    case = STATIC_CASES["nested"]
    prepared = case.calibrated(fq, STATIC_QCONFIGS["minmax"])
    analysis = of(case.make(fq), prepared, batches(case))
    assert analysis["body.heads.0"].calls == 2
    assert analysis["body.heads.1"].calls == 1


# --- sensitivity ------------------------------------------------------------------------------


def test_sensitivity_of_one_layer_is_that_of_the_model_with_it_alone_quantized() -> None:
    model = float_net()

    def configure(net: Any) -> None:
        net.conv2.qconfig = with_bits(3)

    def only(net: Any) -> None:
        for name, child in net.named_children():
            child.qconfig = with_bits(3) if name == "conv2" else None

    def all_but(net: Any) -> None:
        net.conv2.qconfig = None

    sensitivity = of(model, prepared_of(model, configure), data())["conv2"].sensitivity
    assert of(model, prepared_of(model, only), data()[:1]).sqnr == pytest.approx(
        sensitivity.only_sqnr, abs=1e-3
    )
    # Its input came from quantized layers, where only its own observer makes a difference.
    assert of(model, prepared_of(model, all_but), data()[:1]).sqnr == pytest.approx(
        sensitivity.without_sqnr, abs=1e-3
    )


def test_the_metric_is_measured_for_every_layer() -> None:
    model = float_net()
    inputs = torch.cat(data())
    target = model(inputs)

    def likeness(net: nn.Module) -> Tensor:
        assert not net.training
        return 1 - (net(inputs) - target).square().mean()

    def configure(net: Any) -> None:
        net.conv2.qconfig = with_bits(1)

    analysis = of(model, prepared_of(model, configure), data(), metric=likeness)
    assert analysis.float_metric == 1
    scores = {layer.name: layer.sensitivity for layer in analysis}
    assert scores["conv2"].only_metric == min(s.only_metric for s in scores.values()) < 1
    assert scores["conv2"].without_metric == max(s.without_metric for s in scores.values())


def test_sensitivity_takes_two_forwards_for_each_layer() -> None:
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch)

    def count(**options: Any) -> int:
        nonlocal calls
        calls = 0
        analysis = of(model, prepared, data(), forward=forward, timing=False, **options)
        layers = len(analysis.layers)
        assert layers == 5
        return calls

    model = float_net()
    prepared = prepared_of(model)
    cheap = count(sensitivity=False)
    # One in float for each batch; one quantized for every third.
    assert cheap == 3 + 1
    # And one in float, to compare with, and one quantized.
    assert count(sensitivity=True) == cheap + 2 * 5 + 2


class Reusing(nn.Module):
    """Calls a layer twice, changes outputs in place, and adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.first, self.twice, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.functional = fq.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.quant(x)).clamp_(-1, 1)
        y = self.twice(x).mul_(0.5)
        y = self.functional.add(self.twice(y), x)
        return self.dequant(self.last(y))


def test_sensitivity_is_that_of_every_layer_alone_and_of_all_but_it() -> None:
    torch.manual_seed(0)
    model, batch = Reusing().eval(), torch.randn(16, 6)
    names = ("quant", "first", "twice", "functional", "last")

    def prepared(quantized: Collection[str]) -> Any:
        net: Any = copy.deepcopy(model)
        for name in names:
            getattr(net, name).qconfig = with_bits(3) if name in quantized else None
        observed = fq.prepare(net)
        observed(batch)
        return observed

    analysis = of(model, prepared(names), [batch])
    for name in names:
        sensitivity = analysis[name].sensitivity
        others = set(names) - {name}
        for kept, found in (({name}, sensitivity.only_sqnr), (others, sensitivity.without_sqnr)):
            expected = of(model, prepared(kept), [batch], sensitivity=False).sqnr
            assert found == pytest.approx(expected, abs=1e-3), name


def test_progress_is_shown_on_stderr_only_where_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = float_net()
    prepared = prepared_of(model)
    of(model, prepared, data())
    assert capsys.readouterr() == ("", "")
    with quiet():
        analyze(model, prepared, data())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "measuring" in shown.err
    assert "sensitivity" in shown.err


# --- spoilt layers ----------------------------------------------------------------------------


def scale_channel(net: Any) -> None:
    """One channel of conv2 is huge, and the next layer scales it back: the function stays."""
    with torch.no_grad():
        net.conv2.weight[3] *= 300
        net.conv2.bias[3] *= 300
        net.conv3.weight[:, 3] /= 300


def two_bits(net: Any) -> None:
    net.conv2.qconfig = with_bits(2)


def coarse_activation(net: Any) -> None:
    net.conv2.qconfig = fq.QConfig(
        fq.MinMaxObserver.with_args(quant_min=0, quant_max=3), QCONFIG.weight
    )


def coarse_weight(net: Any) -> None:
    net.conv2.qconfig = fq.QConfig(QCONFIG.activation, with_bits(2).weight)


def wrong_observer(net: Any) -> None:
    """A fixed range where the values are not."""
    net.conv2.qconfig = fq.QConfig(
        fq.FixedQParamsObserver.with_args(scale=4.0, zero_point=0), QCONFIG.weight
    )


def per_tensor_outlier(net: Any) -> None:
    """One weight of a layer quantized per tensor is far off."""
    net.conv2.qconfig = fq.QConfig(QCONFIG.activation, fq.default_weight_observer)


def shift_bias(prepared: Any) -> None:
    with torch.no_grad():
        prepared.conv2.bias += 1.0


def saturate(prepared: Any) -> None:
    observer = prepared.conv2.activation_post_process
    observer.reset_min_max_vals()
    observer(torch.linspace(-0.02, 0.02, 100))


def widen(prepared: Any) -> None:
    prepared.conv2.activation_post_process(torch.tensor([-500.0, 500.0]))
    prepared.conv2.activation_post_process = as_minmax(-500.0, 500.0)


def as_minmax(low: float, high: float) -> nn.Module:
    observer = fq.MinMaxObserver()
    observer(torch.tensor([low, high]))
    return observer


def shuffle_weight(prepared: Any) -> None:
    with torch.no_grad():
        prepared.conv2.weight.copy_(prepared.conv2.weight.flip(0))


def spoil_float(net: Any) -> None:
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = 40.0


Change = Callable[[Any], object]
NOTHING: Change = lambda model: None  # noqa: E731

# What is done to both models before prepare; to the configs; to the prepared model.
SPOILT: dict[str, tuple[Change, Change, Change]] = {
    "huge outlier channel": (scale_channel, NOTHING, NOTHING),
    "two bits": (NOTHING, two_bits, NOTHING),
    "two bits of activations": (NOTHING, coarse_activation, NOTHING),
    "two bits of weights": (NOTHING, coarse_weight, NOTHING),
    "wrong observer": (NOTHING, wrong_observer, NOTHING),
    "outlier weight, one scale": (spoil_float, per_tensor_outlier, NOTHING),
    "bias off by a constant": (NOTHING, NOTHING, shift_bias),
    "saturating range": (NOTHING, NOTHING, saturate),
    "range much too wide": (NOTHING, NOTHING, widen),
    "channels mixed up": (NOTHING, NOTHING, shuffle_weight),
}


@pytest.mark.parametrize("converts", [False, True], ids=["prepared", "converted"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_spoilt_layer_ranks_first(spoilt: str, converts: bool) -> None:
    change_float, configure, change_prepared = SPOILT[spoilt]
    model = float_net()
    change_float(model)
    prepared = prepared_of(model, configure)
    with quiet():
        change_prepared(prepared)
    if converts:
        if "two bits" in spoilt and spoilt != "two bits of weights":
            pytest.skip("converted layers have eight bits of activations, whatever was prepared")
        with quiet():
            prepared = fq.convert(prepared)
    analysis = of(model, prepared, data())
    ranked = [layer.name for layer in analysis.ranked()]
    assert ranked[0] == "conv2", [(layer.name, layer.damage) for layer in analysis.ranked()]
    assert "conv2" in str(analysis).splitlines()[3]


# --- bad input --------------------------------------------------------------------------------


def models() -> tuple[nn.Module, nn.Module]:
    model = float_net()
    return model, prepared_of(model)


def test_no_data_is_an_error() -> None:
    with pytest.raises(AnalysisError, match="data is empty"):
        of(*models(), [])
    with pytest.raises(TypeError, match=r"pass a list: \[batch\]"):
        of(*models(), data()[0])


def test_a_model_that_was_not_prepared_is_an_error() -> None:
    model = float_net()
    with pytest.raises(AnalysisError, match=r"Net.*has no quantized layer.*fastquant\.prepare"):
        of(model, model, data())
    with pytest.raises(TypeError, match=r"quantized must be a torch\.nn\.Module, got int"):
        of(model, 3, data())  # type: ignore[arg-type]


def test_models_in_the_wrong_order_are_an_error() -> None:
    model, prepared = models()
    with pytest.raises(AnalysisError, match="float_model has observers"):
        of(prepared, model, data())


def test_a_model_that_was_not_calibrated_is_an_error() -> None:
    model = float_net()
    configured = copy.deepcopy(model)
    configured.qconfig = QCONFIG
    with pytest.raises(AnalysisError, match=r"have seen no data: quant, conv1, conv2, conv3, fc"):
        of(model, fq.prepare(configured), data())


class Branched(nn.Module):
    """Calls `rare` only for inputs whose first element is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = fq.QuantStub()
        self.usual = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.usual(self.quant(x))


def test_layers_that_data_never_reaches_are_named() -> None:
    class Reaching(Branched):
        reach = True

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return self.rare(x) if Reaching.reach else x

    model = Reaching().eval()
    model.qconfig = fq.default_qconfig
    with quiet():
        prepared = fq.prepare(model)
        prepared(torch.randn(2, 4))
    Reaching.reach = False
    with pytest.raises(AnalysisError, match="data never reached these layers: rare"):
        of(model, prepared, [torch.randn(2, 4)])


@pytest.mark.parametrize("value", [None, "0.9", [0.9, 0.8], math.nan, torch.ones(2)])
def test_a_metric_that_returns_no_number_is_an_error(value: Any) -> None:
    with pytest.raises(AnalysisError, match=r"metric must return a number, and returned"):
        of(*models(), data(), metric=lambda model: value)
    with pytest.raises(TypeError, match="metric must be callable"):
        of(*models(), data(), metric=0.9)


def test_weights_of_different_shapes_are_an_error_that_names_the_layer() -> None:
    model, prepared = models()
    model.conv2 = nn.Conv2d(8, 8, 5, padding=2)
    with pytest.raises(AnalysisError, match=r"weight of conv2 .*\[8, 8, 3, 3\].*\[8, 8, 5, 5\]"):
        of(model, prepared, data())


def test_layers_that_the_float_model_lacks_are_named() -> None:
    model, prepared = models()
    model.head = model.fc
    del model.fc
    with pytest.raises(AnalysisError, match="float model has no fc"):
        of(model, prepared, data())


def test_outputs_of_different_shapes_are_an_error() -> None:
    model, prepared = models()
    with quiet():
        converted = fq.convert(prepared)

    def forward(net: nn.Module, batch: Tensor) -> Tensor:
        out = net(batch)
        return out[:2] if type(net.conv1) is not nn.Conv2d else out

    with pytest.raises(AnalysisError, match=r"output of the model has the shape \[4, 5\].*\[2, 5"):
        of(model, converted, data(), forward=forward)


def test_outputs_without_floating_tensors_are_an_error() -> None:
    with pytest.raises(AnalysisError, match="holds no floating tensor"):
        of(*models(), data(), forward=lambda model, batch: model(batch).argmax(1))


@pytest.mark.parametrize("name", ["batches", "sensitivity_batches"])
def test_numbers_of_batches_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        of(*models(), data(), **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        of(*models(), data(), **{name: "all"})


# --- data -------------------------------------------------------------------------------------


def test_data_may_be_a_generator_of_which_few_batches_are_used() -> None:
    drawn = 0

    def generate() -> Iterator[tuple[Tensor, int]]:
        nonlocal drawn
        for batch in data(8):
            drawn += 1
            yield batch, 0

    analysis = of(*models(), generate(), batches=2)
    assert (analysis.batches, analysis.samples, drawn) == (2, 8, 2)


# --- what it is shown as ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.set_num_threads(1)
    model = float_net()

    def configure(net: Any) -> None:
        net.conv2.qconfig = with_bits(2)

    return of(model, prepared_of(model, configure), data(), metric=lambda net: 0.5, name="A|B")


def test_records_are_flat_and_ranked(analysis: Analysis) -> None:
    records = analysis.records()
    assert [record["rank"] for record in records] == [1, 2, 3, 4, 5]
    assert records[0]["name"] == "conv2"
    assert len({tuple(record) for record in records}) == 1
    assert records[0]["weight_bits"] == 2
    assert all(
        isinstance(value, str | int | float | tuple | None)
        for record in records
        for value in record.values()
    )


def test_json_holds_everything_and_is_strict(analysis: Analysis, tmp_path: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = tmp_path / "analysis.json"
    text = analysis.to_json(path)
    assert path.read_text() == text
    parsed = json.loads(text, parse_constant=refuse)
    assert parsed["model"] == "A|B"
    assert [layer["name"] for layer in parsed["layers"]] == [layer.name for layer in analysis]
    conv2 = next(layer for layer in parsed["layers"] if layer["name"] == "conv2")
    assert conv2["output"]["sqnr"] == analysis["conv2"].output.sqnr
    assert len(conv2["weight"]["channel_low"]) == 8


def test_markdown_is_a_table_with_the_worst_layer_first(analysis: Analysis, tmp_path: Any) -> None:
    text = analysis.to_markdown(tmp_path / "analysis.md")
    assert (tmp_path / "analysis.md").read_text() == text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert rows[2].startswith("| 1 | conv2 |")


def test_terminal_text_names_the_worst_layer_and_why(analysis: Analysis) -> None:
    text = str(analysis)
    assert text.startswith("A|B\n")
    assert "Most damage is done by conv2 (Conv2d)" in text
    assert "its weight has 2 bits" in text
    assert "Metric: 0.5 in float, 0.5 quantized" in text


def test_layers_are_found_by_name(analysis: Analysis) -> None:
    assert analysis["conv3"].name == "conv3"
    with pytest.raises(KeyError, match="no layer 'conv9' was analysed; there are quant, conv1"):
        analysis["conv9"]


def test_float_functionals_that_are_never_called_are_left_out() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stubbed(fq, Residual())
            self.inner.body.idle = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Idle().eval()
    model.qconfig = fq.default_qconfig
    inputs = [torch.randn(2, 4, 6, 6)]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = fq.prepare(model)
        prepared(inputs[0])
        for quantized in (prepared, fq.convert(prepared)):
            names = [layer.name for layer in of(model, quantized, inputs)]
            assert "inner.body.idle" not in names
            assert "inner.body.add" in names
