"""Recurrent layers and cells that quantize their inputs and hidden states at each call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.rnn import PackedSequence

from ...._core.dtypes import QINT8
from ...._core.errors import QuantizationError
from ...._native.ops import dynamic_gru, dynamic_lstm
from ...._quantized.tensor import check_floating
from ..observed import NoNativeFormError
from ..scaled import NotScriptable
from ..weighted import require_source
from .linear import Linear
from .weighted import DynamicWeighted, check_weight_dtype, weight_observer_of

_GATES = {"LSTM": 4, "GRU": 3}


class _Gates(Linear):
    """What the input, or the hidden state, gives for each gate: a part of a recurrent layer."""

    def op_arguments(self) -> tuple[Any, ...]:
        """Packed weight, scales and bias."""
        buffers = self._buffers
        return buffers["_packed_weight"], buffers["weight_scale"], buffers["_bias"]

    # torch's functions take float16 weights as they are, widened at each call.
    _pack_half = DynamicWeighted._pack_half
    _unpack_half = DynamicWeighted._unpack_half

    def float_weight(self) -> Tensor:
        """A float16 weight, for torch's functions of fp32."""
        return self._integers().float()

    def _floating(self, x: Tensor) -> Tensor:
        return F.linear(x, self.float_weight(), self.bias())


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _check_dropout(dropout: Any, num_layers: int) -> None:
    is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not is_number or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout={dropout} has no effect: it comes between layers, and num_layers is 1",
            stacklevel=4,
        )


