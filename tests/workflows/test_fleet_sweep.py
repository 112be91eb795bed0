"""FleetSweep: what was never intended or is long over is ended, whatever else is there is left alone."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError

from crosslogic.contracts import names
from crosslogic.contracts.node import Machine
from crosslogic.contracts.sweep import FleetSweepInput
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, Node, NodeState, cluster_name
from crosslogic.new_ids import new_id
from crosslogic.store.sweeps import SweepStore
from tests.workflows.fleet import FleetUnderTest

SECOND_LOOK_S = 0.3
FOREIGN_SECRET = "the node secret of another installation"


def secret_of(fleet: FleetUnderTest) -> str:
    assert fleet.settings.node_secret is not None
    return fleet.settings.node_secret.get_secret_value()


def plant(fleet: FleetUnderTest, node_secret: str) -> str:
    """A machine that no row claims."""
    cluster = cluster_name("local", "in-mumbai", "cpu", True, NODE.show(new_id()), node_secret)
    fleet.cloud.plant(cluster)
    return cluster


async def start(fleet: FleetUnderTest, **fields: Any) -> WorkflowHandle[Any, Any]:
    values: dict[str, Any] = {"look_again_s": SECOND_LOOK_S, **fields}
    order = FleetSweepInput(**values)
    return await fleet.client.start_workflow(
        names.FLEET_SWEEP, order, id=f"sweep-{uuid4()}", task_queue=fleet.task_queue
    )


async def sweep(fleet: FleetUnderTest, **fields: Any) -> dict[str, Any]:
    return await (await start(fleet, **fields)).result()


async def end_long_ago(fleet: FleetUnderTest, node: Node) -> None:
    """Its row is over since an hour, and its machine lives on: as after an order that arrived too late."""
    await fleet.lifecycle(node).signal(names.DRAIN)
    await fleet.lifecycle(node).result()
    await fleet.pool.execute(
        "UPDATE nodes SET tombstoned_at = $2, ended_at = $2 WHERE id = $1",
        node.id,
        datetime.now(UTC) - timedelta(hours=1),
    )
    engine = fleet.cloud.engines[node.cluster]
    await engine.start()
    fleet.cloud.machines[node.cluster] = Machine(node.cluster, MachineStatus.RUNNING, engine.endpoint)


class TestSweep:
    async def test_proves_that_every_machine_was_intended(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        swept = await sweep(fleet)
        numbers = {name: swept[name] for name in ("machines", "owned", "ending", "destroyed", "unexplained", "missing")}
        assert numbers == {"machines": 1, "owned": 1, "ending": 0, "destroyed": 0, "unexplained": 0, "missing": 0}
        assert swept["findings"] == []
        assert swept["created"] == 1
        assert fleet.cloud.alive == {node.cluster}
        await fleet.check_books()

    async def test_ends_a_machine_that_nobody_intended_and_names_it(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        planted = plant(fleet, secret_of(fleet))
        swept = await sweep(fleet)
        (found,) = swept["findings"]
        assert (found["cluster"], found["standing"], found["outcome"]) == (planted, "unintended", "ended")
        assert (swept["machines"], swept["owned"], swept["destroyed"], swept["unexplained"]) == (2, 1, 1, 1)
        assert fleet.cloud.alive == {node.cluster}
        (row,) = await SweepStore(fleet.pool).list_page()
        assert [one["cluster"] for one in row["findings"]] == [planted]

    async def test_ends_what_has_outlived_its_node(self, fleet: FleetUnderTest) -> None:
        """F3."""
        node = await fleet.serve_one()
        await end_long_ago(fleet, node)
        swept = await sweep(fleet)
        assert [(found["node_id"], found["standing"]) for found in swept["findings"]] == [(node.node_id, "orphan")]
        assert (swept["destroyed"], swept["unexplained"]) == (1, 0)
        assert fleet.cloud.alive == set()
        await fleet.check_books()

    async def test_leaves_other_installations_alone(self, fleet: FleetUnderTest) -> None:
        planted = plant(fleet, FOREIGN_SECRET)
        swept = await sweep(fleet)
        (found,) = swept["findings"]
        assert (found["cluster"], found["standing"], found["outcome"]) == (planted, "foreign", "left alone")
        assert (swept["foreign"], swept["destroyed"], swept["unexplained"]) == (1, 0, 0)
        assert fleet.cloud.alive == {planted}

    async def test_only_looks_on_a_dry_run(self, fleet: FleetUnderTest) -> None:
        planted = plant(fleet, secret_of(fleet))
        swept = await sweep(fleet, dry_run=True)
        assert [found["outcome"] for found in swept["findings"]] == [""]
        assert (swept["destroyed"], swept["unexplained"]) == (0, 1)
        assert fleet.cloud.alive == {planted}

    async def test_leaves_many_that_nobody_intended_to_people(self, fleet: FleetUnderTest) -> None:
        """More likely the worker looks into the wrong database."""
        planted = {plant(fleet, secret_of(fleet)) for _ in range(4)}
        swept = await sweep(fleet)
        assert (swept["destroyed"], swept["unexplained"]) == (1, 4)
        assert sum("is this the right database?" in found["outcome"] for found in swept["findings"]) == 3
        assert len(fleet.cloud.alive & planted) == 3
        assert (await sweep(fleet, end_all_unintended=True))["destroyed"] == 3
        assert fleet.cloud.alive == set()

    async def test_never_ends_what_becomes_intended_before_the_second_look(self, fleet: FleetUnderTest) -> None:
        """A reading of the registry that is older than the cloud's list proves nothing."""
        planted = plant(fleet, secret_of(fleet))
        handle = await start(fleet, look_again_s=2.0)
        await fleet.until("the first look", lambda: _has_listed(fleet, 1))
        await fleet.nodes.intend(
            Intent(new_id(), "llama-3-8b", "in-mumbai", "local", planted, "provision/late"),
        )
        swept = await handle.result()
        assert (swept["owned"], swept["findings"]) == (1, [])
        assert fleet.cloud.alive == {planted}

    async def test_tells_a_node_whose_machine_is_missing(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        await fleet.pool.execute("UPDATE nodes SET changed_at = now() - interval '10 min'")
        fleet.cloud.take(node.cluster)
        swept = await sweep(fleet)
        assert [(found["node_id"], found["standing"]) for found in swept["findings"]] == [(node.node_id, "missing")]
        assert swept["missing"] == 1
        assert (await fleet.lifecycle(node).result())["state"] == NodeState.LOST
        await fleet.check_books()

    async def test_goes_on_without_a_cloud_that_does_not_answer(self, fleet: FleetUnderTest) -> None:
        async def away() -> None:
            raise Unavailable("away")

        fleet.cloud.before["list_all"] = deque([away])
        swept = await sweep(fleet)
        assert swept["unasked"] == ["local"]
        assert swept["machines"] == 0

    async def test_refuses_a_cloud_that_is_not_connected(self, fleet: FleetUnderTest) -> None:
        with pytest.raises(WorkflowFailureError) as caught:
            await sweep(fleet, provider="moon")
        assert isinstance(caught.value.cause, ApplicationError)
        assert "There is no cloud 'moon' to sweep; connected: local" in caught.value.cause.message

    async def test_writes_down_what_it_did_before_it_was_cancelled(self, fleet: FleetUnderTest) -> None:
        gate, asked = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            asked.set()
            await gate.wait()

        planted = plant(fleet, secret_of(fleet))
        fleet.cloud.before["end"] = deque([hold])
        handle = await start(fleet)
        await asked.wait()
        await handle.cancel()
        await asyncio.sleep(0.5)
        gate.set()
        with pytest.raises(WorkflowFailureError):
            await handle.result()
        assert (await handle.describe()).status is WorkflowExecutionStatus.CANCELED
        (row,) = await SweepStore(fleet.pool).list_page()
        assert [(found["cluster"], found["outcome"]) for found in row["findings"]] == [(planted, "ended")]
        assert fleet.cloud.alive == set()

    async def test_reads_the_row_once_more_before_it_ends_anything(self, fleet: FleetUnderTest) -> None:
        """The workflow of the order was slow: the row comes after both looks."""
        planted = plant(fleet, secret_of(fleet))

        async def intend() -> None:
            await fleet.nodes.intend(
                Intent(new_id(), "llama-3-8b", "in-mumbai", "local", planted, "provision/late"),
            )

        fleet.cloud.before["find"] = deque([intend])
        swept = await sweep(fleet)
        assert [found["outcome"].partition(":")[0] for found in swept["findings"]] == ["spared"]
        assert (swept["destroyed"], swept["unexplained"]) == (0, 0)
        assert fleet.cloud.alive == {planted}


async def _has_listed(fleet: FleetUnderTest, times: int) -> bool:
    return fleet.cloud.listed >= times
