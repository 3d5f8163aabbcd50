"""Batch norm folded into weights in QAT: torch.ao's function, by way of the weights."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
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
    # Weights 16 bits wide, all in range: a last-bit difference may not become a whole step.
    fake = {"observer": fq.MovingAveragePerChannelMinMaxObserver, "dtype": torch.int32}
    weight = fq.FakeQuantize.with_args(
        **fake,
        quant_min=-32767,
        quant_max=32767,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        averaging_constant=1,
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


class Smooth(fq.FakeQuantize):
    """Rounds nothing, so that derivatives can be measured."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("gammas", [[1.5, -0.5], [1.5, 0.0]])
def test_gradients_are_derivatives(learns: bool, gammas: list[float]) -> None:
    conv = nni.ConvBn2d(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2))
    conv.qconfig = fq.QConfig(nn.Identity, Smooth)
    module = fq.prepare_qat(nn.Sequential(conv).train())[0].double()
    x = torch.randn(3, 2, 3, 3, dtype=torch.double)
    bn_names = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")

    def function(weight: Tensor, gamma: Tensor) -> Tensor:
        # The same running statistics at each call.
        buffers = {name: b.clone() for name, b in module.named_buffers() if name in bn_names}
        state = {"weight": weight, "bn.weight": gamma, **buffers}
        return torch.nn.utils.stateless._functional_call(module, state, (x,))

    weight = torch.randn(2, 2, 2, 2, dtype=torch.double, requires_grad=True)
    gamma = torch.tensor(gammas, dtype=torch.double, requires_grad=learns)
    assert torch.autograd.gradcheck(function, (weight, gamma))
    assert torch.autograd.gradgradcheck(function, (weight, gamma))


def with_gammas(name: str, gammas: list[float]) -> tuple[nn.Module, Tensor]:
    module, x = CASES[name]
    module = copy.deepcopy(module)
    with torch.no_grad():
        module[1].weight[: len(gammas)] = torch.tensor(gammas)
        module[1].bias.uniform_(0.5, 1)
    return module, x


