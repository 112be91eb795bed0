"""T4: every activity run twice has the effect of once."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import temporalio.worker

import worker as fleet_worker
from activities.nodes import NodeActivities
from crosslogic.contracts import names
from crosslogic.contracts.ledger import UsageSealingInput
from crosslogic.contracts.node import NodeLifecycleInput, NodeSpec
from crosslogic.contracts.rollout import DeploymentRolloutInput
from crosslogic.contracts.sweep import FleetSweepInput, FleetSweepResult
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import Node, NodeEvent, NodeState, cluster_name, sources_of
from crosslogic.domain.revision import GoldenPrompt, RevisionSpec
from crosslogic.new_ids import new_id
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.nodes import NodeStore
from crosslogic.store.revisions import RevisionStore
from crosslogic.store.usage import UsageStore
from tests.store.test_usage import a_record
from tests.workflows.fleet import EngineServer, FleetUnderTest, running

# Watches return news, not effects; a second one would wait for news that it has told already.
READ_ONLY = {"watch_region"}


class Twice(temporalio.worker.Interceptor):
    """As a worker does that is killed between an activity's effect and its completion."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def intercept_activity(
        self, next: temporalio.worker.ActivityInboundInterceptor
    ) -> temporalio.worker.ActivityInboundInterceptor:
        ran = self.ran

        class Inbound(temporalio.worker.ActivityInboundInterceptor):
            async def execute_activity(self, input: temporalio.worker.ExecuteActivityInput) -> Any:
                name = input.fn.__name__
                ran[name] += 1
                if name not in READ_ONLY:
                    await self.next.execute_activity(input)
                return await self.next.execute_activity(input)

        return Inbound(next)


async def used(pool: asyncpg.Pool) -> None:
    """One record of a past hour: 18 tokens."""
    at = int((time.time() - 7200) * 1000)
    record = a_record(id=uuid7(at, new_id().int & (1 << 80) - 1))
    await UsageStore(pool).add([msgspec.json.encode(record)])


