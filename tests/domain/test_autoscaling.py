from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslogic.domain.autoscaling import (
    DEFAULT_RULES,
    DRAIN_BEGINS_S,
    GPU_PAUSE_S,
    Demand,
    NodeKind,
    RegionMemory,
    RegionPlan,
    Sight,
    choose_surplus,
    decide,
    spending,
)
from crosslogic.domain.deployment import Placement, RegionTarget, Replica, ScalingSettings, counts, serves
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, NodeState

REGION = "in-mumbai"
TARGET = RegionTarget(REGION, 1, 10)
PLAIN = ScalingSettings()
BUSY = Demand(tokens_in_flight=100, arrival_tokens_per_s=10)
WINDOW_S = DEFAULT_RULES.window_s(300)
# A node's capacity where a test does not say another.
EACH = 1000
COUNTER = itertools.count()


def node(state: NodeState = NodeState.READY, **fields: Any) -> Replica:
    values: dict[str, Any] = {"is_spot": True, "capacity_tokens_per_s": EACH, **fields}
    return Replica(f"node_{next(COUNTER):08}", REGION, state, **values)


def nodes(count: int, state: NodeState = NodeState.READY, **fields: Any) -> list[Replica]:
    return [node(state, **fields) for _ in range(count)]


def arriving(share: float, **fields: Any) -> Demand:
    """Work that would occupy so many nodes."""
    return Demand(tokens_in_flight=1, arrival_tokens_per_s=share * EACH, **fields)


@dataclass
class Looks:
    """A region that is looked at again and again; nodes come at once and drain at once."""

    target: RegionTarget = TARGET
    settings: ScalingSettings = PLAIN
    now: float = 1_000_000.0
    replicas: list[Replica] = field(default_factory=list[Replica])
    memory: RegionMemory | None = None
    sight: dict[str, Any] = field(default_factory=dict[str, Any])

    def look(self, demand: Demand | None, after_s: float = 10.0) -> RegionPlan:
        self.now += after_s
        seen = Sight(now=self.now, replicas=list(self.replicas), demand=demand, **self.sight)
        plan, self.memory = decide(self.target, self.settings, seen, self.memory)
        return plan

    def obey(self, demand: Demand | None, after_s: float = 10.0) -> RegionPlan:
        plan = self.look(demand, after_s)
        self.replicas = [one for one in self.replicas if one.node_id not in plan.drains]
        self.replicas += [node(gpu=kind.gpu, is_spot=kind.is_spot) for kind in plan.orders]
        return plan


class TestPromise:
    @pytest.mark.parametrize(("present", "missing"), [(0, 2), (1, 1), (2, 0), (3, 0)])
    def test_orders_what_the_minimum_lacks(self, present: int, missing: int) -> None:
        plan = Looks(RegionTarget(REGION, 2, 5), replicas=nodes(present)).look(None)
        assert len(plan.orders) == missing
        assert f"{present} of {max(2, present)} replicas present" in plan.reason

    @pytest.mark.parametrize("state", [NodeState.LOST, NodeState.TERMINATED, NodeState.DRAINING])
    def test_replaces_at_once_what_was_lost_or_drains(self, state: NodeState) -> None:
        looks = Looks(replicas=nodes(4))
        looks.look(None)
        looks.replicas[0] = replace(looks.replicas[0], state=state)
        # Without a word on demand, too: the number is kept.
        assert len(looks.look(None).orders) == 1

    def test_pauses_after_failures_and_says_so(self) -> None:
        plan = Looks(replicas=[node(NodeState.FAILED, ended_for_s=1)]).look(BUSY)
        assert (plan.orders, plan.look_again_s) == ((), 4)
        assert "waiting 4 s after 1 failure(s) in a row" in plan.reason

    def test_orders_in_batches(self) -> None:
        plan = Looks(RegionTarget(REGION, 50, 50)).look(None)
        assert len(plan.orders) == DEFAULT_RULES.batch
        assert plan.look_again_s == 1
        assert "ordering 20 of 50" in plan.reason

    def test_drains_a_region_that_is_promised_none(self) -> None:
        looks = Looks(RegionTarget(REGION, 0, 0), replicas=nodes(2))
        assert set(looks.look(BUSY).drains) == {one.node_id for one in looks.replicas}

    def test_takes_a_smaller_maximum_at_once(self) -> None:
        looks = Looks(replicas=nodes(5))
        looks.look(arriving(4))
        looks.target = RegionTarget(REGION, 1, 2)
        assert len(looks.look(arriving(4)).drains) == 3


