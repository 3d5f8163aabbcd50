"""Multi-head attention made of linear layers that can be observed and quantized.

It derives from torch.ao's where that exists, so that users' code and torch.ao's recognise it, and
computes everything by itself. Models get it where torch.ao has none, and where torch.ao's is wrong:
with `batch_first=True`, that reads the results, which are ordered by head and then by position, as
ordered by position and then by head, and so computes something else if there are several heads.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ..._core.errors import QuantizationError
from ..._torch import ao
from ...quantized_tensor import floating
from ..float_functional import FloatFunctional
from .preparing import with_observers

if TYPE_CHECKING:
    _Base = nn.MultiheadAttention
else:
    _Base = getattr(ao.nnquantizable, "MultiheadAttention", nn.MultiheadAttention)
_PROJECTIONS = ("linear_Q", "linear_K", "linear_V")


class MultiheadAttention(_Base):
    """`torch.nn.MultiheadAttention` made of parts; the arguments are torch.nn's."""

    _FLOAT_MODULE = nn.MultiheadAttention

    bias_k: Any
    bias_v: Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.MultiheadAttention.__init__(
            self,
            *(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim),
            *(batch_first, device, dtype),
        )

        def layer(inputs: int) -> Any:
            return nn.Linear(inputs, embed_dim, bias=bias, device=device, dtype=dtype)

        self.linear_Q = layer(embed_dim)
        self.linear_K = layer(self.kdim)
        self.linear_V = layer(self.vdim)
        self.out_proj = layer(embed_dim)
        self.q_scaling_product = FloatFunctional()
        # torch.ao's convert, which makes its quantized attention, knows stubs by the very class.
        self.quant_attn_output = ao.QuantStub()
        self.quant_attn_output_weights = ao.QuantStub()
        self.dequant_q = ao.DeQuantStub()
        self.dequant_k = ao.DeQuantStub()
        self.dequant_v = ao.DeQuantStub()

    def _get_name(self) -> str:
        return "QuantizableMultiheadAttention"

    @classmethod
    def from_float(cls, other: Any) -> Any:
        """An observed module with the weights of a `torch.nn.MultiheadAttention`, in its mode.

        In training mode its layers fake-quantize their weights. In eval mode it is torch.ao's
        where that exists and computes the same, without `batch_first`: torch.ao's `convert` knows
        its own class only, which cannot be trained so.
        """
        if type(other) is not cls._FLOAT_MODULE:
            raise QuantizationError(
                "MultiheadAttention.from_float takes a torch.nn.MultiheadAttention, got "
                f"{type(other).__name__}"
            )
        if not hasattr(other, "qconfig"):
            raise QuantizationError("MultiheadAttention must have a qconfig to be observed")
        if _Base is not nn.MultiheadAttention and not (other.batch_first or other.training):
            theirs: Any = _Base
            return theirs.from_float(other)
        made = cls(
            *(other.embed_dim, other.num_heads, other.dropout, other.in_proj_bias is not None),
            *(other.bias_k is not None, other.add_zero_attn, other.kdim, other.vdim),
            other.batch_first,
        )
        made.qconfig = other.qconfig
        for name, parameter in other.named_parameters(recurse=False):
            # But for `bias_k` and `bias_v` these are not computed with, as torch.ao's are not, but
            # part of a state. The layers' weights are views of them, so training trains both; what
            # waits for the gradients of all parameters, as DistributedDataParallel does, must not
            # wait for theirs.
            only_kept = other.training and name not in ("bias_k", "bias_v")
            kept = Parameter(parameter.detach(), requires_grad=False) if only_kept else parameter
            setattr(made, name, kept)
        made.out_proj.weight, made.out_proj.bias = other.out_proj.weight, other.out_proj.bias
        if other.in_proj_weight is not None:
            weights = other.in_proj_weight.chunk(3)
        else:
            weights = (other.q_proj_weight, other.k_proj_weight, other.v_proj_weight)
        biases = (None,) * 3 if other.in_proj_bias is None else other.in_proj_bias.chunk(3)
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            layer = getattr(made, name)
            layer.weight = Parameter(weight.detach(), weight.requires_grad)
            layer.bias = None if bias is None else Parameter(bias.detach(), bias.requires_grad)
        return with_observers(made.train(other.training))

    @classmethod
    def from_observed(cls, other: Any) -> Any:
        """Refused: this class is observed, and becomes a quantized one."""
        raise NotImplementedError(
            "an observed MultiheadAttention is converted to that of fastquant.nn.quantized, not to "
            "its own class"
        )

    @torch.no_grad()
    def dequantize(self) -> nn.MultiheadAttention:
        """A floating module with the weights of this one, whose layers are quantized modules."""
        layers = [getattr(self, name) for name in _PROJECTIONS]
        made = self._FLOAT_MODULE(
            *(self.embed_dim, self.num_heads, self.dropout, layers[0].bias() is not None),
            *(self.bias_k is not None, self.add_zero_attn, self.kdim, self.vdim),
            self.batch_first,
        )
        for name in ("bias_k", "bias_v"):
            tensor = getattr(self, name)
            setattr(made, name, None if tensor is None else Parameter(tensor.dequantize()))
        weights = [layer.weight().dequantize() for layer in layers]
        if made.in_proj_weight is not None:
            made.in_proj_weight.copy_(torch.cat(weights))
        else:
            for letter, weight in zip("qkv", weights, strict=True):
                setattr(made, f"{letter}_proj_weight", Parameter(weight))
        if made.in_proj_bias is not None:
            made.in_proj_bias.copy_(torch.cat([layer.bias() for layer in layers]))
        out: Any = self.out_proj
        made.out_proj.weight = Parameter(out.weight().dequantize())
        if out.bias() is not None:
            made.out_proj.bias = Parameter(out.bias())
        return made.train(self.training)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """Attention of a batch of sequences; the arguments are torch.nn's.

        `is_causal` says something about `attn_mask`, which must be given with it.
        """
        self._check(query, key, value, attn_mask, is_causal)
        if self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        length, batch, size = query.shape
        scale = float(size // self.num_heads) ** -0.5
        q = self.dequant_q(self.q_scaling_product.mul_scalar(self.linear_Q(query), scale))
        k = self.dequant_k(self.linear_K(key))
        v = self.dequant_v(self.linear_V(value))
        added = 0
        if self.bias_k is not None:
            k, v = (
                torch.cat([x, floating(bias).repeat(1, batch, 1)])
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (k, v))
            added += 1
        q, k, v = (self._by_head(x) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if attn_mask is not None:
            scores = _masked(scores, F.pad(_mask(attn_mask, "attn_mask"), (0, added)))
        if key_padding_mask is not None:
            mask = F.pad(_mask(key_padding_mask, "key_padding_mask"), (0, added))
            mask = mask[:, None, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)
            scores = _masked(scores, mask)
        weights = F.dropout(F.softmax(scores, dim=-1), self.dropout, self.training)
        heads = torch.bmm(weights, v).reshape(batch, self.num_heads, length, -1)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        y = self.out_proj(self.quant_attn_output(heads.permute(order).flatten(2)))
        weights = self.quant_attn_output_weights(weights)
        if not need_weights:
            return y, None
        weights = weights.reshape(batch, self.num_heads, length, -1)
        return y, weights.mean(dim=1) if average_attn_weights else weights

    def _by_head(self, x: Tensor) -> Tensor:
        """Of a sequence, a batch and features: the batch's heads, the sequence, their features."""
        length, batch, size = x.shape
        heads = x.contiguous().view(length, batch * self.num_heads, size // self.num_heads)
        return heads.transpose(0, 1)

    def _check(
        self, query: Any, key: Any, value: Any, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        for name, x, size in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != 3 or x.shape[2] != size:
                raise QuantizationError(
                    f"{name} must have three dimensions, the last of {size} features, got shape "
                    f"{list(x.shape)}"
                )
        if key.shape[:2] != value.shape[:2]:
            raise QuantizationError(
                f"key and value must be of the same sequences, got shapes {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        if is_causal and attn_mask is None:
            raise QuantizationError("is_causal=True needs the causal mask as attn_mask, got None")


def _mask(mask: Tensor, name: str) -> Tensor:
    """A mask as torch.nn takes it, of bools or of numbers to add."""
    if mask.dtype == torch.uint8:
        warnings.warn(f"a uint8 {name} is deprecated: use torch.bool", stacklevel=3)
        mask = mask.to(torch.bool)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise QuantizationError(f"{name} must be bool or floating, got {mask.dtype}")
    return mask


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    try:
        return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    except RuntimeError as error:
        raise QuantizationError(
            f"a mask of shape {list(mask.shape)} does not fit attention of shape "
            f"{list(scores.shape)}: batch times heads, queries, keys"
        ) from error
