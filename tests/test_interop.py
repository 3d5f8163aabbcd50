"""fastquant and torch.ao.quantization in one program: mixed, patched, in FX graph mode."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.ao.quantization.quantize_fx as quantize_fx
import torch.quantization
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, quiet
from zoo import SHARED_CLASSES, STATIC_CASES, ConvNet, Stubbed, torchvision_model, tree

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------- classes and hooks


def test_classes_count_as_each_others_subclasses() -> None:
    assert len(SHARED_CLASSES) > 10
    for a, b in itertools.product(SHARED_CLASSES, SHARED_CLASSES):
        expected = issubclass(getattr(tq, a), getattr(tq, b))
        assert issubclass(getattr(fq, a), getattr(tq, b)) == expected, (a, b)
        assert issubclass(getattr(tq, a), getattr(fq, b)) == expected, (a, b)


@pytest.mark.parametrize("ns", [fq, tq])
def test_a_users_observer_counts_on_both_sides(ns: ModuleType) -> None:
    class Mine(ns.ObserverBase):
        def forward(self, x: Tensor) -> Tensor:
            return x

        def calculate_qparams(self, **kwargs: Any) -> Any:
            return torch.tensor([1.0]), torch.tensor([0])

    mine = Mine(torch.quint8)
    for other in (fq, tq):
        assert isinstance(mine, other.ObserverBase)
        assert not isinstance(mine, (other.MinMaxObserver, other.FakeQuantizeBase))


def test_torchs_fake_quantizes_are_switched_like_ours() -> None:
    for ns in (fq, tq):
        model = nn.Sequential(ns.default_fused_act_fake_quant(), ns.default_fused_wt_fake_quant())
        model.apply(fq.disable_observer)
        model.apply(fq.disable_fake_quant)
        assert not any(m.observer_enabled or m.fake_quant_enabled for m in model)
        model.apply(tq.enable_observer)
        model.apply(tq.enable_fake_quant)
        assert all(m.observer_enabled and m.fake_quant_enabled for m in model)


# ------------------------------------------------------------------------------------ mixed flows


@pytest.mark.parametrize("name", ["residual", "lstm", "attention"])
def test_any_mix_of_namespaces_gives_the_same_model(name: str) -> None:
    case = STATIC_CASES[name]

    def run(prepare: ModuleType, convert: ModuleType, config: ModuleType, stubs: ModuleType) -> Any:
        model = case.make(stubs)
        model.qconfig = config.default_per_channel_qconfig
        with quiet():
            model = prepare.prepare(model)
            model(*case.inputs(0))
            model = convert.convert(model)
        return tree(model), model(*case.inputs(9))

    expected_tree, expected = run(tq, tq, tq, tq)
    for mix in itertools.product((tq, fq), repeat=4):
        found_tree, found = run(*mix)
        assert found_tree == expected_tree, mix
        assert_same(found, expected, str([ns.__name__ for ns in mix]))


@pytest.mark.parametrize("config", [tq, fq])
def test_any_mix_of_namespaces_trains_the_same_model(config: ModuleType) -> None:
    case = STATIC_CASES["conv_net"]

    def run(prepare: ModuleType, convert: ModuleType, config: ModuleType) -> Tensor:
        model = case.make(tq).train()
        model.qconfig = config.get_default_qat_qconfig("x86", 0)
        with quiet():
            model = prepare.prepare_qat(model)
            model(*case.inputs(0)).sum().backward()
            assert model.body.conv1.weight.grad.abs().sum() > 0
            model = convert.convert(model.eval())
        return model(*case.inputs(9))

    expected = run(tq, tq, tq)
    for prepare, convert in itertools.product((tq, fq), repeat=2):
        assert_same(run(prepare, convert, config), expected)


def test_torchs_observers_stay_torchs() -> None:
    model = Stubbed(tq, ConvNet()).eval()
    model.qconfig = tq.default_qconfig
    model = fq.prepare(model)
    assert type(model.body.conv1.activation_post_process) is tq.MinMaxObserver
    assert type(model.body.conv1.qconfig) is fq.QConfig


@pytest.mark.parametrize("ns", [fq, tq])
def test_uncalibrated_torch_observers_are_named_too(ns: ModuleType) -> None:
    model = Stubbed(tq, nn.Linear(2, 2)).eval()
    model.qconfig = tq.default_qconfig
    with quiet():
        model = ns.prepare(model)
    with pytest.warns(UserWarning, match="have seen no data: quant, body"):
        fq.convert(model)


# ----------------------------------------------------------------------------------- torchvision


def torchvision_flow(ns: ModuleType, name: str, qat: bool) -> tuple[nn.Module, Tensor]:
    model = torchvision_model(name).train()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        # Statistics of this batch, without which activations die out in untrained layers.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.train(qat).fuse_model(is_qat=qat)
    if qat:
        model.qconfig = ns.get_default_qat_qconfig("fbgemm", 0)
        model = ns.prepare_qat(model, inplace=True)
    else:
        model.qconfig = ns.get_default_qconfig("fbgemm")
        model = ns.prepare(model, inplace=True)
    with torch.no_grad():
        model(x)
    model = ns.convert(model.eval(), inplace=True)
    return model, model(x)


@pytest.mark.usefixtures("torchs_qat_arithmetic")
@pytest.mark.parametrize(
    ("name", "qat"), [("resnet18", False), ("mobilenet_v2", False), ("resnet18", True)]
)
def test_torchvisions_models_come_out_as_torchs(name: str, qat: bool) -> None:
    with quiet():
        their_model, theirs = torchvision_flow(tq, name, qat)
    our_model, ours = torchvision_flow(fq, name, qat)
    assert tree(our_model) == tree(their_model)
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 20


# --------------------------------------------------------------------------------- FX graph mode


class Graph(nn.Module):
    """What eager mode cannot do: functions, and a sigmoid with fixed parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sigmoid(self.net(x)).reshape(-1, 5)
        return torch.cat([self.fc(x) + x, x], 1)


def graph_flow(ns: ModuleType, qat: bool) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = Graph().train(qat)
    x = torch.randn(2, 3, 8, 8)
    if qat:
        mapping = ns.get_default_qat_qconfig_mapping("x86", 0)
        model = quantize_fx.prepare_qat_fx(model, mapping, (x,))
    else:
        model = quantize_fx.prepare_fx(model, ns.get_default_qconfig_mapping("x86"), (x,))
    model(x)
    return model, quantize_fx.convert_fx(model.eval())(x)


@pytest.mark.parametrize("qat", [False, True])
def test_fx_graph_mode_takes_our_observers(qat: bool) -> None:
    with quiet():
        their_model, theirs = graph_flow(tq, qat)
        our_model, ours = graph_flow(fq, qat)
    assert str(our_model.graph) == str(their_model.graph)
    assert_same(ours, theirs)
    kinds = {type(m) for m in our_model.modules() if isinstance(m, tq.ObserverBase)}
    assert kinds
    assert all(getattr(fq.observer, kind.__name__) is kind for kind in kinds)


def test_fx_graph_mode_works_under_a_patch() -> None:
    with quiet():
        _, expected = graph_flow(tq, False)
        with fq.patch_torch_ao():
            _, ours_by_name = graph_flow(tq, False)
            _, ours = graph_flow(fq, False)
    assert_same(ours_by_name, expected)
    assert_same(ours, expected)
