"""Configs by module type and function, for FX graph mode with fastquant's observers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._torch.ao import QConfigMapping
from .fake_quantize import FixedQParamsFakeQuantize, default_weight_fake_quant
from .observer import (
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_placeholder_observer,
    default_weight_observer,
)
from .qconfig import (
    QConfig,
    default_quint8_weight_qconfig,
    default_reuse_input_qconfig,
    default_symmetric_qnnpack_qat_qconfig,
    default_symmetric_qnnpack_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
)

__all__ = ["QConfigMapping", "get_default_qat_qconfig_mapping", "get_default_qconfig_mapping"]

# FX graph mode tells a mapping by torch.ao's class, so the class is torch.ao's.

_OPS_BY_FIXED_RANGE: dict[Any, tuple[Any, ...]] = {
    default_fixed_qparams_range_0to1_observer: (
        nn.Hardsigmoid,
        F.hardsigmoid,
        "hardsigmoid",
        "hardsigmoid_",
        nn.Sigmoid,
        torch.sigmoid,
        "sigmoid",
        "sigmoid_",
        nn.Softmax,
    ),
    default_fixed_qparams_range_neg1to1_observer: (nn.Tanh, torch.tanh, "tanh", "tanh_"),
}
_FIXED_QPARAMS_OP_TO_OBSERVER = {
    op: observer for observer, ops in _OPS_BY_FIXED_RANGE.items() for op in ops
}

_TRANSPOSED_CONVOLUTIONS = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def _get_default_qconfig_mapping(is_qat: bool, backend: str, version: int) -> QConfigMapping:
    qconfig = (get_default_qat_qconfig if is_qat else get_default_qconfig)(backend, version)
    default_weight = default_weight_fake_quant if is_qat else default_weight_observer
    # FBGEMM has no per-channel transposed convolution.
    per_tensor = backend in ("fbgemm", "x86")
    transposed = QConfig(qconfig.activation, default_weight) if per_tensor else qconfig
    # Layer norm keeps its weight floating.
    layer_norm = QConfig(qconfig.activation, default_placeholder_observer)

    mapping: Any = QConfigMapping()
    mapping.set_global(qconfig)
    mapping.set_object_type("reshape", default_reuse_input_qconfig)
    for op in _TRANSPOSED_CONVOLUTIONS:
        mapping.set_object_type(op, transposed)
    mapping.set_object_type(F.layer_norm, layer_norm)
    mapping.set_object_type(nn.LayerNorm, layer_norm)
    mapping.set_object_type(nn.PReLU, default_quint8_weight_qconfig)
    for observer, ops in _OPS_BY_FIXED_RANGE.items():
        activation = FixedQParamsFakeQuantize.with_args(observer=observer) if is_qat else observer
        fixed = QConfig(activation, default_weight)
        for op in ops:
            mapping.set_object_type(op, fixed)
    result: QConfigMapping = mapping
    return result


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """The static configs for a backend, for `prepare_fx`.

    Args:
        backend: `x86`, `fbgemm`, `qnnpack` or `onednn`.
        version: 0.

    Raises:
        QuantizationError: unknown backend or version.
    """
    return _get_default_qconfig_mapping(False, backend, version)


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """The training configs for a backend, for `prepare_qat_fx`.

    Args:
        backend: `x86`, `fbgemm`, `qnnpack` or `onednn`.
        version: 0 or 1, as for `get_default_qat_qconfig`.

    Raises:
        QuantizationError: unknown backend or version.
    """
    return _get_default_qconfig_mapping(True, backend, version)


def _with_default(mapping: Any, qconfig: QConfig) -> QConfigMapping:
    mapping.set_global(qconfig)
    for op in list(mapping.object_type_qconfigs):
        if op not in _FIXED_QPARAMS_OP_TO_OBSERVER:
            mapping.set_object_type(op, qconfig)
    result: QConfigMapping = mapping
    return result


def _get_symmetric_qnnpack_qconfig_mapping() -> QConfigMapping:
    return _with_default(get_default_qconfig_mapping("qnnpack"), default_symmetric_qnnpack_qconfig)


def _get_symmetric_qnnpack_qat_qconfig_mapping() -> QConfigMapping:
    return _with_default(
        get_default_qat_qconfig_mapping("qnnpack"), default_symmetric_qnnpack_qat_qconfig
    )
