"""Entity, one per deployment: keeps its promise of replicas in each region, as many as its load needs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError
from temporalio.workflow import ParentClosePolicy

from activities.deployments import DeploymentActivities
from crosslogic.contracts.deployment import DeploymentPlan, DeploymentScalingInput, PlanRequest, ReplicaOrder
from crosslogic.contracts.names import DEPLOYMENT_SCALING, DRAIN, LOOK_AGAIN, provisioning_workflow_id
from crosslogic.contracts.node import NodeProvisioningInput
from crosslogic.domain.autoscaling import NodeKind, RegionPlan
from crosslogic.domain.ids import NODE
from workflows.node_provisioning import NodeProvisioning
from workflows.steps import QUICK, check_cancelled, explain, is_cancel_requested, is_history_long, make_findable

# After an order that was refused: what is wrong is mended by people.
REFUSED_PAUSE_S = 60.0
# After a drain that reached nobody: nodes are handed over within a moment.
MISSED_PAUSE_S = 1.0


@workflow.defn(name=DEPLOYMENT_SCALING)
class DeploymentScaling:
    """Keep a deployment's replicas: decide, order what is missing, drain what is too much, wait for a nudge.

    The worker keeps one running for each deployment, under the id `deployment/<name>`:

    ```json
    {"deployment": "llama-7b"}
    ```
    """

    def __init__(self) -> None:
        self._is_nudged = False
        self._missed: set[str] = set()

    @workflow.signal(name=LOOK_AGAIN)
    def look_again(self) -> None:
        """Something may have changed: decide anew now."""
        self._is_nudged = True

    @workflow.run
    async def run(self, input: DeploymentScalingInput) -> str:
        """Run until the deployment is removed."""
        make_findable(deployment=input.deployment)
        while True:
            check_cancelled()
            if is_history_long():
                # The next run looks first, so that no nudge is lost.
                workflow.continue_as_new(input)
            self._is_nudged = False
            # The policy runs in the activity: it may change while workflows run, and histories replay all the same.
            plan = await workflow.execute_activity_method(
                DeploymentActivities.plan_deployment,
                PlanRequest(input.deployment, input.memories),
                **QUICK,
                summary="Look at load and replicas, and decide",
            )
            if not plan.exists:
                return f"there is no deployment {input.deployment!r} any more"
            self._missed.clear()
            plans = [await self._apply(input.deployment, plan.model, region) for region in plan.plans]
            # Whom nobody could tell to drain is not on its way out.
            memories = [memory.forgetting(self._missed) for memory in plan.memories]
            input = replace(input, memories=memories)
            pause_s = min((region.look_again_s for region in plans), default=30.0)
            self._explain(input.deployment, plan, plans, pause_s)
            try:
                await workflow.wait_condition(
                    lambda: self._is_nudged or is_cancel_requested(),
                    timeout=timedelta(seconds=max(0.5, pause_s)),
                    timeout_summary="Decide again even without a nudge",
                )
            except TimeoutError:
                continue

    async def _apply(self, deployment: str, model: str, plan: RegionPlan) -> RegionPlan:
        """Do what was decided for a region; the plan, with what became of it."""
        for ordered, kind in enumerate(plan.orders):
            try:
                await self._order(deployment, model, plan.region, kind)
            except ActivityError as error:
                reason = f"{plan.reason}; {ordered} ordered, then refused: {explain(error)}"
                return replace(plan, look_again_s=REFUSED_PAUSE_S, reason=reason)
        for node_id in plan.drains:
            if not await self._drain(node_id, plan.desired):
                self._missed.add(node_id)
                plan = replace(plan, look_again_s=min(plan.look_again_s, MISSED_PAUSE_S))
        return plan

    async def _order(self, deployment: str, model: str, region: str, kind: NodeKind) -> None:
        node_id = NODE.show(workflow.uuid7())
        workflow_id = provisioning_workflow_id(node_id)
        await workflow.execute_activity_method(
            DeploymentActivities.order_replica,
            ReplicaOrder(deployment, model, region, node_id, workflow_id, kind.gpu, kind.is_spot),
            **QUICK,
            summary=f"Write down a new replica in {region}",
        )
        order = NodeProvisioningInput(
            model=model, region=region, deployment=deployment, gpu=kind.gpu, spot=kind.is_spot, node_id=node_id
        )
        await workflow.start_child_workflow(
            NodeProvisioning.run,
            order,
            id=workflow_id,
            parent_close_policy=ParentClosePolicy.ABANDON,
            static_summary=f"{model} in {region} for {deployment}",
        )

    async def _drain(self, node_id: str, desired: int) -> bool:
        responsible = await workflow.execute_activity_method(
            DeploymentActivities.find_responsible, node_id, **QUICK, summary="Find who is responsible for the node"
        )
        if not responsible.workflow_id:
            return False
        try:
            await workflow.get_external_workflow_handle(responsible.workflow_id).signal(
                DRAIN, f"its deployment wants {desired} replicas"
            )
        except FailureError:
            # It was handed over in this moment, or is gone: the next look sees it.
            workflow.logger.info("nobody to tell at %s", responsible.workflow_id)
            return False
        return True

    def _explain(self, name: str, plan: DeploymentPlan, plans: list[RegionPlan], pause_s: float) -> None:
        lines = "\n".join(f"- {region.region}: {region.reason}" for region in plans) or "- it promises no region"
        workflow.set_current_details(
            f"**Deployment `{name}` of {plan.model}**\n\n{lines}\n\n"
            f"Decided at {workflow.now():%H:%M:%S} UTC; again in {pause_s:.0f} s or when nudged."
        )
