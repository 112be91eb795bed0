"""The local cloud keeps the contract of every cloud."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crosslogic.clients.local_cloud import LocalCloud
from crosslogic.contracts.node import NodeSpec
from tests.clients.cloud_contract import PREFIX, CloudContract
from tests.dev.test_local_cloud import SECRET, TOKEN, Cloud


class LocalLandlord:
    patience_s = 60.0

    def __init__(self, server: Cloud) -> None:
        self._server = server
        self.cloud = LocalCloud(server.url, TOKEN, SECRET, timeout_s=2.0)

    def spec(self, name: str) -> NodeSpec:
        return NodeSpec("node_1", "llama-3-8b", "in-mumbai", provider="local", cluster=f"{PREFIX}{name}")

    def count(self, cluster: str) -> int:
        return sum(machine["status"] != "gone" for machine in self._server.listed(cluster).values())

    def lose_next_reply(self) -> None:
        self._server.behave(faults=[{"operation": "create", "kind": "lost_reply"}])

    def fill(self) -> None:
        self._server.behave(capacity={"in-mumbai": 0})

    def restart(self) -> None:
        self._server.kill()
        self._server.start()

    def take(self, cluster: str) -> None:
        self._server.kill_engines()


@pytest.fixture
async def landlord(tmp_path: Path) -> AsyncIterator[LocalLandlord]:
    server = Cloud(tmp_path)
    server.start()
    made = LocalLandlord(server)
    try:
        yield made
    finally:
        await made.cloud.close()
        server.http.close()
        server.stop()
        server.kill_engines()


class TestContract(CloudContract):
    pass
