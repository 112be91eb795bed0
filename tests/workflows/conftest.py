from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest_asyncio
import redis.asyncio as aioredis

import worker as fleet_worker
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from tests.conftest import make_settings
from tests.workflows.fleet import FAST, FleetUnderTest, making_fleet, running


@pytest_asyncio.fixture
async def idle_fleet(
    database: str,
    valkey: Valkey,
    redis: aioredis.Redis,  # It deletes what the test wrote.
    redis_prefix: str,
    temporal_server: Temporal,
    task_queue: str,
) -> AsyncGenerator[FleetUnderTest]:
    """A fleet whose worker the test starts itself."""
    settings = make_settings(
        database_url=database,
        redis_url=valkey.url,
        redis_prefix=redis_prefix,
        temporal_address=temporal_server.address,
        fleet_task_queue=task_queue,
        **FAST,
    )
    async with making_fleet(settings) as made:
        yield made


@pytest_asyncio.fixture
async def fleet(idle_fleet: FleetUnderTest) -> AsyncGenerator[FleetUnderTest]:
    """A fleet at work."""
    made = fleet_worker.make_worker(idle_fleet.client, idle_fleet.task_queue, idle_fleet.fleet.activities)
    async with running(made):
        yield idle_fleet
