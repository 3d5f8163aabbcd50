"""The whole way from a float model to a quantized one, by nothing that torch.ao has.

These tests run as they are, and once more in a process whose torch has no torch.ao, no quantized
dtypes and no quantized tensors (`tests/alone`). `make test-alone` runs the whole suite like that.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.quantized as nnq
from fastquant._core.dtypes import QINT8, QUINT8
from fastquant.quantization_mappings import DEFAULT_BACKEND

HERE = Path(__file__).parent
ALONE = DEFAULT_BACKEND == "native"


def alone(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process in which there is no torch.ao."""
    paths = [str(HERE / "alone"), str(HERE)]
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "FASTQUANT_ALONE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.mark.skipif(ALONE, reason="this is the process without torch.ao")
def test_all_of_these_pass_without_torch_ao() -> None:
    run = alone("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.skipif(not ALONE, reason="torch.ao is there")
def test_torch_ao_and_quantized_dtypes_are_not_there() -> None:
    for path in ("torch.ao", "torch.quantization", "torch.nn.quantized"):
        with pytest.raises(ImportError):
            importlib.import_module(path)
    found = {name for name in ("quint8", "qint8", "quantize_per_tensor") if name in vars(torch)}
    assert not found
    # Nor does fastquant have anything of it.
    assert not [name for name in sys.modules if name.startswith("torch.ao")]


class Net(nn.Module):
    """Convolutions with batch norm, a sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.plus = nnq.FloatFunctional()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.pool(self.plus.add(x, self.second(x)))
        return self.dequant(self.last(x.flatten(1)))


BATCH = (8, 3, 12, 12)


def calibrated(qconfig: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused float model, the same prepared and calibrated, and data."""
    torch.manual_seed(0)
    model = fq.fuse_modules(Net().eval(), ["conv", "bn", "relu"])
    model.qconfig = qconfig
    prepared = fq.prepare(model)
    x = torch.randn(BATCH)
    fq.calibrate(prepared, [x], progress=False)
    return model, prepared, x


def noise(a: Tensor, b: Tensor) -> float:
    """How large the difference is, compared with `b`."""
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_a_calibrated_model_becomes_int8() -> None:
    model, prepared, x = calibrated(fq.get_default_qconfig("x86"))
    quantized = fq.convert(prepared, backend="native")
    assert type(quantized.conv).__module__.startswith("fastquant.")
    assert noise(quantized(x), model(x)) < 0.1
    if ALONE:
        assert torch.equal(fq.convert(prepared)(x), quantized(x))


@torch.no_grad()
def test_a_qconfig_names_plain_dtypes() -> None:
    outputs = []
    for u8, s8 in ((torch.uint8, torch.int8), (QUINT8, QINT8)):
        qconfig = fq.QConfig(
            fq.HistogramObserver.with_args(dtype=u8),
            fq.PerChannelMinMaxObserver.with_args(dtype=s8, qscheme=torch.per_channel_symmetric),
        )
        _, prepared, x = calibrated(qconfig)
        outputs.append([fq.convert(prepared, backend="native")(x), fq.convert(prepared)(x)])
    for plain, quantized in zip(*outputs, strict=True):
        assert torch.equal(plain, quantized)


def test_a_model_is_trained_and_becomes_int8() -> None:
    torch.manual_seed(0)
    model = fq.fuse_modules_qat(Net().train(), ["conv", "bn", "relu"])
    model.qconfig = fq.get_default_qat_qconfig("x86")
    prepared = fq.prepare_qat(model)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    x, wanted = torch.randn(BATCH), torch.randn(8, 5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (prepared(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    prepared.apply(fq.disable_observer)
    prepared.eval()
    with torch.no_grad():
        quantized = fq.convert(prepared, backend="native")
        assert noise(quantized(x), prepared(x)) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("layer", ["linear", "lstm", "gru"])
def test_dynamic_layers(layer: str) -> None:
    torch.manual_seed(0)
    made: nn.Module = {"linear": nn.Linear, "lstm": nn.LSTM, "gru": nn.GRU}[layer](16, 16)
    model = nn.Sequential(made).eval()
    x = torch.randn(5, 3, 16)
    quantized = fq.quantize_dynamic(model, backend="native")
    expected, found = model(x), quantized(x)
    if layer != "linear":
        expected, found = expected[0], found[0]
    assert type(quantized[0]) is not type(made)
    assert 0 < noise(found, expected) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.LSTM, nn.MultiheadAttention])
def test_modules_made_of_layers(layer: Any) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
            self.body = layer(8, 8) if layer is nn.LSTM else layer(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            outputs = self.body(x) if layer is nn.LSTM else self.body(x, x, x)
            return self.dequant(outputs[0])

    torch.manual_seed(0)
    model = Around().eval()
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    x = torch.randn(6, 2, 8)
    prepared(x)
    quantized = fq.convert(prepared, backend="native")
    assert noise(quantized(x), model(x)) < 0.3


@torch.no_grad()
def test_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16)).eval()
    indices = torch.randint(50, (7,))
    qconfig = fq.float_qparams_weight_only_qconfig
    quantized = fq.quantize_dynamic(model, {nn.Embedding: qconfig}, backend="native")
    assert noise(quantized(indices), model(indices)) < 0.02


def test_models_are_copied_pickled_and_saved(tmp_path: Path) -> None:
    _, prepared, x = calibrated(fq.get_default_qconfig("x86"))
    quantized = fq.convert(prepared, backend="native")
    with torch.no_grad():
        expected = [prepared(x), quantized(x)]
        for model, output in zip((prepared, quantized), expected, strict=True):
            torch.save(model, tmp_path / "model.pt")
            torch.save(model.state_dict(), tmp_path / "state.pt")
            loaded = torch.load(tmp_path / "model.pt", weights_only=False)
            assert torch.equal(loaded(x), output)
            assert torch.equal(copy.deepcopy(model)(x), output)
            state = torch.load(tmp_path / "state.pt", weights_only=True)
            loaded.load_state_dict(state)
            assert torch.equal(loaded(x), output)


@torch.no_grad()
@pytest.mark.skipif(not ALONE, reason="torch.ao's reference modules take no quantized tensors")
def test_reference_modules_compute_in_floating_point() -> None:
    model, prepared, x = calibrated(fq.get_default_qconfig("x86"))
    reference = fq.convert(prepared, is_reference=True)
    assert reference.second.get_quantized_weight().int_repr().dtype == torch.int8
    assert noise(reference(x), model(x)) < 0.1


@pytest.mark.skipif(not ALONE, reason="torch.ao is there")
def test_what_needs_torch_ao_says_so() -> None:
    _, prepared, _ = calibrated(fq.default_qconfig)
    with pytest.raises(fq.QuantizationError, match=r"backend='torch\.ao' needs torch's quantized"):
        fq.convert(prepared, backend="torch.ao")
    with pytest.raises(ImportError, match=r"patch_torch_ao: torch .* has no torch\.ao"):
        fq.patch_torch_ao()
    with pytest.raises(NotImplementedError, match="cannot be scripted"):
        torch.jit.script(fq.MinMaxObserver())
