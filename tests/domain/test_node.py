from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import (
    FINAL_STATES,
    ON_THE_WAY,
    NodeEvent,
    NodeState,
    RouteEntry,
    advance,
    check_endpoint,
    cluster_name,
    sources_of,
)

S, E = NodeState, NodeEvent
ENDS = {E.TERMINATE: S.TERMINATED, E.FAIL: S.FAILED, E.LOSE: S.LOST}

# The whole machine, written out a second time by hand.
WAYS: dict[tuple[NodeState, NodeEvent], NodeState] = {
    (S.REQUESTED, E.LAUNCH): S.LAUNCHING,
    (S.LAUNCHING, E.BOOT): S.BOOTING,
    (S.BOOTING, E.LOAD): S.LOADING,
    (S.LOADING, E.ADMIT): S.READY,
    (S.READY, E.DRAIN): S.DRAINING,
    **{(state, event): end for state in (*sorted(ON_THE_WAY), S.DRAINING) for event, end in ENDS.items()},
}


class TestAdvance:
    @pytest.mark.parametrize("state", NodeState)
    @pytest.mark.parametrize("event", NodeEvent)
    def test_knows_every_state_and_event(self, state: NodeState, event: NodeEvent) -> None:
        expected = WAYS.get((state, event))
        if expected is None:
            with pytest.raises(InvariantViolated, match=f"a {state} node cannot {event}"):
                advance(state, event)
        else:
            assert advance(state, event) is expected

    def test_never_leaves_a_final_state(self) -> None:
        assert {S.TERMINATED, S.FAILED, S.LOST} == FINAL_STATES

    def test_never_comes_back_to_a_state(self) -> None:
        """F4: no way leads from a state to itself, over however many steps."""
        reached: dict[NodeState, set[NodeState]] = {
            state: {advance(state, event) for event in NodeEvent if (state, event) in WAYS} for state in NodeState
        }
        for _ in NodeState:
            for further in reached.values():
                further |= {last for state in further for last in reached[state]}
        assert not [state for state, further in reached.items() if state in further]

    @pytest.mark.parametrize("event", NodeEvent)
    def test_agrees_with_sources_of(self, event: NodeEvent) -> None:
        assert set(sources_of(event)) == {state for state in NodeState if (state, event) in WAYS}
        # One target per event: the SQL of NodeStore.advance relies on it.
        assert len({advance(state, event) for state in sources_of(event)}) == 1

    def test_ends_a_serving_node_only_through_draining(self) -> None:
        assert {event for event in NodeEvent if (S.READY, event) in WAYS} == {E.DRAIN}


class TestRouteEntry:
    @pytest.mark.parametrize("state", NodeState)
    def test_is_routable_only_when_ready_and_not_tombstoned(self, state: NodeState) -> None:
        entry = RouteEntry("node_x", 1, state, "m", "r", "https://x")
        assert entry.is_routable == (state is S.READY)
        assert not replace(entry, is_tombstoned=True).is_routable


class TestClusterName:
    @given(st.integers(0, 2**48 - 1), st.integers(0, 2**80 - 1))
    def test_fits_every_cloud(self, unix_ms: int, random: int) -> None:
        name = cluster_name("aws", "ap-southeast", "A100-80GB", True, NODE.show(uuid7(unix_ms, random)))
        assert name.startswith("cic-aws-ap-southeast-a100-80gb-spot-")
        assert len(name) <= 63
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


class TestCheckEndpoint:
    @pytest.mark.parametrize(
        ("url", "canonical"),
        [
            ("https://gpu-7.example.com", "https://gpu-7.example.com"),
            ("https://GPU-7.example.com:8443/v1/", "https://gpu-7.example.com:8443"),
            (" https://1.2.3.4/ ", "https://1.2.3.4"),
            ("https://[2001:db8::1]:8000", "https://[2001:db8::1]:8000"),
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("http://localhost:8000", "http://localhost:8000"),
            ("http://[::1]:8000", "http://[::1]:8000"),
        ],
    )
    def test_takes_base_urls(self, url: str, canonical: str) -> None:
        assert check_endpoint(url, is_loopback_allowed=True) == canonical

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("gpu-7.example.com", "write https"),
            ("ftp://gpu-7.example.com", "write https"),
            ("https://", "write https"),
            ("http://gpu-7.example.com", "over https"),
            ("https://user:password@gpu-7.example.com", "credentials"),
            ("https://gpu-7.example.com/admin", "without a path"),
            ("https://gpu-7.example.com?x=1", "without a path"),
            ("https://gpu-7.example.com:99999", "port"),
            ("https://169.254.169.254", "cannot be a node's"),
            ("https://[::ffff:169.254.169.254]", "cannot be a node's"),
            ("https://224.0.0.1", "cannot be a node's"),
            ("https://0.0.0.0", "cannot be a node's"),
            ("https://[fe80::1]", "cannot be a node's"),
        ],
    )
    def test_refuses_what_we_must_not_call(self, url: str, problem: str) -> None:
        with pytest.raises(Rejected, match=problem):
            check_endpoint(url, is_loopback_allowed=True)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://localhost", "https://[::1]", "https://127.9.9.9"])
    def test_refuses_loopback_outside_dev_mode(self, url: str) -> None:
        with pytest.raises(Rejected, match="dev mode"):
            check_endpoint(url, is_loopback_allowed=False)
