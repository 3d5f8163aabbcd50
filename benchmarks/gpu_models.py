"""What calibration and QAT of whole models cost on a GPU, beyond the float model's time.

ResNet-50 and MobileNetV2 of torchvision, batch 32 at 224 x 224: a forward that calibrates, and a
step of training, in fp32 and under autocast to fp16 and bf16, eager and as a CUDA graph. Beside
torch.ao's modules, and beside those of fastquant that take one op for several steps.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import fastquant
from fastquant import bench as models
from fastquant.nn.qat.plain import fused_on_cuda
from gpu_timing import Bench, Job
from harness import OURS, THEIRS, Rounds, Run, Suite, Target, at_least, at_most, normal

FLOAT, ONE_OP = "float", "one op"
CALIBRATED = "resnet50"
TRAINED = ("resnet50", "mobilenet_v2")
AUTOCAST = (None, torch.float16, torch.bfloat16)
# A call takes milliseconds.
MOST_ROUNDS = 10


def input_like(bench: Bench, layout: torch.memory_format) -> Tensor:
    shape = (2, 3, 8, 8) if bench.gpu.rehearses else (32, 3, 224, 224)
    return normal(*shape, memory_format=layout).to(bench.device)


def float_model(bench: Bench, name: str) -> nn.Module:
    return models.small_cnn() if bench.gpu.rehearses else models.torchvision_model(name)


class TrainingStep:
    """A step of SGD that a CUDA graph can record; under autocast, if a dtype is given.

    `fuses`: whether QAT modules take one op for several steps.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, autocast: torch.dtype | None, fuses: bool
    ) -> None:
        self.model, self.x = model, x
        self._autocast, self._fuses = autocast, fuses
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def __call__(self) -> None:
        with fused_on_cuda() if self._fuses else contextlib.nullcontext():
            self._optimizer.zero_grad(set_to_none=False)
            enabled = self._autocast is not None
            with torch.autocast(self.x.device.type, self._autocast, enabled=enabled):
                y = self.model(self.x)
            y.float().square().mean().backward()
            self._optimizer.step()


def over_float(
    suite: Suite, work: str, input: str, timed: Rounds, limits: dict[str, Target | None]
) -> None:
    """Add a row for each side that was timed: how much more time it takes than float."""
    for side, limit in limits.items():
        if side in timed.seconds:
            name = f"{work}, over float" + ("" if side == OURS else f": {side}")
            value = functools.partial(lambda t, side: t[side] / t[FLOAT] - 1, side=side)
            suite.add_rounds(name, input, timed, value, "more", limit)


class Models:
    """Adds the rows; keeps the models of one name."""

    def __init__(self, suite: Suite, bench: Bench) -> None:
        self._suite, self._bench = suite, bench
        self._rounds = min(suite.rounds, MOST_ROUNDS)
        self._key: tuple[str, torch.dtype | None] | None = None
        self._steps: dict[str, TrainingStep] = {}

    def jobs(self) -> list[Job]:
        jobs = [Job(f"{CALIBRATED}: calibration", self.calibration)]
        for name in TRAINED:
            for autocast in AUTOCAST:
                for graph in (False, True):
                    run = functools.partial(self.training, name, autocast, graph)
                    jobs.append(Job(f"{name}: QAT, {autocast}, graph: {graph}", run))
        return jobs

    def calibration(self) -> None:
        model = models.fused(float_model(self._bench, CALIBRATED).eval(), "calibrate")
        x = input_like(self._bench, torch.contiguous_format)

        def prepared(library: Any) -> nn.Module:
            own: Any = copy.deepcopy(model)
            own.qconfig = library.get_default_qconfig("x86")
            result: nn.Module = library.prepare(own)
            return result

        sides = {FLOAT: model, OURS: prepared(fastquant), THEIRS: prepared(torch_ao)}

        def forward(model: nn.Module) -> Run:
            model.to(self._bench.device)

            def run() -> None:
                with torch.no_grad():
                    model(x)

            return run

        timed = self._bench.timed({s: forward(m) for s, m in sides.items()}, self._rounds)
        limits = {OURS: at_most(0.15), THEIRS: None}
        work = f"{CALIBRATED}: calibration"
        over_float(self._suite, work, self._bench.describe(x), timed, limits)

    def _prepared(self, name: str, autocast: torch.dtype | None) -> dict[str, TrainingStep]:
        """The training steps of each side, one after the other with the same models."""
        if self._key == (name, autocast):
            return self._steps
        made = {side: step.model for side, step in self._steps.items()}
        same = self._key is not None and self._key[0] == name
        self._key, self._steps = None, {}
        if not same:
            made = {}
            self._bench.gpu.free()
            model = models.fused(float_model(self._bench, name).train(), "qat")
            for side, library in (
                (FLOAT, None),
                (OURS, fastquant),
                (ONE_OP, fastquant),
                (THEIRS, torch_ao),
            ):
                own: Any = copy.deepcopy(model)
                if library is not None:
                    own.qconfig = library.get_default_qat_qconfig("x86")
                    own = library.prepare_qat(own)
                made[side] = own.to(self._bench.device)
        # Mixed precision is fastest in channels_last.
        layout = torch.contiguous_format if autocast is None else torch.channels_last
        x = input_like(self._bench, layout)
        self._steps = {
            side: TrainingStep(model.to(memory_format=layout), x, autocast, side == ONE_OP)
            for side, model in made.items()
        }
        self._key = (name, autocast)
        return self._steps

    def training(self, name: str, autocast: torch.dtype | None, graph: bool) -> None:
        steps = self._prepared(name, autocast)
        runs: dict[str, Run] = {side: steps[side] for side in (FLOAT, OURS, ONE_OP)}
        if graph:  # torch.ao's modules wait for the GPU, so that a graph cannot record them
            runs = {side: self._bench.gpu.recorded(run) for side, run in runs.items()}
        elif self._runs(THEIRS, steps[THEIRS]):
            runs[THEIRS] = steps[THEIRS]
        timed = self._bench.timed(runs, self._rounds)
        dtype = str(autocast or torch.float32).removeprefix("torch.")
        work = f"{name}: QAT step{' as a graph' * graph}, {dtype}{' autocast' * bool(autocast)}"
        input = self._bench.describe(steps[FLOAT].x)
        limits = {OURS: at_most(0.15), ONE_OP: None, THEIRS: None}
        over_float(self._suite, work, input, timed, limits)
        # Whether modules should take one op for several steps on GPUs, too.
        value: Callable[[dict[str, float]], float] = lambda t: t[OURS] / t[ONE_OP]  # noqa: E731
        what = f"{work}: one op against its steps"
        self._suite.add_rounds(what, input, timed, value, "x", at_least(1))
        if graph:
            del runs
            self._bench.gpu.free()

    def _runs(self, side: str, step: TrainingStep) -> bool:
        """Whether a side can do it at all."""
        try:
            step()
        except RuntimeError as error:
            print(f"{side} cannot: {str(error).splitlines()[0]}")
            return False
        return True


def measure(suite: Suite, bench: Bench) -> None:
    """All rows of whole models."""
    bench.run(Models(suite, bench).jobs())
    bench.gpu.free()
