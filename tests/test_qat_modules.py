"""Batch norm folded into weights in QAT: torch.ao's function, by way of the weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from fastquant.nn.qat.batch_norm import _scaled, _unscaled
from oracle import quiet

SHAPES = {1: (4, 3, 9), 2: (4, 3, 6, 6), 3: (2, 3, 4, 4, 4)}


def fused(dims: int, relu: bool, bias: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(dims)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 5, 3, bias=bias)
    bn = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](5)
    name = f"ConvBn{'ReLU' if relu else ''}{dims}d"
    parts = (conv, bn, nn.ReLU()) if relu else (conv, bn)
    return getattr(nni, name)(*parts), torch.randn(SHAPES[dims])


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nni.LinearBn1d(nn.Linear(6, 5), nn.BatchNorm1d(5)), torch.randn(8, 6)


CASES = {
    **{
        f"conv{dims}d-{'relu' if relu else 'plain'}-{'bias' if bias else 'nobias'}": (
            fused(dims, relu, bias)
        )
        for dims in (1, 2, 3)
        for relu in (False, True)
        for bias in (False, True)
    },
    "linear": linear(),
}


def qat(module: nn.Module) -> Any:
    model = nn.Sequential(copy.deepcopy(module)).train()
    # Weights 16 bits wide: a last-bit difference may not become a whole step.
    fake = {"observer": fq.MovingAveragePerChannelMinMaxObserver, "dtype": torch.int32}
    weight = fq.FakeQuantize.with_args(
        **fake, quant_min=-32768, quant_max=32767, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    model.qconfig = fq.QConfig(activation=nn.Identity, weight=weight)
    return fq.prepare_qat(model)[0]


def step(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one step, with running statistics that are not 0 and 1."""
    x = x.clone().requires_grad_()
    module.bn.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, "running_var": module.bn.running_var}


@pytest.mark.parametrize("name", CASES)
def test_the_function_and_its_gradients_are_torchs(
    name: str, request: pytest.FixtureRequest
) -> None:
    module, x = CASES[name]
    ours = step(qat(module), x)
    request.getfixturevalue("torchs_batch_norm_folding")
    theirs = step(qat(module), x)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(
            value, theirs[key], rtol=1e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("function", [_scaled, _unscaled])
@pytest.mark.parametrize("learns", [True, False])
def test_gradients_of_scaling_are_its_derivatives(function: Any, learns: bool) -> None:
    weight = torch.randn(3, 2, 2, dtype=torch.double, requires_grad=True)
    scale = (torch.rand(3, 1, 1, dtype=torch.double) + 0.5).requires_grad_(learns)
    assert torch.autograd.gradcheck(function, (weight, scale))
    assert torch.autograd.gradgradcheck(function, (weight, scale))


def test_the_output_is_not_passed_over_again() -> None:
    module, x = CASES["conv2d-plain-nobias"]
    prepared = qat(module)
    with torch.profiler.profile(record_shapes=True) as profile:
        y = prepared(x)
        y.sum().backward()
    divisions = [e for e in profile.events() if e.name in ("aten::div", "aten::neg")]
    assert divisions, "the weights are divided"
    assert all(list(y.shape) not in e.input_shapes for e in divisions)


def test_torchs_own_fake_quantize_keeps_torchs_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = CASES["conv2d-plain-bias"]
    results = []
    for folded in (True, False):
        if not folded:
            cls = next(c for c in type(qat(module)).__mro__ if "_forward_approximate" in vars(c))
            monkeypatch.setattr(cls, "_forward_approximate", cls._forward_approximate.__wrapped__)
        with quiet():
            model = nn.Sequential(copy.deepcopy(module)).train()
            model.qconfig = tq.get_default_qat_qconfig("x86")
            results.append(step(tq.prepare_qat(model)[0], x))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_modules_stay_torchs_and_can_be_pickled() -> None:
    module, x = CASES["conv2d-relu-bias"]
    prepared = qat(module)
    assert type(prepared).__module__.startswith("torch.ao.nn.intrinsic.qat")
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again(x), copy.deepcopy(prepared)(x))


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    module = nni.ConvBn2d(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))
    prepared = qat(module)
    with pytest.raises(AssertionError, match="running statistics"):
        prepared(torch.randn(SHAPES[2]))
