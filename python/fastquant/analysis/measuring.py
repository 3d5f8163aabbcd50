"""One walk over the data that measures every layer: in float, alone, and with all quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.batches import batch_size
from ..nn.quantized import FloatFunctional
from .clippings import clippings
from .errors import RUN_ERRORS, AnalysisError, first_line
from .grids import Grid
from .reading import CONVOLUTIONS, TRANSPOSED, core, left_out
from .result import OutputReport, WeightReport
from .simulation import FLOAT, OBSERVED, QUANTIZED, Call, Simulation, Site
from .sums import ErrorSums, OutputError, Values, as_float, as_integers, require_same_shape

_CHANNELS_FIRST = (
    *CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm,
)  # fmt: skip
# The page draws this many bars.
_BARS = 128
# Errors take two more forwards than values, and differ less from batch to batch: they, and the
# integers used, are measured on one batch of so many, beginning with the first.
_ERRORS_EVERY = 3


@dataclass
class _Measured:
    """What was measured of a site's outputs."""

    values: Values
    calls: int = 0
    alone: ErrorSums = field(default_factory=ErrorSums)
    accumulated: ErrorSums = field(default_factory=ErrorSums)
    # Float outputs of the present batch, to compare the quantized ones with.
    outputs: list[Tensor] = field(default_factory=list)
    # How many of them have been compared.
    compared: int = 0
    # Whether something changes the outputs in place after the layer has returned them.
    changed_later: bool = True


