"""Roll-outs on a real worker: they go through, or they lead back, and the floor holds all the time (F8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import WorkflowFailureError, WorkflowHandle

import worker as fleet_worker
from crosslogic.clients.entities import Entities
from crosslogic.contracts import names
from crosslogic.domain.ids import uuid7
from crosslogic.domain.node import Node, NodeState
from crosslogic.domain.revision import GoldenPrompt, RevisionSpec
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.revisions import RevisionStore
from tests.workflows.fleet import EngineServer, FleetUnderTest, running

DEPLOYMENT = "llama-7b"
GOLDEN = RevisionSpec(golden=[GoldenPrompt("Say hello.", "hello")])
# No waiting where nothing can come: there is no traffic.
AT_ONCE: dict[str, Any] = {"bake_s": 0, "longest_bake_s": 0, "steps_bp": [5000, 10000]}


class RolloutUnderTest:
    """A deployment that serves, with a second revision to roll out, and a watch on its floor."""

    def __init__(self, fleet: FleetUnderTest) -> None:
        self.fleet = fleet
        self.revisions = RevisionStore(fleet.pool)
        self.floor = 0
        self.least_seen = 1_000

    async def prepare(self, replicas: int, spec: RevisionSpec = GOLDEN) -> None:
        await self.fleet.add_deployment(DEPLOYMENT, in_mumbai=replicas)
        await self.fleet.pool.execute("UPDATE deployment_regions SET replicas_max = 10")
        for _ in range(replicas):
            await self.fleet.serve_one(deployment=DEPLOYMENT, drain_timeout_s=1)
        self.floor = replicas
        await self.revisions.create(DEPLOYMENT, spec, actor="test")

    async def start(self, revision: int = 2, workflow_id: str = "", **fields: Any) -> WorkflowHandle[Any, Any]:
        return await self.fleet.client.start_workflow(
            names.DEPLOYMENT_ROLLOUT,
            {"deployment": DEPLOYMENT, "revision": revision, **AT_ONCE, **fields},
            id=workflow_id or f"by-hand-{uuid4()}",
            task_queue=self.fleet.task_queue,
        )

    async def serving(self) -> list[Node]:
        return [node for node in await self.fleet.nodes.list_alive() if node.route_entry.is_routable]

    async def watch_floor(self) -> None:
        while True:
            self.least_seen = min(self.least_seen, len(await self.serving()))
            await asyncio.sleep(0.02)

    async def until(self, what: str, look: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The deployment's row, as soon as it is as wanted."""

        async def read() -> dict[str, Any] | None:
            row = dict(await self.fleet.pool.fetchrow("SELECT * FROM deployments WHERE name = $1", DEPLOYMENT) or {})
            return row if look(row) else None

        found: dict[str, Any] = await self.fleet.until(what, read)
        return found

    async def until_watched(self, handle: WorkflowHandle[Any, Any]) -> None:
        """Its first share is written, and the workflow compares what comes from now on."""

        async def is_proving() -> bool:
            return await handle.query(names.STATE) == "prove"

        await self.fleet.until("a share is watched", is_proving)

    async def check(self, revision: int, replicas: int) -> None:
        """Only that revision serves, with so many nodes; nothing else is left, and the floor has held (F1, F8)."""
        serving = await self.serving()
        assert [node.revision for node in serving] == [revision] * replicas
        await self.until("let go", lambda row: row["rollout_revision"] is None)
        row = await self.until("the revision serves", lambda row: row["revision"] == revision)
        assert (row["traffic_bp"], row["rollout_workflow_id"]) == (0, None)
        assert self.least_seen >= self.floor, "F8"
        await self.fleet.check_books()


@contextlib.asynccontextmanager
async def watching(rollout: RolloutUnderTest) -> AsyncGenerator[None]:
    watch = asyncio.create_task(rollout.watch_floor())
    try:
        yield
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


@pytest.fixture
def rollout(fleet: FleetUnderTest) -> RolloutUnderTest:
    return RolloutUnderTest(fleet)


def lie(engine: EngineServer) -> None:
    """Engines of the second revision answer wrongly."""
    if engine.revision == 2:
        engine.says = "goodbye"


async def failure_of(handle: WorkflowHandle[Any, Any]) -> str:
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    return str(caught.value.cause)


