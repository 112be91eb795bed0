from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError

from crosslogic.contracts import names
from crosslogic.contracts.node import NodeLifecycleInput, NodeSpec
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Node, NodeState
from crosslogic.new_ids import new_id
from tests.workflows.fleet import EngineServer, FleetUnderTest
from workflows.steps import MOST_EVENTS


class TestDrain:
    async def test_waits_for_running_requests_and_starts_none(self, fleet: FleetUnderTest) -> None:
        """F6."""
        node = await fleet.serve_one(drain_timeout_s=60)
        engine = fleet.cloud.engines[node.cluster]
        engine.load = 2
        await fleet.lifecycle(node).signal(names.DRAIN, "maintenance")
        await fleet.until_state(NodeState.DRAINING)
        assert not (await fleet.routes())[node.node_id].is_routable
        await asyncio.sleep(4.0)  # Longer than an empty node needs.
        assert fleet.cloud.alive == {node.cluster}
        engine.load = 0
        assert await fleet.lifecycle(node).result() == {
            "node_id": node.node_id,
            "state": "terminated",
            "reason": "maintenance",
        }
        assert fleet.cloud.alive == set()
        await fleet.check_books()

    @pytest.mark.parametrize("has_metrics", [True, False])
    async def test_ends_at_its_deadline(self, fleet: FleetUnderTest, has_metrics: bool) -> None:
        """An endless stream, or an engine that does not tell what it is busy with."""
        node = await fleet.serve_one(drain_timeout_s=4)
        engine = fleet.cloud.engines[node.cluster]
        engine.load, engine.has_metrics = 1, has_metrics
        started = time.monotonic()
        await fleet.lifecycle(node).signal(names.DRAIN)
        await fleet.lifecycle(node).result()
        assert time.monotonic() - started >= 4
        await fleet.check_books()

    async def test_twice_is_once(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        for reason in ("first", "second"):
            await fleet.lifecycle(node).signal(names.DRAIN, reason)
        assert (await fleet.lifecycle(node).result())["reason"] == "first"
        ended = await fleet.nodes.get(node.id)
        # Ready, draining, tombstoned, terminated: each once.
        assert ended.generation == node.generation + 3

    async def test_stops_waiting_when_the_machine_is_gone(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=600)
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).signal(names.DRAIN)
        await fleet.until_state(NodeState.DRAINING)
        fleet.cloud.take(node.cluster)
        async with asyncio.timeout(20):
            await fleet.lifecycle(node).result()
        await fleet.check_books()


class TestCancel:
    async def test_of_a_serving_node_is_a_drain_without_waiting(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=600)
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).cancel()
        await self.check_cancelled(fleet, node)

    async def test_of_a_draining_node_ends_the_wait(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=600)
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).signal(names.DRAIN)
        await fleet.until_state(NodeState.DRAINING)
        await fleet.lifecycle(node).cancel()
        await self.check_cancelled(fleet, node)

    async def check_cancelled(self, fleet: FleetUnderTest, node: Node) -> None:
        async with asyncio.timeout(20):
            with pytest.raises(WorkflowFailureError) as caught:
                await fleet.lifecycle(node).result()
        assert isinstance(caught.value.cause, CancelledError)
        assert (await fleet.nodes.get(node.id)).state is NodeState.TERMINATED
        await fleet.check_books()


class TestHistory:
    async def test_stays_short_and_no_signal_is_lost(self, fleet: FleetUnderTest) -> None:
        """T3: continue-as-new under a storm of nudges, and a drain that still arrives."""
        node = await fleet.serve_one()
        handle = fleet.lifecycle(node)
        first = (await handle.describe()).run_id
        longest = 0
        while (described := await handle.describe()).run_id == first:
            longest = max(longest, described.history_length)
            await asyncio.gather(*(handle.signal(names.LOOK_AGAIN) for _ in range(100)))
            # It answers once it has taken them: a storm that outruns it would only test the limit of the server.
            await handle.query("__stack_trace")
        assert longest + 200 >= MOST_EVENTS
        assert longest < 8_000
        await handle.signal(names.DRAIN, "after the storm")
        assert (await handle.result())["reason"] == "after the storm"
        await fleet.check_books()


class TestJoin:
    async def join(self, fleet: FleetUnderTest, engine: EngineServer, **fields: Any) -> Any:
        node_id = NODE.show(new_id())
        values: dict[str, Any] = {"model": "llama-7b", "region": "ap-south-1", "endpoint": engine.endpoint, **fields}
        return await fleet.client.start_workflow(
            names.NODE_LIFECYCLE,
            NodeLifecycleInput(NodeSpec(node_id, drain_timeout_s=5, **values), is_admitted=False),
            id=names.node_workflow_id(node_id),
            task_queue=fleet.task_queue,
        )

    async def test_admits_a_node_that_exists(self, fleet: FleetUnderTest) -> None:
        engine = EngineServer()
        await engine.start()
        handle = await self.join(fleet, engine)
        node = await fleet.until_state(NodeState.READY)
        assert (node.provider, node.endpoint, node.model, node.region) == (
            "joined",
            engine.endpoint,
            "llama-3-8b",
            "in-mumbai",
        )
        assert node.is_pinned
        await fleet.check_books()
        await handle.signal(names.DRAIN, "taken back")
        assert (await handle.result())["state"] == "terminated"
        await fleet.check_books()
        engine.stop()

    async def test_waits_until_it_generates(self, fleet: FleetUnderTest) -> None:
        engine = EngineServer()
        engine.is_well = False
        await engine.start()
        handle = await self.join(fleet, engine)
        await fleet.until_state(NodeState.BOOTING)
        await handle.signal(names.DRAIN, "no patience")
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
        assert "no patience" in str(caught.value.cause)
        assert (await fleet.only_node()).state is NodeState.TERMINATED
        await fleet.check_books()
        engine.stop()

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model": "gpt-9"}, "Unknown model"),
            ({"region": "mars"}, "Unknown region"),
            ({"endpoint": "http://gpu.example.com"}, "nodes are reached over https"),
            ({"endpoint": "https://169.254.169.254"}, "cannot be a node's"),
            ({"deployment": "nope"}, "does not promise"),
        ],
    )
    async def test_refuses_what_cannot_be(self, fleet: FleetUnderTest, fields: dict[str, Any], words: str) -> None:
        engine = EngineServer()
        handle = await self.join(fleet, engine, **fields)
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
        assert isinstance(caught.value.cause, ApplicationError)
        assert "was not joined" in caught.value.cause.message
        assert words in caught.value.cause.message
        assert await fleet.nodes.list_all() == []

    async def test_refuses_an_endpoint_that_is_another_nodes(self, fleet: FleetUnderTest) -> None:
        engine = EngineServer()
        await engine.start()
        await self.join(fleet, engine)
        node = await fleet.until_state(NodeState.READY)
        with pytest.raises(WorkflowFailureError) as caught:
            await (await self.join(fleet, engine)).result()
        assert f"node {node.node_id}'s already" in str(caught.value.cause)
        engine.stop()
