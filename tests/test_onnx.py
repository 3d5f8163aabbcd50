"""Export to ONNX of models as prepare_qat leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_unchanged, quiet, snapshot
from zoo import prepared

pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run the result")

from fastquant import onnx  # noqa: E402

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


def trained(channels: int, backend: str = "x86") -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(fq.QuantStub(), nn.Conv2d(3, channels, 3), nn.ReLU(), fq.DeQuantStub())
    model.train().qconfig = fq.get_default_qat_qconfig(backend)  # type: ignore[assignment]
    prepared = fq.prepare_qat(model)
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    return prepared.eval(), x


def outputs(path: Path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_any_number_of_channels_is_exported(channels: int, tmp_path: Path) -> None:
    model, x = trained(channels)
    model.apply(fq.disable_observer)
    path = tmp_path / "model.onnx"
    onnx.export(model, (x,), str(path), verbose=False)
    expected = model(x)
    # A value on the edge between two steps of the grid may go either way.
    step = max(
        float(module.scale.max())
        for module in model.modules()
        if isinstance(module, fq.FakeQuantize)
    )
    torch.testing.assert_close(outputs(path, x), expected, rtol=0, atol=2 * step)


def test_a_channel_that_saw_nothing_is_exported_with_its_default_scale(tmp_path: Path) -> None:
    model, x = trained(4)
    observer: Any = model[1].weight_fake_quant.activation_post_process  # type: ignore[union-attr]
    observer.min_val[2], observer.max_val[2] = float("inf"), float("-inf")
    path = tmp_path / "model.onnx"
    onnx.export(model, (x,), str(path), verbose=False)
    assert outputs(path, x).isfinite().all()


def test_what_saw_nothing_at_all_is_refused_by_name() -> None:
    model, x = trained(4)
    model[1].activation_post_process.activation_post_process.reset_min_max_vals()  # type: ignore[union-attr, operator]
    with quiet(), pytest.raises(fq.QuantizationError, match="1 has observed nothing yet"):
        onnx.export(model, (x,), verbose=False)


def exported(model: nn.Module, *args: Tensor, **options: Any) -> Any:
    """The ONNX program, and a function that runs it."""
    with quiet():
        program = onnx.export(model, args, verbose=False, **options)
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(y)

    return program, run


def op_types(program: Any) -> list[str]:
    return [node.op_type for node in program.model.graph]


def fake_quantizer(per_channel: bool, quant_min: int, quant_max: int, symmetric: bool) -> Any:
    observer = (
        fq.MovingAveragePerChannelMinMaxObserver if per_channel else fq.MovingAverageMinMaxObserver
    )
    granularity = "channel" if per_channel else "tensor"
    scheme = getattr(torch, f"per_{granularity}_{'symmetric' if symmetric else 'affine'}")
    options: dict[str, Any] = {"ch_axis": 1} if per_channel else {}
    return fq.FakeQuantize(
        observer,
        quant_min,
        quant_max,
        dtype=torch.qint8 if quant_min < 0 else torch.quint8,
        qscheme=scheme,
        **options,
    )


def assert_same_but_for_ties(found: Tensor, expected: Tensor, x: Tensor, scale: Tensor) -> None:
    """Equal, but one step apart where `x / scale` is a half up to rounding."""
    steps = x.double() / scale
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    off = (found - expected).abs()
    assert (off[~tie] <= 1e-6 * expected.abs()[~tie]).all()
    assert (off <= scale * 1.001).all()
    assert tie.float().mean() < 0.01


@pytest.mark.parametrize(
    ("bounds", "symmetric"),
    [
        ((0, 255), False),
        ((-128, 127), True),
        ((0, 127), False),
        ((-127, 127), True),
        ((0, 15), True),
        ((-8, 7), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_onnx_runtime_rounds_as_fake_quantize_does(
    per_channel: bool, bounds: tuple[int, int], symmetric: bool
) -> None:
    module = fake_quantizer(per_channel, *bounds, symmetric)
    module(torch.randn(50, 3, 4) * torch.tensor([1.0, 3.0, 0.2])[:, None] + 0.3)
    module.disable_observer()
    x = torch.randn(50, 3, 4) * 6  # well beyond the range: both ends are clamped to
    program, run = exported(module, x)
    ops = op_types(program)
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == 1
    assert ops[ops.index("QuantizeLinear") + 1] == "DequantizeLinear"
    full = bounds in ((0, 255), (-128, 127))
    assert (len(ops) == 2) == full
    expected = module(x)
    scale = module.scale.reshape(-1, 1) if per_channel else module.scale
    assert_same_but_for_ties(run(x), expected, x, scale)
    assert len(run(x).unique()) > 10


def test_what_is_switched_off_and_observers_of_no_layer_leave_no_trace_in_onnx() -> None:
    model = prepared("qat").eval()
    model.apply(fq.disable_fake_quant)
    x = torch.randn(4, 3, 8, 8)
    program, run = exported(model, x)
    assert "QuantizeLinear" not in op_types(program)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    observed = nn.Sequential(nn.Linear(8, 4), fq.MinMaxObserver())
    program, run = exported(observed, x)
    assert "QuantizeLinear" not in op_types(program)
    torch.testing.assert_close(run(x), observed(x), rtol=1e-4, atol=1e-5)


def test_a_model_with_some_quantizers_switched_off_is_exported_as_it_evaluates() -> None:
    model = prepared("qat")
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    model.eval().apply(fq.disable_observer)
    model[1].activation_post_process.disable_fake_quant()  # type: ignore[union-attr, operator]
    before = snapshot(model)
    x = torch.randn(8, 3, 8, 8)
    program, run = exported(model, x)
    assert_unchanged(model, before)
    ops = op_types(program)
    quantizers = [
        m for m in model.modules() if isinstance(m, fq.FakeQuantizeBase) and m.fake_quant_enabled
    ]
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == len(quantizers)
    assert not {"BatchNormalization", "Div"} & set(ops)
    # Values near a half, and sums in another order, may move an output by a step or two.
    off = (run(x) - model(x)).abs() / model[4].activation_post_process.scale
    assert off.max() < 2.5
    assert off.mean() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fq.FakeQuantize, "layer has observed nothing yet"),
        (fq.default_per_channel_weight_fake_quant, "layer has observed nothing yet"),
        (
            lambda: fq.FakeQuantize(quant_min=-100000, quant_max=1000, dtype=torch.qint32),
            "layer quantizes to -100000 … 1000",
        ),
        (fq.default_embedding_fake_quant, "layer has floating zero points"),
        (fq.default_dynamic_fake_quant, "layer is dynamic"),
    ],
)
def test_what_onnx_cannot_hold_is_refused_by_name(make: Any, message: str) -> None:
    module = make()
    x = torch.randn(3, 4)
    if "nothing" not in message:
        module(x)
    model = nn.Sequential()
    model.add_module("layer", module)
    before = snapshot(model)
    with pytest.raises(fq.utils.QuantizationError, match=message):
        onnx.export(model, (x,), verbose=False)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
@pytest.mark.parametrize("backend", ["x86", "qnnpack", "fbgemm"])
def test_the_older_exporter_writes_what_differs_by_one_step_at_most(
    backend: str, tmp_path: Path
) -> None:
    model, x = trained(4, backend)
    for name, dynamo in (("new", True), ("old", False)):
        onnx.export(model, (x,), str(tmp_path / name), dynamo=dynamo, verbose=False)
    new, old = (outputs(tmp_path / name, x) for name in ("new", "old"))
    step = model[1].activation_post_process.scale  # type: ignore[union-attr]
    assert ((old - new).abs() / step).max() < 1.5  # type: ignore[operator]


def export_as_user_does(model: nn.Module, x: Tensor, path: Path) -> None:
    """By torch's own function, without fastquant.onnx."""
    torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=17, verbose=False)


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("observing", [False, True])
def test_torchs_older_exporter_takes_prepared_models(
    version: int, observing: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), fq.DeQuantStub())
    model.train().qconfig = fq.get_default_qat_qconfig("x86", version=version)  # type: ignore[assignment]
    prepared = fq.prepare_qat(model)
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    prepared.eval()
    if not observing:
        prepared.apply(fq.disable_observer)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    export_as_user_does(prepared, x, tmp_path / "old")
    for name, value in prepared.state_dict().items():
        assert torch.equal(value, before[name]), name
    onnx.export(prepared, (x,), str(tmp_path / "new"), dynamo=False, verbose=False)
    new, old = (outputs(tmp_path / name, x) for name in ("new", "old"))
    torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
