"""Effects on clouds: ordering a node's machine, waiting for it, ending it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from uuid import UUID

from temporalio import activity

from crosslogic.contracts.node import JOINED, Machine, NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeEvent, check_endpoint
from crosslogic.domain.placement import CPU, Gpus, Offer, Place, Wish, explain, rank

if TYPE_CHECKING:
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.nodes import NodeStore
    from crosslogic.store.placement import PlacementStore

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


@runtime_checkable
class Market(Protocol):
    """A cloud that has others behind it, so that there is a choice."""

    async def offers(self) -> list[Offer]:
        """What may be rented, with prices. Raises Unavailable or Rejected."""
        ...

    async def clouds(self) -> list[str]:
        """The clouds behind it that can be used now."""
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
        catalog: CatalogStore | None = None,
        placement: PlacementStore | None = None,
        poll_interval_s: float = POLL_INTERVAL_S,
        unknown_s: float = UNKNOWN_S,
    ) -> None:
        self._clouds = clouds
        self._nodes = nodes
        self._is_loopback_allowed = is_loopback_allowed
        self._catalog = catalog
        self._placement = placement
        self._poll_interval_s = poll_interval_s
        self._unknown_s = unknown_s

    @activity.defn
    async def launch_machine(self, spec: NodeSpec) -> None:
        """Order the node's machine, unless the node is tombstoned. Raises Rejected when there is no place for it."""
        node_id = NODE.parse(spec.node_id)
        cloud = self._cloud(spec.provider)
        placed = await self._place(spec, cloud)
        where = f": {explain(placed.places)}" if placed.places else ""
        await self._nodes.advance(node_id, NodeEvent.LAUNCH, f"ordering a machine from {spec.provider}{where}")
        await self._order(placed, cloud)

    @activity.defn
    async def await_machine(self, spec: NodeSpec) -> None:
        """Return when the machine runs and has an endpoint. Raises Rejected when it is gone or can never serve.

        Where the cloud knows no endpoints, the node's agent has written it to the node's row.
        """
        cloud = self._cloud(spec.provider)
        node_id = NODE.parse(spec.node_id)
        last_seen = time.monotonic()
        while True:
            machine = await cloud.find(spec.cluster)
            if machine is not None:
                last_seen = time.monotonic()
                if machine.failure:
                    raise Rejected(
                        f"The machine of node {spec.node_id} cannot serve{_because(machine)}.", code=machine.failure
                    )
                if machine.status == MachineStatus.GONE:
                    raise Rejected(
                        f"The machine of node {spec.node_id} ended before it was up{_because(machine)}.",
                        code="machine_gone",
                    )
                if machine.is_order_lost:
                    log.info("node %s: ordering again, because %s", spec.node_id, machine.reason)
                    await self._order(await self._place(spec, cloud), cloud)
                elif machine.status == MachineStatus.RUNNING and (url := await self._endpoint(node_id, machine)):
                    endpoint = check_endpoint(url, is_loopback_allowed=self._is_loopback_allowed)
                    if machine.place is not None:
                        await self._nodes.settle(node_id, machine.place)
                    await self._nodes.advance(
                        node_id, NodeEvent.BOOT, "its machine runs; its engine is starting", endpoint=endpoint
                    )
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

    async def _order(self, spec: NodeSpec, cloud: Cloud) -> None:
        """Order the machine. Raises Rejected(code="tombstoned") when the node was undone before or meanwhile."""
        node_id = NODE.parse(spec.node_id)
        node = await self._nodes.get(node_id)
        try:
            if not node.is_tombstoned:
                await cloud.ensure(spec)
        finally:
            # An attempt may have slept through the node's undoing and ordered after it: it cleans up behind itself.
            node = await self._nodes.get(node_id)
            if node.is_tombstoned:
                await cloud.end(spec.cluster)
        if node.is_tombstoned:
            raise Rejected(f"Node {spec.node_id} is tombstoned: it is being undone.", code="tombstoned")

    async def _endpoint(self, node_id: UUID, machine: Machine) -> str:
        if machine.has_endpoints:
            return machine.endpoint
        return (await self._nodes.get(node_id)).endpoint or ""

    async def _place(self, spec: NodeSpec, cloud: Cloud) -> NodeSpec:
        """The spec with the places to try, best first; as it is where there is no choice.

        Raises Rejected (no_offer) when no connected cloud rents what is wanted where it is wanted.
        """
        if spec.places or not isinstance(cloud, Market) or self._catalog is None or self._placement is None:
            return spec
        region = (await self._catalog.load()).regions.regions[spec.region]
        gpus = tuple(Gpus.read(text) for text in (spec.gpus or [spec.gpu or CPU]))
        own = _own_places(region.aliases, gpus, spec)
        wish = Wish(gpus, frozenset(region.aliases), spec.spot, frozenset(spec.clouds), spec.zone)
        is_gpu_wanted = any(gpu.name != CPU for gpu in gpus)
        rented = rank(await cloud.offers(), wish, await self._placement.history()) if is_gpu_wanted else []
        if not is_gpu_wanted:
            rented = _plain_machines(region.aliases, await cloud.clouds(), spec)
        if not own and not rented:
            raise Rejected(
                f"No connected cloud rents {' or '.join(map(str, gpus))} for {spec.region}"
                f"{' as spot' if spec.spot else ''}: name other gpus, clouds or another region, or run `sky check`.",
                code="no_offer",
            )
        return replace(spec, places=[*own, *rented])

    def _cloud(self, provider: str) -> Cloud:
        cloud = self._clouds.get(provider)
        if cloud is None:
            # Not the order's fault: this worker was started without the settings of a cloud that has machines of ours.
            raise Unavailable(f"This worker has no cloud {provider!r}; it knows {', '.join(sorted(self._clouds))}.")
        return cloud


def _own_places(aliases: Sequence[str], gpus: Sequence[Gpus], spec: NodeSpec) -> list[Place]:
    """Clusters of our own in a region: its aliases of the form `slurm/NAME`, `kubernetes/NAME` or `ssh/NAME`."""
    own = [alias.partition("/") for alias in aliases if "/" in alias]
    return [
        Place(cloud, name, gpu=str(gpu), reason=f"{gpu} on machines of our own")
        for cloud, _, name in own
        if not spec.clouds or cloud in spec.clouds
        for gpu in gpus
    ]


# A cloud's regions have names that look like no other's.
_REGION_NAMES = {
    "aws": re.compile(r"[a-z]{2}(-[a-z]+)+-\d"),
    "gcp": re.compile(r"[a-z]+-[a-z]+\d+"),
    "azure": re.compile(r"[a-z]+\d?"),
}


def _plain_machines(aliases: Sequence[str], clouds: Sequence[str], spec: NodeSpec) -> list[Place]:
    """Machines without a GPU. Catalogs list prices of GPUs only, so the order is that of the clouds."""
    return [
        Place(cloud, alias, spec.zone, CPU, is_spot=spec.spot, reason="a machine without a GPU")
        for cloud in clouds
        if (not spec.clouds or cloud in spec.clouds) and cloud in _REGION_NAMES
        for alias in aliases
        if _REGION_NAMES[cloud].fullmatch(alias)
    ]


def _because(machine: Machine) -> str:
    return f" ({machine.reason})" if machine.reason else ""
