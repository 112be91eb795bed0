"""F9: a notice drains a node within a second and brings exactly one replacement, whatever else happens."""

from __future__ import annotations

import asyncio
import time

import pytest

from crosslogic.contracts import names
from crosslogic.contracts.node import NodeLifecycleInput, NodeSpec
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Node, NodeState
from crosslogic.domain.spot import successor_of
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.new_ids import new_id
from tests.workflows.fleet import EngineServer, FleetUnderTest

NOTICE = "aws: terminate"


async def preemptions(fleet: FleetUnderTest) -> dict[str, bool]:
    """Which nodes were taken, and had they notice?"""
    rows = await fleet.pool.fetch("SELECT node_id, had_notice FROM preemptions")
    return {NODE.show(row["node_id"]): row["had_notice"] for row in rows}


async def successor(fleet: FleetUnderTest, node: Node) -> Node:
    """The node's one successor, as soon as it serves."""

    async def look() -> Node | None:
        found = await fleet.nodes.find(successor_of(node.id))
        return found if found is not None and found.state is NodeState.READY else None

    return await fleet.until("the successor serves", look)


async def is_draining(fleet: FleetUnderTest, node: Node) -> bool:
    entry = (await fleet.routes()).get(node.node_id)
    return entry is None or not entry.is_routable


class TestNotice:
    async def test_drains_within_a_second_and_brings_one_successor(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=60)
        engine = fleet.cloud.engines[node.cluster]
        engine.load = 1
        started = time.monotonic()
        for _ in range(2):
            await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        await fleet.until("out of routing", lambda: is_draining(fleet, node), within_s=1 + started - time.monotonic())
        follower = await successor(fleet, node)
        assert (follower.model, follower.region, follower.gpu) == (node.model, node.region, node.gpu)
        assert (follower.is_spot, follower.is_pinned, follower.deployment) == (True, True, None)
        # What runs there goes on: the machine is not gone yet.
        assert fleet.cloud.alive == {node.cluster, follower.cluster}
        engine.load = 0
        result = await fleet.lifecycle(node).result()
        assert (result["state"], result["reason"]) == ("lost", f"the cloud takes the machine: {NOTICE}")
        assert await preemptions(fleet) == {node.node_id: True}
        assert len(await fleet.nodes.list_all()) == 2
        await fleet.check_books()

    async def test_then_death_brings_one_successor(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=600)
        await fleet.watch()
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        await fleet.until("out of routing", lambda: is_draining(fleet, node))
        fleet.cloud.take(node.cluster)
        async with asyncio.timeout(20):
            await fleet.lifecycle(node).result()
        await successor(fleet, node)
        assert len(await fleet.nodes.list_all()) == 2
        await fleet.check_books()

    async def test_with_an_endless_stream_ends_at_the_deadline(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=4)
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        async with asyncio.timeout(20):
            assert (await fleet.lifecycle(node).result())["state"] == "lost"
        await successor(fleet, node)
        await fleet.check_books()

    async def test_does_not_wait_for_a_look_that_hangs(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        engine = fleet.cloud.engines[node.cluster]
        engine.is_mute = True
        before = len(engine.requests)
        await fleet.lifecycle(node).signal(names.LOOK_AGAIN)

        async def asked() -> bool:
            return len(engine.requests) > before

        await fleet.until("the look hangs", asked)
        await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        await fleet.until("out of routing", lambda: is_draining(fleet, node), within_s=1.0)

    async def test_of_a_replica_leaves_its_successor_to_the_deployment(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        await fleet.keep_deployment("llama-7b")
        node = await fleet.until_looked_after()
        await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        await fleet.lifecycle(node).result()
        follower = await fleet.until_looked_after()
        assert follower.id not in {node.id, successor_of(node.id)}
        assert len(await fleet.nodes.list_all()) == 2
        assert await preemptions(fleet) == {node.node_id: True}
        await fleet.check_books()

    async def test_of_a_node_that_is_drained_already_brings_none(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        await fleet.lifecycle(node).signal(names.DRAIN, "not needed any more")
        await fleet.lifecycle(node).signal(names.SPOT_NOTICE, NOTICE)
        assert (await fleet.lifecycle(node).result())["state"] == "terminated"
        assert await fleet.nodes.list_all() == [await fleet.nodes.get(node.id)]

    async def test_of_a_joined_node_only_drains(self, fleet: FleetUnderTest) -> None:
        engine = EngineServer()
        await engine.start()
        node_id = NODE.show(new_id())
        spec = NodeSpec(node_id, "llama-7b", "in-mumbai", endpoint=engine.endpoint, drain_timeout_s=5)
        handle = await fleet.client.start_workflow(
            names.NODE_LIFECYCLE,
            NodeLifecycleInput(spec, is_admitted=False),
            id=names.node_workflow_id(node_id),
            task_queue=fleet.task_queue,
        )
        await fleet.until_state(NodeState.READY)
        await handle.signal(names.SPOT_NOTICE, 17)  # Whatever it is, it is a notice.
        result: dict[str, str] = await handle.result()
        assert (result["state"], result["reason"]) == ("lost", "the cloud takes the machine")
        assert len(await fleet.nodes.list_all()) == 1
        assert await preemptions(fleet) == {}
        engine.stop()

    async def test_in_a_heartbeat_is_enough(self, fleet: FleetUnderTest) -> None:
        """The signal was lost."""
        node = await fleet.serve_one()
        await fleet.watch()
        heartbeats = HeartbeatBoard(fleet.redis, fleet.settings.redis_prefix)
        await heartbeats.put(Heartbeat(node.node_id, time.time(), True, notice="gcp: preempted"))
        result = await fleet.lifecycle(node).result()
        assert (result["state"], result["reason"]) == ("lost", "the cloud takes the machine: gcp: preempted")
        await successor(fleet, node)
        assert await preemptions(fleet) == {node.node_id: True}


class TestDeathWithoutNotice:
    async def test_brings_one_successor(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        await fleet.watch()
        fleet.cloud.take(node.cluster)
        assert (await fleet.lifecycle(node).result())["state"] == "lost"
        await successor(fleet, node)
        assert await preemptions(fleet) == {node.node_id: False}
        assert len(await fleet.nodes.list_all()) == 2
        await fleet.check_books()

    @pytest.mark.parametrize("spot", [True, False])
    async def test_is_a_preemption_only_of_a_spot_machine(self, fleet: FleetUnderTest, spot: bool) -> None:
        node = await fleet.serve_one(spot=spot)
        fleet.cloud.take(node.cluster)
        await fleet.lifecycle(node).signal(names.LOOK_AGAIN)
        await fleet.lifecycle(node).result()
        assert await preemptions(fleet) == ({node.node_id: False} if spot else {})
