"""Embeddings with weights of 8 or 4 bits: from indices to floating tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..._core.dtypes import QUINT4X2, QUINT8, UINT4, UINT8
from ..._core.errors import QuantizationError
from ..._native import ops
from ..._native.fast_calls import is_called_alone
from ..._native.packed_rows import from_bytes, in_bytes, pack_rows, unpack_rows
from ..._quantized import calls
from ...observer import default_float_qparams_observer
from ...quantized_tensor import PerChannelQuantizedTensor
from .. import qat
from .observed import NoNativeFormError, observe
from .scaled import NotScriptable
from .weighted import require_source

_Self = TypeVar("_Self", bound="Embedding")

_INDEX_DTYPES = (torch.int32, torch.int64)
_MODES = ("sum", "mean", "max")


class Embedding(NotScriptable):
    """`torch.nn.Embedding` with a weight of 8 or 4 bits, and a scale and zero point of each row.

    The zero points are floating, as `float_qparams_weight_only_qconfig` chooses them. The weight is
    kept once, in the form that the kernels read.

    Args:
        num_embeddings, embedding_dim: as torch.nn's.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: kept; they have no effect on a
            weight that is not trained.
        _weight: a quantized tensor, as `weight()` returns it; by default the module has zeros.
        dtype: torch.quint8 or torch.quint4x2, or the plain torch.uint8 or torch.uint4.
    """

    # The modules that `from_float` takes.
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, qat.Embedding)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Any = None,
        dtype: torch.dtype = QUINT8,
    ) -> None:
        super().__init__()
        if dtype not in (*UINT8, *UINT4):
            raise QuantizationError(f"dtype must be torch.quint8 or torch.quint4x2, got {dtype}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _row(padding_idx, num_embeddings)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self._bits = 8 if dtype in UINT8 else 4
        self.register_buffer("_packed_weight", None, persistent=False)
        if _weight is not None:
            self.set_weight(_weight)
        else:
            values = torch.zeros(num_embeddings, embedding_dim, dtype=torch.uint8)
            self._pack(values, torch.ones(num_embeddings), torch.zeros(num_embeddings))

    def _pack(self, values: Tensor, scales: Tensor, zero_points: Tensor) -> None:
        packed = pack_rows(values, scales, zero_points, self._bits)
        self._buffers["_packed_weight"] = packed

    def _unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._buffers["_packed_weight"]
        assert packed is not None
        return unpack_rows(packed, self.embedding_dim, self._bits)

    @property
    def dtype(self) -> torch.dtype:
        """torch.quint8 for 8 bits, torch.quint4x2 for 4, or the plain dtypes without these."""
        return QUINT8 if self._bits == 8 else QUINT4X2

    # --- accessors, as torch.ao has them ----------------------------------------------------

    def weight(self) -> PerChannelQuantizedTensor:
        """The weight as a quantized tensor, unpacked at each call: of uint8, also with 4 bits."""
        return PerChannelQuantizedTensor(*self._unpacked(), 0)

    def set_weight(self, w: Any) -> None:
        """Give the module a quantized weight of its shape.

        Args:
            w: what `weight()` of such a module returns, also of one of torch.ao's.

        Raises:
            QuantizationError: it has another shape, no scale of each row, or more bits.
        """
        shape = (self.num_embeddings, self.embedding_dim)
        self._pack(*unpacked_embedding(w, shape, self._bits))

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, "
            f"dtype={self.dtype}, qscheme={torch.per_channel_affine_float_qparams}"
        )

    # --- the call -----------------------------------------------------------------------------

    def forward(self, indices: Tensor) -> Tensor:
        weight = (self._buffers["_packed_weight"], self.embedding_dim, self._bits)
        found = calls.embedding(*weight, indices)  # type: ignore[arg-type]
        if found is not None:
            return found
        _check_indices(indices, self.num_embeddings)
        return ops.quantized_embedding(*weight, indices)  # type: ignore[no-any-return]

    # --- state --------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values, scales, zero_points = self._unpacked()
        destination[prefix + "weight"] = in_bytes(values, self._bits)
        destination[prefix + "weight_scale"] = scales
        destination[prefix + "weight_zero_point"] = zero_points

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("weight", "weight_scale", "weight_zero_point")]
        given = [state_dict.pop(name, None) for name in names]
        missing_keys += [n for n, value in zip(names, given, strict=True) if value is None]
        if all(value is not None for value in given):
            problems = self._problems(names, given)
            error_msgs += problems
            if not problems:
                assign = local_metadata.get("assign_to_params_buffers", False)
                device = given[0].device if assign else self.get_buffer("_packed_weight").device
                weight, scales, zero_points = (value.detach().to(device) for value in given)
                values = from_bytes(weight, self.embedding_dim, self._bits)
                self._pack(values, scales, zero_points)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problems(self, names: list[str], given: list[Any]) -> list[str]:
        """What is wrong with the tensors of a state."""
        bytes_of_row = (self.embedding_dim * self._bits + 7) // 8
        rows = [self.num_embeddings]
        shapes = [[*rows, bytes_of_row], rows, rows]
        for name, value, shape in zip(names, given, shapes, strict=True):
            if not isinstance(value, Tensor) or list(value.shape) != shape:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                return [f"{name} must have shape {shape}, got {found}"]
        weight, scales, zero_points = given
        if weight.dtype != torch.uint8:
            return [f"{names[0]} must be uint8, got {weight.dtype}"]
        if (
            not (scales > 0).all()
            or not scales.isfinite().all()
            or not zero_points.isfinite().all()
        ):
            return [f"{names[1]} must be positive and finite, and {names[2]} finite"]
        return []

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["_buffers"] = {**self._buffers, "_packed_weight": None}
        state["_weight"] = self._unpacked()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weight = state.pop("_weight")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(*weight)

    # --- made of other modules ----------------------------------------------------------------

    @classmethod
    def _like(cls: type[_Self], module: Any, dtype: torch.dtype) -> _Self:
        """A module with the settings of a float one, and a weight of zeros."""
        return cls(
            *(module.num_embeddings, module.embedding_dim, module.padding_idx, module.max_norm),
            *(module.norm_type, module.scale_grad_by_freq, module.sparse),
            dtype=dtype,
        )

    @classmethod
    def from_float(cls: type[_Self], mod: Any, use_precomputed_fake_quant: bool = False) -> _Self:
        """A quantized module of a float or a trained one, which stays as it is.

        Rows that are longer than `max_norm` are shortened, as the float module does it when they
        are looked up.

        Args:
            mod: has a `qconfig`, as `prepare` or a user sets it; None in it stands for
                `float_qparams_weight_only_qconfig`.
            use_precomputed_fake_quant: has no effect, as in torch.ao: the weight is observed again.

        Raises:
            TypeError: `mod` is none of the classes that this one stands for.
            QuantizationError: it has no `qconfig`, or one that is not for embeddings.
        """
        require_source(cls, mod)
        observer = _observer(mod)
        weight = mod.weight.detach().float()
        if mod.max_norm is not None:
            weight = torch.renorm(weight, mod.norm_type, 0, mod.max_norm)
        observe(observer, weight)
        scales, zero_points = (q.to(torch.float32) for q in observer.calculate_qparams())
        made = cls._like(mod, observer.dtype)
        # The product and the sum are rounded, as torch.quantize_per_channel does it.
        inverse = (1.0 / scales).unsqueeze(1)
        levels = (weight * inverse + zero_points.unsqueeze(1)).round().nan_to_num(0.0)
        values = levels.clamp(0, 2**made._bits - 1).to(torch.uint8)
        made._pack(values, scales, zero_points)
        return made

    @classmethod
    def from_reference(cls: type[_Self], ref_embedding: Any) -> _Self:
        """A quantized module of a reference module, which has a quantized weight."""
        made = cls._like(ref_embedding, ref_embedding.weight_dtype)
        made.set_weight(ref_embedding.get_quantized_weight())
        return made


class EmbeddingBag(Embedding):
    """`torch.nn.EmbeddingBag` with a weight of 8 or 4 bits, and a scale and zero point of each row.

    Args:
        num_embeddings, embedding_dim, mode, include_last_offset: as torch.nn's, but `mode` is "sum"
            by default, as torch.ao's is.
        max_norm, norm_type, scale_grad_by_freq, sparse: kept; they have no effect on a weight that
            is not trained.
        _weight: a quantized tensor, as `weight()` returns it; by default the module has zeros.
        dtype: torch.quint8 or torch.quint4x2, or the plain torch.uint8 or torch.uint4.
        padding_idx: an index that no bag counts.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.EmbeddingBag, qat.EmbeddingBag)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "sum",
        sparse: bool = False,
        _weight: Any = None,
        include_last_offset: bool = False,
        dtype: torch.dtype = QUINT8,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type),
            *(scale_grad_by_freq, sparse, _weight, dtype),
        )
        if mode not in _MODES:
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
        self.mode = mode
        self.pruned_weights = False
        self.include_last_offset = include_last_offset

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        compressed_indices_mapping: Tensor | None = None,
    ) -> Tensor:
        """Bags of embeddings.

        Args:
            indices, offsets, per_sample_weights: as torch.nn's.
            compressed_indices_mapping: where `pruned_weights` is True: for each index, the row that
                it stands for, or -1 for a row of zeros that the weight does not have.
        """
        mapping = compressed_indices_mapping if self.pruned_weights else None
        if self.pruned_weights and mapping is None:
            raise ValueError(
                "compressed_indices_mapping must be given where pruned_weights is True"
            )
        weight = (self._buffers["_packed_weight"], self.embedding_dim, self._bits)
        settings = (_MODES.index(self.mode), self.include_last_offset, self.padding_idx)
        bags = calls.embedding_bag(
            *weight,  # type: ignore[arg-type]
            *(indices, offsets, per_sample_weights, mapping),
            *settings,
        )
        if bags is not None:
            return bags
        self._check_bags(indices, offsets, per_sample_weights, mapping)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(torch.float32)
        return ops.quantized_embedding_bag(  # type: ignore[no-any-return]
            *weight, indices, offsets, per_sample_weights, mapping, *settings
        )

    def _check_bags(
        self,
        indices: Any,
        offsets: Any,
        per_sample_weights: Any,
        mapping: Any,
    ) -> None:
        rows: int | None = self.num_embeddings
        if mapping is not None:
            _check_integers("compressed_indices_mapping", mapping)
            rows = None if mapping.numel() == 1 else mapping.numel()
        _check_indices(indices, rows)
        if indices.dim() not in (1, 2):
            raise ValueError(f"indices must have 1 or 2 dimensions, got {indices.dim()}")
        if (offsets is None) == (indices.dim() == 1):
            raise ValueError(
                "offsets must be given for indices of 1 dimension, and must be None for indices of "
                f"2, whose rows are bags; got {'none' if offsets is None else 'some'} for indices "
                f"of {indices.dim()}"
            )
        if offsets is not None:
            _check_offsets(offsets, indices.numel(), self.include_last_offset)
        if per_sample_weights is None:
            return
        if self.mode != "sum":
            raise NotImplementedError(
                f"per_sample_weights need mode='sum', and the mode is {self.mode!r}"
            )
        if not isinstance(per_sample_weights, Tensor) or per_sample_weights.shape != indices.shape:
            raise ValueError(
                f"per_sample_weights must be a tensor of shape {list(indices.shape)}, as indices "
                f"are, got {_described(per_sample_weights)}"
            )

    @classmethod
    def _like(cls: type[_Self], module: Any, dtype: torch.dtype) -> _Self:
        return cls(
            *(module.num_embeddings, module.embedding_dim),
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            mode=module.mode,  # type: ignore[call-arg]
            sparse=module.sparse,
            include_last_offset=module.include_last_offset,
            dtype=dtype,
            padding_idx=getattr(module, "padding_idx", None),
        )


