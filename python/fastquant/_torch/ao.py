"""The only module that imports `torch.ao`: everything the package shares with it."""

from __future__ import annotations

import importlib
import re
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .private import required

with required():
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
    from torch.ao.nn.quantized.modules.utils import _quantize_weight as quantize_weight
    from torch.ao.quantization import observer as _observer
    from torch.ao.quantization import quantization_mappings as mappings
    from torch.ao.quantization.fake_quantize import _is_fake_quant_script_module
    from torch.ao.quantization.observer import (
        AffineQuantizedObserverBase,
        Granularity,
        MappingType,
        PerAxis,
        PerBlock,
        PerGroup,
        PerRow,
        PerTensor,
        PerToken,
        TorchAODType,
        ZeroPointDomain,
        _is_observer_script_module,
        _is_per_channel_script_obs_instance,
        get_block_size,
    )
    from torch.ao.quantization.qconfig_mapping import QConfigMapping
    from torch.ao.quantization.quantize import (
        _observer_forward_hook as observer_forward_hook,
    )
    from torch.ao.quantization.quantize import (
        _observer_forward_pre_hook as observer_forward_pre_hook,
    )
    from torch.ao.quantization.stubs import DeQuantStub, QuantStub, QuantWrapper
    from torch.ao.quantization.utils import MatchAllNode, NodePattern, Pattern

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
    "PlaceholderObserver",
    "QConfigMapping",
    "QuantStub",
    "QuantWrapper",
    "TorchAODType",
    "ZeroPointDomain",
    "_is_fake_quant_script_module",
    "_is_observer_script_module",
    "_is_per_channel_script_obs_instance",
    "get_block_size",
    "mappings",
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
    "quantize_weight",
    "quiet",
]

PlaceholderObserver = _observer.PlaceholderObserver

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
    """torch.ao.quantization, or its submodule of this name."""
    return importlib.import_module(f"torch.ao.quantization.{name}".rstrip("."))
