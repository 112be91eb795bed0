"""Price books: only what can be rated exactly is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from crosslogic.domain.errors import Rejected
from crosslogic.domain.pricing import PriceBook, Tier, TokenClass, charged_e10
from tests.domain.test_rating import BOOK


def book(**changes: Any) -> PriceBook:
    given: dict[str, Any] = {
        "name": "v9",
        "prices_e10": {("llama-3-8b", TokenClass.PROMPT): 500},
        "multipliers_bp": {"us-east": 10_000, "in-mumbai": 7_000},
        "tiers": (Tier(1000, 10),),
    }
    return PriceBook(**(given | changes))


class TestPriceBook:
    def test_every_price_of_the_seed_is_exact_in_every_region_and_tier(self) -> None:
        for price in BOOK.prices_e10.values():
            for multiplier in BOOK.multipliers_bp.values():
                for tier in BOOK.steps:
                    exact = price * multiplier * (100 - tier.discount_percent)
                    assert charged_e10(price, multiplier, tier.discount_percent) * 10**6 == exact

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"prices_e10": {("llama-3-8b", TokenClass.PROMPT): 3}}, "no whole number"),
            ({"prices_e10": {("llama-3-8b", TokenClass.PROMPT): -1}}, "negative"),
            ({"multipliers_bp": {"us-east": 10_001}}, "no whole number"),
            ({"multipliers_bp": {"us-east": 0}}, "positive"),
            ({"tiers": (Tier(10, 10), Tier(10, 20))}, "ascend"),
            ({"tiers": (Tier(0, 10),)}, "ascend"),
            ({"tiers": (Tier(10, 101),)}, "ascend"),
            ({"tiers": (Tier(10, 33),)}, "no whole number"),
            ({"free_tokens": -1}, "negative"),
            ({"capacity_unit_e10": -1}, "negative"),
        ],
    )
    def test_refuses_what_cannot_be_rated_exactly(self, changes: dict[str, Any], words: str) -> None:
        book()
        with pytest.raises(Rejected, match=words):
            book(**changes)
