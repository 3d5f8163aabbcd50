"""Recurrent layers that compute in floating point with the values of quantized weights.

They are the package's own; where torch can quantize tensors itself,
`fastquant.nn.quantized.reference` has torch.ao's instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...._core.errors import QuantizationError
from ....utils import get_qparam_dict
from .weights import UNKNOWN, add_grid, grid_of

_Self = TypeVar("_Self", bound="_Recurrent")


class _Recurrent(nn.Module):
    """What a layer with several floating weights, and the parameters that quantize them, adds."""

    # The arguments that the layers keep as attributes under the same name.
    _ARGUMENTS: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")

    is_decomposed: bool

    def _weight_names(self) -> list[str]:
        return [name for name in self._parameters if name.startswith("weight")]

    def _init_weight_qparams_dict(self, qparams: dict[str, Any] | None, device: Any) -> None:
        names = self._weight_names()
        if qparams is None:
            qparams = {"is_decomposed": False, **dict.fromkeys(names, UNKNOWN)}
        if qparams.keys() != {"is_decomposed", *names}:
            raise QuantizationError(
                f"weight_qparams_dict must have the keys is_decomposed, {', '.join(names)}; got "
                f"{', '.join(qparams)}"
            )
        self.is_decomposed = qparams["is_decomposed"]
        for name in names:
            add_grid(self, name, qparams[name], device, always=False)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}(Reference)"

    @classmethod
    def from_float(
        cls: type[_Self], mod: Any, weight_qparams_dict: dict[str, Any] | None = None
    ) -> _Self:
        """A layer that shares the parameters of a floating one.

        Args:
            mod: layer of torch.nn.
            weight_qparams_dict: for each weight what `fastquant.utils.get_qparam_dict` returns,
                and `is_decomposed`; by default each is observed by `mod.qconfig.weight()`.
        """
        weights = {n: p for n, p in mod.named_parameters() if n.startswith("weight")}
        if weight_qparams_dict is None:
            weight_qparams_dict = {"is_decomposed": False}
            for name, weight in weights.items():
                observer = mod.qconfig.weight()
                observer(weight.detach())
                weight_qparams_dict[name] = get_qparam_dict(observer)
        first = next(iter(weights.values()))
        made = cls(
            **{name: getattr(mod, name) for name in cls._ARGUMENTS},
            device=first.device,
            dtype=first.dtype,
            weight_qparams_dict=weight_qparams_dict,
        )
        for name, parameter in mod.named_parameters():
            setattr(made, name, parameter)
        return made.train(mod.training)


class _Cell(_Recurrent):
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any
    hidden_size: int

    def __init__(
        self, *args: Any, weight_qparams_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_weight_qparams_dict(weight_qparams_dict, kwargs.get("device"))

    def get_quantized_weight_ih(self) -> Any:
        """The quantized weight for the input."""
        return grid_of(self, "weight_ih").quantized(self.weight_ih)

    def get_quantized_weight_hh(self) -> Any:
        """The quantized weight for the state."""
        return grid_of(self, "weight_hh").quantized(self.weight_hh)

    def get_weight_ih(self) -> Tensor:
        """The values that the quantized weight for the input has."""
        return grid_of(self, "weight_ih").values(self.weight_ih)

    def get_weight_hh(self) -> Tensor:
        """The values that the quantized weight for the state has."""
        return grid_of(self, "weight_hh").values(self.weight_hh)

    def _function(self) -> Any:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next state, or states, of a batch of inputs or of one."""
        if input.dim() not in (1, 2):
            raise QuantizationError(f"input must have one or two dimensions, got {input.dim()}")
        is_lstm = isinstance(self, nn.LSTMCell)
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            states = [x.new_zeros(x.size(0), self.hidden_size)] * (1 + is_lstm)
        else:
            states = [s if input.dim() == 2 else s.unsqueeze(0) for s in (hx if is_lstm else [hx])]
        result = self._function()(
            *(x, states if is_lstm else states[0], self.get_weight_ih(), self.get_weight_hh()),
            *(self.bias_ih, self.bias_hh),
        )
        if input.dim() == 2:
            return result
        return tuple(s.squeeze(0) for s in result) if is_lstm else result.squeeze(0)


class RNNCell(_Cell, nn.RNNCell):
    """`torch.nn.RNNCell` with the values of quantized weights.

    Args:
        weight_qparams_dict: for `weight_ih` and `weight_hh` what `fastquant.utils.get_qparam_dict`
            returns, and `is_decomposed`.

    The other arguments are torch.nn's, and so for the other cells.
    """

    _ARGUMENTS = (*_Recurrent._ARGUMENTS, "nonlinearity")

    def _function(self) -> Any:
        functions = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}
        if self.nonlinearity not in functions:
            raise QuantizationError(f"nonlinearity must be tanh or relu, got {self.nonlinearity!r}")
        return functions[self.nonlinearity]


