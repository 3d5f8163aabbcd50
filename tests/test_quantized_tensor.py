"""Quantized tensors, compared with torch's of quantized dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastquant.quantized_tensor import (
    PerChannelQuantizedTensor,
    QuantizedTensor,
    is_quantized,
    parts,
    quantize_per_channel,
    quantize_per_tensor,
)
from oracle import needs_torch_to_round_once

DTYPES = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def pair(
    *shape: int, dtype: torch.dtype = torch.uint8, scale: float = 0.1, zero_point: int = 3
) -> tuple[QuantizedTensor, Tensor]:
    """The same quantized tensor, as ours and as torch's."""
    real = torch.randn(shape) * 5
    ours = quantize_per_tensor(real, scale, zero_point, dtype)
    theirs = torch.quantize_per_tensor(real, scale, zero_point, DTYPES[dtype])
    return ours, theirs


def assert_same(ours: Any, theirs: Any, tolerance: int = 0, layout: bool = True) -> None:
    if isinstance(theirs, (tuple, list)) and not isinstance(theirs, torch.Size):
        assert isinstance(ours, (tuple, list))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, tolerance, layout)
    elif isinstance(theirs, Tensor) and theirs.is_quantized:
        assert is_quantized(ours)
        assert ours.q_scale() == pytest.approx(theirs.q_scale(), rel=1e-7)  # theirs may be fp32
        assert ours.q_zero_point() == theirs.q_zero_point()
        assert ours.shape == theirs.shape
        assert not layout or ours.stride() == theirs.stride()
        expected = theirs.int_repr()
        assert ours.int_repr().dtype == expected.dtype
        difference = ours.int_repr().int() - expected.int()
        assert difference.abs().max().item() <= tolerance if difference.numel() else True
    elif isinstance(theirs, Tensor):
        assert not is_quantized(ours)
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


Function = Callable[[Any], Any]

