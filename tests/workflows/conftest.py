from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest_asyncio
import redis.asyncio as aioredis
from temporalio.client import Client

import worker as fleet_worker
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.hot.routes import RouteBoard
from crosslogic.store.nodes import NodeStore
from tests.conftest import make_settings
from tests.workflows.fleet import FleetUnderTest, MadeUpCloud, running, terminate_all


@pytest_asyncio.fixture
async def idle_fleet(
    database: str,
    pool: asyncpg.Pool,
    valkey: Valkey,
    redis: aioredis.Redis,
    redis_prefix: str,
    temporal_server: Temporal,
    temporal_client: Client,
    task_queue: str,
) -> AsyncIterator[FleetUnderTest]:
    """A fleet whose worker the test starts itself."""
    settings = make_settings(
        database_url=database,
        redis_url=valkey.url,
        redis_prefix=redis_prefix,
        temporal_address=temporal_server.address,
        fleet_task_queue=task_queue,
        probe_interval_s=0.2,
        probe_timeout_s=1.0,
        silence_s=1.5,
        cloud_interval_s=0.5,
    )
    cloud = MadeUpCloud()
    board = RouteBoard(redis, redis_prefix)
    fleet = fleet_worker.assemble(settings, pool, {"local": cloud}, board)
    yield FleetUnderTest(settings, temporal_client, task_queue, pool, cloud, board, NodeStore(pool), fleet)
    await terminate_all(temporal_client, task_queue)
    cloud.stop()
    await fleet.close()


@pytest_asyncio.fixture
async def fleet(idle_fleet: FleetUnderTest) -> AsyncIterator[FleetUnderTest]:
    """A fleet at work."""
    made = fleet_worker.make_worker(idle_fleet.client, idle_fleet.task_queue, idle_fleet.fleet.activities)
    async with running(made):
        yield idle_fleet
