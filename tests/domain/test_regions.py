from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import Rejected
from crosslogic.domain.regions import Region, RegionMap, RegionWish

REGIONS = RegionMap.of(
    [
        Region("in-mumbai", "Mumbai", 7000, ("ap-south-1",), ("ap-southeast", "eu-west", "us-east")),
        Region("us-east", "Virginia", 10000, ("us-east-1",), ("eu-west",)),
        Region("eu-west", "Frankfurt", 11000, ("eu-central-1",), ("us-east", "ap-southeast")),
        Region("ap-southeast", "Singapore", 9000, ("ap-southeast-1",), ("in-mumbai", "us-east")),
    ]
)


class TestResolve:
    @pytest.mark.parametrize(
        ("given_name", "ours"),
        [
            ("in-mumbai", "in-mumbai"),
            ("AP-South-1", "in-mumbai"),
            (" us-east ", "us-east"),
            ("eu-central-1", "eu-west"),
        ],
    )
    def test_takes_names_and_aliases_in_any_case(self, given_name: str, ours: str) -> None:
        assert REGIONS.resolve(given_name) == ours

    def test_lists_the_regions_there_are(self) -> None:
        with pytest.raises(Rejected, match="ap-southeast, eu-west, in-mumbai, us-east") as caught:
            REGIONS.resolve("atlantis")
        assert (caught.value.status, caught.value.param) == (400, "region")

    def test_a_name_wins_over_an_alias(self) -> None:
        regions = RegionMap.of([Region("a", "A", 1, ("b",)), Region("b", "B", 1)])
        assert regions.resolve("b") == "b"


class TestWish:
    def test_reads_a_strict_one(self) -> None:
        assert REGIONS.wish("in-mumbai;strict") == RegionWish("in-mumbai", True)
        assert REGIONS.wish("ap-south-1 ; STRICT") == RegionWish("in-mumbai", True)
        assert REGIONS.wish("in-mumbai") == RegionWish("in-mumbai", False)

    def test_refuses_another_word(self) -> None:
        with pytest.raises(Rejected, match="REGION;strict"):
            REGIONS.wish("in-mumbai;please")

    @given(st.text(max_size=100))
    def test_any_text_is_a_wish_or_rejected(self, text: str) -> None:
        with contextlib.suppress(Rejected):
            assert REGIONS.wish(text).region in REGIONS.regions


class TestPlan:
    def test_what_is_asked_for_is_home(self) -> None:
        plan = REGIONS.plan(RegionWish("us-east"), ["in-mumbai"])
        assert plan.home == "us-east"
        assert plan.candidates == ("us-east", "eu-west")

    def test_a_strict_wish_never_leaves(self) -> None:
        assert REGIONS.plan(RegionWish("us-east", True), []).candidates == ("us-east",)

    def test_else_the_first_preference_that_there_is(self) -> None:
        plan = REGIONS.plan(None, ["closed-down", "ap-southeast", "in-mumbai"])
        assert plan.home == "ap-southeast"
        assert plan.candidates == ("ap-southeast", "in-mumbai", "us-east")

    def test_else_the_first_region(self) -> None:
        assert REGIONS.plan(None, []).home == "in-mumbai"

    def test_a_fallback_that_is_gone_is_passed_over(self) -> None:
        regions = RegionMap.of([Region("a", "A", 1, (), ("gone", "b")), Region("b", "B", 1)])
        assert regions.plan(RegionWish("a"), []).candidates == ("a", "b")
