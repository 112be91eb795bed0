"""Unmodified SkyPilot on an emulated AWS whose machines are real."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from crosslogic.domain.errors import Rejected
from crosslogic.domain.placement import CPU, Gpus, Place
from tests.clients.cloud_contract import PREFIX, CloudContract, bring_up, end
from tests.rigs.aws import AwsRig
from tests.rigs.control_plane import ControlPlane
from tests.rigs.landlords import AwsLandlord, make_client, make_spec

pytestmark = [pytest.mark.rigs, pytest.mark.timeout(900)]


@pytest.fixture
async def landlord(aws_rig: AwsRig, control_plane: ControlPlane) -> AsyncIterator[AwsLandlord]:
    made = AwsLandlord(aws_rig, control_plane)
    yield made
    await made.cloud.close()
    # What a failed test has left behind must not meet the next one: all machines share one network.
    aws_rig.take_all()


class TestContract(CloudContract):
    pass


class TestMachine:
    async def test_serves_where_it_was_placed_and_says_what_it_costs(
        self, landlord: AwsLandlord, control_plane: ControlPlane
    ) -> None:
        landlord.rig.sell_out("g6e.xlarge")
        places = [Place("aws", "us-west-2", gpu="L40S", is_spot=True), Place("aws", "us-east-1", gpu=CPU, is_spot=True)]
        spec = make_spec(f"{PREFIX}placed", places)
        machine = await bring_up(landlord, spec)
        assert machine.place is not None
        # The first place was full, so SkyPilot took the second: m6i.large at the spot price of its catalog.
        assert (machine.place.cloud, machine.place.region, machine.place.instance_type) == (
            "aws",
            "us-east-1",
            "m6i.large",
        )
        assert machine.place.zone in ("us-east-1a", "us-east-1b")
        assert machine.place.is_spot
        assert machine.place.price_microdollars_per_h == 35_000
        async with httpx.AsyncClient(timeout=10) as http:
            assert (await http.get(f"{machine.endpoint}/")).status_code == 200
        said = [said for said in control_plane.registrations if said["node_id"] == spec.node_id]
        assert [entry["join_token"] for entry in said] == [f"token-of-{spec.node_id}"]
        costs = {cost.cluster: cost for cost in await landlord.cloud.costs()}
        assert costs[spec.cluster].is_running
        assert costs[spec.cluster].cost_microdollars > 0
        await end(landlord, spec.cluster)

    async def test_whose_agent_is_not_ours_is_told_apart_and_ended(
        self, aws_rig: AwsRig, control_plane: ControlPlane
    ) -> None:
        landlord = AwsLandlord(aws_rig, control_plane)
        landlord.cloud = make_client(aws_rig.server, control_plane, httpx.AsyncHTTPTransport(), sha256="0" * 64)
        spec = landlord.spec("forged")
        with pytest.raises(Rejected, match="FAILED_SETUP") as caught:
            await bring_up(landlord, spec)
        assert caught.value.code == "setup_failed"
        assert landlord.count(spec.cluster) == 1
        await end(landlord, spec.cluster)
        assert landlord.count(spec.cluster) == 0
        await landlord.cloud.close()


class TestOffers:
    async def test_are_those_of_the_catalog(self, landlord: AwsLandlord) -> None:
        offers = {(offer.region, offer.instance_type): offer for offer in await landlord.cloud.offers()}
        l40s = offers["us-west-2", "g6e.xlarge"]
        assert (l40s.cloud, l40s.gpus) == ("aws", Gpus("L40S"))
        assert (l40s.on_demand_microdollars_per_h, l40s.spot_microdollars_per_h) == (1_861_000, 650_000)
        assert await landlord.cloud.clouds() == ["aws"]
