"""What fastquant takes from torch.ao.quantization, in its own words: used where torch.ao has none.

Where torch.ao exists, `ao` has its classes, because torch.ao's own functions tell them by identity.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._core.factories import _with_args

# --- stubs ----------------------------------------------------------------------------------


class _Stub(nn.Module):
    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        return x


class QuantStub(_Stub):
    """Where tensors become quantized."""


class DeQuantStub(_Stub):
    """Where tensors become floating again."""


class QuantWrapper(nn.Module):
    """A module between a `QuantStub` and a `DeQuantStub`; fastquant's own derives from it."""

    quant: QuantStub
    dequant: DeQuantStub
    module: nn.Module


# --- hooks ----------------------------------------------------------------------------------


def _observer_forward_hook(self: Any, input: Any, output: Any) -> Any:
    """Forward hook that calls the observer on the output."""
    return self.activation_post_process(output)


def _observer_forward_pre_hook(self: Any, input: Any) -> Any:
    """Forward pre-hook that calls the observer on the first input."""
    return self.activation_post_process(input[0])


# --- granularity ----------------------------------------------------------------------------


class MappingType(Enum):
    """Whether quantized values stand for a symmetric range or for any range."""

    SYMMETRIC = auto()
    SYMMETRIC_NO_CLIPPING_ERR = auto()
    ASYMMETRIC = auto()


class ZeroPointDomain(Enum):
    """Whether zero points are quantized values, real values, or absent."""

    INT = auto()
    FLOAT = auto()
    NONE = auto()


class TorchAODType(Enum):
    """Integers of less than 8 bits, for a torch that has no such dtypes."""

    INT1 = auto()
    INT2 = auto()
    INT3 = auto()
    INT4 = auto()
    INT5 = auto()
    INT6 = auto()
    INT7 = auto()


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor have a scale and a zero point in common."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """All elements."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """Those with the same index along an axis."""

    axis: int


@dataclass(frozen=True)
class PerGroup(Granularity):
    """So many neighbours within a row."""

    group_size: int


@dataclass(frozen=True)
class PerBlock(Granularity):
    """Those of a block of this size."""

    block_size: tuple[int, ...]


class PerRow(Granularity):
    """Those of a row, which runs along the last axis."""


class PerToken(Granularity):
    """The same as a row: the last axis runs within a token."""


def get_block_size(input_shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The size of the blocks that have a scale and a zero point in common.

    Args:
        input_shape: the tensor's shape.
        granularity: an instance, such as `PerAxis(0)`.
    """
    if not isinstance(granularity, Granularity):
        # torch.ao asserts this.
        raise AssertionError(
            f"granularity must be an instance of Granularity, such as PerAxis(0), got {granularity}"
        )
    if isinstance(granularity, PerTensor):
        return input_shape
    if isinstance(granularity, PerAxis):
        block_size = list(input_shape)
        block_size[granularity.axis] = 1
        return tuple(block_size)
    if isinstance(granularity, PerRow | PerToken):
        return (*(1 for _ in input_shape[:-1]), input_shape[-1])
    if isinstance(granularity, PerGroup):
        if len(input_shape) != 2:
            raise AssertionError(
                f"PerGroup needs a tensor of two dimensions, got shape {tuple(input_shape)}"
            )
        return (1, granularity.group_size)
    raise ValueError(
        f"Unsupported Granularity: {granularity}; accepted: PerTensor, PerAxis, PerRow, PerGroup, "
        "PerToken"
    )


class AffineQuantizedObserverBase(ABC, nn.Module):
    """Base of observers by granularity, for quantizers of exported programs.

    Args:
        mapping_type: symmetric or not.
        target_dtype: of the quantized values.
        granularity: which elements have a scale and a zero point in common.
        quant_min: least quantized value.
        quant_max: largest quantized value.
        eps: smallest scale.
        scale_dtype: of scales.
        zero_point_dtype: of zero points.
        preserve_zero: whether 0 must be a quantized value exactly.
        zero_point_domain: what zero points are.
        kwargs: ignored.
    """

    with_args = classmethod(_with_args)

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | None = ZeroPointDomain.INT,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if granularity is None:
            raise AssertionError("granularity is None")
        self.mapping_type = mapping_type
        self.target_dtype = target_dtype
        self.granularity = granularity
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.eps = eps
        self.scale_dtype = scale_dtype
        self.zero_point_dtype = zero_point_dtype
        self.preserve_zero = preserve_zero
        self.zero_point_domain = zero_point_domain
        # A subclass's forward sets these.
        self.block_size: tuple[int, ...] | None = None
        self.original_dtype: torch.dtype | None = None

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Observe a tensor, and return it as it is."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of what was observed."""


# --- scripted modules -----------------------------------------------------------------------


def _scripted_class(module: Any) -> str:
    """The path of the class that a scripted module was made from; empty for other modules."""
    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    try:
        self: Any = next(module.graph.inputs())
    except (AttributeError, RuntimeError):  # it has no forward
        return ""
    # Such as __torch__.torch.ao.quantization.observer.___torch_mangle_2.MinMaxObserver
    return re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", self.type().str())


