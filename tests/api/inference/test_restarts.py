"""Several API processes on one port, ended and replaced under load: no client notices, and every answer counts (H4)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest

from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.domain.ids import REQUEST
from crosslogic.settings import Settings, child_environment
from tests.api.inference.conftest import Fleet, chat_body
from tests.api.inference.test_outages import own_postgres
from tests.conftest import Server
from tests.engines import Engine

__all__ = ["own_postgres"]

ROOT = Path(__file__).resolve().parents[3]
GRACE_S = 4
OPTIONS = (
    *("--http", "api.inference.server:HttpProtocol", "--no-access-log"),
    *("--timeout-keep-alive", "75", "--timeout-worker-healthcheck", "30"),
)
WORDS = ["a ", "b ", "c ", "d "]


class Program:
    """`uvicorn api.app:app` with these options, and the processes that it starts."""

    def __init__(
        self, settings: Settings, port: int, *options: str, fd: int | None = None, grace_s: int = GRACE_S
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (the process writes it)
        self.url = f"http://127.0.0.1:{port}"
        where = ("--port", str(port)) if fd is None else ("--fd", str(fd))
        command = [sys.executable, "-m", "uvicorn", "api.app:app", *where, *OPTIONS]
        self._process = subprocess.Popen(
            [*command, "--timeout-graceful-shutdown", str(grace_s), *options],
            cwd=ROOT,
            env=child_environment(
                CROSSLOGIC_MODE="dev",
                CROSSLOGIC_STATE_DIR=str(settings.state_dir),
                CROSSLOGIC_DATABASE_URL=settings.database_url.get_secret_value(),
                CROSSLOGIC_REDIS_URL=settings.redis_url.get_secret_value(),
                CROSSLOGIC_REDIS_PREFIX=settings.redis_prefix,
            ),
            pass_fds=() if fd is None else (fd,),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    @property
    def workers(self) -> set[int]:
        """The pids of the processes that serve below a supervisor."""
        below = psutil.Process(self._process.pid).children()
        return {process.pid for process in below if "spawn_main" in "".join(_command(process))}

    async def ready(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def is_ready() -> bool:
                assert self._process.poll() is None, "the API ended"
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(f"{self.url}/readyz", timeout=5)).status_code == 200
                return False

            await eventually(is_ready, 30)

    async def started(self) -> None:
        """It takes connections, perhaps from a socket on which others would answer as well."""
        await eventually(lambda: _is(b"Application startup complete" in self.said), 30)

    @property
    def said(self) -> bytes:
        """Its log."""
        return os.pread(self._log.fileno(), 10_000_000, 0)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        return await asyncio.to_thread(self._process.wait, 20)

    def kill(self) -> None:
        """All of it, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
        self._process.kill()
        self._process.wait()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


async def eventually(look: Callable[[], Awaitable[Any]], within_s: float) -> None:
    until = asyncio.get_running_loop().time() + within_s
    while not await look():
        assert asyncio.get_running_loop().time() < until, f"not within {within_s} s"
        await asyncio.sleep(0.05)


