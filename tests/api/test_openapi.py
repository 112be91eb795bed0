"""The OpenAPI document is true: the running API answers every operation as it says, whatever it is sent."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import schemathesis as untyped
from hypothesis import HealthCheck, settings
from pydantic import SecretStr

from api.app import create_app
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.settings import Settings
from tests.api.inference.conftest import Fleet, serving
from tests.conftest import TEMPLATE
from tests.engines import Engine

TOKEN = "adm_a-token-for-tests-of-the-document"

# Its types have gaps.
schemathesis: Any = untyped
schemathesis.checks.load_all_checks()
CHECKS = schemathesis.checks.CHECKS
# Valid by its shape is not yet valid: there may be no such org, region or model.
EXCLUDED = [CHECKS.get_one("positive_data_acceptance")]
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
# Under /v1 it is the message that says which method to use.
METHODS = [CHECKS.get_one("unsupported_method"), CHECKS.get_one("allow_header_conformance")]


class Served:
    """The API in a thread, with an engine for chat and one for embeddings, until `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started = threading.Event()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self.url = ""
        self.secret = ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        connection = await asyncpg.connect(self._settings.database_url.get_secret_value())
        fleet = Fleet(connection)
        await fleet.seed()
        async with Engine() as chat, Engine() as embedding:
            await fleet.add_node(chat)
            await fleet.add_node(embedding, model="bge-base-en")
            async with serving(self._settings, fleet) as api:
                self.url, self.secret = api.url, fleet.secret
                self._started.set()
                await self._stop.wait()
        await connection.close()


@pytest.fixture(scope="module")
def served(
    postgres: Postgres, valkey: Valkey, temporal_server: Temporal, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name = f"document_{os.urandom(4).hex()}"

    async def make_database() -> None:
        connection = await asyncpg.connect(postgres.url_of("postgres"))
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        await connection.close()

    asyncio.run(make_database())
    served = Served(
        settings_of(postgres.url_of(name), valkey.url, temporal_server.address, tmp_path_factory.mktemp("api"))
    )
    served.start()
    yield served
    served.stop()


def settings_of(database_url: str, redis_url: str, temporal_address: str, state_dir: Path) -> Settings:
    return Settings(
        mode="dev",
        state_dir=state_dir,
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        redis_prefix=f"t{secrets.token_hex(4)}:",
        temporal_address=temporal_address,
        fleet_task_queue=f"test-{secrets.token_hex(4)}",
        admin_token=SecretStr(TOKEN),
        node_secret=SecretStr("a-node-secret-for-tests-of-the-document"),
        hold_timeout_s=0.1,
    )


schema = schemathesis.openapi.from_dict(
    create_app(Settings(mode="dev")).openapi(),
    config=schemathesis.Config.from_dict(
        {"generation": {"deterministic": True, "database": "none", "allow-extra-parameters": False}}
    ),
)


@schema.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
def test_every_answer_is_documented(case: Any, served: Served) -> None:
    is_inference = case.path.startswith("/v1")
    secret = served.secret if is_inference else TOKEN
    answer = case.call(base_url=served.url, headers={"Authorization": f"Bearer {secret}"})
    case.validate_response(answer, excluded_checks=[*EXCLUDED, *(METHODS if is_inference else ())])
