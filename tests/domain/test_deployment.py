from __future__ import annotations

import pytest

from crosslogic.domain.deployment import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Replica,
    counts,
    failed,
    failures_in_a_row,
    pause_left_s,
)
from crosslogic.domain.node import ON_THE_WAY, NodeState


def replica(state: NodeState, ended_for_s: float = 0.0, *, is_tombstoned: bool = False) -> Replica:
    return Replica("node_x", "in-mumbai", state, is_tombstoned, ended_for_s)


READY, FAILED = replica(NodeState.READY), replica(NodeState.FAILED)


class TestCounts:
    @pytest.mark.parametrize("state", NodeState)
    @pytest.mark.parametrize("is_tombstoned", [False, True])
    def test_what_serves_or_will(self, state: NodeState, is_tombstoned: bool) -> None:
        expected = not is_tombstoned and state in {*ON_THE_WAY, NodeState.READY}
        assert counts(replica(state, is_tombstoned=is_tombstoned)) == expected

    @pytest.mark.parametrize("state", NodeState)
    @pytest.mark.parametrize("is_tombstoned", [False, True])
    def test_never_as_replica_and_failure_at_once(self, state: NodeState, is_tombstoned: bool) -> None:
        one = replica(state, is_tombstoned=is_tombstoned)
        assert not (counts(one) and failed(one))
        assert failed(one) == (state is NodeState.FAILED or (is_tombstoned and state in ON_THE_WAY))


class TestPause:
    @pytest.mark.parametrize(
        ("failures", "pause_s"), [(1, FIRST_PAUSE_S), (2, 10), (3, 20), (6, 160), (7, LONGEST_PAUSE_S), (90, 300)]
    )
    def test_is_twice_as_long_after_each_failure(self, failures: int, pause_s: float) -> None:
        assert pause_left_s(failures_in_a_row([replica(NodeState.FAILED, pause_s - 1)] * failures)) == 1
        assert pause_left_s(failures_in_a_row([replica(NodeState.FAILED, pause_s)] * failures)) == 0

    def test_counts_failures_up_to_the_first_node_that_was_none(self) -> None:
        past = [replica(NodeState.LOST)] + [FAILED] * 20
        assert failures_in_a_row([FAILED, *past]) == [FAILED]
        # One that serves in between does not end the row: it was ordered in another try.
        assert pause_left_s(failures_in_a_row([FAILED, READY, FAILED])) == 2 * FIRST_PAUSE_S

    def test_is_none_without_a_failure(self) -> None:
        assert pause_left_s(failures_in_a_row([READY, replica(NodeState.LOST)])) == 0
