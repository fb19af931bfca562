"""Options of vLLM's under the names that its users type: the same thing here, or a word on what is meant here.

1. `ALIASES` has those that are options here under another name: they are taken wherever ours are.
2. `ELSEWHERE` has the others. A value that asks for what is so anyway is accepted; any other one is refused with one
   line that says what to write, or why nothing needs to be written.
3. Names that are the same here and there stand in neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.errors import ConfigError

ALIASES: Final[dict[str, str]] = {
    "gpu_memory_utilization": "kv_memory_share",
    "max_num_batched_tokens": "prefill_chunk_tokens",
    "num_gpu_blocks_override": "num_kv_blocks",
    "uvicorn_log_level": "log_level",
}
"""Our key of an option by vLLM's."""

SHORT: Final[dict[str, str]] = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-q": "quantization",
}
"""Keys by the short forms of the command line."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An option that does not exist here.

    Attributes:
        says: what is meant here.
        holds: values, as text in lower case, that ask for what is so anyway.
        is_flag: takes no value on the command line, and has a `--no-` form.
    """

    says: str
    holds: frozenset[str] = frozenset()
    is_flag: bool = False

    def check(self, source: str, value: object) -> None:
        """Accept a value that asks for what is so; raise ConfigError for any other."""
        if str(value).lower() not in self.holds:
            raise ConfigError(f"{source}: {self.says}")


def _one(says: str) -> Elsewhere:
    return Elsewhere(says, frozenset({"1"}))


def _zero(says: str) -> Elsewhere:
    return Elsewhere(says, frozenset({"0", "0.0"}))


def _always(says: str) -> Elsewhere:
    return Elsewhere(says, frozenset({"true"}), is_flag=True)


def _never(says: str) -> Elsewhere:
    return Elsewhere(says, frozenset({"false"}), is_flag=True)


_WORKERS: Final = "a model lies on one device; more of them work side by side with --prefill N and --decode N"
_LORA: Final = "adapters are not supported: merge them into the weights"
_CODE: Final = "no code out of a model's folder is ever run, and none is needed: leave it out"
_TLS: Final = "the server speaks plain HTTP: put a proxy that speaks TLS in front of it"
_LOGGED: Final = "requests have a line each by --access-log (text, json or off); the rest is for --log-level to say"
_SPLIT: Final = "prefill and decode are split anyway: --prefill N, --decode N, and --kv-staging for the way of the KV"

