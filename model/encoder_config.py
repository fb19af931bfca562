"""What an encoder must be told about a model: its shape, and how the vectors of a text's tokens become one.

1. `is_encoder` looks at `config.json`: a BertModel embeds, everything else generates (`model/config.py`). 2.
`read_encoder_config` reads the shape; what cannot be run is refused by name. 3. `read_embedding_settings` reads what
sentence-transformers wrote beside it (`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`), for
encoders and decoders alike; where nothing is written, encoders take the mean and decoders the last token, normalised.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import Fields, read_json
from model.errors import ModelError, UnsupportedModelError
from model.source import ModelFiles

ENCODER_ARCHITECTURES = ("BertModel",)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

PoolingName = Literal["mean", "cls", "last"]
_POOLING_FLAGS: dict[str, PoolingName] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Shape of one BERT encoder; sizes in elements, positions in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    type_vocab_size: int
    norm_eps: float
    activation: str

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_position")
        for name in (*sizes, "type_vocab_size"):
            if getattr(self, name) <= 0:
                raise ModelError(f"model config: {name} must be positive, found {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"model config: hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How a text becomes one vector.

    Attributes:
        pooling: the mean over all tokens, the first one, or the last one.
        is_normalized: whether its length is made 1.
        max_tokens: of a text, its frame ([CLS], [SEP]) included.
    """

    pooling: PoolingName
    is_normalized: bool
    max_tokens: int


def is_encoder(files: ModelFiles) -> bool:
    """Tell whether a model only embeds; raises ModelError where its config cannot be read."""
    if files.config_path is None:
        return False
    listed = read_json(files.config_path).get("architectures")
    return isinstance(listed, list) and bool(listed) and listed[0] in ENCODER_ARCHITECTURES


def read_encoder_config(files: ModelFiles) -> EncoderConfig:
    """Read the config of an encoder; raises ModelError, UnsupportedModelError."""
    if files.config_path is None:
        raise ModelError(f"{files.path}: config.json is missing")
    values = read_json(files.config_path)
    expected: dict[str, tuple[object, ...]] = {
        "hidden_act": ACTIVATIONS,
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (),
    }
    for key, allowed in expected.items():
        if values.get(key) is not None and values[key] not in allowed:
            raise UnsupportedModelError(f"config.json: {key} = {values[key]!r} is not supported")
    listed = values.get("architectures")
    if not isinstance(listed, list) or not listed or listed[0] not in ENCODER_ARCHITECTURES:
        raise UnsupportedModelError(f"architectures {listed!r}: of encoders, {ENCODER_ARCHITECTURES[0]} is supported")
    fields = Fields(values, "config.json")
    return EncoderConfig(
        architecture=str(listed[0]),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        max_position=fields.integer("max_position_embeddings", 512),
        type_vocab_size=fields.integer("type_vocab_size", 2),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        activation=str(values.get("hidden_act") or "gelu"),
    )


def read_embedding_settings(files: ModelFiles, max_tokens: int, default: PoolingName) -> EmbeddingSettings:
    """Read how texts are pooled.

    Args:
        files: of the model; a GGUF file says nothing.
        max_tokens: what the model's positions allow.
        default: pooling where the files say nothing.

    Raises ModelError where a file is damaged, UnsupportedModelError for a module or pooling that is not run.
    """
    folder = files.path
    if files.format == "gguf" or not (folder / "modules.json").is_file():
        return EmbeddingSettings(default, True, max_tokens)
    modules = _modules(folder / "modules.json")
    pooling, is_normalized = default, False
    for kind, path in modules:
        if kind == "Pooling":
            pooling = _pooling(folder / path / "config.json")
        elif kind == "Normalize":
            is_normalized = True
        elif kind != "Transformer":
            raise UnsupportedModelError(f"modules.json: a module of type {kind} is not supported")
    limits = folder / "sentence_bert_config.json"
    limit = Fields(read_json(limits), limits.name).optional_integer("max_seq_length") if limits.is_file() else None
    if limit is not None and limit <= 0:
        raise ModelError(f"{limits.name}: max_seq_length must be positive, found {limit}")
    return EmbeddingSettings(pooling, is_normalized, min(limit or max_tokens, max_tokens))


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return (class name, folder) of each module."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(entry["type"]).rsplit(".", 1)[-1], str(entry["path"])) for entry in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path.name}: damaged ({error!r})") from error
    for _, folder in found:
        # A module lies in a folder beside this file: the list must not reach elsewhere on the disk.
        if Path(folder).name != folder:
            raise ModelError(f"{path.name}: {folder!r} is not a plain folder name")
    return found


def _pooling(path: Path) -> PoolingName:
    where = f"{path.parent.name}/{path.name}"
    fields = Fields(read_json(path), where)
    chosen = [key for key in fields.values if key.startswith("pooling_mode_") and fields.flag(key, False)]
    if len(chosen) != 1 or chosen[0] not in _POOLING_FLAGS:
        known = ", ".join(_POOLING_FLAGS)
        raise UnsupportedModelError(f"{where}: pooling {chosen} is not supported (supported: one of {known})")
    return _POOLING_FLAGS[chosen[0]]
