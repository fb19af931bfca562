"""A straightforward decoder without cache, packing or paging, to compare the real one with; and tiny configs."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels.reference import Matrix
from model.batch import ForwardBatch
from model.config import ModelConfig, RopeScaling
from model.decoder import Decoder
from model.loader import LoadOptions, load_model
from model.source import ModelFiles
from model.torch_decoder import TorchDecoder
from model.weights import WeightSource

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500.0,
    rope_scaling=RopeScaling(),
    max_position=256,
    rms_eps=1e-5,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    bos_token_id=1,
    eos_token_ids=(2,),
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
VARIANTS = {
    "llama": TINY,
    "smollm2": replace(TINY, tie_embeddings=True, num_heads=3, num_kv_heads=1),
    "llama3.1": replace(TINY, rope_scaling=LLAMA3),
    "linear rope": replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "mistral": replace(TINY, architecture="MistralForCausalLM", num_kv_heads=6),
    "qwen2": replace(TINY, architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": replace(TINY, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=32, tie_embeddings=True),
}


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Write a config the way a Hugging Face config.json does."""
    values: dict[str, object] = {
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        values["rope_scaling"] = {"type": "linear", "factor": scaling.factor}
    if scaling.kind == "llama3":
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return values


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List every tensor of a model with its shape, under Hugging Face names."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[prefix + "mlp.gate_proj.weight"] = (wide, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (wide, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, wide)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def all_tensors(config: ModelConfig, source: WeightSource) -> dict[str, Tensor]:
    """Read every tensor of a model from a source."""
    return {name: source.tensor(name, shape) for name, shape in tensor_shapes(config).items()}


def plain_logits(config: ModelConfig, tensors: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Compute the logits of every position in float64, one head and one position at a time: [T, vocab]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        x = x + _attention(config, weights, prefix, _norm(x, weights[prefix + "input_layernorm.weight"], config))
        y = _norm(x, weights[prefix + "post_attention_layernorm.weight"], config)
        gate, up = (y @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    x = _norm(x, weights["model.norm.weight"], config)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_eps) * weight


def _attention(config: ModelConfig, weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    heads: dict[str, list[Tensor]] = {}
    for name, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        rows = x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T
        rows = rows + weights.get(f"{prefix}self_attn.{name}_proj.bias", torch.zeros(1).double())
        heads[name] = list(torch.split(rows, config.head_dim, dim=1))
        assert len(heads[name]) == count
        if config.qk_norm and name != "v":
            heads[name] = [_norm(h, weights[f"{prefix}self_attn.{name}_norm.weight"], config) for h in heads[name]]
        if name != "v":
            heads[name] = [_rotate(head, config) for head in heads[name]]
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    outputs = []
    for index, query in enumerate(heads["q"]):
        shared = index // (config.num_heads // config.num_kv_heads)
        scores = (query @ heads["k"][shared].T / math.sqrt(config.head_dim)).masked_fill(future, -math.inf)
        outputs.append(torch.softmax(scores, -1) @ heads["v"][shared])
    return torch.cat(outputs, 1) @ weights[prefix + "self_attn.o_proj.weight"].T


def _rotate(head: Tensor, config: ModelConfig) -> Tensor:
    half = config.head_dim // 2
    out = torch.empty_like(head)
    for pair in range(half):
        frequency = _scaled_frequency(config.rope_theta ** (-2 * pair / config.head_dim), config.rope_scaling)
        angles = torch.arange(len(head)).double() * frequency
        first, second = head[:, pair], head[:, pair + half]
        out[:, pair] = first * angles.cos() - second * angles.sin()
        out[:, pair + half] = second * angles.cos() + first * angles.sin()
    return out


def _scaled_frequency(frequency: float, scaling: RopeScaling) -> float:
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "none":
        return frequency
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * frequency / scaling.factor + share * frequency


def batch_of(
    pieces: list[tuple[list[int], int]], tables: Tensor, block_size: int, all_rows: bool = False, decode: bool = False
) -> ForwardBatch:
    """Build a batch: per sequence its new tokens and how many stand in the cache already; last rows get logits."""
    positions = [torch.arange(cached, cached + len(tokens)) for tokens, cached in pieces]
    slots = [tables[row, p // block_size].long() * block_size + p % block_size for row, p in enumerate(positions)]
    counts = torch.tensor([len(tokens) for tokens, _ in pieces])
    ends = counts.cumsum(0)
    return ForwardBatch(
        token_ids=torch.tensor([token for tokens, _ in pieces for token in tokens]),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
        seq_lens=torch.tensor([cached + len(tokens) for tokens, cached in pieces]).int(),
        block_tables=tables,
        logits_indices=torch.arange(int(ends[-1])) if all_rows else ends - 1,
        is_decode=decode,
    )


def new_cache(decoder: Decoder, num_sequences: int, num_tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Make a zeroed KV cache and shuffled block tables that hold num_tokens for each sequence."""
    blocks_each = -(-num_tokens // block_size)
    kv_cache = torch.zeros(decoder.kv_shape(num_sequences * blocks_each + 1, block_size), dtype=decoder.kv_dtype)
    order = torch.randperm(num_sequences * blocks_each, generator=torch.Generator().manual_seed(1))
    return kv_cache, order.view(num_sequences, blocks_each).int()


def load_torch(files: ModelFiles, dtype: str = "auto") -> TorchDecoder:
    """Load for the torch kernels, whose weights can be looked at."""
    decoder = load_model(files, LoadOptions(dtype=dtype, kernels="torch"))
    assert isinstance(decoder, TorchDecoder)
    return decoder


def floats(matrix: Matrix) -> Tensor:
    """Give a matrix that is not in 8 bits."""
    assert isinstance(matrix, Tensor)
    return matrix
