"""Quantization-aware training in your own loop, without prepare and convert.

    python examples/custom_training_loop.py

Classifies handwritten digits with 2-bit weights, whose scales are learned (LSQ), and 8-bit
activations, whose range follows a moving average. Prints three accuracies: of the float model,
right after fake-quantize was inserted, and after training with it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastquant import functional as F

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(
        f"custom_training_loop.py needs scikit-learn for its data ({error}): pip install "
        "scikit-learn, or install this project with its extra `demo`"
    ) from error

WEIGHT_MIN, WEIGHT_MAX = -2, 1  # 2 bits


class FakeQuantized(nn.Module):
    """A layer that fake-quantizes its input and its weight before it uses them."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        # The input's range, scale and zero point: plain tensors, updated in place.
        self.input_state = F.fake_quantize_state()

        weight = layer.weight.detach()
        channels = len(weight)
        weight_range = F.minmax_state(channels)
        F.observe_minmax_(weight, *weight_range, ch_axis=0)
        scale, _ = F.choose_qparams(
            weight_range.min_val,
            weight_range.max_val,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=WEIGHT_MIN,
            quant_max=WEIGHT_MAX,
        )
        self.scale = nn.Parameter(scale)
        self.zero_point = torch.zeros(channels)
        # The factor on the gradient of the scale that LSQ's authors recommend.
        self.grad_factor = (weight[0].numel() * WEIGHT_MAX) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.fused_observe_fake_quantize(x, *self.input_state, observe=self.training)
        weight = F.learnable_fake_quantize(
            self.layer.weight,
            self.scale,
            self.zero_point,
            quant_min=WEIGHT_MIN,
            quant_max=WEIGHT_MAX,
            ch_axis=0,
            grad_factor=self.grad_factor,
        )
        result: Tensor = functional_call(self.layer, {"weight": weight}, (x,))
        return result


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    return x[:1300], y[:1300], x[1300:], y[1300:]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (64,))
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step} of {steps}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images that `model` classifies correctly."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=600, help="steps of each of the two trainings")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = load()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    print("Training in float")
    train(model, train_x, train_y, steps, rate=2e-3)
    print(f"float: {accuracy(model, test_x, test_y):.1f} %")

    for index, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            model[index] = FakeQuantized(layer)
    with torch.no_grad():
        model.train()(train_x[:256])  # gives every input its first range
    print(f"fake-quantized, not trained: {accuracy(model, test_x, test_y):.1f} %")

    print("Training with fake-quantize")
    train(model, train_x, train_y, steps, rate=1e-3)
    print(f"fake-quantized, trained: {accuracy(model, test_x, test_y):.1f} %")


if __name__ == "__main__":
    main()
