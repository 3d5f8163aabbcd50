"""Which module is swapped for which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import nn

import fastquant as fq
from fastquant.quantization_mappings import (
    _get_special_act_post_process,
    _has_special_act_post_process,
)
from oracle import recipe

TABLES = [name for name in tq.quantization_mappings.__all__ if name.isupper()]

GETTERS = [
    name
    for name in tq.quantization_mappings.__all__
    if name.startswith("get_") and name.endswith(("mappings", "list"))
] + ["no_observer_set"]


def without_our_stubs(mapping: Any) -> Any:
    stubs = (fq.QuantStub, fq.DeQuantStub)
    if isinstance(mapping, dict):
        return {
            key: recipe(value) if hasattr(value, "p") else value
            for key, value in mapping.items()
            if key not in stubs
        }
    return {key for key in mapping if key not in stubs}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_torchs(name: str) -> None:
    ours = getattr(fq.quantization_mappings, name)
    theirs = getattr(tq.quantization_mappings, name)
    assert without_our_stubs(ours) == without_our_stubs(theirs)
    assert getattr(fq, name) is ours


@pytest.mark.parametrize("name", GETTERS)
def test_getters_are_torchs_and_give_copies(name: str) -> None:
    ours = getattr(fq, name)()
    assert without_our_stubs(ours) == without_our_stubs(getattr(tq, name)())
    ours.clear()
    assert getattr(fq, name)()


def test_our_stubs_are_mapped_as_torchs_are() -> None:
    for mapping in (
        fq.get_default_static_quant_module_mappings(),
        fq.get_default_static_quant_reference_module_mappings(),
    ):
        assert mapping[fq.QuantStub] is mapping[tq.QuantStub] is nnq.Quantize
        assert mapping[fq.DeQuantStub] is mapping[tq.DeQuantStub] is nnq.DeQuantize


def test_quantized_counterparts_are_looked_up() -> None:
    assert fq.get_static_quant_module_class(nn.Linear) is nnq.Linear
    assert fq.get_static_quant_module_class(nn.Linear, {nn.Linear: int}) is int
    assert (
        fq.get_static_quant_module_class(nn.Linear, is_reference=True)
        is torch.ao.nn.quantized.reference.Linear
    )
    assert fq.get_dynamic_quant_module_class(nn.LSTM) is torch.ao.nn.quantized.dynamic.LSTM
    assert fq.get_dynamic_quant_module_class(nn.ReLU, {nn.ReLU: int}) is int
    assert fq.get_quantized_operator(F.elu) is torch.ops.quantized.elu
    for look_up in (
        fq.get_static_quant_module_class,
        fq.get_dynamic_quant_module_class,
        fq.get_quantized_operator,
    ):
        with pytest.raises(AssertionError, match="has no quantized counterpart"):
            look_up(nn.Bilinear)


def test_special_activations_are_special_in_training_only() -> None:
    sigmoid = nn.Sigmoid()
    assert _get_special_act_post_process(sigmoid) is fq.default_fixed_qparams_range_0to1_fake_quant
    assert _get_special_act_post_process(nn.ReLU()) is None
    assert _has_special_act_post_process(sigmoid)
    assert not _has_special_act_post_process(sigmoid.eval())
