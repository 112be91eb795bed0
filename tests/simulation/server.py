"""Temporal in memory and in virtual time: histories, tasks, timers, activities with retries, children and signals.

Only what our workflows use. A command that it does not know fails the run, so that a workflow which learns a new trick
teaches it here first.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import temporalio.bridge.proto.workflow_activation as activation_pb
import temporalio.bridge.proto.workflow_commands as commands_pb
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import RetryState, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.bridge.proto import child_workflow as child_pb
from temporalio.converter import DataConverter

Job = activation_pb.WorkflowActivationJob
Command = commands_pb.WorkflowCommand

# Temporal's own defaults: after so many events it suggests a fresh history; a task that is lost is given out again.
SUGGESTED_EVENTS = 4_096
TASK_TIMEOUT_S = 10.0
STICKY_TIMEOUT_S = 1.0
# T3.
MOST_EVENTS = 8_000

ALREADY_EXISTS = (
    child_pb.StartChildWorkflowExecutionFailedCause
    .START_CHILD_WORKFLOW_EXECUTION_FAILED_CAUSE_WORKFLOW_ALREADY_EXISTS
)  # fmt: skip
CLOSING = frozenset(
    {
        "complete_workflow_execution",
        "fail_workflow_execution",
        "cancel_workflow_execution",
        "continue_as_new_workflow_execution",
    }
)


class AlreadyRuns(Exception):
    """A workflow of this id runs."""


class NotFound(Exception):
    """No workflow of this id runs."""


@dataclass(frozen=True)
class Activation:
    """One call of a workflow with what it answered, as a replay needs it."""

    at_ns: int
    history_length: int
    jobs: tuple[Job, ...]
    commands: tuple[Command, ...]
    # The SDK's own flags that were used so far: history tells them to a replay, so that it decides as it did then.
    flags: frozenset[int] = frozenset()


class Executor(Protocol):
    """A worker process, as the server sees it."""

    name: str

    @property
    def is_running(self) -> bool:
        """Does it poll and answer?"""
        ...

    def work_on(self, run: Run, jobs: Sequence[Job]) -> list[Activation]:
        """Activate the workflow with these jobs, and with what follows from its own commands at once."""
        ...

    def look_back(self, run: Run) -> None:
        """Replay the run from its beginning and compare the commands (T2)."""
        ...

    def forget(self, run: Run) -> None:
        """Evict the run."""
        ...

    def execute(self, attempt: Attempt) -> None:
        """Begin an attempt of an activity."""
        ...


@dataclass
class Attempt:
    """One attempt of an activity, on one process."""

    pending: Pending
    process: Executor
    number: int
    started_at: float
    beat_at: float
    cancel: Callable[[], None] = lambda: None

    @property
    def is_current(self) -> bool:
        """Would the server take its result?"""
        return self.pending.current is self and not self.pending.is_done and not self.pending.run.is_closed


@dataclass
class Pending:
    """An activity that was scheduled."""

    run: Run
    seq: int
    command: commands_pb.ScheduleActivity
    scheduled_at: float
    number: int = 0
    current: Attempt | None = None
    is_done: bool = False
    is_cancel_requested: bool = False
    last_failure: Failure | None = None

    @property
    def type(self) -> str:
        """The activity's name."""
        return self.command.activity_type


@dataclass
class Run:
    """One run of a workflow."""

    workflow_id: str
    run_id: str
    type: str
    seed: int
    arguments: tuple[Payload, ...]
    started_at: float
    parent: tuple[Run, int] | None = None
    continued_from: str = ""
    status: str = "running"
    result: Payload | None = None
    failure: Failure | None = None
    recorded: list[Activation] = field(default_factory=list[Activation])
    events: int = 1
    jobs: list[Job] = field(default_factory=list[Job])
    owner: Executor | None = None
    task: int = 0
    is_task_due: bool = False
    is_task_running: bool = False
    lost_tasks: int = 0
    activities: dict[int, Pending] = field(default_factory=dict[int, Pending])
    resolved: set[int] = field(default_factory=set[int])
    timers: dict[int, asyncio.TimerHandle] = field(default_factory=dict[int, asyncio.TimerHandle])
    patches: set[str] = field(default_factory=set[str])

    @property
    def is_closed(self) -> bool:
        """Has it ended?"""
        return self.status != "running"


