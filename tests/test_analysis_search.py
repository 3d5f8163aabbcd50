"""The search for layers to leave in float, or at more bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
from analysis_cases import QCONFIG, data, float_net, of, prepared_of, with_bits
from fastquant.analysis import AnalysisError, Assignment, search
from oracle import quiet

pytestmark = pytest.mark.usefixtures("one_thread")


def coarse(net: Any) -> None:
    net.conv1.qconfig = with_bits(2)
    net.conv2.qconfig = with_bits(3)


def searched(target: float, **options: Any) -> Assignment:
    model = float_net()
    with quiet():
        prepared = prepared_of(model, coarse)
        return search(model, prepared, data(), target, progress=False, **options)


def test_nothing_is_kept_where_the_target_is_reached_already() -> None:
    found = searched(-100.0)
    assert (found.kept, found.qconfigs, found.evaluations) == ((), {}, 1)
    assert found.score == found.quantized_score


def test_the_spoilt_layers_are_kept_and_no_others() -> None:
    assert searched(40.0).kept == ("conv1", "conv2")


def test_one_layer_is_kept_where_one_is_enough() -> None:
    start = searched(-100.0).score
    found = searched(start + 3)
    assert found.kept == ("conv1",)
    assert found.score >= found.target > found.quantized_score == start


def test_the_assignment_prepares_a_model_that_reaches_the_target() -> None:
    found = searched(40.0)
    assert found.qconfigs == {"conv1": None, "conv2": None}

    def configure(net: Any) -> None:
        coarse(net)
        fq.set_qconfig(net, found.qconfigs)

    model = float_net()
    analysis = of(model, prepared_of(model, configure), data()[:1])
    assert analysis.sqnr == pytest.approx(found.score, abs=1e-3)
    assert analysis.sqnr >= 40


def test_layers_may_be_kept_at_more_bits() -> None:
    model = float_net()
    wider = prepared_of(model)
    found = searched(40.0, wider=wider)
    assert found.kept == ("conv1", "conv2")
    assert found.qconfigs["conv1"].activation is wider.conv1.qconfig.activation

    def configure(net: Any) -> None:
        coarse(net)
        fq.set_qconfig(net, found.qconfigs)

    analysis = of(model, prepared_of(model, configure), data()[:1])
    assert analysis.sqnr == pytest.approx(found.score, abs=1e-3)


def test_names_with_dots_are_patterns_of_themselves_alone() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(fq.QuantStub(), body).eval()
    configured = copy.deepcopy(model)
    configured.qconfig = QCONFIG
    configured[1][0].qconfig = with_bits(1)
    inputs = [torch.randn(8, 4)]
    with quiet():
        prepared = fq.prepare(configured)
        prepared(inputs[0])
        found = search(model, prepared, inputs, 30.0, progress=False)
    assert found.qconfigs == {r"1\.0": None}


def test_a_metric_may_be_the_target() -> None:
    model = float_net()
    inputs = torch.cat(data())
    target = model(inputs)

    def likeness(net: nn.Module) -> Tensor:
        return -(net(inputs) - target).square().mean()

    quantized = searched(-1e9, metric=likeness)
    assert quantized.kept == ()
    found = searched(quantized.score / 100, metric=likeness)
    assert found.kept[0] == "conv1"
    assert found.score >= found.target


def test_a_target_that_is_out_of_reach_is_an_error() -> None:
    with pytest.raises(AnalysisError, match=r"target 0\.9 is out of reach: .* it is 0\.5"):
        searched(0.9, metric=lambda net: 0.5)
    with pytest.raises(AnalysisError, match="out of reach: with all layers at more bits"):
        searched(500.0, wider=prepared_of(float_net()))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="target must be a number, got str"):
        searched("40")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metric must be callable"):
        searched(40.0, metric=3)
    with pytest.raises(AnalysisError, match="returned None"):
        searched(40.0, metric=lambda net: None)
    model = float_net()
    with quiet():
        converted = fq.convert(prepared_of(model))
    with pytest.raises(AnalysisError, match="search needs a prepared model"):
        search(model, converted, data(), 40.0, progress=False)

    def less(net: Any) -> None:
        net.conv1.qconfig = None

    with pytest.raises(AnalysisError, match="wider lacks conv1"):
        searched(40.0, wider=prepared_of(model, less))
