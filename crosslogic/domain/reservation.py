"""Reservations: an org's prepaid capacity for one model in one region, from one full hour to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from crosslogic.domain.errors import Rejected

HOUR = timedelta(hours=1)

# (org, model, region): who holds capacity of what, and where.
Holder = tuple[UUID, str, str]


@dataclass(frozen=True, slots=True)
class Reservation:
    """`capacity_units` tokens a second, guaranteed from `starts_at` until just before `ends_at` (None: without end).

    With `overage` the org's tokens beyond it are serverless ones, else they are refused.
    """

    id: UUID
    org_id: UUID
    model: str
    region: str
    capacity_units: int
    starts_at: datetime
    ends_at: datetime | None = None
    overage: bool = True

    def is_active(self, now: datetime) -> bool:
        """Does it hold at this instant?"""
        return self.starts_at <= now and (self.ends_at is None or now < self.ends_at)


def active(reservations: Iterable[Reservation], now: datetime) -> dict[Holder, Reservation]:
    """What each org holds at this instant.

    Several reservations of one holder add up under the id of the eldest, and one that allows overage allows it for all.
    """
    held: dict[Holder, Reservation] = {}
    for reservation in sorted(reservations, key=lambda reservation: (reservation.starts_at, reservation.id)):
        if reservation.is_active(now):
            holder = (reservation.org_id, reservation.model, reservation.region)
            known = held.get(holder)
            held[holder] = reservation if known is None else _sum(known, reservation)
    return held


def _sum(known: Reservation, other: Reservation) -> Reservation:
    units = known.capacity_units + other.capacity_units
    return replace(known, capacity_units=units, overage=known.overage or other.overage)


def units_by_pool(held: Iterable[Reservation]) -> dict[tuple[str, str], int]:
    """Capacity units by (model, region)."""
    units: dict[tuple[str, str], int] = {}
    for reservation in held:
        pool = (reservation.model, reservation.region)
        units[pool] = units.get(pool, 0) + reservation.capacity_units
    return units


def next_change(reservations: Iterable[Reservation], now: datetime) -> datetime | None:
    """The next instant at which one begins or ends; None when none will."""
    instants = (at for one in reservations for at in (one.starts_at, one.ends_at) if at is not None and at > now)
    return min(instants, default=None)


def next_hour(now: datetime) -> datetime:
    """The first full hour after `now`, in UTC: the earliest that a reservation can begin or end."""
    return now.astimezone(UTC).replace(minute=0, second=0, microsecond=0) + HOUR


def check_change(at: datetime, now: datetime, param: str) -> None:
    """Raise Rejected unless something may change at this instant: a full hour (UTC) that has not begun."""
    at = at.astimezone(UTC)
    if at != at.replace(minute=0, second=0, microsecond=0):
        raise Rejected(
            f"{param} must be a full hour (UTC), such as {_show(next_hour(now))}: an hour is billed as a whole.",
            code="not_a_full_hour",
            param=param,
        )
    if at <= now:
        raise Rejected(
            f"{param} is in the past; the earliest is the next full hour, {_show(next_hour(now))}.",
            code="in_the_past",
            param=param,
        )


def _show(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
