"""Batch norm folded into weights in QAT: torch.ao's function, by way of the weights."""

from __future__ import annotations

import copy
import pickle
import textwrap
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.utils.checkpoint
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.intrinsic as nni
import fastquant.nn.intrinsic.qat as nniqat
from fastquant.nn.intrinsic.qat.with_batch_norm import ConvBn2d as OwnBlock
from oracle import quiet
from processes import python

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
    request.getfixturevalue("torchs_qat_arithmetic")
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


@pytest.mark.skipif(nniqat.ConvBn2d is OwnBlock, reason="there is no torch.ao")
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
    run = python(textwrap.dedent(code))
    assert run.returncode == 0, run.stderr


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


def test_modules_stay_of_their_class_and_can_be_pickled() -> None:
    module, x = CASES["conv2d-relu-bias"]
    prepared = qat(module)
    assert type(prepared) is nniqat.ConvBnReLU2d
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again(x), copy.deepcopy(prepared)(x))


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    module = nni.ConvBn2d(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))
    prepared = qat(module)
    with pytest.raises(AssertionError, match="running statistics"):
        prepared(torch.randn(SHAPES[2]))


# ------------------------------------------------------------------- the weight folded by one op

PER_TENSOR = fq.default_weight_fake_quant
PER_CHANNEL = fq.default_per_channel_weight_fake_quant
FUSED = fq.default_fused_per_channel_wt_fake_quant


def prepared(module: nn.Module, weight: Any = PER_CHANNEL) -> Any:
    model = nn.Sequential(copy.deepcopy(module)).train()
    model.qconfig = fq.QConfig(activation=nn.Identity, weight=weight)
    return fq.prepare_qat(model)[0]


def in_steps(module: Any) -> Any:
    """A copy of which somebody looks at the call of the weight's fake-quantizer."""
    module = copy.deepcopy(module)
    module.weight_fake_quant.register_forward_hook(lambda *_: None)
    return module


def gradients_of(module: Any, x: Tensor, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = module(x)
    leaves = [p for p in (x, *module.parameters()) if p.requires_grad]
    slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad((y * slopes).sum(), leaves, **kwargs)


def assert_steps_agree(module: Any, x: Tensor, tolerance: float = 1e-5, steps: int = 2) -> None:
    """By one op and in steps: the same outputs and statistics, to the bit, and gradients."""
    other = in_steps(module)
    for _ in range(steps):
        (y, grads), (expected, expected_grads) = (gradients_of(m, x) for m in (module, other))
        assert torch.equal(y, expected)
        state, expected_state = module.state_dict(), other.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected_state.items())
        for got, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", [PER_TENSOR, PER_CHANNEL, FUSED])
@pytest.mark.parametrize("name", CASES)
def test_one_op_does_what_the_steps_do(name: str, weight: Any) -> None:
    module, x = with_gammas(name, [0.0, -1.5])
    module[1].running_var.uniform_(0.5, 2.0)
    assert_steps_agree(prepared(module, weight).double(), x.double().requires_grad_(), 1e-9)
    assert_steps_agree(prepared(module, weight), x.clone().requires_grad_(), 2e-4)


@pytest.mark.parametrize("off", [fq.disable_observer, fq.disable_fake_quant])
def test_one_op_does_what_the_steps_do_when_half_is_off(off: Any) -> None:
    module, x = with_gammas("conv2d-plain-bias", [0.0, -1.5])
    block = prepared(module)
    block(x)
    block.apply(off)
    other = in_steps(block)
    torch.testing.assert_close(block(x), other(x))
    state = block.state_dict()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize("frozen", ["weight", "bn.weight", "bias", "input", "all but the input"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    module, x = with_gammas("conv2d-plain-bias", [0.0, -1.5])
    block = prepared(module).double()
    x = x.double().requires_grad_(frozen != "input")
    for name, parameter in block.named_parameters():
        if frozen in (name, "all but the input"):
            parameter.requires_grad_(False)
    assert_steps_agree(block, x, 1e-9)


@pytest.mark.parametrize(
    "name", ["conv1d-plain-bias", "conv2d-relu-nobias", "conv3d-plain-bias", "linear"]
)
def test_gradients_of_gradients_are_those_of_the_steps(name: str) -> None:
    module, x = with_gammas(name, [0.0, -1.5])
    block = prepared(module).double()
    x = x.double().requires_grad_()
    results = []
    for each in (block, in_steps(block)):
        leaves = [x, *each.parameters()]
        _, grads = gradients_of(each, x, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["conv2d-plain-bias", "linear"])
def test_autograd_keeps_no_folded_weight(name: str) -> None:
    module, x = CASES[name]
    block = prepared(module)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    weight = block.weight
    assert any(t.data_ptr() == weight.data_ptr() for t in kept)
    others = [t for t in kept if t.numel() >= weight.numel() and t.data_ptr() != weight.data_ptr()]
    assert all(t.shape in (x.shape, y.shape) for t in others)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_have_the_same_gradients(reentrant: bool) -> None:
    module, x = with_gammas("conv2d-relu-bias", [0.0, -1.5])
    block = prepared(module)
    block(x)
    block.apply(fq.disable_observer)  # the block runs twice
    block.apply(nniqat.freeze_bn_stats)
    x = x.clone().requires_grad_()
    y, expected = gradients_of(block, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)

    again = Checkpointed()(x)
    assert torch.equal(again, y)
    slopes = torch.linspace(-1, 1, y.numel()).view_as(y)
    for leaf in (x, *block.parameters()):
        leaf.grad = None
    (again * slopes).sum().backward()
    for leaf, wanted in zip((x, *block.parameters()), expected, strict=True):
        assert torch.equal(leaf.grad, wanted)


def test_a_block_that_is_called_twice_before_backward_has_both_gradients() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module).double().eval()
    other = in_steps(block)
    x = x.double()
    results = []
    for each in (block, other):
        loss = each(x).square().sum() + each(2 * x).sum()
        results.append(torch.autograd.grad(loss, list(each.parameters())))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_weight_that_changes_before_backward_is_noticed() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module)
    loss = block(x).square().sum()
    with torch.no_grad():
        block.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"stride": 2, "padding": (1, 0), "dilation": (1, 2)},
        {"groups": 3},
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_of_every_kind(options: dict[str, Any], channels_last: bool) -> None:
    torch.manual_seed(0)
    module = nni.ConvBn2d(nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6))
    x = torch.randn(4, 3, 7, 7)
    if channels_last:
        module, x = (t.to(memory_format=torch.channels_last) for t in (module, x))
    assert_steps_agree(prepared(module), x.requires_grad_(), 1e-4)


