"""The state of observers and fake-quantizers: saved, loaded, copied and moved, as torch.ao's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_quantization
import torch.ao.quantization.fake_quantize as torch_fake_quantize
import torch.ao.quantization.observer as torch_observer
from torch import Tensor, nn

import fastquant
from fastquant import fake_quantize, observer
from fastquant.observer import get_observer_state_dict, load_observer_state_dict
from oracle import assert_same, assert_same_state, assert_unchanged, quiet, snapshot

OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
    "default_fixed_qparams_range_0to1_observer",
    "weight_observer_range_neg_127_to_127",
    "per_channel_weight_observer_range_neg_127_to_127",
)
FAKE_QUANTS = tuple(n for n in torch_fake_quantize.__all__ if n.startswith(("default", "fused")))
NAMES = (*OBSERVERS, *FAKE_QUANTS, "learnable")


def ours(name: str) -> Any:
    if name == "learnable":
        return fake_quantize.LearnableFakeQuantize(observer.MovingAverageMinMaxObserver)
    return getattr(fake_quantize if name in FAKE_QUANTS else observer, name)()


def theirs(name: str) -> Any:
    with quiet():
        if name == "learnable":
            from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

            return _LearnableFakeQuantize(torch_observer.MovingAverageMinMaxObserver)
        module = torch_fake_quantize if name in FAKE_QUANTS else torch_observer
        return getattr(module, name)()


def calibrate(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with quiet():
        for i in range(2):
            module(torch.randn(5, 4, generator=generator) * (i + 1) + 0.5)
    return module


def saved(module: nn.Module) -> Any:
    """The state as a checkpoint file gives it back."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def assert_goes_on_like(actual: nn.Module, expected: nn.Module) -> None:
    """Same state now, and after more tensors."""
    assert_same_state(actual, expected)
    for seed in (7, 8):
        calibrate(actual, seed)
        calibrate(expected, seed)
    assert_same_state(actual, expected)


both_ways = pytest.mark.parametrize(
    ("source", "target"), [(ours, theirs), (theirs, ours), (ours, ours)], ids=("out", "in", "own")
)


# ---------------------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("onto_calibrated", [False, True])
@both_ways
def test_checkpoints_load_both_ways(
    source: Callable[[str], Any],
    target: Callable[[str], Any],
    name: str,
    calibrated: bool,
    onto_calibrated: bool,
) -> None:
    written, read = source(name), target(name)
    if calibrated:
        calibrate(written)
    if onto_calibrated:
        calibrate(read, seed=1)
    read.load_state_dict(saved(written), strict=True)
    assert_same_state(read, written)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_module_goes_on_where_the_saved_one_was(name: str) -> None:
    written = calibrate(ours(name))
    read = ours(name)
    read.load_state_dict(saved(written), strict=True)
    assert_goes_on_like(read, written)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_read_torchs_checkpoint_goes_on_as_torchs(name: str) -> None:
    if "fused" in name:
        pytest.skip("torch's fused op has qparams of its own")
    written = calibrate(theirs(name))
    read = ours(name)
    read.load_state_dict(saved(written), strict=True)
    assert_goes_on_like(read, written)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_lists_what_torchs_lists(name: str) -> None:
    for prepare in (lambda module: module, calibrate):
        mine, expected = prepare(ours(name)).state_dict(), prepare(theirs(name)).state_dict()
        assert list(mine) == list(expected)
        for key, value in expected.items():
            assert (mine[key].shape, mine[key].dtype) == (value.shape, value.dtype)
        assert {k: v["version"] for k, v in mine._metadata.items()} == {
            k: v["version"] for k, v in expected._metadata.items()
        }


def test_the_count_of_non_finite_values_is_not_saved() -> None:
    module = observer.MinMaxObserver()
    module(torch.tensor([1.0, float("nan")]))
    assert int(module.nonfinite_count) == 1
    assert "nonfinite_count" not in module.state_dict()


