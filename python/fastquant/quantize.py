"""From a float model to a prepared one, and from that to a quantized one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ._conversion import checks, swapping
from ._conversion.fused import observe_sequentials_once
from ._conversion.plan import Classes, Entry, Plan, has_qconfig, look_up
from ._core.dtypes import QINT8, QUINT4X2, plain_dtype
from ._core.errors import PATH_IN_MODEL
from ._torch import ao
from ._torch.ao import nnq
from ._torch.hooks import (
    add_observer_hook,
    copy_forward_hooks,
    copy_forward_pre_hooks,
    remove_observer_hooks,
)
from .nn import quantizable
from .nn.intrinsic import _FusedModule
from .nn.qat.blocks import teach_blocks
from .nn.qat.float_functional import teach_float_functional
from .nn.quantizable.by_torch_ao import BY_TORCH_AO
from .nn.quantizable.preparing import prepare_parts_by
from .nn.quantized import FloatFunctional
from .observer import _is_activation_post_process
from .qconfig import (
    _activation_is_memoryless,
    _add_module_to_qconfig_obs_ctr,
    _assert_valid_qconfig,
    _is_memoryless,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
)
from .quantization_mappings import (
    DEFAULT_BACKEND,
    _get_special_act_post_process,
    _has_special_act_post_process,
    get_default_dynamic_quant_module_mappings,
    get_default_native_dynamic_quant_module_mappings,
    get_default_native_quant_module_mappings,
    get_default_qat_module_mappings,
    get_default_qconfig_propagation_list,
    get_default_static_quant_module_mappings,
    get_default_static_quant_reference_module_mappings,
    no_observer_set,
)
from .stubs import QuantWrapper
from .utils import QuantizationError, check_is_module, has_no_children_ignoring_parametrizations

__all__ = [
    "add_quant_dequant",
    "convert",
    "get_default_custom_config_dict",
    "prepare",
    "prepare_qat",
    "propagate_qconfig_",
    "quantize",
    "quantize_dynamic",
    "quantize_qat",
    "swap_module",
]

_Module = TypeVar("_Module", bound=nn.Module)

is_activation_post_process = _is_activation_post_process
_observer_forward_hook = ao.observer_forward_hook
_observer_forward_pre_hook = ao.observer_forward_pre_hook

_DEFAULT_CUSTOM_CONFIG_DICT: dict[str, dict[type, type]] = {
    "float_to_observed_custom_module_class": {
        nn.LSTM: quantizable.LSTM,
        nn.MultiheadAttention: quantizable.MultiheadAttention,
    },
    "observed_to_quantized_custom_module_class": {
        **{
            source: target
            for name in ("LSTM", "MultiheadAttention")
            for source in ao.named(ao.nnquantizable, name)
            for target in ao.named(nnq, name)
        },
        **BY_TORCH_AO,
    },
}


def get_default_custom_config_dict() -> dict[str, dict[type, type]]:
    """How LSTM and MultiheadAttention are observed and quantized; a copy, to add own modules to.

    Keys: `float_to_observed_custom_module_class`, whose targets have a `from_float` class
    method, for `prepare`; `observed_to_quantized_custom_module_class`, whose targets have
    `from_observed`, for `convert`.
    """
    return {key: dict(classes) for key, classes in _DEFAULT_CUSTOM_CONFIG_DICT.items()}


# They call their observers themselves.
_CALLING_THEIR_OBSERVER = (FloatFunctional, *ao.named(nnq, "QFunctional"))

# --- qconfig --------------------------------------------------------------------------------


def propagate_qconfig_(
    module: nn.Module,
    qconfig_dict: Mapping[Any, Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> None:
    """Give every submodule a `qconfig`, in place.

    A submodule's own `qconfig` attribute comes first, then the entry of `qconfig_dict` for its
    dotted name, then the entry for its type, then what its parent got.

    Args:
        module: the model.
        qconfig_dict: config by dotted name (`""` is the model) or type.
        prepare_custom_config_dict: `non_traceable_module_name` (dotted names) and
            `non_traceable_module_class` (types) list submodules that get none, nor does
            anything inside them.

    Raises:
        TypeError: `module` is no module, or a config no config.
        QuantizationError: a config does not fit its module.
    """
    check_is_module("propagate_qconfig_", module)
    excluded = (prepare_custom_config_dict or {}).get("non_traceable_module_name", ())
    checks.warn_of_unknown_names(module, (*(qconfig_dict or ()), *excluded))
    _propagate_qconfig_helper(
        module, qconfig_dict or {}, prepare_custom_config_dict=prepare_custom_config_dict
    )


def _propagate_qconfig_helper(
    module: nn.Module,
    qconfig_dict: Mapping[Any, Any],
    qconfig_parent: Any = None,
    prefix: str = "",
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> None:
    """`propagate_qconfig_` for the submodule at `prefix`, whose parent got `qconfig_parent`."""
    qconfig = qconfig_dict.get(type_before_parametrizations(module), qconfig_parent)
    qconfig = qconfig_dict.get(prefix, qconfig)
    qconfig = getattr(module, "qconfig", qconfig)
    try:
        _assert_valid_qconfig(qconfig, module)
    except (TypeError, QuantizationError) as error:
        raise type(error)(f"{prefix or 'the model itself'}: {error}") from None
    qconfig = _add_module_to_qconfig_obs_ctr(qconfig, module)
    module.qconfig = qconfig
    custom = prepare_custom_config_dict or {}
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if path not in custom.get("non_traceable_module_name", ()) and type(
            child
        ) not in custom.get("non_traceable_module_class", ()):
            _propagate_qconfig_helper(
                child, qconfig_dict, qconfig, path, prepare_custom_config_dict
            )


def _remove_qconfig(module: nn.Module) -> None:
    """Remove configs, observers and the hooks that feed them, in place."""
    for child in module.children():
        _remove_qconfig(child)
    if hasattr(module, "qconfig"):
        del module.qconfig
    # The observer inside a fake-quantizer stays: where a training module stays, its fake-quantizer
    # must go on working.
    if not _is_activation_post_process(module):
        _remove_activation_post_process(module)


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wrap each leaf that has a `qconfig` in a `QuantWrapper`, in place.

    Returns:
        The module, or a `QuantWrapper` around it if it is itself such a leaf.
    """
    check_is_module("add_quant_dequant", module)
    if has_no_children_ignoring_parametrizations(module) and getattr(module, "qconfig", None):
        return QuantWrapper(module)
    for name, child in module.named_children():
        module._modules[name] = add_quant_dequant(child)
    return module


