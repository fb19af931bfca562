"""gRPC in front of scripted workers: what a client sends and gets, and what reaches the workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protocol.request import FinishReason, TokenLogprobs
from protocol.wire import Abort, GrammarFailed, Prefill, Reserve
from router.api import ChatRequest, CompletionRequest
from router.embeddings import EmbeddingsRequest
from router.grpc_messages import body_of
from router.rpc import baton_v1_pb2 as pb
from router.rpc import baton_v1_pb2_grpc as rpc
from router.tokenizer import Tokenizer
from scripts.grpc_code import main as grpc_code
from tests.router.test_embeddings import DECODER_CARD, serve
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import LENGTH, ScriptedWorker, Stage, aborted, answer, staged


@dataclass
class GrpcStage:
    """A router with gRPC, a pair of workers, and a client's channel."""

    stage: Stage
    channel: grpc.aio.Channel
    stub: Any

    async def read(self, **fields: Any) -> list[pb.GenerateResponse]:
        """Read a whole stream."""
        return [message async for message in self.stub.Generate(pb.GenerateRequest(**fields))]


@asynccontextmanager
async def on_stage(tokenizer: Tokenizer, client_stall_s: float) -> AsyncIterator[GrpcStage]:
    # Scripted workers send no heartbeats: a lease must outlast the longest test on the slowest machine.
    async with staged(
        tokenizer, grpc_port=0, client_stall_s=client_stall_s, lease_ttl_s=120.0, placement_wait_s=60.0
    ) as stage:
        options = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stage.router.grpc_port}", options=options) as channel:
            yield GrpcStage(stage, channel, rpc.BatonStub(channel))


@pytest_asyncio.fixture
async def on_grpc(tokenizer: Tokenizer) -> AsyncIterator[GrpcStage]:
    async with on_stage(tokenizer, client_stall_s=60.0) as stage:
        yield stage


def test_the_generated_code_is_current() -> None:
    assert grpc_code(["--check"]) == 0


# --- messages ---


def test_every_field_has_its_name_over_http() -> None:
    renamed = {"prompt_token_ids", "prompts"}
    ours = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} - renamed
    theirs = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert ours - theirs == set()
    assert {f.name for f in pb.EmbedRequest.DESCRIPTOR.fields} == {*EmbeddingsRequest.__struct_fields__} - {
        "encoding_format"
    }
    in_another_way = {"stream", "stream_options", "max_completion_tokens", "top_logprobs"}
    assert {name for name in theirs - ours if not name.startswith("guided_")} == in_another_way


def test_bodies() -> None:
    hi = pb.ChatMessage(role="user", parts=[pb.ContentPart(type="text", text="hi")], name="me")
    fields = pb.GenerateRequest(
        messages=[hi, pb.ChatMessage(role="assistant"), pb.ChatMessage(role="tool", content="x", tool_call_id="7")],
        chat_template_kwargs={"a": pb.Scalar(int_value=3), "b": pb.Scalar(bool_value=False)},
        logprobs=2,
        temperature=0.0,
        logit_bias={5: -1.5},
        stop=["a", "b"],
        seed=-5,
        add_generation_prompt=False,
    )
    body, kind = body_of(fields, "m")
    assert kind is ChatRequest and body == {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"},
            {"role": "assistant"},
            {"role": "tool", "content": "x", "tool_call_id": "7"},
        ],
        "chat_template_kwargs": {"a": 3, "b": False},
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0.0,
        "logit_bias": {"5": -1.5},
        "stop": ["a", "b"],
        "seed": -5,
        "add_generation_prompt": False,
    }
    prompts = [pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2])), pb.Prompt(token_ids=pb.TokenIds(ids=[3]))]
    assert body_of(pb.GenerateRequest(model="x", prompts=prompts, echo=True), "m")[0] == {
        "model": "x",
        "prompt": [[1, 2], [3]],
        "echo": True,
    }
    assert body_of(pb.GenerateRequest(prompt_token_ids=[9]), "m")[0]["prompt"] == [9]


