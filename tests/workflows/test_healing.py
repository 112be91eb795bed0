"""Deployments, health and lifecycles together: what dies is noticed, left out and replaced, by nobody's hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import redis.asyncio as aioredis
from temporalio.client import WorkflowExecutionStatus

from activities.nodes import spec_of
from crosslogic.clients.entities import Entities
from crosslogic.contracts import names
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, Node, NodeState
from crosslogic.new_ids import new_id
from crosslogic.store.catalog import CatalogStore
from tests.workflows.fleet import EngineServer, FleetUnderTest


async def serving(fleet: FleetUnderTest, count: int) -> list[Node]:
    """That many ready nodes, and no others that have not ended."""

    async def look() -> list[Node]:
        alive = await fleet.nodes.list_alive()
        settled = len(alive) == count and all(node.state is NodeState.READY for node in alive)
        return alive if settled else []

    return await fleet.until(f"{count} nodes serve", look)


class TestPromise:
    async def test_is_kept_in_every_region(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=2, us_east=1)
        handle = await fleet.keep_deployment("llama-7b")
        nodes = await serving(fleet, 3)
        assert sorted(node.region for node in nodes) == ["in-mumbai", "in-mumbai", "us-east"]
        assert not any(node.is_pinned for node in nodes)
        assert {node.deployment for node in nodes} == {"llama-7b"}
        await handle.signal(names.LOOK_AGAIN)

        async def explained() -> bool:
            details = str(await handle.query("__temporal_workflow_metadata"))
            return all(f"{line} replicas present" in details for line in ("in-mumbai: 2 of 2", "us-east: 1 of 1"))

        await fleet.until("both regions are explained", explained)
        await fleet.check_books()

    async def test_grows_when_it_is_nudged(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        handle = await fleet.keep_deployment("llama-7b")
        await serving(fleet, 1)
        await fleet.pool.execute("UPDATE deployment_regions SET replicas_min = 2, replicas_max = 2")
        await handle.signal(names.LOOK_AGAIN)
        await serving(fleet, 2)

    async def test_counts_nodes_that_were_started_by_hand(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        node = await fleet.serve_one()
        handle = await fleet.keep_deployment("llama-7b")
        await handle.signal(names.LOOK_AGAIN)
        await asyncio.sleep(1)
        assert await fleet.nodes.list_all() == [node]

    async def test_pauses_longer_after_each_failure(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.capacity = 0
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        handle = await fleet.keep_deployment("llama-7b")
        await fleet.until_state(NodeState.FAILED)

        async def pausing() -> bool:
            return "1 failure(s) in a row" in str(await handle.query("__temporal_workflow_metadata"))

        await fleet.until("a pause", pausing)
        for _ in range(20):
            await handle.signal(names.LOOK_AGAIN)
            await asyncio.sleep(0.05)
        assert len(await fleet.nodes.list_all()) == 1
        fleet.cloud.capacity = 1
        await serving(fleet, 1)

    async def test_ends_with_its_deployment(self, fleet: FleetUnderTest) -> None:
        handle = await fleet.keep_deployment("nobody-has-this")
        assert "no deployment 'nobody-has-this'" in await handle.result()


class TestDeath:
    async def test_of_a_machine_is_noticed_and_made_good(self, fleet: FleetUnderTest) -> None:
        """F2, F5."""
        await fleet.add_deployment("llama-7b", in_mumbai=2)
        await fleet.keep_deployment("llama-7b")
        await fleet.watch()
        victim, other = await serving(fleet, 2)
        fleet.cloud.take(victim.cluster)
        await fleet.until("out of routing", lambda: _is_out(fleet, victim), within_s=6)
        await fleet.until_state(NodeState.LOST)
        nodes = await serving(fleet, 2)
        assert other.id in {node.id for node in nodes}
        assert len(await fleet.nodes.list_all()) == 3
        assert (await fleet.lifecycle(victim).result())["state"] == "lost"
        await fleet.check_books()

    async def test_of_an_engine_in_a_living_machine_is_believed_after_a_while(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        await fleet.keep_deployment("llama-7b")
        await fleet.watch()
        (victim,) = await serving(fleet, 1)
        fleet.cloud.engines[victim.cluster].stop()
        await fleet.until_state(NodeState.FAILED)
        await serving(fleet, 1)
        assert (await fleet.nodes.get(victim.id)).reason.startswith("the engine has been silent for")
        await fleet.check_books()

    async def test_that_was_none_changes_nothing(self, fleet: FleetUnderTest) -> None:
        """Flapping: a silence shorter than the policy's."""
        node = await fleet.serve_one()
        watch = await fleet.watch()
        engine: EngineServer = fleet.cloud.engines[node.cluster]
        for _ in range(3):
            engine.is_well = False

            async def suspected() -> bool:
                return "suspect" in str(await watch.query("__temporal_workflow_metadata"))

            await fleet.until("suspected", suspected)
            engine.is_well = True
            await asyncio.sleep(0.5)
        assert await fleet.only_node() == node

    async def test_of_redis_memory_is_mended(self, fleet: FleetUnderTest, redis: aioredis.Redis) -> None:
        """Fault f: the route board is rebuilt from Postgres within a few probe intervals."""
        node = await fleet.serve_one()
        await fleet.watch()
        await redis.delete(f"{fleet.settings.redis_prefix}routes")
        await fleet.until("back on the board", lambda: _is_routed(fleet, node), within_s=5)
        stranger = replace(node.route_entry, node_id=NODE.show(new_id()))
        await fleet.board.publish(stranger)
        await fleet.until("strangers are taken off", lambda: _is_alone(fleet, node), within_s=5)


