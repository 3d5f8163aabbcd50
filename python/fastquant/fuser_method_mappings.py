"""How two or three float modules become one fused module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ._torch.ao import MatchAllNode, Pattern
from .nn import intrinsic as nni
from .utils import QuantizationError

__all__ = [
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_convtranspose_bn",
    "fuse_linear_bn",
    "get_fuser_method",
    "get_fuser_method_new",
]


class _Fused(NamedTuple):
    """The fused classes that start with a convolution."""

    conv_bn: type[nn.Module]
    conv_bn_relu: type[nn.Module]
    conv_relu: type[nn.Module]


_FUSED_CONVOLUTIONS: dict[type, _Fused] = {
    nn.Conv1d: _Fused(nni.ConvBn1d, nni.ConvBnReLU1d, nni.ConvReLU1d),
    nn.Conv2d: _Fused(nni.ConvBn2d, nni.ConvBnReLU2d, nni.ConvReLU2d),
    nn.Conv3d: _Fused(nni.ConvBn3d, nni.ConvBnReLU3d, nni.ConvReLU3d),
}


def _check_mode(is_qat: bool, *modules: nn.Module) -> None:
    names = ", ".join(type(module).__name__ for module in modules)
    if len({module.training for module in modules}) > 1:
        raise QuantizationError(f"modules to fuse must be in the same mode, train or eval: {names}")
    if modules[0].training and not is_qat:
        raise QuantizationError(
            f"{names} are in training mode: folding a batch norm into weights needs eval mode; "
            "call model.eval() first, or fuse_modules_qat to go on training"
        )


def _check_bn(bn: Any, features: int) -> None:
    """Raise unless a fused module can train `bn` with `features` channels."""
    name = type(bn).__name__
    if bn.num_features != features:
        raise QuantizationError(
            f"{name} has {bn.num_features} features, but the module before it has {features} "
            "output channels"
        )
    for attribute in ("affine", "track_running_stats"):
        if not getattr(bn, attribute):
            raise QuantizationError(f"{name} can be fused for QAT only with {attribute}=True")


def _fused_convolution(conv: nn.Module) -> _Fused:
    fused = _FUSED_CONVOLUTIONS.get(type(conv))
    if fused is None:
        raise NotImplementedError(
            f"cannot fuse {type(conv).__name__}; accepted: "
            + ", ".join(cls.__name__ for cls in _FUSED_CONVOLUTIONS)
        )
    return fused


def fuse_conv_bn(is_qat: bool, conv: Any, bn: Any) -> nn.Module:
    """A convolution with the batch norm after it.

    Args:
        is_qat: keep both, in a module that trains them as one; otherwise fold the batch norm's
            running statistics and parameters into a copy of `conv` (eval mode).
        conv: `Conv1d`, `Conv2d` or `Conv3d`.
        bn: `BatchNorm` of the same dimensions.

    Raises:
        QuantizationError: modes or channels do not fit.
        NotImplementedError: no fused module exists for the type of `conv`.
    """
    _check_mode(is_qat, conv, bn)
    if not is_qat:
        return fuse_conv_bn_eval(conv, bn)  # type: ignore[no-any-return]
    _check_bn(bn, conv.out_channels)
    return _fused_convolution(conv).conv_bn(conv, bn)


def fuse_conv_bn_relu(is_qat: bool, conv: Any, bn: Any, relu: nn.Module) -> nn.Module:
    """A convolution with the batch norm and the ReLU after it; arguments as `fuse_conv_bn`.

    Raises:
        QuantizationError: modes or channels do not fit.
        NotImplementedError: no fused module exists for the type of `conv`.
    """
    _check_mode(is_qat, conv, bn, relu)
    fused = _fused_convolution(conv)
    if not is_qat:
        return fused.conv_relu(fuse_conv_bn_eval(conv, bn), relu)
    _check_bn(bn, conv.out_channels)
    return fused.conv_bn_relu(conv, bn, relu)


def fuse_linear_bn(is_qat: bool, linear: Any, bn: Any) -> nn.Module:
    """A `Linear` with the `BatchNorm1d` after it; `is_qat` as for `fuse_conv_bn`.

    Raises:
        QuantizationError: modes or channels do not fit.
    """
    _check_mode(is_qat, linear, bn)
    if not is_qat:
        return fuse_linear_bn_eval(linear, bn)  # type: ignore[no-any-return]
    _check_bn(bn, linear.out_features)
    return nni.LinearBn1d(linear, bn)


def fuse_convtranspose_bn(is_qat: bool, convt: Any, bn: Any) -> nn.Module:
    """A transposed convolution with the batch norm after it, in eval mode.

    Raises:
        QuantizationError: modes do not fit, or QAT is asked for: no such module exists.
    """
    _check_mode(is_qat, convt, bn)
    if is_qat:
        raise QuantizationError(
            f"{type(convt).__name__} and {type(bn).__name__} cannot be fused for QAT"
        )
    return fuse_conv_bn_eval(convt, bn, transpose=True)  # type: ignore[no-any-return]


def _sequential_wrapper2(sequential: Callable[[Any, Any], nn.Module]) -> Callable[..., nn.Module]:
    """A fuser method that puts two modules into `sequential`, trained or not."""

    def fuser_method(is_qat: bool, m1: nn.Module, m2: nn.Module) -> nn.Module:
        return sequential(m1, m2)

    return fuser_method


_DEFAULT_OP_LIST_TO_FUSER_METHOD: dict[tuple[Any, ...], Any] = {
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn,
    (nn.Linear, nn.ReLU): _sequential_wrapper2(nni.LinearReLU),
    (nn.BatchNorm2d, nn.ReLU): _sequential_wrapper2(nni.BNReLU2d),
    (nn.BatchNorm3d, nn.ReLU): _sequential_wrapper2(nni.BNReLU3d),
}
for _conv, _bn, _convt in (
    (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d),
):
    _DEFAULT_OP_LIST_TO_FUSER_METHOD |= {
        (_conv, _bn): fuse_conv_bn,
        (_conv, _bn, nn.ReLU): fuse_conv_bn_relu,
        (_conv, nn.ReLU): _sequential_wrapper2(_FUSED_CONVOLUTIONS[_conv].conv_relu),
        (_convt, _bn): fuse_convtranspose_bn,
    }


def get_fuser_method(
    op_list: tuple[Any, ...],
    additional_fuser_method_mapping: Mapping[tuple[Any, ...], Any] | None = None,
) -> Callable[..., nn.Module]:
    """The function that fuses modules of these types; the additional mapping goes first.

    Raises:
        QuantizationError: there is none.
    """
    additional = additional_fuser_method_mapping or {}
    method = {**_DEFAULT_OP_LIST_TO_FUSER_METHOD, **additional}.get(op_list)
    if method is None:
        raise QuantizationError(
            f"did not find fuser method for: ({', '.join(_name(op) for op in op_list)})"
        )
    return method  # type: ignore[no-any-return]


def _name(op: Any) -> str:
    return str(getattr(op, "__name__", op))


def _reverse2(f: Callable[..., Any]) -> Callable[..., Any]:
    """The fuser method for `(second, first)`, the order in which FX patterns name modules."""

    def reversed_method(is_qat: bool, x: Any, y: Any) -> Any:
        return f(is_qat, y, x)

    return reversed_method


def _reverse3(f: Callable[..., Any]) -> Callable[..., Any]:
    """The fuser method for `(third, (second, first))`."""

    def reversed_method(is_qat: bool, x: Any, w: tuple[Any, Any]) -> Any:
        y, z = w
        return f(is_qat, z, y, x)

    return reversed_method


def _get_valid_patterns(op_pattern: Any) -> list[Any]:
    """A pattern and, exact ones first, those in which `MatchAllNode` stands for an op of it."""
    if isinstance(op_pattern, (tuple, list)):
        return list(itertools.product(*map(_get_valid_patterns, op_pattern)))
    return [op_pattern, MatchAllNode]


def get_fuser_method_new(
    op_pattern: Pattern, fuser_method_mapping: Mapping[Any, Any]
) -> Callable[..., Any]:
    """The function that fuses a pattern, which may match a key that holds `MatchAllNode`.

    Raises:
        QuantizationError: there is none.
    """
    for pattern in _get_valid_patterns(op_pattern):
        method = fuser_method_mapping.get(pattern)
        if method is not None:
            return method  # type: ignore[no-any-return]
    raise QuantizationError(f"did not find fuser method for: {op_pattern}")
