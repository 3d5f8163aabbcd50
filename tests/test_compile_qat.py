"""torch.compile of QAT blocks: one graph that trains as eager mode does, with few kernels."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.intrinsic.qat as nniqat
from oracle import quiet
from test_compile import needs_a_compiler
from test_convolution import on_x86

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


SHAPES = {0: (16, 3), 1: (4, 3, 9), 2: (4, 3, 6, 6), 3: (2, 3, 5, 5, 5)}
LAYERS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def network(dims: int = 2, relu: bool = True, **bn: Any) -> nn.Sequential:
    """Two prepared blocks of a layer of so many dimensions and its batch norm."""
    torch.manual_seed(0)
    size: Any = {} if dims == 0 else {"kernel_size": 3}
    modules: list[nn.Module] = []
    fused = []
    for channels in (3, 8):
        n = len(modules)
        # Without a bias, whose gradient is nothing but rounding where batch norm follows.
        modules += [LAYERS[dims](channels, 8, bias=False, **size), NORMS[dims](8, **bn)]
        modules += [nn.ReLU()] if relu else []
        fused.append([str(i + 1) for i in range(n, len(modules))])
    model = nn.Sequential(fq.QuantStub(), *modules).train()
    with quiet():
        model = fq.fuse_modules_qat(model, fused)
        model.qconfig = fq.get_default_qat_qconfig("x86")
        fq.prepare_qat(model, inplace=True)
    return model


def batch(dims: int = 2, n: int | None = None, factor: float = 1.0) -> Tensor:
    shape = SHAPES[dims]
    return torch.randn(shape[0] if n is None else n, *shape[1:]) * factor


def assert_near(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal but for rounding, after which a few values lie a quantization step apart."""
    assert actual.dtype == expected.dtype
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    scale = float(expected.detach().abs().max())
    close = (actual - expected).abs() <= 1e-4 * scale + 1e-6
    assert close.double().mean() >= 0.97, name
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05 * scale + 1e-6, msg=name)


