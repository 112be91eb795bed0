from __future__ import annotations

from uuid import UUID

import asyncpg
import pytest

from crosslogic.domain.node import Intent, NodeEvent
from crosslogic.domain.spot import Place, hazards
from crosslogic.new_ids import new_id
from crosslogic.store.nodes import NodeStore
from crosslogic.store.preemptions import PreemptionStore

READY = (NodeEvent.LAUNCH, NodeEvent.BOOT, NodeEvent.LOAD, NodeEvent.ADMIT)
HERE = Place("skypilot", "", "L4")


@pytest.fixture
def store(pool: asyncpg.Pool) -> PreemptionStore:
    return PreemptionStore(pool)


async def served(pool: asyncpg.Pool, hours: float, *, is_spot: bool = True) -> UUID:
    """A node that came to serve so long ago."""
    nodes, node_id = NodeStore(pool), new_id()
    await nodes.intend(
        Intent(node_id, "llama-3-8b", "us-east", "skypilot", f"cic-{node_id}", "w", gpu="L4", is_spot=is_spot)
    )
    for event in READY:
        await nodes.advance(node_id, event, "made", endpoint="https://a.example")
    await pool.execute(
        "UPDATE nodes SET ready_at = now() - make_interval(secs => $2) WHERE id = $1", node_id, hours * 3600
    )
    return node_id


class TestRecord:
    async def test_is_once_per_node_and_a_late_notice_adds_itself(
        self, store: PreemptionStore, pool: asyncpg.Pool
    ) -> None:
        """T4."""
        node_id = await served(pool, 2.0)
        for had_notice in (False, True, False):
            await store.record(node_id, had_notice=had_notice)
        (found,) = await store.list_recent(30)
        assert (found.place, found.region, found.had_notice) == (HERE, "us-east", True)
        assert found.lived_s == pytest.approx(7200, abs=60)

    async def test_of_what_is_no_spot_machine_is_nothing(self, store: PreemptionStore, pool: asyncpg.Pool) -> None:
        await store.record(await served(pool, 1.0, is_spot=False), had_notice=True)
        await store.record(new_id(), had_notice=True)
        assert await store.list_recent(30) == []


class TestExposure:
    async def test_is_the_time_that_spot_machines_served_within_the_window(
        self, store: PreemptionStore, pool: asyncpg.Pool
    ) -> None:
        await served(pool, 2.0)
        await served(pool, 48.0)
        await served(pool, 5.0, is_spot=False)
        ended = await served(pool, 10.0)
        nodes = NodeStore(pool)
        for event in (NodeEvent.DRAIN, NodeEvent.LOSE):
            await nodes.advance(ended, event, "taken")
        assert await store.exposure_hours(1) == {HERE: pytest.approx(2.0 + 24.0 + 10.0, abs=0.1)}
        assert await store.exposure_hours(30) == {HERE: pytest.approx(2.0 + 48.0 + 10.0, abs=0.1)}

    async def test_and_history_make_hazards(self, store: PreemptionStore, pool: asyncpg.Pool) -> None:
        await store.record(await served(pool, 100.0), had_notice=True)
        (hazard,) = hazards(await store.list_recent(30), await store.exposure_hours(30))
        assert (hazard.place, hazard.preemptions) == (HERE, 1)
        assert 0.01 < hazard.per_hour < 0.05
