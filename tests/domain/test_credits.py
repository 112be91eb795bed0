"""Credits: which are drawn first, and how much of each."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.credits import Credit, CreditKind, draw
from tests.domain.test_rating import START

DAY = timedelta(days=1)


def credit(number: int, cents: int, kind: CreditKind = CreditKind.PROMOTIONAL, expires: int | None = None) -> Credit:
    return Credit(UUID(int=number), kind, cents, START, None if expires is None else START + expires * DAY)


def drawn(microdollars: int, *credits: Credit, spent: int | None = None) -> list[tuple[int, int]]:
    def before(at: datetime) -> int:
        return microdollars if spent is None else spent

    return [(one.credit_id.int, one.cents) for one in draw(microdollars, credits, before)]


class TestDraw:
    def test_promotional_ones_come_before_paid_ones_and_the_earliest_expiry_first(self) -> None:
        held = [
            credit(1, 100, CreditKind.PAID, expires=1),
            credit(2, 100),
            credit(3, 100, expires=9),
            credit(4, 100, CreditKind.SIGN_UP, expires=8),
        ]
        assert drawn(3_500_000, *held) == [(4, 100), (3, 100), (2, 100), (1, 50)]

    def test_pays_the_cents_that_are_billed(self) -> None:
        assert drawn(14_999, credit(1, 500)) == [(1, 1)]
        assert drawn(15_000, credit(1, 500)) == [(1, 2)]
        assert drawn(4_999, credit(1, 500)) == []

    def test_one_that_expires_in_mid_month_pays_what_was_used_by_then(self) -> None:
        assert drawn(10_000_000, credit(1, 800, expires=10), credit(2, 1000), spent=3_000_000) == [(1, 300), (2, 700)]
        assert drawn(10_000_000, credit(1, 800, expires=10), spent=0) == []

    @given(st.integers(0, 10**9), st.lists(st.tuples(st.integers(0, 10**5), st.sampled_from(CreditKind)), max_size=6))
    def test_never_more_than_there_is_nor_than_is_owed(
        self, microdollars: int, held: list[tuple[int, CreditKind]]
    ) -> None:
        credits = [credit(number, cents, kind) for number, (cents, kind) in enumerate(held)]
        taken = drawn(microdollars, *credits)
        owed = (microdollars + 5000) // 10_000
        assert sum(cents for _, cents in taken) == min(owed, sum(cents for cents, _ in held))
        assert all(0 < cents <= held[number][0] for number, cents in taken)
