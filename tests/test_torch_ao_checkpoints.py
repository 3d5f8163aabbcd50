"""State dicts of torch.ao's quantized models: read, loaded into native models, and written."""

from __future__ import annotations

import copy
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq_torch
import torch.ao.nn.quantized.dynamic as nnqd_torch
from torch import Tensor, nn

import fastquant as fq
import fastquant.nn.quantized as nnq
import fastquant.nn.quantized.dynamic as nnqd
from fastquant.bench.models import torchvision_model
from oracle import quiet

QCONFIG = fq.get_default_qconfig("x86")


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    """An engine whose layers give back the weights that they were made of.

    fbgemm's transposed convolutions do not (docs/int8.md).
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    yield
    torch.backends.quantized.engine = before


class Net(nn.Module):
    """A model with every module of torch.ao's that has a state."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.up.qconfig = fq.default_qconfig
        self.bn, self.norm = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.functional = nnq_torch.FloatFunctional()
        self.elu, self.swish, self.leaky = nn.ELU(), nn.Hardswish(), nn.LeakyReLU(0.1)
        self.linear = nn.Linear(8, 5, bias=False)
        self.linear.qconfig = fq.default_qconfig
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.bn(self.up(self.conv(self.quant(x)))))
        x = self.functional.add(self.elu(x), self.leaky(self.swish(x)))
        return self.dequant(self.last(self.linear(x.mean((2, 3)))))


def prepared(seed: int) -> Any:
    torch.manual_seed(seed)
    model: Any = Net().eval()
    model.qconfig = QCONFIG
    model = fq.prepare(model)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 6, 6) * (1 + seed))
    return model


def pair(seed: int) -> tuple[Any, Any]:
    """torch.ao's model and the native one of the same float model."""
    with quiet():
        model = prepared(seed)
        return fq.convert(model), fq.convert(model, backend="native")


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@torch.no_grad()
@pytest.mark.parametrize("through", ["a file", "memory"])
def test_a_checkpoint_of_torch_aos_loads_into_a_model_of_other_weights(through: str) -> None:
    with quiet():
        theirs, same = pair(0)
        _, other = pair(1)
        # Nothing of theirs is in torch.ao's state dict.
        other.elu.scale, other.elu.zero_point = same.elu.scale, same.elu.zero_point
        state = theirs.state_dict()
        result = nnq.load_torch_ao_state_dict(other, saved(state) if through == "a file" else state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(other(x), same(x))
    assert len(other(x).unique()) > 8


@torch.no_grad()
def test_torch_ao_loads_what_is_written() -> None:
    with quiet():
        theirs, ours = pair(0)
        other, _ = pair(1)
        other.elu.scale, other.elu.zero_point = theirs.elu.scale, theirs.elu.zero_point
        state = nnq.to_torch_ao_state_dict(ours)
        assert state.keys() == theirs.state_dict().keys()
        other.load_state_dict(torch.load(saved(state), weights_only=True), strict=True)
        x = torch.randn(4, 3, 6, 6)
        assert torch.equal(other(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_checkpoints_of_torchvisions_models(name: str) -> None:
    with quiet():
        try:
            model: Any = torchvision_model(name).eval()
        except ImportError as error:
            pytest.skip(str(error))
        model.fuse_model(is_qat=False)
        model.qconfig = QCONFIG
        x = torch.randn(2, 3, 64, 64)
        fresh = fq.prepare(model)
        model = copy.deepcopy(fresh)
        model(x)
        state = saved(fq.convert(model).state_dict())
        ours = fq.convert(model, backend="native")
        other = fq.convert(fresh, backend="native")
        nnq.load_torch_ao_state_dict(other, state)
    assert torch.equal(other(x), ours(x))


def test_reading_gives_quantized_tensors_of_this_package() -> None:
    with quiet():
        theirs, _ = pair(0)
        state = nnq.read_torch_ao_state_dict(saved(theirs.state_dict()))
        assert state.keys() == theirs.state_dict().keys()
        weight = theirs.conv.weight()
        assert torch.equal(state["conv.weight"].int_repr(), weight.int_repr())
        assert torch.equal(state["conv.weight"].dequantize(), weight.dequantize())
        assert torch.equal(state["bn.running_var"], theirs.bn.running_var)
        assert state["linear._packed_params.dtype"] == "qint8"
        assert state["linear._packed_params._packed_params"][1] is None
        # Views, too, and tensors that share their memory.
        x = torch.arange(12.0).reshape(3, 4)
        read = nnq.read_torch_ao_state_dict(saved({"a": x.t(), "b": x[1:, 2], "c": x[:0]}))
        assert torch.equal(read["a"], x.t())
        assert torch.equal(read["b"], x[1:, 2])
        assert read["c"].shape == (0, 4)


# --- what is refused -----------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


class Rebuilds:
    def __reduce__(self) -> Any:
        return getattr, ("a", "title")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: {"a": Runs()}, r"posix\.mkdir"),
        (lambda: {"a": Rebuilds()}, "getattr"),
        (lambda: {"a": torch.nn.Linear(2, 2)}, r"NEWOBJ.* save model\.state_dict"),
        (lambda: torch.zeros(3), "must hold a state dict, and holds a Tensor"),
        (lambda: {"a": torch.zeros(3, dtype=torch.complex64)}, "ComplexFloatStorage"),
    ],
)
def test_files_that_hold_anything_else_are_refused(
    value: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fq.QuantizationError, match=message):
        nnq.read_torch_ao_state_dict(saved(value()))
    assert not (tmp_path / "pwned").exists()


