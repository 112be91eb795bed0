"""What has changed since an API process last looked: one counter for each noun that it holds in memory."""

from __future__ import annotations

import asyncpg


class ChangeStore:
    """Reads the counters that triggers move. Works through any pooler, and for changes made with plain SQL."""

    READ = "SELECT noun, seq FROM change_counters"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def read(self) -> dict[str, int]:
        """The counter of each noun: `catalog`, `tenancy`, `nodes`."""
        return {row["noun"]: row["seq"] for row in await self._pool.fetch(self.READ)}
