"""Embedding and EmbeddingBag of fastquant.nn.quantized."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq_torch
import torch.ao.nn.quantized.reference as nnqr
import torch.ao.quantization as tq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastquant as fq
import fastquant.nn.quantized as nnq
from fastquant._quantized import calls
from oracle import quiet
from strategies import random_values, seeds

QCONFIGS: dict[int, tuple[Any, Any]] = {
    8: (fq.float_qparams_weight_only_qconfig, tq.float_qparams_weight_only_qconfig),
    4: (fq.float_qparams_weight_only_qconfig_4bit, tq.float_qparams_weight_only_qconfig_4bit),
}
BITS = pytest.mark.parametrize("bits", [8, 4])


def float_module(kind: type[nn.Module], bits: int = 8, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    module: Any = kind(20, 12, **kwargs)
    module.qconfig = QCONFIGS[bits][0]
    return module


def indices_and_offsets() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, 20, (30,)), torch.tensor([0, 4, 4, 19])


# --------------------------------------------------------------------------------- torch.ao


@given(seeds, st.sampled_from([8, 4]), st.sampled_from(["normal", "outliers", "positive"]))
def test_weights_are_quantized_as_torch_ao_does(seed: int, bits: int, kind: str) -> None:
    bag = nn.EmbeddingBag(9, 24, _weight=random_values((9, 24), torch.float32, seed, kind))
    bag.qconfig, theirs_qconfig = QCONFIGS[bits]  # type: ignore[assignment]
    ours = nnq.EmbeddingBag.from_float(bag)
    bag.qconfig = theirs_qconfig
    with quiet():
        theirs = nnq_torch.EmbeddingBag.from_float(bag)
    assert torch.equal(ours.weight().dequantize(), theirs.weight().dequantize())
    assert torch.equal(ours.weight().q_per_channel_scales(), theirs.weight().q_per_channel_scales())
    again = nnq.EmbeddingBag(9, 24, dtype=ours.dtype)
    again.set_weight(theirs.weight())
    assert torch.equal(again.weight().int_repr(), ours.weight().int_repr())


def test_lookups_are_torch_aos_bits() -> None:
    module = float_module(nn.Embedding)
    ours = nnq.Embedding.from_float(module)
    module.qconfig = QCONFIGS[8][1]
    with quiet():
        theirs = nnq_torch.Embedding.from_float(module)
    indices = torch.randint(0, 20, (3, 5))
    assert torch.equal(ours(indices), theirs(indices))
    assert repr(ours) == repr(theirs)
    assert ours.weight().qscheme() == theirs.weight().qscheme()


@BITS
@pytest.mark.parametrize("include_last", [False, True])
def test_sums_are_close_to_torch_aos(bits: int, include_last: bool) -> None:
    module = float_module(nn.EmbeddingBag, bits, mode="sum", include_last_offset=include_last)
    ours = nnq.EmbeddingBag.from_float(module)
    module.qconfig = QCONFIGS[bits][1]
    with quiet():
        theirs = nnq_torch.EmbeddingBag.from_float(module)
    indices, offsets = indices_and_offsets()
    if include_last:
        offsets = torch.cat((offsets, torch.tensor([30])))
    tolerance = 1e-5 if bits == 8 else 5e-2  # torch rounds scales of 4 bits to fp16
    for weights in (None, torch.rand(30)):
        args = (indices, offsets, weights)
        torch.testing.assert_close(ours(*args), theirs(*args), rtol=0, atol=tolerance)
    ours.pruned_weights = theirs.pruned_weights = True
    mapping = torch.arange(40, dtype=torch.int32) // 2
    mapping[::3] = -1
    args = (indices, offsets, None, mapping)
    torch.testing.assert_close(ours(*args), theirs(*args), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ float


@BITS
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_bags_of_every_mode_are_the_float_modules(
    bits: int, mode: str, padding_idx: int | None
) -> None:
    module = float_module(nn.EmbeddingBag, bits, mode=mode, padding_idx=padding_idx)
    quantized = nnq.EmbeddingBag.from_float(module)
    with torch.no_grad():
        module.weight.copy_(quantized.weight().dequantize())
    indices, offsets = indices_and_offsets()
    for args in ((indices, offsets), (indices.view(5, 6),), (indices.int(), offsets.int())):
        torch.testing.assert_close(quantized(*args), module(*args).detach(), rtol=0, atol=1e-5)
    assert quantized(indices, offsets.int()).shape == (4, 12)


@BITS
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_rows_are_shortened_to_max_norm(bits: int, kind: str) -> None:
    module = float_module(getattr(nn, kind), bits, max_norm=1.0)
    quantized = getattr(nnq, kind).from_float(module)
    indices = torch.arange(20).view(4, 5)
    expected = module(indices).detach()
    assert expected.norm(dim=-1).max() < 1.1
    torch.testing.assert_close(quantized(indices), expected, rtol=0, atol=1.5 / 2**bits)


@BITS
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_trained_modules_keep_what_they_learnt(bits: int, kind: str) -> None:
    qconfig = (
        fq.default_embedding_qat_qconfig if bits == 8 else fq.default_embedding_qat_qconfig_4bit
    )
    module: Any = nn.Sequential(float_module(getattr(nn, kind)))
    module[0].qconfig = qconfig
    mapping = fq.get_embedding_qat_module_mappings()
    trained = fq.prepare_qat(module.train(), mapping=mapping)
    optimizer = torch.optim.SGD(trained.parameters(), 0.5)
    indices = torch.randint(0, 20, (6, 3))
    for _ in range(3):
        trained(indices).square().sum().backward()
        optimizer.step()
    converted = fq.convert(trained.eval(), backend="native")
    assert type(converted[0]) is getattr(nnq, kind)
    torch.testing.assert_close(converted(indices), trained(indices).detach(), rtol=0, atol=1e-5)


@BITS
def test_odd_dimensions_are_right(bits: int) -> None:
    module: Any = nn.Embedding(7, 5)
    module.qconfig = QCONFIGS[bits][0]
    quantized = nnq.Embedding.from_float(module)
    expected = quantized.weight().dequantize()
    torch.testing.assert_close(quantized(torch.arange(7)), expected)
    assert (expected - module.weight).abs().max() < 6 / 2**bits


def test_conversion_keeps_embeddings_of_other_qconfigs_floating() -> None:
    module: Any = nn.Sequential(nn.Embedding(20, 12))
    module.qconfig = fq.get_default_qconfig("native")
    prepared = fq.prepare(module.eval())
    prepared(torch.arange(20))
    with pytest.warns(UserWarning, match="0 .*float_qparams_weight_only_qconfig"):
        converted = fq.convert(prepared, backend="native")
    assert torch.equal(converted(torch.arange(20)), module[0].weight)


@BITS
def test_reference_modules_are_converted(bits: int) -> None:
    module = float_module(nn.EmbeddingBag, bits, mode="sum")
    observer = module.qconfig.weight()
    observer(module.weight)
    with quiet():
        reference = nnqr.EmbeddingBag.from_float(module, fq.utils.get_qparam_dict(observer))
        quantized = nnq.EmbeddingBag.from_reference(reference)
    direct = nnq.EmbeddingBag.from_float(module)
    assert torch.equal(quantized.weight().int_repr(), direct.weight().int_repr())


# ------------------------------------------------------------------------------------ state


def modules(bits: int) -> list[Any]:
    bag = float_module(nn.EmbeddingBag, bits, mode="mean", padding_idx=3)
    table = float_module(nn.Embedding, bits, padding_idx=3)
    return [nnq.EmbeddingBag.from_float(bag), nnq.Embedding.from_float(table)]


@BITS
def test_states_load_into_new_modules(bits: int) -> None:
    indices = torch.randint(0, 20, (4, 5))
    for module in modules(bits):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert {type(value) for value in state.values()} == {Tensor}
        assert state["weight"].numel() * 8 == 20 * 12 * bits
        fresh = copy.deepcopy(module)
        fresh.set_weight(type(module)(20, 12, dtype=module.dtype).weight())
        assert not torch.equal(fresh(indices), module(indices))
        assert fresh.load_state_dict(state).missing_keys == []
        assert torch.equal(fresh(indices), module(indices))
        with torch.device("meta"):
            meta = type(module)(20, 12, dtype=module.dtype)
        meta.load_state_dict(state, assign=True)
        assert torch.equal(meta.weight().dequantize(), module.weight().dequantize())


@BITS
def test_modules_are_copied_pickled_and_moved(bits: int) -> None:
    indices = torch.randint(0, 20, (4, 5))
    for module in modules(bits):
        expected = module(indices)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
            assert torch.equal(other(indices), expected)
            assert repr(other) == repr(module)


@BITS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(20, 30, dtype=torch.uint8)}, r"weight must have shape \[20, \d+\]"),
        ({"weight_scale": torch.zeros(20)}, "weight_scale must be positive"),
        ({"weight_zero_point": torch.full((20,), torch.nan)}, "weight_zero_point finite"),
        ({"weight_scale": 3}, r"weight_scale must have shape \[20\], got int"),
        ({"weight_scale": None}, "Missing key.*weight_scale"),
    ],
)
def test_states_that_do_not_fit_are_refused(bits: int, change: Any, message: str) -> None:
    module = modules(bits)[0]
    before = module.weight().dequantize()
    state = {**module.state_dict(), **change}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict({k: v for k, v in state.items() if v is not None})
    assert torch.equal(module.weight().dequantize(), before)


# -------------------------------------------------------------------------------- the call


class Watching(TorchDispatchMode):
    """Sees every op, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@BITS
