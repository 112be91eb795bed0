"""Suspensions' SQL: why an org does not serve. Every change leaves its audit row (H11)."""

from __future__ import annotations

from uuid import UUID

import asyncpg

from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.spending import AccountEvent, SuspensionReason, suspensions
from crosslogic.store.audit import AuditStore


class SuspensionStore:
    """Keeps `orgs.state` what the reasons for a suspension say."""

    LOCK_ORG = "SELECT state FROM orgs WHERE id = $1 FOR UPDATE"
    REASONS = "SELECT reason FROM suspensions WHERE org_id = $1"
    ADD = "INSERT INTO suspensions (org_id, reason) SELECT $1, unnest($2::text[])"
    REMOVE = "DELETE FROM suspensions WHERE org_id = $1 AND reason = ANY($2::text[])"
    SET_STATE = "UPDATE orgs SET state = $2 WHERE id = $1"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def apply(self, org_id: UUID, event: AccountEvent, *, actor: str) -> frozenset[SuspensionReason]:
        """What an event makes of an org; the reasons that stand now. Again, it changes nothing. Raises Rejected 404.

        An org that somebody suspended without a word here counts as suspended by an operator.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            state = await connection.fetchval(self.LOCK_ORG, org_id)
            if state is None:
                raise Rejected(f"There is no org {ids.ORG.show(org_id)}.", status=404, code="org_not_found")
            rows = await connection.fetch(self.REASONS, org_id)
            noted = frozenset(SuspensionReason(row["reason"]) for row in rows)
            held = noted
            if state == "active":
                held = frozenset[SuspensionReason]()
            elif not noted:
                held = frozenset({SuspensionReason.OPERATOR})
            after = suspensions(held, event)
            await connection.execute(self.REMOVE, org_id, [reason.value for reason in noted - after])
            await connection.execute(self.ADD, org_id, [reason.value for reason in after - noted])
            if after != held:
                await connection.execute(self.SET_STATE, org_id, "suspended" if after else "active")
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="org.account_event",
                    subject=ids.ORG.show(org_id),
                    details={"event": event.value, "reasons": sorted(reason.value for reason in after)},
                )
        return after
