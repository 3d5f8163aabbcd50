"""Quantized tensors in graphs: torch.compile, torch.export, AOTInductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastquant._torch.private import torch_release
from fastquant.nn import quantized as nnq
from fastquant.nn.intrinsic import quantized as nniq
from fastquant.quantized_tensor import (
    QuantizedTensor,
    is_quantized,
    quantize_per_channel,
    quantize_per_tensor,
)
from test_quantized_tensor import (
    BOUNDS,
    FACTS,
    ORDER,
    POOLING,
    ROUNDED,
    SHAPES,
    Function,
)

# What depends on the values, so that no graph can have it.
OF_VALUES = {"mask", "item", "float", "int", "bool", "equal", "torch.equal"}
# What Dynamo does not have for subclasses.
REFUSED = {"grad", "len", "iter"}


@pytest.fixture(autouse=True)
def _no_earlier_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(*shape: int, dtype: torch.dtype = torch.uint8) -> QuantizedTensor:
    return quantize_per_tensor(torch.randn(shape) * 5, 0.1, 3, dtype)


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, (tuple, list)) and not isinstance(expected, torch.Size):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, QuantizedTensor):
        assert type(found) is QuantizedTensor
        assert found.equal(expected)
        assert found.shape == expected.shape
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "functions",
    [SHAPES, FACTS, BOUNDS, ROUNDED, POOLING, ORDER],
    ids=["shapes", "facts", "bounds", "rounded", "pooling", "order"],
)
def test_functions_are_the_same_in_graphs(
    functions: dict[str, Function], dtype: torch.dtype
) -> None:
    chosen = [name for name in functions if name not in OF_VALUES | REFUSED]
    if functions is SHAPES or functions is FACTS:
        # What does not compute with the integers: each function is compiled for one of the dtypes.
        chosen = chosen[dtype == torch.int8 :: 2]
    for name in chosen:
        function = functions[name]
        torch._dynamo.reset()
        x = quantized(2, 8, 6, 6, dtype=dtype)
        compiled = torch.compile(lambda x, f=function: f(x), fullgraph=True, backend="eager")
        try:
            found = compiled(x.clone())
        except Exception as error:
            raise AssertionError(f"{name} does not compile") from error
        same(found, function(x.clone()))


class Net(nn.Module):
    """Layers, and between them what users' forwards do."""

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.quant = nnq.Quantize(0.05, 3, dtype)
        self.conv1 = layer(nniq.ConvReLU2d, 3, 16, 3, stride=2, padding=1)
        self.conv2 = layer(nnq.Conv2d, 16, 16, 3, padding=1, groups=16)
        self.sum, self.cat = nnq.QFunctional(), nnq.QFunctional()
        for module in (self.sum, self.cat):
            module.scale, module.zero_point = 0.2, 5
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.linear = layer(nnq.Linear, 16, 10)
        self.dequant = nnq.DeQuantize()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.quant(x))
        y = self.relu(self.sum.add(x, self.conv2(x)))
        first, second = self.pool(y).chunk(2, 1)
        y = self.cat.cat([second, first], dim=1)
        y = F.pad(y, (1, 1))[:, :, :, 1:]
        y = self.sum.mul(y, F.hardsigmoid(F.adaptive_avg_pool2d(y, 1)))
        y = F.interpolate(y, scale_factor=2.0)
        n, channels = y.size(0), y.shape[1]
        y = y.view(n, 2, channels // 2, -1).transpose(1, 2).reshape(n, channels, -1).mean(2)
        return self.dequant(self.linear(torch.flatten(y, 1)))  # type: ignore[no-any-return]


def layer(cls: Any, *args: Any, **kwargs: Any) -> Any:
    module = cls(*args, **kwargs)
    shape = module._weight_shape
    scales = torch.rand(shape[0], dtype=torch.float64) * 0.01 + 0.005
    weight = quantize_per_channel(torch.randn(shape), scales, torch.zeros(shape[0]), 0)
    module.set_weight_bias(weight, torch.randn(shape[0]))
    module.scale, module.zero_point = 0.1, 9
    return module


def batch(size: int) -> Tensor:
    return torch.randn(size, 3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize(
    # Inductor takes long, and leaves to the ops what they do with either dtype.
    ("dtype", "backend"),
    [(torch.uint8, "inductor"), (torch.int8, "aot_eager")],
)
def test_a_model_compiles_before_it_ever_ran(dtype: torch.dtype, backend: str) -> None:
    model = Net(dtype).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    results = [(x, compiled(x)) for x in (batch(2), batch(5), batch(1))]
    for x, found in results:
        assert torch.equal(found, model(x))


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_with_any_batch(strict: bool) -> None:
    model = Net().eval()
    dim = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (batch(2),), dynamic_shapes=({0: dim},), strict=strict)
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"fastquant.quantized_conv.default", "fastquant.quantized_linear.default"} <= ops
    for x in (batch(2), batch(5), batch(1)):
        assert torch.equal(program.module()(x), model(x))
    # Nothing that export has made stays behind.
    assert torch.equal(Net.forward(model, batch(1).zero_()), model(batch(1).zero_()))