SHAPES: dict[str, Function] = {
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "nn.Flatten": nn.Flatten(),
    "view": lambda x: x.view(x.size(0), -1),
    "view_as": lambda x: x.view_as(x),
    "reshape": lambda x: x.reshape(2, 4, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "torch.permute": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "permute_reshape": lambda x: x.permute(0, 2, 3, 1).reshape(2, -1),
    "transpose": lambda x: x.transpose(1, 2),
    "torch.transpose": lambda x: torch.transpose(x, 1, 2).contiguous(),
    "T": lambda x: x[0, 0].T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(1, 3),
    "slice": lambda x: x[:, 1:],
    "step": lambda x: x[:, ::2, 1:3],
    "none": lambda x: x[..., None],
    "integer": lambda x: x[0],
    "list": lambda x: x[[1, 0]],
    "mask": lambda x: x[x.int_repr() > 4],
    "select": lambda x: x.select(1, 0),
    "narrow": lambda x: x.narrow(1, 0, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "chunk": lambda x: x.chunk(2, 1),
    "torch.chunk": lambda x: torch.chunk(x, 2, dim=1),
    "split": lambda x: x.split(4, 1),
    "torch.split": lambda x: torch.split(x, [2, 6], 1),
    "unbind": lambda x: x.unbind(0),
    "iter": list,
    "tensor_split": lambda x: x.tensor_split(3, 1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x.expand(3, 2, 8, 6, 6),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "flip": lambda x: torch.flip(x, [1]),
    "unflatten": lambda x: x.unflatten(1, (2, 4)),
    "unfold": lambda x: x.unfold(2, 2, 2),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 1)),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "to_device": lambda x: x.to("cpu"),
    "to_memory_format": lambda x: x.to(memory_format=torch.channels_last),
    "to_other": lambda x: x.to(x),
    "cpu": lambda x: x.cpu(),
    "stack": lambda x: torch.stack([x, x.flip(0)]),
    "cat": lambda x: torch.cat([x, x.flip(0)], 1),
    "concat": lambda x: torch.concat((x, x), dim=-1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:1]),
    "pixel_shuffle": nn.PixelShuffle(2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "dropout": nn.Dropout().eval(),
    "identity": nn.Identity(),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_value": lambda x: F.pad(x, (1, 1), value=1.23),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "ConstantPad2d": nn.ConstantPad2d(1, 0.5),
    "empty_like": lambda x: torch.empty_like(x).fill_(1.0),
    "ones_like": torch.ones_like,
    "masked_fill": lambda x: x.masked_fill(x.int_repr() > 4, 1.0),
}

FACTS: dict[str, Function] = {
    "shape": lambda x: x.shape,
    "size": lambda x: x.size(),
    "size_of_dim": lambda x: x.size(1),
    "dim": lambda x: x.dim(),
    "ndim": lambda x: x.ndim,
    "numel": lambda x: x.numel(),
    "torch.numel": torch.numel,
    "stride": lambda x: x.stride(),
    "is_contiguous": lambda x: x.is_contiguous(),
    "is_channels_last": lambda x: x.is_contiguous(memory_format=torch.channels_last),
    "device": lambda x: x.device,
    "layout": lambda x: x.layout,
    "is_quantized": lambda x: x.is_quantized,
    "requires_grad": lambda x: x.requires_grad,
    "grad": lambda x: x.grad,
    "is_leaf": lambda x: x.is_leaf,
    "is_floating_point": lambda x: x.is_floating_point(),
    "torch.is_floating_point": torch.is_floating_point,
    "element_size": lambda x: x.element_size(),
    "len": len,
    "q_scale": lambda x: x.q_scale(),
    "q_zero_point": lambda x: x.q_zero_point(),
    "torch.q_scale": torch.q_scale,
    "qscheme": lambda x: x.qscheme(),
    "int_repr": lambda x: x.int_repr(),
    "dequantize": lambda x: x.dequantize(),
    "torch.dequantize": torch.dequantize,
    "torch.dequantize_list": lambda x: torch.dequantize([x, x]),
    "item": lambda x: x[0, 0, 0, 0].item(),
    "float": lambda x: float(x[0, 0, 0, 0]),
    "int": lambda x: int(x[0, 0, 0, 0]),
    "bool": lambda x: bool(x[0, 0, 0, 0]),
    "is_tensor": torch.is_tensor,
}

BOUNDS: dict[str, Function] = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "relu_inplace": lambda x: F.relu(x, inplace=True),
    "nn.ReLU": nn.ReLU(inplace=True),
    "relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -1.5, 2.0),
    "hardtanh_inplace": nn.Hardtanh(inplace=True),
    "clamp": lambda x: x.clamp(0, 6),
    "torch.clamp": lambda x: torch.clamp(x, -1, 1),
    "clamp_min": lambda x: x.clamp(min=1.04),
    "clamp_max": lambda x: x.clamp(max=1.06),
    "clip": lambda x: x.clip(-1, 1),
}

# Results that torch rounds in fp32 otherwise.
ROUNDED: dict[str, Function] = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "leaky_relu_inplace": nn.LeakyReLU(0.2, inplace=True),
    "sigmoid": torch.sigmoid,
    "nn.Sigmoid": nn.Sigmoid(),
    "F.sigmoid": F.sigmoid,
    "tanh": torch.tanh,
    "nn.Tanh": nn.Tanh(),
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "threshold": lambda x: F.threshold(x, 1.04, 0.0),
    "std": lambda x: x.std(1),
    "bilinear": lambda x: F.interpolate(x, size=(3, 9), mode="bilinear", align_corners=False),
    "align_corners": lambda x: F.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True),
    "nn.Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "grid_sample": lambda x: F.grid_sample(
        x, torch.linspace(-1.2, 1.2, 48).reshape(2, 3, 4, 2), align_corners=False
    ),
    "mean": lambda x: x.mean(),
    "mean_of_dims": lambda x: x.mean([2, 3]),
    "torch.mean": lambda x: torch.mean(x, (2, 3), keepdim=True),
    "mean_of_dim": lambda x: x.mean(-1),
}