@dataclass
class Load:
    """Clients that use their connections again, as pools do, and try nothing twice."""

    port: int
    secret: str
    pause_s: float = 0.0
    streams_only: bool = False
    tokens: dict[str, int] = field(default_factory=dict[str, int])
    errors: list[str] = field(default_factory=list[str])
    closes: int = 0
    # Where nobody listens any more is no error of those that expect that.
    may_refuse: bool = False
    _is_over: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(10)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        async with asyncio.timeout(20):
            await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        chance = random.Random(number)
        while not self._is_over:
            if reader is None or writer is None or reader.at_eof():
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError as error:
                    if not self.may_refuse:
                        self.errors.append(f"connect: {error!r}")
                    return
            try:
                is_last = await self._exchange(reader, writer, is_streamed=number % 2 == 0 or self.streams_only)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self.errors.append(repr(error))
                writer.transport.abort()
                reader = None
                continue
            if is_last:
                self.closes += 1
                writer.close()
                reader = None
            if self.pause_s:
                await asyncio.sleep(chance.random() * self.pause_s)
        if writer is not None:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_streamed: bool) -> bool:
        """One request; True if its answer says that the connection ends."""
        body = json.dumps(chat_body(stream=True) if is_streamed else chat_body()).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (self.secret.encode(), len(body), body)
        )
        async with asyncio.timeout(15):
            status, headers, text = await read_answer(reader)
        if status != 200:
            raise ValueError(f"{status} {text!r}")
        if is_streamed:
            events = [event.removeprefix(b"data: ") for event in text.split(b"\n\n") if event]
            if events[-1] != b"[DONE]":
                raise ValueError(f"cut: {text!r}")
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
            count = sum(bool(delta.get("content")) for delta in deltas)
        else:
            count = len(json.loads(text)["choices"][0]["message"]["content"].split())
        self.tokens[headers["x-request-id"]] = count
        return headers.get("connection") == "close"


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer that has a length or comes in chunks."""
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if "content-length" in headers:
        return int(line.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
    pieces: list[bytes] = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return int(line.split()[1]), headers, b"".join(pieces)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener


@pytest.fixture
async def engine(make_engine: Callable[..., Awaitable[Engine]], fleet: Fleet) -> Engine:
    """Whole answers at once, streams of a fifth of a second."""
    engine = await make_engine(WORDS, pace_s=0.05)
    await fleet.add_node(engine)
    return engine


async def check_records(fleet: Fleet, *loads: Load) -> None:
    """Each answer has its one record, completed and with the tokens that the client got; there are no others."""
    seen = {REQUEST.parse(shown): count for load in loads for shown, count in load.tokens.items()}
    rows = await fleet.records(len(seen), within_s=10)
    assert {row["id"]: row["completion_tokens"] for row in rows} == seen
    assert {row["outcome"] for row in rows} == {"completed"}


class TestSupervisor:
    async def test_h4_a_rolling_restart_fails_no_request(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine
    ) -> None:
        port = free_port()
        program = Program(settings_of(), port, "--workers", "2")
        try:
            await program.ready()
            await eventually(lambda: _is(len(program.workers) == 2), 10)
            async with Load(port, fleet.secret) as busy, Load(port, fleet.secret, pause_s=0.2) as idle:
                for _ in range(2):
                    old = program.workers
                    program.signal(signal.SIGHUP)
                    await eventually(lambda: _is(len(new := program.workers) == 2 and not new & old), 60)  # noqa: B023
            assert busy.errors + idle.errors == []
            assert len(busy.tokens) > 200
            # Connections were told to end, so restarts were noticed and not waited out.
            assert busy.closes >= 10
            await check_records(fleet, busy, idle)
            program.signal(signal.SIGTERM)
            assert await program.ended() == 0
        finally:
            program.kill()

    async def test_a_process_that_could_not_read_keys_replaces_none(
        self, own_postgres: tuple[Postgres, Server], settings_of: Callable[..., Settings], make_engine: Any
    ) -> None:
        postgres, server = own_postgres
        url, port = postgres.url_of("postgres"), free_port()
        fleet = Fleet(await asyncpg.connect(url))
        await fleet.seed()
        await fleet.add_node(await make_engine(WORDS))
        await fleet.sql.close()
        program = Program(settings_of(database_url=url), port, "--workers", "2", "--timeout-worker-healthcheck", "3")
        try:
            await program.ready()
            await eventually(lambda: _is(len(program.workers) == 2), 10)
            old = program.workers
            async with Load(port, fleet.secret) as load:
                # By now each process knows the key.
                await eventually(lambda: _is(len(load.tokens) > 200), 10)
                await asyncio.to_thread(server.kill)
                program.signal(signal.SIGHUP)
                await eventually(lambda: _is(b"aborting the restart" in program.said), 20)
            assert load.errors == []
            assert program.workers == old
        finally:
            program.kill()

    async def test_workers_end_when_it_is_killed_and_the_port_is_free(
        self, settings_of: Callable[..., Settings], fleet: Fleet
    ) -> None:
        port = free_port()
        program = Program(settings_of(), port, "--workers", "2")
        try:
            await program.ready()
            workers = [psutil.Process(pid) for pid in program.workers]
            assert workers
            program.signal(signal.SIGKILL)
            await eventually(lambda: _is(not any(_runs(worker) for worker in workers)), 10)
            socket.create_server(("127.0.0.1", port)).close()
        finally:
            program.kill()


async def _is(truth: bool) -> bool:
    return truth


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class TestTerminate:
    async def test_h4_one_of_two_on_a_socket_leaves_and_no_request_fails(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine, listener: socket.socket
    ) -> None:
        settings, port = settings_of(), listener.getsockname()[1]
        program = Program(settings, port, fd=listener.fileno())
        try:
            await program.ready()
            async with Load(port, fleet.secret) as busy, Load(port, fleet.secret, pause_s=0.2) as idle:
                successor = Program(settings, port, fd=listener.fileno())
                await successor.started()
                program.signal(signal.SIGTERM)
                assert await program.ended() in (0, -signal.SIGTERM)
                program = successor
            assert busy.errors + idle.errors == []
            await check_records(fleet, busy, idle)
        finally:
            program.kill()

    async def test_h4_the_only_one_ends_what_it_has_and_ships_it(
        self, fleet: Fleet, settings_of: Callable[..., Settings], engine: Engine
    ) -> None:
        port = free_port()
        program = Program(settings_of(), port)
        try:
            await program.ready()
            async with Load(port, fleet.secret, may_refuse=True) as load:
                await asyncio.sleep(1)
                program.signal(signal.SIGTERM)
                assert await program.ended() in (0, -signal.SIGTERM)
            assert load.errors == []
            assert len(load.tokens) > 20
            await check_records(fleet, load)
        finally:
            program.kill()

    async def test_what_lasts_longer_than_the_grace_is_cut_and_recorded(
        self, fleet: Fleet, settings_of: Callable[..., Settings], make_engine: Any
    ) -> None:
        await fleet.add_node(await make_engine(["x"] * 200, pace_s=0.1))
        port = free_port()
        program = Program(settings_of(), port, grace_s=1)
        try:
            await program.ready()
            async with Load(port, fleet.secret, streams_only=True, may_refuse=True) as load:
                await asyncio.sleep(1)
                program.signal(signal.SIGTERM)
                assert await program.ended() in (0, -signal.SIGTERM)
            assert load.tokens == {}
            rows = await fleet.records(10, within_s=0.5)
            assert {row["outcome"] for row in rows} == {"cut"}
        finally:
            program.kill()
