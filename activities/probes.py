"""Looking at nodes: is the engine up, can it generate, is it well, is it empty."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloud import Cloud, is_gone
from activities.watches import Poll, RegionMemory
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
from crosslogic.domain.health import (
    SEVERITY,
    Course,
    HealthPolicy,
    MachineStatus,
    RequestView,
    Signals,
    Verdict,
    combine,
    judge,
)
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Node, NodeEvent, NodeState, RouteEntry

if TYPE_CHECKING:
    from crosslogic.clients.engine import EngineClient
    from crosslogic.hot.heartbeats import HeartbeatBoard
    from crosslogic.hot.passive import PassiveBoard
    from crosslogic.hot.routes import RouteBoard
    from crosslogic.store.catalog import CatalogStore
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
# Engines asked at the same time in one watch. Dead ones keep their place until the poll times out, and must not hold
# up the others.
CONCURRENT_POLLS = 400
# A watch looks at what was heard of its nodes this often.
TICK_S = 1.0
# Told in one report; the rest follows with the next one. A storm must not fill a history (T3).
MOST_CHANGES = 200
# Other nodes that are asked whether they answer, before a silent one is given up.
PEERS_ASKED = 3
# How long an engine that missed a generation is given to show that it generates for others.
PROGRESS_S = 2.0
# Once time alone decides nothing any more, a suspect is looked at this often.
SLOW_LOOK_S = 60.0


class ProbeActivities:
    """Asks engines and clouds about nodes. Nothing here changes a node but its way from booting to loading."""

    def __init__(
        self,
        engine: EngineClient,
        nodes: NodeStore,
        clouds: Mapping[str, Cloud],
        board: RouteBoard,
        catalog: CatalogStore,
        heartbeats: HeartbeatBoard,
        passive: PassiveBoard,
        *,
        policy: HealthPolicy,
        probe_interval_s: float,
        cloud_interval_s: float,
        generation_interval_s: float,
        generation_timeout_s: float,
        watch_s: float = WATCH_S,
        poll_interval_s: float = 0.5,
        routes_catch_up_s: float = ROUTES_CATCH_UP_S,
    ) -> None:
        self._engine = engine
        self._nodes = nodes
        self._clouds = clouds
        self._board = board
        self._catalog = catalog
        self._heartbeats = heartbeats
        self._passive = passive
        self._policy = policy
        self._probe_interval_s = probe_interval_s
        self._cloud_interval_s = cloud_interval_s
        self._generation_interval_s = generation_interval_s
        self._generation_timeout_s = generation_timeout_s
        # Kept from one watch of a region to the next: a report must not cost the memory of all other nodes.
        self._regions: dict[str, RegionMemory] = {}
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
        """Have the engine generate, and ask whoever else knows of the node if it does not: what do they mean together?

        A notice is believed at once: it leaves no time for looking (F9).
        """
        spec = look.spec
        node = await self._nodes.get(NODE.parse(spec.node_id))
        if node.is_tombstoned or node.state not in (NodeState.READY, NodeState.DRAINING):
            return NodeReading(spec.node_id, Verdict.BROKEN, f"it is {node.state} and was being undone")
        heartbeat = (await self._read_heartbeats([spec.node_id])).get(spec.node_id)
        if heartbeat is not None and heartbeat.notice:
            poll = Poll(is_answering=True)
        else:
            poll = await self._poll(node, spec.kind, has_to_generate=True)
        signals = await self._gather(look, node, poll, heartbeat)
        judgement = judge(signals, self._policy)
        if judgement.verdict is Verdict.BROKEN:
            signals = dataclasses.replace(signals, do_peers_answer=await self._do_peers_answer(node))
            judgement = judge(signals, self._policy)
        soon_s = min(self._probe_interval_s, self._policy.silence_s / 3)
        return NodeReading(
            spec.node_id,
            judgement.verdict,
            judgement.reason,
            soon_s if look.silent_for_s < self._policy.cut_off_s else max(soon_s, SLOW_LOOK_S),
            is_mute=poll.is_answering,
        )

    async def _gather(self, look: NodeLook, node: Node, poll: Poll, heartbeat: Heartbeat | None) -> Signals:
        views = (await self._read_views(node.region)).get(node.node_id, [])
        word = None
        later = (await self._read_heartbeats([node.node_id])).get(node.node_id)
        if heartbeat is not None and later is not None:
            # Two heartbeats, from before the poll and after it, tell that tokens come, never that none do.
            has_grown = later.completion_tokens > heartbeat.completion_tokens
            word = dataclasses.replace(
                Course(self._policy).word(later, time.time()), tokens_ago_s=0.0 if has_grown else None
            )
        is_well = poll.is_answering and poll.has_generated is not False
        return Signals(
            is_answering=poll.is_answering,
            silent_for_s=0.0 if is_well else look.silent_for_s,
            machine=MachineStatus.UNKNOWN if poll.is_answering else await self._ask_cloud(look.spec),
            failed_polls=0 if poll.is_answering else look.failed_polls + 1,
            failed_generations=look.failed_generations + 1 if poll.is_answering and not is_well else 0,
            is_busy=poll.is_busy,
            agent=word,
            requests=combine(views),
        )

    async def _do_peers_answer(self, node: Node) -> bool | None:
        """Does any of some other nodes answer us? None: there are none."""
        others = [other for other in await self._nodes.list_alive() if other.state is NodeState.READY]
        others = [other for other in others if other.id != node.id and other.endpoint]
        if not others:
            return None
        # Spread over all: their ids sort by age, and nodes of one age may share a fate.
        step = max(1, len(others) // PEERS_ASKED)
        asked = others[::step][:PEERS_ASKED]
        return any(await asyncio.gather(*(self._is_answering(other) for other in asked)))

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
        """Watch the region's serving nodes until a verdict differs from the known one, or `WATCH_S` is over.

        Engines are polled one by one, each in its turn; what agents and requests say is read every second. Meanwhile
        the watch keeps the route board equal to Postgres, so that a Redis that lost its memory has it again within a
        probe interval.
        """
        loop = asyncio.get_running_loop()
        # Taken away while it is used: an attempt that was given up may still run here beside the one that follows it.
        memory = self._regions.pop(watch.region, None)
        if memory is None or memory.is_stale(loop.time()):
            memory = RegionMemory(self._policy, self._probe_interval_s, self._generation_interval_s)
        polls: set[asyncio.Task[None]] = set()
        try:
            return await self._watch(watch, memory, polls)
        finally:
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
            memory.give_up()
            self._regions[watch.region] = memory

    async def _watch(self, watch: RegionWatch, memory: RegionMemory, polls: set[asyncio.Task[None]]) -> RegionReport:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._watch_s
        tick_s = min(TICK_S, self._probe_interval_s)
        gate = asyncio.Semaphore(CONCURRENT_POLLS)
        read_at = asked_cloud_at = float("-inf")
        kinds = {name: model.kind for name, model in (await self._catalog.load()).models.items()}
        machines: dict[str, Machine] | None = None
        serving: dict[str, Node] = {}

        async def poll(node: Node, has_to_generate: bool, is_heard_of: bool) -> None:
            async with gate:
                outcome = await self._poll(node, kinds.get(node.model, "chat"), has_to_generate=has_to_generate)
            memory.take(node.node_id, outcome, loop.time(), is_heard_of=is_heard_of)

        while True:
            now = loop.time()
            if now - read_at >= self._probe_interval_s:
                read_at = now
                alive = await self._nodes.list_alive(watch.region)
                serving = {node.node_id: node for node in alive if node.state in (NodeState.READY, NodeState.DRAINING)}
                await self._mend_board(watch.region, alive)
            memory.keep(serving, now)
            if now - asked_cloud_at >= self._cloud_interval_s:
                machines, asked_cloud_at = await self._list_machines(list(serving.values())), now
            heartbeats = await self._read_heartbeats(serving)
            views = await self._read_views(watch.region)
            memory.hear(heartbeats)
            wall = time.time()
            for node_id, node in serving.items():
                seen, heartbeat = views.get(node_id, []), heartbeats.get(node_id)
                is_heard_of = heartbeat is not None and wall - heartbeat.received_at < self._policy.silence_s
                is_accused = any(view.failures_in_a_row or view.is_unreachable for view in seen) or (
                    heartbeat is not None and not (is_heard_of and heartbeat.is_engine_up)
                )
                has_to_generate = memory.due(node_id, now, is_accused=is_accused)
                if has_to_generate is not None:
                    memory.start(node_id)
                    task = asyncio.create_task(poll(node, has_to_generate, is_heard_of))
                    polls.add(task)
                    task.add_done_callback(polls.discard)
                memory.judge(node, seen, heartbeat, machines, now, wall)
            changed = _changes(serving, memory, watch.verdicts, now)
            if changed or loop.time() >= deadline:
                return RegionReport(changed, list(serving))
            await asyncio.sleep(max(0.05, now + tick_s - loop.time()))

    async def _poll(self, node: Node, kind: str, *, has_to_generate: bool) -> Poll:
        """Ask an engine for a sign of life, or for one token: one that cannot generate may say that it is well."""
        if not has_to_generate:
            return Poll(await self._is_answering(node))
        try:
            generation = await self._engine.generate(
                node.node_id, _endpoint(node), node.model, kind, 1, self._generation_timeout_s
            )
            return Poll(True, True, took_s=generation.duration_s)
        except Rejected:
            pass
        except Unavailable as error:
            if error.code == "engine_busy":
                return Poll(True, False, is_busy=True)
        if not await self._is_answering(node):
            return Poll(False)
        return Poll(True, False, is_busy=await self._is_generating(node))

    async def _is_generating(self, node: Node) -> bool:
        """Is the engine at work for others? Then it is not broken but busy."""
        before = await self._read_progress(node)
        if before is None:
            return False
        await asyncio.sleep(PROGRESS_S)
        after = await self._read_progress(node)
        return after is not None and after > before

    async def _read_progress(self, node: Node) -> float | None:
        try:
            load = await self._engine.read_load(node.node_id, _endpoint(node))
        except Unavailable:
            return None
        return None if load is None else load.progress

    async def _read_heartbeats(self, node_ids: Collection[str]) -> dict[str, Heartbeat]:
        """What agents say; nothing while Redis is away, which makes no agent silent."""
        try:
            return await self._heartbeats.read_many(list(node_ids))
        except Unavailable as error:
            log.warning("heartbeats cannot be read now: %s", error.message)
            return {}

    async def _read_views(self, region: str) -> dict[str, list[RequestView]]:
        """What API processes say of the region's nodes; nothing while Redis is away."""
        try:
            return await self._passive.read(region)
        except Unavailable as error:
            log.warning("what requests say of nodes cannot be read now: %s", error.message)
            return {}

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


