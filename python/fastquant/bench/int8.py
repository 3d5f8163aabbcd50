"""`run_int8`: a model in float, converted natively and converted to torch.ao's modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.dtypes import is_torch_quantized
from .._torch.private import tree_leaves
from ..nn.quantized import FloatLayer
from ..quantize import convert
from .errors import BenchError, attempt
from .layers import layer_costs
from .machine import machine
from .models import as_call, described
from .report import FLOAT, OURS, THEIRS, Layer, caveats, conditions, layer_lines, time_line
from .steps import Step, fused, libraries
from .timing import Case, Summary, measuring, time_rounds

INT8_QCONFIGS = ("x86", "fbgemm", "qnnpack", "onednn", "native")

_BACKENDS = {OURS: "native", THEIRS: "torch.ao"}


@dataclass(frozen=True)
class Int8Report:
    """What :func:`fastquant.bench.run_int8` found.

    Attributes:
        model: the model's name.
        qconfig: the backend whose default qconfig was used.
        inputs: shape and dtype of each input.
        threads: torch's threads meanwhile.
        rounds: how often everything was measured.
        undisturbed: during how many of the rounds no other work took the processors away.
        seconds: time of one forward in each round, in "float", converted by "fastquant" with
            `backend="native"`, and converted to the modules of "torch.ao".
        layers: what each converted layer cost, costliest first.
        signal_to_noise: of each converted model's output, against its difference from the float
            model's, in dB: `10 log10(sum of squared outputs / sum of squared differences)`. With
            random weights it says little.
        floating: layers without a native form, and why each has none.
        torch_ao_error: how torch.ao's model fails; None where it does not.
        machine: processor, instruction set and versions.
    """

    model: str
    qconfig: str
    inputs: list[str]
    threads: int
    rounds: int
    undisturbed: int
    seconds: dict[str, list[float]]
    layers: list[Layer]
    signal_to_noise: dict[str, float]
    floating: dict[str, str]
    torch_ao_error: str | None
    machine: dict[str, Any] = field(default_factory=machine)

    def speed(self, name: str, base: str) -> Summary:
        """How many times as fast `name` is as `base`: median and quartiles of the rounds' ratios.

        Raises:
            KeyError: `name` or `base` was not timed.
        """
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return Summary.of([slow / fast for slow, fast in pairs])

    def caveats(self) -> list[str]:
        """Why the times may mislead, one sentence each; empty if nothing suggests that they do."""
        return caveats(self.seconds, self.rounds, self.undisturbed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: times in seconds, as median and quartiles of the rounds."""
        return {
            "model": self.model,
            "mode": "int8",
            "qconfig": self.qconfig,
            "inputs": self.inputs,
            "threads": self.threads,
            "rounds": self.rounds,
            "undisturbed": self.undisturbed,
            "caveats": self.caveats(),
            "seconds": {name: vars(Summary.of(s)) for name, s in self.seconds.items()},
            # JSON has no infinity: no difference at all is null.
            "signal_to_noise": {
                name: value if math.isfinite(value) else None
                for name, value in self.signal_to_noise.items()
            },
            "floating": self.floating,
            "torch_ao_error": self.torch_ao_error,
            "layers": [layer.as_dict() for layer in self.layers],
            "machine": self.machine,
        }

    def table(self, top: int = 10) -> str:
        """The same as text in lines, with the `top` costliest layers."""
        lines = [
            f"{self.model}, {', '.join(self.inputs)}; int8, {self.qconfig} qconfig; "
            + conditions(self.threads, self.machine, self.rounds, self.undisturbed),
            "",
            *self._model_lines(),
            "",
            *layer_lines("layers", self.layers, list(self.signal_to_noise), top),
            "",
            *(f"{path} stays floating: {reason}" for path, reason in self.floating.items()),
            *([f"torch.ao cannot do this: {self.torch_ao_error}"] if self.torch_ao_error else []),
            *(f"WARNING: {caveat}." for caveat in self.caveats()),
        ]
        return "\n".join(lines).rstrip()

    def _model_lines(self) -> Iterator[str]:
        for name, seconds in self.seconds.items():
            line = time_line(f"forward, {name}", Summary.of(seconds))
            if name != FLOAT:
                line += f"  {self.speed(name, FLOAT).median:.2f}x float"
            if name == OURS and THEIRS in self.seconds:
                line += f", {self.speed(OURS, THEIRS).median:.2f}x torch.ao"
            if name in self.signal_to_noise:
                line += f"; {self.signal_to_noise[name]:.1f} dB signal to noise"
            yield line


