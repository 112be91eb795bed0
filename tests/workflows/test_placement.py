"""Where machines are ordered, and what their nodes' rows say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from temporalio.testing import ActivityEnvironment

from activities.cloud import CloudActivities
from crosslogic.contracts.node import Machine, NodeSpec
from crosslogic.domain.errors import Rejected
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, Node, NodeEvent, NodeState
from crosslogic.domain.placement import Exposure, Gpus, Offer, Place
from crosslogic.new_ids import new_id
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.placement import PlacementStore
from tests.workflows.fleet import FleetUnderTest, MadeUpCloud

ENDPOINT = "http://127.0.0.1:8443"
L4_IN_AWS = Offer("aws", "us-east-1", Gpus("L4"), "g6.xlarge", 800_000, 300_000)
L4_IN_GCP = Offer("gcp", "us-east4", Gpus("L4"), "g2-standard-4", 700_000, 200_000)
ELSEWHERE = Offer("aws", "eu-central-1", Gpus("L4"), "g6.xlarge", 100_000, 10_000)


@dataclass
class MarketCloud(MadeUpCloud):
    """A cloud with others behind it. `answers` are what `find` says, one after the other; the last one stays."""

    rented: Sequence[Offer] = (L4_IN_AWS, L4_IN_GCP, ELSEWHERE)
    orders: list[NodeSpec] = field(default_factory=list[NodeSpec])
    answers: list[Machine] = field(default_factory=list[Machine])
    ended: list[str] = field(default_factory=list[str])

    async def offers(self) -> list[Offer]:
        return list(self.rented)

    async def clouds(self) -> list[str]:
        return ["aws", "azure"]

    async def ensure(self, spec: NodeSpec) -> None:
        self.orders.append(spec)

    async def find(self, cluster: str) -> Machine | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    async def end(self, cluster: str) -> None:
        self.ended.append(cluster)


async def taken(fleet: FleetUnderTest, place: Place, lived_s: float) -> None:
    """A spot machine that its cloud has taken there."""
    node = new_id()
    await fleet.nodes.intend(
        Intent(node, "llama-3-8b", "us-east", "skypilot", NODE.show(node), "provision/x", gpu=place.gpu, is_spot=True)
    )
    await fleet.nodes.settle(node, place)
    await fleet.nodes.advance(node, NodeEvent.LOSE, "taken")
    await fleet.pool.execute(
        "INSERT INTO preemptions (node_id, cloud, region, zone, gpu, had_notice, lived_s) "
        "VALUES ($1, $2, 'us-east', $3, $4, TRUE, $5)",
        *(node, place.cloud, place.zone, place.gpu, lived_s),
    )


def activities(fleet: FleetUnderTest, cloud: MarketCloud) -> CloudActivities:
    return CloudActivities(
        {"skypilot": cloud},
        fleet.nodes,
        is_loopback_allowed=True,
        catalog=CatalogStore(fleet.pool),
        placement=PlacementStore(fleet.pool),
        poll_interval_s=0.01,
    )


async def intended(fleet: FleetUnderTest, **values: object) -> NodeSpec:
    """A node's spec whose row is written."""
    node_id = new_id()
    spec = NodeSpec(
        NODE.show(node_id), "llama-3-8b", "us-east", provider="skypilot", gpu="L4", spot=True,
        cluster=f"cic-{node_id}", workflow_id="provision/1", gpus=["L4"],
    )  # fmt: skip
    await fleet.nodes.intend(
        Intent(node_id, spec.model, spec.region, spec.provider, spec.cluster, spec.workflow_id, is_spot=True)
    )
    return replace(spec, **values)  # pyright: ignore[reportArgumentType]


async def row(fleet: FleetUnderTest, spec: NodeSpec) -> Node:
    return await fleet.nodes.get(NODE.parse(spec.node_id))


class TestLaunch:
    async def test_tries_the_regions_places_by_what_serving_costs_and_says_why(
        self, idle_fleet: FleetUnderTest
    ) -> None:
        cloud, spec = MarketCloud(), await intended(idle_fleet)
        await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        assert [place.infra for place in cloud.orders[0].places] == ["gcp/us-east4", "aws/us-east-1"]
        node = await row(idle_fleet, spec)
        assert node.state is NodeState.LAUNCHING
        assert "gcp/us-east4 first: L4 at $0.200/h spot" in node.reason

    async def test_learns_from_what_was_taken(self, idle_fleet: FleetUnderTest) -> None:
        for _ in range(60):
            await taken(idle_fleet, Place("gcp", "us-east4", "us-east4-a", "L4"), 60)
        cloud, spec = MarketCloud(), await intended(idle_fleet)
        await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        assert [place.cloud for place in cloud.orders[0].places] == ["aws", "gcp"]

    async def test_stays_with_the_clouds_that_were_asked_for(self, idle_fleet: FleetUnderTest) -> None:
        cloud, spec = MarketCloud(), await intended(idle_fleet, clouds=["aws"], spot=False)
        await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        assert [(place.cloud, place.is_spot) for place in cloud.orders[0].places] == [("aws", False)]

    async def test_takes_plain_machines_by_the_clouds_own_names(self, idle_fleet: FleetUnderTest) -> None:
        cloud, spec = MarketCloud(), await intended(idle_fleet, gpus=["cpu"])
        await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        assert [place.infra for place in cloud.orders[0].places] == ["aws/us-east-1", "azure/eastus"]

    async def test_prefers_machines_of_ones_own(self, idle_fleet: FleetUnderTest) -> None:
        await idle_fleet.pool.execute("UPDATE regions SET aliases = aliases || '{slurm/hall}' WHERE name = 'us-east'")
        cloud, spec = MarketCloud(), await intended(idle_fleet)
        await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        infra = [place.infra for place in cloud.orders[0].places]
        assert infra == ["slurm/hall", "gcp/us-east4", "aws/us-east-1"]
        assert not cloud.orders[0].places[0].is_spot

    async def test_refuses_what_nobody_rents_there(self, idle_fleet: FleetUnderTest) -> None:
        cloud, spec = MarketCloud(rented=[ELSEWHERE]), await intended(idle_fleet)
        with pytest.raises(Rejected, match="name other gpus") as caught:
            await ActivityEnvironment().run(activities(idle_fleet, cloud).launch_machine, spec)
        assert caught.value.code == "no_offer"
        assert cloud.orders == []


