"""torch.ao's numeric suite, on models that fastquant prepared and converted."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.ao.ns import _numeric_suite as suite

import fastquant as fq
from oracle import quiet
from zoo import STATIC_CASES, STATIC_QCONFIGS

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["conv_net", "residual", "linears", "nested"]


def pair(name: str, ns: types.ModuleType) -> tuple[Any, Any, Any]:
    """A float model, fused; the prepared one; the converted one."""
    case = STATIC_CASES[name]
    model = case.make(ns)
    if case.fusable:
        model = ns.fuse_modules(model, [list(names) for names in case.fusable])
    with quiet():
        prepared = case.calibrated(ns, STATIC_QCONFIGS["minmax"], fuse=bool(case.fusable))
        return model, prepared, ns.convert(copy.deepcopy(prepared))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_compared_as_those_of_torch_ao(name: str) -> None:
    compared = []
    for ns in (fq, tq):
        model, _, converted = pair(name, ns)
        compared.append(suite.compare_weights(model.state_dict(), converted.state_dict()))
    ours, theirs = compared
    assert ours.keys() == theirs.keys()
    assert ours
    for key, weights in ours.items():
        assert torch.equal(weights["float"], theirs[key]["float"])
        assert torch.equal(weights["quantized"].int_repr(), theirs[key]["quantized"].int_repr())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_compared_as_those_of_torch_ao(name: str) -> None:
    compared = []
    for ns in (fq, tq):
        model, _, converted = pair(name, ns)
        with quiet():
            inputs = STATIC_CASES[name].inputs(0)
            compared.append(suite.compare_model_outputs(model, converted, *inputs))
    ours, theirs = compared
    assert ours.keys() == theirs.keys()
    assert ours
    for key, outputs in ours.items():
        for side in ("float", "quantized"):
            for mine, its in zip(outputs[side], theirs[key][side], strict=True):
                assert torch.equal(dequantized(mine), dequantized(its)), (key, side)


def dequantized(x: Tensor) -> Tensor:
    return x.dequantize() if x.is_quantized else x


def test_shadow_modules_run_beside_converted_ones() -> None:
    model, _, converted = pair("conv_net", fq)
    with quiet():
        stubs = suite.compare_model_stub(
            model, converted, [nn.Linear, torch.ao.nn.intrinsic.ConvReLU2d],
            *STATIC_CASES["conv_net"].inputs(0),
        )  # fmt: skip
    assert len(stubs) == 2
    for logged in stubs.values():
        exact, rounded = logged["float"][0], logged["quantized"][0]
        error = (exact - dequantized(rounded)).abs().max()
        assert error < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_prepared_models_are_compared_as_those_of_torch_ao(name: str) -> None:
    compared = []
    for ns in (fq, tq):
        model, prepared, _ = pair(name, ns)
        with quiet():
            shadowed = suite.compare_model_stub(
                model, prepared, [nn.Linear, nn.Conv2d], *STATIC_CASES[name].inputs(0)
            )
            weights = suite.compare_weights(model.state_dict(), prepared.state_dict())
        compared.append((shadowed, weights))
    ours, theirs = compared
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
    assert ours[0]
    for key, logged in ours[0].items():
        for side in ("float", "quantized"):
            for x, y in zip(logged[side], theirs[0][key][side], strict=True):
                assert torch.equal(x, y)
