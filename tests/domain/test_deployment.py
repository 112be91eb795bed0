from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.deployment import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    RegionTarget,
    Replica,
    counts,
    failed,
    plan_region,
)
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, NodeState

TARGET = RegionTarget("in-mumbai", 2, 5)


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


class TestPlanRegion:
    @pytest.mark.parametrize(("present", "missing"), [(0, 2), (1, 1), (2, 0), (3, 0)])
    def test_orders_what_is_missing(self, present: int, missing: int) -> None:
        plan = plan_region(TARGET, [READY] * present)
        assert plan.missing == missing
        assert f"{present} of 2 replicas present" in plan.reason

    @pytest.mark.parametrize("state", [NodeState.LOST, NodeState.TERMINATED, NodeState.DRAINING])
    def test_replaces_at_once_what_was_lost_or_drains(self, state: NodeState) -> None:
        assert plan_region(TARGET, [replica(state), READY]).missing == 1

    @pytest.mark.parametrize(
        ("failures", "pause_s"), [(1, FIRST_PAUSE_S), (2, 10), (3, 20), (6, 160), (7, LONGEST_PAUSE_S), (90, 300)]
    )
    def test_pauses_twice_as_long_after_each_failure(self, failures: int, pause_s: float) -> None:
        waiting = plan_region(TARGET, [replica(NodeState.FAILED, pause_s - 1)] * failures)
        assert (waiting.missing, waiting.look_again_s) == (0, 1)
        assert plan_region(TARGET, [replica(NodeState.FAILED, pause_s)] * failures).missing == 2

    def test_counts_failures_up_to_the_first_node_that_was_none(self) -> None:
        past = [replica(NodeState.LOST)] + [FAILED] * 20
        assert plan_region(TARGET, [FAILED, *past]).look_again_s == FIRST_PAUSE_S
        # One that serves in between does not end the row: it was ordered in another try.
        assert plan_region(TARGET, [FAILED, READY, FAILED]).look_again_s == 2 * FIRST_PAUSE_S

    def test_waits_for_one_that_is_being_undone(self) -> None:
        undone = replica(NodeState.LAUNCHING, is_tombstoned=True)
        assert plan_region(TARGET, [undone, READY]).missing == 0

    @given(
        st.lists(
            st.builds(replica, st.sampled_from(NodeState), st.floats(0, 1e4), is_tombstoned=st.booleans()), max_size=30
        ),
        st.integers(0, 9),
    )
    def test_never_orders_beyond_the_promise(self, replicas: list[Replica], least: int) -> None:
        """F7: what is present and what is ordered never exceed replicas_min together, unless it did already."""
        plan = plan_region(RegionTarget("in-mumbai", least, 9), replicas)
        present = sum(counts(one) for one in replicas)
        assert plan.missing == 0 or present + plan.missing <= least
        assert plan.look_again_s > 0
        assert all(one.state in FINAL_STATES or plan.missing <= least for one in replicas)
