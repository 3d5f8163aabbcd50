"""FASTQUANT_CUDA: whether the CUDA kernels are built, and what a build says about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"
)


def configure(build: Path, *options: str) -> tuple[bool, str]:
    """Whether the build can be configured, and all that CMake says, in one line."""
    command = ("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options)
    python = f"-DPython_EXECUTABLE={sys.executable}"
    done = subprocess.run((*command, python), text=True, capture_output=True, check=False)
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("options", [(), ("-DFASTQUANT_CUDA=off",), ("-DFASTQUANT_CUDA=OFF",)])
def test_off(tmp_path: Path, options: tuple[str, ...]) -> None:
    configured, said = configure(tmp_path, *options)
    assert configured, said
    assert "CUDA kernels: not built, FASTQUANT_CUDA is off" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="is about CPU builds of torch")
def test_auto_with_a_cpu_build_of_torch(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=auto")
    assert configured, said
    assert "CUDA kernels: not built, torch is not a CUDA build" in said
    assert "FASTQUANT_CUDA=on" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_on(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=on")
    assert configured, said
    assert "CUDA kernels: built with nvcc" in said
    assert "75-real;80-real;86-real;89-real;90" in said


def test_on_without_a_compiler(tmp_path: Path) -> None:
    compiler = f"-DCMAKE_CUDA_COMPILER={tmp_path / 'none'}"
    configured, said = configure(tmp_path / "build", "-DFASTQUANT_CUDA=on", compiler)
    assert not configured
    assert "CUDA" in said


def test_anything_else(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=maybe")
    assert not configured
    assert "FASTQUANT_CUDA must be auto, on or off, and is maybe" in said
