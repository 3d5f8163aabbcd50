"""Calls of QAT blocks with batch norm: one op does several modules' work where nobody can tell."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastquant as fq
import fastquant.nn.intrinsic.qat as nniqat
from fastquant.nn.quantized import FloatFunctional
from oracle import assert_same, assert_unchanged, quiet, snapshot
from zoo import torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {0: (8, 3), 1: (4, 3, 9), 2: (4, 3, 6, 6), 3: (2, 3, 4, 4, 4)}


@dataclass(frozen=True)
class Kind:
    """A linear layer (of 0 dimensions) or a convolution, with batch norm and perhaps ReLU."""

    dims: int = 2
    relu: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.float32

    def block(self, ns: Any = fq, qconfig: Any = None) -> Any:
        """Prepared for QAT by a library."""
        torch.manual_seed(0)
        first: nn.Module = nn.Linear(3, 5, bias=self.bias)
        if self.dims:
            first = CONVS[self.dims](3, 5, 3, padding=1, bias=self.bias)
        bn = BATCH_NORMS[max(self.dims, 1)](5)
        with torch.no_grad():
            bn.weight.uniform_(-2, 2)
            bn.bias.uniform_(-1, 1)
        parts = [first, bn, nn.ReLU()] if self.relu else [first, bn]
        model = nn.Sequential(nn.Sequential(*parts).to(self.dtype)).train()
        ns.fuse_modules_qat(model, [[f"0.{i}" for i in range(len(parts))]], inplace=True)
        model.qconfig = qconfig or ns.get_default_qat_qconfig("x86", version=0)
        with quiet():
            return ns.prepare_qat(model)[0][0]

    def x(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(SHAPES[self.dims], generator=generator).to(self.dtype)


KINDS = [
    *(
        Kind(dims, relu, bias)
        for dims in (1, 2, 3)
        for relu in (True, False)
        for bias in (True, False)
    ),
    Kind(0, False, True),
    Kind(0, False, False),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def activation(**kwargs: Any) -> Any:
    return fq.QConfig(fq.FakeQuantize.with_args(**kwargs), fq.default_per_channel_weight_fake_quant)


QCONFIGS = {
    "fused": fq.get_default_qat_qconfig("x86"),
    "separate": fq.get_default_qat_qconfig("x86", version=0),
    "symmetric": activation(
        observer=fq.MovingAverageMinMaxObserver,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
    "min and max": activation(observer=fq.MinMaxObserver),
    "four bits": activation(
        observer=fq.MovingAverageMinMaxObserver, quant_min=0, quant_max=15, averaging_constant=0.3
    ),
}


def in_steps(block: Any) -> Any:
    """The block, with a user's hook that has to see the output of the modules in it."""
    block.register_forward_hook(lambda *_: None)
    return block