def test_graphs_give_the_same(bits: int) -> None:
    bag, table = modules(bits)
    indices, offsets = indices_and_offsets()
    model = torch.compile(bag, fullgraph=True, dynamic=True)
    for count in (30, 21):
        args = (indices[:count], offsets)
        assert torch.equal(model(*args), bag(*args))
    assert torch.equal(torch.compile(table, fullgraph=True)(indices), table(indices))
    for strict in (False, True):
        exported = torch.export.export(bag, (indices, offsets), strict=strict)
        assert torch.equal(exported.module()(indices, offsets), bag(indices, offsets))


@BITS
def test_calls_without_the_dispatcher_are_taken_and_give_the_same(bits: int) -> None:
    bag, table = modules(bits)
    indices, offsets = indices_and_offsets()
    packed = (bag._packed_weight, 12, bits)
    fast = calls.embedding_bag(*packed, indices, offsets, None, None, 1, False, 3)
    assert fast is not None
    with Watching():
        assert calls.embedding(*packed, indices) is None
        assert torch.equal(bag(indices, offsets), fast)
        looked_up = table(indices)
    assert torch.equal(table(indices), looked_up)
    for strided in (torch.stack((indices, indices), 1)[:, 0], indices.view(5, 6).t()):
        assert torch.equal(table(strided), table(strided.contiguous()))
    assert table(torch.tensor(3)).shape == (12,)
    assert table(indices[:0]).shape == (0, 12)
    assert bag(indices[:0], offsets[:0]).shape == (0, 12)


