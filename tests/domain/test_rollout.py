"""A roll-out's plan: every order of events keeps the floor, comes to an end, and leads back when it is aborted (F8)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslogic.domain.errors import Rejected
from crosslogic.domain.node import NodeState
from crosslogic.domain.rollout import (
    WHOLE_BP,
    Act,
    Action,
    GateVerdict,
    RegionFloor,
    RevisionFigures,
    RolloutNode,
    RolloutPolicy,
    Standing,
    holds_floor,
    judge_gate,
    next_action,
    return_action,
)

OLD, NEW = 1, 2
READY = NodeState.READY


def node(name: str, revision: int = OLD, **fields: object) -> RolloutNode:
    given: dict[str, object] = {"region": "r", "state": READY, "capacity_tokens_per_s": 100, **fields}
    return RolloutNode(name, revision=revision, **given)  # type: ignore[arg-type]


def old_ones(count: int) -> list[RolloutNode]:
    return [node(f"old{number}") for number in range(count)]


def new_ones(count: int) -> list[RolloutNode]:
    return [node(f"new{number}", NEW) for number in range(count)]


def step(
    nodes: list[RolloutNode], replicas: int = 4, policy: RolloutPolicy | None = None, **standing: object
) -> Action:
    floor = RegionFloor("r", replicas, 1)
    return next_action(policy or RolloutPolicy(), [floor], nodes, Standing(OLD, NEW, **standing))  # type: ignore[arg-type]


class TestForth:
    def test_begins_with_one_node_more(self) -> None:
        action = step(old_ones(4))
        assert (action.act, action.region, action.count, action.revision) == (Act.ORDER, "r", 1, NEW)

    def test_verifies_a_node_before_anything_is_sent_there(self) -> None:
        action = step([*old_ones(4), node("new0", NEW, is_held=True)])
        assert (action.act, action.node_ids) == (Act.VERIFY, ["new0"])

    def test_proves_a_share_before_the_next(self) -> None:
        nodes = [*old_ones(4), *new_ones(1)]
        assert step(nodes).traffic_bp == 500
        assert step(nodes, traffic_bp=500).act is Act.PROVE
        assert step(nodes, traffic_bp=500, proven_bp=500).traffic_bp == 2500

    def test_gives_new_nodes_no_more_than_they_can_carry(self) -> None:
        assert step([*old_ones(3), *new_ones(1)], replicas=3, traffic_bp=2500, proven_bp=2500).traffic_bp == 3333

    def test_retires_old_nodes_only_to_make_room(self) -> None:
        nodes = [*old_ones(4), *new_ones(1)]
        action = step(nodes, traffic_bp=2500, proven_bp=2500)
        assert (action.act, action.node_ids) == (Act.RETIRE, ["old0"])
        policy = RolloutPolicy(max_surge_nodes=4)
        assert step(nodes, policy=policy, traffic_bp=2500, proven_bp=2500).act is Act.ORDER

    def test_a_lost_node_pauses_retirement(self) -> None:
        nodes = [*old_ones(3), *new_ones(1)]
        assert step(nodes, traffic_bp=2500, proven_bp=2500).act is Act.ORDER

    def test_commits_once_all_are_new_and_then_retires_the_rest(self) -> None:
        nodes = [*old_ones(1), *new_ones(4)]
        assert step(nodes, traffic_bp=WHOLE_BP, proven_bp=WHOLE_BP).act is Act.COMMIT
        action = step(nodes, traffic_bp=WHOLE_BP, proven_bp=WHOLE_BP, is_committed=True)
        assert (action.act, action.node_ids) == (Act.RETIRE, ["old0"])
        assert step(new_ones(4), traffic_bp=WHOLE_BP, proven_bp=WHOLE_BP, is_committed=True).act is Act.DONE

    def test_holds_where_it_is_told_to_until_it_is_promoted(self) -> None:
        policy = RolloutPolicy(hold_at_bp=1000)
        nodes = [*old_ones(4), *new_ones(1)]
        assert step(nodes, policy=policy, traffic_bp=500, proven_bp=500).traffic_bp == 1000
        held = {"traffic_bp": 1000, "proven_bp": 1000}
        assert step(nodes, policy=policy, **held).act is Act.HOLD
        assert step(nodes, policy=policy, is_promoted=True, **held).traffic_bp == 2500

    def test_leaves_joined_nodes_alone(self) -> None:
        nodes = [node("joined", is_joined=True), *new_ones(4)]
        assert step(nodes, traffic_bp=WHOLE_BP, proven_bp=WHOLE_BP, is_committed=True).act is Act.DONE

    def test_spends_no_more_than_it_may(self) -> None:
        nodes = [node(f"old{number}", price_microdollars_per_h=500_000) for number in range(4)]
        policy = RolloutPolicy(max_surge_nodes=4, max_surge_microdollars_per_h=1_100_000, steps_bp=(WHOLE_BP,))
        assert step(nodes, policy=policy).count == 2
        assert step(nodes, policy=replace(policy, max_surge_microdollars_per_h=499_999)).act is Act.WAIT

    def test_a_slower_revision_gets_more_nodes_before_reservations_lose_theirs(self) -> None:
        nodes = [*old_ones(2), *(node(f"new{number}", NEW, capacity_tokens_per_s=60) for number in range(2))]
        floor = RegionFloor("r", 2, 1, reserved_tokens_per_s=100)
        standing = Standing(OLD, NEW, WHOLE_BP, WHOLE_BP, is_committed=True)
        action = next_action(RolloutPolicy(), [floor], nodes, standing)
        assert (action.act, action.node_ids) == (Act.RETIRE, ["old0"])
        action = next_action(RolloutPolicy(), [floor], nodes[1:], standing)
        assert (action.act, action.revision) == (Act.ORDER, NEW)


class TestBack:
    def test_takes_the_traffic_away_first(self) -> None:
        floor = RegionFloor("r", 4, 1)
        standing = Standing(OLD, NEW, WHOLE_BP, WHOLE_BP, is_committed=True)
        action = return_action(RolloutPolicy(), [floor], new_ones(4), standing)
        assert (action.act, action.traffic_bp) == (Act.SHIFT, 0)

    def test_fetches_old_nodes_before_the_new_ones_go(self) -> None:
        floor = RegionFloor("r", 4, 1)
        action = return_action(RolloutPolicy(), [floor], new_ones(4), Standing(OLD, NEW))
        assert (action.act, action.revision, action.count) == (Act.ORDER, OLD, 1)

    def test_without_old_nodes_to_be_had_the_floor_must_do(self) -> None:
        floor = RegionFloor("r", 4, 2)
        nodes = [*old_ones(2), *new_ones(2)]
        action = return_action(RolloutPolicy(), [floor], nodes, Standing(OLD, NEW), is_restoring=False)
        assert (action.act, action.node_ids) == (Act.RETIRE, ["new0", "new1"])


@dataclass
class World:
    """Nodes that come up, fail or vanish as a seed says, and the checks that hold at any moment."""

    policy: RolloutPolicy
    regions: list[RegionFloor]
    dice: random.Random
    trouble: float = 0.0  # The probability of a loss before each look.
    nodes: list[RolloutNode] = field(default_factory=list[RolloutNode])
    standing: Standing = field(default_factory=lambda: Standing(OLD, NEW))
    made: int = 0

    def add(self, region: str, revision: int, state: NodeState = READY, *, is_held: bool = False) -> None:
        self.made += 1
        capacity = self.dice.choice((80, 100, 120)) if state is not READY else 100
        name = f"n{self.made:04}"
        self.nodes.append(RolloutNode(name, region, revision, state, is_held=is_held, capacity_tokens_per_s=capacity))

    def live(self) -> None:
        """Time passes: nodes come up or fail, those that leave end, and now and then one is lost."""
        for one in list(self.nodes):
            if one.is_leaving:
                if self.dice.random() < 0.5:
                    self.nodes.remove(one)
            elif one.state is not READY and self.dice.random() < 0.7:
                self.nodes.remove(one)
                if self.dice.random() >= self.trouble:
                    self.nodes.append(replace(one, state=READY))
        if self.nodes and self.dice.random() < self.trouble:
            self.nodes.remove(self.dice.choice(self.nodes))

    def do(self, action: Action, *, is_forth: bool) -> None:
        if action.act is Act.ORDER:
            assert action.count > 0
            for _ in range(action.count):
                self.add(action.region, action.revision, NodeState.REQUESTED, is_held=action.revision == NEW)
            self.check_surge()
        elif action.act is Act.VERIFY:
            self.nodes = [replace(one, is_held=False) if one.node_id in action.node_ids else one for one in self.nodes]
        elif action.act is Act.SHIFT:
            self.standing = replace(self.standing, traffic_bp=action.traffic_bp, is_committed=False)
        elif action.act is Act.PROVE:
            self.standing = replace(self.standing, proven_bp=self.standing.traffic_bp)
        elif action.act is Act.COMMIT:
            self.standing = replace(self.standing, is_committed=True)
        elif action.act is Act.RETIRE:
            self.retire(action.node_ids)

    def retire(self, node_ids: list[str]) -> None:
        for region in self.regions:
            serving = [one for one in self.nodes if one.region == region.region and one.serves]
            leaving = [one for one in serving if one.node_id in node_ids]
            if leaving:
                assert holds_floor(region, [one for one in serving if one not in leaving]), "F8"
        self.nodes = [replace(one, is_leaving=True) if one.node_id in node_ids else one for one in self.nodes]

    def check_surge(self) -> None:
        for region in self.regions:
            if region.reserved_tokens_per_s:
                continue  # The floor outweighs the surge.
            surge = self.policy.max_surge_nodes or max(1, -(-region.replicas * self.policy.max_surge_percent // 100))
            assert sum(one.region == region.region for one in self.nodes) <= region.replicas + surge

    def run(self, most: int, *, is_forth: bool) -> bool:
        """Follow the plan for so many looks; True when it is done."""
        for _ in range(most):
            self.live()
            plan = next_action if is_forth else return_action
            action = plan(self.policy, self.regions, self.nodes, self.standing)
            if action.act is Act.DONE:
                return True
            self.do(action, is_forth=is_forth)
        return False


worlds = st.tuples(
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**32),
)


def world_of(sizes: list[tuple[int, int]], surge: int, is_reserved: bool, seed: int, trouble: float = 0.0) -> World:
    regions = [
        # One node lost, the others back this much.
        RegionFloor(f"r{at}", count, min(count, least), 90 * (count - 1) if is_reserved else 0)
        for at, (count, least) in enumerate(sizes)
    ]
    world = World(RolloutPolicy(max_surge_nodes=surge), regions, random.Random(seed), trouble)
    for region in regions:
        for _ in range(region.replicas):
            world.add(region.region, OLD)
    return world


class TestAnyOrderOfEvents:
    @settings(max_examples=150, deadline=None)
    @given(worlds)
    def test_ends_with_new_nodes_only(self, drawn: tuple[list[tuple[int, int]], int, bool, int]) -> None:
        world = world_of(*drawn)
        assert world.run(1000, is_forth=True)
        assert {one.revision for one in world.nodes} == {NEW}
        count = Counter(one.region for one in world.nodes if one.serves)
        assert all(count[region.region] >= region.replicas for region in world.regions)

    @settings(max_examples=150, deadline=None)
    @given(worlds, st.integers(0, 120))
    def test_an_abort_leads_back_from_anywhere(
        self, drawn: tuple[list[tuple[int, int]], int, bool, int], after: int
    ) -> None:
        world = world_of(*drawn, trouble=0.1)
        world.run(after, is_forth=True)
        world.trouble = 0.0
        assert world.run(1500, is_forth=False)
        assert {one.revision for one in world.nodes} <= {OLD}
        assert world.standing.traffic_bp == 0
        count = Counter(one.region for one in world.nodes if one.serves)
        assert all(count[region.region] >= region.replicas for region in world.regions)

    @settings(max_examples=150, deadline=None)
    @given(worlds)
    def test_losses_delay_it_and_no_more(self, drawn: tuple[list[tuple[int, int]], int, bool, int]) -> None:
        world = world_of(*drawn, trouble=0.08)
        world.run(300, is_forth=True)
        world.trouble = 0.0
        assert world.run(1000, is_forth=True)


class TestPolicy:
    @pytest.mark.parametrize(
        "steps", [(), (10_000, 500), (500, 500, 10_000), (500, 5000), (0, 10_000), (-1, 10_000)], ids=str
    )
    def test_wants_growing_shares_up_to_all(self, steps: tuple[int, ...]) -> None:
        with pytest.raises(Rejected, match="steps_bp"):
            RolloutPolicy(steps_bp=steps).check()

    def test_wants_a_ratio_that_the_old_revision_would_pass(self) -> None:
        with pytest.raises(Rejected, match="max_latency_ratio"):
            RolloutPolicy(max_latency_ratio=0.9).check()
        RolloutPolicy().check()


class TestGate:
    OLD = RevisionFigures(1000, 2, ms_per_token_p50=10.0, ttft_ms_p50=200.0)

    @pytest.mark.parametrize(
        ("new", "verdict", "said"),
        [
            (RevisionFigures(3, 1), GateVerdict.TOO_FEW, "4 of 20 requests"),
            (RevisionFigures(100, 0, 11.0, 210.0), GateVerdict.PASSED, "100 requests"),
            (RevisionFigures(90, 10, 11.0, 210.0), GateVerdict.FAILED, "10.0% of the new revision's"),
            (RevisionFigures(100, 0, 11.0, 301.0), GateVerdict.FAILED, "first token takes 301 ms"),
            (RevisionFigures(100, 0, 15.1, 210.0), GateVerdict.FAILED, "each token takes 15 ms"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_compares_with_the_old_revision(self, new: RevisionFigures, verdict: GateVerdict, said: str) -> None:
        found, reason = judge_gate(RolloutPolicy(), self.OLD, new)
        assert found is verdict
        assert said in reason

    def test_does_not_blame_the_new_one_for_the_worlds_errors(self) -> None:
        troubled = RevisionFigures(90, 10, 10.0, 200.0)
        assert judge_gate(RolloutPolicy(), troubled, troubled)[0] is GateVerdict.PASSED

    def test_without_anything_to_compare_with_only_errors_count(self) -> None:
        assert (
            judge_gate(RolloutPolicy(), RevisionFigures(), RevisionFigures(50, 0, 99.0, 999.0))[0] is GateVerdict.PASSED
        )
