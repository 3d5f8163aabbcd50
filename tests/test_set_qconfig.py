"""`set_qconfig`: configs for parts of a model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq
from oracle import quiet

A, B, C = fq.default_qconfig, fq.default_per_channel_qconfig, fq.get_default_qconfig("qnnpack")


def model() -> Any:
    return nn.Sequential(
        fq.QuantStub(),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Conv1d(4, 4, 1),
    ).eval()


def own(net: nn.Module) -> dict[str, Any]:
    return {name: m.qconfig for name, m in net.named_modules() if hasattr(m, "qconfig")}


def test_a_pattern_matches_whole_names() -> None:
    net = model()
    fq.set_qconfig(net, {"1": A, r"1\.\d": B})
    assert own(net) == {"1": A, "1.0": B, "1.1": B, "1.2": B}


def test_a_class_matches_its_modules_and_those_of_subclasses() -> None:
    net = model()
    net[1][2] = type("Own", (nn.Linear,), {})(4, 4)
    fq.set_qconfig(net, {nn.Linear: A})
    assert own(net) == {"1.0": A, "1.2": A}


def test_the_first_match_wins() -> None:
    net = model()
    fq.set_qconfig(net, {"1.2": None, nn.Linear: A, "1.*": B, re.compile(""): C})
    assert own(net) == {"": C, "1": B, "1.0": A, "1.1": B, "1.2": None}


def test_prepare_follows_it() -> None:
    net = model()
    fq.set_qconfig(net, {r"1\.2": None, nn.Conv1d: B, "": A})
    with quiet():
        prepared: Any = fq.prepare(net)
    assert type(prepared[1][0].activation_post_process) is fq.MinMaxObserver
    assert not hasattr(prepared[1][2], "activation_post_process")
    assert prepared[2].qconfig.weight().ch_axis == 0


def test_entries_that_match_nothing_are_named_and_nothing_changes() -> None:
    net = model()
    entries = {"1": A, "head.*": B, nn.Conv2d: A, "": C}
    with pytest.raises(fq.QuantizationError, match=r"no submodule .* matches 'head\.\*', Conv2d"):
        fq.set_qconfig(net, entries)
    assert own(net) == {}


def test_an_entry_that_others_go_before_is_no_mistake() -> None:
    net = model()
    fq.set_qconfig(net, {".*": A, "1": B})
    assert set(own(net).values()) == {A}


@pytest.mark.parametrize(
    ("qconfigs", "error", "message"),
    [
        ({"(": A}, fq.QuantizationError, r"'\(' is no regular expression"),
        ({3: A}, TypeError, "must be a pattern or a class of modules, got int"),
        ({torch.Tensor: A}, TypeError, "must be a pattern or a class of modules"),
        ({"1": 8}, TypeError, "must be a QConfig or None, got int"),
        ({}, TypeError, "qconfigs must be a mapping"),
        ([("1", A)], TypeError, "qconfigs must be a mapping"),
    ],
)
def test_what_is_no_assignment_is_refused(
    qconfigs: Any, error: type[Exception], message: str
) -> None:
    net = model()
    with pytest.raises(error, match=message):
        fq.set_qconfig(net, qconfigs)
    assert own(net) == {}


def test_a_config_that_does_not_fit_is_refused() -> None:
    net = nn.Sequential(nn.ConvTranspose1d(2, 2, 1))
    with pytest.raises(fq.QuantizationError, match="takes no per-channel weight"):
        fq.set_qconfig(net, {"0": B})


def test_the_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="set_qconfig"):
        fq.set_qconfig({}, {"": A})  # type: ignore[arg-type]
