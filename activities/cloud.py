"""Effects on clouds: ordering a node's machine, waiting for it, ending it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from temporalio import activity

from crosslogic.contracts.node import JOINED, Machine, NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeEvent, check_endpoint

if TYPE_CHECKING:
    from crosslogic.store.nodes import NodeStore

log = logging.getLogger(__name__)

# A machine that was ordered and that the cloud then does not know for this long is gone. Clouds list late.
UNKNOWN_S = 60.0
# Time between two questions about one machine.
POLL_INTERVAL_S = 0.5
# A machine counts as ended when the cloud has said so this often in a row.
CONFIRMATIONS = 2


class Cloud(Protocol):
    """A place that rents machines. Raises Unavailable when it does not answer, Rejected when it refuses an order."""

    async def ensure(self, spec: NodeSpec) -> None:
        """Order the machine `spec.cluster` unless it exists. Raises Rejected(code="no_capacity") if it is full."""
        ...

    async def find(self, cluster: str) -> Machine | None:
        """What the cloud says of a machine; None if it knows none of that name."""
        ...

    async def list_all(self, prefix: str) -> list[Machine]:
        """Every machine whose name starts with `prefix`; the list may lag."""
        ...

    async def end(self, cluster: str) -> None:
        """Order a machine's end; also of one that has ended or was never there."""
        ...


def is_gone(machine: Machine | None) -> bool:
    """Does the cloud say that there is no such machine any more?"""
    return machine is None or machine.status == MachineStatus.GONE


class CloudActivities:
    """Machines by provider. Every effect is idempotent by the machine's name, which derives from the node's id."""

    def __init__(
        self,
        clouds: Mapping[str, Cloud],
        nodes: NodeStore,
        *,
        is_loopback_allowed: bool,
        poll_interval_s: float = POLL_INTERVAL_S,
        unknown_s: float = UNKNOWN_S,
    ) -> None:
        self._clouds = clouds
        self._nodes = nodes
        self._is_loopback_allowed = is_loopback_allowed
        self._poll_interval_s = poll_interval_s
        self._unknown_s = unknown_s

    @activity.defn
    async def launch_machine(self, spec: NodeSpec) -> None:
        """Order the node's machine, unless the node is tombstoned."""
        node_id = NODE.parse(spec.node_id)
        await self._nodes.advance(node_id, NodeEvent.LAUNCH, f"ordering a machine from {spec.provider}")
        cloud = self._cloud(spec.provider)
        try:
            await cloud.ensure(spec)
        finally:
            # An attempt may have slept through the node's undoing and ordered after it: it cleans up behind itself.
            node = await self._nodes.get(node_id)
            if node.is_tombstoned:
                await cloud.end(spec.cluster)
        if node.is_tombstoned:
            raise Rejected(f"Node {spec.node_id} is tombstoned: it is being undone.", code="tombstoned")

    @activity.defn
    async def await_machine(self, spec: NodeSpec) -> None:
        """Return when the machine runs and has an endpoint. Raises Rejected when it is gone."""
        cloud = self._cloud(spec.provider)
        last_seen = time.monotonic()
        while True:
            machine = await cloud.find(spec.cluster)
            if machine is not None:
                last_seen = time.monotonic()
                if machine.status == MachineStatus.GONE:
                    raise Rejected(
                        f"The machine of node {spec.node_id} ended before it was up{_because(machine)}.",
                        code="machine_gone",
                    )
                if machine.status == MachineStatus.RUNNING and machine.endpoint:
                    endpoint = check_endpoint(machine.endpoint, is_loopback_allowed=self._is_loopback_allowed)
                    await self._nodes.advance(
                        NODE.parse(spec.node_id), NodeEvent.BOOT, "its machine runs; its engine is starting",
                        endpoint=endpoint,
                    )  # fmt: skip
                    return
            elif time.monotonic() - last_seen > self._unknown_s:
                raise Rejected(f"The cloud does not know the machine of node {spec.node_id}.", code="machine_gone")
            await asyncio.sleep(self._poll_interval_s)

    @activity.defn
    async def end_machine(self, spec: NodeSpec) -> None:
        """End the machine and return when the cloud has confirmed that it is gone. A joined node has none."""
        if spec.provider == JOINED:
            return
        cloud = self._cloud(spec.provider)
        confirmed = 0
        while confirmed < CONFIRMATIONS:
            if not confirmed:
                await cloud.end(spec.cluster)
            confirmed = confirmed + 1 if is_gone(await cloud.find(spec.cluster)) else 0
            if confirmed < CONFIRMATIONS:
                await asyncio.sleep(self._poll_interval_s)

    def _cloud(self, provider: str) -> Cloud:
        cloud = self._clouds.get(provider)
        if cloud is None:
            # Not the order's fault: this worker was started without the settings of a cloud that has machines of ours.
            raise Unavailable(f"This worker has no cloud {provider!r}; it knows {', '.join(sorted(self._clouds))}.")
        return cloud


def _because(machine: Machine) -> str:
    return f" ({machine.reason})" if machine.reason else ""
