"""A real model on real data, quantized to int8 by fastquant and by torch.ao side by side.

    python examples/demo.py    # or: make demo

Trains a small residual CNN on the handwritten digits that come with scikit-learn (nothing is
downloaded), then quantizes it four times: statically with histogram and with min/max observers,
dynamically, and with quantization-aware training. Both libraries run the same code; only the module
that the names are taken from differs. Last, one calibrated model is converted twice, to fastquant's
own int8 modules and to torch.ao's. Every number printed is measured in this run.
"""

from __future__ import annotations

import copy
import io
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType

import torch
import torch.ao.quantization
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastquant

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise SystemExit(
        f"demo.py needs scikit-learn for its data ({error}): pip install scikit-learn, "
        "or install this project with its extra `demo`"
    ) from error

SIDES = {"fastquant": fastquant, "torch.ao": torch.ao.quantization}
TOLERANCE = 1.0  # points of accuracy that static and QAT int8 may lose against float


@dataclass(frozen=True)
class Settings:
    """How long to train and how often to time."""

    epochs: int = 20
    qat_epochs: int = 4
    rounds: int = 9
    batch: int = 64


@dataclass
class Row:
    """One line of the table; each dict goes from a side's name to what was measured there."""

    name: str
    accuracy: dict[str, float] = field(default_factory=dict)
    kilobytes: dict[str, float] = field(default_factory=dict)
    timed: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Net(nn.Module):
    """A CNN with a skip connection, written for eager quantization; the stubs are ``q``'s."""

    def __init__(self, q: ModuleType) -> None:
        super().__init__()
        self.quant = q.QuantStub()
        self.stem = conv_bn_relu(1, 32)
        self.down = conv_bn_relu(32, 64, stride=2)
        self.block = conv_bn_relu(64, 64)
        self.skip = FloatFunctional()
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )
        self.dequant = q.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(self.quant(x)))
        x = self.skip.add(x, self.block(x))
        return self.dequant(self.head(x))  # type: ignore[no-any-return]