def ops_of(run: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    return {event.name for event in profile.events()}


def is_one(run: Callable[[], Any]) -> bool:
    """Whether batch norm and what follows are done by one op."""
    names = ops_of(run)
    one = "fastquant::observe_batch_norm_" in names
    assert one != any("aten::batch_norm" in name for name in names)
    return one


def step(block: Any, x: Tensor, grad_seed: int = 1) -> dict[str, Tensor]:
    """Output, every gradient and every buffer of one training step."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x)
    generator = torch.Generator().manual_seed(grad_seed)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads, **snapshot(block)}


def assert_close(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: float, tolerance: float = 2e-3
) -> None:
    """Outputs a quantization step apart at most, and seldom; all else equal up to rounding."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert value.dtype == other.dtype, name
        a, b = value.double(), other.double()
        if name == "y":
            steps = (a - b).abs() / scale
            assert steps.max() < 1.01, steps.max()
            assert (steps > 0.5).double().mean() < 0.05
        elif name.endswith("zero_point"):
            assert (a - b).abs().max() <= 1, name
        else:
            assert (a - b).norm() <= tolerance * b.norm() + 1e-4, (name, value, other)


# ----------------------------------------------------------------- what it does is the same


@every_kind
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_batch_norm_relu_and_fake_quantize_are_one_op(kind: Kind, qconfig: str) -> None:
    block = kind.block(qconfig=QCONFIGS[qconfig])
    expected = in_steps(copy.deepcopy(block))
    assert is_one(lambda: block(kind.x()))
    assert not is_one(lambda: expected(kind.x()))
    for seed in range(4):
        results = step(block, kind.x(seed)), step(expected, kind.x(seed))
        assert_close(*results, scale=expected.activation_post_process.scale.item())


@every_kind
@pytest.mark.parametrize("version", [0, None])
def test_training_is_as_with_torch_ao(kind: Kind, version: int | None) -> None:
    # Weights 16 bits wide, all in range: a last-bit difference may not become a whole step.
    weight = {
        "quant_min": -32767,
        "quant_max": 32767,
        "dtype": torch.int32,
        "qscheme": torch.per_channel_symmetric,
        "ch_axis": 0,
    }
    blocks = []
    for ns in (fq, tq):
        with quiet():
            kwargs = {} if version is None else {"version": version}
            config = ns.get_default_qat_qconfig("x86", **kwargs)
            observer = ns.MovingAveragePerChannelMinMaxObserver
            wide = ns.FakeQuantize.with_args(observer=observer, **weight)
        blocks.append(kind.block(ns, ns.QConfig(config.activation, wide)))
    ours, theirs = blocks
    assert is_one(lambda: copy.deepcopy(ours)(kind.x()))
    for seed in range(4):
        results = step(ours, kind.x(seed)), step(theirs, kind.x(seed))
        for result in results:
            for name in [name for name in result if "weight_fake_quant" in name]:
                del result[name]
        results[0].pop("activation_post_process.activation_post_process.nonfinite_count")
        assert_close(*results, scale=theirs.activation_post_process.scale.item(), tolerance=5e-3)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "train": lambda block: block.train(),
    "eval": lambda block: block.eval(),
    "freeze": lambda block: block.apply(nniqat.freeze_bn_stats),
    "update": lambda block: block.apply(nniqat.update_bn_stats),
    "no observer": lambda block: block.apply(fq.disable_observer),
    "observer": lambda block: block.apply(fq.enable_observer),
    "no fake quant": lambda block: block.apply(fq.disable_fake_quant),
    "fake quant": lambda block: block.apply(fq.enable_fake_quant),
    "flags by hand": lambda block: [
        flag.copy_(1 - flag) for name, flag in block.named_buffers() if name.endswith("_enabled")
    ],
    "halve": lambda block: [p.data.mul_(0.5) for p in block.parameters()],
    "momentum None": lambda block: setattr(block.bn, "momentum", None),
    "momentum 0": lambda block: setattr(block.bn, "momentum", 0.0),
    "momentum 1": lambda block: setattr(block.bn, "momentum", 1),
    "eps": lambda block: setattr(block.bn, "eps", 0.5),
    "not counted": lambda block: setattr(block.bn, "num_batches_tracked", None),
    "reset": lambda block: (
        block.reset_running_stats() if block.bn.num_batches_tracked is not None else None
    ),
    "scale of two": lambda block: block.activation_post_process.scale.fill_(2.0),
    "frozen": lambda block: block.bn.requires_grad_(False),
    "bias only": lambda block: block.bn.bias.requires_grad_(True),
    "state": lambda block: block.load_state_dict(copy.deepcopy(block.state_dict())),
}


@settings(max_examples=60)
@given(
    kind=st.builds(
        Kind,
        st.sampled_from([1, 2, 3]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([torch.float32, torch.float32, torch.float64]),
    )
    | st.just(Kind(0, False)),
    qconfig=st.sampled_from(tuple(QCONFIGS)),
    actions=st.lists(st.sampled_from(tuple(ACTIONS)), max_size=8),
    with_gradients=st.booleans(),
)
def test_training_goes_on_alike_whatever_is_switched(
    kind: Kind, qconfig: str, actions: list[str], with_gradients: bool
) -> None:
    block = kind.block(qconfig=QCONFIGS[qconfig])
    expected = in_steps(copy.deepcopy(block))
    for seed, action in enumerate(["train", *actions]):
        for each in (block, expected):
            ACTIONS[action](each)
        x = kind.x(seed)
        if with_gradients:
            results = step(block, x), step(expected, x)
        else:
            with torch.no_grad():
                results = (
                    {"y": block(x), **snapshot(block)},
                    {"y": expected(x), **snapshot(expected)},
                )
        scale = expected.activation_post_process.scale.item()
        assert_close(*results, scale=scale, tolerance=1e-2)
        # From here on with the same numbers: rounding errors do not add up.
        expected.load_state_dict(block.state_dict())


@every_kind
def test_gradients_of_gradients(kind: Kind) -> None:
    block = kind.block()
    block(kind.x())
    block.apply(fq.disable_observer)
    expected = in_steps(copy.deepcopy(block))
    results = []
    for each in (block, expected):
        x = kind.x().requires_grad_()
        (first,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in each.named_parameters()}})
    for name, value in results[0].items():
        other = results[1][name]
        assert (value - other).norm() <= 2e-3 * other.norm() + 1e-3, name


def test_inference_and_evaluation_are_one_op_too() -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            block.train(training)
            expected = in_steps(copy.deepcopy(block))
            with mode():
                assert is_one(lambda: copy.deepcopy(block)(kind.x(1)))
                y, other = block(kind.x(1)), expected(kind.x(1))
            assert (y - other).abs().max() <= 1.01 * block.activation_post_process.scale
            assert_same(block.bn.num_batches_tracked, expected.bn.num_batches_tracked)


def test_autocast_to_bf16_is_one_op() -> None:
    kind = Kind()
    block = kind.block()
    expected = in_steps(copy.deepcopy(block))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_one(lambda: copy.deepcopy(block)(kind.x()))
        for seed in range(3):
            results = step(block, kind.x(seed)), step(expected, kind.x(seed))
            assert results[0]["y"].dtype == torch.bfloat16
            for name, value in results[0].items():
                other = results[1][name]
                assert value.dtype == other.dtype
                a, b = value.double(), other.double()
                assert (a - b).norm() <= 0.05 * b.norm() + 0.01, name


