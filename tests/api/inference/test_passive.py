"""What one API process tells of its nodes: counters of the last seconds, and nothing of nodes that nobody used."""

from __future__ import annotations

import pytest
import redis.asyncio as aioredis

from api.inference.router import UNREACHABLE_AFTER
from api.inference.upstream import FailureKind
from api.passive import WINDOW_S, PassiveView
from crosslogic.domain.health import RequestView
from crosslogic.hot import connection
from crosslogic.hot.passive import PassiveBoard
from tests.api.inference.conftest import MakeApi
from tests.api.inference.test_router import World
from tests.engines import Engine


@pytest.fixture
def board(redis: aioredis.Redis, redis_prefix: str) -> PassiveBoard:
    return PassiveBoard(redis, redis_prefix)


class TestLook:
    async def test_counts_what_ended_within_the_window(self, board: PassiveBoard) -> None:
        world = World()
        good, bad, idle = world.fill(3)
        view = PassiveView(world.table, board, "a")
        assert view.look(world.now) == {}
        for node in (good, bad):
            node.take(100)
        good.give_back(100)
        good.first_token(0.5, world.now)
        good.succeeded(world.now)
        bad.failed(FailureKind.SILENT, world.now)
        bad.failed(FailureKind.BUSY, world.now)
        found = view.look(world.now + 1)["r"]
        assert found[good.entry.node_id] == RequestView(starts=1, answers=1, ttft_s=0.5)
        assert found[bad.entry.node_id] == RequestView(starts=1, errors=1, busy=1, failures_in_a_row=1, in_flight=1)
        assert idle.entry.node_id not in found
        later = view.look(world.now + WINDOW_S + 2)
        # The one that failed still has something against it, but in this window nothing happened.
        assert later == {}

    async def test_tells_as_long_as_a_node_is_left_out(self, board: PassiveBoard) -> None:
        world = World()
        node, _ = world.fill(2)
        view = PassiveView(world.table, board, "a")
        for _ in range(UNREACHABLE_AFTER):
            node.failed(FailureKind.CONNECT, world.now)
        for later_s in (0, WINDOW_S + 1, 10 * WINDOW_S):
            found = view.look(world.now + later_s)["r"][node.entry.node_id]
            assert found.is_unreachable
            assert found.failures_in_a_row == UNREACHABLE_AFTER

    async def test_forgets_nodes_that_left(self, board: PassiveBoard) -> None:
        world = World()
        node, _ = world.fill(2)
        view = PassiveView(world.table, board, "a")
        view.look(world.now)
        node.take(1)
        assert view.look(world.now)
        world.table.replace([])
        assert view.look(world.now + 1) == {}


class TestTell:
    async def test_publishes_and_takes_back(self, board: PassiveBoard) -> None:
        world = World()
        (node,) = world.fill(1)
        view = PassiveView(world.table, board, "a")
        await view.tell(world.now)
        node.take(1)
        await view.tell(world.now + 1)
        assert (await board.read("r"))[node.entry.node_id] == [RequestView(starts=1, in_flight=1)]
        await view.tell(world.now + WINDOW_S + 2)
        assert await board.read("r") == {}

    async def test_every_api_process_does(self, make_api: MakeApi, engine: Engine) -> None:
        """From a request that was served to the board, by nobody's hand."""
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        redis = connection.connect(api.settings)
        board = PassiveBoard(redis, api.settings.redis_prefix)

        async def told() -> list[RequestView]:
            return [view for views in (await board.read("in-mumbai")).values() for view in views]

        # Its first word may come after the request: then there is none before it to compare with.
        async def answered() -> bool:
            await api.chat()
            return any(view.answers for view in await told())

        assert await api.until(answered, 10.0)
        await redis.aclose()
