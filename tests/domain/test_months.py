"""Billing months: half-open, in UTC."""

from __future__ import annotations

import pytest

from crosslogic.domain.errors import Rejected
from crosslogic.domain.months import BillingMonth, hour_of
from tests.domain.test_rating import START


class TestBillingMonth:
    @pytest.mark.parametrize(("text", "hours"), [("2026-11", 720), ("2026-12", 744), ("2028-02", 696)])
    def test_is_half_open_and_has_its_own_hours(self, text: str, hours: int) -> None:
        month = BillingMonth.parse(text)
        assert (str(month), month.hours) == (text, hours)
        assert BillingMonth.of(month.starts_at) == month
        assert BillingMonth.of(month.ends_at) == month.next

    @pytest.mark.parametrize("text", ["", "2026-13", "2026-00", "2026-1", "26-11", "2026-11-01", "0000-01", "２026-11"])
    def test_refuses_what_is_no_month(self, text: str) -> None:
        with pytest.raises(Rejected, match="write it as 2026-11"):
            BillingMonth.parse(text)

    def test_an_instant_lies_in_its_full_hour(self) -> None:
        assert hour_of(START.replace(hour=7, minute=59, second=59, microsecond=999_999)) == START.replace(hour=7)