async def test_a_stream_has_text_tokens_logprobs_and_usage(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair()
    asked = dict(prompt="ab", max_tokens=3, logprobs=1, return_token_ids=True, echo=False, seed=5, temperature=0.5)
    reading = asyncio.create_task(on_grpc.read(**asked))
    reserve = await decode.hear(Reserve)
    logged = TokenLogprobs(-0.5, ((byte_id("x"), -0.25),), 2)
    first = await prefill.first(byte_id("o"), num_cached_tokens=1, logprobs=logged)
    decode.emit(reserve, byte_ids("k!"), finish=LENGTH, logprobs=logged)
    messages = await reading
    choices = [choice for message in messages for choice in message.choices]
    assert "".join(choice.text for choice in choices) == "ok!"
    assert [list(choice.prompt_token_ids) for choice in choices] == [byte_ids("ab"), [], []][: len(choices)]
    assert [i for choice in choices for i in choice.token_ids] == byte_ids("ok!")
    assert [choice.finish_reason for choice in choices if choice.HasField("finish_reason")] == ["length"]
    one = choices[0].logprobs[0]
    assert (one.token, one.bytes, one.logprob, one.top_logprobs[0].token) == ("o", b"o", -0.5, "x")
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens) == (2, 3, 5, 1)
    assert not messages[-1].choices and messages[-1].id.startswith("cmpl-") and messages[0].model == "m"
    assert (first.sampling.seed, first.sampling.temperature, first.sampling.max_tokens) == (5, 0.5, 3)


