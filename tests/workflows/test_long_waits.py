"""Hours of a node's life in a moment, on the time-skipping server; the activities are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import temporalio.api.enums.v1 as enums_api
import temporalio.api.operatorservice.v1 as operator_api
from temporalio import activity
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from crosslogic.clients import temporal
from crosslogic.contracts import names
from crosslogic.contracts.deployment import DeploymentPlan, PlanRequest
from crosslogic.contracts.node import NodeChange, NodeEnding, NodeLifecycleInput, NodeLook, NodeReading, NodeSpec
from crosslogic.dev import binaries
from crosslogic.domain.autoscaling import Need, RegionMemory, RegionPlan
from crosslogic.domain.health import Verdict
from worker import WORKFLOWS

SPEC = NodeSpec("node_a", "llama-3-8b", "in-mumbai")
QUEUE = "long-waits"


class Scripted:
    """Activities by their contract names."""

    def __init__(self) -> None:
        self.looks: list[NodeLook] = []
        self.verdicts: list[Verdict] = []
        self.ends: list[NodeEnding] = []
        # When each look or survey was asked for, in the server's time.
        self.times: list[datetime] = []
        self.requests: list[PlanRequest] = []

    @activity.defn
    async def look_at_node(self, look: NodeLook) -> NodeReading:
        self.looks.append(look)
        self.times.append(activity.info().scheduled_time)
        verdict = self.verdicts.pop(0) if self.verdicts else Verdict.HEALTHY
        return NodeReading(look.spec.node_id, verdict, "scripted", 5.0)

    @activity.defn
    async def begin_drain(self, change: NodeChange) -> None: ...

    @activity.defn
    async def await_drained(self, spec: NodeSpec) -> str:
        return "scripted"

    @activity.defn
    async def tombstone_node(self, change: NodeChange) -> None: ...

    @activity.defn
    async def end_machine(self, spec: NodeSpec) -> None: ...

    @activity.defn
    async def end_node(self, ending: NodeEnding) -> None:
        self.ends.append(ending)

    @activity.defn
    async def plan_deployment(self, request: PlanRequest) -> DeploymentPlan:
        self.times.append(activity.info().scheduled_time)
        self.requests.append(request)
        if len(self.times) > 20:
            return DeploymentPlan(exists=False)
        memory = RegionMemory("in-mumbai", len(self.times), needs=(Need(1.5, 2),), drains=("node_a",))
        plan = RegionPlan("in-mumbai", 1, "1 of 1 replicas present", 30.0, 1, 1)
        return DeploymentPlan(True, "llama-3-8b", [plan], [memory])


@asynccontextmanager
async def skipping(scripted: Scripted) -> AsyncGenerator[WorkflowEnvironment]:
    server = binaries.temporal().with_name("temporal-test-server")
    async with await WorkflowEnvironment.start_time_skipping(
        test_server_existing_path=str(server),
        data_converter=temporal.DATA_CONVERTER,
        interceptors=temporal.interceptors(),
    ) as environment:
        keyword = enums_api.IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
        await environment.client.operator_service.add_search_attributes(
            operator_api.AddSearchAttributesRequest(search_attributes=dict.fromkeys(names.SEARCH_ATTRIBUTES, keyword))
        )
        held: list[Any] = [getattr(scripted, name) for name in dir(scripted) if not name.startswith("_")]
        async with Worker(
            environment.client,
            task_queue=QUEUE,
            workflows=WORKFLOWS,
            activities=[method for method in held if callable(method)],
            workflow_runner=temporal.workflow_runner(),
        ):
            yield environment


class TestLifecycle:
    async def test_looks_again_without_a_nudge(self) -> None:
        """The safety look: every half hour, for a node that no watch sees."""
        scripted = Scripted()
        scripted.verdicts = [Verdict.HEALTHY] * 12 + [Verdict.LOST]
        async with skipping(scripted) as environment:
            result = await environment.client.execute_workflow(
                names.NODE_LIFECYCLE, NodeLifecycleInput(SPEC), id="node/node_a", task_queue=QUEUE
            )
        assert result["state"] == "lost"
        assert timedelta(hours=6) <= scripted.times[-1] - scripted.times[0] < timedelta(hours=6, minutes=1)
        assert [ending.state for ending in scripted.ends] == ["lost"]

    async def test_remembers_how_long_a_suspect_has_been_silent(self) -> None:
        scripted = Scripted()
        scripted.verdicts = [Verdict.SUSPECT] * 3 + [Verdict.HEALTHY, Verdict.SUSPECT, Verdict.BROKEN]
        async with skipping(scripted) as environment:
            result = await environment.client.execute_workflow(
                names.NODE_LIFECYCLE, NodeLifecycleInput(SPEC), id="node/node_a", task_queue=QUEUE
            )
        assert result["state"] == "failed"
        assert [look.failed_polls for look in scripted.looks] == [0, 1, 2, 3, 0, 1]
        silences = [round(look.silent_for_s) for look in scripted.looks]
        assert silences == [0, 5, 10, 15, 0, 5]


class TestScaling:
    async def test_decides_without_a_nudge_and_remembers(self) -> None:
        scripted = Scripted()
        async with skipping(scripted) as environment:
            async with asyncio.timeout(60):
                await environment.client.execute_workflow(
                    names.DEPLOYMENT_SCALING, {"deployment": "d"}, id="deployment/d", task_queue=QUEUE
                )
        assert timedelta(minutes=10) <= scripted.times[-1] - scripted.times[0] < timedelta(minutes=11)
        assert [len(request.memories) for request in scripted.requests[:2]] == [0, 1]
        remembered = RegionMemory("in-mumbai", 20, needs=(Need(1.5, 2),), drains=("node_a",))
        assert scripted.requests[-1].memories == [remembered]
