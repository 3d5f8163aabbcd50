"""A float model each of whose layers can be made to compute as it was quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._conversion.checks import listed
from .._torch.ao import nnq
from .errors import AnalysisError
from .reading import Quantized, core

FLOAT, QUANTIZED = 0, 1

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class _OutputOf(nn.Module):
    """What a FloatFunctional calls on its results."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._site = site

    def forward(self, x: Any) -> Any:
        return self._site.after(None, x)


class Site:
    """A layer of the model, with the ways in which it can compute.

    Attributes:
        name: in the model.
        module: of the float model.
        ways: how it may be quantized; state i > 0 is `ways[i - 1]`.
        state: 0 computes in float.
    """

    def __init__(self, simulation: Simulation, name: str, module: Any, way: Quantized) -> None:
        self.name = name
        self.module: nn.Module = module
        self.ways: list[Quantized] = []
        self.state = FLOAT
        self._simulation = simulation
        self._core = core(module)
        self.float_weight: Tensor | None = None
        self.float_bias: Tensor | None = None
        if way.weight is not None:
            self.float_weight = self._core.weight.detach()
            # Parameters of its own: layers may share theirs, and change state one by one.
            self._core.weight = nn.Parameter(self.float_weight, requires_grad=False)
            if getattr(self._core, "bias", None) is None and way.bias is not None:
                # A batch norm that was folded leaves a bias where there was none.
                self._core.bias = nn.Parameter(torch.zeros_like(way.bias), requires_grad=False)
            if getattr(self._core, "bias", None) is not None:
                self.float_bias = self._core.bias.detach()
                self._core.bias = nn.Parameter(self.float_bias, requires_grad=False)
        self.add_way(way)
        if isinstance(module, nnq.FloatFunctional):
            module.activation_post_process = _OutputOf(self)  # type: ignore[assignment]
        else:
            self.module.register_forward_pre_hook(self._before, with_kwargs=True)
            self.module.register_forward_hook(self._hook, with_kwargs=True)

    def add_way(self, way: Quantized) -> None:
        """One more way to quantize the layer; checks that it has the layer's shape."""
        if way.weight is not None:
            theirs = None if self.float_weight is None else list(self.float_weight.shape)
            if theirs != list(way.weight.shape):
                raise AnalysisError(
                    f"the weight of {self.name} has the shape {list(way.weight.shape)} in the "
                    f"quantized model and {theirs} in the float model"
                )
        self.ways.append(way)

    @property
    def way(self) -> Quantized:
        """How the quantized model does it."""
        return self.ways[0]

    def set(self, state: int) -> None:
        """Compute in float, or in one of the ways."""
        if state == self.state:
            return
        self.state = state
        way = self.ways[state - 1] if state else None
        if self.float_weight is not None:
            weight = self.float_weight if way is None or way.weight is None else way.weight
            self._core.weight.data = weight
        if self.float_bias is not None:
            bias = self.float_bias if way is None or way.bias is None else way.bias
            self._core.bias.data = bias

    def round_output(self, x: Any) -> Any:
        """An output as the present state leaves it."""
        grid = self.ways[self.state - 1].output if self.state else None
        if grid is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return grid.quantized(x)

    def alone(self, call: Call | None, output: Any) -> Any:
        """What the quantized layer gives for a float input.

        Args:
            call: arguments of the float layer; None for a FloatFunctional.
            output: what the float layer gave for them.
        """
        state = self.state
        self.set(QUANTIZED)
        try:
            if call is not None and self.way.weight is not None:
                args, kwargs = self._rounded_input(call)
                output = self.module.forward(*args, **kwargs)
            return self.round_output(output)
        finally:
            self.set(state)

    def _rounded_input(self, call: Call) -> Call:
        args, kwargs = call
        if self.state and self.ways[self.state - 1].dynamic and args:
            # As the kernels of dynamic layers choose it, for seven bits.
            x = torch.quantize_per_tensor_dynamic(args[0].float(), torch.quint8, True)
            args = (x.dequantize().to(args[0].dtype), *args[1:])
        return args, kwargs

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._rounded_input((args, kwargs))

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.after((args, kwargs), output)

    def after(self, call: Call | None, output: Any) -> Any:
        """What the layer's output becomes; tells the listener of it."""
        output = self.round_output(output)
        listener = self._simulation.listener
        if listener is not None:
            listener(self, call, output)
        return output


Listener: TypeAlias = Callable[[Site, Call | None, Any], None]


class Simulation:
    """The float model, with a site for each layer that was quantized.

    Args:
        model: as `aligned` gives it; is changed.
        layers: what quantization made of them.

    Attributes:
        model: computes what the states of the sites say.
        sites: by name.
        listener: is called with each output of each site, if any.

    Raises:
        AnalysisError: the float model lacks a layer, or a shape differs.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Quantized]) -> None:
        self.model = model
        self.listener: Listener | None = None
        modules = dict(model.named_modules())
        missing = [name for name in layers if name not in modules]
        if missing:
            raise AnalysisError(
                f"the float model has no {listed(missing)}, which the quantized model has: both "
                "must come from one model, whose modules keep their names"
            )
        self.sites = {
            name: Site(self, name, modules[name], layer) for name, layer in layers.items()
        }

    def set(self, state: int, names: Iterable[str] | None = None) -> None:
        """Bring all sites, or those of these names, to a state."""
        for name in self.sites if names is None else names:
            self.sites[name].set(state)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """In here, `listener` is called with each output of each site."""
        self.listener = listener
        try:
            yield
        finally:
            self.listener = None
