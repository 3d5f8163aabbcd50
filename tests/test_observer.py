"""Observers beside torch.ao's: same streams in, same statistics and qparams out."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.ao.quantization.observer as torch_observer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastquant import observer
from fastquant.utils import QuantizationError
from oracle import (
    PER_CHANNEL,
    PER_TENSOR,
    assert_same,
    assert_same_qparams,
    assert_same_state,
    assert_unchanged,
    configs,
    feed,
    make_both,
    observed,
    quiet,
    rounded_past,
    snapshot,
)
from strategies import FLOATS

RANGE_OBSERVERS = (
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
)
MIN_MAX = RANGE_OBSERVERS[:4]
OWN_KEYWORDS = {"nonfinite", "search_levels", "range_method", "percentile"}


def is_per_channel(name: str) -> bool:
    return "PerChannel" in name


def symmetric(name: str) -> torch.qscheme:
    return torch.per_channel_symmetric if is_per_channel(name) else torch.per_tensor_symmetric


def make(name: str, **kwargs: Any) -> Any:
    return getattr(observer, name)(**kwargs)


# -------------------------------------------------------------------------------- statistics


@given(data=st.data())
@settings(max_examples=150)
def test_min_max_observers_are_torchs(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(MIN_MAX))
    per_channel = is_per_channel(name)
    config = data.draw(configs(PER_CHANNEL if per_channel else PER_TENSOR))
    if "Moving" in name:
        config["averaging_constant"] = data.draw(st.sampled_from((0.01, 0.5, 1, 0.3)))
    if per_channel:
        config["ch_axis"] = data.draw(st.integers(-2, 1))
    both = make_both(getattr(observer, name), getattr(torch_observer, name), **config)
    if both is None:
        return
    stream = data.draw(observed(dtypes=FLOATS, ch_axis=config.get("ch_axis")))
    feed(both, stream)
    assert_same_state(*both)
    if rounded_past(both[1]):
        both[0].calculate_qparams()
    else:
        assert_same_qparams(*both)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_other_floating_dtypes_are_observed_as_their_values(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 5).to(dtype)
    ours, reference = make(name), make(name)
    ours(x)
    reference(x.float())
    assert_same_state(ours, reference)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_observing_keeps_gradients_and_builds_no_graph(name: str) -> None:
    ours = make(name)
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        y = ours(x)
        y.square().sum().backward()
        assert_same(x.grad, 2 * x.detach())
        x.grad = None
    assert not any(buffer.requires_grad for buffer in ours.buffers())


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_what_is_observed_in_inference_mode_can_go_on_outside(name: str) -> None:
    ours, reference = make(name), make(name)
    x = torch.randn(3, 4)
    with torch.inference_mode():
        ours(x)
    ours(3 * x)
    feed([reference], [x, 3 * x])
    assert_same_state(ours, reference)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_an_empty_tensor_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    ours = make(name)
    empty = torch.empty(shape)
    for _ in range(2):
        before = snapshot(ours)
        assert ours(empty) is empty
        assert_unchanged(ours, before)
        ours(torch.randn(3, 3))


def test_averages_that_round_past_each_other_are_a_range() -> None:
    ours = make("MovingAverageMinMaxObserver")
    ours(torch.tensor([0.75, 0.75]))
    ours.min_val.fill_(torch.nextafter(torch.tensor(0.75), torch.tensor(1.0)))
    assert float(ours.calculate_qparams()[0]) == pytest.approx(0.75 / 255)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_reset_forgets(name: str) -> None:
    ours = make(name)
    before = snapshot(ours)
    ours(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]))
    assert int(ours.nonfinite_count) == 1
    ours.reset_min_max_vals()
    assert_unchanged(ours, before)


def test_buffers_follow_factory_kwargs() -> None:
    ours = observer.PerChannelMinMaxObserver(factory_kwargs={"dtype": torch.float64})
    ours(torch.randn(3, 4, dtype=torch.float64))
    assert ours.min_val.dtype == ours.max_val.dtype == ours.eps.dtype == torch.float64
    assert ours.calculate_qparams()[0].dtype == torch.float64


# ------------------------------------------------------------------------- non-finite values


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_non_finite_values_are_left_out_and_counted(name: str) -> None:
    inf, nan = float("inf"), float("nan")
    ours, reference = make(name), make(name)
    ours(torch.tensor([[1.0, nan, -2.0], [inf, 3.0, -inf]]))
    ours(torch.tensor([[1.0, 0.0, -2.0], [nan, 3.0, 4.0]]))
    # The same without: repeating another value of the channel changes no minimum or maximum.
    reference(torch.tensor([[1.0, 1.0, -2.0], [3.0, 3.0, 3.0]]))
    reference(torch.tensor([[1.0, 0.0, -2.0], [3.0, 3.0, 4.0]]))
    assert int(ours.nonfinite_count) == 4
    assert int(reference.nonfinite_count) == 0
    for buffer in ("min_val", "max_val"):
        assert_same(getattr(ours, buffer), getattr(reference, buffer))
    if name == "HistogramObserver":
        assert float(ours.histogram.sum()) == 8


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("warm", [False, True])
def test_non_finite_values_are_refused_on_request(name: str, warm: bool) -> None:
    ours = make(name, nonfinite="raise")
    if warm:
        ours(torch.randn(2, 3))
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"x has 1 non-finite element.* of 6"):
        ours(torch.tensor([[1.0, float("nan"), -2.0], [1.0, 3.0, 2.0]]))
    assert_unchanged(ours, before)


@pytest.mark.parametrize("name", MIN_MAX)
def test_non_finite_values_propagate_on_request_as_in_torch(name: str) -> None:
    x = torch.tensor([[1.0, float("nan"), -2.0], [1.0, float("inf"), 2.0]])
    ours = make(name, nonfinite="propagate")
    with quiet():
        theirs = getattr(torch_observer, name)()
    feed((ours, theirs), [x, x])
    assert_same_state(ours, theirs)
    assert int(ours.nonfinite_count) == 0
    with pytest.raises(QuantizationError, match="not finite"):
        ours.calculate_qparams()


def test_a_channel_without_a_finite_value_gets_the_default() -> None:
    ours = observer.PerChannelMinMaxObserver()
    ours(torch.tensor([[1.0, 2.0], [float("nan"), float("nan")]]))
    with pytest.warns(UserWarning, match=r"channels \[1\]"):
        scale, zero_point = ours.calculate_qparams()
    assert_same(scale[1], torch.tensor(1.0))
    assert int(zero_point[1]) == 0
    assert float(scale[0]) == pytest.approx(2 / 255)


@pytest.mark.parametrize("name", [n for n in RANGE_OBSERVERS if "PerChannel" in n])
def test_channels_that_never_had_a_finite_value_get_a_default_each(name: str) -> None:
    ours = make(name)
    ours(torch.full((3, 2), float("nan")))
    with pytest.warns(UserWarning, match=r"channels \[0, 1, 2\]"):
        scale, zero_point = ours.calculate_qparams()
    assert scale.tolist() == [1.0] * 3
    assert zero_point.tolist() == [0] * 3


@pytest.mark.parametrize("qscheme", PER_TENSOR)
def test_a_scale_is_never_zero(qscheme: torch.qscheme) -> None:
    ours = observer.MinMaxObserver(eps=0.0, qscheme=qscheme, dtype=torch.qint8)
    ours(torch.zeros(3))
    assert_same(ours.calculate_qparams()[0], torch.ones(1))
    ours(torch.tensor([1e-30]))
    assert 0 < float(ours.calculate_qparams()[0]) < 1e-30


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"nonfinite.*'ignore'.*got 'skip'"):
        observer.MinMaxObserver(nonfinite="skip")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "x must be a tensor, got list"),
        (None, TypeError, "x must be a tensor, got NoneType"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "floating dtype.*complex64"),
        (torch.ones(2, 3, device="meta"), ValueError, "must be on x's device, meta, got cpu"),
        (torch.eye(3).to_sparse(), TypeError, "dense tensor.*got layout torch.sparse_coo"),
        (torch.ones(2, 3).to_mkldnn(), TypeError, "dense tensor.*got layout torch._mkldnn"),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            TypeError,
            "dense tensor.*got a nested tensor",
        ),
    ],
)
def test_what_cannot_be_observed_is_refused(
    name: str, warm: bool, x: Any, error: type[Exception], message: str
) -> None:
    ours = make(name)
    if warm:
        ours(torch.randn(2, 3))
    before = snapshot(ours)
    with pytest.raises(error, match=message):
        ours(x)
    assert_unchanged(ours, before)


@pytest.mark.parametrize("name", [n for n in MIN_MAX if is_per_channel(n)])
def test_channels_must_fit(name: str) -> None:
    ours = make(name, ch_axis=1)
    with pytest.raises(ValueError, match=r"ch_axis=1 is out of range for x of shape \[3\]"):
        ours(torch.randn(3))
    with pytest.raises(ValueError, match="0-dim"):
        ours(torch.tensor(3.0))
    assert ours.min_val.shape == (0,)
    ours(torch.randn(2, 3))
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"min_val .* 4 channels of x .*got shape \[3\]"):
        ours(torch.randn(2, 4))
    with pytest.raises(ValueError, match="1 channels"):
        ours(torch.randn(2, 1))
    assert_unchanged(ours, before)


def test_a_buffer_of_another_size_is_named() -> None:
    ours = observer.MinMaxObserver()
    ours.max_val = torch.zeros(3)
    with pytest.raises(ValueError, match=r"max_val must have one element, got shape \[3\]"):
        ours(torch.randn(2))


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_an_uncalibrated_observer_warns_and_gives_the_default(name: str) -> None:
    with quiet():
        theirs = getattr(torch_observer, name)()
    ours = make(name)
    with pytest.warns(UserWarning, match="must run observer"):
        ours.calculate_qparams()
    assert_same_qparams(ours, theirs)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize(
    ("low", "high"), [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (-float("inf"), 0.0)]
)
def test_a_range_that_is_none_has_no_qparams(name: str, low: float, high: float) -> None:
    if low > high and "Moving" in name:
        pytest.skip("moving averages of one value may round past each other")
    ours = make(name)
    ours(torch.randn(2, 3))
    ours.min_val.fill_(low)
    ours.max_val.fill_(high)
    with pytest.raises(QuantizationError, match="min_val="):
        ours.calculate_qparams()


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("MinMaxObserver", {"qscheme": torch.per_channel_affine}, NotImplementedError),
        ("HistogramObserver", {"qscheme": torch.per_channel_affine}, NotImplementedError),
        ("PerChannelMinMaxObserver", {"qscheme": torch.per_tensor_affine}, NotImplementedError),
        ("PerChannelMinMaxObserver", {"is_dynamic": True}, NotImplementedError),
        ("MovingAverageMinMaxObserver", {"is_dynamic": True}, NotImplementedError),
        ("HistogramObserver", {"is_dynamic": True}, NotImplementedError),
        ("MinMaxObserver", {"quant_min": 5, "quant_max": 9}, QuantizationError),
        ("MinMaxObserver", {"quant_min": 0, "quant_max": 0}, QuantizationError),
        ("MinMaxObserver", {"quant_min": -300, "quant_max": 0, "dtype": torch.qint8}, ValueError),
        ("MinMaxObserver", {"dtype": torch.float32}, QuantizationError),
        ("MinMaxObserver", {"bogus": 1}, TypeError),
        ("MinMaxObserver", {"eps": -1e-9}, QuantizationError),
        ("HistogramObserver", {"eps": float("nan")}, QuantizationError),
        ("PerChannelMinMaxObserver", {"eps": float("inf")}, QuantizationError),
        ("MovingAverageMinMaxObserver", {"averaging_constant": 1.5}, QuantizationError),
        (
            "MovingAveragePerChannelMinMaxObserver",
            {"averaging_constant": float("nan")},
            QuantizationError,
        ),
        ("HistogramObserver", {"bins": 0}, QuantizationError),
        ("HistogramObserver", {"search_levels": "all"}, QuantizationError),
    ],
)
def test_what_cannot_be_configured_is_refused(
    name: str, config: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(name, **config)


def test_torchs_errors_can_still_be_caught() -> None:
    with pytest.raises(AssertionError, match="quant_min"):
        observer.MinMaxObserver(quant_min=5, quant_max=9)


@pytest.mark.torch_ao
@pytest.mark.parametrize("name", MIN_MAX)
def test_a_symmetric_quint8_range_cannot_be_reduced(name: str) -> None:
    with pytest.raises(NotImplementedError, match="reduce_range"):
        make(name, dtype=torch.quint8, qscheme=symmetric(name), reduce_range=True)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_symmetric_range_of_a_plain_dtype_is_reduced(name: str, dtype: torch.dtype) -> None:
    scales = []
    for reduced in (False, True):
        ours = make(name, dtype=dtype, qscheme=symmetric(name), reduce_range=reduced)
        ours(torch.linspace(-1, 1, 12).reshape(3, 4))
        scales.append(ours.calculate_qparams()[0])
    torch.testing.assert_close(scales[1] / scales[0], torch.full_like(scales[0], 255 / 127))


def test_reduce_range_does_not_nag() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer.MinMaxObserver(reduce_range=True)
        observer.HistogramObserver(reduce_range=True)


# --------------------------------------------------------------- observers that keep no range


def test_a_recording_is_of_copies() -> None:
    ours = observer.RecordingObserver()
    x = torch.ones(2, requires_grad=True)
    assert ours(x) is x
    with torch.no_grad():
        x.zero_()
    (recorded,) = ours.get_tensor_value()
    assert_same(recorded, torch.ones(2))
    assert not recorded.requires_grad


@pytest.mark.parametrize(
    "name", ["PlaceholderObserver", "NoopObserver", "ReuseInputObserver", "RecordingObserver"]
)
def test_where_nothing_is_observed_there_are_no_qparams(name: str) -> None:
    ours = make(name)
    x = torch.randn(2)
    assert ours(x) is x
    with pytest.raises(RuntimeError, match=name):
        ours.calculate_qparams()


def test_compute_dtype_still_means_dynamic() -> None:
    with pytest.warns(UserWarning, match="is_dynamic"):
        assert observer.PlaceholderObserver(compute_dtype=torch.quint8).is_dynamic


def test_fixed_qparams_are_given() -> None:
    ours = observer.FixedQParamsObserver(scale=0.5, zero_point=3)
    with quiet():
        theirs = torch_observer.FixedQParamsObserver(scale=0.5, zero_point=3)
    assert_same_state(ours, theirs)
    assert_same_qparams(ours, theirs)
    with pytest.raises(NotImplementedError):
        observer.FixedQParamsObserver(scale=0.5, zero_point=3, is_dynamic=True)


# ------------------------------------------------------------------- the same names as torch.ao

CLASSES = [
    name
    for name in torch_observer.__all__
    if inspect.isclass(getattr(torch_observer, name)) and not name.startswith("default")
]
DEFAULTS = [name for name in torch_observer.__all__ if "default" in name or "range_neg" in name]


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_take_what_torchs_take(name: str) -> None:
    def parameters(cls: type) -> list[tuple[str, Any, Any]]:
        return [
            (p.name, p.kind, p.default)
            for p in inspect.signature(cls).parameters.values()
            if p.name not in OWN_KEYWORDS
        ]

    assert parameters(getattr(observer, name)) == parameters(getattr(torch_observer, name))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_related_as_torchs(name: str) -> None:
    def bases(cls: type) -> list[str]:
        return [b.__name__ for b in cls.__mro__ if b.__name__ in torch_observer.__all__]

    assert bases(getattr(observer, name)) == bases(getattr(torch_observer, name))


def config_of(factory: Any) -> tuple[str, dict[str, Any]]:
    """Class and arguments of a default, whether it is a class or a partial one."""
    if inspect.isclass(factory):
        return factory.__name__, {}
    return factory.p.func.__name__, factory.p.keywords


def public_state(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes a user may read."""
    own = {*OWN_KEYWORDS, "training"}
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in own}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_torchs(name: str) -> None:
    ours, theirs = getattr(observer, name), getattr(torch_observer, name)
    assert config_of(ours) == config_of(theirs)
    with quiet():
        mine, expected = ours(), theirs()
    assert public_state(mine) == public_state(expected)
    assert_same_state(mine, expected)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_attributes_are_torchs(name: str) -> None:
    with quiet():
        expected = getattr(torch_observer, name)()
    assert public_state(make(name)) == public_state(expected)


