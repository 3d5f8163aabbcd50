"""The package's own fused modules, beside torch.ao's."""

from __future__ import annotations

import copy
import importlib
import operator
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.nn.utils import parametrizations

import fastquant.nn.intrinsic as room
from fastquant.nn.intrinsic import fused
from oracle import assert_same

# What each class is made of, by the names of its arguments, and the shape of an input.
PARTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
for dims in (1, 2, 3):
    image = (4, 3, 7, 6, 5)[: dims + 2]
    conv = getattr(nn, f"Conv{dims}d")
    bn = getattr(nn, f"BatchNorm{dims}d")
    PARTS |= {
        f"ConvReLU{dims}d": ({"conv": lambda c=conv: c(3, 4, 3), "relu": nn.ReLU}, image),
        f"ConvBn{dims}d": (
            {"conv": lambda c=conv: c(3, 4, 3, bias=False), "bn": lambda b=bn: b(4)},
            image,
        ),
        f"ConvBnReLU{dims}d": (
            {"conv": lambda c=conv: c(3, 4, 3), "bn": lambda b=bn: b(4), "relu": nn.ReLU},
            image,
        ),
    }
for dims in (2, 3):
    bn = getattr(nn, f"BatchNorm{dims}d")
    image = (4, 3, 7, 6, 5)[: dims + 2]
    PARTS[f"BNReLU{dims}d"] = ({"batch_norm": lambda b=bn: b(3), "relu": nn.ReLU}, image)
for name, last in {
    "LinearReLU": {"relu": nn.ReLU},
    "LinearBn1d": {"bn": lambda: nn.BatchNorm1d(4)},
    "LinearLeakyReLU": {"leaky_relu": lambda: nn.LeakyReLU(0.3)},
    "LinearTanh": {"tanh": nn.Tanh},
}.items():
    PARTS[name] = ({"linear": lambda: nn.Linear(3, 4), **last}, (5, 3))

CHAINS = sorted(PARTS)


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.ao's, with the same numbers."""
    parts = {key: make() for key, make in PARTS[name][0].items()}
    return tuple(  # type: ignore[return-value]
        getattr(place, name)(**copy.deepcopy(parts)) for place in (fused, nni)
    )


def run(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of parameters and inputs."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    module.zero_grad()
    y = module(*inputs)
    y.square().sum().backward()
    return [y, *(p.grad for p in (*module.parameters(), *inputs)), *module.buffers()]


def test_every_name_of_torch_ao_is_there() -> None:
    assert set(nni.__all__) == set(room.__all__)
    assert all(issubclass(getattr(fused, name), fused._FusedModule) for name in nni.__all__)
    assert {"ConvAdd2d", "ConvAddReLU2d", *PARTS} == set(nni.__all__)


def test_users_get_torch_ao_classes_where_there_are_any() -> None:
    assert all(getattr(room, name) is getattr(nni, name) for name in nni.__all__)
    assert room._FusedModule is nni._FusedModule


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("training", [False, True])
def test_a_run_of_modules_is_torch_ao_s(name: str, training: bool) -> None:
    ours, theirs = both(name)
    assert repr(ours) == repr(theirs)
    x = torch.randn(PARTS[name][1])
    assert_same(run(ours.train(training), x), run(theirs.train(training), x))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    other, _ = both(name)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(run(copy.deepcopy(other).train(training), x), run(theirs, x))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(torch.jit.script(ours.eval())(x), theirs.eval()(x))


@pytest.mark.parametrize("name", CHAINS)
def test_arguments_go_by_position_too(name: str) -> None:
    parts = [make() for make in PARTS[name][0].values()]
    assert [*getattr(fused, name)(*parts)] == parts


@pytest.mark.parametrize("name", CHAINS)
def test_other_parts_are_refused_in_words(name: str) -> None:
    names = [*PARTS[name][0]]

    class Mine(nn.Identity):
        pass

    for wrong in names:
        parts = {key: make() for key, make in PARTS[name][0].items()}
        kinds = ", ".join(type(part).__name__ for part in parts.values())
        parts[wrong] = Mine()
        with pytest.raises(ValueError, match=rf"{name} is made of {kinds}; got .*Mine"):
            getattr(fused, name)(**parts)
        with pytest.raises(AssertionError):
            getattr(nni, name)(**parts)


def test_parametrized_layers_are_taken() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 5, 5)
    assert_same(fused.ConvReLU2d(conv, nn.ReLU())(x), nni.ConvReLU2d(conv, nn.ReLU())(x))


@pytest.mark.parametrize("name", ["ConvAdd2d", "ConvAddReLU2d"])
@pytest.mark.parametrize("add", [torch.add, operator.add, "module"])
def test_sums_are_torch_ao_s(name: str, add: Any) -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + 2 * y

    add = Add() if add == "module" else add
    relu = [nn.ReLU()] if "ReLU" in name else []
    conv = nn.Conv2d(3, 4, 3)
    made = [getattr(place, name)(*copy.deepcopy((conv, add, *relu))) for place in (fused, nni)]
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    assert_same(run(made[0], x, y), run(made[1], x, y))
    assert [*made[0].state_dict()] == [*made[1].state_dict()]
    assert repr(made[0]) == repr(made[1])


def test_without_torch_ao_the_classes_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("fastquant._torch.ao.nni", None)
        chosen = vars(importlib.reload(room)).copy()
    importlib.reload(room)
    assert all(chosen[name] is getattr(fused, name) for name in (*nni.__all__, "_FusedModule"))
    assert room.LinearReLU is nni.LinearReLU
