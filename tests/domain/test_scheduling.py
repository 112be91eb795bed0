"""The choice of a node by each strategy, and what a node's past does to it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain import scheduling
from crosslogic.domain.scheduling import (
    BUSY_S,
    LEAST_RAMP,
    LONGEST_EJECTION_S,
    ONLY,
    Choice,
    cost_weighted,
    ejection_s,
    latency_weighted,
    least_load,
    load_s,
    may_keep_affinity,
    most_ejected,
    peak,
    ramp,
    recovered,
    round_robin,
    slow_above_s,
    slowness,
    smoothed,
)


@dataclass(eq=False)
class Node:
    """A node of 100 tokens per second, if nothing is said."""

    shown_id: bytes = b"node_x"
    tokens_in_flight: int = 0
    requests_in_flight: int = 0
    seconds_per_token: float = 0.01
    settles_at: float = 0.0
    ttft_s: float = 0.0
    peak_ttft_s: float = 0.0
    ttft_at: float = 0.0
    share: float = 1.0

    def weight(self, now: float) -> float:
        """The share it should be given."""
        return self.share


NODES = st.lists(
    st.builds(
        Node,
        tokens_in_flight=st.integers(0, 10_000),
        requests_in_flight=st.integers(0, 20),
        seconds_per_token=st.floats(0.0001, 0.1),
        settles_at=st.sampled_from([0.0, 50.0]),
        peak_ttft_s=st.floats(0, 10),
        share=st.floats(0.01, 1),
    ),
    max_size=12,
)
BITS = st.integers(0, 2**32 - 1)


def choose(strategy: str, nodes: list[Node], bits: int, tried: list[Node], turn: int = 0) -> Choice[Node] | None:
    """One choice at the instant 10."""
    if strategy == "round-robin":
        return round_robin(nodes, 10.0, turn, bits, tried)
    if strategy == "latency-weighted":
        return latency_weighted(nodes, 10.0, turn, bits, tried)
    if strategy == "cost-weighted":
        half = len(nodes) // 2
        return cost_weighted([part for part in (nodes[:half], nodes[half:]) if part], 10.0, turn, bits, tried)
    return least_load(nodes, 10.0, turn, bits, tried)


every_strategy = pytest.mark.parametrize("strategy", ["round-robin", "least-load", "latency-weighted", "cost-weighted"])


class TestEveryStrategy:
    @every_strategy
    @given(NODES, BITS, st.data())
    def test_chooses_one_that_was_not_tried_while_there_is_one(
        self, strategy: str, nodes: list[Node], bits: int, data: st.DataObject
    ) -> None:
        tried = data.draw(st.lists(st.sampled_from(nodes), max_size=3, unique_by=id)) if nodes else []
        choice = choose(strategy, nodes, bits, tried)
        if len(tried) == len(nodes):
            assert choice is None
        else:
            assert choice is not None
            assert choice.node in nodes
            assert choice.node not in tried
            assert len({id(weighed[0]) for weighed in choice.compared}) == len(choice.compared)
            assert not set(map(id, tried)) & {id(weighed[0]) for weighed in choice.compared}

    @every_strategy
    def test_says_when_there_was_no_choice(self, strategy: str) -> None:
        choice = choose(strategy, [Node()], 5, [])
        assert choice is not None
        assert choice.reason == ONLY

    @every_strategy
    def test_spreads_over_nodes_that_are_alike(self, strategy: str) -> None:
        nodes = [Node() for _ in range(6)]
        chance = random.Random(strategy)
        counts: Counter[int] = Counter()
        for turn in range(600):
            choice = choose(strategy, nodes, chance.getrandbits(32), [], turn)
            assert choice is not None
            # In flight until the end: what was given counts against the next choice.
            choice.node.tokens_in_flight += 1
            choice.node.requests_in_flight += 1
            counts[id(choice.node)] += 1
        if strategy == "cost-weighted":
            assert sum(counts[id(node)] for node in nodes[:3]) == 600
            assert all(180 <= counts[id(node)] <= 220 for node in nodes[:3])
        else:
            assert all(85 <= counts[id(node)] <= 115 for node in nodes)


class TestLeastLoad:
    @given(NODES, BITS)
    def test_takes_the_less_loaded_of_two_different_ones(self, nodes: list[Node], bits: int) -> None:
        choice = choose("least-load", nodes, bits, [])
        if len(nodes) < 2:
            return
        assert choice is not None
        a, b = choice.compared
        assert a[0] is not b[0]
        assert load_s(choice.node, 10.0) == min(a[1], b[1])

    def test_any_two_may_meet(self) -> None:
        nodes = [Node() for _ in range(7)]
        chance = random.Random(3)
        met = {
            frozenset(id(weighed[0]) for weighed in choice.compared)
            for turn in range(2_000)
            if (choice := choose("least-load", nodes, chance.getrandbits(32), [], turn))
        }
        assert len(met) == 21

    @given(st.integers(1, 9), st.integers(0, 1000), BITS)
    def test_equal_ones_take_turns(self, count: int, first: int, bits: int) -> None:
        nodes = [Node() for _ in range(count)]
        turns = Counter(
            id(choice.node)
            for turn in range(first, first + 3 * count)
            if (choice := choose("least-load", nodes, bits, [], turn))
        )
        assert sorted(turns.values()) == [3] * count

    def test_a_larger_node_takes_more(self) -> None:
        small, large = Node(tokens_in_flight=500, seconds_per_token=0.01), Node(b"l", 900, seconds_per_token=0.001)
        assert all(choose("least-load", [small, large], 0, [], turn).node is large for turn in (0, 1))  # type: ignore[union-attr]

    def test_of_two_idle_nodes_the_one_of_full_weight_wins(self) -> None:
        new, settled = Node(share=0.1, settles_at=99.0), Node()
        assert all(choose("least-load", [new, settled], 0, [], turn).node is settled for turn in (0, 1))  # type: ignore[union-attr]

    def test_two_choices_keep_the_fullest_of_many_near_the_mean(self) -> None:
        def fullest(is_blind: bool) -> int:
            nodes = [Node() for _ in range(1000)]
            chance = random.Random(1)
            for turn in range(10_000):
                choice = choose("least-load", nodes, chance.getrandbits(32), [], turn)
                assert choice is not None
                # The second of the two is the one that was drawn.
                (choice.compared[1][0] if is_blind else choice.node).tokens_in_flight += 100
            return max(node.tokens_in_flight for node in nodes) // 100

        # Ten each on average: theory has log₂ log₂ n more with two choices, and twice the mean with one.
        assert fullest(is_blind=False) <= 13
        assert fullest(is_blind=True) >= 18


class TestRoundRobin:
    @given(st.integers(1, 9), st.integers(0, 1000), BITS)
    def test_gives_equal_turns(self, count: int, first: int, bits: int) -> None:
        nodes = [Node() for _ in range(count)]
        turns = Counter(
            id(choice.node)
            for turn in range(first, first + 3 * count)
            if (choice := choose("round-robin", nodes, bits, [], turn))
        )
        assert sorted(turns.values()) == [3] * count

    def test_a_node_of_a_tenth_takes_a_tenth_of_its_turns(self) -> None:
        new, *others = nodes = [Node(share=0.1, settles_at=99.0), Node(), Node()]
        chance = random.Random(2)
        turns = Counter(
            id(choice.node)
            for turn in range(3_000)
            if (choice := choose("round-robin", nodes, chance.getrandbits(32), [], turn))
        )
        assert 70 <= turns[id(new)] <= 130
        assert all(turns[id(other)] >= 970 for other in others)


class TestLatencyWeighted:
    def test_a_fast_node_is_chosen_until_its_queue_outweighs_a_slow_ones(self) -> None:
        fast, slow = Node(b"f", ttft_at=10.0, peak_ttft_s=0.1), Node(b"s", ttft_at=10.0, peak_ttft_s=0.35)
        chosen: list[bytes] = []
        for _ in range(5):
            choice = choose("latency-weighted", [fast, slow], 0, [])
            assert choice is not None
            choice.node.requests_in_flight += 1
            chosen.append(choice.node.shown_id)
        assert chosen == [b"f", b"f", b"f", b"s", b"f"]

    def test_one_never_heard_of_is_asked_once(self) -> None:
        new, known = Node(b"new"), Node(b"known", ttft_at=10.0, peak_ttft_s=0.1)
        first = choose("latency-weighted", [known, new], 0, [])
        assert first is not None
        assert first.node is new
        new.requests_in_flight = 1
        assert choose("latency-weighted", [known, new], 0, []).node is known  # type: ignore[union-attr]

    def test_an_old_peak_fades(self) -> None:
        was_slow, fast = Node(ttft_at=-90.0, peak_ttft_s=1.0), Node(ttft_at=10.0, peak_ttft_s=0.2)
        assert choose("latency-weighted", [was_slow, fast], 0, []).node is was_slow  # type: ignore[union-attr]


class TestCostWeighted:
    def test_dearer_nodes_are_used_when_the_cheaper_are_busy(self) -> None:
        cheap, dear = [Node(b"c1"), Node(b"c2")], [Node(b"d1"), Node(b"d2")]
        chance = random.Random(4)
        chosen: list[bytes] = []
        for turn in range(8):
            choice = cost_weighted([cheap, dear], 10.0, turn, chance.getrandbits(32), [])
            assert choice is not None
            choice.node.tokens_in_flight += 700
            chosen.append(choice.node.shown_id[:1])
        assert BUSY_S == 15.0  # Two requests make 1 900 tokens of load, 19 s.
        assert chosen == [b"c"] * 4 + [b"d"] * 4

    def test_where_all_are_busy_the_least_loaded_serves(self) -> None:
        prices = [[Node(b"c", 9_000)], [Node(b"d", 5_000)], [Node(b"e", 7_000)]]
        choice = cost_weighted(prices, 10.0, 0, 0, [])
        assert choice is not None
        assert (choice.node.shown_id, len(choice.compared)) == (b"d", 3)


class TestAffinity:
    def test_holds_up_to_a_quarter_above_the_mean(self) -> None:
        mean_s = 100.0
        assert may_keep_affinity(Node(tokens_in_flight=12_500), mean_s, 10.0)
        assert not may_keep_affinity(Node(tokens_in_flight=12_500 + 2_049), mean_s, 10.0)

    def test_holds_on_an_idle_pool_for_two_requests(self) -> None:
        assert may_keep_affinity(Node(tokens_in_flight=2_048), 0.0, 10.0)
        assert not may_keep_affinity(Node(tokens_in_flight=2_049), 0.0, 10.0)

    def test_a_node_on_its_ramp_is_loaded_sooner(self) -> None:
        assert not may_keep_affinity(Node(tokens_in_flight=2_048, share=0.1, settles_at=99.0), 0.0, 10.0)


class TestChoice:
    def _choice(self) -> Choice[Node]:
        nodes = [Node(b"node_a", 500, ttft_s=0.25), Node(b"node_b", 1500, share=0.5, settles_at=99.0)]
        choice = least_load(nodes, 10.0, 0, 0, [])
        assert choice is not None
        choice.eligible, choice.ejected = 2, 1
        return choice

    def test_explains_itself_with_the_figures_of_the_moment(self) -> None:
        choice = self._choice()
        choice.compared[0][0].tokens_in_flight = 0
        expected: dict[str, Any] = {
            "node": "node_a",
            "strategy": "least-load",
            "reason": "least-load",
            "eligible": 2,
            "ejected": 1,
            "compared": [
                {"node": "node_a", "score_s": 10.0, "tokens_in_flight": 500, "ttft_ms": 250, "weight": 1.0},
                {"node": "node_b", "score_s": 40.0, "tokens_in_flight": 1500, "ttft_ms": 0, "weight": 0.5},
            ],
        }
        assert choice.explain() == expected

    def test_fits_a_header(self) -> None:
        assert self._choice().header() == (
            b"strategy=least-load; reason=least-load; eligible=2; ejected=1; compared=node_a=10.000, node_b=40.000"
        )


class TestEjection:
    @pytest.mark.parametrize(
        ("failures", "is_connection_failure", "seconds"),
        [(1, True, 1.0), (2, True, 2.0), (6, True, 30.0), (1, False, 0.0), (2, False, 1.0), (3, False, 2.0)],
    )
    def test_doubles_from_the_first_that_counts(
        self, failures: int, is_connection_failure: bool, seconds: float
    ) -> None:
        assert ejection_s(failures, is_connection_failure=is_connection_failure) == seconds

    @given(st.integers(1, 5000), st.booleans())
    def test_is_never_longer_than_the_longest(self, failures: int, is_connection_failure: bool) -> None:
        assert 0 <= ejection_s(failures, is_connection_failure=is_connection_failure) <= LONGEST_EJECTION_S

    @pytest.mark.parametrize(("count", "share", "most"), [(1, 0.5, 1), (3, 0.5, 1), (10, 0.5, 5), (10, 0.0, 1)])
    def test_a_share_of_the_pool_and_at_least_one_may_be_out(self, count: int, share: float, most: int) -> None:
        assert most_ejected(count, share) == most


class TestWeights:
    def test_a_ramp_goes_from_a_tenth_to_all(self) -> None:
        assert ramp(0.0, 30.0, 30.0) == pytest.approx(LEAST_RAMP)
        assert ramp(15.0, 30.0, 30.0) == pytest.approx(0.55)
        assert ramp(30.0, 30.0, 30.0) == ramp(0.0, 0.0, 0.0) == 1.0

    def test_what_busy_took_comes_back_by_a_twentieth_a_second(self) -> None:
        assert recovered(0.7, 2.0) == pytest.approx(0.8)
        assert recovered(0.7, 60.0) == 1.0


class TestLatencies:
    def test_peaks_are_taken_at_once_and_forgotten_slowly(self) -> None:
        assert peak(0.1, 2.0, 0.0) == 2.0
        assert peak(2.0, 0.1, 0.0) == 2.0
        assert peak(2.0, 0.1, 10.0) == pytest.approx(0.1 + 1.9 / 2.718281828)

    def test_the_first_sample_counts_whole_and_the_next_by_its_share(self) -> None:
        assert smoothed(0.0, 0.4) == 0.4
        assert smoothed(0.4, 1.4) == pytest.approx(0.7)

    @pytest.mark.parametrize(("median_s", "slow_s"), [(0.1, 1.1), (0.5, 1.5), (2.0, 6.0)])
    def test_slow_is_three_times_the_median_and_a_second_more(self, median_s: float, slow_s: float) -> None:
        assert slow_above_s(median_s) == slow_s

    def test_slowness_is_bounded_and_one_where_nothing_is_known(self) -> None:
        found = [slowness(*pair) for pair in [(0.0, 1.0), (1.0, 0.0), (2.0, 1.0), (9.0, 1.0), (0.1, 1.0)]]
        assert found == [1.0, 1.0, 2.0, scheduling.MOST_SLOWNESS, scheduling.LEAST_SLOWNESS]