def test_a_block_called_twice_in_a_forward_is_observed_twice() -> None:
    kind = Kind(relu=False)
    block = kind.block()
    block.bn.momentum = None
    expected = in_steps(copy.deepcopy(block))
    for each in (block, expected):
        (each(kind.x(1)).square().sum() + each(kind.x(2)).sum()).backward()
    assert block.bn.num_batches_tracked == 2
    results = [
        {**snapshot(each), **{f"{n}.grad": p.grad for n, p in each.named_parameters()}}
        for each in (block, expected)
    ]
    assert_close(*results, scale=1.0)


class MobileNet(nn.Module):
    """An inverted residual: expansion, depthwise convolution, linear bottleneck, addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._conv(3, 8, 3, stride=2, padding=1)
        self.expand = self._conv(8, 24, 1)
        self.depthwise = self._conv(24, 24, 3, padding=1, groups=24)
        self.project = self._conv(24, 8, 1, relu=False)
        self.add = FloatFunctional()
        self.classifier = nn.Linear(8, 4)

    @staticmethod
    def _conv(*sizes: int, relu: bool = True, **kwargs: Any) -> nn.Module:
        parts = [nn.Conv2d(*sizes, bias=False, **kwargs), nn.BatchNorm2d(sizes[1])]
        return nn.Sequential(*parts, *([nn.ReLU()] if relu else []))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.add.add(x, self.project(self.depthwise(self.expand(x))))
        return self.classifier(x.mean((2, 3)))


def mobile_net() -> nn.Module:
    model = nn.Sequential(fq.QuantStub(), MobileNet()).train()
    for name in ("stem", "expand", "depthwise", "project"):
        parts = [f"1.{name}.{i}" for i in range(2 if name == "project" else 3)]
        fq.fuse_modules_qat(model, [parts], inplace=True)
    model.qconfig = fq.get_default_qat_qconfig("x86")
    return fq.prepare_qat(model)


def losses(model: nn.Module, steps: int = 12) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(16) % 4
    x = torch.randn(16, 3, 16, 16, generator=generator) + target[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def with_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "bn"):
            in_steps(module)
    return model


def test_a_network_trains_alike() -> None:
    torch.manual_seed(0)
    model = mobile_net()
    expected = with_hooks(copy.deepcopy(model))
    ours, theirs = losses(model), losses(expected)
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(theirs, rel=0.1, abs=0.03)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_networks_of_torchvision_step_alike(name: str) -> None:
    # With some seeds a residual sum is half of the largest one, both being sums of multiples of two
    # scales. Half of 127 steps is a tie, which the last bit of a scale decides.
    torch.manual_seed(1)
    model = torchvision_model(name).train()
    model.fuse_model(is_qat=True)
    model.qconfig = fq.get_default_qat_qconfig("x86")
    # In double, since networks this deep amplify the rounding of float, by which a value here and
    # there is quantized to the next integer, without bounds.
    fq.prepare_qat(model, inplace=True).double()
    expected = with_hooks(copy.deepcopy(model))
    results = []
    for each in (model, expected):
        torch.manual_seed(1)  # of dropout and input
        y = each(torch.randn(4, 3, 96, 96, dtype=torch.double))
        y.square().mean().backward()
        results.append(
            (
                y.detach(),
                each.get_submodule("features.0.0" if name[0] == "m" else "conv1").weight.grad,
            )
        )
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


# ------------------------------------------------------- what users put there goes on being heard

Log = list[str]
Deed = Callable[[Any, Log], Any]  # returns what ends it, if it needs an end


def part_of(block: Any, path: str) -> Any:
    return block.get_submodule(path) if path else block


def noting(original: Callable[..., Any], log: Log, name: str) -> Callable[..., Any]:
    def own(*args: Any, **kwargs: Any) -> Any:
        log.append(name)
        return original(*args, **kwargs)

    return own


def on_instance(path: str, method: str) -> Deed:
    def do(block: Any, log: Log) -> None:
        module = part_of(block, path)
        setattr(module, method, noting(getattr(module, method), log, method))

    return do


def on_class(path: str, method: str, base: bool = False) -> Deed:
    """On the class that the method is from, or on the last base class that has one."""

    def do(block: Any, log: Log) -> Callable[[], None]:
        cls = type(part_of(block, path))
        owner = [c for c in cls.__mro__ if method in vars(c)][-1 if base else 0]
        original = vars(owner)[method]
        setattr(owner, method, noting(original, log, method))
        return lambda: setattr(owner, method, original)

    return do


def by_subclass(path: str, method: str) -> Deed:
    def do(block: Any, log: Log) -> None:
        module = part_of(block, path)
        cls = type(module)
        module.__class__ = type(
            cls.__name__, (cls,), {method: noting(getattr(cls, method), log, method)}
        )

    return do


def by_hook(path: str, register: str, **kwargs: Any) -> Deed:
    def do(block: Any, log: Log) -> None:
        getattr(part_of(block, path), register)(lambda *_: log.append(register), **kwargs)

    return do


def by_global_hook(register: str) -> Deed:
    def do(block: Any, log: Log) -> Callable[[], None]:
        def hook(module: nn.Module, *_: Any) -> None:
            log.append(type(module).__name__)

        handle: Any = getattr(hooks_of_all, register)(hook)
        return handle.remove

    return do


def parametrized(path: str, name: str) -> Deed:
    def do(block: Any, log: Log) -> None:
        class Noting(nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                log.append(name)
                return value * 1

        parametrize.register_parametrization(part_of(block, path), name, Noting())

    return do


def other_batch_norm(make: Callable[[Log], Any]) -> Deed:
    def do(block: Any, log: Log) -> None:
        block.bn = make(log)

    return do


class OwnNorm(nn.BatchNorm2d):
    def __init__(self, log: Log) -> None:
        super().__init__(5)
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("own norm")
        return super().forward(x) * 2


class Scaled(nn.Module):
    """A batch norm that is none."""

    eps = 0.0

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log
        self.weight = nn.Parameter(torch.ones(5))
        self.running_var = torch.ones(5)

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("scaled")
        return x * 3


OF_THE_BLOCK = ("forward", "_forward", "_forward_approximate", "_conv_forward", "_call_impl")
FAKE_QUANTIZER = "activation_post_process"
OBSERVER = "activation_post_process.activation_post_process"
PARTS = {
    "": (*OF_THE_BLOCK, "__call__"),
    "bn": ("forward", "_check_input_dim", "_call_impl", "__call__"),
    "weight_fake_quant": ("forward", "calculate_qparams", "__call__"),
    FAKE_QUANTIZER: ("forward", "calculate_qparams", "_call_impl", "__call__"),
    OBSERVER: ("forward", "calculate_qparams", "__call__"),
}
HOOKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("register_forward_hook", {}),
    ("register_forward_hook", {"prepend": True}),
    ("register_forward_hook", {"always_call": True}),
    ("register_forward_hook", {"with_kwargs": True}),
    ("register_forward_pre_hook", {}),
    ("register_forward_pre_hook", {"with_kwargs": True}),
    ("register_full_backward_hook", {}),
    ("register_full_backward_pre_hook", {}),
)
DEEDS: dict[str, Deed] = {
    **{
        f"{how.__name__}: {path}.{method}": how(path, method)
        for path, methods in PARTS.items()
        for method in methods
        for how in (on_instance, on_class, by_subclass)
        # Python looks up `__call__` on the class alone.
        if (how, method) != (on_instance, "__call__")
    },
    **{
        f"{path}: {register} {kwargs}": by_hook(path, register, **kwargs)
        for path in PARTS
        for register, kwargs in HOOKS
        # An observer is called with tensors that need no gradient.
        if not (path == OBSERVER and "backward" in register)
    },
    **{
        register: by_global_hook(register)
        for register in (
            "register_module_forward_hook",
            "register_module_forward_pre_hook",
            "register_module_full_backward_hook",
            "register_module_full_backward_pre_hook",
        )
    },
    "nn.Module.__call__": on_class("", "__call__", base=True),
    "nn.Module._call_impl": on_class("bn", "_call_impl", base=True),
    "parametrized weight": parametrized("", "weight"),
    "parametrized gamma": parametrized("bn", "weight"),
    "parametrized beta": parametrized("bn", "bias"),
    "parametrized variance": parametrized("bn", "running_var"),
    "a subclass of batch norm": other_batch_norm(OwnNorm),
    "another norm": other_batch_norm(Scaled),
}


OFTENER_OR_LESS_OFTEN = (
    # Observers of weights and activations share it here.
    f"on_class: {OBSERVER}.calculate_qparams",
    # torch.ao reads these once more: the weight for its number of dimensions.
    "parametrized weight",
    "parametrized variance",
)


@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_replaced_runs_as_with_torch_ao(deed: str) -> None:
    kind = Kind()
    results = []
    for ns in (fq, tq):
        log: Log = []
        block = kind.block(ns)
        block(kind.x())
        end = DEEDS[deed](block, log)
        try:
            with quiet():
                result = step(block, kind.x(1))
        finally:
            if end is not None:
                end()
        results.append((log, result["y"], block))
    (log, y, ours), (expected, other, theirs) = results
    assert expected, "torch.ao calls it"
    assert set(log) == set(expected)
    assert log == expected or deed in OFTENER_OR_LESS_OFTEN
    # Where a quantized weight's last bit differs, so does the output.
    assert (y - other).norm() <= 0.05 * other.norm()
    if deed != "another norm":
        assert_same(ours.bn.num_batches_tracked, theirs.bn.num_batches_tracked)


@pytest.mark.parametrize("name", ["batch_norm", "relu", "conv2d"])
def test_a_replaced_function_of_torch_is_called(name: str, monkeypatch: Any) -> None:
    block, x = Kind().block(), Kind().x()
    functional, calls = torch.nn.functional, []
    function = getattr(functional, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(functional, name, counted)
    block(x)
    assert calls == [name]


def test_a_users_hook_sees_the_fake_quantized_output() -> None:
    block = Kind().block()
    seen: list[Tensor] = []
    block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    y = block(Kind().x())
    assert seen[0] is y
    steps = y / block.activation_post_process.scale
    torch.testing.assert_close(steps, steps.round())


def test_forward_called_directly_runs_no_hook() -> None:
    kind = Kind()
    block, bare = kind.block(), kind.block()
    del bare._forward_hooks[next(iter(bare._forward_hooks))]
    before = snapshot(block.activation_post_process)
    assert_same(block.forward(kind.x()), bare(kind.x()))
    assert_unchanged(block.activation_post_process, before)


def test_the_input_may_be_given_by_name() -> None:
    kind = Kind()
    block, expected = kind.block(), kind.block()
    assert_same(block(input=kind.x()).shape, expected(kind.x()).shape)
    assert_unchanged(block.weight_fake_quant, snapshot(expected.weight_fake_quant))


def test_a_compiled_fake_quantizer_is_called_compiled() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    block = Kind().block()
    block.activation_post_process.compile(backend=backend)
    block(Kind().x())
    assert graphs


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_blocks_train_as_before(whole: bool) -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    expected = in_steps(copy.deepcopy(block))
    if whole:
        compiled: Any = torch.compile(block, backend="aot_eager", fullgraph=True)
    else:
        block.compile(backend="aot_eager", fullgraph=True)
        compiled = block
    for seed in range(3):
        results = []
        for each in (compiled, expected):
            x = kind.x(seed).requires_grad_()
            y = each(x)
            (y * y.detach().sin()).sum().backward()
            results.append({"y": y.detach(), "x": x.grad})
        assert_close(*results, scale=expected.activation_post_process.scale.item())
    assert_close(snapshot(block), snapshot(expected), scale=1.0)


# ------------------------------------------------------------------------ modes and transforms


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [Functions, Ops])
def test_a_mode_sees_each_step(make: Callable[[], Any]) -> None:
    kind = Kind()
    seen = []
    for each in (kind.block(), in_steps(kind.block())):
        with make() as mode:
            each(kind.x())
        seen.append(mode.names)
    assert seen[0] == seen[1]
    assert any("batch_norm" in name and "fastquant" not in name for name in seen[0])


class Labelled(Tensor):
    pass


def test_a_subclass_of_tensor_stays_one() -> None:
    kind = Kind()
    block, expected = kind.block(), in_steps(kind.block())
    y = block(kind.x().as_subclass(Labelled))
    assert type(y) is type(expected(kind.x().as_subclass(Labelled)))
    for name in ("weight", "bias"):
        block, expected = kind.block(), in_steps(kind.block())
        for each in (block, expected):
            parameter = getattr(each.bn, name).as_subclass(Labelled)
            del each.bn._parameters[name]
            setattr(each.bn, name, parameter)
        assert type(block(kind.x())) is type(expected(kind.x()))


def test_meta_tensors_have_shapes_only() -> None:
    block = Kind().block().to("meta")
    y = block(Kind().x().to("meta"))
    assert y.is_meta
    assert y.shape == (4, 5, 6, 6)


def test_traces_and_exports_hold_torchs_ops() -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    block.eval()
    with quiet():
        traced = torch.jit.trace(copy.deepcopy(block), (kind.x(),), check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    assert (traced(kind.x()) - block(kind.x())).norm() <= 0.05 * block(kind.x()).norm()
    without = block.apply(fq.disable_observer)
    program = torch.export.export(nn.Sequential(without), (kind.x(),))
    assert "batch_norm" in str(program.graph)
    y = program.module()(kind.x())
    assert (y - block(kind.x())).abs().max() <= 1.01 * block.activation_post_process.scale


class Whole(torch.fx.Tracer):
    """Takes blocks as they are; torch.fx cannot look into torch.ao's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "bn") or super().is_leaf_module(m, module_qualified_name)


