"""Native quantized modules: what they compute, keep, save and refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantized as nnq_torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant as fq
import fastquant.nn.intrinsic.quantized as nniq
import fastquant.nn.quantized as nnq
from fastquant.quantized_tensor import quantize_per_tensor
from oracle import quiet

NATIVE = fq.get_default_qconfig("native")
PER_TENSOR = fq.QConfig(NATIVE.activation, fq.default_weight_observer)
SIGNED = fq.QConfig(
    fq.HistogramObserver.with_args(dtype=torch.qint8), fq.default_per_channel_weight_observer
)


class Stubbed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quant = fq.QuantStub()
        self.layer = layer
        self.dequant = fq.DeQuantStub()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.dequant(self.layer(*map(self.quant, xs)))


def prepared(layer: nn.Module, qconfig: Any, *xs: Tensor) -> Stubbed:
    model = Stubbed(layer).eval()
    model.qconfig = qconfig
    model = fq.prepare(model)
    with torch.no_grad():
        model(*xs)
    return model


def on_dequantized_weights(layer: Any, quantized: Any) -> nn.Module:
    """The float layer in float64, with the weight that the quantized one has."""
    layer = copy.deepcopy(layer).double()
    weighted = layer[0] if isinstance(layer, nn.Sequential) else layer
    if isinstance(quantized, (nnq.Linear, nnq.Conv1d, nnq.Conv2d, nnq.Conv3d)) or hasattr(
        quantized, "transposed"
    ):
        weighted.weight.data = quantized.weight().dequantize().double()
    return layer


def assert_within_half_a_step(y: Any, expected: Tensor) -> None:
    limits = torch.iinfo(y.dtype)
    scale, zero_point = y.q_scale(), y.q_zero_point()
    levels = (expected / scale + zero_point).clamp(limits.min, limits.max)
    assert (y.int_repr().double() - levels).abs().max() <= 0.5 + 1e-3


def randomized(bn: Any) -> Any:
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    return bn


def affine(norm: Any) -> Any:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


Layers = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]
WEIGHTED: Layers = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear without bias": (lambda: nn.Linear(70, 33, bias=False), (2, 3, 70)),
    "linear relu": (lambda: nni.LinearReLU(nn.Linear(7, 15), nn.ReLU()), (9, 7)),
    "linear leaky relu": (
        lambda: nni.LinearLeakyReLU(nn.Linear(7, 5), nn.LeakyReLU(0.3)),
        (3, 7),
    ),
    "linear tanh": (lambda: nni.LinearTanh(nn.Linear(7, 5), nn.Tanh()), (3, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, groups=2), (2, 6, 9)),
    "conv1d relu": (lambda: nni.ConvReLU1d(nn.Conv1d(3, 4, 3), nn.ReLU()), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 8)),
    "conv2d even and dilated": (
        lambda: nn.Conv2d(4, 6, (2, 4), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        (1, 4, 9, 8),
    ),
    "depthwise": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=16), (2, 16, 7, 7)),
    "conv2d relu": (lambda: nni.ConvReLU2d(nn.Conv2d(3, 8, 1), nn.ReLU()), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 3, 4, 5, 6)),
    "conv3d relu": (lambda: nni.ConvReLU3d(nn.Conv3d(3, 4, 2), nn.ReLU()), (1, 3, 4, 5, 6)),
    **{
        f"padding {mode}": (
            lambda mode=mode: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode),
            (2, 3, 6, 7),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "padding same": (
        lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
        (2, 3, 6, 7),
    ),
    "padding valid": (lambda: nn.Conv1d(3, 4, 3, padding="valid"), (2, 3, 6)),
    "padding same reflect": (
        lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"),
        (2, 3, 6),
    ),
}
TRANSPOSED: Layers = {
    "conv transpose 1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2), (2, 6, 9)),
    "conv transpose 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 6),
    ),
    "conv transpose 3d": (
        lambda: nn.ConvTranspose3d(3, 4, 2, stride=2, dilation=2),
        (1, 3, 3, 4, 5),
    ),
}
OTHERS: Layers = {
    "hardswish": (nn.Hardswish, (2, 3, 5, 5)),
    "elu": (lambda: nn.ELU(0.7), (2, 30)),
    "leaky relu": (lambda: nn.LeakyReLU(0.2), (2, 30)),
    "prelu": (nn.PReLU, (2, 3, 5, 5)),
    "prelu of channels": (lambda: nn.PReLU(3, init=0.3), (2, 3, 5, 5)),
    "batch norm 2d": (lambda: randomized(nn.BatchNorm2d(6)), (2, 6, 5, 5)),
    "batch norm 3d": (lambda: randomized(nn.BatchNorm3d(6)), (2, 6, 3, 4, 5)),
    "batch norm relu 2d": (
        lambda: nni.BNReLU2d(randomized(nn.BatchNorm2d(6)), nn.ReLU()),
        (2, 6, 5, 5),
    ),
    "batch norm relu 3d": (
        lambda: nni.BNReLU3d(randomized(nn.BatchNorm3d(6)), nn.ReLU()),
        (2, 6, 3, 4, 5),
    ),
    "layer norm": (lambda: affine(nn.LayerNorm([5, 6])), (2, 3, 5, 6)),
    "layer norm without weight": (
        lambda: nn.LayerNorm(30, elementwise_affine=False),
        (2, 30),
    ),
    "group norm": (lambda: affine(nn.GroupNorm(2, 6)), (2, 6, 5, 5)),
    "instance norm 1d": (lambda: affine(nn.InstanceNorm1d(6, affine=True)), (2, 6, 15)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(6), (2, 6, 5, 5)),
    "instance norm 3d": (lambda: affine(nn.InstanceNorm3d(6, affine=True)), (2, 6, 3, 4, 5)),
}
NAMES = {NATIVE: "uint8", SIGNED: "int8", PER_TENSOR: "per tensor"}
CASES: list[tuple[str, Any]] = [
    *((name, NATIVE) for name in WEIGHTED),
    *((name, SIGNED) for name in ("linear relu", "conv2d", "depthwise", "padding same")),
    *((name, PER_TENSOR) for name in (*TRANSPOSED, "linear", "conv2d")),
    *((name, config) for name in OTHERS for config in (NATIVE, SIGNED)),
]


@pytest.mark.parametrize(
    ("name", "qconfig"),
    CASES,
    ids=[f"{name}-{NAMES[config]}" for name, config in CASES],
)
def test_a_layer_is_within_half_a_step_of_its_real_result(name: str, qconfig: Any) -> None:
    torch.manual_seed(0)
    build, shape = {**WEIGHTED, **TRANSPOSED, **OTHERS}[name]
    layer, x = build().eval(), torch.randn(shape)
    model = fq.convert(prepared(layer, qconfig, x), backend="native")
    quantized: Any = model.layer
    assert type(quantized).__module__.startswith("fastquant.nn")
    quantized_x = model.quant(x)
    y = quantized(quantized_x)
    assert y.dtype == (torch.int8 if qconfig is SIGNED else torch.uint8)
    assert len(y.int_repr().unique()) > 10
    with torch.no_grad():
        expected = on_dequantized_weights(layer, quantized)(quantized_x.dequantize().double())
    assert_within_half_a_step(y, expected)


def test_relu6_bounds_and_keeps_the_scale() -> None:
    x = quantize_per_tensor(torch.linspace(-8, 8, 100), 0.07, 120)
    y = nnq.ReLU6()(x)
    assert (y.q_scale(), y.q_zero_point()) == (0.07, 120)
    assert torch.equal(y.int_repr(), x.int_repr().clamp(120, 120 + round(6 / 0.07)))
    in_place = nnq.ReLU6(inplace=True)(x)
    assert in_place.data_ptr() == x.data_ptr()


def test_sigmoid_and_softmax() -> None:
    x = quantize_per_tensor(torch.randn(4, 50), 0.04, 100)
    real = x.dequantize().double()
    assert_within_half_a_step(nnq.Sigmoid(1 / 256, 0)(x), real.sigmoid())
    assert_within_half_a_step(nnq.Softmax(1, 1 / 256, 0)(x), real.softmax(1))
    assert nnq.Sigmoid(1 / 256, 0).output_scale == 1 / 256


def test_activations_of_inputs_that_differ_in_their_dtype_alone() -> None:
    """Each has results of its own dtype, whichever came before."""
    real = torch.randn(4, 50)
    for dtype in (torch.uint8, torch.int8, torch.uint8, torch.int8):
        x = quantize_per_tensor(real, 0.04, 10, dtype)
        for y in (nnq.Sigmoid(0.01, 5)(x), nnq.Hardswish(0.04, 5)(x), F.hardsigmoid(x)):
            assert y.dtype == dtype
        assert_within_half_a_step(nnq.Sigmoid(0.01, 5)(x), x.dequantize().double().sigmoid())
        assert nnq.Sigmoid(1 / 256, 0)(x).q_zero_point() == 0
        assert torch.sigmoid(x).q_zero_point() == (0 if dtype == torch.uint8 else -128)


def test_dropout_does_nothing_in_training_either() -> None:
    x = quantize_per_tensor(torch.randn(4, 50), 0.04, 100)
    assert nnq.Dropout(0.5).train()(x) is x


class ConvAdd(nn.Module):
    def __init__(self, relu: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = relu
        self.fused: nn.Module = (
            nni.ConvAddReLU2d(conv, torch.add, nn.ReLU())
            if relu
            else nni.ConvAdd2d(conv, torch.add)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, x)


@pytest.mark.parametrize("relu", [False, True])
def test_convolutions_fused_with_an_addition(relu: bool) -> None:
    torch.manual_seed(0)
    layer, x = ConvAdd(relu), torch.randn(2, 3, 6, 6)
    model = fq.convert(prepared(layer, NATIVE, x), backend="native")
    fused: Any = model.layer.fused
    assert type(fused) is (nniq.ConvAddReLU2d if relu else nniq.ConvAdd2d)
    quantized_x = model.quant(x)
    conv: Any = copy.deepcopy(layer.fused[0]).double()
    conv.weight.data = fused.weight().dequantize().double()
    real = quantized_x.dequantize().double()
    expected = conv(real) + real
    assert_within_half_a_step(
        fused(quantized_x, quantized_x), expected.relu() if relu else expected
    )


# --- QFunctional ------------------------------------------------------------------------------


def pair(shape: tuple[int, ...], scale: float, zero_point: int) -> tuple[Any, Tensor]:
    """A native quantized tensor, and torch's of the same values."""
    x = torch.randn(shape) * 3
    theirs = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    return quantize_per_tensor(x, scale, zero_point), theirs


OPERATIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda f, x, y: f.add(x, y),
    "add_relu": lambda f, x, y: f.add_relu(x, y),
    "mul": lambda f, x, y: f.mul(x, y),
    "cat": lambda f, x, y: f.cat([x, y, x], dim=1),
    "add_scalar": lambda f, x, y: f.add_scalar(x, 0.37),
    "add_scalar far": lambda f, x, y: f.add_scalar(x, 25.0),
    "add_scalar far below": lambda f, x, y: f.add_scalar(x, -25.0),
    "mul_scalar": lambda f, x, y: f.mul_scalar(x, 0.37),
    "mul_scalar negative": lambda f, x, y: f.mul_scalar(x, -2.0),
    "mul_scalar zero": lambda f, x, y: f.mul_scalar(x, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_functional_operations_match_torch_ao(name: str) -> None:
    torch.manual_seed(0)
    with quiet():
        (x, their_x), (y, their_y) = pair((40, 6, 5), 0.07, 120), pair((40, 6, 5), 0.0517, 100)
        ours, theirs = nnq.QFunctional(), nnq_torch.QFunctional()
        ours.scale = theirs.scale = 0.0931
        ours.zero_point = theirs.zero_point = 90
        got, wanted = OPERATIONS[name](ours, x, y), OPERATIONS[name](theirs, their_x, their_y)
        assert got.q_scale() == pytest.approx(wanted.q_scale(), rel=1e-12)
        assert got.q_zero_point() == wanted.q_zero_point()
        difference = got.int_repr().int() - wanted.int_repr().int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.02
    assert name == "mul_scalar zero" or len(wanted.int_repr().unique()) > 20


def test_functional_operations_with_relu_that_torch_ao_has_as_ops_only() -> None:
    x = quantize_per_tensor(torch.randn(4, 50), 0.04, 100)
    y = quantize_per_tensor(torch.randn(4, 50), 0.03, 110)
    functional = nnq.QFunctional()
    functional.scale, functional.zero_point = 0.05, 30
    a, b = x.dequantize().double(), y.dequantize().double()
    assert_within_half_a_step(functional.mul_relu(x, y), (a * b).relu())
    assert_within_half_a_step(functional.cat_relu([x, y], 1), torch.cat([a, b], 1).relu())
    assert torch.equal(
        functional.add_scalar_relu(x, 0.4).dequantize(),
        functional.add_scalar(x, 0.4).dequantize().relu(),
    )
    assert torch.equal(
        functional.mul_scalar_relu(x, -2.0).dequantize(),
        functional.mul_scalar(x, -2.0).dequantize().relu(),
    )


def test_functional_refuses_in_words_what_it_cannot_do() -> None:
    functional = nnq.QFunctional()
    x = quantize_per_tensor(torch.randn(4, 4), 0.04, 100)
    with pytest.raises(NotImplementedError, match="matmul"):
        functional.matmul(x, x)
    with pytest.raises(RuntimeError, match="call one of its operations"):
        functional(x)
    with pytest.raises(TypeError, match="y must be a quantized tensor"):
        functional.add(x, torch.randn(4, 4))
    with pytest.raises(ValueError, match="at least one"):
        functional.cat([])


# --- what a weight is -------------------------------------------------------------------------


def a_conv(bias: bool = True, qconfig: Any = NATIVE) -> nnq.Conv2d:
    torch.manual_seed(1)
    x = torch.randn(2, 8, 6, 6)
    model = prepared(nn.Conv2d(8, 12, 3, groups=2, bias=bias), qconfig, x)
    return fq.convert(model, backend="native").layer  # type: ignore[no-any-return]


def an_input() -> Any:
    torch.manual_seed(2)
    return quantize_per_tensor(torch.randn(2, 8, 6, 6), 0.03, 120)


def same_output(a: Any, b: Any) -> bool:
    x = an_input()
    return torch.equal(a(x), b(x))


@pytest.mark.parametrize(
    "qconfig",
    [
        NATIVE,
        PER_TENSOR,
        fq.default_symmetric_qnnpack_qconfig,
        fq.default_per_channel_symmetric_qnnpack_qconfig,
    ],
    ids=["per channel", "per tensor", "per tensor without -128", "per channel without -128"],
)
def test_weight_and_bias_are_what_torch_ao_makes_of_them(qconfig: Any) -> None:
    torch.manual_seed(1)
    with quiet():
        for layer, shape in ((nn.Linear(8, 12), (3, 8)), (nn.Conv2d(8, 12, 3), (2, 8, 6, 6))):
            model = prepared(layer, qconfig, torch.randn(shape))
            ours, theirs = fq.convert(model, backend="native").layer, fq.convert(model).layer
            weight, their_weight = ours.weight(), theirs.weight()
            assert torch.equal(weight.int_repr(), their_weight.int_repr())
            assert weight.qscheme() == their_weight.qscheme()
            assert torch.equal(weight.dequantize(), their_weight.dequantize())
            assert torch.equal(ours.bias(), theirs.bias())
            assert (ours.scale, ours.zero_point) == (theirs.scale, theirs.zero_point)


def test_a_weight_is_kept_once() -> None:
    layer = a_conv()
    kept = sum(b.numel() * b.element_size() for b in layer.buffers())
    plain = layer.weight().int_repr().numel() + 4 * (12 + 12)
    # Channels are padded to whole blocks of the kernels.
    assert kept < 4096 + 2 * plain
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nnq.Quantize(0.1, 3, torch.uint8),
        *(a_conv, lambda: nnq.Embedding(3, 8), lambda: nnq.dynamic.Linear(3, 4)),
        *(lambda: nnq.dynamic.LSTM(3, 4), lambda: nnq.dynamic.GRUCell(3, 4)),
    ],
)
def test_torch_script_is_refused_in_words(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(layer())
    with pytest.raises(fq.QuantizationError, match=r"torch.jit.script does not take.*torch.export"):
        torch.jit.script(model)


def test_a_weight_can_be_replaced() -> None:
    layer, other = a_conv(), a_conv()
    with torch.no_grad():
        weight = torch.randn(12, 4, 3, 3)
    with quiet():
        scales = torch.full((12,), 0.02, dtype=torch.float64)
        zeros = torch.zeros(12, dtype=torch.int64)
        theirs = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        layer.set_weight_bias(theirs, torch.ones(12))
        assert torch.equal(layer.weight().int_repr(), theirs.int_repr())
    assert torch.equal(layer.bias(), torch.ones(12))
    assert not same_output(layer, other)
    other.set_weight_bias(layer.weight(), layer.bias())
    assert same_output(layer, other)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    layer = a_conv()
    with pytest.raises(ValueError, match="must be a quantized tensor"):
        layer.set_weight_bias(torch.zeros(12, 4, 3, 3), None)
    wrong = quantize_per_tensor(torch.zeros(12, 4, 3), 0.1, 0, torch.int8)
    with pytest.raises(ValueError, match=r"shape \[12, 4, 3, 3\]"):
        layer.set_weight_bias(wrong, None)
    shifted = quantize_per_tensor(torch.zeros(12, 4, 3, 3), 0.1, 3, torch.int8)
    with pytest.raises(ValueError, match="zero points of the weight must be 0"):
        layer.set_weight_bias(shifted, None)


# --- state -------------------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv": a_conv,
    "conv without bias": lambda: a_conv(bias=False),
    "conv per tensor": lambda: a_conv(qconfig=PER_TENSOR),
    "functional": nnq.QFunctional,
    "quantize": lambda: nnq.Quantize(0.1, -3, torch.int8),
    "hardswish": lambda: nnq.Hardswish(0.1, 30),
    "sigmoid": lambda: nnq.Sigmoid(0.1, 30),
    "prelu": lambda: nnq.PReLU(0.1, 30, 8),
    "batch norm": lambda: nnq.BatchNorm2d(8),
    "group norm": lambda: nnq.GroupNorm(2, 8, torch.randn(8), torch.randn(8), 0.1, 30),
}


