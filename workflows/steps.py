"""What all fleet workflows share: timeouts, undoing that nothing interrupts, nudges, and words for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, NotRequired, TypedDict, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy, SearchAttributeKey, SearchAttributeUpdate
from temporalio.exceptions import ActivityError, ApplicationError, FailureError, TimeoutError

from crosslogic.contracts.names import LOOK_AGAIN, deployment_workflow_id
from crosslogic.contracts.node import NodeSpec

T = TypeVar("T")

# A worker that died is noticed after this; every activity beats once a second (activities/manners.py).
HEARTBEAT_TIMEOUT = timedelta(seconds=5)


class Timing(TypedDict):
    """How long an activity may take and how it is tried again: passed to `execute_activity_method` as `**timing`."""

    start_to_close_timeout: timedelta
    schedule_to_close_timeout: NotRequired[timedelta]
    heartbeat_timeout: timedelta
    retry_policy: RetryPolicy


# For one statement or one call: tried for ever, because what it is about does not go away by giving up.
QUICK = Timing(
    start_to_close_timeout=timedelta(seconds=30),
    heartbeat_timeout=HEARTBEAT_TIMEOUT,
    retry_policy=RetryPolicy(
        initial_interval=timedelta(milliseconds=500), backoff_coefficient=2, maximum_interval=timedelta(seconds=15)
    ),
)

# Temporal asks for a fresh history by 4 096 events at the latest (its default); we do so earlier, because a worker that
# takes a workflow over reads all of it.
MOST_EVENTS = 2_000


def lasting(timeout_s: float) -> Timing:
    """For something that waits: up to `timeout_s` in all, tries included."""
    timeout = timedelta(seconds=max(1.0, timeout_s))
    return Timing(
        start_to_close_timeout=timeout,
        schedule_to_close_timeout=timeout,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        retry_policy=RetryPolicy(
            initial_interval=timedelta(milliseconds=500), backoff_coefficient=2, maximum_interval=timedelta(seconds=5)
        ),
    )


def endless(attempt_s: float) -> Timing:
    """For something that waits and must succeed: one attempt up to `attempt_s`, tried for ever."""
    return Timing(
        start_to_close_timeout=timedelta(seconds=attempt_s),
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        retry_policy=RetryPolicy(
            initial_interval=timedelta(milliseconds=500), backoff_coefficient=2, maximum_interval=timedelta(seconds=15)
        ),
    )


async def unstoppable(work: Coroutine[Any, Any, T], on_cancel: Callable[[], None]) -> T:
    """Finish `work` even when the workflow is cancelled meanwhile, which `on_cancel` is told."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                break
            on_cancel()
    return task.result()


async def outcome(work: asyncio.Future[Any]) -> BaseException | None:
    """How something ended, without raising it; None for one that succeeded or was cancelled."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        if not work.done():
            raise
        return None
    except FailureError as error:
        return error
    return None


def is_cancel_requested() -> bool:
    """Was the workflow's cancellation requested?

    Asked besides waiting for CancelledError, because the SDK loses a cancellation that comes together with the
    completion of the activity that is being waited for (1.35, RAISE_ON_CANCELLING_COMPLETED_ACTIVITY is off).
    """
    return workflow.cancellation_reason() is not None


def check_cancelled() -> None:
    """Raise CancelledError if the workflow's cancellation was requested."""
    if is_cancel_requested():
        raise asyncio.CancelledError(workflow.cancellation_reason())


async def tell(workflow_id: str, signal: str, reason: str | None = None) -> bool:
    """Send a signal, with a reason if there is one; False when there is no such workflow, which is nobody's fault."""
    handle = workflow.get_external_workflow_handle(workflow_id)
    try:
        await (handle.signal(signal) if reason is None else handle.signal(signal, reason))
    except FailureError:
        workflow.logger.info("nobody to send %s to at %s", signal, workflow_id)
        return False
    return True


async def nudge(workflow_id: str) -> bool:
    """Send `look_again`; False when there is no such workflow."""
    return await tell(workflow_id, LOOK_AGAIN)


async def nudge_deployment(spec: NodeSpec) -> None:
    """Tell the deployment of a node that something has changed."""
    if spec.deployment:
        await nudge(deployment_workflow_id(spec.deployment))


def is_history_long() -> bool:
    """Is it time to continue as new (T3)?"""
    info = workflow.info()
    return info.is_continue_as_new_suggested() or info.get_current_history_length() >= MOST_EVENTS


_REGION = SearchAttributeKey.for_keyword("CrossLogicRegion")
_MODEL = SearchAttributeKey.for_keyword("CrossLogicModel")
_DEPLOYMENT = SearchAttributeKey.for_keyword("CrossLogicDeployment")
_NODE = SearchAttributeKey.for_keyword("CrossLogicNode")
_STATE = SearchAttributeKey.for_keyword("CrossLogicState")


def make_findable(*, region: str = "", model: str = "", deployment: str = "", node: str = "", state: str = "") -> None:
    """Set the search attributes that are given."""
    given = ((_REGION, region), (_MODEL, model), (_DEPLOYMENT, deployment), (_NODE, node), (_STATE, state))
    updates: list[SearchAttributeUpdate[str]] = [key.value_set(value) for key, value in given if value]
    workflow.upsert_search_attributes(updates)  # pyright: ignore[reportUnknownMemberType]


def explain(error: BaseException) -> str:
    """Why an activity failed, in words for an operator."""
    cause = error.cause if isinstance(error, ActivityError) else error
    if isinstance(cause, TimeoutError):
        last = cause.__cause__
        return "it took too long" + (f"; the last try said: {last.message}" if isinstance(last, FailureError) else "")
    if isinstance(cause, FailureError):
        return cause.message
    return str(cause) or type(cause).__name__


def refusal(message: str, kind: str) -> ApplicationError:
    """The error that fails a workflow for good, with a message for whoever started it."""
    return ApplicationError(message, type=kind, non_retryable=True)


class Story:
    """What a workflow tells its operator: a headline and what has happened, as markdown in the Temporal UI."""

    _KEPT = 12

    def __init__(self, headline: str) -> None:
        self._headline = headline
        self._lines: list[str] = []

    def tell(self, line: str) -> None:
        """Say what is being done now; the lines before stay readable."""
        self._lines = [*self._lines[-self._KEPT :], f"- {workflow.now():%H:%M:%S} {line}"]
        earlier = "\n".join(reversed(self._lines[:-1]))
        workflow.set_current_details(
            f"**{self._headline}**\n\n{line}" + (f"\n\nBefore that (UTC):\n\n{earlier}" if earlier else "")
        )
