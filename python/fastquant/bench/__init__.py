"""What observers and fake-quantize cost on a model, beside torch.ao.

    python -m fastquant.bench                         # a small CNN
    python -m fastquant.bench resnet18 --mode qat     # torchvision's, where it is installed
    python -m fastquant.bench my_package.my_module:build --input 8x3x224x224

The model is timed in float, prepared by fastquant, and prepared by torch.ao, in turn; then
each layer's observers. Beforehand, both prepared models see the same input once and must have
observed the same ranges. `run` does the same from Python.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import re
import shlex
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import patching, qconfig
from .._torch.private import tree_leaves
from ..fake_quantize import disable_fake_quant, enable_fake_quant
from ..fuse_modules import fuse_modules, fuse_modules_qat
from ..observer import _is_activation_post_process
from ..quantize import prepare, prepare_qat
from ..stubs import DeQuantStub, QuantStub
from .timing import Case, Summary, machine, readable_time, threads_set_to, time_rounds

__all__ = [
    "BenchError",
    "Layer",
    "Report",
    "Step",
    "fused",
    "main",
    "run",
    "small_cnn",
    "torchvision_model",
]

MODES = ("calibrate", "qat")
QCONFIGS = ("x86", "fbgemm", "qnnpack", "onednn")

Ranges = dict[str, list[Tensor]]

# How far apart ranges may be, in their widths. What calibration observes is the same float
# model. A QAT module of fastquant does a batch norm's scaling on the weight, torch.ao's on the
# output, which rounds otherwise.
_TOLERANCE = {"calibrate": 0.0, "qat": 1e-4}

FLOAT, OURS, THEIRS = "float", "fastquant", "torch.ao"


class BenchError(Exception):
    """A model or an input that cannot be measured; the message says why, in one line."""

    def __init__(self, what: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            what = f"{what}: {type(cause).__name__}: {cause}"
        super().__init__(" ".join(what.split()))


# --------------------------------------------------------------------------------------------
# Models


class _SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = [3, 32, 64, 128]
        blocks = [
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for i, o in pairwise(channels)
        ]
        self.quant = QuantStub()
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], 10)
        self.dequant = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(self.quant(x))).flatten(1)
        result: Tensor = self.dequant(self.classifier(x))
        return result

    def fuse_model(self, is_qat: bool = False) -> None:
        fuse = fuse_modules_qat if is_qat else fuse_modules
        for block in self.features:
            fuse(block, ["0", "1", "2"], inplace=True)


def small_cnn() -> nn.Module:
    """Three convolutions with batch norm and ReLU, and a classifier; for `[N, 3, H, W]`."""
    return _SmallCNN()


def torchvision_model(name: str) -> nn.Module:
    """A quantizable model of torchvision, in float and randomly initialised.

    Args:
        name: as in `torchvision.models.quantization`: "mobilenet_v2", "resnet18", …

    Raises:
        ImportError: torchvision is not installed or does not import.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            models = _torchvision_models()
        except ImportError as error:
            raise ImportError(
                f"{name} needs torchvision, which does not import here ({error}): "
                "pip install --no-deps torchvision"
            ) from error
    model: nn.Module = getattr(models, name)(weights=None, quantize=False)
    return model


def _torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models.quantization")
    except RuntimeError:
        # torchvision without its compiled library, which is not built for every torch, lacks
        # the schemas of two ops that classifiers never call.
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(schema)  # type: ignore[no-untyped-call]
        _kept.append(library)
    try:
        return importlib.import_module("torchvision.models.quantization")
    except RuntimeError as error:
        raise ImportError(str(error)) from error


# What a library defined goes with it.
_kept: list[torch.library.Library] = []

# Each with the input it gets unless another is given.
_BUILT_IN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "small_cnn": (small_cnn, "8x3x64x64"),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), "8x3x224x224"),
    "resnet18": (lambda: torchvision_model("resnet18"), "8x3x224x224"),
}


