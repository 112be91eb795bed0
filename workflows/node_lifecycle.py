"""Entity, one per node: watches over it while it serves, and retires it."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.cloud import CloudActivities
from activities.nodes import NodeActivities
from activities.probes import ProbeActivities
from crosslogic.contracts.names import DRAIN, LOOK_AGAIN, NODE_LIFECYCLE, SPOT_NOTICE, STATE, node_workflow_id
from crosslogic.contracts.node import (
    NodeAdmission,
    NodeChange,
    NodeEnding,
    NodeLifecycleInput,
    NodeLifecycleResult,
    NodeLook,
    NodeReading,
    NodeSpec,
)
from crosslogic.domain.health import IN_SERVICE, Verdict
from crosslogic.domain.node import NodeState
from workflows import spot_interruption
from workflows.steps import (
    QUICK,
    Story,
    check_cancelled,
    endless,
    explain,
    is_cancel_requested,
    is_history_long,
    lasting,
    make_findable,
    nudge_deployment,
    outcome,
    refusal,
    unstoppable,
)

# FleetHealth nudges at any change, and again while it lasts; this is for a node that no watch sees. A look is a dozen
# events, so that a thousand nodes at rest write seven a second.
SAFETY_LOOK = timedelta(minutes=30)
# A node that is joined is up already: these are for its first answer and its first generation.
JOIN_TIMEOUT_S = 600.0


@workflow.defn(name=NODE_LIFECYCLE)
class NodeLifecycle:
    """Take care of one node: look at it when something seems wrong, drain it, end it, replace it.

    `NodeProvisioning` starts it. To join a node that exists already (its engine runs at an endpoint of yours), start it
    with the workflow id `node/<node_id>` and one JSON object:

    ```json
    {"spec": {"node_id": "node_01k5h2v9q3f4tbz7x8m6n0c1de", "model": "llama-7b", "region": "in-mumbai",
              "endpoint": "https://gpu-7.example.com:8443"}, "is_admitted": false}
    ```

    Send the signal `drain` (with a reason, if you like) to retire the node: no new requests, running ones end or reach
    the drain deadline, then the machine is ended. Cancelling does the same with a deadline of 0. The signal
    `spot_notice` says that the cloud will take the machine: the node drains, and a replacement starts at once.
    """

    def __init__(self) -> None:
        self._state = NodeState.READY
        self._drain_reason: str | None = None
        # The cloud said so before anybody else had ended the node.
        self._is_noticed = False
        self._is_cancelled = False
        # The first thing to do is to look: a nudge may have come before this run.
        self._is_nudged = True
        self._silent_since: datetime | None = None
        self._failed_polls = 0
        self._failed_generations = 0
        self._story = Story("Taking care of a node")

    @workflow.signal(name=DRAIN)
    def drain(self, reason: Any = "") -> None:
        """Retire the node. Repeating it changes nothing. `reason` is a text or left out."""
        # Not typed as text: a payload of another type would make the SDK drop the signal, and with it the drain.
        self._drain_reason = self._drain_reason or reason or "drained by an operator"

    @workflow.signal(name=SPOT_NOTICE)
    def spot_notice(self, reason: Any = "") -> None:
        """The cloud will take the machine. Repeating it changes nothing, and neither does it while the node drains."""
        if self._drain_reason is None:
            self._notice(f"the cloud takes the machine: {reason}" if reason else "the cloud takes the machine")

    @workflow.signal(name=LOOK_AGAIN)
    def look_again(self) -> None:
        """Something may have changed: look at the node now."""
        self._is_nudged = True

    @workflow.query(name=STATE)
    def state(self) -> str:
        """The node's state as this workflow knows it."""
        return self._state

    def _notice(self, reason: str) -> None:
        self._is_noticed = True
        self._drain_reason = reason

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._drain_reason = self._drain_reason or "the workflow was cancelled"

    @workflow.run
    async def run(self, input: NodeLifecycleInput) -> NodeLifecycleResult:
        """Run until the node has ended. Raises ApplicationError when a node that is joined cannot be admitted."""
        spec = input.spec
        if workflow.info().workflow_id != node_workflow_id(spec.node_id):
            raise refusal(
                f"The workflow of node {spec.node_id} must have the id {node_workflow_id(spec.node_id)!r}, so that a "
                "node has one at most; start it again under that id.",
                "BadWorkflowId",
            )
        self._story = Story(f"Node `{spec.node_id}`: {spec.model} in {spec.region}")
        if input.is_draining:
            self._drain_reason = self._drain_reason or input.drain_reason or "drained"
        if not input.is_admitted:
            spec = await self._join(spec)
        make_findable(
            region=spec.region, model=spec.model, deployment=spec.deployment, node=spec.node_id, state=self._state
        )
        if input.is_orphan:
            end, reason = NodeState.FAILED, input.drain_reason or "the workflow that was starting it is gone"
        else:
            end, reason = await self._watch(spec)
        is_dead = end in (NodeState.LOST, NodeState.FAILED)
        if self._is_noticed:
            end = NodeState.LOST
        await unstoppable(self._retire(spec, end, reason, is_dead=is_dead), self._cancel)
        if self._is_cancelled or is_cancel_requested():
            raise asyncio.CancelledError(reason)
        return NodeLifecycleResult(spec.node_id, end, reason)

    async def _watch(self, spec: NodeSpec) -> tuple[NodeState, str]:
        """Look whenever there is a reason to, until the node must end; how and why."""
        self._story.tell("the node serves")
        pause = SAFETY_LOOK
        try:
            while self._drain_reason is None:
                check_cancelled()
                if self._is_nudged:
                    self._is_nudged = False
                    found = await self._look(spec)
                    if found is None:
                        continue
                    verdict, reason, pause = found
                    if verdict is Verdict.LOST:
                        return NodeState.LOST, reason
                    if verdict is Verdict.BROKEN:
                        return NodeState.FAILED, reason
                    if is_history_long() and self._drain_reason is None:
                        # The next run looks first, so that no nudge is lost; a drain that came meanwhile makes the
                        # server give this task back with it.
                        workflow.continue_as_new(NodeLifecycleInput(spec))
                try:
                    await workflow.wait_condition(
                        lambda: self._is_nudged or self._drain_reason is not None or is_cancel_requested(),
                        timeout=pause,
                        timeout_summary="Look again even without a nudge",
                    )
                except TimeoutError:
                    self._is_nudged = True
        except (asyncio.CancelledError, ActivityError) as error:
            if not is_cancelled_exception(error):
                raise
            self._cancel()
        return NodeState.TERMINATED, self._drain_reason or "drained"

    async def _look(self, spec: NodeSpec) -> tuple[Verdict, str, timedelta] | None:
        """What the sources say, and when to look again; None when a drain did not wait for that (F9)."""
        now = workflow.now()
        silent_for_s = (now - self._silent_since).total_seconds() if self._silent_since else 0.0
        looking = asyncio.ensure_future(
            workflow.execute_activity_method(
                ProbeActivities.look_at_node,
                NodeLook(spec, silent_for_s, self._failed_polls, self._failed_generations),
                **QUICK,
                summary="Have the engine generate, and ask who else knows",
            )
        )
        try:
            await workflow.wait_condition(lambda: looking.done() or self._drain_reason is not None)
        finally:
            if not looking.done():
                looking.cancel()
        if not looking.done():
            await outcome(looking)
            return None
        return self._weigh(looking.result(), now)

    def _weigh(self, reading: NodeReading, now: datetime) -> tuple[Verdict, str, timedelta]:
        verdict = Verdict(reading.verdict)
        if verdict in IN_SERVICE:
            if self._silent_since is not None:
                self._story.tell("the node serves again")
            self._silent_since, self._failed_polls, self._failed_generations = None, 0, 0
            return verdict, reading.reason, SAFETY_LOOK
        self._story.tell(f"{verdict}: {reading.reason}")
        if verdict is Verdict.INTERRUPTED:
            if self._drain_reason is None:
                self._notice(reading.reason)
        elif verdict is Verdict.ILL:
            self._drain_reason = self._drain_reason or reading.reason
        else:
            self._silent_since = self._silent_since or now
            # What it did fail at in a row; the other count starts again.
            self._failed_polls = 0 if reading.is_mute else self._failed_polls + 1
            self._failed_generations = self._failed_generations + 1 if reading.is_mute else 0
        return verdict, reading.reason, timedelta(seconds=max(0.2, reading.look_again_s))

    async def _retire(self, spec: NodeSpec, end: NodeState, reason: str, *, is_dead: bool) -> None:
        """Out of routing, replaced, empty, tombstoned, ended, written down. A dead node is not waited for."""
        self._state = NodeState.DRAINING
        make_findable(state=NodeState.DRAINING)
        self._story.tell(f"leaving routing: {reason}")
        await workflow.execute_activity_method(
            NodeActivities.begin_drain, NodeChange(spec, reason), **QUICK, summary="Take the node out of routing"
        )
        is_taken = end is NodeState.LOST
        if is_taken:
            await spot_interruption.remember(spec, had_notice=self._is_noticed)
        # A draining node is no replica any more: its replacement starts now.
        await nudge_deployment(spec)
        if is_taken:
            successor = await spot_interruption.replace(spec)
            if successor:
                self._story.tell(f"`{successor}` takes its place")
        if not is_dead and not self._is_cancelled and spec.drain_timeout_s > 0:
            self._story.tell(f"waiting for running requests to end (up to {spec.drain_timeout_s} s): {reason}")
            await self._await_drained(spec)
        await self._end(spec, end, reason)
        await nudge_deployment(spec)

    async def _await_drained(self, spec: NodeSpec) -> None:
        waiting = asyncio.ensure_future(
            workflow.execute_activity_method(
                ProbeActivities.await_drained,
                spec,
                # The activity keeps the deadline itself; the margin is for a worker that died at the last moment.
                **lasting(spec.drain_timeout_s + 30),
                summary="Wait until running requests have ended",
            )
        )
        await workflow.wait_condition(lambda: waiting.done() or self._is_cancelled)
        if not waiting.done():
            waiting.cancel()
            await outcome(waiting)
            return
        try:
            self._story.tell(f"drained: {waiting.result()}")
        except ActivityError as error:
            self._story.tell(f"drained without knowing whether it is empty: {explain(error)}")

    async def _end(self, spec: NodeSpec, end: NodeState, reason: str) -> None:
        await workflow.execute_activity_method(
            NodeActivities.tombstone_node, NodeChange(spec, reason), **QUICK, summary="Tombstone: never launch or admit"
        )
        self._story.tell(f"ending the machine and waiting for the cloud to confirm it ({reason})")
        await workflow.execute_activity_method(
            CloudActivities.end_machine, spec, **endless(120), summary="End the machine, confirm it is gone"
        )
        await workflow.execute_activity_method(
            NodeActivities.end_node, NodeEnding(spec, end, reason), **QUICK, summary="Write down the end"
        )
        self._state = end
        make_findable(state=end)
        self._story.tell(f"{end}: {reason}")

    async def _join(self, asked: NodeSpec) -> NodeSpec:
        """Intend, verify and admit a node that exists already. Raises ApplicationError when it cannot be admitted."""
        self._state = NodeState.REQUESTED
        self._story.tell("reading the order")
        try:
            spec = await unstoppable(self._write_down(asked), self._cancel)
        except ActivityError as error:
            raise refusal(f"Node {asked.node_id} was not joined: {explain(error)}", "BadOrder") from error
        work = asyncio.create_task(self._verify(spec))
        try:
            await workflow.wait_condition(lambda: work.done() or self._drain_reason is not None)
        except asyncio.CancelledError:
            self._cancel()
        if is_cancel_requested():
            self._cancel()
        if not work.done():
            work.cancel()
        failure = await unstoppable(outcome(work), self._cancel)
        if failure is None and not work.cancelled():
            await unstoppable(self._admit(spec, work.result()), self._cancel)
            self._state = NodeState.READY
            return spec
        end = NodeState.TERMINATED if self._drain_reason else NodeState.FAILED
        reason = self._drain_reason or (explain(failure) if failure else "it stopped")
        await unstoppable(self._end(spec, end, reason), self._cancel)
        if self._is_cancelled:
            raise asyncio.CancelledError(reason)
        raise refusal(f"Node {spec.node_id} was not joined: {reason}", "JoinFailed") from failure

    async def _write_down(self, asked: NodeSpec) -> NodeSpec:
        return await workflow.execute_activity_method(
            NodeActivities.join_node, asked, **QUICK, summary="Write the node down"
        )

    async def _verify(self, spec: NodeSpec) -> int:
        self._state = NodeState.BOOTING
        self._story.tell(f"waiting for the engine at your endpoint to answer (up to {JOIN_TIMEOUT_S:.0f} s)")
        await workflow.execute_activity_method(
            ProbeActivities.await_engine, spec, **lasting(JOIN_TIMEOUT_S), summary="Wait for the engine"
        )
        if self._drain_reason is not None or is_cancel_requested():
            # The SDK does not tell a task that it was cancelled in the moment in which its activity completed.
            raise asyncio.CancelledError
        self._state = NodeState.LOADING
        self._story.tell("trying a generation")
        return await workflow.execute_activity_method(
            ProbeActivities.warm_engine, spec, **lasting(JOIN_TIMEOUT_S), summary="Generate and measure"
        )

    async def _admit(self, spec: NodeSpec, capacity: int) -> None:
        await workflow.execute_activity_method(
            NodeActivities.admit_node,
            NodeAdmission(spec, capacity),
            **QUICK,
            summary="Admit the node to routing",
        )
