"""State dicts of torch.ao's quantized models: read, loaded into native models, and written.

Reading needs none of torch's quantized dtypes, and makes nothing but tensors and containers.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._core.dtypes import is_torch_quantized
from ..._core.errors import QuantizationError
from ..._native.packed_rows import from_bytes, in_bytes
from ..._torch.private import (
    PICKLED_PARAMETER,
    PICKLED_QUANTIZED_TENSOR,
    PICKLED_TENSOR,
    per_channel_quantized,
)
from ...quantized_tensor import PerChannelQuantizedTensor, QuantizedTensor
from .activation import ELU, PReLU, Sigmoid, Softmax
from .dynamic.torch_ao_state import ScriptObject, give_dynamic, take_dynamic
from .embedding import Embedding, unpacked_embedding
from .functional_modules import QFunctional
from .linear import Linear
from .scaled import Scaled
from .weighted import Weighted, integers_of_weight

Source: TypeAlias = "str | os.PathLike[str] | IO[bytes]"

# torch.ao's modules of these names keep nothing of theirs in a state_dict.
_STATELESS = (ELU, PReLU, Sigmoid, Softmax)

# --- reading ------------------------------------------------------------------------------------

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "QInt8Storage": torch.int8,
    "QUInt4x2Storage": torch.uint8,
    "QUInt8Storage": torch.uint8,
    "ShortStorage": torch.int16,
}
# What a state_dict mentions beside tensors; all of them are read as their names.
_NAMES = {
    *("qint8", "quint8", "quint4x2", "qint32", "float16", "float32", "float64"),
    *("per_tensor_affine", "per_tensor_symmetric"),
    *("per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams"),
}
# torch.save's own pickles have no others.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
}


class _Name(str):
    """A class, dtype or scheme of torch's, by its name."""

    __slots__ = ()


def _rebuilt(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if storage.numel() == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset).clone()


def _rebuilt_quantized(
    storage: Tensor, offset: int, size: Any, stride: Any, qparams: Any, *_: Any
) -> Any:
    values = _rebuilt(storage, offset, size, stride)
    if qparams[0].startswith("per_tensor"):
        return QuantizedTensor(values, float(qparams[1]), int(qparams[2]))
    scales, zero_points = map(torch.as_tensor, qparams[1:3])
    return PerChannelQuantizedTensor(values, scales, zero_points, int(qparams[3]))


def _itself(value: Any, *_: Any) -> Any:
    return value


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    PICKLED_TENSOR: _rebuilt,
    PICKLED_QUANTIZED_TENSOR: _rebuilt_quantized,
    PICKLED_PARAMETER: _itself,
    ("torch.serialization", "_get_layout"): _Name,
    ("torch", "ScriptObject"): ScriptObject,  # a packed weight of a recurrent layer
}