def test_pickles_that_torch_save_does_not_write_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": {1, 2}}, protocol=4))
    file.seek(0)
    with pytest.raises(fq.QuantizationError, match="FRAME"):
        nnq.read_torch_ao_state_dict(file)


def test_a_tensor_outside_its_storage_is_refused() -> None:
    with zipfile.ZipFile(saved({"a": torch.zeros(300)})) as archive:
        data = {name: archive.read(name) for name in archive.namelist()}
    data["archive/data.pkl"] = data["archive/data.pkl"].replace(b"M,\x01", b"M,\x02")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)
    file.seek(0)
    with pytest.raises(fq.QuantizationError, match="cannot read the file"):
        nnq.read_torch_ao_state_dict(file)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(fq.QuantizationError, match=r"old\.pth.* is no file of torch.save's"):
        nnq.read_torch_ao_state_dict(path)
    with pytest.raises(FileNotFoundError):
        nnq.read_torch_ao_state_dict(tmp_path / "absent.pth")


def test_weights_that_do_not_fit_are_refused() -> None:
    with quiet():
        theirs, ours = pair(0)
        state = theirs.state_dict()

        def loading(**changes: Any) -> None:
            changed = {key.replace("__", "."): value for key, value in changes.items()}
            nnq.load_torch_ao_state_dict(copy.deepcopy(ours), {**state, **changed})

        shifted = torch.quantize_per_tensor(torch.zeros(8, 3, 3, 3), 0.1, 5, torch.qint8)
        with pytest.raises(fq.QuantizationError, match=r"conv: the zero points .* must be 0"):
            loading(conv__weight=shifted)
        small = torch.quantize_per_tensor(torch.zeros(8, 3, 3, 2), 0.1, 0, torch.qint8)
        with pytest.raises(fq.QuantizationError, match=r"conv: .*shape \[8, 3, 3, 3\]"):
            loading(conv__weight=small)
        with pytest.raises(fq.QuantizationError, match=r"linear.weight must be qint8, got"):
            loading(**{"linear._packed_params.dtype": torch.float16})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            loading(more=torch.zeros(1))
        del state["conv.scale"]
        with pytest.raises(RuntimeError, match=r"Missing key.*conv\.scale"):
            loading()


# ---------------------------------------------------------------------------------------- dynamic