@torch.no_grad()
def test_an_exported_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Net().eval()
    program = torch.export.export(model, (batch(2),))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = batch(2)
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def aot_compiled(model: nn.Module, path: Path) -> str:
    dim = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (batch(2),), dynamic_shapes=({0: dim},))
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path / "model.pt2"))


@pytest.mark.skipif(
    torch_release < (2, 11), reason="AOTInductor of torch 2.10 gives operators wrong dtypes"
)
def test_aot_inductor_runs_a_model(tmp_path: Path) -> None:
    model = Net().eval()
    run = torch._inductor.aoti_load_package(aot_compiled(model, tmp_path))
    for x in (batch(2), batch(5)):
        assert torch.equal(run(x), model(x))


@pytest.mark.skipif(torch_release >= (2, 11), reason="AOTInductor gives operators their dtypes")
def test_aot_inductor_that_gives_wrong_dtypes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"compile it with torch 2\.11 or newer"):
        aot_compiled(Net().eval(), tmp_path)


# --- quantized tensors that enter and leave graphs ----------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_quantized_tensors_enter_and_leave_graphs(backend: str) -> None:
    net = Net().eval()

    def front(x: Tensor) -> Any:
        return net.conv1(net.quant(x))

    def back(x: Any) -> Any:
        return net.dequant(net.conv2(x).relu())

    x = batch(2)
    middle = front(x)
    found = torch.compile(front, fullgraph=True, backend=backend)(x)
    assert type(found) is QuantizedTensor
    same(found, middle)
    same(found.flatten(1).dequantize(), middle.flatten(1).dequantize())
    compiled = torch.compile(back, fullgraph=True, backend=backend)
    for scale, zero_point in ((0.1, 9), (0.2, 9), (0.3, 1)):
        other = QuantizedTensor(middle.int_repr(), scale, zero_point)
        same(compiled(other), back(other))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_takes_several_quantized_tensors(backend: str) -> None:
    def function(x: Any, y: Any) -> Any:
        lists = torch.cat([x, y], 1), torch.stack([y, x])
        tuples = torch.cat((y, x), 1), torch.stack((x, y)), torch.concat(tensors=(x, x))
        return *lists, *tuples, x.relu(), y.dequantize()

    x, y = quantized(2, 3, 4, 4), quantized(2, 3, 4, 4)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    same(compiled(x, y), function(x, y))
    x.resize_(1, 3, 4, 4)
    y.set_(y[:1].clone())
    same(compiled(x, y), function(x, y))
    same(compiled(x, x), function(x, x))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_graph_may_change_its_input(backend: str) -> None:
    x = quantized(2, 3, 4, 4)
    expected = x.clone().relu_()
    found = torch.compile(lambda x: x.relu_(), fullgraph=True, backend=backend)(x)
    same(found, expected)
    same(x, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x,
        F.hardswish,
        torch.exp,
        torch.rand_like,
        lambda x: F.elu(x, inplace=True),
        F.elu_,
        torch.tanh_,
        lambda x: F.softmax(x, 1),
        lambda x: x.sum(),
    ],
)
def test_graphs_refuse_what_has_no_meaning(function: Callable[[Any], Any]) -> None:
    """A function must not get the integers only because it is called in a graph."""
    x = quantized(2, 8)
    with pytest.raises(Exception, match="does not take quantized tensors"):
        torch.compile(function, fullgraph=True, backend="eager")(x)


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nnq.Quantize(0.1, 3, torch.uint8)(x).exp()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [False, True])
def test_export_refuses_it_too(strict: bool) -> None:
    with pytest.raises(Exception, match="does not take quantized tensors"):
        torch.export.export(Refused(), (torch.randn(2, 8),), strict=strict)


def test_what_export_passes_on_answers_as_a_quantized_tensor() -> None:
    facts = {}

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nnq.Quantize(0.1, 3, torch.uint8)(x)
            facts.update(
                quantized=(y.is_quantized, is_quantized(y)),
                qparams=(y.q_scale(), y.q_zero_point()),
                sizes=(y.shape[1], y.size(1), y.dim(), y.ndim, y.dtype),
            )
            return y.permute(1, 0).unsqueeze(0)[0].dequantize()  # type: ignore[no-any-return]

    x = torch.randn(2, 8)
    found = torch.export.export(Model(), (x,), strict=False).module()(x)
    assert facts == {
        "quantized": (True, True),
        "qparams": (0.1, 3),
        "sizes": (8, 8, 2, 2, torch.uint8),
    }
    same(found, quantize_per_tensor(x, 0.1, 3).t().dequantize())