# --- observers --------------------------------------------------------------------------------


def _register_activation_post_process_hook(module: nn.Module, pre_hook: bool = False) -> None:
    """Have the module's observer called before any other hook, on its input or its output."""
    if not hasattr(module, "activation_post_process"):
        raise QuantizationError(
            f"{type(module).__name__} has no activation_post_process for a hook to call"
        )
    add_observer_hook(module, pre_hook)


def _remove_activation_post_process(module: nn.Module) -> None:
    """Remove the module's observer and the hooks that feed it."""
    if _is_activation_post_process(getattr(module, "activation_post_process", None)):
        delattr(module, "activation_post_process")
    remove_observer_hooks(module)


def _get_unique_devices_(module: nn.Module) -> set[torch.device]:
    """The devices of parameters and buffers, `meta` left out."""
    tensors = (t for ts in (module.parameters(), module.buffers()) for t in ts)
    return {tensor.device for tensor in tensors if tensor.device.type != "meta"}


def _unique_device(module: nn.Module, purpose: str) -> torch.device | None:
    devices = _get_unique_devices_(module)
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise QuantizationError(
            f"{purpose} needs all of a model's tensors on one device, got {names}; move it with "
            "model.to(device)"
        )
    return next(iter(devices), None)


def _make_observer(factory: Callable[[], nn.Module], device: torch.device | None) -> nn.Module:
    if not callable(factory):
        raise TypeError(f"a qconfig's activation must be a callable, got {factory!r}")
    observer = factory()
    return observer if device is None else observer.to(device)


