"""Guardrails on spending: what is told when, and what suspends an org."""

from __future__ import annotations

from datetime import date
from itertools import permutations

import pytest

from crosslogic.domain.months import BillingMonth
from crosslogic.domain.spending import AccountEvent, SuspensionReason, alerts, suspensions

MONTH, TODAY = BillingMonth(2026, 11), date(2026, 11, 24)
USD = 1_000_000
NONE: frozenset[SuspensionReason] = frozenset()


def keys(spent: int = 0, cap: int | None = None, today: int = 0, before: tuple[int, ...] = ()) -> list[str]:
    return [alert.key for alert in alerts("acme", MONTH, spent, cap, TODAY, today, before)]


class TestAlerts:
    @pytest.mark.parametrize(
        ("spent", "percent"),
        [(49_999_999, None), (50_000_000, 50), (79_999_999, 50), (80_000_000, 80), (100_000_000, 100), (10**9, 100)],
    )
    def test_tell_the_highest_threshold_of_the_cap_that_is_reached(self, spent: int, percent: int | None) -> None:
        expected = [] if percent is None else [f"cap/acme/2026-11/100000000/{percent}"]
        assert keys(spent, 100 * USD) == expected

    def test_there_is_nothing_to_tell_without_a_cap(self) -> None:
        assert keys(10**12) == keys(10**12, 0) == []

    @pytest.mark.parametrize(
        ("today", "before", "is_told"),
        [
            (10 * USD + 1, (USD, USD, USD), True),
            (10 * USD, (USD, USD, USD), False),
            (100 * USD, (USD, USD), False),
            (999_999, (1, 1, 1), False),
            (50 * USD, (USD, 90 * USD, USD), True),
        ],
    )
    def test_tell_a_day_beyond_ten_times_the_norm(self, today: int, before: tuple[int, ...], is_told: bool) -> None:
        assert keys(today=today, before=before) == (["norm/acme/2026-11-24"] if is_told else [])


class TestSuspensions:
    def test_a_payment_lifts_non_payment_and_nothing_else(self) -> None:
        held = suspensions(suspensions(NONE, AccountEvent.PAYMENT_FAILED_FOR_GOOD), AccountEvent.ABUSE_FOUND)
        assert held == {SuspensionReason.NON_PAYMENT, SuspensionReason.ABUSE}
        assert suspensions(held, AccountEvent.PAID) == {SuspensionReason.ABUSE}
        assert suspensions(held, AccountEvent.RESUMED) == NONE

    def test_reasons_do_not_depend_on_the_order_in_which_they_come(self) -> None:
        adding = (AccountEvent.PAYMENT_FAILED_FOR_GOOD, AccountEvent.ABUSE_FOUND, AccountEvent.SUSPENDED)
        ends: set[frozenset[SuspensionReason]] = set()
        for order in permutations([*adding, adding[0]]):
            held = NONE
            for event in order:
                held = suspensions(held, event)
            ends.add(held)
        assert ends == {frozenset(SuspensionReason)}
