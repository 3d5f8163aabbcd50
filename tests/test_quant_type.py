"""Kinds of quantization, by name and by number."""

from __future__ import annotations

import pytest
import torch.ao.quantization as tq

import fastquant as fq


def test_kinds_have_torchs_names_and_numbers() -> None:
    assert fq.QuantType.QAT == tq.QuantType.QAT
    for quant_type in tq.QuantType:
        name = tq.quant_type._get_quant_type_to_str(quant_type)
        assert fq.quant_type._get_quant_type_to_str(fq.QuantType(quant_type)) == name
        assert fq.quant_type._quant_type_from_str(name) == quant_type
    with pytest.raises(ValueError, match="unknown QuantType name 'none'"):
        fq.quant_type._quant_type_from_str("none")
