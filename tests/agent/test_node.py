"""A node's whole life with a real agent, a real engine, the real API and a real worker."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from crosslogic.agent.build import build
from crosslogic.contracts import names
from crosslogic.dev.state import free_port
from crosslogic.domain import keys
from crosslogic.domain.certificates import server_name
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeState
from crosslogic.hot import connection as hot
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.new_ids import new_id
from crosslogic.store.agents import AgentStore
from crosslogic.trust import Trust
from tests.agent.metadata import Metadata
from tests.agent.processes import ADMIN, Process, agent_process, api_process, until
from tests.workflows.fleet import FleetUnderTest

ENGINE = f"{sys.executable} -m tests.e2e.plain_engine {{port}}"


class Node:
    """One invited node, its agent and its API."""

    def __init__(self, fleet: FleetUnderTest, metadata: Metadata, folder: Path) -> None:
        self.fleet = fleet
        self.folder = folder
        self.metadata = metadata
        self.api, self.url = api_process(fleet.settings, folder)
        self.http = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20)
        self.port = free_port()
        self.engine_port = free_port()
        self.agent: Process | None = None
        self.id = ""
        self.redis = hot.connect(fleet.settings)
        self.heartbeats = HeartbeatBoard(self.redis, fleet.settings.redis_prefix)

    async def start_api(self) -> None:
        self.api.start()

        async def is_ready() -> bool:
            return (await self.http.get("/readyz")).status_code == 200

        await until("the API is ready", is_ready, self.api.log)

    async def invite(self, **more: Any) -> dict[str, Any]:
        body = {"model": "llama-7b", "region": "in-mumbai", **more}
        answer = await self.http.post("/admin/nodes/invite", json=body, headers=ADMIN)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def start_agent(self, invitation: dict[str, Any], command: str = ENGINE) -> None:
        self.id = invitation["node_id"]
        zipapp = (await self.http.get("/agent/crosslogic-agent.pyz")).content
        self.agent = agent_process(
            self.folder,
            zipapp,
            CONTROL_URL=self.url,
            JOIN_TOKEN=invitation["join_token"],
            NODE_ID=self.id,
            ENGINE="llamacpp",
            ENGINE_COMMAND=command,
            ENGINE_PORT=str(self.engine_port),
            LISTEN=f"127.0.0.1:{self.port}",
            STATE_DIR=str(self.folder / "agent"),
            HEARTBEAT_MS="300",
            CACHE_DIRS=str(self.folder / "cache"),
            AZURE_METADATA=self.metadata.url,
            AWS_EC2_METADATA_SERVICE_ENDPOINT=self.metadata.url,
            GCE_METADATA_HOST=self.metadata.host,
        )
        self.agent.start()

    async def until_state(self, state: NodeState, within_s: float = 60.0) -> None:
        async def look() -> bool:
            node = await self.fleet.nodes.find(NODE.parse(self.id))
            return node is not None and node.state is state

        assert self.agent is not None
        await until(f"the node is {state}", look, self.agent.log, self.api.log, within_s=within_s)

    async def beat(self) -> Any:
        return (await self.heartbeats.read_many([self.id])).get(self.id)

    def engines(self) -> list[psutil.Process]:
        assert self.agent is not None
        assert self.agent.process is not None
        return psutil.Process(self.agent.process.pid).children()

    async def stop(self) -> None:
        if self.agent is not None:
            self.agent.end()
        self.api.end()
        await self.http.aclose()
        await self.redis.aclose()


@pytest_asyncio.fixture
async def node(fleet: FleetUnderTest, metadata: Metadata, tmp_path: Path) -> AsyncGenerator[Node]:
    made = Node(fleet, metadata, tmp_path)
    try:
        await made.start_api()
        yield made
    finally:
        await made.stop()


async def add_org(fleet: FleetUnderTest, name: str) -> str:
    """An org with a key; its secret."""
    org, environment = new_id(), new_id()
    secret = keys.mint("dev", os.urandom(keys.RANDOM_BYTES))
    sql = fleet.pool.execute
    await sql("INSERT INTO orgs (id, name, region_preferences) VALUES ($1, $2, '{in-mumbai}')", org, name)
    await sql("INSERT INTO environments (id, org_id, name) VALUES ($1, $2, 'dev')", environment, org)
    await sql(
        "INSERT INTO keys (id, environment_id, secret_hash, hint) VALUES ($1, $2, $3, $4)",
        new_id(),
        environment,
        keys.hash_secret(secret),
        keys.hint_of(secret),
    )
    return secret


async def ask(node: Node, secret: str, timeout_s: float = 30.0) -> httpx.Response:
    body = {"model": "llama-7b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return await node.http.post(
        "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}, timeout=timeout_s
    )


class TestNode:
    async def test_joins_serves_and_outlives_its_engine_and_its_control_plane(self, node: Node) -> None:
        """F9 among others: every step rests on the one before, and starting all of it again would take longer."""
        fleet = node.fleet
        acme, other = await add_org(fleet, "acme"), await add_org(fleet, "other")
        await node.start_agent(await node.invite(org="acme"))
        await node.until_state(NodeState.READY)

        # Its key never left it, its certificate is ours, and the node is its org's alone (H6).
        row = await fleet.nodes.get(NODE.parse(node.id))
        assert row.has_agent
        assert row.endpoint == f"https://127.0.0.1:{node.port}"
        assert (await fleet.routes())[node.id].org.startswith("org_")
        kept = node.folder / "agent"
        assert (kept / "identity.json").stat().st_mode & 0o077 == 0

        async def served() -> Any:
            answer = await ask(node, acme)
            return answer if answer.status_code == 200 else None

        answer = await until("a request is served", served, node.api.log)
        assert answer.headers["x-crosslogic-node"] == node.id
        assert answer.headers["x-crosslogic-region"] == "in-mumbai"
        refused = await ask(node, other)
        assert refused.status_code == 503, refused.text
        assert node.id not in refused.text

        # Nobody without a client certificate of ours gets in, though the engine itself would answer.
        async with httpx.AsyncClient(trust_env=False, verify=False) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get(f"https://127.0.0.1:{node.port}/health")

        beat = await until("a heartbeat counts its tokens", lambda: _counted(node), node.api.log)
        assert beat.is_engine_up
        assert beat.prompt_tokens > 0
        assert beat.disk_free_mb > 0
        assert beat.engine_restarts == 0

        # The engine dies: the agent starts it again, and says so.
        (engine,) = node.engines()
        engine.kill()

        async def restarted() -> Any:
            latest = await node.beat()
            return latest.engine_restarts == 1 and latest.is_engine_up

        await until("the engine runs again", restarted, node.agent.log if node.agent else node.api.log)

        # The control plane is away: whoever has a certificate of ours is still served.
        node.api.end(signal.SIGKILL)
        assert node.agent is not None

        async def noticed() -> bool:
            return bool(node.agent and node.agent.said("the control plane is away"))

        await until("the agent misses its control plane", noticed, node.agent.log)
        trust = Trust(AgentStore(fleet.pool), _secret(fleet), "test.crosslogic.internal", lambda: datetime.now(UTC))
        await trust.refresh()
        async with httpx.AsyncClient(trust_env=False, verify=trust.context) as ours:
            answer = await ours.get(
                f"https://127.0.0.1:{node.port}/health", extensions={"sni_hostname": server_name(node.id)}
            )
            assert answer.status_code == 200
        # And a notice that comes meanwhile is told as soon as it can be.
        node.metadata.aws_action = {"action": "terminate", "time": "2099-01-01T00:00:00Z"}

        async def tried() -> bool:
            return bool(node.agent and node.agent.said("the notice was not taken yet"))

        await until("the agent tries to tell of the notice", tried, node.agent.log)
        await node.start_api()

        async def drains() -> bool:
            return (await fleet.routes()).get(node.id) is None or (
                (await fleet.routes())[node.id].state is NodeState.DRAINING
            )

        await until("the node leaves routing", drains, node.agent.log, node.api.log)
        row = await fleet.nodes.get(NODE.parse(node.id))
        assert "aws: terminate" in row.reason
        handle = fleet.client.get_workflow_handle(names.node_workflow_id(node.id))

        async def told() -> bool:
            return names.SPOT_NOTICE in [
                event.workflow_execution_signaled_event_attributes.signal_name
                async for event in handle.fetch_history_events()
                if event.HasField("workflow_execution_signaled_event_attributes")
            ]

        await until("the node's workflow is told", told, node.api.log)
        assert (await until("the board has the notice", node.beat)).notice == "aws: terminate"


async def _counted(node: Node) -> Any:
    latest = await node.beat()
    return latest if latest is not None and latest.completion_tokens else None


def _secret(fleet: FleetUnderTest) -> str:
    secret = fleet.settings.node_secret
    assert secret is not None
    return secret.get_secret_value()


class TestBuild:
    async def test_the_api_serves_the_same_bytes_that_anybody_builds(self, node: Node) -> None:
        served = (await node.http.get("/agent/crosslogic-agent.pyz")).content
        assert served == build() == build()
        line = (await node.http.get("/agent/crosslogic-agent.pyz.sha256")).text
        (node.folder / "crosslogic-agent.pyz").write_bytes(served)
        assert line == f"{hashlib.sha256(served).hexdigest()}  crosslogic-agent.pyz\n"
