from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio as aioredis

from crosslogic.domain.autoscaling import Demand
from crosslogic.domain.errors import Unavailable
from crosslogic.hot import connection
from crosslogic.hot.demand import FRESH_S, INDEX_S, TTFT_BOUNDS_MS, DemandBoard, ProcessDemand, add_up
from tests.conftest import make_settings

HERE, THERE = ("llama-3-8b", "in-mumbai"), ("llama-3-8b", "us-east")
NOW = 1_700_000_000.0


@pytest.fixture
def board(redis: aioredis.Redis, redis_prefix: str) -> DemandBoard:
    return DemandBoard(redis, redis_prefix)


def counts(**by_bound: int) -> tuple[int, ...]:
    found = [0] * len(TTFT_BOUNDS_MS)
    for bound, count in by_bound.items():
        found[TTFT_BOUNDS_MS.index(int(bound[1:]))] = count
    return tuple(found)


class TestDemandBoard:
    async def test_adds_up_what_several_processes_see(self, board: DemandBoard) -> None:
        await board.put("a", {HERE: ProcessDemand(10, 1, 5, 100, 90, 2, 0.5, counts(_100=60))}, NOW)
        await board.put(
            "b", {HERE: ProcessDemand(1, 0, 0, 20, 20, ttft_counts=counts(_5000=40)), THERE: ProcessDemand(7)}, NOW
        )
        seen = await board.read()
        assert seen is not None
        assert seen[HERE] == Demand(11, 1, 5, 120, 110, 2, 0.5, 100.0, 5000.0)
        assert seen[THERE] == Demand(7)

    async def test_takes_a_processs_latest_word_only(self, board: DemandBoard) -> None:
        await board.put("a", {HERE: ProcessDemand(10)}, NOW)
        await board.put("a", {THERE: ProcessDemand(3)}, NOW + 1)
        assert await board.read() == {THERE: Demand(3)}

    async def test_a_dead_processs_word_expires(
        self, board: DemandBoard, redis: aioredis.Redis, redis_prefix: str
    ) -> None:
        await board.put("a", {HERE: ProcessDemand(10)}, NOW)
        assert 0 < await redis.ttl(f"{redis_prefix}demand:a") <= FRESH_S
        await redis.delete(f"{redis_prefix}demand:a")
        assert await board.read() is None
        await board.put("b", {}, NOW + INDEX_S + 1)
        any_redis: Any = redis  # Its own annotations are partial.
        assert await any_redis.zrange(f"{redis_prefix}demand", 0, -1) == ["b"]
        assert await board.read() == {}

    async def test_one_that_ends_takes_its_word_back(self, board: DemandBoard) -> None:
        await board.put("a", {HERE: ProcessDemand(10)}, NOW)
        await board.leave("a")
        assert await board.read() is None

    async def test_what_cannot_be_read_is_not_counted(
        self, board: DemandBoard, redis: aioredis.Redis, redis_prefix: str
    ) -> None:
        await board.put("a", {HERE: ProcessDemand(10)}, NOW)
        await board.put("b", {}, NOW)
        for text in ("{", "7", '[["m"]]', '[["m", "r", 3]]'):
            await redis.set(f"{redis_prefix}demand:b", text)
            assert await board.read() == {HERE: Demand(10)}
        await redis.set(f"{redis_prefix}demand:b", '[["m", "r", {"tokens_in_flight": 2, "of_tomorrow": 1}]]')
        assert await board.read() == {HERE: Demand(10), ("m", "r"): Demand(2)}

    async def test_redis_away(self, redis_prefix: str) -> None:
        away = DemandBoard(connection.connect(make_settings(redis_url="redis://127.0.0.1:1/0")), redis_prefix)
        for attempt in (away.read(), away.put("a", {}, NOW), away.leave("a")):
            with pytest.raises(Unavailable, match="Redis does not answer"):
                await attempt


class TestAddUp:
    def test_says_nothing_of_times_that_are_too_few(self) -> None:
        assert add_up([ProcessDemand(ttft_counts=counts(_100=19))]).ttft_ms_p99 is None
        assert add_up(
            [ProcessDemand(ttft_counts=counts(_100=19)), ProcessDemand(ttft_counts=counts(_200=1))]
        ) == Demand(ttft_ms_p50=100.0, ttft_ms_p99=200.0)