class TestAwait:
    async def test_writes_down_where_the_machine_is_and_what_it_costs(self, idle_fleet: FleetUnderTest) -> None:
        place = Place("aws", "us-east-1", "us-east-1a", "L4", "g6.xlarge", True, 300_000)
        spec = await intended(idle_fleet)
        cloud = MarketCloud(answers=[Machine(spec.cluster, MachineStatus.RUNNING, ENDPOINT, place=place)])
        await idle_fleet.nodes.advance(NODE.parse(spec.node_id), NodeEvent.LAUNCH, "")
        await ActivityEnvironment().run(activities(idle_fleet, cloud).await_machine, spec)
        node = await row(idle_fleet, spec)
        assert (node.cloud, node.cloud_region, node.zone, node.instance_type) == (
            "aws",
            "us-east-1",
            "us-east-1a",
            "g6.xlarge",
        )
        assert (node.price_microdollars_per_h, node.gpu, node.endpoint) == (300_000, "L4", ENDPOINT)

    async def test_takes_the_endpoint_that_the_agent_wrote_where_the_cloud_knows_none(
        self, idle_fleet: FleetUnderTest
    ) -> None:
        spec = await intended(idle_fleet)
        cloud = MarketCloud(answers=[Machine(spec.cluster, MachineStatus.RUNNING, has_endpoints=False)])
        await idle_fleet.nodes.advance(NODE.parse(spec.node_id), NodeEvent.LAUNCH, "", endpoint=ENDPOINT)
        await ActivityEnvironment().run(activities(idle_fleet, cloud).await_machine, spec)
        assert (await row(idle_fleet, spec)).state is NodeState.BOOTING

    async def test_orders_again_what_was_broken_off(self, idle_fleet: FleetUnderTest) -> None:
        spec = await intended(idle_fleet)
        lost = Machine(spec.cluster, MachineStatus.STARTING, is_order_lost=True)
        cloud = MarketCloud(answers=[lost, Machine(spec.cluster, MachineStatus.RUNNING, ENDPOINT)])
        await idle_fleet.nodes.advance(NODE.parse(spec.node_id), NodeEvent.LAUNCH, "")
        await ActivityEnvironment().run(activities(idle_fleet, cloud).await_machine, spec)
        assert [order.cluster for order in cloud.orders] == [spec.cluster]

    async def test_orders_nothing_again_for_a_tombstoned_node(self, idle_fleet: FleetUnderTest) -> None:
        """F4: a zombie that finds the order lost must not bring the machine back."""
        spec = await intended(idle_fleet)
        cloud = MarketCloud(answers=[Machine(spec.cluster, MachineStatus.STARTING, is_order_lost=True)])
        intent = Intent(NODE.parse(spec.node_id), spec.model, spec.region, spec.provider, spec.cluster, "provision/1")
        await idle_fleet.nodes.tombstone(intent, "undone")
        with pytest.raises(Rejected) as caught:
            await ActivityEnvironment().run(activities(idle_fleet, cloud).await_machine, spec)
        assert caught.value.code == "tombstoned"
        assert cloud.orders == []
        assert cloud.ended == [spec.cluster]

    @pytest.mark.parametrize("failure", ["no_capacity", "setup_failed"])
    async def test_gives_up_what_will_never_serve(self, idle_fleet: FleetUnderTest, failure: str) -> None:
        spec = await intended(idle_fleet)
        machine = Machine(spec.cluster, MachineStatus.RUNNING, reason="that is why", failure=failure)
        with pytest.raises(Rejected, match="that is why") as caught:
            await ActivityEnvironment().run(activities(idle_fleet, MarketCloud(answers=[machine])).await_machine, spec)
        assert caught.value.code == failure


class TestHistory:
    async def test_counts_hours_by_market_and_what_was_taken_there(self, idle_fleet: FleetUnderTest) -> None:
        spec = await intended(idle_fleet)
        await idle_fleet.nodes.settle(
            NODE.parse(spec.node_id), Place("aws", "us-east-1", "us-east-1a", "L4:2", "g6.12xlarge", True, 900_000)
        )
        await idle_fleet.pool.execute("UPDATE nodes SET created_at = now() - interval '3 hours'")
        await taken(idle_fleet, Place("aws", "us-east-1", "us-east-1b", "L4"), 7200)
        history = await PlacementStore(idle_fleet.pool).history()
        seen = history["aws", "us-east-1", "us-east-1a", "L4"]
        assert (round(seen.hours, 1), seen.preemptions) == (3.0, 0)
        assert history["aws", "us-east-1", "us-east-1b", "L4"] == Exposure(2.0, 1)