def _row(padding_idx: int | None, rows: int) -> int | None:
    """The row that `padding_idx` names, which may count from the end."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx must be a row of {rows}, got {padding_idx}")
    return padding_idx % rows


def _observer(module: Any) -> Any:
    """What observes the module's weight; it must be for embeddings."""
    observer = getattr(module, "weight_fake_quant", None)
    if observer is None:
        if not hasattr(module, "qconfig"):
            raise QuantizationError(
                "it has no qconfig: set fastquant.float_qparams_weight_only_qconfig"
            )
        make = getattr(module.qconfig, "weight", None) or default_float_qparams_observer
        observer = make()
    scheme = torch.per_channel_affine_float_qparams
    if observer.dtype not in (*UINT8, *UINT4) or observer.qscheme != scheme:
        raise NoNativeFormError(
            "embeddings are quantized by float_qparams_weight_only_qconfig, or its 4-bit form; the "
            f"observer of this weight is for {observer.dtype} and {observer.qscheme}"
        )
    return observer


def unpacked_embedding(
    weight: Any, shape: tuple[int, int], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The uint8 values, fp32 scales and fp32 zero points of a quantized tensor.

    Args:
        weight: one of this package's, or of torch's quantized dtypes.
        shape: that it must have.
        bits: the most that its values may have.
    """
    if not getattr(weight, "is_quantized", False):
        raise QuantizationError(
            f"the weight must be a quantized tensor, as weight() returns it, got "
            f"{type(weight).__name__}"
        )
    if tuple(weight.shape) != shape:
        raise QuantizationError(
            f"the weight must have shape {list(shape)}, got {list(weight.shape)}"
        )
    per_tensor = (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if weight.qscheme() in per_tensor or weight.q_per_channel_axis() != 0:
        raise QuantizationError("the weight must have a scale and a zero point for each row")
    values = weight.int_repr()
    if values.dtype != torch.uint8:
        raise QuantizationError(f"the weight must be uint8, got {values.dtype}")
    if weight.dtype == QUINT4X2:
        values = from_bytes(values.reshape(1, -1), weight.numel(), 4).reshape(shape)
    if bits == 4 and (values > 15).any():
        raise QuantizationError("the weight must have 4 bits, as the module's dtype says")
    scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return values, scales.to(torch.float32), zero_points.to(torch.float32)


# --- errors ---------------------------------------------------------------------------------------


def _described(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_integers(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _INDEX_DTYPES:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of torch.int32 or torch.int64, got {found}")


def _check_indices(indices: Any, rows: int | None) -> None:
    """Raise unless these are indices below `rows`; where a mode may hide values, the op does."""
    _check_integers("indices", indices)
    if not is_called_alone() or rows is None or indices.numel() == 0 or indices.is_meta:
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(f"indices must be from 0 to {rows - 1}, got {low if low < 0 else high}")


def _check_offsets(offsets: Any, indices: int, include_last_offset: bool) -> None:
    _check_integers("offsets", offsets)
    if offsets.dim() != 1:
        raise ValueError(f"offsets must have 1 dimension, got shape {list(offsets.shape)}")
    if include_last_offset and offsets.numel() == 0:
        raise ValueError("with include_last_offset, offsets must have an element, the last offset")
    if not is_called_alone() or offsets.numel() == 0 or offsets.is_meta:
        return
    if int(offsets[0]) != 0 or (offsets.diff() < 0).any() or int(offsets[-1]) > indices:
        raise ValueError(
            f"offsets must begin at 0, ascend, and end at most at {indices}, the number of "
            f"indices; got {offsets.tolist()}"
        )
