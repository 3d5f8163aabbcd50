"""Repairs without training: equalization, bias correction, batch norms measured anew."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
from analysis_cases import data, float_net, of, prepared_of, with_bits
from fastquant.analysis import AnalysisError, Repair, correct_bias, equalize, reestimate_batch_norm
from oracle import quiet
from zoo import QAT_QCONFIGS, STATIC_CASES, STATIC_QCONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")


def uneven(build: Callable[[], Sequence[nn.Module]]) -> nn.Module:
    """Layers behind a QuantStub; channels between the first two differ by up to 1000."""
    torch.manual_seed(0)
    model = nn.Sequential(fq.QuantStub(), *build()).eval()
    first, second, *_ = [m for m in model if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    channels = len(first.weight)
    factors = torch.logspace(-1.5, 1.5, channels)[torch.randperm(channels)]
    with torch.no_grad():
        first.weight.mul_(factors.reshape(-1, *[1] * (first.weight.dim() - 1)))
        if first.bias is not None:
            first.bias.mul_(factors)
        groups = getattr(second, "groups", 1)
        inputs = second.weight.view(groups, len(second.weight) // groups, channels // groups, -1)
        inputs.div_(factors.view(groups, 1, channels // groups, 1))
    model.qconfig = fq.default_qconfig  # weights per tensor
    return model


PAIRS: dict[str, tuple[Callable[[], Sequence[nn.Module]], tuple[int, ...]]] = {
    "convolutions": (
        lambda: (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)),
        (4, 3, 8, 8),
    ),
    "linear layers": (lambda: (nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), (32, 6)),
    "depthwise, pointwise": (
        lambda: (
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        ),
        (4, 3, 8, 8),
    ),
    "groups": (
        lambda: (nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=4)),
        (4, 3, 8, 8),
    ),
    "pooling, classifier": (
        lambda: (
            nn.Conv1d(3, 16, 3, bias=False), nn.LeakyReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
            nn.Linear(16, 4),
        ),
        (4, 3, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_equalized_models_compute_the_same_and_are_quantized_better(name: str) -> None:
    build, shape = PAIRS[name]
    model = uneven(build)
    before = copy.deepcopy(model.state_dict())
    inputs = [torch.randn(shape) for _ in range(2)]
    with quiet():
        repair = equalize(model, inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(repair.model(inputs[0]), model(inputs[0]), rtol=1e-4, atol=1e-5)
    assert repair.changed[0] == "1"
    assert len(repair.changed) == (2 if name == "depthwise, pointwise" else 1)
    assert repair.after > repair.before + 6
    first, second = [m for m in repair.model if hasattr(m, "weight")][:2]
    if name in ("convolutions", "linear layers"):
        inputs_of_second = second.weight.abs().transpose(0, 1).flatten(1).amax(1)
        assert torch.allclose(first.weight.abs().flatten(1).amax(1), inputs_of_second, rtol=1e-3)


def test_fused_layers_are_equalized() -> None:
    def build() -> Sequence[nn.Module]:
        return nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)

    model = fq.fuse_modules(uneven(build), ["1", "2", "3"])
    with quiet():
        repair = equalize(model, [torch.randn(4, 3, 8, 8)])
    assert repair.changed == ("1",)
    assert repair.after > repair.before + 6


class Branching(nn.Module):
    """The first layer's output goes to two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) + x


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 4)),
        (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)),
        (nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)),
        (nn.Linear(4, 4),),
        (nn.Identity(), Branching()),
    ],
    ids=["ReLU6", "batch norm", "Sigmoid", "one layer", "branch"],
)
def test_what_factors_do_not_pass_is_not_equalized(layers: tuple[nn.Module, ...]) -> None:
    model = nn.Sequential(*layers).eval()
    model.qconfig = fq.default_qconfig
    with pytest.raises(AnalysisError, match="no two layers that only ReLU"):
        equalize(model, [torch.randn(2, 4)])


