"""Convolutions by the fastest way: results are torch's up to rounding, whichever way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastquant import _C
from fastquant._native import ops
from fastquant._native.convolution import Convolution

on_x86 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="measured on x86"
)
with_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture
def no_convolutions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "convolution", None)
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", None)


def ops_called(function: Any, *args: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return [event.name for event in profile.events()]


def layer(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, bias: bool
) -> tuple[Convolution, Tensor, Tensor | None]:
    torch.manual_seed(0)
    convolution = Convolution((stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel)
    return convolution, weight, torch.randn(outputs) if bias else None


def check_against_torch(
    convolution: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> None:
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*leaves, *convolution)
    grad = torch.randn_like(expected)
    wanted = [t for t, is_needed in zip(leaves, needed, strict=True) if is_needed]
    expected_gradients = iter(torch.autograd.grad(expected, wanted, grad))
    with torch.no_grad():
        y = convolution(x, weight, bias)
        gradients = convolution.gradients(grad, x, weight, needed)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride()
    for is_needed, gradient in zip(needed, gradients, strict=True):
        if is_needed:  # torch may give others, too
            assert gradient is not None
            of_torch = next(expected_gradients)
            scale = float(of_torch.abs().max()) if of_torch.numel() else 1
            torch.testing.assert_close(gradient, of_torch, rtol=1e-4, atol=1e-5 * scale)


# Large: a depthwise convolution, and a 1x1 convolution of few channels. 7 images make parts that
# differ in size where there are several threads.
LARGE = [(32, 32, 3, 1, 32), (96, 96, 3, 2, 96), (16, 96, 1, 1, 1)]
SMALL = [(24, 40, 1, 1, 1), (24, 40, 1, 2, 1), (24, 24, 1, 1, 24), (24, 40, 3, 1, 1)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LARGE)
def test_large_batches(shape: Any, bias: bool, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    convolution, weight, bias_of = layer(*shape, bias)
    x = torch.randn(7, shape[0], 112, 112).to(memory_format=layout)
    check_against_torch(convolution, x, weight, bias_of, [True, True, bias])


@pytest.mark.parametrize(
    "needed", [[False, True, False], [True, False, True], [False, False, True]]
)
def test_large_batches_have_the_gradients_that_are_needed(needed: list[bool]) -> None:
    convolution, weight, bias = layer(*LARGE[0], bias=True)
    check_against_torch(convolution, torch.randn(7, 32, 112, 112), weight, bias, needed)


@pytest.mark.parametrize("shape", LARGE)
@torch.no_grad()
def test_the_gradient_may_take_the_place_of_the_incoming_one(shape: Any) -> None:
    convolution, weight, _ = layer(*shape, bias=False)
    x = torch.randn(7, shape[0], 112, 112)
    grad = torch.randn_like(convolution(x, weight, None))
    expected = convolution.gradients(grad, x, weight, [True, True, False])
    place = grad.clone()
    of_x, of_weight, _ = convolution.gradients(place, x, weight, [True, True, False], True)
    assert torch.equal(of_x, expected[0])
    assert torch.equal(of_weight, expected[1])
    fits = grad.size() == x.size()
    assert (of_x.data_ptr() == place.data_ptr()) == fits
    assert fits or torch.equal(place, grad)


@pytest.mark.filterwarnings("ignore:TF32:UserWarning")  # of mkldnn.flags
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("images", [0, 1, 5])
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.usefixtures("one_thread")
def test_small_images(shape: Any, images: int, onednn: bool) -> None:
    convolution, weight, bias = layer(*shape, bias=True)
    with torch.backends.mkldnn.flags(enabled=onednn):
        x = torch.randn(images, shape[0], 14, 14)
        check_against_torch(convolution, x, weight, bias, [True, True, True])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_kernel_that_does_not_fit_is_torchs_error(size: int) -> None:
    convolution, weight = Convolution((1, 1), (0, 0), (1, 1), 8), torch.randn(8, 1, 4, 4)
    x = torch.randn(2, 8, size, 4)
    with pytest.raises(RuntimeError) as expected:
        F.conv2d(x, weight, None, *convolution)
    with torch.no_grad(), pytest.raises(RuntimeError) as error:
        convolution(x, weight, None)
    assert str(error.value) == str(expected.value)


@torch.no_grad()
def test_large_batches_are_computed_in_parts() -> None:
    convolution, weight, _ = layer(*LARGE[0], bias=False)
    x = torch.randn(8, 32, 112, 112).to(memory_format=torch.channels_last)
    one, many = (ops_called(convolution, x[:n], weight, None) for n in (1, 8))
    assert one.count("aten::convolution") == 1
    assert many.count("aten::convolution") > 1
    compute_bound, wide, _ = layer(32, 32, 3, 1, 1, bias=False)
    assert ops_called(compute_bound, x, wide, None).count("aten::convolution") == 1


@st.composite
def pointwise(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias and the gradient of the output of a 1x1 convolution."""
    sizes = st.sampled_from
    images, height, width = (draw(sizes(choice)) for choice in ((1, 2, 9), (1, 4, 7), (1, 5, 14)))
    inputs, outputs = (draw(sizes((1, 3, 16, 24, 70))) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layout = draw(sizes((torch.contiguous_format, torch.channels_last)))
    x = torch.randn(images, inputs, height, width).to(memory_format=layout)
    grad = torch.randn(images, outputs, height, width).to(memory_format=layout)
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    return x, torch.randn(outputs, inputs, 1, 1), bias, grad


POINTWISE = Convolution((1, 1), (0, 0), (1, 1), 1)


def all_results(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        needed = [True, True, bias is not None]
        results = [POINTWISE(x, weight, bias), *POINTWISE.gradients(grad, x, weight, needed)]
    return [t for t in results if t is not None]


@settings(max_examples=60, deadline=None)
@given(pointwise())
def test_kernels_of_one_element_equal_products_in_double(case: Any) -> None:
    x, weight, bias, grad = case
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*leaves)
    wanted = [t for t in leaves if t is not None]
    of_torch = F.conv2d(x, weight, bias)
    results = all_results(*case)
    for result, exact in zip(
        results, [expected, *torch.autograd.grad(expected, wanted, grad.double())], strict=True
    ):
        terms = max(grad.numel() // grad.shape[1], weight.shape[0], weight.shape[1])
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=3e-7 * terms)
    assert results[0].stride() == of_torch.stride()


@pytest.mark.parametrize("shape", [(16, 96, 112), (24, 144, 56), (32, 192, 28), (200, 40, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_one_element_give_the_same_bits_everywhere(
    shape: tuple[int, int, int], layout: torch.memory_format, threads: None, any_isa: list[str]
) -> None:
    inputs, outputs, size = shape
    torch.manual_seed(0)
    x = torch.randn(3, inputs, size, size).to(memory_format=layout)
    grad = torch.randn(3, outputs, size, size).to(memory_format=layout)
    weight = torch.randn(outputs, inputs, 1, 1)
    expected = None
    for isa in any_isa:
        if not isa.startswith("avx"):  # torch's convolutions
            continue
        _C.set_isa(isa)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results = all_results(x, weight, None, grad)
            expected = expected or results
            assert all(map(torch.equal, results, expected)), (isa, n)


@settings(max_examples=40, deadline=None)
@given(pointwise())
def test_kernels_of_one_element_round_bf16_once(case: Any) -> None:
    """Sums are fp32. On the way to torch's own convolutions, results are not as close."""
    narrow = [None if t is None else t.contiguous().bfloat16() for t in case]
    expected = all_results(*(None if t is None else t.float() for t in narrow))
    for result, wide in zip(all_results(*narrow), expected, strict=True):
        assert result.dtype == torch.bfloat16
        scale = float(wide.abs().max())
        torch.testing.assert_close(result.float(), wide, rtol=2**-8, atol=2**-10 * scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernels_of_one_element_pass_on_what_is_not_finite(value: float) -> None:
    """No element but those that depend on it sees it, at the end of an image, too."""
    x, grad = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    x[1, 3, 4, 4] = grad[0, 5, 4, 3] = value
    weight = torch.randn(8, 8, 1, 1)
    y, of_x, of_weight = all_results(x, weight, None, grad)
    for result, touched in (
        (y, x.isfinite().all(1, keepdim=True)),
        (of_x, grad.isfinite().all(1, keepdim=True)),
    ):
        assert torch.equal(result.isfinite(), touched.expand_as(result))
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:, 3] = expected[5] = False
    assert torch.equal(of_weight.isfinite()[..., 0, 0], expected)


@on_x86
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("no_convolutions_of_torch")
@torch.no_grad()
def test_kernels_of_one_element_do_without_torch(layout: torch.memory_format) -> None:
    x = torch.randn(8, 24, 14, 14).to(memory_format=layout)
    grad = torch.randn(8, 40, 14, 14).to(memory_format=layout)
    assert len(all_results(x, torch.randn(40, 24, 1, 1), torch.randn(40), grad)) == 4


@torch.no_grad()
def test_kernels_of_one_element_of_tensors_with_gaps() -> None:
    x, weight = torch.randn(8, 24, 14, 14)[:, :, ::2], torch.randn(40, 24, 1, 1)
    torch.testing.assert_close(POINTWISE(x, weight, None), F.conv2d(x, weight))
    grad = torch.randn(8, 40, 1, 1).expand(8, 40, 7, 14)
    results = POINTWISE.gradients(grad, x, weight, [True, True, False])
    dense = POINTWISE.gradients(grad.contiguous(), x.contiguous(), weight, [True, True, False])
    for result, expected in zip(results[:2], dense[:2], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_gradients_of_gradients_are_recorded() -> None:
    convolution, weight, _ = layer(*SMALL[0], bias=False)
    x = torch.randn(8, 24, 14, 14)

    def gradient_of_gradient(function: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = function(leaf, weight.requires_grad_(), None).square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    ours, expected = gradient_of_gradient(convolution), gradient_of_gradient(F.conv2d)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------ depthwise convolutions


def depthwise(
    kernel: int, stride: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Convolution, Tensor, Tensor]:
    convolution = Convolution((stride,) * 2, (kernel // 2,) * 2, (1, 1), channels)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    return convolution, weight, torch.randn(channels).to(dtype)


@given(
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    shape=st.tuples(*(st.integers(1, high) for high in (3, 5, 70, 70))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_depthwise_convolutions_are_exact_up_to_rounding(
    kernel: int, stride: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    convolution, *parameters = depthwise(kernel, stride, shape[1], dtype)
    given = [torch.randn(shape).to(dtype), *parameters]

    def in_fp64(function: Any, grad: Any) -> list[Tensor]:
        leaves = [function(t.double()).requires_grad_() for t in given]
        y = F.conv2d(leaves[0], leaves[1], leaves[2], *convolution)
        return [y, *torch.autograd.grad(y, leaves, function(grad(y)))]

    grad = torch.randn_like(in_fp64(torch.clone, torch.zeros_like)[0]).to(dtype)
    expected = in_fp64(torch.clone, lambda _: grad.double())
    magnitudes = in_fp64(torch.abs, lambda _: grad.double())  # these bound what rounding may do
    with torch.no_grad():
        results = [convolution(*given), *convolution.gradients(grad, *given[:2], [True] * 3)]
    for result, truth, magnitude in zip(results, expected, magnitudes, strict=True):
        assert result is not None
        assert result.dtype is dtype
        error = (result.double() - truth).abs()
        assert bool((error <= 2e-6 * magnitude + torch.finfo(dtype).eps * truth.abs()).all())


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.usefixtures("threads")
@torch.no_grad()
def test_depthwise_convolutions_have_the_same_bits_everywhere(
    kernel: int, stride: int, any_isa: list[str]
) -> None:
    convolution, weight, bias = depthwise(kernel, stride, 6)
    x = torch.randn(3, 6, 97, 101)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *convolution))
    results = []
    for isa in any_isa:
        if not isa.startswith("avx"):  # torch's convolutions
            continue
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradients = convolution.gradients(grad, x, weight, [True, True, False])
            results.append((convolution(x, weight, bias), *gradients[:2]))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@on_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_convolutions_of_torch")
@torch.no_grad()
def test_depthwise_convolutions_do_not_call_torchs(dtype: torch.dtype) -> None:
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (7, 2)):
        convolution, weight, bias = depthwise(kernel, stride, 4, dtype)
        x = torch.randn(2, 4, 56, 56).to(dtype)
        y = convolution(x, weight, bias)
        convolution.gradients(torch.ones_like(y), x, weight, [True, True, True])


@with_onednn
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolutions_of_nonfinite_values(stride: int) -> None:
    # Nothing is multiplied beyond an edge: an infinite weight gives no NaN there.
    for index in range(9):
        convolution, weight, bias = depthwise(3, stride, 8)
        weight[0].flatten()[index] = float("inf")
        weight[1].flatten()[index] = float("nan")
        x = torch.rand(2, 8, 6, 5) + 1
        x[0, 2, index % 6, 4] = float("-inf")
        x[1, 3, 5, index % 5] = float("nan")
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = F.conv2d(leaves[0], leaves[1], leaves[2], *convolution)
        grad = torch.rand_like(y) + 1
        grad[0, 4, 0, 0] = float("inf")
        grad[1, 5, -1, -1] = float("nan")
        expected = y, *torch.autograd.grad(y, leaves, grad)
        with torch.no_grad():
            gradients = convolution.gradients(grad, x, weight, [True] * 3)
            results = convolution(x, weight, bias), *gradients
        for result, of_torch in zip(results, expected, strict=True):
            torch.testing.assert_close(result, of_torch, equal_nan=True)


@torch.no_grad()
def test_depthwise_convolutions_of_tensors_that_are_not_contiguous() -> None:
    convolution, weight, bias = depthwise(3, 1, 6)
    x = torch.randn(2, 12, 9, 10)[:, ::2]
    grad = torch.randn(1, 6, 1, 1).expand(2, 6, 9, 10)
    torch.testing.assert_close(convolution(x, weight, bias), F.conv2d(x, weight, bias, 1, 1, 1, 6))
    gradients = convolution.gradients(grad, x, weight, [True] * 3)
    args = (grad.contiguous(), x.contiguous(), weight, [True] * 3)
    for result, expected in zip(gradients, convolution.gradients(*args), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------ 3x3 convolutions

WINOGRAD = Convolution((1, 1), (1, 1), (1, 1), 1)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def of_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        needed = [True, True, bias is not None]
        results = WINOGRAD(x, weight, bias), *WINOGRAD.gradients(grad, x, weight, needed)
    return [t for t in results if t is not None]


def of_torch(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.conv2d(*leaves, padding=1)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@st.composite
def winograd(draw: st.DrawFn, integers: bool = False) -> tuple[Tensor, Tensor, Any, Tensor]:
    """x, weight, bias and the gradient of the output of a 3x3 convolution."""
    images, height, width = draw(st.integers(1, 5)), *draw(st.tuples(*[st.integers(4, 20)] * 2))
    inputs, outputs = (draw(st.sampled_from((16, 17, 24, 40, 70))) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layout, bias = draw(st.sampled_from(LAYOUTS)), draw(st.booleans())
    tensors = [
        torch.randn(images, inputs, height, width).to(memory_format=layout),
        torch.randn(outputs, inputs, 3, 3).to(memory_format=draw(st.sampled_from(LAYOUTS))),
        torch.randn(outputs) if bias else None,
        torch.randn(images, outputs, height, width).to(memory_format=layout),
    ]
    if integers:
        tensors = [None if t is None else t.mul(4).round() for t in tensors]
    return tuple(tensors)  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(winograd())
def test_3x3_convolutions_are_exact_up_to_rounding(case: Any) -> None:
    expected = of_torch(*(None if t is None else t.double() for t in case))
    magnitudes = of_torch(*(None if t is None else t.double().abs() for t in case))
    results, theirs = of_winograd(*case), of_torch(*case)
    for result, of_theirs in zip(results[:2], theirs, strict=False):
        assert result.stride() == of_theirs.stride()
    for result, truth, bound in zip(results, expected, magnitudes, strict=True):
        assert float((result - truth).abs().max()) <= 1e-6 * float(bound.max())


@pytest.mark.parametrize("shape", [(64, 56), (128, 28), (256, 14), (512, 7)])
@pytest.mark.parametrize("positive", [False, True])
def test_3x3_convolutions_are_nearly_as_precise_as_torchs(
    shape: tuple[int, int], positive: bool
) -> None:
    """Root mean square errors, for layers of ResNet-18; inputs are positive after a ReLU."""
    channels, size = shape
    torch.manual_seed(0)
    x, grad = torch.randn(2, channels, size, size), torch.randn(2, channels, size, size)
    case = x.relu() if positive else x, torch.randn(channels, channels, 3, 3), None, grad
    exact = of_torch(*(None if t is None else t.double() for t in case))
    for result, theirs, truth in zip(of_winograd(*case), of_torch(*case), exact, strict=True):
        error, of_theirs = ((t - truth).square().mean().sqrt() for t in (result, theirs))
        assert float(error) <= 1.6 * float(of_theirs)


@settings(max_examples=40, deadline=None)
@given(winograd(integers=True))
def test_3x3_convolutions_of_small_integers_are_exact(case: Any) -> None:
    exact = of_torch(*(None if t is None else t.double() for t in case))
    for result, truth in zip(of_winograd(*case), exact, strict=True):
        assert torch.equal(result.double(), truth)


@pytest.mark.parametrize("shape", [(16, 40, 56), (64, 72, 28), (200, 96, 7)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_3x3_convolutions_have_the_same_bits_everywhere(
    shape: tuple[int, int, int], layout: torch.memory_format, threads: None, any_isa: list[str]
) -> None:
    inputs, outputs, size = shape
    torch.manual_seed(0)
    x = torch.randn(8, inputs, size, size).to(memory_format=layout)
    grad = torch.randn(8, outputs, size, size).to(memory_format=layout)
    weight = torch.randn(outputs, inputs, 3, 3)
    expected = None
    for isa in any_isa:
        if not isa.startswith("avx"):  # torch's convolutions
            continue
        _C.set_isa(isa)
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results = of_winograd(x, weight, torch.ones(outputs), grad)
            expected = expected or results
            assert all(map(torch.equal, results, expected)), (isa, n)


@on_x86
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("no_convolutions_of_torch")
@torch.no_grad()
def test_3x3_convolutions_do_without_torchs(layout: torch.memory_format) -> None:
    x = torch.randn(8, 24, 14, 14).to(memory_format=layout)
    grad = torch.randn(8, 40, 14, 14).to(memory_format=layout)
    weight = torch.randn(40, 24, 3, 3).to(memory_format=layout)
    of_weight = of_winograd(x, weight, torch.randn(40), grad)[2]
    assert of_weight.stride() == weight.stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_3x3_convolutions_of_what_is_not_finite_are_torchs(value: float, where: int) -> None:
    """Also of what is finite, but has no finite sums."""
    torch.manual_seed(0)
    case = [
        torch.rand(2, 16, 9, 8) + 1,
        torch.rand(20, 16, 3, 3) + 1,
        None,
        torch.rand(2, 20, 9, 8) + 1,
    ]
    case[where][1, 3, 1:, 2] = value
    results, expected = of_winograd(*case), of_torch(*case)
    assert not all(bool(t.isfinite().all()) for t in expected)
    for result, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(result, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_3x3_convolutions_whose_transforms_overflow_are_torchs() -> None:
    x, weight = torch.full((1, 16, 8, 8), 2e38), torch.full((16, 16, 3, 3), 1e-3)
    results = of_winograd(x, weight, None, torch.full((1, 16, 8, 8), 1e-3))
    expected = of_torch(x, weight, None, torch.full((1, 16, 8, 8), 1e-3))
    for result, theirs in zip(results, expected, strict=True):
        assert bool(theirs.isfinite().all())
        torch.testing.assert_close(result, theirs)


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("bias", [False, True])
def test_3x3_convolutions_as_an_op(value: float, bias: bool) -> None:
    """It calls torch's convolution itself where results are not finite."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 20, 9, 8), torch.randn(24, 20, 3, 3), torch.randn(2, 24, 9, 8)
    x[1, 3, 2, 2] *= value
    case = x, weight, torch.randn(24) if bias else None, grad
    expected = of_torch(*case)
    y = ops.convolution(*case[:3], 1)
    for needed in ([True, True], [True, False], [False, True]):
        gradients = ops.convolution_backward(grad, x, weight, 1, *needed)
        for gradient, theirs, is_needed in zip(gradients, expected[1:3], needed, strict=True):
            if is_needed:
                torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
            else:
                assert gradient.numel() == 0
    torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.no_grad()
def test_3x3_convolutions_of_tensors_with_gaps() -> None:
    x, weight = torch.randn(8, 24, 14, 14)[:, :, ::2], torch.randn(40, 24, 3, 3)
    torch.testing.assert_close(
        WINOGRAD(x, weight, None), F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4
    )
    grad = torch.randn(8, 40, 1, 1).expand(8, 40, 7, 14)
    results = WINOGRAD.gradients(grad, x, weight, [True, True, False])
    dense = (grad.contiguous(), x.contiguous(), weight, [True, True, False])
    for result, expected in zip(results[:2], WINOGRAD.gradients(*dense)[:2], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


# -------------------------------------------------------------------- bf16 by tiles of AMX

needs_tiles = pytest.mark.skipif("avx512_amx" not in _C.isas(), reason="needs AMX")
# Images, inputs, outputs, height, width, kernel.
TILED = [
    (3, 64, 72, 14, 13, 3),
    (9, 16, 40, 7, 7, 3),
    (2, 70, 100, 28, 28, 1),
    (1, 160, 33, 5, 9, 1),
]


def tiled(shape: Any, integers: bool) -> tuple[Convolution, list[Tensor]]:
    """A convolution; x, weight, bias and the gradient of its output in bf16."""
    images, inputs, outputs, height, width, kernel = shape
    torch.manual_seed(0)
    tensors = [
        torch.randn(images, inputs, height, width),
        torch.randn(outputs, inputs, kernel, kernel),
        torch.randn(outputs),
        torch.randn(images, outputs, height, width),
    ]
    convolution = Convolution((1, 1), (kernel // 2,) * 2, (1, 1), 1)
    return convolution, [(t.round() if integers else t).bfloat16() for t in tensors]


@torch.no_grad()
def all_of(convolution: Convolution, case: list[Tensor]) -> list[Tensor | None]:
    x, weight, bias, grad = case
    gradients = convolution.gradients(grad, x, weight, [True, True, True])
    return [convolution(x, weight, bias), *gradients]


def exact_of(convolution: Convolution, case: list[Tensor]) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in case[:3]]
    y = F.conv2d(*leaves, *convolution)
    return [y.detach(), *torch.autograd.grad(y, leaves, case[3].double())]


@needs_tiles
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("shape", TILED)
@pytest.mark.usefixtures("no_convolutions_of_torch")
def test_bf16_by_tiles(shape: Any, integers: bool) -> None:
    convolution, case = tiled(shape, integers)
    results, exact = all_of(convolution, case), exact_of(convolution, case)
    for result, truth in zip(
        results[:3], exact, strict=False
    ):  # the bias's gradient is torch's sum
        assert result is not None
        assert result.is_contiguous()
        if integers:  # sums of small integers are exact
            assert torch.equal(result, truth.bfloat16())
        tolerance = 2**-8 * truth.abs() + 1e-5 * float(truth.abs().max())
        assert bool(((result.double() - truth).abs() <= tolerance).all())


@needs_tiles
@pytest.mark.parametrize("shape", TILED)
def test_bf16_by_tiles_has_the_same_bits_with_any_number_of_threads(
    shape: Any, threads: None
) -> None:
    convolution, case = tiled(shape, False)
    torch.set_num_threads(1)
    expected = all_of(convolution, case)[:3]
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        assert all(map(torch.equal, all_of(convolution, case)[:3], expected)), n


@needs_tiles
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bf16_by_tiles_of_what_is_not_finite_is_torchs(value: float, where: int) -> None:
    convolution, case = tiled(TILED[0], False)
    case[where][0, 0, 0, 0] = value
    leaves = [t.clone().requires_grad_() for t in case[:3]]
    y = F.conv2d(*leaves, *convolution)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, case[3])]
    for result, theirs in zip(all_of(convolution, case)[:3], expected, strict=False):
        assert result is not None
        torch.testing.assert_close(result, theirs, rtol=2**-6, atol=0.1, equal_nan=True)
