"""What a deployment's workflow asks and orders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from temporalio import activity

from activities.nodes import NodeActivities
from crosslogic.contracts.deployment import DeploymentPlan, DeploymentSurvey, PlanRequest, ReplicaDrain, ReplicaOrder
from crosslogic.contracts.node import NodeOrder, NodeProvisioningInput, NodeSpec
from crosslogic.domain.autoscaling import (
    DEFAULT_RULES,
    Demand,
    RegionMemory,
    RegionPlan,
    ScalingRules,
    Sight,
    decide,
    spending,
)
from crosslogic.domain.catalog import Catalog
from crosslogic.domain.deployment import LONGEST_PAUSE_S, RegionTarget, Replica
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.ids import NODE
from crosslogic.domain.lead_time import LeadTimes
from crosslogic.domain.node import FINAL_STATES

if TYPE_CHECKING:
    from crosslogic.hot.demand import DemandBoard
    from crosslogic.hot.heartbeats import HeartbeatBoard
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.lead_times import LeadTimeStore
    from crosslogic.store.nodes import NodeStore
    from crosslogic.store.scaling import ScalingStore

log = logging.getLogger(__name__)

# Ends older than this say nothing about a region any more.
RECENT_S = 4 * LONGEST_PAUSE_S
# Lead times change slowly: they are read again after so long.
LEAD_TIMES_S = 60.0
# An engine's own word that is older than this is none.
HEARTBEAT_FRESH_S = 30.0


class DeploymentActivities:
    """Decides for deployments and writes down the nodes that they order."""

    def __init__(
        self,
        nodes: NodeStore,
        catalog: CatalogStore,
        writer: NodeActivities,
        *,
        decisions: ScalingStore,
        lead_times: LeadTimeStore,
        demand: DemandBoard,
        heartbeats: HeartbeatBoard,
        rules: ScalingRules = DEFAULT_RULES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._nodes = nodes
        self._catalog = catalog
        self._writer = writer
        self._decisions = decisions
        self._lead_times = lead_times
        self._demand = demand
        self._heartbeats = heartbeats
        self._rules = rules
        self._now = now
        self._learnt = LeadTimes()
        self._learnt_until = 0.0

    @activity.defn
    async def plan_deployment(self, request: PlanRequest) -> DeploymentPlan:
        """Look at the deployment and decide what to do in each of its regions; the decisions are kept."""
        catalog = await self._catalog.load()
        survey = await self._survey(request.deployment, catalog)
        if not survey.exists:
            return DeploymentPlan(exists=False)
        learnt = await self._lead_times_now()
        demand = await self._demand_now()
        memories = {memory.region: memory for memory in request.memories}
        cap = survey.settings.spend_cap_microdollars_per_h
        spent = spending(survey.replicas)
        plans: list[RegionPlan] = []
        kept: list[RegionMemory] = []
        for target in _targets(survey):
            replicas = [replica for replica in survey.replicas if replica.region == target.region]
            place = (survey.model, target.region)
            sight = Sight(
                now=self._now(),
                replicas=replicas,
                demand=None if demand is None else demand.get(place, Demand()),
                reserved_tokens_per_s=catalog.reserved_units.get(place, 0) if target.replicas_max else 0,
                lead_time_s=learnt.eta(cloud="", gpu=_gpu(replicas), model=survey.model).p50_s,
                spend_left_microdollars_per_h=None if cap is None else cap - spent,
                is_rolling=survey.is_rolling,
            )
            plan, memory = decide(target, survey.settings, sight, memories.get(target.region), self._rules)
            dearest = max((replica.price_microdollars_per_h for replica in replicas), default=0)
            spent += dearest * len(plan.orders)
            plans.append(plan)
            kept.append(memory)
            await self._decisions.record(request.deployment, plan)
        return DeploymentPlan(True, survey.model, plans, kept)

    @activity.defn
    async def order_replica(self, order: ReplicaOrder) -> NodeSpec:
        """Write the new node's row, so that the next survey counts it before its workflow runs."""
        wanted = NodeProvisioningInput(order.model, order.region, order.deployment, gpu=order.gpu, spot=order.spot)
        node = NodeOrder(wanted, order.node_id, order.workflow_id, False, order.revision, order.is_held)
        spec = await self._writer.resolve_node_spec(node)
        await self._writer.intend_node(spec)
        return spec

    @activity.defn
    async def find_responsible(self, node_id: str) -> ReplicaDrain:
        """Who is to be told that a node is to drain; nobody (an empty id) once it drains or has ended."""
        node = await self._nodes.find(NODE.parse(node_id))
        if node is None or node.is_tombstoned or node.state in FINAL_STATES or node.state == "draining":
            return ReplicaDrain(node_id)
        return ReplicaDrain(node_id, node.workflow_id)

    async def _survey(self, name: str, catalog: Catalog) -> DeploymentSurvey:
        """The deployment's targets and nodes, as Postgres has them now, with what the nodes' engines say."""
        deployment = catalog.deployments.get(name)
        if deployment is None:
            return DeploymentSurvey(exists=False)
        replicas = await self._nodes.list_replicas(name, RECENT_S)
        return DeploymentSurvey(
            exists=True,
            model=deployment.model,
            targets=list(deployment.regions),
            replicas=await self._heard(replicas),
            settings=deployment.scaling,
            is_rolling=deployment.rollout_revision is not None,
        )

    async def _heard(self, replicas: list[Replica]) -> list[Replica]:
        alive = [replica.node_id for replica in replicas if replica.state not in FINAL_STATES]
        try:
            beats = await self._heartbeats.read_many(alive)
        except Unavailable as error:
            log.warning("engines cannot be heard: %s", error.message)
            return replicas
        since = self._now() - HEARTBEAT_FRESH_S
        fresh = {node_id: beat for node_id, beat in beats.items() if beat.received_at >= since}
        return [
            replace(replica, running=beat.running, waiting=beat.waiting, kv_cache_used=beat.kv_cache_used)
            if (beat := fresh.get(replica.node_id)) is not None
            else replica
            for replica in replicas
        ]

    async def _demand_now(self) -> Mapping[tuple[str, str], Demand] | None:
        try:
            return await self._demand.read()
        except Unavailable as error:
            log.warning("demand cannot be seen: %s", error.message)
            return None

    async def _lead_times_now(self) -> LeadTimes:
        now = self._now()
        if now >= self._learnt_until:
            self._learnt = await self._lead_times.load()
            self._learnt_until = now + LEAD_TIMES_S
            await self._lead_times.prune()
        return self._learnt


def _targets(survey: DeploymentSurvey) -> list[RegionTarget]:
    """The regions that are promised, and those that have nodes still although they are promised none any more."""
    promised = {target.region for target in survey.targets}
    alive = {replica.region for replica in survey.replicas if replica.state not in FINAL_STATES}
    return [*survey.targets, *(RegionTarget(region, 0, 0) for region in sorted(alive - promised))]


def _gpu(replicas: list[Replica]) -> str:
    return next((replica.gpu for replica in replicas if replica.gpu), "")