class TestGrowth:
    def test_follows_the_work_that_arrives_with_a_reserve_of_its_root(self) -> None:
        plan = Looks(replicas=nodes(1)).look(arriving(4))
        assert plan.desired == 4 + 2
        assert "4000 tokens/s arrive, a node does 1000" in plan.reason
        # The larger the fleet, the smaller the share that is spare.
        assert Looks(RegionTarget(REGION, 1, 100), replicas=nodes(1)).look(arriving(64)).desired == 64 + 8

    def test_follows_the_work_in_flight_and_queued(self) -> None:
        full = 30 * EACH
        demand = Demand(tokens_in_flight=full, queued_requests=3, queued_tokens=full, arrival_tokens_per_s=EACH)
        plan = Looks(replicas=nodes(1)).look(demand)
        assert plan.desired == 4  # 2 / 0.6
        assert "60000 tokens are in flight or queued" in plan.reason

    def test_follows_the_engines_caches(self) -> None:
        plan = Looks(replicas=nodes(4, kv_cache_used=0.95)).look(BUSY)
        assert plan.desired == 5
        assert "KV caches are 95% full" in plan.reason

    def test_follows_the_engines_queues(self) -> None:
        plan = Looks(replicas=nodes(4, running=10, waiting=5)).look(BUSY)
        assert plan.desired == 6
        assert "20 requests wait in the engines, 40 run" in plan.reason

    def test_without_a_known_capacity_takes_one_more_while_requests_queue(self) -> None:
        looks = Looks(replicas=nodes(2, capacity_tokens_per_s=0))
        assert looks.look(replace(BUSY, queued_requests=1)).desired == 3
        assert looks.look(BUSY).desired == 3

    def test_waits_for_nodes_that_were_ordered(self) -> None:
        looks = Looks(replicas=[*nodes(2), *nodes(4, NodeState.BOOTING, capacity_tokens_per_s=0)])
        plan = looks.look(arriving(4))
        assert (plan.desired, plan.orders, plan.drains) == (6, (), ())

    def test_backs_all_reservations_with_one_node_lost(self) -> None:
        looks = Looks(replicas=nodes(1), sight={"reserved_tokens_per_s": 2 * EACH})
        plan = looks.look(Demand())
        assert plan.desired == 3
        assert "2000 tokens/s are reserved: 2 to hold them, and one that may be lost" in plan.reason

    def test_believes_more_of_a_node_than_was_measured_once_it_has_been_seen(self) -> None:
        looks = Looks(replicas=nodes(2))
        served = arriving(4, served_tokens_per_s=4 * EACH)
        assert looks.look(served).desired == 6
        for _ in range(15):
            looks.look(served)
        assert looks.memory is not None
        assert looks.memory.capacity_tokens_per_s == 2 * EACH
        # Work of nodes that have just gone is not credited to those that are left.
        looks.replicas = looks.replicas[:1]
        looks.look(served)
        assert looks.memory.capacity_tokens_per_s == 2 * EACH


class TestHeadroom:
    SLOW = ScalingSettings(ttft_target_ms=1000)

    def test_grows_while_first_tokens_are_late_and_shrinks_slowly_after(self) -> None:
        looks = Looks(settings=self.SLOW, replicas=nodes(6))
        late, early = arriving(3, ttft_ms_p99=2000.0), arriving(3, ttft_ms_p99=500.0)
        first = looks.obey(late)
        for _ in range(6):
            looks.obey(late)
        assert looks.memory is not None
        raised = looks.memory.headroom
        assert raised > DEFAULT_RULES.headroom
        assert len(looks.replicas) > first.desired
        for _ in range(6):
            looks.obey(early)
        assert raised - 0.02 < looks.memory.headroom < raised

    def test_is_not_the_answer_where_nodes_are_idle_or_on_their_way(self) -> None:
        idle = Looks(settings=self.SLOW, replicas=nodes(6))
        coming = Looks(settings=self.SLOW, replicas=[*nodes(2), *nodes(3, NodeState.BOOTING)])
        for _ in range(6):
            idle.look(arriving(1, ttft_ms_p99=2000.0))
            coming.look(arriving(2, ttft_ms_p99=2000.0))
        assert idle.memory is not None
        assert coming.memory is not None
        assert idle.memory.headroom == coming.memory.headroom == DEFAULT_RULES.headroom

    def test_keeps_within_its_bounds(self) -> None:
        looks = Looks(settings=self.SLOW, replicas=nodes(10))
        for _ in range(200):
            looks.look(arriving(9, ttft_ms_p99=2000.0), after_s=60)
        assert looks.memory is not None
        assert looks.memory.headroom == DEFAULT_RULES.most_headroom


