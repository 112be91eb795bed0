"""The API as a process of its own, killed at any moment and run on a disk that is full (A1, A2, A5, H4)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from crosslogic.domain.ids import REQUEST
from crosslogic.settings import Settings, child_environment
from tests.api.inference.conftest import Fleet, chat_body
from tests.engines import Engine

ROOT = Path(__file__).resolve().parents[3]
KILLS = 4
MAY_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
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
    """`uvicorn api.app:app` on a listening socket that outlives it.

    `limit` is how long its files may become, `disk_bytes` the size of a disk of its own for its state.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, *, limit: int | None = None, disk_bytes: int | None = None
    ) -> None:
        def before() -> None:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "uvicorn", "api.app:app", "--fd", str(listener.fileno()), *OPTIONS]
        if disk_bytes is not None:
            mount = f'mount -t tmpfs -o size={disk_bytes} none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, str(settings.state_dir), *command]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(settings),
            pass_fds=(listener.fileno(),),
            preexec_fn=before,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def lift_limit(self) -> None:
        """Room again."""
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, unlimited)

    def sees(self, path: Path) -> Path:
        """The path as the process sees it, mounts of its own included."""
        return Path(f"/proc/{self._process.pid}/root{path}")

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


@dataclass
class Seen:
    """What one client knows of an answer."""

    tokens: int = 0
    is_complete: bool = False


class Clients:
    """Clients that ask again and again, streamed and whole, and count what they get."""

    def __init__(self, url: str, secret: str) -> None:
        self.seen: dict[str, Seen] = {}
        self._is_over = asyncio.Event()
        self._http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {secret}"}, trust_env=False, timeout=20
        )
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, count: int) -> None:
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(count)]

    async def end(self) -> None:
        """Let each have the answer that it waits for."""
        self._is_over.set()
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    async def _ask(self, number: int) -> None:
        while not self._is_over.is_set():
            # Broken off by a kill: the next request goes to whoever is alive.
            with contextlib.suppress(httpx.HTTPError):
                await (self.whole() if number % 3 == 0 else self.stream())

    async def whole(self) -> None:
        async with self._http.stream("POST", "/v1/chat/completions", json=chat_body()) as answer:
            if answer.status_code != 200:
                return
            seen = self.seen[answer.headers["x-request-id"]] = Seen()
            text = b"".join([piece async for piece in answer.aiter_raw()])
            seen.tokens = len(json.loads(text)["choices"][0]["message"]["content"].split())
            seen.is_complete = True

    async def stream(self) -> None:
        async with self._http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            if answer.status_code != 200:
                return
            seen = self.seen[answer.headers["x-request-id"]] = Seen()
            rest = b""
            async for piece in answer.aiter_raw():
                *events, rest = (rest + piece).split(b"\n\n")
                for event in events:
                    if event == b"data: [DONE]":
                        seen.is_complete = True
                    elif json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"].get("content"):
                        seen.tokens += 1


