from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from crosslogic.clients.engine import MAX_ANSWER_BYTES, EngineClient, EngineLoad, parse_load
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Unavailable

SECRET = "a secret of the test"


class Script:
    """An HTTP server that answers every request with the same bytes."""

    def __init__(self, answer: bytes, pause_s: float = 0.0) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.heads: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        try:
            for start in range(0, len(self.answer), 65_536 if not self.pause_s else 1):
                writer.write(self.answer[start : start + (65_536 if not self.pause_s else 1)])
                await writer.drain()
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
        except ConnectionError:
            pass
        writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers))
    return f"{head}\r\n".encode() + body


@pytest_asyncio.fixture
async def client() -> AsyncGenerator[EngineClient]:
    client = EngineClient(SECRET, timeout_s=1.0)
    yield client
    await client.close()


async def serving(script: Script) -> asyncio.Server:
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    return server


class TestHealth:
    async def test_presents_the_nodes_own_credential(self, client: EngineClient) -> None:
        script = Script(http(b"{}"))
        async with await serving(script):
            await client.check_health("node_a", script.url)
        assert f"authorization: Bearer {node_credential(SECRET, 'node_a')}" in script.heads[0]

    @pytest.mark.parametrize(
        "answer",
        [
            http(b"loading", "503 Service Unavailable"),
            http(b"", "302 Found", "location: http://127.0.0.1:1/health"),
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"",
        ],
        ids=["loading", "redirect", "another protocol", "nothing"],
    )
    async def test_is_200_and_nothing_else(self, client: EngineClient, answer: bytes) -> None:
        script = Script(answer)
        async with await serving(script):
            with pytest.raises(Unavailable):
                await client.check_health("node_a", script.url)
        assert len(script.heads) == 1

    async def test_does_not_wait_for_a_drip(self, client: EngineClient) -> None:
        script = Script(http(b"{}"), pause_s=0.2)
        async with await serving(script), asyncio.timeout(3):
            with pytest.raises(Unavailable, match="TimeoutError"):
                await client.check_health("node_a", script.url)

    async def test_does_not_read_without_end(self, client: EngineClient) -> None:
        script = Script(http(b"x" * (MAX_ANSWER_BYTES + 1)))
        async with await serving(script):
            with pytest.raises(Unavailable, match="longer than"):
                await client.check_health("node_a", script.url)


class TestGenerate:
    @pytest.mark.parametrize(
        "body",
        [b"<html>", b"[]", b"{}", b'{"usage": {"completion_tokens": 0}, "choices": [{}]}', b'{"usage": null}'],
    )
    async def test_believes_tokens_only(self, client: EngineClient, body: bytes) -> None:
        script = Script(http(body))
        async with await serving(script):
            with pytest.raises(Unavailable):
                await client.generate("node_a", script.url, "m", "chat", 1)


class TestParseLoad:
    def test_reads_vllm(self) -> None:
        page = (Path(__file__).parent / "vllm-0.32.0.prom").read_text()
        assert parse_load(page) == EngineLoad(running=3, waiting=2)

    def test_reads_llama_cpp(self) -> None:
        page = (
            "# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 2\nllamacpp:requests_deferred 1\n"
        )
        assert parse_load(page) == EngineLoad(running=2, waiting=1)

    def test_adds_up_several_engines(self) -> None:
        assert parse_load('vllm:num_requests_running{engine="0"} 1.0\nvllm:num_requests_running{engine="1"} 2.0\n') == (
            EngineLoad(running=3, waiting=0)
        )

    @pytest.mark.parametrize(
        "page",
        ["", "up 1\n", "vllm:num_requests_running NaN\n", "vllm:num_requests_running\n", "vllm:num_requests_running x"],
    )
    def test_does_not_guess(self, page: str) -> None:
        assert parse_load(page) is None
