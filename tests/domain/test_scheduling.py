"""The choice of a node and how long a failing one is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.scheduling import LONGEST_EJECTION_S, choose, ejection_s, load


@dataclass(frozen=True)
class Node:
    capacity_tokens_per_s: int = 100
    tokens_in_flight: int = 0
    ejected_until: float = 0.0


NODES = st.lists(
    st.builds(
        Node,
        capacity_tokens_per_s=st.integers(0, 1000),
        tokens_in_flight=st.integers(0, 10_000),
        ejected_until=st.sampled_from([0.0, 5.0, 50.0]),
    ),
    max_size=8,
)


class TestChoose:
    @given(NODES, st.integers(0, 1000))
    def test_takes_the_least_loaded_of_those_that_are_not_ejected(self, nodes: list[Node], turn: int) -> None:
        chosen = choose(nodes, 10.0, turn)
        if not nodes:
            assert chosen is None
            return
        usable = [node for node in nodes if node.ejected_until <= 10.0] or nodes
        assert chosen in usable
        assert load(chosen) == min(map(load, usable))  # type: ignore[arg-type]

    @given(st.integers(1, 9), st.integers(0, 1000))
    def test_equal_ones_take_turns(self, count: int, first: int) -> None:
        nodes = [Node(capacity_tokens_per_s=100) for _ in range(count)]
        # Equal nodes compare equal, so they are told apart by identity.
        turns = Counter(id(choose(nodes, 0.0, turn)) for turn in range(first, first + 3 * count))
        assert sorted(turns.values()) == [3] * count

    def test_a_larger_node_takes_more(self) -> None:
        assert choose([Node(100, 500), Node(1000, 900)], 0.0, 0) == Node(1000, 900)

    def test_a_node_nobody_has_measured_counts_as_a_slow_one(self) -> None:
        assert load(Node(0, 40)) == 2.0

    def test_ejected_ones_are_tried_when_nothing_else_is_left(self) -> None:
        assert choose([Node(ejected_until=99.0)], 0.0, 0) is not None


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
