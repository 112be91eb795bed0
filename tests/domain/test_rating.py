"""Rating: exact, the same in whatever order, and equal to a second working out in fractions (B11)."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.pricing import Override, PriceBook, Tariff, Tier, TokenClass
from crosslogic.domain.rating import (
    Bucket,
    RatedHour,
    Standing,
    flat_fees,
    half_up,
    rate_hour,
    rate_month,
    share,
)
from crosslogic.domain.reservation import Reservation
from tests.domain import rerating

NOVEMBER = BillingMonth(2026, 11)
START = NOVEMBER.starts_at
HOUR = timedelta(hours=1)
P, C = TokenClass.PROMPT, TokenClass.COMPLETION
MILLION = 1_000_000


def e10(usd_per_million: str) -> int:
    return int(Fraction(usd_per_million) * 10_000)


PRICES = {
    (model, token_class): e10(usd)
    for token_class, prices in ((P, rerating.INPUT), (C, rerating.OUTPUT))
    for model, usd in prices.items()
}
BOOK = PriceBook(
    "v1",
    PRICES,
    {region: int(Fraction(times) * 10_000) for region, times in rerating.MULTIPLIER.items()},
    (Tier(10 * MILLION, 10), Tier(100 * MILLION, 20), Tier(1000 * MILLION, 30)),
    25_000,
    10**10,
)
TARIFF = Tariff.always(BOOK)


def bucket(tokens: int, hour: int = 0, **changes: Any) -> Bucket:
    return replace(Bucket(START + hour * HOUR, "llama-3-70b", "us-east", P, "serverless", tokens), **changes)


@st.composite
def buckets(draw: st.DrawFn, plans: tuple[str, ...] = ("serverless", "reserved", "enterprise")) -> list[Bucket]:
    """A month of one org: one plan an hour, some tokens paid by a reservation, volumes around every threshold."""
    keys = draw(
        st.lists(
            st.tuples(
                st.integers(0, NOVEMBER.hours - 1),
                st.sampled_from(sorted(PRICES)),
                st.sampled_from(sorted(rerating.MULTIPLIER)),
                st.sampled_from((None, UUID(int=7))),
            ),
            unique=True,
            max_size=12,
        )
    )
    sizes = st.one_of(
        st.integers(0, 60_000),
        st.integers(0, 2 * 10**9),
        st.sampled_from((1, 24_999, 25_000, 10 * MILLION, 10 * MILLION - 25_000, 90 * MILLION, 900 * MILLION)),
    )
    plan_of = {hour: draw(st.sampled_from(plans)) for hour, *_ in keys}
    return [
        Bucket(START + hour * HOUR, model, region, token_class, plan_of[hour], draw(sizes), reservation)
        for hour, (model, token_class), region, reservation in keys
    ]


class TestRateMonth:
    @given(buckets())
    def test_b11_equals_a_re_rating_in_fractions(self, given: list[Bucket]) -> None:
        usd = rerating.usd_of_month(given)
        rated = rate_month(NOVEMBER, given, TARIFF)
        assert Fraction(rated.standing.exact_e10, 10**10) == usd
        assert rated.microdollars == rerating.microdollars(usd)

    @given(buckets(), st.randoms())
    def test_does_not_depend_on_the_order_of_buckets(self, given: list[Bucket], random: Any) -> None:
        shuffled = list(given)
        random.shuffle(shuffled)
        assert rate_month(NOVEMBER, shuffled, TARIFF) == rate_month(NOVEMBER, given, TARIFF)

    @given(buckets())
    def test_conserves_tokens_and_money(self, given: list[Bucket]) -> None:
        rated = rate_month(NOVEMBER, given, TARIFF)
        billed = sum(bucket.tokens for bucket in given if bucket.reservation_id is None)
        assert sum(line.tokens for line in rated.lines) == rated.standing.volume_tokens == billed
        assert sum(line.exact_e10 for line in rated.lines) == rated.standing.exact_e10
        assert sum(line.microdollars for line in rated.lines) == rated.microdollars
        assert sum(hour.microdollars for hour in rated.hours) == rated.microdollars
        assert all(hour.microdollars >= 0 for hour in rated.hours)
        for line in rated.lines:
            assert abs(line.microdollars * 10_000 - line.exact_e10) < 10_000

    @given(buckets(), st.integers(0, NOVEMBER.hours))
    def test_a_month_that_is_rated_in_two_parts_is_the_same(self, given: list[Bucket], cut: int) -> None:
        at = START + cut * HOUR
        hours: list[RatedHour] = list(rate_month(NOVEMBER, [b for b in given if b.hour < at], TARIFF).hours)
        standing = hours[-1].after if hours else Standing()
        for hour in sorted({b.hour for b in given if b.hour >= at}):
            hours.append(rate_hour(NOVEMBER, standing, hour, [b for b in given if b.hour == hour], TARIFF))
            standing = hours[-1].after
        assert tuple(hours) == rate_month(NOVEMBER, given, TARIFF).hours

    @given(buckets(), st.integers(1, 10**9))
    def test_more_usage_behind_the_last_hour_never_costs_less(self, given: list[Bucket], tokens: int) -> None:
        last = max((b.hour for b in given), default=START)
        later = Bucket(last + HOUR, "gemma-7b", "eu-west", C, "serverless", tokens)
        if later.hour < NOVEMBER.ends_at:
            before, after = (rate_month(NOVEMBER, all, TARIFF) for all in (given, [*given, later]))
            assert after.microdollars >= before.microdollars
            assert after.hours[: len(before.hours)] == before.hours

    @pytest.mark.parametrize(
        ("tokens", "microdollars"),
        [
            (0, 0),
            (25_000, 0),
            (25_001, 1),  # 0.6 microdollars, rounded up.
            (10 * MILLION, 5_985_000),
            (10 * MILLION + MILLION, 5_985_000 + 540_000),
            (100 * MILLION, 5_985_000 + 48_600_000),
            (101 * MILLION, 5_985_000 + 48_600_000 + 480_000),
            (1001 * MILLION, 5_985_000 + 48_600_000 + 432_000_000 + 420_000),
        ],
    )
    def test_tiers_begin_with_the_token_behind_their_threshold(self, tokens: int, microdollars: int) -> None:
        assert rate_month(NOVEMBER, [bucket(tokens)], TARIFF).microdollars == microdollars

    def test_free_tokens_count_as_volume(self) -> None:
        (line, discounted) = rate_month(NOVEMBER, [bucket(10 * MILLION + 1)], TARIFF).lines
        assert (line.tokens, line.free_tokens, line.discount_percent) == (10 * MILLION, 25_000, 0)
        assert (discounted.tokens, discounted.free_tokens, discounted.discount_percent) == (1, 0, 10)

    @pytest.mark.parametrize(("plan", "free"), [("serverless", 25_000), ("reserved", 25_000), ("enterprise", 0)])
    def test_enterprise_has_no_free_tokens(self, plan: str, free: int) -> None:
        (line,) = rate_month(NOVEMBER, [bucket(30_000, plan=plan)], TARIFF).lines
        assert line.free_tokens == free

    def test_free_tokens_are_the_first_of_the_month_whoever_used_them(self) -> None:
        early, later = bucket(25_000, plan="enterprise"), bucket(25_000, hour=1)
        assert [hour.free_tokens for hour in rate_month(NOVEMBER, [early, later], TARIFF).hours] == [0, 0]

    def test_a_reservation_s_tokens_are_neither_billed_nor_volume_nor_free(self) -> None:
        paid = bucket(10**9, reservation_id=UUID(int=1))
        with_them = rate_month(NOVEMBER, [paid, bucket(30_000, hour=1)], TARIFF)
        assert with_them.standing == rate_month(NOVEMBER, [bucket(30_000, hour=1)], TARIFF).standing

    def test_an_hour_goes_by_model_region_and_token_class(self) -> None:
        given = [
            bucket(20_000, model="mistral-7b"),
            bucket(20_000, model="gemma-7b", region="us-east", token_class=P),
            bucket(20_000, model="gemma-7b", region="us-east", token_class=C),
            bucket(20_000, model="gemma-7b", region="eu-west", token_class=P),
        ]
        (hour,) = rate_month(NOVEMBER, given, TARIFF).hours
        order = [(piece.model, piece.region, piece.token_class, piece.is_free) for piece in hour.pieces]
        assert order == [
            ("gemma-7b", "eu-west", P, True),
            ("gemma-7b", "us-east", C, True),
            ("gemma-7b", "us-east", C, False),
            ("gemma-7b", "us-east", P, False),
            ("mistral-7b", "us-east", P, False),
        ]

    def test_prices_are_the_hour_s_and_terms_are_the_month_s(self) -> None:
        dearer = replace(BOOK, name="v2", prices_e10={key: 2 * price for key, price in PRICES.items()}, free_tokens=0)
        tariff = Tariff([(START + HOUR, dearer), (START, BOOK)])
        first, second = bucket(20_000), bucket(20_000, hour=1)
        rated = rate_month(NOVEMBER, [first, second], tariff)
        # 5 000 of the second hour's tokens are free still, the rest cost twice the old price.
        assert rated.microdollars == 15_000 * 12_000 // 10_000
        with pytest.raises(Rejected, match="No price book"):
            rate_month(BillingMonth(2026, 10), [bucket(1, hour=-1)], tariff)

    def test_an_org_s_own_price_holds_for_enterprise_from_its_hour_on(self) -> None:
        own = [
            Override("llama-3-70b", P, START + HOUR, 100),
            Override("llama-3-70b", P, START + 2 * HOUR, None),
        ]
        tariff = Tariff.always(BOOK, own)
        for plan, units in (("enterprise", [6000, 100, 6000]), ("serverless", [6000, 6000, 6000])):
            given = [bucket(MILLION, hour=hour, plan=plan) for hour in range(3)]
            rated = rate_month(NOVEMBER, given, tariff)
            assert [hour.list_e10 // MILLION for hour in rated.hours] == units

    def test_says_which_price_is_missing(self) -> None:
        for wrong, words in (
            (bucket(1, model="gpt-9"), "no price for prompt tokens of gpt-9"),
            (bucket(1, region="moon"), "no multiplier for moon"),
            (bucket(1, model="bge-base-en", token_class=C), "no price for completion tokens of bge-base-en"),
        ):
            with pytest.raises(Rejected, match=words):
                rate_month(NOVEMBER, [wrong], TARIFF)

    def test_refuses_hours_of_another_month_and_negative_tokens(self) -> None:
        for wrong in (bucket(1, hour=-1), bucket(1, hour=NOVEMBER.hours), bucket(-1)):
            with pytest.raises(InvariantViolated):
                rate_month(NOVEMBER, [wrong], TARIFF)


class TestFlatFees:
    def reserve(self, number: int, units: int, first: int, end: int | None, region: str = "us-east") -> Reservation:
        ends_at = None if end is None else START + end * HOUR
        return Reservation(UUID(int=number), UUID(int=1), "llama-3-8b", region, units, START + first * HOUR, ends_at)

    def test_a_whole_month_costs_a_dollar_a_unit_times_the_region(self) -> None:
        held = [self.reserve(1, 100, -5, None), self.reserve(2, 10, 0, NOVEMBER.hours, "in-mumbai")]
        assert [fee.microdollars for fee in flat_fees(NOVEMBER, held, TARIFF)] == [100_000_000, 7_000_000]

    def test_hours_are_parts_of_the_month_rounded_once_over_all(self) -> None:
        # Each hour of November is 1/720 of $1: three times a third of it is rounded as one.
        held = [self.reserve(number, 1, number, number + 1) for number in range(3)]
        fees = flat_fees(NOVEMBER, held, TARIFF)
        assert [fee.microdollars for fee in fees] == [1389, 1389, 1389]
        assert sum(fee.microdollars for fee in fees) == half_up(3 * 10**6, 720)
        two = flat_fees(NOVEMBER, [self.reserve(1, 1, 0, 1, "eu-west"), self.reserve(2, 1, 0, 1)], TARIFF)
        assert sum(fee.microdollars for fee in two) == half_up(21 * 10**5, 720)

    def test_what_ended_before_or_begins_after_costs_nothing(self) -> None:
        held = [self.reserve(1, 5, -9, 0), self.reserve(2, 5, NOVEMBER.hours, None), self.reserve(3, 5, 7, 7)]
        assert flat_fees(NOVEMBER, held, TARIFF) == ()


class TestShare:
    @given(st.lists(st.integers(0, 10**12), max_size=9), st.integers(1, 10**5))
    def test_always_sums_to_the_rounded_total(self, parts: list[int], unit: int) -> None:
        total = half_up(sum(parts), unit)
        shares = share(total, parts, unit)
        assert sum(shares) == total
        assert all(0 <= got - part // unit <= 1 for got, part in zip(shares, parts, strict=True))

    def test_the_largest_remainder_comes_first_and_the_first_of_equals(self) -> None:
        assert share(2, [4, 9, 9], 10) == [0, 1, 1]
        assert share(1, [5, 5], 10) == [1, 0]

    def test_refuses_a_total_that_is_another(self) -> None:
        with pytest.raises(InvariantViolated):
            share(5, [10], 10)


class TestHalfUp:
    @pytest.mark.parametrize(("amount", "rounded"), [(0, 0), (4_999, 0), (5_000, 1), (14_999, 1), (15_000, 2)])
    def test_rounds_to_the_nearest_and_halves_up(self, amount: int, rounded: int) -> None:
        assert half_up(amount, 10_000) == rounded