def _changes(
    serving: Mapping[str, Node], memory: RegionMemory, known: Mapping[str, str], now: float
) -> list[NodeReading]:
    """What there is to tell, the worst first. An ill node is taken out only where another one serves its model well."""
    spared: dict[str, int] = {}
    for node_id, node in serving.items():
        if node.state is NodeState.READY:
            verdict = memory.verdict_of(node_id)
            # As many may leave as healthy ones stay.
            gain = 1 if verdict is Verdict.HEALTHY else -1 if known.get(node_id) == Verdict.ILL else 0
            spared[node.model] = spared.get(node.model, 0) + gain
    changed: list[NodeReading] = []
    for node_id, node in serving.items():
        is_known_ill = known.get(node_id) == Verdict.ILL
        may_be_ill = is_known_ill or spared.get(node.model, 0) > 0
        judgement = memory.settle(node_id, known.get(node_id, Verdict.HEALTHY), now, may_be_ill=may_be_ill)
        if judgement is not None:
            if judgement.verdict is Verdict.ILL and not is_known_ill:
                spared[node.model] -= 1
            changed.append(NodeReading(node_id, judgement.verdict, judgement.reason))
    changed.sort(key=lambda reading: -SEVERITY[Verdict(reading.verdict)])
    return changed[:MOST_CHANGES]
