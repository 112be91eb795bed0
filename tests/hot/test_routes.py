from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import redis.asyncio as aioredis
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.node import NodeState, RouteEntry
from crosslogic.hot import connection
from crosslogic.hot.routes import RouteBoard, decode, encode
from tests.conftest import make_settings

ENTRY = RouteEntry(
    "node_a",
    5,
    NodeState.READY,
    "llama-3-8b",
    "in-mumbai",
    "https://10.0.0.1",
    "llama-7b",
    120,
    price_microdollars_per_h=350_000,
)


@pytest.fixture
def board(redis: aioredis.Redis, redis_prefix: str) -> RouteBoard:
    return RouteBoard(redis, redis_prefix)


class TestPublish:
    async def test_takes_newer_generations_only(self, board: RouteBoard) -> None:
        assert await board.publish(ENTRY)
        assert not await board.publish(replace(ENTRY, capacity_tokens_per_s=1))
        assert not await board.publish(replace(ENTRY, generation=4, state=NodeState.LOADING))
        assert await board.read_all() == [ENTRY]
        draining = replace(ENTRY, generation=6, state=NodeState.DRAINING)
        assert await board.publish(draining)
        assert await board.read_all() == [draining]

    @pytest.mark.parametrize("state", [NodeState.TERMINATED, NodeState.FAILED, NodeState.LOST])
    async def test_never_brings_back_what_has_ended(self, board: RouteBoard, state: NodeState) -> None:
        """F4, faults c and i."""
        await board.publish(ENTRY)
        assert await board.publish(replace(ENTRY, generation=7, state=state))
        assert await board.read_all() == []
        for generation in (5, 6, 7):
            assert not await board.publish(replace(ENTRY, generation=generation))
        assert await board.read_all() == []

    async def test_ends_what_was_never_on_it(self, board: RouteBoard) -> None:
        assert await board.publish(replace(ENTRY, generation=3, state=NodeState.FAILED))
        assert not await board.publish(replace(ENTRY, generation=2))

    async def test_survives_a_server_that_forgot_its_scripts(self, board: RouteBoard, redis: aioredis.Redis) -> None:
        await board.publish(ENTRY)
        await redis.script_flush()  # pyright: ignore[reportUnknownMemberType]
        assert await board.publish(replace(ENTRY, generation=6))

    async def test_says_when_redis_is_away(self) -> None:
        away = connection.connect(make_settings(redis_url="redis://127.0.0.1:1/0"))
        for call in (RouteBoard(away, "x:").publish(ENTRY), RouteBoard(away, "x:").read_all()):
            with pytest.raises(Unavailable, match="Redis does not answer"):
                await call
        with pytest.raises(Unavailable):
            await anext(RouteBoard(away, "x:").listen())
        await away.aclose()


class TestListen:
    async def test_gives_what_is_there_and_then_what_comes(self, board: RouteBoard) -> None:
        other = replace(ENTRY, node_id="node_b")
        await board.publish(ENTRY)
        listening = board.listen()
        async with asyncio.timeout(5):
            assert await anext(listening) == ENTRY
            following = asyncio.ensure_future(anext(listening))
            await board.publish(other)
            assert await following == other
            following = asyncio.ensure_future(anext(listening))
            ended = replace(ENTRY, generation=6, state=NodeState.LOST)
            await board.publish(ended)
            assert await following == ended

    async def test_ignores_what_is_no_entry(self, board: RouteBoard, redis: aioredis.Redis, redis_prefix: str) -> None:
        listening = board.listen()
        following = asyncio.ensure_future(anext(listening))
        await asyncio.sleep(0.3)
        for nonsense in ("", "[]", "{}", '{"node_id": 1}', "\\xff"):
            await redis.publish(f"{redis_prefix}routes:push", nonsense)  # pyright: ignore[reportUnknownMemberType]
        await board.publish(ENTRY)
        async with asyncio.timeout(5):
            assert await following == ENTRY


class TestWireForm:
    @given(
        st.builds(
            RouteEntry,
            st.text(),
            st.integers(0, 2**53),
            st.sampled_from(NodeState),
            st.text(),
            st.text(),
            st.text(),
            st.text(),
            st.integers(0, 10**6),
            st.booleans(),
        )
    )
    def test_loses_nothing(self, entry: RouteEntry) -> None:
        assert decode(encode(entry)) == entry

    def test_ignores_fields_of_a_newer_version(self) -> None:
        assert decode(encode(ENTRY)[:-1] + ',"colour":"blue"}') == ENTRY