def _load(spec: str, what: str) -> Any:
    """The object at "module:name"; `name` may be dotted."""
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise BenchError(f"{what} must be module:callable, got {spec!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise BenchError(f"cannot import {module_name!r} of {what} {spec!r}", error) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise BenchError(f"{what} {spec!r} is not there", error) from error
    return found


def _load_model(spec: str) -> nn.Module:
    build = _BUILT_IN[spec][0] if spec in _BUILT_IN else None
    if build is None:
        if ":" not in spec:
            raise BenchError(
                f"model must be module:callable or one of {', '.join(_BUILT_IN)}, got {spec!r}"
            )
        build = _load(spec, "model")
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise BenchError(f"model {spec!r} is neither a module nor callable: {build!r}")
    torch.manual_seed(0)
    try:
        model = build()
    except Exception as error:
        raise BenchError(f"model {spec!r} cannot be built", error) from error
    if not isinstance(model, nn.Module):
        raise BenchError(f"model {spec!r} must give a torch.nn.Module, gave {type(model).__name__}")
    return model


# --------------------------------------------------------------------------------------------
# Inputs

_INPUT = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>\w+))?")


def _parse_input(spec: str) -> Tensor:
    """A tensor of "8x3x224x224" or "16x128:int64": normal numbers, or zeros and ones."""
    match = _INPUT.fullmatch(spec)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise BenchError(
            f"input must be sizes and perhaps a dtype, as in 8x3x224x224 or 16x128:int64, "
            f"got {spec!r}"
        )
    shape = [int(size) for size in match["shape"].split("x")]
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 2, shape).to(dtype)
    except (RuntimeError, TypeError) as error:
        raise BenchError(f"input {spec!r} cannot be made", error) from error


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a mapping is the latter, a tuple or list the former."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape))}:{str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


