"""Errors for names of `torch.ao.quantization` that fastquant lacks: they say where to find them.

fastquant is for eager mode. `import fastquant.quantize_fx`, `from fastquant import prepare_jit` and
`fastquant.backend_config` raise the same exception types as any unknown name, with a message that
says where to find it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

_PACKAGE = "fastquant"
_FX = (
    "FX graph mode is torch.ao.quantization.quantize_fx, in releases of torch that have torch.ao; "
    "its prepare_fx and prepare_qat_fx take fastquant's observers, for example by "
    "fastquant.get_default_qconfig_mapping()"
)
_PT2E = (
    "PT2E quantization of exported programs is torchao.quantization.pt2e, whose quantizers take "
    "fastquant's observers in their QuantizationSpec; fastquant.export makes such programs of "
    "eager models"
)
_JIT = (
    "quantization of TorchScript is torch.ao.quantization.quantize_jit, in releases of torch that "
    "have torch.ao, with torch.ao's own observers; of what fastquant.convert returns, models of "
    "torch's quantized modules can be scripted, native ones traced or exported by torch.export"
)
_ELSEWHERE = {
    "backend_config": _FX,
    "fx": _FX,
    "quantize_fx": _FX,
    "pt2e": _PT2E,
    "quantize_pt2e": _PT2E,
    "quantizer": _PT2E,
    "convert_dynamic_jit": _JIT,
    "convert_jit": _JIT,
    "fuse_conv_bn_jit": _JIT,
    "prepare_dynamic_jit": _JIT,
    "prepare_jit": _JIT,
    "quantize_dynamic_jit": _JIT,
    "quantize_jit": _JIT,
    "script_qconfig": _JIT,
    "script_qconfig_dict": _JIT,
}


def _message(name: str) -> str:
    return f"fastquant is for eager mode and has no {name!r}: {_ELSEWHERE[name]}"


def missing(name: str) -> NoReturn:
    """The package's `__getattr__`, which Python calls for names that it does not have."""
    raise AttributeError(
        _message(name) if name in _ELSEWHERE else f"module {_PACKAGE!r} has no attribute {name!r}"
    )


class _Elsewhere(MetaPathFinder):
    """An import finder. It is the last one, so it is asked only for modules that do not exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == _PACKAGE and name in _ELSEWHERE:
            # Without the argument `name`: with it, `from fastquant import` would drop the message.
            raise ModuleNotFoundError(_message(name))
        return None


def explain_missing_modules() -> None:
    """Make imports of modules that only torch.ao has fail with a message that says so."""
    sys.meta_path.append(_Elsewhere())
