"""The package's own layers for quantization-aware training, beside torch.ao's."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.ao.nn.qat as nnqat
import torch.ao.nn.qat.dynamic as nnqatd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastquant as fq
import fastquant.nn.qat as room
import fastquant.nn.qat.dynamic as dynamic_room
from fastquant.nn.qat import layers
from fastquant.nn.qat.dynamic import linear as dynamic
from oracle import assert_same, quiet

pytestmark = pytest.mark.usefixtures("one_thread")

QCONFIG = fq.get_default_qat_qconfig("x86")
ROWS = fq.QConfig(
    fq.NoopObserver,
    fq.FakeQuantize.with_args(
        observer=fq.MovingAveragePerChannelMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.quint8,
        qscheme=torch.per_channel_affine_float_qparams,
        ch_axis=0,
    ),
)
MEMORYLESS = fq.QConfig(
    fq.FakeQuantize.with_args(
        observer=fq.MovingAverageMinMaxObserver, averaging_constant=1.0, dtype=torch.quint8
    ),
    fq.default_weight_fake_quant,
)


def run(module: Any, *inputs: Tensor) -> dict[str, Any]:
    """What two training steps do: outputs, gradients, and every number that the module keeps."""
    found: dict[str, Any] = {}
    for step in range(2):
        module.zero_grad()
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        y = module(*leaves)
        y.square().sum().backward()
        grads = [x.grad for x in (*module.parameters(), *leaves)]
        found[str(step)] = [y.detach(), *(g for g in grads if g is not None)]
    return {**found, **module.state_dict()}


def compared(float_layer: Any, name: str, qconfig: Any, *inputs: Tensor) -> None:
    """Both libraries' layers do the same, and read each other's state."""
    float_layer.qconfig = qconfig
    made = []
    for place in (layers, nnqat):
        torch.manual_seed(1)
        made.append(getattr(place, name).from_float(copy.deepcopy(float_layer)))
        made.append(torch.rand(3))
    ours, after, theirs, expected_after = made
    assert_same(after, expected_after)  # the same numbers were drawn
    assert repr(ours) == repr(theirs)
    assert ours.training
    fresh = copy.deepcopy(ours)
    assert_same(run(ours, *inputs), run(theirs, *inputs))
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    copied = copy.deepcopy(theirs)
    copied.load_state_dict(ours.state_dict(), strict=True)
    assert_same(run(fresh, *inputs), run(copied, *inputs))
    back, expected = (module.eval().to_float() for module in (ours, theirs))
    assert type(back) is type(expected)
    assert not back.training
    assert_same(back.state_dict(), expected.state_dict())
    assert_same(back(*inputs), expected.eval()(*inputs))
    assert next(back.parameters()).data_ptr() == ours.weight.data_ptr()


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: Any) -> tuple[int, dict[str, Any]]:
    dims = draw(st.sampled_from((1, 2, 3)))
    padding_mode = draw(st.sampled_from(("zeros", "reflect", "circular")))
    return dims, {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": draw(st.one_of(st.just(2), st.tuples(*[st.sampled_from((1, 2))] * dims))),
        "stride": draw(st.sampled_from((1, 2))),
        "padding": draw(st.sampled_from((0, 1))),
        "dilation": draw(st.sampled_from((1, 2))),
        "groups": draw(st.sampled_from((1, 2))),
        "bias": draw(st.booleans()),
        "padding_mode": padding_mode,
    }


@given(convolutions())
def test_convolutions_are_torch_ao_s(case: tuple[int, dict[str, Any]]) -> None:
    dims, arguments = case
    torch.manual_seed(0)
    compared(
        CONVS[dims](**arguments), f"Conv{dims}d", QCONFIG, torch.randn(2, 4, *[6, 5, 5][:dims])
    )


@given(st.booleans(), st.sampled_from([(3,), (2, 3), (2, 4, 3)]))
def test_linear_layers_are_torch_ao_s(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compared(nn.Linear(3, 5, bias=bias), "Linear", QCONFIG, torch.randn(shape))


@given(
    st.sampled_from([None, 0, 3]),
    st.sampled_from([None, 1.0]),
    st.booleans(),
)
def test_embeddings_are_torch_ao_s(
    padding_idx: int | None, max_norm: float | None, by_frequency: bool
) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(*(6, 4, padding_idx, max_norm, 1.5), scale_grad_by_freq=by_frequency)
    compared(table, "Embedding", ROWS, torch.tensor([[0, 3, 3], [5, 0, 1]]))


@given(
    st.sampled_from(["sum", "mean", "max"]),
    st.booleans(),
    st.sampled_from([None, 3]),
    st.booleans(),
)
def test_embedding_bags_are_torch_ao_s(
    mode: str, last: bool, padding_idx: int | None, by_frequency: bool
) -> None:
    torch.manual_seed(0)
    table = nn.EmbeddingBag(
        *(6, 4),
        mode=mode,
        include_last_offset=last,
        padding_idx=padding_idx,
        scale_grad_by_freq=by_frequency and mode != "max",
    )
    offsets = torch.tensor([0, 2, 6] if last else [0, 2])
    compared(table, "EmbeddingBag", ROWS, torch.tensor([0, 3, 3, 5, 0, 1]), offsets)


def test_weights_of_the_samples_reach_the_bag() -> None:
    table = nn.EmbeddingBag(6, 4, mode="sum")
    table.qconfig = ROWS  # type: ignore[assignment]
    ours, theirs = (
        place.EmbeddingBag.from_float(copy.deepcopy(table)) for place in (layers, nnqat)
    )
    index, weights = torch.tensor([[0, 3], [5, 1]]), torch.rand(2, 2)
    assert_same(ours(index, None, weights), theirs(index, None, weights))


def test_frozen_tables_stay_frozen() -> None:
    table = nn.Embedding.from_pretrained(torch.randn(5, 3), freeze=True)
    table.qconfig = ROWS  # type: ignore[assignment]
    assert layers.Embedding.from_float(table).weight is table.weight


def test_parameters_are_shared_with_the_float_layer() -> None:
    for layer in (nn.Linear(3, 4), nn.Conv2d(3, 4, 1), nn.Conv1d(3, 4, 1, bias=False)):
        layer.qconfig = QCONFIG  # type: ignore[assignment]
        made = getattr(layers, type(layer).__name__).from_float(layer)
        assert made.weight is layer.weight
        assert made.bias is layer.bias
        assert made.qconfig is QCONFIG


def test_parametrizations_move_along() -> None:
    for layer, x in (
        (nn.Linear(3, 4), torch.randn(2, 3)),
        (nn.Conv2d(3, 4, 2), torch.randn(2, 3, 4, 4)),
    ):
        layer.qconfig = QCONFIG  # type: ignore[assignment]
        plain = getattr(layers, type(layer).__name__).from_float(copy.deepcopy(layer))
        normed = parametrizations.weight_norm(layer)
        made = getattr(layers, type(plain).__name__).from_float(normed)
        torch.testing.assert_close(made(x), plain(x))
        assert {name for name, _ in made.named_parameters()} == {
            name for name, _ in normed.named_parameters()
        }


def test_constructors_take_torch_ao_s_arguments() -> None:
    for name in room.__all__:
        qconfig = ROWS if "Embedding" in name else QCONFIG
        arguments = (3, 4, 2) if "Conv" in name else (3, 4)
        made = []
        for place in (layers, nnqat):
            torch.manual_seed(0)
            made.append(
                getattr(place, name)(*arguments, qconfig=qconfig, device="cpu", dtype=torch.float64)
            )
        ours, theirs = made
        assert_same(ours.state_dict(), theirs.state_dict())
        assert ours.weight.dtype == torch.float64
        parameters = [parameter.numel() for parameter in ours.parameters()]
        assert parameters == [parameter.numel() for parameter in theirs.parameters()]


def test_every_name_of_torch_ao_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, theirs, name, own in (
        (room, nnqat, "nnqat", layers),
        (dynamic_room, nnqatd, "nnqatd", dynamic),
    ):
        names = [n for n in dir(theirs) if n[0].isupper()]
        assert set(module.__all__) == set(names)
        assert all(getattr(module, n) is getattr(theirs, n) for n in names)
        with monkeypatch.context() as patched:
            patched.setattr(f"fastquant._torch.ao.{name}", None)
            chosen = vars(importlib.reload(module)).copy()
        importlib.reload(module)
        assert all(chosen[n] is getattr(own, n) for n in names)


def test_the_linear_layer_inside_of_attention_is_taken() -> None:
    layer: Any = nn.MultiheadAttention(4, 2).out_proj
    layer.qconfig = QCONFIG
    made = layers.Linear.from_float(layer)
    assert made.weight is layer.weight


def test_mistakes_are_named() -> None:
    for make, message in (
        (lambda: layers.Linear(3, 4), "Linear needs a qconfig.*got None"),
        (lambda: layers.Conv2d(3, 4, 1), "Conv2d needs a qconfig"),
        (lambda: layers.Linear.from_float(nn.Conv1d(3, 4, 1)), "takes a Linear, got Conv1d"),
        (lambda: layers.Conv1d.from_float(nn.Conv1d(3, 4, 1)), "this Conv1d has none"),
        (
            lambda: layers.Embedding(3, 4, qconfig=QCONFIG),
            "Embedding needs a weight with qscheme torch.per_channel_affine_float_qparams, got "
            "torch.per_channel_symmetric",
        ),
        (lambda: layers.EmbeddingBag(3, 4, qconfig=QCONFIG), "EmbeddingBag needs a weight with"),
        (lambda: dynamic.Linear(3, 4, qconfig=QCONFIG), "forgets earlier batches"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_dynamic_layer_is_torch_ao_s() -> None:
    layer = nn.Linear(3, 4)
    layer.qconfig = MEMORYLESS  # type: ignore[assignment]
    x = torch.randn(2, 3)
    ours = dynamic.Linear.from_float(copy.deepcopy(layer))
    with quiet():
        theirs = nnqatd.Linear.from_float(copy.deepcopy(layer))
    assert_same(run(ours, x), run(theirs, x))


def test_a_model_prepared_with_these_layers_trains_as_with_torch_ao_s() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).train()
    model.qconfig = QCONFIG  # type: ignore[assignment]
    mapping = {nn.Conv2d: layers.Conv2d, nn.Linear: layers.Linear}
    ours = fq.prepare_qat(model, mapping)
    theirs = fq.prepare_qat(model)
    assert type(ours[0]) is layers.Conv2d
    x = torch.randn(2, 3, 6, 6)
    assert_same(run(ours, x), run(theirs, x))
    theirs.load_state_dict(ours.state_dict(), strict=True)
