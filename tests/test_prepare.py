"""prepare and prepare_qat: what they attach, and what they tell it of the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq


def model(qat: bool = False) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    made = nn.Sequential(fq.QuantStub(), body, fq.DeQuantStub()).train(qat)
    made.qconfig = fq.get_default_qat_qconfig() if qat else fq.default_per_channel_qconfig
    return made


def test_a_config_without_a_factory_for_an_activation_that_is_observed_is_refused() -> None:
    float_model = model()
    float_model.qconfig = fq.QConfig(None, fq.default_weight_observer)
    with pytest.raises(TypeError, match="a qconfig's activation must be a callable, got None"):
        fq.prepare(float_model)


@pytest.mark.parametrize(
    "pass_on", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_errors_name_the_layer(pass_on: Any) -> None:
    prepared = pass_on(fq.prepare(model()))
    x = torch.randn(1, 3, 8, 8)
    prepared(x)
    with pytest.raises(TypeError, match=r"^1\.0\.activation_post_process: x .*got tuple"):
        prepared[1][0].activation_post_process((x, x))
    with pytest.raises(TypeError, match=r"^0\.activation_post_process: x must .*torch.int64"):
        prepared(x.long())
    assert list(prepared.state_dict()) == list(fq.prepare(model()).state_dict())


@pytest.mark.parametrize(
    "make",
    [
        fq.default_per_channel_weight_fake_quant,
        fq.default_fused_per_channel_wt_fake_quant,
        fq.PerChannelMinMaxObserver,
    ],
)
def test_errors_of_weights_name_the_layer(make: Any) -> None:
    prepared = model(qat=True)
    prepared.qconfig = fq.QConfig(fq.default_fake_quant, make)
    prepared = fq.prepare_qat(prepared)
    prepared(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^1\.0\.weight_fake_quant: .* 7 channels"):
        prepared[1][0].weight_fake_quant(torch.randn(7, 3, 3, 3))


def test_the_output_of_a_recurrent_layer_is_a_tuple_and_says_where() -> None:
    recurrent = nn.Sequential(nn.GRU(3, 4)).eval()
    recurrent[0].qconfig = fq.default_qconfig
    prepared = fq.prepare(recurrent, allow_list={nn.GRU})
    with pytest.raises(TypeError, match=r"^0\.activation_post_process: x .*got tuple"):
        prepared(torch.randn(2, 1, 3))


def test_observers_outside_a_model_name_none() -> None:
    with pytest.raises(TypeError, match=r"^x must be a tensor"):
        fq.MinMaxObserver()(3)
