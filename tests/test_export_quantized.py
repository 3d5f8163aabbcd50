"""`fastquant.export`: quantized models as programs of quantize and dequantize ops."""

from __future__ import annotations

import collections
import copy
import importlib.util
import re
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import fastquant as fq
import fastquant.nn.quantized as nnq
from fastquant._torch import ao, decomposed
from fastquant._torch.private import torch_release
from fastquant.export import export
from fastquant.nn.intrinsic import quantized as nniq
from fastquant.nn.quantized.weighted import Weighted
from fastquant.quantized_tensor import quantize_per_tensor
from oracle import quiet
from zoo import torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")

RUNTIMES = ("inductor", "executorch", "openvino")
NATIVE = fq.get_default_qconfig("native")
SIGNED = fq.QConfig(activation=fq.MinMaxObserver.with_args(dtype=torch.qint8), weight=NATIVE.weight)


class Stubbed(nn.Module):
    """Layers between stubs; `function` calls them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.dequant(self.function(self, self.quant(x)))


def calibrated(model: nn.Module, *inputs: Tensor, qconfig: Any = NATIVE) -> Any:
    model.qconfig = qconfig
    model = fq.prepare(model.eval())
    with torch.no_grad():
        for x in inputs:
            model(x)
    return model


def native(prepared: nn.Module) -> Any:
    return fq.convert(prepared, backend="native").eval()


def calls(program: Any) -> collections.Counter[str]:
    """How often each op is called, by its name without namespace and overload."""
    return collections.Counter(
        node.target._schema.name.split("::")[1]
        for node in program.graph.nodes
        if hasattr(node.target, "_schema")
    )


def steps_apart(a: Tensor, b: Tensor, step: float) -> float:
    return float((a - b).abs().max() / step)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def assert_close(program: Any, converted: Any, x: Tensor, steps: int) -> None:
    """Within so many steps of the output's scale; if 1, the same in nearly every element."""
    scales: list[float] = []
    hook = converted.dequant.register_forward_pre_hook(
        lambda m, args: scales.append(args[0]._scale)
    )
    found, expected = program.module()(x), converted(x)
    hook.remove()
    assert found.shape == expected.shape
    assert len(expected.unique()) > 3
    apart = (found - expected).abs() / scales[-1]
    assert apart.max() <= steps + 1e-3
    if steps == 1:
        assert apart.gt(0.5).float().mean() < 0.05


# --- what programs compute ----------------------------------------------------------------------


def shaped(*shape: int) -> Tensor:
    return torch.randn(shape)


def only(layer: nn.Module) -> Stubbed:
    return Stubbed(lambda m, x: m.layer(x), layer=layer)


def conv_then(function: Callable[..., Any], **layers: nn.Module) -> Stubbed:
    """A function of what a convolution returns, and another one after it."""

    def run(m: Any, x: Tensor) -> Any:
        return m.last(function(m, m.first(x)))

    return Stubbed(run, first=nn.Conv2d(3, 8, 3, padding=1), last=nn.Conv2d(8, 4, 1), **layers)


def fused(layers: list[nn.Module], names: list[str]) -> Stubbed:
    body = nn.Sequential(*layers).eval()
    for module in body.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return only(fq.fuse_modules(body, names))


def functional(name: str, *numbers: float) -> Stubbed:
    def run(m: Any, x: Tensor) -> Any:
        arguments = numbers or (m.last(x),)
        if "cat" in name:
            return getattr(m.sum, name)([x, *arguments], dim=1)
        return getattr(m.sum, name)(x, *arguments)

    return Stubbed(run, last=nn.Conv2d(3, 3, 1), sum=nnq.FloatFunctional())


