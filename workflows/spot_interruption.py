"""What follows when a cloud takes a machine: it is remembered, then replaced, exactly once (F9).

Steps of `NodeLifecycle`, which drains the node, and no workflow of their own: docs/decisions/0018.
"""

from __future__ import annotations

from temporalio import workflow
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ParentClosePolicy

from activities.interruptions import InterruptionActivities
from crosslogic.contracts.names import NODE_PROVISIONING, provisioning_workflow_id
from crosslogic.contracts.node import (
    JOINED,
    NodeInterruption,
    NodeProvisioningInput,
    NodeProvisioningResult,
    NodeSpec,
)
from crosslogic.domain.ids import NODE
from crosslogic.domain.spot import successor_of
from workflows.steps import QUICK


async def remember(spec: NodeSpec, *, had_notice: bool) -> None:
    """Write the interruption down. Before the replacement is placed, which must know of it."""
    if spec.spot:
        await workflow.execute_activity_method(
            InterruptionActivities.remember_interruption,
            NodeInterruption(spec, had_notice),
            **QUICK,
            summary="Remember that the cloud took this machine",
        )


async def replace(spec: NodeSpec) -> str:
    """Order the node's successor, if that is ours to do; its id, or nothing.

    A deployment orders what it lacks by itself: two who order are two nodes. Without a cloud there is none to order.
    The id derives from the node's, so that a second order finds the first.
    """
    if spec.deployment or spec.provider == JOINED:
        return ""
    successor = NODE.show(successor_of(NODE.parse(spec.node_id)))
    try:
        await workflow.start_child_workflow(
            NODE_PROVISIONING,
            NodeProvisioningInput(
                model=spec.model,
                region=spec.region,
                provider=spec.provider,
                gpu=spec.gpu,
                spot=spec.spot,
                node_id=successor,
                drain_timeout_s=spec.drain_timeout_s,
            ),
            id=provisioning_workflow_id(successor),
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            parent_close_policy=ParentClosePolicy.ABANDON,
            result_type=NodeProvisioningResult,
            static_summary=f"{spec.model} in {spec.region}, in place of {spec.node_id}",
        )
    except WorkflowAlreadyStartedError:
        workflow.logger.info("the successor of %s is on its way already", spec.node_id)
    return successor
