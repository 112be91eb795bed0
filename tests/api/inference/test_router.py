"""The route table and its pools: who is eligible, who is left out and comes back, and how requests spread (F2, F4)."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from api.inference.router import TRIAL_S, UNREACHABLE_AFTER, Node, Pool, RouteTable
from api.inference.upstream import FailureKind
from crosslogic.domain.affinity import prefix_blocks
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import NodeState, RouteEntry
from crosslogic.domain.scheduling import Choice, Rules
from tests.api.inference.conftest import MakeApi
from tests.engines import Engine

CAPACITY = 1000
RULES = Rules(full_load_s=30.0, slow_start_s=30.0, ejected_share=0.5)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def entry_of(number: int, **fields: Any) -> RouteEntry:
    """A ready node of the pool (m, r)."""
    given: dict[str, Any] = {
        "node_id": NODE.show(uuid7(1, number)),
        "generation": 1,
        "state": NodeState.READY,
        "model": "m",
        "region": "r",
        "endpoint": f"http://127.0.0.1:{10_000 + number}",
        "deployment": "d",
        "capacity_tokens_per_s": CAPACITY,
        **fields,
    }
    return RouteEntry(**given)


class World:
    """A table, its clock and its one pool."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.clock = Clock()
        self.table = RouteTable(lambda _: "credential", None, rules, self.clock)

    def fill(self, count: int, strategy: str = "least-load", **fields: Any) -> list[Node]:
        """A full reading of so many ready nodes; the nodes in order."""
        self.table.set_strategies({"d": strategy})
        self.table.replace([entry_of(number, **fields) for number in range(count)])
        return self.nodes

    @property
    def nodes(self) -> list[Node]:
        return sorted(self.table.nodes, key=lambda node: node.shown_id)

    @property
    def pool(self) -> Pool:
        pool = self.table.pool("m", "r")
        assert pool is not None
        return pool

    @property
    def now(self) -> float:
        return self.clock.now

    def choose(self, *tried: Node, blocks: tuple[int, ...] = ()) -> Choice[Node]:
        choice = self.table.choose(self.pool, tried, blocks)
        assert choice is not None
        return choice

    def serve(self, count: int, tokens: int = 1000) -> Counter[Node]:
        """So many requests that stay in flight: who got how many."""
        counts: Counter[Node] = Counter()
        for _ in range(count):
            node = self.choose().node
            node.take(tokens)
            counts[node] += 1
        return counts

    def eject(self, node: Node) -> None:
        assert node.failed(FailureKind.RESET, self.now)


@pytest.fixture
async def world() -> World:
    """A table on a clock that the test moves."""
    return World()


