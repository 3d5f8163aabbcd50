"""LSTMs made of linear layers, sums and products, each of which can be observed and quantized.

They are the package's own; where torch.ao exists, `fastquant.nn.quantizable` has torch.ao's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..._core.dtypes import QUINT8, is_torch_quantized, plain_dtype
from ..._core.errors import QuantizationError
from ...quantized_tensor import is_quantized, quantize_per_tensor
from ..float_functional import FloatFunctional
from .preparing import with_observers

_GATES = ("input", "forget", "cell", "output")

States = tuple[Any, Any]


def _zeros(sizes: Sequence[int], like: Any, qparams: tuple[float, int], dtype: torch.dtype) -> Any:
    """Zeros beside a tensor `like`: quantized if it is, in the dtype that is for such."""
    if is_quantized(like):
        zeros = torch.zeros(sizes, device=like.device)
        return quantize_per_tensor(zeros, *qparams, plain_dtype(dtype))
    if is_torch_quantized(like):
        return torch.quantize_per_tensor(torch.zeros(sizes, device=like.device), *qparams, dtype)
    return torch.zeros(sizes, device=like.device, dtype=like.dtype)


class LSTMCell(nn.Module):
    """`torch.nn.LSTMCell` made of parts.

    Args:
        input_dim, hidden_dim: sizes of input and state.
        bias, device, dtype: of the linear layers, as torch.nn has them.
        split_gates: have linear layers and sums of their own for each gate.
    """

    _FLOAT_MODULE = nn.LSTMCell

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = input_dim
        self.hidden_size = hidden_dim
        self.bias = bias
        self.split_gates = split_gates

        def layer(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.igates: Any = nn.ModuleDict()
        self.hgates: Any = nn.ModuleDict()
        self.gates: Any = nn.ModuleDict()
        if split_gates:
            for gate in _GATES:
                self.igates[gate] = layer(input_dim, hidden_dim)
                self.hgates[gate] = layer(hidden_dim, hidden_dim)
                self.gates[gate] = FloatFunctional()
        else:
            self.igates = layer(input_dim, 4 * hidden_dim)
            self.hgates = layer(hidden_dim, 4 * hidden_dim)
            self.gates = FloatFunctional()

        self.input_gate = nn.Sigmoid()
        self.forget_gate = nn.Sigmoid()
        self.cell_gate = nn.Tanh()
        self.output_gate = nn.Sigmoid()

        self.fgate_cx = FloatFunctional()
        self.igate_cgate = FloatFunctional()
        self.fgate_cx_igate_cgate = FloatFunctional()
        self.ogate_cy = FloatFunctional()

        # Of the states that a quantized cell starts with.
        self.initial_hidden_state_qparams: tuple[float, int] = (1.0, 0)
        self.initial_cell_state_qparams: tuple[float, int] = (1.0, 0)
        self.hidden_state_dtype: torch.dtype = QUINT8
        self.cell_state_dtype: torch.dtype = QUINT8

    def forward(self, x: Any, hidden: States | None = None) -> States:
        """The new hidden and cell state, of a batch of inputs and the states before."""
        if hidden is None or hidden[0] is None or hidden[1] is None:
            hidden = self._initial_states(x)
        hx, cx = hidden
        if self.split_gates:
            sums = [self.gates[g].add(self.igates[g](x), self.hgates[g](hx)) for g in _GATES]
        else:
            sums = self.gates.add(self.igates(x), self.hgates(hx)).chunk(4, 1)
        input_gate = self.input_gate(sums[0])
        forget_gate = self.forget_gate(sums[1])
        cell_gate = self.cell_gate(sums[2])
        output_gate = self.output_gate(sums[3])
        kept = self.fgate_cx.mul(forget_gate, cx)
        cy = self.fgate_cx_igate_cgate.add(kept, self.igate_cgate.mul(input_gate, cell_gate))
        return self.ogate_cy.mul(output_gate, torch.tanh(cy)), cy

    def _initial_states(self, x: Any) -> States:
        sizes = (x.shape[0], self.hidden_size)
        return (
            _zeros(sizes, x, self.initial_hidden_state_qparams, self.hidden_state_dtype),
            _zeros(sizes, x, self.initial_cell_state_qparams, self.cell_state_dtype),
        )

    def _get_name(self) -> str:
        return "QuantizableLSTMCell"

    @classmethod
    def from_params(
        cls,
        wi: Tensor,
        wh: Tensor,
        bi: Tensor | None = None,
        bh: Tensor | None = None,
        split_gates: bool = False,
    ) -> LSTMCell:
        """A cell with these weights and biases, as `torch.nn.LSTMCell` has them.

        Args:
            wi, wh: weights for input and state.
            bi, bh: biases, both or none.
            split_gates: as the class has it.
        """
        if (bi is None) != (bh is None):
            raise QuantizationError(
                "bi and bh must both be tensors or both be None, got one of each"
            )
        cell = cls(wi.shape[1], wh.shape[1], bi is not None, split_gates=split_gates)
        for layers, weight, bias in ((cell.igates, wi, bi), (cell.hgates, wh, bh)):
            count = len(_GATES) if split_gates else 1
            weights = weight.chunk(count)
            biases = [None] * count if bias is None else bias.chunk(count)
            for layer, w, b in zip(_all(layers), weights, biases, strict=True):
                layer.weight = Parameter(w.detach())
                layer.bias = None if b is None else Parameter(b.detach())
        return cell

    @classmethod
    def from_float(
        cls, other: Any, use_precomputed_fake_quant: bool = False, split_gates: bool = False
    ) -> LSTMCell:
        """A cell with the weights of a `torch.nn.LSTMCell` that has a `qconfig`."""
        if type(other) is not cls._FLOAT_MODULE:
            raise QuantizationError(
                f"LSTMCell.from_float takes a torch.nn.LSTMCell, got {type(other).__name__}"
            )
        _require_qconfig(other, None)
        cell = cls.from_params(
            *(other.weight_ih, other.weight_hh, other.bias_ih, other.bias_hh),
            split_gates=split_gates,
        )
        cell.qconfig = other.qconfig
        for layers in (cell.igates, cell.hgates):
            for layer in {layers, *_all(layers)}:
                layer.qconfig = other.qconfig
        return cell


def _all(layers: Any) -> list[Any]:
    """The linear layers of all gates: one for each, or one for all of them."""
    return list(layers.values()) if isinstance(layers, nn.ModuleDict) else [layers]


def _require_qconfig(other: Any, qconfig: Any) -> Any:
    """The config of a float module, or else the one that was given."""
    found = getattr(other, "qconfig", qconfig)
    if not hasattr(other, "qconfig") and not qconfig:
        raise QuantizationError(
            f"{type(other).__name__} must have a qconfig, or be given one, to be observed"
        )
    return found


class _LSTMSingleLayer(nn.Module):
    """A cell that goes over a sequence, which is the first dimension."""

    def __init__(self, cell: LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Any, hidden: States | None = None) -> tuple[Any, States]:
        outputs = []
        for i in range(x.shape[0]):
            hidden = self.cell(x[i], hidden)
            assert hidden is not None
            outputs.append(hidden[0])
        assert hidden is not None  # there is at least one step
        return torch.stack(outputs, 0), hidden


class _LSTMLayer(nn.Module):
    """One layer, in one direction or both."""

    def __init__(self, forward_cell: LSTMCell, backward_cell: LSTMCell | None) -> None:
        super().__init__()
        self.batch_first = False
        self.bidirectional = backward_cell is not None
        self.layer_fw = _LSTMSingleLayer(forward_cell)
        if backward_cell is not None:
            self.layer_bw = _LSTMSingleLayer(backward_cell)

    def forward(self, x: Any, hidden: States) -> tuple[Any, States]:
        """Output and last states; the states of two directions are stacked."""
        if not self.bidirectional:
            return self.layer_fw(x, hidden)  # type: ignore[no-any-return]
        (h0, h1), (c0, c1) = hidden
        y0, (h0, c0) = self.layer_fw(x, (h0, c0))
        y1, (h1, c1) = self.layer_bw(x.flip(0), (h1, c1))
        y = torch.cat([y0, y1.flip(0)], y0.dim() - 1)
        return y, (torch.stack([h0, h1], 0), torch.stack([c0, c1], 0))


class LSTM(nn.Module):
    """`torch.nn.LSTM` made of parts; the cells are in `layers`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, device, dtype: as
            torch.nn has them.
        dropout: ignored with a warning, as torch.ao does; put `Dropout` between LSTMs of one layer.
        split_gates: have linear layers and sums of their own for each gate.
    """

    _FLOAT_MODULE = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        split_gates: bool = False,
    ) -> None:
        super().__init__()
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, (int, float))
            or (not 0 <= dropout <= 1)
        ):
            raise QuantizationError(
                f"dropout must be a probability, a number from 0 to 1, got {dropout!r}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.training = False
        if dropout:
            warnings.warn(
                f"dropout={dropout} is ignored: a quantizable LSTM has none between its layers",
                stacklevel=2,
            )

        def cell(layer: int, suffix: str) -> LSTMCell:
            size = hidden_size * (1 + bidirectional) if layer else input_size
            return LSTMCell(size, hidden_size, bias, device, dtype, split_gates=split_gates)

        self.layers = self._layers_of(cell)

    def _layers_of(self, cell: Callable[[int, str], LSTMCell]) -> nn.ModuleList:
        """All layers, of the cells for each layer's number and its direction's suffix."""
        return nn.ModuleList(
            _LSTMLayer(cell(i, ""), cell(i, "_reverse") if self.bidirectional else None)
            for i in range(self.num_layers)
        )

    def forward(self, x: Any, hidden: Any = None) -> tuple[Any, States]:
        """Outputs and last states, as torch.nn.LSTM has them, of a batch of sequences.

        Args:
            x: of three dimensions.
            hidden: the states before, two tensors; or a pair of them for each layer.
        """
        if x.dim() != 3:
            raise QuantizationError(
                f"x must have three dimensions, sequence, batch and features, got {x.dim()}"
            )
        if self.batch_first:
            x = x.transpose(0, 1)
        layers_hidden = []
        for i, layer in enumerate(self.layers):
            x, last = layer(x, self._states_of(i, x, hidden))
            layers_hidden.append(last)
        hx, cx = (torch.stack(states) for states in zip(*layers_hidden, strict=True))
        if self.bidirectional:
            hx, cx = (states.reshape(-1, *states.shape[-2:]) for states in (hx, cx))
        if self.batch_first:
            x = x.transpose(0, 1)
        return x, (hx, cx)

    def _states_of(self, layer: int, x: Any, hidden: Any) -> States:
        """The states that a layer begins with: of each direction, where it has two."""
        directions = 2 if self.bidirectional else 1
        sizes = (directions, x.shape[1], self.hidden_size)[not self.bidirectional :]
        if hidden is None:
            zeros = _zeros(sizes, x, (1.0, 0), x.dtype)
            return zeros, zeros
        if isinstance(hidden[0], (list, tuple)):
            return hidden[layer]  # type: ignore[no-any-return]
        hx, cx = hidden
        by_layer = (self.num_layers, *sizes)
        return hx.reshape(by_layer)[layer], cx.reshape(by_layer)[layer]

    def _get_name(self) -> str:
        return "QuantizableLSTM"

    @classmethod
    def from_float(cls, other: Any, qconfig: Any = None, split_gates: bool = False) -> LSTM:
        """An observed LSTM with the weights of a `torch.nn.LSTM`.

        Args:
            other: in training mode it gets fake-quantizers, otherwise observers.
            qconfig: used where `other` has none.
            split_gates: as the class has it.
        """
        if not isinstance(other, cls._FLOAT_MODULE):
            raise QuantizationError(
                f"LSTM.from_float takes a torch.nn.LSTM, got {type(other).__name__}"
            )
        if getattr(other, "proj_size", 0):
            raise QuantizationError(
                f"an LSTM with proj_size={other.proj_size} has no quantizable form"
            )
        found = _require_qconfig(other, qconfig)
        made = cls(
            *(other.input_size, other.hidden_size, other.num_layers, other.bias),
            *(other.batch_first, other.dropout, other.bidirectional),
            split_gates=split_gates,
        )
        made.qconfig = found

        def cell(layer: int, suffix: str) -> LSTMCell:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            wi, wh, bi, bh = (getattr(other, f"{n}_l{layer}{suffix}", None) for n in names)
            return LSTMCell.from_params(wi, wh, bi, bh, split_gates)  # type: ignore[arg-type]

        made.layers = made._layers_of(cell)
        for layer in made.layers:
            layer.qconfig = found
        return with_observers(made.train(other.training))  # type: ignore[no-any-return]

    @classmethod
    def from_observed(cls, other: Any) -> LSTM:
        """Refused: this class is observed, and becomes a quantized one."""
        raise NotImplementedError(
            "an observed LSTM is converted to fastquant.nn.quantized.LSTM, not to its own class"
        )
