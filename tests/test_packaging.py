"""What is shipped: version, build info, wheel and ABI; and what builds say that cannot work."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastquant
from fastquant import _C

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False, **kwargs)


def output_of(*command: str | Path, **kwargs: Any) -> str:
    done = run(*command, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what an installation says of itself -----------------------------------------------------


def test_version() -> None:
    assert fastquant.__version__ == version("fastquant")
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastquant.__version__)


def test_build_info() -> None:
    info = fastquant.build_info()
    assert info["isa"] == _C.isa()
    assert info["isas_usable"] == _C.isas()
    assert info["isas_built"] == _C.built_isas()
    assert info["version"] == fastquant.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cuda"]["loaded"] == (info["cuda"]["why_not"] is None)
    assert info["cuda"]["built"] or not info["cuda"]["loaded"]


# --- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core")
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", out)
    output_of(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_serves_every_python(wheel: Path) -> None:
    name, number, python, abi, platform = wheel.stem.split("-")
    assert (name, number) == ("fastquant", fastquant.__version__)
    assert (python, abi) == ("cp310", "abi3")
    assert platform.startswith("linux")


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "python"
    sources = {
        str(path.relative_to(package))
        for path in (package / "fastquant").rglob("*")
        if path.suffix in {".py", ".pyi", ".typed", ".css", ".js"}
    }
    extras = [name for name in names if name not in sources]
    assert sources <= set(names)
    assert "fastquant/py.typed" in sources
    assert "fastquant/_C.abi3.so" in extras
    assert any(name.endswith("licenses/LICENSE") for name in extras)
    assert all(name.endswith(".so") or ".dist-info/" in name for name in extras)


def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -S: without the editable installation that the tests run on, which would come first.
    path = [str(tmp_path), *(p for p in sys.path if p.endswith("-packages"))]
    code = (
        f"import sys; sys.path[:0] = {path}\n"
        "import torch, fastquant\n"
        "observer = fastquant.MinMaxObserver()\n"
        "observer(torch.tensor([-3.0, 5.0]))\n"
        "print(fastquant.__file__, observer.min_val.item(), observer.max_val.item())"
    )
    file, low, high = output_of(sys.executable, "-S", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert (float(low), float(high)) == (-3.0, 5.0)


# --- the audit -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    pytest.importorskip("torch_abi_audit")
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_extension_keeps_to_the_stable_abi(audit: ModuleType) -> None:
    assert audit.audit_abi(_C.__file__) == []


def test_an_extension_beyond_the_stable_abi_is_found_out(audit: ModuleType) -> None:
    objections = audit.audit_abi(torch._C.__file__)
    assert any("stable ABI" in objection for objection in objections)
    assert any("limited API" in objection for objection in objections)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
def test_weak_symbols_are_found_out(audit: ModuleType, tmp_path: Path) -> None:
    def compiled(name: str, code: str) -> Path:
        source = tmp_path / f"{name}.cpp"
        source.write_text(code)
        output_of("g++", "-c", source, "-o", tmp_path / f"{name}.o")
        return tmp_path / f"{name}.o"

    strong = compiled("strong", "int table() { return 1; }")
    weak = compiled("weak", "inline int shared() { return 1; } int table() { return shared(); }")
    assert audit.audit_symbols([strong]) == []
    assert any("shared()" in objection for objection in audit.audit_symbols([strong, weak]))


# --- builds that cannot be -------------------------------------------------------------------


def configure(python: Path, build: Path) -> str:
    done = run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={python}",
        timeout=120,
    )
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake")
def test_building_without_torch_or_with_an_old_one_says_what_to_do(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    output_of(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    message = configure(python, tmp_path / "build")
    assert "builds against the torch (2.10 or newer)" in message
    assert "pip's build isolation hides it" in message
    assert "Otherwise install torch first" in message

    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").touch()
    (packages / "torch" / "version.py").write_text("__version__ = '2.9.1'\n")
    message = configure(python, tmp_path / "build")
    assert "fastquant needs torch >= 2.10" in message
    assert "holds 2.9.1" in message


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_says_what_is_missing(tmp_path: Path) -> None:
    old_python = tmp_path / "old_python"
    old_python.write_text("#!/bin/sh\nexit 1\n")
    old_python.chmod(0o755)
    done = run("make", "demo", f"VENV={tmp_path / 'none'}", f"PYTHON={old_python}", cwd=ROOT)
    assert done.returncode != 0
    assert "Python 3.10 or newer" in done.stdout

    # An environment that has torch, on a machine that has no compiler.
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("make", "sh", "find"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".torch").touch()
    done = run("make", "demo", f"VENV={tmp_path / 'venv'}", cwd=ROOT, env={"PATH": str(tools)})
    assert done.returncode != 0
    assert "C++17 compiler" in done.stdout
    assert "apt install g++" in done.stdout
