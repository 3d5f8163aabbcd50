"""Which module is swapped for which, by kind of quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ._torch import ao
from ._torch.ao import DeQuantStub as TorchDeQuantStub
from ._torch.ao import QuantStub as TorchQuantStub
from ._torch.ao import (
    has_quantized_modules,
    named,
    nniq,
    nniqd,
    nnq,
    nnqd,
    nnsq,
    nnsqd,
)
from ._torch.private import AttentionLinear
from .fake_quantize import (
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
)
from .nn import intrinsic as nni
from .nn import qat as nnqat
from .nn import quantizable
from .nn import quantized as native
from .nn.intrinsic import qat as nniqat
from .nn.intrinsic import quantized as native_fused
from .nn.intrinsic.quantized import dynamic as native_fused_dynamic
from .nn.qat import dynamic as nnqatd
from .nn.quantized import dynamic as native_dynamic
from .nn.quantized import reference
from .nn.quantized.reference import stubs as reference_stubs
from .stubs import DeQuantStub, QuantStub
from .utils import QuantizationError

__all__ = [
    "DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_DYNAMIC_SPARSE_QUANT_MODULE_MAPPINGS",
    "DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS",
    "DEFAULT_MODULE_TO_ACT_POST_PROCESS",
    "DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS",
    "DEFAULT_QAT_MODULE_MAPPINGS",
    "DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_STATIC_SPARSE_QUANT_MODULE_MAPPINGS",
    "get_default_compare_output_module_list",
    "get_default_dynamic_quant_module_mappings",
    "get_default_dynamic_sparse_quant_module_mappings",
    "get_default_float_to_quantized_operator_mappings",
    "get_default_native_dynamic_quant_module_mappings",
    "get_default_native_quant_module_mappings",
    "get_default_qat_module_mappings",
    "get_default_qconfig_propagation_list",
    "get_default_static_quant_module_mappings",
    "get_default_static_quant_reference_module_mappings",
    "get_default_static_sparse_quant_module_mappings",
    "get_dynamic_quant_module_class",
    "get_embedding_qat_module_mappings",
    "get_embedding_static_quant_module_mappings",
    "get_quantized_operator",
    "get_static_quant_module_class",
    "no_observer_set",
]

Mapping = dict[Callable[..., Any], Any]

# Also the attention that torch.ao's own prepare makes, which ours derives from where it exists.
_AnyAttention = getattr(ao.nnquantizable, "MultiheadAttention", quantizable.MultiheadAttention)


DEFAULT_BACKEND = "torch.ao" if has_quantized_modules else "native"
"""Whose quantized modules a conversion makes if not told: torch's, where it has any."""


def _same_names(source: Any, target: Any, names: str) -> Mapping:
    """`source.Name` to `target.Name` for each of the space-separated names that both have."""
    return {
        getattr(source, name): getattr(target, name)
        for name in names.split()
        if hasattr(source, name) and hasattr(target, name)
    }


_CONVOLUTIONS = "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"


def _stubs(target: Any) -> Mapping:
    """Every stub to what it becomes in `target`."""
    return {
        QuantStub: target.Quantize,
        DeQuantStub: target.DeQuantize,
        TorchQuantStub: target.Quantize,
        TorchDeQuantStub: target.DeQuantize,
    }


