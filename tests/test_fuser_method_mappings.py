"""Which fuser method serves which run of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch.ao.quantization as tq
from torch import nn

import fastquant as fq
from fastquant.fuser_method_mappings import (
    _get_valid_patterns,
    _reverse2,
    _reverse3,
    _sequential_wrapper2,
)
from fastquant.utils import MatchAllNode


def test_fuser_methods_are_looked_up() -> None:
    assert fq.get_fuser_method((nn.Conv2d, nn.BatchNorm2d)) is fq.fuse_conv_bn
    assert fq.get_fuser_method((nn.Conv2d, nn.BatchNorm2d), {(nn.Conv2d, nn.BatchNorm2d): id}) is id
    mapping = {(nn.ReLU, (nn.BatchNorm2d, MatchAllNode)): "any", (nn.ReLU, nn.Linear): "exact"}
    assert fq.get_fuser_method_new((nn.ReLU, nn.Linear), mapping) == "exact"
    assert fq.get_fuser_method_new((nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)), mapping) == "any"
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fq.get_fuser_method_new((nn.Tanh, nn.Tanh), mapping)


def test_patterns_match_torchs() -> None:
    for pattern in ((nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)), (nn.ReLU, nn.Linear), nn.ReLU):
        theirs = tq.fuser_method_mappings._get_valid_patterns(pattern)
        assert _get_valid_patterns(pattern) == theirs


def test_wrapped_methods_take_modules_in_their_own_order() -> None:
    def note(*args: Any) -> Any:
        return args

    assert _reverse2(note)(True, "second", "first") == (True, "first", "second")
    assert _reverse3(note)(False, "third", ("second", "first")) == (
        False,
        "first",
        "second",
        "third",
    )
    assert _sequential_wrapper2(note)(True, "first", "second") == ("first", "second")