class TestForth:
    async def test_replaces_every_node_and_never_goes_below_the_floor(self, rollout: RolloutUnderTest) -> None:
        """F8, F1: two nodes, one more at a time."""
        await rollout.prepare(2)
        async with watching(rollout):
            result = await (await rollout.start()).result()
        assert (result["state"], result["serving"]) == ("completed", 2)
        await rollout.check(2, 2)
        states = await rollout.fleet.pool.fetch("SELECT revision, state FROM deployment_revisions ORDER BY revision")
        assert [tuple(row) for row in states] == [(1, "retired"), (2, "serving")]

    @pytest.mark.chaos
    async def test_back_and_forth_again(self, rollout: RolloutUnderTest) -> None:
        """A roll-back is a roll-out of the older revision, and so is its own return."""
        await rollout.prepare(1)
        async with watching(rollout):
            await (await rollout.start(2)).result()
            await rollout.check(2, 1)
            rollback = await rollout.start(1, hold_at_bp=5000)
            await rollout.until("half of the traffic", lambda row: row["traffic_bp"] == 5000)
            await rollback.signal(names.ABORT, "the older one was worse")
            assert (await rollback.result())["state"] == "returned"
            await rollout.check(2, 1)
            await (await rollout.start(1)).result()
        await rollout.check(1, 1)

    @pytest.mark.chaos
    async def test_holds_a_canary_until_it_is_promoted(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        handle = await rollout.start(hold_at_bp=1000)
        await rollout.until("a tenth of the traffic", lambda row: row["traffic_bp"] == 1000)

        async def holding() -> bool:
            return await handle.query(names.STATE) == "hold"

        await rollout.fleet.until("it holds", holding)
        await handle.signal(names.PROMOTE)
        assert (await handle.result())["state"] == "completed"

    @pytest.mark.chaos
    async def test_a_pause_stops_it_until_it_is_resumed(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        handle = await rollout.start(bake_s=600, longest_bake_s=600)
        await rollout.until("a share", lambda row: row["traffic_bp"] == 5000)
        await handle.signal(names.PAUSE)
        await handle.signal(names.PROMOTE)

        async def paused() -> bool:
            return await handle.query(names.STATE) == "paused"

        await rollout.fleet.until("paused", paused)
        await handle.signal(names.RESUME)
        await rollout.until("the promoted share", lambda row: row["traffic_bp"] == 10_000)
        await handle.signal(names.PROMOTE)
        assert (await handle.result())["state"] == "completed"

    @pytest.mark.chaos
    async def test_a_lost_node_is_replaced_before_others_are_retired(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(2)
        watch = await rollout.fleet.watch()
        handle = await rollout.start(hold_at_bp=5000)
        await rollout.until("half of the traffic", lambda row: row["traffic_bp"] == 5000)
        victim = next(node for node in await rollout.serving() if node.revision == 2)
        rollout.fleet.cloud.take(victim.cluster)
        await rollout.fleet.until_state(NodeState.LOST)
        await handle.signal(names.PROMOTE)
        assert (await handle.result())["state"] == "completed"
        rollout.floor = 0
        await rollout.check(2, 2)
        await watch.cancel()


class TestGates:
    async def test_a_wrong_answer_of_the_first_node_leads_back(self, rollout: RolloutUnderTest) -> None:
        """A bad revision never gets a request."""
        await rollout.prepare(2)
        rollout.fleet.cloud.on_engine = lie
        async with watching(rollout):
            reason = await failure_of(await rollout.start())
        assert "'goodbye' instead of 'hello'" in reason
        assert "Revision 1 serves as before" in reason
        await rollout.check(1, 2)

    @pytest.mark.chaos
    async def test_a_wrong_answer_of_the_last_node_leads_back_too(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(3)

        def lie_last(engine: EngineServer) -> None:
            made = [other for other in rollout.fleet.cloud.engines.values() if other.revision == 2]
            if engine.revision == 2 and len(made) == 2:
                engine.says = "goodbye"

        rollout.fleet.cloud.on_engine = lie_last
        async with watching(rollout):
            reason = await failure_of(await rollout.start())
        assert "goodbye" in reason
        await rollout.check(1, 3)

    async def test_slow_answers_lead_back(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        handle = await rollout.start(bake_s=600, longest_bake_s=600)
        await rollout.until_watched(handle)
        for node in await rollout.serving():
            await add_requests(rollout.fleet, node, 30, ttft_ms=100 if node.revision == 1 else 900)
        await handle.signal(names.LOOK_AGAIN)
        assert "first token takes 900 ms, with the old revision 100 ms" in await failure_of(handle)
        await rollout.check(1, 1)

    @pytest.mark.chaos
    async def test_failed_tries_that_no_client_saw_lead_back(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        handle = await rollout.start(bake_s=600, longest_bake_s=600)
        await rollout.until_watched(handle)
        old, new = sorted(await rollout.serving(), key=lambda node: node.revision)
        await add_requests(rollout.fleet, old, 30, ttft_ms=100, failed_on=new)
        await handle.signal(names.LOOK_AGAIN)
        assert "100.0% of the new revision's requests failed" in await failure_of(handle)
        await rollout.check(1, 1)

    @pytest.mark.chaos
    async def test_nodes_that_do_not_come_up_lead_back(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        rollout.fleet.cloud.capacity = 1
        assert "did not come up" in await failure_of(await rollout.start(max_failed_nodes=1))
        await rollout.check(1, 1)


STEPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "begun": lambda row: row["rollout_revision"] == 2,
    "half": lambda row: row["traffic_bp"] == 5000,
    "whole": lambda row: row["traffic_bp"] == 10_000,
    "committed": lambda row: row["revision"] == 2,
}


class TestBack:
    @pytest.mark.chaos
    @pytest.mark.parametrize("step", STEPS)
    async def test_an_abort_leads_back_from_every_step(self, rollout: RolloutUnderTest, step: str) -> None:
        """F8, T7."""
        await rollout.prepare(2)
        async with watching(rollout):
            handle = await rollout.start()
            await rollout.until(step, STEPS[step])
            await handle.signal(names.ABORT, "we do not want it")
            result = await handle.result()
        assert (result["state"], result["serving"], result["reason"]) == ("returned", 1, "we do not want it")
        await rollout.check(1, 2)

    @pytest.mark.chaos
    async def test_a_cancellation_leads_back_and_ends_as_cancelled(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        handle = await rollout.start(hold_at_bp=5000)
        await rollout.until("half", STEPS["half"])
        await handle.cancel()
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
        assert "cancelled" in str(caught.value.cause).lower()
        await rollout.check(1, 1)

    @pytest.mark.chaos
    async def test_a_terminated_one_is_taken_back_by_the_worker(self, rollout: RolloutUnderTest) -> None:
        """F1 after somebody pressed Terminate."""
        await rollout.prepare(1)
        handle = await rollout.start(hold_at_bp=5000)
        await rollout.until("half", STEPS["half"])
        await handle.terminate()
        fleet = rollout.fleet
        await Entities(fleet.client, fleet.task_queue).keep_rollouts(
            (await CatalogStore(fleet.pool).load()).deployments.values()
        )
        orphan = fleet.client.get_workflow_handle(names.rollout_workflow_id(DEPLOYMENT, 2))
        assert (await orphan.result())["state"] == "returned"
        # Two served when it was taken over; the deployment's own workflow decides how many of them are needed.
        await rollout.check(1, 2)


class TestFence:
    async def test_one_rollout_at_a_time(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        first = await rollout.start(hold_at_bp=5000)
        await rollout.until("half", STEPS["half"])
        assert "is rolling out revision 2" in await failure_of(await rollout.start())
        await first.signal(names.ABORT)
        await first.result()

    async def test_refuses_what_cannot_be_carried_out(self, rollout: RolloutUnderTest) -> None:
        await rollout.prepare(1)
        assert "serves revision 1 already" in await failure_of(await rollout.start(1))
        assert "has no revision 9" in await failure_of(await rollout.start(9))
        assert "steps_bp" in await failure_of(await rollout.start(steps_bp=[5000]))

    async def test_a_late_write_changes_nothing(self, rollout: RolloutUnderTest) -> None:
        """Fault c: an attempt that was stopped, and goes on after the traffic was taken away."""
        await rollout.prepare(1)
        store = rollout.revisions
        claim = await store.claim(DEPLOYMENT, 2, "w")
        assert await store.shift(DEPLOYMENT, 2, "w", claim.step + 2, 0, 1)
        assert not await store.shift(DEPLOYMENT, 2, "w", claim.step + 1, 5000, 1)
        assert not await store.shift(DEPLOYMENT, 2, "another", claim.step + 3, 5000, 1)
        assert (await store.claim(DEPLOYMENT, 2, "w")).traffic_bp == 0


class TestKilledWorker:
    @pytest.mark.chaos
    async def test_goes_on_with_another(self, idle_fleet: FleetUnderTest) -> None:
        """T5: workers come and go while it is under way, in every step that they happen to be in."""
        rollout = RolloutUnderTest(idle_fleet)

        def worker() -> Any:
            return fleet_worker.make_worker(idle_fleet.client, idle_fleet.task_queue, idle_fleet.fleet.activities)

        async with running(worker()):
            await rollout.prepare(2)
            handle = await rollout.start()
        async with watching(rollout):
            for _ in range(4):
                async with running(worker()):
                    await asyncio.sleep(1.5)
            async with running(worker()):
                assert (await handle.result())["state"] == "completed"
                await rollout.check(2, 2)


async def add_requests(
    fleet: FleetUnderTest, node: Node, count: int, *, ttft_ms: int, failed_on: Node | None = None
) -> None:
    """Usage records as API processes write them, with the node that failed first where there was one."""
    now_ms = int((await fleet.pool.fetchval("SELECT extract(epoch FROM now()) * 1000")) + 1)
    tries: list[list[Any]] = [[failed_on.node_id, "least-load", "only", 1, 0, [], "error"]] if failed_on else []
    tries.append([node.node_id, "least-load", "only", 1, 0, [], ""])
    for number in range(count):
        request_id = uuid7(now_ms, number + node.revision * 1000)
        await fleet.pool.execute(
            """
            INSERT INTO usage_records (id, admitted_at, org_id, environment_id, key_id, home_region, served_region,
                model, node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens, cached_tokens,
                token_source, latency_ms, ttft_ms, status, outcome, list_price_microdollars, tries)
            VALUES ($1, now(), $1, $1, $1, 'in-mumbai', 'in-mumbai', 'llama-3-8b', $2, 'chat', true, 10, 10, 0,
                'engine', $3 + 100, $3, 200, 'completed', 1, $4)
            """,
            request_id, node.id, ttft_ms, len(tries),
        )  # fmt: skip
        await fleet.pool.execute(
            "INSERT INTO request_decisions VALUES ($1, $2::text::jsonb)", request_id, json.dumps([tries, [], [], False])
        )