def _static(plain: Any, fused: Any) -> Mapping:
    """Float, fused or QAT module to quantized module.

    Args:
        plain: where quantized modules are.
        fused: where those are that quantized fused modules become.
    """
    return {
        **_stubs(plain),
        **_same_names(nn, plain, f"Linear {_CONVOLUTIONS}"),
        **_same_names(nn, plain, "BatchNorm2d BatchNorm3d GroupNorm LayerNorm"),
        **_same_names(nn, plain, "InstanceNorm1d InstanceNorm2d InstanceNorm3d"),
        **_same_names(nn, plain, "Dropout ELU Hardswish LeakyReLU ReLU6 PReLU"),
        AttentionLinear: plain.Linear,
        native.FloatFunctional: plain.QFunctional,
        **_same_names(nni, fused, "BNReLU2d BNReLU3d ConvReLU1d ConvReLU2d ConvReLU3d"),
        **_same_names(nni, fused, "ConvAdd2d ConvAddReLU2d LinearReLU LinearLeakyReLU LinearTanh"),
        **_same_names(nnqat, plain, "Linear Conv2d Conv3d"),
        **_same_names(nniqat, fused, "ConvReLU2d ConvReLU3d LinearReLU"),
        **{
            cls: getattr(target, f"Conv{suffix}")
            for target, suffixes in ((plain, "1d 2d 3d"), (fused, "ReLU1d ReLU2d ReLU3d"))
            for suffix in suffixes.split()
            for cls in named(nniqat, f"ConvBn{suffix}")
        },
        **dict.fromkeys(named(nniqat, "LinearBn1d"), plain.Linear),
    }


DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS: Mapping = {
    **(
        _stubs(nnq)
        if has_quantized_modules
        else {**_stubs(reference_stubs), native.FloatFunctional: reference_stubs.FloatFunctional}
    ),
    **_same_names(nn, reference, f"Linear {_CONVOLUTIONS} Embedding EmbeddingBag"),
    **_same_names(nn, reference, "GRUCell LSTMCell RNNCell LSTM"),
}
"""Float module to reference module: quantized weights, computation in floating point."""

DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS: Mapping = {
    **_static(native, native_fused),
    **_same_names(quantizable, native, "LSTM MultiheadAttention"),
    _AnyAttention: native.MultiheadAttention,
    **_same_names(nn, native, "Embedding EmbeddingBag"),
    **_same_names(nnqat, native, "Embedding EmbeddingBag"),
}
"""Float, fused or QAT module to quantized module of this package."""

DEFAULT_STATIC_QUANT_MODULE_MAPPINGS: Mapping = (
    {**_static(nnq, nniq), **_same_names(nn, nnq, "Embedding EmbeddingBag")}
    if has_quantized_modules
    else dict(DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS)
)
"""Float, fused or QAT module to quantized module, of torch's where it has any."""

DEFAULT_QAT_MODULE_MAPPINGS: Mapping = {
    **_same_names(nn, nnqat, "Conv2d Conv3d Linear"),
    AttentionLinear: nnqat.Linear,
    **_same_names(nni, nniqat, "ConvBn1d ConvBn2d ConvBn3d ConvReLU2d ConvReLU3d"),
    **_same_names(nni, nniqat, "ConvBnReLU1d ConvBnReLU2d ConvBnReLU3d LinearReLU LinearBn1d"),
}
"""Float or fused module to one that fake-quantizes its weight."""


def _dynamic(plain: Any, fused: Any, embeddings: Any) -> Mapping:
    """Float or fused module to module that quantizes its input at each call.

    Dynamic convolutions exist and are left out: those of torch.ao have a poor accuracy.

    Args:
        plain: where dynamic modules are.
        fused: where those are that fused modules become.
        embeddings: where quantized embeddings are.
    """
    return {
        **_same_names(nn, plain, "Linear LSTM GRU LSTMCell RNNCell GRUCell"),
        **{
            source: target
            for source in (AttentionLinear, *named(nnqatd, "Linear"))
            for target in named(plain, "Linear")
        },
        **_same_names(nni, fused, "LinearReLU"),
        **_same_names(nn, embeddings, "EmbeddingBag Embedding"),
    }


DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS: Mapping = _dynamic(
    native_dynamic, native_fused_dynamic, native
)
"""Float, fused or QAT module to one of this package that quantizes activations at each call."""

DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS: Mapping = (
    _dynamic(nnqd, nniqd, nnq)
    if has_quantized_modules
    else dict(DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS)
)
"""Float module to one with quantized weights that quantizes activations at each call."""

