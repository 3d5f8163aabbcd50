"""Convolutions of QAT layers take native kernels wherever nothing could tell the difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastquant as fq
from fastquant import _C
from fastquant.nn.qat import convolution, layers

on_x86 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="measured on x86"
)
CHANNELS = 16
GEOMETRIES = {"1x1": (1, 1), "depthwise": (3, CHANNELS), "3x3": (3, 1)}
STEPS = ("convolution", "grad_input", "grad_weight")
QCONFIG = fq.get_default_qat_qconfig("x86")


@pytest.fixture(autouse=True)
def small_inputs_take_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_FEW_ELEMENTS", 0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native kernels that have been called so far."""
    names: list[str] = []

    def listing(name: str, kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            done = kernel(*args)
            names.extend([name] if done else [])
            return done

        return call

    names_of_steps = [f"{kind}_{step}" for kind in ("pointwise", "winograd") for step in STEPS]
    for name in (*names_of_steps, "depthwise_convolution", "depthwise_convolution_backward"):
        monkeypatch.setattr(_C, name, listing(name, getattr(_C, name)))
    return names


def expected_calls(geometry: str, backward: bool = True) -> list[str]:
    if geometry == "depthwise":
        return ["depthwise_convolution", "depthwise_convolution_backward"][: 1 + backward]
    kernel = {"1x1": "pointwise", "3x3": "winograd"}[geometry]
    return [f"{kernel}_{step}" for step in STEPS[: 3 if backward else 1]]


def prepared(kind: str, geometry: str, bias: bool = True) -> Any:
    """A QAT layer as `prepare_qat` makes it, but one that does not quantize its output."""
    torch.manual_seed(0)
    size, groups = GEOMETRIES[geometry]
    conv = nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, groups=groups, bias=bias)
    parts: list[nn.Module] = [conv]
    if kind == "own":
        parts[0].qconfig = QCONFIG  # type: ignore[assignment]
        return layers.Conv2d.from_float(parts[0])
    parts += [nn.BatchNorm2d(CHANNELS)] if "Bn" in kind else []
    parts += [nn.ReLU()] if "ReLU" in kind else []
    model = nn.Sequential(*parts).train()
    if len(parts) > 1:
        model = fq.fuse_modules_qat(nn.Sequential(model), [[f"0.{i}" for i in range(len(parts))]])
        model = model[0]
    model.qconfig = fq.QConfig(nn.Identity, QCONFIG.weight)  # type: ignore[assignment]
    return fq.prepare_qat(model)[0]


def off(module: Any) -> Any:
    return module.apply(fq.disable_observer).apply(fq.disable_fake_quant)


def in_steps(module: Any) -> Any:
    """A copy whose convolution is called as torch.nn has it, since a user has replaced it."""
    module = copy.deepcopy(module)
    module._conv_forward = type(module)._conv_forward.__get__(module)
    return module


def step(module: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    scale = max(float(t.abs().max()) for t in expected)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)
        assert got.stride() == wanted.stride()


LAYERS = ["ConvBn2d", "ConvBnReLU2d", "Conv2d", "ConvReLU2d", "own"]