class TestPace:
    def test_shrinks_to_the_most_of_a_window(self) -> None:
        looks = Looks(replicas=nodes(6))
        looks.obey(arriving(4))
        looks.obey(arriving(2), after_s=60)  # 2 + √2: four nodes.
        for _ in range(int(WINDOW_S / 10) - 7):
            assert looks.obey(arriving(0.1)).desired == 6
        assert "within" in looks.look(arriving(0.1)).reason
        seen = [looks.obey(arriving(0.1)).desired for _ in range(12)]
        assert seen == sorted(seen, reverse=True)
        assert (4 in seen, seen[-1]) == (True, 1)

    def test_remembers_for_as_long_as_nodes_take_to_come(self) -> None:
        assert DEFAULT_RULES.window_s(10) == DEFAULT_RULES.shortest_window_s
        assert DEFAULT_RULES.window_s(450) == 900
        assert DEFAULT_RULES.window_s(9999) == DEFAULT_RULES.longest_window_s

    def test_does_not_grow_right_after_it_shrank(self) -> None:
        looks = Looks(replicas=nodes(6))
        looks.obey(arriving(4))
        while looks.obey(arriving(0.1)).desired == 6:
            pass
        plan = looks.look(arriving(4))
        assert (plan.desired, plan.orders) == (1, ())
        assert "but it shrank 10 s ago" in plan.reason
        assert looks.look(arriving(4), after_s=30).desired == 6

    def test_holds_what_it_has_while_nobody_says_what_is_asked_for(self) -> None:
        looks = Looks(replicas=nodes(6))
        looks.obey(arriving(4))
        for _ in range(500):
            plan = looks.obey(None)
            assert (plan.desired, plan.orders, plan.drains) == (6, (), ())
            assert "no API process says" in plan.reason
        # The gap counts as need: what was not seen was perhaps there.
        assert looks.obey(arriving(0.1)).desired == 6

    def test_takes_what_is_there_for_needed_at_first(self) -> None:
        looks = Looks(replicas=nodes(5))
        assert looks.look(arriving(0.1)).desired == 5

    def test_does_not_shrink_during_a_roll_out(self) -> None:
        looks = Looks(replicas=nodes(6), sight={"is_rolling": True})
        looks.obey(arriving(4))
        plans = [looks.obey(arriving(0.1)) for _ in range(200)]
        assert {(plan.desired, plan.drains) for plan in plans} == {(6, ())}
        assert "a roll-out is in progress" in plans[-1].reason

    def test_a_burst_of_looks_at_one_moment_changes_nothing(self) -> None:
        """What a schedule that catches up sends."""
        looks = Looks(replicas=nodes(6))
        looks.obey(arriving(4))
        looks.obey(arriving(0.1), after_s=WINDOW_S + 10)
        before = looks.memory
        for _ in range(100):
            plan = looks.obey(arriving(0.1), after_s=0)
            assert (plan.orders, plan.drains) == ((), ())
        assert before is not None
        assert looks.memory is not None
        assert looks.memory.desired == before.desired
        assert len(looks.memory.needs) <= 2


class TestZero:
    LIMITS = RegionTarget(REGION, 0, 5)

    def test_is_reached_after_the_idle_time_and_left_for_the_first_request(self) -> None:
        looks = Looks(self.LIMITS, ScalingSettings(idle_s=120), replicas=nodes(1))
        looks.obey(BUSY)
        for _ in range(11):
            assert looks.obey(Demand()).desired == 1
        plan = looks.obey(Demand())
        assert (plan.desired, len(plan.drains)) == (0, 1)
        assert "nothing is asked for" in plan.reason
        assert looks.obey(Demand()).orders == ()
        # At once, right after it shrank.
        plan = looks.obey(Demand(held_requests=1))
        assert len(plan.orders) == 1
        assert "1 requests wait for a first node" in plan.reason

    def test_is_not_left_without_a_request(self) -> None:
        assert Looks(self.LIMITS).look(Demand()).desired == 0
        assert Looks(self.LIMITS).look(None).desired == 0

    def test_is_not_reached_while_anything_runs(self) -> None:
        looks = Looks(self.LIMITS, ScalingSettings(idle_s=60), replicas=nodes(1))
        for _ in range(300):
            assert looks.obey(Demand(tokens_in_flight=1)).desired == 1


