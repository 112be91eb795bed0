"""Guardrails on spending: when an org is told, and when it is suspended and let back in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

from crosslogic.domain.months import BillingMonth

CAP_PERCENTS = (50, 80, 100)
# A day that costs so many times as much as a usual one.
NORM_TIMES = 10
# Without a few days there is no norm, and cents are nobody's alarm.
NORM_DAYS = 3
LEAST_ALARMING_MICRODOLLARS = 1_000_000


@dataclass(frozen=True, slots=True)
class Alert:
    """What an org is told once: `key` is the same whenever the same thing is found again."""

    key: str
    title: str
    text: str


def alerts(
    org: str,
    month: BillingMonth,
    spent_microdollars: int,
    cap_microdollars: int | None,
    today: date,
    today_microdollars: int,
    days_before: Iterable[int],
) -> list[Alert]:
    """What there is to tell of an org's spending: thresholds of its cap, and a day far beyond its norm.

    `days_before` are the days before today, in microdollars; the norm is their median.
    """
    found: list[Alert] = []
    if cap_microdollars is not None and cap_microdollars > 0:
        reached = [percent for percent in CAP_PERCENTS if spent_microdollars * 100 >= cap_microdollars * percent]
        for percent in reached[-1:]:
            found.append(
                Alert(
                    f"cap/{org}/{month}/{cap_microdollars}/{percent}",
                    f"{org} has used {percent} % of its spend cap",
                    f"{_usd(spent_microdollars)} of {_usd(cap_microdollars)} in {month}."
                    + (" Further requests are refused." if percent == CAP_PERCENTS[-1] else ""),
                )
            )
    days = sorted(days_before)
    if len(days) >= NORM_DAYS and today_microdollars >= LEAST_ALARMING_MICRODOLLARS:
        norm = days[len(days) // 2]
        if today_microdollars > NORM_TIMES * norm:
            found.append(
                Alert(
                    f"norm/{org}/{today.isoformat()}",
                    f"{org} spends more than {NORM_TIMES} times what it usually does",
                    f"{_usd(today_microdollars)} on {today.isoformat()}; a usual day is {_usd(norm)}.",
                )
            )
    return found


def _usd(microdollars: int) -> str:
    return f"${microdollars // 1_000_000}.{microdollars % 1_000_000:06d}"


class SuspensionReason(StrEnum):
    """Why an org is suspended. One that was suspended by hand is let back in by hand."""

    OPERATOR = "operator"
    NON_PAYMENT = "non_payment"
    ABUSE = "abuse"


class AccountEvent(StrEnum):
    """What may suspend an org or let it back in."""

    PAYMENT_FAILED_FOR_GOOD = "payment_failed_for_good"  # The last try: Stripe gives up.
    PAID = "paid"
    ABUSE_FOUND = "abuse_found"
    SUSPENDED = "suspended"
    RESUMED = "resumed"


def suspensions(held: frozenset[SuspensionReason], event: AccountEvent) -> frozenset[SuspensionReason]:
    """The reasons that stand after an event; an org serves while there is none.

    A payment lifts non-payment only; resuming by hand lifts all. Any order and repetition of payments is harmless.
    """
    if event is AccountEvent.RESUMED:
        return frozenset()
    if event is AccountEvent.PAID:
        return held - {SuspensionReason.NON_PAYMENT}
    return held | {_SUSPENDS[event]}


_SUSPENDS = {
    AccountEvent.PAYMENT_FAILED_FOR_GOOD: SuspensionReason.NON_PAYMENT,
    AccountEvent.ABUSE_FOUND: SuspensionReason.ABUSE,
    AccountEvent.SUSPENDED: SuspensionReason.OPERATOR,
}
