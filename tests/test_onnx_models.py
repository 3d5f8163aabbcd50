"""Export to ONNX of models as they are converted natively, and what onnxruntime makes of them."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant as fq
import fastquant.nn.quantized as native
from oracle import assert_unchanged, quiet, snapshot
from zoo import short_torchvision_model

pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run the result")

import onnx as standard  # noqa: E402

from fastquant import onnx  # noqa: E402

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


class Quantized(nn.Module):
    """A function of quantized tensors between stubs, and the modules that it calls."""

    def __init__(self, body: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.parts, self.body = nn.ModuleList(modules), body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.body(self.quant(x), *self.parts))
        return y


def chain(*modules: nn.Module) -> nn.Module:
    def body(x: Tensor, *parts: nn.Module) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return Quantized(body, *modules)


def calibrated(
    model: nn.Module, shape: tuple[int, ...], qconfig: Any = None
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        for part in model.modules():
            for name in ("running_mean", "running_var"):
                if getattr(part, name, None) is not None:
                    getattr(part, name).uniform_(0.5, 1.5)
        model.eval().qconfig = qconfig or fq.get_default_qconfig("native")  # type: ignore[assignment]
        model = fq.prepare(model)
        model(torch.randn(shape))
    return model, torch.randn(shape)


def session(model: Any, optimized: Path | None = None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def exported(model: nn.Module, *args: Any, **options: Any) -> Any:
    """The exported model, checked."""
    with quiet():
        program = onnx.export(model, args, verbose=False, **options)
    proto = program.model_proto
    standard.checker.check_model(proto, full_check=True)
    standard.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return proto


def run(proto: Any, x: Tensor) -> Tensor:
    found = session(proto.SerializeToString())
    (y,) = found.run(None, {found.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def ops_of(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def steps_apart(found: Tensor, expected: Tensor) -> Tensor:
    """How many steps of the output's grid lie between; `expected` must have some neighbours."""
    levels = expected.unique()
    assert len(levels) > 3
    assert found.shape == expected.shape
    return (found - expected).abs() / levels.diff().min()


def assert_one_step_apart(
    model: nn.Module, x: Tensor, fraction: float = 0.02, **options: Any
) -> Any:
    """Export a prepared model; compare with its native form. Returns the ONNX model.

    `fraction`: how many elements may differ by a step; means of few integers are often ties.
    """
    before = snapshot(model)
    proto = exported(model, x, **options)
    assert_unchanged(model, before)
    with quiet(), torch.no_grad():
        converted = fq.convert(model, backend="native")
        off = steps_apart(run(proto, x), converted(x))
    assert off.max() < 1.01
    assert (off > 0.5).float().mean() <= fraction
    return proto


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "strided, dilated": (
        lambda: nn.Conv2d(5, 7, 3, stride=2, padding=2, dilation=2),
        (2, 5, 11, 12),
    ),
    "groups": (lambda: nn.Conv2d(6, 9, (3, 2), groups=3), (2, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 8)),
    "depthwise, multiplied": (lambda: nn.Conv2d(3, 6, 5, groups=3, bias=False), (2, 3, 9, 8)),
    "same, uneven": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (2, 3, 9, 8)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 8)),
    "1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), (2, 4, 17)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 5, 6, 4)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 6),
    ),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 6)),
    "transposed, 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, bias=False), (2, 3, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_convolutions(name: str, per_channel: bool) -> None:
    make, shape = CONVOLUTIONS[name]
    if per_channel and "transposed" in name:
        pytest.skip("prepare takes no observer for each channel of transposed convolutions")
    weight = fq.default_per_channel_weight_observer if per_channel else fq.default_weight_observer
    qconfig = fq.QConfig(fq.MinMaxObserver, weight)
    proto = assert_one_step_apart(*calibrated(chain(make()), shape, qconfig))
    assert {"Conv", "ConvTranspose"} & ops_of(proto).keys()