class TestCap:
    def test_bounds_orders(self) -> None:
        looks = Looks(
            replicas=nodes(2, price_microdollars_per_h=300_000), sight={"spend_left_microdollars_per_h": 700_000}
        )
        plan = looks.look(arriving(4))
        assert (plan.desired, len(plan.orders)) == (6, 2)
        assert "the cap leaves 0.70 USD/h for nodes at 0.30 USD/h each" in plan.reason

    def test_lets_a_first_node_show_its_price(self) -> None:
        looks = Looks(RegionTarget(REGION, 3, 3), sight={"spend_left_microdollars_per_h": 700_000})
        assert len(looks.obey(None).orders) == 1
        assert len(looks.obey(None).orders) == 0
        looks.replicas = [replace(one, price_microdollars_per_h=350_000) for one in looks.replicas]
        assert len(looks.obey(None).orders) == 2

    def test_counts_every_machine_that_has_not_ended(self) -> None:
        priced = [node(state, price_microdollars_per_h=1) for state in NodeState]
        assert spending(priced) == len(NodeState) - len(FINAL_STATES)


class TestKind:
    def test_the_base_is_on_demand(self) -> None:
        looks = Looks(RegionTarget(REGION, 4, 4), ScalingSettings(on_demand_base=2), replicas=[node(is_spot=False)])
        assert [kind.is_spot for kind in looks.look(None).orders] == [False, True, True]

    def test_a_gpu_that_cannot_be_had_gives_way_to_the_next(self) -> None:
        wanted = ScalingSettings(gpus=("H200", "A100"))
        looks = Looks(RegionTarget(REGION, 1, 1), wanted)
        assert looks.look(None).orders == (NodeKind("H200"),)
        looks.replicas = [node(NodeState.FAILED, gpu="H200", ended_for_s=60)]
        assert looks.look(None).orders == (NodeKind("A100"),)
        looks.replicas = [
            node(NodeState.FAILED, gpu="A100", ended_for_s=60),
            node(NodeState.FAILED, gpu="H200", ended_for_s=200),
        ]
        assert looks.look(None).orders == (NodeKind("H200"),)
        looks.replicas = [node(NodeState.FAILED, gpu="H200", ended_for_s=GPU_PAUSE_S)]
        assert looks.look(None).orders == (NodeKind("H200"),)


class TestSurplus:
    def chosen(self, present: Sequence[Replica], count: int, desired: int = 1, **said: Any) -> list[Replica]:
        return choose_surplus(present, count, desired, ScalingSettings(**said))

    def test_takes_the_youngest_on_its_way_first(self) -> None:
        old, young = node(NodeState.LOADING, age_s=300), node(NodeState.LAUNCHING, age_s=5)
        assert self.chosen([old, node(), young], 2) == [young, old]

    def test_keeps_as_many_serving_as_are_wanted(self) -> None:
        present = [node(), node(), node(NodeState.BOOTING, is_pinned=True)]
        assert len(self.chosen(present, 1, desired=2)) == 0
        assert len(self.chosen(present, 2, desired=1)) == 1

    def test_takes_the_dearest_then_the_idlest_then_the_youngest(self) -> None:
        dear = node(price_microdollars_per_h=9, running=5, age_s=500)
        idle = node(price_microdollars_per_h=1, running=0, age_s=500)
        young, old = node(price_microdollars_per_h=1, running=1, age_s=5), node(price_microdollars_per_h=1, running=1)
        old = replace(old, age_s=900)
        assert self.chosen([old, young, idle, dear], 3) == [dear, idle, young]

    def test_keeps_them_spread_or_packed(self) -> None:
        present = [node(zone="a"), node(zone="a"), node(zone="b")]
        assert {one.zone for one in self.chosen(present, 1)} == {"a"}
        assert {one.zone for one in self.chosen(present, 1, placement=Placement.PACKED)} == {"b"}

    def test_keeps_the_on_demand_base(self) -> None:
        base, spot = node(is_spot=False, price_microdollars_per_h=9), node(price_microdollars_per_h=1)
        assert self.chosen([base, spot], 1, on_demand_base=1) == [spot]

    def test_does_not_take_another_while_one_has_been_told(self) -> None:
        """A drain is a signal: the row may say "ready" for a moment yet."""
        looks = Looks(replicas=nodes(2))
        looks.look(BUSY)
        looks.target = RegionTarget(REGION, 1, 1)
        first = looks.look(BUSY)
        assert len(first.drains) == 1
        assert looks.look(BUSY).drains == ()
        assert looks.look(BUSY, after_s=DRAIN_BEGINS_S).drains == first.drains
        assert looks.memory is not None
        looks.memory = looks.memory.forgetting(first.drains)
        assert looks.look(BUSY).drains == first.drains