def _insert_observer(
    module: nn.Module, device: torch.device | None, factory: Callable[[], nn.Module] | None = None
) -> None:
    """Attach an observer and its hook, unless there is no config or nothing to observe."""
    if not has_qconfig(module) or isinstance(module, ao.DeQuantStub):
        return
    qconfig: Any = module.qconfig
    observer = _make_observer(factory or qconfig.activation, device)
    module.add_module("activation_post_process", observer)
    memoryless = _activation_is_memoryless(qconfig) if factory else _is_memoryless(observer)
    _register_activation_post_process_hook(module, pre_hook=memoryless)


def _add_observer_(
    module: nn.Module,
    qconfig_propagation_list: Iterable[Any] | None = None,
    non_leaf_module_list: Iterable[Any] | None = None,
    device: torch.device | None = None,
    custom_module_class_mapping: Classes | None = None,
) -> None:
    """Give observers to the submodules that have a config, in place.

    Args:
        module: the model, configs propagated.
        qconfig_propagation_list: types that are observed where they are leaves.
        non_leaf_module_list: types that are observed as a whole.
        device: where observers go; by default where the model is.
        custom_module_class_mapping: observed class by float class; its `from_float` is called.

    Raises:
        QuantizationError: the model lies on several devices.
    """
    leaves = (
        get_default_qconfig_propagation_list()
        if qconfig_propagation_list is None
        else set(qconfig_propagation_list)
    )
    if device is None:
        device = _unique_device(module, "prepare")
    wholes = set(non_leaf_module_list or ())
    if names := [repr(given) for given in (*leaves, *wholes) if isinstance(given, str)]:
        checks.warn_user(
            "prepare: allow_list and observer_non_leaf_module_list take classes, so names have no "
            f"effect: {checks.listed(names)}"
        )
    _observe(module, leaves, wholes, device, custom_module_class_mapping or {}, {})