def test_padding_by_its_name() -> None:
    module = nni.ConvBn2d(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    block, x = prepared(module), torch.randn(4, 3, 7, 7)
    other = copy.deepcopy(block)
    other.padding = "same"
    assert torch.equal(block(x), other(x))


def test_an_input_without_a_batch_dimension() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module).eval()
    block.bn = nn.Identity()
    block.bn.weight, block.bn.running_var, block.bn.eps = (
        nn.Parameter(torch.rand(5)),
        torch.rand(5),
        0.1,
    )
    y = block(x[0].clone().requires_grad_())
    torch.testing.assert_close(y, block(x)[0])
    y.sum().backward()


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv2d-plain-bias", "conv2d-relu-nobias", "linear"])
def test_autocast_computes_in_its_own_dtype(
    name: str, dtype: torch.dtype, of_x: torch.dtype
) -> None:
    module, x = with_gammas(name, [0.0, -1.5])
    block = prepared(module)
    other = in_steps(block)
    results = []
    for each in (block, other):
        leaf = x.to(of_x, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = each(leaf)
        y.float().square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in each.parameters())])
    assert results[0][0].dtype == dtype
    assert torch.equal(results[0][0], results[1][0])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01)


def test_under_autocast_gradients_of_gradients_are_those_of_the_steps() -> None:
    module, x = with_gammas("conv2d-plain-bias", [0.0, -1.5])
    block = prepared(module)
    results = []
    for each in (block, in_steps(block)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(leaf)
        (grad,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), list(each.parameters())[:2]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_a_replaced_convolution_is_called() -> None:
    class Doubled(nniqat.ConvBn2d):
        def _conv_forward(self, *args: Any) -> Tensor:
            return 2 * super()._conv_forward(*args)

    module, x = CASES["conv2d-plain-nobias"]
    block = prepared(module).eval()
    plain = block(x)
    block.__class__ = Doubled
    doubled = block(x)
    assert not torch.equal(plain, doubled)
    own = prepared(module).eval()
    own._conv_forward = lambda *args: 2 * type(own)._conv_forward(own, *args)
    assert torch.equal(own(x), doubled)


def test_a_replaced_function_of_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("conv2d-plain-nobias", "conv2d"), ("linear", "linear")):
        module, x = CASES[name]
        block = prepared(module)
        calls: list[Any] = []
        torchs = getattr(torch.nn.functional, function)

        def counting(*args: Any, torchs: Any = torchs, calls: Any = calls, **kwargs: Any) -> Tensor:
            calls.append(args)
            return torchs(*args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, function, counting)
        block(x)
        assert len(calls) == 1, name


def test_modes_see_single_steps() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module)
    other = copy.deepcopy(block)
    with Seen():
        y = block(x)
    assert "conv2d" in names
    assert torch.equal(y, other(x))


def test_torch_func_differentiates_a_block() -> None:
    module, x = with_gammas("conv2d-plain-bias", [0.0, -1.5])
    block = prepared(module).double()
    x = x.double()
    parameters = dict(block.named_parameters())
    buffers = {name: b.clone() for name, b in block.named_buffers()}

    def loss(parameters: Any) -> Tensor:
        state = {**parameters, **{name: b.clone() for name, b in buffers.items()}}
        return torch.func.functional_call(block, state, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters)
    block(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_a_weight_that_cannot_be_observed_is_refused_by_name_and_changes_nothing() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = nn.Sequential(prepared(module, PER_CHANNEL.with_args(nonfinite="raise")))
    with torch.no_grad():
        block[0].weight[0, 0, 0, 0] = float("nan")
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="1 non-finite"):
        block(x)
    for key, value in block.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_weights_that_are_nan_stay_nan_and_are_counted() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module)
    with torch.no_grad():
        block.weight[1, 0, 0, 0] = float("nan")
    y = block(x)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3, 4]].isfinite().all()
    assert block.weight_fake_quant.activation_post_process.nonfinite_count == 1


def test_without_gradients_the_statistics_are_the_same() -> None:
    module, x = CASES["conv2d-plain-bias"]
    block = prepared(module)
    other = copy.deepcopy(block)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y, other(x))
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
