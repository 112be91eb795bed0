from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import pytest
import pytest_asyncio
import redis.asyncio as aioredis

import worker as fleet_worker
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from tests.agent.metadata import Metadata
from tests.conftest import make_settings
from tests.workflows.fleet import FAST, FleetUnderTest, making_fleet, running


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    """The machine's metadata server."""
    server = Metadata()
    yield server
    server.stop()


@pytest_asyncio.fixture
async def fleet(
    database: str,
    valkey: Valkey,
    redis: aioredis.Redis,  # It deletes what the test wrote.
    redis_prefix: str,
    temporal_server: Temporal,
    task_queue: str,
) -> AsyncGenerator[FleetUnderTest]:
    """A fleet at work, with a worker as in production."""
    settings = make_settings(
        database_url=database,
        redis_url=valkey.url,
        redis_prefix=redis_prefix,
        temporal_address=temporal_server.address,
        fleet_task_queue=task_queue,
        node_secret="a-node-secret-for-tests-of-the-agent",
        **(FAST | {"silence_s": 15.0}),
    )
    async with making_fleet(settings) as made:
        await made.fleet.trust.refresh()
        async with running(fleet_worker.make_worker(made.client, made.task_queue, made.fleet.activities)):
            yield made