class Measuring:
    """Measures of a model and its layers.

    Args:
        simulation: of the float model.
        converted: the model whose outputs are compared with the float one's; None simulates it.
        run: runs a model on a batch.
        may_fail: whether to simulate the model, too, if `converted` cannot be run.

    Attributes:
        error: of the model's output.
        batches: how many were run.
        samples: sum of the batches' first dimensions.
        failure: why `converted` could not be run; None where it was.
    """

    def __init__(
        self,
        simulation: Simulation,
        converted: nn.Module | None,
        run: Callable[[nn.Module, Any], Any],
        may_fail: bool = False,
    ) -> None:
        self._simulation = simulation
        self._converted = converted
        self._run = run
        self._may_fail = may_fail
        # Layers of modules that convert swaps whole: the converted model does not have them.
        whole = () if converted is None else tuple(f"{name}." for name in left_out(converted))
        self._inner = [name for name in simulation.sites if whole and name.startswith(whole)]
        self.failure: str | None = None
        self.error = OutputError()
        self.batches = self.samples = 0
        self._with_errors = True
        self._layers = {
            name: _Measured(Values(site.way.output, channel_axis(site)))
            for name, site in simulation.sites.items()
        }

    def walk(self, batches: Iterable[Any]) -> None:
        """Run all batches, in float and quantized.

        Raises:
            AnalysisError: there is no batch, or a layer was never called.
        """
        for batch in batches:
            self._measure(batch)
            self.batches += 1
            self.samples += batch_size(batch)
        if self.batches == 0:
            raise AnalysisError("data is empty: there was no batch to analyse the model with")
        unreached = [name for name, measured in self._layers.items() if not measured.calls]
        for name in list(unreached):
            # Models may have one in each block and use it in some.
            if isinstance(self._simulation.sites[name].module, FloatFunctional):
                del self._simulation.sites[name]
                unreached.remove(name)
        if unreached:
            raise AnalysisError(
                f"data never reached these layers: {', '.join(unreached)}. Use data that does, or "
                "prepare the model with their qconfig set to None"
            )

    def _measure(self, batch: Any) -> None:
        self._simulation.set(FLOAT)
        self._with_errors = self.batches % _ERRORS_EVERY == 0
        with self._simulation.listening(self._in_float):
            reference = self._run(self._simulation.model, batch)
        if not self._with_errors:
            return
        for measured in self._layers.values():
            # The first batch is kept in copies, by which it is seen who may do without.
            if self.batches == 0:
                originals, measured.outputs = measured.outputs[::2], measured.outputs[1::2]
                measured.changed_later = any(
                    original._version or not torch.equal(original, copied)
                    for original, copied in zip(originals, measured.outputs, strict=True)
                )
        self.error.add(reference, self._run_quantized(batch))
        for measured in self._layers.values():
            measured.outputs.clear()
            measured.compared = 0
        self._simulation.set(FLOAT)

    def _run_quantized(self, batch: Any) -> Any:
        """The quantized model's output; adds the errors of its layers."""
        if self._converted is not None:
            try:
                output = self._run_converted(self._converted, batch)
                if self._inner:
                    self._run_simulated(batch, self._inner)
                return output
            except AnalysisError:
                raise
            except RUN_ERRORS as error:
                if not self._may_fail or self.batches:
                    raise
                self.failure = first_line(error)
                self._converted = None
                for measured in self._layers.values():
                    measured.accumulated, measured.compared = ErrorSums(), 0
        return self._run_simulated(batch, self._layers)

    def _run_simulated(self, batch: Any, names: Collection[str]) -> Any:
        """What the simulation gives; adds the errors of these layers."""

        def note(site: Site, call: Call | None, output: Any) -> None:
            if site.name in names:
                self._compare(site.name, output)

        self._simulation.set(QUANTIZED)
        with self._simulation.listening(note):
            return self._simulation.run(self._run, batch)

    def _in_float(self, site: Site, call: Call | None, output: Any) -> None:
        measured = self._layers[site.name]
        measured.calls += 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        measured.values.add(output)
        if not self._with_errors:
            return
        alone = site.alone(call, output)
        require_same_shape(f"the output of {site.name}", output, alone)
        measured.values.add_error(measured.alone, output, alone)
        if self.batches == 0:
            measured.outputs += [output, output.clone()]
        else:
            measured.outputs.append(output.clone() if measured.changed_later else output)

    def _compare(self, name: str, output: Any) -> None:
        measured = self._layers[name]
        left = measured.compared < len(measured.outputs)
        if as_integers(output) is None:
            output = as_float(output)
            left = left and isinstance(output, Tensor) and output.is_floating_point()
        if left:
            reference = measured.outputs[measured.compared]
            measured.compared += 1
            require_same_shape(f"the output of {name}", reference, output)
            measured.accumulated.add(reference, output)

    def _run_converted(self, model: nn.Module, batch: Any) -> Any:
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for name in self._layers.keys() - set(self._inner):
                module, note = modules[name], partial(self._compare, name)
                if isinstance(self._simulation.sites[name].module, FloatFunctional):
                    stack.enter_context(_results_told(module, note))
                else:
                    hook = _output_told(note)
                    stack.callback(module.register_forward_hook(hook).remove)
            return self._run(model, batch)

    def calls(self, name: str) -> int:
        """How often a layer is called for a batch."""
        return round(self._layers[name].calls / self.batches)

    def output(self, name: str) -> OutputReport | None:
        """What was measured of a layer's output."""
        measured = self._layers[name]
        values, grid = measured.values, measured.values.grid
        if values.histogram is None or values.channels is None:
            return None
        ends: tuple[float | None, float | None] = (None, None)
        if grid is not None:
            low, high = grid.ends()
            ends = (low.min().item(), high.max().item())
        return OutputReport(
            shape=values.shape,
            bits=None if grid is None else grid.bits,
            scale=None if grid is None else float(grid.scale.flatten()[0]),
            zero_point=None if grid is None else float(grid.zero_point.flatten()[0]),
            low=values.low(),
            high=values.high(),
            clip_low=ends[0],
            clip_high=ends[1],
            clipped_share=values.clipped_share(),
            levels_used=values.levels_used(),
            channels=values.channels.min_val.numel(),
            dead_channels=values.dead_channels(),
            lost_channels=values.lost_channels(),
            nonfinite=values.nonfinite(),
            sqnr=measured.alone.sqnr,
            cosine=measured.alone.cosine,
            accumulated_sqnr=measured.accumulated.sqnr,
            accumulated_cosine=measured.accumulated.cosine,
            histogram=bars(values.histogram.histogram),
            clippings=clippings(values.histogram, grid),
        )

    def bytes_of_output(self, name: str) -> tuple[int, int]:
        """Bytes of a layer's output for a batch, in float and quantized."""
        values = self._layers[name].values
        elements = math.prod(values.shape) if values.shape else 0
        bits = 32 if values.grid is None else max(8, values.grid.bits)
        return elements * 4, elements * bits // 8


