"""Real servers for every test that wants them: one of each per run, with a database, prefix and task queue per test."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio
import redis.asyncio as aioredis
from temporalio.client import Client

from crosslogic.clients import temporal
from crosslogic.dev.parts import Part
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.hot import connection as hot
from crosslogic.settings import Settings
from crosslogic.store.migrations import migrate
from tests.stripe_account import stripe_account
from tests.stripe_double import double, double_process

__all__ = ["double", "double_process", "stripe_account"]

START_TIMEOUT_S = 60.0
TEMPLATE = "migrated"


class Server:
    """One server process under test, which a test may also kill and start again."""

    def __init__(self, part: Part, log: Path) -> None:
        self.part = part
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when it does its job."""
        launch = self.part.prepare()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                list(launch.command),
                env=dict(launch.environment),
                cwd=launch.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=launch.user,
                start_new_session=True,
            )
        until = time.monotonic() + START_TIMEOUT_S
        while not asyncio.run(self.part.is_ready()):
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{self.part.name} did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> None:
        """Stop it cleanly."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(self.part.stop_signal)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.contextmanager
def serving(part: Part, folder: Path) -> Generator[Server]:
    """The server, while it is needed."""
    server = Server(part, folder / f"{part.name}.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Postgres, with a database that has every migration and is copied for each test."""
    folder = tmp_path_factory.mktemp("postgres")
    part = Postgres(folder / "postgres", free_port(), secrets.token_hex(8))
    with serving(part, folder):
        asyncio.run(_make_template(part))
        try:
            yield part
        finally:
            part.forget()


async def _make_template(postgres: Postgres) -> None:
    connection = await asyncpg.connect(postgres.url_of("postgres"))
    try:
        # The tests kill Postgres, never the machine: what it has written is safe without waiting for the disk.
        await connection.execute("ALTER SYSTEM SET fsync = off")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute(f"CREATE DATABASE {TEMPLATE}")
    finally:
        await connection.close()
    await migrate(postgres.url_of(TEMPLATE))


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Valkey."""
    folder = tmp_path_factory.mktemp("valkey")
    part = Valkey(folder / "valkey", free_port(), secrets.token_hex(8))
    with serving(part, folder):
        yield part


@pytest.fixture(scope="session")
def temporal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Temporal]:
    """Temporal's development server, with our search attributes."""
    folder = tmp_path_factory.mktemp("temporal")
    part = Temporal(folder / "temporal", free_port(), free_port(), free_port(), free_port())
    with serving(part, folder):
        yield part


@pytest_asyncio.fixture
async def database(postgres: Postgres) -> AsyncIterator[str]:
    """The URL of a migrated database of the test's own."""
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url_of("postgres"))
    try:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield postgres.url_of(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool on the test's database."""
    async with asyncpg.create_pool(database, min_size=1, max_size=8) as pool:
        yield pool


@pytest.fixture
def redis_prefix() -> str:
    """A prefix of the test's own."""
    return f"test-{uuid4().hex}:"


@pytest.fixture
def task_queue() -> str:
    """A task queue of the test's own."""
    return f"test-{uuid4().hex}"


@pytest_asyncio.fixture
async def redis(valkey: Valkey, redis_prefix: str) -> AsyncIterator[aioredis.Redis]:
    """A client of the run's Valkey; what the test wrote under its prefix is deleted."""
    client = hot.connect(make_settings(redis_url=valkey.url))
    yield client
    any_client: Any = client
    async for key in any_client.scan_iter(match=f"{redis_prefix}*", count=1000):
        await any_client.delete(key)
    await client.aclose()


@pytest_asyncio.fixture
async def temporal_client(temporal_server: Temporal) -> Client:
    """A client as our processes have it."""
    return await temporal.connect(make_settings(temporal_address=temporal_server.address))


def make_settings(**values: Any) -> Settings:
    """Settings of a test: dev mode and a local cloud, the rest as given. The environment has no say."""
    return Settings.model_validate(
        {"mode": "dev", "cloud_provider": "local", "local_cloud_token": "test-token", **values}
    )
