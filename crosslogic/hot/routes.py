"""The route table in Redis: what Postgres says of every node, pushed to all API processes at once."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.node import FINAL_STATES, NodeState, RouteEntry

log = logging.getLogger(__name__)

# How long the board remembers an ended node's generation, so that a late message cannot bring it back. Longer than any
# attempt of an activity may be late.
TOMBSTONE_S = 3600

_PUBLISH = (Path(__file__).parent / "routes.lua").read_text(encoding="utf-8")


class RouteBoard:
    """Publishes and reads route entries. A rebuildable view: write to Postgres first, then here.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: aioredis.Redis, prefix: str) -> None:
        self._redis: Any = redis  # Its own annotations are partial.
        self._hash = f"{prefix}routes"
        self._channel = f"{prefix}routes:push"
        self._gone = f"{prefix}routes:gone:"
        self._publish = self._redis.register_script(_PUBLISH)

    async def publish(self, entry: RouteEntry) -> bool:
        """Take the entry and push it, unless one of its generation or newer was taken before (False then).

        An entry in a final state leaves the table and is remembered for `TOMBSTONE_S`.
        """
        arguments = [
            entry.node_id,
            entry.generation,
            encode(entry),
            self._channel,
            int(entry.state in FINAL_STATES),
            TOMBSTONE_S,
        ]
        try:
            return bool(await self._publish(keys=[self._hash, self._gone + entry.node_id], args=arguments))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def read_all(self) -> list[RouteEntry]:
        """Every entry on the board, in no order."""
        try:
            found: dict[str, str] = await self._redis.hgetall(self._hash)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        return [entry for text in found.values() if (entry := _decode_or_none(text)) is not None]

    async def listen(self) -> AsyncIterator[RouteEntry]:
        """First every entry on the board, then each one that is pushed, for ever; nothing is missed in between.

        When the connection breaks it ends with Unavailable: then call it again.
        """
        try:
            async with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:
                await subscription.subscribe(self._channel)
                # The first message confirms: what is published from now on arrives, what was before is on the board.
                await subscription.get_message(timeout=5.0)
                for entry in await self.read_all():
                    yield entry
                while True:
                    message = await subscription.get_message(timeout=1.0)
                    if message is not None and (entry := _decode_or_none(message["data"])) is not None:
                        yield entry
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"Redis does not answer ({type(error).__name__}: {error}); check CROSSLOGIC_REDIS_URL.")


def encode(entry: RouteEntry) -> str:
    """The JSON form of an entry, as the hash and the channel carry it."""
    return json.dumps(asdict(entry), separators=(",", ":"))


def decode(text: str) -> RouteEntry:
    """The inverse of `encode`. Fields of a newer version are ignored. Raises ValueError for anything else."""
    try:
        fields: dict[str, Any] = json.loads(text)
        return RouteEntry(
            node_id=str(fields["node_id"]),
            generation=int(fields["generation"]),
            state=NodeState(fields["state"]),
            model=str(fields["model"]),
            region=str(fields["region"]),
            endpoint=str(fields["endpoint"]),
            deployment=str(fields.get("deployment", "")),
            capacity_tokens_per_s=int(fields.get("capacity_tokens_per_s", 0)),
            is_tombstoned=bool(fields.get("is_tombstoned", False)),
            price_microdollars_per_h=int(fields.get("price_microdollars_per_h", 0)),
            org=str(fields.get("org", "")),
            has_agent=bool(fields.get("has_agent", False)),
            revision=int(fields.get("revision", 1)),
            is_held=bool(fields.get("is_held", False)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a route entry: {text[:200]!r}") from error


def _decode_or_none(text: str) -> RouteEntry | None:
    try:
        return decode(text)
    except ValueError as error:
        log.warning("ignored a message on the route board: %s", error)
        return None