class TestEntities:
    """The worker's keeper: nothing that Temporal lost, or that somebody terminated, stays lost."""

    def entities(self, fleet: FleetUnderTest) -> Entities:
        return Entities(fleet.client, fleet.task_queue, grace_s=0.0)

    async def keep(self, fleet: FleetUnderTest) -> tuple[list[str], list[str]]:
        catalog = await CatalogStore(fleet.pool).load()
        kept = await self.entities(fleet).keep_nodes(
            await fleet.nodes.list_alive(),
            fleet.nodes.find,
            lambda node: spec_of(node, catalog),
            fleet.nodes.hand_over,
        )
        return kept.adopted, kept.orphaned

    async def test_leaves_what_is_looked_after_alone(self, fleet: FleetUnderTest) -> None:
        await fleet.serve_one()
        assert await self.keep(fleet) == ([], [])

    async def test_gives_a_serving_node_its_lifecycle_back(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        await fleet.lifecycle(node).terminate("by an operator's mistake")
        assert await self.keep(fleet) == ([node.node_id], [])
        assert (await fleet.lifecycle(node).describe()).status is WorkflowExecutionStatus.RUNNING
        await fleet.lifecycle(node).signal(names.DRAIN)
        await fleet.until_state(NodeState.TERMINATED)
        await fleet.lifecycle(node).result()
        await fleet.check_books()

    async def test_names_the_lifecycle_of_a_node_that_was_never_handed_over(self, fleet: FleetUnderTest) -> None:
        """Its provisioning was terminated between admitting it and handing it over: a drain would reach nobody."""
        node = await fleet.serve_one()
        await fleet.nodes.hand_over(node.id, "terminated-by-mistake")
        assert await self.keep(fleet) == ([node.node_id], [])
        assert (await fleet.nodes.get(node.id)).workflow_id == fleet.lifecycle(node).id
        assert await self.keep(fleet) == ([], [])

    async def test_undoes_a_node_whose_provisioning_is_gone(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.boots = False
        handle = await fleet.provision()
        node = await fleet.until_state(NodeState.LAUNCHING)
        await fleet.until("a machine", lambda: _has_machine(fleet))
        await handle.terminate("by an operator's mistake")
        assert await self.keep(fleet) == ([], [node.node_id])
        node = await fleet.until_state(NodeState.FAILED)
        assert node.reason == f"{handle.id} is gone"
        await fleet.lifecycle(node).result()
        assert fleet.cloud.alive == set()
        await fleet.check_books()

    async def test_undoes_a_row_whose_provisioning_never_started(self, fleet: FleetUnderTest) -> None:
        """It would count as a replica for ever otherwise."""
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        lost = Intent(new_id(), "llama-3-8b", "in-mumbai", "local", "cic-x", "provision/x", "llama-7b")
        await fleet.nodes.intend(lost)
        await fleet.keep_deployment("llama-7b")
        await asyncio.sleep(0.5)
        assert len(await fleet.nodes.list_all()) == 1
        await self.keep(fleet)
        await fleet.until_state(NodeState.FAILED)
        await serving(fleet, 1)
        await fleet.check_books()

    async def test_finishes_a_drain_that_lost_its_workflow(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(drain_timeout_s=600)
        fleet.cloud.engines[node.cluster].load = 1
        await fleet.lifecycle(node).signal(names.DRAIN, "maintenance")
        await fleet.until_state(NodeState.DRAINING)
        await fleet.lifecycle(node).terminate("by an operator's mistake")
        await self.keep(fleet)
        fleet.cloud.engines[node.cluster].load = 0
        assert (await fleet.until_state(NodeState.TERMINATED)).reason == "maintenance"

    async def test_starts_the_standing_ones_once(self, fleet: FleetUnderTest) -> None:
        # Their ids are the same for every test on this server: another namespace's worth of names.
        regions, deployments = [f"test-{new_id()}"], [f"test-{new_id()}"]
        entities = self.entities(fleet)
        for _ in range(2):
            await entities.keep_standing(regions, deployments)
        watch = fleet.client.get_workflow_handle(names.fleet_health_workflow_id(regions[0]))
        assert (await watch.describe()).status is WorkflowExecutionStatus.RUNNING
        keeper = fleet.client.get_workflow_handle(names.deployment_workflow_id(deployments[0]))
        assert "no deployment" in await keeper.result()


async def _is_out(fleet: FleetUnderTest, node: Node) -> bool:
    entry = (await fleet.routes()).get(node.node_id)
    return entry is None or not entry.is_routable


async def _is_routed(fleet: FleetUnderTest, node: Node) -> bool:
    return node.node_id in await fleet.routes()


async def _is_alone(fleet: FleetUnderTest, node: Node) -> bool:
    return set(await fleet.routes()) == {node.node_id}


async def _has_machine(fleet: FleetUnderTest) -> bool:
    return bool(fleet.cloud.alive)