def _observe(
    module: nn.Module,
    leaves: set[Any],
    wholes: set[Any],
    device: torch.device | None,
    custom: Classes,
    done: dict[nn.Module, nn.Module],
) -> None:
    """Observe what is below a module; `done` has what became of each module, by what it was."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        if child in done:  # it is in several places, and what replaces it is in all of them
            if done[child] is not child:
                setattr(module, name, done[child])
            continue
        done[child] = child
        kind = type_before_parametrizations(child)
        if kind is nn.Dropout:
            continue
        if issubclass(kind, _CALLING_THEIR_OBSERVER):
            # It calls its observer itself.
            if has_qconfig(child):
                child.activation_post_process = _make_observer(child.qconfig.activation, device)  # type: ignore[union-attr, arg-type]
        elif issubclass(kind, _FusedModule) or kind in wholes:
            _insert_observer(child, device)
        elif _has_special_act_post_process(child):
            _insert_observer(child, device, _get_special_act_post_process(child))
        elif kind in custom and has_qconfig(child):
            done[child] = _observe_custom(child, custom[kind], device)
            setattr(module, name, done[child])
        else:
            _observe(child, leaves, wholes, device, custom, done)
    # AdaRound gives a leaf a `weight_fake_quant`, which makes it a parent, and still a leaf here.
    is_leaf = has_no_children_ignoring_parametrizations(module) or hasattr(
        module, "weight_fake_quant"
    )
    if (
        is_leaf
        and not isinstance(module, nn.Sequential)
        and type_before_parametrizations(module) in leaves
    ):
        _insert_observer(module, device)


def _observe_custom(
    module: nn.Module, observed_class: Any, device: torch.device | None
) -> nn.Module:
    observed: nn.Module = observed_class.from_float(module)
    # torch.ao's LSTM prepares itself, by torch.ao's means, whose configs cannot be pickled.
    for submodule in observed.modules():
        if has_qconfig(submodule):
            submodule.qconfig = _add_module_to_qconfig_obs_ctr(submodule.qconfig, submodule)
    copy_forward_pre_hooks(module, observed)
    copy_forward_hooks(module, observed)
    if not issubclass(observed_class, tuple(no_observer_set())):
        _insert_observer(observed, device)
    return observed


def prepare(
    model: _Module,
    inplace: bool = False,
    allow_list: Iterable[Any] | None = None,
    observer_non_leaf_module_list: Iterable[Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> _Module:
    """Prepare a model for calibration: propagate configs, attach observers.

    Set `model.qconfig`, or that of submodules, first. Hooks of yours keep their order and run
    after the observers.

    Args:
        model: float model, in eval mode, on one device.
        inplace: change `model` itself instead of a copy.
        allow_list: types that are observed where they are leaves; by default all that can be
            quantized.
        observer_non_leaf_module_list: types that are observed as a whole.
        prepare_custom_config_dict: `float_to_observed_custom_module_class` as in
            `get_default_custom_config_dict`, the default; `non_traceable_module_name` and
            `non_traceable_module_class` as in `propagate_qconfig_`.

    Returns:
        The prepared model. Warns where no submodule has a config, where batch norm or dropout
        would be calibrated in training mode, where a module was fused for training, where the model
        itself would have to be swapped, and where no submodule has a name that is given.

    Raises:
        TypeError: `model` is no module, or a `qconfig` no config.
        QuantizationError: a config does not fit its module, several devices, or lazy layers that
            were not called yet.
    """
    check_is_module("prepare", model)
    checks.check_initialized("prepare", model)
    if not inplace:
        model = copy.deepcopy(model)
    _prepare(model, allow_list, observer_non_leaf_module_list, prepare_custom_config_dict)
    checks.warn_of_training_mode(model)
    return model


def _prepare(
    model: nn.Module,
    allow_list: Iterable[Any] | None = None,
    observer_non_leaf_module_list: Iterable[Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> None:
    custom = prepare_custom_config_dict
    if custom is None:
        custom = _DEFAULT_CUSTOM_CONFIG_DICT
    classes: Classes = custom.get("float_to_observed_custom_module_class", {})
    with ao.quiet():
        propagate_qconfig_(model, prepare_custom_config_dict=custom)
        if type_before_parametrizations(model) in classes and has_qconfig(model):
            checks.warn_user(checks.staying("prepare", model))
        if not any(has_qconfig(module) for module in model.modules()):
            warnings.warn(
                "None of the submodules has a qconfig, so nothing is prepared: set "
                "model.qconfig, or that of the submodules to quantize, before the call",
                stacklevel=3,
            )
        _add_observer_(
            model,
            allow_list,
            observer_non_leaf_module_list,
            custom_module_class_mapping=classes,
        )
    observe_sequentials_once(model)
    swapping.call_parts_of_encoders(model)
    for path, module in model.named_modules():
        if _is_activation_post_process(module):
            module.__dict__[PATH_IN_MODEL] = path


def prepare_qat(model: _Module, mapping: Classes | None = None, inplace: bool = False) -> _Module:
    """Prepare a model for quantization-aware training.

    Propagates configs, swaps modules for ones that fake-quantize their weight, attaches
    observers or fake-quantizers to outputs.

    Args:
        model: float model, in training mode, on one device, `qconfig` set.
        mapping: QAT class by float class; by default `get_default_qat_module_mappings`.
        inplace: change `model` itself instead of a copy.

    Returns:
        The prepared model.

    Raises:
        TypeError: `model` is no module, or a `qconfig` no config.
        QuantizationError: the model is in eval mode, or is itself an LSTM or MultiheadAttention; or
            as for `prepare`.
    """
    check_is_module("prepare_qat", model)
    if not model.training:
        raise QuantizationError(
            "prepare_qat only works on models in training mode; call model.train() first"
        )
    if mapping is None:
        mapping = get_default_qat_module_mappings()
    made_of_parts = _DEFAULT_CUSTOM_CONFIG_DICT["float_to_observed_custom_module_class"]
    if has_qconfig(model) and type(model) in made_of_parts:
        raise QuantizationError(
            f"prepare_qat swaps submodules, so it cannot prepare the {type(model).__name__} that "
            "it was given; put it into a module that calls it, and prepare that"
        )
    checks.check_initialized("prepare_qat", model)
    if not inplace:
        model = copy.deepcopy(model)
    teach_blocks()
    teach_float_functional()
    with ao.quiet():
        propagate_qconfig_(model)
    plan = Plan("prepare_qat", model, mapping, _observed_to_quantized(None), closed=made_of_parts)
    checks.warn_of_root(plan)
    checks.warn_of_transposed(model)
    swapping.swap(plan)
    for module in model.modules():
        _set_channels_of_weight(module)
    _prepare(model, observer_non_leaf_module_list=mapping.values())
    return model


def _set_channels_of_weight(module: nn.Module) -> None:
    """Give a weight's fake-quantizer the size that its first call would, which graphs cannot."""
    fake_quantizer: Any = getattr(module, "weight_fake_quant", None)
    # Other observers get their size at the first call. So do those of a parametrized weight, which
    # every look at it computes, with effects of its own: spectral_norm moves on.
    if not hasattr(fake_quantizer, "_axis") or is_parametrized(module, "weight"):
        return
    axis, weight = fake_quantizer._axis(), getattr(module, "weight", None)
    if axis is not None and isinstance(weight, Tensor) and -weight.dim() <= axis < weight.dim():
        fake_quantizer._set_channels(weight.shape[axis])