def test_a_symbolic_trace_keeps_the_block() -> None:
    model = mobile_net()
    traced = torch.fx.GraphModule(model, Whole().trace(model))
    x = torch.randn(2, 3, 8, 8)
    assert is_one(lambda: copy.deepcopy(traced)(x))
    expected = copy.deepcopy(model)
    assert_same(traced(x), expected(x))


def test_gradients_of_torch_func() -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    expected = in_steps(copy.deepcopy(block))

    def gradients(block: Any) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        buffers = {name: b.clone() for name, b in block.named_buffers()}

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            y = torch.func.functional_call(block, {**parameters, **buffers}, (kind.x(),))
            return y.square().sum()

        found: dict[str, Tensor] = torch.func.grad(loss)(parameters, buffers)
        return found

    for training in (True, False):
        for each in (block, expected):
            each.train(training).apply(fq.disable_observer)
        assert_close(gradients(block), gradients(expected), scale=1.0)


def test_forward_mode_derivatives_are_refused_as_before() -> None:
    from torch.autograd import forward_ad

    kind = Kind()
    for each in (kind.block(), in_steps(kind.block())):
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            each(forward_ad.make_dual(kind.x(), kind.x()))


def test_a_functional_call_updates_the_buffers_it_was_given() -> None:
    kind = Kind()
    block = kind.block()
    before = snapshot(block)
    expected = in_steps(copy.deepcopy(block))
    given = {name: b.clone() for name, b in block.named_buffers()}
    also = copy.deepcopy(given)
    y = torch.func.functional_call(block, given, (kind.x(),))
    other = torch.func.functional_call(expected, also, (kind.x(),))
    assert_unchanged(block, before)
    assert_close(
        {"y": y, **given}, {"y": other, **also}, scale=expected.activation_post_process.scale.item()
    )
    assert given["bn.num_batches_tracked"] == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_observes_at_each_of_its_two_forwards(use_reentrant: bool) -> None:
    kind = Kind()
    block = nn.Sequential(kind.block(), nn.Identity())
    expected = copy.deepcopy(block)
    x = kind.x().requires_grad_()
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    assert_same(y, expected(kind.x()))
    y.square().sum().backward()
    assert block[0].bn.num_batches_tracked == 2
    expected(kind.x())
    assert_unchanged(block, snapshot(expected))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_gives_the_same_gradients(use_reentrant: bool) -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    block.apply(fq.disable_observer).apply(nniqat.freeze_bn_stats)
    expected = copy.deepcopy(block)
    x, other = kind.x(1).requires_grad_(), kind.x(1).requires_grad_()
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    expected(other).square().sum().backward()
    assert_same(x.grad, other.grad)
    for p, q in zip(block.parameters(), expected.parameters(), strict=True):
        assert_same(p.grad, q.grad)


