"""Real engines, killed in the middle of their answers (A3, H2)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosslogic.bootstrap import ROOT
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.ids import NODE
from crosslogic.new_ids import new_id
from tests.api.inference.conftest import Api, Fleet, MakeApi

START_S = 60.0
SECRET = "dev-node-secret-not-for-production"
STORY = "Write a long story about a lighthouse keeper and the sea."


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": STORY}]}
COMPLETION: dict[str, Any] = {
    "path": "/v1/completions",
    "prompt": "The sea was calm. The keeper of the lighthouse",
}
JSON: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Give the name and the age of a person."}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "person",
            "schema": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 60}, "age": {"type": "integer"}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
        },
    },
}


class RealEngine:
    """llama.cpp in a process of its own, registered as a node."""

    def __init__(self, folder: Path) -> None:
        self.node_id = NODE.show(new_id())
        report = folder / f"{self.node_id}.json"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crosslogic.dev.engine", str(report)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        order = {"model": "llama-3-8b", "kind": "chat", "credential": node_credential(SECRET, self.node_id)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode())
        self.process.stdin.close()
        until = time.monotonic() + START_S
        while not report.exists():
            assert self.process.poll() is None, "the engine ended"
            assert time.monotonic() < until, "the engine did not start"
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{json.loads(report.read_text())['port']}"

    async def join(self, fleet: Fleet) -> None:
        """Stand in the registry as a ready node."""
        await fleet.sql.execute(
            "INSERT INTO nodes (id, model, region, provider, cluster, state, endpoint, workflow_id, generation) "
            "VALUES ($1, 'llama-3-8b', 'in-mumbai', 'joined', $2, 'ready', $3, 'none', 3)",
            NODE.parse(self.node_id),
            self.node_id,
            self.url,
        )

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], RealEngine]]:
    """Engines that are killed in the end."""
    started: list[RealEngine] = []

    def one() -> RealEngine:
        started.append(RealEngine(tmp_path))
        return started[-1]

    yield one
    for engine in started:
        engine.kill()


async def _stream(
    api: Api, kill_after: int, kill: Callable[[str], None], **fields: Any
) -> tuple[list[str], dict[str, Any]]:
    """The pieces of a streamed answer whose node dies after so many of them, and its usage."""
    path = fields.pop("path", "/v1/chat/completions")
    body = {"model": "llama-7b", "stream": True, "stream_options": {"include_usage": True}, **fields}
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    async with api.http.stream("POST", path, json=body, timeout=120) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if piece:
                    pieces.append(piece)
                if piece and len(pieces) == kill_after:
                    kill(answer.headers["x-crosslogic-node"])
    return pieces, usage


async def _rest_of(engine: RealEngine, told: str, left: int, asked: dict[str, Any]) -> str:
    """What an engine itself says behind `told`."""
    fields: dict[str, Any] = {**asked, "temperature": 0, "seed": 7, "max_tokens": left, "cache_prompt": False}
    path = fields.pop("path", "/v1/chat/completions")
    if "prompt" in fields:
        fields["prompt"] += told
    else:
        fields["messages"] = [*fields["messages"], {"role": "assistant", "content": told}]
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    credential = node_credential(SECRET, engine.node_id)
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False, timeout=60) as client:
        answer = await client.post(
            path, json={"model": "llama-3-8b", **fields}, headers={"Authorization": f"Bearer {credential}"}
        )
    choice = answer.json()["choices"][0]
    # Not streamed, it repeats what it was given.
    return choice["text"] if "text" in choice else choice["message"]["content"].removeprefix(told)


class TestKilledInTheMiddle:
    @pytest.mark.parametrize(
        ("asked", "kill_after"),
        [(CHAT, 1), (CHAT, 24), (COMPLETION, 3), (JSON, 4)],
        ids=["chat", "late", "completion", "json"],
    )
    async def test_the_answer_goes_on_as_if_one_engine_had_given_it(
        self, make_api: MakeApi, start: Callable[[], RealEngine], asked: dict[str, Any], kill_after: int
    ) -> None:
        engines = {engine.node_id: engine for engine in (start(), start())}
        api = await make_api(idle_timeout_s=60, first_byte_timeout_s=60, total_timeout_s=120)
        for engine in engines.values():
            await engine.join(api.fleet)
        await asyncio.sleep(0.5)
        fields = {**asked, "temperature": 0, "seed": 7, "max_tokens": 48, "cache_prompt": False}
        whole, whole_usage = await _stream(api, 0, lambda _: None, **fields)
        assert len(whole) > kill_after + 2
        broken, usage = await _stream(api, kill_after, lambda node_id: engines[node_id].kill(), **fields)
        assert sum(engine.process.poll() is not None for engine in engines.values()) == 1
        (survivor,) = [engine for engine in engines.values() if engine.process.poll() is None]
        text = "".join(broken)
        if "response_format" in asked:
            assert text == "".join(whole)
            assert set(json.loads(text)) == {"name", "age"}
        else:
            # A few pieces may have been on their way when the engine died: the seam is behind one of them.
            assert text.startswith("".join(whole[:kill_after]))
            possible: list[str] = []
            for count in range(kill_after, min(kill_after + 8, len(whole))):
                told = "".join(whole[:count])
                space = told[len(told.rstrip()) :]
                rest = await _rest_of(survivor, told.rstrip(), 48 - count, asked)
                possible.append(told + rest.removeprefix(space))
                if possible[-1] == text:
                    break
            assert text in possible
        assert usage["completion_tokens"] <= 48
        assert abs(usage["prompt_tokens"] - whole_usage["prompt_tokens"]) <= 1
        first, second = await api.fleet.records(2)
        assert (second["outcome"], second["completion_tokens"]) == ("completed", usage["completion_tokens"])
        assert first["prompt_tokens"] == whole_usage["prompt_tokens"]

    async def test_a_client_that_hangs_up_pays_what_the_engines_tokenizer_counts(
        self, make_api: MakeApi, start: Callable[[], RealEngine]
    ) -> None:
        engine = start()
        api = await make_api(idle_timeout_s=60, first_byte_timeout_s=60, total_timeout_s=120)
        await engine.join(api.fleet)
        await asyncio.sleep(0.5)
        fields = {"messages": [{"role": "user", "content": STORY}], "temperature": 0, "max_tokens": 64}
        _, usage = await _stream(api, 0, lambda _: None, **fields)
        body = json.dumps({"model": "llama-7b", "stream": True, **fields}).encode()
        client = await api.open(body)
        for _ in range(12):
            await client.read_until(b'"content":"')
        client.hang_up()
        _, second = await api.fleet.records(2, within_s=10)
        assert second["outcome"] == "client_gone"
        assert second["prompt_tokens"] == usage["prompt_tokens"]
        assert 10 <= second["completion_tokens"] < 64
