"""Credits: what an org need not pay. Whole cents, for usage only, after rounding and before tax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

from crosslogic.domain.rating import MICRODOLLARS_PER_CENT, half_up


class CreditKind(StrEnum):
    """Where a credit comes from. All but paid ones are promotional."""

    SIGN_UP = "sign_up"
    REFERRAL = "referral"
    PROMOTIONAL = "promotional"
    PAID = "paid"


SIGN_UP_CENTS = 1_000
# To both sides.
REFERRAL_CENTS = 500


@dataclass(frozen=True, slots=True)
class Credit:
    """What is left of one credit, in cents. It pays usage of hours that end by `expires_at` (None: of any hour)."""

    id: UUID
    kind: CreditKind
    cents: int
    granted_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """What a month takes from one credit."""

    credit_id: UUID
    cents: int


_NEVER = datetime.max.replace(tzinfo=UTC)


def draw(total_microdollars: int, credits: Iterable[Credit], spent_before: Callable[[datetime], int]) -> list[Draw]:
    """What a month's usage takes from an org's credits: promotional before paid, the earliest expiry first.

    The usage is paid as the cents that it is billed as. `spent_before` tells how many microdollars of it were used by
    an instant, so that a credit which expires in mid-month pays no more than that.
    """
    drawn: list[Draw] = []
    left = half_up(total_microdollars, MICRODOLLARS_PER_CENT)
    paid = 0
    for credit in sorted(credits, key=_order):
        payable = left
        if credit.expires_at is not None:
            payable = min(left, half_up(spent_before(credit.expires_at), MICRODOLLARS_PER_CENT) - paid)
        cents = min(credit.cents, payable)
        if cents > 0:
            drawn.append(Draw(credit.id, cents))
            left -= cents
            paid += cents
    return drawn


def _order(credit: Credit) -> tuple[bool, datetime, datetime, UUID]:
    return credit.kind is CreditKind.PAID, credit.expires_at or _NEVER, credit.granted_at, credit.id
