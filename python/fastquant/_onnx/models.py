"""What a model is exported as: its native form, or itself with quantized weights."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .._conversion.checks import has_observer, uncalibrated
from .._conversion.plan import Plan
from .._core.errors import QuantizationError
from ..fake_quantize import FakeQuantizeBase
from ..nn.quantized import DeQuantize, FloatFunctional, QFunctional
from ..nn.quantized.dynamic.rnn import RNNBase, RNNCellBase
from ..nn.quantized.dynamic.weighted import DynamicWeighted
from ..nn.quantized.embedding import Embedding
from ..nn.quantized.float_layer import FloatLayer
from ..nn.quantized.scaled import Scaled
from ..observer import ObserverBase
from ..quantization_mappings import get_default_native_quant_module_mappings
from ..quantize import _check_and_convert
from .fake_quantizers import freeze, integers_of_observer, of_fake_quantizer, quantize_weights
from .lowering import FUNCTION


def exportable(model: nn.Module, opset: int | None, dynamo: bool) -> nn.Module:
    """A model in a form of which each part has its like in ONNX.

    Args:
        model: in eval mode; is changed.
        opset: for which it is exported; None for any.
        dynamo: whether by torch's newer exporter.
    """
    if isinstance(model, FakeQuantizeBase):
        return of_fake_quantizer("the model itself", model, opset)
    if isinstance(model, ObserverBase):
        return nn.Identity()
    plan = Plan(FUNCTION, model, get_default_native_quant_module_mappings(), {})
    prepared = any(True for _ in plan.swaps())
    if not (prepared or is_native(model) or any(map(_quantizes, model.modules()))):
        raise QuantizationError(
            f"{FUNCTION}: the model has neither observers nor quantized modules, so nothing would "
            "be quantized: prepare it (prepare or prepare_qat) and run data through it first, or "
            "export the floating model with torch.onnx.export"
        )
    as_native = prepared and dynamo and _is_native_as_a_whole(plan)
    if as_native:
        unseen = uncalibrated(plan, functionals=True)
        model = _check_and_convert(FUNCTION, model, inplace=True, backend="native")
        _refuse_calls(model, unseen)
    elif prepared:
        quantize_weights(plan, opset)
    if not dynamo and is_native(model):
        raise QuantizationError(
            f"{FUNCTION}: dynamo=False takes prepared models, and not the native modules that "
            "convert makes; leave dynamo=False out"
        )
    freeze(model, opset, observers=prepared and not as_native)
    return model


def is_native(model: nn.Module) -> bool:
    """Whether a model has native modules, whose ops torch.onnx does not know."""
    kinds = (Scaled, DeQuantize, Embedding, DynamicWeighted, RNNBase, RNNCellBase)
    return any(isinstance(module, kinds) for module in model.modules())


def _quantizes(module: nn.Module) -> bool:
    kinds = (FakeQuantizeBase, ObserverBase, FloatLayer)
    return isinstance(module, kinds) or has_observer(module)


def require_no_torch_ao_modules(model: nn.Module) -> None:
    """Raise for a model that convert has swapped torch.ao's quantized modules into."""
    for path, module in model.named_modules():
        package = type(module).__module__
        quantized = package.startswith(
            ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized")
        )
        if quantized and not isinstance(module, FloatFunctional):
            raise QuantizationError(
                f"{FUNCTION}: {path or 'the model itself'} is one of torch.ao's quantized modules "
                f"({type(module).__name__}), which have no ONNX form: export the model before it "
                'is converted, or convert it with backend="native"'
            )


def _is_native_as_a_whole(plan: Plan) -> bool:
    """Whether every activation has a native form, and no fake-quantizer is switched off."""
    for module in plan.model.modules():
        if isinstance(module, FakeQuantizeBase) and not bool(module.fake_quant_enabled):
            return False
    for entry in plan.swaps():
        limits = integers_of_observer(getattr(entry.module, "activation_post_process", None))
        if limits is not None and limits[1] - limits[0] > 255:
            return False
    return True


class _Uncalibrated(nn.Module):
    """In the place of a module whose observer has seen nothing: it may be there, but not called."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise QuantizationError(
            f"{self._path} has observed nothing yet: run data through the prepared model before it "
            "is exported"
        )


class _UncalibratedFunctional(_Uncalibrated, QFunctional):
    """The same of a module whose operations with a number take no scale of its own."""

    def __init__(self, path: str) -> None:
        QFunctional.__init__(self)
        self._path = path

    add = add_relu = mul = mul_relu = cat = cat_relu = _Uncalibrated.forward


def _refuse_calls(model: nn.Module, paths: list[str]) -> None:
    """Have the modules at these paths raise an error that names them."""
    refusing: dict[int, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        is_functional = isinstance(module, QFunctional)
        kind = _UncalibratedFunctional if is_functional else _Uncalibrated
        refusing[id(module)] = kind(path)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in refusing:
                module._modules[name] = refusing[id(child)]
