"""prepare and prepare_qat: what they attach, and what they tell it of the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, quiet


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
    with pytest.raises(
        TypeError, match=r"^0\.activation_post_process: x must be a tensor, got int"
    ):
        prepared(3)
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


def test_a_model_that_was_moved_to_the_meta_device_is_prepared_and_loaded() -> None:
    def prepared(device: str) -> nn.Module:
        made = nn.Sequential(fq.QuantStub(), nn.Linear(4, 4)).to(device).train()
        made.qconfig = fq.get_default_qat_qconfig("x86")
        return fq.prepare_qat(made)

    source, x = prepared("cpu"), torch.randn(3, 4)
    source(x)
    target = prepared("meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same(target(x), source(x))


def test_a_channel_axis_that_the_first_tensor_does_not_have_names_the_layer() -> None:
    prepared = model()
    observer = fq.PerChannelMinMaxObserver.with_args(ch_axis=4)
    prepared.qconfig = fq.QConfig(observer, fq.default_weight_observer)
    prepared = fq.prepare(prepared)
    with pytest.raises(ValueError, match=r"^0\.activation_post_process: ch_axis=4 is out of range"):
        prepared(torch.randn(1, 3, 8, 8))


def test_the_output_of_a_recurrent_layer_is_a_tuple_and_says_where() -> None:
    recurrent = nn.Sequential(nn.GRU(3, 4)).eval()
    recurrent[0].qconfig = fq.default_qconfig
    prepared = fq.prepare(recurrent, allow_list={nn.GRU})
    with pytest.raises(TypeError, match=r"^0\.activation_post_process: x .*got tuple"):
        prepared(torch.randn(2, 1, 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["", "layers.0.linear1"])
def test_encoders_of_torch_with_padding_are_observed_without_gradients(
    what: str, training: bool
) -> None:
    # torch.nn's encoder would give its layers nested tensors, and torch.ao's prepared ones fail.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    config = fq.get_default_qat_qconfig if training else fq.get_default_qconfig
    encoder.get_submodule(what).qconfig = config("native")
    prepared = (fq.prepare_qat if training else fq.prepare)(encoder)
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    if training:
        prepared(x, src_key_padding_mask=padding)
    with torch.no_grad(), quiet():
        ours = prepared.eval()(x, src_key_padding_mask=padding)
        floating = encoder.eval()(x, src_key_padding_mask=padding)
    assert_close = torch.testing.assert_close
    assert_close(ours[~padding], floating[~padding], atol=0.2 if training else 1e-5, rtol=0)
    observer = prepared.layers[0].linear1.activation_post_process
    assert (observer.calculate_qparams()[0] != 1).all()


def test_names_in_place_of_classes_are_warned_of() -> None:
    made = model()
    with pytest.warns(UserWarning, match=r"take classes, so names have no effect: '1'$") as caught:
        fq.prepare(made, allow_list={nn.Conv2d, "1"})
    assert [warning.filename for warning in caught] == [__file__]


def test_observers_outside_a_model_name_none() -> None:
    with pytest.raises(TypeError, match=r"^x must be a tensor"):
        fq.MinMaxObserver()(3)


# ------------------------------------------------------------- models that have seen no data as yet


def with_batch_norm() -> tuple[nn.Module, Tensor]:
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    made = nn.Sequential(fq.QuantStub(), *parts, fq.DeQuantStub()).train()
    made = fq.fuse_modules_qat(made, ["1", "2", "3"])
    made.qconfig = fq.get_default_qat_qconfig()
    return fq.prepare_qat(made), torch.randn(2, 3, 6, 6)


def test_fake_quantizers_can_be_frozen_before_any_data() -> None:
    prepared, x = with_batch_norm()
    prepared.apply(fq.disable_observer)
    assert prepared(x).isfinite().all()


def test_averages_of_a_model_can_be_started_before_any_data() -> None:
    prepared, x = with_batch_norm()
    averaged = torch.optim.swa_utils.AveragedModel(prepared, use_buffers=True)
    for _ in range(2):
        prepared(x).sum().backward()
        averaged.update_parameters(prepared)
    assert averaged.module.eval()(x).isfinite().all()


@pytest.mark.parametrize("fresh", [True, False])
def test_states_of_either_size_load(fresh: bool) -> None:
    prepared, x = with_batch_norm()
    other, _ = with_batch_norm()
    if not fresh:
        other(x)
    prepared.load_state_dict(other.state_dict())
    with quiet():
        torchs = nn.Sequential(
            tq.QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
        )
        torchs = tq.fuse_modules_qat(torchs.train(), ["1", "2", "3"])
        torchs.qconfig = tq.get_default_qat_qconfig()
        torchs = tq.prepare_qat(torchs)
        if not fresh:
            torchs(x)
    prepared.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(prepared.state_dict())
    torch.testing.assert_close(prepared(x), torchs(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("gamma", [0.5, 0.0])
def test_a_fresh_model_compiles_without_breaks_and_trains(gamma: float) -> None:
    prepared, x = with_batch_norm()
    prepared[1].bn.weight.data[0] = gamma
    expected = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for run, owner in ((compiled, prepared), (expected, expected)):
            owner.zero_grad()
            y = run(x)
            y.square().mean().backward()
            results.append((y.detach(), [p.grad for p in owner.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on", ["instance", "class"])
def test_a_fused_module_with_another_forward_is_observed(
    on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 8, 8)
    seen = {}
    for ns in (fq, tq):
        torch.manual_seed(0)
        model = nn.Sequential(ns.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        model = ns.fuse_modules(model, [["1", "2"]])
        model.qconfig = ns.get_default_qconfig("x86")
        fused = model[1]
        with monkeypatch.context() as patch:
            if on == "instance":
                fused.forward = lambda x, fused=fused: fused[1](fused[0](x))
            else:
                patch.setattr(type(fused), "forward", lambda self, x: self[1](self[0](x)))
            prepared = ns.prepare(model, inplace=True)
            prepared(x)
        seen[ns] = prepared[1].activation_post_process
    assert_same(seen[fq].histogram, seen[tq].histogram)
    assert_same(seen[fq].calculate_qparams(), seen[tq].calculate_qparams())