@on_x86
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("quantizes", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_training(kind: str, geometry: str, quantizes: bool, bias: bool, called: list[str]) -> None:
    module, x = prepared(kind, geometry, bias), torch.randn(4, CHANNELS, 14, 14)
    module = module if quantizes else off(module)
    other = in_steps(module)
    found = step(module, x)
    assert called == expected_calls(geometry)
    called.clear()
    expected = step(other, x)
    assert called == []
    assert_alike(found, expected)


@on_x86
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation(kind: str, geometry: str, no_gradients: Any, called: list[str]) -> None:
    module, x = prepared(kind, geometry), torch.randn(4, CHANNELS, 14, 14)
    module(x)
    module.eval().apply(fq.disable_observer)
    called.clear()
    with no_gradients():
        y, expected = module(x), in_steps(module)(x)
    assert called == expected_calls(geometry, backward=False)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not y.requires_grad


@on_x86
@pytest.mark.parametrize("geometry", ["1x1", "depthwise"])  # others take fp32 alone
@pytest.mark.parametrize("kind", ["ConvBn2d", "ConvReLU2d"])
def test_autocast(kind: str, geometry: str, called: list[str]) -> None:
    module, x = off(prepared(kind, geometry)), torch.randn(4, CHANNELS, 14, 14)
    other = in_steps(module)
    with torch.autocast("cpu"):
        found = step(module, x)
        assert called
        expected = step(other, x)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert_alike(found, expected, 2e-2)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", ["ConvBn2d", "Conv2d"])
def test_gradients_of_gradients(kind: str, geometry: str) -> None:
    module, x = off(prepared(kind, geometry)).double(), torch.randn(2, CHANNELS, 5, 5).double()
    results = []
    for each in (module, in_steps(module)):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [leaf, each.weight]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    module, x = off(prepared("Conv2d", "1x1")), torch.randn(4, CHANNELS, 5, 5)
    module.requires_grad_()
    if frozen != "input":
        getattr(module, frozen).requires_grad_(False)
    results = []
    for each in (module, in_steps(module)):
        leaf = x.clone().requires_grad_(frozen != "input")
        each(leaf).square().sum().backward()
        results.append([leaf.grad, each.weight.grad, each.bias.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_expanded_gradients(geometry: str) -> None:
    module, x = off(prepared("Conv2d", geometry)), torch.randn(4, CHANNELS, 5, 5)
    results = []
    for each in (module, in_steps(module)):
        leaf = x.clone().requires_grad_()
        each(leaf).sum().backward()
        results.append([leaf.grad, each.weight.grad, each.bias.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ConvBn2d", "Conv2d"])
def test_an_output_of_which_somebody_keeps_the_gradient_keeps_it(kind: str) -> None:
    module, x = off(prepared(kind, "depthwise")).eval(), torch.randn(4, CHANNELS, 5, 5)
    outputs: list[Tensor] = []
    hook = module.bn if kind == "ConvBn2d" else module
    hook.register_forward_hook(
        lambda _, inputs, output: outputs.append(inputs[0] if kind == "ConvBn2d" else output)
    )
    results = []
    for each in (module, in_steps(module)):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        outputs[-1].retain_grad()
        y.square().sum().backward()
        results.append([outputs[-1].grad, leaf.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ConvBn2d", "Conv2d"])
def test_a_weight_that_changes_before_backward_is_noticed(kind: str) -> None:
    module, x = off(prepared(kind, "1x1")), torch.randn(4, CHANNELS, 5, 5).requires_grad_()
    loss = module(x).square().sum()
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["ConvBn2d", "Conv2d"])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    module, x = off(prepared(kind, "1x1")).eval(), torch.randn(4, CHANNELS, 5, 5)
    other = copy.deepcopy(module)

    def checkpointed(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)

    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((checkpointed, other), leaves, strict=True):
        function(leaf).square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(module.weight.grad, other.weight.grad)


@pytest.mark.parametrize("quantizes", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_torch_func_transforms(kind: str, quantizes: bool) -> None:
    module, x = prepared(kind, "1x1").eval(), torch.randn(4, CHANNELS, 5, 5)
    module(x)
    module.apply(fq.disable_observer)
    module = module if quantizes else off(module)
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    found = torch.func.grad(lambda x: module(x).square().sum())(x)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4)


class Seeing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizes", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_whoever_looks_sees_torchs_convolution(
    kind: str, quantizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = prepared(kind, "1x1"), torch.randn(4, CHANNELS, 5, 5)
    module = module if quantizes else off(module)
    with Seeing() as mode:
        module(x)
    assert F.conv2d in mode.seen
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 4 * CHANNELS * CHANNELS * 25
    calls: list[str] = []

    def instead(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", instead("function", F.conv2d))
        module(x)
    with monkeypatch.context() as patch:
        forward = instead("of the class", nn.Conv2d._conv_forward)
        patch.setattr(nn.Conv2d, "_conv_forward", forward)
        module(x)
    module._conv_forward = instead("of the instance", module._conv_forward)
    module(x)
    assert calls == ["function", "of the class", "of the instance"]


@pytest.mark.parametrize("kind", ["Conv2d", "ConvReLU2d"])
def test_replaced_forwards_are_called(kind: str) -> None:
    module, x = prepared(kind, "1x1"), torch.randn(4, CHANNELS, 5, 5)
    forward, inputs = module.forward, []
    module.forward = lambda x: (inputs.append(x), forward(x))[1]
    module(x)
    assert inputs == [x]


@pytest.mark.parametrize("kind", ["Conv2d", "ConvReLU2d"])
def test_subclasses_keep_their_own_steps(kind: str) -> None:
    module, x = prepared(kind, "1x1"), torch.randn(4, CHANNELS, 5, 5)
    expected = module(x)

    class Doubling(type(module)):  # type: ignore[misc]
        def _conv_forward(self, *args: Any) -> Any:
            return 2 * super()._conv_forward(*args)

    module.__class__ = Doubling
    torch.testing.assert_close(module(x), 2 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding_mode", ["circular", "reflect"])
def test_other_padding_is_torchs(padding_mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, padding_mode=padding_mode)
    model = nn.Sequential(conv).train()
    model.qconfig = QCONFIG
    module, x = off(fq.prepare_qat(model)), torch.randn(4, CHANNELS, 5, 5)
    assert torch.equal(module(x), conv(x))


def test_inputs_without_a_batch_dimension() -> None:
    for geometry in GEOMETRIES:
        module, x = off(prepared("Conv2d", geometry)), torch.randn(CHANNELS, 5, 5)
        torch.testing.assert_close(module(x), module(x[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ConvBn2d", "Conv2d"])
def test_what_does_not_fit_is_torchs_error(kind: str) -> None:
    module = off(prepared(kind, "1x1"))
    conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
    for x in (torch.randn(4, 7, 5, 5), torch.randn(5, 5)):
        messages = []
        for each in (module, conv):
            with pytest.raises(RuntimeError) as error:
                each(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", ["Conv2d", "ConvReLU2d"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_graphs_compute_as_eager_mode(kind: str, geometry: str) -> None:
    module, x = prepared(kind, geometry), torch.randn(4, CHANNELS, 14, 14)
    module(x)
    module.apply(fq.disable_observer)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, x), step(other, x)
    assert_alike(found, expected)


def test_layers_of_torch_ao_can_still_be_scripted() -> None:
    tq = pytest.importorskip("torch.ao.quantization")
    prepared("Conv2d", "1x1")  # prepare_qat changes torch.ao's classes
    x = torch.randn(4, CHANNELS, 5, 5)
    qconfig = tq.get_default_qat_qconfig("x86", version=0)
    for cls in (torch.ao.nn.qat.Conv2d, torch.ao.nn.intrinsic.qat.ConvReLU2d):
        module = cls(CHANNELS, CHANNELS, 1, qconfig=qconfig)
        torch.testing.assert_close(torch.jit.script(module)(x), module(x))


KINDS = ["ConvBn2d", "Conv2d"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_may_change_before_backward(kind: str) -> None:
    """No gradient depends on its values: torch's convolutions do not save it."""
    module, x = prepared(kind, "1x1").eval(), torch.randn(4, CHANNELS, 5, 5)
    results = []
    for each in (module, in_steps(module)):
        leaf = x.clone().requires_grad_()
        loss = each(leaf).square().sum()
        with torch.no_grad():
            each.bias.add_(1)
        loss.backward()
        results.append([leaf.grad, each.weight.grad, each.bias.grad])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_autograd_saves_is_what_torchs_convolution_saves() -> None:
    saved: list[torch.Size] = []
    module, x = off(prepared("Conv2d", "1x1")), torch.randn(4, CHANNELS, 5, 5)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.shape), t)[1],
        lambda t: t,
    )
    with hooks:
        module(x)
        in_steps(module)(x)
    assert len(saved) == 4
    assert saved[:2] == saved[2:]


@pytest.mark.parametrize("watching", ["mode", "profiler"])
def test_a_checkpoint_may_be_recomputed_while_something_looks(watching: str) -> None:
    module, x = prepared("Conv2d", "1x1"), torch.randn(4, CHANNELS, 5, 5).requires_grad_()
    module(x)
    module.apply(fq.disable_observer)
    y: Any = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    with FlopCounterMode(display=False) if watching == "mode" else torch.profiler.profile():
        y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", LAYERS)
def test_the_profiler_counts_multiplications(kind: str) -> None:
    module, x = prepared(kind, "1x1"), torch.randn(4, CHANNELS, 5, 5)
    with torch.profiler.profile(with_flops=True) as profile:
        module(x)
    flops = [event.flops for event in profile.key_averages() if event.key == "aten::conv2d"]
    assert flops == [2 * 4 * CHANNELS * CHANNELS * 25]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_one_number_for_all_dimensions(kind: str, name: str) -> None:
    module, x = prepared(kind, "depthwise"), torch.randn(4, CHANNELS, 6, 6)
    expected = step(copy.deepcopy(module), x)
    setattr(module, name, getattr(module, name)[0])
    assert_alike(step(module, x), expected)


@pytest.mark.filterwarnings("ignore:.*backward hook")
@pytest.mark.parametrize("bias", [True, False])
def test_backward_hooks_that_are_not_full(bias: bool) -> None:
    module, x = off(prepared("Conv2d", "1x1", bias)), torch.randn(4, CHANNELS, 5, 5)
    seen: list[Any] = []
    for each in (module, in_steps(module)):
        each.register_backward_hook(lambda _, of_inputs, __: seen.append(of_inputs))
        step(each, x)
    assert len(seen) == 2
    for got, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_bias_of_another_shape_is_refused() -> None:
    module = off(prepared("Conv2d", "1x1"))
    module.bias = nn.Parameter(torch.randn(CHANNELS, 1))
    with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional"):
        module(torch.randn(4, CHANNELS, 5, 5))
