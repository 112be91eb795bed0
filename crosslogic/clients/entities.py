"""Keeps the fleet's entity workflows running: one per region, deployment and node, started by contract name."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError, RPCStatusCode

from crosslogic.contracts import names
from crosslogic.contracts.deployment import DeploymentScalingInput
from crosslogic.contracts.node import FleetHealthInput, NodeLifecycleInput, NodeSpec
from crosslogic.contracts.rollout import DeploymentRolloutInput
from crosslogic.domain.catalog import Deployment
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.node import ON_THE_WAY, Node, NodeState

log = logging.getLogger(__name__)

# A row may be ahead of its workflow for a moment: a replica's is written before its provisioning is started, and an
# admitted node's before its lifecycle is. What is older has lost its workflow.
GRACE_S = 60.0
RPC_TIMEOUT = timedelta(seconds=5)
# More nodes than these are looked up in Temporal's list, which lags, instead of one by one.
ASKED_BY_NAME = 100
PAGE = 1_000  # Workflows read at once.


@dataclass
class Kept:
    """What one round had to start; empty when all was well."""

    adopted: list[str] = field(default_factory=list[str])
    orphaned: list[str] = field(default_factory=list[str])


class Entities:
    """Starts what should run and does not. Running it again and again, from any number of workers, is harmless."""

    def __init__(self, client: Client, task_queue: str, grace_s: float = GRACE_S) -> None:
        self._client = client
        self._task_queue = task_queue
        self._grace_s = grace_s

    async def keep_standing(self, regions: Collection[str], deployments: Collection[str]) -> None:
        """See to it that every region's watch and every deployment's keeper runs. Raises Unavailable."""
        for region in regions:
            await self._start(
                names.FLEET_HEALTH,
                FleetHealthInput(region),
                names.fleet_health_workflow_id(region),
                f"Watching the nodes of {region}",
            )
        for deployment in deployments:
            await self._start(
                names.DEPLOYMENT_SCALING,
                DeploymentScalingInput(deployment),
                names.deployment_workflow_id(deployment),
                f"Keeping the replicas of {deployment}",
            )

    async def keep_rollouts(self, deployments: Iterable[Deployment]) -> None:
        """See to it that a roll-out whose workflow is gone (somebody terminated it) returns. Raises Unavailable."""
        for deployment in deployments:
            holder, revision = deployment.rollout_workflow_id, deployment.rollout_revision
            # The workflow lets go of its deployment before it ends.
            if holder is None or revision is None or await self._runs(holder):
                continue
            log.warning("the roll-out of %s has lost its workflow %s", deployment.name, holder)
            await self._start(
                names.DEPLOYMENT_ROLLOUT,
                DeploymentRolloutInput(deployment.name, revision, orphan_of=holder),
                names.rollout_workflow_id(deployment.name, revision),
                f"Taking back revision {revision} of {deployment.name}",
            )

    async def keep_nodes(
        self,
        nodes: Collection[Node],
        read_again: Callable[[UUID], Awaitable[Node | None]],
        spec_of: Callable[[Node], NodeSpec],
        hand_over: Callable[[UUID, str], Awaitable[None]],
    ) -> Kept:
        """See to it that every node that has not ended has a workflow that answers for it.

        A serving node without one (somebody terminated it) gets its lifecycle back. One on its way whose provisioning
        is gone is undone by a lifecycle, so that it does not count as a replica for ever. Either is `hand_over`'s from
        then on: who drains the node signals whom its row names. Raises Unavailable when Temporal does not answer.
        """
        kept = Kept()
        running = await self._list_running() if len(nodes) > ASKED_BY_NAME else frozenset[str]()
        oldest = datetime.now(UTC) - timedelta(seconds=self._grace_s)
        for node in nodes:
            if node.changed_at > oldest or node.workflow_id in running or await self._runs(node.workflow_id):
                continue
            # Its workflow may have ended properly since the row was read, or have handed it over.
            current = await read_again(node.id)
            if current is None or current != node:
                continue
            is_orphan = node.state in ON_THE_WAY
            (kept.orphaned if is_orphan else kept.adopted).append(node.node_id)
            log.warning("node %s (%s) has lost its workflow %s", node.node_id, node.state, node.workflow_id)
            workflow_id = names.node_workflow_id(node.node_id)
            await self._start(
                names.NODE_LIFECYCLE,
                NodeLifecycleInput(
                    spec_of(node),
                    is_draining=node.state is NodeState.DRAINING,
                    drain_reason=f"{node.workflow_id} is gone" if is_orphan else node.reason,
                    is_orphan=is_orphan,
                ),
                workflow_id,
                f"{node.model} in {node.region}, taken over",
            )
            await hand_over(node.id, workflow_id)
        return kept

    async def _list_running(self) -> frozenset[str]:
        """The workflows of nodes that run, as Temporal's list has them: one question instead of one for each node.

        The list lags: what it lacks is asked for by name, and what it has too much is missed until the next round.
        """
        types = f"('{names.NODE_LIFECYCLE}', '{names.NODE_PROVISIONING}')"
        query = f"WorkflowType IN {types} AND TaskQueue = '{self._task_queue}' AND ExecutionStatus = 'Running'"
        try:
            found = self._client.list_workflows(query, page_size=PAGE, rpc_timeout=RPC_TIMEOUT)
            return frozenset([workflow.id async for workflow in found])
        except RPCError as error:
            raise Unavailable(f"Temporal does not answer ({error.message}).") from error

    async def _runs(self, workflow_id: str) -> bool:
        try:
            described = await self._client.get_workflow_handle(workflow_id).describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise Unavailable(f"Temporal does not answer ({error.message}).") from error
        return described.status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)

    async def _start(self, workflow: str, argument: Any, workflow_id: str, summary: str) -> None:
        try:
            await self._client.start_workflow(
                workflow,
                argument,
                id=workflow_id,
                task_queue=self._task_queue,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=summary,
                rpc_timeout=RPC_TIMEOUT,
            )
        except RPCError as error:
            raise Unavailable(f"Temporal does not answer ({error.message}).") from error
