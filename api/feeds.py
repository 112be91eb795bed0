"""What keeps an API process's memory true: pushes from Redis, and behind them the change counters in Postgres.

Postgres away: everything is served from what is known. Redis away: changes arrive within the poll interval instead of
at once. Neither is ever waited for by a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from api.inference.auth import KeyRing, within
from api.inference.router import RouteTable
from api.inference.routes import Inference
from crosslogic.domain.catalog import Catalog, Deployment
from crosslogic.domain.scheduling import Split
from crosslogic.hot.routes import RouteBoard
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.changes import ChangeStore
from crosslogic.store.nodes import NodeStore

log = logging.getLogger("crosslogic.feeds")

POLL_INTERVAL_S = 0.25
# A question of microseconds: without an answer by then its connection is as good as lost.
POLL_TIMEOUT_S = 2.0
# Even if no counter moved, read the nodes again this often: a full reading heals whatever went wrong.
FULL_READ_INTERVAL_S = 30.0


class Feeds:
    """Reads each noun again when its counter has moved."""

    def __init__(
        self,
        *,
        changes: ChangeStore,
        catalog: CatalogStore,
        nodes: NodeStore,
        board: RouteBoard,
        keys: KeyRing,
        table: RouteTable,
        inference: Inference,
    ) -> None:
        self._changes = changes
        self._board = board
        self._table = table
        self._inference = inference
        self._catalog: Catalog | None = None
        self._seen: dict[str, int] = {}
        self._readers: dict[str, Callable[[], Awaitable[None]]] = {
            "catalog": self._reader(catalog.load, self._take_catalog),
            "tenancy": keys.refresh,
            "nodes": self._reader(nodes.route_entries, table.replace),
        }
        self.ready = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Has everything been read once?"""
        return self.ready.is_set()

    @staticmethod
    def _reader(read: Callable[[], Awaitable[Any]], take: Callable[[Any], None]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            take(await read())

        return run

    def _take_catalog(self, catalog: Catalog) -> None:
        self._catalog = self._inference.catalog = catalog
        self._table.set_strategies({name: deployment.strategy for name, deployment in catalog.deployments.items()})
        self._table.set_splits({name: _split(deployment) for name, deployment in catalog.deployments.items()})

    def turn_reservations(self, now: datetime) -> None:
        """Begin and end reservations whose hour has come; that needs no server."""
        catalog = self._catalog
        if catalog is not None and catalog.changes_at is not None and catalog.changes_at <= now:
            self._take_catalog(catalog.at(now))

    async def poll_once(self) -> None:
        """Read what has moved since the last poll. Raises what the stores raise."""
        counters = await within(POLL_TIMEOUT_S, self._changes.read())
        failure: Exception | None = None
        for noun, read in self._readers.items():
            seq = counters.get(noun, 0)
            if self._seen.get(noun) != seq:
                try:
                    await read()
                    # Only now: a reading that failed is tried again.
                    self._seen[noun] = seq
                except Exception as error:
                    # One noun that cannot be read must not keep a revoked key alive (H10).
                    failure = error
        if failure is not None:
            raise failure
        self.ready.set()

    async def keep_polling(self) -> None:
        """Run for the life of the process."""
        loop = asyncio.get_running_loop()
        is_away = False
        full_read_at = loop.time() + FULL_READ_INTERVAL_S
        while True:
            self.turn_reservations(datetime.now(UTC))
            try:
                if loop.time() >= full_read_at:
                    self._seen.pop("nodes", None)
                    full_read_at = loop.time() + FULL_READ_INTERVAL_S
                await self.poll_once()
                if is_away:
                    log.info("Postgres is back")
                is_away = False
            except Exception as error:
                if not is_away:
                    log.warning("Postgres is away, serving from memory: %r", error)
                is_away = True
            await asyncio.sleep(POLL_INTERVAL_S)

    async def keep_listening(self) -> None:
        """Run for the life of the process: take pushed route entries as they come."""
        pause_s = 0.1
        is_away = False
        while True:
            try:
                async for entry in self._board.listen():
                    if is_away:
                        log.info("Redis is back")
                    is_away, pause_s = False, 0.1
                    self._table.apply(entry)
            except Exception as error:
                if not is_away:
                    log.warning("Redis is away, changes come from Postgres: %r", error)
                is_away = True
            await asyncio.sleep(pause_s)
            pause_s = min(2.0, pause_s * 2)


def _split(deployment: Deployment) -> Split:
    """Who gets the deployment's requests. While a roll-out is on, whichever revision serves by now is only its goal."""
    if deployment.rollout_revision is None or deployment.rollout_from is None:
        return Split(deployment.revision)
    return Split(deployment.rollout_from, deployment.rollout_revision, deployment.traffic_bp)
