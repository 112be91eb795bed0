"""What we know of Stripe: ids, notices, and how its objects stood when they were last read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg


@dataclass(frozen=True, slots=True)
class StripeObject:
    """Something that we made at Stripe, under our own name for it."""

    kind: str
    key: str
    stripe_id: str
    sealed_secret: bytes | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Why an org's service may have to stop, by Stripe's objects. All three empty: it pays."""

    unpaid_invoices: tuple[str, ...]
    overdue_subscriptions: tuple[str, ...]
    open_disputes: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Does nothing speak against serving it?"""
        return not (self.unpaid_invoices or self.overdue_subscriptions or self.open_disputes)


class StripeStore:
    """Ids are kept once and stay; states only move to a later reading, so that the order of notices is all the same."""

    SELECT_OBJECTS = "SELECT kind, key, stripe_id, sealed_secret FROM stripe_objects WHERE kind = $1 ORDER BY key"
    UPSERT_OBJECT = """
        INSERT INTO stripe_objects (kind, key, stripe_id, sealed_secret) VALUES ($1, $2, $3, $4)
        ON CONFLICT (kind, key) DO UPDATE SET stripe_id = excluded.stripe_id, sealed_secret = excluded.sealed_secret
    """
    DELETE_OBJECT = "DELETE FROM stripe_objects WHERE kind = $1 AND key = $2"
    NOTE_EVENT = """
        INSERT INTO stripe_events (id, type, subject_id) VALUES ($1, $2, $3)
        ON CONFLICT (id) DO UPDATE SET type = stripe_events.type
        RETURNING handled_at IS NULL AS is_new
    """
    MARK_HANDLED = "UPDATE stripe_events SET handled_at = now() WHERE id = $1 AND handled_at IS NULL"
    NEXT_READING = "SELECT nextval('stripe_readings')"
    UPSERT_STATE = """
        INSERT INTO stripe_states (kind, stripe_id, customer, status, details, reading)
        VALUES ($1, $2, $3, $4, $5::text::jsonb, $6)
        ON CONFLICT (kind, stripe_id) DO UPDATE SET
            customer = CASE WHEN excluded.customer = '' THEN stripe_states.customer ELSE excluded.customer END,
            status = excluded.status, details = excluded.details, reading = excluded.reading, read_at = now()
        WHERE stripe_states.reading < excluded.reading
    """
    SELECT_STATES = """
        SELECT kind, stripe_id, status, details::text AS details FROM stripe_states
        WHERE customer = $1 ORDER BY kind, stripe_id
    """
    INSERT_METER_ERROR = """
        INSERT INTO stripe_meter_errors (event_id, idempotency_key, code, meter, errors, message)
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING
    """
    SELECT_METER_ERRORS = """
        SELECT idempotency_key, code, meter, errors, noted_at FROM stripe_meter_errors
        WHERE noted_at >= $1 ORDER BY noted_at, event_id, idempotency_key
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def objects(self, kind: str) -> dict[str, StripeObject]:
        """What we made of this kind, by our name for it."""
        rows = await self._pool.fetch(self.SELECT_OBJECTS, kind)
        return {row["key"]: StripeObject(**dict(row)) for row in rows}

    async def keep_object(self, kind: str, key: str, stripe_id: str, sealed_secret: bytes | None = None) -> None:
        """Remember what we made."""
        await self._pool.execute(self.UPSERT_OBJECT, kind, key, stripe_id, sealed_secret)

    async def forget_object(self, kind: str, key: str) -> None:
        """Forget what is no longer there."""
        await self._pool.execute(self.DELETE_OBJECT, kind, key)

    async def note_event(self, event_id: str, kind: str, subject_id: str) -> bool:
        """Remember a notice. False if it came before and was dealt with."""
        return bool(await self._pool.fetchval(self.NOTE_EVENT, event_id, kind, subject_id))

    async def mark_handled(self, event_id: str) -> None:
        """The notice has had all its effect."""
        await self._pool.execute(self.MARK_HANDLED, event_id)

    async def next_reading(self) -> int:
        """To be drawn before an object is read at Stripe, and given to `keep_state` with what was read."""
        return int(await self._pool.fetchval(self.NEXT_READING))

    async def keep_state(
        self, kind: str, stripe_id: str, customer: str, status: str, details: Mapping[str, Any], reading: int
    ) -> None:
        """How an object stands, unless a reading that began later was kept already."""
        await self._pool.execute(
            self.UPSERT_STATE, kind, stripe_id, customer, status, json.dumps(details, sort_keys=True), reading
        )

    async def standing(self, customer: str) -> Standing:
        """Whether a customer pays: derived from the states, so a payment lifts what a failure had set."""
        unpaid: list[str] = []
        overdue: list[str] = []
        disputed: list[str] = []
        for row in await self._pool.fetch(self.SELECT_STATES, customer):
            kind, status, details = row["kind"], row["status"], json.loads(row["details"])
            if kind == "invoice" and (status == "uncollectible" or (status == "open" and details.get("attempts"))):
                unpaid.append(row["stripe_id"])
            elif kind == "subscription" and status in ("past_due", "unpaid"):
                overdue.append(row["stripe_id"])
            elif kind == "dispute" and status not in ("won", "warning_closed", "prevented", "deleted"):
                disputed.append(row["stripe_id"])
        return Standing(tuple(unpaid), tuple(overdue), tuple(disputed))

    async def add_meter_error(
        self, event_id: str, idempotency_key: str, code: str, meter: str, errors: int, message: str
    ) -> None:
        """Keep one sample of a report about meter events that Stripe threw away."""
        await self._pool.execute(self.INSERT_METER_ERROR, event_id, idempotency_key, code, meter, errors, message)

    async def meter_errors(self, since: datetime) -> list[dict[str, Any]]:
        """The samples noted since then, oldest first."""
        return [dict(row) for row in await self._pool.fetch(self.SELECT_METER_ERRORS, since)]
