"""Modules that quantize their input at each call, beside torch.ao's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastquant as fq
import fastquant.nn.intrinsic.quantized.dynamic as nniqd
import fastquant.nn.quantized.dynamic as nnqd
from fastquant._native import fast_calls
from fastquant.nn import intrinsic as nni
from fastquant.nn.qat import dynamic as nnqatd
from fastquant.utils import QuantizationError
from oracle import quiet

try:
    import torch.ao.nn.intrinsic.quantized.dynamic as nniqd_torch
    import torch.ao.nn.quantized.dynamic as nnqd_torch
    from torch.ao.nn.quantized import reference as nnqr
except ImportError:
    nniqd_torch = nnqd_torch = nnqr = None

beside_torch_ao = pytest.mark.skipif(nnqd_torch is None, reason="torch.ao is the oracle")

INT8, FLOAT16 = fq.default_dynamic_qconfig, fq.float16_dynamic_qconfig
PER_CHANNEL = fq.per_channel_dynamic_qconfig
CONFIGS = {"int8": INT8, "per channel": PER_CHANNEL, "float16": FLOAT16}


def configured(module: nn.Module, qconfig: Any = INT8) -> Any:
    module.qconfig = qconfig  # type: ignore[assignment]
    return module


def both(module: nn.Module, qconfig: Any = INT8) -> tuple[Any, Any]:
    """Our form of a float module, and torch.ao's."""
    with quiet():
        theirs = getattr(nnqd_torch, type(module).__name__).from_float(configured(module, qconfig))
    return native(module, qconfig), theirs


def native(module: nn.Module, qconfig: Any = INT8) -> Any:
    """Our form of a float module."""
    return getattr(nnqd, type(module).__name__).from_float(configured(module, qconfig))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def close(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same(ours: Any, theirs: Any) -> None:
    close(ours, theirs, 0.0)


# ------------------------------------------------------------------------------------------ linear


@beside_torch_ao
@given(
    inputs=st.sampled_from([1, 4, 17, 64]),
    outputs=st.sampled_from([2, 16, 33]),
    rows=st.lists(st.integers(1, 4), max_size=2),
    bias=st.booleans(),
    config=st.sampled_from(sorted(CONFIGS)),
)
def test_linear_is_torch_aos(
    inputs: int, outputs: int, rows: list[int], bias: bool, config: str
) -> None:
    torch.manual_seed(inputs * outputs)
    ours, theirs = both(nn.Linear(inputs, outputs, bias=bias), CONFIGS[config])
    x = torch.randn(*rows, inputs) * 3
    if rows:  # torch.ao's float16 layer takes no vector
        # With scales for each channel, a rounding at a tie moves an output by a step of the input.
        step = float(x.max() - x.min()) / 127 * float(ours.weight().dequantize().abs().max())
        tolerance = {"int8": 2e-6, "float16": 1e-5, "per channel": 1e-6 + 2 * step}[config]
        close(ours(x), theirs(x), tolerance)
    assert repr(ours) == repr(theirs)


@beside_torch_ao
def test_linear_with_relu_is_torch_aos() -> None:
    for config in (INT8, FLOAT16):
        fused = configured(nni.LinearReLU(nn.Linear(20, 9), nn.ReLU()), config)
        configured(fused[0], config)
        x = torch.randn(5, 20)
        with quiet():
            ours = nniqd.LinearReLU.from_float(fused)
            theirs = nniqd_torch.LinearReLU.from_float(fused)
        close(ours(x), theirs(x))
        assert float(ours(x).min()) == 0.0
        assert repr(ours) == repr(theirs)


def test_eight_bits_of_the_input_are_more_accurate_than_seven() -> None:
    layer = configured(nn.Linear(256, 64), PER_CHANNEL)
    ours = nnqd.Linear.from_float(layer)
    x = torch.randn(50, 256)
    exact = torch.nn.functional.linear(x, ours.weight().dequantize(), layer.bias)
    errors = []
    for ours.reduce_range in (True, False):
        errors.append(float((ours(x) - exact).norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [INT8, FLOAT16])
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype, config: Any) -> None:
    x = torch.randn(3, 8)
    for module in (nn.Linear(8, 4), nn.LSTM(8, 4), nn.GRUCell(8, 4)):
        ours = native(module, config)
        given_x = x.unsqueeze(0) if isinstance(module, nn.LSTM) else x
        expected = tensors(ours(given_x))[0]
        y = tensors(ours(given_x.to(dtype)))[0]
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)