# --------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class Layer:
    """What one layer's observers, or its weight's, cost in one forward.

    ``shape`` is that of the first tensor observed; ``seconds`` holds a summary for
    "fastquant" and, where torch.ao ran, "torch.ao".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: int
    seconds: dict[str, Summary]


@dataclass(frozen=True)
class Report:
    """What :func:`run` found.

    ``undisturbed`` of the ``rounds`` kept their processors: the others shared them with work of
    other processes.
    ``seconds``: times of one forward (mode "calibrate") or training step ("qat") of the model
    in "float", and prepared by "fastquant" and "torch.ao": one for each round.
    ``same_ranges``: whether both observed the same ranges: bit for bit in calibration, but for
    the rounding of QAT modules in training; None where torch.ao failed, and ``torch_ao_error``
    says how. ``largest_difference`` is in widths of the range; ``differences`` names the layers
    whose ranges are not the same.
    """

    model: str
    mode: str
    qconfig: str
    inputs: list[str]
    threads: int
    rounds: int
    undisturbed: int
    seconds: dict[str, list[float]]
    layers: list[Layer]
    same_ranges: bool | None
    largest_difference: float | None
    differences: list[str]
    torch_ao_error: str | None
    machine: dict[str, Any] = field(default_factory=machine)

    def overhead(self, name: str) -> Summary:
        """Time beyond the float model's in the same round, as a fraction of it."""
        pairs = zip(self.seconds[name], self.seconds[FLOAT], strict=True)
        return Summary.of([prepared / plain - 1 for prepared, plain in pairs])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times are seconds."""
        apart = math.inf if self.largest_difference is None else self.largest_difference
        return {
            "model": self.model,
            "mode": self.mode,
            "qconfig": self.qconfig,
            "inputs": self.inputs,
            "threads": self.threads,
            "rounds": self.rounds,
            "undisturbed": self.undisturbed,
            "seconds": {name: vars(Summary.of(s)) for name, s in self.seconds.items()},
            "overhead": {name: vars(self.overhead(name)) for name in self.seconds if name != FLOAT},
            "same_ranges": self.same_ranges,
            # JSON has no infinity, which is how far apart ranges are that cannot be compared.
            "largest_difference": apart if math.isfinite(apart) else None,
            "differences": self.differences,
            "torch_ao_error": self.torch_ao_error,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "calls": layer.calls,
                    "seconds": {name: vars(summary) for name, summary in layer.seconds.items()},
                }
                for layer in self.layers
            ],
            "machine": self.machine,
        }

    @property
    def _what(self) -> str:
        return "forward" if self.mode == "calibrate" else "training step"

    def table(self, top: int = 10) -> str:
        """The same for people; the `top` costliest layers."""
        lines = [
            f"{self.model}, {', '.join(self.inputs)}; {self.mode}, {self.qconfig} qconfig; "
            f"{self.threads} thread{'s' * (self.threads != 1)}, {self.machine['isa']}, "
            f"torch {self.machine['torch']}; median of {self.rounds} rounds (quartiles), "
            f"{self.undisturbed} of them undisturbed by other processes",
            "",
        ]
        for name, seconds in self.seconds.items():
            summary = Summary.of(seconds)
            label = f"{self._what}, {name}"
            line = f"{label:<26}{readable_time(summary.median):>9}"
            line += f"  ({readable_time(summary.low)} to {readable_time(summary.high)})"
            if name != FLOAT:
                line += f"  {self.overhead(name).median:+.0%}"
            lines.append(line)
        lines += ["", *self._layer_lines(top), "", self._verdict()]
        return "\n".join(lines)

    def _layer_lines(self, top: int) -> Iterator[str]:
        names = [name for name in self.seconds if name != FLOAT]
        rows = [*self.layers[:top], self._total()]
        width = max(len(layer.name) for layer in rows)
        yield (
            f"{'observers in one ' + self._what:<{width + 24}}"
            + "".join(f"{name:>11}" for name in names)
            + ("    ratio" if len(names) > 1 else "")
        )
        for layer in rows:
            sizes = "x".join(map(str, layer.shape))
            calls = f" ({layer.calls} calls)" if layer.calls > 1 else ""
            times = [layer.seconds[name].median for name in names]
            yield (
                f"{layer.name:<{width}}  {sizes + calls:<22}"
                + "".join(f"{readable_time(time):>11}" for time in times)
                + (f"{times[1] / times[0]:8.1f}x" if len(times) > 1 else "")
            )

    def _total(self) -> Layer:
        names = [name for name in self.seconds if name != FLOAT]
        sums = {n: math.fsum(layer.seconds[n].median for layer in self.layers) for n in names}
        count = f"all {len(self.layers)}"
        return Layer(count, "", (), 1, {n: Summary(s, s, s) for n, s in sums.items()})

    def _verdict(self) -> str:
        if self.torch_ao_error is not None:
            return f"torch.ao cannot do this: {self.torch_ao_error}"
        if self.same_ranges:
            apart = self.largest_difference
            exactly = f"to within {apart:.0e} of their width" if apart else "bit for bit"
            return f"Both observed the same ranges, {exactly}, in all {len(self.layers)} layers."
        return "RANGES DIFFER in: " + ", ".join(self.differences)


# --------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class _Side:
    """A library to prepare with."""

    name: str
    prepare: Callable[..., nn.Module]
    prepare_qat: Callable[..., nn.Module]
    qconfigs: ModuleType

    def prepared(self, model: nn.Module, mode: str, backend: str) -> nn.Module:
        """A prepared copy of a model; its parts keep no qconfig of their own but None."""
        model = copy.deepcopy(model)
        kind = "get_default_qat_qconfig" if mode == "qat" else "get_default_qconfig"
        config = getattr(self.qconfigs, kind)(backend)
        for module in model.modules():
            if getattr(module, "qconfig", None) is not None:
                module.qconfig = config
        model.qconfig = config
        make = self.prepare_qat if mode == "qat" else self.prepare
        return make(model, inplace=True)


def _sides() -> tuple[_Side, _Side]:
    theirs = patching.original()
    return (
        _Side(OURS, prepare, prepare_qat, qconfig),
        _Side(THEIRS, theirs.prepare, theirs.prepare_qat, theirs),
    )


def fused(model: nn.Module, mode: str) -> nn.Module:
    """A copy, fused by its own `fuse_model` where it has one that knows of the mode."""
    model = copy.deepcopy(model)
    fuse = getattr(model, "fuse_model", None)
    if callable(fuse):
        if "is_qat" in inspect.signature(fuse).parameters:
            fuse(is_qat=mode == "qat")
        elif mode == "calibrate":
            fuse()
    return model


class Step:
    """One forward without gradients, or one training step."""

    def __init__(self, model: nn.Module, inputs: Any, mode: str) -> None:
        self.model = model
        self._args, self._kwargs = _as_call(inputs)
        self._optimizer: torch.optim.SGD | None = None
        if mode == "qat":
            parameters = [p for p in model.parameters() if p.requires_grad]
            if not parameters:
                raise BenchError("mode 'qat' needs a model with parameters to train")
            # Small steps: what is measured must not drift.
            self._optimizer = torch.optim.SGD(parameters, lr=1e-6)

    def __call__(self) -> None:
        if self._optimizer is None:
            with torch.no_grad():
                self.model(*self._args, **self._kwargs)
            return
        self._optimizer.zero_grad()
        output = self.model(*self._args, **self._kwargs)
        losses = [
            leaf.float().square().mean()
            for leaf in tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not losses:
            raise BenchError("mode 'qat' needs a model whose output has a gradient")
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def _observers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost observers and fake-quantizers, by the name of their layer."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if _is_activation_post_process(module):
            inside.append(f"{name}.")
            layer = re.sub(r"(^|\.)activation_post_process$", "", name)
            found[re.sub(r"weight_fake_quant$", "weight", layer) or "the model itself"] = module
    return found


def _first_ranges(step: Step) -> Ranges:
    """What one step observes that leaves tensors as they are; a step as usual follows.

    torch.ao's fused fake-quantize has scales of its own, so what comes after it differs.
    """
    step.model.apply(disable_fake_quant)
    step()
    ranges = _ranges(step.model)
    step.model.apply(enable_fake_quant)
    step()
    return ranges


def _ranges(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the ranges that were observed, by layer."""
    return {
        layer: [
            buffer.clone()
            for name, buffer in sorted(observer.named_buffers())
            if name.split(".")[-1] in ("min_val", "max_val")
        ]
        for layer, observer in _observers(model).items()
    }


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """How far apart two ranges are at most, in widths of the range; 0 for the same bits."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    if all(map(torch.equal, ours, theirs)):
        return 0.0
    a, b = torch.stack(tuple(ours)), torch.stack(tuple(theirs))
    apart = (a - b).abs() / (b[0] - b[-1]).abs()
    # Infinities on both sides, where nothing was observed, are no difference.
    return float(apart[a != b].nan_to_num(nan=math.inf).max())


def _differences(ours: Ranges, theirs: Ranges) -> dict[str, float]:
    """By layer, how far its ranges are apart."""
    return {
        layer: _difference(ours.get(layer, ()), theirs.get(layer, ()))
        for layer in sorted(ours.keys() | theirs.keys())
    }


class _LayerClock:
    """Adds up the time that each observer of a model takes in one pass."""

    def __init__(self, model: nn.Module) -> None:
        self._observers = _observers(model)
        self.kinds = {name: type(module).__name__ for name, module in self._observers.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def running(self) -> Iterator[None]:
        """In here, `forward` of every observer is timed, from zero."""
        self.calls.clear()
        self.seconds.clear()
        for name, observer in self._observers.items():
            # The instance's attribute comes before the class's method, and takes no hook.
            observer.forward = self._timed(name, observer.forward)
        try:
            yield
        finally:
            for observer in self._observers.values():
                del observer.forward

    def _timed(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, Tensor):
                self.shapes.setdefault(name, tuple(x.shape))
            start = time.perf_counter()
            result = forward(x, *args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            self.calls[name] += 1
            return result

        return timed


def _layer_costs(
    steps: Mapping[str, Step], rounds: int, on_step: Callable[[], object]
) -> list[Layer]:
    """What each layer's observers cost inside whole steps; costliest first."""
    clocks = {name: _LayerClock(step.model) for name, step in steps.items()}
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for name, step in steps.items():
            with clocks[name].running():
                step()
            for layer, cost in clocks[name].seconds.items():
                seconds[layer][name].append(cost)
            on_step()
    ours = clocks[OURS]
    layers = [
        Layer(
            name,
            ours.kinds[name],
            ours.shapes.get(name, ()),
            ours.calls[name],
            {side: Summary.of(costs) for side, costs in sides.items()},
        )
        for name, sides in seconds.items()
        if sides.keys() == steps.keys()
    ]
    key = THEIRS if THEIRS in steps else OURS
    return sorted(layers, key=lambda layer: -layer.seconds[key].median)