DEMANDS = st.none() | st.builds(
    Demand,
    tokens_in_flight=st.floats(0, 1e6),
    queued_requests=st.integers(0, 100),
    queued_tokens=st.floats(0, 1e5),
    arrival_tokens_per_s=st.sampled_from([0.0]) | st.floats(0, 2e4),
    served_tokens_per_s=st.floats(0, 2e4),
    held_requests=st.integers(0, 3),
    sheds_per_s=st.floats(0, 10),
    ttft_ms_p99=st.none() | st.floats(1, 60_000),
)
STEPS = st.tuples(
    DEMANDS,
    st.floats(0, 900),  # Seconds since the look before.
    st.sampled_from(["", "", "", "dies", "fails", "comes", "by hand"]),
    st.integers(0, 3000),  # Reserved.
)
LIMITS = st.tuples(st.integers(0, 6), st.integers(0, 14)).map(lambda both: (min(both), max(both)))
SETTINGS = st.builds(
    ScalingSettings,
    placement=st.sampled_from(Placement),
    on_demand_base=st.integers(0, 3),
    ttft_target_ms=st.none() | st.integers(1, 10_000),
    spend_cap_microdollars_per_h=st.none() | st.integers(0, 20),
    idle_s=st.integers(1, 900),
)


class TestAlways:
    @given(LIMITS, SETTINGS, st.lists(STEPS, max_size=40), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_the_promises_of_a_decision(
        self,
        limits: tuple[int, int],
        said: ScalingSettings,
        steps: list[tuple[Demand | None, float, str, int]],
        is_prompt: bool,
    ) -> None:
        """F7: bounds, the cap, no turn inside a cooldown, the last serving replica, pinned nodes."""
        looks = Looks(RegionTarget(REGION, *limits), said)
        turned_at, direction, before = -1e9, 0, None
        for demand, passed_s, happens, reserved in steps:
            self.happen(looks, happens)
            cap = said.spend_cap_microdollars_per_h
            spent = spending(looks.replicas)
            looks.sight = {"reserved_tokens_per_s": reserved}
            if cap is not None:
                looks.sight["spend_left_microdollars_per_h"] = cap - spent
            plan = looks.look(demand, passed_s)
            assert limits[0] <= plan.desired <= limits[1]
            assert not (plan.orders and plan.drains)
            present = [one for one in looks.replicas if counts(one)]
            # Nodes that were told to drain and have not begun to are not counted, and not waited for.
            assert plan.present == len(present) if is_prompt else plan.present <= len(present)
            assert plan.present + len(plan.orders) <= max(plan.desired, plan.present)
            price = max((one.price_microdollars_per_h for one in looks.replicas), default=0)
            if cap is not None and plan.orders and price:
                assert spent + price * len(plan.orders) <= cap
            drained = [one for one in looks.replicas if one.node_id in plan.drains]
            assert not any(one.is_pinned for one in drained)
            left = sum(serves(one) for one in present if one.node_id not in plan.drains)
            if any(map(serves, drained)):
                assert left >= plan.desired
                assert left >= 1 or plan.desired == 0
            if before is not None and plan.desired != before:
                now_up = 1 if plan.desired > before else -1
                if direction and now_up != direction and plan.needed != 0:
                    cooldown_s = DEFAULT_RULES.rise_cooldown_s if now_up > 0 else WINDOW_S
                    promises = ("are reserved", "replicas_min is", "wait for a first node")
                    is_promise = now_up > 0 and any(promise in plan.reason for promise in promises)
                    assert looks.now - turned_at >= cooldown_s - 1e-6 or is_promise
                turned_at, direction = looks.now, now_up
            before = plan.desired
            if is_prompt:
                looks.replicas = [one for one in looks.replicas if one.node_id not in plan.drains]
            price = 3
            looks.replicas += [
                node(NodeState.LAUNCHING, is_spot=kind.is_spot, price_microdollars_per_h=price) for kind in plan.orders
            ]

    @staticmethod
    def happen(looks: Looks, what: str) -> None:
        for place, one in enumerate(looks.replicas):
            if what == "comes" and one.state in ON_THE_WAY:
                looks.replicas[place] = replace(one, state=NodeState.READY)
            elif what == "dies" and one.state is NodeState.READY:
                looks.replicas[place] = replace(one, state=NodeState.LOST)
                return
            elif what == "fails" and one.state in ON_THE_WAY:
                looks.replicas[place] = replace(one, state=NodeState.FAILED)
                return
        if what == "by hand":
            looks.replicas.append(node(is_pinned=True, price_microdollars_per_h=2))
