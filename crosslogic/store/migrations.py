"""Brings a database's schema up to date: numbered files, applied once each, forward only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import asyncpg

from crosslogic.domain.errors import Rejected, Unavailable

MIGRATIONS_DIR = Path(__file__).parent / "migrations"

# A migration that cannot get its locks soon would make every query behind it wait: it gives up and is run again.
LOCK_TIMEOUT = "5s"
# Several processes may set up one database at once; all but one wait here. An arbitrary number of ours.
ADVISORY_LOCK = 4_267_351_204
WAIT_FOR_OTHERS = "60s"

CREATE_HISTORY = """
    CREATE TABLE IF NOT EXISTS schema_migrations (
        name       TEXT PRIMARY KEY,
        sha256     TEXT NOT NULL,
        applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
    )
"""
LOCK_HISTORY = "SELECT pg_advisory_xact_lock($1)"
SELECT_HISTORY = "SELECT name, sha256 FROM schema_migrations ORDER BY name"
INSERT_HISTORY = "INSERT INTO schema_migrations (name, sha256) VALUES ($1, $2)"


async def migrate(dsn: str, directory: Path = MIGRATIONS_DIR) -> list[str]:
    """Apply what is missing and return its names, oldest first; each file is one transaction.

    Raises Rejected when the database's history is not a beginning of ours (a file was changed or is missing here), and
    Unavailable when Postgres cannot be reached or a lock is not free.
    """
    scripts = _read_scripts(directory)
    try:
        # No statement cache: a pooler in transaction mode may be in between.
        connection = await asyncpg.connect(dsn, timeout=10, statement_cache_size=0)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise Unavailable(f"Postgres cannot be reached for migrations ({type(error).__name__}: {error}).") from error
    applied: list[str] = []
    try:
        while (name := await _apply_next(connection, scripts)) is not None:
            applied.append(name)
    except asyncpg.LockNotAvailableError as error:
        raise Unavailable("A migration could not get its lock in time; run the set-up again.") from error
    finally:
        await connection.close()
    return applied


def _read_scripts(directory: Path) -> dict[str, str]:
    files = sorted(directory.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


async def _apply_next(connection: asyncpg.Connection, scripts: dict[str, str]) -> str | None:
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{WAIT_FOR_OTHERS}'")
        await connection.execute(LOCK_HISTORY, ADVISORY_LOCK)
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        await connection.execute(CREATE_HISTORY)
        history = {row["name"]: row["sha256"] for row in await connection.fetch(SELECT_HISTORY)}
        for name, digest in history.items():
            if name not in scripts:
                raise Rejected(f"The database has migration {name}, which this version does not know: use a newer one.")
            if digest != _digest(scripts[name]):
                raise Rejected(f"Migration {name} was changed after it had been applied; add a new migration instead.")
        missing = [name for name in scripts if name not in history]
        if not missing:
            return None
        if history and missing[0] < max(history):
            raise Rejected(
                f"Migration {missing[0]} comes before {max(history)}, which is applied already: renumber it."
            )
        await connection.execute(scripts[missing[0]])
        await connection.execute(INSERT_HISTORY, missing[0], _digest(scripts[missing[0]]))
        return missing[0]


def _digest(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()
