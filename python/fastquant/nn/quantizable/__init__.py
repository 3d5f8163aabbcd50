"""Layers that consist of layers which can be quantized, under the names of torch.ao.nn.quantizable.

Where torch.ao exists, the LSTMs are its classes, and `MultiheadAttention` derives from its class.
"""

from __future__ import annotations

from ..._torch import ao
from ..._torch.counterparts import prefer_torch_ao
from .attention import MultiheadAttention
from .rnn import LSTM, LSTMCell

# What an LSTM consists of: pickles of torch.ao's hold these by name.
from .rnn import _LSTMLayer as _LSTMLayer
from .rnn import _LSTMSingleLayer as _LSTMSingleLayer

__all__ = ["LSTM", "LSTMCell", "MultiheadAttention"]

prefer_torch_ao(globals(), ao.nnquantizable, ("LSTM", "LSTMCell"))
MultiheadAttention.__module__ = __name__
