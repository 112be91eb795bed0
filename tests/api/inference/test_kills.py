"""The API as a process of its own, killed at any moment and run on a disk that is full (A1, A2, A5, H4)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from crosslogic.domain.ids import REQUEST
from crosslogic.settings import Settings, child_environment
from tests.api.inference.conftest import Fleet, chat_body
from tests.engines import Engine

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 3
OPTIONS = ("--http", "api.inference.server:HttpProtocol", "--no-access-log", "--timeout-graceful-shutdown", "5")


def _environment(settings: Settings) -> dict[str, str]:
    given = {
        "CROSSLOGIC_MODE": "dev",
        "CROSSLOGIC_STATE_DIR": str(settings.state_dir),
        "CROSSLOGIC_DATABASE_URL": settings.database_url.get_secret_value(),
        "CROSSLOGIC_REDIS_URL": settings.redis_url.get_secret_value(),
        "CROSSLOGIC_REDIS_PREFIX": settings.redis_prefix,
    }
    return child_environment(**given)


class Process:
    """`uvicorn api.app:app` on a listening socket that outlives it."""

    def __init__(self, settings: Settings, listener: socket.socket, limit: int | None = None) -> None:
        def before() -> None:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "api.app:app", "--fd", str(listener.fileno()), *OPTIONS],
            cwd=ROOT,
            env=_environment(settings),
            pass_fds=(listener.fileno(),),
            preexec_fn=before,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def ready(self) -> None:
        async with asyncio.timeout(30), httpx.AsyncClient(trust_env=False) as client:
            while True:
                assert self._process.poll() is None, "the API ended"
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.url}/readyz", timeout=5)).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        self._process.terminate()

    async def ended(self) -> int:
        return await asyncio.to_thread(self._process.wait, 20)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener


async def _stream(client: httpx.AsyncClient, complete: set[str], begun: set[str]) -> None:
    """One stream; its id is in `complete` once its last byte was here."""
    async with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
        if answer.status_code != 200:
            return
        begun.add(answer.headers["x-request-id"])
        text = b""
        async for piece in answer.aiter_raw():
            text += piece
            if text.endswith(b"data: [DONE]\n\n"):
                complete.add(answer.headers["x-request-id"])


class TestA1:
    async def test_sigkill_at_any_moment_loses_no_answer_and_counts_none_twice(
        self, fleet: Fleet, settings_of: Callable[..., Settings], make_engine: Any, listener: socket.socket
    ) -> None:
        settings = settings_of()
        for _ in range(2):
            await fleet.add_node(await make_engine(["a", "b", "c"], pace_s=0.004))
        chance = random.Random(20261123)
        complete: set[str] = set()
        begun: set[str] = set()
        process = Process(settings, listener)
        await process.ready()
        for _ in range(ROUNDS):
            is_over = asyncio.Event()

            async def load(over: asyncio.Event, url: str) -> None:
                headers = {"Authorization": f"Bearer {fleet.secret}"}
                async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
                    while not over.is_set():
                        with contextlib.suppress(httpx.HTTPError):
                            await _stream(client, complete, begun)

            clients = [asyncio.create_task(load(is_over, process.url)) for _ in range(12)]
            await asyncio.sleep(0.8 + chance.random() * 0.5)
            process.kill()
            is_over.set()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            process = Process(settings, listener)
            await process.ready()
        assert len(complete) > 30
        ids = {REQUEST.parse(shown) for shown in complete}

        admitted = {REQUEST.parse(shown) for shown in begun}

        async def recorded() -> set[Any]:
            return {row["id"] for row in await fleet.sql.fetch("SELECT id FROM usage_records")}

        for _ in range(100):
            if admitted <= await recorded():
                break
            await asyncio.sleep(0.1)
        assert admitted - await recorded() == set()
        for row in await fleet.sql.fetch("SELECT * FROM usage_records"):
            if row["id"] in ids:
                assert (row["outcome"], row["completion_tokens"]) == ("completed", 3)
            else:
                assert row["outcome"] in ("completed", "interrupted", "client_gone", "failed")
        process.kill()

    async def test_h4_sigterm_lets_running_streams_end(
        self, fleet: Fleet, settings_of: Callable[..., Settings], make_engine: Any, listener: socket.socket
    ) -> None:
        await fleet.add_node(await make_engine(["x"] * 20, pace_s=0.05))
        process = Process(settings_of(), listener)
        await process.ready()
        complete: set[str] = set()
        headers = {"Authorization": f"Bearer {fleet.secret}"}
        async with httpx.AsyncClient(base_url=process.url, headers=headers, trust_env=False) as client:
            streams = [asyncio.create_task(_stream(client, complete, set())) for _ in range(8)]
            await asyncio.sleep(0.5)
            process.terminate()
            await asyncio.gather(*streams)
        assert len(complete) == 8
        # uvicorn ends by the signal that it was sent.
        assert await process.ended() in (0, -signal.SIGTERM)
        # Shipped before it left.
        assert {row["outcome"] for row in await fleet.records(8, within_s=0.1)} == {"completed"}


class TestA5:
    async def test_a_full_disk_is_503_before_any_node_hears_of_it(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine, listener: socket.socket
    ) -> None:
        await fleet.add_node(engine)
        process = Process(settings_of(), listener, limit=3000)
        try:
            await process.ready()
            headers = {"Authorization": f"Bearer {fleet.secret}"}
            async with httpx.AsyncClient(base_url=process.url, headers=headers, trust_env=False) as client:
                answers = [await client.post("/v1/chat/completions", json=chat_body()) for _ in range(12)]
            statuses = [answer.status_code for answer in answers]
            served = statuses.count(200)
            assert 1 <= served <= 6
            assert statuses[-1] == 503
            assert answers[-1].json()["error"]["code"] == "usage_log_failed"
            # The last one may have been asked and then not be settled: its client got 503 and pays nothing.
            assert served <= len(engine.requests) <= served + 1
            completed = [row for row in await fleet.records(served, within_s=3) if row["outcome"] == "completed"]
            assert len(completed) == served
        finally:
            process.kill()
        # What the full disk has kept open is settled as free of charge by the next process.
        following = Process(settings_of(), listener)
        try:
            await following.ready()
            rows = await fleet.records(len(engine.requests), within_s=5)
            assert sum(row["outcome"] == "completed" for row in rows) == served
            assert all(row["completion_tokens"] == 0 for row in rows if row["outcome"] != "completed")
        finally:
            following.kill()
