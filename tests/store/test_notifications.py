"""The outbox, and suspensions, in a real Postgres."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import msgspec
import pytest

from activities.notifications import NotificationActivities
from crosslogic.clients.notifier import Notifier
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.spending import AccountEvent, Alert, SuspensionReason
from crosslogic.new_ids import new_id
from crosslogic.store.notifications import NotificationStore
from crosslogic.store.suspensions import SuspensionStore
from crosslogic.store.tenancy import TenancyStore
from crosslogic.store.usage import UsageStore
from tests.store.test_usage import a_record

MINUTE = timedelta(minutes=1)


class Outbox:
    """The activities over one database with made-up channels. The clock is the test's."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.now = datetime.now(UTC)
        self.store = NotificationStore(pool)
        self.sent: list[tuple[str, str]] = []
        self.away: set[str] = set()
        channels: dict[str, Any] = {name: self._channel(name) for name in ("slack", "webhook")}
        notifier = cast(Notifier, SimpleNamespace(channels=channels))
        self.activities = NotificationActivities(self.store, notifier, lambda: self.now)

    def _channel(self, name: str) -> Any:
        async def send(key: str, title: str, text: str) -> None:
            if name in self.away:
                raise Unavailable(f"{name} answered 500.")
            self.sent.append((name, title))

        return send


class TestSendNotifications:
    async def test_each_channel_gets_each_once_and_one_that_is_away_later(self, pool: asyncpg.Pool) -> None:
        outbox = Outbox(pool)
        for _ in range(2):
            await outbox.store.add(None, Alert("a", "first", "text"))
        outbox.now += MINUTE
        outbox.away = {"slack"}
        assert await outbox.activities.send_notifications() == 0
        assert await outbox.activities.send_notifications() == 0
        outbox.away = set()
        outbox.now += MINUTE
        assert await outbox.activities.send_notifications() == 1
        assert await outbox.activities.send_notifications() == 0
        assert sorted(outbox.sent) == [("slack", "first"), ("webhook", "first")]


class TestFindAlerts:
    async def test_tells_once_of_each_threshold_of_a_cap(self, pool: asyncpg.Pool) -> None:
        outbox, tenancy = Outbox(pool), TenancyStore(pool)
        org, _ = await tenancy.create_org(new_id(), "acme", actor="test")
        await tenancy.set_limits("org", org.id, {"monthly_spend_microdollars": 1000}, actor="test")
        usage = UsageStore(pool)
        for spend, new in ((400, 0), (100, 1), (0, 0), (500, 1)):
            record = a_record(org_id=org.id, list_price_microdollars=spend)
            await usage.add([msgspec.json.encode(record)])
            assert await outbox.activities.find_alerts() == new
        rows = await pool.fetch("SELECT title FROM notifications ORDER BY id")
        assert [row["title"][-26:] for row in rows] == ["used 50 % of its spend cap", "sed 100 % of its spend cap"]


class TestSuspensionStore:
    async def test_an_org_serves_while_there_is_no_reason_against_it(self, pool: asyncpg.Pool) -> None:
        store, tenancy = SuspensionStore(pool), TenancyStore(pool)
        org, _ = await tenancy.create_org(new_id(), "acme", actor="test")
        for event, state in (
            (AccountEvent.PAYMENT_FAILED_FOR_GOOD, "suspended"),
            (AccountEvent.PAYMENT_FAILED_FOR_GOOD, "suspended"),
            (AccountEvent.PAID, "active"),
            (AccountEvent.PAID, "active"),
            (AccountEvent.ABUSE_FOUND, "suspended"),
            (AccountEvent.PAID, "suspended"),
            (AccountEvent.RESUMED, "active"),
        ):
            await store.apply(org.id, event, actor="test")
            assert (await tenancy.get_org(org_id=org.id)).state == state
        actions = await pool.fetchval("SELECT count(*) FROM audit_log WHERE action = 'org.account_event'")
        assert actions == 4

    async def test_a_payment_does_not_let_in_whom_an_operator_suspended(self, pool: asyncpg.Pool) -> None:
        store, tenancy = SuspensionStore(pool), TenancyStore(pool)
        org, _ = await tenancy.create_org(new_id(), "acme", actor="test")
        await tenancy.update_org(org.id, {"state": "suspended"}, actor="test")
        assert await store.apply(org.id, AccountEvent.PAID, actor="test") == {SuspensionReason.OPERATOR}
        await tenancy.update_org(org.id, {"state": "active"}, actor="test")
        assert await store.apply(org.id, AccountEvent.PAID, actor="test") == frozenset()
        with pytest.raises(Rejected, match="no org"):
            await store.apply(new_id(), AccountEvent.PAID, actor="test")