# Results that are in channels_last.
POOLING: dict[str, Function] = {
    "max_pool1d": lambda x: F.max_pool1d(x[:, 0], 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d_stride": lambda x: F.max_pool2d(x, 3, 2, 1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, [2, 3]),
    "nn.MaxPool2d": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "dilated": lambda x: F.max_pool2d(x, 2, 1, 0, 2),
    "unbatched": lambda x: F.max_pool2d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x[None], 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[:, 0], 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "nn.AvgPool2d": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg_pool3d": lambda x: F.avg_pool3d(x[None], 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[:, 0], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d_sizes": lambda x: F.adaptive_avg_pool2d(x, (2, None)),
    "nn.AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x[None], 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, size=(9, 4), mode="nearest-exact"),
    "nearest3d": lambda x: F.interpolate(x[None], scale_factor=2),
}

ORDER: dict[str, Function] = {
    "eq": lambda x: x == x.flip(0),
    "ne": lambda x: x != x.flip(0),
    "lt": lambda x: x < x.flip(0),
    "le": lambda x: torch.le(x, x.flip(0)),
    "gt_number": lambda x: x > 0.5,
    "ge_number": lambda x: x >= 0.3,
    "reflected": lambda x: x > 0.5,
    "eq_real": lambda x: x == x.dequantize(),
    "equal": lambda x: x.equal(x),
    "torch.equal": lambda x: torch.equal(x, x.flip(0)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max_of_dim": lambda x: x.max(1)[0],
    "torch.min": lambda x: torch.min(x, 1).values,
    "sort": lambda x: x.sort(1, descending=True)[0],
    "topk": lambda x: torch.topk(x, 2, 1)[0],
}


EXACT = SHAPES | FACTS | BOUNDS | ORDER


@pytest.mark.parametrize("zero_point", [3, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED, *POOLING])
def test_functions_do_what_they_do_with_torchs_tensors(
    name: str, dtype: torch.dtype, zero_point: int
) -> None:
    function = (EXACT | ROUNDED | POOLING)[name]
    ours, theirs = pair(2, 8, 6, 6, dtype=dtype, zero_point=zero_point)
    try:
        expected = function(theirs)
    except RuntimeError:
        assert dtype == torch.int8  # torch has some functions for quint8 only
        return
    tolerance = 0 if name in EXACT else 1
    assert_same(function(ours), expected, tolerance, layout=name not in POOLING)


# --- what torch.ao refuses, or has no function for ----------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (1, 1, 2, 1), mode="replicate"),
        lambda x: F.pad(x, (1, 1, 2, 1), mode="circular"),
        lambda x: x.roll(1, 0),
        lambda x: x.gather(1, torch.zeros(2, 1, 6, 6, dtype=torch.int64)),
        lambda x: x.take(torch.tensor([1, 2])),
        lambda x: x.masked_select(x > 0.55),
        torch.zeros_like,
        lambda x: x.amax(1),
        lambda x: x.argmax(1),
        lambda x: F.interpolate(x[:, 0], scale_factor=2),
    ],
)
def test_more_functions_do_what_they_do_with_the_real_numbers(
    function: Function, dtype: torch.dtype
) -> None:
    ours, theirs = pair(2, 8, 6, 6, dtype=dtype)
    found, expected = function(ours), function(theirs.dequantize())
    if is_quantized(found):
        assert (found.q_scale(), found.q_zero_point()) == (ours.q_scale(), ours.q_zero_point())
        found = found.dequantize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [F.silu, nn.SiLU(), nn.SiLU(inplace=True)])
