"""Builds the CUDA kernels for this machine's GPU and checks them on it. Installs nothing.

    python tools/cuda_check.py                      # all stages but amx; or: make cuda-check
    python tools/cuda_check.py --only build,test    # some of them
    python tools/cuda_check.py --only amx           # needs no GPU

The stages: `build` builds a separate package in build/cuda-check, `test` runs `pytest -m cuda`,
`sanitize` runs kernels under compute-sanitizer, `bench` measures and stores the result in
benchmarks/results/gpu, or in gpu of the folder that --results names. A stage that fails, or takes
longer than --limit says, keeps no other from its turn, unless it was to build the package. The
machine must have a GPU, a CUDA build of torch, nvcc, a C++ compiler, cmake, ninja, pytest and
hypothesis; torchvision for the models that are measured; and pytest-xdist to test in parallel.

Where minutes on a GPU are few, build elsewhere, with any torch, and copy build/cuda-check/package
to the same place on the machine with the GPU. No GPU is needed for

    python tools/cuda_check.py --only build --architectures 90-real
    python benchmarks/gpu.py --rehearse     # that nothing in the benchmark fails on the way

Machines with GPUs often have processors with AMX. There, `amx` builds a package without CUDA in
build/amx-check, runs the native tests and those of int8 and of convolutions on AMX, measures int8
layers with it and without, beside torch.ao's, and stores the results in benchmarks/results/amx. It
does nothing on other processors.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
PACKAGE = BUILD / "package"
RESULTS = ROOT / "benchmarks" / "results"
AMX_BUILD = ROOT / "build" / "amx-check"
AMX_PACKAGE = AMX_BUILD / "package"

# Tests that reach every kernel in every layout; the sanitizer is too slow for all tests.
SANITIZED = "geometries or any_place or empty or histograms_of"
# What each tool of compute-sanitizer looks over: fastquant's kernels alone, which saves most of the
# time. But initcheck has to see what torch's kernels have written.
_OURS = ("--kernel-name", "kns=fastquant")
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": _OURS,
    "racecheck": _OURS,
    "synccheck": _OURS,
    "initcheck": (),
}


class CheckError(Exception):
    """A command failed; the message says how."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    only: list[str]
    architectures: str | None
    results: Path | None
    limit: float | None


def environment(package: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package), **more}


def run(
    *command: str | Path, package: Path = PACKAGE, limit: float | None = None, **more: str
) -> None:
    """Run a command with a package that was built.

    Raises:
        CheckError: it failed, or took more than `limit` seconds.
    """
    print("$", *command, flush=True)
    end = f"from: {' '.join(map(str, command))}"
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(package, **more), timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"no end in {limit:.0f} s {end}") from None
    if done.returncode != 0:
        raise CheckError(f"exit status {done.returncode} {end}")


def build(options: Options) -> None:
    """Build a package for this GPU, or for given architectures, apart from any other fastquant."""
    architectures = options.architectures or "{}{}-real".format(*torch.cuda.get_device_capability())
    # Without -Werror: what another compiler warns of is no reason to check nothing.
    run(
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DFASTQUANT_CUDA=on", f"-DFASTQUANT_CUDA_ARCHITECTURES={architectures}"),
        *("-DFASTQUANT_WERROR=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
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


def files_of_tests() -> list[Path]:
    """Those with tests marked `cuda`: others may import what this machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path for path in files if "pytest.mark.cuda" in path.read_text()]


def in_parallel() -> tuple[str, ...]:
    """Arguments with which pytest takes several processes, since CPUs take most of the time."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(max(1, min(8, len(os.sched_getaffinity(0)) // 2))))


def test(options: Options) -> None:
    run(
        *(sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"),
        *("--tb=short", "--durations=10", *in_parallel()),
        *files_of_tests(),
        limit=options.limit,
        OMP_NUM_THREADS="2",
    )


def sanitize(options: Options) -> None:
    """Run the tools of compute-sanitizer side by side.

    Every tensor gets its own allocation, so that an access beyond it is noticed.
    """
    if shutil.which("compute-sanitizer") is None:
        raise CheckError("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    folder = options.results or BUILD
    folder.mkdir(parents=True, exist_ok=True)
    logs = {tool: folder / f"{tool}.log" for tool in TOOLS}
    running = {}
    for tool, kernels in TOOLS.items():
        command = (
            # Calls of torch's that fail as torch expects are no errors.
            *("compute-sanitizer", "--tool", tool, *kernels, "--report-api-errors", "no"),
            *("--print-limit", "20", "--error-exitcode", "86"),
            *(sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"),
            *("-k", SANITIZED, "tests/test_cuda.py"),
        )
        print("$", *command, ">", logs[tool], flush=True)
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTQUANT_SANITIZED": "1"}
        with logs[tool].open("w") as log:
            running[tool] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(PACKAGE, OMP_NUM_THREADS="2", **alone),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    start, failed = time.monotonic(), []
    for tool, process in running.items():
        left = None
        if options.limit is not None:
            left = max(0.0, start + options.limit - time.monotonic())
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        lines = logs[tool].read_text(errors="replace").splitlines()
        print(f"--- {tool}: exit status {code}; {logs[tool]} ends with", *lines[-15:], sep="\n")
        if code != 0:
            failed.append(tool)
    if failed:
        raise CheckError(f"{', '.join(failed)} of compute-sanitizer")


def bench(options: Options) -> None:
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    # Apart from the results of CPUs, of which the README's tables are made.
    result = (options.results or RESULTS) / "gpu" / f"{gpu}.json"
    # A GPU that nobody else uses takes the same time in each round: few suffice.
    command: list[str | Path] = [
        sys.executable,
        "benchmarks/gpu.py",
        "--rounds",
        "20",
        "--json",
        result,
    ]
    if options.limit is not None:
        # Python and torch need some time to start and to end.
        command += ["--seconds", f"{0.9 * options.limit:.0f}"]
    run(*command, limit=options.limit)


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


def amx(options: Options) -> None:
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
    results = (options.results or RESULTS) / "amx"
    results.mkdir(parents=True, exist_ok=True)
    # Without a name, the faster kernel for each size of product.
    for isa in ("avx512_vnni", "avx512_amx", ""):
        run(
            *(sys.executable, "benchmarks/int8_layers.py", "--threads", "1", "--rounds", "20"),
            *("--json", results / f"{isa or 'measured'}.json"),
            package=AMX_PACKAGE,
            FASTQUANT_ISA=isa,
        )


STAGES: dict[str, Callable[[Options], None]] = {
    stage.__name__: stage for stage in (build, test, sanitize, bench, amx)
}


def chosen(names: str) -> list[str]:
    wanted = names.split(",")
    if not set(wanted) <= STAGES.keys():
        raise ValueError
    return wanted


chosen.__name__ = f"choice of {', '.join(STAGES)}"  # for argparse's message


def why_not(options: Options) -> str | None:
    """What this machine lacks for any check; None if nothing."""
    needs_gpu = set(options.only) - {"amx"}
    if options.architectures is not None:
        needs_gpu -= {"build"}
    if needs_gpu and not torch.cuda.is_available():
        kind = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return (
            "needs an NVIDIA GPU and a CUDA build of torch; "
            f"torch {torch.__version__} is {kind} and finds no GPU"
        )
    tools = ("nvcc", "cmake", "ninja") if "build" in options.only else ()
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} on the PATH" if missing else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in STAGES if name != "amx"]
    parser.add_argument("--only", type=chosen, default=default, metavar="STAGE[,STAGE...]")
    parser.add_argument(
        "--architectures",
        help="for which to build, as CMAKE_CUDA_ARCHITECTURES. Default: the GPU's",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="for results and logs. Default: benchmarks/results, and build/cuda-check for logs",
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="that a stage may take")
    options = Options(**vars(parser.parse_args()))
    reason = why_not(options)
    if reason is not None:
        raise SystemExit(f"cuda_check: {reason}; nothing was checked")
    failures = []
    for name in options.only:
        start = time.monotonic()
        try:
            if name not in ("build", "amx"):
                check_package()
            STAGES[name](options)
        except CheckError as error:
            failures.append(f"cuda_check: {name}: {error}")
        print(f"cuda_check: {name} took {time.monotonic() - start:.0f} s", flush=True)
        if failures and name == "build":
            break
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"cuda_check: {', '.join(options.only)}: all well")


if __name__ == "__main__":
    main()
