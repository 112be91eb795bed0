"""Credits' SQL: granted once for each reason, drawn by closed months. Grants leave their audit row (H11)."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain import ids
from crosslogic.domain.credits import REFERRAL_CENTS, Credit, CreditKind
from crosslogic.domain.errors import Rejected
from crosslogic.store.audit import AuditStore


class CreditStore:
    """What orgs need not pay."""

    GRANT = """
        INSERT INTO credits (id, org_id, kind, reason_key, cents, granted_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (org_id, reason_key) DO NOTHING
    """
    # What is left of each that was granted by an instant, months from a given one on not counted.
    LEFT = """
        SELECT c.id, c.kind, c.cents - coalesce(sum(d.cents), 0)::bigint AS cents, c.granted_at, c.expires_at
        FROM credits c LEFT JOIN credit_draws d ON d.credit_id = c.id AND d.month < $3
        WHERE c.org_id = $1 AND c.granted_at < $2
        GROUP BY c.id ORDER BY c.id
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def grant(self, org_id: UUID, credit: Credit, reason_key: str, *, actor: str) -> bool:
        """Grant a credit; False if this reason has been granted to the org already."""
        async with self._pool.acquire() as connection, connection.transaction():
            return await self._grant(connection, org_id, credit, reason_key, actor)

    async def refer(
        self, referrer: UUID, referred: UUID, ids_of_both: tuple[UUID, UUID], now: datetime, *, actor: str
    ) -> bool:
        """Grant both sides of a referral theirs; False if this pair was. Raises Rejected for one org on both sides."""
        if referrer == referred:
            raise Rejected("An org cannot refer itself.", code="invalid_referral", param="referrer")
        async with self._pool.acquire() as connection, connection.transaction():
            is_new = False
            for org_id, other, credit_id in (
                (referrer, referred, ids_of_both[0]),
                (referred, referrer, ids_of_both[1]),
            ):
                credit = Credit(credit_id, CreditKind.REFERRAL, REFERRAL_CENTS, now)
                is_new |= await self._grant(connection, org_id, credit, f"referral/{ids.ORG.show(other)}", actor)
        return is_new

    async def _grant(self, connection: Any, org_id: UUID, credit: Credit, reason_key: str, actor: str) -> bool:
        status = await connection.execute(
            self.GRANT,
            credit.id,
            org_id,
            credit.kind.value,
            reason_key,
            credit.cents,
            credit.granted_at,
            credit.expires_at,
        )
        if status == "INSERT 0 0":
            return False
        await AuditStore.append(
            connection,
            actor=actor,
            action="credit.grant",
            subject=ids.ORG.show(org_id),
            details={"kind": credit.kind.value, "cents": credit.cents, "reason": reason_key},
        )
        return True

    async def left(self, org_id: UUID, granted_before: datetime, before_month: str) -> list[Credit]:
        """An org's credits with what the months before a given one (such as 2026-11) have left of them."""
        rows = await self._pool.fetch(self.LEFT, org_id, granted_before, before_month)
        return [
            Credit(row["id"], CreditKind(row["kind"]), row["cents"], row["granted_at"], row["expires_at"])
            for row in rows
        ]
