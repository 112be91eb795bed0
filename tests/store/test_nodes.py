from __future__ import annotations

import itertools
from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest

from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE
from crosslogic.domain.lead_time import Phase
from crosslogic.domain.node import FINAL_STATES, TRANSITIONS, Intent, NodeEvent, NodeState, advance
from crosslogic.new_ids import new_id
from crosslogic.store.lead_times import LeadTimeStore
from crosslogic.store.nodes import LEADING_OUT, NodeStore


@pytest.fixture
def store(pool: asyncpg.Pool) -> NodeStore:
    return NodeStore(pool)


def intent(**values: object) -> Intent:
    node_id = new_id()
    wanted = Intent(node_id, "llama-3-8b", "in-mumbai", "local", f"cic-{node_id}", f"provision/{node_id}")
    return replace(wanted, **values)  # pyright: ignore[reportArgumentType]


PATHS: dict[NodeState, tuple[NodeEvent, ...]] = {NodeState.REQUESTED: ()}
for _ in NodeState:
    for state, event in itertools.product(list(PATHS), NodeEvent):
        if event in TRANSITIONS[state]:
            PATHS.setdefault(advance(state, event), (*PATHS[state], event))


async def bring(store: NodeStore, to: NodeState, wanted: Intent | None = None) -> UUID:
    wanted = wanted or intent()
    await store.intend(wanted)
    for event in PATHS[to]:
        await store.advance(wanted.id, event, f"to {to}", endpoint="https://10.0.0.1")
    return wanted.id


class TestPrice:
    async def test_makes_a_new_generation_once_and_reaches_the_route_entry(
        self, store: NodeStore, pool: asyncpg.Pool
    ) -> None:
        node_id = await bring(store, NodeState.READY)
        before = await store.get(node_id)
        assert before.route_entry.price_microdollars_per_h == 0
        priced = await store.set_price(node_id, 350_000, actor="test")
        assert priced.route_entry.price_microdollars_per_h == 350_000
        assert (priced.generation, priced.state) == (before.generation + 1, NodeState.READY)
        assert await store.set_price(node_id, 350_000, actor="test") == priced
        assert await pool.fetchval("SELECT count(*) FROM audit_log WHERE action = 'node.set_price'") == 1

    async def test_of_a_node_that_is_not_there(self, store: NodeStore) -> None:
        with pytest.raises(Rejected, match="There is no node"):
            await store.set_price(new_id(), 1, actor="test")


class TestPhases:
    async def test_are_timed_where_the_state_moves_on(self, store: NodeStore, pool: asyncpg.Pool) -> None:
        wanted = intent(gpu="L4")
        await bring(store, NodeState.BOOTING, wanted)
        # Half a minute and half a minute ago: prices and tombstones in between do not count as a beginning.
        await pool.execute("UPDATE nodes SET created_at = created_at - interval '60 seconds'")
        await pool.execute("UPDATE node_phases SET seconds = 40")
        await store.set_price(wanted.id, 5, actor="test")
        await store.advance(wanted.id, NodeEvent.LOAD, "", endpoint="https://10.0.0.1")
        await store.advance(wanted.id, NodeEvent.ADMIT, "")
        await store.advance(wanted.id, NodeEvent.ADMIT, "")
        rows = await pool.fetch("SELECT phase, round(seconds) AS s, cloud, gpu, model, region FROM node_phases")
        assert {tuple(row) for row in rows} == {
            (phase, seconds, "local", "L4", "llama-3-8b", "in-mumbai")
            for phase, seconds in (("provision", 40), ("boot", 20), ("load", 0))
        }

    async def test_of_a_node_that_failed_or_joined_are_not_kept(self, store: NodeStore, pool: asyncpg.Pool) -> None:
        await bring(store, NodeState.FAILED)
        await bring(store, NodeState.READY, intent(provider="joined"))
        assert await pool.fetchval("SELECT count(*) FROM node_phases") == 0

    async def test_teach_lead_times(self, store: NodeStore, pool: asyncpg.Pool) -> None:
        for _ in range(5):
            await bring(store, NodeState.READY)
        await pool.execute("UPDATE node_phases SET seconds = 7")
        times = LeadTimeStore(pool)
        eta = (await times.load()).eta(cloud="local", gpu="", model="llama-3-8b")
        assert (eta.p50_s, eta.samples, eta.basis) == (21, 5, "cloud, gpu, model")
        (coming,) = [await bring(store, NodeState.LOADING)]
        assert set((await times.ended_phases([coming]))[coming]) == {Phase.PROVISION, Phase.BOOT}
        assert [node.id for node in await store.list_on_the_way()] == [coming]
        await pool.execute("UPDATE node_phases SET at = at - interval '91 days'")
        await times.prune()
        assert await pool.fetchval("SELECT count(*) FROM node_phases") == 0


