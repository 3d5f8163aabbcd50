"""A convolution and its gradients, by the way of computing them that takes the least time.

torch leaves most convolutions on the CPU to oneDNN, which copies what it reads and writes into
layouts of its own. Where an output takes few multiplications, the copies take longer. So:

- 1x1 convolutions are products of matrices, and depthwise convolutions have a kernel for each
  channel. For both there are native kernels, from and to torch's layouts (csrc/cpu/pointwise.h,
  csrc/cpu/depthwise.h).
- 3x3 convolutions with stride 1 take fewer multiplications by Winograd's algorithm
  (csrc/cpu/winograd.h). Where a result is not finite, torch computes it.
- 1x1 and 3x3 convolutions of bf16 with stride 1 are products of tiles where the processor has AMX
  (csrc/cpu/tiled_convolution.h). Where a result is not finite, torch computes it.
- For a large batch, each call maps new memory for oneDNN's copies, and the page faults take longer
  than a convolution of few multiplications. Image by image, or a few at a time, the copies fit the
  caches, and malloc reuses the same memory.

`benchmarks/convolution.py` measures all of this. Results are the same up to rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import ops
from .fast_calls import may_skip_dispatcher

__all__ = ["Convolution", "Gradients"]

# Of x, weight and bias, where needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Functions of `_C`: the convolution, and the gradients of x and weight.
_Kernels = tuple[Any, Any, Any]

# Input and output of so many bytes are computed in parts, of so many for each thread, where an
# output takes few multiplications. Where it takes many, they hide what memory costs. The first
# layer of a network, with 7x7 weights for each of 3 channels, takes 147.
_LARGE_BATCH, _PART_OF_A_THREAD, _FEW_MULTIPLICATIONS = 20 << 20, 2 << 20, 150

# Instruction sets on which the native kernels take less time than torch's convolutions.
_MEASURED_ISAS = ("avx512", "avx_vnni", "avx2")
_HAS_AMX = "avx512_amx" in _C.isas()
_NATIVE_IN_GRAPHS = _C.isa().startswith(_MEASURED_ISAS)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)

# On a processor with AMX, where tiles do not take a 1x1 convolution of bf16, it is left to oneDNN,
# which multiplies with AMX, too. Native kernels take it if an element that is read or written takes
# so few multiplications that oneDNN's copies take longer than they.
_FEW_FOR_AMX = 50

# Tiles of AMX take convolutions with more multiplications than this for each element that is read
# or written. Packing images takes longer than fewer.
_FEW_FOR_TILES = 24

# The kernel sizes of depthwise convolutions that are computed here, and from how many pixels on
# that is faster than oneDNN. Gradients are always.
_DEPTHWISE = {3: 1, 5: 28 * 28, 7: 56 * 56}

# Winograd's algorithm takes 3x3 convolutions of so many input and output channels and more, and of
# images with such sides and longer. It transforms the weight first, which pays off where a large
# one meets so many tiles of 2x2 pixels. The transformed weight takes 16 / 9 of its memory.
_CHANNELS_OF_WINOGRAD, _SIDE_OF_WINOGRAD, _TILES_OF_WINOGRAD = 16, 4, 48
_SMALL_WEIGHT, _LARGEST_WEIGHT = 1 << 16, 1 << 22

_WHOLE = slice(None)

# By the dimensions of their inputs.
_TORCH: dict[int, Any] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


class Convolution(NamedTuple):
    """A convolution that is not transposed, of inputs with a batch dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = None
        if self._is_depthwise(x, weight):
            result = self._depthwise(x, weight, bias)
        elif (kernels := self._kernels(x, weight)) is not None:
            result = _native(kernels, x, weight, bias)
        if result is not None:
            return result
        for part in self._parts(x, weight):
            # The functions that torch's modules call, since the profiler counts their operations.
            of_part: Tensor = _TORCH[x.dim()](x[part], weight, bias, *self)
            if part == _WHOLE:
                return of_part
            if result is None:
                size, stride = of_part.size(), of_part.stride()
                result = _for_parts(
                    of_part.new_empty_strided(
                        (x.shape[0], *size[1:]), (math.prod(size[1:]), *stride[1:])
                    )
                )
            result[part] = of_part
        assert result is not None
        return result

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        needed: list[bool],
        reuse: bool = False,
    ) -> Gradients:
        """Of x, weight and bias, where needed. With `reuse`, grad may become the gradient of x."""
        reuse = reuse and grad.size() == x.size() and grad.stride() == x.stride()
        gradients = None
        if self._is_depthwise(x, weight):
            gradients = self._depthwise_gradients(grad, x, weight, needed, reuse)
        elif (kernels := self._kernels(x, weight)) is not None:
            gradients = _native_gradients(kernels, grad, x, weight, needed)
        if gradients is not None:
            return gradients
        sizes = [weight.shape[0]] if needed[2] else None
        geometry = self._geometry()
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

    def in_graph(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The op of the native kernels, which compilers do not look into; None where torch is used.

        A compiler's x has its strides in eager mode: the op gets no other.
        """
        has_kernels = (
            _NATIVE_IN_GRAPHS
            and (
                self._has_pointwise_kernel(x, weight, x.dtype)
                or self._has_depthwise_kernel(x, weight)
                or self._has_winograd_kernel(x, weight, x.dtype)
            )
            and x.is_cpu
            and x.dtype in _NATIVE_DTYPES
            and x.dtype == weight.dtype
            and _is_contiguous(x)
            and _is_contiguous(weight)
        )
        return ops.convolution(x, weight, bias, self.stride[0]) if has_kernels else None

    def is_left_to_torch(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether, computed in `dtype`, all of it is torch's convolution of the whole batch."""
        if x.dim() != 4 or not x.is_cpu or dtype not in _NATIVE_DTYPES:
            return True
        if self._has_depthwise_kernel(x, weight) or self._kernels_by_size(x, weight, dtype):
            return False
        return dtype != torch.float32 or self._images_at_once(x, weight) == x.shape[0]

    def _geometry(self) -> tuple[Any, ...]:
        """What torch's functions take after the bias."""
        output_padding = (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, False, output_padding, self.groups

    def _kernels(self, x: Tensor, weight: Tensor) -> _Kernels | None:
        """What computes it faster than torch; None also for depthwise convolutions."""
        return self._kernels_by_size(x, weight, x.dtype) if _is_for_natives(x) else None

    def _kernels_by_size(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> _Kernels | None:
        """The same by its sizes alone, where it is computed in `dtype`."""
        if self._has_tiled_kernel(x, weight, dtype):
            return _C.tiled_convolution, _C.tiled_grad_input, _C.tiled_grad_weight
        if self._has_pointwise_kernel(x, weight, dtype):
            return _C.pointwise_convolution, _C.pointwise_grad_input, _C.pointwise_grad_weight
        if self._has_winograd_kernel(x, weight, dtype):
            return _C.winograd_convolution, _C.winograd_grad_input, _C.winograd_grad_weight
        return None

    def _is_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        """Whether native kernels compute it, with a kernel for each channel."""
        return self._has_depthwise_kernel(x, weight) and _is_for_natives(x)

    def _has_depthwise_kernel(self, x: Tensor, weight: Tensor) -> bool:
        return (
            self.groups == x.shape[1] == weight.shape[0]
            and x.dim() == 4
            and (size := weight.shape[-1]) in _DEPTHWISE
            and weight.shape[1:] == (1, size, size)
            and self.stride in ((1, 1), (2, 2))
            and self.padding == (size // 2,) * 2
            and self.dilation == (1, 1)
        )

    def _depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The convolution, or None where torch is to compute it."""
        images, channels, height, width = x.shape
        if height * width < _DEPTHWISE[weight.shape[-1]]:
            return None
        if not (_is_contiguous(x) and _is_contiguous(weight)):
            return None
        if not _may_skip_dispatcher(x, weight, bias):
            return None
        step = self.stride[0]
        y = x.new_empty((images, channels, -(-height // step), -(-width // step)))
        return y if _C.depthwise_convolution(x, weight, bias, step, y) else None

    def _depthwise_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool], reuse: bool
    ) -> Gradients | None:
        if not (_is_contiguous(x) and _is_contiguous(weight)):
            return None
        if not may_skip_dispatcher(grad, x, weight):
            return None
        of_bias = grad.sum((0, 2, 3)) if needed[2] else None  # first, as grad may be overwritten
        of_x = (grad if reuse else torch.empty_like(x)) if needed[0] else None
        of_weight = torch.empty_like(weight) if needed[1] else None
        args = (grad, x, weight, self.stride[0], of_x, of_weight)
        done = _C.depthwise_convolution_backward(*args)
        return (of_x, of_weight, of_bias) if done else None

    def _has_pointwise_kernel(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        if x.dim() != 4:
            return False
        outputs, inputs, *kernel = weight.shape
        return (
            inputs == x.shape[1]
            and kernel == [1, 1]
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
            and (
                not _is_left_to_amx(dtype)
                or (
                    dtype is torch.bfloat16
                    and not _multiplies_more_than(_FEW_FOR_AMX, outputs, inputs)
                )
            )
        )

    def _has_tiled_kernel(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        if dtype is not torch.bfloat16 or _C.isa() != "avx512_amx" or x.dim() != 4:
            return False
        outputs, inputs, *kernel = weight.shape
        return (
            inputs == x.shape[1]
            and kernel in ([1, 1], [3, 3])
            and self.stride == self.dilation == (1, 1)
            and self.padding == (kernel[0] // 2,) * 2
            and self.groups == 1
            and _multiplies_more_than(_FEW_FOR_TILES, outputs, inputs, math.prod(kernel))
        )

    def _has_winograd_kernel(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        return (
            dtype is torch.float32
            and x.dim() == 4
            and weight.shape[1:] == (x.shape[1], 3, 3)
            and self.stride == self.padding == self.dilation == (1, 1)
            and self.groups == 1
            and min(weight.shape[:2]) >= _CHANNELS_OF_WINOGRAD
            and min(x.shape[2:]) >= _SIDE_OF_WINOGRAD
            and _has_tiles_for(x, weight)
            and not _is_left_to_amx(dtype)
        )

    def _parts(self, x: Tensor, weight: Tensor) -> list[slice]:
        """The parts of a batch to compute one after the other; the whole where that is faster."""
        images = x.shape[0]
        at_once = self._images_at_once(x, weight) if _is_measured(x, torch.float32) else images
        if at_once == images:
            return [_WHOLE]
        return [slice(i, i + at_once) for i in range(0, images, at_once)]

    def _images_at_once(self, x: Tensor, weight: Tensor) -> int:
        """How many images of a batch in fp32 are computed at once in the least time."""
        images = x.shape[0]
        if images == 0 or math.prod(weight.shape[1:]) > _FEW_MULTIPLICATIONS:
            return images
        per_image = x.nbytes // images + x.element_size() * self._outputs_per_image(x, weight)
        if images * per_image < _LARGE_BATCH:
            return images
        at_once = torch.get_num_threads() * _PART_OF_A_THREAD // per_image
        return min(max(at_once, 1), images)

    def _outputs_per_image(self, x: Tensor, weight: Tensor) -> int:
        sizes = (
            max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)
            for size, kernel, stride, padding, dilation in zip(
                x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return weight.shape[0] * math.prod(sizes)


def _native(kernels: _Kernels, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution in the memory format of torch's; None where torch is to compute it."""
    memory_format = _memory_format(x, weight)
    if memory_format is None or not _may_skip_dispatcher(x, weight, bias):
        return None
    size = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    y = torch.empty(size, dtype=x.dtype, memory_format=memory_format)
    return y if kernels[0](x, weight.contiguous(), bias, y) else None


def _native_gradients(
    kernels: _Kernels, grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> Gradients | None:
    _, of_input, of_weights = kernels
    of_x = of_weight = of_bias = None
    if _memory_format(x, weight) is None or not may_skip_dispatcher(grad, x, weight):
        return None
    contiguous = weight.contiguous()
    if needed[0]:
        of_x = torch.empty_like(x)
        if not of_input(grad, contiguous, of_x):
            return None
    if needed[1]:
        of_weight = torch.empty_like(contiguous)
        if not of_weights(grad, x, of_weight):
            return None
        if contiguous is not weight:
            of_weight = torch.empty_like(weight).copy_(of_weight)
    if needed[2]:
        of_bias = grad.sum((0, 2, 3))
    return of_x, of_weight, of_bias


def _has_tiles_for(x: Tensor, weight: Tensor) -> bool:
    """Whether transforming the weight for Winograd's algorithm pays off."""
    images, _, height, width = x.shape
    elements = math.prod(weight.shape)
    if elements <= _SMALL_WEIGHT:
        return True
    tiles = images * ((height + 1) // 2) * ((width + 1) // 2)
    return elements <= _LARGEST_WEIGHT and tiles >= _TILES_OF_WINOGRAD


def _is_left_to_amx(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies with AMX, as it does bf16, and fp32 that it may round to bf16."""
    if not _HAS_AMX or dtype is torch.bfloat16:
        return _HAS_AMX
    if torch.compiler.is_dynamo_compiling():
        return False  # Dynamo cannot trace the question.
    precision: str = torch.backends.mkldnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "bf16"


def _multiplies_more_than(times: int, outputs: int, inputs: int, taps: int = 1) -> bool:
    """Whether stride 1 takes more multiplications for each element that is read or written."""
    return outputs * inputs * taps > times * (outputs + inputs)


def _memory_format(x: Tensor, weight: Tensor) -> torch.memory_format | None:
    """Of the result of native kernels; None where they do not take x and weight as they lie."""
    if _is_contiguous(x):
        return torch.contiguous_format if _is_contiguous(weight) else None
    _, channels, height, width = x.shape
    channels_last = (channels * height * width, 1, width * channels, channels)
    if x.dtype is torch.float32 and x.stride() == channels_last:
        formats = torch.contiguous_format, torch.channels_last
        has_one = any(weight.is_contiguous(memory_format=f) for f in formats)
        return torch.channels_last if has_one else None
    return None


def _is_contiguous(x: Tensor) -> bool:
    """Unlike torch's, not for channels_last either where sizes of 1 make both the same memory."""
    _, channels, height, width = x.shape
    return x.stride() == (channels * height * width, height * width, width, 1)


def _may_skip_dispatcher(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return may_skip_dispatcher(x, weight, *(() if bias is None else (bias,)))


def _for_parts(x: Tensor) -> Tensor:
    """Memory to write the results of parts to."""
    if may_skip_dispatcher(x):
        _C.prefer_huge_pages(x)
    return x


def _is_for_natives(x: Tensor) -> bool:
    """Whether native kernels were measured to be faster for such tensors, on this processor."""
    return _is_measured(x, *_NATIVE_DTYPES) and _C.isa().startswith(_MEASURED_ISAS)


def _is_measured(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether x is such as was measured, and no gradient of a gradient is to be recorded."""
    return (
        x.dim() == 4
        and x.is_cpu
        and x.dtype in dtypes
        and x.numel() > 0
        and not torch.is_grad_enabled()
    )
