"""Reference modules, under the names of torch.ao.nn.quantized.reference.

Their weights have the values of quantized weights, and they compute in floating point.

Where torch can quantize tensors itself they are torch.ao's classes, otherwise those of the modules
here.
"""

from __future__ import annotations

from ...._torch import ao
from ...._torch.counterparts import prefer_torch_ao
from .layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    EmbeddingBag,
    Linear,
)
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
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "RNNCell",
]

prefer_torch_ao(globals(), ao.nnqr if ao.has_quantized_modules else None, __all__)