class Text(nn.Module):
    """Every dynamic module that has a state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, bidirectional=True)
        self.gru, self.linear = nn.GRU(32, 8), nn.Linear(8, 5, bias=False)
        self.lstm_cell, self.gru_cell, self.rnn_cell = (
            nn.LSTMCell(5, 4),
            nn.GRUCell(4, 3),
            nn.RNNCell(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        return self.rnn_cell(self.gru_cell(self.lstm_cell(self.linear(y[-1]))[0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_states_load_and_are_written(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.backends.quantized.engine = "x86"  # onednn has no float16
    x = torch.randn(5, 2, 12)
    with quiet():
        theirs = fq.quantize_dynamic(Text(), dtype=dtype, backend="torch.ao")
        torch.save(theirs.state_dict(), tmp_path / "state.pt")
    for state in (theirs.state_dict(), tmp_path / "state.pt"):
        ours = fq.quantize_dynamic(Text(), dtype=dtype, backend="native")
        nnq.load_torch_ao_state_dict(ours, state)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    written = nnq.to_torch_ao_state_dict(ours)
    with quiet():
        fresh = fq.quantize_dynamic(Text(), dtype=dtype, backend="torch.ao")
        fresh.load_state_dict(written)
    torch.testing.assert_close(fresh(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_dynamic_convolution_loads_and_is_written() -> None:
    conv = nn.Conv2d(3, 5, 3)
    conv.qconfig = fq.default_dynamic_qconfig  # type: ignore[assignment]
    with quiet():
        theirs = nnqd_torch.Conv2d.from_float(conv)
        ours = nnqd.Conv2d(3, 5, 3)
        nnq.load_torch_ao_state_dict(ours, theirs.state_dict())
        fresh = nnqd_torch.Conv2d(3, 5, 3)
        fresh.load_state_dict(nnq.to_torch_ao_state_dict(ours))
    assert torch.equal(ours.weight().int_repr(), theirs.weight().int_repr())
    assert torch.equal(fresh.weight().int_repr(), theirs.weight().int_repr())


def test_dynamic_states_of_another_dtype_are_refused_by_name() -> None:
    torch.backends.quantized.engine = "x86"  # onednn has no float16
    with quiet():
        theirs = fq.quantize_dynamic(Text(), dtype=torch.float16, backend="torch.ao")
    ours = fq.quantize_dynamic(Text(), backend="native")
    with pytest.raises(fq.utils.QuantizationError, match=r"^lstm: its weight must be int8"):
        nnq.load_torch_ao_state_dict(ours, theirs.state_dict())
    with pytest.raises(fq.utils.QuantizationError, match=r"^lstm: .*packed weight.*got str"):
        nnq.load_torch_ao_state_dict(ours, {"lstm._all_weight_values.0.param": "x"})


def test_the_range_that_an_old_layer_used_is_kept() -> None:
    linear = nn.Sequential(nn.Linear(4, 3))
    with quiet():
        state = fq.quantize_dynamic(linear, backend="torch.ao").state_dict()
    ours = fq.quantize_dynamic(linear, backend="native")
    nnq.load_torch_ao_state_dict(ours, state)
    assert ours[0].reduce_range
    state._metadata["0"]["version"] = 3
    nnq.load_torch_ao_state_dict(ours, state)
    assert not ours[0].reduce_range


# ------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("as_file", [True, False])
def test_embeddings_are_read_and_written(bits: int, as_file: bool, tmp_path: Path) -> None:
    qconfig = (
        fq.float_qparams_weight_only_qconfig
        if bits == 8
        else fq.float_qparams_weight_only_qconfig_4bit
    )
    model: Any = nn.Sequential(nn.EmbeddingBag(9, 6, mode="sum"))
    model.qconfig = qconfig
    prepared = fq.prepare(model.eval())
    with quiet():
        theirs = fq.convert(prepared, backend="torch.ao")
    with torch.no_grad():
        prepared[0].weight.mul_(3)
    ours = fq.convert(prepared, backend="native")
    indices = torch.randint(0, 9, (4, 5))
    assert not torch.allclose(ours(indices), theirs(indices), atol=0.1)
    state: Any = theirs.state_dict()
    if as_file:
        torch.save(state, tmp_path / "theirs.pt")
        state = tmp_path / "theirs.pt"
    nnq.load_torch_ao_state_dict(ours, state)
    assert torch.equal(ours[0].weight().dequantize(), theirs[0].weight().dequantize())
    assert torch.equal(ours[0].weight().q_per_channel_scales(), scales_of(theirs[0]))

    dtype = torch.quint8 if bits == 8 else torch.quint4x2
    with quiet():
        again = nn.Sequential(nnq_torch.EmbeddingBag(9, 6, dtype=dtype))
        again.load_state_dict(nnq.to_torch_ao_state_dict(ours))
    assert torch.equal(again(indices), theirs(indices))


def scales_of(module: Any) -> Tensor:
    scales: Tensor = module.weight().q_per_channel_scales()
    return scales


def test_what_torch_ao_cannot_hold_is_refused() -> None:
    model = nn.Sequential(nnq.Embedding(4, 5, dtype=torch.quint4x2))
    with pytest.raises(fq.QuantizationError, match="0 has an odd embedding_dim, 5"):
        nnq.to_torch_ao_state_dict(model)
    state = {"0._packed_params._packed_weight": nnq.Embedding(4, 6).weight()}
    with pytest.raises(fq.QuantizationError, match=r"^0: the weight must have shape \[4, 5\]"):
        nnq.load_torch_ao_state_dict(model, state)
