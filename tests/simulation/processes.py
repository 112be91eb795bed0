"""Worker processes: they run the workflows and activities that `worker.py` registers, and can be killed or stopped.

A process that was killed never goes on: it stays in the middle of whatever it was waiting for. One that was stopped
(SIGSTOP) goes on later, as a zombie.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, get_type_hints

import temporalio.bridge.proto.workflow_activation as activation_pb
from temporalio import workflow
from temporalio.api.common.v1 import Payloads
from temporalio.api.failure.v1 import Failure
from temporalio.bridge.proto.workflow_commands import ActivityCancellationType
from temporalio.common import MetricMeter, Priority, TypedSearchAttributes
from temporalio.converter import DataConverter
from temporalio.testing import ActivityEnvironment
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    WorkflowInboundInterceptor,
    WorkflowInstance,
    WorkflowInstanceDetails,
    WorkflowInterceptorClassInput,
    WorkflowRunner,
)

from crosslogic.domain.errors import InvariantViolated
from tests.simulation import clock
from tests.simulation.server import (
    SUGGESTED_EVENTS,
    Activation,
    Attempt,
    Command,
    Job,
    Run,
    Server,
    cancelled_activity,
    seconds,
)

# What an activity raises only if our own code is wrong, or if the simulator lacks something that it needs.
DEFECTS = (AssertionError, TypeError, AttributeError, LookupError, NameError, NotImplementedError, InvariantViolated)


@dataclass
class Registry:
    """What `worker.make_worker` gives to a worker."""

    workflows: Sequence[type[Any]]
    runner: WorkflowRunner
    interceptors: Sequence[Interceptor]
    converter: DataConverter

    def __post_init__(self) -> None:
        definitions = [workflow._Definition.must_from_class(cls) for cls in self.workflows]  # pyright: ignore[reportPrivateUsage]
        self.definitions = {definition.name: definition for definition in definitions}
        self.extern_functions: dict[str, Callable[..., Any]] = {}
        given = WorkflowInterceptorClassInput(unsafe_extern_functions=self.extern_functions)
        made = [interceptor.workflow_interceptor_class(given) for interceptor in self.interceptors]
        self.workflow_interceptors: list[type[WorkflowInboundInterceptor]] = [one for one in made if one is not None]
        self.extern_functions["__temporal_get_metric_meter"] = lambda: MetricMeter.noop
        self.extern_functions["__temporal_assert_local_activity_valid"] = lambda name: None  # pyright: ignore[reportUnknownLambdaType]

    def instance(self, run: Run) -> WorkflowInstance:
        """A new instance of a run's workflow. Raises AssertionError for a type that no worker has."""
        definition = self.definitions.get(run.type)
        assert definition is not None, f"worker.WORKFLOWS has no {run.type}"
        info: dict[str, Any] = dict.fromkeys(workflow.Info.__dataclass_fields__)
        started_at = clock.EPOCH + timedelta(seconds=run.started_at)
        info |= {
            "attempt": 1,
            "continued_run_id": run.continued_from or None,
            "first_execution_run_id": run.run_id,
            "headers": {},
            "namespace": "simulation",
            "original_execution_run_id": run.run_id,
            "raw_memo": {},
            "run_id": run.run_id,
            "search_attributes": {},
            "start_time": started_at,
            "task_queue": "fleet",
            "task_timeout": timedelta(seconds=10),
            "typed_search_attributes": TypedSearchAttributes([]),
            "workflow_id": run.workflow_id,
            "workflow_start_time": started_at,
            "workflow_type": run.type,
            "priority": Priority.default,
        }
        if run.parent is not None:
            parent = run.parent[0]
            info["parent"] = workflow.ParentInfo("simulation", parent.run_id, parent.workflow_id)
        details = WorkflowInstanceDetails(
            payload_converter_factory=self.converter.payload_converter_class,
            failure_converter_class=self.converter.failure_converter_class,
            interceptor_classes=self.workflow_interceptors,
            defn=definition,
            info=workflow.Info(**info),
            randomness_seed=run.seed,
            extern_functions=self.extern_functions,
            disable_eager_activity_execution=True,
            worker_level_failure_exception_types=[],
            patch_activation_callback=None,
            last_completion_result=Payloads(),
            last_failure=None,
        )
        return self.runner.create_instance(details)


