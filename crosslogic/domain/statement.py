"""An org's month in money: usage, flat fees and credits, each exact, with the lines that they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from crosslogic.domain.credits import Credit, Draw, draw
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.pricing import Tariff
from crosslogic.domain.rating import MICRODOLLARS_PER_CENT, Bucket, Fee, RatedMonth, flat_fees, half_up, rate_month
from crosslogic.domain.reservation import Reservation


@dataclass(frozen=True, slots=True)
class Statement:
    """A month before tax. Credits pay usage only, as the cents that it is billed as."""

    rated: RatedMonth
    fees: tuple[Fee, ...]
    draws: tuple[Draw, ...]

    @property
    def usage_microdollars(self) -> int:
        """After tiers and free tokens: what a spend cap is held against."""
        return self.rated.microdollars

    @property
    def fee_microdollars(self) -> int:
        """Of reservations."""
        return sum(fee.microdollars for fee in self.fees)

    @property
    def credit_cents(self) -> int:
        """Taken from credits; shown as a negative line."""
        return sum(one.cents for one in self.draws)

    @property
    def due_cents(self) -> int:
        """Usage and fees, each rounded half up to cents as the line that bills it, less credits."""
        usage = half_up(self.usage_microdollars, MICRODOLLARS_PER_CENT)
        return usage - self.credit_cents + half_up(self.fee_microdollars, MICRODOLLARS_PER_CENT)


def state_month(
    month: BillingMonth,
    buckets: Iterable[Bucket],
    tariff: Tariff,
    reservations: Iterable[Reservation],
    credits: Iterable[Credit],
) -> Statement:
    """Everything about an org's month; the same input always gives the same statement. Raises Rejected."""
    rated = rate_month(month, buckets, tariff)
    draws = draw(rated.microdollars, credits, rated.spent_before)
    return Statement(rated, flat_fees(month, reservations, tariff), tuple(draws))
