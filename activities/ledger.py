"""What sealing and rating usage does to the ledger. Each can be run again at any time, by anybody."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from temporalio import activity

from crosslogic.contracts.ledger import HourSpan, Rated, Sealed
from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.rating import rate_hour
from crosslogic.domain.sealing import sealable_until

if TYPE_CHECKING:
    from crosslogic.store.buckets import BucketStore
    from crosslogic.store.ledger import LedgerStore
    from crosslogic.store.prices import PriceStore
    from crosslogic.store.usage import UsageStore
    from crosslogic.store.usage_logs import UsageLogStore

# A log that has said nothing for so long is one that somebody has to look at.
SILENT_LOG = timedelta(minutes=2)


class LedgerActivities:
    """Seals hours, proves them, and rates them in order."""

    def __init__(
        self,
        usage: UsageStore,
        logs: UsageLogStore,
        buckets: BucketStore,
        prices: PriceStore,
        ledger: LedgerStore,
        *,
        longest_request_s: float,
        now: Callable[[], datetime],
    ) -> None:
        self._usage = usage
        self._logs = logs
        self._buckets = buckets
        self._prices = prices
        self._ledger = ledger
        self._longest_request = timedelta(seconds=longest_request_s)
        self._now = now

    @activity.defn
    async def add_usage_partitions(self) -> None:
        """Make the partitions of usage records of this month and the next two."""
        month = BillingMonth.of(self._now())
        await self._usage.add_partitions([month.starts_at, month.next.starts_at, month.next.next.starts_at])

    @activity.defn
    async def seal_hours(self) -> Sealed:
        """Seal every hour of which no usage can come any more, and post its tokens."""
        now = self._now()
        reports = await self._logs.list_logs()
        until = sealable_until(now, [report.complete_until for report in reports], self._longest_request)
        before = (await self._buckets.horizon()).sealed_until
        after = (await self._buckets.seal(until)).sealed_until
        silent = [report for report in reports if report.reported_at < now - SILENT_LOG]
        waits_for = ""
        if silent and hour_behind(after, now):
            waits_for = (
                f"usage log {silent[0].name}, complete until {silent[0].complete_until.isoformat()} and silent since "
                f"{silent[0].reported_at.isoformat()}"
            )
        return Sealed(before.isoformat(), after.isoformat(), waits_for)

    @activity.defn
    async def prove_hours(self) -> HourSpan:
        """Sum the records of some sealed hours again; an empty span when all are proved.

        Raises InvariantViolated unless they are what was sealed (B1), now and whenever it is run again.
        """
        start, end = await self._buckets.unproved()
        if start < end:
            differences = await self._buckets.compare(start, end)
            if differences:
                raise InvariantViolated(
                    f"{len(differences)} sealed sums of [{start.isoformat()}, {end.isoformat()}) are not those of "
                    f"their records, first {differences[0]}"
                )
            await self._buckets.set_proved(end)
        return HourSpan(start.isoformat(), end.isoformat())

    @activity.defn
    async def rate_hours(self, orgs_at_once: int) -> Rated:
        """Rate some orgs' oldest sealed hour that has no price, and post it. Raises Rejected for a missing price."""
        unrated = await self._ledger.unrated(orgs_at_once)
        if not unrated:
            await self._ledger.all_rated()
            return Rated(0)
        tariffs = await self._prices.tariffs([one.org_id for one in unrated])
        hour = unrated[0].hour
        month = BillingMonth.of(hour)
        await self._ledger.add_rated(
            [
                (
                    one.org_id,
                    rate_hour(month, one.standing, hour, one.buckets, tariffs[one.org_id]),
                    tariffs[one.org_id].book(hour).name,
                )
                for one in unrated
            ]
        )
        return Rated(len(unrated), hour.isoformat())


def hour_behind(sealed_until: datetime, now: datetime) -> bool:
    """Is an hour open that ended more than an hour ago?"""
    return now - sealed_until > timedelta(hours=2)
