"""How far each API process's usage log is in Postgres: what tells when an hour can be sealed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from crosslogic.domain.errors import Rejected


@dataclass(frozen=True, slots=True)
class LogReport:
    """One log: every request that it admitted before `complete_until` is in Postgres."""

    name: str
    complete_until: datetime
    reported_at: datetime


class UsageLogStore:
    """Logs that may hold records which Postgres has not got."""

    # Never back: what was complete once stays so.
    REPORT = """
        INSERT INTO usage_logs (name, complete_until) VALUES ($1, $2)
        ON CONFLICT (name) DO UPDATE SET
            complete_until = greatest(usage_logs.complete_until, excluded.complete_until), reported_at = now()
    """
    FORGET = "DELETE FROM usage_logs WHERE name = $1"
    LIST = "SELECT name, complete_until, reported_at FROM usage_logs ORDER BY complete_until, name"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def report(self, name: str, complete_until: datetime) -> None:
        """Say that every request which this log admitted before an instant is in Postgres."""
        await self._pool.execute(self.REPORT, name, complete_until)

    async def forget(self, name: str) -> bool:
        """All of this log is in Postgres, or nobody will ever have it; False if it is not known."""
        return await self._pool.execute(self.FORGET, name) == "DELETE 1"

    async def forget_known(self, name: str) -> None:
        """The same for an operator. Raises Rejected 404."""
        if not await self.forget(name):
            raise Rejected(f"There is no usage log {name[:80]!r}; list them.", status=404, code="log_not_found")

    async def list_logs(self) -> list[LogReport]:
        """All of them, the one that is furthest behind first."""
        return [LogReport(**dict(row)) for row in await self._pool.fetch(self.LIST)]
