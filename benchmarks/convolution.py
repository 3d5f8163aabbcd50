"""How much faster do QAT modules compute convolutions than torch's own choice of a way?

    python benchmarks/convolution.py

Forward and backward. Layers of MobileNetV2, batch 8 at 224 x 224: depthwise and expanding
convolutions of large images, which are computed in parts, and, with one thread, 1x1 convolutions of
small images, which oneDNN computes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastquant._native.convolution import Convolution
from harness import OURS, Case, Suite, at_least, describe, main, normal

MOST_ROUNDS = 15
BATCH = 8
# Inputs, outputs, height and width, kernel, stride, groups.
LARGE = (
    (32, 32, 112, 3, 1, 32),
    (96, 96, 112, 3, 2, 96),
    (144, 144, 56, 3, 1, 144),
    (16, 96, 112, 1, 1, 1),  # not with one thread
)
SMALL = (
    (192, 32, 28, 1, 1, 1),
    (64, 384, 14, 1, 1, 1),
    (576, 96, 14, 1, 1, 1),
    (960, 160, 7, 1, 1, 1),
)


class AsTorch(Convolution):
    """The same by one call each of torch's functions, which choose by themselves."""

    def _parts(self, x: Tensor, weight: Tensor) -> list[slice]:
        return [slice(None)]

    def _is_faster_by_onednn(self, x: Tensor, weight: Tensor) -> bool:
        return False


@torch.no_grad()
def forward_backward(convolution: Convolution, x: Tensor, weight: Tensor) -> None:
    y = convolution(x, weight, None)
    convolution.gradients(y, x, weight, None, [True, True, False])


def measure(suite: Suite) -> None:
    shapes = LARGE[:-1] + SMALL if suite.threads == 1 else LARGE
    for inputs, outputs, size, kernel, stride, groups in shapes:
        x, weight = (
            normal(BATCH, inputs, size, size),
            normal(outputs, inputs // groups, kernel, kernel),
        )
        geometry = (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
        kind = "depthwise" if groups > 1 else "1x1"
        suite.add(
            f"{kind} convolution to {outputs} channels, stride {stride}, against torch's",
            describe(x),
            {
                name: Case(functools.partial(forward_backward, way(*geometry), x, weight))
                for name, way in ((OURS, Convolution), ("torch", AsTorch))
            },
            lambda t: t["torch"] / t[OURS],
            "x",
            at_least(1),
            MOST_ROUNDS,
        )


if __name__ == "__main__":
    main(measure)