@pytest.mark.parametrize("name", ["PerChannelMinMaxObserver", "MinMaxObserver"])
def test_what_is_missing_or_unexpected_is_reported(name: str) -> None:
    state = calibrate(ours(name)).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        ours(name).load_state_dict({**state, "extra": torch.ones(1)})
    del state["max_val"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"max_val"'):
        ours(name).load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_missing_keys_are_torchs(name: str) -> None:
    """Whatever is missing, in a fake-quantizer or in the observer inside it."""
    expected_module, module = nn.Sequential(theirs(name)), nn.Sequential(ours(name))
    state = nn.Sequential(theirs(name)).state_dict()
    partial_states: list[Any] = [{}]
    for key in state:
        partial_states.append(state.copy())
        partial_states[-1]._metadata = state._metadata
        del partial_states[-1][key]
    for partial in partial_states:
        expected = expected_module.load_state_dict(partial, strict=False)
        actual = module.load_state_dict(partial, strict=False)
        assert set(actual.missing_keys) == set(expected.missing_keys)
        assert set(actual.unexpected_keys) == set(expected.unexpected_keys)


@pytest.mark.parametrize("name", NAMES)
def test_what_lacks_something_is_not_loaded(name: str) -> None:
    state = calibrate(ours(name)).state_dict()
    module = calibrate(ours(name), seed=1)
    before = snapshot(module)
    missing = "scale" if "scale" in state else "min_val"
    del state[missing]
    assert module.load_state_dict(state, strict=False).missing_keys == [missing]
    if name != "learnable":
        assert_unchanged(module, before)


def test_a_histogram_of_another_size_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for histogram"):
        observer.HistogramObserver(bins=8).load_state_dict(
            observer.HistogramObserver(bins=16).state_dict()
        )


# ------------------------------------------------------------------------------- older versions


def with_version(state: dict[str, Tensor], version: int | None) -> OrderedDict[str, Tensor]:
    """The state as that version of the class would have written it."""
    old = OrderedDict(state)
    metadata: Any = OrderedDict({"": {} if version is None else {"version": version}})
    old._metadata = metadata  # type: ignore[attr-defined]
    return old


@pytest.mark.parametrize("name", OBSERVERS[:5])
@pytest.mark.parametrize("version", [None, 1])
def test_states_without_eps_load(name: str, version: int | None) -> None:
    written = calibrate(ours(name))
    state = written.state_dict()
    del state["eps"]
    if "PerChannel" in name and version == 1:
        for end in ("min", "max"):
            state[f"{end}_vals"] = state.pop(f"{end}_val")
    read = ours(name)
    read.load_state_dict(with_version(state, version))
    assert_goes_on_like(read, written)


@pytest.mark.parametrize("name", OBSERVERS[2:4])
@pytest.mark.parametrize("version", [None, 1, 2])
def test_per_channel_states_by_their_old_names_load(name: str, version: int | None) -> None:
    written = calibrate(ours(name))
    state = written.state_dict()
    old = {(f"{key}s" if key.endswith("_val") else key): value for key, value in state.items()}
    assert "min_vals" in old
    read = ours(name)
    read.load_state_dict(with_version(old, version))
    assert_goes_on_like(read, written)


@pytest.mark.parametrize("name", ["HistogramObserver", "MinMaxObserver"])
@pytest.mark.parametrize("version", [None, 1, 2])
def test_unobserved_ranges_of_old_states_load(name: str, version: int | None) -> None:
    state = ours(name).state_dict()
    for key in ("min_val", "max_val"):
        state[key] = torch.tensor([])
    read = calibrate(ours(name))
    read.load_state_dict(with_version(state, version))
    assert_same(read.min_val, torch.tensor(float("inf")))
    assert_same(read.max_val, torch.tensor(float("-inf")))


def test_old_histograms_load_as_in_torch() -> None:
    state = calibrate(ours("HistogramObserver")).state_dict()
    mine, expected = ours("HistogramObserver"), theirs("HistogramObserver")
    for module in (mine, expected):
        module.load_state_dict(with_version(state, 2))
    assert_same_state(mine, expected)


def test_reading_changes_no_checkpoint() -> None:
    state = with_version(calibrate(ours("PerChannelMinMaxObserver")).state_dict(), 1)
    state["min_vals"] = state.pop("min_val")
    before = dict(state)
    ours("PerChannelMinMaxObserver").load_state_dict(state)
    assert state == before


# -------------------------------------------------------------------- copies, pickles, dtypes


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved_whole(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
def test_a_duplicate_is_whole_and_its_own(
    name: str, calibrated: bool, duplicate: Callable[[Any], Any]
) -> None:
    original = ours(name)
    if calibrated:
        calibrate(original)
    before = snapshot(original)
    copied = duplicate(original)
    assert_unchanged(copied, before)
    calibrate(copied, seed=3)
    assert_unchanged(original, before)
    assert_goes_on_like(duplicate(original), original)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("when", ["before", "after"])
def test_modules_convert_to_other_dtypes(name: str, dtype: torch.dtype, when: str) -> None:
    module = ours(name)
    if when == "before":
        module.to(dtype)
    calibrate(module)
    module.to(dtype)
    reference = calibrate(ours(name))
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for key, value in module.state_dict().items():
        expected = reference.state_dict()[key]
        if expected.is_floating_point():
            # Statistics and scales stay wide; what is learned is the model's.
            learned = name == "learnable" and not key.startswith("activation_post_process")
            narrow = dtype != torch.float64 and not learned
            assert value.dtype == (torch.float32 if narrow else dtype), key
            # A value near the edge of a bin may go next door: compare the total count.
            total = Tensor.sum if key.endswith("histogram") else Tensor.clone
            torch.testing.assert_close(
                total(value.float()), total(expected), rtol=tolerance, atol=tolerance
            )
        elif not key.endswith("zero_point"):
            assert_same(value, expected, key)
    x = torch.randn(5, 4).to(dtype)
    with quiet():
        assert module(x).dtype == dtype
    with quiet():
        scale, _ = module.calculate_qparams()
    assert bool((scale > 0).all())


@pytest.mark.torch_ao
def test_fixed_qparams_stay_shared_in_a_copy() -> None:
    copied = copy.deepcopy(ours("default_fixed_qparams_range_0to1_fake_quant"))
    assert copied.scale is copied.activation_post_process.scale


def torchs_pickled(name: str, calibrated: bool) -> Any:
    """What torch.ao has pickled, read under the patch."""
    module = theirs(name)
    if calibrated:
        calibrate(module)
    data = pickle.dumps(module)
    with fastquant.patch_torch_ao():
        return pickle.loads(data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_modules_that_torch_pickled_work_under_the_patch(name: str, calibrated: bool) -> None:
    if "fused" in name and calibrated:
        pytest.skip("torch's fused op has qparams of its own")
    module = torchs_pickled(name, calibrated)
    expected = ours(name)
    assert type(module) is type(expected)
    if calibrated:
        calibrate(expected)
    assert_goes_on_like(module, expected)
    copied = copy.deepcopy(torchs_pickled(name, calibrated))
    assert_goes_on_like(pickled(copied), expected_after(name, calibrated))
    assert not {key for key in module.state_dict() if "nonfinite" in key}


def expected_after(name: str, calibrated: bool) -> Any:
    return calibrate(ours(name)) if calibrated else ours(name)


def test_models_that_torch_pickled_work_under_the_patch() -> None:
    model = nn.Sequential(torch_quantization.QuantStub(), nn.Linear(4, 3)).eval()
    model.qconfig = torch_quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    x = torch.randn(5, 4)
    with quiet():
        prepared = torch_quantization.prepare(model)
        for module in prepared.modules():
            vars(module).pop("qconfig", None)  # which torch.ao has made one that cannot be pickled
        prepared(x)
        data = pickle.dumps(prepared)
        with fastquant.patch_torch_ao():
            read = pickle.loads(data)
        for each in (prepared, read):
            each(2 * x)
    for own, expected in zip(read, prepared, strict=True):
        assert type(own.activation_post_process) is observer.HistogramObserver
        assert_same_state(own, expected)


# Written by version 0.1.0: modules that have seen data[0] and data[1], prepared models that have
# seen images.
PICKLED = Path(__file__).parent / "data" / "pickled_modules.pt"


@pytest.mark.torch_ao
def test_modules_that_an_older_version_pickled_go_on_where_they_were() -> None:
    with quiet():
        read = torch.load(PICKLED, weights_only=False)
    data, images, modules = read["data"], read["images"], read["modules"]
    fresh: dict[str, Any] = {
        "minmax": observer.MinMaxObserver(),
        "average": observer.MovingAverageMinMaxObserver(),
        "channels": observer.PerChannelMinMaxObserver(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric
        ),
        "average_channels": observer.MovingAveragePerChannelMinMaxObserver(),
        "histogram": observer.HistogramObserver(bins=64),
        "fixed": observer.default_fixed_qparams_range_0to1_observer(),
        "fake_quantize": fake_quantize.default_fake_quant(),
        "fused": fake_quantize.default_fused_per_channel_wt_fake_quant(),
        "fixed_fake_quantize": fake_quantize.default_fixed_qparams_range_0to1_fake_quant(),
        "learnable": fake_quantize.LearnableFakeQuantize(observer.MovingAverageMinMaxObserver),
    }
    prepared = {modules.pop("prepared"), modules.pop("prepared_for_training")}
    assert modules.keys() == fresh.keys()
    for name, module in modules.items():
        for x in data[:2]:
            fresh[name](x)
        assert_same_state(module, fresh[name])
        for again in (module, pickled(module)):
            assert_same(again(data[2]), copy.deepcopy(fresh[name])(data[2]))
            again(data[1])
        fresh[name](data[2])
        fresh[name](data[1])
        assert_same_state(module, fresh[name])
    for model in prepared:
        with quiet():
            model(images)
            converted = fastquant.convert(model.eval())
        assert type(converted[1]).__name__ == "ConvReLU2d"
        assert converted(images).isfinite().all()


# ---------------------------------------------------------------------- devices and meta tensors


def prepared_for_training(device: str) -> nn.Module:
    with torch.device(device):
        model = nn.Sequential(fastquant.QuantStub(), nn.Linear(4, 4), fastquant.DeQuantStub())
        model.train().qconfig = fastquant.get_default_qat_qconfig("x86")  # type: ignore[assignment]
        return fastquant.prepare_qat(model)


@pytest.mark.parametrize("assign", [False, True])
def test_models_made_on_meta_are_whole_once_a_state_is_loaded(assign: bool) -> None:
    written, read = prepared_for_training("cpu"), prepared_for_training("meta")
    x = torch.randn(8, 4)
    written(x)
    if not assign:
        read.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read.load_state_dict(saved(written), assign=assign)
    assert_unchanged(read, snapshot(written))
    assert_same(read(2 * x), written(2 * x))
    assert_same_state(read, written)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN")
        fastquant.convert(read.eval())


def poison(fill: int) -> Callable[..., Tensor]:
    """torch.empty_like as unlucky as it may be."""
    empty_like = torch.empty_like
    return lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(fill)


@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_to_empty_leaves_no_count_undefined(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = observer.MinMaxObserver(factory_kwargs={"device": start})
    if start == "cpu":
        module(torch.tensor([1.0, float("nan")]))
    monkeypatch.setattr(torch, "empty_like", poison(10**18))
    module.to_empty(device="cpu")
    assert module.min_val > 1e17
    assert int(module.nonfinite_count) == (1 if start == "cpu" else 0)


def test_loading_a_state_starts_the_count_anew() -> None:
    """What a state's statistics have left out is not known."""
    module = observer.MinMaxObserver()
    module(torch.tensor([1.0, float("nan")]))
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    assert int(module.nonfinite_count) == 1
    module.load_state_dict(calibrate(observer.MinMaxObserver()).state_dict())
    assert int(module.nonfinite_count) == 0


def test_counts_move_with_their_observer() -> None:
    module = observer.MinMaxObserver()
    module(torch.tensor([1.0, float("nan")]))
    for move in (module.double, module.cpu, module.share_memory):
        move()
        assert int(module.nonfinite_count) == 1
    module.to("meta")
    assert module.nonfinite_count.is_meta


@pytest.mark.parametrize("name", ["MinMaxObserver", "PerChannelMinMaxObserver"])
def test_a_state_loads_into_parameters_in_the_place_of_buffers(name: str) -> None:
    written, read = calibrate(ours(name)), ours(name)
    for key in ("min_val", "max_val"):
        value = getattr(read, key).clone()
        delattr(read, key)
        setattr(read, key, nn.Parameter(value, requires_grad=key == "min_val"))
    read.load_state_dict(written.state_dict())
    for key in ("min_val", "max_val"):
        assert isinstance(getattr(read, key), nn.Parameter)
        assert_same(getattr(read, key).detach(), getattr(written, key))
    wrong = {**written.state_dict(), "min_val": torch.tensor(float("nan")).expand_as(read.min_val)}
    with pytest.raises(RuntimeError, match="finite and in order"):
        read.load_state_dict(wrong)
    assert_same(read.min_val.detach(), written.min_val)


@pytest.mark.parametrize(
    ("name", "replaced"),
    [("FakeQuantize", "scale"), ("FakeQuantize", "zero_point"), ("HistogramObserver", "max_val")],
)
def test_a_plain_tensor_in_the_place_of_a_buffer_is_saved(name: str, replaced: str) -> None:
    states = []
    for library in (torch_quantization, fastquant):
        with quiet():
            module = getattr(library, name)()
        module(torch.linspace(-1, 1, 9))
        value = getattr(module, replaced).clone()
        delattr(module, replaced)
        setattr(module, replaced, value)
        states.append(module.state_dict())
    theirs, mine = states
    assert list(mine) == list(theirs)
    assert_same(mine[replaced], theirs[replaced])


# ------------------------------------------------------------------- states of observers alone


class Model(nn.Module):
    """Two layers with an observer and a fake-quantizer each, as prepare leaves them."""

    def __init__(self, library: Callable[[str], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.first.activation_post_process = library("HistogramObserver")
        self.second = nn.Linear(4, 4)
        self.second.activation_post_process = library("default_fake_quant")
        self.second.weight_fake_quant = library("default_per_channel_weight_fake_quant")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first.activation_post_process(self.first(x))
        self.second.weight_fake_quant(self.second.weight)
        return self.second.activation_post_process(self.second(x))


@pytest.mark.torch_ao
@both_ways
def test_observer_states_move_between_models(
    source: Callable[[str], Any], target: Callable[[str], Any]
) -> None:
    written, read = calibrate(Model(source)), Model(target)
    linear = read.first.weight.detach().clone()
    state = get_observer_state_dict(written)
    expected = torch_observer.get_observer_state_dict(written)
    assert state.keys() == expected.keys()
    assert state._metadata == expected._metadata  # type: ignore[attr-defined]
    before = dict(state)
    load_observer_state_dict(read, state)
    assert dict(state) == before
    for name in ("first", "second"):
        assert_same_state(
            getattr(read, name).activation_post_process,
            getattr(written, name).activation_post_process,
        )
    assert_same(read.first.weight, linear)


@pytest.mark.torch_ao
def test_torchs_functions_take_our_observers() -> None:
    written, read = calibrate(Model(ours)), Model(ours)
    with quiet():
        torch_observer.load_observer_state_dict(
            read, torch_observer.get_observer_state_dict(written)
        )
    assert_same_state(read.second.activation_post_process, written.second.activation_post_process)


def test_an_eps_of_ones_own_survives() -> None:
    """torch.ao's load_observer_state_dict puts the default in its place."""

    def model() -> nn.Sequential:
        result = nn.Sequential(nn.Linear(4, 4))
        result[0].activation_post_process = observer.MinMaxObserver(eps=2**-12)
        return result

    written, read = model(), model()
    load_observer_state_dict(read, get_observer_state_dict(written))
    assert float(read[0].activation_post_process.eps) == 2**-12  # type: ignore[union-attr, arg-type]


@pytest.mark.torch_ao
def test_an_observers_state_must_be_whole_and_fit() -> None:
    state = get_observer_state_dict(calibrate(Model(ours)))
    partial = OrderedDict(state)
    del partial["first.activation_post_process.histogram"]
    with pytest.raises(RuntimeError, match=r"missing.*first\.activation_post_process\.histogram"):
        load_observer_state_dict(Model(ours), partial)
    wrong = OrderedDict(state)
    wrong["first.activation_post_process.histogram"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_observer_state_dict(Model(ours), wrong)


@pytest.mark.torch_ao
def test_observers_without_an_entry_keep_their_state() -> None:
    read = calibrate(Model(ours))
    before = snapshot(read)
    load_observer_state_dict(read, OrderedDict())
    assert_unchanged(read, before)


@pytest.mark.parametrize("q", [torch_quantization, fastquant])
def test_observers_of_weights_load_although_their_fake_quantizers_have_no_entry(q: Any) -> None:
    def prepared() -> Any:
        model = nn.Sequential(nn.Linear(3, 2)).train()
        model.qconfig = q.get_default_qat_qconfig("x86", 0)
        with quiet():
            return q.prepare_qat(model)

    written, read = prepared(), prepared()
    written(torch.randn(4, 3))
    q.observer.load_observer_state_dict(read, q.observer.get_observer_state_dict(written))
    seen = read[0].weight_fake_quant.activation_post_process
    assert_same_state(seen, written[0].weight_fake_quant.activation_post_process)


def test_a_users_hooks_and_extra_state_see_an_observers_state_once() -> None:
    calls: list[str] = []

    class Mine(fastquant.MinMaxObserver):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None:
            calls.append("extra state")

    module = fastquant.FakeQuantize(Mine)
    observer = module.activation_post_process
    observer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    observer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    module.load_state_dict(module.state_dict())
    assert calls == ["before", "extra state", "after"]
