"""The API as its clients meet it: the real app under a real server, Postgres and Valkey, and scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import openai
import pytest
import uvicorn
import uvloop

from api.app import create_app
from api.inference.server import HttpProtocol
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.valkey import Valkey
from crosslogic.domain import ids, keys
from crosslogic.domain.tenancy import GLOBAL_SUBJECT
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from tests.conftest import TEMPLATE
from tests.engines import Engine


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Callable[[], Any]]:
    """The loop that uvicorn takes in production."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def shared_database(postgres: Postgres) -> str:
    """One migrated database for all these tests: emptying it is much faster than making another."""
    name = f"inference_{os.urandom(4).hex()}"

    async def make() -> None:
        connection = await asyncpg.connect(postgres.url_of("postgres"))
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        await connection.close()

    asyncio.run(make())
    return postgres.url_of(name)


@pytest.fixture
async def database_url(shared_database: str) -> str:
    """A migrated database that holds nothing but the catalog."""
    connection = await asyncpg.connect(shared_database)
    await connection.execute(
        "TRUNCATE usage_records, usage_hours, late_usage, usage_logs, nodes, limits, keys, environments, orgs, "
        "deployments CASCADE"
    )
    await connection.close()
    return shared_database


@pytest.fixture
async def make_engine() -> AsyncIterator[Callable[..., Awaitable[Engine]]]:
    """Engines that are stopped in the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(*arguments: Any, **options: Any) -> Engine:
            return await stack.enter_async_context(Engine(*arguments, **options))

        yield make


@pytest.fixture
async def engine(make_engine: Callable[..., Awaitable[Engine]]) -> Engine:
    """An engine that is well."""
    return await make_engine()


class Fleet:
    """The database behind the API, changed with plain SQL as an operator would."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.sql = connection
        self.org_id = new_id()
        self.environment_id = new_id()
        self.key_id = new_id()
        self.secret = ""

    async def seed(self) -> None:
        """One org at home in Mumbai with a key that has no limits."""
        await self.sql.execute(
            "INSERT INTO orgs (id, name, region_preferences) VALUES ($1, 'acme', '{in-mumbai}')", self.org_id
        )
        await self.sql.execute(
            "INSERT INTO environments (id, org_id, name) VALUES ($1, $2, 'dev')", self.environment_id, self.org_id
        )
        self.secret = await self.add_key(self.key_id)
        for layer, subject in (("environment", self.environment_id), ("key", self.key_id)):
            await self.limit(layer, subject)

    async def add_key(self, key_id: UUID | None = None, *, role: str = "developer", secret: str = "") -> str:
        """A new key's secret."""
        secret = secret or keys.mint("dev", os.urandom(keys.RANDOM_BYTES))
        await self.sql.execute(
            "INSERT INTO keys (id, environment_id, secret_hash, hint, role) VALUES ($1, $2, $3, $4, $5)",
            key_id or new_id(),
            self.environment_id,
            keys.hash_secret(secret),
            keys.hint_of(secret),
            role,
        )
        return secret

    async def limit(self, layer: str, subject: UUID = GLOBAL_SUBJECT, **limits: int) -> None:
        """Set a subject's limits; those not named are lifted."""
        names = ("requests_per_min", "tokens_per_min", "tokens_per_day", "concurrency")
        await self.sql.execute(
            "INSERT INTO limits (layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency) "
            "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (layer, subject_id) DO UPDATE SET requests_per_min = $3, "
            "tokens_per_min = $4, tokens_per_day = $5, concurrency = $6",
            layer,
            subject,
            *(limits.get(name, -1) for name in names),
        )

    async def add_node(
        self, engine: Engine | str, model: str = "llama-3-8b", region: str = "in-mumbai", state: str = "ready"
    ) -> str:
        """A node's shown id."""
        node_id = new_id()
        await self.sql.execute(
            "INSERT INTO nodes (id, model, region, provider, cluster, state, endpoint, workflow_id, generation) "
            "VALUES ($1, $2, $3, 'joined', $4, $5, $6, 'none', 3)",
            node_id,
            model,
            region,
            str(node_id),
            state,
            engine if isinstance(engine, str) else engine.url,
        )
        return ids.NODE.show(node_id)

    async def set_state(self, node_id: str, state: str) -> None:
        """Move a node."""
        await self.sql.execute(
            "UPDATE nodes SET state = $2, generation = generation + 1, "
            "ended_at = CASE WHEN $2 IN ('terminated', 'failed', 'lost') THEN now() END WHERE id = $1",
            ids.NODE.parse(node_id),
            state,
        )

    async def records(self, count: int, within_s: float = 5.0) -> list[dict[str, Any]]:
        """The usage records by admission, once there are `count`; and there must not be more."""
        found: list[Any] = []
        until = asyncio.get_running_loop().time() + within_s
        while asyncio.get_running_loop().time() < until:
            found = await self.sql.fetch("SELECT * FROM usage_records ORDER BY id")
            if len(found) >= count:
                break
            await asyncio.sleep(0.02)
        assert len(found) == count, f"{len(found)} records, not {count}: {[dict(row) for row in found]}"
        return [dict(row) for row in found]

    async def record(self) -> dict[str, Any]:
        """The one usage record."""
        return (await self.records(1))[0]