# -------------------------------------------------------------------------- input that is refused


def error_of(run: Callable[[], Any]) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


def no_running_statistics(block: Any) -> None:
    block.bn.track_running_stats = False


BAD: dict[str, tuple[Kind, Callable[[Any], Any], Callable[[Tensor], Any]]] = {
    "one value per channel": (Kind(1), lambda b: None, lambda x: x[:1, :, :1]),
    "one row": (Kind(0, False), lambda b: None, lambda x: x[:1]),
    "empty": (Kind(), lambda b: None, lambda x: x[:0]),
    "no batch": (Kind(), lambda b: None, lambda x: x[0]),
    "wrong channels": (Kind(), lambda b: None, lambda x: x[:, :2]),
    "double": (Kind(), lambda b: None, lambda x: x.double()),
    "integers": (Kind(), lambda b: None, lambda x: x.long()),
    "no tensor": (Kind(), lambda b: None, lambda x: x.tolist()),
    "more features": (
        Kind(),
        lambda b: setattr(b, "bn", nn.BatchNorm2d(7)),
        lambda x: x,
    ),
    "other dimensions": (Kind(), lambda b: setattr(b, "bn", nn.BatchNorm1d(5)), lambda x: x),
    "no gamma": (
        Kind(),
        lambda b: setattr(b, "bn", nn.BatchNorm2d(5, affine=False)),
        lambda x: x,
    ),
    "running statistics of double": (
        Kind(),
        lambda b: b.bn.running_mean.data.double(),
        lambda x: x,
    ),
    "eps of zero": (Kind(), lambda b: setattr(b.bn, "eps", 0.0), lambda x: x),
    "statistics not tracked": (Kind(), no_running_statistics, lambda x: x),
    "momentum of text": (Kind(), lambda b: setattr(b.bn, "momentum", "much"), lambda x: x),
    "mean elsewhere": (
        Kind(),
        lambda b: setattr(b.bn, "running_mean", b.bn.running_mean.to("meta")),
        lambda x: x,
    ),
    "scale elsewhere": (
        Kind(),
        lambda b: b.activation_post_process.to("meta"),
        lambda x: x,
    ),
    "observer elsewhere": (
        Kind(),
        lambda b: b.activation_post_process.activation_post_process.to("meta"),
        lambda x: x,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unusual_input_is_taken_or_refused_as_by_the_single_modules(case: str) -> None:
    kind, spoil, change = BAD[case]
    block = kind.block()
    block(kind.x())
    expected = in_steps(copy.deepcopy(block))
    for each in (block, expected):
        spoil(each)
    x = change(kind.x(1))
    ours, theirs = error_of(lambda: block(x)), error_of(lambda: expected(x))
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)
    on_cpu = {n for n, t in snapshot(block).items() if not t.is_meta}
    results = [{n: t for n, t in snapshot(b).items() if n in on_cpu} for b in (block, expected)]
    assert_close(*results, scale=1.0)


def test_refused_values_raise_an_error_with_the_layer_and_change_no_statistic() -> None:
    refusing = activation(observer=fq.MovingAverageMinMaxObserver, nonfinite="raise")
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())).train()
    fq.fuse_modules_qat(model, [["0.0", "0.1", "0.2"]], inplace=True)
    model.qconfig = refusing
    prepared = fq.prepare_qat(model)
    prepared(Kind().x())
    block = prepared[0][0]
    before = snapshot(block.activation_post_process), snapshot(block.bn)
    x = Kind().x()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^0\.0\.activation_post_process: x has \d+ non-finite"):
        prepared(x)
    assert_unchanged(block.activation_post_process, before[0])
    assert_unchanged(block.bn, before[1])