@pytest.mark.parametrize(
    "make",
    [
        lambda: fq.FakeQuantize(fq.HistogramObserver),
        lambda: fq.LearnableFakeQuantize(fq.MovingAverageMinMaxObserver),
        fq.MinMaxObserver,
        fq.HistogramObserver,
        fq.default_fixed_qparams_range_0to1_fake_quant,
        lambda: fq.FakeQuantize(fq.MinMaxObserver, quant_min=-8, quant_max=7, dtype=torch.qint8),
    ],
    ids=["histogram fake-quantize", "learnable", "min/max", "histogram", "fixed", "four bits"],
)
def test_each_module_goes_through_torchs_older_exporter(make: Any, tmp_path: Path) -> None:
    module = make()
    x = torch.randn(6, 5)
    expected = module(x)
    export_as_user_does(nn.Sequential(nn.Identity(), module).eval(), x, tmp_path / "old")
    torch.testing.assert_close(outputs(tmp_path / "old", x), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
def test_what_is_switched_off_is_not_exported(tmp_path: Path) -> None:
    module = fq.default_fake_quant()
    x = torch.randn(6, 5)
    module(x)
    module.disable_fake_quant()
    export_as_user_does(nn.Sequential(nn.ReLU(), module).eval(), x, tmp_path / "old")
    assert torch.equal(outputs(tmp_path / "old", x), x.relu())


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
def test_what_onnx_cannot_hold_is_refused_in_words(tmp_path: Path) -> None:
    module = fq.FakeQuantize(fq.MinMaxObserver, quant_min=0, quant_max=1000, dtype=torch.qint32)
    module(torch.randn(6, 5))
    with pytest.raises(fq.QuantizationError, match="from opset 21 on"):
        export_as_user_does(module.eval(), torch.randn(6, 5), tmp_path / "old")


@pytest.mark.parametrize("dynamo", [True, False])
def test_models_in_which_nothing_quantizes_are_refused(dynamo: bool, tmp_path: Path) -> None:
    model = fq.QuantWrapper(nn.Linear(5, 4)).eval()
    without_config = fq.prepare(model)
    for plain in (model, without_config, nn.ReLU()):
        with pytest.raises(fq.QuantizationError, match=r"nothing would be quantized: prepare it"):
            onnx.export(plain, (torch.randn(6, 5),), tmp_path / "model.onnx", dynamo=dynamo)
    assert not list(tmp_path.iterdir())
