"""What orgs and operators are told: found by rule, written once, sent until every channel has it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from temporalio import activity

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.spending import alerts

if TYPE_CHECKING:
    from crosslogic.clients.notifier import Notifier
    from crosslogic.store.notifications import NotificationStore

SENT_AT_ONCE = 50
# 1, 2, 4 … minutes between tries, an hour at most, for about two days.
MOST_ATTEMPTS = 50
LONGEST_PAUSE = timedelta(hours=1)


class NotificationActivities:
    """Fills the outbox and empties it."""

    def __init__(self, notifications: NotificationStore, notifier: Notifier, now: Callable[[], datetime]) -> None:
        self._notifications = notifications
        self._notifier = notifier
        self._now = now

    @activity.defn
    async def find_alerts(self) -> int:
        """Write down what there is to tell of orgs' spending; how much of it is new."""
        today = self._now().replace(hour=0, minute=0, second=0, microsecond=0)
        month = BillingMonth.of(today)
        new = 0
        for one in await self._notifications.spending(month.starts_at, today):
            found = alerts(one.org, month, one.month, one.cap, today.date(), one.today, one.days_before)
            for alert in found:
                new += await self._notifications.add(one.org_id, alert)
        return new

    @activity.defn
    async def send_notifications(self) -> int:
        """Send what is due to the channels that lack it; how many are done. At least once: a crash may repeat one."""
        done = 0
        for one in await self._notifications.due(self._now(), SENT_AT_ONCE):
            sent, error = set(one.sent_to), ""
            for name, send in self._notifier.channels.items():
                if name not in sent:
                    try:
                        await send(f"notification/{one.id}", one.title, one.body)
                        sent.add(name)
                    except Unavailable as refused:
                        error = refused.message
            is_done = not error or one.attempts + 1 >= MOST_ATTEMPTS
            pause = min(LONGEST_PAUSE, timedelta(minutes=2 ** min(one.attempts, 10)))
            await self._notifications.settle(one.id, sent, self._now() + pause, error, is_done=is_done)
            done += is_done
        return done