class Server:
    """Temporal. Everything happens on the running (virtual) loop and by the dice of `random`."""

    def __init__(self, dice: random.Random, converter: DataConverter, tell: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._dice = dice
        self._converter = converter
        self._tell = tell
        self._down_until = 0.0
        self._made = 0
        self.processes: list[Executor] = []
        self.runs: dict[str, Run] = {}
        self.closed: list[Run] = []
        # A replay of all of a run's history costs its square: this share of tasks is followed by one.
        self.look_back_share = 0.05
        self.is_over = False
        self.on_task: Callable[[Run], None] = lambda run: None
        self.on_close: Callable[[Run], None] = lambda run: None

    # What clients ask.

    @property
    def is_down(self) -> bool:
        """Is it away?"""
        return self._loop.time() < self._down_until

    def go_down(self, for_s: float) -> None:
        """Be away for a while; what was due meanwhile comes then."""
        self._down_until = max(self._down_until, self._loop.time() + for_s)

    def start(
        self,
        type: str,
        workflow_id: str,
        arguments: Sequence[Payload],
        parent: tuple[Run, int] | None = None,
        continued_from: Run | None = None,
    ) -> Run:
        """Start a workflow. Raises AlreadyRuns."""
        if workflow_id in self.runs:
            raise AlreadyRuns(workflow_id)
        self._made += 1
        run = Run(
            workflow_id,
            f"run-{self._made}",
            type,
            self._dice.getrandbits(63),
            tuple(arguments),
            self._loop.time(),
            parent,
            continued_from.run_id if continued_from else "",
        )
        self.runs[workflow_id] = run
        job = Job()
        job.initialize_workflow.workflow_type = type
        job.initialize_workflow.workflow_id = workflow_id
        job.initialize_workflow.arguments.extend(arguments)
        job.initialize_workflow.randomness_seed = run.seed
        job.initialize_workflow.continued_from_execution_run_id = run.continued_from
        self._tell(f"{workflow_id} starts")
        self._add(run, job)
        return run

    def find(self, workflow_id: str) -> Run:
        """The running workflow of this id. Raises NotFound."""
        run = self.runs.get(workflow_id)
        if run is None:
            raise NotFound(workflow_id)
        return run

    def signal(self, workflow_id: str, name: str, arguments: Sequence[Any] = ()) -> None:
        """Send a signal. Raises NotFound."""
        run = self.find(workflow_id)
        job = Job()
        job.signal_workflow.signal_name = name
        job.signal_workflow.input.extend(self._converter.payload_converter.to_payloads(list(arguments)))
        self._tell(f"{workflow_id} gets the signal {name}")
        self._add(run, job)

    def cancel(self, workflow_id: str) -> None:
        """Request cancellation. Raises NotFound."""
        run = self.find(workflow_id)
        job = Job()
        job.cancel_workflow.reason = "cancelled by an operator"
        self._tell(f"{workflow_id} is to be cancelled")
        self._add(run, job)

    def terminate(self, workflow_id: str) -> None:
        """End a workflow without asking it. Raises NotFound."""
        run = self.find(workflow_id)
        self._tell(f"{workflow_id} is terminated")
        self._close(run, "terminated")

    # Workflow tasks.

    def _add(self, run: Run, job: Job) -> None:
        run.jobs.append(job)
        run.events += 1
        self._wake(run)

    def _wake(self, run: Run) -> None:
        if run.is_closed or run.is_task_due or run.is_task_running:
            return
        run.is_task_due = True
        self._later(self._dice.uniform(0.001, 0.03), self._start_task, run)

    def _start_task(self, run: Run) -> None:
        if run.is_closed:
            return
        if not any(process.is_running for process in self.processes):
            self._later(0.5, self._start_task, run)
            return
        if run.owner is None or not run.owner.is_running:
            is_moved = run.owner is not None
            run.owner = self._pick()
            if is_moved:
                # The task was put into the dead process's own queue first.
                self._later(STICKY_TIMEOUT_S, self._start_task, run)
                return
        run.is_task_due = False
        jobs = [job for job in run.jobs if not self._is_stale(run, job)]
        run.jobs = []
        if not jobs:
            return
        run.is_task_running = True
        run.task += 1
        process = run.owner
        batch = process.work_on(run, jobs)
        self._later(self._dice.uniform(0.001, 0.02), self._finish_task, run, run.task, process, jobs, batch)

    @staticmethod
    def _is_stale(run: Run, job: Job) -> bool:
        return job.HasField("resolve_activity") and job.resolve_activity.seq in run.resolved

    def _finish_task(
        self, run: Run, task: int, process: Executor, jobs: list[Job], batch: Sequence[Activation]
    ) -> None:
        if run.is_closed or task != run.task:
            return
        if not process.is_running:
            # Its answer never arrives: the task is given out again once it has timed out.
            self._tell(f"{run.workflow_id}: a task was lost with {process.name}")
            process.forget(run)
            run.jobs = jobs + run.jobs
            run.is_task_running, run.is_task_due, run.owner = False, True, None
            self._later(self._dice.uniform(0.5, TASK_TIMEOUT_S), self._start_task, run)
            return
        run.is_task_running = False
        variants = [command.WhichOneof("variant") for part in batch for command in part.commands]
        if run.jobs and CLOSING & set(variants):
            # Something has come that the workflow has not seen: it may not end yet (UnhandledCommand).
            process.forget(run)
            run.jobs = jobs + run.jobs
            self._wake(run)
            return
        run.recorded.extend(batch)
        run.events += 3
        for part in batch:
            run.resolved |= {job.resolve_activity.seq for job in part.jobs if job.HasField("resolve_activity")}
            for command in part.commands:
                self._apply(run, command)
        if run.events >= MOST_EVENTS:
            raise AssertionError(f"T3: {run.workflow_id} has {run.events} events")
        self.on_task(run)
        if not run.is_closed and process.is_running and self._dice.random() < self.look_back_share:
            process.look_back(run)
            if self._dice.random() < 0.5:
                process.forget(run)
        if run.jobs:
            self._wake(run)

    # Commands.

    def _apply(self, run: Run, command: Command) -> None:
        variant = command.WhichOneof("variant") or "nothing"
        handler: Callable[[Run, Any], None] | None = getattr(self, f"_on_{variant}", None)
        if handler is None:
            raise AssertionError(
                f"the simulated Temporal does not know the command {variant} that {run.type} gave: teach it in "
                "tests/simulation/server.py"
            )
        run.events += 1
        handler(run, getattr(command, variant))

    def _on_upsert_workflow_search_attributes(self, run: Run, command: Any) -> None:
        pass

    def _on_modify_workflow_properties(self, run: Run, command: Any) -> None:
        pass

    def _on_set_patch_marker(self, run: Run, command: commands_pb.SetPatchMarker) -> None:
        run.patches.add(command.patch_id)

    def _on_start_timer(self, run: Run, command: commands_pb.StartTimer) -> None:
        def fire() -> None:
            if run.timers.pop(command.seq, None) is None or run.is_closed:
                return
            job = Job()
            job.fire_timer.seq = command.seq
            self._add(run, job)

        run.timers[command.seq] = self._loop.call_later(
            command.start_to_fire_timeout.ToTimedelta().total_seconds(), self._once_up, fire
        )

    def _on_cancel_timer(self, run: Run, command: commands_pb.CancelTimer) -> None:
        timer = run.timers.pop(command.seq, None)
        if timer is not None:
            timer.cancel()

    def _on_schedule_activity(self, run: Run, command: commands_pb.ScheduleActivity) -> None:
        pending = run.activities[command.seq] = Pending(run, command.seq, command, self._loop.time())
        self._later(self._dice.uniform(0.001, 0.03), self._dispatch, pending)

    def _on_request_cancel_activity(self, run: Run, command: commands_pb.RequestCancelActivity) -> None:
        pending = run.activities.get(command.seq)
        if pending is None or pending.is_done:
            return
        pending.is_cancel_requested = True
        if pending.current is None:
            # It waits for its first or next attempt, which never comes.
            self._resolve(pending, cancelled_activity(pending.command))

    def _on_start_child_workflow_execution(self, run: Run, command: commands_pb.StartChildWorkflowExecution) -> None:
        def begin() -> None:
            job = Job()
            started = job.resolve_child_workflow_execution_start
            started.seq = command.seq
            try:
                child = self.start(command.workflow_type, command.workflow_id, command.input, (run, command.seq))
                started.succeeded.run_id = child.run_id
            except AlreadyRuns:
                started.failed.workflow_id = command.workflow_id
                started.failed.workflow_type = command.workflow_type
                started.failed.cause = ALREADY_EXISTS
            if not run.is_closed:
                self._add(run, job)

        self._later(self._dice.uniform(0.001, 0.1), begin)

    def _on_signal_external_workflow_execution(
        self, run: Run, command: commands_pb.SignalExternalWorkflowExecution
    ) -> None:
        target = command.workflow_execution.workflow_id or command.child_workflow_id

        def deliver() -> None:
            job = Job()
            job.resolve_signal_external_workflow.seq = command.seq
            found = self.runs.get(target)
            if found is None:
                failure = job.resolve_signal_external_workflow.failure
                failure.message = "Unable to signal external workflow because it was not found"
                failure.application_failure_info.SetInParent()
            else:
                signal = Job()
                signal.signal_workflow.signal_name = command.signal_name
                signal.signal_workflow.input.extend(command.args)
                self._add(found, signal)
            if not run.is_closed:
                self._add(run, job)

        self._later(self._dice.uniform(0.001, 0.1), deliver)

    def _on_request_cancel_external_workflow_execution(
        self, run: Run, command: commands_pb.RequestCancelExternalWorkflowExecution
    ) -> None:
        def deliver() -> None:
            job = Job()
            job.resolve_request_cancel_external_workflow.seq = command.seq
            found = self.runs.get(command.workflow_execution.workflow_id)
            if found is None:
                failure = job.resolve_request_cancel_external_workflow.failure
                failure.message = "Unable to cancel external workflow because it was not found"
                failure.application_failure_info.SetInParent()
            else:
                self.cancel(found.workflow_id)
            if not run.is_closed:
                self._add(run, job)

        self._later(self._dice.uniform(0.001, 0.1), deliver)

    def _on_complete_workflow_execution(self, run: Run, command: commands_pb.CompleteWorkflowExecution) -> None:
        run.result = command.result
        self._close(run, "completed")

    def _on_fail_workflow_execution(self, run: Run, command: commands_pb.FailWorkflowExecution) -> None:
        run.failure = command.failure
        self._close(run, "failed")

    def _on_cancel_workflow_execution(self, run: Run, command: Any) -> None:
        self._close(run, "cancelled")

    def _on_continue_as_new_workflow_execution(
        self, run: Run, command: commands_pb.ContinueAsNewWorkflowExecution
    ) -> None:
        self._close(run, "continued")
        self.start(
            command.workflow_type or run.type,
            run.workflow_id,
            command.arguments,
            parent=run.parent,
            continued_from=run,
        )

    def _close(self, run: Run, status: str) -> None:
        run.status = status
        self._tell(f"{run.workflow_id} is {status}" + (f": {run.failure.message}" if run.failure else ""))
        for timer in run.timers.values():
            timer.cancel()
        run.timers.clear()
        if run.owner is not None:
            run.owner.forget(run)
        del self.runs[run.workflow_id]
        self.closed.append(run)
        if status != "continued":
            self._tell_parent(run)
            self.on_close(run)

    def _tell_parent(self, run: Run) -> None:
        if run.parent is None or run.parent[0].is_closed:
            return
        parent, seq = run.parent
        job = Job()
        resolved = job.resolve_child_workflow_execution
        resolved.seq = seq
        if run.status == "completed":
            if run.result is not None:
                resolved.result.completed.result.CopyFrom(run.result)
            else:
                resolved.result.completed.SetInParent()
        else:
            outcome = resolved.result.cancelled if run.status == "cancelled" else resolved.result.failed
            outcome.failure.message = "Child Workflow execution " + run.status
            info = outcome.failure.child_workflow_execution_failure_info
            info.workflow_execution.workflow_id = run.workflow_id
            info.workflow_type.name = run.type
            if run.failure is not None:
                outcome.failure.cause.CopyFrom(run.failure)
            elif run.status == "cancelled":
                outcome.failure.cause.canceled_failure_info.SetInParent()
            else:
                outcome.failure.cause.terminated_failure_info.SetInParent()
        self._add(parent, job)

    # Activities.

    def _dispatch(self, pending: Pending) -> None:
        if pending.is_done or pending.run.is_closed:
            return
        if not any(process.is_running for process in self.processes):
            self._later(0.5, self._dispatch, pending)
            return
        now = self._loop.time()
        pending.number += 1
        process = self._pick()
        attempt = pending.current = Attempt(pending, process, pending.number, now, now)
        process.execute(attempt)
        self._watch(attempt)

    def _watch(self, attempt: Attempt) -> None:
        """See to it that the attempt's timeouts are noticed."""
        if not attempt.is_current:
            return
        pending, command, now = attempt.pending, attempt.pending.command, self._loop.time()
        due = [(attempt.started_at + seconds(command.start_to_close_timeout), TimeoutType.TIMEOUT_TYPE_START_TO_CLOSE)]
        if seconds(command.heartbeat_timeout):
            due.append((attempt.beat_at + seconds(command.heartbeat_timeout), TimeoutType.TIMEOUT_TYPE_HEARTBEAT))
        if seconds(command.schedule_to_close_timeout):
            at = pending.scheduled_at + seconds(command.schedule_to_close_timeout)
            due.append((at, TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_CLOSE))
        at, kind = min(due)
        if now + 1e-6 < at:
            self._later(at - now, self._watch, attempt)
            return
        failure = Failure(message="activity timeout")
        failure.timeout_failure_info.timeout_type = kind
        self._tell(
            f"{pending.run.workflow_id}: {pending.type} #{attempt.number} on {attempt.process.name} "
            f"{TimeoutType.Name(kind).removeprefix('TIMEOUT_TYPE_').lower()} timeout"
        )
        if pending.last_failure is not None and kind == TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_CLOSE:
            failure.cause.CopyFrom(pending.last_failure)
        if pending.is_cancel_requested:
            self._resolve(pending, cancelled_activity(command))
        elif kind == TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_CLOSE:
            self._resolve(pending, failed_activity(command, failure, RetryState.RETRY_STATE_TIMEOUT))
        else:
            self._try_again(pending, failure)

    def beat(self, attempt: Attempt) -> bool:
        """Take a heartbeat; False when the attempt is to stop: its workflow wants that, or nobody waits for it."""
        if self.is_down:
            return True
        if not attempt.is_current:
            return False
        attempt.beat_at = self._loop.time()
        return not attempt.pending.is_cancel_requested

    def report(self, attempt: Attempt, *, result: Payload | None = None, failure: Failure | None = None) -> None:
        """An attempt has ended; a `failure` with canceled_failure_info means cancelled. Nobody waits for a zombie's."""

        def deliver() -> None:
            if not attempt.process.is_running or not attempt.is_current:
                return
            pending = attempt.pending
            if result is not None:
                job = Job()
                job.resolve_activity.result.completed.result.CopyFrom(result)
                self._resolve(pending, job)
            elif failure is not None and failure.HasField("canceled_failure_info") and pending.is_cancel_requested:
                self._resolve(pending, cancelled_activity(pending.command))
            elif failure is not None:
                self._tell(f"{pending.run.workflow_id}: {pending.type} #{attempt.number} failed: {failure.message}")
                self._try_again(pending, failure)

        self._later(self._dice.uniform(0.001, 0.02), deliver)

    def _try_again(self, pending: Pending, failure: Failure) -> None:
        command, policy, info = pending.command, pending.command.retry_policy, failure.application_failure_info
        pending.current = None
        if pending.is_cancel_requested:
            self._resolve(pending, cancelled_activity(command))
            return
        if not failure.HasField("timeout_failure_info") or pending.last_failure is None:
            pending.last_failure = failure
        if info.non_retryable or info.type in policy.non_retryable_error_types:
            self._resolve(pending, failed_activity(command, failure, RetryState.RETRY_STATE_NON_RETRYABLE_FAILURE))
            return
        if policy.maximum_attempts and pending.number >= policy.maximum_attempts:
            self._resolve(pending, failed_activity(command, failure, RetryState.RETRY_STATE_MAXIMUM_ATTEMPTS_REACHED))
            return
        pause_s = seconds(policy.initial_interval) * policy.backoff_coefficient ** min(pending.number - 1, 30)
        pause_s = min(pause_s, seconds(policy.maximum_interval) or 100 * seconds(policy.initial_interval))
        pause_s = seconds(info.next_retry_delay) or pause_s
        limit_s = seconds(command.schedule_to_close_timeout)
        if limit_s and self._loop.time() + pause_s > pending.scheduled_at + limit_s:
            self._resolve(pending, failed_activity(command, failure, RetryState.RETRY_STATE_TIMEOUT))
            return
        self._later(pause_s, self._dispatch, pending)

    def _resolve(self, pending: Pending, job: Job) -> None:
        pending.is_done = True
        if pending.run.is_closed:
            return
        job.resolve_activity.seq = pending.seq
        if pending.seq not in pending.run.resolved:
            pending.run.events += 1
            self._add(pending.run, job)

    # Time.

    def _pick(self) -> Executor:
        return self._dice.choice([process for process in self.processes if process.is_running])

    def _later(self, delay_s: float, what: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_later(delay_s, self._once_up, what, *arguments)

    def _once_up(self, what: Callable[..., None], *arguments: Any) -> None:
        """What the server does, it does when it is there."""
        if self.is_over:
            return
        if self.is_down:
            pause_s = self._down_until - self._loop.time() + self._dice.uniform(0.001, 0.5)
            self._loop.call_later(pause_s, self._once_up, what, *arguments)
        else:
            what(*arguments)


def seconds(duration: Any) -> float:
    """A protobuf Duration in seconds; 0 when it was not set."""
    return float(duration.seconds) + duration.nanos / 1e9


def failed_activity(command: commands_pb.ScheduleActivity, cause: Failure, state: RetryState.ValueType) -> Job:
    """The job that tells a workflow that its activity has failed for good."""
    job = Job()
    failure = job.resolve_activity.result.failed.failure
    failure.message = "Activity task failed"
    failure.activity_failure_info.activity_type.name = command.activity_type
    failure.activity_failure_info.activity_id = command.activity_id
    failure.activity_failure_info.retry_state = state
    failure.cause.CopyFrom(cause)
    return job


def cancelled_activity(command: commands_pb.ScheduleActivity) -> Job:
    """The job that tells a workflow that its activity was cancelled."""
    job = Job()
    failure = job.resolve_activity.result.cancelled.failure
    failure.message = "Activity cancelled"
    failure.activity_failure_info.activity_type.name = command.activity_type
    failure.activity_failure_info.activity_id = command.activity_id
    failure.activity_failure_info.retry_state = RetryState.RETRY_STATE_CANCEL_REQUESTED
    failure.cause.message = "Activity cancelled"
    failure.cause.canceled_failure_info.SetInParent()
    return job
