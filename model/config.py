"""What the decoder must know about a model, read from a Hugging Face `config.json` or from a GGUF header.

One frozen record serves every supported architecture; what differs between them is a field here, never a subclass.
What cannot be run is refused by name (UnsupportedModelError), never approximated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ModelError, UnsupportedModelError
from model.gguf_file import GgufFile

if TYPE_CHECKING:
    from model.source import ModelFiles

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_KINDS = ("none", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    kind: `none`; `linear` (every frequency divided by factor); `llama3` (low frequencies divided by factor, high ones
    kept, a smooth ramp between, as Llama 3.1 does); `tensor` (divided by the factors that a GGUF file carries in
    `rope_freqs.weight`, which is how it stores llama3). The last three fields mean something for `llama3` only.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and settings of one decoder-only model; sizes in elements, positions in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling
    max_position: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position"):
            if getattr(self, name) <= 0:
                raise ModelError(f"model config: {name} must be positive, found {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"model config: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def max_context_tokens(self) -> int:
        """The longest usable context: max_position, or the sliding window where that is shorter.

        Every layer attends to its whole context here, so a sliding-window model is exact up to its window and is
        clamped to it.
        """
        return min(self.max_position, self.sliding_window or self.max_position)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V that one token takes over all layers (times the dtype's size: bytes)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class Fields:
    """Typed access to a JSON object or GGUF metadata: a wrong type or a missing field is a ModelError naming it."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values, self.where = values, where

    def integer(self, key: str, default: int | None = None) -> int:
        """Give an integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} must be an integer, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Give a number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} must be a number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Give a truth value."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} must be true or false, found {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Give an integer, or None where there is none."""
        return None if self.values.get(key) is None else self.integer(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Give token ids, none where there are none."""
        value = self.values.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise ModelError(f"{self.where}: {key} must be a token id or a list of them, found {value!r}")
        return tuple(items)


def read_config(files: "ModelFiles") -> ModelConfig:
    """Read the config of resolved model files; raises ModelError."""
    if files.format == "gguf":
        return from_gguf(GgufFile(files.weight_files[0]))
    if files.config_path is None:
        raise ModelError(f"{files.path}: config.json is missing")
    config = from_hf(read_json(files.config_path))
    if files.generation_config_path is None:
        return config
    generation = Fields(read_json(files.generation_config_path), "generation_config.json")
    merged = tuple(dict.fromkeys((*generation.token_ids("eos_token_id"), *config.eos_token_ids)))
    return replace(config, eos_token_ids=merged)


def from_hf(values: Mapping[str, object]) -> ModelConfig:
    """Read a Hugging Face `config.json` (already parsed); raises ModelError, UnsupportedModelError."""
    fields = Fields(values, "config.json")
    architecture = _hf_architecture(values)
    _refuse_hf_features(values)
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if num_heads <= 0:
        raise ModelError(f"config.json: num_attention_heads must be positive, found {num_heads}")
    theta, scaling = _hf_rope(values)
    bos = fields.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=fields.integer("max_position_embeddings", 2048),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_hf_sliding_window(fields, architecture),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _hf_architecture(values: Mapping[str, object]) -> str:
    listed = values.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and listed else None
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
        )
    return str(architecture)


def _refuse_hf_features(values: Mapping[str, object]) -> None:
    expected: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1, 1.0),
        "quantization_config": (),
    }
    for key, allowed in expected.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            shown = value.get("quant_method", value) if isinstance(value, dict) else value
            raise UnsupportedModelError(f"config.json: {key} = {shown!r} is not supported")


def _hf_rope(values: Mapping[str, object]) -> tuple[float, RopeScaling]:
    # transformers 5 writes rope_parameters, with theta inside; earlier ones rope_theta and rope_scaling.
    nested = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ModelError(f"config.json: rope_scaling must be an object, found {nested!r}")
    fields = Fields(nested, "config.json: rope_scaling")
    theta = fields.number("rope_theta", Fields(values, "config.json").number("rope_theta", 10000.0))
    kind = nested.get("rope_type", nested.get("type", "none"))
    kind = "none" if kind == "default" else kind
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "none":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", fields.number("factor"))
    return theta, RopeScaling(
        "llama3",
        fields.number("factor"),
        fields.number("low_freq_factor"),
        fields.number("high_freq_factor"),
        fields.integer("original_max_position_embeddings"),
    )


def _hf_sliding_window(fields: Fields, architecture: str) -> int | None:
    # Qwen carries a window size that is in force only with use_sliding_window; Llama has none.
    in_force = architecture == "MistralForCausalLM" or (
        architecture.startswith("Qwen") and fields.flag("use_sliding_window", False)
    )
    return fields.optional_integer("sliding_window") if in_force else None


def from_gguf(file: GgufFile) -> ModelConfig:
    """Read a GGUF header; raises ModelError, UnsupportedModelError."""
    name = file.metadata.get("general.architecture")
    architecture = GGUF_ARCHITECTURES.get(str(name))
    if architecture is None:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedModelError(
            f"{file.path.name}: GGUF architecture {name!r} is not supported (supported: {known})"
        )
    fields = Fields(file.metadata, file.path.name)
    if fields.integer(f"{name}.expert_count", 0):
        raise UnsupportedModelError(f"{file.path.name}: mixture-of-experts models are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path.name}: tensor 'token_embd.weight' is missing")
    num_heads, hidden_size = fields.integer(f"{name}.attention.head_count"), fields.integer(f"{name}.embedding_length")
    if num_heads <= 0:
        raise ModelError(f"{file.path.name}: {name}.attention.head_count must be positive, found {num_heads}")
    head_dim = fields.integer(f"{name}.attention.key_length", hidden_size // num_heads)
    if fields.integer(f"{name}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path.name}: rotary embedding of a part of the head is not supported")
    return ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{name}.feed_forward_length"),
        num_layers=fields.integer(f"{name}.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer(f"{name}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=fields.number(f"{name}.rope.freq_base", 10000.0),
        rope_scaling=_gguf_rope_scaling(file, fields, str(name)),
        max_position=fields.integer(f"{name}.context_length"),
        rms_eps=fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=fields.optional_integer(f"{name}.attention.sliding_window"),
        bos_token_id=fields.optional_integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_gguf_eos(fields),
    )


def _gguf_rope_scaling(file: GgufFile, fields: Fields, name: str) -> RopeScaling:
    if "rope_freqs.weight" in file.tensors:
        return RopeScaling("tensor")
    kind = fields.values.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"{file.path.name}: rope scaling {kind!r} is not supported")
    factor = fields.number(f"{name}.rope.scaling.factor", 1.0)
    return RopeScaling("linear", factor) if kind == "linear" and factor != 1.0 else RopeScaling()


def _gguf_eos(fields: Fields) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    ids = (fields.optional_integer(key) for key in keys)
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file; raises ModelError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path.name}: must be a JSON object, found {type(values).__name__}")
    return values
