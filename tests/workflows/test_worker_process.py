"""`python worker.py` as a process of its own, against the real local cloud and real engines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from crosslogic.bootstrap import ROOT
from crosslogic.clients.engine import EngineClient
from crosslogic.contracts import names
from crosslogic.dev.parts import PythonPart
from crosslogic.dev.state import free_port
from crosslogic.domain.node import NodeState
from crosslogic.settings import Settings, child_environment
from tests.conftest import serving
from tests.workflows.fleet import FleetUnderTest
from workflows.steps import HEARTBEAT_TIMEOUT

TOKEN = "test-token"


class LocalCloudDoor:
    """The local cloud's API, as a test uses it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)

    async def machines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.http.get("/machines")).json()["machines"]
        return [machine for machine in found if machine["status"] != "gone"]

    async def behave(self, **behaviour: Any) -> None:
        (await self.http.put("/behaviour", json=behaviour)).raise_for_status()


def environment_of(settings: Settings, **more: str) -> dict[str, str]:
    """The settings as a process gets them."""
    secret = settings.node_secret
    assert secret is not None
    return child_environment(
        CROSSLOGIC_MODE="dev",
        CROSSLOGIC_DATABASE_URL=settings.database_url.get_secret_value(),
        CROSSLOGIC_REDIS_URL=settings.redis_url.get_secret_value(),
        CROSSLOGIC_REDIS_PREFIX=settings.redis_prefix,
        CROSSLOGIC_TEMPORAL_ADDRESS=settings.temporal_address,
        CROSSLOGIC_FLEET_TASK_QUEUE=settings.fleet_task_queue,
        CROSSLOGIC_NODE_SECRET=secret.get_secret_value(),
        CROSSLOGIC_CLOUD_PROVIDER="local",
        CROSSLOGIC_LOCAL_CLOUD_TOKEN=TOKEN,
        CROSSLOGIC_PROBE_INTERVAL_S="0.5",
        CROSSLOGIC_PROBE_TIMEOUT_S="2",
        CROSSLOGIC_SILENCE_S="5",
        CROSSLOGIC_CLOUD_INTERVAL_S="2",
        PYTHONUNBUFFERED="1",
        **more,
    )


