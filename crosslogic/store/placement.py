"""What placement learns from: how long our spot nodes have run in each market, and how often one was taken."""

from __future__ import annotations

import asyncpg

from crosslogic.domain.placement import Exposure, Gpus, Market

# Older weather says little about a market.
DAYS = 30


class PlacementStore:
    """Reads the history of spot markets; others write it."""

    SELECT_HOURS = """
        SELECT cloud, cloud_region AS region, zone, gpu,
               sum(extract(epoch FROM coalesce(ended_at, now())
                   - greatest(created_at, now() - make_interval(days => $1))) / 3600)::float8 AS hours
        FROM nodes
        WHERE is_spot AND cloud <> '' AND coalesce(ended_at, now()) > now() - make_interval(days => $1)
        GROUP BY 1, 2, 3, 4
    """
    SELECT_PREEMPTIONS = """
        SELECT p.cloud, n.cloud_region AS region, p.zone, p.gpu, count(*) AS taken, sum(lived_s)::float8 / 3600 AS hours
        FROM preemptions p JOIN nodes n ON n.id = p.node_id
        WHERE at > now() - make_interval(days => $1) GROUP BY 1, 2, 3, 4
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def history(self) -> dict[Market, Exposure]:
        """The last DAYS days by market."""
        hours = {_market(row): row["hours"] for row in await self._pool.fetch(self.SELECT_HOURS, DAYS)}
        taken = {_market(row): row for row in await self._pool.fetch(self.SELECT_PREEMPTIONS, DAYS)}
        return {
            market: Exposure(
                # A node that was taken has run at least as long as it lived, whatever has become of its row.
                max(hours.get(market, 0.0), taken[market]["hours"] if market in taken else 0.0),
                taken[market]["taken"] if market in taken else 0,
            )
            for market in hours.keys() | taken.keys()
        }


def _market(row: asyncpg.Record) -> Market:
    return (row["cloud"], row["region"], row["zone"], Gpus.read(row["gpu"] or "cpu").name)