IMAGE, ROWS = (2, 3, 9, 9), (4, 6, 10)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: only(nn.Conv1d(6, 4, 3, padding="same", dilation=2)), ROWS),
    "conv2d": (lambda: only(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)), IMAGE),
    "conv2d even": (lambda: only(nn.Conv2d(3, 4, (2, 3), padding="same")), IMAGE),
    "conv2d reflect": (lambda: only(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), IMAGE),
    "conv2d grouped": (lambda: only(nn.Conv2d(3, 6, 3, groups=3)), IMAGE),
    "conv3d": (lambda: only(nn.Conv3d(2, 4, 3, padding=1)), (2, 2, 5, 6, 7)),
    "conv bn relu": (
        lambda: fused([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], ["0", "1", "2"]),
        IMAGE,
    ),
    "linear": (lambda: only(nn.Linear(10, 7)), ROWS),
    "linear relu": (lambda: fused([nn.Linear(10, 7), nn.ReLU()], ["0", "1"]), ROWS),
    "batch norm": (lambda: only(nn.BatchNorm2d(3)), IMAGE),
    "bn relu": (lambda: fused([nn.BatchNorm2d(3), nn.ReLU()], ["0", "1"]), IMAGE),
    "layer norm": (lambda: only(nn.LayerNorm(10)), ROWS),
    "group norm": (lambda: only(nn.GroupNorm(2, 6)), ROWS),
    "instance norm": (lambda: only(nn.InstanceNorm2d(3, affine=True)), IMAGE),
    "hardswish": (lambda: only(nn.Hardswish()), IMAGE),
    "elu": (lambda: only(nn.ELU(0.7)), IMAGE),
    "leaky relu": (lambda: only(nn.LeakyReLU(0.2)), IMAGE),
    "prelu": (lambda: only(nn.PReLU(3)), IMAGE),
    "relu6": (lambda: only(nn.ReLU6()), IMAGE),
    "sigmoid": (lambda: only(nn.Sigmoid()), IMAGE),
    "dropout": (lambda: only(nn.Dropout(0.5)), IMAGE),
    "add": (lambda: functional("add"), IMAGE),
    "add relu": (lambda: functional("add_relu"), IMAGE),
    "mul": (lambda: functional("mul"), IMAGE),
    "cat": (lambda: functional("cat"), IMAGE),
    "add scalar": (lambda: functional("add_scalar", 0.7), IMAGE),
    "mul scalar": (lambda: functional("mul_scalar", -0.5), IMAGE),
    "lstm": (lambda: Stubbed(lambda m, x: m.layer(x)[0], layer=nn.LSTM(5, 4)), (3, 2, 5)),
    "attention": (
        lambda: Stubbed(lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(8, 2)),
        (3, 2, 8),
    ),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max pool": lambda m, x: F.max_pool2d(x, 2),
    "average pool": lambda m, x: F.avg_pool2d(x, 3, stride=1, padding=1),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda m, x: x.mean([2, 3], keepdim=True),
    "relu": lambda m, x: F.relu(x),
    "relu in place": lambda m, x: F.relu_(x),
    "clamp": lambda m, x: x.clamp(-0.5, 0.5),
    "sigmoid": lambda m, x: torch.sigmoid(x),
    "tanh": lambda m, x: x.tanh(),
    "hardsigmoid": lambda m, x: F.hardsigmoid(x),
    "leaky relu": lambda m, x: F.leaky_relu(x, 0.3),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pad": lambda m, x: F.pad(x, (1, 0, 2, 1)),
    "slice": lambda m, x: x[:, :, 1:, :-1],
    "shuffle": lambda m, x: x.view(x.shape[0], 2, 4, 9, 9).transpose(1, 2).reshape(-1, 8, 9, 9),
    "chunk": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "unbind": lambda m, x: torch.stack(x.unbind(2)[2:], 2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_native_ones_do(name: str) -> None:
    make, shape = LAYERS[name]
    prepared = calibrated(make(), torch.randn(shape) * 2)
    converted, x = native(prepared), torch.randn(shape)
    for runtime in RUNTIMES:
        program = export(prepared, (x,), runtime=runtime)
        # These take results that have not been rounded before, an LSTM at each step.
        adds = name == "cat" or (name in ("add", "add relu") and runtime != "executorch")
        assert_close(program, converted, x, steps=3 if name == "lstm" else 2 if adds else 1)


@torch.no_grad()
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers_are_quantized_as_in_native_models(name: str) -> None:
    model = conv_then(FUNCTIONS[name])
    if name == "shuffle":
        model.first.padding = (1, 1)
    prepared = calibrated(model, shaped(*IMAGE))
    converted, x = native(prepared), shaped(*IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of layers with floating inputs
        program = export(prepared, (x,))
    assert_close(program, converted, x, steps=2)


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "function",
    [F.gelu, F.silu, nn.SiLU(inplace=True), F.leaky_relu, torch.sigmoid, torch.special.expit],
)
def test_results_of_functions_are_rounded(function: Any, runtime: str) -> None:
    model = Stubbed(lambda m, x: function(m.layer(x)), layer=nn.Conv2d(3, 8, 3))
    prepared = calibrated(model, shaped(*IMAGE))
    x = shaped(*IMAGE)
    expected = native(prepared)(x)
    for source in (prepared, native(prepared)):
        found = export(source, (x,), runtime=runtime).module()(x)
        # One step is more than 0.001. A number on the border between two steps may go either way.
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.99


class Block(nn.Module):
    """A residual block as torchvision's quantizable models have it, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)),
        )
        self.sum = nnq.FloatFunctional()
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(self.quant(x)))
        x = self.sum.add_relu(self.body(x), x)
        return self.dequant(self.classifier(self.hidden(self.average(x).flatten(1))))

    def fused(self, fuse: Callable[..., Any] = fq.fuse_modules) -> Block:
        names = [[f"stem.{i}" for i in range(3)], [f"body.{i}" for i in range(3)]]
        fuse(self, [*names, ["body.3", "body.4"], ["hidden.0", "hidden.1"]], inplace=True)
        return self


def images(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 14, 14)


def block() -> Any:
    model = Block()
    with torch.no_grad():
        for _ in range(4):
            model(images(16) * 2)  # for the statistics of batch norms
    return calibrated(model.eval().fused(), images(8))


@torch.enable_grad()
def trained_block() -> Any:
    model: Any = Block().fused(fq.fuse_modules_qat)
    model.qconfig = fq.get_default_qat_qconfig("x86")
    model = fq.prepare_qat(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = model(images(8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


@torch.no_grad()
@pytest.mark.parametrize("make", [block, trained_block], ids=["calibrated", "trained"])
def test_a_program_computes_what_the_models_do_with_any_batch(make: Callable[[], Any]) -> None:
    prepared = make()
    before = copy.deepcopy(prepared.state_dict())
    mode = prepared.training
    program = export(prepared, (images(2),), dynamic_shapes=BATCH)
    assert prepared.training == mode
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
    run, converted, x = program.module(), native(prepared), images(5)
    assert_close(program, converted, x, steps=2)
    assert_close(program, converted, x[:1], steps=2)
    # What the model computes with fake-quantizers, or without; within the error of its integers.
    assert steps_apart(run(x), prepared.eval()(x), converted.classifier.scale) <= 4
    # A converted model gives the same program.
    assert torch.equal(
        export(converted, (images(2),)).module()(images(2).zero_()), run(images(2).zero_())
    )


@torch.no_grad()
def test_a_program_has_the_form_of_pt2e() -> None:
    program = export(block(), (images(2),))
    counts = calls(program)
    assert counts["conv2d"] == 3
    assert counts["linear"] == 2
    assert counts["dequantize_per_channel"] == 5
    assert not any("batch_norm" in name for name in counts)
    targets = {
        node.target.namespace for node in program.graph.nodes if hasattr(node.target, "_schema")
    }
    assert targets == {"aten", "quantized_decomposed"}
    for node in program.graph.nodes:
        if op(node) in ("conv2d", "linear"):
            x, weight, bias = node.args[:3]
            assert op(x) == "dequantize_per_tensor"
            assert len(x.users) == 1
            assert op(weight) == "dequantize_per_channel"
            assert program.state_dict[source(program, weight.args[0])].dtype == torch.int8
            assert program.state_dict[source(program, bias)].dtype == torch.float32
        if op(node) in (
            "max_pool2d",
            "adaptive_avg_pool2d",
            "flatten",
        ):
            (user,) = node.users
            assert op(user) == "quantize_per_tensor"


def op(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.split("::")[1]


def source(program: Any, node: Any) -> str:
    """The name in the state_dict of what a placeholder stands for."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}[node.name]


@torch.no_grad()
def test_runtimes_get_the_forms_that_they_know() -> None:
    prepared = block()
    programs = {name: export(prepared, (images(2),), runtime=name) for name in RUNTIMES}
    counts = {name: calls(program) for name, program in programs.items()}
    dtypes = {
        name: {n.args[5] for n in program.graph.nodes if op(n) == "quantize_per_tensor"}
        for name, program in programs.items()
    }
    assert dtypes == {
        "inductor": {torch.uint8},
        "executorch": {torch.int8},
        "openvino": {torch.uint8},
    }
    # The layer before the sum is rounded before it, or only the sum is.
    assert (
        counts["executorch"]["quantize_per_tensor"] == counts["inductor"]["quantize_per_tensor"] + 1
    )
    # OpenVINO reads quantize as rounding, and floating weights.
    assert [counts[name]["quantize_per_channel"] for name in RUNTIMES] == [0, 0, 5]
    x = images(2)
    results = [program.module()(x) for program in programs.values()]
    for result in results[1:]:
        assert steps_apart(result, results[0], native(prepared).classifier.scale) <= 2.001


@torch.no_grad()
def test_what_is_joined_has_one_scale() -> None:
    """XNNPACK takes no other concatenation, and Inductor's copies integers only then."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.join.cat([x, F.relu(m.first(x)), F.max_pool2d(x, 3, 1, 1)], dim=1)
        return m.last(torch.cat([m.second(y), *y.chunk(2, 1)], 1))

    layers = {
        "first": nn.Conv2d(3, 2, 1),
        "second": nn.Conv2d(8, 3, 1),
        "last": nn.Conv2d(11, 4, 1),
    }
    prepared = calibrated(Stubbed(run, join=nnq.FloatFunctional(), **layers), shaped(*IMAGE))
    program, x = export(prepared, (shaped(*IMAGE),)), shaped(*IMAGE)
    joins = [node for node in program.graph.nodes if op(node) == "cat"]
    assert len(joins) == 2
    for node in joins:
        grids = {part.args[1:] for part in node.args[0]}
        assert grids == {user.args[1:] for user in node.users}
        assert all(op(part) == "dequantize_per_tensor" for part in node.args[0])
    assert_close(program, native(prepared), x, steps=2)


@torch.no_grad()
def test_signed_activations_become_what_the_runtime_takes() -> None:
    prepared = calibrated(Block().eval().fused(), images(8), qconfig=SIGNED)
    converted, x = native(prepared), images(3)
    assert converted.quant.dtype == torch.int8
    for runtime in RUNTIMES:
        assert_close(export(prepared, (x,), runtime=runtime), converted, x, steps=2)


@torch.no_grad()
def test_what_is_left_in_floats_stays_so() -> None:
    model: Any = Block().eval().fused()
    model.qconfig = NATIVE
    model.hidden.append(model.dequant)
    model.classifier.qconfig, model.dequant = None, nn.Identity()
    model = fq.prepare(model)
    model(images(8))
    with quiet():
        converted = native(model)
    program, x = export(model, (images(2),)), images(2)
    assert calls(program)["dequantize_per_channel"] == 4
    torch.testing.assert_close(program.module()(x), converted(x), atol=0.02, rtol=0.02)


def test_hooks_of_users_are_traced() -> None:
    prepared = block()
    prepared.classifier.register_forward_hook(lambda m, args, y: y * 2)
    x = images(2)
    with torch.no_grad():
        doubled = export(prepared, (x,)).module()(x)
        prepared.classifier._forward_hooks.popitem()
        torch.testing.assert_close(doubled, 2 * export(prepared, (x,)).module()(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "qat"),
    [
        ("resnet18", False),
        ("resnet18", True),
        ("mobilenet_v2", False),
        ("mobilenet_v2", True),
        ("mobilenet_v3_large", False),
        ("shufflenet_v2_x1_0", False),
        ("googlenet", False),
        ("inception_v3", False),
    ],
)
def test_torchvisions_models(name: str, qat: bool) -> None:
    if not ao.has_quantized_modules:
        pytest.skip("torchvision's models have stubs of torch.ao, and there is no torch.ao")
    model: Any = torchvision_model(name)
    if hasattr(model, "aux_logits"):  # classifiers that only train
        model.aux_logits = False
        model.aux1 = model.aux2 = model.AuxLogits = None
    size = 80 if name == "inception_v3" else 64
    x = torch.randn(2, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(torch.randn(8, 3, size, size))
    if qat:
        model.fuse_model(is_qat=True)
        model.qconfig = fq.get_default_qat_qconfig("x86")
        fq.prepare_qat(model, inplace=True)(x)
        floating = model.eval().apply(fq.disable_fake_quant)(x)
        prepared = model.apply(fq.enable_fake_quant)
    else:
        model.eval().fuse_model(is_qat=False)
        floating = model(x)
        prepared = calibrated(model, x)
    converted = native(prepared)
    program = export(prepared, (x,), runtime="executorch")
    assert calls(program)["dequantize_per_channel"] == sum(
        isinstance(module, Weighted) for module in converted.modules()
    )
    found, expected = program.module()(x), converted(x)
    noise = rms(expected - floating)
    assert rms(found - floating) < noise * 1.1
    # One value in a thousand is rounded to the next integer, which untrained layers amplify; more
    # in ShuffleNet, whose parts of concatenations a program rounds once and native int8 twice.
    assert rms(found - expected) < (noise if name.startswith("shufflenet") else noise / 2)


class Natives(nn.Module):
    """Quantized modules that convert makes only of fused or transposed layers, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = nnq.Quantize(0.03, 100, torch.uint8), nnq.DeQuantize()
        self.up = filled(nnq.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1))
        self.add = filled(nniq.ConvAddReLU2d(8, 8, 3, padding=1))
        self.leaky = filled(nniq.LinearLeakyReLU(8, 8, 0.2))
        self.tanh = filled(nniq.LinearTanh(8, 8))
        self.softmax = nnq.Softmax(1, 1 / 256, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.quant(x))
        x = self.add(x, x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.dequant(self.softmax(self.tanh(self.leaky(x))))


def filled(layer: Any) -> Any:
    weight = torch.randn(layer._weight_shape) / 4
    layer.set_weight_bias(quantize_per_tensor(weight, 0.01, 0, torch.int8), torch.randn(8) / 4)
    layer.scale, layer.zero_point = 0.02, 110
    return layer


@torch.no_grad()
def test_native_modules_are_exported_as_they_are() -> None:
    model, x = Natives().eval(), torch.randn(6, 3, 7, 7)
    assert_close(export(model, (x,)), model, x, steps=2)


class Bags(nn.Module):
    """Embeddings, whose sum a linear layer gets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bags = nn.Embedding(30, 8), nn.EmbeddingBag(30, 8, mode="mean")
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.linear = nn.Linear(8, 5)

    def forward(self, indices: Tensor) -> Tensor:
        return self.dequant(self.linear(self.quant(self.rows(indices).sum(1) + self.bags(indices))))


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_stay_small(bits: int) -> None:
    model: Any = Bags().eval()
    model.qconfig = NATIVE
    model.rows.qconfig = model.bags.qconfig = (
        fq.float_qparams_weight_only_qconfig
        if bits == 8
        else fq.float_qparams_weight_only_qconfig_4bit
    )
    model = fq.prepare(model)
    indices = torch.randint(30, (6, 4))
    model(indices)
    program = export(model, (indices,))
    assert [tuple(v.shape) for v in program.state_dict.values() if v.dtype == torch.uint8] == [
        (30, 8)
    ] * 2
    assert_close(program, native(model), indices, steps=1)
    assert_close(export(model, (indices,), runtime="openvino"), native(model), indices, steps=1)


# --- where programs run -------------------------------------------------------------------------


def needs_int8_kernels_of_inductor() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("Inductor's quantized layers are oneDNN's, which this torch does not have")
    if torch_release >= (2, 14):
        # Importing it registers the patterns that torch had itself before.
        pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


@torch.no_grad()
def test_inductor_computes_with_integers() -> None:
    needs_int8_kernels_of_inductor()
    prepared, x = block(), images(3)
    program = export(prepared, (x,))
    torch._dynamo.reset()
    compiled = torch.compile(program.module())
    with torch._inductor.config.patch(freezing=True):
        found, code = run_and_get_code(compiled, x)
    text = "\n".join(code)
    counts = collections.Counter(
        re.findall(r"^[^\"\n]*torch\.ops\.onednn\.(\w+)", text, re.MULTILINE)
    )
    # The last convolution with the residual sum and ReLU, the others with ReLU or nothing.
    assert counts == {"qconv_pointwise": 2, "qconv2d_pointwise": 1, "qlinear_pointwise": 2}
    assert re.search(r"qconv2d_pointwise\.binary.*'sum'.*'relu'", text)
    assert "aten.convolution" not in text
    converted = native(prepared)
    assert steps_apart(found, converted(x), converted.classifier.scale) <= 2.001


RUN_COMPILED_WITHOUT_FASTQUANT = """
    import sys
    sys.modules["fastquant"] = None  # import fastquant fails
    import torch
    run = torch._inductor.aoti_load_package({package!r})
    x, expected, step = torch.load({data!r})
    assert (run(x) - expected).abs().max() / step <= 2.001
    print("ran")
"""


@torch.no_grad()
def test_aot_inductor_compiles_a_program(tmp_path: Path) -> None:
    needs_int8_kernels_of_inductor()
    prepared, x = block(), images(3)
    program = export(prepared, (images(2),), dynamic_shapes=BATCH)
    with torch._inductor.config.patch(freezing=True):
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    with zipfile.ZipFile(package) as files:
        code = "".join(files.read(n).decode() for n in files.namelist() if n.endswith(".cpp"))
    assert "aoti_torch_cpu__qconv_pointwise" in code
    assert "aten_convolution" not in code
    converted = native(prepared)
    torch.save((x, converted(x), converted.classifier.scale), tmp_path / "data.pt")
    code = RUN_COMPILED_WITHOUT_FASTQUANT.format(package=package, data=str(tmp_path / "data.pt"))
    assert printed(code).endswith("ran")


RUN_WITHOUT_FASTQUANT = """
    import sys
    sys.modules["fastquant"] = None  # import fastquant fails
    import torch, {registers}
    program = torch.export.load({program!r})
    x, expected = torch.load({data!r})
    found = program.module()(x)
    assert torch.equal(found, expected), (found - expected).abs().max()
    assert torch.equal(program.module()(x[:1]), expected[:1])
    print("ran")
"""


@torch.no_grad()
def test_a_saved_program_runs_without_fastquant(tmp_path: Path) -> None:
    program = export(block(), (images(2),), dynamic_shapes=BATCH)
    x = images(3)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, program.module()(x)), tmp_path / "data.pt")
    code = RUN_WITHOUT_FASTQUANT.format(
        registers="torch.ao.quantization.fx._decomposed"
        if ao.has_quantized_modules
        else "torch._inductor.decomposition",
        program=str(tmp_path / "model.pt2"),
        data=str(tmp_path / "data.pt"),
    )
    assert printed(code).endswith("ran")


def printed(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not there")
@pytest.mark.parametrize("make", [block, trained_block], ids=["calibrated", "trained"])
def test_openvino_computes_with_integers(make: Callable[[], Any]) -> None:
    import openvino

    prepared, x = make(), images(3)
    program = export(prepared, (images(2),), dynamic_shapes=BATCH, runtime="openvino")
    model = openvino.convert_model(program)
    compiled = openvino.Core().compile_model(
        model, "CPU", {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    (found,) = request.infer([x.numpy()]).values()
    converted = native(prepared)
    assert steps_apart(torch.from_numpy(found), converted(x), converted.classifier.scale) <= 2.001
    kinds = [
        (info.node_type, info.exec_type.split("_")[-1])
        for info in request.profiling_info
        if info.node_type in ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy")
    ]
    assert len(kinds) == 5
    assert {kind for _, kind in kinds} == {"I8"}


RUN_WITH_EXECUTORCH = """
    import torch
    import torch.ao.quantization.fx._decomposed
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.load({program!r})
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    nodes = lowered.exported_program().graph.nodes
    left = [str(node.target) for node in nodes if node.op == "call_function"]
    x, expected, step = torch.load({data!r})
    # The runtime reads the program where it lies, so all of this has to stay alive.
    buffer = lowered.to_executorch().buffer
    loaded = Runtime.get().load_program(buffer)
    method = loaded.load_method("forward")
    (found,) = method.execute([x])
    assert not any("conv" in name or "linear" in name or "quantize" in name for name in left), left
    assert (found - expected).abs().max() / step <= 2.001, (found - expected).abs().max() / step
    print("ran")
"""


@torch.no_grad()
@pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None or not ao.has_quantized_modules,
    reason="there is no executorch, or no torch.ao, which it imports",
)
def test_executorch_computes_with_integers(tmp_path: Path) -> None:
    prepared, x = block(), images(3)
    program = export(prepared, (images(2),), dynamic_shapes=BATCH, runtime="executorch")
    torch.export.save(program, tmp_path / "model.pt2")
    converted = native(prepared)
    torch.save((x, converted(x), converted.classifier.scale), tmp_path / "data.pt")
    code = RUN_WITH_EXECUTORCH.format(
        program=str(tmp_path / "model.pt2"), data=str(tmp_path / "data.pt")
    )
    assert printed(code).endswith("ran")


# --- the ops ------------------------------------------------------------------------------------


def test_ops_of_our_own_are_those_of_torch() -> None:
    """Where torch has no `quantized_decomposed`, ours are registered."""
    theirs = decomposed.ops()
    x, scales = torch.randn(3, 4, 5) * 9, torch.rand(4) * 0.1 + 0.01
    zeros = torch.arange(4)
    each: dict[str, tuple[Any, ...]] = {
        "quantize_per_tensor": (x, 0.05, 3, -100, 90, torch.int8),
        "quantize_per_channel": (x, scales, zeros, 1, -128, 127, torch.int8),
    }
    for name, args in each.items():
        integers = decomposed.IMPLEMENTATIONS[name](*args)
        assert torch.equal(integers, getattr(theirs, name).default(*args))
        back = f"de{name}"
        real = decomposed.IMPLEMENTATIONS[back](integers, *args[1:])
        assert torch.equal(real, getattr(theirs, back).default(integers, *args[1:]))


def test_ops_are_registered_where_torch_has_none() -> None:
    code = """
        import sys
        import torch
        for name in ("torch.ao.quantization.fx._decomposed", "torch._inductor.decomposition"):
            sys.modules[name] = None
        import fastquant as fq
        from fastquant.export import export
        model = fq.QuantWrapper(torch.nn.Linear(4, 3)).eval()
        model.qconfig = fq.get_default_qconfig("native")
        model = fq.prepare(model)
        model(torch.randn(8, 4))
        program = export(model, (torch.randn(2, 4),))
        x = torch.randn(2, 4)
        print((program.module()(x) - fq.convert(model, backend="native")(x)).abs().max().item())
    """
    assert float(printed(code)) < 1e-5


# --- bad input ----------------------------------------------------------------------------------


def refused(model: nn.Module, message: str, *args: Any, **options: Any) -> None:
    with quiet(), pytest.raises((fq.QuantizationError, TypeError), match=message):
        export(model, args or (images(2),), **options)


def test_models_without_data_are_refused() -> None:
    model: Any = Block().eval()
    model.qconfig = NATIVE
    refused(fq.prepare(model), r"these layers have seen no data: body\.0.*Run data through")


def test_layers_that_are_not_called_need_no_data() -> None:
    model: Any = Block().eval()
    model.qconfig = NATIVE
    model.auxiliary = nn.Linear(3, 3)
    model = fq.prepare(model)
    model(images())
    with quiet():
        program = export(model, (images(2),))
    assert not any("auxiliary" in name for name in calls(program))


def test_models_that_are_not_quantized_are_refused() -> None:
    refused(Block().eval(), "neither observers nor quantized modules")
    refused(nn.Module, "got", ())  # type: ignore[arg-type]


def test_unknown_runtimes_are_refused() -> None:
    refused(block(), "runtime must be one of 'inductor', 'executorch', 'openvino', got 'tpu'",
            runtime="tpu")  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "torch.ao"])
def test_dynamic_models_are_refused(backend: str) -> None:
    with quiet():
        model = fq.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), backend=backend)
    refused(model, "0 are quantized dynamically", torch.randn(2, 4))


def test_models_of_torch_ao_are_refused() -> None:
    with quiet():
        model = fq.convert(block(), backend="torch.ao")
    refused(model, r"stem\.0.* are quantized modules of torch\.ao.*backend='native'")


def test_activations_of_two_dtypes_are_refused() -> None:
    model: Any = nn.Sequential(fq.QuantWrapper(nn.Linear(4, 4)), fq.QuantWrapper(nn.Linear(4, 4)))
    model[0].qconfig, model[1].qconfig = NATIVE, SIGNED
    model = fq.prepare(model.eval())
    model(torch.randn(2, 4))
    refused(model, r"several dtypes.*uint8: 0\.quant; torch\.int8: 1\.quant", torch.randn(2, 4))


def test_quantized_inputs_are_refused() -> None:
    refused(native(block()), "must be floating tensors", quantize_per_tensor(images(), 0.1, 3))


def test_observers_as_layers_are_refused() -> None:
    model = Stubbed(lambda m, x: m.layer(m.observer(x)), layer=nn.Linear(5, 5))
    prepared = calibrated(model)
    prepared.observer = fq.MovingAverageMinMaxObserver()
    prepared(torch.randn(2, 5))
    refused(prepared, "observer .*MovingAverageMinMaxObserver.* calls", torch.randn(2, 5))


def test_trained_layers_that_stay_floating_are_refused_by_name() -> None:
    weight = fq.FakeQuantize.with_args(
        observer=fq.PerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_channel_affine,
    )
    model: Any = conv_then(lambda m, x: x)
    model.qconfig = fq.QConfig(activation=fq.default_fake_quant, weight=weight)
    prepared = fq.prepare_qat(model.train())
    prepared(shaped(*IMAGE))
    refused(prepared.eval(), r"layer first.* has no quantized form", shaped(*IMAGE))


def test_changed_forwards_are_refused() -> None:
    class Mine(nnq.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x)

    model = Stubbed(lambda m, x: m.layer(x), layer=Mine(4, 3))
    model.quant, model.dequant = nnq.Quantize(0.1, 3, torch.uint8), nnq.DeQuantize()
    refused(model, "layer is a Mine, whose class changes the forward", torch.randn(2, 4))


def test_floating_inputs_of_layers_are_said() -> None:
    prepared = calibrated(conv_then(lambda m, x: x + 1.5 * x.abs()), shaped(*IMAGE))
    with pytest.warns(
        UserWarning, match=r"last .*_Weighted.* get floating inputs.*FloatFunctional"
    ):
        export(prepared, (shaped(*IMAGE),))
