"""A convolution and its gradients, by the way of computing them that takes the least time.

torch has one convolution for all sizes. Two of its choices cost a QAT step much on the CPU:

- With one thread, torch computes a 1x1 convolution of fewer than 16 images by matrix products of
  MKL. oneDNN takes 0.4 to 0.8 of that time where images are small.
- oneDNN copies what it reads and writes into layouts of its own. For a large batch, each call maps
  new memory for these copies, and the page faults take longer than a depthwise convolution. Image
  by image, or a few at a time, the copies fit the caches, and malloc reuses the same memory.

`benchmarks/convolution.py` measures both. Results are the same up to rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .fast_calls import may_skip_dispatcher

__all__ = ["Convolution", "Gradients"]

# Of x, weight and bias, where needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# torch itself takes oneDNN from so many images on. It was measured to be faster for fewer, too, for
# images of so many elements per channel.
_ONEDNNS_BATCH, _SMALL_IMAGE = 16, 28 * 28
_HAS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)

# Input and output of so many bytes are computed in parts, of so many for each thread, where an
# output takes few multiplications. Where it takes many, they hide what memory costs.
_LARGE_BATCH, _PART_OF_A_THREAD, _FEW_MULTIPLICATIONS = 20 << 20, 2 << 20, 64

_WHOLE = slice(None)


class Convolution(NamedTuple):
    """A convolution that is not transposed, of inputs with a batch dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor | None = None
        geometry = self._geometry(x, weight)
        for part in self._parts(x, weight):
            of_part = torch.convolution(x[part], weight, bias, *geometry)
            if part == _WHOLE:
                return of_part
            if y is None:
                size, stride = of_part.size(), of_part.stride()
                y = _for_parts(
                    of_part.new_empty_strided(
                        (x.shape[0], *size[1:]), (math.prod(size[1:]), *stride[1:])
                    )
                )
            y[part] = of_part
        assert y is not None
        return y

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: list[bool],
        reuse: bool = False,
    ) -> Gradients:
        """Of x, weight and bias, where needed. With `reuse`, grad may become the gradient of x."""
        reuse = reuse and grad.size() == x.size() and grad.stride() == x.stride()
        sizes = None if bias is None else list(bias.shape)
        geometry = self._geometry(x, weight)
        of_x = None
        of_parameters: list[Tensor | None] = [None, None]
        for part in self._parts(x, weight):
            of_part, *of_its_parameters = torch.ops.aten.convolution_backward.default(
                grad[part], x[part], weight, sizes, *geometry, needed
            )
            if part == _WHOLE:
                return of_part, *of_its_parameters
            if needed[0]:
                if of_x is None:
                    of_x = grad if reuse else _for_parts(torch.empty_like(x))
                of_x[part] = of_part  # grad[part] has been read
            of_parameters = [
                b if a is None else a.add_(b)
                for a, b in zip(of_parameters, of_its_parameters, strict=True)
            ]
        of_weight, of_bias = of_parameters
        return of_x, of_weight, of_bias

    def _geometry(self, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """What torch's functions take after the bias."""
        # A kernel of one element looks the same with any dilation; with one, torch takes oneDNN.
        dilation = (2, 2) if self._is_faster_by_onednn(x, weight) else self.dilation
        output_padding = (0,) * len(self.stride)
        return self.stride, self.padding, dilation, False, output_padding, self.groups

    def _is_by_matrix_products(self, x: Tensor, weight: Tensor) -> bool:
        """Whether torch takes MKL's matrix products, which write y where it lies, not oneDNN."""
        return (
            weight.shape[2:] == (1, 1)
            and self.stride == (1, 1)
            and self.groups == 1
            and x.shape[0] < _ONEDNNS_BATCH
            and torch.get_num_threads() == 1
        )

    def _is_faster_by_onednn(self, x: Tensor, weight: Tensor) -> bool:
        return (
            _is_measured(x)
            and self._is_by_matrix_products(x, weight)
            and x.shape[0] > 1
            and x.shape[2] * x.shape[3] <= _SMALL_IMAGE
            and _HAS_ONEDNN
            and bool(torch.backends.mkldnn.enabled)
        )

    def _parts(self, x: Tensor, weight: Tensor) -> list[slice]:
        """The parts of a batch to compute one after the other; the whole where that is faster."""
        images, whole = x.shape[0], [_WHOLE]
        if math.prod(weight.shape[1:]) > _FEW_MULTIPLICATIONS or not _is_measured(x):
            return whole
        per_image = x.nbytes // images + x.element_size() * self._outputs_per_image(x, weight)
        at_once = max(torch.get_num_threads() * _PART_OF_A_THREAD // per_image, 1)
        if (
            images * per_image < _LARGE_BATCH
            or at_once >= images
            or self._is_by_matrix_products(x, weight)
        ):
            return whole
        return [slice(i, i + at_once) for i in range(0, images, at_once)]

    def _outputs_per_image(self, x: Tensor, weight: Tensor) -> int:
        sizes = (
            max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)
            for size, kernel, stride, padding, dilation in zip(
                x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return weight.shape[0] * math.prod(sizes)


def _for_parts(x: Tensor) -> Tensor:
    """Memory to write the results of parts to."""
    if may_skip_dispatcher(x):
        _C.prefer_huge_pages(x)
    return x


def _is_measured(x: Tensor) -> bool:
    """Whether x is such as was measured, and no gradient of a gradient is to be recorded."""
    return (
        x.dim() == 4
        and x.is_cpu
        and x.dtype is torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
    )