@pytest.mark.parametrize("policy", ["ignore", "propagate"])
@pytest.mark.parametrize("training", [True, False])
def test_nonfinite_values_are_left_out_and_counted_as_before(policy: str, training: bool) -> None:
    kind = Kind()
    block = kind.block(
        qconfig=activation(observer=fq.MovingAverageMinMaxObserver, nonfinite=policy)
    )
    block(kind.x())
    block.train(training)
    block.bn.train(training)
    expected = in_steps(copy.deepcopy(block))
    x = kind.x(1)
    x[0, 0, 2, 2] = float("inf")
    results = []
    for each in (block, expected):
        results.append({"y": each(x).detach(), **snapshot(each)})
    for name, value in results[0].items():
        torch.testing.assert_close(
            value,
            results[1][name],
            equal_nan=True,
            rtol=1e-3,
            atol=0.05,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# ------------------------------------------------------------------------- copies and processes


def test_copies_and_states_go_on_alike() -> None:
    kind = Kind()
    block = kind.block()
    step(block, kind.x())
    copied = copy.deepcopy(block)
    pickled = pickle.loads(pickle.dumps(block))
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    loaded = kind.block()
    loaded.load_state_dict(torch.load(file))
    expected = step(block, kind.x(1))
    for each in (copied, pickled, loaded):
        assert is_one(lambda each=each: copy.deepcopy(each)(kind.x()))
        assert_same(step(each, kind.x(1)), expected)


def test_states_go_between_torch_ao_and_here() -> None:
    kind = Kind()
    with quiet():
        ours, theirs = kind.block(), kind.block(tq)
        step(ours, kind.x())
        step(theirs, kind.x())
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        results = step(ours, kind.x(1)), step(theirs, kind.x(1))
    assert (results[0]["y"] - results[1]["y"]).norm() <= 0.05 * results[1]["y"].norm()


@pytest.mark.parametrize("training", [True, False])
def test_synchronized_batch_norm_is_called(training: bool) -> None:
    kind = Kind()
    block = kind.block()
    block(kind.x())
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).train(training)
    assert type(synchronized.bn) is nn.SyncBatchNorm
    assert not is_one(lambda: copy.deepcopy(synchronized)(kind.x()))
    results = []
    for each in (synchronized, block.train(training)):
        results.append({"y": each(kind.x(1)).detach(), **snapshot(each)})
    assert_close(*results, scale=block.activation_post_process.scale.item())


