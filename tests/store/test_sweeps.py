from __future__ import annotations

import asyncpg
import pytest

from crosslogic.contracts.sweep import FleetSweepResult, SweepFinding
from crosslogic.domain.ids import NODE, SWEEP
from crosslogic.domain.node import Intent
from crosslogic.new_ids import new_id
from crosslogic.store.nodes import NodeStore
from crosslogic.store.sweeps import SweepStore


@pytest.fixture
def store(pool: asyncpg.Pool) -> SweepStore:
    return SweepStore(pool)


def swept(*findings: SweepFinding, provider: str = "", dry_run: bool = False) -> FleetSweepResult:
    return FleetSweepResult(
        sweep_id=SWEEP.show(new_id()),
        provider=provider,
        dry_run=dry_run,
        machines=5,
        created=0,
        owned=2,
        ending=1,
        destroyed=1,
        foreign=1,
        missing=0,
        unexplained=0,
        unasked=["far-away"],
        findings=list(findings),
    )


FOUND = SweepFinding("local", "cic-x", "orphan", "its node is over", NODE.show(new_id()), "ended")
FOREIGN = SweepFinding("local", "cic-y", "foreign", "another installation's", "", "left alone")


class TestSweepStore:
    async def test_keeps_a_sweep_with_its_findings(self, store: SweepStore) -> None:
        done = swept(FOUND, FOREIGN)
        assert await store.record(done) == done
        (row,) = await store.list_page()
        assert (row["id"], row["machines"], row["owned"], row["destroyed"]) == (SWEEP.parse(done.sweep_id), 5, 2, 1)
        assert row["unasked"] == ["far-away"]
        assert [(found["cluster"], found["standing"], found["outcome"]) for found in row["findings"]] == [
            ("cic-x", "orphan", "ended"),
            ("cic-y", "foreign", "left alone"),
        ]
        assert [found["node_id"] for found in row["findings"]] == [NODE.parse(FOUND.node_id), None]

    async def test_takes_one_once(self, store: SweepStore) -> None:
        """T4."""
        done = swept(FOUND)
        first = await store.record(done)
        assert await store.record(done) == first
        assert len(await store.list_page()) == 1

    async def test_counts_the_nodes_written_down_since_the_one_before(
        self, store: SweepStore, pool: asyncpg.Pool
    ) -> None:
        nodes = NodeStore(pool)
        for number in range(3):
            node_id = new_id()
            await nodes.intend(Intent(node_id, "llama-3-8b", "in-mumbai", "local", f"cic-{node_id}", "w"))
            if number < 2:
                continue
            await pool.execute("UPDATE nodes SET created_at = now() - interval '1 hour' WHERE id = $1", node_id)
        assert (await store.record(swept())).created == 3
        assert (await store.record(swept())).created == 0

    async def test_lists_newest_first_page_by_page(self, store: SweepStore) -> None:
        ids = [(await store.record(swept(*[FOUND] * (number % 2)))).sweep_id for number in range(4)]
        page = await store.list_page(limit=3)
        assert [SWEEP.show(row["id"]) for row in page] == ids[:0:-1]
        assert [SWEEP.show(row["id"]) for row in await store.list_page(before=page[-1]["id"])] == ids[:1]
        found = await store.list_page(with_findings_only=True)
        assert [SWEEP.show(row["id"]) for row in found] == [ids[3], ids[1]]

    async def test_knows_the_last_of_every_cloud(self, store: SweepStore) -> None:
        assert await store.find_last() is None
        done = await store.record(swept())
        await store.record(swept(provider="local"))
        await store.record(swept(dry_run=True))
        last = await store.find_last()
        assert last is not None
        assert SWEEP.show(last["id"]) == done.sweep_id

    async def test_forgets_what_found_nothing_after_a_month(self, store: SweepStore, pool: asyncpg.Pool) -> None:
        for findings in ((), (FOUND,)):
            await store.record(swept(*findings))
        await pool.execute("UPDATE sweeps SET ended_at = now() - interval '31 days'")
        await store.record(swept())
        kept = await store.list_page()
        assert [len(row["findings"]) for row in kept] == [0, 1]