def _output_told(note: Callable[[Any], None]) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        note(output)

    return hook


@contextmanager
def _results_told(functional: Any, note: Callable[[Any], None]) -> Iterator[None]:
    """In here, `note` gets what the operations of a QFunctional return, which is not called."""

    def told(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            note(result)
            return result

        return call

    methods = [name for name in OBSERVED if callable(getattr(functional, name, None))]
    before = {name: vars(functional)[name] for name in methods if name in vars(functional)}
    for name in methods:
        vars(functional)[name] = told(getattr(functional, name))
    try:
        yield
    finally:
        for name in methods:
            del vars(functional)[name]
        vars(functional).update(before)


def channel_axis(site: Site) -> int:
    """Which axis of a layer's output is its channels."""
    module = core(site.module)
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding) else 1


def bars(histogram: Tensor) -> tuple[float, ...]:
    """A histogram in few enough bins to be drawn."""
    return tuple(histogram.double().reshape(_BARS, -1).sum(1).tolist())


def weight_report(site: Site) -> WeightReport | None:
    """What became of a layer's weight."""
    weight, quantized = site.float_weight, site.way.weight
    if weight is None or quantized is None:
        return None
    grid = site.way.weight_grid
    axis = 0
    if isinstance(core(site.module), TRANSPOSED):
        axis = 1
    sums = ErrorSums()
    sums.add(weight, quantized)
    values = Values(grid, axis)
    values.add(weight)
    values.add_clipped(weight)
    assert values.channels is not None
    low, high = values.channels.min_val, values.channels.max_val
    used = None
    if grid is not None:
        integers = grid.integers(quantized).nan_to_num_(nan=grid.quant_min) - grid.quant_min
        counts = torch.bincount(integers.flatten().int(), minlength=grid.levels)
        used = float((counts > 0).float().mean())
    return WeightReport(
        shape=tuple(weight.shape),
        bits=None if grid is None else grid.bits,
        ch_axis=None if grid is None else grid.ch_axis,
        scale=_extent(grid, "scale"),
        zero_point=_extent(grid, "zero_point"),
        low=values.low(),
        high=values.high(),
        channel_low=tuple(low.tolist()),
        channel_high=tuple(high.tolist()),
        clipped_share=values.clipped_share(),
        levels_used=used,
        dead_channels=values.dead_channels() if weight[0].numel() > 1 else 0,
        nonfinite=values.nonfinite(),
        sqnr=sums.sqnr,
        cosine=sums.cosine,
    )


def _extent(grid: Grid | None, name: str) -> tuple[float, float] | None:
    if grid is None:
        return None
    values: Tensor = getattr(grid, name)
    return float(values.min()), float(values.max())


def bytes_of_weight(site: Site) -> tuple[int, int]:
    """Bytes of a layer's weight, in float and quantized, scales included."""
    weight, grid = site.float_weight, site.way.weight_grid
    if weight is None:
        return 0, 0
    size = weight.numel() * weight.element_size()
    if grid is None:
        return size, weight.numel() * 2
    return size, weight.numel() * max(grid.bits, 4) // 8 + grid.scale.numel() * 4


def first(batches: Sequence[Any] | Iterable[Any]) -> Any:
    """The first batch.

    Raises:
        AnalysisError: there is none.
    """
    for batch in batches:
        return batch
    raise AnalysisError("data is empty: there was no batch to analyse the model with")
