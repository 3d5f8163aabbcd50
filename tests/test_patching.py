"""patch_torch_ao: fastquant behind torch.ao's names, everywhere, until it is undone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.quantization
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, quiet
from processes import python
from zoo import SHARED_CLASSES, STATIC_CASES, ConvNet, Stubbed, torchvision_model

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_patch_reaches_code_that_cannot_be_edited() -> None:
    torchvision_model("resnet18")
    utils: Any = pytest.importorskip("torchvision.models.quantization.utils")
    outputs = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = Stubbed(tq, ConvNet()).eval()
        model.fuse_model = lambda: None
        x = torch.randn(2, 3, 8, 8)
        handle = fq.patch_torch_ao() if patched else None
        with quiet():
            utils.quantize_model(model, "fbgemm")
        if handle is not None:
            handle.undo()
        outputs.append(model(x))
    assert_same(outputs[1], outputs[0])


def globals_of_torch() -> dict[tuple[str, str], int]:
    """Identities of all that the modules of torch.ao.quantization hold."""
    return {
        (module.__name__, name): id(value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith(("torch.ao.quantization", "torch.quantization"))
        for name, value in list(vars(module).items())
    }


def test_a_patch_swaps_implementations_everywhere_and_takes_them_back() -> None:
    before = globals_of_torch()
    handle = fq.patch_torch_ao()
    try:
        for name in (
            *SHARED_CLASSES,
            "prepare",
            "convert",
            "quantize",
            "quantize_dynamic",
            "prepare_qat",
            "fuse_modules",
            "QConfig",
            "default_qconfig",
            "get_default_qconfig",
            "default_weight_fake_quant",
            "get_default_qat_module_mappings",
            "propagate_qconfig_",
        ):
            assert getattr(tq, name) is getattr(fq, name), name
        for module in ("torch.ao.quantization.observer", "torch.quantization.observer"):
            assert sys.modules[module].MinMaxObserver is fq.MinMaxObserver
        assert sys.modules["torch.ao.quantization.quantize"].convert is fq.convert
        assert sys.modules["torch.ao.quantization.fx.prepare"].PlaceholderObserver is (
            fq.PlaceholderObserver
        )
        learnable = sys.modules["torch.ao.quantization._learnable_fake_quantize"]
        assert learnable._LearnableFakeQuantize is fq.LearnableFakeQuantize
        assert tq.QuantStub is not fq.QuantStub
        assert tq.QuantType is not fq.QuantType
        assert handle.active
    finally:
        handle.undo()
    assert not handle.active
    assert {key: before[key] for key in globals_of_torch() if key in before} == before
    handle.undo()  # a second time changes nothing
    assert globals_of_torch()[("torch.ao.quantization", "prepare")] == id(tq.prepare)


def test_patches_nest_and_survive_exceptions() -> None:
    before = globals_of_torch()
    outer = fq.patch_torch_ao()
    with pytest.raises(ZeroDivisionError), fq.patch_torch_ao():
        _ = 1 // (tq.prepare is not fq.prepare)
    assert tq.prepare is fq.prepare
    inner = fq.patch_torch_ao()
    outer.undo()  # in any order
    assert tq.prepare is fq.prepare
    inner.undo()
    assert tq.prepare is not fq.prepare
    assert {key: before[key] for key in globals_of_torch() if key in before} == before


def test_a_patch_leaves_what_others_have_set_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine() -> None:
        return None

    monkeypatch.setattr(tq, "default_eval_fn", tq.default_eval_fn)  # put back at the end
    with fq.patch_torch_ao():
        assert tq.default_eval_fn is fq.default_eval_fn
        tq.default_eval_fn = mine
    assert tq.default_eval_fn is mine


def test_modules_imported_under_a_patch_get_torchs_names_back() -> None:
    script = """
import sys, fastquant as fq
before = set(sys.modules)
with fq.patch_torch_ao():
    import torch.quantization, torch.ao.quantization._correct_bias
    assert torch.quantization.prepare is fq.prepare
assert torch.quantization.prepare is torch.ao.quantization.prepare is not fq.prepare
for name, module in list(sys.modules.items()):
    if name.startswith(("torch.ao.quantization", "torch.quantization")):
        for attribute, value in vars(module).items():
            source = getattr(value, "__module__", None) or ""
            assert not str(source).startswith("fastquant"), (name, attribute, value)
"""
    run = python(script)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["lstm", "attention", "conv_net"])
def test_patched_code_gives_torchs_models(name: str) -> None:
    case = STATIC_CASES[name]

    def run() -> tuple[nn.Module, Tensor]:
        model = case.make(tq)
        model.qconfig = tq.get_default_qconfig("qnnpack")
        model = tq.prepare(model)
        model(*case.inputs(0))
        model = tq.convert(model)
        return model, model(*case.inputs(9))

    with quiet():
        _, expected = run()
    with fq.patch_torch_ao():
        model, found = run()
    assert_same(found, expected)
    # What was made under the patch works without it.
    assert_same(model(*case.inputs(9)), expected)


def test_a_model_prepared_under_a_patch_is_converted_without_it() -> None:
    case = STATIC_CASES["conv_net"]
    with fq.patch_torch_ao():
        model = case.make(tq)
        model.qconfig = tq.default_qconfig
        model = tq.prepare(model)
    model(*case.inputs(0))
    with quiet():
        by_torch = tq.convert(model)
    assert_same(by_torch(*case.inputs(9)), fq.convert(model)(*case.inputs(9)))
