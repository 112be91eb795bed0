"""Saga: new nodes of a revision up, verified, given traffic step by step, old nodes retired; or all the way back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError
from temporalio.workflow import ParentClosePolicy

from activities.deployments import DeploymentActivities
from activities.rollouts import RolloutActivities
from crosslogic.contracts.deployment import ReplicaOrder
from crosslogic.contracts.names import (
    ABORT,
    DEPLOYMENT_ROLLOUT,
    DRAIN,
    LOOK_AGAIN,
    PAUSE,
    PROGRESS,
    PROMOTE,
    RESUME,
    STATE,
    deployment_workflow_id,
    provisioning_workflow_id,
)
from crosslogic.contracts.node import NodeProvisioningInput
from crosslogic.contracts.rollout import (
    DeploymentRolloutInput,
    DeploymentRolloutResult,
    NodeVerdict,
    NodeVerification,
    RevisionComparison,
    RolloutEnd,
    RolloutOrder,
    RolloutProgress,
    RolloutScope,
    RolloutSurvey,
    TrafficShift,
)
from crosslogic.domain.ids import NODE
from crosslogic.domain.rollout import (
    WHOLE_BP,
    Act,
    Action,
    GateVerdict,
    RolloutNode,
    Standing,
    judge_gate,
    next_action,
    percent,
    return_action,
)
from workflows.node_provisioning import NodeProvisioning
from workflows.steps import (
    QUICK,
    Story,
    explain,
    is_cancel_requested,
    is_history_long,
    lasting,
    make_findable,
    nudge,
    outcome,
    refusal,
    unstoppable,
)

# Between two looks while nothing changes; children that end and signals cut it short.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
# Between two comparisons of a share that is being watched, and of one that is held.
COMPARE_INTERVAL_S, HOLD_INTERVAL_S = 30.0, 60.0
# A drain that nobody has followed by then is sent again.
REMIND_S = 30.0
# All golden prompts of one node, tries included.
VERIFY_TIMEOUT_S = 600.0
# After nodes that failed to come up, before the next order: doubled each time.
FIRST_FAILURE_PAUSE_S, LONGEST_FAILURE_PAUSE_S = 5.0, 300.0

COMPLETED, RETURNED = "completed", "returned"


@workflow.defn(name=DEPLOYMENT_ROLLOUT)
class DeploymentRollout:
    """Replace the revision that a deployment serves: surge, verify, shift traffic, retire; or return to the old one.

    Send one JSON object; only `deployment` and `revision` are needed:

    ```json
    {"deployment": "llama-7b", "revision": 2}
    ```

    With `"hold_at_bp": 500` it stops at 5 % of the traffic until it is promoted. Signals: `abort` (with a reason, if
    you like) returns to the old revision from any step, as cancelling does; `pause` and `resume`; `promote` ends the
    wait that it is in. If a node, a golden prompt or a comparison fails, it returns and the workflow fails with the
    reason.
    """

    def __init__(self) -> None:
        self._abort_reason: str | None = None
        self._is_paused = False
        self._is_promoted = False
        self._is_cancelled = False
        self._is_nudged = False
        self._pause_s = FIRST_PAUSE_S
        self._doing: str = "begin"
        self._model = ""
        self._progress: RolloutProgress | None = None
        self._story = Story("Rolling out a revision")

    @workflow.signal(name=ABORT)
    def abort(self, reason: Any = "") -> None:
        """Return to the old revision. `reason` is a text or left out."""
        # Not typed as text: a payload of another type would make the SDK drop the signal, and with it the abort.
        self._abort_reason = self._abort_reason or reason or "aborted by an operator"

    @workflow.signal(name=PAUSE)
    def pause(self) -> None:
        """Begin no further step. What was begun goes on."""
        self._is_paused = True

    @workflow.signal(name=RESUME)
    def resume(self) -> None:
        """Go on after a pause."""
        self._is_paused = False

    @workflow.signal(name=PROMOTE)
    def promote(self) -> None:
        """End the wait that it is in, or the next: a share that is being watched, or one that is held."""
        self._is_promoted = True

    @workflow.signal(name=LOOK_AGAIN)
    def look_again(self) -> None:
        """Something may have changed: look now."""
        self._is_nudged = True

    @workflow.query(name=STATE)
    def state(self) -> str:
        """What it is doing: an `Act`, `begin`, `paused`, `completed` or `returned`."""
        return self._doing

    @workflow.query(name=PROGRESS)
    def progress(self) -> RolloutProgress | None:
        """How far it is; null before it has begun."""
        return self._progress

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._abort_reason = self._abort_reason or "the workflow was cancelled"

    @workflow.run
    async def run(self, input: DeploymentRolloutInput) -> DeploymentRolloutResult:
        """Run until all is new, or all is as before. Raises ApplicationError when it had to return."""
        self._story = Story(f"Revision {input.revision} of `{input.deployment}`")
        make_findable(deployment=input.deployment)
        result = await unstoppable(self._roll_out(input), self._cancel)
        if result is None:
            workflow.continue_as_new(replace(input, progress=self._at, orphan_of=""))
        self._doing = result.state
        make_findable(state=result.state)
        self._story.tell(f"{result.state}: {result.reason}")
        await unstoppable(_nudge_keeper(input.deployment), self._cancel)
        if self._is_cancelled or self._at.is_cancelled or is_cancel_requested():
            raise asyncio.CancelledError(result.reason)
        if self._at.is_failure:
            raise refusal(
                f"Revision {input.revision} of {input.deployment} was not rolled out: {result.reason}. Revision "
                f"{result.serving} serves as before; nothing of the new one is left.",
                "RolloutReturned",
            )
        return result

    @property
    def _at(self) -> RolloutProgress:
        assert self._progress is not None
        return self._progress

    def _note(self, **changes: Any) -> None:
        self._progress = replace(self._at, **changes)

    async def _roll_out(self, input: DeploymentRolloutInput) -> DeploymentRolloutResult | None:
        """Step by step until it is done; None when it should go on in a fresh history."""
        await self._begin(input)
        while True:
            self._read_messages()
            if is_history_long():
                return None
            survey = await self._survey(input)
            if self._is_paused and not self._at.return_reason:
                self._doing = "paused"
                self._story.tell("paused: send the signal resume, or abort")
                await self._wait(LONGEST_PAUSE_S * 4, lambda: not self._is_paused)
                continue
            action = self._plan(input, survey)
            self._doing = action.act
            if action.act is Act.DONE:
                return await self._finish(input, action)
            await self._take(input, action, survey)

    async def _begin(self, input: DeploymentRolloutInput) -> None:
        self._progress = input.progress
        try:
            start = await workflow.execute_activity_method(
                RolloutActivities.begin_rollout,
                RolloutOrder(replace(input, progress=None), workflow.info().workflow_id),
                **QUICK,
                summary="Take hold of the deployment and set the goals",
            )
        except ActivityError as error:
            raise refusal(f"No roll-out was begun: {explain(error)}", "BadOrder") from error
        self._model = start.model
        make_findable(model=start.model)
        if self._progress is None:
            self._progress = replace(start.progress, moved_at=_now(), shifted_at=_now())
            self._story.tell(f"from revision {start.progress.from_revision} to {input.revision}")
        if input.orphan_of:
            self._turn_back(f"the workflow {input.orphan_of!r}, which began it, is gone")
        # What was told to the run before this one holds.
        self._is_paused = self._is_paused or self._at.is_paused
        self._is_promoted = self._is_promoted or self._at.is_impatient

    def _read_messages(self) -> None:
        if is_cancel_requested():
            self._cancel()
        self._note(
            is_paused=self._is_paused,
            is_impatient=self._is_promoted,
            is_cancelled=self._at.is_cancelled or self._is_cancelled,
        )
        if self._abort_reason is not None and not self._at.return_reason:
            self._turn_back(self._abort_reason)

    def _turn_back(self, reason: str, *, is_failure: bool = False) -> None:
        """From now on every step leads to the old revision."""
        if not self._at.return_reason:
            self._note(return_reason=reason, is_failure=is_failure, failures=0, order_after=0.0)
            self._story.tell(f"returning to revision {self._at.from_revision}: {reason}")

    def _plan(self, input: DeploymentRolloutInput, survey: RolloutSurvey) -> Action:
        at = self._at
        standing = Standing(
            at.from_revision, input.revision, at.traffic_bp, at.proven_bp, at.is_committed, at.is_promoted
        )
        if at.return_reason:
            return return_action(input.policy, survey.floors, survey.nodes, standing, is_restoring=at.is_restoring)
        return next_action(input.policy, survey.floors, survey.nodes, standing)

    async def _survey(self, input: DeploymentRolloutInput) -> RolloutSurvey:
        """The world as it is, with what was told to drain already counted as leaving."""
        at = self._at
        survey = await workflow.execute_activity_method(
            RolloutActivities.survey_rollout,
            RolloutScope(input.deployment, at.goals, at.ordered),
            **QUICK,
            summary="Read nodes and floors",
        )
        settled = {*survey.came_up, *survey.failed}
        if settled:
            self._note(ordered=[node_id for node_id in at.ordered if node_id not in settled], moved_at=_now())
        if survey.came_up:
            self._note(failures=0, order_after=0.0)
        if survey.failed:
            self._count_failures(input, len(survey.failed), survey.failure)
        present = {node.node_id: node for node in survey.nodes}
        waited = {
            node_id: told_at
            for node_id, told_at in self._at.retiring.items()
            if node_id in present and not present[node_id].is_leaving
        }
        for node_id, told_at in waited.items():
            if _now() - told_at > REMIND_S:
                waited[node_id] = _now()
                await _drain(present[node_id], "its revision is retired")
        self._note(retiring=waited)
        nodes = [replace(node, is_leaving=True) if node.node_id in waited else node for node in survey.nodes]
        return replace(survey, nodes=nodes)

    def _count_failures(self, input: DeploymentRolloutInput, count: int, reason: str) -> None:
        failures = self._at.failures + count
        pause_s = min(LONGEST_FAILURE_PAUSE_S, FIRST_FAILURE_PAUSE_S * 2 ** min(failures - 1, 16))
        self._note(failures=failures, order_after=_now() + pause_s)
        self._story.tell(f"{failures} node(s) in a row did not come up: {reason}")
        if failures < max(1, input.max_failed_nodes):
            return
        if not self._at.return_reason:
            self._turn_back(f"{failures} node(s) in a row did not come up, the last because {reason}", is_failure=True)
        elif self._at.is_restoring:
            self._note(is_restoring=False)
            self._story.tell("nodes of the old revision cannot be had: going on with as many as the floor needs")

    async def _take(self, input: DeploymentRolloutInput, action: Action, survey: RolloutSurvey) -> None:
        """Do one step."""
        if action.act is Act.WAIT:
            await self._idle(input, action)
            return
        if action.act is Act.ORDER and _now() < self._at.order_after:
            await self._wait(self._at.order_after - _now())
            return
        if action.act is Act.HOLD:
            await self._hold(input, action)
        elif action.act is Act.PROVE:
            await self._prove(input)
        else:
            self._story.tell(action.reason)
            if action.act is Act.ORDER:
                await self._order(input, action)
            elif action.act is Act.VERIFY:
                await self._verify(input, action.node_ids)
            elif action.act is Act.SHIFT:
                await self._shift(input, action.traffic_bp)
            elif action.act is Act.COMMIT:
                await self._shift(input, WHOLE_BP, is_commit=True)
            else:
                await self._retire(action, survey)
        self._pause_s = FIRST_PAUSE_S
        self._note(moved_at=_now())

    async def _order(self, input: DeploymentRolloutInput, action: Action) -> None:
        is_new = action.revision == input.revision
        for _ in range(action.count):
            if self._abort_reason is not None and not self._at.return_reason:
                return
            node_id = NODE.show(workflow.uuid7())
            workflow_id = provisioning_workflow_id(node_id)
            order = ReplicaOrder(
                input.deployment,
                self._model,
                action.region,
                node_id,
                workflow_id,
                revision=action.revision,
                is_held=is_new,
            )
            try:
                await workflow.execute_activity_method(
                    DeploymentActivities.order_replica,
                    order,
                    **QUICK,
                    summary=f"Write down a node of revision {action.revision} in {action.region}",
                )
            except ActivityError as error:
                self._count_failures(input, 1, explain(error))
                return
            self._note(ordered=[*self._at.ordered, node_id])
            child = await workflow.start_child_workflow(
                NodeProvisioning.run,
                NodeProvisioningInput(
                    model=self._model, region=action.region, deployment=input.deployment, node_id=node_id
                ),
                id=workflow_id,
                parent_close_policy=ParentClosePolicy.ABANDON,
                static_summary=f"Revision {action.revision} of {input.deployment} in {action.region}",
            )
            child.add_done_callback(self._on_child)

    def _on_child(self, child: asyncio.Task[Any]) -> None:
        if not child.cancelled():
            child.exception()
        self._is_nudged = True

    async def _verify(self, input: DeploymentRolloutInput, node_ids: list[str]) -> None:
        """Ask each; those that answer as they must may serve. The first that does not ends the roll-out."""
        for node_id in node_ids:
            asking: asyncio.Task[NodeVerdict] = asyncio.ensure_future(
                workflow.execute_activity_method(
                    RolloutActivities.verify_node,
                    NodeVerification(node_id, input.golden),
                    **lasting(VERIFY_TIMEOUT_S),
                    summary=f"Ask {node_id} the golden prompts",
                )
            )
            await workflow.wait_condition(lambda task=asking: task.done() or self._abort_reason is not None)
            if not asking.done():
                asking.cancel()
                await outcome(asking)
                return
            failure = await outcome(asking)
            if failure is not None:
                if getattr(getattr(failure, "cause", None), "type", None) != "node_gone":
                    self._turn_back(f"`{node_id}` could not be verified: {explain(failure)}", is_failure=True)
                return
            verdict = asking.result()
            if not verdict.is_good:
                self._turn_back(f"`{node_id}` is not as it must be: {verdict.reason}", is_failure=True)
                return
            self._story.tell(f"`{node_id}`: {verdict.reason}")
            await workflow.execute_activity_method(
                RolloutActivities.release_node, node_id, **QUICK, summary="Let requests start there"
            )

    async def _shift(self, input: DeploymentRolloutInput, traffic_bp: int, *, is_commit: bool = False) -> None:
        # The step is taken before the write: whatever an earlier attempt still writes is older.
        self._note(step=self._at.step + 1)
        serving = input.revision if is_commit else self._at.from_revision
        await workflow.execute_activity_method(
            RolloutActivities.shift_traffic,
            TrafficShift(
                input.deployment, input.revision, workflow.info().workflow_id, self._at.step, traffic_bp, serving
            ),
            **QUICK,
            summary=f"Give revision {input.revision} {percent(traffic_bp)} of the traffic",
        )
        self._note(
            traffic_bp=traffic_bp,
            is_committed=is_commit,
            proven_bp=min(self._at.proven_bp, traffic_bp),
            shifted_at=self._at.shifted_at if is_commit else _now(),
        )

    async def _prove(self, input: DeploymentRolloutInput) -> None:
        """Watch the share in force until it was long enough and had enough requests; or fail."""
        verdict, reason = await self._compare(input)
        share, elapsed_s = percent(self._at.traffic_bp), _now() - self._at.shifted_at
        if verdict is GateVerdict.FAILED:
            self._turn_back(f"at {share}: {reason}", is_failure=True)
            return
        is_enough = verdict is GateVerdict.PASSED or elapsed_s >= max(input.longest_bake_s, input.bake_s)
        if (is_enough and elapsed_s >= input.bake_s) or self._is_promoted:
            self._is_promoted = False
            self._note(proven_bp=self._at.traffic_bp)
            self._story.tell(f"{share} is proven: {reason}")
            return
        self._story.tell(f"watching {share} for {input.bake_s} s: {reason}")
        left_s = (input.bake_s if verdict is GateVerdict.PASSED else input.longest_bake_s) - elapsed_s
        await self._wait(min(COMPARE_INTERVAL_S, max(0.5, min(left_s, input.bake_s))), lambda: self._is_promoted)

    async def _hold(self, input: DeploymentRolloutInput, action: Action) -> None:
        """A canary: as long as it compares well, until somebody decides."""
        verdict, reason = await self._compare(input)
        if verdict is GateVerdict.FAILED:
            self._turn_back(f"held at {percent(self._at.traffic_bp)}: {reason}", is_failure=True)
            return
        if not self._is_promoted:
            self._story.tell(f"{action.reason} ({reason})")
            await self._wait(HOLD_INTERVAL_S, lambda: self._is_promoted)
        if self._is_promoted:
            self._is_promoted = False
            self._note(is_promoted=True)

    async def _compare(self, input: DeploymentRolloutInput) -> tuple[GateVerdict, str]:
        at = self._at
        found = await workflow.execute_activity_method(
            RolloutActivities.compare_revisions,
            RevisionComparison(input.deployment, at.from_revision, input.revision, at.shifted_at),
            **QUICK,
            summary="Compare the revisions' requests",
        )
        if found.old.requests >= input.min_requests:
            self._note(baseline=found.old)
        return judge_gate(input.policy, self._at.baseline or found.old, found.new)

    async def _retire(self, action: Action, survey: RolloutSurvey) -> None:
        nodes = {node.node_id: node for node in survey.nodes}
        for node_id in action.node_ids:
            self._note(retiring={**self._at.retiring, node_id: _now()})
            await _drain(nodes[node_id], f"roll-out: {action.reason}")

    async def _idle(self, input: DeploymentRolloutInput, action: Action) -> None:
        """Nothing to do but wait; too long without a step, and it returns."""
        if not self._at.return_reason and _now() - self._at.moved_at > input.step_timeout_s:
            self._turn_back(f"nothing has moved for {input.step_timeout_s} s: {action.reason}", is_failure=True)
            return
        if self._pause_s == FIRST_PAUSE_S:
            self._story.tell(action.reason)
        await self._wait(self._pause_s)
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)

    async def _wait(self, pause_s: float, until: Any = None) -> None:
        """Until there is a reason to look again, `until` holds, or the pause is over."""
        try:
            await workflow.wait_condition(
                lambda: (
                    self._is_nudged
                    or is_cancel_requested()
                    or (self._abort_reason is not None and not self._at.return_reason)
                    or (self._is_paused and not self._at.is_paused)
                    or (until is not None and until())
                ),
                timeout=timedelta(seconds=max(0.1, pause_s)),
                timeout_summary="Look again",
            )
        except TimeoutError:
            return
        self._is_nudged = False

    async def _finish(self, input: DeploymentRolloutInput, action: Action) -> DeploymentRolloutResult:
        at = self._at
        result = DeploymentRolloutResult(
            deployment=input.deployment,
            revision=input.revision,
            state=RETURNED if at.return_reason else COMPLETED,
            serving=at.from_revision if at.return_reason else input.revision,
            reason=at.return_reason or action.reason,
        )
        await workflow.execute_activity_method(
            RolloutActivities.end_rollout,
            RolloutEnd(workflow.info().workflow_id, result),
            **QUICK,
            summary="Let go of the deployment",
        )
        return result


async def _drain(node: RolloutNode, reason: str) -> None:
    """Tell whoever is responsible for the node. Nobody there: the worker gives it a new one, which is told next."""
    try:
        await workflow.get_external_workflow_handle(node.workflow_id).signal(DRAIN, reason)
    except FailureError:
        workflow.logger.info("nobody to drain %s at %s", node.node_id, node.workflow_id)


async def _nudge_keeper(deployment: str) -> None:
    await nudge(deployment_workflow_id(deployment))


def _now() -> float:
    return workflow.now().timestamp()