def activate(
    instance: WorkflowInstance,
    run: Run,
    at_ns: int,
    history_length: int,
    jobs: Sequence[Job],
    flags: frozenset[int],
    *,
    is_replaying: bool,
) -> Activation:
    """Activate the workflow with these jobs. Raises AssertionError when the task fails (T6)."""
    asked = activation_pb.WorkflowActivation(
        run_id=run.run_id,
        is_replaying=is_replaying,
        history_length=history_length,
        continue_as_new_suggested=history_length >= SUGGESTED_EVENTS,
        available_internal_flags=sorted(flags),
    )
    asked.timestamp.FromNanoseconds(at_ns)
    asked.jobs.extend(jobs)
    answer = on_its_own_loop(instance, asked)
    if answer.HasField("failed"):
        raise AssertionError(
            f"T6: a task of {run.workflow_id} ({run.type}) failed: {answer.failed.failure.message}\n"
            f"{answer.failed.failure.stack_trace}"
        )
    used = flags | set(answer.successful.used_internal_flags)
    return Activation(at_ns, history_length, tuple(jobs), tuple(answer.successful.commands), used)


def on_its_own_loop(instance: WorkflowInstance, asked: activation_pb.WorkflowActivation) -> Any:
    """Activate; the instance is an event loop of its own, and leaves ours behind as it found it."""
    ours = asyncio.get_running_loop()
    try:
        return instance.activate(asked)
    finally:
        asyncio._set_running_loop(ours)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue]


def evict(instance: WorkflowInstance, run: Run) -> None:
    """Take an instance's tasks down."""
    asked = activation_pb.WorkflowActivation(run_id=run.run_id)
    job = Job()
    job.remove_from_cache.message = "evicted"
    asked.jobs.append(job)
    asked.timestamp.FromNanoseconds(0)
    on_its_own_loop(instance, asked)


def same(one: Sequence[Command], other: Sequence[Command]) -> bool:
    """Are these the same commands?"""
    return [command.SerializeToString(deterministic=True) for command in one] == [
        command.SerializeToString(deterministic=True) for command in other
    ]


class _Root(ActivityInboundInterceptor):
    """The end of the chain: the activity itself."""

    def __init__(self) -> None:
        pass

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        return await input.fn(*input.args)


