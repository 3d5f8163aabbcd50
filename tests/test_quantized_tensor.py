"""Quantized tensors, compared with torch's of quantized dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastquant.quantized_tensor import (
    QuantizedTensor,
    is_quantized,
    quantize_per_tensor,
)

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
