"""How much faster do QAT modules compute convolutions than torch's own choice of a way?

    python benchmarks/convolution.py

Forward and backward. Layers of MobileNetV2, batch 8 at 224 x 224: depthwise and 1x1 convolutions,
for which there are kernels, in fp32 and bf16; depthwise convolutions with larger kernels, as
EfficientNet has them; and the 3x3 convolutions of ResNet-18 with stride 1, in fp32 and, where there
is AMX, in bf16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastquant import _C
from fastquant._native.convolution import Convolution
from harness import OURS, Case, Suite, at_least, describe, main, normal

MOST_ROUNDS = 15
BATCH = 8
# Inputs, outputs, height and width, kernel, stride, groups.
DEPTHWISE = (
    (32, 32, 112, 3, 1, 32),
    (96, 96, 112, 3, 2, 96),
    (144, 144, 56, 3, 1, 144),
    (144, 144, 56, 3, 2, 144),
    (192, 192, 28, 3, 1, 192),
    (192, 192, 28, 3, 2, 192),
    (384, 384, 14, 3, 1, 384),
    (576, 576, 14, 3, 2, 576),
    (960, 960, 7, 3, 1, 960),
    (240, 240, 28, 5, 1, 240),
    (672, 672, 14, 5, 2, 672),
)
POINTWISE = (
    (32, 16, 112, 1, 1, 1),
    (16, 96, 112, 1, 1, 1),
    (96, 24, 56, 1, 1, 1),
    (24, 144, 56, 1, 1, 1),
    (192, 32, 28, 1, 1, 1),
    (64, 384, 14, 1, 1, 1),
    (576, 96, 14, 1, 1, 1),
    (960, 160, 7, 1, 1, 1),
    (320, 1280, 7, 1, 1, 1),
)
WINOGRAD = (
    (64, 64, 56, 3, 1, 1),
    (128, 128, 28, 3, 1, 1),
    (256, 256, 14, 3, 1, 1),
    (512, 512, 7, 3, 1, 1),
)


class AsTorch(Convolution):
    """The same by one call each of torch's functions, which choose by themselves."""

    def _is_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        return False

    def _kernels(self, x: Tensor, weight: Tensor) -> None:
        return None

    def _parts(self, x: Tensor, weight: Tensor) -> list[slice]:
        return [slice(None)]


@torch.no_grad()
def forward_backward(convolution: Convolution, x: Tensor, weight: Tensor) -> None:
    y = convolution(x, weight, None)
    convolution.gradients(y, x, weight, [True, True, False])


def measure(suite: Suite) -> None:
    shapes = [(*shape, torch.float32) for shape in DEPTHWISE + POINTWISE + WINOGRAD]
    shapes += [(*shape, torch.bfloat16) for shape in DEPTHWISE[:9:2] + POINTWISE[1::2]]
    if _C.isa() == "avx512_amx":
        shapes += [(*shape, torch.bfloat16) for shape in WINOGRAD]
    for inputs, outputs, size, kernel, stride, groups, dtype in shapes:
        x = normal(BATCH, inputs, size, size, dtype=dtype)
        weight = normal(outputs, inputs // groups, kernel, kernel, dtype=dtype)
        geometry = (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
        kind = f"{kernel}x{kernel}{' depthwise' * (groups > 1)}"
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
