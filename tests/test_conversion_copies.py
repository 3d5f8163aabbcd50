"""A converted copy: what is copied, how, and that it shares nothing with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, quiet
from zoo import (
    STATIC_CASES,
    STATIC_QCONFIGS,
    Stubbed,
    tree,
)

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(nn.Module):
    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        self.copies = getattr(self, "copies", 0) + 1
        return type(self)()


class Pickled(nn.Module):
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pickled": True}


def test_modules_are_copied_as_they_copy_themselves() -> None:
    counted, pickled = Counted(), Pickled()
    model = nn.Sequential(counted, pickled, nn.ReLU(), nn.Sequential(counted, pickled))
    model.notes = {"of": [counted], "names": ["a"]}
    copied = fq.convert(model)
    assert counted.copies == 1
    assert copied[0] is copied[3][0] is copied.notes["of"][0] is not counted
    assert copied[1] is copied[3][1] is not pickled
    assert copied[1].pickled
    assert copied.notes["names"] is not model.notes["names"]
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        assert type(original) is type(module)
        ours, theirs = (
            {k: v for k, v in vars(m).items() if k[0] == "_"} for m in (module, original)
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[k] is not theirs[k] for k in ours if isinstance(ours[k], dict))


def test_a_converted_copy_that_keeps_its_configs_has_its_own() -> None:
    model = STATIC_CASES["residual"].calibrated(fq, STATIC_QCONFIGS["x86"])

    def parts(root: nn.Module) -> set[int]:
        configs = [m.qconfig for m in root.modules() if getattr(m, "qconfig", None)]
        return {id(part) for config in configs for part in (config, *config)}

    kept = fq.convert(model, remove_qconfig=False)
    assert parts(kept)
    assert not parts(kept) & parts(model)


@pytest.mark.parametrize("name", STATIC_CASES)
def test_a_converted_copy_and_its_original_share_nothing(name: str) -> None:
    case = STATIC_CASES[name]
    model = case.make(fq)
    if case.fusable:
        model = fq.fuse_modules(model, list(case.fusable))
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    prepared(*case.inputs(1))
    before = copy.deepcopy(prepared.state_dict())
    converted = fq.convert(prepared)
    expected = converted(*case.inputs(2))

    assert_same(prepared.state_dict(), before)
    with quiet():
        theirs = tq.convert(copy.deepcopy(prepared))
    ours_of_torchs = {tq.QuantStub: fq.QuantStub, tq.DeQuantStub: fq.DeQuantStub}
    assert [type(m) for m in converted.modules()] == [
        ours_of_torchs.get(type(m), type(m)) for m in theirs.modules()
    ]
    with torch.no_grad():
        for tensor in (*prepared.parameters(), *prepared.buffers()):
            tensor.zero_()
    assert_same(converted(*case.inputs(2)), expected)


class Referred(nn.Module):
    """A layer that a list refers to, too; or a float layer in a quantized custom module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.layers = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @classmethod
    def from_float(cls, module: Referred) -> Referred:
        observed = cls(module.layer)
        observed.qconfig = module.qconfig
        return observed

    @classmethod
    def from_observed(cls, module: Referred) -> Referred:
        return cls(module.layer)


class Observed(Referred):
    """What a Referred is between prepare and convert, where it is custom."""


class QuantizedCustom(Referred):
    """And after."""


def a_list() -> tuple[nn.Module, dict[str, Any]]:
    return Stubbed(fq, Referred(nn.Linear(4, 4))), {}


def fused_for_training() -> tuple[nn.Module, dict[str, Any]]:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    return Stubbed(fq, fq.fuse_modules_qat(body, [["0", "1"]])), {}


def fused_without_counterpart() -> tuple[nn.Module, dict[str, Any]]:
    body = fq.fuse_modules(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), [["0", "1"]])
    mapping = fq.get_default_static_quant_module_mappings()
    del mapping[type(body[0])]
    return Stubbed(fq, body), {"mapping": mapping}


def layer_with_layers() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.Linear(4, 4)
    layer.extra = nn.Sequential(nn.Linear(4, 4))
    return nn.Sequential(layer), {"mapping": fq.get_default_dynamic_quant_module_mappings()}


def custom() -> tuple[nn.Module, dict[str, Any]]:
    swaps = {"observed_to_quantized_custom_module_class": {Observed: QuantizedCustom}}
    return nn.Sequential(Referred(nn.Linear(4, 4))), {"convert_custom_config_dict": swaps}


@pytest.mark.parametrize(
    "make", [a_list, fused_for_training, fused_without_counterpart, layer_with_layers, custom]
)
def test_what_stays_in_float_is_copied(make: Callable[[], Any]) -> None:
    model, settings = make()
    model.eval()
    if make is layer_with_layers:
        fq.propagate_qconfig_(model, {"": fq.default_dynamic_qconfig})
        prepared = model
    else:
        model.qconfig = fq.default_qconfig
        observed = {"float_to_observed_custom_module_class": {Referred: Observed}}
        settings_of_prepare = {"prepare_custom_config_dict": observed} if make is custom else {}
        prepared = fq.prepare(model, **settings_of_prepare)
        prepared(torch.randn(2, 3, 5, 5) if make is fused_for_training else torch.randn(2, 4))
    before = tree(prepared)
    converted = fq.convert(prepared, **settings)

    def storages(root: nn.Module) -> set[int]:
        layers = [m for m in root.modules() if isinstance(m, Referred)]
        every = [*root.modules(), *(layer for m in layers for layer in m.layers)]
        tensors = [t for m in every for t in (*m.parameters(), *m.buffers())]
        return {t.data_ptr() for t in tensors if t.numel()}

    assert tree(prepared) == before
    assert storages(prepared)
    assert not storages(prepared) & storages(converted)
