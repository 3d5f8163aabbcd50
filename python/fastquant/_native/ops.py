"""Every op of `csrc/library.cpp`, bound once under its own name, with its fallback.

The fallback, in plain torch ops, serves devices that have no kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import library as library  # loads the ops
from .reference import OPS

Op = Callable[..., Any]


def _bind(name: str, any_layout: bool = False) -> Op:
    """The op.

    With `any_layout`, its results do not depend on the layout of its input. In a compiled graph it
    then gets what a convolution makes, usually channels_last, where other ops get a copy with the
    strides of eager mode. Ops with a mask are none of these: its bits have the order of the memory.
    """
    op = getattr(torch.ops.fastquant, name).default
    if any_layout:
        op.tags.append(torch.Tag.flexible_layout)
    bound: Op = op
    return bound


observe_minmax_ = _bind("observe_minmax_", any_layout=True)
observe_histogram_ = _bind("observe_histogram_", any_layout=True)
observe_channel_histograms_ = _bind("observe_channel_histograms_", any_layout=True)
observe_error_ = _bind("observe_error_", any_layout=True)
observe_qparams_ = _bind("observe_qparams_", any_layout=True)
search_histogram_range = _bind("search_histogram_range")
histogram_range = _bind("histogram_range")
least_error_range = _bind("least_error_range", any_layout=True)
histogram_error = _bind("histogram_error")
choose_qparams = _bind("choose_qparams")
fake_quantize = _bind("fake_quantize", any_layout=True)
fake_quantize_with_mask = _bind("fake_quantize_with_mask")
fake_quantize_backward = _bind("fake_quantize_backward")
quantize_per_channel = _bind("quantize_per_channel")
fused_observe_fake_quantize = _bind("fused_observe_fake_quantize", any_layout=True)
fused_observe_fake_quantize_with_mask = _bind("fused_observe_fake_quantize_with_mask")
observe_batch_norm_ = _bind("observe_batch_norm_", any_layout=True)
batch_norm_fake_quantize = _bind("batch_norm_fake_quantize", any_layout=True)
batch_norm_fake_quantize_backward = _bind("batch_norm_fake_quantize_backward", any_layout=True)
add_observe_fake_quantize = _bind("add_observe_fake_quantize")
observe_folded_weight_ = _bind("observe_folded_weight_", any_layout=True)
fold_weight = _bind("fold_weight", any_layout=True)
fold_weight_backward = _bind("fold_weight_backward", any_layout=True)
convolution = _bind("convolution")
convolution_backward = _bind("convolution_backward")
learnable_fake_quantize = _bind("learnable_fake_quantize")
learnable_fake_quantize_backward = _bind("learnable_fake_quantize_backward")
quantize = _bind("quantize", any_layout=True)
dequantize = _bind("dequantize")
pack_weight = _bind("pack_weight")
unpack_weight = _bind("unpack_weight")
quantized_linear = _bind("quantized_linear", any_layout=True)
quantized_conv = _bind("quantized_conv", any_layout=True)
quantized_conv_transpose = _bind("quantized_conv_transpose", any_layout=True)
quantized_add = _bind("quantized_add", any_layout=True)
quantized_mul = _bind("quantized_mul", any_layout=True)
quantized_cat = _bind("quantized_cat", any_layout=True)
lookup = _bind("lookup")
quantized_max_pool = _bind("quantized_max_pool", any_layout=True)
quantized_avg_pool = _bind("quantized_avg_pool", any_layout=True)
quantized_adaptive_avg_pool = _bind("quantized_adaptive_avg_pool", any_layout=True)
quantized_mean = _bind("quantized_mean", any_layout=True)
quantized_interpolate = _bind("quantized_interpolate", any_layout=True)
quantized_batch_norm = _bind("quantized_batch_norm", any_layout=True)
quantized_group_norm = _bind("quantized_group_norm", any_layout=True)
quantized_layer_norm = _bind("quantized_layer_norm", any_layout=True)
quantized_softmax = _bind("quantized_softmax", any_layout=True)
dynamic_linear = _bind("dynamic_linear", any_layout=True)
half_linear = _bind("half_linear", any_layout=True)
dynamic_conv = _bind("dynamic_conv", any_layout=True)
dynamic_conv_transpose = _bind("dynamic_conv_transpose", any_layout=True)
dynamic_lstm = _bind("dynamic_lstm", any_layout=True)
dynamic_gru = _bind("dynamic_gru", any_layout=True)
quantized_embedding = _bind("quantized_embedding")
quantized_embedding_bag = _bind("quantized_embedding_bag")

# An op that has no autograd of its own leaves gradients on while its kernel runs, so the
# fallback turns them off itself.
_fallback: Any = torch.library.Library("fastquant", "IMPL")  # type: ignore[no-untyped-call]
for _name, _op in OPS.items():
    _fallback.impl(_name, torch.no_grad()(_op), "CompositeExplicitAutograd")