class RNNBase(NotScriptable):
    """LSTM and GRU layers.

    The input of all steps of a layer is quantized at once, its hidden states at each step, as by
    torch.ao. The weights are in child modules `ih_l0`, `hh_l0`, `ih_l0_reverse` and so on.

    Args:
        mode: "LSTM" or "GRU".
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: how many layers follow each other.
        bias: whether the layers have biases.
        batch_first: whether input and output are [batch, steps, features].
        dropout: between the layers, in training mode.
        bidirectional: whether each layer also goes from the last step to the first.
        dtype: of the weights: torch.qint8, or torch.int8, which is the same; or torch.float16, with
            which nothing else is quantized.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTM, nn.GRU)

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__()
        _check_dropout(dropout, num_layers)
        if mode not in _GATES:
            raise ValueError(f"mode must be 'LSTM' or 'GRU', got {mode!r}")
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.dtype = check_weight_dtype(dtype)
        self.training = False
        directions = 2 if bidirectional else 1
        for name in self._names():
            layer_input = input_size if name.startswith("l0") else hidden_size * directions
            for kind, inputs in (("ih", layer_input), ("hh", hidden_size)):
                gates = _Gates(inputs, _GATES[mode] * hidden_size, bias, dtype)
                self.add_module(f"{kind}_{name}", gates)

    def _names(self) -> list[str]:
        """The name of each layer in each direction, as torch has it in names of weights."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]

    def _parts(self) -> Iterator[tuple[str, _Gates]]:
        """`ih_l0` and so on, with their weights, in the order of torch."""
        for name in self._names():
            for kind in ("ih", "hh"):
                yield f"{kind}_{name}", self._modules[f"{kind}_{name}"]  # type: ignore[misc]

    # --- accessors, as torch.ao has them ------------------------------------------------------

    def get_weight(self) -> dict[str, Any]:
        """The weights by torch's names, as quantized tensors (float16 ones as they are)."""
        return {f"weight_{name}": part.weight() for name, part in self._parts()}

    def get_bias(self) -> dict[str, Tensor | None]:
        """The biases by torch's names."""
        return {f"bias_{name}": part.bias() for name, part in self._parts()}

    def set_weight_bias(self, weight_bias_dict: Mapping[str, Any]) -> None:
        """Take quantized weights and biases, by torch's names: `weight_ih_l0` and so on."""
        for name, part in self._parts():
            part.set_weight_bias(
                weight_bias_dict[f"weight_{name}"], weight_bias_dict.get(f"bias_{name}")
            )

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        usual = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
        }
        for name, value in usual.items():
            if getattr(self, name) != value:
                text += f", {name}={getattr(self, name)}"
        return text

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    # --- forward ----------------------------------------------------------------------------

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        """The states that a caller gives, as a tuple."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            batch = int(batch_sizes[0])
        else:
            data, batch_sizes, order, back = input, None, None, None
        check_floating(data)
        expected = 2 if batch_sizes is not None else 3
        is_single = batch_sizes is None and data.dim() == 2
        _require(
            is_single or data.dim() == expected,
            f"input must have {expected} dimensions, got {data.dim()}",
        )
        _require(
            data.shape[-1] == self.input_size,
            f"input must have {self.input_size} features in its last dimension, got shape "
            f"{list(data.shape)}",
        )
        x = data
        if is_single:
            x = x.unsqueeze(1)
        elif batch_sizes is None and self.batch_first:
            x = x.transpose(0, 1)
        if batch_sizes is None:
            _require(x.shape[0] > 0, "input must have at least one step, got none")
            batch = x.shape[1]
        states = self._checked_states(hx, x, batch, is_single)
        if order is not None:
            states = tuple(s.index_select(1, order) for s in states)
        if x.dtype == torch.float32:
            y, states = self._computed(x, batch_sizes, states)
        else:
            y, states = self._computed(x.float(), batch_sizes, tuple(s.float() for s in states))
            y, states = y.to(data.dtype), tuple(s.to(data.dtype) for s in states)
        if back is not None:
            states = tuple(s.index_select(1, back) for s in states)
        if is_single:
            y, states = y.squeeze(1), tuple(s.squeeze(1) for s in states)
        elif batch_sizes is None and self.batch_first:
            y = y.transpose(0, 1)
        output = y if batch_sizes is None else PackedSequence(y, batch_sizes, order, back)
        return output, states if len(states) > 1 else states[0]

    def _checked_states(
        self, hx: Any, x: Tensor, batch: int, is_single: bool
    ) -> tuple[Tensor, ...]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shape = (rows, batch, self.hidden_size)
        if hx is None:
            zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
            return (zeros,) * (_GATES[self.mode] - 2)
        states = self._states(hx)
        if is_single:
            states = tuple(s.unsqueeze(1) for s in states)
        for k, state in enumerate(states):
            _require(
                tuple(state.shape) == shape,
                f"hidden[{k}] must have shape {list(shape)}, got {list(state.shape)}",
            )
        return states

    def _computed(
        self, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and the states of all layers, of fp32 tensors: [steps, batch, features]."""
        if self.dtype == torch.float16:
            return self._floating(x, batch_sizes, states)
        op = dynamic_lstm if self.mode == "LSTM" else dynamic_gru
        names = self._names()
        directions = 2 if self.bidirectional else 1
        finals: list[list[Tensor]] = []
        for first in range(0, len(names), directions):
            outputs = []
            for k in range(first, first + directions):
                ih: Any = self._modules[f"ih_{names[k]}"]
                hh: Any = self._modules[f"hh_{names[k]}"]
                y, *after = op(
                    *(x, batch_sizes, *(s[k] for s in states)),
                    *(*ih.op_arguments(), *hh.op_arguments(), k > first, ih.reduce_range),
                )
                outputs.append(y)
                finals.append(after)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self.dropout and self.training and first + directions < len(names):
                x = F.dropout(x, self.dropout)
        if len(finals) == 1:
            return x, tuple(state.unsqueeze(0) for state in finals[0])
        return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))

    def _floating(
        self, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same with float16 weights, computed in fp32."""
        weights = []
        for name in self._names():
            parts: list[Any] = [self._modules[f"{kind}_{name}"] for kind in ("ih", "hh")]
            weights += [part.float_weight() for part in parts]
            weights += [part.bias() for part in parts] if self.bias else []
        function: Any = torch.lstm if self.mode == "LSTM" else torch.gru
        given: Any = states if self.mode == "LSTM" else states[0]
        settings = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            y, *after = function(x, given, weights, *settings, False)
        else:
            y, *after = function(x, batch_sizes, given, weights, *settings)
        return y, tuple(after)

    # --- made of other modules ----------------------------------------------------------------

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """A dynamically quantized layer of a float one.

        Args:
            mod: has a `qconfig`, whose observer each weight gets; None is the default one.
            use_precomputed_fake_quant: has no effect here, as in torch.ao.

        Raises:
            TypeError: `mod` is none of the classes that this one stands for.
            QuantizationError: it has projections (`proj_size`), or its weights' observer is for no
                weight that is possible here.
        """
        require_source(cls, mod)
        if getattr(mod, "proj_size", 0):
            raise NoNativeFormError(f"it has projections (proj_size={mod.proj_size})")
        dtype = weight_observer_of(mod).dtype
        made = cls._of(mod, dtype)
        for name, part in made._parts():
            bias = getattr(mod, f"bias_{name}") if mod.bias else None
            part.take(getattr(mod, f"weight_{name}"), bias, weight_observer_of(mod))
        made.train(mod.training)
        return made

    @classmethod
    def _of(cls, mod: Any, dtype: torch.dtype) -> Any:
        kind: Any = {"LSTM": LSTM, "GRU": GRU}[mod.mode]
        return kind(
            *(mod.input_size, mod.hidden_size, mod.num_layers, mod.bias, mod.batch_first),
            *(mod.dropout, mod.bidirectional, dtype),
        )

    @classmethod
    def from_reference(cls, ref_mod: Any) -> Any:
        """A dynamically quantized layer of a reference module, which has quantized weights."""
        made = cls._of(ref_mod, ref_mod.weight_ih_l0_dtype)
        made.set_weight_bias(ref_mod.get_quantized_weight_bias_dict())
        return made


class LSTM(RNNBase):
    """`torch.nn.LSTM` with int8 weights, which quantizes its input and hidden states.

    Takes the arguments of `RNNBase` after `mode`, and states and PackedSequences as `torch.nn.LSTM`
    does.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTM,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        _require(
            isinstance(hx, (tuple, list)) and len(hx) == 2,
            "hx must be a pair of tensors: hidden and cell states",
        )
        return tuple(hx)


class GRU(RNNBase):
    """`torch.nn.GRU` with int8 weights, which quantizes its input and hidden states.

    Takes the arguments of `RNNBase` after `mode`, and states and PackedSequences as `torch.nn.GRU`
    does.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.GRU,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        _require(isinstance(hx, Tensor), f"hx must be a tensor, got {type(hx).__name__}")
        return (hx,)


# --- cells ----------------------------------------------------------------------------------------


class RNNCellBase(NotScriptable):
    """One step of a recurrent layer.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether there are biases.
        num_chunks: how many gates there are.
        dtype: of the weights, as for `RNNBase`.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    _STATES: ClassVar[int] = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_chunks: int = 4,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.weight_dtype = check_weight_dtype(dtype)
        self.ih = _Gates(input_size, num_chunks * hidden_size, bias, dtype)
        self.hh = _Gates(hidden_size, num_chunks * hidden_size, bias, dtype)

    def _get_name(self) -> str:
        return f"DynamicQuantized{type(self).__name__}"

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}"

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    # --- accessors, as torch.ao has them ------------------------------------------------------

    def get_weight(self) -> dict[str, Any]:
        """The weights by torch's names, as quantized tensors (float16 ones as they are)."""
        return {"weight_ih": self.ih.weight(), "weight_hh": self.hh.weight()}

    def get_bias(self) -> dict[str, Tensor | None]:
        """The biases by torch's names."""
        return {"bias_ih": self.ih.bias(), "bias_hh": self.hh.bias()}

    @property
    def bias_ih(self) -> Tensor | None:
        """The bias of the input."""
        return self.ih.bias()

    @property
    def bias_hh(self) -> Tensor | None:
        """The bias of the hidden state."""
        return self.hh.bias()

    def set_weight_bias(self, weight_bias_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what `{"weight": get_weight(), "bias": get_bias()}` of such a cell is."""
        weights, biases = weight_bias_dict["weight"], weight_bias_dict["bias"]
        for kind, part in (("ih", self.ih), ("hh", self.hh)):
            part.set_weight_bias(weights[f"weight_{kind}"], biases.get(f"bias_{kind}"))

    # --- forward ------------------------------------------------------------------------------

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        check_floating(input)
        _require(
            input.dim() in (1, 2) and input.shape[-1] == self.input_size,
            f"input must have shape [batch, {self.input_size}], got {list(input.shape)}",
        )
        is_single = input.dim() == 1
        x = input.unsqueeze(0) if is_single else input
        if hx is None:
            zeros = torch.zeros(
                (x.shape[0], self.hidden_size), dtype=input.dtype, device=input.device
            )
            states = (zeros,) * self._STATES
        else:
            states = tuple(hx) if self._STATES > 1 else (hx,)
            _require(len(states) == self._STATES, f"hx must be {self._STATES} tensors")
            states = tuple(s.unsqueeze(0) for s in states) if is_single else states
        for k, state in enumerate(states):
            _require(
                tuple(state.shape) == (x.shape[0], self.hidden_size),
                f"hidden[{k}] must have shape {[x.shape[0], self.hidden_size]}, got "
                f"{list(state.shape)}",
            )
        after = self._computed(x.float(), *(s.float() for s in states))
        after = tuple((state.squeeze(0) if is_single else state).to(input.dtype) for state in after)
        return after if self._STATES > 1 else after[0]

    def _computed(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """The states after the step, of fp32 tensors [batch, features]."""
        raise NotImplementedError

    def _float_arguments(self) -> tuple[Any, ...]:
        """float16 weights and biases, as torch's functions of cells take them."""
        weights = self.ih.float_weight(), self.hh.float_weight()
        return *weights, self.ih.bias(), self.hh.bias()

    def _op_arguments(self) -> tuple[Any, ...]:
        """What the ops take after the states."""
        parts = (*self.ih.op_arguments(), *self.hh.op_arguments())
        return *parts, False, self.ih.reduce_range

    # --- made of other modules ----------------------------------------------------------------

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """A dynamically quantized cell of a float one.

        Args:
            mod: has a `qconfig`, whose observer each weight gets; None is the default one.
            use_precomputed_fake_quant: has no effect here, as in torch.ao.

        Raises:
            TypeError: `mod` is none of the classes that this one stands for.
            QuantizationError: its weights' observer is for no weight that is possible here.
        """
        require_source(cls, mod)
        kind = _CELLS[type_before_parametrizations(mod)]
        made = kind._like(mod, weight_observer_of(mod).dtype)
        for name in ("ih", "hh"):
            bias = getattr(mod, f"bias_{name}") if mod.bias else None
            part: _Gates = getattr(made, name)
            part.take(getattr(mod, f"weight_{name}"), bias, weight_observer_of(mod))
        return made

    @classmethod
    def from_reference(cls, ref_mod: Any) -> Any:
        """A dynamically quantized cell of a reference module, which has quantized weights."""
        made = cls._like(ref_mod, ref_mod.weight_ih_dtype)
        weights = {
            "weight_ih": ref_mod.get_quantized_weight_ih(),
            "weight_hh": ref_mod.get_quantized_weight_hh(),
        }
        made.set_weight_bias(
            {"weight": weights, "bias": {"bias_ih": ref_mod.bias_ih, "bias_hh": ref_mod.bias_hh}}
        )
        return made

    @classmethod
    def _like(cls, mod: Any, dtype: torch.dtype) -> Any:
        return cls(mod.input_size, mod.hidden_size, bool(mod.bias), dtype=dtype)


class RNNCell(RNNCellBase):
    """`torch.nn.RNNCell` with int8 weights, which quantizes its input and hidden state.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether there are biases.
        nonlinearity: "tanh" or "relu".
        dtype: of the weights, as for `RNNBase`.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNNCell,)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, dtype)
        if nonlinearity not in ("tanh", "relu"):
            raise QuantizationError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity={self.nonlinearity}"

    @classmethod
    def _like(cls, mod: Any, dtype: torch.dtype) -> Any:
        return cls(mod.input_size, mod.hidden_size, bool(mod.bias), mod.nonlinearity, dtype)

    def _computed(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        total = self.ih(x) + self.hh(states[0])
        return (total.tanh() if self.nonlinearity == "tanh" else total.relu(),)


class LSTMCell(RNNCellBase):
    """`torch.nn.LSTMCell` with int8 weights, which quantizes its input and hidden state.

    Takes the arguments of `RNNCellBase` but `num_chunks`.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.LSTMCell,)
    _STATES: ClassVar[int] = 2

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = QINT8
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, dtype)

    def _computed(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        if self.weight_dtype == torch.float16:
            return torch.lstm_cell(x, states, *self._float_arguments())
        _, *after = dynamic_lstm(x.unsqueeze(0), None, *states, *self._op_arguments())
        return tuple(after)


class GRUCell(RNNCellBase):
    """`torch.nn.GRUCell` with int8 weights, which quantizes its input and hidden state.

    Takes the arguments of `RNNCellBase` but `num_chunks`.
    """

    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nn.GRUCell,)

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype = QINT8
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, dtype)

    def _computed(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        if self.weight_dtype == torch.float16:
            return (torch.gru_cell(x, states[0], *self._float_arguments()),)
        return (dynamic_gru(x.unsqueeze(0), None, *states, *self._op_arguments())[1],)


_CELLS: dict[Any, Any] = {nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell, nn.RNNCell: RNNCell}
