"""Fusing modules, against torch.ao.quantization and by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import nn

import fastquant as fq
import fastquant.nn.intrinsic as nni
from fastquant.fuse_modules import fuse_known_modules
from fastquant.fuser_method_mappings import (
    _DEFAULT_OP_LIST_TO_FUSER_METHOD,
)
from oracle import assert_same
from zoo import ConvNet, tree

LAYERS: dict[type, Callable[[], nn.Module]] = {
    nn.Conv1d: lambda: nn.Conv1d(3, 4, 2),
    nn.Conv2d: lambda: nn.Conv2d(3, 4, 2, bias=False),
    nn.Conv3d: lambda: nn.Conv3d(3, 4, 2),
    nn.ConvTranspose1d: lambda: nn.ConvTranspose1d(3, 4, 2),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(3, 4, 2),
    nn.ConvTranspose3d: lambda: nn.ConvTranspose3d(3, 4, 2),
    nn.Linear: lambda: nn.Linear(3, 4),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(4),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(4),
    nn.BatchNorm3d: lambda: nn.BatchNorm3d(4),
    nn.ReLU: nn.ReLU,
}
SHAPES = {"1d": (2, 3, 5), "2d": (2, 3, 5, 5), "3d": (2, 3, 3, 3, 3), "ar": (2, 3)}
PATTERNS = sorted(
    tq.fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD,
    key=lambda types: [cls.__name__ for cls in types],
)


def build(types: tuple[type, ...]) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(LAYERS[cls]() for cls in types))
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    shape = SHAPES[types[0].__name__[-2:]]
    if "BatchNorm" in types[0].__name__:
        shape = (shape[0], 4, *shape[2:])
    return model, torch.randn(shape)


def test_the_same_runs_of_modules_can_be_fused() -> None:
    assert set(_DEFAULT_OP_LIST_TO_FUSER_METHOD) == set(PATTERNS)


@pytest.mark.parametrize("types", PATTERNS, ids=lambda types: "-".join(t.__name__ for t in types))
@pytest.mark.parametrize("qat", [False, True])
def test_fusing_matches_torch(types: tuple[type, ...], qat: bool) -> None:
    model, x = build(types)
    model.train(qat)
    names = [str(i) for i in range(len(types))]
    name = "fuse_modules_qat" if qat else "fuse_modules"
    if qat and types[0].__name__.startswith("ConvTranspose"):
        with pytest.raises(ValueError, match=r"cannot fuse 0, 1: .* for QAT"):
            fq.fuse_modules_qat(model, names)
        return
    theirs = getattr(tq, name)(model, names)
    ours = getattr(fq, name)(model, names)
    assert tree(ours) == tree(theirs)
    assert tree(ours) != tree(model)
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_same(ours(x), theirs(x))
    if not qat:
        torch.testing.assert_close(ours(x), model(x))


def test_several_runs_are_fused_in_a_copy_unless_inplace() -> None:
    model = nn.Sequential(ConvNet()).eval()
    before = tree(model)
    runs = [["0.conv1", "0.bn1", "0.relu1"], ("0.conv2", "0.bn2")]
    fused = fq.fuse_modules(model, runs)
    assert tree(model) == before
    assert type(fused[0].conv1) is nni.ConvReLU2d
    assert type(fused[0].bn1) is type(fused[0].relu1) is type(fused[0].bn2) is nn.Identity
    assert fq.fuse_modules(model, runs, inplace=True) is model
    assert tree(model) == tree(fused)


def test_a_method_of_ones_own_fuses_other_types() -> None:
    class Both(nn.Sequential):
        pass

    def fuse(is_qat: bool, first: nn.Module, second: nn.Module) -> nn.Module:
        assert not is_qat
        return Both(first, second)

    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    config = {"additional_fuser_method_mapping": {(nn.Linear, nn.Tanh): fuse}}
    fused = fq.fuse_modules(model, ["0", "1"], fuse_custom_config_dict=config)
    assert type(fused[0]) is Both
    assert_same(fused(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_a_fuser_of_ones_own_is_called() -> None:
    def swap(modules: Any, is_qat: bool, additional: Any) -> Any:
        return [nn.Sequential(*modules), nn.Identity()]

    fused = fq.fuse_modules(nn.Sequential(nn.ReLU(), nn.Tanh()), ["0", "1"], fuser_func=swap)
    assert tree(fused) == {
        "": "Sequential",
        "0": "Sequential",
        "0.0": "ReLU",
        "0.1": "Tanh",
        "1": "Identity",
    }


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("length", [2, 3])
def test_hooks_move_to_the_fused_module_and_run_once(qat: bool, length: int) -> None:
    model, x = build((nn.Conv2d, nn.BatchNorm2d, nn.ReLU)[:length])
    model.train(qat)
    calls: list[str] = []
    first, last = model[0], model[-1]
    first.register_forward_pre_hook(lambda *args: calls.append(f"pre {len(args)}"))
    first.register_forward_pre_hook(
        lambda *args: calls.append(f"pre kwargs {len(args)}"), with_kwargs=True
    )
    last.register_forward_hook(lambda *args: calls.append(f"post {len(args)}"))
    last.register_forward_hook(
        lambda *args: calls.append(f"always {len(args)}"), always_call=True, with_kwargs=True
    )
    names = [str(i) for i in range(length)]
    fused = (fq.fuse_modules_qat if qat else fq.fuse_modules)(model, names)
    # torch.ao calls a pre-hook twice where the convolution is copied.
    fused(x)
    assert calls == ["pre 2", "pre kwargs 3", "post 3", "always 4"]
    calls.clear()
    with pytest.raises(RuntimeError):
        fused(x[:, :2])
    assert calls == ["pre 2", "pre kwargs 3", "always 4"]


def test_hooks_stay_where_fusing_fails() -> None:
    model, x = build((nn.Conv2d, nn.BatchNorm2d))
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[1].register_forward_hook(lambda *_: calls.append("post"))
    with pytest.raises(ValueError, match="training mode"):
        fq.fuse_modules(model, ["0", "1"], inplace=True)
    model(x)
    assert calls == ["pre", "post"]


# ------------------------------------------------------------------------------------- bad input


def test_training_mode_is_refused_where_statistics_are_folded() -> None:
    for length in (2, 3):
        model, _ = build((nn.Conv2d, nn.BatchNorm2d, nn.ReLU)[:length])
        names = [str(i) for i in range(length)]
        with pytest.raises(AssertionError, match=r"cannot fuse 0, 1.*call model\.eval\(\) first"):
            fq.fuse_modules(model, names)


def test_mixed_modes_are_refused() -> None:
    model, _ = build((nn.Conv2d, nn.BatchNorm2d))
    model[1].eval()
    with pytest.raises(AssertionError, match="same mode, train or eval: Conv2d, BatchNorm2d"):
        fq.fuse_modules_qat(model, ["0", "1"])


@pytest.mark.parametrize(
    ("bn", "message"),
    [
        (nn.BatchNorm2d(5), "BatchNorm2d has 5 features, but the module before it has 4"),
        (nn.BatchNorm2d(4, affine=False), "only with affine=True"),
        (nn.BatchNorm2d(4, track_running_stats=False), "only with track_running_stats=True"),
    ],
)
def test_batch_norms_that_cannot_be_trained_fused_are_refused(bn: nn.Module, message: str) -> None:
    for rest in ([], [nn.ReLU()]):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), bn, *rest)
        with pytest.raises(AssertionError, match=message):
            fq.fuse_modules_qat(model, [str(i) for i in range(len(model))])


def test_runs_that_cannot_be_fused_are_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2)).eval()
    with pytest.raises(AssertionError, match=r"did not find fuser method for: \(ReLU, Linear\)"):
        fq.fuse_modules(model, ["0", "1"])
    for name in ("9", "0.weight", "1.weight"):
        with pytest.raises(ValueError, match=f"'{name}' names no submodule of Sequential"):
            fq.fuse_modules(model, ["0", name])
    with pytest.raises(NotImplementedError, match=r"cannot fuse ReLU; accepted: Conv1d"):
        fq.fuse_conv_bn_relu(False, nn.ReLU().eval(), nn.BatchNorm2d(2).eval(), nn.ReLU().eval())


@pytest.mark.parametrize("fuse", [fq.fuse_modules, fq.fuse_modules_qat])
@pytest.mark.parametrize("names", [[], [[]], [["0"], []], "0", [0, 1], None, ["0", ["1"]], 3])
def test_what_is_no_list_of_names_is_refused(fuse: Any, names: Any) -> None:
    model, _ = build((nn.Conv2d, nn.ReLU))
    with pytest.raises(AssertionError, match=r"modules_to_fuse must be a list of dotted names"):
        fuse(model.train(fuse is fq.fuse_modules_qat), names)
    assert tree(model) == {"": "Sequential", "0": "Conv2d", "1": "ReLU"}


def test_names_may_come_from_any_iterable() -> None:
    model, _ = build((nn.Conv2d, nn.ReLU))
    for names in (("0", "1"), iter(["0", "1"]), (run for run in [("0", "1")])):
        assert type(fq.fuse_modules(model.eval(), names)[0]) is nni.ConvReLU2d


def test_one_module_alone_may_be_fused_by_a_method_of_ones_own() -> None:
    model = nn.Sequential(nn.Tanh())
    config = {"additional_fuser_method_mapping": {(nn.Tanh,): lambda is_qat, tanh: nn.ReLU()}}
    assert tree(fq.fuse_modules(model, ["0"], fuse_custom_config_dict=config))["0"] == "ReLU"


def test_no_modules_to_fuse_are_refused() -> None:
    with pytest.raises(AssertionError, match="mod_list must hold the modules to fuse"):
        fuse_known_modules([], False)
