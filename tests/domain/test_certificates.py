from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from crosslogic.domain.certificates import (
    NODE_LIFE,
    Authority,
    issuer,
    join_token,
    names_of,
    read_session,
    renew_at,
    session_token,
    trusted,
)
from crosslogic.domain.errors import Rejected

NODE = "node_01k5h2v9q3f4tbz7x8m6n0c1de"
NOW = datetime(2026, 11, 24, tzinfo=UTC)
DAY = timedelta(days=1)


def authority(number: int, created: datetime, issues_from: datetime) -> Authority:
    return Authority(number, "", b"", created, issues_from, created + 10 * DAY)


class TestNames:
    def test_are_the_nodes_own_and_its_endpoints(self) -> None:
        own = "node-01k5h2v9q3f4tbz7x8m6n0c1de.node.crosslogic.internal"
        assert names_of(NODE, "https://gpu-7.example.org:8443") == [own, "gpu-7.example.org"]
        assert names_of(NODE, "https://[2001:db8::1]:8443") == [own, "2001:db8::1"]


class TestRotation:
    def test_a_successor_is_trusted_before_it_issues(self) -> None:
        first, second = authority(1, NOW, NOW), authority(2, NOW + 6 * DAY, NOW + 8 * DAY)
        at = NOW + 7 * DAY
        assert trusted((first, second), at) == [second, first]
        assert issuer((first, second), at) is first
        assert issuer((first, second), NOW + 8 * DAY) is second
        assert trusted((first, second), NOW + 11 * DAY) == [second]
        assert issuer((), NOW) is None

    def test_is_due_after_two_thirds(self) -> None:
        assert renew_at(NOW, NOW + 9 * DAY) == NOW + 6 * DAY


class TestSession:
    def test_names_its_node_until_it_ends(self) -> None:
        token = session_token("s", NODE, 1000)
        assert read_session("s", token, 1001) == NODE
        with pytest.raises(Rejected) as refused:
            read_session("s", token, 1000 + NODE_LIFE.total_seconds())
        assert refused.value.status == 401

    @pytest.mark.parametrize("change", ["node", "moment", "secret", "join token", "nothing"])
    def test_is_no_other_nodes(self, change: str) -> None:
        token = session_token("s", NODE, 1000)
        other = {
            "node": token.replace("01k5", "01k6"),
            "moment": token.replace("_1000_", "_2000_"),
            "secret": session_token("t", NODE, 1000),
            "join token": join_token("s", NODE),
            "nothing": "",
        }[change]
        with pytest.raises(Rejected):
            read_session("s", other, 1001)