ELSEWHERE: Final[dict[str, Elsewhere]] = {
    "tensor_parallel_size": _one(_WORKERS),
    "pipeline_parallel_size": _one(_WORKERS),
    "data_parallel_size": _one("more workers are --prefill N and --decode N"),
    "enable_expert_parallel": _never(_WORKERS),
    "distributed_executor_backend": Elsewhere(_WORKERS),
    "api_server_count": _one("one router serves all clients"),
    "kv_transfer_config": Elsewhere(_SPLIT),
    "enable_prefix_caching": _always("prefixes are always cached; a cache_salt of its own keeps a request apart"),
    "enable_chunked_prefill": _always("prompts are always computed in chunks, of --prefill-chunk-tokens"),
    "enable_auto_tool_choice": _always("tools are always on; a request without tools, or tool_choice none, has none"),
    "tool_call_parser": Elsewhere("the form of tool calls follows from the model's chat template: leave it out"),
    "reasoning_parser": Elsewhere("reasoning is not told apart from the answer: leave it out"),
    "trust_remote_code": _never(_CODE),
    "swap_space": _zero("nothing is swapped: what gives way is computed again; leave it out"),
    "cpu_offload_gb": _zero("weights are not offloaded: --quantization makes them smaller"),
    "seed": Elsewhere("each request has its own: the field `seed` of its body", frozenset({"0"})),
    "speculative_config": Elsewhere("there is no speculative decoding: leave it out"),
    "speculative_model": Elsewhere("there is no speculative decoding: leave it out"),
    "num_speculative_tokens": _zero("there is no speculative decoding: leave it out"),
    "disable_log_requests": Elsewhere(_LOGGED, is_flag=True),
    "enable_log_requests": Elsewhere(_LOGGED, is_flag=True),
    "disable_log_stats": Elsewhere("figures are at /metrics and are not logged: leave it out", is_flag=True),
    "disable_uvicorn_access_log": Elsewhere(_LOGGED, is_flag=True),
    "max_log_len": Elsewhere("prompts are not logged: leave it out"),
    "log_config_file": Elsewhere(_LOGGED),
    "tokenizer": Elsewhere("the model's own is used: name a model whose files hold the tokenizer"),
    "tokenizer_mode": Elsewhere("the model's own is used: leave it out", frozenset({"auto"})),
    "skip_tokenizer_init": _never("the router always speaks text: leave it out"),
    "load_format": Elsewhere("safetensors and GGUF are told apart by themselves", frozenset({"auto"})),
    "download_dir": Elsewhere("HF_HOME says where models of the hub are kept, --cache-dir where those of aliases are"),
    "revision": Elsewhere("it is part of the model's name: ORG/NAME@REVISION"),
    "hf_token": Elsewhere("set the variable HF_TOKEN"),
    "task": Elsewhere(
        "what a model can do follows from its files: generate, and /v1/embeddings", frozenset({"auto", "generate"})
    ),
    "runner": Elsewhere(
        "what a model can do follows from its files: generate, and /v1/embeddings", frozenset({"auto", "generate"})
    ),
    "generation_config": Elsewhere("a model's own defaults of sampling are not taken: leave it out"),
    "override_generation_config": Elsewhere("each request says how it is sampled: leave it out"),
    "guided_decoding_backend": Elsewhere("say --grammar-backend: llguidance or xgrammar", frozenset({"auto"})),
    "structured_outputs_config": Elsewhere("say --grammar-backend: llguidance or xgrammar"),
    "scheduling_policy": Elsewhere("requests may bring a `priority`; equal ones go by deadline: leave it out"),
    "max_logprobs": Elsewhere("the limit is fixed: 20 of the likeliest tokens"),
    "max_seq_len_to_capture": Elsewhere("graphs are recorded by batch, for any length; --enforce-eager has none"),
    "compilation_config": Elsewhere("kernels are compiled ahead: leave it out; --kernels and --enforce-eager choose"),
    "kv_cache_memory_bytes": Elsewhere("say --kv-cache-gib, in GiB"),
    "max_num_partial_prefills": Elsewhere("prompts take turns by their deadlines: leave it out"),
    "long_prefill_token_threshold": Elsewhere("prompts take turns by their deadlines: leave it out"),
    "enable_lora": _never(_LORA),
    "lora_modules": Elsewhere(_LORA),
    "max_lora_rank": Elsewhere(_LORA),
    "max_loras": Elsewhere(_LORA),
    "max_cpu_loras": Elsewhere(_LORA),
    "async_scheduling": Elsewhere("on a GPU steps are always prepared ahead: leave it out", is_flag=True),
    "attention_backend": Elsewhere("say --kernels: auto, native, triton or torch", frozenset({"auto"})),
    "num_scheduler_steps": _one("each step is scheduled: leave it out"),
    "enable_sleep_mode": _never("a server that sleeps is one that is stopped: leave it out"),
    "disable_custom_all_reduce": Elsewhere(_WORKERS, is_flag=True),
    "prefix_caching_hash_algo": Elsewhere("the hash is fixed: leave it out"),
    "enable_prompt_tokens_details": _always("cached_tokens are always told"),
    "enable_request_id_headers": _always("answers always have X-Request-ID"),
    "return_tokens_as_token_ids": Elsewhere("requests ask for return_token_ids", is_flag=True),
    "tokenizer_revision": Elsewhere("it is part of the model's name: ORG/NAME@REVISION"),
    "mm_processor_kwargs": Elsewhere("only text is served: leave it out"),
    "limit_mm_per_prompt": Elsewhere("only text is served: leave it out"),
    "chat_template_content_format": Elsewhere("content is given to templates as text: leave it out"),
    "response_role": Elsewhere("answers have the role assistant", frozenset({"assistant"})),
    "root_path": Elsewhere("put a proxy in front that takes the path away"),
    "ssl_keyfile": Elsewhere(_TLS),
    "ssl_certfile": Elsewhere(_TLS),
    "ssl_ca_certs": Elsewhere(_TLS),
    "allow_credentials": Elsewhere("keys come in a header, no cookie is ever read: leave it out", is_flag=True),
    "allowed_methods": Elsewhere("--allowed-origins says all there is to say"),
    "allowed_headers": Elsewhere("--allowed-origins says all there is to say"),
    "middleware": Elsewhere("no code of others runs in the router: put a proxy in front of it"),
    "enable_server_load_tracking": _always("/load always tells"),
    "disable_frontend_multiprocessing": Elsewhere("--mode colocated has the fewest processes", is_flag=True),
    "model_impl": Elsewhere("there is one implementation of each model", frozenset({"auto"})),
    "hf_overrides": Elsewhere("edit the config.json of a copy of the model"),
    "rope_scaling": Elsewhere("edit the config.json of a copy of the model"),
}
"""By vLLM's key."""
