"""The package's own FloatFunctional, beside torch.ao's."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.float_functional as room
from fastquant.nn import quantized
from fastquant.nn.float_functional import operations
from fastquant.nn.qat.float_functional import _shorten
from oracle import assert_same

NAMES = ("FloatFunctional", "FXFloatFunctional")
CALLS: dict[str, Any] = {
    "add": lambda f, x, y: f.add(x, y),
    "add_relu": lambda f, x, y: f.add_relu(x, y),
    "add_scalar": lambda f, x, y: f.add_scalar(x, 0.5),
    "mul": lambda f, x, y: f.mul(x, y),
    "mul_scalar": lambda f, x, y: f.mul_scalar(x, -2.0),
    "cat": lambda f, x, y: f.cat([x, y]),
    "cat of an axis": lambda f, x, y: f.cat([x, y], dim=1),
    "matmul": lambda f, x, y: f.matmul(x, y.T),
}


def test_users_get_torch_ao_s_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(getattr(room, name) is getattr(nnq, name) for name in NAMES)
    assert all(getattr(quantized, name) is getattr(nnq, name) for name in NAMES)
    with monkeypatch.context() as patched:
        patched.setattr("fastquant._torch.ao.nnq", None)
        chosen = vars(importlib.reload(room)).copy()
    importlib.reload(room)
    assert all(chosen[name] is getattr(operations, name) for name in NAMES)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_torch_ao_s(name: str, call: str) -> None:
    ours, theirs = (getattr(place, name)() for place in (operations, nnq))
    assert repr(ours) == repr(theirs)
    if name == "FloatFunctional":
        for module in (ours, theirs):
            module.activation_post_process = fq.FakeQuantize()
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for _ in range(2):
        assert_same(CALLS[call](ours, x, y), CALLS[call](theirs, x, y))
    assert_same(ours.state_dict(), theirs.state_dict())
    copy.deepcopy(ours).load_state_dict(theirs.state_dict(), strict=True)


def test_it_is_no_function_itself() -> None:
    for name in NAMES:
        with pytest.raises(RuntimeError, match="no forward"):
            getattr(operations, name)()(torch.ones(1))


class Model(nn.Module):
    def __init__(self, functional: nn.Module) -> None:
        super().__init__()
        self.functional = functional

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.functional.add_relu(x, y)
        return self.functional.cat([self.functional.mul(z, y), x])


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_scripted(name: str) -> None:
    model = Model(getattr(operations, name)())
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert_same(torch.jit.script(model)(x, y), model(x, y))


def test_one_op_adds_in_training() -> None:
    class Mine(operations.FloatFunctional):
        pass

    slow, fast = operations.FloatFunctional(), Mine()
    for name, lowest in (("add", -math.inf), ("add_relu", 0.0)):
        _shorten(Mine, name, lowest)
        for module in (slow, fast):
            module.activation_post_process = fq.FakeQuantize()
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        with torch.profiler.profile() as profile:
            result = getattr(fast, name)(x, y)
        assert "fastquant::add_observe_fake_quantize" in {e.name for e in profile.events()}
        assert_same(result, getattr(slow, name)(x, y))
        assert_same(fast.state_dict(), slow.state_dict())