def test_replicas_of_data_parallel_run() -> None:
    kind = Kind()
    block = kind.block()
    expected = in_steps(copy.deepcopy(block))
    replica = block._replicate_for_data_parallel()
    for path in ("bn", FAKE_QUANTIZER, "weight_fake_quant", OBSERVER):
        owner, _, name = path.rpartition(".")
        part = part_of(block, path)._replicate_for_data_parallel()
        part_of(replica, owner)._modules[name] = part
    for path in ("", "bn"):
        for name, parameter in part_of(block, path)._parameters.items():
            setattr(part_of(replica, path), name, None if parameter is None else parameter * 1)
    y = replica(kind.x())
    y.square().sum().backward()
    other = expected(kind.x())
    assert (y - other).abs().max() <= 1.01 * expected.activation_post_process.scale
    assert block.bn.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------- without batch norm


def conv_relu(dims: int = 2, qconfig: str = "fused", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    parts = CONVS[dims](3, 5, 3, padding=1), nn.ReLU()
    model = nn.Sequential(nn.Sequential(*parts).to(dtype)).train()
    fq.fuse_modules_qat(model, [["0.0", "0.1"]], inplace=True)
    model.qconfig = QCONFIGS[qconfig]  # type: ignore[assignment]
    return fq.prepare_qat(model)[0][0]


def is_one_without_batch_norm(run: Callable[[], Any]) -> bool:
    """Whether ReLU and what follows are done by one op."""
    names = ops_of(run)
    one = "fastquant::observe_batch_norm_" in names
    assert one != ("aten::relu" in names)
    return one


def assert_same_step(block: Any, expected: Any, x: Tensor) -> None:
    """The same output, statistics and gradients of x; those of parameters up to rounding."""
    ours, theirs = step(block, x), step(expected, x)
    for name, value in ours.items():
        if name in ("weight", "bias"):
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("qconfig", QCONFIGS)
@pytest.mark.parametrize("dims", [2, 3])
def test_relu_and_fake_quantize_are_one_op(dims: int, qconfig: str) -> None:
    block, kind = conv_relu(dims, qconfig), Kind(dims)
    assert is_one_without_batch_norm(lambda: step(copy.deepcopy(block), kind.x()))
    expected = in_steps(copy.deepcopy(block))
    assert not is_one_without_batch_norm(lambda: step(copy.deepcopy(expected), kind.x()))
    for seed in range(3):
        assert_same_step(block, expected, kind.x(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_relu_and_fake_quantize_in_other_dtypes(dtype: torch.dtype) -> None:
    block = conv_relu(dtype=dtype)
    expected = in_steps(copy.deepcopy(block))
    assert_same_step(block, expected, Kind().x().to(dtype))
    with torch.autocast("cpu"):
        block, x = conv_relu(), Kind().x()
        assert_same_step(block, in_steps(copy.deepcopy(block)), x)


@pytest.mark.parametrize("frozen", [True, False])
def test_relu_and_fake_quantize_whatever_is_switched_off(frozen: bool) -> None:
    block, x = conv_relu(), Kind().x()
    expected = in_steps(copy.deepcopy(block))
    for switch in (
        fq.disable_fake_quant,
        fq.disable_observer,
        fq.enable_fake_quant,
        fq.enable_observer,
    ):
        for each in (block, expected):
            each.apply(switch).train(not frozen)
        assert_same_step(block, expected, x)
        with torch.no_grad():
            assert torch.equal(block(x), expected(x))


@pytest.mark.parametrize("policy", ["ignore", "propagate"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nonfinite_values_without_batch_norm(policy: str, value: float) -> None:
    block = conv_relu()
    block.activation_post_process = fq.FakeQuantize(
        fq.MovingAverageMinMaxObserver, nonfinite=policy
    )
    block(Kind().x())
    expected = in_steps(copy.deepcopy(block))
    x = Kind().x(1)
    x[0, 0, 2, 2] = value
    results = [{"y": each(x).detach(), **snapshot(each)} for each in (block, expected)]
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], equal_nan=True, rtol=0, atol=0)


def test_refused_values_without_batch_norm() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())).train()
    fq.fuse_modules_qat(model, [["0.0", "0.1"]], inplace=True)
    model.qconfig = activation(observer=fq.MovingAverageMinMaxObserver, nonfinite="raise")
    prepared = fq.prepare_qat(model)
    prepared(Kind().x())
    observer = prepared[0][0].activation_post_process
    before, x = snapshot(observer), Kind().x()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^0\.0\.activation_post_process: x has \d+ non-finite"):
        prepared(x)
    assert_unchanged(observer, before)


def test_gradients_of_gradients_without_batch_norm() -> None:
    block, x = conv_relu(dtype=torch.float64), Kind(dtype=torch.float64).x()
    results = []
    for each in (block, in_steps(copy.deepcopy(block))):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [leaf, each.weight]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda b: b.register_forward_hook(lambda *_: None),
    "pre-hook": lambda b: b.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda b: b.register_full_backward_hook(lambda *_: None),
    "hook of the fake-quantizer": lambda b: b.activation_post_process.register_forward_hook(
        lambda *_: None
    ),
    "forward": lambda b: setattr(b, "forward", b.forward),
    "no fake-quantizer": lambda b: setattr(b, "activation_post_process", nn.Identity()),
    "per channel": lambda b: setattr(
        b,
        "activation_post_process",
        fq.FakeQuantize(
            fq.MovingAveragePerChannelMinMaxObserver,
            ch_axis=1,
            qscheme=torch.per_channel_affine,
        ),
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_relu(look: str) -> None:
    block = conv_relu()
    LOOKS[look](block)
    assert not is_one_without_batch_norm(lambda: block(Kind().x().requires_grad_()))


def test_a_global_hook_sees_relu_before_it_is_fake_quantized() -> None:
    block, seen = conv_relu(), []
    handle = hooks_of_all.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        block(Kind().x())
    finally:
        handle.remove()
    assert block.activation_post_process in seen
    assert block in seen


def test_a_replaced_relu_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs, relu = conv_relu(), [], nn.functional.relu
    monkeypatch.setattr(nn.functional, "relu", lambda x: (inputs.append(x), relu(x))[1])
    block(Kind().x())
    assert len(inputs) == 1


def test_other_input_without_batch_norm() -> None:
    block = conv_relu()
    x = Kind().x()
    expected = in_steps(copy.deepcopy(block))
    assert torch.equal(block(input=x), expected(x))
    assert torch.equal(block(x[0]), expected(x[0]))
    with torch.inference_mode():
        assert torch.equal(block(x), expected(x))
    for wrong in (x[:0], x[:, :2], x.double(), torch.randn(3)):
        ours, theirs = error_of(lambda w=wrong: block(w)), error_of(lambda w=wrong: expected(w))
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
