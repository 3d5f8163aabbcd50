"""Whole models, pickled where torch.ao is and read where it is not, and the other way round."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantized as nnq_torch
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from fastquant import checkpoints
from fastquant._core.dtypes import QUINT8
from oracle import quiet
from test_without_torch_ao import alone

# A process that loads models, and says what their modules and outputs are.
READ = """
import sys, torch, fastquant as fq
for path in sys.argv[1:]:
    x, output = torch.load(path + ".data")
    if path.endswith(".pickle"):
        with open(path, "rb") as file:
            model = fq.checkpoints.load(file)
    else:
        model = fq.checkpoints.load_model(path)
    for module in model.modules():
        assert not type(module).__module__.startswith("torch.ao"), type(module)
    torch.testing.assert_close(model(x), output)
    print(type(model[1]).__module__, type(model[1]).__name__)
"""

# A process that saves a prepared and a trained model.
WRITE = """
import sys, torch, fastquant as fq
from torch import nn
for train in (False, True):
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(fq.QuantStub(), *parts, fq.DeQuantStub()).train(train)
    fuse = fq.fuse_modules_qat if train else fq.fuse_modules
    model = fuse(model, ["1", "2", "3"])
    model.qconfig = (fq.get_default_qat_qconfig if train else fq.get_default_qconfig)("x86")
    model = (fq.prepare_qat if train else fq.prepare)(model)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    model.eval()
    path = f"{sys.argv[1]}/{train}"
    torch.save(model, path)
    torch.save((x, model(x).detach()), path + ".data")
"""


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Models that consist of torch.ao's classes as far as they can."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    conv = nni.ConvReLU2d(nn.Conv2d(3, 4, 3), nn.ReLU())
    linear = nni.LinearReLU(nn.Linear(4, 4), nn.ReLU())
    for name, layer, x in (
        ("fused", conv, torch.randn(2, 3, 8, 8)),
        ("linear", linear, torch.randn(2, 4)),
    ):
        made[name] = nn.Sequential(tq.QuantStub(), layer, tq.DeQuantStub()).eval(), x
    for name, activation in (
        ("minmax", tq.MinMaxObserver),
        ("histogram", tq.HistogramObserver),
        ("average", tq.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5)),
    ):
        model = nn.Sequential(tq.QuantStub(), nn.Linear(4, 4), tq.DeQuantStub()).eval()
        model.qconfig = tq.QConfig(activation, tq.default_per_channel_weight_observer)
        made[name] = fq.prepare(model), torch.randn(2, 4)
    for name, layer in (("lstm", nn.LSTM(4, 3)), ("both ways", nn.LSTM(4, 3, bidirectional=True))):
        model = nn.Sequential(tq.QuantStub(), layer).eval()
        model.qconfig = tq.default_qconfig
        made[name] = fq.prepare(model), torch.randn(2, 3, 4)
    trained = nn.Sequential(tq.QuantStub(), nn.Conv2d(3, 4, 3), tq.DeQuantStub()).train()
    trained.qconfig = tq.QConfig(tq.default_fake_quant, tq.default_weight_fake_quant)
    made["trained"] = fq.prepare_qat(trained), torch.randn(2, 3, 8, 8)
    return made


def under_old_names(pickled: bytes) -> bytes:
    """A pickle as torch 1.9 would have written it."""
    for new in (b"torch.ao.quantization", b"torch.ao.nn"):
        pickled = pickled.replace(b"c" + new, b"c" + new.replace(b".ao", b""))
    return pickled


def test_models_with_torch_ao_s_classes_are_read_without_it(tmp_path: Path) -> None:
    paths = []
    for name, (model, x) in models().items():
        with quiet(), torch.no_grad():
            model(x)
            output = model.eval()(x)
        pickled = pickle.dumps(model, protocol=2)
        assert b"ctorch.ao" in pickled
        assert b"ctorch.ao" not in under_old_names(pickled)
        torch.save(model, tmp_path / name)
        (tmp_path / f"{name}.pickle").write_bytes(pickled)
        (tmp_path / f"old {name}.pickle").write_bytes(under_old_names(pickled))
        for path in (name, f"{name}.pickle", f"old {name}.pickle"):
            paths.append(str(tmp_path / path))
            torch.save((x, output), f"{paths[-1]}.data")
    run = alone("-W", "ignore", "-c", READ, *paths, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "fastquant.nn.intrinsic ConvReLU2d"


def test_models_written_without_torch_ao_are_read_with_it(tmp_path: Path) -> None:
    assert hasattr(tq, "prepare")
    run = alone("-W", "ignore", "-c", WRITE, str(tmp_path), timeout=300)
    assert run.returncode == 0, run.stderr
    for train in (False, True):
        model: Any = torch.load(tmp_path / str(train), weights_only=False)
        x, output = torch.load(tmp_path / f"{train}.data")
        torch.testing.assert_close(model(x), output)
        assert type(model[1]).__module__.startswith("torch.ao.nn.intrinsic")
        quantized = fq.convert(model, backend="native")
        assert torch.isfinite(quantized(x)).all()


def test_a_model_of_torch_s_quantized_modules_is_refused_in_words(tmp_path: Path) -> None:
    model = nn.Sequential(nnq_torch.Linear(2, 2))
    torch.save(model, tmp_path / "model")
    script = "import sys, fastquant as fq; fq.checkpoints.load_model(sys.argv[1])"
    run = alone("-c", script, str(tmp_path / "model"), timeout=300)
    message = run.stderr.splitlines()[-1]
    assert "torch.ao.nn.quantized.modules.linear.Linear" in message
    assert "load_torch_ao_state_dict" in message


def named(module: str, name: str) -> bytes:
    """A pickle of nothing but a class or function."""
    return f"c{module}\n{name}\n.".encode()


@pytest.mark.parametrize(
    ("module", "name", "advice"),
    [
        ("torch.ao.quantization.nowhere", "Nothing", "has nothing of the name"),
        ("torch.ao.nn.intrinsic.modules.fused", "Nothing", "has nothing of the name"),
        ("torch.nn.quantized.modules.linear", "Nothing", "load_torch_ao_state_dict"),
        ("no_such_package", "Net", "install the package that defines it"),
        ("fastquant.observer", "Nothing", "install the package that defines it"),
    ],
)
def test_unknown_classes_are_named(module: str, name: str, advice: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=advice) as caught:
        checkpoints.loads(named(module, name))
    assert f"{module}.{name}" in str(caught.value)


def test_what_can_be_imported_is_itself() -> None:
    assert checkpoints.loads(named("torch.nn.modules.linear", "Linear")) is nn.Linear
    assert checkpoints.loads(named("fastquant.observer", "MinMaxObserver")) is fq.MinMaxObserver
    assert checkpoints.loads(named("torch", "quint8")) is QUINT8
    assert checkpoints.loads(checkpoints.dumps({"a": [1.5]})) == {"a": [1.5]}


def test_only_models_are_loaded_as_models(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state")
    with pytest.raises(TypeError, match="a file that holds a model, this one holds a dict"):
        checkpoints.load_model(tmp_path / "state")
    loaded = torch.load(tmp_path / "state", pickle_module=checkpoints, weights_only=False)
    assert torch.equal(loaded["weight"], torch.zeros(2))
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2), buffer)
    buffer.seek(0)
    assert isinstance(checkpoints.load_model(buffer), nn.Linear)


def test_importing_puts_nothing_under_torchs_names() -> None:
    run = alone(
        "-c", "import sys, fastquant; print([n for n in sys.modules if n[:8] == 'torch.ao'])"
    )
    assert run.stdout.strip() == "[]", run.stderr
