"""What is asked for, by model and region: each API process says what it sees, readers add it up.

It is said anew every second, so Redis may forget it at any time; the word of a process that has died expires.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from crosslogic.domain.autoscaling import Demand
from crosslogic.domain.errors import Unavailable

log = logging.getLogger(__name__)

# A process that has said nothing for so long is not counted any more.
FRESH_S = 10
# Its name leaves the index after this.
INDEX_S = 3600
# Fewer first tokens than this say nothing of their slowest.
LEAST_FIRST_TOKENS = 20
# Bounds of the spread of times to first token, in milliseconds; the last one stands for all that is slower.
TTFT_BOUNDS_MS = (50, 100, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 4000, 5000, 7500, 10000, 20000, 60000)

Place = tuple[str, str]  # Model and region.


@dataclass(frozen=True, slots=True)
class ProcessDemand:
    """What one process sees of one model in one region. `ttft_counts` are those of the last minute, by bound."""

    tokens_in_flight: float = 0.0
    queued_requests: int = 0
    queued_tokens: float = 0.0
    arrival_tokens_per_s: float = 0.0
    served_tokens_per_s: float = 0.0
    held_requests: int = 0
    sheds_per_s: float = 0.0
    ttft_counts: tuple[int, ...] = ()


_FIELDS = frozenset(field.name for field in fields(ProcessDemand))


class DemandBoard:
    """Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis: aioredis.Redis, prefix: str) -> None:
        self._redis: Any = redis  # Its own annotations are partial.
        self._prefix = f"{prefix}demand:"
        self._index = f"{prefix}demand"

    async def put(self, process: str, seen: Mapping[Place, ProcessDemand], now: float) -> None:
        """Say all that a process sees, in place of what it said before. `now` (Unix seconds) only ages the index."""
        text = json.dumps([[*place, asdict(demand)] for place, demand in seen.items()], separators=(",", ":"))
        try:
            async with self._redis.pipeline(transaction=True) as together:
                together.set(self._prefix + process, text, ex=FRESH_S)
                together.zadd(self._index, {process: now})
                together.zremrangebyscore(self._index, "-inf", now - INDEX_S)
                await together.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def leave(self, process: str) -> None:
        """A process that ends takes its word back at once."""
        try:
            await self._redis.delete(self._prefix + process)
            await self._redis.zrem(self._index, process)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def read(self) -> dict[Place, Demand] | None:
        """What all processes see together; None when none has said anything lately."""
        try:
            processes: list[str] = await self._redis.zrange(self._index, 0, -1)
            texts: list[str | None] = (
                await self._redis.mget([self._prefix + process for process in processes]) if processes else []
            )
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        words = [word for text in texts if text is not None and (word := _decode(text)) is not None]
        if not words:
            return None
        by_place: dict[Place, list[ProcessDemand]] = {}
        for word in words:
            for place, demand in word.items():
                by_place.setdefault(place, []).append(demand)
        return {place: add_up(demands) for place, demands in by_place.items()}


def add_up(demands: list[ProcessDemand]) -> Demand:
    """What several processes see of one place, together."""
    counts = [sum(places) for places in zip(*(one.ttft_counts for one in demands if one.ttft_counts), strict=False)]
    return Demand(
        tokens_in_flight=sum(one.tokens_in_flight for one in demands),
        queued_requests=sum(one.queued_requests for one in demands),
        queued_tokens=sum(one.queued_tokens for one in demands),
        arrival_tokens_per_s=sum(one.arrival_tokens_per_s for one in demands),
        served_tokens_per_s=sum(one.served_tokens_per_s for one in demands),
        held_requests=sum(one.held_requests for one in demands),
        sheds_per_s=sum(one.sheds_per_s for one in demands),
        ttft_ms_p50=_quantile(counts, 0.5),
        ttft_ms_p99=_quantile(counts, 0.99),
    )


def _quantile(counts: list[int], share: float) -> float | None:
    """The upper bound of the bucket that holds the quantile."""
    total = sum(counts)
    if total < LEAST_FIRST_TOKENS:
        return None
    seen = 0
    for count, bound in zip(counts, TTFT_BOUNDS_MS, strict=False):
        seen += count
        if seen >= share * total:
            return float(bound)
    return float(TTFT_BOUNDS_MS[-1])


def _decode(text: str) -> dict[Place, ProcessDemand] | None:
    """What a process said; None if it cannot be read. Fields of a newer version are ignored."""
    try:
        found: dict[Place, ProcessDemand] = {}
        for model, region, stored in json.loads(text):
            given: dict[str, Any] = {name: value for name, value in stored.items() if name in _FIELDS}
            given["ttft_counts"] = tuple(given.get("ttft_counts", ()))
            found[(str(model), str(region))] = ProcessDemand(**given)
    except (ValueError, TypeError, AttributeError):
        log.warning("ignored a process's word on demand that cannot be read: %r", text[:200])
        return None
    return found


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"Redis does not answer ({type(error).__name__}: {error}); check CROSSLOGIC_REDIS_URL.")
