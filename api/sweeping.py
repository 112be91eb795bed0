"""The last sweep of the clouds, as metrics. Every API process shows the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

import asyncpg

from api.inference.observing import Observer
from crosslogic.store.sweeps import SweepStore

log = logging.getLogger(__name__)

READ_INTERVAL_S = 30.0
STANDINGS = ("machines", "owned", "ending", "destroyed", "foreign", "missing", "unexplained")


async def keep_showing(sweeps: SweepStore, observer: Observer, now: Callable[[], datetime]) -> None:
    """Run for the life of the process. Without a sweep there is nothing to show; while Postgres is away, the last."""
    while True:
        try:
            await show(sweeps, observer, now())
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            log.warning("the last sweep cannot be read now: %s", error)
        await asyncio.sleep(READ_INTERVAL_S)


async def show(sweeps: SweepStore, observer: Observer, now: datetime) -> None:
    """Set the gauges to what the newest sweep of every cloud found."""
    last = await sweeps.find_last()
    if last is None:
        return
    observer.sweep_age.set((now - last["started_at"]).total_seconds())
    for standing in STANDINGS:
        observer.swept.set(last["foreign_machines" if standing == "foreign" else standing], standing)
