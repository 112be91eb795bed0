"""Deployments under load: a real worker decides by what the demand board says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import redis.asyncio as aioredis

import worker as fleet_worker
from crosslogic.contracts import names
from crosslogic.domain.node import Node, NodeState
from crosslogic.hot.demand import DemandBoard, ProcessDemand
from crosslogic.store.scaling import ScalingStore
from tests.workflows.fleet import FleetUnderTest

PLACE = ("llama-3-8b", "in-mumbai")
BUSY = ProcessDemand(tokens_in_flight=10, arrival_tokens_per_s=1)


@contextlib.asynccontextmanager
async def told(fleet: FleetUnderTest, redis: aioredis.Redis, demand: ProcessDemand) -> AsyncGenerator[DemandBoard]:
    """The board says this until the block ends, as an API process would."""
    board = DemandBoard(redis, fleet.settings.redis_prefix)

    async def tell() -> None:
        while True:
            await board.put("api-1", {PLACE: demand}, time.time())
            await asyncio.sleep(0.2)

    await board.put("api-1", {PLACE: demand}, time.time())
    telling = asyncio.create_task(tell())
    try:
        yield board
    finally:
        telling.cancel()
        await board.leave("api-1")


async def serving(fleet: FleetUnderTest, count: int) -> list[Node]:
    """That many ready nodes, and no others that have not ended."""

    async def look() -> bool:
        alive = await fleet.nodes.list_alive()
        return len(alive) == count and all(node.state is NodeState.READY for node in alive)

    await fleet.until(f"{count} nodes serve", look)
    return await fleet.nodes.list_alive()


async def limit(fleet: FleetUnderTest, least: int, most: int) -> None:
    await fleet.pool.execute("UPDATE deployment_regions SET replicas_min = $1, replicas_max = $2", least, most)


class TestLoad:
    async def test_orders_what_it_needs_and_says_why(self, fleet: FleetUnderTest, redis: aioredis.Redis) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        await limit(fleet, 1, 3)
        handle = await fleet.keep_deployment("llama-7b")
        (first,) = await serving(fleet, 1)
        rate = float(first.capacity_tokens_per_s)
        async with told(fleet, redis, ProcessDemand(tokens_in_flight=1, arrival_tokens_per_s=rate)):
            await handle.signal(names.LOOK_AGAIN)
            await serving(fleet, 2)
        decisions = await ScalingStore(fleet.pool).list_decisions("llama-7b")
        grown = next(one for one in decisions if one.ordered and one.needed)
        assert (grown.region, grown.desired, grown.present) == ("in-mumbai", 2, 1)
        assert "tokens/s arrive, a node does" in grown.reason
        await fleet.check_books()

    async def test_drains_what_is_too_much_but_not_what_was_started_by_hand(
        self, fleet: FleetUnderTest, redis: aioredis.Redis
    ) -> None:
        """F7, F1."""
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        by_hand = await fleet.serve_one()
        await limit(fleet, 3, 3)
        handle = await fleet.keep_deployment("llama-7b")
        await serving(fleet, 3)
        await limit(fleet, 1, 1)
        async with told(fleet, redis, BUSY):
            await handle.signal(names.LOOK_AGAIN)
            (left,) = await serving(fleet, 1)
        assert left.id == by_hand.id
        ended = [node for node in await fleet.nodes.list_all() if node.id != by_hand.id]
        assert {(node.state, node.reason) for node in ended} == {
            (NodeState.TERMINATED, "its deployment wants 1 replicas")
        }
        await fleet.check_books()

    async def test_holds_while_nobody_says_what_is_asked_for(self, fleet: FleetUnderTest) -> None:
        """A metric gap."""
        await fleet.add_deployment("llama-7b", in_mumbai=2)
        handle = await fleet.keep_deployment("llama-7b")
        await serving(fleet, 2)
        await limit(fleet, 0, 5)
        await fleet.pool.execute("UPDATE deployments SET idle_s = 1")
        for _ in range(20):
            await handle.signal(names.LOOK_AGAIN)
            await asyncio.sleep(0.1)
        await serving(fleet, 2)


class TestZero:
    async def test_is_reached_when_idle_and_left_when_a_request_waits(
        self, fleet: FleetUnderTest, redis: aioredis.Redis
    ) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        await limit(fleet, 0, 2)
        await fleet.pool.execute("UPDATE deployments SET idle_s = 1")
        handle = await fleet.keep_deployment("llama-7b")
        async with told(fleet, redis, ProcessDemand(held_requests=1)):
            waking = asyncio.create_task(fleet_worker.keep_waking(fleet.client, fleet.fleet))
            try:
                await serving(fleet, 1)
            finally:
                waking.cancel()
        async with told(fleet, redis, ProcessDemand()):

            async def ended() -> bool:
                await handle.signal(names.LOOK_AGAIN)
                await asyncio.sleep(0.3)
                return not await fleet.nodes.list_alive()

            await fleet.until("nothing is left", ended)
            assert await fleet_worker.wake_once(fleet.client, fleet.fleet) == []
        await fleet.check_books()