def test_silu_is_within_half_a_step(function: Function, dtype: torch.dtype) -> None:
    x, theirs = pair(2, 8, 6, 6, dtype=dtype)
    expected = F.silu(theirs.dequantize().double())
    y = function(x)
    assert (y.q_scale(), y.q_zero_point()) == (x.q_scale(), x.q_zero_point())
    assert ((y.dequantize().double() - expected).abs() <= 0.501 * y.q_scale()).all()
    assert (y is x) == getattr(function, "inplace", False)


@pytest.mark.usefixtures("one_thread")
def test_silu_in_a_graph_is_as_in_eager() -> None:
    x, _ = pair(2, 8, 6, 6)
    y = torch.compile(nn.SiLU(), backend="eager", fullgraph=True)(x)
    assert y.equal(nn.SiLU()(x))


def test_view_takes_any_layout() -> None:
    """Layers give channels_last, which forwards that view their outputs need not know."""
    x = pair(2, 8, 6, 6)[0]
    y = x.contiguous(memory_format=torch.channels_last)
    assert y.view(2, -1).equal(x.view(2, -1))


@pytest.mark.parametrize("name", sorted({*BOUNDS, "leaky_relu_inplace"}))
def test_inplace_functions_change_their_input_and_return_it(name: str) -> None:
    x, _ = pair(2, 8, 6, 6)
    before, y = x.clone(), (BOUNDS | ROUNDED)[name](x)
    if "inplace" in name or name.endswith("_") or name.startswith("nn.ReLU"):
        assert y is x
        assert not x.equal(before)
    else:
        assert x.equal(before)


def test_views_share_memory_with_what_they_are_views_of() -> None:
    x, _ = pair(2, 8, 6, 6)
    x[:, 1:3].relu_()
    assert (x[:, 1:3].dequantize() >= 0).all()
    assert (x.dequantize() < 0).any()
    x.flatten()[0] = 7.0
    assert x[0, 0, 0, 0].item() == pytest.approx(7.0)


def test_cat_requantizes_to_the_first_tensor() -> None:
    a, their_a = pair(2, 3, 4, 4)
    b, their_b = pair(2, 5, 4, 4, scale=0.23, zero_point=77)
    for dim in (1, -3):
        found, expected = torch.cat([a, b], dim), torch.cat([their_a, their_b], dim)
        assert_same(found, expected, tolerance=1)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a quantized tensor.*float32"):
        torch.cat([a, b.dequantize()], 1)
    with pytest.raises(TypeError, match=r"one dtype, got torch.int8 and torch.uint8"):
        torch.cat([a, pair(2, 3, 4, 4, dtype=torch.int8)[0]], 1)