def run(
    model: nn.Module,
    inputs: Any,
    *,
    name: str | None = None,
    mode: str = "calibrate",
    qconfig: str = "x86",
    threads: int | None = None,
    rounds: int = 10,
    progress: bool = True,
) -> Report:
    """Measure a float model, as it is and prepared by fastquant and by torch.ao.

    The model itself is not changed. It is fused first where it has a `fuse_model` method (for
    mode "qat" one with a parameter `is_qat`). All of it gets one qconfig; submodules whose
    `qconfig` is None stay in float.

    Args:
        model: float model on the CPU.
        inputs: example input: a tensor, a tuple or list of positional arguments, or a mapping
            of keyword arguments.
        name: what the report calls the model.
        mode: "calibrate" measures a forward in eval mode without gradients; "qat" a training
            step (forward, backward, SGD).
        qconfig: backend whose default qconfig is used: "x86", "fbgemm", "qnnpack", "onednn".
        threads: torch's threads meanwhile; None leaves them as they are.
        rounds: how often everything is measured, interleaved.
        progress: show a progress bar on stderr.

    Raises:
        BenchError: the model does not run on the input, or gets no observers.
        RuntimeError: torch.ao.quantization is patched, which leaves nothing to compare with.
        ValueError: a mode, qconfig, number of threads or of rounds that is none.
    """
    for argument, value, known in (("mode", mode, MODES), ("qconfig", qconfig, QCONFIGS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    for argument, number in (("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise ValueError(f"{argument} must be at least 1, got {number}")
    with warnings.catch_warnings(), threads_set_to(threads):
        # What torch.ao and the model have to say is not what this is about.
        warnings.simplefilter("ignore")
        return _run(model, inputs, name or type(model).__name__, mode, qconfig, rounds, progress)


def _attempt(what: str, step: Callable[[], Any]) -> Any:
    try:
        torch.manual_seed(0)
        return step()
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(what, error) from error


def _run(
    model: nn.Module,
    inputs: Any,
    name: str,
    mode: str,
    backend: str,
    rounds: int,
    progress: bool,
) -> Report:
    sides = _sides()
    with tqdm(total=None, desc="float model", unit="step", disable=not progress) as bar:
        model = copy.deepcopy(model).train(mode == "qat")
        base = _attempt("the model's fuse_model fails", partial(fused, model, mode))
        # Calibration is held against the fused model; training has no fused float model.
        steps = {FLOAT: Step(copy.deepcopy(model if mode == "qat" else base), inputs, mode)}
        _attempt("the model does not run on the input", steps[FLOAT])

        torch_ao_error = None
        ranges: dict[str, Ranges] = {}
        for side in sides:
            bar.set_description(f"first step, {side.name}")
            try:
                prepared = _attempt(
                    f"{side.name} cannot prepare the model",
                    partial(side.prepared, base, mode, backend),
                )
                step = Step(prepared, inputs, mode)
                ranges[side.name] = _attempt(
                    f"the model prepared by {side.name} does not run", partial(_first_ranges, step)
                )
            except BenchError as error:
                if side.name == OURS:
                    raise
                torch_ao_error = str(error)
                continue
            if not ranges[side.name]:
                raise BenchError("nothing in the model gets an observer: no layer to quantize")
            steps[side.name] = step
        apart = _differences(ranges[OURS], ranges[THEIRS]) if THEIRS in steps else {}
        differences = [layer for layer, value in apart.items() if value > _TOLERANCE[mode]]

        prepared_steps = {key: step for key, step in steps.items() if key != FLOAT}
        bar.reset(total=rounds * (len(steps) + len(prepared_steps)))
        bar.set_description("whole model")
        whole = time_rounds({key: Case(step) for key, step in steps.items()}, rounds, bar.update)
        bar.set_description("layer by layer")
        layers = _layer_costs(prepared_steps, rounds, bar.update)
    args, kwargs = _as_call(inputs)
    return Report(
        model=name,
        mode=mode,
        qconfig=backend,
        inputs=[_described(value) for value in (*args, *kwargs.values())],
        threads=torch.get_num_threads(),
        rounds=rounds,
        undisturbed=whole.undisturbed,
        seconds=whole.seconds,
        layers=layers,
        same_ranges=None if torch_ao_error else not differences,
        largest_difference=None if torch_ao_error else max(apart.values()),
        differences=differences,
        torch_ao_error=torch_ao_error,
    )


# --------------------------------------------------------------------------------------------
# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_at_least_one.__name__ = "number, at least 1,"  # argparse's messages name the type


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m fastquant.bench",
        description="Time a model in float, prepared by fastquant, and prepared by torch.ao, "
        "and check that both observe the same ranges.",
        epilog="Exit status: 0; 1 where the ranges differ; 2 where the model cannot be measured.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="small_cnn",
        help=f"{', '.join(_BUILT_IN)} (the last two need torchvision), or module:callable, "
        "which is called without arguments and gives a float torch.nn.Module. One with a "
        "fuse_model method is fused first. Default: small_cnn",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--input",
        action="append",
        metavar="SIZES[:DTYPE]",
        help="an example input, as in 8x3x224x224 or 16x128:int64: normally distributed, or "
        "zeros and ones; once for each argument",
    )
    given.add_argument(
        "--inputs",
        metavar="MODULE:CALLABLE",
        help="is called without arguments and gives the example input: a tensor, a tuple of "
        "arguments or a dict of keyword arguments",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="calibrate",
        help="calibrate: a forward in eval mode; qat: a training step. Default: calibrate",
    )
    parser.add_argument("--qconfig", choices=QCONFIGS, default="x86", help="default: x86")
    parser.add_argument("--threads", type=_at_least_one, help="default: as many as torch takes")
    parser.add_argument("--rounds", type=_at_least_one, default=10, help="default: 10")
    parser.add_argument("--top", type=_at_least_one, default=10, help="layers shown; default: 10")
    parser.add_argument(
        "--json", metavar="FILE", help="write all results to FILE; - for standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _inputs_of(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    if options.inputs is not None:
        make = _load(options.inputs, "inputs")
        if not callable(make):
            raise BenchError(f"inputs {options.inputs!r} is not callable")
        try:
            return make()
        except Exception as error:
            raise BenchError(f"inputs {options.inputs!r} fails", error) from error
    if options.input is not None:
        return tuple(_parse_input(spec) for spec in options.input)
    if options.model in _BUILT_IN:
        return (_parse_input(_BUILT_IN[options.model][1]),)
    raise BenchError("a model of yours needs --input or --inputs")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        model = _load_model(options.model)
        report = run(
            model,
            _inputs_of(options),
            name=options.model,
            mode=options.mode,
            qconfig=options.qconfig,
            threads=options.threads,
            rounds=options.rounds,
            progress=not options.quiet,
        )
        if options.json is not None:
            _write_json(report, options.json, argv)
    except BenchError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    print(report.table(options.top), file=sys.stderr if options.json == "-" else sys.stdout)
    return 1 if report.same_ranges is False else 0


def _write_json(report: Report, path: str, argv: Sequence[str] | None) -> None:
    words = sys.argv[1:] if argv is None else argv
    result = {
        "command": shlex.join(["python", "-m", "fastquant.bench", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **report.as_dict(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise BenchError(f"cannot write {path!r}", error) from error
