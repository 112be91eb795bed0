"""How every activity behaves: heartbeats, a quick end when its worker stops, and errors that Temporal understands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import timedelta
from typing import Any

import temporalio.worker
from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from crosslogic.domain.errors import InvariantViolated, Rejected, Unavailable

log = logging.getLogger(__name__)

# A worker that was killed is noticed one heartbeat timeout later (T5), so every activity beats, long or short. The
# SDK sends at most one per 80 % of the timeout.
HEARTBEAT_INTERVAL_S = 1.0
# How long an activity may go on after its worker was told to stop. A worker stops within 4 s.
SHUTDOWN_GRACE_S = 1.5


class Manners(temporalio.worker.Interceptor):
    """Goes around every activity of a worker."""

    def intercept_activity(
        self, next: temporalio.worker.ActivityInboundInterceptor
    ) -> temporalio.worker.ActivityInboundInterceptor:
        """Wrap the next interceptor."""
        return _MannersInbound(next)


class _MannersInbound(temporalio.worker.ActivityInboundInterceptor):
    async def execute_activity(self, input: temporalio.worker.ExecuteActivityInput) -> Any:
        work = asyncio.ensure_future(self.next.execute_activity(input))
        helpers = [asyncio.create_task(_beat()), asyncio.create_task(_stop_with_the_worker(work))]
        try:
            return await work
        except asyncio.CancelledError:
            work.cancel()
            with contextlib.suppress(BaseException):
                await work
            if activity.is_worker_shutdown() and not activity.is_cancelled():
                # Not a cancellation of the work: another worker goes on with it at once.
                raise ApplicationError(
                    "this worker is stopping",
                    type="WorkerStopping",
                    next_retry_delay=timedelta(milliseconds=100),
                    category=ApplicationErrorCategory.BENIGN,
                ) from None
            raise
        except Rejected as error:
            raise _told(error, type=error.code, non_retryable=True) from error
        except Unavailable as error:
            raise _told(error, type="Unavailable") from error
        except InvariantViolated as error:
            raise ApplicationError(error.message, type="InvariantViolated", non_retryable=True) from error
        finally:
            for helper in helpers:
                helper.cancel()


def _told(error: Rejected | Unavailable, *, type: str, non_retryable: bool = False) -> ApplicationError:
    """The error for Temporal, logged in one line: it is no defect of ours, so nobody needs its stack trace."""
    log.warning("%s: %s", activity.info().activity_type, error.message)
    return ApplicationError(
        error.message, type=type, non_retryable=non_retryable, category=ApplicationErrorCategory.BENIGN
    )


async def _beat() -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


async def _stop_with_the_worker(work: asyncio.Future[Any]) -> None:
    """Let a short activity finish; break off one that would outlast the worker."""
    await activity.wait_for_worker_shutdown()
    await asyncio.sleep(SHUTDOWN_GRACE_S)
    work.cancel()