class TestEveryActivityTwice:
    async def test_is_once(self, idle_fleet: FleetUnderTest) -> None:
        fleet, twice = idle_fleet, Twice()
        async with running(fleet_worker.make_worker(fleet.client, fleet.task_queue, fleet.fleet.activities, [twice])):
            await fleet.add_deployment("llama-7b", in_mumbai=1)
            deployment = await fleet.keep_deployment("llama-7b")
            node = await fleet.until_looked_after()
            # Requested, launching, booting, loading, ready: each once.
            assert node.generation == 5
            assert fleet.cloud.ever == [node.cluster]
            await fleet.watch()
            await fleet.check_books()
            await deployment.cancel()
            await fleet.lifecycle(node).signal(names.DRAIN, "enough")
            await fleet.lifecycle(node).result()
            ended = await fleet.nodes.get(node.id)
            # Draining, tombstoned, terminated.
            assert (ended.state, ended.generation) == (NodeState.TERMINATED, 8)

            fleet.cloud.capacity = 0
            failing = await fleet.provision()
            failed = await fleet.until_state(NodeState.FAILED)
            # Requested, launching, tombstoned, failed.
            assert failed.generation == 4
            assert (await failing.describe()).id == failing.id

            engine = EngineServer()
            await engine.start()
            node_id = NODE.show(new_id())
            spec = NodeSpec(node_id, "llama-7b", "in-mumbai", endpoint=engine.endpoint)
            await fleet.client.start_workflow(
                names.NODE_LIFECYCLE,
                NodeLifecycleInput(spec, is_admitted=False),
                id=names.node_workflow_id(node_id),
                task_queue=fleet.task_queue,
            )
            joined = await fleet.until_state(NodeState.READY)
            assert joined.generation == 5
            await fleet.check_books()
            engine.stop()

            fleet.cloud.capacity = 1
            taken = await fleet.serve_one()
            await fleet.lifecycle(taken).signal(names.SPOT_NOTICE, "aws: terminate")
            await fleet.lifecycle(taken).result()
            assert await fleet.pool.fetchval("SELECT count(*) FROM preemptions") == 1
            await used(fleet.pool)
            sealing = await fleet.client.start_workflow(
                names.USAGE_SEALING, UsageSealingInput(), id=f"sealing-{node_id}", task_queue=fleet.task_queue
            )
            assert "sealed until" in await sealing.result()
            sums = "SELECT (SELECT sum(tokens) FROM usage_buckets), (SELECT count(*) FROM rated_hours)"
            assert tuple(await fleet.pool.fetchrow(sums) or ()) == (18, 1)
            assert await fleet.pool.fetchval("SELECT count(*) FROM ledger_transactions") == 2
            assert await fleet.pool.fetchval("SELECT proved_until = sealed_until FROM usage_horizon")
            assert fleet.settings.node_secret is not None
            secret = fleet.settings.node_secret.get_secret_value()
            planted = cluster_name("local", "in-mumbai", "cpu", True, NODE.show(new_id()), secret)
            fleet.cloud.plant(planted)
            swept = await fleet.client.execute_workflow(
                names.FLEET_SWEEP,
                FleetSweepInput(look_again_s=0.1),
                id=f"sweep-{planted}",
                task_queue=fleet.task_queue,
                result_type=FleetSweepResult,
            )
            assert [found.cluster for found in swept.findings] == [planted]
            assert await fleet.pool.fetchval("SELECT count(*) FROM sweeps") == 1
            assert fleet.cloud.machines[planted].status == "gone"

            fleet.cloud.capacity = 4
            golden = RevisionSpec(golden=[GoldenPrompt("Say hello.", "hello")])
            await RevisionStore(fleet.pool).create("llama-7b", golden, actor="test")
            rollout = await fleet.client.start_workflow(
                names.DEPLOYMENT_ROLLOUT,
                DeploymentRolloutInput("llama-7b", 2, bake_s=0, longest_bake_s=0),
                id=names.rollout_workflow_id("llama-7b", 2),
                task_queue=fleet.task_queue,
            )
            await rollout.result()
            row = "SELECT revision, rollout_revision, traffic_bp FROM deployments WHERE name = 'llama-7b'"
            assert tuple(await fleet.pool.fetchrow(row) or ()) == (2, None, 0)

            await fleet.pool.execute("UPDATE deployment_regions SET replicas_min = 0, replicas_max = 0")
            await fleet.keep_deployment("llama-7b")

            async def are_rented_ones_gone() -> bool:
                return all(node.is_pinned for node in await fleet.nodes.list_alive())

            await fleet.until("what is too many has gone", are_rented_ones_gone)
            rotation = await fleet.client.start_workflow(
                names.CERTIFICATE_ROTATION,
                {"new_authority": False},
                id=f"rotation-{planted}",
                task_queue=fleet.task_queue,
            )
            await rotation.result()
            assert await fleet.pool.fetchval("SELECT count(*) FROM authorities") == 1
        every = {method.__name__ for method in fleet.fleet.activities}
        assert set(twice.ran) == every, "an activity was not exercised"


class FasterStore(NodeStore):
    """Before it does anything to a node, another attempt of the same has done all of it."""

    async def advance(self, node_id: UUID, event: NodeEvent, reason: str, **columns: Any) -> Node:
        node = await self.get(node_id)
        for done in (NodeEvent.LAUNCH, NodeEvent.BOOT):
            if node.state in sources_of(done):
                node = await super().advance(node_id, done, "the other attempt", **columns)
        return await super().advance(node_id, event, reason, **columns)


class TestJoinNode:
    async def test_may_be_overtaken_by_an_attempt_that_was_thought_dead(self, idle_fleet: FleetUnderTest) -> None:
        fleet = idle_fleet
        writer = NodeActivities(
            FasterStore(fleet.pool),
            CatalogStore(fleet.pool),
            fleet.board,
            providers=(),
            default_provider="local",
            is_loopback_allowed=True,
        )
        spec = NodeSpec(NODE.show(new_id()), "llama-7b", "in-mumbai", endpoint="http://127.0.0.1:1")
        await writer.join_node(spec)
        assert (await fleet.only_node()).state is NodeState.BOOTING