class LSTMCell(_Cell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with the values of quantized weights."""

    def _function(self) -> Any:
        return torch.lstm_cell


class GRUCell(_Cell, nn.GRUCell):
    """`torch.nn.GRUCell` with the values of quantized weights."""

    def _function(self) -> Any:
        return torch.gru_cell


class _Layers(_Recurrent):
    """The computation of layers over sequences; those that derive from it name one of torch.nn.

    Args:
        weight_qparams_dict: for each weight, by its name, what `fastquant.utils.get_qparam_dict`
            returns, and `is_decomposed`.

    The other arguments are torch.nn's.
    """

    _ARGUMENTS: ClassVar[tuple[str, ...]] = (
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
        "bidirectional",
    )
    # How many states there are.
    _STATES: ClassVar[int] = 1

    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    hidden_size: int
    permute_hidden: Any
    check_forward_args: Any
    all_weights: Any

    def __init__(
        self, *args: Any, weight_qparams_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_weight_qparams_dict(weight_qparams_dict, kwargs.get("device"))

    def _init_weight_qparams_dict(self, qparams: dict[str, Any] | None, device: Any) -> None:
        super()._init_weight_qparams_dict(qparams, device)
        for name, buffer in self.named_buffers():
            if name.endswith("zero_point"):  # as torch.ao keeps those of layers, but not of cells
                self.register_buffer(name, buffer.to(torch.int))

    def _names(self) -> Iterable[str]:
        """The parameters, in the order in which torch's functions take them."""
        return list(self._parameters)

    def get_quantized_weight_bias_dict(self) -> dict[str, Any]:
        """Quantized weights and floating biases, by name."""
        return {
            name: grid_of(self, name).quantized(getattr(self, name))
            if name.startswith("weight")
            else getattr(self, name)
            for name in self._names()
        }

    def get_flat_weights(self) -> list[Tensor]:
        """The values that the quantized weights have, and biases."""
        return [
            grid_of(self, name).values(getattr(self, name))
            if name.startswith("weight")
            else getattr(self, name)
            for name in self._names()
        ]

    def _function(self) -> Any:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Outputs and last states, as torch.nn has them, of sequences, packed ones, or one."""
        packed = isinstance(input, PackedSequence)
        batch_sizes: Any
        x, batch_sizes, order, back = input if packed else (input, None, None, None)
        if not packed and x.dim() not in (2, 3):
            raise QuantizationError(f"input must have two or three dimensions, got {x.dim()}")
        batch_dim = 0 if self.batch_first else 1
        is_one = not packed and x.dim() == 2
        if is_one:
            x = x.unsqueeze(batch_dim)
        several = self._STATES > 1
        if hx is None:
            count = self.num_layers * (1 + self.bidirectional)
            batch = int(batch_sizes[0]) if packed else x.size(batch_dim)
            sizes = [self.hidden_size] * self._STATES
            sizes[0] = self.proj_size or self.hidden_size
            states = [x.new_zeros(count, batch, size) for size in sizes]
        else:
            states = list(hx) if several else [hx]
            dims = 2 if is_one else 3
            if any(state.dim() != dims for state in states):
                raise QuantizationError(
                    f"hx must have {dims} dimensions, as the input has, got "
                    f"{', '.join(str(state.dim()) for state in states)}"
                )
            states = [state.unsqueeze(1) for state in states] if is_one else states
        hidden: Any = tuple(states) if several else states[0]
        if hx is not None:
            hidden = self.permute_hidden(hidden, order)
        self.check_forward_args(x, hidden, batch_sizes)
        settings = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        weights = self.get_flat_weights()
        if packed:
            y, *last = self._function()(x, batch_sizes, hidden, weights, *settings)
        else:
            y, *last = self._function()(x, hidden, weights, *settings, self.batch_first)
        if is_one:
            y, last = y.squeeze(batch_dim), [state.squeeze(1) for state in last]
        hidden = self.permute_hidden(tuple(last) if several else last[0], back)
        return PackedSequence(y, batch_sizes, order, back) if packed else y, hidden


class LSTM(_Layers, nn.LSTM):
    """`torch.nn.LSTM` with the values of quantized weights."""

    _ARGUMENTS = (*_Layers._ARGUMENTS, "proj_size")
    _STATES = 2

    def _function(self) -> Any:
        return torch.lstm


class GRU(_Layers, nn.GRU):
    """`torch.nn.GRU` with the values of quantized weights."""

    def _function(self) -> Any:
        return torch.gru
