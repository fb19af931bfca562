"""A BERT encoder: texts as token ids in, the last hidden state of every token out.

1. Word, position and segment embeddings are added and normalised.
2. Each layer: q, k, v (packed), attention of every token to every token of its own text, project, add, normalise; then
   up, GELU, down, add, normalise ("post-LN").
3. The states come back text by text; whoever asked pools them.

On a CPU texts are computed one by one: a text's vector has the same bits in any company, and no padding is computed.
On a GPU the tokens of all texts are rows of one matrix, without padding, in everything but the attention; there texts
of like length go together through torch's fused attention, under a mask. The last bits may then depend on the company.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dummy_weights import DummyWeights
from model.encoder_config import EncoderConfig, read_encoder_config
from model.errors import ModelError, WeightError
from model.loader import LoadOptions, choose_dtype
from model.safetensors_weights import SafetensorsWeights
from model.source import ModelFiles
from model.weights import LoadSummary, WeightSource

# What sentence-transformers never reads: a buffer of old exports, and the head of BERT's second training task.
_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
# Texts attend together on a GPU if the longest has at most so many times the tokens of the shortest.
_MAX_PADDING = 1.25


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix `[out, in]` and a bias `[out]`, or the weight and bias of a norm."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Weights of one layer; rows of qkv: all q heads, all k heads, all v heads."""

    qkv: Affine
    attention_out: Affine
    attention_norm: Affine
    up: Affine
    down: Affine
    norm: Affine


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Everything learned. `positions` has the one segment's embedding added: every token is of the first segment."""

    words: Tensor
    positions: Tensor
    norm: Affine
    layers: tuple[EncoderLayer, ...]

    def num_bytes(self) -> int:
        """Count the bytes that the weights take."""
        affines = [self.norm]
        for layer in self.layers:
            affines += [layer.qkv, layer.attention_out, layer.attention_norm, layer.up, layer.down, layer.norm]
        tensors = [self.words, self.positions, *(part for a in affines for part in (a.weight, a.bias))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Encoder:
    """A loaded encoder. Immutable; calls of several threads do not disturb each other.

    Attributes:
        arithmetic: names the numbers it computes with.
        backend: one line saying what runs.
    """

    def __init__(self, config: EncoderConfig, weights: EncoderWeights, load_summary: LoadSummary) -> None:
        self.config = config
        self.weights = weights
        self.load_summary = load_summary
        self.device = weights.words.device
        self.dtype = weights.words.dtype
        self.arithmetic = str(self.dtype).removeprefix("torch.")
        company = "one text at a time" if self.device.type == "cpu" else "texts packed without padding"
        self.backend = f"torch's encoder operations in {self.arithmetic}, {company}"
        self._approximation = "none" if config.activation == "gelu" else "tanh"

    def forward(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the last hidden states of each text, `[number of its tokens, hidden_size]`, on the device.

        Each text has 1 to `max_position` token ids, all in the vocabulary. On a GPU nothing waits for the device.
        """
        with torch.inference_mode():
            if self.device.type == "cpu":
                return [self._forward([len(text)], torch.tensor(text), torch.arange(len(text))) for text in texts]
            lengths = [len(text) for text in texts]
            tokens = torch.tensor([token_id for text in texts for token_id in text]).to(self.device, non_blocking=True)
            places = torch.cat([torch.arange(length) for length in lengths]).to(self.device, non_blocking=True)
            states = self._forward(lengths, tokens, places)
            ends = list(itertools.accumulate(lengths))
            return [states[end - length : end] for length, end in zip(lengths, ends, strict=True)]

    def _forward(self, lengths: Sequence[int], tokens: Tensor, places: Tensor) -> Tensor:
        """Compute texts that lie one after another in the rows: `[rows, hidden_size]`."""
        w = self.weights
        groups = _groups(lengths, self.device)
        hidden = self._norm(F.embedding(tokens, w.words) + F.embedding(places, w.positions), w.norm)
        for layer in w.layers:
            qkv = F.linear(hidden, layer.qkv.weight, layer.qkv.bias)
            attended = _attend(qkv, groups, self.config.num_heads)
            projected = F.linear(attended, layer.attention_out.weight, layer.attention_out.bias)
            hidden = self._norm(projected + hidden, layer.attention_norm)
            widened = self._activate(F.linear(hidden, layer.up.weight, layer.up.bias))
            hidden = self._norm(F.linear(widened, layer.down.weight, layer.down.bias) + hidden, layer.norm)
        return hidden

    def _norm(self, x: Tensor, norm: Affine) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, self.config.norm_eps)

    def _activate(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.config.activation == "relu" else F.gelu(x, approximate=self._approximation)


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts that attend together: where their tokens stand in the rows, `[texts, longest]`, and which exist, or all."""

    rows: Tensor | None
    exists: Tensor | None
    num_texts: int


def _groups(lengths: Sequence[int], device: torch.device) -> list[_Group]:
    if len(lengths) == 1:
        return [_Group(None, None, 1)]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    for text in order:
        if groups and lengths[text] <= _MAX_PADDING * lengths[groups[-1][0]]:
            groups[-1].append(text)
        else:
            groups.append([text])
    return [_group([(starts[text], lengths[text]) for text in group], device) for group in groups]


def _group(texts: list[tuple[int, int]], device: torch.device) -> _Group:
    longest = max(length for _, length in texts)
    start, length = torch.tensor(texts).T.unsqueeze(-1)
    place = torch.arange(longest)
    exists = place < length
    # Padding reads a row that exists, and is masked.
    rows = torch.where(exists, start + place, start)
    is_even = bool(exists.all())
    return _Group(rows.to(device), None if is_even else exists.to(device), len(texts))


def _attend(qkv: Tensor, groups: list[_Group], num_heads: int) -> Tensor:
    """Let the tokens of each text attend to each other: `[rows, 3 * hidden_size]` to `[rows, hidden_size]`."""
    out = torch.empty(qkv.shape[0], qkv.shape[1] // 3, dtype=qkv.dtype, device=qkv.device)
    for group in groups:
        chosen = qkv if group.rows is None else qkv[group.rows]
        chosen = chosen.view(group.num_texts, -1, 3, num_heads, out.shape[1] // num_heads)
        query, key, value = chosen.permute(2, 0, 3, 1, 4).unbind()
        mask = None if group.exists is None else group.exists[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(group.num_texts, -1, out.shape[1])
        if group.rows is None:
            return attended[0]
        if group.exists is None:
            out[group.rows.flatten()] = attended.flatten(0, 1)
        else:
            out[group.rows[group.exists]] = attended[group.exists]
    return out


def load_encoder(files: ModelFiles, options: LoadOptions) -> Encoder:
    """Load an encoder; raises ModelError and its children, also for options that only decoders have."""
    started_s = time.monotonic()
    if options.quantization not in ("auto", "none"):
        raise ModelError(f"quantization {options.quantization}: encoders compute in their dtype, unquantised")
    if options.kernels not in ("auto", "torch"):
        raise ModelError(f"kernels {options.kernels}: encoders run in torch's operations")
    config = read_encoder_config(files)
    dtype, device = choose_dtype(options.dtype, options.device), torch.device(options.device)
    source: WeightSource
    source = DummyWeights(options.dummy_seed) if files.format == "dummy" else SafetensorsWeights(files.weight_files)
    weights = _Reader(config, source, dtype, device).weights()
    summary = LoadSummary(weights.num_bytes(), time.monotonic() - started_s, str(dtype)[6:], options.device)
    return Encoder(config, weights, summary)


@dataclass(frozen=True, slots=True)
class _Reader:
    config: EncoderConfig
    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def weights(self) -> EncoderWeights:
        c = self.config
        words = self._tensor("embeddings.word_embeddings.weight", c.vocab_size, c.hidden_size)
        positions = self.source.tensor("embeddings.position_embeddings.weight", (c.max_position, c.hidden_size))
        segments = self.source.tensor("embeddings.token_type_embeddings.weight", (c.type_vocab_size, c.hidden_size))
        layers = tuple(self._layer(f"encoder.layer.{index}.") for index in range(c.num_layers))
        places = (positions.float() + segments[0].float()).to(self.device, self.dtype)
        norm = self._vectors("embeddings.LayerNorm", c.hidden_size)
        if left := [name for name in self.source.unused() if name not in _IGNORED]:
            raise WeightError(f"{c.architecture} has no place for {len(left)} tensors of this model, as {left[0]!r}")
        return EncoderWeights(words, places, norm, layers)

    def _layer(self, prefix: str) -> EncoderLayer:
        size, wide = self.config.hidden_size, self.config.intermediate_size
        heads = [self._matrix(f"{prefix}attention.self.{name}", size, size) for name in ("query", "key", "value")]
        return EncoderLayer(
            qkv=Affine(torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])),
            attention_out=self._matrix(f"{prefix}attention.output.dense", size, size),
            attention_norm=self._vectors(f"{prefix}attention.output.LayerNorm", size),
            up=self._matrix(f"{prefix}intermediate.dense", wide, size),
            down=self._matrix(f"{prefix}output.dense", size, wide),
            norm=self._vectors(f"{prefix}output.LayerNorm", size),
        )

    def _matrix(self, name: str, rows: int, cols: int) -> Affine:
        return Affine(self._tensor(f"{name}.weight", rows, cols), self._tensor(f"{name}.bias", rows))

    def _vectors(self, name: str, size: int) -> Affine:
        return Affine(self._tensor(f"{name}.weight", size), self._tensor(f"{name}.bias", size))

    def _tensor(self, name: str, *shape: int) -> Tensor:
        return self.source.tensor(name, shape).to(self.device, self.dtype)
