from __future__ import annotations

from dataclasses import replace

import asyncpg
import pytest

from crosslogic.domain.autoscaling import NodeKind, RegionPlan
from crosslogic.store.scaling import REPEAT_S, ScalingStore

PLAN = RegionPlan("in-mumbai", 2, "2 of 2 replicas present", 10.0, present=2, serving=2, needed=1)


@pytest.fixture
def store(pool: asyncpg.Pool) -> ScalingStore:
    return ScalingStore(pool)


class TestDecisions:
    async def test_are_kept_when_something_is_done_or_has_changed(self, store: ScalingStore) -> None:
        grown = replace(PLAN, desired=3, orders=(NodeKind(),))
        for plan in (PLAN, PLAN, grown, grown, PLAN, replace(PLAN, needed=None)):
            await store.record("chat", plan)
        await store.record("chat", replace(PLAN, region="us-east"))
        kept = await store.list_decisions("chat", region="in-mumbai")
        assert [(one.desired, one.ordered, one.needed) for one in reversed(kept)] == [
            (2, 0, 1), (3, 1, 1), (3, 1, 1), (2, 0, 1), (2, 0, None),
        ]  # fmt: skip
        assert len(await store.list_decisions("chat")) == 6
        assert len(await store.list_decisions("chat", limit=2)) == 2
        assert [(one.region, one.needed) for one in await store.latest()] == [("in-mumbai", None), ("us-east", 1)]

    async def test_give_a_sign_of_life_and_are_forgotten(self, store: ScalingStore, pool: asyncpg.Pool) -> None:
        await store.record("chat", PLAN)
        await pool.execute("UPDATE scaling_decisions SET at = at - make_interval(secs => $1)", REPEAT_S + 1.0)
        await store.record("chat", PLAN)
        assert len(await store.list_decisions("chat")) == 2
        await pool.execute("UPDATE scaling_decisions SET at = at - interval '7 days'")
        await store.record("other", PLAN)
        assert await store.list_decisions("chat") == []
