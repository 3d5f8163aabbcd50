"""Small models that exercise every path of prepare and convert, and torchvision's.

Each builder takes the namespace that stubs come from, `fastquant` or `torch.ao.quantization`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.quantization
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastquant as fq
import fastquant.nn.quantized as nnq
from fastquant import bench
from fastquant._torch import ao
from oracle import quiet


def tree(model: nn.Module) -> dict[str, str]:
    """The class of each submodule, by its path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


OBSERVERS: dict[str, Callable[[], nn.Module]] = {
    "minmax": fq.MinMaxObserver,
    "average": fq.MovingAverageMinMaxObserver,
    "channels": fq.PerChannelMinMaxObserver,
    "channel average": fq.MovingAveragePerChannelMinMaxObserver,
    "histogram": lambda: fq.HistogramObserver(bins=64),
}
every_observer = pytest.mark.parametrize("name", OBSERVERS)


class Stubbed(nn.Module):
    """`body` between a QuantStub and a DeQuantStub."""

    def __init__(self, ns: ModuleType, body: nn.Module) -> None:
        super().__init__()
        self.quant = ns.QuantStub()
        self.body = body
        self.dequant = ns.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.body(self.quant(x)))


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, twice; then pooling and a classifier."""

    fusable = (["conv1", "bn1", "relu1"], ["conv2", "bn2"])

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.bn2(self.conv2(x))).flatten(1))


class Residual(nn.Module):
    """A residual block on FloatFunctional, with add, mul and cat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 1)
        self.add = nnq.FloatFunctional()
        self.mul = nnq.FloatFunctional()
        self.cat = nnq.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.add.add_relu(self.conv(x), self.down(x))
        return self.cat.cat([self.mul.mul(y, x), x], 1)


def prepared(
    kind: str,
    ns: ModuleType = fq,
    layers: Sequence[nn.Module] | None = None,
    shape: tuple[int, ...] = (4, 3, 8, 8),
) -> nn.Module:
    """Layers behind a QuantStub, prepared by `ns`, that have seen a batch of that shape.

    Args:
        kind: "min_max" or "histogram" for calibration by such observers, or "qat".
        ns: fastquant or torch.ao.quantization.
        layers: a convolution and a linear layer, if not given.
        shape: what the first layer takes.
    """
    torch.manual_seed(0)
    if layers is None:
        layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    model: nn.Module = nn.Sequential(fq.QuantStub(), *layers)
    with quiet():
        if kind == "qat":
            model.train().qconfig = fq.get_default_qat_qconfig("x86")
            model = ns.prepare_qat(model)
        else:
            histogram = kind == "histogram"
            model.eval()
            model.qconfig = fq.get_default_qconfig("x86") if histogram else fq.default_qconfig
            model = ns.prepare(model)
        model(torch.randn(shape))
    return model


class Nested(nn.Module):
    """Sequentials in Sequentials, a ModuleList, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6))
        )
        self.heads = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.heads[1](self.heads[0](self.heads[0](x)))


class Embedded(nn.Module):
    """Embedding and embedding bag; each under its own qconfig, the classifier floating."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.bag = nn.EmbeddingBag(12, 8, mode="sum", include_last_offset=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(torch.cat([self.table(indices[:2]), self.bag(indices, offsets)], 1))


class Recurrent(nn.Module):
    """LSTM between stubs."""

    def __init__(self, ns: ModuleType, **kwargs: Any) -> None:
        super().__init__()
        self.quant = ns.QuantStub()
        self.lstm = nn.LSTM(6, 5, **kwargs)
        self.dequant = ns.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.lstm(self.quant(x))[0])


class Attention(nn.Module):
    """Multi-head self-attention between stubs."""

    def __init__(self, ns: ModuleType) -> None:
        super().__init__()
        self.quant = ns.QuantStub()
        self.attention = nn.MultiheadAttention(8, 2)
        self.dequant = ns.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        y, weights = self.attention(x, x, x)
        return torch.cat([self.dequant(y).flatten(), self.dequant(weights).flatten()])


