from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator, Iterator
from typing import Any

import asyncpg
import httpx
import pytest
from pydantic import SecretStr

from crosslogic.dev.postgres import Postgres
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from tests.api.admin.server import TOKEN, serving
from tests.conftest import TEMPLATE


@contextlib.contextmanager
def settings_of(database: str) -> Generator[Settings]:
    """Dev mode over this database, and a Temporal that is away."""
    with socket.socket() as closed:
        # Bound but not listening: a connection is refused, and nobody else gets the port.
        closed.bind(("127.0.0.1", 0))
        yield Settings(
            mode="dev",
            database_url=SecretStr(database),
            temporal_address=f"127.0.0.1:{closed.getsockname()[1]}",
            admin_token=SecretStr(TOKEN),
            node_secret=SecretStr("a-node-secret-for-tests-of-the-admin-api"),
        )


def client_of(url: str) -> httpx.Client:
    """A client with the token; paths are below /admin."""
    return httpx.Client(
        base_url=f"{url}/admin", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=20
    )


@pytest.fixture
def settings(database: str) -> Iterator[Settings]:
    """Settings over a database of the test's own."""
    with settings_of(database) as made:
        yield made


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    """The admin API over a database of the test's own."""
    with serving(settings) as url, client_of(url) as client:
        yield client


@pytest.fixture(scope="module")
def empty(postgres: Postgres) -> Iterator[httpx.Client]:
    """The admin API over a database where nobody writes: one for all tests of a file."""
    name = f"empty_{new_id().hex}"

    async def copy() -> None:
        connection = await asyncpg.connect(postgres.url_of("postgres"))
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        await connection.close()

    asyncio.run(copy())
    with settings_of(postgres.url_of(name)) as settings, serving(settings) as url, client_of(url) as client:
        yield client
        assert client.get("/audit").json()["data"] == [], "a test that writes needs a database of its own"


@pytest.fixture
def made(api: httpx.Client) -> Callable[..., Any]:
    """POST that must succeed: the answer's body."""

    def post(path: str, **body: Any) -> Any:
        answer = api.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    return post
