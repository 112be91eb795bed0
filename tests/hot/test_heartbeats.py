from __future__ import annotations

import pytest
import redis.asyncio as aioredis

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.hot import connection
from crosslogic.hot.heartbeats import MEMORY_S, HeartbeatBoard, decode
from tests.conftest import make_settings

BEAT = Heartbeat("node_a", 1_700_000_000.25, True, running=3, kv_cache_used=0.5, notice="aws: terminate")


@pytest.fixture
def board(redis: aioredis.Redis, redis_prefix: str) -> HeartbeatBoard:
    return HeartbeatBoard(redis, redis_prefix)


class TestHeartbeats:
    async def test_the_latest_is_read_and_others_are_not_there(self, board: HeartbeatBoard) -> None:
        await board.put(Heartbeat("node_a", 1.0, False))
        await board.put(BEAT)
        assert await board.read_many(["node_a", "node_b"]) == {"node_a": BEAT}
        assert await board.read_many([]) == {}

    async def test_they_are_forgotten_by_themselves(
        self, board: HeartbeatBoard, redis: aioredis.Redis, redis_prefix: str
    ) -> None:
        await board.put(BEAT)
        assert 0 < await redis.ttl(f"{redis_prefix}heartbeat:node_a") <= MEMORY_S

    async def test_nonsense_is_ignored(self, board: HeartbeatBoard, redis: aioredis.Redis, redis_prefix: str) -> None:
        await redis.set(f"{redis_prefix}heartbeat:node_b", "[1]")
        await board.put(BEAT)
        assert list(await board.read_many(["node_b", "node_a"])) == ["node_a"]

    async def test_a_dead_server_is_told(self) -> None:
        redis = connection.connect(make_settings(redis_url="redis://127.0.0.1:1"))
        board = HeartbeatBoard(redis, "")
        with pytest.raises(Unavailable):
            await board.put(BEAT)
        with pytest.raises(Unavailable):
            await board.read_many(["node_a"])


class TestDecode:
    def test_ignores_what_a_newer_version_adds(self) -> None:
        assert decode('{"node_id":"a","received_at":1.0,"is_engine_up":true,"colour":1}') == Heartbeat("a", 1.0, True)
        assert decode('{"node_id":"a"}') is None
        assert decode("nonsense") is None