class TestA1:
    async def test_a1_a2_a3_sigkill_at_any_moment_loses_no_answer_counts_none_twice_and_bills_what_was_relayed(
        self, fleet: Fleet, settings_of: Callable[..., Settings], make_engine: Any, listener: socket.socket
    ) -> None:
        """Processes share a socket and follow each other: each is killed while it works and its successor is up."""
        # Whole answers hold no words glued together, so that the client can count them.
        brief, long = await make_engine(["a ", "b ", "c "], pace_s=0.004), await make_engine(["x "] * 80, pace_s=0.02)
        for engine in (brief, long):
            await fleet.add_node(engine)
        settings, chance = settings_of(), random.Random(20261123)
        process = Process(settings, listener)
        try:
            await process.ready()
            clients = Clients(process.url, fleet.secret)
            clients.begin(8)
            for _ in range(KILLS):
                successor = Process(settings, listener)
                try:
                    await successor.ready()
                    await asyncio.sleep(chance.random() * 0.7)
                finally:
                    process.kill()
                    process = successor
            await clients.end()
            process.kill()
            process = Process(settings, listener)
            await process.ready()
            seen = {REQUEST.parse(shown): one for shown, one in clients.seen.items()}

            async def recorded() -> dict[UUID, Any]:
                return {row["id"]: row for row in await fleet.sql.fetch("SELECT * FROM usage_records")}

            for _ in range(200):
                if seen.keys() <= (await recorded()).keys():
                    break
                await asyncio.sleep(0.1)
            records = await recorded()
        finally:
            process.kill()
        assert seen.keys() - records.keys() == set()
        complete = {id for id, one in seen.items() if one.is_complete}
        assert len(complete) > 100
        assert {records[id]["is_streamed"] for id in complete} == {True, False}
        assert {records[id]["outcome"] for id in complete} == {"completed"}
        assert {id: records[id]["completion_tokens"] for id in complete} == {id: seen[id].tokens for id in complete}
        broken = {id for id in seen if id not in complete and records[id]["outcome"] == "interrupted"}
        # Some were killed so late that a whole second of them had been noted.
        assert any(records[id]["completion_tokens"] for id in broken)
        for id in broken:
            assert records[id]["completion_tokens"] <= seen[id].tokens
        # A kill between the settled record and the last byte: all but the end was there.
        for id in seen.keys() - complete - broken:
            assert records[id]["outcome"] == "completed"
            assert records[id]["completion_tokens"] >= seen[id].tokens
        # Those whose client has not even seen their id.
        for id in records.keys() - seen.keys():
            assert records[id]["outcome"] in ("completed", "interrupted", "failed")

    async def test_h4_sigterm_lets_running_streams_end(
        self, fleet: Fleet, settings_of: Callable[..., Settings], make_engine: Any, listener: socket.socket
    ) -> None:
        await fleet.add_node(await make_engine(["x"] * 20, pace_s=0.05))
        process = Process(settings_of(), listener)
        await process.ready()
        clients = Clients(process.url, fleet.secret)
        streams = [asyncio.create_task(clients.stream()) for _ in range(8)]
        await asyncio.sleep(0.5)
        process.terminate()
        await asyncio.gather(*streams)
        await clients.end()
        assert [one.is_complete for one in clients.seen.values()] == [True] * 8
        # uvicorn ends by the signal that it was sent.
        assert await process.ended() in (0, -signal.SIGTERM)
        # Shipped before it left.
        assert {row["outcome"] for row in await fleet.records(8, within_s=0.1)} == {"completed"}


async def _ask(url: str, secret: str, times: int) -> list[httpx.Response]:
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=20) as client:
        return [await client.post("/v1/chat/completions", json=chat_body()) for _ in range(times)]


class TestA5:
    async def test_a_full_disk_is_503_before_any_node_hears_of_it_and_room_ends_it(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine, listener: socket.socket
    ) -> None:
        await fleet.add_node(engine)
        process = Process(settings_of(), listener, limit=3000)
        try:
            await process.ready()
            answers = await _ask(process.url, fleet.secret, 12)
            statuses = [answer.status_code for answer in answers]
            served = statuses.count(200)
            assert 1 <= served <= 6
            assert statuses[-1] == 503
            assert answers[-1].json()["error"]["code"] == "usage_log_failed"
            # The last one may have been asked and then not be settled: its client got 503 and pays nothing.
            asked = len(engine.requests)
            assert served <= asked <= served + 1
            completed = [row for row in await fleet.records(served, within_s=3) if row["outcome"] == "completed"]
            assert len(completed) == served
            # With room again the same process settles what has waited, and serves.
            process.lift_limit()
            rows = await fleet.records(asked, within_s=5)
            assert [row["outcome"] for row in rows] == ["completed"] * served + ["failed"] * (asked - served)
            assert all(row["completion_tokens"] == 0 for row in rows if row["outcome"] != "completed")
            assert [answer.status_code for answer in await _ask(process.url, fleet.secret, 3)] == [200] * 3
            await fleet.records(asked + 3, within_s=3)
        finally:
            process.kill()

    @pytest.mark.skipif(not MAY_MOUNT, reason="only root may mount a disk of its own")
    async def test_a_real_disk_without_room_does_the_same(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine, listener: socket.socket
    ) -> None:
        await fleet.add_node(engine)
        settings = settings_of()
        settings.state_dir.mkdir()
        process = Process(settings, listener, disk_bytes=256 * 1024)
        try:
            await process.ready()
            assert [answer.status_code for answer in await _ask(process.url, fleet.secret, 2)] == [200, 200]
            ballast = process.sees(settings.state_dir / "ballast")
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(512)):
                    pass
            statuses = [answer.status_code for answer in await _ask(process.url, fleet.secret, 20)]
            assert statuses[-1] == 503
            asked, served = len(engine.requests), 2 + statuses.count(200)
            assert served <= asked <= served + 1
            ballast.unlink()
            assert [answer.status_code for answer in await _ask(process.url, fleet.secret, 3)] == [200] * 3
            rows = await fleet.records(asked + 3, within_s=5)
            assert sum(row["outcome"] == "completed" for row in rows) == served + 3
        finally:
            process.kill()
