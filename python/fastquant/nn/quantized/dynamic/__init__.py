"""Layers that quantize their input at each call, under the names of torch.ao.nn.quantized.dynamic.

They take and return ordinary floating tensors, keep int8 weights (or float16 ones) packed for the
native kernels, and compile, export, save and load as any module does.
"""

from __future__ import annotations

from .conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from .linear import Linear
from .rnn import GRU, LSTM, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "RNNCell",
]
