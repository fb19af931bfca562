"""The engine in this process, with the real model: results, order, streaming, abort, cancellation, errors, end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from baton import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from baton.async_llm import Prompt, new_request
from baton.in_process import configure
from engine.kv_cache import KVCache
from engine.loading import LoadedModel
from protocol.errors import (
    ConfigError,
    ContextTooLong,
    EngineDead,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestFailed,
)

pytestmark = pytest.mark.model
GREEDY = SamplingParams(temperature=0, max_tokens=8)
OPTIONS: dict[str, Any] = {"num_kv_blocks": 256, "threads": 1}
FRANCE, PARIS = "The capital of France is", " Paris.\n\nThe answer is:"


@pytest.fixture(scope="module")
def llm(cache_dir: Path) -> Iterator[LLM]:
    with LLM("smollm2", cache_dir=str(cache_dir), max_num_seqs=2, **OPTIONS) as llm:
        yield llm


@pytest_asyncio.fixture
async def engine(cache_dir: Path) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM("smollm2", cache_dir=str(cache_dir), max_num_requests=4, **OPTIONS) as engine:
        yield engine


async def none_leased(engine: AsyncLLM) -> None:
    async with asyncio.timeout(10):
        while engine.engine.leased_blocks():
            await asyncio.sleep(0.01)


def test_outputs_come_in_order_however_many_there_are(llm: LLM) -> None:
    prompts = [f"{i}: {FRANCE}" for i in range(12)]
    lengths = [1 + i * 5 % 7 for i in range(12)]
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=n) for n in lengths], show_progress=True)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert (
        llm.generate(prompts[3], SamplingParams(temperature=0, max_tokens=lengths[3]))[0].outputs == outputs[3].outputs
    )


def test_prompts_of_every_shape_say_the_same(llm: LLM) -> None:
    (text,) = llm.generate(FRANCE, GREEDY)
    ids = text.prompt_token_ids
    prompts: list[Prompt] = [ids, {"prompt": FRANCE}, {"prompt_token_ids": ids}, FRANCE]
    shapes = llm.generate(prompts, GREEDY)
    assert text.outputs[0].text == PARIS
    assert [(s.prompt, s.outputs) for s in shapes] == [(FRANCE, text.outputs)] * 4
    assert llm.generate([], GREEDY) == []
    assert llm.generate(list(np.array(ids)), GREEDY)[0].outputs == text.outputs
    (whole,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=None, stop="answer"))
    assert whole.outputs[0].text == " Paris.\n\nThe " and whole.outputs[0].stop_reason == "answer"


def test_choices_seeds_and_logprobs(llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=7, max_tokens=6, logprobs=2, ignore_eos=True, logit_bias={7042: 1.5})
    (first,), (again,) = llm.generate(FRANCE, sampling), llm.generate(FRANCE, sampling)
    assert first.outputs == again.outputs and len({tuple(o.token_ids) for o in first.outputs}) > 1
    for choice in first.outputs:
        assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids) == 6
        for token_id, ranked in zip(choice.token_ids, choice.logprobs, strict=True):
            assert token_id in ranked and len(ranked) in (2, 3)
            assert sorted(ranked.values(), key=lambda one: -one.logprob)[0].rank == 1


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    hi = [{"role": "user", "content": "Say hi"}]
    (one,) = llm.chat(hi, GREEDY)
    assert "<|im_start|>user\nSay hi<|im_end|>" in one.prompt
    assert [o.outputs for o in llm.chat([hi, hi], [GREEDY, GREEDY])] == [one.outputs] * 2


def test_texts_become_vectors(llm: LLM) -> None:
    one, two = llm.embed(["The sea", FRANCE])
    assert len(one) == len(two) == 576 and one != two and abs(sum(x * x for x in one) - 1) < 1e-3
    assert llm.embed("The sea") == [one] and llm.embed([]) == []
    with pytest.raises(InvalidRequest, match="input"):
        llm.embed([""])


def test_the_calls_that_users_of_vllm_type(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, n=1, best_of=1, top_p=1.0, top_k=-1, use_beam_search=False)
    sampling.max_tokens = 8
    (output,) = llm.generate([FRANCE], sampling, False)
    assert capsys.readouterr().err == ""
    assert llm.generate(prompts=FRANCE, sampling_params=sampling, use_tqdm=True)[0].outputs == output.outputs
    assert "requests" in capsys.readouterr().err
    (choice,) = output.outputs
    assert choice.text == PARIS and choice.finished() and choice.cumulative_logprob is None
    assert output.metrics is not None and output.metrics.finished_time is not None
    assert output.metrics.arrival_time < (output.metrics.first_token_time or 0) <= output.metrics.finished_time
    ids = output.prompt_token_ids
    logged = SamplingParams(temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=0, detokenize=False)
    (told,) = llm.generate([{"prompt_token_ids": ids, "cache_salt": "s"}], logged, use_tqdm=False, priority=[3])
    assert told.outputs[0].text == "" and told.outputs[0].token_ids == choice.token_ids[:2]
    assert told.outputs[0].cumulative_logprob is not None and told.outputs[0].cumulative_logprob < 0
    (tail,) = llm.generate(FRANCE, SamplingParams(max_tokens=1, truncate_prompt_tokens=2))
    assert tail.prompt_token_ids == ids[-2:]
    assert sampling.clone() == sampling and sampling.clone() is not sampling


def test_structured_outputs_in_every_shape(llm: LLM) -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"enum": ["yes"]}

    class Theirs:
        json, regex, choice, grammar, json_object = None, "ye[s]", None, None, False

    for given in ({"choice": ["yes"]}, StructuredOutputsParams(choice=["yes"]), Theirs(), {"json": '{"const": "yes"}'}):
        for sampling in (
            SamplingParams(temperature=0, structured_outputs=given),
            SamplingParams(temperature=0, guided_decoding=given),
        ):
            assert llm.generate(FRANCE, sampling)[0].outputs[0].text.strip('"') == "yes"
    schema = SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(json=Model))
    assert llm.chat([{"role": "user", "content": "?"}], schema, use_tqdm=False)[0].outputs[0].text == '"yes"'


def test_what_vllm_has_and_we_have_not_is_refused_by_name(llm: LLM) -> None:
    refused: list[dict[str, Any]] = [
        *({"bad_words": ["x"]}, {"allowed_token_ids": [5]}, {"logits_processors": [print]}, {"use_beam_search": True}),
        *({"length_penalty": 2.0}, {"best_of": 3}, {"spaces_between_special_tokens": False}, {"early_stopping": True}),
        *({"extra_args": {"x": 1}}, {"structured_outputs": {}}),
    ]
    for fields in refused:
        with pytest.raises(InvalidRequest) as caught:
            llm.generate(FRANCE, SamplingParams(**fields))
        assert caught.value.param == next(iter(fields))
    with pytest.raises(InvalidRequest, match="multi_modal_data"):
        llm.generate({"prompt": "x", "multi_modal_data": {"image": 1}})
    with pytest.raises(InvalidRequest, match="tools: LLM.chat does not take it"):
        llm.chat([{"role": "user", "content": "x"}], tools=[{}])
    with pytest.raises(InvalidRequest, match="priority: 2 for 1"):
        llm.generate("x", priority=[1, 2])


def test_the_tokenizer_is_the_engines(llm: LLM) -> None:
    tokenizer, talk = llm.get_tokenizer(), [{"role": "user", "content": "Say hi"}]
    (output,) = llm.chat(talk, GREEDY)
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True) == output.prompt_token_ids
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == output.prompt
    ids = tokenizer.encode(FRANCE)
    assert llm.generate(FRANCE, GREEDY)[0].prompt_token_ids == ids == tokenizer(FRANCE)["input_ids"]
    assert tokenizer.decode(ids) == FRANCE and tokenizer.batch_decode([ids, ids[:1]])[1] == "The"
    assert tokenizer.tokenize("The capital") == ["The", " capital"]
    end = tokenizer.eos_token_id
    assert end is not None and tokenizer.decode(end) == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([end], skip_special_tokens=True) == ""
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == end
    assert len(tokenizer) == tokenizer.vocab_size > max(ids)


def test_a_seed_of_the_engine_makes_its_requests_repeatable(cache_dir: Path) -> None:
    told = []
    for seed in (1, 1, 2):
        with LLM(
            model="smollm2", cache_dir=str(cache_dir), seed=seed, gpu_memory_utilization=0.5, tensor_parallel_size=1,
            trust_remote_code=False, dtype="auto", max_model_len=256, enforce_eager=True, swap_space=0, threads=1,
        ) as engine:  # fmt: skip
            sampling = SamplingParams(max_tokens=8, ignore_eos=True)
            one, two = engine.generate([FRANCE, FRANCE], sampling)
            assert one.outputs != two.outputs
            told.append([one.outputs, two.outputs])
    assert told[0] == told[1] != told[2]


def test_what_cannot_be_run_names_its_field(llm: LLM) -> None:
    for bad, param in (
        (SamplingParams(temperature=-1), "temperature"),
        (SamplingParams(logit_bias={10**9: 1.0}), "logit_bias"),
        (SamplingParams(max_tokens=10**6), "max_tokens"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(logit_bias={5: float("inf")}), "logit_bias"),
        (SamplingParams(seed=1 << 80), "seed"),
        (SamplingParams(stop="\ud800"), "stop"),
        (SamplingParams(structured_outputs={"regex": "("}), "structured_outputs"),
    ):
        with pytest.raises((InvalidRequest, ContextTooLong)) as caught:
            llm.generate([FRANCE, FRANCE], [GREEDY, bad])
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="2 for 1 prompts"):
        llm.generate(FRANCE, [GREEDY, GREEDY])
    assert llm.generate(FRANCE, GREEDY)[0].outputs[0].text == PARIS


def test_options_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="did you mean block_size"):
        configure("smollm2", {"blok_size": 16})
    with pytest.raises(ConfigError, match="no such option"):
        configure("smollm2", {"port": 80})
    with pytest.raises(ConfigError, match="did you mean gpu_memory_utilization"):
        configure("smollm2", {"gpu_memory_utilisation": 0.9})
    with pytest.raises(ConfigError, match="^tensor_parallel_size: a model lies on one device"):
        configure("smollm2", {"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="^trust_remote_code: no code out of a model's folder"):
        configure("smollm2", {"trust_remote_code": True})
    with pytest.raises(ConfigError, match="is the same as kv_memory_share"):
        configure("smollm2", {"kv_memory_share": 0.5, "gpu_memory_utilization": 0.5})
    with pytest.raises(ConfigError, match="num_kv_blocks: must be at least 2"):
        configure("smollm2", {"num_kv_blocks": 1})


def test_a_closed_engine_says_so(cache_dir: Path) -> None:
    llm = LLM("smollm2", cache_dir=str(cache_dir), **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate(FRANCE, GREEDY)


async def test_a_stream_grows_to_the_whole_answer(engine: AsyncLLM) -> None:
    cumulative = [output async for output in engine.generate(FRANCE, GREEDY)]
    assert cumulative[-1].finished and not cumulative[0].finished
    assert [len(output.outputs[0].token_ids) for output in cumulative] == sorted(
        len(output.outputs[0].token_ids) for output in cumulative
    )
    deltas = [output async for output in engine.generate(FRANCE, GREEDY, deltas=True)]
    assert "".join(d.outputs[0].text for d in deltas) == cumulative[-1].outputs[0].text == PARIS
    assert sum((d.outputs[0].token_ids for d in deltas), []) == cumulative[-1].outputs[0].token_ids
    hi = [{"role": "user", "content": "Say hi"}]
    assert [output async for output in engine.chat(hi, GREEDY)][-1].outputs[0].text


async def test_abort_leaving_and_cancelling_free_every_block(engine: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=1500, ignore_eos=True)
    with pytest.raises(RequestAborted):
        async for output in engine.generate(FRANCE, long, "mine"):
            with pytest.raises(InvalidRequest, match="still running"):
                await anext(engine.generate(FRANCE, long, "mine"))
            assert not output.finished and await engine.abort("mine")
    assert not await engine.abort("mine")
    await none_leased(engine)
    async for _ in engine.generate(FRANCE, long, "left"):
        break
    await none_leased(engine)
    reading = asyncio.create_task(engine.finish(new_request(FRANCE, None, long)))
    async with asyncio.timeout(10):
        while not engine.engine.leased_blocks():
            await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await none_leased(engine)


async def test_more_than_the_limit_is_refused_and_the_end_ends_everything(engine: AsyncLLM) -> None:
    streams = [engine.generate(FRANCE, SamplingParams(max_tokens=500, ignore_eos=True)) for _ in range(4)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(Overloaded):
        await anext(engine.generate(FRANCE, GREEDY))
    await engine.close()
    for stream in streams:
        with pytest.raises(RequestFailed):
            async for _ in stream:
                pass
    with pytest.raises(EngineDead):
        await anext(engine.generate(FRANCE, GREEDY))
    await engine.close()


def test_importing_baton_loads_nothing_heavy() -> None:
    code = "import sys, baton; baton.SamplingParams(n=2); sys.exit('torch' in sys.modules or 'aiohttp' in sys.modules)"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 0
    with pytest.raises(ImportError):
        from baton import nothing_of_the_kind  # noqa: F401


def test_a_closed_engine_gives_its_memory_back(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    new_kv_cache = LoadedModel.new_kv_cache

    def noted(model: LoadedModel) -> KVCache:
        made.append(weakref.ref(model.decoder))
        made.append(weakref.ref(cache := new_kv_cache(model)))
        return cache

    monkeypatch.setattr(LoadedModel, "new_kv_cache", noted)
    with LLM("smollm2", cache_dir=str(cache_dir), **OPTIONS) as llm:
        llm.generate(FRANCE, GREEDY)
        assert made and all(one() is not None for one in made)
    assert not [one() for one in made if one() is not None]