def test_models_that_cannot_be_equalized_are_refused_in_words() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if x.sum() > 0 else x

    model: nn.Module = Dynamic().eval()
    with pytest.raises(AnalysisError, match="needs a qconfig"):
        equalize(model, [torch.randn(2, 4)])
    model.qconfig = fq.default_qconfig
    with pytest.raises(AnalysisError, match=r"torch\.fx cannot trace the model"):
        equalize(model, [torch.randn(2, 4)])

    class Peeking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self[1].weight.abs().mean()

    model = Peeking(fq.QuantStub(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model.qconfig = fq.default_qconfig
    with torch.no_grad():
        model[1].weight[0] *= 100
    with pytest.raises(AnalysisError, match="does not compute what the model does"):
        equalize(model, [torch.randn(2, 4)])
    with pytest.raises(TypeError, match=r"float_model must be a torch\.nn\.Module"):
        equalize(3, [torch.randn(2, 4)])  # type: ignore[arg-type]


# --- bias correction --------------------------------------------------------------------------


def biased(net: Any) -> None:
    for name in ("conv1", "conv2", "conv3", "fc"):
        getattr(net, name).qconfig = fq.QConfig(fq.HistogramObserver, with_bits(3).weight)


def positive() -> list[Tensor]:
    """Inputs whose mean is far from 0, so that rounded weights shift outputs."""
    return [batch.abs() + 1 for batch in data()]


def prepared_net(configure: Any = biased) -> nn.Module:
    model = copy.deepcopy(float_net())
    model.qconfig = fq.get_default_qconfig("qnnpack")
    configure(model)
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, positive(), progress=False)
    return prepared


def corrected(prepared: nn.Module) -> Repair:
    with quiet():
        return correct_bias(float_net(), prepared, positive(), progress=False)


def test_corrected_biases_bring_the_output_closer() -> None:
    prepared = prepared_net()
    before = copy.deepcopy(prepared.state_dict())
    repair = corrected(prepared)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
    assert repair.changed == ("conv1", "conv2", "conv3", "fc")
    assert repair.after > repair.before + 6
    # What an analysis of the repaired model finds.
    assert of(float_net(), repair.model, positive()).sqnr == pytest.approx(repair.after, abs=1.5)


def test_corrected_channels_have_the_means_of_the_float_model() -> None:
    repair = corrected(prepared_net())
    again = corrected(repair.model)
    # Its layers before are rounded alike, so there is nothing left to correct in the first one.
    first, second = repair.model.get_submodule("conv1"), again.model.get_submodule("conv1")
    assert torch.allclose(first.bias, second.bias, atol=1e-5)
    assert not torch.allclose(first.bias, float_net().conv1.bias, atol=1e-4)


def test_corrected_models_convert() -> None:
    repair = corrected(prepared_net())
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = fq.convert(repair.model)
    assert of(float_net(), converted, positive()).sqnr > repair.before + 3


def test_layers_without_a_bias_get_one() -> None:
    layers = (nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    model = nn.Sequential(fq.QuantStub(), *layers).eval()
    inputs = [torch.rand(32, 6) + 1]
    configured = copy.deepcopy(model)
    configured.qconfig = fq.QConfig(fq.HistogramObserver, with_bits(3).weight)
    with quiet():
        prepared = fq.prepare(configured)
        prepared(inputs[0])
        repair = correct_bias(model, prepared, inputs, progress=False)
        converted: Any = fq.convert(repair.model)
    assert prepared[1].bias is None
    assert converted[1].bias().abs().max() > 0
    assert repair.after > repair.before + 3


@pytest.mark.parametrize("name", ["conv_net", "residual", "transposed", "nested", "conv1d"])
def test_biases_of_every_kind_of_layer_are_corrected(name: str) -> None:
    case = STATIC_CASES[name]
    prepared = case.calibrated(fq, STATIC_QCONFIGS["minmax"], fuse=bool(case.fusable))
    inputs = [case.inputs(seed)[0] for seed in range(3)]
    with quiet():
        repair = correct_bias(case.make(fq), prepared, inputs, progress=False)
    assert repair.changed
    assert repair.after > repair.before - 1


def test_biases_of_other_models_are_refused() -> None:
    model = float_net()
    with quiet():
        converted = fq.convert(prepared_of(model))
    trained = STATIC_CASES["conv_net"]
    qat = trained.trained(fq, QAT_QCONFIGS["x86"], fuse=True)
    pairs = [(model, converted, data()), (trained.make(fq), qat, [trained.inputs(0)[0]])]
    for float_model, quantized, inputs in pairs:
        with pytest.raises(AnalysisError, match="needs a model that was prepared for calibration"):
            correct_bias(float_model, quantized, inputs, progress=False)


# --- batch norm -------------------------------------------------------------------------------


class Normed(nn.Module):
    """A batch norm that stands alone behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = fq.QuantStub()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.quant(x)))


def test_batch_norms_are_measured_anew_behind_quantized_layers() -> None:
    torch.manual_seed(0)
    model = Normed()
    inputs = positive()
    with torch.no_grad():
        for _ in range(60):
            model(inputs[0])
    model.eval()
    configured = copy.deepcopy(model)
    configured.qconfig = fq.QConfig(fq.HistogramObserver, with_bits(3).weight)
    with quiet():
        prepared: Any = fq.prepare(configured)
        fq.calibrate(prepared, inputs, progress=False)
        before = copy.deepcopy(prepared.state_dict())
        repair = reestimate_batch_norm(model, prepared, inputs)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
    assert repair.changed == ("norm",)
    assert repair.after > repair.before + 3
    norm: Any = repair.model.get_submodule("norm")
    assert norm.momentum == 0.1
    assert not norm.training


def test_batch_norms_of_qat_blocks_are_measured_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    inputs = positive()
    with torch.no_grad():
        for _ in range(60):
            model(inputs[0])
    qat: Any = fq.fuse_modules_qat(
        nn.Sequential(fq.QuantStub(), copy.deepcopy(model)), ["1.0", "1.1", "1.2"]
    )
    float_model = nn.Sequential(fq.QuantStub(), model).eval()
    qat.train().qconfig = fq.get_default_qat_qconfig("qnnpack")
    with quiet():
        qat = fq.prepare_qat(qat)
        qat(inputs[0])
        qat[1][0].bn.running_mean += 2.0
        qat.eval()
        repair = reestimate_batch_norm(float_model, qat, inputs)
    assert repair.changed == ("1.0.bn",)
    assert repair.after > repair.before + 6


def test_models_without_batch_norms_of_their_own_are_refused() -> None:
    model = float_net()
    prepared = prepared_of(model)
    with pytest.raises(AnalysisError, match="no batch norm of its own"):
        reestimate_batch_norm(model, prepared, data())
    with quiet():
        converted = fq.convert(prepared)
    with pytest.raises(AnalysisError, match="needs a prepared model"):
        reestimate_batch_norm(model, converted, data())


def test_a_batch_norm_that_differs_between_the_models_is_seen() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    configured = copy.deepcopy(model)
    configured.qconfig = fq.default_qconfig
    with quiet():
        prepared: Any = fq.prepare(configured)
        fq.calibrate(prepared, data(), progress=False)
        prepared.norm.running_mean += 0.5
    assert of(model, prepared, data()).ranked()[0].name == "norm"