# Of torch's own, which goes with torch.ao.
DEFAULT_STATIC_SPARSE_QUANT_MODULE_MAPPINGS: Mapping = _same_names(nn, nnsq, "Linear")
DEFAULT_DYNAMIC_SPARSE_QUANT_MODULE_MAPPINGS: Mapping = _same_names(nn, nnsqd, "Linear")

DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS: dict[Callable[..., Any] | str, Any] = {
    getattr(F, name): getattr(torch.ops.quantized, name)
    for name in ("elu", "hardswish", "instance_norm", "layer_norm", "leaky_relu", "dropout")
    if hasattr(torch.ops.quantized, name)
}
"""Function of `torch.nn.functional` to quantized op."""

DEFAULT_MODULE_TO_ACT_POST_PROCESS: Mapping = {
    **dict.fromkeys(
        (nn.Hardsigmoid, nn.Sigmoid, nn.Softmax), default_fixed_qparams_range_0to1_fake_quant
    ),
    nn.Tanh: default_fixed_qparams_range_neg1to1_fake_quant,
}
"""Module whose output range is known to the fake-quantizer that it trains with."""

_INCLUDE_QCONFIG_PROPAGATE_LIST: set[Callable[..., Any]] = {nn.Sequential}

# Targets made from the weight alone, or from nothing: no observed output is needed.
_MADE_WITHOUT_OBSERVER = {
    *named(nnq, "DeQuantize Dropout Embedding EmbeddingBag"),
    *(native.DeQuantize, native.Dropout, native.Embedding, native.EmbeddingBag),
    *(native.LSTM, native.MultiheadAttention),
}
MADE_FROM_OBSERVER = {
    *DEFAULT_STATIC_QUANT_MODULE_MAPPINGS.values(),
    *DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS.values(),
    *DEFAULT_STATIC_SPARSE_QUANT_MODULE_MAPPINGS.values(),
} - _MADE_WITHOUT_OBSERVER


def no_observer_set() -> set[Any]:
    """Classes of modules that get no observer of their own: those inside them are observed."""
    return {quantizable.LSTM, _AnyAttention}


def get_default_static_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_STATIC_QUANT_MODULE_MAPPINGS`, which `convert` uses."""
    return dict(DEFAULT_STATIC_QUANT_MODULE_MAPPINGS)


def get_default_native_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS`: `convert` with `backend="native"`."""
    return dict(DEFAULT_NATIVE_QUANT_MODULE_MAPPINGS)


def get_default_static_quant_reference_module_mappings() -> Mapping:
    """A copy of `DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS`: `convert` with `is_reference`."""
    return dict(DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS)


def get_embedding_static_quant_module_mappings() -> Mapping:
    """`DEFAULT_STATIC_QUANT_MODULE_MAPPINGS`, and embeddings that were trained by QAT."""
    return {
        **DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
        **_same_names(nnqat, nnq, "EmbeddingBag Embedding"),
    }


def get_default_static_sparse_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_STATIC_SPARSE_QUANT_MODULE_MAPPINGS`; empty where torch has none."""
    return dict(DEFAULT_STATIC_SPARSE_QUANT_MODULE_MAPPINGS)


def get_default_qat_module_mappings() -> Mapping:
    """A copy of `DEFAULT_QAT_MODULE_MAPPINGS`, which `prepare_qat` uses."""
    return dict(DEFAULT_QAT_MODULE_MAPPINGS)


def get_embedding_qat_module_mappings() -> Mapping:
    """`DEFAULT_QAT_MODULE_MAPPINGS`, and embeddings."""
    return {
        **DEFAULT_QAT_MODULE_MAPPINGS,
        **_same_names(nn, nnqat, "EmbeddingBag Embedding"),
    }


