from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from crosslogic.domain.credentials import MARK_LENGTH, machine_mark
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import FINAL_STATES, Node, NodeState, cluster_name
from crosslogic.domain.sweep import (
    ENDING_GRACE_S,
    MISSING_GRACE_S,
    Standing,
    bears_our_mark,
    is_missing,
    judge_machine,
    most_unintended,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SECRET = "the node secret of this installation"


def node(state: NodeState = NodeState.READY, *, over_for_s: float | None = None, age_s: float = 3_600) -> Node:
    node_id = uuid7(1_000, 12345)
    at = NOW - timedelta(seconds=age_s)
    over_at = None if over_for_s is None else NOW - timedelta(seconds=over_for_s)
    return Node(
        id=node_id,
        deployment=None,
        model="llama-3-8b",
        region="in-mumbai",
        provider="local",
        cluster=cluster_name("local", "in-mumbai", "cpu", True, NODE.show(node_id), SECRET),
        gpu="cpu",
        is_spot=True,
        is_pinned=False,
        state=state,
        generation=5,
        reason="",
        endpoint="https://10.0.0.1",
        capacity_tokens_per_s=0,
        workflow_id="node/x",
        drain_timeout_s=120,
        created_at=at,
        changed_at=at,
        ready_at=at,
        tombstoned_at=over_at,
        ended_at=over_at if state in FINAL_STATES else None,
    )


class TestMark:
    def test_is_in_the_name_and_only_of_this_installation(self) -> None:
        name = node().cluster
        assert name.startswith("cic-local-in-mumbai-cpu-spot-")
        assert bears_our_mark(name, SECRET)
        assert not bears_our_mark(name, "the node secret of another one")
        assert not bears_our_mark(name[:-1] + ("a" if name[-1] != "a" else "b"), SECRET)

    @pytest.mark.parametrize("name", ["", "cic-", "cic-local-in-mumbai-cpu-spot-", "cic-x-12345", "cic-x-1234567890"])
    def test_is_not_in_names_of_other_forms(self, name: str) -> None:
        assert not bears_our_mark(name, SECRET)

    def test_depends_on_the_node(self) -> None:
        marks = {machine_mark(SECRET, f"node{number}") for number in range(200)}
        assert len(marks) == 200
        assert {len(mark) for mark in marks} == {MARK_LENGTH}

    def test_leaves_names_without_a_secret_as_they_were(self) -> None:
        assert cluster_name("local", "eu-west", "L4", False, NODE.show(uuid7(1, 2))).endswith("-od-0000000002")


class TestJudgeMachine:
    @pytest.mark.parametrize("state", [state for state in NodeState if state not in FINAL_STATES])
    def test_owns_what_a_living_row_claims(self, state: NodeState) -> None:
        assert judge_machine(node(state), True, NOW).standing is Standing.OWNED
        # A node from before there were marks.
        assert judge_machine(node(state), False, NOW).standing is Standing.OWNED

    @pytest.mark.parametrize("state", NodeState)
    def test_leaves_the_undoing_to_its_workflow_for_a_while(self, state: NodeState) -> None:
        """F3."""
        assert judge_machine(node(state, over_for_s=ENDING_GRACE_S), True, NOW).standing is Standing.ENDING
        judged = judge_machine(node(state, over_for_s=ENDING_GRACE_S + 1), True, NOW)
        assert judged.standing is Standing.ORPHAN
        assert f"is {state} and over for 301 s" in judged.reason

    def test_tells_ours_from_other_installations(self) -> None:
        assert judge_machine(None, True, NOW).standing is Standing.UNINTENDED
        assert judge_machine(None, False, NOW).standing is Standing.FOREIGN

    def test_counts_from_the_tombstone(self) -> None:
        row = replace(node(NodeState.FAILED, over_for_s=10), tombstoned_at=NOW - timedelta(hours=1))
        assert judge_machine(row, True, NOW).standing is Standing.ORPHAN


class TestIsMissing:
    @pytest.mark.parametrize("state", NodeState)
    def test_expects_machines_of_nodes_that_have_had_one(self, state: NodeState) -> None:
        has_one = state in (NodeState.BOOTING, NodeState.LOADING, NodeState.READY, NodeState.DRAINING)
        assert is_missing(node(state), NOW) is has_one

    def test_gives_lists_time(self) -> None:
        assert not is_missing(node(age_s=MISSING_GRACE_S), NOW)
        assert is_missing(node(age_s=MISSING_GRACE_S + 1), NOW)

    def test_leaves_tombstoned_nodes_to_their_undoing(self) -> None:
        assert not is_missing(node(NodeState.DRAINING, over_for_s=1), NOW)


class TestMostUnintended:
    @pytest.mark.parametrize(("machines", "most"), [(0, 1), (1, 1), (19, 1), (20, 2), (1_000, 100)])
    def test_is_one_or_a_tenth(self, machines: int, most: int) -> None:
        assert most_unintended(machines) == most
