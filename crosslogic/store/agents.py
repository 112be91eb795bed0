"""Node agents: what lets them in, the certificates they were given, and our certificate authorities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain.certificates import Authority
from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import FINAL_STATES, NodeState
from crosslogic.store.audit import AuditStore


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a join token stands for. `model` and `region` are None for a node that we launch: its row has them."""

    node_id: UUID
    expires_at: datetime
    org_id: UUID | None = None
    model: str | None = None
    region: str | None = None


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """What is remembered of a certificate."""

    serial: str
    authority_id: int
    issued_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Agent:
    """A node's agent as it registered, with its newest certificate and the state of its node, if that has a row."""

    node_id: UUID
    org_id: UUID | None
    endpoint: str
    engine: str
    version: str
    registered_at: datetime
    renewal_asked_at: datetime | None
    logs_asked_at: datetime | None
    logs_at: datetime | None
    notice: str
    notice_at: datetime | None
    certificate_issued_at: datetime | None
    certificate_expires_at: datetime | None
    node_state: NodeState | None

    @property
    def is_ended(self) -> bool:
        """Its node has ended: nothing it says counts any more, and it gets no certificate."""
        return self.node_state in FINAL_STATES

    @property
    def owes_renewal(self) -> bool:
        """Was it told to renew its certificate, and has not?"""
        asked, issued = self.renewal_asked_at, self.certificate_issued_at
        return asked is not None and (issued is None or issued < asked)

    @property
    def owes_logs(self) -> bool:
        """Was it asked for its logs, and has not sent them?"""
        return self.logs_asked_at is not None and (self.logs_at is None or self.logs_at < self.logs_asked_at)


