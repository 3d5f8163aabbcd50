"""How fast are prepared models under torch.compile, compared with eager and with float models?

python benchmarks/compile.py
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastquant as fq
from harness import OURS, Rounds, Suite, at_least, main

# As fast as eager, up to noise.
NO_SLOWER = at_least(0.95)


def _model(qat: bool, qconfig: fq.QConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        fq.QuantStub(),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).train(qat)
    model.qconfig = qconfig
    return fq.prepare_qat(model) if qat else fq.prepare(model)


def _forward(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def _step(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: model(x).square().mean().backward()


def _blocks(qat: bool) -> nn.Module:
    """Convolutions with batch norm and ReLU, fused and prepared if `qat`."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [fq.QuantStub()]
    for _ in range(2):
        modules += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*modules).train()
    if qat:
        fq.fuse_modules_qat(model, [["1", "2", "3"], ["4", "5", "6"]], inplace=True)
        model.qconfig = fq.get_default_qat_qconfig("x86")
        fq.prepare_qat(model, inplace=True)
    return model


def _compiled_blocks(suite: Suite) -> None:
    """Blocks with batch norm against the float ones: a step, and how long it takes to compile."""
    x = torch.randn(8, 32, 28, 28)
    cases, seconds = {}, {}
    for name in ("float", OURS):
        # Empty, so that every kernel is compiled.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            torch.compiler.reset()
            run = _step(torch.compile(_blocks(name == OURS), fullgraph=True), x)
            start = time.perf_counter()
            run()
            seconds[name] = [time.perf_counter() - start]
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        cases[name] = run
    work, size = "QAT of conv, batch norm, ReLU, compiled", str(list(x.shape))
    suite.add(f"{work}: step over float", size, cases, lambda t: t[OURS] / t["float"] - 1, "more")
    suite.add_rounds(
        f"{work}: compiling over float",
        size,
        Rounds(seconds, 1),
        lambda t: t[OURS] / t["float"] - 1,
        "more",
    )


HISTOGRAM_QAT = fq.QConfig(
    fq.default_histogram_fake_quant, fq.default_per_channel_weight_fake_quant
)


def measure(suite: Suite) -> None:
    x = torch.randn(8, 3, 32, 32)
    for work, qat, qconfig, of, target in (
        ("calibrate, min/max", False, fq.default_qconfig, _forward, NO_SLOWER),
        ("calibrate, histogram", False, fq.get_default_qconfig("x86"), _forward, NO_SLOWER),
        ("QAT, forward and backward", True, fq.get_default_qat_qconfig("x86"), _step, NO_SLOWER),
        # Fake-quantizers around histogram observers run their Python inside the graph, so compiling
        # gains nothing there.
        ("QAT by histogram, both ways", True, HISTOGRAM_QAT, _step, None),
    ):
        cases = {}
        for name in (OURS, "compiled"):
            model = _model(qat, qconfig)
            model(x)
            run = of(torch.compile(model, fullgraph=True) if name == "compiled" else model, x)
            run()  # compiles
            cases[name] = run
        suite.add(
            f"{work}: eager / compiled",
            "[8, 3, 32, 32]",
            cases,
            lambda t: t[OURS] / t["compiled"],
            "x",
            target,
        )
    _compiled_blocks(suite)


if __name__ == "__main__":
    main(measure)
