"""The local cloud through its HTTP door, with real engines, and the client that provisioning uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosslogic.bootstrap import ROOT
from crosslogic.clients.local_cloud import LocalCloud
from crosslogic.contracts.node import NodeSpec
from crosslogic.dev.processes import ProcessId
from crosslogic.dev.state import free_port, read_json
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.settings import child_environment

TOKEN = "token-of-the-test"
SECRET = "secret-of-the-test"
START_S = 60.0  # An engine starts in a second; a loaded machine may need much longer.

Machine = dict[str, Any]


def eventually(look: Callable[[], Any], what: str, within_s: float = START_S) -> Any:
    """The first true value that `look` returns."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if found := look():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


class Cloud:
    """One local cloud as a process, and what one can see of it from outside."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "cloud"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._state = state
        self.http = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=10)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = child_environment(
            CROSSLOGIC_MODE="dev",
            CROSSLOGIC_STATE_DIR=str(self._state),
            CROSSLOGIC_LOCAL_CLOUD_URL=self.url,
            CROSSLOGIC_LOCAL_CLOUD_TOKEN=TOKEN,
        )
        with (self._state / "cloud.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "crosslogic.dev.local_cloud"], env=environment, cwd=ROOT, stdout=log, stderr=log
            )
        eventually(lambda: self.http.get("/behaviour").status_code == 200, "the cloud answers")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(10)

    def order(self, cluster: str, **changes: str) -> httpx.Response:
        body = {"model": "llama-3-8b", "kind": "chat", "region": "in-mumbai", "credential": "nc_test"} | changes
        return self.http.put(f"/machines/{cluster}", json=body)

    def show(self, cluster: str) -> Machine:
        return self.http.get(f"/machines/{cluster}").json()

    def listed(self, prefix: str = "") -> dict[str, Machine]:
        machines = self.http.get("/machines", params={"prefix": prefix}).json()["machines"]
        return {machine["cluster"]: machine for machine in machines}

    def wait_for(self, cluster: str, status: str) -> Machine:
        return eventually(lambda: found if (found := self.show(cluster)).get("status") == status else None, status)

    def behave(self, **behaviour: Any) -> None:
        assert self.http.put("/behaviour", json=behaviour).status_code == 200

    def kill_engines(self) -> None:
        for machine in read_json(self.folder / "machines.json").get("machines", {}).values():
            process = ProcessId.read(machine["process"])
            if process:
                process.kill()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    running = Cloud(tmp_path)
    running.start()
    try:
        yield running
    finally:
        running.http.close()
        if running.process and running.process.poll() is None:
            running.stop()
        running.kill_engines()


@pytest.fixture
async def client(cloud: Cloud) -> AsyncIterator[LocalCloud]:
    client = LocalCloud(cloud.url, TOKEN, SECRET, timeout_s=1.0)
    yield client
    await client.close()


def spec(cluster: str, node_id: str = "node_1", *, kind: str = "chat") -> NodeSpec:
    return NodeSpec(
        node_id=node_id,
        model="llama-3-8b",
        region="in-mumbai",
        deployment="",
        provider="local",
        gpu="",
        spot=True,
        cluster=cluster,
        is_pinned=False,
        workflow_id="",
        kind=kind,
    )


def ask(machine: Machine, credential: str | None) -> httpx.Response:
    headers = {"authorization": f"Bearer {credential}"} if credential else {}
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return httpx.post(f"{machine['endpoint']}/v1/chat/completions", json=body, headers=headers, timeout=60)


class TestMachines:
    async def test_serves_who_has_the_credential_and_is_gone_when_ended(self, cloud: Cloud, client: LocalCloud) -> None:
        assert await client.find("cic-1") is None
        await client.ensure(spec("cic-1"))
        machine = cloud.wait_for("cic-1", "running")
        answer = ask(machine, node_credential(SECRET, "node_1"))
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"]
        assert answer.json()["model"] == "llama-3-8b", "the file's name must not leak"
        assert ask(machine, None).status_code == 401
        assert ask(machine, node_credential(SECRET, "node_2")).status_code == 401
        found = await client.find("cic-1")
        assert found is not None
        assert (found.status, found.endpoint) == ("running", machine["endpoint"])
        # Ordering and ending again has no further effect.
        await client.ensure(spec("cic-1"))
        assert cloud.show("cic-1")["pid"] == machine["pid"]
        await client.end("cic-1")
        await client.end("cic-1")
        await client.end("cic-never-there")
        assert cloud.wait_for("cic-1", "gone")["reason"] == "ended by order"
        assert [listed.status for listed in await client.list_all("cic-")] == ["gone"]
        assert await client.list_all("other-") == []

    async def test_an_embedding_machine_embeds(self, cloud: Cloud, client: LocalCloud) -> None:
        await client.ensure(spec("cic-1", kind="embedding"))
        machine = cloud.wait_for("cic-1", "running")
        headers = {"authorization": f"Bearer {node_credential(SECRET, 'node_1')}"}
        body = {"input": ["one", "two"]}
        async with httpx.AsyncClient(headers=headers, timeout=60) as http:
            answer = await http.post(f"{machine['endpoint']}/v1/embeddings", json=body)
        vectors = [item["embedding"] for item in answer.json()["data"]]
        assert len(vectors) == 2
        assert vectors[0] != vectors[1]

    def test_a_killed_engine_is_gone_within_a_second(self, cloud: Cloud) -> None:
        cloud.order("cic-1")
        os.kill(cloud.wait_for("cic-1", "running")["pid"], signal.SIGKILL)
        gone = eventually(lambda: cloud.show("cic-1")["status"] == "gone" and cloud.show("cic-1"), "gone", within_s=2)
        assert gone["reason"] == "the machine died (SIGKILL)"
        assert gone["endpoint"] == ""

    def test_machines_survive_the_cloud_and_are_taken_over(self, cloud: Cloud) -> None:
        cloud.order("cic-1")
        cloud.order("cic-2")
        before = cloud.wait_for("cic-1", "running")
        doomed = cloud.wait_for("cic-2", "running")
        cloud.kill()
        assert ask(before, "nc_test").status_code == 200
        os.kill(doomed["pid"], signal.SIGKILL)
        cloud.start()
        assert cloud.show("cic-1") == before
        assert cloud.wait_for("cic-2", "gone")
        cloud.http.delete("/machines/cic-1")
        cloud.wait_for("cic-1", "gone")
        assert ProcessId.of(before["pid"]) is None

    def test_a_clean_stop_switches_machines_off_and_the_next_start_on_again(self, cloud: Cloud) -> None:
        cloud.order("cic-1")
        before = cloud.wait_for("cic-1", "running")
        cloud.stop()
        assert ProcessId.of(before["pid"]) is None
        cloud.start()
        after = cloud.wait_for("cic-1", "running")
        assert after["pid"] != before["pid"]
        assert after["endpoint"] == before["endpoint"]
        assert ask(after, "nc_test").status_code == 200

    def test_another_order_of_the_same_name_is_refused(self, cloud: Cloud) -> None:
        cloud.behave(launch_latency_s=60)
        assert cloud.order("cic-1").status_code == 202
        refused = cloud.order("cic-1", region="us-east")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_taken")

    @pytest.mark.parametrize("name", ["..%2F..%2Fetc", "-x", "A", "a" * 129])
    def test_refuses_names_that_are_no_file_names(self, cloud: Cloud, name: str) -> None:
        assert cloud.order(name).status_code == 400

    def test_refuses_whoever_has_no_token(self, cloud: Cloud) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert httpx.get(f"{cloud.url}/machines", headers=headers).status_code == 401

    def test_keeps_credentials_to_the_owner(self, cloud: Cloud) -> None:
        cloud.order("cic-1")
        machine = cloud.wait_for("cic-1", "running")
        assert (cloud.folder / "machines.json").stat().st_mode & 0o077 == 0
        assert "nc_test" not in Path(f"/proc/{machine['pid']}/cmdline").read_text()
        assert "nc_test" not in Path(f"/proc/{machine['pid']}/environ").read_text()


class TestBehaviour:
    """None of these machines boots: the launch latency keeps them starting."""

    @pytest.fixture(autouse=True)
    def _slow(self, cloud: Cloud) -> None:
        cloud.behave(launch_latency_s=60)

    async def test_a_slow_launch_can_be_ended_before_it_boots(self, cloud: Cloud, client: LocalCloud) -> None:
        await client.ensure(spec("cic-1"))
        assert cloud.show("cic-1")["status"] == "starting"
        await client.end("cic-1")
        assert cloud.wait_for("cic-1", "gone")["pid"] == 0

    async def test_a_full_region_has_no_capacity(self, cloud: Cloud, client: LocalCloud) -> None:
        cloud.behave(launch_latency_s=60, capacity={"in-mumbai": 1})
        await client.ensure(spec("cic-1"))
        with pytest.raises(Rejected) as refused:
            await client.ensure(spec("cic-2"))
        assert refused.value.code == "no_capacity"
        await client.ensure(spec("cic-1"))
        await client.end("cic-1")
        cloud.wait_for("cic-1", "gone")
        await client.ensure(spec("cic-2"))

    async def test_error_has_no_effect(self, cloud: Cloud, client: LocalCloud) -> None:
        cloud.behave(launch_latency_s=60, faults=[{"operation": "create", "kind": "error", "after": 1, "count": 2}])
        await client.ensure(spec("cic-1"))
        for _ in range(2):
            with pytest.raises(Unavailable):
                await client.ensure(spec("cic-2"))
        assert await client.find("cic-2") is None
        await client.ensure(spec("cic-2"))

    async def test_lost_reply_has_its_effect(self, cloud: Cloud, client: LocalCloud) -> None:
        faults = [{"operation": operation, "kind": "lost_reply"} for operation in ("create", "delete")]
        cloud.behave(launch_latency_s=60, faults=faults)
        with pytest.raises(httpx.RemoteProtocolError):
            cloud.order("cic-1")
        assert cloud.show("cic-1")["status"] == "starting"
        with pytest.raises(Unavailable):
            await client.end("cic-1")
        cloud.wait_for("cic-1", "gone")

    async def test_hang_never_answers_and_has_no_effect(self, cloud: Cloud, client: LocalCloud) -> None:
        faults = [{"operation": operation, "kind": "hang"} for operation in ("create", "get", "list")]
        cloud.behave(launch_latency_s=60, faults=faults)
        with pytest.raises(Unavailable):
            await client.ensure(spec("cic-1"))
        with pytest.raises(Unavailable):
            await client.find("cic-1")
        with pytest.raises(Unavailable):
            await client.list_all("")
        assert await client.find("cic-1") is None

    async def test_no_capacity_by_order(self, cloud: Cloud, client: LocalCloud) -> None:
        cloud.behave(launch_latency_s=60, faults=[{"operation": "create", "kind": "no_capacity"}])
        with pytest.raises(Rejected) as refused:
            await client.ensure(spec("cic-1"))
        assert refused.value.code == "no_capacity"
        assert await client.find("cic-1") is None

    def test_the_list_lags_behind_orders_and_ends(self, cloud: Cloud) -> None:
        cloud.behave(list_lag_s=1.0)
        cloud.order("cic-1")
        assert cloud.listed() == {}
        assert cloud.show("cic-1")["status"] in ("starting", "running")
        running = cloud.wait_for("cic-1", "running")
        eventually(lambda: "cic-1" in cloud.listed(), "listed")
        cloud.http.delete("/machines/cic-1")
        cloud.wait_for("cic-1", "gone")
        assert cloud.listed()["cic-1"]["status"] == "running"
        assert cloud.listed()["cic-1"]["endpoint"] == running["endpoint"]
        eventually(lambda: cloud.listed()["cic-1"]["status"] == "gone", "gone from the list", within_s=5)

    def test_faults_survive_a_kill_of_the_cloud(self, cloud: Cloud) -> None:
        cloud.behave(launch_latency_s=60, faults=[{"operation": "create", "kind": "error", "count": 2}])
        assert cloud.order("cic-1").status_code == 500
        cloud.kill()
        cloud.start()
        assert cloud.order("cic-1").status_code == 500
        assert cloud.order("cic-1").status_code == 202

    def test_refuses_what_it_does_not_know(self, cloud: Cloud) -> None:
        refused = cloud.http.put("/behaviour", json={"faults": [{"operation": "create", "kind": "sulk"}]})
        assert refused.status_code == 400
        assert "faults.0.kind" in refused.json()["error"]["message"]


class TestClient:
    async def test_nobody_there_is_unavailable(self) -> None:
        client = LocalCloud(f"http://127.0.0.1:{free_port()}", TOKEN, SECRET)
        with pytest.raises(Unavailable):
            await client.find("cic-1")
        await client.close()

    async def test_a_wrong_token_is_unavailable(self, cloud: Cloud) -> None:
        client = LocalCloud(cloud.url, "wrong", SECRET)
        with pytest.raises(Unavailable, match="token"):
            await client.ensure(spec("cic-1"))
        await client.close()