def test_bad_input_is_named() -> None:
    bag, table = modules(8)
    indices, offsets = indices_and_offsets()
    for bad, found in ((20, 20), (-1, -1)):
        with pytest.raises(IndexError, match=f"indices must be from 0 to 19, got {found}"):
            table(torch.tensor([1, bad]))
        with pytest.raises(IndexError, match=f"indices must be from 0 to 19, got {found}"):
            bag(torch.tensor([[1, bad]]))
    with pytest.raises(TypeError, match=r"indices must be a tensor of torch.int32 or torch.int64"):
        table(indices.float())
    with pytest.raises(TypeError, match=r"got list"):
        table([1, 2])
    for args in ((indices,), (indices.view(5, 6), offsets)):
        with pytest.raises(ValueError, match="offsets must be given for indices of 1 dimension"):
            bag(*args)
    with pytest.raises(ValueError, match="1 or 2 dimensions, got 3"):
        bag(indices.view(5, 3, 2))
    for wrong in (offsets + 1, offsets.flip(0), offsets * 2):
        with pytest.raises(ValueError, match="offsets must begin at 0, ascend"):
            bag(indices, wrong)
    with pytest.raises(NotImplementedError, match="need mode='sum'"):
        bag(indices, offsets, torch.ones(30))
    sums = nnq.EmbeddingBag.from_float(float_module(nn.EmbeddingBag, mode="sum"))
    with pytest.raises(ValueError, match=r"per_sample_weights must be a tensor of shape \[30\]"):
        sums(indices, offsets, torch.ones(29))
    half = sums(indices, offsets, torch.ones(30, dtype=torch.float64))
    assert torch.equal(half, sums(indices, offsets, torch.ones(30)))
    sums.pruned_weights = True
    with pytest.raises(ValueError, match="compressed_indices_mapping must be given"):
        sums(indices, offsets)
    with pytest.raises(TypeError, match="compressed_indices_mapping must be a tensor"):
        sums(indices, offsets, None, torch.ones(20))


def test_weights_and_sources_that_do_not_fit_are_refused() -> None:
    with pytest.raises(fq.QuantizationError, match="dtype must be"):
        nnq.Embedding(3, 4, dtype=torch.qint8)
    with pytest.raises(ValueError, match="mode must be"):
        nnq.EmbeddingBag(3, 4, mode="median")
    with pytest.raises(ValueError, match="padding_idx must be a row of 3"):
        nnq.Embedding(3, 4, padding_idx=3)
    table = nnq.Embedding(3, 4, dtype=torch.quint4x2)
    with pytest.raises(fq.QuantizationError, match="must be a quantized tensor"):
        table.set_weight(torch.randn(3, 4))
    ones, values = torch.ones(3), torch.full((3, 4), 200, dtype=torch.uint8)
    weight = fq.quantized_tensor.PerChannelQuantizedTensor(values, ones, ones, 0)
    with pytest.raises(fq.QuantizationError, match="must have 4 bits"):
        table.set_weight(weight)
    with pytest.raises(fq.QuantizationError, match=r"must have shape \[4, 4\], got \[3, 4\]"):
        nnq.Embedding(4, 4).set_weight(weight)
    with pytest.raises(TypeError, match="from_float takes a module of class"):
        nnq.Embedding.from_float(nn.Linear(3, 4))
    with pytest.raises(fq.QuantizationError, match="it has no qconfig"):
        nnq.Embedding.from_float(nn.Embedding(3, 4))
