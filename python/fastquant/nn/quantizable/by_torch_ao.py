"""Attention whose layers are torch.ao's quantized ones."""

from __future__ import annotations

from typing import Any

from ..._torch import ao
from . import attention

# What `convert` makes of attention with torch.ao's quantized layers, by the class that it was.
BY_TORCH_AO: dict[type, type] = {}

_theirs: Any = getattr(ao.nnq, "MultiheadAttention", None)
if _theirs is not None:

    class MultiheadAttention(attention.MultiheadAttention, _theirs):  # type: ignore[misc]
        """torch.ao's class, but for what it computes."""

        def _get_name(self) -> str:
            return "QuantizedMultiheadAttention"

        @classmethod
        def from_float(cls, other: Any) -> Any:
            """Refused: it is made of an observed module."""
            raise NotImplementedError("a quantized MultiheadAttention is made of an observed one")

        @classmethod
        def from_observed(cls, other: Any) -> Any:
            """What an observed module becomes."""
            made = super(attention.MultiheadAttention, cls).from_observed(other)
            # torch.ao deletes them, and layers around this one look whether there are any.
            made.in_proj_weight = made.in_proj_bias = None
            return made

    BY_TORCH_AO[attention.MultiheadAttention] = MultiheadAttention
