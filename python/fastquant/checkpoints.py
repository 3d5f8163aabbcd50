"""Whole models that were pickled with torch.ao, read where it is gone: as fastquant's classes.

A model that was saved as a whole, `torch.save(model, path)`, names the class of each module. Where
torch.ao is gone, these names lead nowhere. This module is a `pickle_module` for `torch.load` that
knows where in fastquant such a class is now, under whichever of its old names:

    model = fastquant.checkpoints.load_model(path)
    model = torch.load(path, pickle_module=fastquant.checkpoints, weights_only=False)

State dicts hold no classes, so plain `torch.load` reads them; `read_torch_ao_state_dict` in
`fastquant.nn.quantized` those of torch.ao's quantized models.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
import sys
from pickle import (
    DEFAULT_PROTOCOL,
    HIGHEST_PROTOCOL,
    PickleError,
    Pickler,
    PicklingError,
    UnpicklingError,
    dump,
    dumps,
)
from typing import IO, Any

import torch
from torch import nn

from ._core.dtypes import QUANTIZED_NAMES, quantized_dtype
from ._version import __version__

__all__ = [
    "DEFAULT_PROTOCOL",
    "HIGHEST_PROTOCOL",
    "PickleError",
    "Pickler",
    "PicklingError",
    "Unpickler",
    "UnpicklingError",
    "dump",
    "dumps",
    "load",
    "load_model",
    "loads",
]

# torch.ao was torch.quantization, torch.nn.intrinsic and so on until torch 1.13.
_OF_QUANTIZATION = re.compile(r"torch\.(?:ao\.)?quantization(?:\.(\w+))?")
_OF_NN = re.compile(
    r"torch\.(?:ao\.)?nn\.((?:intrinsic|qat|quantizable|quantized|sparse)(?:\.\w+)*?)"
    r"(?:\.modules(?:\.\w+)*)?"
)
_RENAMED = {"_learnable_fake_quantize": "fake_quantize"}
# Of torch's quantized modules, these belong to float models.
_FLOAT = ("FloatFunctional", "FXFloatFunctional")


class Unpickler(pickle.Unpickler):
    """`pickle.Unpickler`, which finds classes of torch.ao in fastquant where torch has them not."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names."""
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError) as error:
            found = _counterpart(module, name)
            if found is None:
                raise UnpicklingError(_why_not(module, name, error)) from error
            return found


def _counterpart(module: str, name: str) -> Any:
    """What fastquant has for a name of torch's; None where there is nothing."""
    if module == "torch" and name in QUANTIZED_NAMES:
        return quantized_dtype(name)
    places: tuple[str, ...] = ()
    if match := _OF_QUANTIZATION.fullmatch(module):
        places = (f".{_RENAMED.get(match[1], match[1])}" if match[1] else "", "")
    elif (match := _OF_NN.fullmatch(module)) and (not _is_quantized(match[1]) or name in _FLOAT):
        places = (f".nn.{match[1]}",)
    for place in places:
        try:
            return getattr(importlib.import_module(f"{__package__}{place}"), name)
        except (ImportError, AttributeError):
            continue
    return None


def _is_quantized(package: str) -> bool:
    """Whether a package below torch.ao.nn has modules whose weights are packed for torch's ops."""
    return "quantized" in package.split(".") and not package.endswith(".reference")


def _why_not(module: str, name: str, error: Exception) -> str:
    what = f"the file holds {module}.{name}, which is not here ({error})"
    match = _OF_NN.fullmatch(module)
    if match and _is_quantized(match[1]):
        return (
            f"{what}: the model was converted to torch's quantized modules. Load it with a torch "
            "that has them, save its state_dict(), and load that into a model converted with "
            "backend='native', by fastquant.nn.quantized.load_torch_ao_state_dict"
        )
    if match or _OF_QUANTIZATION.fullmatch(module):
        return (
            f"{what}, and fastquant {__version__} has nothing of the name. Load it with a torch "
            "that has torch.ao, and save its state_dict() or convert it there"
        )
    return (
        f"{what}: install the package that defines it, or load the file where it can be imported, "
        "and save the model's state_dict()"
    )


def load(file: Any, **kwargs: Any) -> Any:
    """`pickle.load`, with this module's `Unpickler`."""
    return Unpickler(file, **kwargs).load()


def loads(data: bytes, **kwargs: Any) -> Any:
    """`pickle.loads`, with this module's `Unpickler`."""
    return load(io.BytesIO(data), **kwargs)


def load_model(f: str | os.PathLike[str] | IO[bytes], map_location: Any = None) -> nn.Module:
    """The model in a file of `torch.save(model, f)`, which runs whatever code the file names.

    Args:
        f: path, or an open file; from a source that you trust, since this unpickles it.
        map_location: as for `torch.load`.

    Raises:
        pickle.UnpicklingError: the file holds a class that neither this environment nor fastquant
            has; the message names it.
        TypeError: the file holds no model.
    """
    this = sys.modules[__name__]
    model = torch.load(f, map_location, pickle_module=this, weights_only=False)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load_model takes a file that holds a model, this one holds a {type(model).__name__}: "
            "use torch.load"
        )
    return model