def test_values_are_written_in_the_scale_of_the_tensor() -> None:
    ours, theirs = pair(2, 3, 4, 4)
    others = pair(2, 3, 4, 4, scale=0.3, zero_point=1)
    for x, other in ((ours, others[0]), (theirs, others[1])):
        x[0, 0] = other.dequantize()[0, 0]
        x[1, 1] = 2.03
        x[:, 2] = x[:, 1]
    assert_same(ours, theirs)
    copied, expected = ours.clone().copy_(others[0]), theirs.clone().copy_(others[1])
    assert_same(copied, expected)
    real = torch.randn(2, 3, 4, 4)
    assert_same(ours.copy_(real), theirs.copy_(real))
    ours[0] = others[0][0]
    assert torch.allclose(ours[0].dequantize(), others[0][0].dequantize(), atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"Tensor.copy_ .*dequantize"):
        real.copy_(ours)
    with pytest.raises(NotImplementedError, match=r"__setitem__ .*dequantize"):
        real[0] = ours[0]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name", "remedy"),
    [
        (lambda x: x + x, "Tensor.add", "FloatFunctional, whose add()"),
        (lambda x: 1 - x, "Tensor.__rsub__", "FloatFunctional, whose add()"),
        (lambda x: x.add_(x), "Tensor.add_", "FloatFunctional"),
        (lambda x: torch.mul(x, x), "torch.mul", "FloatFunctional, whose mul()"),
        (lambda x: x @ x, "Tensor.matmul", "FloatFunctional, whose matmul()"),
        (lambda x: x.exp(), "Tensor.exp", "dequantize()"),
        (lambda x: x.sum(), "Tensor.sum", "dequantize()"),
        (lambda x: x.float(), "Tensor.float", "dequantize()"),
        (lambda x: x.to(torch.float32), "Tensor.to", "dequantize()"),
        (lambda x: x.view(torch.int8), "Tensor.view", "int_repr()"),
        (lambda x: x.numpy(), "Tensor.numpy", "int_repr()"),
        (lambda x: x.tolist(), "Tensor.tolist", "int_repr()"),
        (lambda x: F.softmax(x, 1), "torch.nn.functional.softmax", "dequantize()"),
        (F.hardswish, "torch.nn.functional.hardswish", "dequantize()"),
        (lambda x: F.linear(x, torch.zeros(2, 6)), "linear", "dequantize()"),
        (F.dropout, "torch.nn.functional.dropout", "model.eval()"),
        (lambda x: torch.zeros(6) + x, "Tensor.add", "dequantize()"),
        (lambda x: torch.zeros(6)[x], "Tensor.__getitem__", "dequantize()"),
        (torch.ops.aten.relu, "torch.ops.aten.relu", "dequantize()"),
        (
            lambda x: F.max_pool2d(x, 2, return_indices=True),
            "max_pool2d_with_indices",
            "dequantize()",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(function: Function, name: str, remedy: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        function(pair(2, 8, 6, 6)[0])
    assert name in str(error.value)
    assert remedy in str(error.value)


def test_arguments_are_checked() -> None:
    real, integers = torch.randn(3), torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="scale must be positive and finite, got 0"):
        quantize_per_tensor(real, 0.0, 3)
    with pytest.raises(ValueError, match="scale must be positive and finite, got inf"):
        QuantizedTensor(integers, float("inf"), 3)
    with pytest.raises(ValueError, match="zero_point must be an integer from 0 to 255"):
        quantize_per_tensor(real, 0.1, -1)
    with pytest.raises(ValueError, match="zero_point must be an integer from -128 to 127"):
        quantize_per_tensor(real, 0.1, 128, torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.float32"):
        quantize_per_tensor(real, 0.1, 3, torch.float32)
    with pytest.raises(TypeError, match=r"floating-point tensor, got one of torch.uint8"):
        quantize_per_tensor(integers, 0.1, 3)
    with pytest.raises(TypeError, match=r"values must be .* got one of torch.float32"):
        QuantizedTensor(real, 0.1, 3)
    with pytest.raises(TypeError, match=r"here must be a quantized tensor.* QuantStub"):
        parts(real, "here")
    with pytest.raises(TypeError, match="scale for each channel, which only weights have"):
        parts(quantize_per_channel(torch.randn(2, 3), torch.ones(2), torch.zeros(2), 0))
    with pytest.raises(RuntimeError, match="no gradients"):
        pair(2)[0].requires_grad_()


def test_torchs_quantized_dtypes_name_the_integers() -> None:
    x = quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    assert x.dtype == torch.int8
    assert x.to(torch.qint8) is x


# --- copies, files, printing --------------------------------------------------------------------


def saved_and_loaded(x: Any, **kwargs: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **kwargs)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: saved_and_loaded(x, weights_only=True),
        lambda x: saved_and_loaded(x, weights_only=False),
        lambda x: saved_and_loaded({"x": [x]})["x"][0],
    ],
)
def test_copies_and_files_keep_everything(duplicate: Function) -> None:
    x = pair(2, 3)[0]
    y = duplicate(x)
    assert type(y) is QuantizedTensor
    assert y.equal(x)
    weight = quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int64), 0
    )
    again = duplicate(weight)
    assert type(again) is PerChannelQuantizedTensor
    assert (again == weight).all()
    assert torch.equal(again.q_per_channel_scales(), weight.q_per_channel_scales())


