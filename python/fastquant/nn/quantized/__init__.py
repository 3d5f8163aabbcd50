"""Quantized modules on ordinary int8 and uint8 tensors, under the names of torch.ao.nn.quantized.

They take and return quantized tensors of this package (`fastquant.quantized_tensor`), keep their
weights packed for its kernels, and compile, export, save and load as any module does.
"""

from __future__ import annotations

from torch.nn import MaxPool2d

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
from .float_layer import FloatLayer
from .functional_modules import FloatFunctional, FXFloatFunctional, QFunctional
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
