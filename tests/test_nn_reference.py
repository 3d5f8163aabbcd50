"""The package's own reference modules, beside torch.ao's."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized.reference as nnqr
import torch.ao.quantization.fx._decomposed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastquant as fq
import fastquant.nn.quantized.reference as room
from fastquant.nn.quantized.reference import layers, rnn
from fastquant.utils import get_qparam_dict
from oracle import assert_same, quiet

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {n: getattr(layers, n, None) or getattr(rnn, n) for n in room.__all__}
OBSERVERS: dict[str, Any] = {
    "uint8": fq.MinMaxObserver.with_args(dtype=torch.quint8),
    "int8": fq.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
    "channels": fq.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    ),
    "affine channels": fq.PerChannelMinMaxObserver.with_args(
        dtype=torch.quint8, qscheme=torch.per_channel_affine
    ),
    "int32": fq.MinMaxObserver.with_args(
        dtype=torch.qint32, quant_min=-(2**15), quant_max=2**15 - 1
    ),
    "rows": fq.default_float_qparams_observer,
    "rows of 4 bits": fq.default_float_qparams_observer_4bit,
    "float16": fq.PlaceholderObserver.with_args(dtype=torch.float16),
}


def qparams(weight: Tensor, observer: str) -> dict[str, Any]:
    made = OBSERVERS[observer]()
    made(weight.detach())
    return get_qparam_dict(made)


def real(weight: Any) -> Tensor:
    return weight.dequantize() if weight.is_quantized else weight


def test_users_get_torch_ao_s_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(nnqr.__all__) == set(room.__all__)
    assert all(getattr(room, name) is getattr(nnqr, name) for name in room.__all__)
    with monkeypatch.context() as patched:
        patched.setattr("fastquant._torch.ao.has_quantized_modules", False)
        chosen = vars(importlib.reload(room)).copy()
    importlib.reload(room)
    assert all(chosen[name] is OURS[name] for name in room.__all__)


# --- layers with one weight ----------------------------------------------------------------------


def compared(name: str, layer: Any, observer: str, *inputs: Tensor) -> tuple[Any, Any]:
    """Both libraries' modules have the same numbers, do the same, and read each other's state."""
    parameters = qparams(layer.weight, observer)
    with quiet():
        theirs = getattr(nnqr, name).from_float(copy.deepcopy(layer), parameters)
    ours = OURS[name].from_float(copy.deepcopy(layer), parameters)
    assert repr(ours) == repr(theirs)
    assert_same(ours.state_dict(), theirs.state_dict())
    with quiet():
        assert_same(ours.get_weight(), theirs.get_weight())
        quantized, expected = ours.get_quantized_weight(), theirs.get_quantized_weight()
        assert_same(ours(*inputs), theirs(*inputs))
        if observer in ("uint8", "int8", "channels", "affine channels"):
            assert_same(quantized.int_repr(), expected.int_repr())
            assert_same(quantized.dequantize(), expected.dequantize())
        elif observer != "rows of 4 bits":  # which torch packs
            integers = expected.int_repr() if expected.is_quantized else expected
            assert_same(quantized, integers)
        fresh = OURS[name].from_float(type(layer)(**arguments_of(layer)), parameters)
        fresh.load_state_dict(theirs.state_dict(), strict=True)
        assert_same(fresh(*inputs), theirs(*inputs))
        copied = copy.deepcopy(theirs)
        copied.load_state_dict(ours.state_dict(), strict=True)
        assert_same(copied(*inputs), ours(*inputs))
    return ours, theirs


def arguments_of(layer: Any) -> dict[str, Any]:
    arguments = OURS[type(layer).__name__]._arguments_of(layer)
    arguments.pop("_weight", None)
    bias = arguments.pop("bias_", None)
    return arguments if bias is None else {**arguments, "bias": bias}


WEIGHTS = st.sampled_from([o for o in OBSERVERS if "rows" not in o])


@given(WEIGHTS, st.booleans())
def test_linear_layers_are_torch_ao_s(observer: str, bias: bool) -> None:
    torch.manual_seed(0)
    compared("Linear", nn.Linear(5, 7, bias=bias), observer, torch.randn(3, 5))


@given(
    st.sampled_from([1, 2, 3]),
    WEIGHTS,
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
)
def test_convolutions_are_torch_ao_s(
    dims: int, observer: str, bias: bool, stride: int, padding: int, groups: int
) -> None:
    torch.manual_seed(0)
    arguments = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
    x = torch.randn(2, 4, *[6, 5, 5][:dims])
    name = f"Conv{dims}d"
    compared(name, getattr(nn, name)(4, 6, 2, dilation=2, **arguments), observer, x)
    name = f"ConvTranspose{dims}d"
    more = {"output_padding": stride - 1, **arguments}
    compared(name, getattr(nn, name)(4, 6, 2, **more), observer, x)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes_are_those_of_the_layer(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    x = torch.randn(1, 3, 6, 6)
    ours = layers.Conv2d.from_float(layer, qparams(layer.weight, "channels"))
    with torch.no_grad():
        layer.weight.copy_(ours.get_weight())
    assert_same(ours(x), layer(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_take_the_size_of_the_output(dims: int) -> None:
    layer = getattr(nn, f"ConvTranspose{dims}d")(3, 4, 3, stride=2, padding=1)
    x = torch.randn(1, 3, *[5] * dims)
    name = f"ConvTranspose{dims}d"
    ours = OURS[name].from_float(layer, qparams(layer.weight, "int8"))
    with torch.no_grad():
        layer.weight.copy_(ours.get_weight())
    for size in (9, 10):
        assert_same(ours(x, [size] * dims), layer(x, [size] * dims))
    with pytest.raises(ValueError, match=rf"from \[9.*\] to \[10.*got \[{11}"):
        ours(x, [11] * dims)


@pytest.mark.parametrize("observer", ["rows", "rows of 4 bits", "channels", "uint8"])
def test_embeddings_are_torch_ao_s(observer: str) -> None:
    index = torch.tensor([0, 3, 3, 5])
    compared("Embedding", nn.Embedding(6, 4, padding_idx=3), observer, index)
    for mode in ("sum", "mean", "max"):
        bag = nn.EmbeddingBag(6, 4, mode=mode)
        compared("EmbeddingBag", bag, observer, index, torch.tensor([0, 1]))


@pytest.mark.parametrize("observer", ["uint8", "channels"])
def test_decomposed_weights_are_torch_ao_s(observer: str) -> None:
    layer = nn.Linear(16, 8)
    parameters = {**qparams(layer.weight, observer), "is_decomposed": True}
    with quiet():
        theirs = nnqr.Linear.from_float(layer, parameters)
        ours = layers.Linear.from_float(layer, parameters)
        assert_same(ours.get_quantized_weight(), theirs.get_quantized_weight())
        assert_same(ours.get_weight(), theirs.get_weight())


def test_a_state_of_channels_is_read_by_a_layer_with_one_scale() -> None:
    layer = nn.Linear(4, 3)
    ours = layers.Linear.from_float(layer, qparams(layer.weight, "channels"))
    other = layers.Linear(4, 3)
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_same(other.get_weight(), ours.get_weight())
    assert_same(other.state_dict(), ours.state_dict())
    state = ours.state_dict()
    del state["weight_qscheme"]
    with pytest.raises(RuntimeError, match="weight_qscheme"):
        other.load_state_dict(state, strict=True)


def test_what_no_weight_can_have_is_refused() -> None:
    symmetric = {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8, "scale": 1.0}
    with pytest.raises(ValueError, match=r"qscheme of weight must be None.*symmetric"):
        layers.Linear(2, 2, weight_qparams=symmetric)
    with pytest.raises(ValueError, match="keys is_decomposed, weight_ih, weight_hh; got weight_ih"):
        rnn.GRUCell(2, 2, weight_qparams_dict={"weight_ih": {}})


# --- recurrent layers ----------------------------------------------------------------------------


def dictionary(layer: Any, observer: str) -> dict[str, Any]:
    weights = {n: p for n, p in layer.named_parameters() if n.startswith("weight")}
    return {"is_decomposed": False, **{n: qparams(p, observer) for n, p in weights.items()}}


RECURRENT = ["uint8", "int8", "channels", "float16"]


@pytest.mark.torch_ao
@pytest.mark.parametrize("observer", RECURRENT)
@pytest.mark.parametrize("bias", [False, True])
def test_cells_are_torch_ao_s(observer: str, bias: bool) -> None:
    for name, more in (
        ("RNNCell", {"nonlinearity": "tanh"}),
        ("RNNCell", {"nonlinearity": "relu"}),
        ("LSTMCell", {}),
        ("GRUCell", {}),
    ):
        layer = getattr(nn, name)(4, 3, bias=bias, **more)
        settings = dictionary(layer, observer)
        with quiet():
            theirs = getattr(nnqr, name).from_float(layer, settings)
            ours = OURS[name].from_float(layer, settings)
            assert repr(ours) == repr(theirs)
            assert_same(ours.state_dict(), theirs.state_dict())
            for which in ("ih", "hh"):
                found, expected = (getattr(m, f"get_weight_{which}")() for m in (ours, theirs))
                assert_same(found, expected)
                if observer != "float16":
                    quantized = getattr(ours, f"get_quantized_weight_{which}")()
                    assert_same(real(quantized), expected)
            for shape in ((2, 4), (4,)):
                x = torch.randn(shape)
                h, c = torch.randn(*shape[:-1], 3), torch.randn(*shape[:-1], 3)
                hidden = (h, c) if name == "LSTMCell" else h
                assert_same(ours(x), theirs(x))
                assert_same(ours(x, hidden), theirs(x, hidden))
            theirs.load_state_dict(ours.state_dict(), strict=True)
            ours.load_state_dict(theirs.state_dict(), strict=True)
        with pytest.raises(ValueError, match="one or two dimensions, got 3"):
            ours(torch.ones(1, 1, 4))


@given(
    st.sampled_from(["LSTM", "GRU"]),
    st.sampled_from(RECURRENT),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["batch", "one", "packed"]),
    st.booleans(),
)
def test_layers_over_sequences_are_torch_ao_s(
    name: str,
    observer: str,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    bidirectional: bool,
    kind: str,
    with_states: bool,
) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, name)(
        4, 3, num_layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    )
    settings = dictionary(layer, observer)
    with quiet():
        theirs = getattr(nnqr, name).from_float(layer, settings)
    ours = OURS[name].from_float(layer, settings)
    assert repr(ours) == repr(theirs)
    assert_same(ours.state_dict(), theirs.state_dict())
    x: Any = torch.randn(5, 5, 4)
    count = num_layers * (1 + bidirectional)
    sizes = (count, 3) if kind == "one" else (count, 5, 3)
    if kind == "one":
        x = x[0]
    elif kind == "packed":
        lengths = torch.tensor([5, 2, 4, 1, 3])
        x = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    hidden: Any = None
    if with_states:
        hidden = torch.randn(sizes)
        hidden = (hidden, torch.randn(sizes)) if name == "LSTM" else hidden
    with quiet():
        (y, last), (their_y, their_last) = ours(x, hidden), theirs(x, hidden)
        expected = theirs.get_quantized_weight_bias_dict()
    assert_same(getattr(y, "data", y), getattr(their_y, "data", their_y))
    assert type(y) is type(their_y)
    assert_same(last, their_last)
    quantized = ours.get_quantized_weight_bias_dict()
    assert quantized.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(real(quantized[key]), real(value))


def test_projections_are_computed() -> None:
    layer = nn.LSTM(4, 5, 2, proj_size=3, bidirectional=True)
    settings = dictionary(layer, "channels")
    ours = rnn.LSTM.from_float(layer, settings)
    with torch.no_grad():
        for name in settings.keys() - {"is_decomposed"}:
            weight = getattr(layer, name)
            weight.copy_(ours.get_flat_weights()[layer._flat_weights_names.index(name)])
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(rnn.LSTM.from_float(layer, settings)(x), layer(x))


# --- conversion ----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2)
        self.fc = nn.Linear(3, 8)
        self.cell = nn.GRUCell(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(self.quant(x)).relu()).mean((2, 3))
        x = self.dequant(self.fc(x))
        return self.cell(x)


def test_convert_makes_them_of_a_prepared_model() -> None:
    torch.manual_seed(0)
    model: Any = Model().eval()
    x = torch.randn(5, 3, 8, 8)
    expected = model(x)
    model.qconfig = fq.default_qconfig
    prepared = fq.prepare(model)
    prepared(x)
    mapping = {getattr(nn, name): cls for name, cls in OURS.items() if hasattr(nn, name)} | {
        fq.QuantStub: fq.nn.quantized.Quantize,
        fq.DeQuantStub: fq.nn.quantized.DeQuantize,
    }
    converted = fq.convert(prepared, mapping, backend="native")
    kinds = {name: type(module) for name, module in converted.named_children()}
    assert kinds["conv"] is OURS["Conv2d"]
    assert kinds["cell"] is OURS["GRUCell"]
    torch.testing.assert_close(converted(x), expected, atol=0.05, rtol=0)