def test_copies_have_memory_of_their_own() -> None:
    x = pair(2, 3)[0]
    before = x.clone()
    y = copy.deepcopy(x)
    y.fill_(3.0)
    assert x.equal(before)
    integers = x.int_repr()
    integers.zero_()
    assert x.equal(before)


def test_a_buffer_may_be_a_quantized_tensor() -> None:
    module, other = nn.Module(), nn.Module()
    module.register_buffer("x", pair(2, 3)[0])
    other.register_buffer("x", pair(2, 3, scale=0.7)[0])
    module.to("cpu").half()
    other.load_state_dict(module.state_dict())
    assert other.x.equal(module.x)


def test_printing_shows_real_numbers_and_how_they_are_kept() -> None:
    x = QuantizedTensor(torch.tensor([[3, 13], [5, 255]], dtype=torch.uint8), 0.5, 3)
    text = repr(x)
    for part in ("[  0.,   5.]", "126.", "size=(2, 2)", "torch.uint8", "scale=0.5", "zero_point=3"):
        assert part in text
    assert str(x) == text
    assert f"{x}" == text
    assert f"{x[0, 1]:.2f}" == "5.00"
    weight = quantize_per_channel(torch.ones(2, 1), torch.tensor([0.1, 0.5]), torch.zeros(2), 0)
    assert "axis=0" in repr(weight)


def test_weights_with_scales_of_channels_are_as_torchs() -> None:
    real = torch.randn(4, 3, 2)
    for axis in (0, 1, -1):
        count = real.shape[axis]
        scales = torch.rand(count, dtype=torch.float64) + 0.01
        zero_points = torch.randint(-3, 3, (count,))
        ours = quantize_per_channel(real, scales, zero_points, axis)
        theirs = torch.quantize_per_channel(real, scales, zero_points, axis % 3, torch.qint8)
        assert torch.equal(ours.int_repr(), theirs.int_repr())
        assert torch.allclose(ours.dequantize(), theirs.dequantize())
        assert ours.q_per_channel_axis() == theirs.q_per_channel_axis()
        assert ours.qscheme() == theirs.qscheme()
        assert ours.shape == theirs.shape
        assert ours.is_quantized
        with pytest.raises(NotImplementedError, match="scale for each channel"):
            ours + 1