def test_partial_constructors_nest_override_and_pickle() -> None:
    factory = observer.MinMaxObserver.with_args(quant_min=0, quant_max=15)
    factory = factory.with_args(quant_max=7).with_callable_args(eps=lambda: 0.5)
    made = factory()
    assert (made.quant_min, made.quant_max, float(made.eps)) == (0, 7, 0.5)
    assert float(factory(eps=0.25).eps) == 0.25
    assert factory() is not factory()
    copied = pickle.loads(pickle.dumps(observer.default_histogram_observer))
    assert copied.p.keywords == observer.default_histogram_observer.p.keywords
    assert "MinMaxObserver" in repr(factory)


def test_callable_args_are_evaluated_at_each_call() -> None:
    values = iter((0.5, 0.25))
    factory = observer.MinMaxObserver.with_callable_args(eps=lambda: next(values))
    assert [float(factory().eps) for _ in range(2)] == [0.5, 0.25]


# ------------------------------------------------------------------------------- users' classes


class Percentile(observer.UniformQuantizationObserverBase):
    """A user's observer on our base, written as for torch.ao."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.low, self.high = x.quantile(torch.tensor([0.01, 0.99]))
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self._calculate_qparams(self.low, self.high)


def test_users_observers_work_on_our_base() -> None:
    ours = Percentile(quant_min=0, quant_max=127)
    ours(torch.linspace(-1, 1, 101))
    scale, zero_point = ours.calculate_qparams()
    assert float(scale) == pytest.approx(1.96 / 127)
    assert int(zero_point) == 64
    with pytest.raises(NotImplementedError):
        ours.reset_min_max_vals()


def test_a_range_changed_by_hand_counts() -> None:
    ours = observer.MinMaxObserver()
    ours(torch.tensor([0.0, 1.0]))
    ours.quant_max = 15
    assert float(ours.calculate_qparams()[0]) == pytest.approx(1 / 15)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_repr_shows_the_range(name: str) -> None:
    assert "min_val" in repr(make(name))


# ------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_observers_leave_a_compiled_graph_whole(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    ours = make(name)
    ours(torch.randn(3, 4))
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 3.0):
        x = torch.randn(3, 4) * scale
        assert_same(compiled(x), eager(x))
    assert_same_state(ours, eager)


def test_the_first_tensor_of_a_compiled_per_channel_observer_only_breaks_the_graph() -> None:
    torch._dynamo.reset()
    ours, eager = observer.PerChannelMinMaxObserver(), observer.PerChannelMinMaxObserver()
    compiled = torch.compile(ours, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 4)
        compiled(x)
        eager(x)
    assert_same_state(ours, eager)