def test_the_way_without_the_dispatcher_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = native(nn.Linear(40, 30))
    for shape in ((40,), (1, 40), (3, 7, 40), (2, 2, 2, 40)):
        x = torch.randn(shape)
        y = ours(x)
        with monkeypatch.context() as patch:
            patch.setattr(fast_calls, "fast_calls", False)
            same(y, ours(x))
        same(ours(x.transpose(0, -1).contiguous().transpose(0, -1)), y)
        y.resize_(1)  # an ordinary tensor


def test_views_that_keep_negatives_are_read_as_what_they_stand_for() -> None:
    ours = native(nn.Linear(6, 3))
    z = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    same(ours(z), ours(z.resolve_neg()))


# ------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_are_closer_to_float_than_torch_aos(name: str, dims: int) -> None:
    torch.manual_seed(dims)
    layer: Any = configured(getattr(nn, f"{name}{dims}d")(8, 12, 3, stride=2, padding=1, groups=2))
    ours = getattr(nnqd, f"{name}{dims}d").from_float(layer)
    x = torch.randn(2, 8, *[9] * dims)
    expected = layer(x)
    error = float((ours(x) - expected).abs().max())
    assert error < 0.03 * float(expected.abs().max())
    if name == "Conv" and nnqd_torch is not None:
        with quiet():
            theirs = getattr(nnqd_torch, f"{name}{dims}d").from_float(layer)
        assert error < float((theirs(x) - expected).abs().max())


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_convolutions_pad_as_float_ones(settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 6, 4, **({"padding": 2} | settings))
    ours = nnqd.Conv2d.from_float(configured(layer))
    x = torch.randn(1, 3, 12, 12)
    expected = layer(x)
    assert float((ours(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())


# --------------------------------------------------------------------------------------- recurrent

SETTINGS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
]


@beside_torch_ao
@pytest.mark.parametrize("config", ["int8", "float16"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_torch_aos(kind: Any, settings: dict[str, Any], config: str) -> None:
    torch.manual_seed(1)
    ours, theirs = both(kind(12, 9, **settings), CONFIGS[config])
    rows = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    for steps, batch in ((1, 1), (7, 3)):
        shape = (batch, steps) if settings.get("batch_first") else (steps, batch)
        x = torch.randn(*shape, 12)
        close(ours(x), theirs(x))
        state = torch.randn(rows, batch, 9) * 0.3
        hx = (state, -state) if kind is nn.LSTM else state
        close(ours(x, hx), theirs(x, hx))
    assert repr(ours) == repr(theirs)


@beside_torch_ao
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    kind=st.sampled_from([nn.LSTM, nn.GRU]),
    config=st.sampled_from([INT8, FLOAT16]),
    given_state=st.booleans(),
)
def test_packed_sequences_are_as_torch_aos(
    lengths: list[int], kind: Any, config: Any, given_state: bool
) -> None:
    torch.manual_seed(sum(lengths))
    ours, theirs = both(kind(5, 7, 2, bidirectional=True), config)
    x = pack_padded_sequence(
        torch.randn(max(lengths), len(lengths), 5), lengths, enforce_sorted=False
    )
    state = torch.randn(4, len(lengths), 7)
    hx = None if not given_state else (state, state) if kind is nn.LSTM else state
    close(ours(x, hx), theirs(x, hx))
    assert pad_packed_sequence(ours(x)[0])[1].tolist() == lengths


def test_layers_without_bias_and_sequences_without_batch() -> None:
    for kind in (nn.LSTM, nn.GRU):
        layer = configured(kind(6, 5, 2, bias=False))
        ours = getattr(nnqd, kind.__name__).from_float(layer)
        x = torch.randn(4, 6)
        y, _ = ours(x)
        assert float((y - layer(x)[0]).abs().max()) < 0.05
        same(y, ours(x.unsqueeze(1))[0].squeeze(1))
        assert set(ours.get_bias().values()) == {None}


def test_dropout_comes_between_layers_in_training_mode_alone() -> None:
    layer = configured(nn.GRU(6, 5, 2, dropout=1.0))
    ours = nnqd.GRU.from_float(layer).eval()
    x = torch.randn(4, 2, 6)
    with_input = ours(x)[0]
    ours.train()
    assert not torch.equal(ours(x)[0], with_input)
    same(ours(x)[0], ours(-x)[0])  # the second layer sees zeros


@beside_torch_ao
@pytest.mark.parametrize("config", ["int8", "float16"])
@pytest.mark.parametrize(
    "cell",
    [
        nn.LSTMCell(12, 9),
        nn.GRUCell(12, 9),
        nn.RNNCell(12, 9),
        nn.RNNCell(12, 9, nonlinearity="relu"),
    ],
    ids=str,
)
def test_cells_are_torch_aos(cell: nn.Module, config: str) -> None:
    ours, theirs = both(cell, CONFIGS[config])
    x, state = torch.randn(4, 12), torch.randn(4, 9) * 0.3
    hx = (state, -state) if isinstance(cell, nn.LSTMCell) else state
    close(ours(x), theirs(x))
    close(ours(x, hx), theirs(x, hx))
    assert repr(ours) == repr(theirs)
    one = ours(x[0], (state[0], -state[0]) if isinstance(cell, nn.LSTMCell) else state[0])
    assert tensors(one)[0].shape == (9,)


# ------------------------------------------------------------------------------ weights and states


def models() -> Iterator[tuple[Any, Tensor]]:
    for config in CONFIGS.values():
        yield nnqd.Linear.from_float(configured(nn.Linear(12, 5), config)), torch.randn(3, 12)
        for kind in (nn.LSTM, nn.GRU):
            layer = configured(kind(12, 5, 2, bidirectional=True), config)
            yield getattr(nnqd, kind.__name__).from_float(layer), torch.randn(4, 2, 12)
        for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
            made = getattr(nnqd, cell.__name__).from_float(configured(cell(12, 5), config))
            yield made, torch.randn(2, 12)
    yield nnqd.Conv2d.from_float(configured(nn.Conv2d(3, 5, 3))), torch.randn(1, 3, 6, 6)


def blank(module: Any) -> Any:
    """A new module with the settings of another."""
    if isinstance(module, nnqd.Linear):
        return nnqd.Linear(12, 5, dtype=module.weight_dtype)
    if isinstance(module, nnqd.Conv2d):
        return nnqd.Conv2d(3, 5, 3)
    if isinstance(module, (nnqd.LSTM, nnqd.GRU)):
        return type(module)(12, 5, 2, bidirectional=True, dtype=module.dtype)
    return type(module)(12, 5, dtype=module.weight_dtype)


def test_states_are_ordinary_tensors_and_load() -> None:
    for module, x in models():
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert all(type(value) is Tensor and not value.is_quantized for value in state.values())
        assert not any("packed" in key for key in state)
        fresh = blank(module)
        fresh.load_state_dict(state)
        same(fresh(x), module(x))


def test_copies_and_pickles_compute_the_same() -> None:
    for module, x in models():
        copied = copy.deepcopy(module)
        assert b"_packed_weight" not in pickle.dumps(module).replace(b"_packed_weight\x94N", b"")
        for other in (copied, pickle.loads(pickle.dumps(module))):
            same(other(x), module(x))


def test_precision_of_scales_and_biases_stays() -> None:
    for module, x in models():
        expected = module(x)
        same(module.half().double()(x), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0), (1, 16), (1, 3)])
