"""The latest heartbeat of every node. Heartbeats come again by themselves, so Redis may forget them at any time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.heartbeat import Heartbeat

log = logging.getLogger(__name__)

# A heartbeat that is older says nothing any more; a node that has ended leaves nothing behind.
MEMORY_S = 120

_FIELDS = frozenset(field.name for field in fields(Heartbeat))


class HeartbeatBoard:
    """Takes and reads heartbeats. Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis: aioredis.Redis, prefix: str) -> None:
        self._redis: Any = redis  # Its own annotations are partial.
        self._prefix = f"{prefix}heartbeat:"

    async def put(self, heartbeat: Heartbeat) -> None:
        """Take a node's latest heartbeat in place of the one before."""
        try:
            await self._redis.set(self._prefix + heartbeat.node_id, encode(heartbeat), ex=MEMORY_S)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def read_many(self, node_ids: Sequence[str]) -> dict[str, Heartbeat]:
        """The latest heartbeats of those nodes that sent one within `MEMORY_S`."""
        if not node_ids:
            return {}
        try:
            texts: list[str | None] = await self._redis.mget([self._prefix + node_id for node_id in node_ids])
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        found = (decode(text) for text in texts if text is not None)
        return {heartbeat.node_id: heartbeat for heartbeat in found if heartbeat is not None}


def encode(heartbeat: Heartbeat) -> str:
    """The JSON form of a heartbeat."""
    return json.dumps(asdict(heartbeat), separators=(",", ":"))


def decode(text: str) -> Heartbeat | None:
    """The inverse of `encode`, None for anything else. Fields of a newer version are ignored."""
    try:
        stored: dict[str, Any] = json.loads(text)
        return Heartbeat(**{name: value for name, value in stored.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        log.warning("ignored a heartbeat that cannot be read: %r", text[:200])
        return None


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"Redis does not answer ({type(error).__name__}: {error}); check CROSSLOGIC_REDIS_URL.")
