"""Calibration: what the observers see, what is restored, interruptions, bad input."""

from __future__ import annotations

import io
import signal
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastquant
from fastquant import calibrate
from fastquant.observer import get_observer_state_dict, load_observer_state_dict
from oracle import assert_same, assert_same_state
from zoo import OBSERVERS, every_observer

BATCHES = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 2)]
SAMPLES = sum(map(len, BATCHES))
TARGET = torch.zeros(1)
Pair = namedtuple("Pair", "x target")


@pytest.fixture(autouse=True)
def keyboard_interrupts() -> Iterator[None]:
    """Interrupts raise, also where the tests run in the background and were told to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Net(nn.Module):
    """Three observed places: `quant`, `first`, `second`. `watch` is called between the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = fastquant.QuantStub()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)
        self.watch: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.quant(x))
        self.watch()
        return self.dropout(self.second(x))


def prepared(q: Any = fastquant, qconfig: str = "default_qconfig", prepare: str = "prepare") -> Net:
    torch.manual_seed(0)
    model = Net().train(prepare == "prepare_qat")
    model.qconfig = getattr(q, qconfig)
    result = getattr(q, prepare)(model)
    assert isinstance(result, Net)
    return result


def statistics(model: nn.Module) -> dict[str, Tensor]:
    names = ("min_val", "max_val", "histogram", "scale", "zero_point")
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(names)}


def after(batches: list[Tensor], model: Net | None = None) -> dict[str, Tensor]:
    """The statistics of a plain evaluation loop over these batches."""
    model = (model or prepared()).eval()
    with torch.no_grad():
        for x in batches:
            model(x)
    return statistics(model)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from BATCHES


EQUAL_BATCHES = list(torch.cat(BATCHES).split(5))
DATA: dict[str, tuple[Any, list[Tensor]]] = {
    "tensors": (BATCHES, BATCHES),
    "generator": ((x for x in BATCHES), BATCHES),
    "tuples": ([(x, TARGET) for x in BATCHES], BATCHES),
    "lists": ([[x, TARGET] for x in BATCHES], BATCHES),
    "named tuples": ([Pair(x, TARGET) for x in BATCHES], BATCHES),
    "dicts": ([{"x": x} for x in BATCHES], BATCHES),
    "dict and target": ([({"x": x}, TARGET) for x in BATCHES], BATCHES),
    "DataLoader": (
        DataLoader(TensorDataset(torch.cat(BATCHES), torch.zeros(SAMPLES)), batch_size=5),
        EQUAL_BATCHES,
    ),
    "DataLoader of a stream": (DataLoader(Stream(), batch_size=None), BATCHES),
}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_gives_the_statistics_of_a_plain_loop(kind: str) -> None:
    data, batches = DATA[kind]
    model = prepared()
    done = calibrate(model, data, progress=False)
    assert_same(statistics(model), after(batches))
    assert (done.batches, done.samples) == (len(batches), SAMPLES)
    assert done.seconds > 0