class _Reader(pickle.Unpickler):
    """Unpickles what a state_dict is made of, and refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        data = archive.read(f"{folder}data.pkl")
        accepted = _OPCODES
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and arg == "torch ScriptObject":
                accepted = _OPCODES | {"NEWOBJ"}  # makes the packed weight of a recurrent layer
            if opcode.name not in accepted:
                raise pickle.UnpicklingError(
                    f"its pickle has the opcode {opcode.name}, and a state dict's has not; of a "
                    "whole model, save model.state_dict()"
                )
        super().__init__(BytesIO(data))
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if module == "torch" and (name in _STORAGES or name in _NAMES):
            return _Name(name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, *_ = pid
        if key not in self._storages:
            if kind not in _STORAGES:
                raise pickle.UnpicklingError(f"it holds a {kind}")
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            dtype = _STORAGES[kind]
            storage = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if kind == "QUInt4x2Storage":
                storage = from_bytes(storage.unsqueeze(0), 2 * len(data), 4).squeeze(0)
            self._storages[key] = storage
        return self._storages[key]


def read_torch_ao_state_dict(source: Source) -> OrderedDict[str, Any]:
    """The state_dict of a model that torch.ao quantized, from a file of torch.save's.

    torch need not have quantized dtypes. Each quantized tensor becomes a `QuantizedTensor` or a
    `PerChannelQuantizedTensor`, each dtype its name. A file that holds anything but
    tensors, numbers, strings and containers is refused, and nothing in it is run.

    Args:
        source: a path, or an open file.

    Raises:
        QuantizationError: it is no such file. What it holds instead is said.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            folder = next(n for n in names if n.endswith("/data.pkl")).removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in names and archive.read(order).decode() != sys.byteorder:
                raise QuantizationError("its byte order is not this machine's")
            state = _Reader(archive, folder).load()
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile as error:
        raise QuantizationError(
            f"{_named(source)} is no file of torch.save's, or one of torch 1.5 or older: load it "
            "with that torch, and save it with a newer one"
        ) from error
    except Exception as error:
        raise QuantizationError(
            f"cannot read {_named(source)} as a state dict of torch.ao's: {error}"
        ) from error
    if not isinstance(state, dict):
        raise QuantizationError(
            f"{_named(source)} must hold a state dict, and holds a {type(state).__name__}: save "
            "model.state_dict()"
        )
    return OrderedDict(state)


def _named(source: Any) -> str:
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "the file"


# --- loading ------------------------------------------------------------------------------------


def load_torch_ao_state_dict(
    model: nn.Module, state: Mapping[str, Any] | Source, strict: bool = True
) -> Any:
    """Load the state_dict of a model that torch.ao quantized into a native one, in place.

    torch.ao's ELU, PReLU, Sigmoid and Softmax have nothing of theirs in a state_dict: those of
    the model keep what they have.

    Args:
        model: converted with `backend="native"` from the same float model, calibrated or not.
        state: a state_dict, or a file that `read_torch_ao_state_dict` reads.
        strict: whether keys that are missing or unexpected are an error.

    Returns:
        The missing and unexpected keys, as `load_state_dict` returns them.

    Raises:
        QuantizationError: a weight has zero points other than 0, or is no int8 weight of its
            layer's shape.
        RuntimeError: keys are missing or unexpected, as `load_state_dict` raises it.
    """
    theirs = state if isinstance(state, Mapping) else read_torch_ao_state_dict(state)
    ours = OrderedDict(theirs)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Weighted):
            _take_weight(ours, prefix, module)
        elif isinstance(module, Embedding):
            _take_embedding(ours, prefix, module)
        elif isinstance(module, _STATELESS):
            for name, value in module.state_dict().items():
                ours.setdefault(prefix + name, value)
        else:
            take_dynamic(ours, getattr(theirs, "_metadata", {}), path, module)
    return model.load_state_dict(ours, strict)


def _take_weight(state: dict[str, Any], prefix: str, module: Weighted) -> None:
    """Put a weight of torch.ao's into the form that the module loads; other forms stay."""
    packed = f"{prefix}_packed_params."
    dtype = state.pop(f"{packed}dtype", None)
    if dtype is not None and str(dtype).removeprefix("torch.") != "qint8":
        raise QuantizationError(f"{prefix}weight must be qint8, got {dtype}")
    for name in ("weight", "bias"):  # version 2 of torch.ao's Linear
        if packed + name in state:
            state[prefix + name] = state.pop(packed + name)
    pair = state.pop(f"{packed}_packed_params", None)
    if pair is not None:
        state[f"{prefix}weight"], state[f"{prefix}bias"] = pair
    weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
    if bias is None:
        state.pop(f"{prefix}bias", None)
    if not is_torch_quantized(weight):
        return
    try:
        values, scales = integers_of_weight(weight, module._weight_shape, module._channel_axis())
    except QuantizationError as error:
        raise QuantizationError(f"{prefix.rstrip('.')}: {error}") from None
    state[f"{prefix}weight"], state[f"{prefix}weight_scale"] = values, scales


