"""Builds the CUDA kernels for this machine's GPU and checks them on it. Installs nothing.

    python tools/cuda_check.py                      # all stages; or: make cuda-check
    python tools/cuda_check.py --only build,test    # some of them
    python tools/cuda_check.py --only amx           # needs no GPU

The stages: `build` builds a separate package in build/cuda-check, `test` runs `pytest -m cuda`,
`sanitize` runs kernels under compute-sanitizer, `bench` measures and stores the result in
benchmarks/results. The machine must have a GPU, a CUDA build of torch, nvcc, a C++ compiler, cmake,
ninja, pytest and hypothesis; and torchvision for the models that are measured.

Machines with GPUs often have processors with AMX. There, `amx` builds a package without CUDA in
build/amx-check, runs the native tests and those of int8 and of convolutions on AMX, measures int8
layers with it and without, beside torch.ao's, and stores the results in benchmarks/results/amx. It
does nothing on other processors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
PACKAGE = BUILD / "package"
AMX_BUILD = ROOT / "build" / "amx-check"
AMX_PACKAGE = AMX_BUILD / "package"

# Tests that reach every kernel in every layout; the sanitizer is too slow for all tests.
SANITIZED = "geometries or any_place or empty or histograms_of"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def run(*command: str | Path, package: Path = PACKAGE, **environment: str) -> None:
    """Run a command with a package that was built.

    Raises:
        SystemExit: it failed; the message says how.
    """
    print("$", *command, flush=True)
    code = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        check=False,
    ).returncode
    if code != 0:
        raise SystemExit(f"cuda_check: exit status {code} from: {' '.join(map(str, command))}")


def build(architectures: str = "native") -> None:
    """Build a package for this GPU, or for given architectures, apart from any other fastquant."""
    run(
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DFASTQUANT_CUDA=on", f"-DFASTQUANT_CUDA_ARCHITECTURES={architectures}"),
        *("-DFASTQUANT_WERROR=ON", f"-DPython_EXECUTABLE={sys.executable}"),
    )
    run("cmake", "--build", BUILD, "--target", "_C", "_cuda")
    install(BUILD, PACKAGE)


def install(directory: Path, package: Path) -> None:
    """Make a package of what was built in a directory."""
    shutil.rmtree(package, ignore_errors=True)
    run("cmake", "--install", directory, "--prefix", package)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    source = ROOT / "python" / "fastquant"
    shutil.copytree(source, package / "fastquant", ignore=ignored, dirs_exist_ok=True)
    # An editable fastquant is found by an entry of sys.meta_path, which comes before PYTHONPATH.
    (package / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [\n"
        "    finder\n"
        "    for finder in sys.meta_path\n"
        "    if 'fastquant' not in getattr(finder, 'known_source_files', ())\n"
        "]\n"
    )


def check_package(package: Path = PACKAGE, fault: str = "info['cuda']['why_not']") -> None:
    """Stop unless Python imports the package built here and finds no fault with its `info`.

    That is what fastquant.build_info() returns; without another expression, CUDA kernels must be
    loaded.
    """
    code = (
        "import fastquant, pathlib, sys\n"
        "found = pathlib.Path(fastquant.__file__).parent\n"
        f"if found != pathlib.Path({str(package / 'fastquant')!r}):\n"
        "    sys.exit(f'another fastquant comes first, {found}: pip uninstall fastquant')\n"
        "info = fastquant.build_info()\n"
        "print(info)\n"
        f"sys.exit({fault})"
    )
    run(sys.executable, "-c", code, package=package)


def test() -> None:
    run(sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests")


def sanitize() -> None:
    """Run each tool of compute-sanitizer; every tensor gets its own allocation, so that an access
    beyond it is noticed."""
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("cuda_check: compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    for tool in TOOLS:
        run(
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "86"),
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *("-k", SANITIZED, "tests/test_cuda.py"),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            FASTQUANT_SANITIZED="1",
        )


def bench() -> None:
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    result = ROOT / "benchmarks" / "results" / f"gpu-{gpu}.json"
    run(sys.executable, "benchmarks/gpu.py", "--json", result)


NATIVE_TESTS = (
    "quantized_layers_test",
    "quantized_dynamic_test",
    "quantized_amx_test",
    "tiled_convolution_test",
)
TESTS = (
    "quantized_layers",
    "quantized_dynamic",
    "convert_native",
    "ops",
    "convolution",
    "qat_convolution",
)


def amx() -> None:
    """Test AMX and measure it, where the processor has it."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "amx_int8" not in cpu.read_text():
        print("cuda_check: no AMX here")
        return
    run(
        *("cmake", "-S", ROOT, "-B", AMX_BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DFASTQUANT_CUDA=off", "-DFASTQUANT_BUILD_TESTS=ON"),
        *("-DFASTQUANT_WERROR=ON", f"-DPython_EXECUTABLE={sys.executable}"),
    )
    run("cmake", "--build", AMX_BUILD, "--target", "_C", *NATIVE_TESTS)
    install(AMX_BUILD, AMX_PACKAGE)
    usable = "'avx512_amx' in info['isas_usable']"
    check_package(AMX_PACKAGE, f"None if {usable} else 'the system does not permit AMX'")
    for name in NATIVE_TESTS:
        run(AMX_BUILD / name)
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"tests/test_{name}.py" for name in TESTS),
        package=AMX_PACKAGE,
        FASTQUANT_ISA="avx512_amx",
    )
    results = ROOT / "benchmarks" / "results" / "amx"
    results.mkdir(parents=True, exist_ok=True)
    # Without a name, the faster kernel for each size of product.
    for isa in ("avx512_vnni", "avx512_amx", ""):
        run(
            *(sys.executable, "benchmarks/int8_layers.py", "--threads", "1", "--rounds", "20"),
            *("--json", results / f"{isa or 'measured'}.json"),
            package=AMX_PACKAGE,
            FASTQUANT_ISA=isa,
        )


STAGES: dict[str, Callable[[], None]] = {
    stage.__name__: stage for stage in (build, test, sanitize, bench, amx)
}


def chosen(names: str) -> list[str]:
    wanted = names.split(",")
    if not set(wanted) <= STAGES.keys():
        raise ValueError
    return wanted


chosen.__name__ = f"choice of {', '.join(STAGES)}"  # for argparse's message


def why_not() -> str | None:
    """What this machine lacks for any check; None if nothing."""
    if not torch.cuda.is_available():
        kind = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return (
            "needs an NVIDIA GPU and a CUDA build of torch; "
            f"torch {torch.__version__} is {kind} and finds no GPU"
        )
    missing = [tool for tool in ("nvcc", "cmake", "ninja") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} on the PATH" if missing else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=chosen, default=list(STAGES), metavar="STAGE[,STAGE...]")
    stages = parser.parse_args().only
    reason = why_not() if stages != ["amx"] else None
    if reason is not None:
        raise SystemExit(f"cuda_check: {reason}; nothing was checked")
    for name in stages:
        if name not in ("build", "amx"):
            check_package()
        STAGES[name]()
    print(f"cuda_check: {', '.join(stages)}: all well")


if __name__ == "__main__":
    main()