def get_default_dynamic_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS`, which `quantize_dynamic` uses."""
    return dict(DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS)


def get_default_native_dynamic_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS`.

    `quantize_dynamic` with `backend="native"` uses it.
    """
    return dict(DEFAULT_NATIVE_DYNAMIC_QUANT_MODULE_MAPPINGS)


def get_default_dynamic_sparse_quant_module_mappings() -> Mapping:
    """A copy of `DEFAULT_DYNAMIC_SPARSE_QUANT_MODULE_MAPPINGS`; empty where torch has none."""
    return dict(DEFAULT_DYNAMIC_SPARSE_QUANT_MODULE_MAPPINGS)


def get_default_qconfig_propagation_list() -> set[Callable[..., Any]]:
    """The classes that `prepare` gives observers if their modules have a qconfig.

    These are all that the mappings of static, dynamic and QAT quantization swap, and `Sequential`.
    """
    return _keys(_all_mappings()) | _INCLUDE_QCONFIG_PROPAGATE_LIST


def get_default_compare_output_module_list() -> set[Callable[..., Any]]:
    """The classes, float and quantized, whose outputs a comparison of two models looks at.

    These are all that the mappings swap and swap for, and `Sequential`.
    """
    targets = {target for mapping in _all_mappings() for target in mapping.values()}
    return _keys(_all_mappings()) | targets | _INCLUDE_QCONFIG_PROPAGATE_LIST


def _all_mappings() -> tuple[Mapping, ...]:
    return (
        DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
        DEFAULT_QAT_MODULE_MAPPINGS,
        DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS,
    )


def _keys(mappings: Iterable[Mapping]) -> set[Callable[..., Any]]:
    return {source for mapping in mappings for source in mapping}


def get_default_float_to_quantized_operator_mappings() -> dict[Callable[..., Any] | str, Any]:
    """A copy of `DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS`."""
    return dict(DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS)


def _look_up(key: Any, what: str, default: dict[Any, Any], additional: dict[Any, Any]) -> Any:
    target = {**default, **additional}.get(key)
    if target is None:
        raise QuantizationError(f"{what} {key} has no quantized counterpart")
    return target


def get_static_quant_module_class(
    float_module_class: Callable[..., Any],
    additional_static_quant_mapping: Mapping | None = None,
    is_reference: bool = False,
) -> Any:
    """The statically quantized class that a float, fused or QAT one is swapped for.

    Args:
        float_module_class: the class to look up; subclasses are not found by their bases.
        additional_static_quant_mapping: entries that are looked up before the default ones.
        is_reference: whether to look in the mapping to reference modules.

    Raises:
        QuantizationError: there is none.
    """
    default = (
        DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS
        if is_reference
        else DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    )
    additional = additional_static_quant_mapping or {}
    return _look_up(float_module_class, "module class", default, additional)


def get_dynamic_quant_module_class(
    float_module_class: Callable[..., Any],
    additional_dynamic_quant_mapping: Mapping | None = None,
) -> Any:
    """The dynamically quantized class that a float, fused or QAT one is swapped for.

    Args:
        float_module_class: the class to look up; subclasses are not found by their bases.
        additional_dynamic_quant_mapping: entries that are looked up before the default ones.

    Raises:
        QuantizationError: there is none.
    """
    default = DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
    additional = additional_dynamic_quant_mapping or {}
    return _look_up(float_module_class, "module class", default, additional)


def get_quantized_operator(float_op: Callable[..., Any] | str) -> Any:
    """The op of `torch.ops.quantized` for a function of `torch.nn.functional`, such as `F.elu`.

    Raises:
        QuantizationError: there is none.
    """
    return _look_up(float_op, "operator", DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS, {})


def _get_special_act_post_process(module: nn.Module) -> Callable[..., Any] | None:
    """What makes the fake-quantizer of a module whose output range is known, None for others."""
    return DEFAULT_MODULE_TO_ACT_POST_PROCESS.get(type_before_parametrizations(module))


def _has_special_act_post_process(module: nn.Module) -> bool:
    """Whether the module's output range is known, and it is in training."""
    return module.training and type(module) in DEFAULT_MODULE_TO_ACT_POST_PROCESS
