"""What a router does with workers that come, hang, lie and go, over the real control wire."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from protocol.errors import AuthenticationFailed, PeerLost
from protocol.wire import Abort, Dismissed, Links, Members, Prefill, Pulse, Reserve, Tokens, Welcome
from router.tokenizer import Tokenizer
from tests.router.cluster import FINGERPRINT, registration
from tests.router.tiny import byte_id, byte_ids
from tests.router.workers import (
    CHAT,
    HI,
    LENGTH,
    Stage,
    answer,
    events,
    staged,
)


async def test_registration_is_welcomed_and_decode_hears_of_prefill_workers(stage: Stage) -> None:
    decode = await stage.worker("d0")
    welcome = await decode.hear(Welcome)
    assert (welcome.heartbeat_s, welcome.lease_ttl_s) == (0.1, 2.0)
    assert (await decode.hear(Members)).peers == ()
    prefill = await stage.worker("p0")
    await prefill.hear(Welcome)
    (address,) = (await decode.hear(Members)).peers
    assert address == prefill.register.address
    await prefill.close()
    assert (await decode.hear(Members)).peers == ()


async def test_the_welcome_comes_first_and_pulses_follow(stage: Stage) -> None:
    channel = await stage.dial()
    channel.post(registration("d0"))
    assert isinstance(await channel.receive(), Welcome)
    kinds = [type(await channel.receive()) for _ in range(4)]
    assert kinds.count(Pulse) >= 2
    channel.abort("test over")
    await channel.close()


async def test_a_wrong_secret_is_refused_and_harms_nobody(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.http.post(f"{stage.url}{CHAT}", json={**HI, "stream": True, "max_tokens": 3}))
    reserve = await decode.hear(Reserve)
    await prefill.first(byte_id("a"))
    with pytest.raises(AuthenticationFailed, match="wrong cluster secret"):
        await stage.dial(b"x" * 32)
    decode.emit(reserve, byte_ids("bc"), finish=LENGTH)
    async with await asked as response:
        assert (await events(response))[-1] == "[DONE]"


async def test_another_model_is_dismissed_for_good(stage: Stage) -> None:
    await stage.pair()
    other = msgspec.structs.replace(FINGERPRINT, model_hash="other")
    foreign = await stage.worker("d1", fingerprint=other)
    dismissed = await foreign.hear(Dismissed)
    assert dismissed.is_final and "different model or KV layout" in dismissed.reason
    await stage.ready()


async def test_a_worker_that_says_nonsense_is_cut_off_and_placed_around(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    channel = await stage.dial()
    channel.post(Tokens(rows=()))
    with pytest.raises(PeerLost):
        await channel.receive()
    await channel.close()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
    await decode.hear(Reserve)
    decode.say(Welcome(router_id="x", heartbeat_s=1.0, lease_ttl_s=1.0))
    replacement = await stage.worker("d0", instance=2)
    replacement.say(Links(peers=(("p0", 1),)))
    await prefill.hear(Prefill)
    await prefill.hear(Abort)
    await answer(prefill, replacement, "ok", LENGTH)
    assert (await asked)[0] == 200


async def test_a_silent_worker_is_lost(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, lease_ttl_s=0.4) as stage:
        prefill, decode = await stage.pair()
        for _ in range(8):
            prefill.beat()
            await asyncio.sleep(0.1)
        assert decode.channel.is_lost and not prefill.channel.is_lost


async def test_a_hung_worker_is_dismissed_though_its_heart_beats(tokenizer: Tokenizer) -> None:
    async with staged(tokenizer, stall_s=0.3) as stage:
        prefill, decode = await stage.pair()
        for _ in range(6):
            prefill.beat()
            decode.beat(progress=5, has_work=True, num_running=1)
            await asyncio.sleep(0.1)
        dismissed = await decode.hear(Dismissed)
        assert dismissed.is_final and "no progress" in dismissed.reason
        again = await stage.worker("d0")
        assert (await again.hear(Dismissed)).is_final, "the same instance"


async def test_the_same_instance_on_a_new_connection_takes_its_place(stage: Stage) -> None:
    prefill, decode = await stage.pair()
    asked = asyncio.create_task(stage.post(CHAT, {**HI, "max_tokens": 2}))
    await decode.hear(Reserve)
    await prefill.hear(Prefill)
    again = await stage.worker("d0")
    await again.hear(Welcome)
    again.say(Links(peers=(("p0", 1),)))
    await answer(prefill, again, "ok", LENGTH)
    assert (await asked)[0] == 200
    assert decode.channel.is_lost
