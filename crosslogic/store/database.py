"""The pool of connections to Postgres that every store holds."""

from __future__ import annotations

import asyncpg

from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.settings import Settings

# Longest wait for a new connection, and for one statement. Nothing we run is slow; a server that is must not hold us.
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 30.0


async def connect(settings: Settings, *, at_once: int = 1) -> asyncpg.Pool:
    """A pool that reconnects by itself when Postgres comes back. With `at_once=0` it connects when first used.

    Raises Unavailable when Postgres cannot be reached now, Rejected when it refuses us or the URL cannot be read.
    """
    try:
        return await asyncpg.create_pool(
            settings.database_url.get_secret_value(),
            min_size=at_once,
            max_size=settings.database_connections,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            # A pooler in transaction mode gives each transaction another server connection, which does not know our
            # prepared statements.
            statement_cache_size=0 if settings.database_is_pooled else 256,
            max_inactive_connection_lifetime=300.0,
            server_settings={"application_name": "crosslogic"},
        )
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError, ValueError) as error:
        raise Rejected(f"Postgres refuses the connection ({error}); check CROSSLOGIC_DATABASE_URL.") from error
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Unavailable(
            f"Postgres cannot be reached ({error or type(error).__name__}); check CROSSLOGIC_DATABASE_URL."
        ) from error