async def test_chat_stop_strings_and_several_choices(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair()
    hi = [pb.ChatMessage(role="user", content="hi")]
    reading = asyncio.create_task(on_grpc.read(messages=hi, stop=["k"], n=2))
    for _ in range(2):
        await answer(prefill, decode, "ok", FinishReason.STOP)
    messages = await reading
    texts = ["", ""]
    for message in messages:
        for choice in message.choices:
            texts[choice.index] += choice.text
    ends = [choice for message in messages for choice in message.choices if choice.HasField("finish_reason")]
    assert texts == ["o", "o"] and [end.stop_string for end in ends] == ["k", "k"]
    assert messages[0].id.startswith("chatcmpl-")


async def test_metadata_name_a_request_and_its_salt(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair()
    call = on_grpc.stub.Generate(
        pb.GenerateRequest(prompt="a", max_tokens=2), metadata=(("x-request-id", "r-1"), ("x-cache-salt", "acme"))
    )
    reserve = await decode.hear(Reserve)
    submitted = await prefill.first(byte_id("x"))
    decode.emit(reserve, byte_ids("y"), finish=LENGTH)
    assert [message.id async for message in call][-1] == "cmpl-r-1"
    assert ("x-request-id", "r-1") in tuple(await call.initial_metadata())
    assert submitted.cache_salt == "acme"


async def test_embed_says_what_http_says_and_cancels(on_grpc: GrpcStage) -> None:
    prefill, _ = await on_grpc.stage.pair(embedding=DECODER_CARD)
    texts = [pb.Prompt(text="hi"), pb.Prompt(text="abc")]
    ids = [pb.Prompt(token_ids=pb.TokenIds(ids=[5, 6])), pb.Prompt(token_ids=pb.TokenIds(ids=[7]))]
    for inputs, plain in ((texts, ["hi", "abc"]), (ids, [[5, 6], [7]])):
        asked = pb.EmbedRequest(input=inputs, normalize=False, truncate_prompt_tokens=2, dimensions=3, user="me")
        call = asyncio.create_task(_ask(on_grpc.stub.Embed(asked, metadata=(("x-cache-salt", "acme"),))))
        seen = await serve(prefill, 2)
        answer = await call
        assert {one.cache_salt for one in seen} == {"acme"} and answer.model == "m"
        body = {"model": "m", "input": plain, "normalize": False, "truncate_prompt_tokens": 2, "cache_salt": "acme"}
        asking = asyncio.create_task(on_grpc.stage.post("/v1/embeddings", body))
        assert [one.prompt for one in await serve(prefill, 2)] == [one.prompt for one in seen]
        _, told, _ = await asking
        found = [{"object": "embedding", "index": e.index, "embedding": list(e.embedding)} for e in answer.data]
        assert found == told["data"]
        usage = {"prompt_tokens": answer.usage.prompt_tokens, "total_tokens": answer.usage.total_tokens}
        assert usage == told["usage"]
    call = on_grpc.stub.Embed(pb.EmbedRequest(input=texts))
    await prefill.hear(Prefill)
    call.cancel()
    await prefill.hear(Abort)
    await on_grpc.stage.until(lambda: on_grpc.stage.router.switchboard.num_requests == 0)


async def _ask(call: Any) -> Any:
    return await call


async def test_what_cannot_be_embedded_is_refused_as_http_does(on_grpc: GrpcStage) -> None:
    await on_grpc.stage.pair(embedding=DECODER_CARD)
    a, code = pb.Prompt(text="a"), grpc.StatusCode
    cases: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({}, code.INVALID_ARGUMENT, "input"),
        ({"input": [pb.Prompt()]}, code.INVALID_ARGUMENT, "input"),
        ({"input": [a, pb.Prompt(token_ids=pb.TokenIds(ids=[1]))]}, code.INVALID_ARGUMENT, "input"),
        ({"input": [pb.Prompt(text="x" * 300)]}, code.INVALID_ARGUMENT, "input"),
        ({"input": [a], "dimensions": 2}, code.INVALID_ARGUMENT, "dimensions"),
        ({"input": [a], "truncate_prompt_tokens": -2}, code.INVALID_ARGUMENT, "truncate_prompt_tokens"),
        ({"input": [a], "model": "other"}, code.NOT_FOUND, "model"),
    ]
    for fields, status, field in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await on_grpc.stub.Embed(pb.EmbedRequest(**fields))
        error = caught.value
        assert (error.code(), dict(error.trailing_metadata() or ())["baton-field"]) == (status, field), fields


# --- what is refused ---


async def _error(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    error = caught.value
    assert isinstance(error, grpc.aio.AioRpcError)
    return error


async def test_errors_have_the_right_status_and_name_the_field(on_grpc: GrpcStage) -> None:
    stub, code = on_grpc.stub, grpc.StatusCode
    error = await _error(stub.Generate(pb.GenerateRequest(prompt="a")))
    assert error.code() is code.UNAVAILABLE and "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    await on_grpc.stage.pair()
    cases: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({}, code.INVALID_ARGUMENT, "prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, code.INVALID_ARGUMENT, "prompt_token_ids"),
        ({"prompt": "a", "temperature": -1.0}, code.INVALID_ARGUMENT, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, code.INVALID_ARGUMENT, "temperature"),
        ({"prompt": "a", "logit_bias": {1: float("inf")}}, code.INVALID_ARGUMENT, "logit_bias"),
        ({"prompt": "a", "max_tokens": 9999}, code.INVALID_ARGUMENT, "max_tokens"),
        ({"prompt": "a" * 300}, code.INVALID_ARGUMENT, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, code.INVALID_ARGUMENT, "add_generation_prompt"),
        ({"messages": [pb.ChatMessage(role="king", content="x")]}, code.INVALID_ARGUMENT, "messages"),
        ({"prompt": "a", "request_id": "two\nlines"}, code.INVALID_ARGUMENT, "request_id"),
        ({"prompt": "a", "model": "other"}, code.NOT_FOUND, "model"),
        ({"prompt_token_ids": [99999]}, code.INVALID_ARGUMENT, "prompt"),
    ]
    for fields, status, field in cases:
        error = await _error(stub.Generate(pb.GenerateRequest(**fields)))
        assert (error.code(), dict(error.trailing_metadata())["baton-field"]) == (status, field), fields
    error = await _error(stub.Generate(pb.GenerateRequest(prompt="a"), metadata=(("x-priority", "high"),)))
    assert error.code() is code.INVALID_ARGUMENT


async def test_too_many_requests_say_when_to_come_back(tokenizer: Tokenizer) -> None:
    async with (
        staged(tokenizer, grpc_port=0, max_num_requests=1) as stage,
        grpc.aio.insecure_channel(f"127.0.0.1:{stage.router.grpc_port}") as channel,
    ):
        await stage.pair()
        error = await _error(rpc.BatonStub(channel).Generate(pb.GenerateRequest(prompt="a", n=2)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1


@asynccontextmanager
async def with_two_tenants(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[tuple[Stage, grpc.aio.Channel]]:
    """A router that knows the key `one` of acme and the key `two` of another, and a client's channel."""
    keys = tmp_path / "keys"
    keys.write_text("one acme\ntwo other\n")
    async with (
        staged(tokenizer, grpc_port=0, api_key_files=(str(keys),)) as stage,
        grpc.aio.insecure_channel(f"127.0.0.1:{stage.router.grpc_port}") as channel,
    ):
        yield stage, channel


async def test_keys_are_needed_where_http_needs_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with with_two_tenants(tokenizer, tmp_path) as (stage, channel):
        prefill, _ = await stage.pair()
        stub, health = rpc.BatonStub(channel), health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        asked = pb.GenerateRequest(prompt="a", max_tokens=9, request_id="mine")
        for metadata in ((), (("authorization", "Bearer three"),)):
            assert (await _error(stub.Generate(asked, metadata=metadata))).code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        own, others = (("authorization", "Bearer one"),), (("authorization", "Bearer two"),)
        call = stub.Generate(asked, metadata=own)
        mine = await prefill.first(byte_id("x"))
        assert (await call.read()).choices[0].text == "x"
        another = stub.Generate(asked, metadata=others)
        theirs = await prefill.first(byte_id("x"))
        assert mine.cache_salt != theirs.cache_salt
        assert (await stub.Abort(pb.AbortRequest(request_id="mine"), metadata=others)).was_open
        assert (await _error(another)).code() is grpc.StatusCode.ABORTED
        assert stage.router.switchboard.num_requests == 1
        call.cancel()


async def test_tenants_share_no_prefix_of_what_they_embed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with with_two_tenants(tokenizer, tmp_path) as (stage, channel):
        prefill, _ = await stage.pair(embedding=DECODER_CARD)
        salts = []
        for key in ("one", "two"):
            asked = pb.EmbedRequest(input=[pb.Prompt(text="hi")], cache_salt="same")
            metadata = (("authorization", f"Bearer {key}"),)
            call = asyncio.create_task(_ask(rpc.BatonStub(channel).Embed(asked, metadata=metadata)))
            salts += [one.cache_salt for one in await serve(prefill, 1)]
            await call
        assert len(set(salts)) == 2


# --- ends ---


async def _begun(on_grpc: GrpcStage, **more: Any) -> tuple[Any, ScriptedWorker, ScriptedWorker, Prefill]:
    """Begin a stream of which one token has come."""
    prefill, decode = await on_grpc.stage.pair()
    call = on_grpc.stub.Generate(pb.GenerateRequest(prompt="a", max_tokens=100, request_id="mine"), **more)
    submitted = await prefill.first(byte_id("x"))
    assert (await call.read()).choices[0].text == "x"
    return call, prefill, decode, submitted


async def _over(on_grpc: GrpcStage, decode: ScriptedWorker, submitted: Prefill) -> None:
    await aborted(decode, submitted.transfer_id)
    assert on_grpc.stage.router.switchboard.num_requests == 0


async def test_cancelling_aborts_on_the_workers(on_grpc: GrpcStage) -> None:
    call, _, decode, submitted = await _begun(on_grpc)
    call.cancel()
    await _over(on_grpc, decode, submitted)


async def test_a_deadline_ends_the_request(on_grpc: GrpcStage) -> None:
    call, _, decode, submitted = await _begun(on_grpc, timeout=1.5)
    assert (await _error(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await _over(on_grpc, decode, submitted)


async def test_abort_ends_a_request_by_its_id(on_grpc: GrpcStage) -> None:
    call, _, decode, submitted = await _begun(on_grpc)
    again = await _error(on_grpc.stub.Generate(pb.GenerateRequest(prompt="a", request_id="mine")))
    assert dict(again.trailing_metadata())["baton-field"] == "request_id"
    assert (await on_grpc.stub.Abort(pb.AbortRequest(request_id="mine"))).was_open
    assert (await _error(call)).code() is grpc.StatusCode.ABORTED
    await _over(on_grpc, decode, submitted)
    assert not (await on_grpc.stub.Abort(pb.AbortRequest(request_id="mine"))).was_open


async def test_who_does_not_read_is_paused_then_given_up_and_others_go_on(tokenizer: Tokenizer) -> None:
    async with on_stage(tokenizer, client_stall_s=2.0) as on_grpc:
        await _neglect(on_grpc)


async def _neglect(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair(max_model_len=200_000, num_blocks=20_000)
    prompt = "long " * 30_000
    # Its echo alone is more than what a client's window takes.
    call = on_grpc.stub.Generate(pb.GenerateRequest(prompt=prompt, echo=True, max_tokens=100))
    submitted = await prefill.first(byte_id("x"))
    await aborted(decode, submitted.transfer_id)  # paused
    await decode.hear(Reserve)
    other = asyncio.create_task(on_grpc.read(prompt="b", max_tokens=2))
    await answer(prefill, decode, "ok", LENGTH)
    assert "".join(c.text for m in await other for c in m.choices) == "ok"
    await on_grpc.stage.until(lambda: on_grpc.stage.router.switchboard.num_requests == 0)
    call.cancel()


async def test_who_reads_on_in_time_gets_the_rest(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair(max_model_len=200_000, num_blocks=20_000)
    prompt = "long " * 30_000
    call = on_grpc.stub.Generate(pb.GenerateRequest(prompt=prompt, echo=True, max_tokens=2))
    submitted = await prefill.first(byte_id("x"))
    await aborted(decode, submitted.transfer_id)  # paused
    await decode.hear(Reserve)
    text = (await call.read()).choices[0].text
    assert text == prompt + "x"
    again = await decode.hear(Reserve)
    await prefill.first(byte_id("x"))
    decode.emit(again, byte_ids("y"), finish=LENGTH)
    assert (await call.read()).choices[0].text == "y"
    assert (await call.read()).usage.completion_tokens == 2


# --- health, reflection, end ---


async def test_health_and_reflection(on_grpc: GrpcStage) -> None:
    health = health_pb2_grpc.HealthStub(on_grpc.channel)

    async def status(service: str = "baton.v1.Baton") -> int:
        return int((await health.Check(health_pb2.HealthCheckRequest(service=service))).status)

    assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
    await on_grpc.stage.pair()
    async with asyncio.timeout(5):
        while await status() != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.02)
    assert await status("") == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(on_grpc.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Baton"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {"baton.v1.Baton", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto


async def test_draining_lets_a_stream_go_on_and_takes_no_other(on_grpc: GrpcStage) -> None:
    call, _, decode, submitted = await _begun(on_grpc)
    draining = asyncio.create_task(on_grpc.stage.router.drain())
    error = await _error(on_grpc.stub.Generate(pb.GenerateRequest(prompt="a")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    reserve = await decode.hear(Reserve)
    decode.emit(reserve, byte_ids("y"), finish=LENGTH)
    assert (await call.read()).choices[0].text == "y"
    await draining
    assert (await call.read()).usage.completion_tokens == 2
    assert await call.code() is grpc.StatusCode.OK


async def test_a_failed_grammar_is_an_invalid_argument(on_grpc: GrpcStage) -> None:
    prefill, decode = await on_grpc.stage.pair()
    asked = asyncio.create_task(on_grpc.read(prompt="hi", max_tokens=5))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    decode.say(GrammarFailed(transfer_id=reserve.transfer_id, reason="grammar: too costly"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "too costly" in str(caught.value.details())
