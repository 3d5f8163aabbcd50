"""Eager-mode quantization for PyTorch: the API of torch.ao.quantization on native kernels.

`fastquant` and its submodules stand in for `torch.ao.quantization` and its submodules of the
same names. `fastquant.functional` holds the same kernels as plain functions, `calibrate` runs
data through a prepared model, and `patch_torch_ao` helps code that cannot be edited.
"""

# ruff: noqa: F403, PLE0604 (the lists put together below are of strings)

from __future__ import annotations

from typing import TypeAlias

from . import (
    checkpoints,
    distributed,
    fake_quantize,
    functional,
    fuser_method_mappings,
    observer,
    qconfig,
    qconfig_mapping,
    quant_type,
    quantization_mappings,
    stubs,
)
from ._native.build_info import build_info
from ._torch.elsewhere import missing as __getattr__  # noqa: F401 (Python calls it)
from ._version import __version__

# Submodules first: where one shares its name with a function, as `quantize` does, the package
# has the function, as torch.ao.quantization does, and `from fastquant.quantize import …` works.
from .calibrate import Calibration, calibrate
from .fake_quantize import *
from .fuse_modules import *
from .fuse_modules import __all__ as _fuse_modules_names
from .fuser_method_mappings import *
from .merging import merge
from .observer import *
from .patching import Patch, introduce_to_torch_ao, patch_torch_ao
from .qconfig import *
from .qconfig_mapping import *
from .quant_type import *
from .quantization_mappings import *
from .quantize import *
from .quantize import __all__ as _quantize_names
from .quantize import default_eval_fn
from .set_qconfig import set_qconfig
from .stubs import *
from .utils import QuantizationError

ObserverOrFakeQuantize: TypeAlias = observer.ObserverBase | fake_quantize.FakeQuantizeBase

__all__ = [
    "Calibration",
    "ObserverOrFakeQuantize",
    "Patch",
    "QuantizationError",
    "__version__",
    "build_info",
    "calibrate",
    "checkpoints",
    "default_eval_fn",
    "distributed",
    "functional",
    "merge",
    "patch_torch_ao",
    "set_qconfig",
    *fake_quantize.__all__,
    *_fuse_modules_names,
    *fuser_method_mappings.__all__,
    *observer.__all__,
    *qconfig.__all__,
    *qconfig_mapping.__all__,
    *quant_type.__all__,
    *quantization_mappings.__all__,
    *_quantize_names,
    *stubs.__all__,
]

introduce_to_torch_ao()