@pytest.mark.parametrize("channels", range(1, 10))
def test_every_number_of_channels(channels: int) -> None:
    layers = nn.Conv2d(channels, channels, 3), nn.Flatten(), nn.Linear(channels * 9, channels)
    # One element more or less is a large part of so few.
    proto = assert_one_step_apart(*calibrated(chain(*layers), (12, channels, 5, 5)), fraction=0.15)
    assert ops_of(proto)["QuantizeLinear"] == 3


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear of one row": (lambda: chain(nn.Linear(5, 7)), (5,)),
    "linear of sequences": (lambda: chain(nn.Linear(5, 7, bias=False)), (2, 3, 4, 5)),
    "linear, tanh": (lambda: chain(fq.nn.intrinsic.LinearTanh(nn.Linear(5, 7), nn.Tanh())), (3, 5)),
    "linear, leaky": (
        lambda: chain(fq.nn.intrinsic.LinearLeakyReLU(nn.Linear(5, 7), nn.LeakyReLU(0.1))),
        (3, 5),
    ),
    "relu": (lambda: chain(nn.Conv2d(3, 4, 1), nn.ReLU()), (2, 3, 5, 6)),
    "relu6": (lambda: chain(nn.Conv2d(3, 4, 1), nn.ReLU6()), (2, 3, 5, 6)),
    "activations": (
        lambda: chain(
            *(nn.Hardswish(), nn.Sigmoid(), nn.ELU(), nn.LeakyReLU(0.1), nn.Tanh(), nn.PReLU(3))
        ),
        (2, 3, 5, 6),
    ),
    "functions": (
        lambda: Quantized(lambda x: F.hardsigmoid(F.gelu(F.hardtanh(x, -1.5, 1.0)))),
        (2, 3, 5, 6),
    ),
    "silu": (lambda: chain(nn.Conv2d(3, 4, 1), nn.SiLU()), (2, 3, 5, 6)),
    "silu in place": (lambda: chain(nn.Conv2d(3, 4, 1), nn.SiLU(inplace=True)), (2, 3, 5, 6)),
    "max pool": (lambda: chain(nn.MaxPool2d(3, 2, 1)), (2, 3, 8, 9)),
    "max pool, rounded up": (lambda: chain(nn.MaxPool2d(2, 2, ceil_mode=True)), (2, 3, 7, 9)),
    "max pool, dilated": (lambda: chain(nn.MaxPool2d(3, 1, 1, dilation=2)), (3, 8, 9)),
    "max pool, 1d": (lambda: chain(nn.MaxPool1d(3)), (2, 3, 12)),
    "average pool": (lambda: chain(nn.AvgPool2d(3, 2, 1)), (2, 3, 8, 9)),
    "average pool, pads out": (
        lambda: chain(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (2, 3, 8, 9),
    ),
    "average pool, rounded up": (lambda: chain(nn.AvgPool2d(3, 2, ceil_mode=True)), (2, 3, 8, 8)),
    "average pool, padded and rounded up": (
        lambda: chain(nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
        (2, 3, 8, 7),
    ),
    "average pool, divisor, rounded up": (
        lambda: chain(nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5)),
        (2, 3, 8, 7),
    ),
    "average pool, divisor": (
        lambda: chain(nn.AvgPool2d(2, padding=1, divisor_override=3)),
        (2, 3, 8, 9),
    ),
    "average pool, 1d": (lambda: chain(nn.AvgPool1d(2)), (2, 3, 9)),
    "global": (lambda: chain(nn.AdaptiveAvgPool2d(1)), (2, 30, 7, 6)),
    "adaptive": (lambda: chain(nn.AdaptiveAvgPool2d((2, 3))), (2, 4, 6, 6)),
    "adaptive, uneven": (lambda: chain(nn.AdaptiveAvgPool2d((3, None))), (4, 7, 6)),
    "mean": (lambda: Quantized(lambda x: x.mean([2, 3])), (2, 30, 5, 6)),
    "mean, kept": (lambda: Quantized(lambda x: x.mean((-1, 1), keepdim=True)), (2, 3, 5, 6)),
    "nearest": (lambda: Quantized(lambda x: F.interpolate(x, scale_factor=2)), (2, 3, 5, 6)),
    "nearest, to a size": (lambda: Quantized(lambda x: F.interpolate(x, (7, 11))), (2, 3, 5, 6)),
    "nearest-exact": (
        lambda: Quantized(lambda x: F.interpolate(x, (7, 11), mode="nearest-exact")),
        (2, 3, 5, 6),
    ),
    "bilinear": (
        lambda: Quantized(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
        (2, 3, 5, 6),
    ),
    "bilinear, odd factor": (
        lambda: Quantized(lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear")),
        (2, 3, 5, 6),
    ),
    "bilinear, corners": (
        lambda: Quantized(lambda x: F.interpolate(x, (9, 8), mode="bilinear", align_corners=True)),
        (2, 3, 5, 6),
    ),
    "batch norm": (lambda: chain(nn.BatchNorm2d(3)), (2, 3, 5, 6)),
    "batch norm, relu": (
        lambda: chain(fq.nn.intrinsic.BNReLU2d(nn.BatchNorm2d(3).eval(), nn.ReLU())),
        (2, 3, 5, 6),
    ),
    "layer norm": (lambda: chain(nn.LayerNorm([5, 6])), (2, 3, 5, 6)),
    "group norm": (lambda: chain(nn.GroupNorm(2, 4)), (2, 4, 5, 6)),
    "instance norm": (lambda: chain(nn.InstanceNorm2d(4, affine=True)), (2, 4, 5, 6)),
    "moved": (
        lambda: Quantized(
            lambda x: torch.cat([t.flip(2) for t in x.permute(0, 2, 1, 3)[:, 1:].chunk(2, 1)], 1)
        ),
        (2, 3, 5, 6),
    ),
    "padded": (lambda: Quantized(lambda x: F.pad(x, (1, 2), value=0.5)), (2, 3, 5, 6)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions(name: str) -> None:
    make, shape = MODULES[name]
    fraction = 0.4 if "average" in name or "adaptive" in name or "mean" in name else 0.02
    assert_one_step_apart(*calibrated(make(), shape), fraction)


FUNCTIONALS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, f: f.add(x, x.flip(1)),
    "add, broadcast": lambda x, f: f.add(x, x[:, :, :1]),
    "add_relu": lambda x, f: f.add_relu(x, x.flip(1)),
    "mul": lambda x, f: f.mul(x, x.flip(1)),
    "cat": lambda x, f: f.cat([x, x.relu()], 1),
    "add_scalar": lambda x, f: f.add(x, f.add_scalar(x, 0.7)),
    "add_scalar, far": lambda x, f: f.add(x, f.add_scalar(x, 30.0)),
    "mul_scalar": lambda x, f: f.add(x, f.mul_scalar(x, -2.5)),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_functionals(name: str) -> None:
    body = FUNCTIONALS[name]
    assert_one_step_apart(*calibrated(Quantized(body, native.FloatFunctional()), (2, 3, 5, 6)))


def transposed_in_groups() -> nn.Module:
    """A transposed convolution that has a scale for each channel of each group."""
    layer = native.ConvTranspose2d(4, 6, 2, groups=2)
    layer.load_state_dict(
        {
            "weight": torch.randint(-127, 128, (4, 3, 2, 2), dtype=torch.int8),
            "weight_scale": torch.rand(6) * 0.01 + 1e-3,
            "bias": torch.randn(6),
            "scale": torch.tensor(0.05),
            "zero_point": torch.tensor(120),
        }
    )
    return layer


def functional(body: Callable[[Any, Any], Any]) -> nn.Module:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.functional = native.QFunctional()
            self.functional.scale, self.functional.zero_point = 0.05, 30

        def forward(self, x: Any) -> Any:
            return body(self.functional, x)

    return Body()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "make",
    [
        lambda: native.Softmax(1, 1 / 256, 0),
        transposed_in_groups,
        lambda: functional(lambda f, x: f.mul_relu(x, x.flip(1))),
        lambda: functional(lambda f, x: f.cat_relu([x, x.flip(1)], 1)),
        lambda: functional(lambda f, x: f.add_scalar(x, 30.0)),
        lambda: functional(lambda f, x: f.mul_scalar_relu(x, -2.5)),
    ],
    ids=["softmax", "transposed, groups", "mul_relu", "cat_relu", "add_scalar", "mul_scalar_relu"],
)
def test_native_modules_that_prepared_ones_do_not_become(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantize = native.Quantize(0.02, 100 if dtype == torch.uint8 else -20, dtype)
    model = nn.Sequential(quantize, make(), native.DeQuantize())
    x = torch.randn(2, 4, 5, 6)
    off = steps_apart(run(exported(model, x), x), model(x))
    assert off.max() < 1.01
    assert (off > 0.5).float().mean() < 0.02


def test_int8_activations_with_bounds_that_saturation_does_not_give() -> None:
    signed = fq.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    qconfig = fq.QConfig(signed, fq.default_per_channel_weight_observer)
    fused = fq.nn.intrinsic.ConvReLU2d(nn.Conv2d(3, 8, 3), nn.ReLU())
    model, x = calibrated(chain(fused, nn.MaxPool2d(2), nn.Conv2d(8, 4, 2)), (2, 3, 9, 9), qconfig)
    proto = assert_one_step_apart(model, x)
    assert ops_of(proto)["Clip"] == 1


def test_a_bias_beyond_int32_is_kept() -> None:
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[1] *= 1e-9
        conv.bias.copy_(torch.tensor([0.1, 50.0, -0.2, 3.0]))  # type: ignore[union-attr]
        conv.weight[3] = 0.0
    model, x = calibrated(chain(conv), (2, 3, 6, 6))
    proto = assert_one_step_apart(model, x)
    assert ops_of(proto)["DequantizeLinear"] == 4  # input, weight, bias, output


class Residual(nn.Module):
    """Batch norms, a residual, a depthwise layer, pooling and a classifier, as networks have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = (
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.BatchNorm2d(channels),
        )
        self.add, self.pool, self.fc = (
            native.FloatFunctional(),
            nn.MaxPool2d(2),
            nn.Linear(channels, 5),
        )
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.pool(self.add.add_relu(self.bn2(self.conv2(x)), x))
        y: Tensor = self.dequant(self.fc(self.average(x).flatten(1)))
        return y


def trained(channels: int = 8, backend: str = "x86") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    groups = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
    with quiet():
        model = fq.fuse_modules_qat(Residual(channels).train(), groups)
        model.qconfig = fq.get_default_qat_qconfig(backend)
        model = fq.prepare_qat(model)
        for _ in range(5):
            model(torch.randn(4, 3, 8, 8))
    return model, torch.randn(4, 3, 8, 8)


# What onnxruntime makes of the ops above; where it cannot fuse, the floating ones stay.
FLOATING = {"BatchNormalization", "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Mul"}


@pytest.mark.parametrize("prepare", ["prepare", "prepare_qat"])
def test_onnxruntime_computes_in_integers(prepare: str, tmp_path: Path) -> None:
    if prepare == "prepare_qat":
        model, x = trained()
    else:
        groups = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
        model, x = calibrated(fq.fuse_modules(Residual(8).eval(), groups), (4, 3, 8, 8))
    model.eval()
    proto = assert_one_step_apart(model, x)
    assert not {"BatchNormalization", "Div"} & ops_of(proto).keys()
    session(proto.SerializeToString(), tmp_path / "optimized.onnx")
    ops = ops_of(standard.load(tmp_path / "optimized.onnx"))
    assert ops["QLinearConv"] == 2
    assert ops["QLinearAdd"] == ops["QGemm"] == ops["QLinearGlobalAveragePool"] == 1
    assert ops["QuantizeLinear"] == ops["DequantizeLinear"] == 1
    assert not FLOATING & ops.keys()


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "mobilenet_v3_large"]
)
def test_torchvision_models_run_as_integers(name: str, tmp_path: Path) -> None:
    model: Any = short_torchvision_model(name).eval()
    with quiet():
        model.fuse_model()
    model, x = calibrated(model, (2, 3, 64, 64))
    proto = exported(model, x)
    session(proto.SerializeToString(), tmp_path / "optimized.onnx")
    ops = ops_of(standard.load(tmp_path / "optimized.onnx"))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert ops["QLinearConv"] == convolutions
    assert (
        not {"BatchNormalization", "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"} & ops.keys()
    )


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, nn.Module]:
    """examples/demo.py, with its data and the trained network."""
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    path = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo_for_onnx", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digits = module.load()
    return module, digits, module.train_float(digits, module.Settings(epochs=6))


@pytest.mark.torch_ao  # the example needs it
@pytest.mark.parametrize("prepare", ["prepare", "prepare_qat"])
def test_a_trained_network_predicts_as_the_native_one(demo: Any, prepare: str) -> None:
    example, digits, trained = demo
    with quiet():
        model = example.load_into(fq, trained)
        if prepare == "prepare":
            model = fq.fuse_modules(model.eval(), example.FUSED)
            model.qconfig = fq.get_default_qconfig("native")
            model = fq.prepare(model)
            fq.calibrate(model, digits.batches(64, seed=0), progress=False)
        else:
            model = fq.fuse_modules_qat(model.train(), example.FUSED)
            model.qconfig = fq.get_default_qat_qconfig("x86")
            model = fq.prepare_qat(model)
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
            for x, y in digits.batches(64, seed=1):
                example.step(model, optimizer, x, y)
        with torch.no_grad():
            expected = fq.convert(model.eval(), backend="native")(digits.test_x)
    found = run(exported(model, digits.test_x), digits.test_x)
    assert (expected.argmax(1) == digits.test_y).float().mean() > 0.9
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.995
    off = steps_apart(found, expected)
    assert off.max() < 1.01
    assert (off > 0.5).float().mean() < 0.05


@pytest.mark.parametrize("how", ["names", "Dim", "dynamic_axes", "dict"])
def test_dimensions_may_be_dynamic(how: str) -> None:
    model, x = trained()
    axes = {0: "batch", 2: "height"}
    options: dict[str, Any] = {
        "names": {"dynamic_shapes": (axes,)},
        "Dim": {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)},
        "dict": {"dynamic_shapes": {"x": axes}},
        "dynamic_axes": {"dynamic_axes": {"image": axes}, "input_names": ["image"]},
    }[how]
    model.eval()
    with quiet():
        converted = fq.convert(model, backend="native")
        # The other two ways are names for export, and how they are given matters to neither model.
        for each in (model, converted) if how in ("names", "Dim") else (model,):
            proto = exported(each, x, **options)
            smaller = torch.randn(1, 3, 8 if how == "Dim" else 12, 8)
            assert steps_apart(run(proto, smaller), converted(smaller)).max() < 1.01
    dims = [
        dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim
    ]
    assert dims[0] == "batch"
    assert how == "Dim" or dims[2] == "height"


def test_a_converted_model_is_exported_as_the_prepared_one() -> None:
    model, x = trained()
    model.eval()
    with quiet():
        converted = fq.convert(model, backend="native")
    before = converted.state_dict()
    assert torch.equal(run(exported(converted, x), x), run(exported(model, x), x))
    for name, value in converted.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_options_and_files(tmp_path: Path) -> None:
    model, x = trained()
    with quiet():
        options = {"input_names": ["image"], "output_names": ["scores"], "verbose": False}
        onnx.export(model, x, tmp_path / "model.onnx", external_data=False, **options)
        file = io.BytesIO()
        onnx.export(model, (), file, kwargs={"x": x}, **options)
    for found in (session(tmp_path / "model.onnx"), session(file.getvalue())):
        assert [entry.name for entry in found.get_inputs()] == ["image"]
        assert found.run(["scores"], {"image": x.numpy()})[0].shape == (4, 5)


def test_what_stays_floating_stays_so() -> None:
    model = nn.Sequential(chain(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 3))
    model[2].qconfig = None  # type: ignore[assignment]
    model, x = calibrated(model, (2, 3, 6, 6))
    with quiet():
        converted = fq.convert(model, backend="native")
    proto = exported(model, x)
    torch.testing.assert_close(run(proto, x), converted(x), rtol=0, atol=0.02)
    assert ops_of(proto)["QuantizeLinear"] == 2


def four_bit_weights(backend: str = "native") -> Any:
    weight = fq.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-8, quant_max=7
    )
    return fq.QConfig(fq.MinMaxObserver, weight)


def test_four_bits_are_stored_as_int4_where_the_opset_has_it() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 6)
    model, x = calibrated(chain(*layers), (2, 3, 6, 6), four_bit_weights())
    types = {}
    for opset in (20, 21):
        proto = assert_one_step_apart(model, x, opset_version=opset)
        assert proto.opset_import[0].version == opset
        types[opset] = Counter(i.data_type for i in proto.graph.initializer if len(i.dims) > 1)
    assert types[20] == {standard.TensorProto.INT8: 2}
    assert types[21] == {standard.TensorProto.INT4: 2}


@pytest.mark.parametrize(
    "bounds", [(0, 15), (-8, 7), (-7, 7), (0, 65535), (-32768, 32767), (0, 1000)]
)
def test_fake_quantizers_of_4_and_16_bits(bounds: tuple[int, int]) -> None:
    module = fq.FakeQuantize(
        fq.MinMaxObserver, *bounds, dtype=torch.quint8 if bounds == (0, 15) else torch.qint32
    )
    module(torch.randn(50, 4))
    module.disable_observer()
    x = torch.randn(50, 4) * 2
    proto = exported(module, x, opset_version=21)
    assert ops_of(proto)["QuantizeLinear"] == 1
    torch.testing.assert_close(run(proto, x), module(x), rtol=0, atol=float(module.scale) * 1e-3)
    if bounds[1] > 255:
        assert exported(module, x).opset_import[0].version == 21
        with pytest.raises(fq.QuantizationError, match="from opset 21 on"):
            onnx.export(module, (x,), opset_version=20, verbose=False)


@pytest.mark.parametrize("prepare", ["prepare", "prepare_qat"])
def test_activations_of_16_bits(prepare: str) -> None:
    observer = fq.MinMaxObserver.with_args(quant_min=0, quant_max=65535, dtype=torch.qint32)
    groups = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]
    if prepare == "prepare":
        qconfig = fq.QConfig(observer, fq.default_per_channel_weight_observer)
        model, x = calibrated(fq.fuse_modules(Residual(8).eval(), groups), (4, 3, 8, 8), qconfig)
    else:
        fake_quantizer = fq.FakeQuantize.with_args(
            observer=fq.MovingAverageMinMaxObserver,
            quant_min=0,
            quant_max=65535,
            dtype=torch.qint32,
        )
        x = torch.randn(4, 3, 8, 8)
        with quiet():
            model = fq.fuse_modules_qat(Residual(8).train(), groups)
            model.qconfig = fq.QConfig(fake_quantizer, fq.default_per_channel_weight_fake_quant)
            model = fq.prepare_qat(model)
            model(x)
        model.eval().apply(fq.disable_observer)
    y = model(x)  # seen by the observers, so that nothing is out of range
    proto = exported(model, x)
    kinds = {i.data_type for i in proto.graph.initializer if not i.dims}
    assert standard.TensorProto.UINT16 in kinds
    assert "BatchNormalization" not in ops_of(proto)
    # Trained models evaluate so; observers leave the numbers of others as they are.
    assert (run(proto, x) - y).abs().max() < 0.05 * y.abs().max()


def test_dynamic_linear_layers_are_quantized_at_each_call() -> None:
    torch.manual_seed(0)
    with quiet():
        model = fq.quantize_dynamic(
            nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)).eval(),
            backend="native",
        )
    for part in model:
        part.reduce_range = False  # ONNX's op uses all 8 bits
    x = torch.randn(5, 3, 16)
    proto = exported(model, x, dynamic_shapes=({0: "batch"},))
    assert ops_of(proto)["DynamicQuantizeLinear"] == ops_of(proto)["MatMulInteger"] == 2
    for each in (x, torch.randn(2, 3, 16)):
        y = model(each)
        assert (run(proto, each) - y).abs().max() < 0.01 * y.abs().max()


def test_recurrent_and_embedding_layers_are_refused_by_name() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lstm(x)[0]
            return y

    with quiet():
        model = fq.quantize_dynamic(Tagger().eval(), backend="native")
    refused(model, torch.randn(3, 2, 8), "lstm calls dynamic_lstm, .*: leave it floating")


def test_linear_layers_of_float16_weights_keep_them() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(130, 70), fq.nn.intrinsic.LinearReLU(nn.Linear(70, 3), nn.ReLU())
    with quiet():
        model = fq.quantize_dynamic(
            nn.Sequential(*layers).eval(), dtype=torch.float16, backend="native"
        )
    x = torch.randn(5, 130)
    proto = exported(model, x, dynamic_shapes=({0: "batch"},))
    of_weight = [i for i in proto.graph.initializer if list(i.dims) == [70, 130]]
    assert [i.data_type for i in of_weight] == [standard.TensorProto.FLOAT16]
    for each in (x, torch.randn(2, 130)):
        torch.testing.assert_close(run(proto, each), model(each))


# --- what cannot be exported ------------------------------------------------------------------


def refused(model: nn.Module, x: Any, message: str, **options: Any) -> None:
    with quiet(), pytest.raises(fq.QuantizationError, match=message):
        onnx.export(model, (x,), verbose=False, **options)


def test_layers_that_saw_nothing_are_refused_by_name_where_they_are_called() -> None:
    def half(x: Tensor, a: nn.Module, b: nn.Module, f: Any) -> Tensor:
        return f.add(a(x), x) if getattr(half, "adds", False) else a(x)

    model = Quantized(half, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), native.FloatFunctional())
    model, x = calibrated(model, (2, 3, 5, 5))
    assert_one_step_apart(model, x)
    half.adds = True  # type: ignore[attr-defined]
    refused(model, x, r"parts\.2 has observed nothing yet")
    fresh = Quantized(half, nn.Conv2d(3, 3, 1))
    fresh.qconfig = fq.get_default_qconfig("native")  # type: ignore[assignment]
    refused(fq.prepare(fresh.eval()), x, "quant has observed nothing yet")


def test_models_that_take_or_return_quantized_tensors_are_refused() -> None:
    model, x = calibrated(nn.Sequential(fq.QuantStub(), nn.Conv2d(3, 4, 3)), (2, 3, 5, 5))
    refused(model, x, "end its quantized part with a DeQuantStub")
    with quiet():
        converted = fq.convert(model, backend="native")
    refused(converted[1], converted[0](x), "args has a quantized tensor")


@pytest.mark.torch_ao
def test_models_of_torch_aos_quantized_modules_are_refused_by_name() -> None:
    model, x = calibrated(chain(nn.Conv2d(3, 4, 3)), (2, 3, 5, 5))
    with quiet():
        refused(fq.convert(model), x, r"parts\.0|quant is one of torch\.ao's quantized modules")


def test_ops_without_an_onnx_form_are_named_with_their_module() -> None:
    class Rotated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x)[0]

    model, x = calibrated(nn.Sequential(chain(nn.Conv2d(3, 4, 3)), Rotated()), (2, 3, 5, 5))
    refused(model, x, r"1 calls .*linalg_qr, which has no ONNX form")


def test_arithmetic_between_quantized_layers_is_refused_as_in_eager_mode() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    model, x = calibrated(chain(nn.Conv2d(3, 4, 3), Swish()), (2, 3, 5, 5))
    with quiet(), pytest.raises(NotImplementedError, match="FloatFunctional, whose mul"):
        onnx.export(model, (x,), verbose=False)


def test_opsets_that_torch_cannot_convert_a_model_to_are_refused() -> None:
    model, x = calibrated(
        chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)), (2, 3, 5, 5)
    )
    assert exported(model, x, opset_version=17).opset_import[0].version == 17
    refused(model, x, "opset_version=13: .* pass opset_version=", opset_version=13)


def test_the_older_exporter_is_refused_for_converted_models() -> None:
    model, x = calibrated(chain(nn.Conv2d(3, 4, 3)), (2, 3, 5, 5))
    with quiet():
        converted = fq.convert(model, backend="native")
    refused(converted, x, "leave dynamo=False out", dynamo=False)


@pytest.mark.parametrize("dynamo", [True, False])
def test_torch_onnx_export_says_what_to_call_for_converted_models(dynamo: bool) -> None:
    model, x = calibrated(chain(nn.Conv2d(3, 4, 3)), (2, 3, 5, 5))
    with quiet():
        converted = fq.convert(model, backend="native")
        with pytest.raises(Exception, match=r"call fastquant\.onnx\.export") as raised:
            torch.onnx.export(converted, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
    chained = [raised.value]
    while chained[-1].__cause__ is not None:
        chained.append(chained[-1].__cause__)  # type: ignore[arg-type]
    assert any(isinstance(error, fq.QuantizationError) for error in chained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset_version": 12}, "opset_version must be at least 13, got 12"),
        ({"opset_version": 99}, "opset_version must be at most .* got 99"),
        ({"dynamic_axes": {"y": {0: "batch"}}}, "dynamic_axes must name inputs"),
        ({"verify": True}, "verify=True"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_words(options: Any, message: str) -> None:
    model, x = calibrated(chain(nn.Conv2d(3, 4, 3)), (2, 3, 5, 5))
    with quiet(), pytest.raises(ValueError, match=message):
        onnx.export(model, (x,), verbose=False, **options)
