from __future__ import annotations

import pytest
import redis.asyncio as aioredis

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.health import RequestView
from crosslogic.hot import connection
from crosslogic.hot.passive import MEMORY_S, PassiveBoard, decode, encode
from tests.conftest import make_settings

VIEW = RequestView(starts=3, answers=2, errors=1, failures_in_a_row=1, is_ejected=True, ttft_s=0.25)


@pytest.fixture
def board(redis: aioredis.Redis, redis_prefix: str) -> PassiveBoard:
    return PassiveBoard(redis, redis_prefix)


class TestBoard:
    async def test_holds_the_last_word_of_each_process_by_region(self, board: PassiveBoard) -> None:
        await board.put("us-east", "a", {"node_a": RequestView(starts=9)})
        await board.put("us-east", "a", {"node_a": VIEW})
        await board.put("us-east", "b", {"node_a": VIEW, "node_b": VIEW})
        await board.put("eu-west", "a", {"node_c": VIEW})
        assert await board.read("us-east") == {"node_a": [VIEW, VIEW], "node_b": [VIEW]}
        assert await board.read("ap-southeast") == {}

    async def test_forgets_processes_that_are_gone(
        self, board: PassiveBoard, redis: aioredis.Redis, redis_prefix: str
    ) -> None:
        await board.put("us-east", "a", {"node_a": VIEW})
        assert 0 < await redis.ttl(f"{redis_prefix}passive:us-east:a") <= MEMORY_S
        await redis.delete(f"{redis_prefix}passive:us-east:a")
        assert await board.read("us-east") == {}
        assert not await redis.exists(f"{redis_prefix}passive:us-east")

    async def test_says_that_redis_is_away(self) -> None:
        board = PassiveBoard(connection.connect(make_settings(redis_url="redis://127.0.0.1:1")), "")
        with pytest.raises(Unavailable):
            await board.put("us-east", "a", {})
        with pytest.raises(Unavailable):
            await board.read("us-east")


class TestDecode:
    def test_is_the_inverse_of_encode(self) -> None:
        assert decode(encode({"node_a": VIEW})) == {"node_a": VIEW}

    def test_ignores_what_a_newer_version_adds_and_nonsense(self) -> None:
        row = encode({"node_a": VIEW}).replace("]", ",1]")
        assert decode(row) == {"node_a": VIEW}
        assert decode("[1]") == {}
        assert decode('{"node_a": 1}') == {}
