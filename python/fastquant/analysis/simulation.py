"""A float model each of whose layers can be made to compute as it was quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import functional as F
from .._conversion.checks import listed
from ..nn.quantized import FloatFunctional
from .between import Between, copied, remember_grid
from .errors import AnalysisError
from .metrics import Metric, score
from .reading import CUSTOM, Quantized, core

FLOAT, QUANTIZED = 0, 1

OBSERVED = ("add", "mul", "cat", "add_relu", "matmul")
"""The operations of a FloatFunctional whose results are observed."""

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def _rounded_to_seven_bits(x: Tensor) -> Tensor:
    """What a dynamic layer's kernel makes of its input; seven bits cannot overflow in it."""
    low, high = x.detach().float().aminmax()
    scale, zero_point = F.choose_qparams(low, high, quant_min=0, quant_max=127)
    return F.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=255)


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
        # What differs between the ways: the module's own tensors, and their values in float.
        self._tensors: dict[str, Tensor] = {}
        self._float: dict[str, Tensor] = {}
        if way.weight is not None:
            self._own("weight", self._core.weight)
            if getattr(self._core, "bias", None) is not None:
                self._own("bias", self._core.bias)
            elif way.bias is not None:
                # A batch norm that was folded leaves a bias where there was none.
                self._own("bias", torch.zeros_like(way.bias))
        else:
            tensors = dict((*module.named_parameters(), *module.named_buffers()))
            for name, tensor in way.state.items():
                if name in tensors and tensors[name].shape == tensor.shape:
                    self._tensors[name] = tensors[name]
                    self._float[name] = tensors[name].detach()
        self.add_way(way)
        if isinstance(module, FloatFunctional):
            module.activation_post_process = _OutputOf(self)
            for method in OBSERVED:
                within = simulation.between.within(getattr(module, method))
                vars(module)[method] = within
        else:
            self.module.register_forward_pre_hook(self._before, with_kwargs=True)
            self.module.register_forward_hook(self._hook, with_kwargs=True)

    def _own(self, name: str, value: Tensor) -> None:
        """Give the module its own parameter: layers may share theirs, and change one by one."""
        self._float[name] = value.detach()
        self._tensors[name] = nn.Parameter(value.detach(), requires_grad=False)
        setattr(self._core, name, self._tensors[name])

    @property
    def float_weight(self) -> Tensor | None:
        """The float model's weight; None for layers without a quantized one."""
        return self._float["weight"] if self.ways[0].weight is not None else None

    def add_way(self, way: Quantized) -> None:
        """One more way to quantize the layer; checks that it has the layer's shape."""
        if way.weight is not None:
            theirs = list(self._float["weight"].shape) if "weight" in self._float else None
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
        if state != self.state:
            self.state = state
            self._apply()

    def _apply(self) -> None:
        values: Mapping[str, Tensor | None] = {}
        if self.state:
            way = self.ways[self.state - 1]
            values = {**way.state, "weight": way.weight, "bias": way.bias}
            if way.weight is None:
                values = way.state
        for name, tensor in self._tensors.items():
            value = values.get(name)
            tensor.data = self._float[name] if value is None else value

    def set_bias(self, bias: Tensor) -> None:
        """Have another bias in the quantized layer."""
        if "bias" not in self._tensors:
            self._own("bias", torch.zeros_like(bias))
        self.ways[0] = replace(self.ways[0], bias=bias)
        self._apply()

    def round_output(self, x: Any) -> Any:
        """An output as the present state leaves it."""
        grid = self.ways[self.state - 1].output if self.state else None
        if grid is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        rounded = grid.quantized(x)
        remember_grid(rounded, grid)
        return rounded

    def alone(self, call: Call | None, output: Any) -> Any:
        """What the quantized layer gives for a float input, before its output is rounded.

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
            return output
        finally:
            self.set(state)

    def _rounded_input(self, call: Call) -> Call:
        args, kwargs = call
        if self.state and self.ways[self.state - 1].dynamic and args:
            args = (_rounded_to_seven_bits(args[0]), *args[1:])
        return args, kwargs

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._simulation.between.begin()
        return self._rounded_input((args, kwargs))

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        output = self.after((args, kwargs), output)
        self._simulation.between.end()
        return output

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
        between: the context in which what lies between the sites rounds as in a converted model.

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
        self.between = Between(model, (m for m in modules.values() if isinstance(m, CUSTOM)))
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

    def run(self, run: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """What the model returns for a batch, as the sites' states are."""
        with self.between:
            return run(self.model, batch)

    def score(self, metric: Metric, which: str) -> float:
        """A user's metric of the model, as the sites' states are; `which` names it in an error."""
        with self.between:
            return score(metric, self.model, which)

    def record(self, run: Callable[[nn.Module, Any], Any], batch: Any) -> tuple[Any, Recording]:
        """What the model returns for a batch, and what its layers gave meanwhile."""
        recording = Recording()
        with self.listening(recording.note):
            return self.run(run, batch), recording

    @contextmanager
    def replaying(self, outputs: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
        """In here, these layers give what they gave before, and compute nothing.

        They must be in float: what they give was rounded before.
        """
        with ExitStack() as stack:
            for name, given in outputs.items():
                stack.enter_context(_returning(self.sites[name].module, given))
            yield


class Recording:
    """What layers gave in a run of the model, and in which order."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[Tensor]] = {}
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._calls = 0

    def note(self, site: Site, call: Call | None, output: Any) -> None:
        """The listener that records."""
        self._first.setdefault(site.name, self._calls)
        self._last[site.name] = self._calls
        self._calls += 1
        # A FloatFunctional has methods instead of a forward, and takes little time.
        if call is not None and isinstance(output, Tensor):
            self._outputs.setdefault(site.name, []).append(copied(output))

    def before(self, name: str) -> dict[str, list[Tensor]]:
        """The outputs of layers that are done before this one begins: it does not change them."""
        first = self._first.get(name, 0)
        return {
            other: outputs
            for other, outputs in self._outputs.items()
            if self._last[other] < first and not other.startswith(f"{name}.")
        }


@contextmanager
def _returning(module: nn.Module, outputs: Sequence[Tensor]) -> Iterator[None]:
    """In here, the module's calls return copies of these tensors, one after the other."""
    # Copies, because an operation that follows may change its input in place.
    rest = iter(outputs)
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = lambda *args, **kwargs: copied(next(rest))
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before