class AgentStore:
    """Reads and writes what is known of agents."""

    # Some number of ours: of several processes that find no authority, one makes it.
    LOCK_AUTHORITIES = "SELECT pg_advisory_xact_lock(7205759403)"
    SELECT_AUTHORITIES = "SELECT * FROM authorities ORDER BY id"
    INSERT_AUTHORITY = """
        INSERT INTO authorities (id, certificate, sealed_key, created_at, issues_from, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6)
    """
    INVITE = """
        INSERT INTO join_tokens (token_hash, node_id, org_id, model, region, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT DO NOTHING
    """
    USE_TOKEN = """
        UPDATE join_tokens SET used_at = coalesce(used_at, now()), key_hash = $3
        WHERE token_hash = $1 AND node_id = $2 AND (key_hash IS NULL OR key_hash = $3)
          AND (used_at IS NOT NULL OR expires_at > now())
        RETURNING node_id, expires_at, org_id, model, region
    """
    SELECT_TOKEN = """
        SELECT used_at IS NOT NULL AS is_used FROM join_tokens WHERE token_hash = $1 AND node_id = $2
    """
    REGISTER = """
        INSERT INTO agents (node_id, org_id, endpoint, engine, version) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (node_id) DO UPDATE SET endpoint = $3, engine = $4, version = $5
    """
    MARK_NODE = """
        UPDATE nodes SET has_agent = TRUE, generation = generation + 1, changed_at = now()
        WHERE id = $1 AND NOT has_agent
    """
    ADD_CERTIFICATE = """
        INSERT INTO agent_certificates (serial, node_id, authority_id, issued_at, expires_at)
        VALUES ($1, $2, $3, $4, $5)
    """
    SELECT = """
        SELECT a.node_id, a.org_id, a.endpoint, a.engine, a.version, a.registered_at, a.renewal_asked_at,
               a.logs_asked_at, a.logs_at, a.notice, a.notice_at, c.issued_at AS certificate_issued_at,
               c.expires_at AS certificate_expires_at, n.state AS node_state
        FROM agents a
        LEFT JOIN nodes n ON n.id = a.node_id
        LEFT JOIN LATERAL (
            SELECT issued_at, expires_at FROM agent_certificates
            WHERE node_id = a.node_id ORDER BY issued_at DESC LIMIT 1
        ) c ON TRUE
        WHERE ($1::uuid IS NULL OR a.node_id = $1) AND ($2::uuid IS NULL OR a.node_id < $2)
          AND ($3 OR n.ended_at IS NULL)
        ORDER BY a.node_id DESC LIMIT $4
    """
    IS_AGENT = "SELECT 1 FROM agents WHERE node_id = $1"
    ASK_LOGS = "UPDATE agents SET logs_asked_at = now() WHERE node_id = $1"
    ASK_RENEWAL = "UPDATE agents SET renewal_asked_at = now() WHERE node_id = $1"
    ASK_OVERDUE = """
        UPDATE agents a SET renewal_asked_at = now()
        FROM (SELECT DISTINCT ON (node_id) node_id, issued_at, expires_at FROM agent_certificates
              ORDER BY node_id, issued_at DESC) c
        WHERE c.node_id = a.node_id AND now() >= c.issued_at + (c.expires_at - c.issued_at) * $1::float8
          AND (a.renewal_asked_at IS NULL OR a.renewal_asked_at < c.issued_at)
          AND NOT EXISTS (SELECT 1 FROM nodes n WHERE n.id = a.node_id AND n.ended_at IS NOT NULL)
        RETURNING a.node_id
    """
    SELECT_EXPIRED = """
        SELECT a.node_id FROM agents a
        LEFT JOIN nodes n ON n.id = a.node_id
        WHERE n.ended_at IS NULL AND NOT EXISTS (
            SELECT 1 FROM agent_certificates c WHERE c.node_id = a.node_id AND c.expires_at > now()
        )
        ORDER BY a.node_id LIMIT 100
    """
    PRUNE_CERTIFICATES = "DELETE FROM agent_certificates WHERE expires_at < now() - interval '30 days'"
    PRUNE_TOKENS = "DELETE FROM join_tokens WHERE used_at IS NULL AND expires_at < now() - interval '30 days'"
    PUT_LOGS = "UPDATE agents SET logs = $2, logs_at = now() WHERE node_id = $1"
    SELECT_LOGS = "SELECT logs FROM agents WHERE node_id = $1"
    NOTE_NOTICE = """
        UPDATE agents SET notice = $2, notice_at = coalesce(notice_at, now()) WHERE node_id = $1
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    # Authorities

    async def list_authorities(self) -> list[Authority]:
        """All of them, oldest first."""
        return [Authority(**row) for row in await self._pool.fetch(self.SELECT_AUTHORITIES)]

    async def add_authority(self, make: Callable[[Sequence[Authority]], Authority | None]) -> list[Authority]:
        """Add what `make` makes of those that there are, if it makes one; no other process adds one meanwhile."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(self.LOCK_AUTHORITIES)
            known = [Authority(**row) for row in await connection.fetch(self.SELECT_AUTHORITIES)]
            made = make(known)
            if made is None:
                return known
            await connection.execute(
                self.INSERT_AUTHORITY,
                made.id,
                made.certificate,
                made.sealed_key,
                made.created_at,
                made.issues_from,
                made.expires_at,
            )
            await AuditStore.append(
                connection,
                actor="authority",
                action="authority.create",
                subject=f"authority/{made.id}",
                details={"issues_from": made.issues_from.isoformat(), "expires_at": made.expires_at.isoformat()},
            )
            return [*known, made]

    # Registration

    async def invite(self, token: str, invitation: Invitation, *, actor: str) -> None:
        """Let whoever has the token register this node. Repeating it changes nothing.

        Raises Rejected when the org, model or region is not there.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            try:
                status = await connection.execute(
                    self.INVITE,
                    _hash(token),
                    invitation.node_id,
                    invitation.org_id,
                    invitation.model,
                    invitation.region,
                    invitation.expires_at,
                )
            except asyncpg.ForeignKeyViolationError as error:
                raise Rejected(
                    f"The invitation names something that is not there ({error.constraint_name})."
                ) from error
            if status.endswith(" 1"):
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="agent.invite",
                    subject=NODE.show(invitation.node_id),
                    details={"model": invitation.model, "region": invitation.region},
                )

    async def use_token(self, token: str, node_id: UUID, key_hash: bytes) -> Invitation:
        """What the token stands for; from now on it is this key's. Raises Rejected (401) if it lets nobody in."""
        row = await self._pool.fetchrow(self.USE_TOKEN, _hash(token), node_id, key_hash)
        if row is not None:
            return Invitation(**row)
        known = await self._pool.fetchrow(self.SELECT_TOKEN, _hash(token), node_id)
        if known is None:
            problem = "It is not this node's, or was never given out"
        elif known["is_used"]:
            problem = "It was used already, with another key"
        else:
            problem = "It has expired"
        raise Rejected(
            f"The join token lets nobody in. {problem}; get a new one with `nodes invite`.",
            status=401,
            code="invalid_join_token",
        )

    async def register(
        self,
        node_id: UUID,
        certificate: IssuedCertificate,
        *,
        org_id: UUID | None,
        endpoint: str,
        engine: str,
        version: str,
    ) -> None:
        """Write down an agent and its first certificate; its node's row, if there is one, says so from now on."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(self.REGISTER, node_id, org_id, endpoint, engine, version)
            await connection.execute(self.MARK_NODE, node_id)
            await connection.execute(self.ADD_CERTIFICATE, *_columns(node_id, certificate))
            await AuditStore.append(
                connection,
                actor=f"agent/{NODE.show(node_id)}",
                action="agent.register",
                subject=NODE.show(node_id),
                details={"serial": certificate.serial, "engine": engine, "version": version},
            )

    async def add_certificate(self, node_id: UUID, certificate: IssuedCertificate) -> None:
        """Remember a renewed certificate."""
        await self._pool.execute(self.ADD_CERTIFICATE, *_columns(node_id, certificate))

    # Reading

    async def find(self, node_id: UUID) -> Agent | None:
        """The agent of a node, or None."""
        row = await self._pool.fetchrow(self.SELECT, node_id, None, True, 1)
        return None if row is None else _agent(row)

    async def get(self, node_id: UUID) -> Agent:
        """The agent of a node. Raises Rejected (404) when it has none."""
        agent = await self.find(node_id)
        if agent is None:
            raise Rejected(
                f"No agent of node {NODE.show(node_id)} has registered; list them with `agents list`.",
                status=404,
                code="unknown_agent",
            )
        return agent

    async def list_page(self, *, before: UUID | None, limit: int, include_ended: bool) -> list[Agent]:
        """Agents, newest node first."""
        rows = await self._pool.fetch(self.SELECT, None, before, include_ended, limit)
        return [_agent(row) for row in rows]

    async def is_agent(self, node_id: UUID) -> bool:
        """Has an agent of this node registered?"""
        return await self._pool.fetchval(self.IS_AGENT, node_id) is not None

    async def read_logs(self, node_id: UUID) -> str:
        """The log lines that the agent sent last; empty: none yet."""
        return await self._pool.fetchval(self.SELECT_LOGS, node_id) or ""

    # What agents are asked, and what they answer

    async def ask_logs(self, node_id: UUID) -> None:
        """Have the agent send its engine's latest log lines."""
        await self._pool.execute(self.ASK_LOGS, node_id)

    async def ask_renewal(self, node_id: UUID) -> None:
        """Have the agent renew its certificate now, with a new key."""
        await self._pool.execute(self.ASK_RENEWAL, node_id)

    async def ask_overdue(self, share: float) -> list[UUID]:
        """Ask all who should have renewed by themselves: more than this share of the certificate's life is over."""
        return [row["node_id"] for row in await self._pool.fetch(self.ASK_OVERDUE, share)]

    async def list_expired(self) -> list[UUID]:
        """Nodes that have not ended and whose agents have no valid certificate; a hundred at most."""
        return [row["node_id"] for row in await self._pool.fetch(self.SELECT_EXPIRED)]

    async def prune(self) -> None:
        """Forget certificates and unused tokens that expired a month ago."""
        await self._pool.execute(self.PRUNE_CERTIFICATES)
        await self._pool.execute(self.PRUNE_TOKENS)

    async def put_logs(self, node_id: UUID, logs: str) -> None:
        """Keep the log lines that an agent sent, in place of those before."""
        await self._pool.execute(self.PUT_LOGS, node_id, logs)

    async def note_notice(self, node_id: UUID, notice: str) -> None:
        """Remember that the cloud will take the machine."""
        await self._pool.execute(self.NOTE_NOTICE, node_id, notice)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _columns(node_id: UUID, certificate: IssuedCertificate) -> tuple[object, ...]:
    return (
        certificate.serial,
        node_id,
        certificate.authority_id,
        certificate.issued_at,
        certificate.expires_at,
    )


def _agent(row: asyncpg.Record) -> Agent:
    fields: dict[str, Any] = dict(row)
    state: str | None = fields["node_state"]
    fields["node_state"] = None if state is None else NodeState(state)
    return Agent(**fields)