@pytest.mark.parametrize(
    ("q", "qconfig", "prepare"),
    [
        (fastquant, "default_per_channel_qconfig", "prepare"),
        (fastquant, "default_qat_qconfig", "prepare_qat"),
        (torch_ao, "default_qconfig", "prepare"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
def test_every_kind_of_prepared_model(q: Any, qconfig: str, prepare: str) -> None:
    model = prepared(q, qconfig, prepare)
    calibrate(model, BATCHES, progress=False)
    got = statistics(model)
    assert_same(got, after(BATCHES, prepared(q, qconfig, prepare)))
    assert any("min_val" in name and value.isfinite().all() for name, value in got.items())


def test_a_single_observer_is_a_model_too() -> None:
    observer = fastquant.MinMaxObserver()
    calibrate(observer, BATCHES, progress=False)
    assert observer.max_val == torch.cat(BATCHES).max()


def test_a_calibrated_model_converts_and_computes() -> None:
    model = prepared().eval()
    reference = model.second(model.first(BATCHES[0])).detach()
    calibrate(model, BATCHES, progress=False)
    converted = fastquant.convert(model)
    x = torch.quantize_per_tensor(
        BATCHES[0], float(converted.quant.scale), int(converted.quant.zero_point), torch.quint8
    )
    out = converted.second(converted.first(x)).dequantize()
    assert (out - reference).abs().max() < 0.1


def test_batches_stops_early_and_takes_no_more_than_it_needs() -> None:
    stream = iter(BATCHES)
    model = prepared()
    done = calibrate(model, stream, batches=2, progress=False)
    assert done.batches == 2
    assert next(stream) is BATCHES[2]
    assert_same(statistics(model), after(BATCHES[:2]))


def test_batches_may_exceed_the_data() -> None:
    assert calibrate(prepared(), BATCHES, batches=100, progress=False).batches == len(BATCHES)


def test_forward_runs_the_batch() -> None:
    model = prepared()
    data = [{"image": x, "name": "a string"} for x in BATCHES]
    done = calibrate(model, data, forward=lambda m, batch: m(batch["image"]), progress=False)
    assert_same(statistics(model), after(BATCHES))
    assert done.samples == SAMPLES


class _OfTwo(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = prepared()

    def forward(self, x: Any, scale: float) -> Tensor:
        return self.inner(x * scale)


class _OfADict(_OfTwo):
    """Takes one argument, a dict."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.inner(batch["x"] + batch["shift"])


@pytest.mark.parametrize(
    ("model", "batch", "call"),
    [
        (_OfTwo, BATCHES[0], "model(batch)"),
        (_OfTwo, (BATCHES[0], 2.0), "model(batch[0])"),
        (_OfADict, {"x": BATCHES[0], "shift": 1}, "model(**batch)"),
        (_OfADict, ({"x": BATCHES[0], "shift": 1}, 3), "model(**batch[0])"),
    ],
)
def test_a_batch_that_does_not_fit_the_forward_says_how_to_call_it(
    model: type[nn.Module], batch: Any, call: str
) -> None:
    with pytest.raises(TypeError, match=r"forward\(\) .*argument") as caught:
        calibrate(model(), [batch], progress=False)
    assert call in str(caught.value)
    assert "forward=lambda model, batch" in str(caught.value)


def test_a_type_error_of_the_model_itself_stays_as_it_is() -> None:
    with pytest.raises(TypeError) as caught:
        calibrate(_OfADict(), [{"batch": {"x": BATCHES[0], "shift": "a"}}], progress=False)
    assert "forward=" not in str(caught.value)


def test_runs_in_eval_mode_without_gradients_and_restores_both() -> None:
    model = prepared()
    model.train()
    model.second.eval()
    before = [module.training for module in model.modules()]
    seen = []

    def watch() -> None:
        seen.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))

    model.watch = watch
    calibrate(model, BATCHES, progress=False)
    assert seen == [(False, False)] * len(BATCHES)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_what_a_model_keeps_from_its_forward_can_be_trained_on() -> None:
    model = prepared(qconfig="default_debug_qconfig")
    calibrate(model, BATCHES, progress=False)
    (record,) = model.quant.activation_post_process.get_tensor_value()[:1]
    nn.Linear(4, 1)(record).sum().backward()  # an inference tensor would raise


def test_an_error_in_the_model_restores_modes_and_keeps_statistics() -> None:
    model = prepared()
    model.train()
    model.quant.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="shapes"):
        calibrate(model, [BATCHES[0], torch.ones(1, 7)], progress=False)
    assert [module.training for module in model.modules()] == before
    assert_same(
        {k: v for k, v in statistics(model).items() if not k.startswith("quant")},
        {k: v for k, v in after(BATCHES[:1]).items() if not k.startswith("quant")},
    )


# --- interruption ---------------------------------------------------------------------------


def test_interruption_waits_for_the_end_of_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    model = prepared()
    model.train()
    calls = iter(range(10))
    # In the second batch, after `first` was observed and before `second` was.
    model.watch = lambda: signal.raise_signal(signal.SIGINT) if next(calls) == 1 else None
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, BATCHES)
    assert_same(statistics(model), after(BATCHES[:2]))
    assert model.training
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is handler
    shown = capsys.readouterr().err
    assert "2/3" in shown
    assert shown.endswith("\n")  # a bar left open stays on its line

    # What was gathered can be built on.
    model.watch = lambda: None
    calibrate(model, BATCHES[2:], progress=False)
    assert_same(statistics(model), after(BATCHES))


def test_a_second_interruption_acts_at_once() -> None:
    model = prepared()

    def watch() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second interruption was held back too")

    model.watch = watch
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, BATCHES, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler


def test_interruption_while_data_is_loaded() -> None:
    def data() -> Iterator[Tensor]:
        yield BATCHES[0]
        signal.raise_signal(signal.SIGINT)
        yield BATCHES[1]

    model = prepared()
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, data(), progress=False)
    assert_same(statistics(model), after(BATCHES[:1]))


def test_runs_in_any_thread() -> None:
    model = prepared()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(calibrate(model, BATCHES, progress=False))
    )
    thread.start()
    thread.join()
    assert [result.batches for result in results] == [len(BATCHES)]
    assert_same(statistics(model), after(BATCHES))


@every_observer
def test_interrupted_calibration_goes_on_from_its_saved_state(name: str) -> None:
    batches = [torch.randn(6, 5) for _ in range(6)]
    whole, first, second = (
        nn.Sequential(OrderedDict(activation_post_process=OBSERVERS[name]())) for _ in range(3)
    )
    calibrate(whole, batches, progress=False)
    calibrate(first, batches[:2], progress=False)
    file = io.BytesIO()
    torch.save(get_observer_state_dict(first), file)
    load_observer_state_dict(second, torch.load(io.BytesIO(file.getvalue())))
    calibrate(second, batches[2:], progress=False)
    assert_same_state(second, whole)


# --- devices --------------------------------------------------------------------------------


def test_batches_are_moved_to_the_device_of_the_model() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
    batch = {"x": BATCHES[0], "pair": Pair([BATCHES[1]], "kept"), "packed": packed}
    seen = []
    # A device that is not there, which fake tensors can be on all the same.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch_ao.MinMaxObserver(factory_kwargs={"device": "cuda"})
        calibrate(model, [batch], forward=lambda _, moved: seen.append(moved), progress=False)
    (moved,) = seen
    assert moved["x"].is_cuda
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].x[0].is_cuda
    assert moved["pair"].target == "kept"
    assert moved["packed"].data.is_cuda
    assert not BATCHES[0].is_cuda


def test_a_model_on_several_devices_is_refused() -> None:
    model = prepared()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.register_buffer("elsewhere", torch.empty(1, device="cuda"))
    with pytest.raises(ValueError, match=r"one device.*cpu.*cuda"):
        calibrate(model, BATCHES, progress=False)


# --- non-finite values ----------------------------------------------------------------------


def test_nonfinite_values_are_reported_once_by_layer_and_for_this_run() -> None:
    model = prepared()
    bad = BATCHES[0].clone()
    bad[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.warns(UserWarning, match="left out") as caught:
        calibrate(model, [bad, *BATCHES], progress=False)
    (warning,) = caught
    message = str(warning.message)
    # Row 0 has two of them; each linear layer makes its whole row of it.
    assert "quant (2), first (4), second (2)" in message
    assert warning.filename == __file__
    for name, value in statistics(model).items():
        assert value.isfinite().all(), name

    with pytest.warns(UserWarning, match=r"quant \(2\), first \(4\), second \(2\)"):
        calibrate(model, [bad], progress=False)


@pytest.mark.filterwarnings("error")
def test_finite_data_warns_of_nothing() -> None:
    calibrate(prepared(), BATCHES, progress=False)


# --- progress -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "batches", "shown"),
    [(BATCHES, None, "3/3"), (BATCHES, 2, "2/2"), (BATCHES, 100, "3/3"), (iter(BATCHES), 2, "2/2")],
)
def test_progress_knows_the_end(
    data: Any, batches: int | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(prepared(), data, batches=batches)
    assert shown in capsys.readouterr().err


def test_progress_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(prepared(), BATCHES, progress=False)
    assert capsys.readouterr() == ("", "")


# --- bad input ------------------------------------------------------------------------------


def converted() -> nn.Module:
    model = prepared()
    calibrate(model, BATCHES, progress=False)
    return fastquant.convert(model.eval())


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (lambda: calibrate("resnet", BATCHES), TypeError, r"model .*Module, got str"),  # type: ignore[arg-type]
    "not prepared": (lambda: calibrate(Net(), BATCHES), ValueError, r"Net.*no observers.*prepare"),
    "converted": (lambda: calibrate(converted(), BATCHES), ValueError, r"converted model"),
    "meta": (lambda: calibrate(prepared().to("meta"), BATCHES), ValueError, r"meta device"),
    "data is a tensor": (lambda: calibrate(prepared(), BATCHES[0]), TypeError, r"data .*\[batch\]"),
    "data is a dict": (lambda: calibrate(prepared(), {"x": 1}), TypeError, r"data .*one dict"),
    "data not iterable": (lambda: calibrate(prepared(), 3), TypeError, r"data .*got int"),  # type: ignore[arg-type]
    "empty data": (lambda: calibrate(prepared(), []), ValueError, r"data is empty"),
    "empty tuple": (lambda: calibrate(prepared(), [()]), ValueError, r"empty tuple"),
    "batches 0": (lambda: calibrate(prepared(), BATCHES, batches=0), ValueError, r"batches .*0"),
    "batches -1": (lambda: calibrate(prepared(), BATCHES, batches=-1), ValueError, r"batches .*-1"),
    "batches True": (
        lambda: calibrate(prepared(), BATCHES, batches=True),
        TypeError,
        r"batches .*bool",
    ),
    "batches 1.5": (
        lambda: calibrate(prepared(), BATCHES, batches=1.5),  # type: ignore[arg-type]
        TypeError,
        r"batches .*float",
    ),
    "forward": (
        lambda: calibrate(prepared(), BATCHES, forward="x"),  # type: ignore[arg-type]
        TypeError,
        r"forward .*callable.*str",
    ),
    "batch of strings": (
        lambda: calibrate(prepared(), ["a"]),
        TypeError,
        r"got str.*forward",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
