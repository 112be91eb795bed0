"""Looking at nodes: is the engine up, can it generate, is it well, is it empty."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloud import Cloud, is_gone
from crosslogic.contracts.node import (
    JOINED,
    Machine,
    NodeLook,
    NodeReading,
    NodeSpec,
    RegionReport,
    RegionWatch,
)
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import HealthPolicy, MachineStatus, Signals, Verdict, judge
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Node, NodeEvent, NodeState, RouteEntry

if TYPE_CHECKING:
    from crosslogic.clients.engine import EngineClient
    from crosslogic.hot.routes import RouteBoard
    from crosslogic.store.nodes import NodeStore

log = logging.getLogger(__name__)

# Enough to time a generation; few enough that a slow engine has them in a second.
MEASURED_TOKENS = 24
# Enough to see an engine batch, few enough for one that answers four at a time.
MEASURED_AT_ONCE = 4
# A drained node is empty when it was empty this often in a row.
EMPTY_READINGS = 2
# API processes may start requests for this long after a node stopped being ready (F2): only then is empty empty.
ROUTES_CATCH_UP_S = 3.0
# A watch without news returns after this, so that its workflow's history tells that it is alive.
WATCH_S = 300.0
# Engines asked at the same time in one watch.
CONCURRENT_POLLS = 64


@dataclasses.dataclass
class _Memory:
    """What a watch remembers of one node."""

    answered_at: float
    failed_polls: int = 0


class ProbeActivities:
    """Asks engines and clouds about nodes. Nothing here changes a node but its way from booting to loading."""

    def __init__(
        self,
        engine: EngineClient,
        nodes: NodeStore,
        clouds: Mapping[str, Cloud],
        board: RouteBoard,
        *,
        policy: HealthPolicy,
        probe_interval_s: float,
        cloud_interval_s: float,
        watch_s: float = WATCH_S,
        poll_interval_s: float = 0.5,
        routes_catch_up_s: float = ROUTES_CATCH_UP_S,
    ) -> None:
        self._engine = engine
        self._nodes = nodes
        self._clouds = clouds
        self._board = board
        self._policy = policy
        self._probe_interval_s = probe_interval_s
        self._cloud_interval_s = cloud_interval_s
        self._watch_s = watch_s
        self._poll_interval_s = poll_interval_s
        self._routes_catch_up_s = routes_catch_up_s

    @activity.defn
    async def await_engine(self, spec: NodeSpec) -> None:
        """Return when the engine says that it is well. Raises Rejected when its machine is gone."""
        node_id = NODE.parse(spec.node_id)
        endpoint = _endpoint(await self._nodes.get(node_id))
        while True:
            try:
                await self._engine.check_health(spec.node_id, endpoint)
                break
            except (Unavailable, Rejected):
                await self._check_machine(spec, "its engine answered")
            await asyncio.sleep(self._poll_interval_s)
        await self._nodes.advance(node_id, NodeEvent.LOAD, "its engine answers; trying a generation")

    @activity.defn
    async def warm_engine(self, spec: NodeSpec) -> int:
        """Generate for real and return the engine's tokens/s with several answers at once; a first one warms caches.

        An engine that answers many at once gives each of them less, and all of them together far more than one alone.
        """
        endpoint = _endpoint(await self._nodes.get(NODE.parse(spec.node_id)))
        while True:
            try:
                await self._engine.generate(spec.node_id, endpoint, spec.model, spec.kind, 1)
                return await self._measure(spec, endpoint)
            except (Unavailable, Rejected) as error:
                log.info("node %s cannot generate yet: %s", spec.node_id, error.message)
                await self._check_machine(spec, "it generated a token")
            await asyncio.sleep(self._poll_interval_s)

    async def _measure(self, spec: NodeSpec, endpoint: str) -> int:
        began = asyncio.get_running_loop().time()
        generations = await asyncio.gather(
            *(
                self._engine.generate(spec.node_id, endpoint, spec.model, spec.kind, MEASURED_TOKENS)
                for _ in range(MEASURED_AT_ONCE)
            )
        )
        took_s = asyncio.get_running_loop().time() - began
        return max(1, round(sum(generation.tokens for generation in generations) / max(took_s, 1e-6)))

    @activity.defn
    async def look_at_node(self, look: NodeLook) -> NodeReading:
        """Poll the engine and, if it is silent, ask the cloud: what do they mean together?"""
        spec = look.spec
        node = await self._nodes.get(NODE.parse(spec.node_id))
        if node.is_tombstoned or node.state not in (NodeState.READY, NodeState.DRAINING):
            return NodeReading(spec.node_id, Verdict.BROKEN, f"it is {node.state} and was being undone")
        is_answering = await self._is_answering(node)
        machine = MachineStatus.UNKNOWN if is_answering else await self._ask_cloud(spec)
        failed_polls = 0 if is_answering else look.failed_polls + 1
        verdict, reason = judge(Signals(is_answering, look.silent_for_s, machine, failed_polls), self._policy)
        return NodeReading(spec.node_id, verdict, reason, min(self._probe_interval_s, self._policy.silence_s / 3))

    @activity.defn
    async def await_drained(self, spec: NodeSpec) -> str:
        """Return how the wait ended: when the engine is empty, when it is dead, or at the drain deadline (F6).

        An engine that does not tell what it is busy with gets the whole drain time.
        """
        node = await self._nodes.get(NODE.parse(spec.node_id))
        endpoint = _endpoint(node)
        # Of the first attempt: a worker that dies does not prolong the drain.
        started_at = activity.info().scheduled_time
        empty = silent = 0
        while (waited_s := (datetime.now(UTC) - started_at).total_seconds()) < spec.drain_timeout_s:
            try:
                load = await self._engine.read_load(spec.node_id, endpoint)
                silent = 0
                empty = empty + 1 if load is not None and load.total == 0 else 0
            except Unavailable:
                silent, empty = silent + 1, 0
            if waited_s >= self._routes_catch_up_s and empty >= EMPTY_READINGS:
                return "all its requests have ended"
            if silent >= self._policy.confirming_polls and is_gone(await self._find_machine(spec)):
                return "its machine is gone"
            await asyncio.sleep(self._poll_interval_s)
        return f"the drain time of {spec.drain_timeout_s} s is over"

    @activity.defn
    async def watch_region(self, watch: RegionWatch) -> RegionReport:
        """Poll the region's serving nodes until a verdict differs from the known one, or `WATCH_S` is over.

        Meanwhile it keeps the route board equal to Postgres, so that a Redis that lost its memory has it again within
        a probe interval.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._watch_s
        memories: dict[str, _Memory] = {}
        machines: dict[str, Machine] | None = None
        asked_cloud_at = float("-inf")
        while True:
            started = loop.time()
            alive = await self._nodes.list_alive(watch.region)
            serving = [node for node in alive if node.state in (NodeState.READY, NodeState.DRAINING)]
            await self._mend_board(watch.region, alive)
            if started - asked_cloud_at >= self._cloud_interval_s:
                machines, asked_cloud_at = await self._list_machines(serving), started
            changed = await self._poll_all(serving, memories, machines, watch.verdicts)
            if changed or loop.time() >= deadline:
                return RegionReport(changed, [node.node_id for node in serving])
            await asyncio.sleep(max(0.05, started + self._probe_interval_s - loop.time()))

    async def _poll_all(
        self,
        serving: Sequence[Node],
        memories: dict[str, _Memory],
        machines: dict[str, Machine] | None,
        known: Mapping[str, str],
    ) -> list[NodeReading]:
        gate = asyncio.Semaphore(CONCURRENT_POLLS)

        async def poll(node: Node) -> NodeReading | None:
            async with gate:
                is_answering = await self._is_answering(node)
            now = time.monotonic()
            memory = memories.setdefault(node.node_id, _Memory(now))
            if is_answering:
                memory.answered_at, memory.failed_polls = now, 0
            else:
                memory.failed_polls += 1
            machine = _status(node, machines)
            silent_for_s = now - memory.answered_at
            signals = Signals(is_answering, silent_for_s, machine, memory.failed_polls)
            verdict, reason = judge(signals, self._policy)
            if verdict == known.get(node.node_id, Verdict.HEALTHY):
                return None
            return NodeReading(node.node_id, verdict, reason)

        readings = await asyncio.gather(*(poll(node) for node in serving))
        return [reading for reading in readings if reading is not None]

    async def _mend_board(self, region: str, alive: Sequence[Node]) -> None:
        """Publish what the board lacks of a region, and take off it what has ended."""
        try:
            board = {entry.node_id: entry for entry in await self._board.read_all() if entry.region == region}
            for node in alive:
                shown = board.pop(node.node_id, None)
                is_on_board = shown is not None and shown.generation >= node.generation
                if node.state in (NodeState.READY, NodeState.DRAINING) and not is_on_board:
                    await self._board.publish(node.route_entry)
            if board:
                await self._take_off(board)
        except Unavailable as error:
            log.warning("the route board of %s cannot be mended now: %s", region, error.message)

    async def _take_off(self, leftovers: dict[str, RouteEntry]) -> None:
        rows = await self._nodes.find_many([NODE.parse(node_id) for node_id in leftovers])
        known = {node.node_id: node for node in rows}
        for node_id, entry in leftovers.items():
            node = known.get(node_id)
            if node is None:
                # Postgres has never had it, or was replaced: nothing may be routed there.
                log.warning("node %s is on the route board and not in Postgres: taking it off", node_id)
                gone = dataclasses.replace(entry, state=NodeState.LOST, generation=entry.generation + 1)
                await self._board.publish(gone)
            elif node.generation > entry.generation:
                await self._board.publish(node.route_entry)

    async def _list_machines(self, serving: Sequence[Node]) -> dict[str, Machine] | None:
        found: dict[str, Machine] = {}
        for provider in {node.provider for node in serving} - {JOINED}:
            cloud = self._clouds.get(provider)
            if cloud is None:
                return None
            try:
                found |= {machine.cluster: machine for machine in await cloud.list_all(f"cic-{provider}-")}
            except (Unavailable, Rejected) as error:
                log.warning("cloud %s cannot be asked now: %s", provider, error.message)
                return None
        return found

    async def _is_answering(self, node: Node) -> bool:
        try:
            await self._engine.check_health(node.node_id, _endpoint(node))
        except (Unavailable, Rejected):
            return False
        return True

    async def _ask_cloud(self, spec: NodeSpec) -> MachineStatus:
        try:
            machine = await self._find_machine(spec)
        except (Unavailable, Rejected):
            return MachineStatus.UNKNOWN
        return MachineStatus.GONE if machine is None else MachineStatus(machine.status)

    async def _find_machine(self, spec: NodeSpec) -> Machine | None:
        """The cloud's answer; for a node without a cloud a machine that is there."""
        cloud = self._clouds.get(spec.provider)
        if cloud is None:
            return Machine(spec.cluster, MachineStatus.UNKNOWN)
        return await cloud.find(spec.cluster)

    async def _check_machine(self, spec: NodeSpec, before: str) -> None:
        try:
            machine = await self._find_machine(spec)
        except Unavailable:
            return
        if is_gone(machine):
            raise Rejected(f"The machine of node {spec.node_id} ended before {before}.", code="machine_gone")


def _endpoint(node: Node) -> str:
    if not node.endpoint:
        raise Rejected(f"Node {node.node_id} has no endpoint.", code="no_endpoint")
    return node.endpoint


def _status(node: Node, machines: dict[str, Machine] | None) -> MachineStatus:
    if machines is None or node.provider == JOINED:
        return MachineStatus.UNKNOWN
    machine = machines.get(node.cluster)
    return MachineStatus.GONE if machine is None else MachineStatus(machine.status)
