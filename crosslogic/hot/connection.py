"""The connection to Redis that everything in this package holds."""

from __future__ import annotations

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from crosslogic.settings import Settings

# Redis answers in well under a millisecond; one that needs longer than this is as good as gone.
TIMEOUT_S = 2.0
# Notices a connection that died without a word, e.g. behind a load balancer.
HEALTH_CHECK_INTERVAL_S = 5


def connect(settings: Settings) -> aioredis.Redis:
    """A client that connects when it is first used and again whenever the connection broke. Answers are `str`."""
    return aioredis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        settings.redis_url.get_secret_value(),
        decode_responses=True,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=HEALTH_CHECK_INTERVAL_S,
        retry=Retry(ExponentialBackoff(cap=0.1, base=0.01), 1),
        retry_on_error=[RedisConnectionError],
        client_name="crosslogic",
    )