def run_int8(
    model: nn.Module,
    inputs: Any,
    *,
    name: str | None = None,
    qconfig: str = "x86",
    threads: int | None = None,
    rounds: int = 10,
    progress: bool = True,
) -> Int8Report:
    """Measure a float model in float, and converted to int8 natively and to torch.ao's modules.

    The model itself is not changed. It is fused where it has a `fuse_model` method, prepared and
    calibrated once, by fastquant, on the example input; both conversions start from there.

    Args:
        model: float model on the CPU.
        inputs: example input: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments.
        name: what the report calls the model.
        qconfig: backend whose default qconfig is used: "x86", "fbgemm", "qnnpack", "onednn", or
            "native", with which torch.ao's kernels may saturate.
        threads: torch's threads meanwhile; None leaves them as they are.
        rounds: how often everything is measured, interleaved.
        progress: show a progress bar on stderr.

    Returns:
        The times of all rounds, in seconds, and how close the outputs are;
        `print(report.table())` shows them.

    Raises:
        BenchError: the model does not run on the input, or cannot be converted natively.
        RuntimeError: torch.ao.quantization is patched, which leaves nothing to compare with.
        ValueError: qconfig is not one of those above, or threads or rounds is below 1.
    """
    if qconfig not in INT8_QCONFIGS:
        raise ValueError(f"qconfig must be one of {', '.join(INT8_QCONFIGS)}, got {qconfig!r}")
    with measuring(threads, rounds, progress) as bar:
        return _report(model, inputs, name or type(model).__name__, qconfig, rounds, bar)


def _report(
    model: nn.Module, inputs: Any, name: str, qconfig: str, rounds: int, bar: Any
) -> Int8Report:
    steps, outputs, floating, torch_ao_error = _converted(model, inputs, qconfig, bar)
    converted = {key: step for key, step in steps.items() if key != FLOAT}
    bar.reset(total=rounds * (len(steps) + len(converted)))
    bar.set_description("whole model")
    whole = time_rounds({key: Case(step) for key, step in steps.items()}, rounds, bar.update)
    bar.set_description("layer by layer")
    layers = layer_costs(converted, rounds, bar.update, _quantized_layers)
    return Int8Report(
        model=name,
        qconfig=qconfig,
        inputs=described(inputs),
        threads=torch.get_num_threads(),
        rounds=rounds,
        undisturbed=whole.undisturbed,
        seconds=whole.seconds,
        layers=layers,
        signal_to_noise={key: _decibels(outputs[FLOAT], outputs[key]) for key in converted},
        floating=floating,
        torch_ao_error=torch_ao_error,
    )


def _converted(
    model: nn.Module, inputs: Any, qconfig: str, bar: Any
) -> tuple[dict[str, Step], dict[str, Tensor], dict[str, str], str | None]:
    """Steps, outputs, layers that stay floating, and how torch.ao's model fails, if it does."""
    ours, _ = libraries()
    model = copy.deepcopy(model).eval()
    base = attempt("the model's fuse_model fails", partial(fused, model, "calibrate"))
    steps = {FLOAT: Step(base, inputs, "calibrate")}
    expected = attempt("the model does not run on the input", partial(_output, base, inputs))
    outputs = {FLOAT: expected}
    bar.set_description("calibrating")
    prepared = attempt(
        "fastquant cannot prepare the model",
        partial(ours.prepared, base, "calibrate", qconfig),
    )
    attempt("the prepared model does not run", partial(_output, prepared, inputs))
    torch_ao_error = None
    for key, backend in _BACKENDS.items():
        bar.set_description(f"converting, {key}")
        try:
            converted = attempt(
                f"the model cannot be converted with backend={backend!r}",
                partial(convert, prepared, backend=backend),
            )
            outputs[key] = attempt(
                f"the model converted with backend={backend!r} does not run",
                partial(_output, converted, inputs),
            )
        except BenchError as error:
            if key == OURS:
                raise
            torch_ao_error = str(error)
        else:
            steps[key] = Step(converted, inputs, "calibrate")
    if not _quantized_layers(steps[OURS].model):
        raise BenchError("nothing in the model is quantized: no layer has a QuantStub before it")
    floating = _floating_layers(prepared, steps[OURS].model)
    return steps, outputs, floating, torch_ao_error


def _quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that convert has put in, but for those whose operations are methods."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "zero_point") and type(module).__name__ != "QFunctional"
    }


def _floating_layers(prepared: nn.Module, converted: nn.Module) -> dict[str, str]:
    """The layers that convert left floating although they had a qconfig, and why."""
    floating = {}
    for path, module in converted.named_modules():
        if isinstance(module, FloatLayer):
            floating[path] = module.reason
        elif (
            isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and getattr(prepared.get_submodule(path), "qconfig", None) is not None
        ):
            floating[path] = "its qconfig is not one for embeddings"
    return floating


def _output(model: nn.Module, inputs: Any) -> Tensor:
    """All floating results of a forward, in one row."""
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        leaves = tree_leaves(model(*args, **kwargs))
    found = [
        (leaf.dequantize() if is_torch_quantized(leaf) else leaf).double().flatten()
        for leaf in leaves
        if isinstance(leaf, Tensor) and (is_torch_quantized(leaf) or leaf.is_floating_point())
    ]
    if not found:
        raise BenchError("the model must return floating tensors")
    return torch.cat(found)


def _decibels(expected: Tensor, got: Tensor) -> float:
    noise = float((got - expected).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf
