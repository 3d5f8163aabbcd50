"""What is measured: the built-in models, models that a user names, and their example inputs."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..fuse_modules import fuse_modules, fuse_modules_qat
from ..stubs import DeQuantStub, QuantStub
from .errors import BenchError


class _SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = [3, 32, 64, 128]
        blocks = [
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for i, o in pairwise(channels)
        ]
        self.quant = QuantStub()
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], 10)
        self.dequant = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(self.quant(x))).flatten(1)
        result: Tensor = self.dequant(self.classifier(x))
        return result

    def fuse_model(self, is_qat: bool = False) -> None:
        fuse = fuse_modules_qat if is_qat else fuse_modules
        for block in self.features:
            fuse(block, ["0", "1", "2"], inplace=True)


def small_cnn() -> nn.Module:
    """Three convolutions with batch norm and ReLU, and a classifier; takes `[N, 3, H, W]`."""
    return _SmallCNN()


def torchvision_model(name: str) -> nn.Module:
    """A quantizable model of torchvision, in float and randomly initialised.

    Args:
        name: as in `torchvision.models.quantization`: "mobilenet_v2", "resnet18", …

    Raises:
        ImportError: torchvision is not installed or does not import.
        AttributeError: it has no quantizable model of this name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            models = _torchvision_models()
        except ImportError as error:
            raise ImportError(
                f"{name} needs torchvision, which does not import here ({error}): "
                "pip install --no-deps torchvision"
            ) from error
    model: nn.Module = getattr(models, name)(weights=None, quantize=False)
    return model


def _torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models.quantization")
    except RuntimeError:
        # torchvision fails to import without its compiled library, which does not exist for every
        # torch. All it misses are the schemas of two ops that classifiers never call.
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(schema)  # type: ignore[no-untyped-call]
        _kept.append(library)
    try:
        return importlib.import_module("torchvision.models.quantization")
    except RuntimeError as error:
        raise ImportError(str(error)) from error


# Schemas disappear with the library object that defined them.
_kept: list[torch.library.Library] = []

# Each with the input it gets unless another is given.
BUILT_IN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "small_cnn": (small_cnn, "8x3x64x64"),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), "8x3x224x224"),
    "resnet18": (lambda: torchvision_model("resnet18"), "8x3x224x224"),
}


def load_object(spec: str, what: str) -> Any:
    """The object at "module:name"; `name` may be dotted."""
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise BenchError(f"{what} must be module:callable, got {spec!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise BenchError(f"cannot import {module_name!r} of {what} {spec!r}", error) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise BenchError(f"{what} {spec!r} does not exist", error) from error
    return found


def load_model(spec: str) -> nn.Module:
    """The built-in model of this name, or the one that "module:callable" gives."""
    build = BUILT_IN[spec][0] if spec in BUILT_IN else None
    if build is None:
        if ":" not in spec:
            raise BenchError(
                f"model must be module:callable or one of {', '.join(BUILT_IN)}, got {spec!r}"
            )
        build = load_object(spec, "model")
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise BenchError(f"model {spec!r} is neither a module nor callable: {build!r}")
    torch.manual_seed(0)
    try:
        model = build()
    except Exception as error:
        raise BenchError(f"model {spec!r} cannot be built", error) from error
    if not isinstance(model, nn.Module):
        raise BenchError(
            f"model {spec!r} must return a torch.nn.Module, returned {type(model).__name__}"
        )
    return model


def load_inputs(spec: str) -> Any:
    """What the callable at "module:callable" returns."""
    make = load_object(spec, "inputs")
    if not callable(make):
        raise BenchError(f"inputs {spec!r} is not callable")
    try:
        return make()
    except Exception as error:
        raise BenchError(f"inputs {spec!r} fails", error) from error


_INPUT = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>\w+))?")


def parse_input(spec: str) -> Tensor:
    """A random tensor of "8x3x224x224" (normally distributed) or "16x128:int64" (0 and 1)."""
    match = _INPUT.fullmatch(spec)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise BenchError(
            f"input must be sizes and perhaps a dtype, as in 8x3x224x224 or 16x128:int64, "
            f"got {spec!r}"
        )
    shape = [int(size) for size in match["shape"].split("x")]
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 2, shape).to(dtype)
    except (RuntimeError, TypeError) as error:
        raise BenchError(f"input {spec!r} cannot be made", error) from error


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a mapping is the latter, a tuple or list the former."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def described(inputs: Any) -> list[str]:
    """Shape and dtype of every argument, as `parse_input` reads them; a type's name for others."""
    args, kwargs = as_call(inputs)
    return [
        f"{'x'.join(map(str, value.shape))}:{str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in (*args, *kwargs.values())
    ]
