"""Export to ONNX of models as prepare_qat leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq

pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run the result")

from fastquant import onnx as fq_onnx  # noqa: E402


def trained(channels: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(fq.QuantStub(), nn.Conv2d(3, channels, 3), nn.ReLU(), fq.DeQuantStub())
    model.train().qconfig = fq.get_default_qat_qconfig("x86")  # type: ignore[assignment]
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
    fq_onnx.export(model, (x,), str(path), verbose=False)
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
    fq_onnx.export(model, (x,), str(path), verbose=False)
    assert outputs(path, x).isfinite().all()


def test_what_saw_nothing_at_all_is_refused_by_name() -> None:
    model, x = trained(4)
    model[1].weight_fake_quant.activation_post_process.reset_min_max_vals()  # type: ignore[union-attr, operator]
    with pytest.raises(fq.QuantizationError, match=r"1\.weight_fake_quant has observed nothing"):
        fq_onnx.export(model, (x,), verbose=False)
