"""What API processes have seen of nodes in the last seconds. It is told again every second, so Redis may forget it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.health import RequestView

log = logging.getLogger(__name__)

# A process that has said nothing for this long has nothing to say, or is gone.
MEMORY_S = 5
_WIDTH = len(fields(RequestView))


class PassiveBoard:
    """Takes and reads views by region and process. Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis: aioredis.Redis, prefix: str) -> None:
        self._redis: Any = redis  # Its own annotations are partial.
        self._prefix = f"{prefix}passive:"

    async def put(self, region: str, process_id: str, views: Mapping[str, RequestView]) -> None:
        """Take what a process sees of a region's nodes, by their ids, in place of what it said before."""
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.set(f"{self._prefix}{region}:{process_id}", encode(views), ex=MEMORY_S)
                pipeline.sadd(self._prefix + region, process_id)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def read(self, region: str) -> dict[str, list[RequestView]]:
        """What all processes see of a region's nodes, by node id."""
        index = self._prefix + region
        try:
            processes = sorted(await self._redis.smembers(index))
            if not processes:
                return {}
            texts: list[str | None] = await self._redis.mget([f"{index}:{process}" for process in processes])
            gone = [process for process, text in zip(processes, texts, strict=True) if text is None]
            if gone:
                await self._redis.srem(index, *gone)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        found: dict[str, list[RequestView]] = {}
        for text in texts:
            for node_id, view in decode(text).items() if text is not None else ():
                found.setdefault(node_id, []).append(view)
        return found


def encode(views: Mapping[str, RequestView]) -> str:
    """The JSON form of a process's views: each as a row of values, because there may be a thousand."""
    return json.dumps({node_id: astuple(view) for node_id, view in views.items()}, separators=(",", ":"))


def decode(text: str) -> dict[str, RequestView]:
    """The inverse of `encode`; what cannot be read is left out, and so are values that a newer version adds."""
    try:
        rows: dict[str, list[Any]] = json.loads(text)
        return {node_id: RequestView(*row[:_WIDTH]) for node_id, row in rows.items()}
    except (ValueError, TypeError, AttributeError):
        log.warning("ignored a view of nodes that cannot be read: %r", text[:200])
        return {}


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"Redis does not answer ({type(error).__name__}: {error}); check CROSSLOGIC_REDIS_URL.")
