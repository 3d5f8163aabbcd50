"""Settings that every test runs under."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import torch_caches
from fastquant import _C, QuantizationError
from fastquant._torch import ao
from fastquant.nn import qat as nnqat
from fastquant.nn.intrinsic import qat as nniqat
from fastquant.nn.qat.blocks import teach_blocks

# Inductor would start processes that compile beside this one, and import torch for it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

settings.register_profile(
    "fastquant",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastquant")


def pytest_runtest_setup(item: pytest.Function) -> None:
    torch_caches.use()
    if not ao.has_quantized_modules and item.get_closest_marker("torch_ao"):
        pytest.skip("is about torch.ao or torch's quantized modules, and there are none")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, object, object]:
    """Skip a test that asks for torch's quantized modules where there are none."""
    try:
        return (yield)
    except QuantizationError as error:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        source = inspect.getsource(item.function)
        if (
            ao.has_quantized_modules
            or not re.search(r"needs (torch's quantized modules|backend='torch.ao')", str(error))
            or not ("torch.ao" in parameters or re.search(r'"torch\.ao"|is_reference', source))
        ):
            raise
        pytest.skip("converts to torch's quantized modules, and there are none")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End this process, or these tests, where a kernel's error has ended the GPU's context.

    Every later test would fail with that error. pytest-xdist goes on with the next test in a new
    process.
    """
    ran = yield
    if item.get_closest_marker("cuda") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            pytest.exit(f"{item.nodeid} has ended the GPU's context: {error}", returncode=70)
    return ran


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test set torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For small models, which threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The instruction sets this processor runs; puts back the one in use."""
    before = _C.isa()
    yield _C.isas()
    _C.set_isa(before)


@pytest.fixture
def any_isa(every_isa: list[str]) -> list[str]:
    """Of those, the ones that differ in the kernels on floating-point values."""
    quantized_only = ("avx512_amx", "avx512_vnni", "avx_vnni", "neon_dot")
    return [isa for isa in every_isa if isa not in quantized_only]


@pytest.fixture
def torchs_qat_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """QAT modules with torch.ao's own arithmetic, for comparisons that want every bit."""
    if not ao.has_quantized_modules:
        pytest.skip("compares with torch.ao's arithmetic, and there is no torch.ao")
    teach_blocks()
    convolution = nniqat.ConvBn2d.__bases__[0]
    plain = (nnqat.Conv2d, nniqat.ConvReLU1d, nniqat.ConvReLU2d, nniqat.ConvReLU3d)
    forwards = [(cls, "forward") for cls in (nniqat.LinearBn1d, *plain)]
    for cls, name in ((convolution, "_forward_approximate"), *forwards):
        monkeypatch.setattr(cls, name, getattr(cls, name).__wrapped__)
