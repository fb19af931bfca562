"""transformers' continuous batching on random weights, in a process of its own that imports nothing of ours.

python -I transformers_peer.py '{"config": {...}, "device": "cuda", "dtype": "bfloat16", "batches": [1, 8], ...}'
    1. The model is made from its config, its weights drawn on the device.
    2. For each batch: random prompts go in together; each result that streams back gets a timestamp.
    3. One JSON object a line comes out for each batch; at the end, or where something is missing, one with `skip`.

It is started with -I because a folder of this repository bears the name of a package that transformers looks for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
import time
from typing import Any

ATTENTION = "sdpa"
# A step that takes this long is one that never ends: the caller has a budget of its own.
RESULT_BUDGET_S = 60.0


def main() -> int:
    """Measure what the first argument asks for."""
    asked = json.loads(sys.argv[1])
    if importlib.util.find_spec("transformers") is None:
        return tell({"skip": "transformers is not installed beside this Python"})
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        generation = importlib.import_module("transformers.generation")
        batching_config = generation.ContinuousBatchingConfig
    except (ImportError, AttributeError) as error:
        return tell({"skip": f"transformers with continuous batching cannot be imported: {error}"})
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, asked["dtype"])
    config = transformers.AutoConfig.for_model(**asked["config"])
    config._attn_implementation = ATTENTION
    with torch.device(asked["device"]), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tell({"loaded": transformers.__version__, "torch": torch.__version__, "attention": ATTENTION})
    most = max(asked["batches"])
    wanted = {
        "num_blocks": -(-most * (asked["context_tokens"] + asked["num_steps"] + 64) // asked["page_tokens"]) + most,
        "max_batch_tokens": asked["max_batch_tokens"],
        "auto_switch_to_flash": False,
        "allow_block_sharing": False,
    }
    settings = batching_config(**known(batching_config, wanted | {paging(batching_config): asked["page_tokens"]}))
    choice = transformers.GenerationConfig(
        max_new_tokens=asked["num_steps"], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    manager = model.init_continuous_batching(generation_config=choice, continuous_batching_config=settings)
    manager.start()
    try:
        for batch in asked["batches"]:
            tell({"batch": batch} | streams(manager, batch, asked))
    finally:
        manager.stop(block=True, timeout=10)
    return 0


def known(config: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Keep the settings that this version has."""
    return {name: value for name, value in wanted.items() if name in config.__dataclass_fields__}


def paging(config: Any) -> str:
    """Name the setting for tokens of a block: it was renamed."""
    return "page_size" if "page_size" in config.__dataclass_fields__ else "block_size"


def streams(manager: Any, batch: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Send `batch` prompts together; return the gaps between steps in which every stream got a token."""
    draw, vocab = random.Random(batch), asked["config"]["vocab_size"]
    num_prompt_tokens = max(1, asked["context_tokens"] - asked["num_steps"] // 2)
    names = [
        manager.add_request(
            [draw.randrange(3, vocab) for _ in range(num_prompt_tokens)],
            request_id=f"{batch}-{number}",
            max_new_tokens=asked["num_steps"],
            streaming=True,
        )
        for number in range(batch)
    ]
    seen: dict[str, list[float]] = {name: [] for name in names}
    num_open, began_s = batch, time.perf_counter()
    while num_open:
        result = manager.get_result(timeout=RESULT_BUDGET_S)
        if result is None or result.error is not None:
            return {"error": "no result in time" if result is None else str(result.error)}
        now_s = time.perf_counter()
        seen[result.request_id].append(now_s)
        num_open -= result.is_finished()
    return figures(list(seen.values()), began_s, asked["num_warm_steps"])


def figures(streams_s: list[list[float]], began_s: float, num_warm_steps: int) -> dict[str, Any]:
    """Return the median and the 99th percentile of the gaps while every stream ran."""
    begin_s = max(times[0] for times in streams_s)
    end_s = min(times[-1] for times in streams_s)
    gaps = sorted(
        b - a
        for times in streams_s
        for a, b in list(zip(times, times[1:], strict=False))[num_warm_steps:]
        if begin_s <= a and b <= end_s
    )
    if not gaps:
        return {"error": "the streams did not run side by side"}
    return {
        "itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
        "itl_p99_ms": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * 1e3,
        "first_tokens_s": begin_s - began_s,
        "num_gaps": len(gaps),
    }


def tell(what: dict[str, Any]) -> int:
    """Print one line; return the exit code of a run that has nothing more to say."""
    print(json.dumps(what), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
