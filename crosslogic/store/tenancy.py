"""Tenancy's SQL: orgs, environments, keys and their limits."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain import ids
from crosslogic.domain.credits import SIGN_UP_CENTS, CreditKind
from crosslogic.domain.errors import Rejected
from crosslogic.domain.tenancy import (
    GLOBAL_SUBJECT,
    LAYERS,
    LIMITS,
    Environment,
    Key,
    LimitRow,
    Org,
    Principal,
)
from crosslogic.store.audit import AuditStore


class TenancyStore:
    """Who may ask what. Every write leaves its audit row in the same transaction (H11); a write that would change
    nothing leaves none. New ids are the caller's, so that a repeated call can be told from a second one.
    """

    FIND_PRINCIPALS = """
        SELECT k.secret_hash, k.id AS key_id, k.role, k.state AS key_state, k.expires_at,
               e.id AS environment_id, e.state AS environment_state, e.home_region, e.allowed_models,
               o.id AS org_id, o.state AS org_state, o.plan, o.region_preferences, o.is_operator,
               (SELECT coalesce(json_object_agg(l.layer, row_to_json(l)), '{}')::text FROM limits l
                WHERE (l.layer, l.subject_id) IN
                      (('global', $2::uuid), ('org', o.id), ('environment', e.id), ('key', k.id))) AS limits
        FROM keys k JOIN environments e ON e.id = k.environment_id JOIN orgs o ON o.id = e.org_id
        WHERE k.secret_hash = ANY($1::bytea[])
    """

    # One for each org, so that the org's id is the credit's.
    INSERT_SIGN_UP_CREDIT = """
        INSERT INTO credits (id, org_id, kind, reason_key, cents, granted_at) VALUES ($1, $1, $2, $2, $3, now())
    """
    INSERT_ORG = """
        INSERT INTO orgs (id, name, plan, region_preferences, is_operator) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (name) DO NOTHING
    """
    GET_ORG = """
        SELECT id, name, state, plan, region_preferences, is_operator, created_at FROM orgs WHERE id = $1 OR name = $2
    """
    LIST_ORGS = """
        SELECT id, name, state, plan, region_preferences, is_operator, created_at FROM orgs
        WHERE ($1::uuid IS NULL OR id > $1) AND ($2::text IS NULL OR state = $2)
        ORDER BY id LIMIT $3
    """
    LOCK_ORG = """
        SELECT id, name, state, plan, region_preferences, is_operator, created_at FROM orgs WHERE id = $1 FOR UPDATE
    """
    UPDATE_ORG = "UPDATE orgs SET state = $2, plan = $3, region_preferences = $4, is_operator = $5 WHERE id = $1"

    INSERT_ENVIRONMENT = """
        INSERT INTO environments (id, org_id, name, home_region, allowed_models) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (org_id, name) DO NOTHING
    """
    GET_ENVIRONMENT = """
        SELECT e.id, e.org_id, o.name AS org_name, e.name, e.state, e.home_region, e.allowed_models, e.created_at
        FROM environments e JOIN orgs o ON o.id = e.org_id
        WHERE e.id = $1
    """
    FIND_ENVIRONMENT = """
        SELECT e.id, e.org_id, o.name AS org_name, e.name, e.state, e.home_region, e.allowed_models, e.created_at
        FROM environments e JOIN orgs o ON o.id = e.org_id
        WHERE e.org_id = $1 AND e.name = $2
    """
    LIST_ENVIRONMENTS = """
        SELECT e.id, e.org_id, o.name AS org_name, e.name, e.state, e.home_region, e.allowed_models, e.created_at
        FROM environments e JOIN orgs o ON o.id = e.org_id
        WHERE ($1::uuid IS NULL OR e.id > $1) AND ($2::uuid IS NULL OR e.org_id = $2)
          AND ($3::text IS NULL OR e.name = $3)
        ORDER BY e.id LIMIT $4
    """
    LOCK_ENVIRONMENT = """
        SELECT e.id, e.org_id, o.name AS org_name, e.name, e.state, e.home_region, e.allowed_models, e.created_at
        FROM environments e JOIN orgs o ON o.id = e.org_id
        WHERE e.id = $1 FOR UPDATE OF e
    """
    UPDATE_ENVIRONMENT = "UPDATE environments SET state = $2, home_region = $3, allowed_models = $4 WHERE id = $1"

    INSERT_KEY = """
        INSERT INTO keys (id, environment_id, secret_hash, hint, name, role, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (secret_hash) DO NOTHING
    """
    GET_KEY = """
        SELECT k.id, k.environment_id, e.name AS environment_name, e.org_id, o.name AS org_name, k.name, k.role,
               k.state, k.hint, k.expires_at, k.created_at
        FROM keys k JOIN environments e ON e.id = k.environment_id JOIN orgs o ON o.id = e.org_id
        WHERE k.id = $1
    """
    LIST_KEYS = """
        SELECT k.id, k.environment_id, e.name AS environment_name, e.org_id, o.name AS org_name, k.name, k.role,
               k.state, k.hint, k.expires_at, k.created_at
        FROM keys k JOIN environments e ON e.id = k.environment_id JOIN orgs o ON o.id = e.org_id
        WHERE ($1::uuid IS NULL OR k.id > $1) AND ($2::uuid IS NULL OR e.org_id = $2)
          AND ($3::uuid IS NULL OR e.id = $3)
        ORDER BY k.id LIMIT $4
    """
    LOCK_KEY = """
        SELECT k.id, k.environment_id, e.name AS environment_name, e.org_id, o.name AS org_name, k.name, k.role,
               k.state, k.hint, k.expires_at, k.created_at, now() AS now
        FROM keys k JOIN environments e ON e.id = k.environment_id JOIN orgs o ON o.id = e.org_id
        WHERE k.id = $1 FOR UPDATE OF k
    """
    UPDATE_KEY_STATE = "UPDATE keys SET state = $2 WHERE id = $1"
    UPDATE_KEY_EXPIRY = "UPDATE keys SET expires_at = $2 WHERE id = $1"

    GET_LIMITS = """
        SELECT requests_per_min, tokens_per_min, tokens_per_day, concurrency, monthly_spend_microdollars, dry_run
        FROM limits WHERE layer = $1 AND subject_id = $2
    """
    SET_LIMITS = """
        INSERT INTO limits AS known (layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency,
                                     monthly_spend_microdollars, dry_run)
        VALUES ($1, $2, $3, $4, $5, $6, $7, coalesce($9::text[], '{}'))
        ON CONFLICT (layer, subject_id) DO UPDATE SET
            requests_per_min = CASE WHEN 'requests_per_min' = ANY($8::text[])
                THEN excluded.requests_per_min ELSE known.requests_per_min END,
            tokens_per_min = CASE WHEN 'tokens_per_min' = ANY($8)
                THEN excluded.tokens_per_min ELSE known.tokens_per_min END,
            tokens_per_day = CASE WHEN 'tokens_per_day' = ANY($8)
                THEN excluded.tokens_per_day ELSE known.tokens_per_day END,
            concurrency = CASE WHEN 'concurrency' = ANY($8)
                THEN excluded.concurrency ELSE known.concurrency END,
            monthly_spend_microdollars = CASE WHEN 'monthly_spend_microdollars' = ANY($8)
                THEN excluded.monthly_spend_microdollars ELSE known.monthly_spend_microdollars END,
            dry_run = coalesce($9, known.dry_run)
        RETURNING requests_per_min, tokens_per_min, tokens_per_day, concurrency, monthly_spend_microdollars, dry_run
    """
    COPY_LIMITS = """
        INSERT INTO limits (layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency, dry_run)
        SELECT layer, $2, requests_per_min, tokens_per_min, tokens_per_day, concurrency, dry_run
        FROM limits WHERE layer = 'key' AND subject_id = $1
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def find_principals(self, hashes: Sequence[bytes]) -> dict[bytes, Principal]:
        """Who holds the secrets of these SHA-256 hashes; hashes nobody holds are left out."""
        rows = await self._pool.fetch(self.FIND_PRINCIPALS, list(hashes), GLOBAL_SUBJECT)
        return {row["secret_hash"]: _principal(row) for row in rows}

    # Orgs

    async def create_org(
        self,
        org_id: UUID,
        name: str,
        *,
        plan: str = "serverless",
        region_preferences: Sequence[str] = (),
        is_operator: bool = False,
        actor: str,
    ) -> tuple[Org, bool]:
        """The org of that name, and whether this call made it. An existing one is returned as it is."""
        async with self._pool.acquire() as connection, connection.transaction():
            status = await connection.execute(
                self.INSERT_ORG, org_id, name, plan, list(region_preferences), is_operator
            )
            is_new = status == "INSERT 0 1"
            row = await connection.fetchrow(self.GET_ORG, None, name)
            assert row is not None
            if is_new:
                await connection.execute(self.INSERT_SIGN_UP_CREDIT, org_id, CreditKind.SIGN_UP.value, SIGN_UP_CENTS)
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="org.create",
                    subject=ids.ORG.show(org_id),
                    details={
                        "name": name,
                        "plan": plan,
                        "region_preferences": list(region_preferences),
                        "is_operator": is_operator,
                    },
                )
        return _org(row), is_new

    async def get_org(self, *, org_id: UUID | None = None, name: str | None = None) -> Org:
        """By id or by name. Raises Rejected 404."""
        row = await self._pool.fetchrow(self.GET_ORG, org_id, name)
        if row is None:
            raise _no_such("org", name if org_id is None else ids.ORG.show(org_id))
        return _org(row)

    async def list_orgs(self, *, after: UUID | None = None, state: str | None = None, limit: int = 50) -> list[Org]:
        """Orgs with an id above `after`, oldest first."""
        return [_org(row) for row in await self._pool.fetch(self.LIST_ORGS, after, state, limit)]

    async def update_org(self, org_id: UUID, changes: Mapping[str, Any], *, actor: str) -> Org:
        """Set any of `state`, `plan`, `region_preferences` and `is_operator`. Raises Rejected 404."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK_ORG, org_id)
            if row is None:
                raise _no_such("org", ids.ORG.show(org_id))
            before = dict(row)
            after = before | dict(changes)
            if after == before:
                return _org(before)
            await connection.execute(
                self.UPDATE_ORG,
                org_id,
                after["state"],
                after["plan"],
                list(after["region_preferences"]),
                after["is_operator"],
            )
            await AuditStore.append(
                connection,
                actor=actor,
                action="org.update",
                subject=ids.ORG.show(org_id),
                details={name: {"from": before[name], "to": after[name]} for name in changes},
            )
        return _org(after)

    # Environments

    async def create_environment(
        self,
        environment_id: UUID,
        org_id: UUID,
        name: str,
        *,
        home_region: str | None = None,
        allowed_models: Sequence[str] | None = None,
        actor: str,
    ) -> tuple[Environment, bool]:
        """The org's environment of that name, and whether this call made it. Raises Rejected 404 without the org."""
        allowed = None if allowed_models is None else list(allowed_models)
        async with self._pool.acquire() as connection, connection.transaction():
            if await connection.fetchrow(self.GET_ORG, org_id, None) is None:
                raise _no_such("org", ids.ORG.show(org_id))
            status = await connection.execute(
                self.INSERT_ENVIRONMENT, environment_id, org_id, name, home_region, allowed
            )
            is_new = status == "INSERT 0 1"
            row = await connection.fetchrow(self.FIND_ENVIRONMENT, org_id, name)
            assert row is not None
            if is_new:
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="environment.create",
                    subject=ids.ENVIRONMENT.show(environment_id),
                    details={
                        "org": ids.ORG.show(org_id),
                        "name": name,
                        "home_region": home_region,
                        "allowed_models": allowed,
                    },
                )
        return _environment(row), is_new

    async def get_environment(self, environment_id: UUID) -> Environment:
        """By id. Raises Rejected 404."""
        row = await self._pool.fetchrow(self.GET_ENVIRONMENT, environment_id)
        if row is None:
            raise _no_such("environment", ids.ENVIRONMENT.show(environment_id))
        return _environment(row)

    async def list_environments(
        self, *, after: UUID | None = None, org_id: UUID | None = None, name: str | None = None, limit: int = 50
    ) -> list[Environment]:
        """Environments with an id above `after`, oldest first."""
        rows = await self._pool.fetch(self.LIST_ENVIRONMENTS, after, org_id, name, limit)
        return [_environment(row) for row in rows]

    async def update_environment(self, environment_id: UUID, changes: Mapping[str, Any], *, actor: str) -> Environment:
        """Set any of `state`, `home_region` and `allowed_models` (None: all). Raises Rejected 404."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK_ENVIRONMENT, environment_id)
            if row is None:
                raise _no_such("environment", ids.ENVIRONMENT.show(environment_id))
            before = dict(row)
            after = before | dict(changes)
            if after == before:
                return _environment(before)
            await connection.execute(
                self.UPDATE_ENVIRONMENT, environment_id, after["state"], after["home_region"], after["allowed_models"]
            )
            await AuditStore.append(
                connection,
                actor=actor,
                action="environment.update",
                subject=ids.ENVIRONMENT.show(environment_id),
                details={name: {"from": before[name], "to": after[name]} for name in changes},
            )
        return _environment(after)

    # Keys

    async def create_key(
        self,
        key_id: UUID,
        environment_id: UUID,
        *,
        secret_hash: bytes,
        hint: str,
        name: str = "",
        role: str = "developer",
        expires_at: datetime | None = None,
        actor: str,
    ) -> tuple[Key, bool]:
        """The new key; False with the one that was asked for where this secret has a key already (the demo's has).

        Raises Rejected 404 without the environment.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            if await connection.fetchrow(self.GET_ENVIRONMENT, environment_id) is None:
                raise _no_such("environment", ids.ENVIRONMENT.show(environment_id))
            status = await connection.execute(
                self.INSERT_KEY, key_id, environment_id, secret_hash, hint, name, role, expires_at
            )
            is_new = status == "INSERT 0 1"
            if not is_new:
                found = await connection.fetchrow(self.FIND_PRINCIPALS, [secret_hash], GLOBAL_SUBJECT)
                assert found is not None
                key_id = found["key_id"]
            row = await connection.fetchrow(self.GET_KEY, key_id)
            assert row is not None
            if is_new:
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="key.create",
                    subject=ids.KEY.show(key_id),
                    details={
                        "environment": ids.ENVIRONMENT.show(environment_id),
                        "name": name,
                        "role": role,
                        "expires_at": _instant(expires_at),
                    },
                )
        return _key(row), is_new

    async def get_key(self, key_id: UUID) -> Key:
        """By id. Raises Rejected 404."""
        row = await self._pool.fetchrow(self.GET_KEY, key_id)
        if row is None:
            raise _no_such("key", ids.KEY.show(key_id))
        return _key(row)

    async def list_keys(
        self,
        *,
        after: UUID | None = None,
        org_id: UUID | None = None,
        environment_id: UUID | None = None,
        limit: int = 50,
    ) -> list[Key]:
        """Keys with an id above `after`, oldest first."""
        rows = await self._pool.fetch(self.LIST_KEYS, after, org_id, environment_id, limit)
        return [_key(row) for row in rows]

    async def set_key_state(self, key_id: UUID, state: str, *, actor: str) -> Key:
        """Suspend, resume (`active`) or revoke. Raises Rejected 404, and 409 for a key that was revoked."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK_KEY, key_id)
            if row is None:
                raise _no_such("key", ids.KEY.show(key_id))
            if row["state"] == state:
                return _key(row)
            _refuse_revoked(row)
            await connection.execute(self.UPDATE_KEY_STATE, key_id, state)
            await AuditStore.append(
                connection,
                actor=actor,
                action="key.update",
                subject=ids.KEY.show(key_id),
                details={"state": {"from": row["state"], "to": state}},
            )
        return _key(dict(row) | {"state": state})

    async def rotate_key(
        self,
        key_id: UUID,
        new_key_id: UUID,
        *,
        secret_hash: bytes,
        hint: str,
        overlap: timedelta,
        expires_at: datetime | None,
        actor: str,
    ) -> tuple[Key, Key]:
        """The old key, which now expires after `overlap` unless it would sooner, and its successor.

        The successor has the old one's environment, name, role and limits. Raises Rejected 404, and 409 for a key that
        is not in use (suspended, revoked or expired).
        """
        async with self._pool.acquire() as connection, connection.transaction():
            old = await connection.fetchrow(self.LOCK_KEY, key_id)
            if old is None:
                raise _no_such("key", ids.KEY.show(key_id))
            _refuse_revoked(old)
            if old["state"] != "active" or (old["expires_at"] is not None and old["expires_at"] <= old["now"]):
                raise Rejected(
                    f"Key {ids.KEY.show(key_id)} is suspended or has expired, so there is nothing to hand over. "
                    "Resume it first, or create a new key.",
                    status=409,
                    code="key_not_active",
                )
            ends_at: datetime = old["now"] + overlap
            if old["expires_at"] is not None:
                ends_at = min(ends_at, old["expires_at"])
            await connection.execute(
                self.INSERT_KEY,
                new_key_id,
                old["environment_id"],
                secret_hash,
                hint,
                old["name"],
                old["role"],
                expires_at,
            )
            await connection.execute(self.COPY_LIMITS, key_id, new_key_id)
            await connection.execute(self.UPDATE_KEY_EXPIRY, key_id, ends_at)
            new = await connection.fetchrow(self.GET_KEY, new_key_id)
            assert new is not None
            await AuditStore.append(
                connection,
                actor=actor,
                action="key.rotate",
                subject=ids.KEY.show(key_id),
                details={
                    "successor": ids.KEY.show(new_key_id),
                    "expires_at": {"from": _instant(old["expires_at"]), "to": _instant(ends_at)},
                    "successor_expires_at": _instant(expires_at),
                },
            )
        return _key(dict(old) | {"expires_at": ends_at}), _key(new)

    # Limits

    async def get_limits(self, layer: str, subject_id: UUID) -> LimitRow:
        """What is set for a subject; all None where nothing is. Raises Rejected 404 for an unknown subject."""
        await self._check_subject(self._pool, layer, subject_id)
        row = await self._pool.fetchrow(self.GET_LIMITS, layer, subject_id)
        return _limit_row(layer, subject_id, dict(row or {}))

    async def set_limits(
        self,
        layer: str,
        subject_id: UUID,
        changes: Mapping[str, int | None],
        *,
        dry_run: Collection[str] | None = None,
        actor: str,
    ) -> LimitRow:
        """Set the given limits (None: back to the default, -1: none) and keep the others.

        `dry_run` names the limits that only report; None leaves that as it is.

        Raises Rejected 404 for an unknown subject, 400 for a spend limit on anything but an org.
        """
        if layer != "org" and changes.get("monthly_spend_microdollars") is not None:
            raise Rejected(
                "Only an org can have a monthly spend limit.", code="invalid_limit", param="monthly_spend_microdollars"
            )
        async with self._pool.acquire() as connection, connection.transaction():
            await self._check_subject(connection, layer, subject_id)
            row = await connection.fetchrow(
                self.SET_LIMITS,
                layer,
                subject_id,
                *(changes.get(name) for name in LIMITS),
                list(changes),
                None if dry_run is None else sorted(dry_run),
            )
            assert row is not None
            kind = {"org": ids.ORG, "environment": ids.ENVIRONMENT, "key": ids.KEY}.get(layer)
            await AuditStore.append(
                connection,
                actor=actor,
                action="limits.set",
                subject=kind.show(subject_id) if kind else layer,
                details=dict(changes) if dry_run is None else {**changes, "dry_run": sorted(dry_run)},
            )
        return _limit_row(layer, subject_id, dict(row))

    async def _check_subject(
        self,
        connection: asyncpg.Pool | asyncpg.Connection | asyncpg.pool.PoolConnectionProxy,
        layer: str,
        subject_id: UUID,
    ) -> None:
        if layer == "org":
            found, kind = await connection.fetchrow(self.GET_ORG, subject_id, None), ids.ORG
        elif layer == "environment":
            found, kind = await connection.fetchrow(self.GET_ENVIRONMENT, subject_id), ids.ENVIRONMENT
        elif layer == "key":
            found, kind = await connection.fetchrow(self.GET_KEY, subject_id), ids.KEY
        elif layer == "global" and subject_id == GLOBAL_SUBJECT:
            return
        else:
            raise Rejected(f"There is no such layer of limits: {layer[:32]!r}.", code="invalid_layer", param="layer")
        if found is None:
            raise _no_such(layer, kind.show(subject_id))


def _no_such(noun: str, shown: str | None) -> Rejected:
    return Rejected(
        f"There is no {noun} {shown}. List the {noun}s to see which there are.", status=404, code=f"{noun}_not_found"
    )


def _refuse_revoked(key: Mapping[str, Any] | asyncpg.Record) -> None:
    if key["state"] == "revoked":
        raise Rejected(
            f"Key {ids.KEY.show(key['id'])} is revoked, which is for ever. Create a new key.",
            status=409,
            code="key_revoked",
        )


def _instant(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _org(row: Mapping[str, Any] | asyncpg.Record) -> Org:
    return Org(
        id=row["id"],
        name=row["name"],
        state=row["state"],
        plan=row["plan"],
        region_preferences=tuple(row["region_preferences"]),
        created_at=row["created_at"],
        is_operator=row["is_operator"],
    )


def _environment(row: Mapping[str, Any] | asyncpg.Record) -> Environment:
    allowed: Sequence[str] | None = row["allowed_models"]
    return Environment(
        id=row["id"],
        org_id=row["org_id"],
        org_name=row["org_name"],
        name=row["name"],
        state=row["state"],
        home_region=row["home_region"],
        allowed_models=None if allowed is None else tuple(allowed),
        created_at=row["created_at"],
    )


def _key(row: Mapping[str, Any] | asyncpg.Record) -> Key:
    return Key(
        id=row["id"],
        environment_id=row["environment_id"],
        environment_name=row["environment_name"],
        org_id=row["org_id"],
        org_name=row["org_name"],
        name=row["name"],
        role=row["role"],
        state=row["state"],
        hint=row["hint"],
        expires_at=row["expires_at"],
        created_at=row["created_at"],
    )


def _limit_row(layer: str, subject_id: UUID, row: Mapping[str, Any]) -> LimitRow:
    return LimitRow(
        layer, subject_id, **{name: row.get(name) for name in LIMITS}, dry_run=frozenset(row.get("dry_run", ()))
    )


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
            _limit_row(layer, subject, limits.get(layer, {})) for layer, subject in zip(LAYERS, subjects, strict=True)
        ),
        is_operator=row["is_operator"],
    )
