"""Fake-quantize whose scale and zero point are learned, beside torch.ao."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.ao.quantization.fake_quantize as torch_fake_quantize
import torch.ao.quantization.observer as torch_observer
from torch.ao.quantization._learnable_fake_quantize import (
    _LearnableFakeQuantize as TorchLearnable,
)

from fastquant import fake_quantize, observer
from fastquant.fake_quantize import (
    LearnableFakeQuantize,
)
from fastquant.observer import (
    MovingAverageMinMaxObserver,
)
from fastquant.utils import QuantizationError
from oracle import (
    assert_runs_same,
    assert_same,
    assert_same_state,
    assert_unchanged,
    quiet,
    snapshot,
)


def learnable_pair(**kwargs: Any) -> tuple[Any, Any]:
    per_channel = "channel_len" in kwargs
    name = f"MovingAverage{'PerChannel' if per_channel else ''}MinMaxObserver"
    # Unsigned where affine: torch's backward takes a negative zero point for the next one.
    if "affine" in str(kwargs["qscheme"]):
        kwargs = {"quant_min": 0, "quant_max": 255, **kwargs}
    else:
        kwargs = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, **kwargs}
    with quiet():
        theirs = TorchLearnable(getattr(torch_observer, name), **kwargs)
    return LearnableFakeQuantize(getattr(observer, name), **kwargs), theirs


@pytest.mark.parametrize("use_grad_scaling", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"qscheme": torch.per_tensor_affine},
        {"qscheme": torch.per_tensor_symmetric, "zero_point": 2.0},
        {"qscheme": torch.per_channel_affine, "channel_len": 4, "ch_axis": 0},
        {"qscheme": torch.per_channel_symmetric, "channel_len": 5, "ch_axis": 1},
    ],
    ids=["tensor-affine", "tensor-symmetric", "channel-affine", "channel-symmetric"],
)
def test_learnable_is_torchs(kwargs: dict[str, Any], use_grad_scaling: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = learnable_pair(**kwargs, use_grad_scaling=use_grad_scaling)
    assert_same_state(ours, theirs)
    for mode in (
        "enable_static_observation",
        "enable_static_estimate",
        "enable_param_learning",
        "enable_static_estimate",
    ):
        getattr(ours, mode)()
        getattr(theirs, mode)()
        for _ in range(2):
            x = torch.randn(4, 5, 6)
            for module in (ours, theirs):
                module.zero_grad()
            assert_runs_same(ours, theirs, x)
            assert_same_state(ours, theirs)
            for name in ("scale", "zero_point"):
                mine, expected = getattr(ours, name), getattr(theirs, name)
                assert mine.requires_grad == expected.requires_grad
                assert (mine.grad is None) == (expected.grad is None)
                if mine.grad is not None:
                    torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-4)
            if mode == "enable_param_learning":
                with torch.no_grad():
                    for module in (ours, theirs):
                        module.scale -= 1e-3
                        module.zero_point += 0.4
    for mine, expected in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert_same(mine, expected)


def test_a_learned_scale_follows_its_gradient() -> None:
    ours, _ = learnable_pair(qscheme=torch.per_tensor_symmetric, scale=1.0)
    ours.enable_param_learning()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-4)
    x = torch.linspace(-1, 1, 1001)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (ours(x) - x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_learnable_module_may_be_called_twice_a_step() -> None:
    ours, _ = learnable_pair(qscheme=torch.per_tensor_affine)
    ours.enable_param_learning()
    (ours(torch.randn(3)) + ours(torch.randn(3))).sum().backward()


def test_learnable_modes_chain_and_toggle() -> None:
    ours, _ = learnable_pair(qscheme=torch.per_tensor_affine)
    assert ours.enable_param_learning() is ours
    assert ours.toggle_fake_quant(False).toggle_observer_update(True) is ours
    assert (int(ours.fake_quant_enabled), int(ours.static_enabled)) == (0, 1)
    ours.apply(fake_quantize.disable_observer)
    assert int(ours.static_enabled) == 0
    ours.apply(torch_fake_quantize.enable_observer)
    assert int(ours.static_enabled) == 1
    assert fake_quantize._LearnableFakeQuantize is LearnableFakeQuantize


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quant_min": 5, "quant_max": 5}, "less than quant_max"),
        ({"quant_min": -129, "quant_max": 0}, "quant_min out of bound"),
        ({"quant_min": 0, "quant_max": 200}, "quant_max out of bound"),
        ({"channel_len": 0}, "channel_len"),
    ],
)
def test_learnable_refuses_bad_configurations(kwargs: dict[str, Any], message: str) -> None:
    config = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, **kwargs}
    with pytest.raises(QuantizationError, match=message):
        LearnableFakeQuantize(MovingAverageMinMaxObserver, **config)


def test_learnable_refuses_another_number_of_channels() -> None:
    ours, _ = learnable_pair(qscheme=torch.per_channel_affine, channel_len=4)
    before = snapshot(ours)
    with pytest.raises(ValueError, match="scale must have one element for each of the 3 channels"):
        ours(torch.randn(3, 2))
    assert_unchanged(ours, before)


def test_learnable_takes_what_torchs_takes() -> None:
    mine, theirs = (
        inspect.signature(c).parameters for c in (LearnableFakeQuantize, TorchLearnable)
    )
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]
    public = {name for name in vars(TorchLearnable) if not name.startswith("_")}
    assert public <= set(dir(LearnableFakeQuantize))