@pytest.mark.parametrize("gammas", [[0.0, 0.0], [-1.0, 0.0], [-1e-3, 0.0, -0.0]])
@pytest.mark.parametrize("name", [name for name in CASES if name != "linear"])
def test_channels_whose_gamma_is_zero_train_as_on_torchs_slow_path(
    name: str, gammas: list[float]
) -> None:
    module, x = with_gammas(name, gammas)
    ours, theirs = qat(module), qat(module)
    # torch.ao's own answer to a gamma of zero, by a second convolution.
    theirs._enable_slow_path_for_better_numerical_stability = True
    for _ in range(2):
        results = step(ours, x), step(theirs, x)
        for key, value in results[0].items():
            torch.testing.assert_close(
                value, results[1][key], rtol=2e-3, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert results[0]["bn.weight"].abs().min() > 1e-3, "gamma can leave zero"


def test_a_linear_layer_with_a_gamma_of_zero_trains_as_in_float() -> None:
    module, x = with_gammas("linear", [0.0, -2.0])
    prepared = qat(module)
    prepared.apply(fq.disable_fake_quant)
    rounded = step(qat(module), x)
    exact = step(prepared, x)
    for key, value in rounded.items():
        torch.testing.assert_close(value, exact[key], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_channel_whose_gamma_is_zero_is_converted_to_its_constant(name: str) -> None:
    module, x = with_gammas(name, [0.0])
    model = nn.Sequential(fq.QuantStub(), copy.deepcopy(module), fq.DeQuantStub()).train()
    model.qconfig = fq.get_default_qat_qconfig("x86", version=0)
    prepared = fq.prepare_qat(model)
    for _ in range(20):
        prepared(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in prepared.parameters())
    constant = prepared[1].bn.bias[0].detach()
    if "relu" in name.lower():
        constant = constant.clamp(min=0)
    with quiet():
        y = fq.convert(prepared.eval())(x)[:, 0]
    torch.testing.assert_close(y, constant.expand_as(y), rtol=0.02, atol=0.02)


def test_a_pruned_channel_does_not_widen_the_range_of_the_others() -> None:
    module, x = with_gammas("conv2d-plain-bias", [0.0])
    with torch.no_grad():
        module[0].weight[0] = 1000.0
    model = nn.Sequential(module).train()
    model.qconfig = fq.QConfig(nn.Identity, fq.default_weight_fake_quant)
    prepared = fq.prepare_qat(model)
    prepared(x)
    assert prepared[0].weight_fake_quant.activation_post_process.max_val < 10


def off(module: nn.Module) -> Any:
    prepared = qat(module)
    prepared.apply(fq.disable_fake_quant)
    prepared.apply(fq.disable_observer)
    return prepared


@pytest.mark.parametrize("name", CASES)
def test_with_all_off_the_weight_itself_is_used(name: str) -> None:
    module, x = CASES[name]
    assert torch.equal(off(module)(x), copy.deepcopy(module)(x))
    still_on = off(module)
    still_on.apply(fq.enable_fake_quant)
    assert not torch.equal(still_on(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize("look_on", ["forward hook", "global hook", "backward hook", "subclass"])
def test_who_looks_on_sees_the_weight_of_inference_with_all_off_too(look_on: str) -> None:
    module, x = CASES["conv2d-plain-bias"]
    prepared = off(module)
    fake_quantizer = prepared.weight_fake_quant
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, *output: Any) -> None:
        if module is fake_quantizer:
            seen.append(inputs[0])

    handle = None
    if look_on == "forward hook":
        fake_quantizer.register_forward_hook(see)
    elif look_on == "global hook":
        handle = nn.modules.module.register_module_forward_pre_hook(see)
    elif look_on == "backward hook":
        fake_quantizer.register_full_backward_hook(see)
    else:

        class Seeing(type(fake_quantizer)):
            def forward(self, x: Tensor) -> Tensor:
                see(self, (x,))
                return super().forward(x)

        fake_quantizer.__class__ = Seeing
    y = prepared(x)
    y.square().sum().backward()
    if handle is not None:
        handle.remove()
    assert len(seen) == 1
    if look_on != "backward hook":
        bn = module[1]
        scale = bn.weight / torch.sqrt(torch.ones(5) + bn.eps)
        torch.testing.assert_close(seen[0], module[0].weight * scale[:, None, None, None])
    torch.testing.assert_close(y, copy.deepcopy(module)(x))


def test_a_fake_quantizer_that_rounds_in_place_is_heard() -> None:
    class InPlace(fq.FakeQuantize):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    module, x = CASES["conv2d-plain-bias"]
    module = copy.deepcopy(module)
    module.qconfig = fq.QConfig(nn.Identity, InPlace)
    prepared = fq.prepare_qat(nn.Sequential(module).train())[0]
    prepared.eval()
    doubled = nn.Sequential(copy.deepcopy(module[0]), copy.deepcopy(module[1])).eval()
    doubled[0].weight.data *= 2
    torch.testing.assert_close(prepared(x), doubled(x))


def test_blocks_take_their_input_by_name() -> None:
    for name in CASES:
        module, x = CASES[name]
        prepared = qat(module).eval()
        assert torch.equal(prepared(input=x), prepared(x)), name


def test_torch_ao_is_taught_by_prepare_qat_and_not_by_the_import() -> None:
    code = """
        import sys, types
        import torch, torch.ao.nn.intrinsic.qat, torch.ao.nn.qat, torch.ao.quantization
        from torch import nn

        def classes():
            return {
                (name, key): dict(vars(cls))
                for name, module in list(sys.modules.items())
                if name.startswith("torch.ao")
                for key, cls in vars(module).items()
                if isinstance(cls, type) and cls.__module__.startswith("torch.ao")
            }

        before = classes()
        import fastquant as fq
        after = classes()
        assert all(after[key] == members for key, members in before.items())
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).train()
        fq.fuse_modules_qat(model, [["0.0", "0.1"]], inplace=True)
        model.qconfig = fq.get_default_qat_qconfig()
        with torch.no_grad():
            model[0][0][1].weight.zero_()
        prepared = fq.prepare_qat(model)
        assert prepared(torch.randn(4, 2)).isfinite().all()
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=120
    )


def test_the_output_is_not_passed_over_again() -> None:
    module, x = CASES["conv2d-plain-nobias"]
    prepared = qat(module)
    with torch.profiler.profile(record_shapes=True) as profile:
        y = prepared(x)
        y.sum().backward()
    names = {e.name for e in profile.events() if list(y.shape) in e.input_shapes}
    assert "aten::native_batch_norm" in names
    assert not names & {"aten::div", "aten::mul", "aten::neg"}


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
