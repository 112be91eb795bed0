"""What a region's watch finds, with engines that fail in every way that nodes know; and what it leaves alone."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from activities.probes import ProbeActivities
from crosslogic.contracts import names
from crosslogic.contracts.node import Machine, NodeReading, RegionReport, RegionWatch
from crosslogic.domain.health import HealthPolicy, MachineStatus, RequestView
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, Node, NodeEvent, NodeState
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.hot.passive import PassiveBoard
from crosslogic.new_ids import new_id
from crosslogic.store.catalog import CatalogStore
from tests.workflows.fleet import EngineServer, FleetUnderTest
from workflows.steps import MOST_EVENTS

READY = (NodeEvent.LAUNCH, NodeEvent.BOOT, NodeEvent.LOAD, NodeEvent.ADMIT)


async def add_node(fleet: FleetUnderTest, **fields: Any) -> Node:
    """A node that serves, with a real engine, as if it had been provisioned."""
    node_id = new_id()
    shown = NODE.show(node_id)
    cluster = f"cic-local-{shown}"
    engine = EngineServer()
    await engine.start()
    fleet.cloud.engines[cluster] = engine
    fleet.cloud.machines[cluster] = Machine(cluster, MachineStatus.RUNNING, engine.endpoint)
    values: dict[str, Any] = {"model": "llama-3-8b", "region": "in-mumbai", "provider": "local", **fields}
    node = await fleet.nodes.intend(
        Intent(id=node_id, cluster=cluster, workflow_id=names.node_workflow_id(shown), drain_timeout_s=5, **values)
    )
    for event in READY:
        node = await fleet.nodes.advance(node_id, event, "made", endpoint=engine.endpoint)
    await fleet.board.publish(node.route_entry)
    return node


class Watcher:
    """The activity itself, without a workflow. Silence is far longer than any test unless it says otherwise."""

    def __init__(self, fleet: FleetUnderTest, silence_s: float = 60.0, **options: Any) -> None:
        self.fleet = fleet
        self.heartbeats = HeartbeatBoard(fleet.redis, fleet.settings.redis_prefix)
        self.passive = PassiveBoard(fleet.redis, fleet.settings.redis_prefix)
        values: dict[str, Any] = {"watch_s": 2.0, "cloud_interval_s": 0.3, "generation_timeout_s": 0.4} | options
        self.activities = ProbeActivities(
            fleet.fleet_engine,
            fleet.nodes,
            {"local": fleet.cloud},
            fleet.board,
            CatalogStore(fleet.pool),
            self.heartbeats,
            self.passive,
            policy=HealthPolicy.scaled(silence_s),
            probe_interval_s=0.2,
            generation_interval_s=0.2,
            **values,
        )
        self.known: dict[str, str] = {}

    async def watch(self) -> RegionReport:
        report = await self.activities.watch_region(RegionWatch("in-mumbai", self.known))
        self.known |= {reading.node_id: reading.verdict for reading in report.changed}
        return report

    async def until(self, node: Node, verdict: str, within_s: float = 20.0) -> NodeReading:
        """The reading in which a node is told to be in that state."""
        async with asyncio.timeout(within_s):
            while True:
                for reading in (await self.watch()).changed:
                    if (reading.node_id, reading.verdict) == (node.node_id, verdict):
                        return reading


class TestFinds:
    async def test_an_engine_that_accepts_and_never_speaks(self, idle_fleet: FleetUnderTest) -> None:
        """A half-open connection looks the same: nothing comes, and nothing ends."""
        node = await add_node(idle_fleet)
        idle_fleet.cloud.engines[node.cluster].is_mute = True
        await Watcher(idle_fleet).until(node, "suspect")

    async def test_an_engine_that_is_well_and_cannot_generate(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        idle_fleet.cloud.engines[node.cluster].can_generate = False
        reading = await Watcher(idle_fleet).until(node, "suspect")
        assert "answers but has generated nothing" in reading.reason

    async def test_what_requests_find_before_silence_is_long(self, idle_fleet: FleetUnderTest) -> None:
        """Death without notice: two sources agree within seconds, whatever the silence that one alone would need."""
        node = await add_node(idle_fleet)
        watcher = Watcher(idle_fleet, silence_s=3.0)
        idle_fleet.cloud.engines[node.cluster].stop()
        await watcher.passive.put("in-mumbai", "a", {node.node_id: RequestView(is_unreachable=True)})
        reading = await watcher.until(node, "broken", within_s=5)
        assert "requests fail there" in reading.reason

    async def test_a_machine_that_the_cloud_took(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        idle_fleet.cloud.take(node.cluster)
        await Watcher(idle_fleet).until(node, "lost")

    async def test_a_notice_in_a_heartbeat(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        watcher = Watcher(idle_fleet)
        await watcher.heartbeats.put(Heartbeat(node.node_id, time.time(), True, notice="azure: preempt"))
        assert "azure: preempt" in (await watcher.until(node, "interrupted")).reason

    async def test_an_ill_node_only_where_another_serves(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        watcher = Watcher(idle_fleet)
        slow = RequestView(answers=20, ttft_s=9.0, median_ttft_s=1.0)
        hot = Heartbeat(node.node_id, time.time(), True, gpu_temperature_c=95.0)
        await watcher.heartbeats.put(hot)
        await watcher.passive.put("in-mumbai", "a", {node.node_id: slow})
        assert "too few others" in (await watcher.until(node, "ailing")).reason
        await add_node(idle_fleet)
        await watcher.passive.put("in-mumbai", "a", {node.node_id: slow})
        assert "95 °C" in (await watcher.until(node, "ill")).reason


class TestLeavesAlone:
    @pytest.mark.parametrize("fault", ["full", "slow but at work"])
    async def test_what_is_overloaded(self, idle_fleet: FleetUnderTest, fault: str) -> None:
        node = await add_node(idle_fleet)
        engine = idle_fleet.cloud.engines[node.cluster]
        if fault == "full":
            engine.is_full = True
        else:
            engine.can_generate, engine.grows_by = False, 7
        watcher = Watcher(idle_fleet, silence_s=0.5)
        for _ in range(3):
            assert (await watcher.watch()).changed == []
        assert "/v1/chat/completions" in engine.requests

    async def test_what_its_agent_and_requests_speak_for(self, idle_fleet: FleetUnderTest) -> None:
        """It is us who cannot reach it."""
        node = await add_node(idle_fleet)
        idle_fleet.cloud.engines[node.cluster].stop()
        watcher = Watcher(idle_fleet, silence_s=30.0)
        await watcher.heartbeats.put(Heartbeat(node.node_id, time.time(), True))
        await watcher.until(node, "suspect")
        for _ in range(2):
            assert (await watcher.watch()).changed == []

    async def test_a_single_missed_poll(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        engine = idle_fleet.cloud.engines[node.cluster]
        watcher = Watcher(idle_fleet, watch_s=4.0)
        watching = asyncio.create_task(watcher.watch())
        await asyncio.sleep(0.5)
        # Only one request is refused: the engine mends itself while it answers.
        engine.refusals = 1
        assert (await watching).changed == []
        assert engine.refusals == 0

    async def test_a_fleet_that_it_cannot_hear_because_redis_is_away(self, idle_fleet: FleetUnderTest) -> None:
        await add_node(idle_fleet)
        watcher = Watcher(idle_fleet)
        idle_fleet.redis.connection_pool.connection_kwargs["port"] = 1
        await idle_fleet.redis.connection_pool.disconnect()
        report = await watcher.watch()
        assert (report.changed, len(report.present)) == ([], 1)


class TestFlapping:
    async def test_is_told_ever_more_seldom(self, idle_fleet: FleetUnderTest) -> None:
        node = await add_node(idle_fleet)
        engine = idle_fleet.cloud.engines[node.cluster]
        watcher = Watcher(idle_fleet, watch_s=0.5)
        told: list[str] = []

        async def flap() -> None:
            while True:
                engine.is_well = not engine.is_well
                await asyncio.sleep(1.0)

        flapping = asyncio.create_task(flap())
        until = time.monotonic() + 8
        while time.monotonic() < until:
            told += [reading.verdict for reading in (await watcher.watch()).changed]
        flapping.cancel()
        # Undamped it would be told with every flip, eight times.
        assert told == ["suspect"]


class TestReports:
    async def test_keep_what_is_known_of_the_others(self, idle_fleet: FleetUnderTest) -> None:
        """A report on one node must not restart the clock of another's silence."""
        silent, lost = await add_node(idle_fleet), await add_node(idle_fleet)
        watcher = Watcher(idle_fleet, silence_s=1.5)
        idle_fleet.cloud.engines[silent.cluster].stop()
        await watcher.until(silent, "suspect")
        idle_fleet.cloud.take(lost.cluster)
        await watcher.until(lost, "lost")
        await watcher.until(silent, "broken", within_s=8)

    async def test_of_two_watches_at_once_are_the_same(self, idle_fleet: FleetUnderTest) -> None:
        """A zombie: an attempt that Temporal has given up still runs beside the next one."""
        node = await add_node(idle_fleet)
        watcher = Watcher(idle_fleet)
        zombie = asyncio.create_task(watcher.activities.watch_region(RegionWatch("in-mumbai")))
        await asyncio.sleep(0.3)
        idle_fleet.cloud.take(node.cluster)
        await watcher.until(node, "lost")
        assert [reading.verdict for reading in (await zombie).changed] == ["lost"]

    async def test_come_again_while_it_lasts(self, idle_fleet: FleetUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
        """The nudge may have been lost."""
        monkeypatch.setattr("activities.watches.TELL_AGAIN_S", 0.5)
        node = await add_node(idle_fleet)
        idle_fleet.cloud.take(node.cluster)
        watcher = Watcher(idle_fleet)
        for _ in range(2):
            await watcher.until(node, "lost")


class TestStorm:
    @pytest.mark.chaos
    async def test_of_a_hundred_deaths_at_once(self, fleet: FleetUnderTest) -> None:
        """F1, F4, T3: each is found, ended and remembered once, and no history grows long."""
        # Nobody keeps this promise, so that the storm is all there is.
        await fleet.add_deployment("stormy")
        nodes = [await add_node(fleet, is_spot=True, deployment="stormy") for _ in range(100)]
        await fleet.adopt_all()
        watch = await fleet.watch()
        for node in nodes:
            fleet.cloud.take(node.cluster)

        async def all_lost() -> bool:
            await asyncio.sleep(0.5)
            return {node.state for node in await fleet.nodes.list_all()} == {NodeState.LOST}

        await fleet.until("all are lost", all_lost, within_s=400)
        assert (await watch.describe()).history_length < MOST_EVENTS + 1_000
        assert await fleet.pool.fetchval("SELECT count(*) FROM preemptions") == 100
        await fleet.check_books()

    async def test_of_silence_everywhere_is_taken_for_our_own(self, fleet: FleetUnderTest) -> None:
        """The cloud says that the machines run: it is us who are cut off, so nothing ends for a while."""
        nodes = [await add_node(fleet) for _ in range(3)]
        await fleet.adopt_all()
        await fleet.watch()
        for node in nodes:
            fleet.cloud.engines[node.cluster].is_well = False
        details = fleet.lifecycle(nodes[0])

        async def suspected() -> bool:
            return "perhaps we are cut off" in str(await details.query("__temporal_workflow_metadata"))

        await fleet.until("it suspects itself", suspected)
        for node in nodes:
            fleet.cloud.engines[node.cluster].is_well = True
        assert {node.state for node in await fleet.nodes.list_all()} == {NodeState.READY}
