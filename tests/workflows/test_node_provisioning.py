from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import Worker

from activities.cloud import CloudActivities
from activities.manners import Manners
from activities.nodes import spec_of
from crosslogic.clients import temporal
from crosslogic.contracts.names import DRAIN, STATE
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, NodeState
from crosslogic.new_ids import new_id
from crosslogic.store.catalog import CatalogStore
from tests.workflows.fleet import EngineServer, FleetUnderTest, running
from worker import WORKFLOWS

# Long enough for a step to be in, short enough to wait for.
SHORT_S = 2


def sick(engine: EngineServer) -> None:
    engine.is_well = False


def mute(engine: EngineServer) -> None:
    engine.can_generate = False


async def failure_of(handle: WorkflowHandle[Any, Any]) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    assert isinstance(caught.value.cause, ApplicationError)
    return caught.value.cause


class TestSuccess:
    async def test_brings_a_node_up_and_hands_it_over(self, fleet: FleetUnderTest) -> None:
        handle = await fleet.provision("by-hand")
        result = await handle.result()
        node = await fleet.only_node()
        assert result == {
            "node_id": node.node_id,
            "state": "ready",
            "model": "llama-3-8b",
            "region": "in-mumbai",
            "reason": "it serves",
        }
        assert node.state is NodeState.READY
        assert node.workflow_id == f"node/{node.node_id}"
        assert node.is_pinned
        assert node.capacity_tokens_per_s > 0
        assert await fleet.lifecycle(node).query(STATE) == "ready"
        await fleet.check_books()

    async def test_is_findable_and_tells_what_it_is_doing(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(region="ap-south-1")
        described = await fleet.lifecycle(node).describe()
        attributes: Any = described.typed_search_attributes
        found = {pair.key.name: pair.value for pair in attributes}
        assert found["CrossLogicNode"] == node.node_id
        assert found["CrossLogicRegion"] == "in-mumbai"
        assert found["CrossLogicModel"] == "llama-3-8b"
        assert found["CrossLogicState"] == "ready"
        details = await fleet.lifecycle(node).query("__temporal_workflow_metadata")
        assert f"Node `{node.node_id}`: llama-3-8b in in-mumbai" in str(details)

    async def test_counts_for_the_deployment_that_promises_it(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        node = await fleet.serve_one()
        assert node.deployment == "llama-7b"
        assert node.is_pinned

    async def test_serves_embeddings(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one(model="bge-base-en")
        assert "/v1/embeddings" in fleet.cloud.engines[node.cluster].requests

    async def test_takes_a_node_id_once(self, fleet: FleetUnderTest) -> None:
        node_id = NODE.show(new_id())
        node = await fleet.serve_one(node_id=node_id)
        error = await failure_of(await fleet.provision(node_id=node_id))
        assert "No node was started" in error.message
        assert "is taken" in error.message
        assert await fleet.only_node() == node
        await fleet.check_books()


class TestBadOrders:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model": "gpt-9"}, ["Unknown model 'gpt-9'", "llama-7b", "mistral-7b"]),
            ({"region": "mars"}, ["Unknown region 'mars'", "in-mumbai", "us-east"]),
            ({"provider": "aws"}, ["'aws'", "local"]),
            ({"deployment": "nope"}, ["Deployment 'nope' does not promise llama-3-8b in in-mumbai", "leave it out"]),
            ({"node_id": "node_x"}, ["not a node id", "node_01k5"]),
            ({"launch_timeout_s": 0}, ["launch_timeout_s", "seconds"]),
        ],
    )
    async def test_fail_with_what_to_write_instead(
        self, fleet: FleetUnderTest, fields: dict[str, Any], words: list[str]
    ) -> None:
        error = await failure_of(await fleet.provision(**fields))
        assert error.non_retryable
        for word in ["No node was started", *words]:
            assert word in error.message
        assert await fleet.nodes.list_all() == []


class TestUndo:
    """F1, F3 and F4 whatever step fails."""

    async def check_failed(self, fleet: FleetUnderTest, handle: WorkflowHandle[Any, Any], *words: str) -> None:
        error = await failure_of(handle)
        for word in [*words, "Everything was undone"]:
            assert word in error.message
        node = await fleet.only_node()
        assert node.state is NodeState.FAILED
        assert node.is_tombstoned
        assert fleet.cloud.alive == set()
        await fleet.check_books()

    async def test_when_there_is_no_capacity(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.capacity = 0
        await self.check_failed(fleet, await fleet.provision(), "ordering the machine", "no capacity")

    async def test_when_the_machine_never_runs(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.boots = False
        handle = await fleet.provision(launch_timeout_s=SHORT_S)
        await self.check_failed(fleet, handle, "waiting for the machine", "took too long")

    async def test_when_the_machine_ends_before_it_is_up(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.boots = False
        handle = await fleet.provision()
        node = await fleet.until_state(NodeState.LAUNCHING)
        await fleet.until("machine", lambda: _true(lambda: node.cluster in fleet.cloud.alive))
        fleet.cloud.take(node.cluster, "preempted")
        await self.check_failed(fleet, handle, "ended before it was up", "preempted")

    async def test_when_the_engine_never_answers(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = sick
        handle = await fleet.provision(boot_timeout_s=SHORT_S)
        await self.check_failed(fleet, handle, "waiting for the engine", "took too long")

    async def test_when_the_machine_ends_while_it_boots(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = sick
        handle = await fleet.provision()
        node = await fleet.until_state(NodeState.BOOTING)
        fleet.cloud.take(node.cluster)
        await self.check_failed(fleet, handle, "ended before its engine answered")

    async def test_when_the_engine_generates_nothing(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = mute
        handle = await fleet.provision(load_timeout_s=SHORT_S)
        await self.check_failed(fleet, handle, "first generation", "took too long")

    async def test_when_the_machine_ends_while_it_loads(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = mute
        handle = await fleet.provision()
        node = await fleet.until_state(NodeState.LOADING)
        fleet.cloud.take(node.cluster)
        await self.check_failed(fleet, handle, "ended before it generated a token")

    async def test_when_it_was_tombstoned_before_it_could_be_admitted(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = mute
        handle = await fleet.provision()
        node = await fleet.until_state(NodeState.LOADING)
        intent = Intent(node.id, node.model, node.region, node.provider, node.cluster, node.workflow_id)
        await fleet.nodes.tombstone(intent, "by the test")
        fleet.cloud.engines[node.cluster].can_generate = True
        await self.check_failed(fleet, handle, "admitting the node", "tombstoned")

    async def test_is_tried_until_the_cloud_answers(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.on_engine = sick
        fleet.cloud.before["end"] = deque([_fault(Unavailable("the cloud is away"))] * 2)
        fleet.cloud.after["end"] = deque([_fault(Unavailable("the reply was lost"))])
        handle = await fleet.provision(boot_timeout_s=SHORT_S)
        await self.check_failed(fleet, handle, "waiting for the engine")


class TestLostReplies:
    async def test_order_one_machine_only(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.before["ensure"] = deque([_fault(Unavailable("the cloud is away"))])
        fleet.cloud.after["ensure"] = deque([_fault(Unavailable("the reply was lost"))])
        await fleet.serve_one()
        assert len(fleet.cloud.ever) == 1
        await fleet.check_books()

    async def test_do_not_mind_a_cloud_that_lists_late(self, fleet: FleetUnderTest) -> None:
        fleet.cloud.lag_reads = 4
        await fleet.serve_one()
        await fleet.check_books()


STEPS = ["ordering", "launching", "booting", "loading", "serving"]


async def reach(fleet: FleetUnderTest, step: str) -> tuple[WorkflowHandle[Any, Any], Callable[[], None]]:
    """A provisioning that is in that step, and what lets the cloud answer again."""
    gate = asyncio.Event()
    if step == "ordering":
        reached = asyncio.Event()

        async def wait() -> None:
            reached.set()
            await gate.wait()

        fleet.cloud.before["ensure"] = deque([wait])
        handle = await fleet.provision()
        await reached.wait()
        return handle, gate.set
    if step == "launching":
        fleet.cloud.boots = False
        handle = await fleet.provision()
        await fleet.until("a machine", lambda: _true(lambda: bool(fleet.cloud.ever)))
        return handle, gate.set
    fleet.cloud.on_engine = {"booting": sick, "loading": mute}.get(step)
    handle = await fleet.provision()
    await fleet.until_state(NodeState(step) if step != "serving" else NodeState.READY)
    if step == "serving":
        await handle.result()
    return handle, gate.set


class TestDrain:
    @pytest.mark.parametrize("step", STEPS[:-1])
    async def test_before_it_serves_undoes_everything(self, fleet: FleetUnderTest, step: str) -> None:
        handle, release = await reach(fleet, step)
        await handle.signal(DRAIN, "not needed any more")
        await fleet.until("tombstoned", lambda: _tombstoned(fleet))
        if step == "ordering":
            # Time enough for an undo that does not wait for the order in flight; then the cloud carries it out.
            await asyncio.sleep(3)
            release()
            await fleet.until("the machine was there", lambda: _true(lambda: bool(fleet.cloud.ever)))
        result = await handle.result()
        assert (result["state"], result["reason"]) == ("terminated", "not needed any more")
        assert (await fleet.only_node()).state is NodeState.TERMINATED
        assert fleet.cloud.alive == set()
        await fleet.check_books()

    async def test_at_the_moment_of_admission_reaches_the_lifecycle(self, fleet: FleetUnderTest) -> None:
        handle, _ = await reach(fleet, "loading")
        fleet.cloud.engines[fleet.cloud.ever[0]].can_generate = True
        while (await fleet.only_node()).state is not NodeState.READY:
            pass
        await handle.signal(DRAIN, "changed my mind")
        await handle.result()
        node = await fleet.until_state(NodeState.TERMINATED)
        assert node.reason == "changed my mind"
        await fleet.lifecycle(node).result()
        await fleet.check_books()


class TestCancel:
    @pytest.mark.parametrize("step", STEPS[:-1])
    async def test_undoes_everything_and_ends_as_cancelled(self, fleet: FleetUnderTest, step: str) -> None:
        """T7; the launch in flight is the one that leaks without shield and tombstone."""
        handle, release = await reach(fleet, step)
        await handle.cancel()
        await fleet.until("tombstoned", lambda: _tombstoned(fleet))
        if step == "ordering":
            # Time enough for an undo that does not wait for the order in flight; then the cloud carries it out.
            await asyncio.sleep(3)
            release()
            await fleet.until("the machine was there", lambda: _true(lambda: bool(fleet.cloud.ever)))
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
        assert isinstance(caught.value.cause, CancelledError)
        assert (await fleet.only_node()).state is NodeState.TERMINATED
        assert fleet.cloud.alive == set()
        await fleet.check_books()


class TestCoincidence:
    """A stop that reaches the workflow in one task with the completion of the step that it was waiting for.

    The SDK drops a task's cancellation then; the workflow would go on with the next step, here for half an hour.
    """

    @pytest.mark.parametrize("stop", ["drain", "cancel"])
    async def test_stops_all_the_same(self, idle_fleet: FleetUnderTest, stop: str) -> None:
        fleet = idle_fleet

        def sick_and_mute(engine: EngineServer) -> None:
            engine.is_well = engine.can_generate = False

        fleet.cloud.on_engine = sick_and_mute
        client, queue = fleet.client, fleet.task_queue
        decider = Worker(client, task_queue=queue, workflows=WORKFLOWS, workflow_runner=temporal.workflow_runner())
        doer = Worker(client, task_queue=queue, activities=fleet.fleet.activities, interceptors=[Manners()])
        async with running(doer):
            async with running(decider):
                handle = await fleet.provision()
                node = await fleet.until_state(NodeState.BOOTING)
                await asyncio.sleep(1)  # Until the workflow has asked for the next step.
            fleet.cloud.engines[node.cluster].is_well = True
            await fleet.until_state(NodeState.LOADING)

            async def completed() -> bool:
                return not (await handle.describe()).raw_description.pending_activities

            await fleet.until("the activity is completed", completed)
            await (handle.signal(DRAIN, "in that moment") if stop == "drain" else handle.cancel())
            again = Worker(client, task_queue=queue, workflows=WORKFLOWS, workflow_runner=temporal.workflow_runner())
            async with running(again), asyncio.timeout(20):
                with contextlib.suppress(WorkflowFailureError):
                    await handle.result()
        assert (await fleet.only_node()).state is NodeState.TERMINATED
        await fleet.check_books()


class TestZombies:
    """Attempts of `launch_machine` that come after the node was undone (fault c)."""

    def activities(self, fleet: FleetUnderTest) -> CloudActivities:
        return CloudActivities({"local": fleet.cloud}, fleet.nodes, is_loopback_allowed=True)

    async def test_order_nothing_when_the_tombstone_stands(self, idle_fleet: FleetUnderTest) -> None:
        intent = await _requested(idle_fleet)
        spec = spec_of(await idle_fleet.nodes.get(intent.id), await CatalogStore(idle_fleet.pool).load())
        await idle_fleet.nodes.tombstone(intent, "undone")
        with pytest.raises(Rejected, match="tombstoned"):
            await ActivityEnvironment().run(self.activities(idle_fleet).launch_machine, spec)
        assert idle_fleet.cloud.ever == []

    async def test_clean_up_behind_themselves_when_it_comes_meanwhile(self, idle_fleet: FleetUnderTest) -> None:
        intent = await _requested(idle_fleet)
        spec = spec_of(await idle_fleet.nodes.get(intent.id), await CatalogStore(idle_fleet.pool).load())

        async def undone_meanwhile() -> None:
            await idle_fleet.nodes.tombstone(intent, "undone")

        idle_fleet.cloud.before["ensure"] = deque([undone_meanwhile])
        with pytest.raises(Rejected, match="tombstoned"):
            await ActivityEnvironment().run(self.activities(idle_fleet).launch_machine, spec)
        assert idle_fleet.cloud.ever == [spec.cluster]
        assert idle_fleet.cloud.alive == set()

    async def test_a_late_intent_finds_the_tombstone(self, idle_fleet: FleetUnderTest) -> None:
        intent = await _requested(idle_fleet)
        late = replace(intent, id=new_id(), cluster="cic-late")
        await idle_fleet.nodes.tombstone(late, "undone before it was written")
        assert (await idle_fleet.nodes.intend(late)).is_tombstoned


async def _requested(fleet: FleetUnderTest) -> Intent:
    intent = Intent(new_id(), "llama-3-8b", "in-mumbai", "local", "cic-zombie", "provision/zombie")
    await fleet.nodes.intend(intent)
    return intent


async def _tombstoned(fleet: FleetUnderTest) -> bool:
    return (await fleet.only_node()).is_tombstoned


async def _true(claim: Callable[[], bool]) -> bool:
    return claim()


def _fault(error: Exception) -> Callable[[], Any]:
    async def fail() -> None:
        raise error

    return fail
