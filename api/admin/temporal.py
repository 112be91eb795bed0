"""The admin API's way to workflows: by the names of the contract, never by their classes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from crosslogic.domain.errors import CrossLogicError, Unavailable

if TYPE_CHECKING:
    from temporalio.client import Client

# An operator waits for the answer: better a clear 503 than a long silence.
TIMEOUT_S = 5.0


class Workflows:
    """Starts and signals workflows over one client, which is made when it is first needed."""

    def __init__(self, connect: Callable[[], Awaitable[Client]]) -> None:
        self._connect = connect
        self._client: Client | None = None
        # Held while connecting, so that many requests at once make one connection.
        self._lock = asyncio.Lock()

    async def temporal(self) -> Client:
        """The client. Raises Unavailable while Temporal is away; the next call tries again."""
        async with self._lock:
            if self._client is None:
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        self._client = await self._connect()
                except CrossLogicError:
                    raise
                except Exception as error:  # The SDK raises a bare RuntimeError when it cannot connect.
                    raise _away() from error
            return self._client

    async def start(self, workflow: str, argument: Any, *, workflow_id: str, task_queue: str, signal: str = "") -> None:
        """Start the workflow unless one of that id is running; with `signal`, send it that in either case.

        Raises Unavailable while Temporal is away.
        """
        client = await self.temporal()
        from temporalio.common import WorkflowIDConflictPolicy
        from temporalio.service import RPCError

        options: dict[str, Any] = {"start_signal": signal} if signal else {}
        try:
            await client.start_workflow(
                workflow,
                argument,
                id=workflow_id,
                task_queue=task_queue,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                rpc_timeout=timedelta(seconds=TIMEOUT_S),
                **options,
            )
        except (RPCError, TimeoutError) as error:
            raise _away() from error

    async def signal(self, workflow_id: str, signal: str, *arguments: Any) -> bool:
        """Signal the workflow; False if none of that id is running. Raises Unavailable while Temporal is away."""
        client = await self.temporal()
        from temporalio.service import RPCError, RPCStatusCode

        try:
            await client.get_workflow_handle(workflow_id).signal(
                signal, args=arguments, rpc_timeout=timedelta(seconds=TIMEOUT_S)
            )
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise _away() from error
        except TimeoutError as error:
            raise _away() from error
        return True


def _away() -> Unavailable:
    return Unavailable(
        "Temporal cannot be reached now, so no workflow can be started or told. Requests go on being served; "
        "try again when it is back.",
        code="temporal_away",
        retry_after_s=5,
    )