def zeroed(module: nn.Module) -> nn.Module:
    """A module of the same settings that has other values."""
    other: Any = copy.deepcopy(module)
    if hasattr(other, "scale"):
        other.scale, other.zero_point = 0.5, 1
    if isinstance(other, nnq.Conv2d):
        bias = None if other.bias() is None else torch.zeros(12)
        other.set_weight_bias(
            quantize_per_tensor(torch.zeros(12, 4, 3, 3), 0.1, 0, torch.int8), bias
        )
    return other


@pytest.mark.parametrize("name", MODULES)
def test_a_state_dict_has_plain_tensors_and_loads_strictly(name: str) -> None:
    module: Any = MODULES[name]()
    state = module.state_dict()
    assert all(type(value) is Tensor and not value.is_quantized for value in state.values())
    assert {"scale", "zero_point"} <= state.keys()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other: Any = zeroed(module)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert (other.scale, other.zero_point) == (module.scale, module.zero_point)
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True)
    )
    if isinstance(module, nnq.Conv2d):
        assert same_output(module, other)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(name: str, copied: Callable[[Any], Any]) -> None:
    module: Any = MODULES[name]()
    module.register_forward_hook(print)
    other = copied(module)
    assert type(other) is type(module)
    assert repr(other) == repr(module)
    assert list(other._forward_hooks.values()) == [print]
    state = other.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(a, state[key]) for key, a in module.state_dict().items())
    if isinstance(module, nnq.Conv2d):
        module._forward_hooks.clear()
        other._forward_hooks.clear()
        assert same_output(module, other)


