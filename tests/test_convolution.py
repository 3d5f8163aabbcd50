"""Convolutions by the fastest of torch's ways: results are torch's, whichever way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastquant._native.convolution import Convolution


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
        gradients = convolution.gradients(grad, x, weight, bias, needed)
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
    expected = convolution.gradients(grad, x, weight, None, [True, True, False])
    place = grad.clone()
    of_x, of_weight, _ = convolution.gradients(place, x, weight, None, [True, True, False], True)
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
    x = torch.randn(8, 32, 112, 112)
    one, many = (ops_called(convolution, x[:n], weight, None) for n in (1, 8))
    assert one.count("aten::convolution") == 1
    assert many.count("aten::convolution") > 1
    compute_bound, wide, _ = layer(32, 32, 3, 1, 1, bias=False)
    assert ops_called(compute_bound, x, wide, None).count("aten::convolution") == 1


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="measured on x86"
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.filterwarnings("ignore:TF32:UserWarning")
@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_one_thread_takes_onednn_for_small_images() -> None:
    convolution, weight, _ = layer(*SMALL[0], bias=False)
    small, large = torch.randn(8, 24, 14, 14), torch.randn(8, 24, 56, 56)
    onednn = "aten::mkldnn_convolution"
    assert onednn in ops_called(convolution, small, weight, None)
    assert onednn not in ops_called(convolution, large, weight, None)
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn not in ops_called(convolution, small, weight, None)


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