def _take_embedding(state: dict[str, Any], prefix: str, module: Embedding) -> None:
    """Put an embedding's weight into the form that the module loads."""
    state.pop(f"{prefix}_packed_params.dtype", None)
    weight = state.pop(f"{prefix}_packed_params._packed_weight", None)
    if weight is None:
        return
    shape = (module.num_embeddings, module.embedding_dim)
    try:
        values, scales, zero_points = unpacked_embedding(weight, shape, module._bits)
    except QuantizationError as error:
        raise QuantizationError(f"{prefix.rstrip('.')}: {error}") from None
    state[f"{prefix}weight"] = in_bytes(values, module._bits)
    state[f"{prefix}weight_scale"] = scales
    state[f"{prefix}weight_zero_point"] = zero_points


# --- writing ------------------------------------------------------------------------------------


def to_torch_ao_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """The state_dict that torch.ao's form of a native model would have, for it to load.

    It has torch's quantized dtypes, and needs a torch that has them.

    Args:
        model: converted with `backend="native"`.
    """
    state = OrderedDict(model.state_dict())
    metadata = OrderedDict(getattr(model.state_dict(), "_metadata", {}))
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Embedding):
            _give_embedding(state, metadata, prefix, module)
        if not isinstance(module, Scaled):
            give_dynamic(state, metadata, path, module)
            continue
        if isinstance(module, _STATELESS):
            for name in module.state_dict():
                del state[prefix + name]
            continue
        state[f"{prefix}scale"] = torch.tensor(module.scale, dtype=torch.float32)
        if isinstance(module, Weighted):
            _give_weight(state, metadata, path, prefix, module)
        elif not isinstance(module, QFunctional):
            for name in ("scale", "zero_point"):
                state[prefix + name] = state[prefix + name].reshape(1)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _give_weight(
    state: dict[str, Any], metadata: dict[str, Any], path: str, prefix: str, module: Weighted
) -> None:
    values, scales, bias = module._integers(), module.weight_scale, module.bias()
    for name in ("weight", "weight_scale", "bias"):
        state.pop(prefix + name, None)
    if scales.numel() == 1:
        scale = float(scales)
        weight = torch.quantize_per_tensor(values * scale, scale, 0, torch.qint8)
    else:
        zero_points = torch.zeros(len(scales), dtype=torch.int64)
        axis = module._channel_axis()
        weight = per_channel_quantized(values, scales.double(), zero_points, axis)
    if isinstance(module, Linear):
        packed = f"{prefix}_packed_params"
        state[f"{packed}.dtype"], state[f"{packed}._packed_params"] = torch.qint8, (weight, bias)
        metadata[path] = metadata[packed] = {"version": 3}
    else:
        state[f"{prefix}weight"], state[f"{prefix}bias"] = weight, bias


def _give_embedding(
    state: dict[str, Any], metadata: dict[str, Any], prefix: str, module: Embedding
) -> None:
    values, scales, zero_points = module._unpacked()
    for name in ("weight", "weight_scale", "weight_zero_point"):
        del state[prefix + name]
    if module._bits == 8:
        weight = per_channel_quantized(values, scales, zero_points, 0)
    elif values.shape[1] % 2:
        raise QuantizationError(
            f"{prefix.rstrip('.')} has an odd embedding_dim, {values.shape[1]}: torch.ao looks up "
            "wrong values in a weight of 4 bits like that"
        )
    else:
        zeros = torch.zeros(values.shape)
        weight = torch.quantize_per_channel(zeros, scales, zero_points, 0, torch.quint4x2)
        memory = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())
        memory[: values.numel() // 2] = in_bytes(values, 4).flatten()
    packed = f"{prefix}_packed_params"
    state[f"{packed}.dtype"], state[f"{packed}._packed_weight"] = weight.dtype, weight
    metadata[packed] = {"version": 1}