def test_the_packed_weight_is_in_no_state_dict_and_no_pickle() -> None:
    layer = a_conv()
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias", "scale", "zero_point"}
    assert layer.state_dict()["weight"].dtype == torch.int8
    large = nnq.Linear(300, 300)
    assert len(pickle.dumps(large)) < 1.2 * 300 * 300


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    layer = a_conv()
    good = layer.state_dict()

    def loading(strict: bool = True, **changes: Any) -> Any:
        changed = {**good, **changes}
        other = zeroed(layer)
        return other.load_state_dict({k: v for k, v in changed.items() if v is not None}, strict)

    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        loading(weight_scale=None)
    with pytest.raises(RuntimeError, match=r"weight must be int8 of shape \[12, 4, 3, 3\]"):
        loading(weight=torch.zeros(12, 4, 3, 2, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="weight must be int8"):
        loading(weight=torch.zeros(12, 4, 3, 3))
    with pytest.raises(RuntimeError, match="1 or 12 positive"):
        loading(weight_scale=torch.ones(3))
    with pytest.raises(RuntimeError, match="1 or 12 positive"):
        loading(weight_scale=torch.zeros(12))
    with pytest.raises(RuntimeError, match="bias must have shape"):
        loading(bias=torch.zeros(3))
    with pytest.raises(RuntimeError, match="scale must be finite and greater than 0"):
        loading(scale=torch.tensor(-1.0))
    with pytest.raises(RuntimeError, match="zero_point must be an integer"):
        loading(zero_point=torch.tensor(300))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        loading(more=torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        a_conv(bias=False).load_state_dict(good)
    assert loading(strict=False, bias=None).missing_keys == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make", [a_conv, lambda: randomized(nnq.BatchNorm2d(8)), lambda: nnq.PReLU(0.1, 30, 8)]
)
def test_a_change_of_dtype_changes_no_result(make: Callable[[], Any], dtype: torch.dtype) -> None:
    layer = make()
    assert same_output(copy.deepcopy(layer).to(dtype), layer)


def test_a_module_of_the_constructor_has_a_weight_of_zeros() -> None:
    layer = nnq.Conv2d(8, 12, 3, groups=2)
    assert not layer.weight().int_repr().any()
    assert (layer.scale, layer.zero_point) == (1.0, 0)
    layer.load_state_dict(a_conv().state_dict())
    layer.scale, layer.zero_point = a_conv().scale, a_conv().zero_point
    assert same_output(layer, a_conv())


def test_modules_say_what_they_are() -> None:
    layer = a_conv(bias=False)
    text = repr(layer)
    assert text.startswith("QuantizedConv2d(8, 12, kernel_size=(3, 3), stride=(1, 1), scale=")
    assert "groups=2" in text
    assert "bias=False" in text
    assert repr(nniq.LinearReLU(3, 4)).startswith(
        "QuantizedLinearReLU(in_features=3, out_features=4"
    )
    assert repr(nnq.Quantize(0.5, 3, torch.quint8)) == (
        "Quantize(scale=0.5, zero_point=3, dtype=torch.uint8)"
    )


# --- what is refused ------------------------------------------------------------------------


def test_layers_refuse_inputs_in_words() -> None:
    layer = a_conv()
    with pytest.raises(TypeError, match="QuantStub"):
        layer(torch.randn(2, 8, 6, 6))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) with C = 8.*\[2, 7, 6, 6\]"):
        layer(quantize_per_tensor(torch.randn(2, 7, 6, 6), 0.1, 0))
    with pytest.raises(ValueError, match=r"\[8, 6, 6\]"):
        layer(quantize_per_tensor(torch.randn(8, 6, 6), 0.1, 0))
    for features in (2, 3, 5):  # of less than 4, packed weights have the same size
        with pytest.raises(ValueError, match=rf"4 features.*\[2, {features}\]"):
            nnq.Linear(4, 3)(quantize_per_tensor(torch.randn(2, features), 0.1, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nnq.Conv2d(3, 4, 0), "kernel_size"),
        (lambda: nnq.Conv2d(3, 4, (3, 3, 3)), "kernel_size"),
        (lambda: nnq.Conv2d(3, 4, 3, stride=0), "stride"),
        (lambda: nnq.Conv2d(3, 4, 3, padding=-1), "padding"),
        (lambda: nnq.Conv2d(3, 4, 3, padding="some"), "padding"),
        (lambda: nnq.Conv2d(3, 4, 3, stride=2, padding="same"), "stride 1"),
        (lambda: nnq.Conv2d(3, 4, 3, groups=2), "divisible by groups"),
        (lambda: nnq.Conv2d(3, 4, 3, padding_mode="mirror"), "padding_mode"),
        (lambda: nnq.ConvTranspose2d(3, 4, 3, padding_mode="reflect"), "padding_mode"),
        (lambda: nnq.Linear(3, 4, dtype=torch.float16), "dtype"),
        (lambda: nnq.Quantize(0.0, 0, torch.uint8), "scale"),
        (lambda: nnq.Quantize(float("nan"), 0, torch.uint8), "scale"),
        (lambda: nnq.Quantize(0.1, -1, torch.uint8), "zero_point"),
        (lambda: nnq.Quantize(0.1, 200, torch.int8), "zero_point"),
        (lambda: nnq.Quantize(0.1, 0, torch.int32), "dtype"),
        (lambda: nnq.Hardswish(-1.0, 0), "scale"),
    ],
)
def test_constructors_refuse_in_words(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_from_float_refuses_other_classes() -> None:
    layer = nn.Conv1d(3, 4, 3)
    with pytest.raises(TypeError, match=r"Linear.from_float takes .*got .*Conv1d"):
        nnq.Linear.from_float(layer)
    with pytest.raises(TypeError, match="FloatFunctional"):
        nnq.QFunctional.from_float(layer)


@pytest.mark.parametrize(
    "x", [None, torch.ones(2, dtype=torch.int32), quantize_per_tensor(torch.ones(2), 0.1, 0)]
)
def test_quantize_refuses_what_is_not_floating(x: Any) -> None:
    with pytest.raises(TypeError, match="x must be an ordinary floating-point tensor"):
        nnq.Quantize(0.1, 3, torch.uint8)(x)


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(4, 1), [0.0] * 4])
def test_a_bias_that_does_not_fit_is_refused(bias: Any) -> None:
    for layer in (nnq.Linear(2, 4), nnq.Conv2d(2, 4, 1), nnq.ConvTranspose2d(2, 4, 1, groups=2)):
        with pytest.raises(fq.QuantizationError, match=r"bias must be None or a tensor of shape"):
            layer.set_weight_bias(layer.weight(), bias)