def test_linear_layers_of_any_size(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    layer = nnqd.Linear(inputs, outputs, dtype=dtype)
    weight, bias = torch.full((outputs, inputs), 2.0), torch.arange(float(outputs))
    if dtype == torch.float16:
        layer.set_weight_bias(weight, bias)
    for rows in (0, 1, 5):
        y = layer(torch.ones(rows, inputs))
        assert y.shape == (rows, outputs)
        if dtype == torch.float16:
            assert torch.equal(y, (bias + 2 * inputs).expand(rows, outputs))


@pytest.mark.parametrize("shape", [(16, 1), (1, 16), (5, 3), (32, 16)])
def test_float16_weights_that_are_read_are_copies(shape: tuple[int, int]) -> None:
    layer = nnqd.Linear(*shape[::-1], dtype=torch.float16)
    weight = torch.randn(shape).half()
    layer.set_weight_bias(weight, None)
    for copied in (layer.weight(), layer.state_dict()["weight"], weight):
        expected = copied.clone()
        copied.zero_()
        assert torch.equal(layer.weight(), expected)


def test_weights_and_biases_are_those_that_were_set() -> None:
    for module, x in models():
        fresh = blank(module)
        if isinstance(module, (nnqd.LSTM, nnqd.GRU)):
            fresh.set_weight_bias(module.get_weight() | module.get_bias())
        elif isinstance(module, (nnqd.Linear, nnqd.Conv2d)):
            fresh.set_weight_bias(module.weight(), module.bias())
        else:
            fresh.set_weight_bias({"weight": module.get_weight(), "bias": module.get_bias()})
        same(fresh(x), module(x))


@beside_torch_ao
def test_weights_are_those_of_torch_ao() -> None:
    for layer in (nn.Linear(12, 5), nn.LSTM(12, 5, 2, bidirectional=True), nn.GRUCell(12, 5)):
        ours, theirs = both(layer)
        if isinstance(layer, nn.Linear):
            pairs = [(ours.weight(), theirs.weight()), (ours.bias(), theirs.bias())]
        else:
            found = ours.get_weight() | ours.get_bias()
            wanted = theirs.get_weight() | theirs.get_bias()
            assert list(found) == list(wanted)
            pairs = [(found[name], wanted[name]) for name in wanted]
        for a, b in pairs:
            if a.is_quantized:
                assert a.q_scale() == pytest.approx(b.q_scale(), rel=1e-7)
                same(a.int_repr(), b.int_repr())
            else:
                same(a, b.detach())


def test_a_parametrized_layer_gives_the_weight_that_it_computes() -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = configured(nn.Linear(6, 4))
    expected = nnqd.Linear.from_float(layer).weight()
    parametrize.register_parametrization(layer, "weight", Doubled())
    found = nnqd.Linear.from_float(layer).weight()
    assert torch.equal(found.int_repr(), expected.int_repr())
    assert found.q_scale() == pytest.approx(2 * expected.q_scale())


@beside_torch_ao
def test_a_layer_trained_for_dynamic_quantization() -> None:
    qconfig = fq.QConfig(
        activation=fq.default_dynamic_fake_quant, weight=fq.default_weight_fake_quant
    )
    layer: Any = nnqatd.Linear(12, 5, qconfig=qconfig)
    x = torch.randn(4, 12)
    layer(x)
    with quiet():
        theirs = nnqd_torch.Linear.from_float(layer)
    close(nnqd.Linear.from_float(layer)(x), theirs(x))


# --------------------------------------------------------------------------------------- gradients


@beside_torch_ao
def test_gradients_stop_as_at_torch_aos_layers() -> None:
    ours, theirs = both(nn.Linear(6, 3))
    x = torch.randn(2, 6, requires_grad=True)
    assert ours(x).requires_grad == theirs(x).requires_grad
    same(ours(x).detach(), ours(x.detach()))
    with torch.no_grad():
        assert not ours(x).requires_grad


# ------------------------------------------------------------------------------------------ graphs


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(24, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        _, h = self.gru(y)
        return self.head(h[0])  # type: ignore[no-any-return]


@pytest.fixture(params=[Mlp, Recurrent], ids=["MLP", "recurrent"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield fq.quantize_dynamic(request.param(), backend="native").eval()
    torch._dynamo.reset()


def batch(size: int) -> Tensor:
    return torch.randn(size, 5, 16)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_with_any_batch(model: Any, backend: str) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in (2, 5, 3):
            x = batch(size)
            close(compiled(x), model(x), 1e-2 if backend == "inductor" else 0.0)


def test_exported_with_any_batch(model: Any) -> None:
    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(model, (batch(4),), dynamic_shapes=({0: size},))
    ops = {str(node.target) for node in program.graph.nodes}
    assert "fastquant.dynamic_linear.default" in ops
    for n in (2, 9):
        x = batch(n)
        same(program.module()(x), model(x))


def test_compiled_ahead_of_time(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(model, (batch(4),))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        x = batch(4)
        close(loaded(x), model(x), 1e-2)


# --------------------------------------------------------------------------------------- bad input


def bad(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.torch_ao
def test_bad_input_is_refused_in_words() -> None:
    linear = nnqd.Linear(6, 3)
    bad(lambda: linear(torch.randn(2, 5)), ValueError, "6 features.*shape \\[2, 5\\]")
    bad(lambda: linear(torch.randn(2, 7)), ValueError, "6 features.*shape \\[2, 7\\]")
    bad(lambda: linear(torch.ones(2, 6, dtype=torch.int64)), TypeError, "floating-point")
    bad(lambda: nnqd.Linear(6, 3, dtype=torch.int16), QuantizationError, "dtype must be.*int16")
    lstm = nnqd.LSTM(6, 3)
    bad(lambda: lstm(torch.randn(2, 2, 5)), RuntimeError, "6 features.*\\[2, 2, 5\\]")
    bad(lambda: lstm(torch.randn(2, 2, 2, 6)), RuntimeError, "3 dimensions, got 4")
    bad(lambda: lstm(torch.randn(0, 2, 6)), RuntimeError, "at least one step")
    x = torch.randn(2, 2, 6)
    bad(lambda: lstm(x, torch.zeros(1, 2, 3)), RuntimeError, "pair of tensors")
    short = torch.zeros(1, 1, 3)
    bad(lambda: lstm(x, (short, short)), RuntimeError, "hidden\\[0\\].*\\[1, 2, 3\\]")
    bad(lambda: nnqd.GRU(6, 3)(x, (short,)), RuntimeError, "hx must be a tensor, got tuple")
    bad(lambda: nnqd.LSTM(6, 3, dropout=2.0), ValueError, "dropout.*got 2.0")
    bad(lambda: nnqd.RNNCell(6, 3, nonlinearity="x"), QuantizationError, "nonlinearity.*'x'")
    cell = nnqd.LSTMCell(6, 3)
    bad(lambda: cell(torch.randn(2, 5)), RuntimeError, "\\[batch, 6\\], got \\[2, 5\\]")
    conv = nnqd.Conv2d(3, 5, 3)
    bad(lambda: conv(torch.randn(1, 2, 6, 6)), ValueError, "C = 3.*\\[1, 2, 6, 6\\]")


@pytest.mark.torch_ao
def test_modules_that_cannot_be_quantized_are_named() -> None:
    bad(lambda: nnqd.Linear.from_float(nn.Conv1d(1, 1, 1)), TypeError, "Linear.*got.*Conv1d")
    bad(lambda: nnqd.Linear.from_float(nn.Linear(2, 2)), QuantizationError, "qconfig")
    unsigned = fq.QConfig(
        activation=fq.default_dynamic_quant_observer,
        weight=fq.MinMaxObserver.with_args(dtype=torch.uint8),
    )
    layer = configured(nn.Linear(2, 2), unsigned)
    bad(lambda: nnqd.Linear.from_float(layer), QuantizationError, "uint8")
    lstm = configured(nn.LSTM(2, 4, proj_size=2))
    bad(lambda: nnqd.LSTM.from_float(lstm), QuantizationError, "proj_size=2")
    half = configured(nn.Conv2d(1, 1, 1), FLOAT16)
    bad(lambda: nnqd.Conv2d.from_float(half), QuantizationError, "int8, got float16")


def test_states_of_another_dtype_are_refused_in_words() -> None:
    int8, half = nnqd.Linear(6, 3), nnqd.Linear(6, 3, dtype=torch.float16)
    bad(lambda: half.load_state_dict(int8.state_dict()), RuntimeError, "must be float16")
    bad(lambda: int8.load_state_dict(half.state_dict()), RuntimeError, "weight_scale")
    bad(lambda: half.set_weight_bias(int8.weight(), None), QuantizationError, "floating tensor")
    bad(lambda: int8.set_weight_bias(half.weight(), None), QuantizationError, "quantized tensor")


# --------------------------------------------------------------------------------------- reference


@beside_torch_ao
def test_from_reference() -> None:
    qparams = {
        "qscheme": torch.per_tensor_affine,
        "dtype": getattr(torch, "qint8", None),
        "scale": 0.02,
        "zero_point": 0,
        "is_decomposed": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = nnqr.Linear.from_float(nn.Linear(6, 3), qparams)
        x = torch.randn(4, 6)
        close(nnqd.Linear.from_reference(linear)(x), nnqd_torch.Linear.from_reference(linear)(x))
        layer = nn.LSTM(6, 3)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        lstm = nnqr.LSTM.from_float(layer, dict.fromkeys(names, qparams) | {"is_decomposed": False})
        x = torch.randn(5, 2, 6)
        close(nnqd.LSTM.from_reference(lstm)(x), nnqd_torch.LSTM.from_reference(lstm)(x))