def test_weights_can_be_copied_moved_and_asked_about() -> None:
    real, scales, zeros = torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    x = quantize_per_channel(real, scales, zeros, 0)
    for y in (
        *(x.clone(), torch.clone(x), x.contiguous(), x.to("cpu"), x.cpu(), x.data, x.detach()),
        *(x.to(torch.int8), torch.clone(input=x)),
    ):
        assert type(y) is PerChannelQuantizedTensor
        assert x.equal(y)
        assert torch.equal(x, y)
        assert torch.equal(input=x, other=y)
    before = copy.deepcopy(x)
    for part in (cloned := x.clone()).q_per_channel_scales(), cloned.q_per_channel_zero_points():
        part.zero_()
    cloned._integers.zero_()
    assert x.equal(before)
    torch.testing.assert_close(x, x.clone())
    for other in (
        quantize_per_channel(real, scales * 2, zeros, 0),
        quantize_per_channel(real, scales, zeros + 1, 0),
        quantize_per_channel(real, torch.rand(3) + 0.1, torch.zeros(3), 1),
        quantize_per_channel(real + 1, scales, zeros, 0),
        x.int_repr(),
        pair(2, 3)[0],
    ):
        assert not x.equal(other)
        assert not torch.equal(other, x)
    moved = x.to("meta")
    assert moved.is_meta
    assert moved.q_per_channel_scales().is_meta
    assert (x.element_size(), x.nbytes, x.itemsize) == (1, 6, 1)
    assert not x.is_floating_point()
    assert not torch.is_floating_point(x)
    assert not any((x.is_cuda, x.is_sparse, x.is_nested))
    with pytest.raises(TypeError, match=r"stays torch.int8.*dequantize"):
        x.to(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_is_torchs(dtype: torch.dtype) -> None:
    needs_torch_to_round_once()
    real = torch.cat([torch.randn(1000) * 10, torch.tensor([0.0, 1e30, -1e30, 0.25, 0.35])])
    for scale, zero_point in ((0.1, 3), (0.3, 100), (1e-3, 0)):
        ours = quantize_per_tensor(real, scale, zero_point, dtype)
        theirs = torch.quantize_per_tensor(real, scale, zero_point, DTYPES[dtype])
        assert_same(ours, theirs)


@pytest.mark.parametrize("scale", [0.1, 1e-30, 1e30])
@pytest.mark.parametrize(("low", "high"), [(0.5, float("inf")), (-float("inf"), 0.5)])
def test_bounds_may_be_infinite_and_tensors(scale: float, low: float, high: float) -> None:
    ours, _ = pair(4, 6, scale=scale, zero_point=128)
    levels = ours.dequantize().clamp(low, high)
    expected = quantize_per_tensor(levels, scale, 128)
    for y in (ours.clamp(low, high), F.hardtanh(ours, low, high)):
        assert torch.equal(y, expected)
    assert torch.equal(ours.clamp(torch.tensor(low), torch.tensor(high)), expected)


def test_infinities_are_written_as_the_limits() -> None:
    ours, _ = pair(2, 3, zero_point=7)
    mask = torch.tensor([True, False, False])
    assert ours.masked_fill(mask, -float("inf")).int_repr()[:, 0].tolist() == [0, 0]
    padded = F.pad(ours, (1, 1), value=float("inf"))
    assert padded.int_repr()[:, 0].tolist() == padded.int_repr()[:, -1].tolist() == [255, 255]
    with pytest.raises(ValueError, match="NaN"):
        ours.clamp(min=float("nan"))
    with pytest.raises(NotImplementedError, match=r"bound of shape \[3\]"):
        ours.clamp(min=torch.zeros(3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, (1, 2, 3)), "one number or 2"),
        (lambda x: F.max_pool2d(x, (2, 2, 2)), "one number or 2"),
        (lambda x: F.avg_pool2d(x, 2, (1, 1, 1)), "one number or 2"),
        (lambda x: x.mean((1, 1)), "once"),
        (lambda x: x.mean((1, -3)), "once"),
    ],
)
def test_pooling_refuses_dimensions_it_does_not_have(function: Function, message: str) -> None:
    ours, _ = pair(2, 3, 6, 6)
    with pytest.raises(ValueError, match=message):
        function(ours)


def test_a_parameter_before_a_quantized_tensor_is_refused_by_name() -> None:
    ours, _ = pair(2, 3)
    with pytest.raises(NotImplementedError, match=r"Tensor\.expand_as does not take"):
        nn.Parameter(torch.randn(1, 3)).expand_as(ours)