def test_a_module_on_meta_takes_the_state_that_is_assigned() -> None:
    x = quantize_per_tensor(torch.randn(2, 3, 5, 5), 0.1, 100)
    for make in (lambda: nnq.Conv2d(3, 4, 3), lambda: nnq.Conv2d(3, 4, 3, bias=False)):
        layer = make()
        weight = quantize_per_tensor(torch.randn(4, 3, 3, 3), 0.01, 0, torch.int8)
        layer.set_weight_bias(weight, None if layer.bias() is None else torch.randn(4))
        loaded = make().to("meta")
        loaded.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    x = quantize_per_tensor(torch.randn(4), 0.1, 100)
    functional = nnq.QFunctional()
    for name in ("add_scalar", "add_scalar_relu", "mul_scalar", "mul_scalar_relu"):
        with pytest.raises(ValueError, match="y must be finite"):
            getattr(functional, name)(x, number)


def test_a_number_may_be_far_beyond_the_range() -> None:
    x = quantize_per_tensor(torch.randn(4), 0.1, 100)
    assert nnq.QFunctional().add_scalar(x, 1e30).dequantize().tolist() == pytest.approx([1e30] * 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", 3, "weight, weight_scale and bias must be tensors"),
        ("weight_scale", 0.5, "weight, weight_scale and bias must be tensors"),
        ("bias", [0.0] * 4, "weight, weight_scale and bias must be tensors"),
        ("weight_scale", torch.full((4,), float("inf")), "positive finite elements"),
        ("zero_point", torch.tensor(1.5), r"zero_point must be an integer .* got 1\.5"),
    ],
)
def test_a_state_with_values_that_do_not_fit_is_refused(
    name: str, value: Any, message: str
) -> None:
    layer = nnq.Linear(2, 4)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), name: value})


@pytest.mark.parametrize(
    "module",
    [nnq.Linear(2, 2), nnq.Conv2d(2, 2, 1), nnq.QFunctional(), nnq.Quantize(1.0, 0, torch.uint8)],
    ids=lambda module: type(module).__name__,
)
def test_scales_and_zero_points_that_are_assigned_are_checked(module: Any) -> None:
    for scale in (-1, 0.0, float("nan"), float("inf")):
        with pytest.raises(fq.QuantizationError, match="scale must be finite and greater than 0"):
            module.scale = scale
    for name in ("scale", "zero_point"):
        for value in (None, "1", [1], torch.ones(2), 1j):
            with pytest.raises(fq.QuantizationError, match=f"{name} must be a number, got"):
                setattr(module, name, value)
    for zero_point in (300, -129, 0.5, float("nan")):
        with pytest.raises(fq.QuantizationError, match="zero_point must be an integer from -128"):
            module.zero_point = zero_point
    assert (module.scale, module.zero_point) == (1.0, 0)
    module.scale, module.zero_point = torch.tensor(0.25), torch.tensor(7)
    assert (module.scale, module.zero_point) == (0.25, 7)
    assert (type(module.scale), type(module.zero_point)) == (float, int)