class Api:
    """A running API and clients to it."""

    def __init__(self, app: Any, url: str, fleet: Fleet, settings: Settings) -> None:
        self.app = app
        self.url = url
        self.fleet = fleet
        self.settings = settings
        self.http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {fleet.secret}"}, timeout=20, trust_env=False, verify=False
        )

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, secret: str = "") -> openai.AsyncOpenAI:
        """The official SDK, without retries of its own."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=secret or self.fleet.secret, max_retries=0)

    def sync_client(self) -> openai.OpenAI:
        """The official SDK, for a thread."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.fleet.secret, max_retries=0)

    async def chat(self, *, key: str = "", headers: Mapping[str, str] | None = None, **fields: Any) -> httpx.Response:
        """A chat completion over plain HTTP."""
        given = dict(headers or {})
        if key:
            given["Authorization"] = f"Bearer {key}"
        return await self.http.post("/v1/chat/completions", json=chat_body(**fields), headers=given)

    async def open(self, body: bytes, path: str = "/v1/chat/completions", *headers: str) -> RawClient:
        """A request whose connection the test holds in its hands."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: test",
            f"Authorization: Bearer {self.fleet.secret}",
            f"Content-Length: {len(body)}",
            *headers,
        ]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        return RawClient(reader, writer)

    async def until(self, look: Callable[[], Awaitable[Any]], within_s: float = 3.0) -> Any:
        """The first true value of `look`; fails when there is none in time."""
        until = asyncio.get_running_loop().time() + within_s
        while True:
            found = await look()
            if found:
                return found
            assert asyncio.get_running_loop().time() < until, f"not within {within_s} s, last {found!r}"
            await asyncio.sleep(0.02)


class RawClient:
    """A client that can hang up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read_until(self, mark: bytes, within_s: float = 5.0) -> bytes:
        """What comes up to and with `mark`."""
        async with asyncio.timeout(within_s):
            return await self.reader.readuntil(mark)

    async def rest(self, within_s: float = 5.0) -> bytes:
        """What comes until the end of the connection."""
        async with asyncio.timeout(within_s):
            return await self.reader.read()

    def stop_reading(self) -> None:
        """Read no more, and stay."""
        transport: Any = self.writer.transport
        transport.pause_reading()

    def hang_up(self) -> float:
        """Close at once; the loop's time."""
        self.writer.transport.abort()
        return asyncio.get_running_loop().time()


def chat_body(**fields: Any) -> dict[str, Any]:
    """The body of a small chat completion."""
    return {"model": "llama-7b", "messages": [{"role": "user", "content": "hi"}], **fields}


class _Server(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """Signals are pytest's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(settings: Settings, fleet: Fleet) -> AsyncGenerator[Api]:
    """The app under uvicorn in this process, ready."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = _Server(
        uvicorn.Config(
            app, http=HttpProtocol, log_config=None, lifespan="on", timeout_graceful_shutdown=2, access_log=False
        )
    )
    running = asyncio.create_task(server.serve([listener]))
    api = Api(app, f"http://127.0.0.1:{port}", fleet, settings)
    try:

        async def is_ready() -> bool:
            if running.done():
                running.result()
                raise AssertionError("the server ended")
            try:
                return (await api.http.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await api.until(is_ready, 10)
        yield api
    finally:
        await api.http.aclose()
        server.should_exit = True
        await running
        listener.close()


@pytest.fixture
async def fleet(database_url: str) -> AsyncIterator[Fleet]:
    """The seeded database."""
    connection = await asyncpg.connect(database_url)
    fleet = Fleet(connection)
    await fleet.seed()
    yield fleet
    with contextlib.suppress(Exception):
        await connection.close(timeout=1)


@pytest.fixture
def settings_of(database_url: str, valkey: Valkey, tmp_path: Path) -> Callable[..., Settings]:
    """Settings with short deadlines; a test names those that matter to it."""

    def make(**values: Any) -> Settings:
        given: dict[str, Any] = {
            "mode": "dev",
            "state_dir": tmp_path / "state",
            "database_url": database_url,
            "redis_url": valkey.url,
            "redis_prefix": f"t{os.urandom(4).hex()}:",
            "connect_timeout_s": 0.5,
            "first_byte_timeout_s": 5,
            "idle_timeout_s": 5,
            "total_timeout_s": 20,
            "hold_timeout_s": 2,
            **values,
        }
        return Settings(**given)

    return make


MakeApi = Callable[..., Awaitable[Api]]


@pytest.fixture
async def make_api(fleet: Fleet, settings_of: Callable[..., Settings]) -> AsyncIterator[MakeApi]:
    """`await make_api(engine, …, setting=value)`: an API with a ready node in Mumbai for each engine."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(*engines: Engine | str, **values: Any) -> Api:
            for one in engines:
                await fleet.add_node(one)
            return await stack.enter_async_context(serving(settings_of(**values), fleet))

        yield make


def tokens_in_flight(api: Api) -> Sequence[int]:
    """What each node believes to be working on: all zero at rest."""
    return [node.tokens_in_flight for node in api.app.inference._table.nodes]
