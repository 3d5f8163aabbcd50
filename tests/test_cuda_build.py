"""Whether the CUDA kernels are built and loaded, and what a build says about it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import python

ROOT = Path(__file__).resolve().parents[1]
CUDA_CHECK = ROOT / "tools" / "cuda_check.py"

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


# -------------------------------------------------------------------------- FASTQUANT_CUDA


def configure(build: Path, *options: str, **environment: str) -> tuple[bool, str]:
    """Whether the build can be configured, and all that CMake says, in one line."""
    command = ("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options)
    python = f"-DPython_EXECUTABLE={sys.executable}"
    done = subprocess.run(
        (*command, python),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


def cuda_build_of_torch(path: Path, cuda: str) -> str:
    """As much of one as CMake looks at; the PYTHONPATH that finds it."""
    library = path / "torch" / "lib"
    library.mkdir(parents=True)
    (library.parent / "include").mkdir()
    (library.parent / "__init__.py").touch()
    (library.parent / "version.py").write_text(f"__version__ = '2.11.0'\ncuda = '{cuda}'\n")
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        (library / name).touch()
    return str(path)


@needs_cmake
def test_off(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=OFF")
    assert configured, said
    assert "CUDA kernels: not built, FASTQUANT_CUDA is off" in said


@needs_cmake
@pytest.mark.skipif(torch.version.cuda is not None, reason="is about CPU builds of torch")
def test_auto_with_a_cpu_build_of_torch(tmp_path: Path) -> None:
    configured, said = configure(tmp_path)
    assert configured, said
    assert "CUDA kernels: not built, torch is not a CUDA build" in said
    assert "FASTQUANT_CUDA=on" in said


@needs_cmake
@needs_nvcc
def test_auto_with_a_cuda_build_of_torch(tmp_path: Path) -> None:
    path = cuda_build_of_torch(tmp_path, "99.0")
    configured, said = configure(tmp_path / "build", PYTHONPATH=path)
    assert configured, said
    assert "CUDA kernels: built with nvcc" in said


@needs_cmake
def test_auto_without_a_compiler(tmp_path: Path) -> None:
    path = cuda_build_of_torch(tmp_path, "99.0")
    configured, said = configure(
        tmp_path / "build", PYTHONPATH=path, CUDACXX=str(tmp_path / "none")
    )
    assert configured, said
    assert "CUDA kernels: not built, no CUDA compiler was found" in said


@needs_cmake
@needs_nvcc
def test_auto_with_a_toolkit_that_is_newer_than_torch(tmp_path: Path) -> None:
    path = cuda_build_of_torch(tmp_path, "9.2")
    configured, said = configure(tmp_path / "build", PYTHONPATH=path)
    assert configured, said
    assert "CUDA kernels: not built, torch is for CUDA 9 and the toolkit is" in said


@needs_cmake
@needs_nvcc
def test_on(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=on")
    assert configured, said
    assert "CUDA kernels: built with nvcc" in said
    assert "75-real;80-real;86-real;89-real;90" in said


@needs_cmake
def test_on_without_a_compiler(tmp_path: Path) -> None:
    compiler = f"-DCMAKE_CUDA_COMPILER={tmp_path / 'none'}"
    configured, said = configure(tmp_path / "build", "-DFASTQUANT_CUDA=on", compiler)
    assert not configured
    assert "CUDA" in said


@needs_cmake
def test_anything_else(tmp_path: Path) -> None:
    configured, said = configure(tmp_path, "-DFASTQUANT_CUDA=maybe")
    assert not configured
    assert "FASTQUANT_CUDA must be auto, on or off, and is maybe" in said


# --------------------------------------------------------------------- which are then loaded

# As if they had been built: says so instead of being loaded.
PRETENCE = """
import importlib.util, sys, torch
from importlib.machinery import ModuleSpec
find_spec = importlib.util.find_spec
cuda = ModuleSpec("fastquant._cuda", None, origin="cuda.so")
importlib.util.find_spec = lambda name, *rest: (
    cuda if name == cuda.name else find_spec(name, *rest)
)
load = torch.ops.load_library
loaded = []
torch.ops.load_library = lambda path: loaded.append(path) if path == "cuda.so" else load(path)
torch.version.cuda = {cuda!r}
import fastquant
print(loaded, fastquant.build_info()["cuda"])
"""


def loading(cuda: str | None, **environment: str) -> tuple[bool, str]:
    """Whether the package is imported, and what it says of its CUDA kernels."""
    done = python(PRETENCE.format(cuda=cuda), **environment)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("setting", ["", "1"])
def test_a_cuda_build_of_torch_loads_them(setting: str) -> None:
    imported, said = loading("13.0", FASTQUANT_CUDA_KERNELS=setting)
    assert imported, said
    assert said.startswith("['cuda.so'] {'built': True, 'loaded': True, 'why_not': None}")


def test_a_cpu_build_of_torch_does_not() -> None:
    imported, said = loading(None, FASTQUANT_CUDA_KERNELS="1")
    assert imported, said
    assert said.startswith("[] {'built': True, 'loaded': False")
    assert "is a CPU build" in said


def test_the_environment_switches_them_off() -> None:
    imported, said = loading("13.0", FASTQUANT_CUDA_KERNELS="0")
    assert imported, said
    assert said.startswith("[] {'built': True, 'loaded': False")
    assert "FASTQUANT_CUDA_KERNELS=0" in said


def test_the_environment_says_anything_else() -> None:
    imported, said = loading("13.0", FASTQUANT_CUDA_KERNELS="off")
    assert not imported
    assert "FASTQUANT_CUDA_KERNELS must be 0 or 1, and is 'off'" in said


# ------------------------------------------------------------------------------- cuda_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_check_without_a_gpu() -> None:
    command = (sys.executable, str(CUDA_CHECK))
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert "nothing was checked" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_building_for_given_architectures_needs_no_gpu(tmp_path: Path) -> None:
    command = (sys.executable, str(CUDA_CHECK), "--only", "build", "--architectures", "90-real")
    empty = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=empty)
    assert done.returncode == 1
    assert "needs nvcc, cmake, ninja on the PATH" in done.stderr


@pytest.fixture
def cuda_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """tools/cuda_check.py, on a machine that seems to have a GPU, with stages to be replaced."""
    spec = importlib.util.spec_from_file_location("cuda_check", CUDA_CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "why_not", lambda options: None)
    monkeypatch.setattr(module, "check_package", lambda: None)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    return module


def exit_of(cuda_check: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cuda_check.main()
    return str(caught.value)


@pytest.mark.parametrize(("failing", "runs"), [("test", "build test bench"), ("build", "build")])
def test_a_stage_that_fails(
    cuda_check: Any, monkeypatch: pytest.MonkeyPatch, failing: str, runs: str
) -> None:
    ran = []

    def stage(name: str, options: Any) -> None:
        ran.append(name)
        if name == failing:
            raise cuda_check.CheckError("no luck")

    stages = {name: functools.partial(stage, name) for name in ("build", "test", "bench")}
    monkeypatch.setattr(cuda_check, "STAGES", stages)
    said = exit_of(cuda_check, monkeypatch, "--only", "build,test,bench")
    assert said == f"cuda_check: {failing}: no luck"
    assert " ".join(ran) == runs


def test_a_stage_has_its_limit(
    cuda_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T1000")
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.py").write_text("import time; time.sleep(600)")
    arguments = ("--only", "bench", "--limit", "1.2", "--results", str(tmp_path))
    said = exit_of(cuda_check, monkeypatch, *arguments)
    assert "bench: no end in 1 s" in said
    assert f"--json {tmp_path / 'gpu' / 'nvidia-t1000.json'}" in said
    assert said.endswith("--seconds 1")


def test_each_sanitizer_has_its_turn(
    cuda_check: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        '#!/bin/sh\necho "this is $2"\n'
        "[ $2 != racecheck ] || exit 86\n[ $2 != initcheck ] || sleep 600\n"
    )
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    arguments = ("--only", "sanitize", "--limit", "2", "--results", str(tmp_path / "results"))
    said = exit_of(cuda_check, monkeypatch, *arguments)
    assert said == "cuda_check: sanitize: racecheck, initcheck of compute-sanitizer"
    printed = capfd.readouterr().out
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"this is {tool}" in printed
        assert (tmp_path / "results" / f"{tool}.log").read_text() == f"this is {tool}\n"


def test_all_files_with_tests_for_a_gpu_are_run(cuda_check: Any) -> None:
    assert {"test_cuda.py", "test_quantize.py"} <= {p.name for p in cuda_check.files_of_tests()}


def without_amx() -> bool:
    cpu = Path("/proc/cpuinfo")
    return not cpu.exists() or "amx_int8" not in cpu.read_text()


@pytest.mark.skipif(not without_amx(), reason="is about processors without AMX")
def test_checking_amx_needs_no_gpu() -> None:
    command = (sys.executable, str(CUDA_CHECK), "--only", "amx")
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no AMX here" in done.stdout