class TestPool:
    async def test_is_the_same_object_for_ever(self, world: World) -> None:
        assert world.table.pool("m", "r") is None
        world.fill(2)
        pool = world.pool
        world.table.replace([])
        world.fill(3, generation=2)
        assert world.pool is pool
        assert (pool.routable_count, len(pool.nodes), pool.had_nodes) == (3, 3, True)

    async def test_is_known_before_its_first_node_is_ready(self, world: World) -> None:
        world.table.apply(entry_of(0, state=NodeState.BOOTING))
        assert (world.pool.had_nodes, world.pool.lost_at, world.pool.on_the_way) == (False, None, 1)
        assert world.table.choose(world.pool) is None
        assert world.table.is_any_on_the_way("m", ["q", "r"])
        assert not world.table.is_any_routable("m", ["q", "r"])
        world.table.apply(entry_of(0, generation=2))
        assert (world.pool.had_nodes, world.pool.on_the_way, world.pool.routable_count) == (True, 0, 1)
        assert world.table.regions_of("m") == ["r"]

    async def test_sums_tokens_in_flight_as_nodes_take_and_leave(self, world: World) -> None:
        first, second = world.fill(2)
        first.take(700)
        second.take(50)
        assert world.pool.tokens_in_flight == 750
        world.table.apply(entry_of(0, generation=2, state=NodeState.DRAINING))
        assert world.pool.tokens_in_flight == 50
        first.give_back(700)
        second.give_back(50)
        assert (world.pool.tokens_in_flight, first.tokens_in_flight, second.requests_in_flight) == (0, 0, 0)

    async def test_what_an_ejected_node_has_in_flight_comes_back_with_it(self, world: World) -> None:
        first, second = world.fill(2)
        first.take(700)
        second.take(50)
        world.eject(first)
        assert world.pool.tokens_in_flight == 50
        first.take(1)
        first.give_back(701)
        first.take(300)
        world.clock.now += 2
        first.succeeded(world.now)
        assert world.pool.tokens_in_flight == 350

    async def test_holds_what_its_nodes_do_in_the_time_of_a_full_load(self, world: World) -> None:
        first, _ = world.fill(2)
        assert world.pool.capacity_tokens == 2 * CAPACITY * 30
        first.failed(FailureKind.BUSY, world.now)
        assert world.pool.capacity_tokens == int(1.7 * CAPACITY * 30)
        world.clock.now += 2
        world.pool.refresh(world.now)
        assert world.pool.capacity_tokens == int(1.8 * CAPACITY * 30)
        world.eject(first)
        assert world.pool.capacity_tokens == CAPACITY * 30

    async def test_has_no_bound_while_a_node_is_unmeasured(self, world: World) -> None:
        world.fill(2)
        world.table.apply(entry_of(2, capacity_tokens_per_s=0))
        assert world.pool.capacity_tokens == 0
        world.nodes[0].failed(FailureKind.BUSY, world.now - 60)
        assert world.pool.capacity_tokens == 0
        world.table.apply(entry_of(2, generation=2, capacity_tokens_per_s=CAPACITY))
        assert world.pool.capacity_tokens == 3 * CAPACITY * 30

    async def test_notes_when_it_was_lost(self, world: World) -> None:
        world.fill(2)
        world.clock.now = 1005.0
        world.table.apply(entry_of(0, generation=2, state=NodeState.DRAINING))
        assert world.pool.lost_at is None
        world.clock.now = 1007.0
        world.table.apply(entry_of(1, generation=2, state=NodeState.DRAINING))
        assert world.pool.lost_at == 1007.0
        world.clock.now = 1009.0
        world.table.apply(entry_of(2, state=NodeState.BOOTING))
        assert world.pool.lost_at == 1007.0
        world.table.apply(entry_of(2, generation=2))
        assert world.pool.lost_at is None

    async def test_f2_a_pool_that_cannot_be_reached_is_lost(self, world: World) -> None:
        (node,) = world.fill(1)
        for _ in range(UNREACHABLE_AFTER):
            assert world.choose().node is node
            node.failed(FailureKind.CONNECT, world.now)
        assert world.table.choose(world.pool) is None
        assert (world.pool.routable_count, world.pool.lost_at) == (0, world.now)
        assert world.table.is_any_routable("m", ["r"])

    async def test_f2_an_older_requests_success_makes_a_node_reachable_again(self, world: World) -> None:
        (node,) = world.fill(1)
        for _ in range(UNREACHABLE_AFTER):
            node.failed(FailureKind.CONNECT, world.now)
        node.succeeded(world.now)
        assert (world.pool.routable_count, world.pool.lost_at) == (1, None)

    async def test_tells_when_there_may_be_room(self, world: World) -> None:
        first, second = world.fill(2)
        calls: list[int] = []
        world.pool.on_room = lambda: calls.append(world.pool.tokens_in_flight)
        first.take(700)
        second.take(50)
        assert calls == []
        first.give_back(700)
        assert calls == [50]
        world.eject(first)
        assert calls == [50]
        world.clock.now += 2
        first.succeeded(world.now)
        assert calls == [50, 50]
        world.table.apply(entry_of(2))
        assert calls == [50, 50, 50]

    async def test_tells_when_busy_nodes_recover(self, world: World) -> None:
        first, _ = world.fill(2)
        calls: list[int] = []
        first.failed(FailureKind.BUSY, world.now)
        world.pool.on_room = lambda: calls.append(world.pool.capacity_tokens)
        world.pool.refresh(world.now)
        assert calls == []
        world.clock.now += 60
        world.pool.refresh(world.now)
        world.pool.refresh(world.now)
        assert calls == [2 * CAPACITY * 30]


