"""Layers that compute in floating point with the values that their quantized weight has.

They are the package's own; where torch can quantize tensors itself,
`fastquant.nn.quantized.reference` has torch.ao's instead.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ...._core.errors import QuantizationError
from ....quantized_tensor import floating
from ...qat import layers
from .weights import UNKNOWN, add_grid, grid_of

_Self = TypeVar("_Self", bound="ReferenceModule")


class ReferenceModule(nn.Module):
    """What a layer with a floating weight, and the parameters that quantize it, adds to it."""

    # `convert` makes it of a layer and the parameters of its weight's observer.
    _IS_REFERENCE = True
    # The QAT layer that is made with the same arguments.
    _LIKE: ClassVar[type[layers.Trained]]
    _NAME: ClassVar[str]

    weight: Any
    bias: Any
    weight_quant_min: int | None
    weight_quant_max: int | None

    def _init_weight_qparams(self, weight_qparams: dict[str, Any] | None, device: Any) -> None:
        qparams = UNKNOWN if weight_qparams is None else weight_qparams
        add_grid(self, "weight", qparams, device, always=True)
        self.is_decomposed: bool = qparams.get("is_decomposed", False)
        self.weight_quant_min = qparams.get("quant_min")
        self.weight_quant_max = qparams.get("quant_max")

    def _get_name(self) -> str:
        return f"Quantized{self._NAME}(Reference)"

    def get_weight(self) -> Tensor:
        """The values that the quantized weight has."""
        return grid_of(self, "weight").values(self.weight)

    def get_quantized_weight(self) -> Any:
        """The quantized weight, as a tensor of fastquant; integers where there is none such."""
        return grid_of(self, "weight").quantized(self.weight)

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        return cls._LIKE._arguments_of(layer)

    @classmethod
    def from_float(cls: type[_Self], mod: Any, weight_qparams: dict[str, Any]) -> _Self:
        """A layer with the weight and bias of a floating one.

        Args:
            mod: layer of torch.nn.
            weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.
        """
        made = cls(
            **cls._arguments_of(mod),
            device=mod.weight.device,
            dtype=mod.weight.dtype,
            weight_qparams=weight_qparams,
        )
        for name in ("weight", "bias"):
            tensor = getattr(mod, name, None)
            if tensor is not None:
                setattr(made, name, Parameter(tensor.detach()))
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_qscheme"] = self.weight_qscheme
        destination[f"{prefix}weight_dtype"] = self.weight_dtype

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        for name in ("weight_qscheme", "weight_dtype"):
            if prefix + name in state_dict:
                setattr(self, name, state_dict.pop(prefix + name))
            elif strict:
                missing_keys.append(prefix + name)
        # Of another size, where the weight had one scale and has one for each channel now.
        for name in ("weight_scale", "weight_zero_point"):
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name].detach().clone())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        self.weight_axis_int = int(self.weight_axis)  # type: ignore[arg-type]


class Linear(ReferenceModule, nn.Linear):
    """`torch.nn.Linear` with the values of a quantized weight.

    Args:
        in_features, out_features, device, dtype: as torch.nn has them.
        bias_: whether there is a bias.
        weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.
    """

    _LIKE = layers.Linear
    _NAME = "Linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_: bool = True,
        device: Any = None,
        dtype: Any = None,
        weight_qparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias_, device, dtype)
        self._init_weight_qparams(weight_qparams, device)

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        arguments = super()._arguments_of(layer)
        arguments["bias_"] = arguments.pop("bias")
        return arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(floating(x), self.get_weight(), self.bias)


class _Conv(ReferenceModule):
    """The constructor and the computation; classes that derive from it name a layer of torch.nn.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as torch.nn has them.
        weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.
    """

    _conv_forward: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        weight_qparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            *(padding_mode, device, dtype),
        )
        self._init_weight_qparams(weight_qparams, device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(floating(x), self.get_weight(), self.bias)
        return y


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` with the values of a quantized weight."""

    _LIKE = layers.Conv1d
    _NAME = "Conv1d"


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` with the values of a quantized weight."""

    _LIKE = layers.Conv2d
    _NAME = "Conv2d"


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` with the values of a quantized weight."""

    _LIKE = layers.Conv3d
    _NAME = "Conv3d"


class _ConvTranspose(ReferenceModule):
    """The constructor and the computation; classes that derive from it name a layer of torch.nn.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device, dtype: as torch.nn has them.
        weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.
    """

    _LIKE = layers.Conv1d
    _function: ClassVar[Any]

    stride: Any
    padding: Any
    output_padding: Any
    kernel_size: Any
    dilation: Any
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        weight_qparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups),
            *(bias, dilation, padding_mode, device, dtype),
        )
        self._init_weight_qparams(weight_qparams, device)

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        return {**super()._arguments_of(layer), "output_padding": layer.output_padding}

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = self._function(
            *(floating(x), self.get_weight(), self.bias, self.stride, self.padding),
            *(self._padding_for(x, output_size), self.groups, self.dilation),
        )
        return y

    def _padding_for(self, x: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        """What is added to one side of the output, to make it of a size that was asked for."""
        if output_size is None:
            return self.output_padding  # type: ignore[no-any-return]
        wanted = list(output_size)[-len(self.stride) :]
        least = [
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for size, stride, padding, dilation, kernel in zip(
                x.shape[-len(self.stride) :],
                *(self.stride, self.padding, self.dilation, self.kernel_size),
                strict=True,
            )
        ]
        most = [size + stride - 1 for size, stride in zip(least, self.stride, strict=True)]
        if len(wanted) != len(least) or not all(
            a <= size <= b for a, size, b in zip(least, wanted, most, strict=True)
        ):
            raise QuantizationError(
                f"output_size must be from {least} to {most} for an input of shape "
                f"{list(x.shape)}, got {list(output_size)}"
            )
        return tuple(size - a for size, a in zip(wanted, least, strict=True))


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with the values of a quantized weight."""

    _NAME = "ConvTranspose1d"
    _function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with the values of a quantized weight."""

    _NAME = "ConvTranspose2d"
    _function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with the values of a quantized weight."""

    _NAME = "ConvTranspose3d"
    _function = staticmethod(F.conv_transpose3d)


class _Table(ReferenceModule):
    """The constructor of the embeddings, which takes the arguments of torch.nn's and one more."""

    _NAME = "Embedding"

    def __init__(
        self, *args: Any, weight_qparams: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_weight_qparams(weight_qparams, kwargs.get("device"))


class Embedding(_Table, nn.Embedding):
    """`torch.nn.Embedding` with the values of a quantized weight.

    Args:
        weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.

    The other arguments are torch.nn's.
    """

    _LIKE = layers.Embedding

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            *(input, self.get_weight(), self.padding_idx, self.max_norm, self.norm_type),
            *(self.scale_grad_by_freq, self.sparse),
        )


class EmbeddingBag(_Table, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with the values of a quantized weight.

    Args:
        weight_qparams: as `fastquant.utils.get_qparam_dict` returns them.

    The other arguments are torch.nn's.
    """

    _LIKE = layers.EmbeddingBag

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return F.embedding_bag(
            *(input, self.get_weight(), offsets, self.max_norm, self.norm_type),
            *(self.scale_grad_by_freq, self.mode, self.sparse, per_sample_weights),
            *(self.include_last_offset, self.padding_idx),
        )