# --- conversion -------------------------------------------------------------------------------


def convert(
    module: _Module,
    mapping: Classes | None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: Mapping[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Module:
    """Swap the submodules of a prepared and calibrated model for quantized ones.

    Args:
        module: prepared model.
        mapping: quantized class by class, each with a class method `from_float`; by default
            the static one (with `is_reference`, the reference one), and, of the native backend, the
            dynamic one for modules whose config is for dynamic quantization.
        inplace: change `module` itself instead of a copy.
        remove_qconfig: remove configs, observers and their hooks at the end.
        is_reference: swap in reference modules: quantized weights, floating computation.
        convert_custom_config_dict: `observed_to_quantized_custom_module_class` as in
            `get_default_custom_config_dict`, the default.
        use_precomputed_fake_quant: keep the weight ranges observed in training instead of
            observing the weights again.
        backend: whose quantized modules: "torch.ao", the default where torch has them, or "native"
            for `fastquant.nn.quantized`. A layer that has no native form stays floating, between
            dequantize and quantize.

    Returns:
        The converted model. Warns, naming layers, if observers have seen no data, and their scale
        is 1; if they left out NaN or infinities; if nothing quantizes the input of quantized
        layers; if torch computes a quantized transposed convolution wrongly; and if layers have no
        native form.

    Raises:
        TypeError: `module` is no module.
        QuantizationError: `backend` is unknown, is "torch.ao" where torch has no quantized modules,
            or has no reference modules; modules have a config but no observer, so prepare is
            missing; or a module, which is named, cannot be converted, or only to one of torch's
            that computes something else. Where `from_float` failed, it is a RuntimeError, too.
    """
    check_is_module("convert", module)
    return _check_and_convert(
        "convert",
        module,
        mapping,
        inplace,
        remove_qconfig,
        is_reference,
        convert_custom_config_dict,
        use_precomputed_fake_quant,
        backend,
    )


def _check_and_convert(
    function: str,
    module: _Module,
    mapping: Classes | None = None,
    inplace: bool = True,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: Mapping[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Module:
    """`convert`, called by `function`, which messages name."""
    _check_backend(function, backend)
    custom = convert_custom_config_dict
    dynamic: Classes = {}
    if backend == "native":
        if is_reference and ao.has_quantized_modules:
            raise QuantizationError(
                f"{function}: is_reference=True needs backend='torch.ao', got backend='native'"
            )
        if mapping is None and not is_reference:
            mapping = get_default_native_quant_module_mappings()
            dynamic = get_default_native_dynamic_quant_module_mappings()
        # What is in an LSTM or MultiheadAttention is swapped as in any module.
        custom = {} if custom is None else custom
    if mapping is None:
        mapping = _default_mapping(is_reference)
    plan = Plan(function, module, mapping, _observed_to_quantized(custom), dynamic)
    checks.check(plan)
    checks.warn(plan)
    if inplace:
        swapping.swap(plan, use_precomputed_fake_quant)
    else:
        module = swapping.swap_in_copy(plan, use_precomputed_fake_quant, remove_qconfig)
    if remove_qconfig:
        _remove_qconfig(module)
    return module


def _check_backend(function: str, backend: str) -> None:
    if backend not in ("torch.ao", "native"):
        raise QuantizationError(
            f"{function}: backend must be 'torch.ao' or 'native', got {backend!r}"
        )
    if backend == "torch.ao" and not ao.has_quantized_modules:
        raise QuantizationError(
            f"{function}: backend='torch.ao' needs torch's quantized modules, which torch "
            f"{torch.__version__} does not have; accepted: backend='native'"
        )


def _convert(
    module: _Module,
    mapping: Classes | None = None,
    inplace: bool = False,
    is_reference: bool = False,
    convert_custom_config_dict: Mapping[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
) -> _Module:
    """`convert` without its checks; configs and observers stay."""
    if mapping is None:
        mapping = _default_mapping(is_reference)
    if not inplace:
        module = copy.deepcopy(module)
    custom = _observed_to_quantized(convert_custom_config_dict)
    swapping.swap(Plan("convert", module, mapping, custom), use_precomputed_fake_quant)
    return module


def _default_mapping(is_reference: bool) -> Classes:
    if is_reference:
        return get_default_static_quant_reference_module_mappings()
    return get_default_static_quant_module_mappings()


def _observed_to_quantized(config: Mapping[str, Any] | None) -> Classes:
    if config is None:
        config = _DEFAULT_CUSTOM_CONFIG_DICT
    classes: Classes = config.get("observed_to_quantized_custom_module_class", {})
    return classes


def swap_module(
    mod: nn.Module,
    mapping: Classes,
    custom_module_class_mapping: Classes,
    use_precomputed_fake_quant: bool = False,
) -> nn.Module:
    """The quantized counterpart of a module that has a config, made on its device.

    Forward hooks and pre-hooks are kept, with their order and flags; those of observers are
    not.

    Args:
        mod: observed module.
        mapping: quantized class, with `from_float`, by class.
        custom_module_class_mapping: quantized class, with `from_observed`, by observed class;
            goes first.
        use_precomputed_fake_quant: passed to a `from_float` that takes it.

    Returns:
        `mod` itself where it has no config or no counterpart.

    Raises:
        QuantizationError: the module lies on several devices.
    """
    target, how = look_up(mod, mapping, custom_module_class_mapping)
    if how is None or not has_qconfig(mod):
        return mod
    entry = Entry("the module", None, "", mod, target, how)
    with ao.quiet():
        return swapping.replacement(
            "swap_module", entry, use_precomputed_fake_quant, shortcuts=False
        )


# --- the whole way in one call ------------------------------------------------------------------


def quantize(
    model: _Module,
    run_fn: Callable[..., Any],
    run_args: Iterable[Any],
    mapping: Classes | None = None,
    inplace: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Module:
    """Static quantization: prepare, calibrate with `run_fn(model, *run_args)`, convert.

    Args:
        model: float model, `qconfig` set; put into eval mode.
        run_fn: runs data through the prepared model.
        run_args: further arguments of `run_fn`.
        mapping: as for `convert`.
        inplace: change `model` itself instead of a copy.
        backend: as for `convert`.

    Returns:
        The quantized model.

    Raises:
        TypeError: `model` is no module.
        QuantizationError: as for `prepare` and `convert`.
    """
    check_is_module("quantize", model)
    _check_backend("quantize", backend)
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    prepare(model, inplace=True)
    run_fn(model, *run_args)
    return _check_and_convert("quantize", model, mapping, backend=backend)


def quantize_qat(
    model: _Module,
    run_fn: Callable[..., Any],
    run_args: Iterable[Any],
    inplace: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Module:
    """Quantization-aware training: prepare, train with `run_fn(model, *run_args)`, convert.

    Args:
        model: float model, `qconfig` set; put into training mode.
        run_fn: trains the prepared model.
        run_args: further arguments of `run_fn`.
        inplace: change `model` itself instead of a copy.
        backend: as for `convert`.

    Returns:
        The quantized model.

    Raises:
        TypeError: `model` is no module.
        QuantizationError: as for `prepare_qat` and `convert`.
    """
    check_is_module("quantize_qat", model)
    _check_backend("quantize_qat", backend)
    if not inplace:
        model = copy.deepcopy(model)
    model.train()
    prepare_qat(model, inplace=True)
    run_fn(model, *run_args)
    return _check_and_convert("quantize_qat", model, backend=backend)


_RECURRENT_AND_LINEAR = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)
# By dtype of the weights: the config, and the types it goes to where none are asked for.
_DYNAMIC_DEFAULTS: dict[torch.dtype, tuple[Any, tuple[type[nn.Module], ...]]] = {
    torch.int8: (default_dynamic_qconfig, _RECURRENT_AND_LINEAR),
    torch.float16: (float16_dynamic_qconfig, _RECURRENT_AND_LINEAR),
    torch.uint8: (float_qparams_weight_only_qconfig, (nn.EmbeddingBag, nn.Embedding)),
    plain_dtype(QUINT4X2): (float_qparams_weight_only_qconfig_4bit, (nn.EmbeddingBag,)),
}


def quantize_dynamic(
    model: _Module,
    qconfig_spec: Mapping[Any, Any] | Iterable[Any] | None = None,
    dtype: torch.dtype = QINT8,
    mapping: Classes | None = None,
    inplace: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Module:
    """Dynamic quantization: quantized weights, activations quantized at each call or not at all.

    Args:
        model: float model; put into eval mode.
        qconfig_spec: a dict from submodule type or dotted name to config; or a set of types and
            names that get the config of `dtype`; by default `Linear` and recurrent modules
            (`qint8`, `float16`) or embeddings (`quint8`, `quint4x2`).
        dtype: of the weights; unused where `qconfig_spec` is a dict.
        mapping: quantized class by class; by default that of the backend,
            `get_default_dynamic_quant_module_mappings` for torch.ao's.
        inplace: change `model` itself instead of a copy.
        backend: whose quantized modules: "torch.ao", or "native" for
            `fastquant.nn.quantized.dynamic`. A layer that has no native form stays as it is.

    Returns:
        The quantized model. Warns, naming them, of layers that have no native form, of what
        `qconfig_spec` asks for that has no dynamic one or that the model does not have, and of lazy
        layers that were not called yet.

    Raises:
        TypeError: `model` is no module.
        ValueError: no config is known for `dtype`.
        QuantizationError: `backend` is unknown, or weights are on the meta device.
    """
    check_is_module("quantize_dynamic", model)
    _check_backend("quantize_dynamic", backend)
    if isinstance(qconfig_spec, Mapping):
        asked = tuple(key for key, qconfig in qconfig_spec.items() if qconfig is not None)
    else:
        asked = () if qconfig_spec is None else tuple(qconfig_spec)
        plain = plain_dtype(dtype)
        if plain not in _DYNAMIC_DEFAULTS:
            raise ValueError(
                f"quantize_dynamic has no default config for {dtype}; accepted: "
                f"{', '.join(map(str, _DYNAMIC_DEFAULTS))}; or give qconfig_spec as a dict"
            )
        qconfig, types = _DYNAMIC_DEFAULTS[plain]
        qconfig_spec = dict.fromkeys(types if qconfig_spec is None else asked, qconfig)
    if mapping is None:
        mapping = (
            get_default_native_dynamic_quant_module_mappings()
            if backend == "native"
            else get_default_dynamic_quant_module_mappings()
        )
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    with ao.quiet():
        propagate_qconfig_(model, qconfig_spec)
    plan = Plan("quantize_dynamic", model, mapping, _observed_to_quantized(None))
    checks.warn_of_root(plan)
    checks.warn_of_idle_spec(plan, asked, mapping)
    checks.warn_of_lazy(model, qconfig_spec, mapping)
    checks.check(plan)
    swapping.swap(plan)
    _remove_qconfig(model)
    return model


def default_eval_fn(model: nn.Module, calib_data: Iterable[tuple[Any, Any]]) -> None:
    """Run the model on the inputs of (input, target) pairs; a `run_fn` for `quantize`."""
    for data, _target in calib_data:
        model(data)


def _get_observer_dict(mod: nn.Module, target_dict: dict[str, nn.Module], prefix: str = "") -> None:
    """Put each observer of a model into `target_dict`, by its dotted name below `prefix`."""
    for name, module in mod.named_modules(prefix=prefix, remove_duplicate=False):
        if hasattr(module, "activation_post_process"):
            key = f"{name}.activation_post_process" if name else "activation_post_process"
            target_dict[key] = module.activation_post_process


prepare_parts_by(
    lambda module: prepare(module, inplace=True), lambda module: prepare_qat(module, inplace=True)
)
