from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import Rejected
from crosslogic.domain.placement import (
    MOST_PLACES,
    Exposure,
    Gpus,
    Offer,
    RiskPolicy,
    Wish,
    explain,
    exposure_of,
    fitting,
    hazard_per_h,
    rank,
    serving_cost,
)

L4 = Gpus("L4")
H100 = Gpus("H100", 8)
ANYWHERE = frozenset({"us-east-1", "us-east4"})


def offer(cloud: str, spot: float | None, gpus: Gpus = L4, region: str = "us-east-1", zone: str = "") -> Offer:
    spot_price = None if spot is None else round(spot * 1_000_000)
    return Offer(cloud, region, gpus, f"{cloud}-{gpus}", 1_000_000, spot_price, zone)


class TestGpus:
    @pytest.mark.parametrize(
        ("text", "gpus"), [("L4", L4), ("A100:8", Gpus("A100", 8)), ("cpu", Gpus("cpu")), ("CPU", Gpus("cpu"))]
    )
    def test_reads_a_name_with_or_without_a_count(self, text: str, gpus: Gpus) -> None:
        assert Gpus.read(text) == gpus
        assert Gpus.read(str(gpus)) == gpus

    @pytest.mark.parametrize("text", ["", ":2", "L4:0", "L4:x", "L4:-1", "L4:65", "cpu:2:1"])
    def test_refuses_other_forms_and_says_what_to_write(self, text: str) -> None:
        with pytest.raises(Rejected, match=r"NAME or NAME:COUNT"):
            Gpus.read(text)


class TestFitting:
    @pytest.mark.parametrize(
        ("vram_gb", "expected"),
        [
            (2, {"T4": 1, "L4": 1, "H100": 1}),
            (16, {"T4": 1, "L4": 1, "A100": 1}),
            (40, {"T4": 4, "L4": 2, "A100": 1, "L40S": 1, "A100-80GB": 1}),
            (80, {"T4": 8, "L4": 4, "A100": 2, "L40S": 2, "A100-80GB": 1, "H100": 1}),
            (600, {"A100-80GB": 8, "H100": 8, "H200": 8, "B200": 4}),
        ],
    )
    def test_takes_the_fewest_of_each_kind(self, vram_gb: int, expected: dict[str, int]) -> None:
        found = {gpus.name: gpus.count for gpus in fitting(vram_gb)}
        assert expected.items() <= found.items()

    def test_leaves_out_what_cannot_hold_it(self) -> None:
        assert "T4" not in {gpus.name for gpus in fitting(600)}
        with pytest.raises(Rejected, match="gpus"):
            fitting(10_000)


class TestHazard:
    def test_of_an_unknown_market_is_the_prior(self) -> None:
        policy = RiskPolicy()
        assert hazard_per_h(None) == policy.prior_preemptions_per_h

    @given(hours=st.floats(0, 1e5), taken=st.integers(0, 1000))
    def test_lies_between_the_prior_and_what_was_seen(self, hours: float, taken: int) -> None:
        prior = RiskPolicy().prior_preemptions_per_h
        hazard = hazard_per_h(Exposure(hours, taken))
        seen = taken / hours if hours else float("inf") if taken else prior
        assert min(prior, seen) - 1e-9 <= hazard <= max(prior, seen) + 1e-9

    @given(hours=st.floats(0, 1e4), taken=st.integers(0, 100))
    def test_grows_with_every_preemption(self, hours: float, taken: int) -> None:
        assert hazard_per_h(Exposure(hours, taken + 1)) > hazard_per_h(Exposure(hours, taken))


