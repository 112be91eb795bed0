"""The outbox: what orgs and operators are told, written once by its key and kept until every channel has taken it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from crosslogic.domain.spending import Alert


@dataclass(frozen=True, slots=True)
class Notification:
    """One that is due, and the channels that have it already."""

    id: int
    title: str
    body: str
    sent_to: tuple[str, ...]
    attempts: int


@dataclass(frozen=True, slots=True)
class Spending:
    """An org's spending, in microdollars: this month, its cap, today, and each of the days before that it used."""

    org_id: UUID
    org: str
    month: int
    cap: int | None
    today: int
    days_before: tuple[int, ...]


class NotificationStore:
    """Writes, hands out and settles notifications."""

    ADD = """
        INSERT INTO notifications (key, org_id, title, body) VALUES ($1, $2, $3, $4) ON CONFLICT (key) DO NOTHING
    """
    DUE = """
        SELECT id, title, body, sent_to, attempts FROM notifications
        WHERE done_at IS NULL AND due_at <= $1 ORDER BY due_at, id LIMIT $2
    """
    SETTLE = """
        UPDATE notifications SET sent_to = $2, attempts = attempts + 1, due_at = $3, last_error = $4,
               done_at = CASE WHEN $5 THEN now() END
        WHERE id = $1
    """
    # Rated hours as they were rated, later ones by list price. Only orgs that used something in the last two days.
    SPENDING = """
        WITH span AS (
            SELECT least($1::timestamptz, $2::timestamptz - interval '14 days') AS starts_at, rated_until
            FROM usage_horizon
        ), spent AS (
            SELECT org_id, hour, microdollars FROM rated_hours, span WHERE hour >= starts_at AND hour < rated_until
            UNION ALL
            SELECT org_id, billed_hour, list_price_microdollars FROM usage_hours, span
            WHERE billed_hour >= greatest(starts_at, rated_until)
              AND reservation_id IS NULL
        ), days AS (
            SELECT org_id, date_bin('1 day', hour, 'epoch') AS day, sum(microdollars)::bigint AS amount,
                   coalesce(sum(microdollars) FILTER (WHERE hour >= $1), 0)::bigint AS of_month
            FROM spent GROUP BY 1, 2
        )
        SELECT d.org_id, o.name AS org, sum(d.of_month)::bigint AS month, l.monthly_spend_microdollars AS cap,
               coalesce(sum(d.amount) FILTER (WHERE d.day = $2), 0)::bigint AS today,
               coalesce(array_agg(d.amount) FILTER (WHERE d.day < $2 AND d.day >= $2 - interval '14 days'), '{}')
                   AS days_before
        FROM days d JOIN orgs o ON o.id = d.org_id
        LEFT JOIN limits l ON l.layer = 'org' AND l.subject_id = d.org_id
        GROUP BY d.org_id, o.name, l.monthly_spend_microdollars
        HAVING max(d.day) >= $2 - interval '1 day'
        ORDER BY o.name
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(self, org_id: UUID | None, alert: Alert) -> bool:
        """Write one; False if it was told before."""
        status = await self._pool.execute(self.ADD, alert.key, org_id, alert.title, alert.text)
        return status == "INSERT 0 1"

    async def due(self, now: datetime, limit: int) -> list[Notification]:
        """Those whose time has come, oldest first."""
        return [
            Notification(row["id"], row["title"], row["body"], tuple(row["sent_to"]), row["attempts"])
            for row in await self._pool.fetch(self.DUE, now, limit)
        ]

    async def settle(
        self, notification_id: int, sent_to: Collection[str], due_at: datetime, error: str, *, is_done: bool
    ) -> None:
        """Note which channels have it, and when the others are tried again."""
        await self._pool.execute(self.SETTLE, notification_id, sorted(sent_to), due_at, error[:500], is_done)

    async def spending(self, month_starts_at: datetime, today: datetime) -> list[Spending]:
        """What orgs spend that were active since yesterday. `today` is a day's first instant, UTC."""
        return [
            Spending(
                row["org_id"],
                row["org"],
                row["month"],
                None if row["cap"] in (None, -1) else row["cap"],
                row["today"],
                tuple(row["days_before"]),
            )
            for row in await self._pool.fetch(self.SPENDING, month_starts_at, today)
        ]
