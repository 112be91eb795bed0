"""Saga: order a node, wait until it serves, hand it over; or undo all of it."""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError, WorkflowAlreadyStartedError
from temporalio.workflow import ParentClosePolicy

from activities.cloud import CloudActivities
from activities.nodes import NodeActivities
from activities.probes import ProbeActivities
from crosslogic.contracts.names import DRAIN, NODE_PROVISIONING, STATE, node_workflow_id
from crosslogic.contracts.node import (
    NodeAdmission,
    NodeChange,
    NodeEnding,
    NodeLifecycleInput,
    NodeOrder,
    NodeProvisioningInput,
    NodeProvisioningResult,
    NodeSpec,
)
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeState
from workflows.node_lifecycle import NodeLifecycle
from workflows.steps import (
    QUICK,
    Story,
    endless,
    explain,
    is_cancel_requested,
    lasting,
    make_findable,
    nudge_deployment,
    outcome,
    refusal,
    unstoppable,
)


@workflow.defn(name=NODE_PROVISIONING)
class NodeProvisioning:
    """Start a node: order its machine, wait for its engine, admit it to routing, and hand it to its lifecycle.

    Send one JSON object; only `model` and `region` are needed:

    ```json
    {"model": "llama-7b", "region": "in-mumbai", "spot": true}
    ```

    Send the signal `drain` (with a reason, if you like) to stop it at any moment: before the node serves, everything is
    undone and the workflow completes as `terminated`; after that the node drains. Cancelling does the same and ends as
    cancelled. If a step fails, everything is undone and the workflow fails with the reason.
    """

    def __init__(self) -> None:
        self._state = NodeState.REQUESTED
        self._stop_reason: str | None = None
        self._is_cancelled = False
        self._is_admitting = False
        self._doing = "reading the order"
        self._launch: asyncio.Future[None] | None = None
        self._story = Story("Starting a node")

    @workflow.signal(name=DRAIN)
    def drain(self, reason: Any = "") -> None:
        """Stop: undo what there is, or drain the node when it serves already. `reason` is a text or left out."""
        # Not typed as text: a payload of another type would make the SDK drop the signal, and with it the drain.
        self._stop_reason = self._stop_reason or reason or "drained by an operator"

    @workflow.query(name=STATE)
    def state(self) -> str:
        """The node's state as this workflow knows it."""
        return self._state

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._stop_reason = self._stop_reason or "the workflow was cancelled"

    @workflow.run
    async def run(self, order: NodeProvisioningInput) -> NodeProvisioningResult:
        """Bring one node up. Raises ApplicationError when it cannot be; then nothing of it is left."""
        node_id = order.node_id or NODE.show(workflow.uuid7())
        try:
            spec = await unstoppable(self._resolve(order, node_id), self._cancel)
        except ActivityError as error:
            # Nothing was written yet, or the id is another workflow's: there is nothing that we may undo.
            raise refusal(f"No node was started: {explain(error)}", "BadOrder") from error
        work = asyncio.create_task(self._bring_up(spec, order))
        try:
            await workflow.wait_condition(lambda: work.done() or self._stop_reason is not None)
        except asyncio.CancelledError:
            self._cancel()
        if is_cancel_requested():
            self._cancel()
        if not work.done() and not self._is_admitting:
            work.cancel()
        failure = await unstoppable(outcome(work), self._cancel)
        if isinstance(failure, ActivityError) and _is_not_ours(failure):
            raise refusal(f"No node was started: {explain(failure)}", "BadOrder") from failure
        if self._state is NodeState.READY:
            result = await unstoppable(self._finish(spec), self._cancel)
        else:
            result = await unstoppable(self._undo(spec, failure), self._cancel)
        if self._is_cancelled:
            raise asyncio.CancelledError(result.reason)
        if result.state == NodeState.FAILED:
            raise refusal(
                f"Node {spec.node_id} ({spec.model} in {spec.region}) failed while {self._doing}: {result.reason} "
                "Everything was undone; nothing of it is left.",
                "ProvisioningFailed",
            ) from failure
        return result

    async def _resolve(self, order: NodeProvisioningInput, node_id: str) -> NodeSpec:
        self._tell("reading the order")
        spec = await workflow.execute_activity_method(
            NodeActivities.resolve_node_spec,
            NodeOrder(order, node_id, workflow.info().workflow_id),
            **QUICK,
            summary="Resolve names and defaults",
        )
        self._story = Story(f"Starting node `{spec.node_id}`: {spec.model} in {spec.region}")
        make_findable(region=spec.region, model=spec.model, deployment=spec.deployment, node=spec.node_id)
        return spec

    async def _bring_up(self, spec: NodeSpec, order: NodeProvisioningInput) -> None:
        """Each step's undo is in `_undo`, which relies on the tombstone and on names that derive from the node's id."""
        self._begin("writing down that the node is wanted")
        forecast = await workflow.execute_activity_method(
            NodeActivities.intend_node, spec, **QUICK, summary="Write the intent before any cloud is called"
        )
        if forecast:
            self._story.tell(f"such a node {forecast}")

        self._begin(f"ordering the machine {spec.cluster} from {spec.provider}", NodeState.LAUNCHING)
        # Never abandoned in flight: its effect could come after the undo.
        launch = self._launch = asyncio.ensure_future(
            workflow.execute_activity_method(
                CloudActivities.launch_machine,
                spec,
                **lasting(order.launch_timeout_s),
                summary=f"Order a machine from {spec.provider}",
            )
        )
        await asyncio.shield(launch)

        self._begin(f"waiting for the machine to run (up to {order.launch_timeout_s} s)")
        await workflow.execute_activity_method(
            CloudActivities.await_machine, spec, **lasting(order.launch_timeout_s), summary="Wait for the machine"
        )

        self._begin(f"waiting for the engine to answer (up to {order.boot_timeout_s} s)", NodeState.BOOTING)
        await workflow.execute_activity_method(
            ProbeActivities.await_engine, spec, **lasting(order.boot_timeout_s), summary="Wait for the engine"
        )

        self._begin(f"waiting for a first generation (up to {order.load_timeout_s} s)", NodeState.LOADING)
        capacity = await workflow.execute_activity_method(
            ProbeActivities.warm_engine, spec, **lasting(order.load_timeout_s), summary="Generate and measure"
        )

        # From here on nothing interrupts: the node may be serving, so it can only be drained.
        self._begin(f"admitting the node to routing at {capacity} tokens/s")
        self._is_admitting = True
        await workflow.execute_activity_method(
            NodeActivities.admit_node,
            NodeAdmission(spec, capacity),
            **QUICK,
            summary="Admit the node to routing",
        )
        self._state = NodeState.READY
        make_findable(state=NodeState.READY)
        self._tell("handing the node over to its lifecycle")

    async def _finish(self, spec: NodeSpec) -> NodeProvisioningResult:
        workflow_id = node_workflow_id(spec.node_id)
        try:
            await workflow.start_child_workflow(
                NodeLifecycle.run,
                NodeLifecycleInput(spec),
                id=workflow_id,
                parent_close_policy=ParentClosePolicy.ABANDON,
                static_summary=f"{spec.model} in {spec.region}",
            )
        except WorkflowAlreadyStartedError:
            # A node has one lifecycle (F5), whoever started it.
            workflow.logger.info("%s runs already", workflow_id)
        # Until now a drain came to this workflow, from now on it goes there.
        await workflow.execute_activity_method(
            NodeActivities.hand_over_node, spec, **QUICK, summary="Make the lifecycle responsible"
        )
        if self._stop_reason is not None:
            try:
                await workflow.get_external_workflow_handle(workflow_id).signal(DRAIN, self._stop_reason)
            except FailureError:
                workflow.logger.info("%s has ended already", workflow_id)
        self._tell(f"the node serves; `{workflow_id}` takes care of it from now on")
        return _result(spec, NodeState.READY, "it serves")

    async def _undo(self, spec: NodeSpec, failure: BaseException | None) -> NodeProvisioningResult:
        """Undo every step, in this order: forbid, let the launch settle, end, confirm, write down."""
        if self._stop_reason is None:
            state, reason = NodeState.FAILED, explain(failure) if failure else "it stopped"
        else:
            state, reason = NodeState.TERMINATED, self._stop_reason
        self._story.tell(f"undoing: {reason}")
        await workflow.execute_activity_method(
            NodeActivities.tombstone_node, NodeChange(spec, reason), **QUICK, summary="Tombstone: never launch or admit"
        )
        if self._launch is not None:
            await outcome(self._launch)
            self._story.tell(f"ending the machine and waiting for the cloud to confirm it ({reason})")
            await workflow.execute_activity_method(
                CloudActivities.end_machine, spec, **endless(120), summary="End the machine, confirm it is gone"
            )
        await workflow.execute_activity_method(
            NodeActivities.end_node, NodeEnding(spec, state, reason), **QUICK, summary="Write down the end"
        )
        self._state = state
        make_findable(state=state)
        self._story.tell(f"{state}; everything was undone: {reason}")
        await nudge_deployment(spec)
        return _result(spec, state, reason)

    def _begin(self, doing: str, state: NodeState | None = None) -> None:
        """Begin a step of `_bring_up`, or end the task if everything is to stop.

        A task that is cancelled in the very moment in which its activity completes is not told so by the SDK.
        """
        if self._stop_reason is not None or is_cancel_requested():
            raise asyncio.CancelledError
        if state is not None:
            self._state = state
            make_findable(state=state)
        self._tell(doing)

    def _tell(self, doing: str) -> None:
        self._doing = doing
        self._story.tell(doing)


def _is_not_ours(failure: ActivityError) -> bool:
    """Was the intent refused because the id is another workflow's, or undone already? Then we touch nothing."""
    return failure.activity_type == "intend_node" and getattr(failure.cause, "type", None) == "node_id_taken"


def _result(spec: NodeSpec, state: NodeState, reason: str) -> NodeProvisioningResult:
    return NodeProvisioningResult(spec.node_id, state, spec.model, spec.region, reason)
