"""LSTM and attention made of layers, beside torch.ao's and torch.nn's."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.ao.nn.quantizable as nnquantizable
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.quantizable as room
from fastquant.nn import quantized as native
from fastquant.nn.quantizable import rnn
from oracle import assert_same, quiet

pytestmark = pytest.mark.usefixtures("one_thread")

QCONFIG = fq.get_default_qconfig("x86")


def test_lstms_are_torch_ao_s_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(room.__all__) == {"LSTM", "LSTMCell", "MultiheadAttention"}
    for name in ("LSTM", "LSTMCell"):
        assert getattr(room, name) is getattr(nnquantizable, name)
    assert issubclass(room.MultiheadAttention, nnquantizable.MultiheadAttention)
    with monkeypatch.context() as patched:
        patched.setattr("fastquant._torch.ao.nnquantizable", None)
        chosen = vars(importlib.reload(room)).copy()
    importlib.reload(room)
    assert chosen["LSTM"] is rnn.LSTM
    assert chosen["LSTMCell"] is rnn.LSTMCell


# --- LSTM ----------------------------------------------------------------------------------------


@st.composite
def lstms(draw: Any) -> tuple[dict[str, Any], bool, str]:
    settings = {
        "input_size": 4,
        "hidden_size": draw(st.sampled_from((3, 5))),
        "num_layers": draw(st.sampled_from((1, 2, 3))),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    return settings, draw(st.booleans()), draw(st.sampled_from(("none", "tensors", "by layer")))


def states(settings: dict[str, Any], batch: int, how: str) -> Any:
    """States to begin with: none, as torch.nn has them, or a pair for each layer."""
    layers, directions = settings["num_layers"], 1 + settings["bidirectional"]
    sizes = (layers * directions, batch, settings["hidden_size"])
    h, c = torch.randn(sizes), torch.randn(sizes)
    if how == "none":
        return None
    if how == "tensors":
        return h, c
    # One tensor for a layer of one direction, both stacked for a layer of two.
    by_layer = (x.reshape(layers, directions, *sizes[1:]) for x in (h, c))
    pairs = zip(*by_layer, strict=True)
    return [tuple(x if directions == 2 else x[0] for x in pair) for pair in pairs]


@given(lstms())
def test_an_observed_lstm_is_torch_ao_s(case: tuple[dict[str, Any], bool, str]) -> None:
    settings, split, how = case
    torch.manual_seed(0)
    layer: Any = nn.LSTM(**settings).eval()
    layer.qconfig = fq.QConfig(fq.MinMaxObserver, fq.default_weight_observer)
    x = torch.randn(2, 3, 4)
    hidden = states(settings, 2 if settings["batch_first"] else 3, how)
    with quiet():
        theirs = nnquantizable.LSTM.from_float(layer, split_gates=split)
    ours = rnn.LSTM.from_float(layer, split_gates=split)
    assert repr(ours).replace(" at 0x", "") == repr(theirs).replace(" at 0x", "")
    fresh, copied = copy.deepcopy(ours), copy.deepcopy(theirs)
    for _ in range(2):
        assert_same(ours(x, hidden), theirs(x, hidden))
    assert_same(ours.state_dict(), theirs.state_dict())
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    copied.load_state_dict(ours.state_dict(), strict=True)
    assert_same(fresh(x, hidden), copied(x, hidden))
    if how != "by layer":
        found, expected = ours(x, hidden), layer(x, hidden)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], tuple(expected[1]))
    gradients = []
    for module in (ours, theirs):
        module.zero_grad()
        module(x, hidden)[0].square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert_same(*gradients)


def test_in_training_an_lstm_is_fake_quantized_as_torch_ao_s() -> None:
    layer: Any = nn.LSTM(4, 3, 2, bidirectional=True).train()
    layer.qconfig = fq.get_default_qat_qconfig("x86")
    with quiet():
        theirs = nnquantizable.LSTM.from_float(layer)
    ours = rnn.LSTM.from_float(layer)
    assert ours.training
    x = torch.randn(5, 2, 4)
    for _ in range(3):
        assert_same(ours(x), theirs(x))
    assert_same(ours.state_dict(), theirs.state_dict())


@given(lstms())
def test_an_observed_lstm_becomes_the_native_one_of_torch_ao_s(
    case: tuple[dict[str, Any], bool, str],
) -> None:
    settings, split, _ = case
    torch.manual_seed(0)
    layer: Any = nn.LSTM(**settings).eval()
    layer.qconfig = QCONFIG
    x = torch.randn(4, 3, 4)
    mapping = {**fq.get_default_native_quant_module_mappings(), rnn.LSTM: native.LSTM}
    results = []
    for place in (rnn, nnquantizable):
        model: Any = nn.Sequential(fq.QuantStub()).eval()
        model.qconfig = QCONFIG
        model = fq.prepare(model)
        with quiet():
            model.append(place.LSTM.from_float(layer, split_gates=split))
        model(x)
        converted = fq.convert(model, mapping, backend="native")
        assert isinstance(converted[1], native.LSTM)
        y, (h, c) = converted(x)
        results.append([t.dequantize() for t in (y, h, c)])
    assert_same(*results)
    torch.testing.assert_close(results[0][0], layer(x)[0], atol=0.3, rtol=0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cells_are_torch_ao_s(split: bool, bias: bool) -> None:
    cell: Any = nn.LSTMCell(4, 3, bias)
    cell.qconfig = QCONFIG
    ours, theirs = (
        place.LSTMCell.from_float(cell, split_gates=split) for place in (rnn, nnquantizable)
    )
    assert repr(ours) == repr(theirs)
    x = torch.randn(2, 4)
    hidden = torch.randn(2, 3), torch.randn(2, 3)
    assert_same(ours(x), theirs(x))
    assert_same(ours(x, hidden), theirs(x, hidden))
    torch.testing.assert_close(ours(x, hidden), cell(x, hidden))
    assert {n for n, m in ours.named_modules() if hasattr(m, "qconfig")} == {
        n for n, m in theirs.named_modules() if hasattr(m, "qconfig")
    }
    made = []
    for place in (rnn, nnquantizable):
        torch.manual_seed(0)
        made.append(place.LSTMCell(4, 3, bias, dtype=torch.float64, split_gates=split))
    assert_same(made[0].state_dict(), made[1].state_dict())
    made[0](x.double())


def test_a_new_lstm_takes_what_its_layers_give() -> None:
    for settings in ({}, {"bidirectional": True}, {"bidirectional": True, "split_gates": True}):
        made = rnn.LSTM(4, 3, num_layers=2, **settings)
        y, _ = made(torch.randn(5, 2, 4))
        assert y.shape == (5, 2, 6 if settings else 3)
        made = rnn.LSTM(4, 3, num_layers=2, dtype=torch.float64, **settings)
        assert made(torch.randn(5, 2, 4, dtype=torch.float64))[0].dtype == torch.float64


def test_mistakes_with_lstms_are_named() -> None:
    with_qconfig: Any = nn.LSTM(3, 4, proj_size=2)
    with_qconfig.qconfig = QCONFIG
    for make, message in (
        (lambda: rnn.LSTM.from_float(nn.GRU(3, 4)), "takes a torch.nn.LSTM, got GRU"),
        (lambda: rnn.LSTM.from_float(nn.LSTM(3, 4)), "LSTM must have a qconfig"),
        (lambda: rnn.LSTM.from_float(with_qconfig), "proj_size=2"),
        (lambda: rnn.LSTM(3, 4)(torch.ones(2, 3)), "x must have three dimensions.*got 2"),
        (lambda: rnn.LSTM(3, 4, dropout=True), "dropout must be a probability.*got True"),
        (lambda: rnn.LSTM(3, 4, dropout=1.5), "got 1.5"),
        (lambda: rnn.LSTMCell.from_float(nn.LSTM(3, 4)), "takes a torch.nn.LSTMCell, got LSTM"),
        (lambda: rnn.LSTMCell.from_float(nn.LSTMCell(3, 4)), "LSTMCell must have a qconfig"),
        (
            lambda: rnn.LSTMCell.from_params(torch.ones(4, 2), torch.ones(4, 1), torch.ones(4)),
            "bi and bh",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.warns(UserWarning, match="dropout=0.5 is ignored"):
        rnn.LSTM(3, 4, 2, dropout=0.5)
    with pytest.raises(NotImplementedError, match=r"fastquant\.nn\.quantized\.LSTM"):
        rnn.LSTM.from_observed(nn.Identity())


# --- attention -----------------------------------------------------------------------------------


@st.composite
def attentions(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if draw(st.booleans()):
        settings |= {"kdim": 6, "vdim": 10}
    call: dict[str, Any] = {
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }
    torch.manual_seed(1)
    mask = draw(st.sampled_from((None, "bool", "float", "of heads")))
    if mask == "bool":
        call["attn_mask"] = torch.randn(4, 5) > 1
    elif mask == "float":
        call["attn_mask"] = torch.randn(4, 5)
    elif mask == "of heads":
        call["attn_mask"] = torch.randn(3 * 2, 4, 5)
    padding = draw(st.sampled_from((None, "bool", "float")))
    if padding is not None:
        call["key_padding_mask"] = torch.tensor([[0] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
        if padding == "float":
            call["key_padding_mask"] = call["key_padding_mask"] * -2.0
    return settings, call


def inputs(settings: dict[str, Any]) -> list[Tensor]:
    """Query, key and value, of 4 and 5 steps of 3 sequences."""
    sizes = (8, settings.get("kdim", 8), settings.get("vdim", 8))
    tensors = [torch.randn(n, 3, size) for n, size in zip((4, 5, 5), sizes, strict=True)]
    return [x.transpose(0, 1) if settings["batch_first"] else x for x in tensors]


@given(attentions())
def test_attention_is_torch_nn_s(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    settings, call = case
    torch.manual_seed(0)
    layer: Any = nn.MultiheadAttention(8, 2, **settings).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer.qconfig = QCONFIG
    given = inputs(settings)
    expected = layer(*given, **call)
    with quiet():
        prepared = room.MultiheadAttention.from_float(layer)
    ours = room.MultiheadAttention(8, 2, **settings).eval()
    ours.qconfig = QCONFIG
    ours = fq.prepare(ours)
    assert {*ours.state_dict()} == {*prepared.state_dict()}
    if settings["batch_first"]:
        ours = prepared
    else:
        ours.load_state_dict(prepared.state_dict(), strict=True)
        if call.get("key_padding_mask", torch.ones(1, dtype=torch.bool)).dtype == torch.bool:
            assert_same(ours(*given, **call), prepared(*given, **call))
            assert_same(ours.state_dict(), prepared.state_dict())
    assert isinstance(prepared, nnquantizable.MultiheadAttention)
    found = ours(*given, **call)
    torch.testing.assert_close(found[0], expected[0])
    if call["need_weights"]:
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found[1] is None


class Attending(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quant, self.layer, self.dequant = fq.QuantStub(), layer, fq.DeQuantStub()

    def forward(self, *given: Tensor, **call: Any) -> Tensor:
        y: Tensor = self.dequant(self.layer(*(self.quant(x) for x in given), **call)[0])
        return y


@pytest.mark.parametrize("backend", ["torch.ao", "native"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 10}])
def test_converted_attention_is_near_torch_nn_s(
    extra: dict[str, Any], batch_first: bool, backend: str
) -> None:
    settings = {"batch_first": batch_first, **extra}
    model: Any = Attending(nn.MultiheadAttention(8, 2, **settings)).eval()
    given = inputs(settings)
    expected = model(*given)
    model.qconfig = QCONFIG
    prepared = fq.prepare(model)
    prepared(*given)
    converted = fq.convert(prepared, backend=backend)
    torch.testing.assert_close(converted(*given), expected, atol=0.06, rtol=0)
    reloaded = fq.convert(fq.prepare(model), backend=backend)
    reloaded.load_state_dict(converted.state_dict(), strict=True)
    assert_same(reloaded(*given), converted(*given))
    assert_same(pickle.loads(pickle.dumps(converted))(*given), converted(*given))
    if backend == "torch.ao" and not batch_first:
        return  # its class is torch.ao's, whose dequantize fails
    back = converted.layer.dequantize()
    assert type(back) is nn.MultiheadAttention
    torch.testing.assert_close(back(*given)[0], expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 10}, {"bias": False}]
)
def test_attention_is_trained_with_quantization(extra: dict[str, Any], batch_first: bool) -> None:
    settings = {"batch_first": batch_first, **extra}
    model: Any = Attending(nn.MultiheadAttention(8, 2, **settings)).train()
    given = inputs(settings)
    model.qconfig = fq.get_default_qat_qconfig("native")
    prepared: Any = fq.prepare_qat(model)
    assert all(module.training for module in prepared.modules())
    layers = {
        name: layer
        for name, layer in prepared.named_modules()
        if isinstance(layer, native.Linear) or hasattr(layer, "weight_fake_quant")
    }
    assert {name.rpartition(".")[2] for name in layers} == {
        *("linear_Q", "linear_K", "linear_V", "out_proj")
    }
    for switch in (fq.disable_fake_quant, fq.disable_observer):
        prepared.apply(switch)
    torch.testing.assert_close(prepared(*given), model(*given))

    for switch in (fq.enable_fake_quant, fq.enable_observer):
        prepared.apply(switch)
    learning = [p for p in prepared.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(learning, 0.1)
    before = [p.detach().clone() for p in learning]
    for _ in range(3):
        optimizer.zero_grad()
        prepared(*given).square().sum().backward()
        assert all(p.grad is not None for p in learning)
        optimizer.step()
    no_effect = getattr(prepared.layer.linear_K, "bias", None)  # softmax does not see it
    for old, new in zip(before, learning, strict=True):
        assert new is no_effect or not torch.equal(old, new)
    packed = prepared.layer.in_proj_weight
    if packed is not None:
        parts = [getattr(prepared.layer, f"linear_{name}").weight for name in "QKV"]
        assert_same(packed.detach(), torch.cat(parts).detach())

    prepared.apply(fq.disable_observer)
    prepared.eval()
    expected = prepared(*given).detach()
    again: Any = fq.prepare_qat(model)
    again.load_state_dict(prepared.state_dict())
    again.apply(fq.disable_observer)
    assert_same(again.eval()(*given).detach(), expected)
    for backend in ("native", "torch.ao"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of layers that have seen no data
            converted = fq.convert(prepared, backend=backend)
        torch.testing.assert_close(converted(*given), expected, atol=0.06, rtol=0)


def test_attention_without_a_config_is_not_trained_with_quantization() -> None:
    model: Any = Attending(nn.MultiheadAttention(8, 2)).train()
    model.qconfig = fq.get_default_qat_qconfig("native")
    model.layer.qconfig = None
    prepared: Any = fq.prepare_qat(model)
    assert type(prepared.layer) is nn.MultiheadAttention
    assert type(prepared.layer.out_proj) is type(model.layer.out_proj)


def test_native_attention_has_biases_of_keys_and_values() -> None:
    model: Any = Attending(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)).eval()
    given = inputs({"batch_first": True})
    expected = model(*given)
    model.qconfig = QCONFIG
    prepared = fq.prepare(model)
    prepared(*given)
    converted = fq.convert(prepared, backend="native")
    torch.testing.assert_close(converted(*given), expected, atol=0.06, rtol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_inside_of_an_encoder_is_the_quantized_one(batch_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    torch.manual_seed(0)
    model: Any = Encoder().eval()
    x = torch.randn(4, 3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(x)
        model.layer.self_attn.qconfig = QCONFIG
        prepared = fq.prepare(model)
        torch.testing.assert_close(prepared(x), expected, atol=1e-5, rtol=1e-5)
        seen = [m for m in prepared.modules() if isinstance(m, fq.HistogramObserver)]
        assert len(seen) > 3
        assert all(m.min_val.numel() and m.min_val.isfinite() for m in seen[:3])


def test_masks_and_shapes_that_do_not_fit_are_named() -> None:
    layer: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    for other, message in (
        (nn.Linear(2, 2), "takes a torch.nn.MultiheadAttention, got Linear"),
        (layer, "must have a qconfig"),
    ):
        with pytest.raises(ValueError, match=message):
            room.MultiheadAttention.from_float(other)
    layer.qconfig = QCONFIG
    ours = room.MultiheadAttention.from_float(layer)
    x = torch.randn(3, 4, 8)
    for arguments, call, message in (
        ((x[0], x, x), {}, r"query must have three dimensions, .* 8 features, got shape \[4, 8\]"),
        ((x, x[..., :5], x), {}, r"key must have .* got shape \[3, 4, 5\]"),
        ((x, x, x[:2]), {}, "key and value must be of the same sequences"),
        ((x, x, x), {"is_causal": True}, "needs the causal mask"),
        ((x, x, x), {"attn_mask": torch.ones(4, 4, dtype=torch.long)}, "attn_mask must be bool"),
        ((x, x, x), {"attn_mask": torch.ones(3, 9)}, r"mask of shape \[3, 9\] does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(*arguments, **call)
    causal = torch.ones(4, 4).triu(1).bool()
    expected = layer.eval()(x, x, x, attn_mask=causal, is_causal=True)
    torch.testing.assert_close(ours(x, x, x, attn_mask=causal, is_causal=True), expected)
    with pytest.warns(UserWarning, match="uint8 attn_mask is deprecated"):
        ours(x, x, x, attn_mask=causal.to(torch.uint8))
    with pytest.raises(NotImplementedError, match=r"fastquant\.nn\.quantized"):
        room.MultiheadAttention.from_observed(ours)