FUSED = [[f"{name}.0", f"{name}.1", f"{name}.2"] for name in ("stem", "down", "block")]
FUSED.append(["head.1", "head.2"])

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Digits:
    """The digits as 1 x 8 x 8 images in [0, 1] with their labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, seed: int) -> Batches:
        """The training set, shuffled."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_x), generator=generator)
        return [(self.train_x[i], self.train_y[i]) for i in torch.split(order, size)]

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test set that ``model`` gets right."""
        model.eval()
        with torch.no_grad():
            hits = model(self.test_x).argmax(1) == self.test_y
        return 100 * float(hits.float().mean())


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train, test = train_test_split(range(len(x)), test_size=0.3, stratify=y, random_state=0)
    return Digits(x[train], y[train], x[test], y[test])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train_float(digits: Digits, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    model = Net(fastquant)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for epoch in tqdm(range(settings.epochs), "training in float", unit="epoch", leave=False):
        for x, y in digits.batches(settings.batch, seed=epoch):
            step(model, optimizer, x, y)
        schedule.step()
    return model


def load_into(q: ModuleType, trained: nn.Module) -> nn.Module:
    model = Net(q)
    model.load_state_dict(trained.state_dict())
    return model


def kilobytes(model: nn.Module) -> float:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1024


def measure(row: Row, digits: Digits, models: dict[str, nn.Module]) -> Row:
    for side, model in models.items():
        row.accuracy[side] = digits.accuracy(model)
        row.kilobytes[side] = kilobytes(model)
    return row


def static(
    name: str,
    qconfig: Callable[[ModuleType], object],
    trained: nn.Module,
    digits: Digits,
    settings: Settings,
) -> Row:
    """Post-training static quantization; calibration is timed in interleaved rounds."""
    prepared = {}
    for side, q in SIDES.items():
        model = q.fuse_modules(load_into(q, trained).eval(), FUSED)
        model.qconfig = qconfig(q)
        prepared[side] = q.prepare(model)

    calibrated = {}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    data = digits.batches(settings.batch, seed=0)
    for _ in tqdm(range(settings.rounds), f"{name}: calibrating", unit="round", leave=False):
        for side, model in prepared.items():
            calibrated[side] = copy.deepcopy(model)
            run = fastquant.calibrate(calibrated[side], data, progress=False)
            seconds[side].append(run.seconds)

    row = Row(name, timed="calibration")
    row.milliseconds = {side: 1e3 * median(times) for side, times in seconds.items()}
    return measure(row, digits, {side: q.convert(calibrated[side]) for side, q in SIDES.items()})


def native(trained: nn.Module, digits: Digits, settings: Settings) -> Row:
    """One calibrated model in fastquant's int8 modules and in torch.ao's; inference is timed."""
    model = fastquant.fuse_modules(load_into(fastquant, trained).eval(), FUSED)
    fastquant.propagate_qconfig_(
        model, {"": fastquant.get_default_qconfig(torch.backends.quantized.engine)}
    )
    model = fastquant.prepare(model)
    fastquant.calibrate(model, digits.batches(settings.batch, seed=0), progress=False)
    models = {
        "fastquant": fastquant.convert(model, backend="native"),
        "torch.ao": fastquant.convert(model),
    }
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    batch = digits.test_x[: settings.batch]
    with torch.no_grad():
        for _ in tqdm(range(10 * settings.rounds), "int8 inference", unit="round", leave=False):
            for side, converted in models.items():
                start = time.perf_counter()
                converted(batch)
                seconds[side].append(time.perf_counter() - start)

    row = Row("native int8", timed="inference")
    row.milliseconds = {side: 1e3 * median(times) for side, times in seconds.items()}
    return measure(row, digits, models)


def dynamic(trained: nn.Module, digits: Digits) -> Row:
    """Dynamic quantization: weights ahead of time, activations in each call; linear layers only."""
    models = {
        side: q.quantize_dynamic(load_into(q, trained).eval(), {nn.Linear}, dtype=torch.qint8)
        for side, q in SIDES.items()
    }
    return measure(Row("dynamic"), digits, models)


def aware(trained: nn.Module, digits: Digits, settings: Settings) -> Row:
    """Quantization-aware fine-tuning; both sides take each step in turn, and steps are timed."""
    models, optimizers = {}, {}
    for side, q in SIDES.items():
        model = q.fuse_modules_qat(load_into(q, trained).train(), FUSED)
        model.qconfig = q.get_default_qat_qconfig(torch.backends.quantized.engine)
        models[side] = q.prepare_qat(model)
        optimizers[side] = torch.optim.Adam(models[side].parameters(), lr=2e-4)

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for epoch in tqdm(range(settings.qat_epochs), "QAT: fine-tuning", unit="epoch", leave=False):
        for number, (x, y) in enumerate(digits.batches(settings.batch, seed=100 + epoch)):
            for side, model in models.items():
                torch.manual_seed(number)  # the same dropout on both sides
                start = time.perf_counter()
                step(model, optimizers[side], x, y)
                seconds[side].append(time.perf_counter() - start)

    row = Row("QAT", timed="training step")
    row.milliseconds = {side: 1e3 * median(times) for side, times in seconds.items()}
    return measure(row, digits, {side: q.convert(models[side].eval()) for side, q in SIDES.items()})


def table(rows: list[Row]) -> str:
    pair = "".join(f"{side:>10}" for side in SIDES)
    lines = [
        f"{'':17}  {'accuracy, %':>20}  {'size, KB':>20}  {'time, ms':>20}",
        f"{'':17}  {pair}  {pair}  {pair}   ratio",
    ]
    for row in rows:
        line = f"{row.name:17}"
        for values, decimals in ((row.accuracy, 1), (row.kilobytes, 0), (row.milliseconds, 1)):
            cells = (f"{values[side]:.{decimals}f}" if side in values else "" for side in SIDES)
            line += "  " + "".join(f"{cell:>10}" for cell in cells)
        if row.timed:
            ours, theirs = row.milliseconds.values()
            line += f"{theirs / ours:7.1f}x  {row.timed}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def run(settings: Settings) -> list[Row]:
    """The whole demo; the rows of its table, float first."""
    digits = load()
    trained = train_float(digits, settings)
    engine = torch.backends.quantized.engine
    qconfigs: dict[str, Callable[[ModuleType], object]] = {
        "static, histogram": lambda q: q.get_default_qconfig(engine),
        "static, min/max": lambda q: q.default_per_channel_qconfig,
    }
    return [
        measure(Row("float"), digits, {"fastquant": trained}),
        *(static(name, qconfig, trained, digits, settings) for name, qconfig in qconfigs.items()),
        dynamic(trained, digits),
        aware(trained, digits, settings),
        native(trained, digits, settings),
    ]


def main() -> int:
    # torch.ao warns of its own deprecation at each call, in its own name and in its caller's.
    warnings.filterwarnings("ignore", module=r"torch\.")
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
    # The tensors are small: a second thread would mostly wait, even more so where other programs
    # want the processor too, and the times would say little.
    torch.set_num_threads(1)
    info = fastquant.build_info()
    print(
        f"fastquant {info['version']} ({info['isa']} kernels), torch {info['torch']} "
        f"({torch.backends.quantized.engine} engine), threads: {info['threads']}",
        flush=True,
    )
    start = time.perf_counter()
    rows = run(Settings())
    print(f"\n{table(rows)}\n\n{time.perf_counter() - start:.0f} s in all")

    float_accuracy = rows[0].accuracy["fastquant"]
    for row in rows:
        loss = float_accuracy - row.accuracy["fastquant"]
        if row.timed and loss > TOLERANCE:
            print(f"{row.name}: {loss:.1f} points below float, more than {TOLERANCE}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
