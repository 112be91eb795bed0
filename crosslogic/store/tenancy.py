"""Tenancy's SQL: orgs, environments, keys and their limits."""

from __future__ import annotations

import json
from collections.abc import Sequence

import asyncpg

from crosslogic.domain.tenancy import GLOBAL_SUBJECT, LAYERS, LIMITS, LimitRow, Principal


class TenancyStore:
    """Who may ask what. Every write leaves an audit row in the same transaction (H11)."""

    FIND_PRINCIPALS = """
        SELECT k.secret_hash, k.id AS key_id, k.role, k.state AS key_state, k.expires_at,
               e.id AS environment_id, e.state AS environment_state, e.home_region, e.allowed_models,
               o.id AS org_id, o.state AS org_state, o.plan, o.region_preferences,
               (SELECT coalesce(json_object_agg(l.layer, row_to_json(l)), '{}')::text FROM limits l
                WHERE (l.layer, l.subject_id) IN
                      (('global', $2::uuid), ('org', o.id), ('environment', e.id), ('key', k.id))) AS limits
        FROM keys k JOIN environments e ON e.id = k.environment_id JOIN orgs o ON o.id = e.org_id
        WHERE k.secret_hash = ANY($1::bytea[])
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def find_principals(self, hashes: Sequence[bytes]) -> dict[bytes, Principal]:
        """Who holds the secrets of these SHA-256 hashes; hashes nobody holds are left out."""
        rows = await self._pool.fetch(self.FIND_PRINCIPALS, list(hashes), GLOBAL_SUBJECT)
        return {row["secret_hash"]: _principal(row) for row in rows}


def _principal(row: asyncpg.Record) -> Principal:
    home: str | None = row["home_region"]
    preferences = [home, *row["region_preferences"]] if home else row["region_preferences"]
    allowed: list[str] | None = row["allowed_models"]
    limits = json.loads(row["limits"])
    subjects = (GLOBAL_SUBJECT, row["org_id"], row["environment_id"], row["key_id"])
    return Principal(
        key_id=row["key_id"],
        environment_id=row["environment_id"],
        org_id=row["org_id"],
        role=row["role"],
        org_state=row["org_state"],
        environment_state=row["environment_state"],
        key_state=row["key_state"],
        expires_at=row["expires_at"],
        region_preferences=tuple(dict.fromkeys(preferences)),
        allowed_models=None if allowed is None else frozenset(allowed),
        plan=row["plan"],
        limits=tuple(
            LimitRow(layer, subject, **{name: limits.get(layer, {}).get(name) for name in LIMITS})
            for layer, subject in zip(LAYERS, subjects, strict=True)
        ),
    )