class TestTable:
    async def test_f4_the_higher_generation_holds_and_the_gone_stay_gone(self, world: World) -> None:
        world.table.apply(entry_of(0, generation=5))
        world.table.apply(entry_of(0, generation=4, state=NodeState.DRAINING))
        assert world.pool.routable_count == 1
        world.table.apply(entry_of(0, generation=6, state=NodeState.TERMINATED))
        world.table.apply(entry_of(0, generation=6))
        assert world.pool.routable_count == 0

    async def test_tells_of_every_change(self, world: World) -> None:
        calls: list[int] = []
        world.table.on_change(lambda: calls.append(len(world.table.nodes)))
        change = asyncio.create_task(world.table.next_change())
        await asyncio.sleep(0)
        world.table.apply(entry_of(0))
        world.table.apply(entry_of(0))
        world.table.apply(entry_of(1))
        await change
        assert calls == [1, 2]

    async def test_a_node_with_another_engine_begins_anew(self, world: World) -> None:
        (before,) = world.fill(1)
        before.take(100)
        before.failed(FailureKind.CONNECT, world.now)
        world.table.apply(entry_of(0, generation=2, endpoint="http://127.0.0.1:9"))
        (after,) = world.nodes
        assert after is not before
        assert before.is_gone
        assert (after.failures, after.tokens_in_flight, world.pool.tokens_in_flight) == (0, 0, 0)
        before.give_back(100)
        assert world.pool.tokens_in_flight == 0

    async def test_an_entry_that_changes_keeps_what_is_in_flight(self, world: World) -> None:
        (node,) = world.fill(1)
        node.take(100)
        world.table.apply(entry_of(0, generation=2, capacity_tokens_per_s=2 * CAPACITY))
        assert world.nodes == [node]
        assert (world.pool.tokens_in_flight, world.pool.capacity_tokens) == (100, 2 * CAPACITY * 30)

    async def test_the_first_deployment_by_name_decides_how_a_pool_chooses(self, world: World) -> None:
        world.table.set_strategies({"b": "round-robin", "a": "cost-weighted"})
        world.table.apply(entry_of(0, deployment="b"))
        assert world.pool.strategy == "round-robin"
        world.table.apply(entry_of(1, deployment="a"))
        assert world.pool.strategy == "cost-weighted"
        world.table.set_strategies({"b": "round-robin", "a": "prefix-affinity"})
        assert (world.pool.strategy, world.pool.wants_prefix) == ("prefix-affinity", True)
        world.table.apply(entry_of(2, deployment=""))
        assert world.pool.strategy == "prefix-affinity"

    async def test_the_first_region_with_an_untried_node_decides_and_ejected_ones_come_last(self, world: World) -> None:
        table = world.table
        table.replace([entry_of(0), entry_of(1, region="s"), entry_of(2, region="t")])
        home, second, third = world.nodes
        regions = ("nowhere", "r", "s")

        def chosen(*tried: Node) -> Node | None:
            choice = table.choose_in("m", regions, tried)
            return None if choice is None else choice.node

        assert chosen() is home
        assert chosen(home) is second
        assert chosen(home, second) is None
        world.eject(home)
        assert chosen() is second
        assert chosen(second) is home
        assert third.tokens_in_flight == 0
        assert table.choose_in("m", ("nowhere",)) is None

    async def test_an_unreachable_node_is_probed_until_a_connection_succeeds(self) -> None:
        connections: list[int] = []
        server = await asyncio.start_server(lambda _, writer: connections.append(1) or writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        table = RouteTable(lambda _: "credential", None)
        table.apply(entry_of(0, endpoint=f"http://127.0.0.1:{port}"))
        (node,) = table.nodes
        for _ in range(UNREACHABLE_AFTER):
            node.failed(FailureKind.CONNECT, asyncio.get_running_loop().time())
        pool = table.pool("m", "r")
        assert pool is not None
        assert pool.routable_count == 0
        probing = asyncio.create_task(table.keep_probing())
        async with asyncio.timeout(5):
            await table.next_change()
        assert pool.routable_count == 1
        assert connections
        probing.cancel()
        server.close()


class TestEjection:
    async def test_a_broken_connection_ejects_at_once_and_an_error_the_second_time(self, world: World) -> None:
        first, second, third = world.fill(3)
        assert first.failed(FailureKind.RESET, world.now)
        assert not second.failed(FailureKind.ERROR, world.now)
        assert world.pool.nodes == [second, third]
        second.succeeded(world.now)
        assert not second.failed(FailureKind.ERROR, world.now)
        assert second.failed(FailureKind.ERROR, world.now)
        assert all(world.choose().node is third for _ in range(9))

    async def test_asking_for_too_much_is_no_failure(self, world: World) -> None:
        (node,) = world.fill(1)
        for _ in range(9):
            assert not node.failed(FailureKind.TOTAL, world.now)
        assert (node.failures, world.choose().reason) == (0, "only")

    async def test_an_ejected_node_returns_by_one_trial_and_a_ramp(self, world: World) -> None:
        bad, *others = world.fill(3)
        world.eject(bad)
        assert all(world.choose().node in others for _ in range(20))
        world.clock.now += 1.0
        trial = world.choose()
        assert (trial.node, trial.reason, trial.eligible, trial.ejected) == (bad, "trial", 2, 1)
        assert all(world.choose().node in others for _ in range(20))
        bad.first_token(0.1, world.now)
        assert bad in world.pool.nodes
        assert bad.weight(world.now) == pytest.approx(0.1)
        world.clock.now += 15
        assert bad.weight(world.now) == pytest.approx(0.55)

    async def test_a_trial_without_news_is_repeated(self, world: World) -> None:
        bad, _ = world.fill(2)
        world.eject(bad)
        world.clock.now += 1.0
        assert world.choose().reason == "trial"
        assert world.choose().reason != "trial"
        world.clock.now += TRIAL_S
        assert world.choose().node is bad

    async def test_a_trial_that_fails_ejects_for_twice_as_long(self, world: World) -> None:
        bad, good = world.fill(2)
        world.eject(bad)
        world.clock.now += 1.0
        assert world.choose().node is bad
        world.eject(bad)
        world.clock.now += 1.9
        assert world.choose().node is good
        world.clock.now += 0.1
        assert world.choose().node is bad

    async def test_a_request_that_was_tried_there_is_no_trial(self, world: World) -> None:
        bad, good = world.fill(2)
        world.eject(bad)
        world.clock.now += 1.0
        assert world.choose(bad).node is good
        assert world.choose().node is bad

    async def test_an_answer_of_before_the_ejection_is_no_proof(self, world: World) -> None:
        bad, _ = world.fill(2)
        world.eject(bad)
        bad.first_token(0.1, world.now)
        bad.succeeded(world.now)
        assert bad not in world.pool.nodes

    async def test_the_last_node_is_tried_though_it_is_ejected(self, world: World) -> None:
        (node,) = world.fill(1)
        world.eject(node)
        assert world.table.choose(world.pool, is_last_resort_allowed=False) is None
        choice = world.choose()
        assert (choice.node, choice.reason, choice.ejected) == (node, "last-resort", 1)
        node.succeeded(world.now)
        assert world.choose().reason == "only"

    @pytest.mark.parametrize(("count", "most"), [(2, 1), (5, 2), (10, 5), (40, 20)])
    async def test_no_more_than_the_share_is_ejected_at_once(self, world: World, count: int, most: int) -> None:
        nodes = world.fill(count)
        for node in nodes:
            world.clock.now += 0.01
            world.eject(node)
            ejected = [other for other in nodes if other.ejected_until > world.now]
            assert len(ejected) <= most
            assert node in ejected
        # Those ejected longest are on trial, one request each, once the shortest ejection is over.
        world.clock.now = 1001.005 + 0.01 * (count - most)
        trials = [choice.node for _ in range(count) if (choice := world.choose()).reason == "trial"]
        assert trials == nodes[: count - most]

    async def test_dead_nodes_beyond_the_share_cost_few_tries(self, world: World) -> None:
        good = world.fill(4)[-1]
        failures = 0
        for _ in range(1000):
            world.clock.now += 0.01
            node = world.choose().node
            if node is good:
                node.first_token(0.1, world.now)
                node.succeeded(world.now)
            else:
                failures += 1
                node.failed(FailureKind.ERROR, world.now)
        # Three nodes and ten seconds: two failures to find each out, then at most a trial a second.
        assert failures <= 6 + 3 * 11

    async def test_a_slow_first_token_ejects_once(self, world: World) -> None:
        slow, *others = world.fill(4)
        for node in others:
            for _ in range(2):
                node.first_token(0.2, world.now)
        world.clock.now += 2
        assert not slow.first_token(3.0, world.now)
        assert slow.first_token(3.0, world.now)
        assert slow not in world.pool.nodes
        assert slow.failures == 0
        world.clock.now += 10
        assert world.choose().node is slow
        # Back after its trial, and slow is what it must be again before it counts.
        assert not slow.first_token(3.0, world.now)
        assert slow in world.pool.nodes

    async def test_a_node_ejected_for_slowness_no_longer_makes_the_median(self, world: World) -> None:
        slow, fast = world.fill(2)
        for latency_s in (0.2, 0.2):
            fast.first_token(latency_s, world.now)
        slow.first_token(5.0, world.now)
        world.clock.now += 2
        assert slow.first_token(5.0, world.now)
        world.pool.measure(world.now)
        # One node has no pool to be compared with.
        assert (world.pool.median_ttft_s, world.pool.slow_above_s) == (0.0, math.inf)

    async def test_slow_is_relative_to_the_pool(self, world: World) -> None:
        nodes = world.fill(4)
        for round in range(5):
            world.clock.now += 2
            assert not any(node.first_token(2.0 + number / 2, world.now) for number, node in enumerate(nodes)), round
        assert len(world.pool.nodes) == 4

    async def test_slow_nodes_are_never_the_last_or_beyond_the_share(self) -> None:
        world = World(replace(RULES, ejected_share=0.2))
        *fast, slow, slower = world.fill(5)
        for _ in range(3):
            world.clock.now += 2
            for node in fast:
                node.first_token(0.1, world.now)
            slow.first_token(5.0, world.now)
            slower.first_token(9.0, world.now)
        assert world.pool.out == [slow]
        (alone,) = World().fill(1)
        for latency_s in (0.1, 0.1, 50.0, 50.0, 50.0):
            assert not alone.first_token(latency_s, 2000.0)


class TestOverload:
    async def test_busy_is_not_broken_and_takes_three_tenths_for_a_while(self, world: World) -> None:
        (node,) = world.fill(1)
        for _ in range(3):
            assert not node.failed(FailureKind.BUSY, world.now)
        # Three refusals of one moment are one piece of news.
        assert node.weight(world.now) == pytest.approx(0.7)
        assert (node.failures, world.pool.nodes) == (0, [node])
        world.clock.now += 2
        assert node.weight(world.now) == pytest.approx(0.8)
        node.failed(FailureKind.BUSY, world.now)
        assert node.weight(world.now) == pytest.approx(0.56)
        world.clock.now += 60
        assert node.weight(world.now) == 1.0

    async def test_a_busy_node_gets_less(self, world: World) -> None:
        busy, *others = world.fill(2)
        for _ in range(4):
            busy.failed(FailureKind.BUSY, world.now)
            world.clock.now += 0.2
        counts = world.serve(100)
        assert counts[busy] < 0.5 * counts[others[0]]

    async def test_never_takes_a_nodes_last_share(self, world: World) -> None:
        (node,) = world.fill(1)
        for _ in range(50):
            node.failed(FailureKind.BUSY, world.now)
            world.clock.now += 0.2
        assert node.weight(world.now) >= 0.1


class TestSlowStart:
    async def test_a_node_that_joins_others_begins_with_a_tenth(self, world: World) -> None:
        world.fill(4)
        world.table.apply(entry_of(9))
        new = world.nodes[-1]
        assert new.weight(world.now) == pytest.approx(0.1)
        counts = world.serve(500)
        assert counts[new] < 0.2 * counts[world.nodes[0]]
        world.clock.now += 30
        assert new.weight(world.now) == 1.0

    async def test_the_first_nodes_of_a_pool_begin_with_all(self, world: World) -> None:
        assert [node.weight(world.now) for node in world.fill(3)] == [1.0, 1.0, 1.0]

    async def test_a_changed_entry_is_no_new_node(self, world: World) -> None:
        world.fill(2)
        world.table.apply(entry_of(1, generation=2))
        assert [node.weight(world.now) for node in world.nodes] == [1.0, 1.0]

    async def test_can_be_switched_off(self) -> None:
        world = World(replace(RULES, slow_start_s=0.0))
        world.fill(2)
        world.table.apply(entry_of(2))
        assert [node.weight(world.now) for node in world.nodes] == [1.0, 1.0, 1.0]


class TestLeastLoad:
    async def test_load_follows_capacity(self, world: World) -> None:
        world.table.replace(
            [entry_of(0, capacity_tokens_per_s=500), entry_of(1, capacity_tokens_per_s=2000), entry_of(2)]
        )
        counts = world.serve(700)
        small, large, middle = (counts[node] for node in world.nodes)
        assert (small, middle, large) == pytest.approx((100, 200, 400), rel=0.1)

    async def test_a_slower_node_gets_less_than_its_capacity_says(self, world: World) -> None:
        fast, slow = world.fill(2)
        for _ in range(2):
            fast.first_token(0.3, world.now)
            slow.first_token(0.6, world.now)
        world.clock.now += 2
        for node, latency_s in ((fast, 0.3), (slow, 0.6)):
            node.first_token(latency_s, world.now)
        counts = world.serve(300)
        assert counts[fast] == pytest.approx(2 * counts[slow], rel=0.1)

    async def test_says_whom_it_compared(self, world: World) -> None:
        first, second = world.fill(2)
        first.take(5000)
        choice = world.choose()
        assert choice.node is second
        assert choice.reason == "least-load"
        assert (choice.eligible, choice.ejected) == (2, 0)
        compared = {weighed[0]: weighed[2] for weighed in choice.compared}
        assert compared == {first: 5000, second: 0}


class TestCostWeighted:
    async def test_the_cheapest_known_price_comes_first(self, world: World) -> None:
        world.table.set_strategies({"d": "cost-weighted"})
        prices = {0: 3_000_000, 1: 0, 2: 1_000_000}
        world.table.replace([entry_of(number, price_microdollars_per_h=price) for number, price in prices.items()])
        dear, unknown, cheap = world.nodes
        assert [world.choose().node for _ in range(3)] == [cheap] * 3
        cheap.take(15_000)
        assert world.choose().node is dear
        dear.take(15_000)
        assert world.choose().node is unknown
        world.table.apply(entry_of(0, generation=2, price_microdollars_per_h=500_000))
        dear.give_back(15_000)
        assert world.choose().node is dear


class TestPrefixAffinity:
    def conversation(self, number: int, turns: int, system: str = "") -> tuple[int, ...]:
        """The blocks of a conversation after so many turns."""
        texts = [system, *(f"{number}-{turn} " * 120 for turn in range(turns))]
        return prefix_blocks({"messages": [{"role": "user", "content": text} for text in texts]})

    async def test_a_conversation_stays_with_its_node(self, world: World) -> None:
        world.fill(8, "prefix-affinity")
        homes = {number: world.choose(blocks=self.conversation(number, 1)).node for number in range(20)}
        assert len(set(homes.values())) == 8
        for turns in (2, 3, 4):
            for number, home in homes.items():
                choice = world.choose(blocks=self.conversation(number, turns))
                assert (choice.node, choice.reason) == (home, "affinity")

    async def test_one_prompt_never_piles_onto_one_node(self, world: World) -> None:
        nodes = world.fill(8, "prefix-affinity")
        blocks = self.conversation(1, 4)
        chance = random.Random(1)
        running: list[Node] = []
        kept = 0
        for _ in range(2000):
            mean = world.pool.tokens_in_flight / 8
            choice = world.choose(blocks=blocks)
            if choice.reason == "affinity":
                kept += 1
                assert choice.node.tokens_in_flight <= 1.25 * mean + 2048
            choice.node.take(1000)
            running.append(choice.node)
            if len(running) > 160:
                running.pop(chance.randrange(len(running))).give_back(1000)
            # Beyond what affinity may do, two choices may both fall on full nodes, now and then.
            assert max(node.tokens_in_flight for node in nodes) <= 1.5 * mean + 2 * 2048
        assert kept > 1000

    async def test_a_shared_beginning_spreads_and_each_conversation_stays(self, world: World) -> None:
        world.fill(8, "prefix-affinity")
        system = "You are a helpful assistant. " * 40
        homes: dict[int, Node] = {}
        for number in range(200):
            node = world.choose(blocks=self.conversation(number, 1, system)).node
            node.take(1000)
            homes[number] = node
        assert max(Counter(homes.values()).values()) <= 1.25 * 25 + 3
        for node in homes.values():
            node.give_back(1000)
        kept = [
            world.choose(blocks=self.conversation(number, 2, system)).node is homes[number] for number in range(200)
        ]
        assert all(kept)

    async def test_an_ejected_nodes_conversations_move_and_settle(self, world: World) -> None:
        world.fill(3, "prefix-affinity")
        blocks = self.conversation(1, 2)
        home = world.choose(blocks=blocks).node
        world.eject(home)
        second = world.choose(blocks=blocks)
        assert (second.node is home, second.reason) == (False, "least-load")
        assert world.choose(blocks=blocks).node is second.node
        world.table.apply(replace(second.node.entry, generation=2, state=NodeState.DRAINING))
        assert world.choose(blocks=blocks).node not in (home, second.node)

    async def test_a_retry_goes_elsewhere(self, world: World) -> None:
        world.fill(3, "prefix-affinity")
        blocks = self.conversation(1, 2)
        home = world.choose(blocks=blocks).node
        assert world.choose(home, blocks=blocks).node is not home

    async def test_the_body_is_read_only_where_it_matters(self, world: World) -> None:
        class Unread(dict[str, Any]):
            def get(self, *_: Any) -> Any:
                raise AssertionError("read")

        world.fill(3)
        assert world.table.choose_in("m", ["r"], (), Unread()) is not None
        world.fill(3, "prefix-affinity")
        body = {"messages": [{"role": "user", "content": "tell me " * 100}]}
        first = world.table.choose_in("m", ["r"], (), body)
        second = world.table.choose_in("m", ["r"], (), body)
        assert first is not None
        assert second is not None
        assert (second.node, second.reason) == (first.node, "affinity")


class TestLatencyWeighted:
    async def test_waits_are_shorter_than_by_turns_where_nodes_differ(self) -> None:
        def mean_wait_s(strategy: str) -> float:
            """Poisson arrivals on nodes of which one is four times as slow; each serves one request after the other."""
            world = World()
            nodes = world.fill(4, strategy)
            service_s = {node: 0.004 if node is nodes[0] else 0.001 for node in nodes}
            free_at = dict.fromkeys(nodes, world.now)
            ends: list[tuple[float, Node, float]] = []
            chance = random.Random(5)
            waits: list[float] = []
            for _ in range(1500):
                world.clock.now += chance.expovariate(1800.0)
                for end in sorted(end for end in ends if end[0] <= world.now):
                    ends.remove(end)
                    end[1].first_token(end[2], end[0])
                    end[1].give_back(100)
                node = world.choose().node
                node.take(100)
                free_at[node] = max(world.now, free_at[node]) + service_s[node]
                wait_s = free_at[node] - world.now
                waits.append(wait_s)
                ends.append((free_at[node], node, wait_s))
            return sum(waits) / len(waits)

        assert mean_wait_s("latency-weighted") < 0.1 * mean_wait_s("round-robin")


class TestFeed:
    async def test_a_deployments_strategy_and_a_nodes_price_arrive(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api()
        sql = api.fleet.sql
        await sql.execute("INSERT INTO deployments (name, model, strategy) VALUES ('d', 'llama-3-8b', 'cost-weighted')")
        node_id = await api.fleet.add_node(engine)
        await sql.execute(
            "UPDATE nodes SET deployment = 'd', price_microdollars_per_h = 7, generation = generation + 1"
        )

        async def pool_of(strategy: str) -> Pool | None:
            pool = api.app.inference._table.pool("llama-3-8b", "in-mumbai")
            return pool if pool is not None and pool.nodes and pool.strategy == strategy else None

        pool: Pool = await api.until(lambda: pool_of("cost-weighted"))
        assert [(node.entry.node_id, node.entry.price_microdollars_per_h) for node in pool.nodes] == [(node_id, 7)]
        assert (await api.chat()).headers["x-crosslogic-node"] == node_id
        await sql.execute("UPDATE deployments SET strategy = 'prefix-affinity'")
        assert await api.until(lambda: pool_of("prefix-affinity")) is pool
        assert (await api.chat()).status_code == 200
        assert (pool.tokens_in_flight, pool.nodes[0].requests_in_flight) == (0, 0)
