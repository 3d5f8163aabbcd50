"""What prepare and convert warn of and refuse, by the names of the layers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized.dynamic as nnqd
from torch import nn

import fastquant as fq
from oracle import quiet
from zoo import (
    ConvNet,
    Recurrent,
    Stubbed,
    tree,
)

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("where", ["", "body", "body.0"])
def test_conversion_of_an_unprepared_model_is_refused(where: str) -> None:
    model = Stubbed(fq, nn.Sequential(nn.Linear(2, 2), nn.ReLU())).eval()
    model.get_submodule(where).qconfig = fq.default_qconfig
    with pytest.raises(ValueError, match=r"no observer: .*body\.0.*Call prepare"):
        fq.convert(model)
    assert type(model.body[0]) is nn.Linear


def test_conversion_of_a_module_that_was_not_observed_is_refused() -> None:
    model = Stubbed(fq, ConvNet()).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model, allow_list=[fq.QuantStub, nn.Linear])
    model(torch.randn(2, 3, 8, 8))
    # torch.ao gives such convolutions scale 1 and zero point 0 without a word.
    with pytest.raises(AssertionError, match=r"no observer: body\.conv1, body\.bn1, body\.conv2"):
        fq.convert(model)


def test_conversion_that_has_nothing_to_observe_needs_no_preparation() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    fq.propagate_qconfig_(model, {nn.Linear: fq.default_dynamic_qconfig})
    converted = fq.convert(model, fq.get_default_dynamic_quant_module_mappings())
    assert type(converted[0]) is nnqd.Linear
    float_model = Stubbed(fq, ConvNet())
    assert tree(fq.convert(float_model)) == tree(float_model)


def test_uncalibrated_layers_are_named_in_one_warning() -> None:
    model = Stubbed(fq, ConvNet()).eval()
    model.qconfig = fq.get_default_qconfig()
    model = fq.prepare(model)
    with pytest.warns(UserWarning, match="have seen no data") as record:
        fq.convert(model)
    messages = [str(warning.message) for warning in record]
    assert len(messages) == 1
    assert "quant, body.conv1, body.bn1, body.conv2, body.bn2, body.fc" in messages[0]
    assert record[0].filename == __file__
    model.body(model.quant(torch.randn(2, 3, 8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.convert(model)


def test_uncalibrated_layers_inside_custom_modules_are_named() -> None:
    model = Recurrent(fq).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    with pytest.warns(UserWarning, match=r"lstm\.layers\.0\.layer_fw\.cell\.igates"):
        fq.convert(model)


def test_no_qconfig_anywhere_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="None of the submodules has a qconfig") as record:
        fq.prepare(Stubbed(fq, nn.Linear(2, 2)).eval())
    assert record[0].filename == __file__


def test_training_needs_training_mode() -> None:
    model = Stubbed(fq, nn.Linear(2, 2)).eval()
    model.qconfig = fq.get_default_qat_qconfig()
    # Both what it is and what torch.ao raises.
    for expected in (ValueError, AssertionError):
        with pytest.raises(expected, match=r"training mode; call model\.train\(\)"):
            fq.prepare_qat(model)


def test_calibration_in_training_mode_is_warned_of() -> None:
    model = Stubbed(fq, ConvNet()).train()
    model.qconfig = fq.default_qconfig
    with pytest.warns(UserWarning, match=r"training mode.*body\.bn1, body\.bn2.*model\.eval"):
        fq.prepare(model)


def test_fusing_for_training_and_preparing_for_calibration_is_warned_of() -> None:
    model = fq.fuse_modules_qat(Stubbed(fq, ConvNet()), [["body.conv1", "body.bn1", "body.relu1"]])
    model.eval().qconfig = fq.default_qconfig
    with pytest.warns(UserWarning, match=r"prepare: body\.conv1 were fused for training"):
        fq.prepare(model)


@pytest.mark.parametrize(
    "call",
    [
        fq.quantize_dynamic,
        lambda model: fq.prepare_qat(model.train()),
        lambda model: fq.convert(fq.prepare(model.eval())),
    ],
)
def test_a_bare_module_cannot_be_swapped_and_is_warned_of(call: Callable[[Any], Any]) -> None:
    model = nn.Linear(2, 2)
    model.qconfig = fq.default_dynamic_qconfig
    with pytest.warns(UserWarning, match="the Linear that it was given stays as it is"):
        call(model)


@pytest.mark.torch_ao
def test_a_module_that_cannot_be_converted_is_named() -> None:
    model = Stubbed(fq, nn.Sequential(nn.Linear(2, 2))).eval()
    model.qconfig = fq.QConfig(fq.default_observer, fq.default_observer)  # unsigned weights
    model = fq.prepare(model)
    model(torch.randn(2, 2))
    with pytest.raises(AssertionError, match=r"cannot convert body\.0: .*qint8"):
        fq.convert(model)


@pytest.mark.torch_ao
def test_nothing_is_said_about_what_users_did_not_do() -> None:
    # In a process of its own: torch says some of it once per process.
    script = """
from fastquant import *
import torch, torch.nn as nn, fastquant as fq
import torch.ao.quantization as tq

class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.lstm, self.dequant = fq.QuantStub(), nn.LSTM(3, 4), fq.DeQuantStub()
    def forward(self, x):
        return self.dequant(self.lstm(self.quant(x))[0])

for qconfig in (fq.get_default_qconfig(), tq.get_default_qconfig()):
    model = LSTM().eval()
    model.qconfig = qconfig
    model = fq.prepare(model)
    model(torch.randn(2, 3, 3))
    fq.convert(model)(torch.randn(2, 3, 3))
fq.quantize_dynamic(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)))
model = fq.QuantWrapper(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
model = fq.fuse_modules_qat(model.train(), [["module.0", "module.1", "module.2"]])
model.qconfig = fq.get_default_qat_qconfig()
model = fq.prepare_qat(model)
model(torch.randn(2, 3, 4, 4))
fq.convert(model.eval())(torch.randn(2, 3, 4, 4))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_convert_names_layers_and_counts_what_was_left_out_once() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(3, 3)).eval()
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    with quiet():
        prepared(torch.tensor([[1.0, 2.0, float("nan")]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fq.convert(prepared)
    messages = [str(w.message) for w in caught if "NaN or infinite" in str(w.message)]
    assert len(messages) == 1
    assert "0 (1)" in messages[0]
    assert "1 (3)" in messages[0]