@pytest.mark.parametrize(
    ("scales", "zero_points", "axis", "error", "message"),
    [
        ([1.0, 1.0], [0, 0, 0], 1, ValueError, "scales must have one element for each of the 3"),
        ([1.0, 1.0, 1.0], [0], 1, ValueError, "zero_points must have one element"),
        ([1.0, -1.0, 1.0], [0, 0, 0], 1, ValueError, "scale must be positive"),
        ([1.0, 1.0, 1.0], [0, 0, 200], -1, ValueError, "zero_point must be an integer"),
        ([1.0, 1.0, 1.0], [0, 0.5, 0], 1, ValueError, "zero_point must be an integer"),
        ([1.0, 1.0, 1.0], [0, 0, 0], 2, IndexError, "axis must be a dimension"),
    ],
)
def test_scales_of_channels_are_checked(
    scales: Any, zero_points: Any, axis: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_per_channel(
            torch.randn(2, 3), torch.tensor(scales), torch.tensor(zero_points), axis
        )


def test_a_fractional_zero_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero_point must be an integer.*1\.5"):
        quantize_per_tensor(torch.randn(2), 0.1, 1.5)  # type: ignore[arg-type]


def test_a_data_loader_makes_batches() -> None:
    ours, _ = pair(4, 3)
    batch = next(iter(torch.utils.data.DataLoader(ours, batch_size=4)))  # type: ignore[arg-type]
    assert torch.equal(batch, ours)


class QuantizedRows(torch.utils.data.Dataset[Tensor]):
    """Rows of one scale, or each of a scale of its own."""

    def __init__(self, growth: float = 0.0) -> None:
        self.growth = growth

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        values = torch.arange(3 * i, 3 * i + 3, dtype=torch.uint8)
        return QuantizedTensor(values, 0.5 + self.growth * i, 3)


STRATEGIES = sorted(torch.multiprocessing.get_all_sharing_strategies())
SENDING = [("fork", strategy, size) for strategy in STRATEGIES for size in (None, 2)]
# Such a worker imports all anew: each size, and each strategy, in one of them.
SENDING += [("spawn", STRATEGIES[0], None), ("spawn", STRATEGIES[-1], 2)]


@pytest.mark.parametrize(("context", "strategy", "batch_size"), SENDING)
def test_workers_of_a_data_loader_send_quantized_tensors(
    context: str, strategy: str, batch_size: int | None
) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        data = torch.utils.data.ConcatDataset([QuantizedRows(), QuantizedRows(growth=0.25)])
        # Without workers, torch.stack makes batches: with the scale of their first row.
        expected = list(torch.utils.data.DataLoader(data, batch_size))
        found = list(
            torch.utils.data.DataLoader(
                data, batch_size, num_workers=1, multiprocessing_context=context, timeout=60
            )
        )
        assert len(found) == len(expected) == (8 if batch_size is None else 4)
        for x, y in zip(found, expected, strict=True):
            assert type(x) is QuantizedTensor
            assert (x.q_scale(), x.q_zero_point()) == (y.q_scale(), y.q_zero_point())
            assert torch.equal(x.int_repr(), y.int_repr())
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_joining_into_a_tensor(join: Function) -> None:
    ours, _ = pair(4, 3)
    expected = join([ours, ours], 1)
    for out in (expected.new(0), ours.new(expected.shape), ours.new(7)):
        assert join([ours, ours], 1, out=out) is out
        assert torch.equal(out, expected)
        assert out.q_scale() == ours.q_scale()
    with pytest.raises(TypeError, match="out must be a quantized tensor"):
        join([ours, ours], out=torch.empty(0))
    with pytest.raises(TypeError, match=r"out must have the dtype.*uint8.*int8"):
        join([ours, ours], out=QuantizedTensor(torch.zeros(1, dtype=torch.int8), 1.0, 0))
    with pytest.raises(NotImplementedError, match=r"Tensor\.new .* of other values"):
        ours.new([1, 2])


@pytest.mark.parametrize("function", [F.max_pool2d, F.avg_pool2d])
def test_padding_of_more_than_half_the_window_is_refused(function: Function) -> None:
    ours, _ = pair(1, 2, 6, 6)
    with pytest.raises(RuntimeError, match="padding must be at most half of the window"):
        function(ours, 2, padding=2)


def test_a_negative_output_size_is_refused() -> None:
    ours, _ = pair(1, 2, 6, 6)
    with pytest.raises(RuntimeError, match="output_size must not be negative"):
        F.adaptive_avg_pool2d(ours, -1)
