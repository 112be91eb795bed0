"""Reservations' SQL. Every write leaves its audit row in the same transaction (H11)."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import asyncpg

from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.reservation import Reservation, check_change
from crosslogic.store.audit import AuditStore


class ReservationStore:
    """Who has prepaid which capacity."""

    BOOKED = """
        SELECT id, org_id, model, region, capacity_units, starts_at, ends_at, overage
        FROM reservations WHERE ends_at IS NULL OR ends_at > now()
    """
    INSERT = """
        INSERT INTO reservations (id, org_id, model, region, capacity_units, starts_at, ends_at, overage)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO NOTHING
    """
    GET = """
        SELECT id, org_id, model, region, capacity_units, starts_at, ends_at, overage FROM reservations WHERE id = $1
    """
    LOCK = """
        SELECT id, org_id, model, region, capacity_units, starts_at, ends_at, overage
        FROM reservations WHERE id = $1 FOR UPDATE
    """
    LIST = """
        SELECT id, org_id, model, region, capacity_units, starts_at, ends_at, overage FROM reservations
        WHERE ($1::uuid IS NULL OR id > $1) AND ($2::uuid IS NULL OR org_id = $2)
          AND ($3 OR ends_at IS NULL OR ends_at > now())
        ORDER BY id LIMIT $4
    """
    OF_SPAN = """
        SELECT id, org_id, model, region, capacity_units, starts_at, ends_at, overage FROM reservations
        WHERE org_id = $1 AND starts_at < $3 AND (ends_at IS NULL OR ends_at > $2) ORDER BY id
    """
    SET_END = "UPDATE reservations SET ends_at = $2 WHERE id = $1"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @classmethod
    async def booked(cls, connection: asyncpg.Connection | asyncpg.pool.PoolConnectionProxy) -> list[Reservation]:
        """All that have not ended, within the caller's transaction."""
        return [_reservation(row) for row in await connection.fetch(cls.BOOKED)]

    async def add(self, reservation: Reservation, *, actor: str) -> bool:
        """Write a new one, whose org, model and region exist; False if it is there already, just like this.

        Raises Rejected 409 where the id is another one's.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            status = await connection.execute(
                self.INSERT,
                reservation.id,
                reservation.org_id,
                reservation.model,
                reservation.region,
                reservation.capacity_units,
                reservation.starts_at,
                reservation.ends_at,
                reservation.overage,
            )
            if status == "INSERT 0 0":
                known = _found(await connection.fetchrow(self.GET, reservation.id), reservation.id)
                if known != reservation:
                    raise Rejected(
                        f"Reservation {ids.RESERVATION.show(reservation.id)} exists and is another one.",
                        status=409,
                        code="reservation_exists",
                        param="reservation_id",
                    )
                return False
            await AuditStore.append(
                connection,
                actor=actor,
                action="reservation.add",
                subject=ids.RESERVATION.show(reservation.id),
                details={
                    "org": ids.ORG.show(reservation.org_id),
                    "model": reservation.model,
                    "region": reservation.region,
                    "capacity_units": reservation.capacity_units,
                    "starts_at": reservation.starts_at.isoformat(),
                    "ends_at": _shown(reservation.ends_at),
                    "overage": reservation.overage,
                },
            )
        return True

    async def get(self, reservation_id: UUID) -> Reservation:
        """One reservation. Raises Rejected 404."""
        return _found(await self._pool.fetchrow(self.GET, reservation_id), reservation_id)

    async def list_reservations(
        self, *, after: UUID | None = None, org_id: UUID | None = None, with_ended: bool = False, limit: int = 50
    ) -> list[Reservation]:
        """Reservations, oldest first."""
        return [_reservation(row) for row in await self._pool.fetch(self.LIST, after, org_id, with_ended, limit)]

    async def of_month(self, org_id: UUID, month: BillingMonth) -> list[Reservation]:
        """An org's reservations that hold at some time of a month."""
        rows = await self._pool.fetch(self.OF_SPAN, org_id, month.starts_at, month.ends_at)
        return [_reservation(row) for row in rows]

    async def end(self, reservation_id: UUID, ends_at: datetime, now: datetime, *, actor: str) -> Reservation:
        """Set when it ends: at a full hour to come; one that has not begun by then never does.

        Raises Rejected 404, 409 for one that has ended, 400 for an instant at which nothing may change.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            before = _found(await connection.fetchrow(self.LOCK, reservation_id), reservation_id)
            shown = ids.RESERVATION.show(reservation_id)
            if before.ends_at is not None and before.ends_at <= max(now, before.starts_at):
                raise Rejected(
                    f"Reservation {shown} has ended; add a new one.", status=409, code="reservation_has_ended"
                )
            check_change(ends_at, now, "ends_at")
            ends_at = max(ends_at, before.starts_at)
            if ends_at != before.ends_at:
                await connection.execute(self.SET_END, reservation_id, ends_at)
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="reservation.end",
                    subject=shown,
                    details={"ends_at": _shown(ends_at), "ended_before_at": _shown(before.ends_at)},
                )
            return _found(await connection.fetchrow(self.GET, reservation_id), reservation_id)


def _shown(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _found(row: asyncpg.Record | None, reservation_id: UUID) -> Reservation:
    if row is None:
        raise Rejected(
            f"There is no reservation {ids.RESERVATION.show(reservation_id)}.",
            status=404,
            code="reservation_not_found",
        )
    return _reservation(row)


def _reservation(row: asyncpg.Record) -> Reservation:
    return Reservation(
        id=row["id"],
        org_id=row["org_id"],
        model=row["model"],
        region=row["region"],
        capacity_units=row["capacity_units"],
        starts_at=row["starts_at"],
        ends_at=row["ends_at"],
        overage=row["overage"],
    )