class TestIntend:
    async def test_twice_is_once(self, store: NodeStore) -> None:
        wanted = intent()
        first = await store.intend(wanted)
        assert await store.intend(wanted) == first
        assert (first.state, first.generation, first.is_tombstoned) == (NodeState.REQUESTED, 1, False)

    async def test_never_brings_a_node_back(self, store: NodeStore) -> None:
        """F4."""
        wanted = intent()
        await bring(store, NodeState.FAILED, wanted)
        assert (await store.intend(wanted)).state is NodeState.FAILED

    @pytest.mark.parametrize("values", [{"model": "gone"}, {"region": "mars"}, {"deployment": "gone"}])
    async def test_says_what_is_not_there(self, store: NodeStore, values: dict[str, str]) -> None:
        with pytest.raises(Rejected, match="not there any more"):
            await store.intend(intent(**values))

    async def test_gives_a_machine_to_one_node(self, store: NodeStore) -> None:
        wanted = intent()
        await store.intend(wanted)
        with pytest.raises(Rejected, match="has the machine"):
            await store.intend(replace(wanted, id=new_id()))


EVERY = list(itertools.product(NodeState, NodeEvent))


def target_of(event: NodeEvent) -> NodeState:
    return next(ways[event] for ways in TRANSITIONS.values() if event in ways)


class TestAdvance:
    async def test_follows_the_machine_for_every_state_and_event(self, store: NodeStore) -> None:
        for state, event in EVERY:
            node_id = await bring(store, state)
            before = await store.get(node_id)
            target = target_of(event)
            if event in TRANSITIONS[state]:
                after = await store.advance(node_id, event, "because", endpoint="https://10.0.0.2")
                assert (after.state, after.generation, after.reason) == (target, before.generation + 1, "because")
                assert (after.ended_at is not None) == (target in FINAL_STATES)
                assert (after.ready_at is not None) == (before.ready_at is not None or target is NodeState.READY)
            elif state is target:
                # Its effect is there already: success, and nothing changes (T4).
                assert await store.advance(node_id, event, "again") == before
            else:
                with pytest.raises(InvariantViolated):
                    await store.advance(node_id, event, "no")
                assert await store.get(node_id) == before

    async def test_leads_a_tombstoned_node_out_only(self, store: NodeStore) -> None:
        for state, event in EVERY:
            if state in FINAL_STATES or state is target_of(event):
                continue
            wanted = intent()
            await bring(store, state, wanted)
            tombstoned = await store.tombstone(wanted, "undone")
            if event not in LEADING_OUT:
                with pytest.raises(Rejected, match="tombstoned"):
                    await store.advance(wanted.id, event, "no")
                assert await store.get(wanted.id) == tombstoned
            elif event in TRANSITIONS[state]:
                assert (await store.advance(wanted.id, event, "out")).state is target_of(event)

    async def test_of_an_unknown_node_is_refused(self, store: NodeStore) -> None:
        with pytest.raises(Rejected, match="There is no node"):
            await store.advance(new_id(), NodeEvent.LAUNCH, "x")


class TestTombstone:
    async def test_is_permanent_and_once(self, store: NodeStore) -> None:
        wanted = intent()
        await bring(store, NodeState.LOADING, wanted)
        first = await store.tombstone(wanted, "first")
        assert await store.tombstone(wanted, "second") == first
        assert first.reason == "first"

    async def test_stands_without_a_row(self, store: NodeStore) -> None:
        wanted = intent()
        assert (await store.tombstone(wanted, "before its intent")).is_tombstoned
        assert (await store.intend(wanted)).is_tombstoned


class TestReadings:
    async def test_route_entries_are_of_nodes_that_have_not_ended(self, store: NodeStore) -> None:
        for state in NodeState:
            await bring(store, state)
        entries = await store.route_entries()
        assert {entry.state for entry in entries} == set(NodeState) - FINAL_STATES
        assert [entry.state for entry in entries if entry.is_routable] == [NodeState.READY]

    async def test_replicas_are_newest_first_with_recent_ends(self, store: NodeStore, pool: asyncpg.Pool) -> None:
        await pool.execute("INSERT INTO deployments (name, model) VALUES ('d', 'llama-3-8b')")
        ids = [
            await bring(store, state, intent(deployment="d"))
            for state in (NodeState.FAILED, NodeState.READY, NodeState.LOST)
        ]
        await bring(store, NodeState.READY)
        old = await bring(store, NodeState.FAILED, intent(deployment="d"))
        await pool.execute("UPDATE nodes SET ended_at = now() - interval '1 hour' WHERE id = $1", old)
        found = await store.list_replicas("d", 600.0)
        assert [replica.node_id for replica in found] == [NODE.show(node_id) for node_id in reversed(ids)]
        assert all(0 <= replica.ended_for_s < 60 for replica in found)

    async def test_every_change_moves_the_counter_that_processes_poll(
        self, store: NodeStore, pool: asyncpg.Pool
    ) -> None:
        async def seq() -> int:
            return await pool.fetchval("SELECT seq FROM change_counters WHERE noun = 'nodes'")

        before = await seq()
        await bring(store, NodeState.READY)
        assert await seq() >= before + 5
