"""A sweep of the local cloud: the machines are real engine processes, and so is what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis

import worker as fleet_worker
from crosslogic.clients import temporal
from crosslogic.clients.local_cloud import LocalCloud
from crosslogic.contracts import names
from crosslogic.contracts.sweep import FleetSweepInput, FleetSweepResult
from crosslogic.dev.processes import ProcessId
from crosslogic.dev.temporal import Temporal
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, cluster_name
from crosslogic.new_ids import new_id
from crosslogic.store.nodes import NodeStore
from tests.conftest import make_settings
from tests.dev.test_local_cloud import TOKEN, Cloud, eventually
from tests.workflows.fleet import running

NODE_SECRET = "the node secret of this installation, in a test"


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    made.start()
    try:
        yield made
    finally:
        made.http.close()
        made.stop()
        made.kill_engines()


def machine_name(node_secret: str) -> str:
    return cluster_name("local", "in-mumbai", "cpu", True, NODE.show(new_id()), node_secret)


class TestFleetSweep:
    async def test_kills_the_orphan_and_nothing_else(
        self, cloud: Cloud, pool: asyncpg.Pool, redis: aioredis.Redis, temporal_server: Temporal, task_queue: str
    ) -> None:
        """F1: also while the list is late with what was ordered and with what was ended."""
        settings = make_settings(
            temporal_address=temporal_server.address, fleet_task_queue=task_queue, node_secret=NODE_SECRET
        )
        owned, planted, foreign = machine_name(NODE_SECRET), machine_name(NODE_SECRET), machine_name("another one's")
        node_id = new_id()
        await NodeStore(pool).intend(Intent(node_id, "llama-3-8b", "in-mumbai", "local", owned, "provision/x"))
        for cluster in (owned, planted, foreign):
            cloud.order(cluster)
        processes = {cluster: await asyncio.to_thread(self.process_of, cloud, cluster) for cluster in (owned, planted)}
        client = await temporal.connect(settings)
        local = LocalCloud(cloud.url, TOKEN, NODE_SECRET)
        fleet = fleet_worker.assemble(settings, pool, {"local": local}, redis)

        async def sweep() -> FleetSweepResult:
            return await client.execute_workflow(
                names.FLEET_SWEEP,
                FleetSweepInput(look_again_s=0.5),
                id=f"sweep-{uuid4()}",
                task_queue=task_queue,
                result_type=FleetSweepResult,
            )

        async with running(fleet_worker.make_worker(client, task_queue, fleet.activities)):
            # Nothing is old enough to be listed: there is nothing to be judged.
            cloud.behave(list_lag_s=3_600)
            assert (await sweep()).machines == 0
            cloud.behave(list_lag_s=0)
            swept = await sweep()
            assert {(found.cluster, found.standing, found.outcome) for found in swept.findings} == {
                (planted, "unintended", "ended"),
                (foreign, "foreign", "left alone"),
            }
            assert (swept.machines, swept.owned, swept.destroyed, swept.foreign) == (3, 1, 1, 1)
            # The list still shows what was ended, and the machine itself says that it is gone.
            cloud.behave(list_lag_s=3)
            again = await sweep()
            assert again.destroyed == 0
        assert not processes[planted].is_alive
        assert processes[owned].is_alive
        assert cloud.show(planted)["reason"] == "ended by order"
        cloud.behave(list_lag_s=0)
        assert {cluster for cluster, machine in cloud.listed().items() if machine["status"] != "gone"} >= {
            owned,
            foreign,
        }
        await fleet.close()
        await local.close()

    @staticmethod
    def process_of(cloud: Cloud, cluster: str) -> ProcessId:
        pid = eventually(lambda: cloud.show(cluster)["pid"], "its process runs")
        process = ProcessId.of(pid)
        assert process is not None
        return process
