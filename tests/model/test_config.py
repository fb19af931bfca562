"""Reading model configs: what is understood, and what is refused by name."""

import json
from pathlib import Path

import pytest

from model.config import ModelConfig, RopeScaling, from_hf, read_config
from model.errors import ModelError, UnsupportedModelError
from model.source import resolve
from tests.model.plain import TINY, VARIANTS, hf_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_config_reads_back(variant: str) -> None:
    assert from_hf(hf_config(VARIANTS[variant])) == VARIANTS[variant]


def test_defaults_are_those_of_hugging_face() -> None:
    values = hf_config(TINY)
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id", "rope_theta"):
        del values[name]
    config = from_hf(values)
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (8, 6, False)
    assert (config.eos_token_ids, config.rope_theta) == ((), 10000.0)


def test_rope_parameters_of_newer_transformers_are_read() -> None:
    values = hf_config(TINY)
    del values["rope_theta"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    assert from_hf(values).rope_theta == 77.0
    values["rope_parameters"] = {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}
    assert from_hf(values).rope_scaling == RopeScaling("linear", 2.0)


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**hf_config(TINY), "eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5, 9]}')
    assert read_config(resolve(f"dummy:{tmp_path}", tmp_path, print)).eos_token_ids == (7, 5, 9)


@pytest.mark.parametrize(
    ("architecture", "extra", "usable"),
    [
        ("MistralForCausalLM", {"sliding_window": 40}, 40),
        ("MistralForCausalLM", {"sliding_window": 4096}, 256),
        ("MistralForCausalLM", {"sliding_window": None}, 256),
        ("Qwen2ForCausalLM", {"sliding_window": 40, "use_sliding_window": False}, 256),
        ("Qwen2ForCausalLM", {"sliding_window": 40, "use_sliding_window": True}, 40),
        ("LlamaForCausalLM", {}, 256),
    ],
)
def test_the_usable_context_is_clamped_to_a_window_in_force(
    architecture: str, extra: dict[str, object], usable: int
) -> None:
    assert from_hf({**hf_config(TINY), "architectures": [architecture], **extra}).max_context_tokens == usable


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": []}, "None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config = 'awq'"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        from_hf({**hf_config(TINY), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": "many"}, "vocab_size must be an integer, found 'many'"),
        ({"hidden_size": None}, "hidden_size must be an integer, found None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_key_value_heads": 4}, "no multiple of num_kv_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": []}, "rms_norm_eps must be a number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
    ],
)
def test_a_damaged_field_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        from_hf({**hf_config(TINY), **change})


def test_a_config_that_is_no_json_object_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="must be a JSON object, found list"):
        read_config(resolve(f"dummy:{tmp_path}", tmp_path, print))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_config(resolve(f"dummy:{tmp_path}", tmp_path, print))


def test_kv_elements_count_both_halves_of_all_layers() -> None:
    config: ModelConfig = TINY
    assert config.kv_elements_per_token == 2 * 3 * 2 * 16