class Process:
    """A worker process."""

    def __init__(
        self, name: str, registry: Registry, server: Server, tell: Callable[[str], None], broke: Callable[[str], None]
    ) -> None:
        self.name = name
        self._registry = registry
        self._server = server
        self._tell = tell
        self._broke = broke
        self._loop = asyncio.get_running_loop()
        self._is_alive = True
        self._has_vanished = False
        self._going = asyncio.Event()
        self._going.set()
        self._cache: dict[str, tuple[WorkflowInstance, int]] = {}
        self._environments: dict[int, ActivityEnvironment] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self._activities: dict[str, Callable[..., Any]] = {}
        inbound: ActivityInboundInterceptor = _Root()
        for interceptor in reversed(registry.interceptors):
            inbound = interceptor.intercept_activity(inbound)
        self._inbound = inbound

    def register(self, activities: Sequence[Callable[..., Any]]) -> None:
        """Take the activities that `worker.assemble` has made for this process."""
        for method in activities:
            definition: Any = getattr(method, "__temporal_activity_definition")
            self._activities[definition.name] = method

    # Life and death.

    @property
    def is_running(self) -> bool:
        """Does it poll and answer?"""
        return self._is_alive and self._going.is_set()

    @property
    def is_alive(self) -> bool:
        """Was it not killed yet?"""
        return self._is_alive

    async def gate(self) -> None:
        """Pass while the process runs; wait while it is stopped; never pass once it was killed."""
        while not self.is_running:
            if self._has_vanished:
                raise asyncio.CancelledError
            if not self._is_alive:
                await self._loop.create_future()
            await self._going.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self._tell(f"{self.name} is killed")
        self._is_alive = False
        self._forget_all()

    def vanish(self) -> None:
        """The simulation is over: nothing is reached any more."""
        self._has_vanished, self._is_alive = True, False
        self._forget_all()

    def stop(self) -> None:
        """SIGSTOP."""
        self._tell(f"{self.name} is stopped")
        self._going.clear()

    def resume(self) -> None:
        """SIGCONT."""
        if self._is_alive:
            self._tell(f"{self.name} goes on")
            self._going.set()

    def ask_to_end(self) -> None:
        """SIGTERM: what is under way may end or gives itself back."""
        self._tell(f"{self.name} is to end")
        for environment in list(self._environments.values()):
            environment.worker_shutdown()

    def spawn(self, coroutine: Any) -> None:
        """Run something of this process's own."""
        task = self._loop.create_task(coroutine)
        task.add_done_callback(self._ended)
        self.tasks.append(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broke(f"{type(error).__name__}: {error}")

    # Workflows.

    def work_on(self, run: Run, jobs: Sequence[Job]) -> list[Activation]:
        instance, seen = self._cache.get(run.run_id, (None, -1))
        if instance is None or seen != len(run.recorded):
            self.forget(run)
            instance = self._replayed(run)
        at_ns = int(clock.now().timestamp() * 1e9)
        batch: list[Activation] = []
        kinds = {seq: pending.command.cancellation_type for seq, pending in run.activities.items()}
        resolved: set[int] = set(run.resolved)
        flags: frozenset[int] = run.recorded[-1].flags if run.recorded else frozenset()
        following: list[Job] = list(jobs)
        while following:
            length = run.events + len(batch)
            resolved |= {job.resolve_activity.seq for job in following if job.HasField("resolve_activity")}
            done = activate(instance, run, at_ns, length, following, flags, is_replaying=False)
            batch.append(done)
            flags = done.flags
            following = []
            for command in done.commands:
                variant = command.WhichOneof("variant")
                if variant == "schedule_activity":
                    kinds[command.schedule_activity.seq] = command.schedule_activity.cancellation_type
                elif variant == "request_cancel_activity":
                    seq = command.request_cancel_activity.seq
                    # The SDK's core answers this itself and at once, unless the workflow wants to wait.
                    if kinds[seq] != ActivityCancellationType.WAIT_CANCELLATION_COMPLETED and seq not in resolved:
                        scheduled = next(
                            found.schedule_activity
                            for part in (*run.recorded, *batch)
                            for found in part.commands
                            if found.WhichOneof("variant") == "schedule_activity" and found.schedule_activity.seq == seq
                        )
                        job = cancelled_activity(scheduled)
                        job.resolve_activity.seq = seq
                        following.append(job)
        self._cache[run.run_id] = (instance, len(run.recorded) + len(batch))
        return batch

    def _replayed(self, run: Run) -> WorkflowInstance:
        """A new instance that has lived through what was recorded. Raises AssertionError where it differs (T2)."""
        instance = self._registry.instance(run)
        for position, part in enumerate(run.recorded):
            jobs = list(part.jobs)
            for command in part.commands:
                if command.HasField("set_patch_marker"):
                    job = Job()
                    job.notify_has_patch.patch_id = command.set_patch_marker.patch_id
                    jobs.insert(0, job)
            again = activate(instance, run, part.at_ns, part.history_length, jobs, part.flags, is_replaying=True)
            assert same(again.commands, part.commands), (
                f"T2: {run.workflow_id} ({run.type}) answers activation {position} differently in a replay:\n"
                f"jobs:  {', '.join(job.WhichOneof('variant') or '' for job in part.jobs)}\n"
                f"first: {shown(part.commands)}\nnow:   {shown(again.commands)}"
            )
        return instance

    def look_back(self, run: Run) -> None:
        evict(self._replayed(run), run)

    def forget(self, run: Run) -> None:
        found = self._cache.pop(run.run_id, None)
        if found is not None:
            evict(found[0], run)

    def _forget_all(self) -> None:
        for instance, _ in self._cache.values():
            on_its_own_loop(instance, _EVICTION)
        self._cache.clear()

    # Activities.

    def execute(self, attempt: Attempt) -> None:
        self.spawn(self._execute(attempt))

    async def _execute(self, attempt: Attempt) -> None:
        pending = attempt.pending
        method = self._activities.get(pending.type)
        if method is None:
            self._broke(
                f"{pending.run.type} calls the activity {pending.type}, which worker.assemble did not make: is its "
                "class held there, and does tests/simulation/world.py give it what it needs?"
            )
            return
        converter = self._registry.converter
        environment = ActivityEnvironment()
        scheduled_at = clock.EPOCH + timedelta(seconds=pending.scheduled_at)
        environment.info = replace(
            ActivityEnvironment.default_info(),
            activity_id=pending.command.activity_id,
            activity_type=pending.type,
            attempt=attempt.number,
            scheduled_time=scheduled_at,
            current_attempt_scheduled_time=scheduled_at,
            started_time=clock.now(),
            heartbeat_timeout=timedelta(seconds=seconds(pending.command.heartbeat_timeout)),
            start_to_close_timeout=timedelta(seconds=seconds(pending.command.start_to_close_timeout)),
            schedule_to_close_timeout=timedelta(seconds=seconds(pending.command.schedule_to_close_timeout)),
            workflow_id=pending.run.workflow_id,
            workflow_run_id=pending.run.run_id,
            workflow_type=pending.run.type,
        )
        environment.on_heartbeat = partial(self._beat, attempt, environment)
        key = id(attempt)
        self._environments[key] = environment
        values = converter.payload_converter.from_payloads(list(pending.command.arguments), argument_types(method))

        async def through_the_interceptors() -> Any:
            return await self._inbound.execute_activity(
                ExecuteActivityInput(fn=method, args=values, executor=None, headers={})
            )

        result, failure = None, None
        try:
            value = await environment.run(through_the_interceptors)
            result = converter.payload_converter.to_payloads([value])[0]
        except asyncio.CancelledError:
            failure = Failure(message="Cancelled")
            failure.canceled_failure_info.SetInParent()
        except Exception as error:
            if attempt.is_current and self.is_running and isinstance(_origin(error), DEFECTS):
                origin = _origin(error)
                self._broke(f"{pending.type} for {pending.run.workflow_id} raised {type(origin).__name__}: {origin}")
            failure = Failure()
            converter.failure_converter.to_failure(error, converter.payload_converter, failure)
        finally:
            self._environments.pop(key, None)
        await self.gate()
        self._server.report(attempt, result=result, failure=failure)

    def _beat(self, attempt: Attempt, environment: ActivityEnvironment, *details: Any) -> None:
        if not self._is_alive:
            # Its heart stops here; the rest of it waits at the gate for ever.
            raise asyncio.CancelledError
        if self.is_running and not self._server.beat(attempt):
            self._loop.call_soon(environment.cancel)


def _origin(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


_EVICTION = activation_pb.WorkflowActivation(jobs=[Job(remove_from_cache=activation_pb.RemoveFromCache(message="x"))])

_HINTS: dict[Any, list[Any]] = {}


def argument_types(method: Callable[..., Any]) -> list[Any]:
    """The types that an activity's arguments are decoded into."""
    function = getattr(method, "__func__", method)
    if function not in _HINTS:
        hints = get_type_hints(function)
        _HINTS[function] = [hints[name] for name in inspect.signature(method).parameters]
    return _HINTS[function]


def shown(commands: Sequence[Command]) -> str:
    """Commands in one line."""
    return ", ".join(
        f"{command.WhichOneof('variant')}"
        + (f"({command.schedule_activity.activity_type})" if command.HasField("schedule_activity") else "")
        for command in commands
    )
