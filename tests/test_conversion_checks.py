"""What prepare and convert warn of and refuse, by the names of the layers."""

from __future__ import annotations

import copy
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
from oracle import assert_same, quiet
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


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_a_bare_module_made_of_parts_is_warned_of_or_refused(make: Callable[[], Any]) -> None:
    name = type(make()).__name__
    model = make().eval()
    model.qconfig = fq.get_default_qconfig()
    with pytest.warns(UserWarning, match=f"prepare swaps .* the {name} that it was given stays"):
        fq.prepare(model)
    model = make().train()
    model.qconfig = fq.get_default_qat_qconfig()
    with pytest.raises(ValueError, match=f"prepare_qat swaps .* the {name} that it was given; put"):
        fq.prepare_qat(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in make().modules()]


def test_transposed_convolutions_with_scales_of_channels_are_named() -> None:
    def model() -> Any:
        layers = (nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 3, 2), nn.ConvTranspose2d(3, 2, 2))
        return Stubbed(fq, nn.Sequential(*layers)).eval()

    made, x = model(), torch.randn(2, 2, 4, 4)
    made.qconfig, made.body[2].qconfig = fq.get_default_qconfig("native"), None
    with pytest.raises(
        ValueError, match=r"^body\.1: ConvTranspose2d takes .*set_qconfig\(model"
    ) as e:
        fq.prepare(made)
    # The advice holds.
    advice = (
        str(e.value)
        .partition("e.g. by ")[2]
        .replace("…", 'fastquant.get_default_qconfig("native")')
    )
    made = model()
    exec(advice, {"fastquant": fq, "nn": nn, "model": made})
    prepared = fq.prepare(made)
    prepared(x)
    converted = fq.convert(prepared, backend="native")
    torch.testing.assert_close(converted(x), made(x), atol=0.1, rtol=0)

    made = model().train()
    made.qconfig, made.body[2].qconfig = fq.get_default_qat_qconfig("native"), None
    with pytest.warns(
        UserWarning, match=r"prepare_qat: transposed .* for them: body\.1\. Give"
    ) as w:
        trained = fq.prepare_qat(made)
    assert [warning.filename for warning in w] == [__file__]
    trained(x)
    trained.body[1].qconfig = fq.default_qat_qconfig
    trained.body[2] = nn.Identity()
    converted = fq.convert(trained.eval(), backend="native")
    assert type(converted.body[1]) is fq.nn.quantized.ConvTranspose2d
    torch.testing.assert_close(converted(x), trained(x), atol=0.1, rtol=0)


def test_lazy_layers_are_to_be_called_before_they_are_prepared() -> None:
    def lazy() -> Any:
        layers = (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
        return Stubbed(fq, nn.Sequential(*layers)).eval()

    model, x = lazy(), torch.randn(2, 3, 4, 4)
    model.qconfig = fq.get_default_qconfig("native")
    for call in (fq.prepare, lambda model: fq.prepare_qat(model.train())):
        with pytest.raises(
            ValueError, match=r"no size yet: body\.0, body\.1, body\.3.*run the model"
        ):
            call(model)
    model.eval()(x)
    prepared = fq.prepare(model)
    prepared(x)
    converted = fq.convert(prepared, backend="native")
    torch.testing.assert_close(converted(x), model(x), atol=0.1, rtol=0)
    # What stays floating may be lazy.
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)).eval()
    model.qconfig, model[1].qconfig = fq.default_qconfig, None
    fq.prepare(model)


@pytest.mark.parametrize(
    ("spec", "warned"),
    [(None, True), ({nn.Linear}, True), ({nn.LSTM}, False), ({nn.Linear: None}, False)],
)
def test_dynamic_quantization_names_lazy_layers_that_it_leaves(spec: Any, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fq.quantize_dynamic(nn.Sequential(nn.LazyLinear(2)), spec, backend="native")
    assert [("no size yet" in str(w.message), w.filename) for w in caught] == (
        [(True, __file__)] if warned else []
    )


def test_names_that_no_submodule_has_are_warned_of() -> None:
    def model() -> Any:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    def prepare(names: list[str]) -> Any:
        made = model().eval()
        made.qconfig = fq.default_qconfig
        fq.prepare(made, prepare_custom_config_dict={"non_traceable_module_name": names})

    def propagate(names: list[str]) -> None:
        fq.propagate_qconfig_(model(), dict.fromkeys(names, fq.default_qconfig))

    def quantize_dynamic(names: list[str]) -> Any:
        fq.quantize_dynamic(model(), {nn.Linear, *names}, backend="native")

    for call in (prepare, propagate, quantize_dynamic):
        with pytest.warns(UserWarning, match=r"Sequential has no .*no effect: '1\.fc'\.") as caught:
            call(["1.fc", "1.0"])
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call(["1.0", ""])


@pytest.mark.parametrize(
    "backend", [pytest.param("torch.ao", marks=pytest.mark.torch_ao), "native"]
)
def test_modules_without_values_are_named_when_converted(backend: str) -> None:
    model = Stubbed(fq, nn.Sequential(nn.Linear(2, 2), nn.Flatten())).eval()
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    prepared(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"convert: .* meta device.*: quant, body\.0\. Accepted"):
        fq.convert(copy.deepcopy(prepared).to("meta"), backend=backend)
    with pytest.raises(ValueError, match=r"quantize_dynamic: .* meta device.*: body\.0\. Accepted"):
        fq.quantize_dynamic(copy.deepcopy(model).to("meta"), backend=backend)
    # The advice holds, and what stays floating may be there.
    moved = copy.deepcopy(prepared).to("meta").to_empty(device="cpu")
    moved.load_state_dict(prepared.state_dict())
    x = torch.randn(3, 2)
    assert_same(fq.convert(moved, backend=backend)(x), fq.convert(prepared, backend=backend)(x))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert fq.quantize_dynamic(mixed, {"0"}, backend=backend)[1].weight.is_meta


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
