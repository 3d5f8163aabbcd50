"""The only module that imports `torch.ao`: everything the package shares with it.

Importing it never fails. A package of torch.ao.nn that this torch lacks is an empty namespace here,
and what else it lacks is fastquant's own, from `stand_ins`.
"""

from __future__ import annotations

import importlib
import re
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from . import stand_ins
from .private import NAMES

__all__ = [
    "AffineQuantizedObserverBase",
    "DeQuantStub",
    "Granularity",
    "MappingType",
    "MatchAllNode",
    "NodePattern",
    "Pattern",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "QConfigMapping",
    "QuantStub",
    "QuantWrapper",
    "TorchAODType",
    "ZeroPointDomain",
    "get_block_size",
    "has_quantized_modules",
    "mappings",
    "named",
    "namespace",
    "nni",
    "nniq",
    "nniqat",
    "nniqd",
    "nnq",
    "nnqat",
    "nnqatd",
    "nnqd",
    "nnqr",
    "nnquantizable",
    "nnsq",
    "nnsqd",
    "observer_forward_hook",
    "observer_forward_pre_hook",
    "quiet",
]

# --- torch.ao.nn ----------------------------------------------------------------------------


def _module(path: str) -> Any:
    """The module torch.ao.<path>; an empty namespace where this torch has none."""
    NAMES.append(f"ao.{path}")
    try:
        return importlib.import_module(f"torch.ao.{path}")
    # A torch that is losing torch.ao may have modules there that need what is gone already.
    except (ImportError, AttributeError):
        return types.SimpleNamespace()


if TYPE_CHECKING:
    import torch.ao.nn.intrinsic as nni
    import torch.ao.nn.intrinsic.qat as nniqat
    import torch.ao.nn.intrinsic.quantized as nniq
    import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
    import torch.ao.nn.qat as nnqat
    import torch.ao.nn.qat.dynamic as nnqatd
    import torch.ao.nn.quantizable as nnquantizable
    import torch.ao.nn.quantized as nnq
    import torch.ao.nn.quantized.dynamic as nnqd
    import torch.ao.nn.quantized.reference as nnqr
    import torch.ao.nn.sparse.quantized as nnsq
    import torch.ao.nn.sparse.quantized.dynamic as nnsqd
else:
    nni = _module("nn.intrinsic")
    nniqat = _module("nn.intrinsic.qat")
    nniq = _module("nn.intrinsic.quantized")
    nniqd = _module("nn.intrinsic.quantized.dynamic")
    nnqat = _module("nn.qat")
    nnqatd = _module("nn.qat.dynamic")
    nnquantizable = _module("nn.quantizable")
    nnq = _module("nn.quantized")
    nnqd = _module("nn.quantized.dynamic")
    nnqr = _module("nn.quantized.reference")
    nnsq = _module("nn.sparse.quantized")
    nnsqd = _module("nn.sparse.quantized.dynamic")


def named(package: Any, names: str) -> tuple[Any, ...]:
    """`package.Name` for each of the space-separated names, left out where there is none."""
    return tuple(getattr(package, name) for name in names.split() if hasattr(package, name))


has_quantized_modules = all(
    hasattr(owner, name)
    for owner, name in (
        *((nnq, "Linear"), (nnq, "Quantize"), (nniq, "ConvReLU2d")),
        *((torch, "qint8"), (torch, "quantize_per_tensor")),
    )
)
"""Whether torch has quantized modules, and tensors for them: what backend="torch.ao" needs."""

# --- torch.ao.quantization ------------------------------------------------------------------

mappings = _module("quantization.quantization_mappings")

if TYPE_CHECKING:
    from .stand_ins import (
        AffineQuantizedObserverBase,
        DeQuantStub,
        Granularity,
        MappingType,
        MatchAllNode,
        NodePattern,
        Pattern,
        PerAxis,
        PerBlock,
        PerGroup,
        PerRow,
        PerTensor,
        PerToken,
        QConfigMapping,
        QuantStub,
        QuantWrapper,
        TorchAODType,
        ZeroPointDomain,
        _observer_forward_hook,
        _observer_forward_pre_hook,
        get_block_size,
    )
else:
    # The names of a group refer to each other, so all of them are torch.ao's or none.
    _GROUPS = (
        ("stubs", "DeQuantStub QuantStub QuantWrapper"),
        (
            "observer",
            "AffineQuantizedObserverBase Granularity MappingType PerAxis PerBlock PerGroup PerRow "
            "PerTensor PerToken TorchAODType ZeroPointDomain get_block_size",
        ),
        ("qconfig_mapping", "QConfigMapping"),
        ("quantize", "_observer_forward_hook"),
        ("quantize", "_observer_forward_pre_hook"),
        ("utils", "MatchAllNode NodePattern Pattern"),
    )
    for _name, _names in _GROUPS:
        NAMES += [f"ao.quantization.{_name}.{name}" for name in _names.split()]
        _theirs = vars(_module(f"quantization.{_name}"))
        _own = vars(stand_ins)
        _source = _theirs if _theirs.keys() >= set(_names.split()) else _own
        globals().update({name: _source[name] for name in _names.split()})

observer_forward_hook = _observer_forward_hook
observer_forward_pre_hook = _observer_forward_pre_hook

# --- warnings -------------------------------------------------------------------------------

_REPEATED_WARNINGS = (
    # From calls of torch.ao.quantization inside torch.ao.nn (LSTM, MultiheadAttention).
    ("torch.ao.quantization is deprecated", DeprecationWarning),
    # From every quantized tensor that a swapped-in module creates.
    ("torch.quantize_per_tensor, torch.quantize_per_channel and other", UserWarning),
    # From every construction of a torch.ao observer that a user's QConfig names.
    ("Please use quant_min and quant_max to specify the range", UserWarning),
    # One for each layer; fastquant's convert names all these layers in one warning instead.
    ("must run observer before calling calculate_qparams", UserWarning),
    # fastquant's own, from a convert inside a convert under `patch_torch_ao`.
    ("convert: the observers of these layers have seen no data", UserWarning),
    ("convert: the model has no QuantStub", UserWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of torch about calls that fastquant makes and the user does not."""
    with warnings.catch_warnings():
        for message, category in _REPEATED_WARNINGS:
            warnings.filterwarnings("ignore", re.escape(message), category)
        yield


# --- namespaces -----------------------------------------------------------------------------


def namespace(name: str = "") -> types.ModuleType:
    """torch.ao.quantization, or its submodule of this name.

    Raises:
        ImportError: this torch has none.
    """
    return importlib.import_module(f"torch.ao.quantization.{name}".rstrip("."))


def register_decomposed_ops() -> None:
    """Have torch.ao register the ops of `torch.ops.quantized_decomposed`.

    Raises:
        ImportError: this torch has none.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")
