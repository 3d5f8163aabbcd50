"""The package's own fused layers for quantization-aware training, beside torch.ao's."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.quantization as tq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.intrinsic.qat as room
from fastquant.nn import intrinsic as nni
from fastquant.nn.intrinsic.qat import with_batch_norm, with_relu
from fastquant.nn.qat.blocks import teach_blocks
from oracle import assert_same, quiet

pytestmark = pytest.mark.usefixtures("one_thread")

QCONFIG = fq.get_default_qat_qconfig("x86")
OURS = {
    name: getattr(place, name)
    for place in (with_relu, with_batch_norm)
    for name in room.__all__
    if hasattr(place, name)
}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def run(module: Any, x: Tensor) -> dict[str, Any]:
    """What two training steps and an evaluation do, and every number that the module keeps."""
    found: dict[str, Any] = {}
    for step in range(2):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        grads = [t.grad for t in (*module.parameters(), leaf)]
        found[str(step)] = [y.detach(), *(g for g in grads if g is not None)]
    evaluated = copy.deepcopy(module).eval()
    return {**found, **module.state_dict(), "evaluated": evaluated(x).detach()}


def fused(name: str, **arguments: Any) -> tuple[Any, Tensor]:
    """A float module that becomes one of this name, in training mode, and an input."""
    torch.manual_seed(0)
    dims = 0 if "Linear" in name else int(name[-2])
    parts: list[nn.Module] = [
        CONVS[dims](4, 6, 2, **arguments) if dims else nn.Linear(4, 6, **arguments)
    ]
    if "Bn" in name:
        parts.append(BATCH_NORMS[max(dims, 1)](6, eps=1e-3, momentum=0.2))
        with torch.no_grad():
            parts[1].weight.uniform_(-2, 2)  # type: ignore[union-attr, operator]
            parts[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    if "ReLU" in name:
        parts.append(nn.ReLU())
    module = getattr(nni, name)(*parts).train()
    module.qconfig = QCONFIG
    return module, torch.randn(5, 4, *[6, 5, 4][:dims])


def both(name: str, **arguments: Any) -> tuple[Any, Any, Tensor]:
    module, x = fused(name, **arguments)
    if "ReLU" in name and "Bn" not in name:
        module[0].qconfig = QCONFIG  # torch.ao reads it there
    made = []
    for cls in (OURS[name], getattr(nniqat, name)):
        torch.manual_seed(1)
        made.append(cls.from_float(copy.deepcopy(module)))
        made.append(torch.rand(3))
    if name != "LinearBn1d":  # whose bias torch.ao leaves as the memory was
        assert_same(made[1], made[3])  # the same numbers were drawn
    return made[0], made[2], x


every_name = pytest.mark.parametrize("name", sorted(OURS))
with_bn = pytest.mark.parametrize("name", [name for name in sorted(OURS) if "Bn" in name])


def test_every_name_of_torch_ao_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in dir(nniqat) if name[0].isupper()]
    assert sorted(OURS) == sorted(names)
    assert set(room.__all__) == {*names, "freeze_bn_stats", "update_bn_stats"}
    assert all(getattr(room, name) is getattr(nniqat, name) for name in names)
    with monkeypatch.context() as patched:
        patched.setattr("fastquant._torch.ao.nniqat", None)
        chosen = vars(importlib.reload(room)).copy()
    importlib.reload(room)
    assert all(chosen[name] is OURS[name] for name in names)


@st.composite
def settings_of_convolutions(draw: Any) -> dict[str, Any]:
    return {
        "stride": draw(st.sampled_from((1, 2))),
        "padding": draw(st.sampled_from((0, 1))),
        "dilation": draw(st.sampled_from((1, 2))),
        "groups": draw(st.sampled_from((1, 2))),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(("zeros", "circular"))),
    }


@given(st.sampled_from(sorted(OURS)), settings_of_convolutions())
def test_layers_are_torch_ao_s(name: str, arguments: dict[str, Any]) -> None:
    teach_blocks()  # has torch.ao's fold on the weight's side, too
    arguments = {"bias": arguments["bias"]} if "Linear" in name else arguments
    ours, theirs, x = both(name, **arguments)
    assert isinstance(ours, nni._FusedModule)
    assert repr(ours) == repr(theirs)
    fresh, copied = copy.deepcopy(ours), copy.deepcopy(theirs)
    assert_same(run(ours, x), run(theirs, x))
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    copied.load_state_dict(ours.state_dict(), strict=True)
    assert_same(run(fresh, x), run(copied, x))
    back, expected = (module.eval().to_float() for module in (ours, theirs))
    assert repr(back) == repr(expected)
    assert not any(module.training for module in back.modules())
    assert_same(back.state_dict(), expected.state_dict())


@with_bn
def test_with_other_fake_quantizers_they_are_the_same_up_to_rounding(name: str) -> None:
    with quiet():
        qconfig = tq.get_default_qat_qconfig("x86", version=0)
        module, x = fused(name)
        module.qconfig = qconfig
        made = [
            cls.from_float(copy.deepcopy(module)) for cls in (OURS[name], getattr(nniqat, name))
        ]
        found, expected = (run(block, x) for block in made)
    for key in ("0", "evaluated"):
        torch.testing.assert_close(found[key], expected[key], rtol=2e-3, atol=2e-3)


@with_bn
def test_channels_that_gamma_has_pruned_stay_numbers(name: str) -> None:
    ours, _, x = both(name)
    with torch.no_grad():
        ours.bn.weight[2], ours.bn.bias[2] = 0, 1
    found = run(ours, x)
    assert all(t.isfinite().all() for t in found["0"])
    assert (found["0"][0][:, 2] == 1).all()
    assert ours.bn.weight.grad[2] != 0


@pytest.mark.parametrize("name", [name for name in sorted(OURS) if name.startswith("ConvBn")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_slow_path_is_torch_ao_s(name: str, bias: bool, frozen: bool) -> None:
    ours, theirs, x = both(name, bias=bias)
    for module in (ours, theirs):
        module._enable_slow_path_for_better_numerical_stability = True
        if frozen:
            module.freeze_bn_stats()
    assert_same(run(ours, x), run(theirs, x))


@with_bn
def test_freezing_is_torch_ao_s(name: str) -> None:
    teach_blocks()
    ours, theirs, x = both(name)
    for step in (
        lambda m: m.freeze_bn_stats(),
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.update_bn_stats(),
        lambda m: m.train(),
        lambda m: m.reset_running_stats(),
    ):
        for module in (ours, theirs):
            step(module)
        assert ours.freeze_bn == theirs.freeze_bn
        assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
        assert_same(run(ours, x), run(theirs, x))


@with_bn
def test_functions_freeze_torch_ao_s_layers(name: str) -> None:
    _, theirs, x = both(name)
    model = nn.Sequential(nn.Identity(), theirs)
    model.apply(room.freeze_bn_stats)
    before = copy.deepcopy(theirs.bn.state_dict())
    theirs.train()(x)
    assert_same(theirs.bn.state_dict(), before)
    model.apply(room.update_bn_stats)
    theirs(x)
    assert theirs.bn.num_batches_tracked == before["num_batches_tracked"] + 1


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("renamed", [False, True])
def test_states_of_older_versions_are_read(version: int | None, renamed: bool) -> None:
    for name in ("ConvBn2d", "ConvBnReLU3d"):
        ours, theirs, x = both(name)
        run(theirs, x)
        state = theirs.state_dict()
        state._metadata[""] = {} if version is None else {"version": version}
        if renamed:
            for new, old in {
                "weight": "gamma",
                "bias": "beta",
                "running_mean": "running_mean",
                "running_var": "running_var",
                "num_batches_tracked": "num_batches_tracked",
            }.items():
                state[old] = state.pop(f"bn.{new}")
        ours.load_state_dict(copy.deepcopy(state), strict=True)
        assert_same(ours.state_dict(), theirs.state_dict())
        theirs.load_state_dict(copy.deepcopy(state), strict=True)
        state.pop("beta" if renamed else "bn.bias")
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match=r"bn\.bias"):
                module.load_state_dict(copy.deepcopy(state), strict=True)


@every_name
def test_constructors_take_torch_ao_s_arguments(name: str) -> None:
    made = []
    for cls in (OURS[name], getattr(nniqat, name)):
        torch.manual_seed(0)
        arguments = (3, 4) if "Linear" in name else (3, 4, 2)
        bn = {"eps": 0.1, "momentum": 0.3, "freeze_bn": True} if "Bn" in name else {}
        made.append(cls(*arguments, bias=name != "LinearBn1d", **bn, qconfig=QCONFIG))
    ours, theirs = made
    assert_same(ours.state_dict(), theirs.state_dict())
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert repr(ours) == repr(theirs)


def test_random_weights_of_a_linear_layer_are_numbers() -> None:
    torch.manual_seed(0)
    bias = OURS["LinearBn1d"](9, 4, qconfig=QCONFIG).bias
    assert (bias.abs() <= 1 / 3).all()
    assert bias.unique().numel() == 4


@every_name
def test_mistakes_are_named(name: str) -> None:
    module, _ = fused(name)
    with pytest.raises(ValueError, match=rf"{name}\.from_float takes a {name}, got Identity"):
        OURS[name].from_float(nn.Identity())
    del module.qconfig
    with pytest.raises(ValueError, match=rf"this {name} has none"):
        OURS[name].from_float(module)
    with pytest.raises(ValueError, match=rf"{name} needs a qconfig"):
        OURS[name](*((3, 4) if "Linear" in name else (3, 4, 2)))
    if "Bn" in name:
        ours, *_ = both(name)
        ours.bn.running_mean = ours.bn.running_var = None
        with pytest.raises(AssertionError, match="running statistics"):
            ours.to_float()


def test_a_model_prepared_with_these_layers_trains_as_with_torch_ao_s() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.ReLU()),
    )
    runs = [["0", "1", "2"], ["3", "4"], ["6", "7"], ["8", "9"]]
    fq.fuse_modules_qat(model.train(), runs, inplace=True)
    model.qconfig = QCONFIG  # type: ignore[assignment]
    mapping = {getattr(nni, name): cls for name, cls in OURS.items()}
    ours = fq.prepare_qat(model, mapping)
    theirs = fq.prepare_qat(model)
    assert type(ours[0]) is OURS["ConvBnReLU2d"]
    x = torch.randn(5, 3, 6, 6)
    found, expected = run(ours, x), run(theirs, x)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["0"], expected["0"], rtol=1e-3, atol=1e-3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
