"""Config mappings, which say by type and name what each module of a model gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch.ao.quantization as tq

import fastquant as fq
from oracle import quiet, recipes

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")


def mapping_recipe(mapping: Any) -> Any:
    return {
        style: [(key[:-1], recipes(key[-1])) for key in mapping[style]]
        if isinstance(mapping[style], list)
        else recipes(mapping[style])
        for style in mapping
    }


def by_type(mapping: dict[str, Any]) -> dict[Any, Any]:
    return {key: recipes(qconfig) for key, qconfig in mapping["object_type"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qat", [False, True])
def test_config_mappings_of_backends_are_torchs(backend: str, qat: bool) -> None:
    name = "get_default_qat_qconfig" if qat else "get_default_qconfig"
    theirs = getattr(tq, f"{name}_mapping")(backend).to_dict()
    with quiet():
        assert getattr(tq, f"{name}_dict")(backend).keys() == theirs.keys()
    ours = getattr(fq, f"{name}_mapping")(backend)
    assert isinstance(ours, tq.QConfigMapping)
    for mapping in (ours.to_dict(), getattr(fq, f"{name}_dict")(backend)):
        assert recipes(mapping[""]) == recipes(theirs[""])
        assert by_type(mapping) == by_type(theirs)


@pytest.mark.parametrize(
    "name", ["_get_symmetric_qnnpack_qconfig_mapping", "_get_symmetric_qnnpack_qat_qconfig_mapping"]
)
def test_symmetric_config_mappings_are_torchs(name: str) -> None:
    ours = getattr(fq.qconfig_mapping, name)().to_dict()
    theirs = getattr(tq.qconfig_mapping, name)().to_dict()
    assert recipes(ours[""]) == recipes(theirs[""])
    assert by_type(ours) == by_type(theirs)