class TestRank:
    def test_takes_the_cheapest_first(self) -> None:
        wish = Wish((L4,), ANYWHERE, True)
        places = rank([offer("aws", 0.5), offer("gcp", 0.3, region="us-east4"), offer("azure", None)], wish, {})
        assert [place.cloud for place in places] == ["gcp", "aws"]
        assert places[0].price_microdollars_per_h == 300_000
        assert all(place.is_spot for place in places)

    def test_a_market_that_takes_nodes_back_costs_more_than_it_says(self) -> None:
        wish = Wish((L4,), ANYWHERE, True)
        history = {("gcp", "us-east4", "us-east4-a", "L4"): Exposure(10, 50)}
        places = rank([offer("aws", 0.35), offer("gcp", 0.3, region="us-east4")], wish, history)
        assert [place.cloud for place in places] == ["aws", "gcp"]
        # 51 preemptions in 30 h, and a quarter of an hour lost with each: 0.3 × (1 + 1.7 × 0.25).
        assert "$0.427 an hour of serving" in places[1].reason

    def test_counts_a_zone_by_its_own_history(self) -> None:
        wish = Wish((L4,), ANYWHERE, True)
        history = {("aws", "us-east-1", "us-east-1a", "L4"): Exposure(10, 50)}
        zones = [offer("aws", 0.3, zone="us-east-1a"), offer("aws", 0.31, zone="us-east-1b")]
        assert [place.zone for place in rank(zones, wish, history)] == ["us-east-1b", "us-east-1a"]

    def test_on_demand_has_no_hazard_and_its_own_price(self) -> None:
        places = rank([offer("aws", 0.3)], Wish((L4,), ANYWHERE, False), {})
        assert (places[0].price_microdollars_per_h, places[0].is_spot) == (1_000_000, False)
        assert "on demand" in places[0].reason

    def test_takes_a_bigger_machine_where_no_smaller_one_is_rented(self) -> None:
        wish = Wish((Gpus("H100"),), ANYWHERE, True)
        assert [place.gpu for place in rank([offer("aws", 20.0, H100)], wish, {})] == ["H100:8"]
        assert rank([offer("aws", 1.0, L4)], Wish((Gpus("L4", 2),), ANYWHERE, True), {}) == []

    def test_stays_in_the_region_the_clouds_and_the_zone_that_were_asked_for(self) -> None:
        offers = [
            offer("aws", 0.3, zone="us-east-1a"),
            offer("gcp", 0.1, region="us-east4"),
            offer("aws", 0.1, region="x"),
        ]
        aws = Wish((L4,), ANYWHERE, True, frozenset({"aws"}))
        assert [place.infra for place in rank(offers, aws, {})] == ["aws/us-east-1/us-east-1a"]
        assert rank(offers, Wish((L4,), frozenset({"us-east-1"}), True, zone="us-east-1b"), {}) == []
        zoned = Wish((L4,), ANYWHERE, True, frozenset({"gcp"}), "us-east4-b")
        assert [place.infra for place in rank(offers, zoned, {})] == ["gcp/us-east4/us-east4-b"]

    def test_never_tries_for_ever(self) -> None:
        offers = [offer("aws", 0.3 + i / 1000, region="us-east-1", zone=f"z{i}") for i in range(100)]
        places = rank(offers, Wish((L4,), ANYWHERE, True), {})
        assert [place.zone for place in places] == [f"z{i}" for i in range(MOST_PLACES)]

    @given(
        prices=st.lists(st.integers(1, 10**8), min_size=1, max_size=30),
        taken=st.lists(st.integers(0, 50), min_size=30, max_size=30),
    )
    def test_is_in_the_order_of_what_serving_costs(self, prices: list[int], taken: list[int]) -> None:
        offers = [Offer("aws", "us-east-1", L4, f"t{i}", None, price, f"z{i}") for i, price in enumerate(prices)]
        history = {("aws", "us-east-1", f"z{i}", "L4"): Exposure(10, count) for i, count in enumerate(taken)}
        places = rank(offers, Wish((L4,), ANYWHERE, True), history)
        costs = [
            serving_cost(place.price_microdollars_per_h, hazard_per_h(exposure_of(place, history))) for place in places
        ]
        assert costs == sorted(costs)
        assert len(places) == min(len(prices), MOST_PLACES)


class TestExplain:
    def test_names_the_first_and_counts_the_others(self) -> None:
        places = rank([offer("aws", 0.5), offer("gcp", 0.3, region="us-east4")], Wish((L4,), ANYWHERE, True), {})
        assert explain(places).startswith("gcp/us-east4 first: L4 at $0.300/h spot, 0.050 preemptions/h expected")
        assert explain(places).endswith("1 more if it is full")
        assert explain([]) == "no place was found"
