"""Int8 linear layers and convolutions beside torch.ao's on its two engines.

    python benchmarks/int8_layers.py [--threads 1,2]

The value of a row is how many times as fast as the better of torch.ao's two engines, fbgemm and
onednn, a layer is, call and all. The last row compares a layer of one row with reading its weights,
which are found in the same caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastquant._native import ops
from fastquant._torch.ao import nnq
from harness import OURS, Case, Suite, at_least, at_most, main, normal

ENGINES = ("fbgemm", "onednn")
X_SCALE, X_ZERO_POINT = 0.06, 64
INF = float("inf")


@dataclass(frozen=True)
class Layer:
    """A float layer, the shape of its input, and how fast its quantized form is to be."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    target: float = 1.0


def conv(
    name: str,
    channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    size: int,
    *,
    groups: int = 1,
    batch: int = 1,
    target: float = 1.0,
) -> Layer:
    module = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups)
    return Layer(name, module, (batch, channels, size, size), target)


def linear(inputs: int, outputs: int, batch: int, target: float = 1.0) -> Layer:
    name = f"linear {inputs}x{outputs} batch {batch}"
    return Layer(name, nn.Linear(inputs, outputs), (batch, inputs), target)


def layers() -> list[Layer]:
    return [
        conv("tiny 1x1 4->4", 4, 4, 1, 1, 1),
        conv("3x3 64->64 @56", 64, 64, 3, 1, 56),
        conv("3x3 128->128 @28", 128, 128, 3, 1, 28),
        conv("3x3 256->256 @14", 256, 256, 3, 1, 14),
        conv("3x3 512->512 @7", 512, 512, 3, 1, 7),
        conv("3x3 stride 2 64->128 @56", 64, 128, 3, 2, 56),
        conv("1x1 256->64 @56", 256, 64, 1, 1, 56),
        conv("1x1 64->256 @56", 64, 256, 1, 1, 56),
        conv("1x1 96->24 @56", 96, 24, 1, 1, 56),
        conv("1x1 24->144 @56", 24, 144, 1, 1, 56),
        conv("1x1 160->960 @7", 160, 960, 1, 1, 7),
        conv("1x1 960->160 @7", 960, 160, 1, 1, 7),
        conv("1x1 320->1280 @7", 320, 1280, 1, 1, 7),
        conv("1x1 stride 2 64->128 @56", 64, 128, 1, 2, 56),
        conv("1x1 58->58 @28", 58, 58, 1, 1, 28),
        conv("stem 7x7 stride 2 3->64 @224", 3, 64, 7, 2, 224),
        conv("stem 3x3 stride 2 3->32 @224", 3, 32, 3, 2, 224),
        conv("3x3 128->128 @28, 32 groups", 128, 128, 3, 1, 28, groups=32),
        conv("3x3 256->256 @28, 32 groups", 256, 256, 3, 1, 28, groups=32),
        conv("3x3 512->512 @14, 32 groups", 512, 512, 3, 1, 14, groups=32),
        conv("3x3 240->240 @28, 10 groups", 240, 240, 3, 1, 28, groups=10),
        conv("depthwise 3x3 144 @56", 144, 144, 3, 1, 56, groups=144, target=1.4),
        conv("depthwise 3x3 stride 2 96 @112", 96, 96, 3, 2, 112, groups=96, target=1.4),
        conv("depthwise 3x3 960 @7", 960, 960, 3, 1, 7, groups=960, target=1.4),
        conv("depthwise 3x3 32 @112", 32, 32, 3, 1, 112, groups=32, target=1.4),
        conv("3x3 64->64 @56 batch 8", 64, 64, 3, 1, 56, batch=8),
        conv("depthwise 3x3 144 @56 batch 8", 144, 144, 3, 1, 56, groups=144, batch=8, target=1.4),
        linear(512, 1000, 1, 1.5),
        linear(768, 3072, 1, 1.5),
        linear(768, 3072, 8),
        linear(768, 3072, 32),
        linear(768, 3072, 256),
        linear(4096, 4096, 1, 1.5),
    ]