def _is_observer_script_module(mod: Any, obs_type_name: str) -> bool:
    """Whether a scripted module was made from a class whose path holds this text."""
    return obs_type_name in _scripted_class(mod)


def _is_per_channel_script_obs_instance(module: Any) -> bool:
    """Whether a scripted module was made from one of torch.ao's observers of channels' ranges."""
    return any(
        _is_observer_script_module(module, f"quantization.observer.{name}")
        for name in ("PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver")
    )


def _is_fake_quant_script_module(module: Any) -> bool:
    """Whether a scripted module was made from one of torch.ao's fake-quantizers."""
    return _scripted_class(module) in (
        "torch.ao.quantization.fake_quantize.FakeQuantize",
        "torch.ao.quantization.fake_quantize.FusedMovingAvgObsFakeQuantize",
    )


# --- FX graph mode --------------------------------------------------------------------------

Pattern: TypeAlias = Any
"""Module types and functions to fuse, the last one first."""

NodePattern: TypeAlias = Any
"""The nodes of a graph that match a `Pattern`."""


class MatchAllNode:
    """In a pattern: anything."""


class QConfigMapping:
    """Which config what gets: by default, by type or function, and by name.

    Each setter returns the mapping. Later ones go first, in the order of the attributes.

    Attributes:
        global_qconfig: for all that has no other.
        object_type_qconfigs: by module type, function, or name of a method.
        module_name_regex_qconfigs: by regular expression for names of modules.
        module_name_qconfigs: by name of a module.
        module_name_object_type_order_qconfigs: by name of a module, type, and how many of the type
            come before.
    """

    def __init__(self) -> None:
        self.global_qconfig: Any = None
        self.object_type_qconfigs: OrderedDict[Any, Any] = OrderedDict()
        self.module_name_regex_qconfigs: OrderedDict[str, Any] = OrderedDict()
        self.module_name_qconfigs: OrderedDict[str, Any] = OrderedDict()
        self.module_name_object_type_order_qconfigs: OrderedDict[Any, Any] = OrderedDict()

    def set_global(self, global_qconfig: Any) -> QConfigMapping:
        """Set the config of all that has no other."""
        self.global_qconfig = global_qconfig
        return self

    def set_object_type(self, object_type: Any, qconfig: Any) -> QConfigMapping:
        """Set the config of a module type, a function, or a method by its name."""
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: Any) -> QConfigMapping:
        """Set the config of modules whose names match; the expression set first goes first."""
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: Any) -> QConfigMapping:
        """Set the config of the module of this name."""
        self.module_name_qconfigs[module_name] = qconfig
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: Any, index: int, qconfig: Any
    ) -> QConfigMapping:
        """Set the config of the `index`-th op of a type in the module of this name."""
        self.module_name_object_type_order_qconfigs[module_name, object_type, index] = qconfig
        return self

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for name, value in vars(self).items():
            entries = isinstance(value, OrderedDict) and value
            lines += [
                f" {name}",
                *([f"  {k}: {v}" for k, v in value.items()] if entries else [f"  {value}"]),
            ]
        return "\n".join([*lines, ")"])

    def to_dict(self) -> dict[str, Any]:
        """The mapping as a dictionary: the global config at "", the others as lists of tuples."""
        return {
            "": self.global_qconfig,
            **{
                style: [(*(k if style == _ORDER else (k,)), v) for k, v in own.items()]
                for style, own in self._styles().items()
            },
        }

    @classmethod
    def from_dict(cls, qconfig_dict: Mapping[str, Any]) -> QConfigMapping:
        """The mapping for what `to_dict` gives; every key may be missing."""
        made = cls()
        made.global_qconfig = qconfig_dict.get("")
        for style, own in made._styles().items():
            for *key, qconfig in qconfig_dict.get(style, ()):
                own[tuple(key) if style == _ORDER else key[0]] = qconfig
        return made

    def _styles(self) -> dict[str, OrderedDict[Any, Any]]:
        return {
            "object_type": self.object_type_qconfigs,
            "module_name_regex": self.module_name_regex_qconfigs,
            "module_name": self.module_name_qconfigs,
            _ORDER: self.module_name_object_type_order_qconfigs,
        }


_ORDER = "module_name_object_type_order"

# Pickles name the public modules, which have torch.ao's of the same name where there are any.
for _module, _names in {
    "fastquant.observer": (
        *(AffineQuantizedObserverBase, Granularity, MappingType, PerAxis, PerBlock, PerGroup),
        *(PerRow, PerTensor, PerToken, TorchAODType, ZeroPointDomain),
    ),
    "fastquant.qconfig_mapping": (QConfigMapping,),
    "fastquant.quantize": (_observer_forward_hook, _observer_forward_pre_hook),
    "fastquant.utils": (MatchAllNode,),
}.items():
    for _name in _names:
        _name.__module__ = _module
