"""Kills from outside, one part after the other: the API serves on, and afterwards the state is right."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import make_key
from tests.e2e.stack import Stack, eventually, free_port


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    stack = Stack(tmp_path_factory.mktemp("kills"), free_port())
    try:
        stack.wait_until_serving()
        stack.wait_for_nodes(3, model="llama-3-8b")
        stack.wait_for_nodes(1, model="bge-base-en")
        yield stack, make_key(stack)
    finally:
        stack.stop()


def engine_of(node: dict[str, object]) -> psutil.Process:
    """The engine process of a node, found by the port in its endpoint."""
    port = int(str(node["endpoint"]).rsplit(":", 1)[1])
    for process in psutil.process_iter(["cmdline"]):
        if "crosslogic.dev.engine" not in " ".join(process.info["cmdline"] or []):
            continue
        if any(connection.laddr.port == port for connection in process.net_connections(kind="inet")):
            return process
    raise LookupError(f"no engine on port {port}")


def wait_for_replacement(stack: Stack, node_id: str) -> list[dict[str, Any]]:
    """Three chat nodes that serve, and the one that was killed is none of them."""

    def look() -> list[dict[str, Any]]:
        nodes = stack.nodes(state="ready", model="llama-3-8b")
        return nodes if len(nodes) == 3 and node_id not in {node["id"] for node in nodes} else []

    return eventually(look, within_s=90, what=f"a replacement of {node_id}")


class TestEngine:
    def test_a_killed_engine_is_routed_around_and_replaced(self, own: tuple[Stack, str]) -> None:
        stack, key = own
        victim = stack.nodes(state="ready", model="llama-3-8b", region="in-mumbai")[0]
        engine_of(victim).kill()
        answers = [stack.ask("hi", key=key, max_tokens=2) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6, "no client may notice"
        assert victim["id"] not in {answer.headers["x-crosslogic-node"] for answer in answers}
        nodes = wait_for_replacement(stack, victim["id"])
        shown = json.loads(stack.command("nodes", "show", str(victim["id"]), "--json").stdout)
        assert shown["state"] in ("lost", "failed")
        ended = stack.temporal("workflow", "result", "--workflow-id", f"node/{victim['id']}", "-o", "json")
        assert json.loads(ended.stdout)["result"]["state"] == shown["state"]
        listed = stack.temporal(
            "workflow",
            "list",
            "--query",
            'WorkflowType="NodeProvisioning" AND ExecutionStatus="Completed"',
            "-o",
            "json",
        )
        replacement = {node["id"] for node in nodes}
        assert any(node_id in listed.stdout for node_id in replacement)

    def test_an_answer_outlives_the_engine_that_began_it(self, own: tuple[Stack, str]) -> None:
        stack, key = own
        body = {
            "model": "llama-7b",
            "messages": [{"role": "user", "content": "Write a very long story."}],
            "max_tokens": 800,
            "stream": True,
        }
        nodes = {node["id"]: node for node in stack.nodes(state="ready", model="llama-3-8b")}
        events: list[str] = []
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                events.append(line)
                if len(events) == 10:
                    engine_of(nodes[answer.headers["x-crosslogic-node"]]).kill()
        assert events[-1] == "data: [DONE]"
        assert not any("stream_cut" in event for event in events)
        assert len(events) > 20
        wait_for_replacement(stack, answer.headers["x-crosslogic-node"])


class Load:
    """Requests one after the other from a thread of its own; what they were answered."""

    def __init__(self, stack: Stack, key: str) -> None:
        self.codes: list[int | str] = []
        self._is_over = threading.Event()
        self._stack, self._key = stack, key
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                self.codes.append(self._stack.ask("hi", key=self._key, max_tokens=2).status_code)
            except httpx.HTTPError as error:
                self.codes.append(type(error).__name__)
            time.sleep(0.05)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(70)


class TestParts:
    @pytest.mark.parametrize(
        "marks",
        [
            pytest.param(("worker.py",), id="worker"),
            pytest.param(("temporal", "start-dev"), id="temporal"),
            pytest.param(("postgres", "-D"), id="postgres"),
            pytest.param(("valkey-server",), id="valkey"),
            pytest.param(("crosslogic.dev.local_cloud",), id="cloud"),
        ],
    )
    def test_the_api_serves_on_and_the_state_is_right_afterwards(
        self, own: tuple[Stack, str], marks: tuple[str, ...]
    ) -> None:
        stack, key = own
        before = {node["id"] for node in stack.nodes(state="ready")}
        with Load(stack, key) as load:
            time.sleep(1)
            killed = stack.kill(*marks)
            eventually(lambda: stack.part(*marks).pid != killed, within_s=30, what="the part to be started again")
            time.sleep(5)
        assert set(load.codes) == {200}, load.codes
        assert len(load.codes) > 10
        # What the part does works again: a node dies and is replaced.
        victim = stack.nodes(state="ready", model="llama-3-8b", region="us-east")[0]
        engine_of(victim).kill()
        wait_for_replacement(stack, victim["id"])
        after = {node["id"] for node in stack.nodes(state="ready")}
        assert before - {victim["id"]} == before & after, "no other node may have been touched"

    def test_a_killed_api_loses_no_usage(self, own: tuple[Stack, str]) -> None:
        stack, _ = own
        key = make_key(stack)
        headers = {"Authorization": f"Bearer {key}"}
        seen = 0
        ids: set[str] = set()
        for round_number in range(3):
            answered = threading.Semaphore(0)

            def ask(answered: threading.Semaphore = answered) -> None:
                nonlocal seen
                while True:
                    try:
                        answer = stack.ask("hi", key=key, max_tokens=2)
                    except httpx.HTTPError:
                        return
                    if answer.status_code != 200:
                        return
                    seen += 1
                    ids.add(answer.headers["x-request-id"])
                    answered.release()

            thread = threading.Thread(target=ask)
            thread.start()
            for _ in range(4 + round_number):
                assert answered.acquire(timeout=30)
            stack.kill("uvicorn", "api.app:app")
            thread.join(70)
            eventually(lambda: stack.ask("hi").status_code == 200, within_s=30, what="the API to be back")

        def counted() -> bool:
            usage = httpx.get(f"{stack.url}/v1/usage", headers=headers).json()
            # The environment's other requests are none: the key is the only one in use in staging.
            return int(usage["requests"]) >= seen

        eventually(counted, within_s=60, what=f"{seen} requests in the usage")
        recorded = eventually(lambda: request_ids(stack), within_s=10, what="the records")
        assert ids <= recorded, "every answer that arrived has its record"


def request_ids(stack: Stack) -> set[str]:
    import asyncio

    import asyncpg

    from crosslogic.domain.ids import REQUEST

    async def read() -> set[str]:
        connection = await asyncpg.connect(stack.endpoints["postgres"])
        try:
            return {REQUEST.show(row["id"]) for row in await connection.fetch("SELECT id FROM usage_records")}
        finally:
            await connection.close()

    return asyncio.run(read())


class TestZombie:
    def test_a_stopped_engine_is_a_failed_node(self, own: tuple[Stack, str]) -> None:
        """SIGSTOP: it accepts connections and never speaks."""
        stack, _ = own
        victim = stack.nodes(state="ready", model="llama-3-8b", region="in-mumbai")[0]
        process = engine_of(victim)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            wait_for_replacement(stack, victim["id"])
        finally:
            if process.is_running():
                process.kill()
