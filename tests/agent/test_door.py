"""What the API lets agents say, and what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from api.agents import AgentContext, read_heartbeat
from crosslogic.domain.errors import Rejected
from crosslogic.domain.heartbeat import Heartbeat

NODE = "node_01k5h2v9q3f4tbz7x8m6n0c1de"


class TestHeartbeat:
    def test_is_its_senders_and_timed_by_the_receiver(self) -> None:
        body = {"node_id": "node_other", "received_at": 1.0, "is_engine_up": True, "running": 3, "kv_cache_used": 0.5}
        beat = read_heartbeat(body | {"of_a_newer_agent": {}}, NODE, 99.0)
        assert beat == Heartbeat(NODE, 99.0, True, running=3, kv_cache_used=0.5)

    @pytest.mark.parametrize(
        "body",
        [
            [],
            {"is_engine_up": "yes"},
            {"running": -1},
            {"running": 1.5},
            {"running": True},
            {"running": 2**60},
            {"kv_cache_used": float("nan")},
            {"notice": "x" * 101},
            {"notice": "a\nb"},
            {"notice": 7},
        ],
    )
    def test_of_the_wrong_shape_is_refused(self, body: Any) -> None:
        with pytest.raises(Rejected):
            read_heartbeat(body, NODE, 1.0)


class TestLimits:
    def make(self) -> AgentContext:
        context = AgentContext.__new__(AgentContext)
        context._tokens, context._refilled_at, context._heard_at = 20.0, 0.0, {}  # pyright: ignore[reportPrivateUsage]
        return context

    def test_registrations_are_bounded_and_come_back(self) -> None:
        context = self.make()
        for _ in range(20):
            context.take_registration(0.0)
        with pytest.raises(Rejected) as refused:
            context.take_registration(0.0)
        assert refused.value.status == 429
        context.take_registration(1.0)

    def test_one_node_cannot_send_without_pause(self) -> None:
        context = self.make()
        context.take_heartbeat("a", 1.0)
        context.take_heartbeat("b", 1.0)
        with pytest.raises(Rejected):
            context.take_heartbeat("a", 1.01)
        context.take_heartbeat("a", 2.0)