def train_alike(compiled: Callable[[Tensor], Tensor], models: list[nn.Module], x: Tensor) -> None:
    """One step of both models; `compiled` is the first one."""
    model, expected = models
    y, z = compiled(x), expected(x)
    assert_near(y, z, "output")
    if z.requires_grad:
        weights = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
        (y * weights).sum().backward()
        (z * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert_near(p.grad, q.grad, name)
        p.grad = q.grad = None
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert_near(a, b, name)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dims", LAYERS)
def test_blocks_train_compiled_as_in_eager_mode(dims: int, relu: bool) -> None:
    if dims == 0 and relu:
        pytest.skip("torch.ao has no block of a linear layer, batch norm and ReLU")
    models = [network(dims, relu) for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for factor in (1.0, 2.0, 0.5):
        train_alike(compiled, models, batch(dims, factor=factor))
    assert graphs() == 1


def test_blocks_compile_after_a_call_of_another_fake_quantizer() -> None:
    """In a process of its own, since the first call of each class of them counts."""
    program = """
        import torch
        import fastquant as fq
        from test_compile_qat import batch, network

        fq.FakeQuantize()(torch.randn(3))  # the base class of the model's fake-quantizers
        compiled = torch.compile(network(0, relu=False), fullgraph=True, backend="aot_eager")
        compiled(batch(0)).sum().backward()
        compiled(batch(0))
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parent,
        check=True,
    )


@needs_a_compiler
def test_blocks_train_in_the_layouts_that_inductor_chooses() -> None:
    models = [network() for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True)
    for factor in (1.0, 2.0):
        train_alike(compiled, models, batch(factor=factor))
    assert graphs() == 1


def test_a_backend_that_decomposes_and_partitions_trains_blocks() -> None:
    models = [network() for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager_decomp_partition")
    for _ in range(2):
        train_alike(compiled, models, batch())


def test_the_graph_of_a_block_has_one_op_for_each_pass() -> None:
    """So that it compiles in less time, and no kernel goes over activations a third time."""
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(network(), fullgraph=True, backend=record)(batch())
    passes = ("observe_folded_weight_", "observe_batch_norm_", "batch_norm_fake_quantize")
    for name in passes:
        assert sum(target == f"fastquant.{name}.default" for target in targets) == 2, name
    assert not any("relu" in target or "observe_qparams" in target for target in targets)


# Of blocks: 1x1 and depthwise convolutions, and one that torch computes; and 3x3 ones.
BOTTLENECK: list[dict[str, Any]] = [
    {"in_channels": 3, "out_channels": 8, "kernel_size": 1},
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 8},
    {"in_channels": 8, "out_channels": 8, "kernel_size": 5, "padding": 2, "groups": 8},
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 8, "out_channels": 5, "kernel_size": 1},
]
WIDE: list[dict[str, Any]] = [
    {"in_channels": 3, "out_channels": 16, "kernel_size": 1},
    {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1},
]


def blocks(sizes: list[dict[str, Any]]) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, as prepared blocks."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [fq.QuantStub()]
    for size in sizes:
        modules += [nn.Conv2d(**size, bias=False), nn.BatchNorm2d(size["out_channels"]), nn.ReLU()]
    model = nn.Sequential(*modules).train()
    with quiet():
        names = [[str(i + k) for k in range(3)] for i in range(1, len(modules), 3)]
        model = fq.fuse_modules_qat(model, names)
        model.qconfig = fq.get_default_qat_qconfig("x86")
        fq.prepare_qat(model, inplace=True)
    return model


@on_x86
@pytest.mark.parametrize(
    ("sizes", "autocast", "of_torch"),
    [(BOTTLENECK, False, 1), (BOTTLENECK, True, 1), (WIDE, False, 0), (WIDE, True, 1)],
)
def test_convolutions_with_kernels_are_ops_in_graphs(
    sizes: list[dict[str, Any]], autocast: bool, of_torch: int
) -> None:
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(blocks(sizes), fullgraph=True, backend=record)
    with torch.autocast("cpu", enabled=autocast):
        compiled(batch())
    assert targets.count("fastquant.convolution.default") == len(sizes) - of_torch
    assert sum("conv2d" in target for target in targets) == of_torch


@needs_a_compiler
@pytest.mark.parametrize("sizes", [BOTTLENECK, WIDE])
def test_convolutions_with_kernels_train_compiled_as_in_eager_mode(
    sizes: list[dict[str, Any]],
) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        models = [blocks(sizes) for _ in range(2)]
        compiled = torch.compile(models[0], fullgraph=True)
        for factor in (1.0, 2.0):
            train_alike(compiled, models, batch(factor=factor).to(memory_format=layout))


def test_batch_sizes_of_blocks_share_a_dynamic_graph() -> None:
    models = [network() for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5, 8):
        train_alike(compiled, models, batch(n=n))
    assert graphs() == 1


def test_switches_of_blocks_do_not_recompile() -> None:
    models = [network() for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    train_alike(compiled, models, batch())
    for switch in (
        fq.disable_observer,
        fq.disable_fake_quant,
        fq.enable_observer,
        fq.enable_fake_quant,
    ):
        for model in models:
            model.apply(switch)
        train_alike(compiled, models, batch(factor=3))
    assert graphs() == 1


def test_blocks_evaluate_and_freeze_statistics_as_in_eager_mode() -> None:
    models = [network() for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    train_alike(compiled, models, batch())
    for change in (
        nniqat.freeze_bn_stats,
        nn.Module.eval,
        nn.Module.train,
        nniqat.update_bn_stats,
    ):
        for model in models:
            if change in (nn.Module.eval, nn.Module.train):
                change(model)
            else:
                model.apply(change)
        train_alike(compiled, models, batch(factor=2))


def test_an_average_over_all_batches_is_kept_in_compiled_code() -> None:
    """Batch norm with momentum None reads how many batches it has seen, which breaks graphs."""
    models = [network(momentum=None) for _ in range(2)]
    compiled = torch.compile(models[0], backend="aot_eager")
    for _ in range(3):
        train_alike(compiled, models, batch())


def doubled(module: nn.Module, *args: Any) -> Any:
    return args[-1] * 2


REPLACED: dict[str, Callable[[Any], Any]] = {
    "hook": lambda m: m.register_forward_hook(doubled),
    "hook of the batch norm": lambda m: m.bn.register_forward_hook(doubled),
    "hook of the fake-quantizer": lambda m: m.activation_post_process.register_forward_hook(
        doubled
    ),
    "hook of the weight's": lambda m: m.weight_fake_quant.register_forward_hook(doubled),
    "forward of the batch norm": lambda m: setattr(m.bn, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_users_replace_in_a_block_is_in_its_graph(what: str) -> None:
    models = [network() for _ in range(2)]
    for model in models:
        REPLACED[what](model[1])
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    train_alike(compiled, models, batch())


def test_a_copy_of_a_compiled_model_trains_on_its_own() -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(batch())
    other = copy.deepcopy(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.compile(other, fullgraph=True, backend="aot_eager")(batch(factor=5))
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]), name


@pytest.mark.parametrize(
    "make",
    [
        fq.MinMaxObserver,
        fq.MovingAverageMinMaxObserver,
        fq.PerChannelMinMaxObserver,
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_compiled_observers_take_integers(make: Callable[[], Any], dtype: torch.dtype) -> None:
    observer, expected = make(), make()
    compiled = torch.compile(observer, fullgraph=True, backend="aot_eager")
    for high in (5, 9):
        x = torch.arange(high * 2).reshape(2, high).to(dtype)
        torch.testing.assert_close(compiled(x), expected(x))
        for a, b in zip(observer.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