def quantized_weight(module: nn.Module) -> tuple[Tensor, Tensor]:
    """int8 weights and their scales, one for each output channel."""
    weight = module.weight.detach()
    scale = weight.flatten(1).abs().amax(1) / 127
    shape = [-1] + [1] * (weight.dim() - 1)
    return (weight / scale.reshape(shape)).round().clamp(-127, 127).to(torch.int8), scale


def of_torch_ao(
    module: nn.Module, engine: str, x: Tensor, scale: float, zero_point: int
) -> Callable[[], object]:
    torch.backends.quantized.engine = engine
    weight, weight_scale = quantized_weight(module)
    quantized = torch._make_per_channel_quantized_tensor(
        weight, weight_scale.double(), torch.zeros(len(weight), dtype=torch.int64), 0
    )
    if isinstance(module, nn.Linear):
        layer = nnq.Linear(module.in_features, module.out_features)
    else:
        layer = nnq.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            groups=module.groups,
        )
    layer.set_weight_bias(quantized, module.bias.detach())
    layer.scale, layer.zero_point = scale, zero_point
    values = torch._make_per_tensor_quantized_tensor(x, X_SCALE, X_ZERO_POINT)

    def run() -> object:
        torch.backends.quantized.engine = engine
        return layer(values)

    return run


def packed_weight(module: nn.Module) -> Tensor:
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return ops.pack_weight(quantized_weight(module)[0], groups, False)


def of_fastquant(
    module: nn.Module, packed: Tensor, x: Tensor, scale: float, zero_point: int
) -> Callable[[], Tensor]:
    weight, weight_scale = quantized_weight(module)
    bias = module.bias.detach()
    output = (scale, zero_point, -INF, INF, torch.uint8)
    if isinstance(module, nn.Linear):
        given = (x, X_SCALE, X_ZERO_POINT, packed, weight_scale, bias, module.out_features)
        return lambda: ops.quantized_linear(*given, *output)
    groups, shape = module.groups, list(weight.shape)
    geometry = [list(sizes) for sizes in (module.stride, module.padding, module.dilation)]
    given = (x, X_SCALE, X_ZERO_POINT, packed, weight_scale, bias, shape, *geometry, groups)
    return lambda: ops.quantized_conv(*given, *output)


def input_of(layer: Layer) -> Tensor:
    return (normal(*layer.shape) / X_SCALE + X_ZERO_POINT).round().clamp(0, 127).to(torch.uint8)


def against_reading(suite: Suite, layer: Layer) -> None:
    packed, x = packed_weight(layer.module), input_of(layer)
    suite.add(
        f"{layer.name}, against reading its weights",
        f"uint8 {list(layer.shape)}",
        {
            OURS: of_fastquant(layer.module, packed, x, 1.0, 64),
            "read": packed.view(torch.int64).sum,
        },
        lambda t: t[OURS] / t["read"],
        "of limit",
        at_most(1.25),
    )


def measure(suite: Suite) -> None:
    for layer in layers():
        module = layer.module
        x = input_of(layer)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            scale = module((x.float() - X_ZERO_POINT) * X_SCALE).abs().max().item() / 63
        before = torch.backends.quantized.engine
        cases = {OURS: Case(of_fastquant(module, packed_weight(module), x, scale, 64))}
        for engine in ENGINES:
            cases[engine] = Case(of_torch_ao(module, engine, x, scale, 64))
        suite.add(
            layer.name,
            f"uint8 {list(layer.shape)}",
            cases,
            lambda t: min(t[engine] for engine in ENGINES) / t[OURS],
            "x",
            at_least(layer.target),
        )
        torch.backends.quantized.engine = before
    against_reading(suite, linear(4096, 4096, 1))


if __name__ == "__main__":
    main(measure)