class Zoo(nn.Module):
    """All recurrent modules, for dynamic quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(12, 6)
        self.lstm_cell = nn.LSTMCell(6, 6)
        self.gru_cell = nn.GRUCell(6, 6)
        self.rnn_cell = nn.RNNCell(6, 6)
        self.fc = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(self.lstm(x)[0])[0][0]
        return self.fc(self.rnn_cell(self.gru_cell(self.lstm_cell(x)[0])))


class Norms(nn.Module):
    """Normalizations that have quantized counterparts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.layer = nn.LayerNorm([4, 5, 5])
        self.batch = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.layer(self.instance(self.group(self.conv(x)))))


class Doubled(nn.Module):
    """A parametrization: the weight is twice what is stored."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrized() -> nn.Module:
    body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    parametrize.register_parametrization(body[0], "weight", Doubled())
    return body


def _activations() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 6),
        nn.Sigmoid(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Hardswish(),
        nn.ELU(),
        nn.LeakyReLU(0.1),
        nn.ReLU6(),
        nn.Hardsigmoid(),
        nn.Dropout(0.5),
    )


@dataclass(frozen=True)
class Case:
    """A model and the inputs that it takes."""

    build: Callable[[ModuleType], nn.Module]
    shape: tuple[int, ...] = (4, 6)
    # QAT trains it, in training mode, by the default QAT mapping.
    trains: bool = True
    # Reference modules exist for all of it.
    has_reference: bool = True
    # Transposed convolutions take no per-channel weights.
    per_tensor_only: bool = False
    # It has a batch norm without quantized counterpart, so it must be fused away.
    must_fuse: bool = False
    fusable: tuple[list[str], ...] = field(default=())

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=generator),)

    def make(self, ns: ModuleType) -> nn.Module:
        torch.manual_seed(0)
        model = self.build(ns)
        # Batch norms with something in them.
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
        return model.eval()

    def calibrated(self, ns: ModuleType, qconfig: QConfigOf, fuse: bool = False) -> nn.Module:
        """Prepared by `ns`, and calibrated on three batches."""
        model = self.make(ns)
        if fuse:
            model = ns.fuse_modules(model, [list(names) for names in self.fusable])
        model.qconfig = qconfig(ns)
        model = ns.prepare(model)
        for seed in range(3):
            model(*self.inputs(seed))
        return model

    def trained(self, ns: ModuleType, qconfig: QConfigOf, fuse: bool = False) -> nn.Module:
        """Prepared for training by `ns`, and trained for three steps."""
        model = self.make(ns).train()
        if fuse:
            model = ns.fuse_modules_qat(model, [list(names) for names in self.fusable])
        model.qconfig = qconfig(ns)
        model = ns.prepare_qat(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed in range(3):
            torch.manual_seed(seed)  # dropout
            optimizer.zero_grad()
            model(*self.inputs(seed)).square().mean().backward()
            optimizer.step()
        return model.eval()


QConfigOf = Callable[[ModuleType], Any]

STATIC_QCONFIGS: dict[str, QConfigOf] = {
    "x86": lambda ns: ns.get_default_qconfig("x86"),
    "minmax": lambda ns: ns.default_qconfig,
    "per_channel": lambda ns: ns.default_per_channel_qconfig,
    "moving_average": lambda ns: ns.QConfig(
        ns.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3),
        ns.default_weight_observer,
    ),
}
# torch.ao's fused op (version 1) rounds scales in its own way; version 0 is two plain steps.
QAT_QCONFIGS: dict[str, QConfigOf] = {
    "x86": lambda ns: ns.get_default_qat_qconfig("x86", 0),
    "qnnpack": lambda ns: ns.get_default_qat_qconfig("qnnpack", 0),
}

STATIC_CASES = {
    "conv_net": Case(
        lambda ns: Stubbed(ns, ConvNet()),
        (2, 3, 8, 8),
        fusable=tuple([f"body.{name}" for name in names] for names in ConvNet.fusable),
    ),
    "residual": Case(lambda ns: Stubbed(ns, Residual()), (2, 4, 6, 6)),
    "linears": Case(
        lambda ns: Stubbed(
            ns, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        ),
        fusable=(["body.0", "body.1"],),
    ),
    "linear_bn": Case(
        lambda ns: Stubbed(ns, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))),
        must_fuse=True,
        fusable=(["body.0", "body.1"],),
    ),
    "bn_relu": Case(
        lambda ns: Stubbed(ns, nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())),
        (2, 3, 5, 5),
        trains=False,
        has_reference=False,
        fusable=(["body.0", "body.1"],),
    ),
    "conv1d": Case(
        lambda ns: Stubbed(ns, nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())),
        (2, 3, 9),
        must_fuse=True,
        fusable=(["body.0", "body.1", "body.2"],),
    ),
    "conv3d": Case(
        lambda ns: Stubbed(ns, nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU())),
        (2, 2, 4, 4, 4),
        fusable=(["body.0", "body.1"],),
    ),
    "transposed": Case(
        lambda ns: Stubbed(ns, nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4))),
        (2, 3, 6, 6),
        trains=False,
        per_tensor_only=True,
        fusable=(["body.0", "body.1"],),
    ),
    "nested": Case(lambda ns: Stubbed(ns, Nested())),
    "parametrized": Case(
        lambda ns: Stubbed(ns, _parametrized()), trains=False, has_reference=False
    ),
    "activations": Case(lambda ns: Stubbed(ns, _activations()), has_reference=False),
    "norms": Case(lambda ns: Stubbed(ns, Norms()), (2, 3, 5, 5), trains=False, has_reference=False),
    "wrapped": Case(lambda ns: nn.Sequential(ns.QuantWrapper(nn.Linear(6, 4)), nn.ReLU())),
    "lstm": Case(Recurrent, (3, 2, 6), has_reference=False),
    "lstm_deep": Case(
        lambda ns: Recurrent(ns, num_layers=2, bidirectional=True, batch_first=True),
        (3, 2, 6),
        trains=False,
        has_reference=False,
    ),
    "attention": Case(Attention, (3, 2, 8), trains=False, has_reference=False),
}


def torchvision_model(name: str) -> nn.Module:
    """A quantizable model of torchvision, randomly initialised; skips where there is none."""
    if not ao.has_quantized_modules:
        pytest.skip("torchvision's quantizable models consist of torch.ao's modules")
    torch.manual_seed(0)
    try:
        return bench.torchvision_model(name)
    except ImportError as error:
        pytest.skip(str(error))


def short_torchvision_model(name: str) -> nn.Module:
    """Such a model with each kind of its blocks once or twice, for what takes long for each node.

    With FASTQUANT_WHOLE_MODELS in the environment, all of the model.
    """
    whole = torchvision_model(name)
    if os.environ.get("FASTQUANT_WHOLE_MODELS"):
        return whole
    module: Any = importlib.import_module(type(whole).__module__)
    if name == "resnet18":
        model = module.QuantizableResNet(module.QuantizableBasicBlock, [2, 1, 1, 1])
    elif name == "mobilenet_v2":
        model = module.QuantizableMobileNetV2(
            inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]],
            block=module.QuantizableInvertedResidual,
        )
    elif name == "shufflenet_v2_x1_0":
        model = module.QuantizableShuffleNetV2([2, 1, 1], [24, 116, 232, 464, 1024])
    else:
        assert name == "mobilenet_v3_large"
        blocks, last = module._mobilenet_v3_conf(name)
        # Both activations, kernels and strides, with and without residual and squeezing.
        model = module.QuantizableMobileNetV3(
            [blocks[i] for i in (0, 1, 3, 4, 6, 10, 11)],
            last,
            block=module.QuantizableInvertedResidual,
        )
    module._replace_relu(model)
    result: nn.Module = model
    return result


# The observers and fake-quantizers whose names are in both namespaces.
SHARED_CLASSES = [
    name
    for name in dir(fq)
    if isinstance(getattr(fq, name), type)
    and issubclass(getattr(fq, name), (fq.ObserverBase, fq.FakeQuantizeBase))
    and hasattr(tq, name)
]