class WorkerProcess:
    """One `python worker.py`."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = environment
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "worker.py"], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """The exit code and how long it took."""
        assert self.process is not None
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(15), time.monotonic() - started

    def says(self, words: str) -> bool:
        return words in self.log.read_text()


@pytest_asyncio.fixture
async def door(idle_fleet: FleetUnderTest, tmp_path: Path) -> AsyncGenerator[LocalCloudDoor]:
    url = f"http://127.0.0.1:{free_port()}"
    environment = environment_of(
        idle_fleet.settings, CROSSLOGIC_LOCAL_CLOUD_URL=url, CROSSLOGIC_STATE_DIR=str(tmp_path / "state")
    )
    part = PythonPart(
        "local-cloud", ["-m", "crosslogic.dev.local_cloud"], environment, sys.executable, f"{url}/behaviour", TOKEN
    )
    context = serving(part, tmp_path)
    await asyncio.to_thread(context.__enter__)
    door = LocalCloudDoor(url)
    try:
        yield door
    finally:
        await door.http.aclose()
        await asyncio.to_thread(context.__exit__, None, None, None)


@pytest_asyncio.fixture
async def worker(idle_fleet: FleetUnderTest, door: LocalCloudDoor, tmp_path: Path) -> AsyncGenerator[WorkerProcess]:
    url = str(door.http.base_url)
    worker = WorkerProcess(environment_of(idle_fleet.settings, CROSSLOGIC_LOCAL_CLOUD_URL=url), tmp_path / "worker.log")
    worker.start()
    try:
        yield worker
    finally:
        if worker.process is not None and worker.process.poll() is None:
            worker.end(signal.SIGTERM)


@asynccontextmanager
async def engine_client(fleet: FleetUnderTest) -> AsyncGenerator[EngineClient]:
    secret = fleet.settings.node_secret
    assert secret is not None
    client = EngineClient(secret.get_secret_value(), 5.0)
    try:
        yield client
    finally:
        await client.close()


class TestWithRealEngines:
    async def test_keeps_a_promise_and_heals(
        self, idle_fleet: FleetUnderTest, worker: WorkerProcess, door: LocalCloudDoor
    ) -> None:
        """The worker starts the entities by itself; an engine's kill -9 is made good without anyone's help."""
        fleet = idle_fleet
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        first = await fleet.until_state(NodeState.READY, within_s=90)
        assert first.endpoint is not None
        async with engine_client(fleet) as client:
            generated = await client.generate(first.node_id, first.endpoint, "llama-3-8b", "chat", 4)
            assert 1 <= generated.tokens <= 4
            load = await client.read_load(first.node_id, first.endpoint)
            assert load is not None
            assert load.total == 0
        (machine,) = await door.machines()
        os.kill(machine["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        await fleet.until("it is lost", lambda: _is(fleet, first.id, NodeState.LOST), within_s=30)
        second = await fleet.until_looked_after()
        assert second.id != first.id
        print(f"replaced after {time.monotonic() - killed_at:.1f} s")
        assert {machine["cluster"] for machine in await door.machines()} == {second.cluster}
        await fleet.lifecycle(second).signal(names.DRAIN)
        code, took_s = worker.end(signal.SIGTERM)
        assert code == 0, worker.log.read_text()
        assert took_s < 4.0

    async def test_that_is_killed_loses_nothing(
        self, idle_fleet: FleetUnderTest, worker: WorkerProcess, door: LocalCloudDoor
    ) -> None:
        """T5, faults a and b: SIGKILL while the machine is coming up, and a lost reply."""
        fleet = idle_fleet
        await door.behave(
            launch_latency_s=3, faults=[{"operation": "create", "kind": "lost_reply", "count": 1, "after": 0}]
        )
        handle = await fleet.provision(drain_timeout_s=1)
        await fleet.until("a machine", lambda: _has(door), within_s=60)
        worker.end(signal.SIGKILL)
        worker.start()
        restarted_at = time.monotonic()

        async def goes_on() -> bool:
            pending = (await handle.describe()).raw_description.pending_activities
            return any(one.attempt > 1 and one.state == 2 for one in pending)

        await fleet.until("the activity runs again", goes_on, within_s=30)
        took_s = time.monotonic() - restarted_at
        print(f"recovered after {took_s:.1f} s")
        # The process itself needs some seconds to start on a busy machine.
        assert took_s <= HEARTBEAT_TIMEOUT.total_seconds() + 4 + 5
        assert (await handle.result())["state"] == "ready"
        assert len(await door.machines()) == 1
        node = await fleet.only_node()
        await fleet.lifecycle(node).signal(names.DRAIN)
        assert (await fleet.lifecycle(node).result())["state"] == "terminated"
        assert await door.machines() == []


class TestWithoutServers:
    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("CROSSLOGIC_TEMPORAL_ADDRESS", "127.0.0.1:1", "waiting for Temporal"),
            ("CROSSLOGIC_DATABASE_URL", "postgresql://x@127.0.0.1:1/x", "waiting for Postgres"),
        ],
    )
    async def test_waits_and_says_for_what(
        self, idle_fleet: FleetUnderTest, tmp_path: Path, setting: str, value: str, words: str
    ) -> None:
        environment = environment_of(idle_fleet.settings) | {setting: value}
        worker = WorkerProcess(environment, tmp_path / "worker.log")
        worker.start()
        await idle_fleet.until(words, lambda: _true(lambda: worker.says(words)), within_s=30)
        code, took_s = worker.end(signal.SIGTERM)
        assert (code, took_s < 4.0) == (0, True)

    async def test_ends_when_its_settings_make_no_sense(self, tmp_path: Path) -> None:
        worker = WorkerProcess(child_environment(CROSSLOGIC_MODE="production"), tmp_path / "worker.log")
        worker.start()
        assert worker.process is not None
        assert worker.process.wait(30) == 2
        assert worker.says("CROSSLOGIC_ADMIN_TOKEN must be set")


async def _is(fleet: FleetUnderTest, node_id: Any, state: NodeState) -> bool:
    return (await fleet.nodes.get(node_id)).state is state


async def _has(door: LocalCloudDoor) -> bool:
    return bool(await door.machines())


async def _true(claim: Callable[[], bool]) -> bool:
    return claim()
