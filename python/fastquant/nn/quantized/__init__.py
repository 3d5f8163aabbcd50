"""Quantized modules on ordinary int8 and uint8 tensors, under the names of torch.ao.nn.quantized.

They take and return quantized tensors of this package (`fastquant.quantized_tensor`), keep their
weights packed for its kernels, and compile, export, save and load as any module does.

`fastquant.convert(…, backend="native")` makes them. Made by hand, they take the arguments of the
module of torch.nn or torch.ao.nn.quantized that has their name, and shapes are those of torch.nn.
The input is a `QuantizedTensor` of uint8 or int8, the output one of the same dtype, with the
module's `scale` (a positive float) and `zero_point` (an int), unless the class says otherwise.
Where there is a weight, it is int8 with zero point 0, and has one scale, or one for each output
channel; a bias is fp32, in the units of the real result. An input that is not quantized raises
TypeError, one of the wrong shape ValueError.
"""

from __future__ import annotations

from torch.nn import MaxPool2d

from ..float_functional import FloatFunctional, FXFloatFunctional
from .activation import ELU, Hardswish, LeakyReLU, PReLU, ReLU6, Sigmoid, Softmax
from .batchnorm import BatchNorm2d, BatchNorm3d
from .conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from .dropout import Dropout
from .embedding import Embedding, EmbeddingBag
from .float_layer import FloatLayer
from .functional_modules import QFunctional
from .linear import Linear
from .normalization import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm
from .rnn import LSTM, MultiheadAttention
from .stubs import DeQuantize, Quantize
from .torch_ao_state import (
    load_torch_ao_state_dict,
    read_torch_ao_state_dict,
    to_torch_ao_state_dict,
)

__all__ = [
    "ELU",
    "LSTM",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeQuantize",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "FXFloatFunctional",
    "FloatFunctional",
    "FloatLayer",
    "GroupNorm",
    "Hardswish",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "MultiheadAttention",
    "PReLU",
    "QFunctional",
    "Quantize",
    "ReLU6",
    "Sigmoid",
    "Softmax",
    "load_torch_ao_state_dict",
    "read_torch_ao_state_dict",
    "to_torch_ao_state_dict",
]
