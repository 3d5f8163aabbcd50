"""Names of torch.ao.quantization that fastquant has not: errors that say where to find them."""

from __future__ import annotations

import importlib

import pytest

import fastquant
from oracle import quiet


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("quantize_fx", "torch.ao.quantization.quantize_fx"),
        ("backend_config", "torch.ao.quantization.quantize_fx"),
        ("quantize_pt2e", "torchao.quantization.pt2e"),
        ("prepare_jit", "torch.ao.quantization.quantize_jit"),
    ],
)
def test_what_is_not_for_eager_mode_says_where_it_is(name: str, instead: str) -> None:
    message = f"fastquant is for eager mode and has no '{name}': .*{instead}"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(f"fastquant.{name}")
    with pytest.raises(ImportError, match=message):
        exec(f"from fastquant import {name}")
    with pytest.raises(ImportError, match=message):
        exec(f"from fastquant.{name} import anything")
    with pytest.raises(AttributeError, match=message):
        getattr(fastquant, name)


def test_other_names_are_unknown_as_usual() -> None:
    assert not hasattr(fastquant, "nothing")
    with pytest.raises(ModuleNotFoundError, match=r"No module named .fastquant\.nothing") as caught:
        importlib.import_module("fastquant.nothing")
    assert caught.value.name == "fastquant.nothing"
    with pytest.raises(ModuleNotFoundError, match="No module named 'other'"):
        importlib.import_module("other.quantize_fx")


def test_fx_takes_fastquants_default_mapping_as_the_message_says() -> None:
    import torch
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = fastquant.get_default_qconfig_mapping()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).eval()
    with quiet():
        prepared = prepare_fx(model, mapping, torch.randn(1, 2))
    assert any(isinstance(m, fastquant.HistogramObserver) for m in prepared.modules())
