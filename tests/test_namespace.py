"""Every eager name of torch.ao.quantization, under the same name in fastquant."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

import pytest
import torch.ao.quantization as tq

import fastquant as fq

SUBMODULES = [
    "",
    "observer",
    "fake_quantize",
    "qconfig",
    "qconfig_mapping",
    "quant_type",
    "quantize",
    "quantization_mappings",
    "fuse_modules",
    "fuser_method_mappings",
    "stubs",
    "utils",
]

# Names of torch.ao.quantization that are no part of its eager mode, by why they are not.
NOT_EAGER = {
    "entry points of the TorchScript mode": {
        "convert_dynamic_jit",
        "convert_jit",
        "fuse_conv_bn_jit",
        "prepare_dynamic_jit",
        "prepare_jit",
        "quantize_dynamic_jit",
        "quantize_jit",
        "script_qconfig",
        "script_qconfig_dict",
    },
    "helpers of FX graph mode, about nodes of a graph": {
        "check_node",
        "func_list",
        "get_fqn_to_example_inputs",
        "method_list",
        "module_type_list",
        "QuantizerCls",
    },
}
# Those of PT2E and its numeric debugger, which newer releases do not have there.
GONE = {
    "CUSTOM_KEY",
    "NUMERIC_DEBUG_HANDLE_KEY",
    "allow_exported_model_train_eval",
    "compare_results",
    "extract_results_from_loggers",
    "generate_numeric_debug_handle",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "prepare_for_propagation_comparison",
}
EXCLUDED = GONE.union(*NOT_EAGER.values())

# Private, and reached for all the same.
PRIVATE = {
    "observer": [
        "_ObserverBase",
        "_PartialWrapper",
        "_is_activation_post_process",
        "_is_observer_script_module",
        "_is_per_channel_script_obs_instance",
        "_with_args",
        "_with_callable_args",
        "ABC",
    ],
    "fake_quantize": [
        "_is_fake_quant_script_module",
        "_is_float_qparams",
        "_is_per_channel",
        "_is_per_tensor",
        "_is_symmetric_quant",
    ],
    "qconfig": [
        "_activation_is_memoryless",
        "_add_module_to_qconfig_obs_ctr",
        "_assert_valid_qconfig",
        "_default_fp32_placeholder_qconfig",
        "_default_quint8_placeholder_qconfig",
        "_is_reuse_input_qconfig",
        "_obs_or_fq_ctr_equals",
        "_partial_wrapper_equals",
    ],
    "quantize": [
        "_DEFAULT_CUSTOM_CONFIG_DICT",
        "_add_observer_",
        "_convert",
        "_get_observer_dict",
        "_get_unique_devices_",
        "_is_activation_post_process",
        "_observer_forward_hook",
        "_observer_forward_pre_hook",
        "_propagate_qconfig_helper",
        "_register_activation_post_process_hook",
        "_remove_activation_post_process",
        "_remove_qconfig",
        "is_activation_post_process",
    ],
    "quantization_mappings": [
        "_INCLUDE_QCONFIG_PROPAGATE_LIST",
        "_get_special_act_post_process",
        "_has_special_act_post_process",
    ],
    "fuse_modules": ["_fuse_modules", "_get_module", "_set_module"],
    "fuser_method_mappings": [
        "_DEFAULT_OP_LIST_TO_FUSER_METHOD",
        "_get_valid_patterns",
        "_reverse2",
        "_reverse3",
        "_sequential_wrapper2",
    ],
    "utils": ["_assert_and_get_unique_device", "_get_path_of_module", "_parent_name"],
}


def ours_named(name: str) -> types.ModuleType:
    return importlib.import_module(f"fastquant.{name}".rstrip("."))


def modules(name: str) -> tuple[types.ModuleType, types.ModuleType]:
    """fastquant's module of this name and torch.ao's."""
    return ours_named(name), importlib.import_module(f"torch.ao.quantization.{name}".rstrip("."))


def public_names(module: types.ModuleType) -> set[str]:
    """Public names of a module that it or torch.ao.quantization defines."""
    listed = {name for name in getattr(module, "__all__", ()) if hasattr(module, name)}
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").startswith("torch.ao.quantization")
        and getattr(value, "__module__", "") == module.__name__
    }
    return listed | defined


@pytest.mark.torch_ao
@pytest.mark.parametrize("name", SUBMODULES)
def test_every_eager_name_is_there(name: str) -> None:
    ours, theirs = modules(name)
    wanted = public_names(theirs) - EXCLUDED
    assert name in ("quant_type",) or len(wanted) > 2
    assert not sorted(wanted - set(vars(ours)))
    listed = {n for n in getattr(theirs, "__all__", ()) if hasattr(theirs, n)} - EXCLUDED
    assert not name or not sorted(listed - set(ours.__all__))


@pytest.mark.torch_ao
def test_the_exclusions_exist_and_are_missing() -> None:
    names = {name for submodule in SUBMODULES for name in public_names(modules(submodule)[1])}
    unlisted = {"QuantizerCls", "func_list", "method_list", "module_type_list"}
    assert names >= EXCLUDED - GONE - unlisted
    assert not [name for name in EXCLUDED if hasattr(fq, name)]


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_that_code_uses_are_there(name: str) -> None:
    ours = ours_named(name)
    for private in PRIVATE[name]:
        assert hasattr(ours, private), private


@pytest.mark.torch_ao
@pytest.mark.parametrize("name", PRIVATE)
def test_these_private_names_are_torchs(name: str) -> None:
    _, theirs = modules(name)
    for private in PRIVATE[name]:
        assert hasattr(theirs, private), private


@pytest.mark.parametrize("name", SUBMODULES)
def test_star_imports_give_what_all_lists(name: str) -> None:
    ours = ours_named(name)
    found: dict[str, Any] = {}
    exec(f"from {ours.__name__} import *", found)
    assert set(ours.__all__) <= set(found)
    assert len(set(ours.__all__)) == len(ours.__all__) or not name


@pytest.mark.torch_ao
def test_submodules_are_attributes_of_the_package_as_in_torch() -> None:
    for name in SUBMODULES[1:]:
        ours, theirs = getattr(fq, name), getattr(tq, name)
        assert isinstance(ours, types.ModuleType) == isinstance(theirs, types.ModuleType), name


def compatible(ours: inspect.Signature, theirs: inspect.Signature) -> bool:
    """Whether a call that fits `theirs` fits `ours`, with the same defaults."""
    mine = list(ours.parameters.values())
    for i, parameter in enumerate(theirs.parameters.values()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if i >= len(mine) or mine[i].name != parameter.name:
            return False
        if parameter.default is not parameter.empty and (
            mine[i].default is mine[i].empty
            or (
                isinstance(parameter.default, (bool, int, str, type(None)))
                and mine[i].default != parameter.default
            )
        ):
            return False
    return True


@pytest.mark.torch_ao
@pytest.mark.parametrize("name", SUBMODULES[4:])
def test_functions_take_torchs_arguments(name: str) -> None:
    ours, theirs = modules(name)
    checked = 0
    for function in (*public_names(theirs), *PRIVATE.get(name, ())):
        theirs_function = getattr(theirs, function)
        if function in EXCLUDED or not inspect.isfunction(theirs_function):
            continue
        theirs_function = inspect.unwrap(theirs_function)
        signature = inspect.signature(getattr(ours, function))
        assert compatible(signature, inspect.signature(theirs_function)), function
        checked += 1
    assert checked or name in ("quant_type", "stubs")


def test_what_fastquant_adds_is_there() -> None:
    for name in (
        "QuantizationError",
        "__version__",
        "build_info",
        "calibrate",
        "functional",
        "patch_torch_ao",
    ):
        assert name in fq.__all__
        assert hasattr(fq, name)
    assert fq.build_info()["version"] == fq.__version__
