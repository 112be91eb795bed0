"""The audit log's SQL: every admin write, each row chained to the one before by its hash (H11).

A row's hash is SHA-256 over the previous row's hash and the row's canonical JSON, so that altering, removing or
inserting a row breaks the chain there. Whoever can rewrite the whole table can also rewrite the whole chain: keep a
head that `verify` printed somewhere else, and give it to a later `verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

_GENESIS = bytes(32)

# Serialises writers of the chain's head across all processes; any number that no other advisory lock uses.
_LOCK = 0x43_49_43_41


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One admin write: who did what to which subject, with which values. Never holds a secret."""

    seq: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
    hash: bytes


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """What `verify` found: `problem` is empty for an intact chain, else it names the first bad record, `broken_seq`."""

    records: int
    head: bytes
    broken_seq: int | None = None
    problem: str = ""


class AuditStore:
    """Appends to the chain and proves it."""

    LOCK_HEAD = "SELECT pg_advisory_xact_lock($1)"
    SELECT_HEAD = """
        SELECT clock_timestamp() AS now, (SELECT max(seq) FROM audit_log) AS seq,
               (SELECT hash FROM audit_log ORDER BY seq DESC LIMIT 1) AS hash
    """
    INSERT = """
        INSERT INTO audit_log (seq, at, actor, action, subject, details, previous_hash, hash)
        VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, $7, $8)
    """
    LIST = """
        SELECT seq, at, actor, action, subject, details::text AS details, hash FROM audit_log
        WHERE ($1::bigint IS NULL OR seq < $1) AND ($2::text IS NULL OR subject = $2)
        ORDER BY seq DESC LIMIT $3
    """
    WALK = """
        SELECT seq, at, actor, action, subject, details::text AS details, previous_hash, hash
        FROM audit_log WHERE seq > $1 ORDER BY seq LIMIT $2
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @classmethod
    async def append(
        cls,
        connection: asyncpg.Connection | asyncpg.pool.PoolConnectionProxy,
        *,
        actor: str,
        action: str,
        subject: str,
        details: Mapping[str, Any],
    ) -> None:
        """Chain one entry within the caller's transaction, which must be READ COMMITTED and should write nothing after:
        until it ends, every other admin write waits for it.
        """
        # A statement of its own: the next one must see what the lock's last holder has committed.
        await connection.execute(cls.LOCK_HEAD, _LOCK)
        head = await connection.fetchrow(cls.SELECT_HEAD)
        assert head is not None
        seq, at = (head["seq"] or 0) + 1, head["now"]
        previous = head["hash"] or _GENESIS
        chained = _chain(previous, seq, at, actor, action, subject, details)
        await connection.execute(cls.INSERT, seq, at, actor, action, subject, json.dumps(details), previous, chained)

    async def record(self, *, actor: str, action: str, subject: str, details: Mapping[str, Any]) -> None:
        """Chain one entry for a write that is made elsewhere (a workflow is started), before it is made."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self.append(connection, actor=actor, action=action, subject=subject, details=details)

    async def list_entries(
        self, *, before_seq: int | None = None, subject: str | None = None, limit: int = 50
    ) -> Sequence[AuditEntry]:
        """The newest entries first."""
        rows = await self._pool.fetch(self.LIST, before_seq, subject, limit)
        return [
            AuditEntry(
                seq=row["seq"],
                at=row["at"],
                actor=row["actor"],
                action=row["action"],
                subject=row["subject"],
                details=json.loads(row["details"]),
                hash=row["hash"],
            )
            for row in rows
        ]

    async def verify(self, known_head: bytes | None = None, batch: int = 1_000) -> AuditVerdict:
        """Walk the whole chain. With `known_head`, a head of an earlier walk, that record must still be in it."""
        previous, records, is_head_found = _GENESIS, 0, known_head in (None, _GENESIS)
        while True:
            rows = await self._pool.fetch(self.WALK, records, batch)
            for row in rows:
                seq: int = row["seq"]
                if seq != records + 1:
                    return AuditVerdict(records, previous, records + 1, f"record {records + 1} is missing")
                if row["previous_hash"] != previous:
                    return AuditVerdict(records, previous, seq, f"record {seq} does not follow record {records}")
                expected = _chain(
                    previous, seq, row["at"], row["actor"], row["action"], row["subject"], json.loads(row["details"])
                )
                if row["hash"] != expected:
                    return AuditVerdict(records, previous, seq, f"record {seq} was altered after it was written")
                previous, records = expected, seq
                is_head_found = is_head_found or previous == known_head
            if len(rows) < batch:
                break
        if not is_head_found:
            return AuditVerdict(
                records, previous, records + 1, "the given head is not in the chain: records were removed"
            )
        return AuditVerdict(records, previous)


def _chain(
    previous: bytes, seq: int, at: datetime, actor: str, action: str, subject: str, details: Mapping[str, Any]
) -> bytes:
    """A record's hash: over the previous hash and the record's JSON, keys sorted, no spaces, instants in µs UTC."""
    record = {
        "seq": seq,
        "at": at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": actor,
        "action": action,
        "subject": subject,
        "details": details,
    }
    return hashlib.sha256(previous + json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).digest()
