"""Entity, one per deployment: keeps its promise of replicas in each region."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.workflow import ParentClosePolicy

from activities.deployments import DeploymentActivities
from crosslogic.contracts.deployment import DeploymentScalingInput, DeploymentSurvey, ReplicaOrder
from crosslogic.contracts.names import DEPLOYMENT_SCALING, LOOK_AGAIN, provisioning_workflow_id
from crosslogic.contracts.node import NodeProvisioningInput
from crosslogic.domain.deployment import RegionPlan, RegionTarget, plan_region
from crosslogic.domain.ids import NODE
from workflows.node_provisioning import NodeProvisioning
from workflows.steps import QUICK, check_cancelled, explain, is_cancel_requested, is_history_long, make_findable

# Nodes ordered for one region between two surveys: a large deployment grows in batches, and a survey comes in between.
BATCH = 20
# After an order that was refused: what is wrong is mended by people.
REFUSED_PAUSE_S = 60.0


@workflow.defn(name=DEPLOYMENT_SCALING)
class DeploymentScaling:
    """Keep a deployment's replicas: survey its nodes, order what is missing, wait for a nudge.

    The worker keeps one running for each deployment, under the id `deployment/<name>`:

    ```json
    {"deployment": "llama-7b"}
    ```
    """

    def __init__(self) -> None:
        self._is_nudged = False

    @workflow.signal(name=LOOK_AGAIN)
    def look_again(self) -> None:
        """Something may have changed: survey now."""
        self._is_nudged = True

    @workflow.run
    async def run(self, input: DeploymentScalingInput) -> str:
        """Run until the deployment is removed."""
        make_findable(deployment=input.deployment)
        while True:
            check_cancelled()
            if is_history_long():
                # The next run surveys first, so that no nudge is lost.
                workflow.continue_as_new(input)
            self._is_nudged = False
            survey = await workflow.execute_activity_method(
                DeploymentActivities.survey_deployment,
                input.deployment,
                **QUICK,
                summary="Read targets and replicas",
            )
            if not survey.exists:
                return f"there is no deployment {input.deployment!r} any more"
            plans = [await self._keep(input.deployment, survey, target) for target in survey.targets]
            pause_s = min((plan.look_again_s for plan in plans), default=30.0)
            self._explain(input.deployment, survey, plans, pause_s)
            try:
                await workflow.wait_condition(
                    lambda: self._is_nudged or is_cancel_requested(),
                    timeout=timedelta(seconds=max(0.5, pause_s)),
                    timeout_summary="Survey again even without a nudge",
                )
            except TimeoutError:
                continue

    async def _keep(self, deployment: str, survey: DeploymentSurvey, target: RegionTarget) -> RegionPlan:
        """Order what the region lacks; what was decided there."""
        plan = plan_region(target, [replica for replica in survey.replicas if replica.region == target.region])
        for ordered in range(min(plan.missing, BATCH)):
            try:
                await self._order(deployment, survey.model, target.region)
            except ActivityError as error:
                reason = f"{plan.reason}; {ordered} ordered, then refused: {explain(error)}"
                return RegionPlan(target.region, 0, REFUSED_PAUSE_S, reason)
        if plan.missing > BATCH:
            return RegionPlan(target.region, plan.missing, 1.0, f"{plan.reason}, {BATCH} at a time")
        return plan

    async def _order(self, deployment: str, model: str, region: str) -> None:
        node_id = NODE.show(workflow.uuid7())
        workflow_id = provisioning_workflow_id(node_id)
        await workflow.execute_activity_method(
            DeploymentActivities.order_replica,
            ReplicaOrder(deployment, model, region, node_id, workflow_id),
            **QUICK,
            summary=f"Write down a new replica in {region}",
        )
        await workflow.start_child_workflow(
            NodeProvisioning.run,
            NodeProvisioningInput(model=model, region=region, deployment=deployment, node_id=node_id),
            id=workflow_id,
            parent_close_policy=ParentClosePolicy.ABANDON,
            static_summary=f"{model} in {region} for {deployment}",
        )

    def _explain(self, name: str, survey: DeploymentSurvey, plans: list[RegionPlan], pause_s: float) -> None:
        lines = "\n".join(f"- {plan.region}: {plan.reason}" for plan in plans) or "- it promises no region"
        workflow.set_current_details(
            f"**Deployment `{name}` of {survey.model}**\n\n{lines}\n\n"
            f"Read at {workflow.now():%H:%M:%S} UTC; again in {pause_s:.0f} s or when nudged."
        )
