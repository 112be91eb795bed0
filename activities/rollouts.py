"""What a roll-out asks and does: its hold on the deployment, shares of traffic, verification, comparison."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from crosslogic.contracts.rollout import (
    NodeVerdict,
    NodeVerification,
    RevisionComparison,
    RevisionsCompared,
    RolloutEnd,
    RolloutOrder,
    RolloutProgress,
    RolloutScope,
    RolloutStart,
    RolloutSurvey,
    TrafficShift,
)
from crosslogic.domain.catalog import Catalog, Deployment
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import FINAL_STATES, Node, NodeState
from crosslogic.domain.revision import GoldenPrompt, check_golden, is_as_expected
from crosslogic.domain.rollout import RegionFloor, RevisionFigures, RolloutNode

if TYPE_CHECKING:
    from crosslogic.clients.engine import EngineClient
    from crosslogic.hot.routes import RouteBoard
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.nodes import NodeStore
    from crosslogic.store.revisions import RevisionStore

log = logging.getLogger(__name__)

# Golden prompts asked of one node at the same time; an engine that serves nobody yet answers as many.
AT_ONCE = 4
# Longest for one golden answer, in seconds.
ANSWER_TIMEOUT_S = 60.0
# Without golden prompts of anybody's: a node must at least say something.
_ANY_ANSWER = GoldenPrompt("Say hello.", "", max_tokens=8)

LONGEST_S = 30 * 86_400


class RolloutActivities:
    """Effects of roll-outs. Each is idempotent (T4); writes of the traffic are fenced and numbered."""

    def __init__(
        self,
        revisions: RevisionStore,
        nodes: NodeStore,
        catalog: CatalogStore,
        board: RouteBoard,
        engine: EngineClient,
    ) -> None:
        self._revisions = revisions
        self._nodes = nodes
        self._catalog = catalog
        self._board = board
        self._engine = engine

    @activity.defn
    async def begin_rollout(self, order: RolloutOrder) -> RolloutStart:
        """Take hold of the deployment and set the goals. Raises Rejected for an order that cannot be carried out."""
        asked = order.input
        asked.policy.check()
        check_golden(asked.golden)
        for name in ("bake_s", "longest_bake_s", "step_timeout_s", "max_failed_nodes"):
            if not (1 if name == "step_timeout_s" else 0) <= getattr(asked, name) <= LONGEST_S:
                raise Rejected(f"{name} must be a whole number up to {LONGEST_S}.", code="invalid_policy", param=name)
        catalog = await self._catalog.load()
        deployment = catalog.deployments.get(asked.deployment)
        if deployment is not None and not deployment.regions:
            raise Rejected(
                f"Deployment {asked.deployment} promises no region; there is nowhere to roll it out.", code="no_region"
            )
        claim = await self._revisions.claim(
            asked.deployment, asked.revision, order.workflow_id, orphan_of=asked.orphan_of
        )
        deployment = (await self._catalog.load()).deployments[asked.deployment]
        return RolloutStart(
            deployment.model,
            RolloutProgress(
                from_revision=claim.from_revision,
                step=claim.step,
                goals=await self._goals(catalog, deployment),
                traffic_bp=claim.traffic_bp,
                is_committed=claim.is_committed,
            ),
        )

    async def _goals(self, catalog: Catalog, deployment: Deployment) -> list[RegionFloor]:
        """As many nodes as there are now or must be, and as much backed as is backed now."""
        found = [node for node, is_undone in await self._revisions.nodes_of(deployment.name) if not is_undone]
        goals: list[RegionFloor] = []
        for target in deployment.regions:
            here = [node for node in found if node.region == target.region and not node.is_leaving]
            joined = sum(node.is_joined for node in here)
            serving = [node.capacity_tokens_per_s for node in here if node.serves]
            goals.append(
                RegionFloor(
                    region=target.region,
                    replicas=max(
                        target.replicas_min - joined, sum(not node.is_joined and node.serves for node in here)
                    ),
                    replicas_min=target.replicas_min,
                    reserved_tokens_per_s=sum(serving) - max(serving, default=0),
                )
            )
        if not any(goal.replicas for goal in goals):
            # Scaled to zero: one node proves the revision before requests wait for it.
            goals[0] = replace(goals[0], replicas=1)
        return goals

    @activity.defn
    async def survey_rollout(self, scope: RolloutScope) -> RolloutSurvey:
        """The deployment's nodes and floors as they are now."""
        catalog = await self._catalog.load()
        deployment = catalog.deployments.get(scope.deployment)
        if deployment is None:
            raise Rejected(f"There is no deployment {scope.deployment} any more.", code="deployment_not_found")
        others = await self._revisions.backed_by_others(deployment.model, deployment.name)
        targets = {target.region: target for target in deployment.regions}
        floors: list[RegionFloor] = []
        for goal in scope.goals:
            target = targets.get(goal.region)
            reserved = catalog.reserved_units.get((deployment.model, goal.region), 0) - others.get(goal.region, 0)
            floors.append(
                replace(
                    goal,
                    # What was never there cannot be kept: the deployment's own workflow sees to that.
                    replicas_min=min(target.replicas_min if target else 0, goal.replicas_min),
                    reserved_tokens_per_s=max(0, min(reserved, goal.reserved_tokens_per_s)),
                )
            )
        waited = [NODE.parse(node_id) for node_id in scope.ordered]
        nodes: list[RolloutNode] = []
        came_up: list[str] = []
        failed: list[str] = []
        for node, is_undone in await self._revisions.nodes_of(scope.deployment, waited):
            if node.node_id in scope.ordered:
                if node.state is NodeState.READY:
                    came_up.append(node.node_id)
                elif is_undone or node.state in FINAL_STATES:
                    failed.append(node.node_id)
            if node.state not in FINAL_STATES:
                nodes.append(node)
        failure = (await self._nodes.get(NODE.parse(failed[-1]))).reason if failed else ""
        return RolloutSurvey(floors, nodes, came_up, failed, failure)

    @activity.defn
    async def verify_node(self, verification: NodeVerification) -> NodeVerdict:
        """Ask the node its golden prompts, at temperature 0. A node that is gone is not good, and not to blame."""
        node = await self._nodes.get(NODE.parse(verification.node_id))
        catalog = await self._catalog.load()
        golden = [*catalog.spec_of(node.deployment or "", node.revision).golden, *verification.golden]
        gate = asyncio.Semaphore(AT_ONCE)
        kind = catalog.models[node.model].kind

        async def ask(one: GoldenPrompt) -> str:
            async with gate:
                answer = await self._engine.answer(
                    node.node_id, _endpoint(node), node.model, kind, one.prompt, one.max_tokens, ANSWER_TIMEOUT_S
                )
            if not answer.strip():
                return f"no answer to {one.prompt[:80]!r}"
            return "" if is_as_expected(one, answer) else f"{answer[:80]!r} instead of {one.expected[:80]!r}"

        wrong = [words for words in await asyncio.gather(*map(ask, golden or [_ANY_ANSWER])) if words]
        if wrong:
            return NodeVerdict(False, f"{len(wrong)} of {len(golden) or 1} golden prompts failed: {wrong[0]}")
        return NodeVerdict(True, f"{len(golden)} golden prompts passed" if golden else "it answers")

    @activity.defn
    async def release_node(self, node_id: str) -> None:
        """Let requests start on a node that was held."""
        node = await self._nodes.release(NODE.parse(node_id))
        try:
            await self._board.publish(node.route_entry)
        except Unavailable as error:
            # Postgres has it, every API process polls Postgres, and the region's watch mends the board.
            log.warning("the route board missed node %s: %s", node_id, error.message)

    @activity.defn
    async def shift_traffic(self, shift: TrafficShift) -> None:
        """Write the share, which every API process reads within a second, unless a later write has overtaken it."""
        done = await self._revisions.shift(
            shift.deployment, shift.revision, shift.workflow_id, shift.step, shift.traffic_bp, shift.serving
        )
        if not done:
            log.warning("step %d of the roll-out of %s was written already", shift.step, shift.deployment)

    @activity.defn
    async def compare_revisions(self, comparison: RevisionComparison) -> RevisionsCompared:
        """What requests were like on either revision since an instant."""
        since = datetime.fromtimestamp(comparison.since, UTC)
        first = uuid7(int(comparison.since * 1000), 0)
        found = await self._revisions.compare(comparison.deployment, first, since)
        nothing = RevisionFigures()
        return RevisionsCompared(
            found.get(comparison.old_revision, nothing), found.get(comparison.new_revision, nothing)
        )

    @activity.defn
    async def end_rollout(self, end: RolloutEnd) -> None:
        """Let go of the deployment, and write down how it went."""
        result = end.result
        await self._revisions.finish(
            result.deployment,
            result.revision,
            end.workflow_id,
            {"revision": result.revision, "state": result.state, "serving": result.serving, "reason": result.reason},
        )


def _endpoint(node: Node) -> str:
    if node.state is not NodeState.READY or not node.endpoint:
        raise Rejected(f"Node {node.node_id} is {node.state}; it cannot be asked.", code="node_gone")
    return node.endpoint
