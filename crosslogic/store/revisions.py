"""Revisions of deployments, and the roll-out that is on: at most one for each deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeState
from crosslogic.domain.revision import GoldenPrompt, Match, RevisionSpec
from crosslogic.domain.rollout import RevisionFigures, RolloutNode
from crosslogic.store.audit import AuditStore

# Requests that a comparison looks at: the newest, so that it costs the same on a busy day.
MOST_COMPARED = 20_000


@dataclass(frozen=True, slots=True)
class Revision:
    """A row. `state` is `candidate`, `serving`, `retired` (it served before) or `returned` (its roll-out went back)."""

    deployment: str
    revision: int
    spec: RevisionSpec
    state: str
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A roll-out's hold on its deployment. `step` numbers the last write that was made under it."""

    from_revision: int
    step: int
    traffic_bp: int
    is_committed: bool


class RevisionStore:
    """Writes are fenced: only the workflow that holds a deployment changes its traffic, in the order of its steps."""

    LOCK = """
        SELECT revision, rollout_revision, rollout_from, rollout_workflow_id, rollout_step, traffic_bp
        FROM deployments WHERE name = $1 FOR UPDATE
    """
    INSERT = """
        INSERT INTO deployment_revisions (deployment, revision, spec, created_by)
        SELECT $1, coalesce(max(revision), 0) + 1, $2::text::jsonb, $3 FROM deployment_revisions WHERE deployment = $1
        RETURNING deployment, revision, spec::text AS spec, state, created_at, created_by
    """
    SELECT = """
        SELECT deployment, revision, spec::text AS spec, state, created_at, created_by
        FROM deployment_revisions WHERE deployment = $1 AND revision = $2
    """
    LIST = """
        SELECT deployment, revision, spec::text AS spec, state, created_at, created_by
        FROM deployment_revisions WHERE deployment = $1 AND ($2::integer IS NULL OR revision < $2)
        ORDER BY revision DESC LIMIT $3
    """
    SELECT_IN_USE = """
        SELECT r.deployment, r.revision, r.spec::text AS spec
        FROM deployment_revisions r JOIN deployments d ON d.name = r.deployment
        WHERE r.revision IN (d.revision, d.rollout_revision, d.rollout_from)
    """
    SET_STATE = "UPDATE deployment_revisions SET state = $3 WHERE deployment = $1 AND revision = $2 AND state <> $3"
    CLAIM = """
        UPDATE deployments SET rollout_revision = $2, rollout_from = revision, rollout_workflow_id = $3, traffic_bp = 0
        WHERE name = $1
    """
    TAKE_OVER = "UPDATE deployments SET rollout_workflow_id = $2 WHERE name = $1"
    SHIFT = """
        UPDATE deployments SET traffic_bp = $5, rollout_step = $4, revision = $6
        WHERE name = $1 AND rollout_revision = $2 AND rollout_workflow_id = $3 AND rollout_step < $4
    """
    RELEASE = """
        UPDATE deployments
        SET rollout_revision = NULL, rollout_from = NULL, rollout_workflow_id = NULL, traffic_bp = 0
        WHERE name = $1 AND rollout_revision = $2 AND rollout_workflow_id = $3
    """
    SELECT_NODES = """
        SELECT id, region, revision, state, workflow_id, is_held, provider, capacity_tokens_per_s,
               price_microdollars_per_h, tombstoned_at
        FROM nodes WHERE deployment = $1 AND (ended_at IS NULL OR id = ANY($2::uuid[]))
        ORDER BY id
    """
    # What the deployment's own nodes need not back, because others that serve the model there do.
    SELECT_OTHERS = """
        SELECT region, sum(capacity_tokens_per_s)::bigint AS tokens_per_s FROM nodes
        WHERE model = $1 AND deployment IS DISTINCT FROM $2 AND state = 'ready' AND NOT is_held
          AND tombstoned_at IS NULL
        GROUP BY region
    """
    # A try that another node made good counts against the node that failed it: clients saw nothing, the gate must.
    COMPARE = """
        WITH recent AS (
            SELECT id, node_id, outcome, is_streamed, latency_ms, ttft_ms, completion_tokens, tries, continuations
            FROM usage_records WHERE id >= $2 ORDER BY id DESC LIMIT $3
        ), answered AS (
            SELECT n.revision, count(*) FILTER (WHERE r.outcome IN ('completed', 'client_gone')) AS requests,
                   percentile_cont(0.5) WITHIN GROUP (ORDER BY r.ttft_ms::float8)
                       FILTER (WHERE r.is_streamed AND r.tries = 1) AS ttft_ms,
                   percentile_cont(0.5) WITHIN GROUP
                       (ORDER BY (r.latency_ms - CASE WHEN r.is_streamed THEN coalesce(r.ttft_ms, 0) ELSE 0 END)::float8
                                 / r.completion_tokens)
                       FILTER (WHERE r.completion_tokens > 0 AND r.tries = 1 AND r.outcome = 'completed')
                       AS ms_per_token
            FROM recent r JOIN nodes n ON n.id = r.node_id WHERE n.deployment = $1 GROUP BY n.revision
        ), failed AS (
            SELECT n.revision, count(*) AS errors
            FROM recent r
            JOIN request_decisions d USING (id)
            CROSS JOIN LATERAL jsonb_array_elements(d.decision -> 0) AS try
            JOIN unnest($4::text[], $5::uuid[]) AS known (shown, id) ON known.shown = try ->> 0
            JOIN nodes n ON n.id = known.id
            WHERE coalesce(try ->> -1, '') NOT IN ('', 'busy')
            GROUP BY n.revision
        )
        SELECT coalesce(a.revision, f.revision) AS revision, coalesce(a.requests, 0) AS requests,
               coalesce(f.errors, 0) AS errors, coalesce(a.ttft_ms, 0) AS ttft_ms,
               coalesce(a.ms_per_token, 0) AS ms_per_token
        FROM answered a FULL JOIN failed f USING (revision)
    """
    SELECT_OF_DEPLOYMENT = "SELECT id FROM nodes WHERE deployment = $1 AND (ended_at IS NULL OR ended_at > $2)"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def create(self, deployment: str, spec: RevisionSpec, *, actor: str) -> Revision:
        """Write down the deployment's next revision. Raises Rejected (404) where there is no such deployment."""
        async with self._pool.acquire() as connection, connection.transaction():
            if await connection.fetchrow(self.LOCK, deployment) is None:
                raise _unknown(deployment)
            row = await connection.fetchrow(self.INSERT, deployment, json.dumps(asdict(spec)), actor)
            assert row is not None
            await AuditStore.append(
                connection,
                actor=actor,
                action="revision.create",
                subject=deployment,
                details={"revision": row["revision"], "spec": asdict(spec)},
            )
        return _revision(row)

    async def get(self, deployment: str, revision: int) -> Revision:
        """One revision. Raises Rejected (404) when there is none."""
        row = await self._pool.fetchrow(self.SELECT, deployment, revision)
        if row is None:
            raise _unknown_revision(deployment, revision)
        return _revision(row)

    async def list_of(self, deployment: str, *, before: int | None = None, limit: int = 50) -> list[Revision]:
        """A deployment's revisions, newest first, with a number below `before`."""
        return [_revision(row) for row in await self._pool.fetch(self.LIST, deployment, before, limit)]

    async def claim(self, deployment: str, revision: int, workflow_id: str, *, orphan_of: str = "") -> Claim:
        """Begin the roll-out, or find it begun by this workflow or by `orphan_of`, which is gone.

        Raises Rejected: 404 for what is not there, 409 `rollout_in_progress` while another workflow holds the
        deployment, 409 `already_serving` for the revision that serves.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK, deployment)
            if row is None:
                raise _unknown(deployment)
            if await connection.fetchrow(self.SELECT, deployment, revision) is None:
                raise _unknown_revision(deployment, revision)
            holder = row["rollout_workflow_id"]
            if holder is None and orphan_of:
                raise Rejected(f"No roll-out of {deployment} is on.", status=409, code="no_rollout")
            if holder is None:
                if row["revision"] == revision:
                    raise Rejected(
                        f"Deployment {deployment} serves revision {revision} already; there is nothing to roll out.",
                        status=409,
                        code="already_serving",
                    )
                await connection.execute(self.CLAIM, deployment, revision, workflow_id)
                return Claim(row["revision"], row["rollout_step"], 0, is_committed=False)
            if row["rollout_revision"] != revision or holder not in (workflow_id, orphan_of):
                raise Rejected(
                    f"Workflow {holder!r} is rolling out revision {row['rollout_revision']} of {deployment}. Wait for "
                    "it, or send it the signal abort.",
                    status=409,
                    code="rollout_in_progress",
                )
            if holder != workflow_id:
                await connection.execute(self.TAKE_OVER, deployment, workflow_id)
            return Claim(
                row["rollout_from"],
                row["rollout_step"],
                row["traffic_bp"],
                is_committed=row["revision"] == revision,
            )

    async def shift(
        self, deployment: str, revision: int, workflow_id: str, step: int, traffic_bp: int, serving: int
    ) -> bool:
        """Give the revision a share, and name the one that serves; False for a write that a later one has overtaken."""
        status = await self._pool.execute(self.SHIFT, deployment, revision, workflow_id, step, traffic_bp, serving)
        return status == "UPDATE 1"

    async def finish(self, deployment: str, revision: int, workflow_id: str, details: dict[str, Any]) -> None:
        """End the roll-out: the revision that serves now is all there is. Repeating it changes nothing."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK, deployment)
            if row is None or (row["rollout_revision"], row["rollout_workflow_id"]) != (revision, workflow_id):
                return
            is_through = row["revision"] == revision
            await connection.execute(self.RELEASE, deployment, revision, workflow_id)
            await connection.execute(self.SET_STATE, deployment, row["revision"], "serving")
            loser = row["rollout_from"] if is_through else revision
            await connection.execute(self.SET_STATE, deployment, loser, "retired" if is_through else "returned")
            await AuditStore.append(
                connection, actor="workflow", action="rollout.end", subject=deployment, details=details
            )

    async def nodes_of(self, deployment: str, also: Sequence[UUID] = ()) -> list[tuple[RolloutNode, bool]]:
        """The deployment's nodes that have not ended, and `also` those; each with whether it is being undone."""
        rows = await self._pool.fetch(self.SELECT_NODES, deployment, list(also))
        return [
            (
                RolloutNode(
                    node_id=NODE.show(row["id"]),
                    region=row["region"],
                    revision=row["revision"],
                    state=NodeState(row["state"]),
                    workflow_id=row["workflow_id"],
                    is_held=row["is_held"],
                    is_leaving=row["tombstoned_at"] is not None or row["state"] == NodeState.DRAINING,
                    is_joined=row["provider"] == "joined",
                    capacity_tokens_per_s=row["capacity_tokens_per_s"],
                    price_microdollars_per_h=row["price_microdollars_per_h"],
                ),
                row["tombstoned_at"] is not None,
            )
            for row in rows
        ]

    async def backed_by_others(self, model: str, deployment: str) -> dict[str, int]:
        """Tokens per second that nodes of no part of the deployment serve the model with, by region."""
        rows = await self._pool.fetch(self.SELECT_OTHERS, model, deployment)
        return {row["region"]: row["tokens_per_s"] for row in rows}

    async def compare(self, deployment: str, first: UUID, since: datetime) -> dict[int, RevisionFigures]:
        """What each revision's requests were like, of those with an id from `first` on, which was made at `since`."""
        rows = await self._pool.fetch(self.SELECT_OF_DEPLOYMENT, deployment, since)
        ids = [row["id"] for row in rows]
        shown = [NODE.show(node_id) for node_id in ids]
        found = await self._pool.fetch(self.COMPARE, deployment, first, MOST_COMPARED, shown, ids)
        return {
            row["revision"]: RevisionFigures(row["requests"], row["errors"], row["ms_per_token"], row["ttft_ms"])
            for row in found
        }


def read_spec(text: str) -> RevisionSpec:
    """A revision's spec as it is stored. Fields of a newer version are ignored."""
    stored: dict[str, Any] = json.loads(text)
    golden = [
        GoldenPrompt(one["prompt"], one["expected"], Match(one["match"]), one["max_tokens"])
        for one in stored.pop("golden", [])
    ]
    known = {field.name for field in fields(RevisionSpec)}
    return RevisionSpec(**{name: value for name, value in stored.items() if name in known}, golden=golden)


def _revision(row: asyncpg.Record) -> Revision:
    return Revision(
        row["deployment"], row["revision"], read_spec(row["spec"]), row["state"], row["created_at"], row["created_by"]
    )


def _unknown(deployment: str) -> Rejected:
    return Rejected(
        f"There is no deployment {deployment[:64]!r}. List the deployments to see which there are.",
        status=404,
        code="deployment_not_found",
        param="deployment",
    )


def _unknown_revision(deployment: str, revision: int) -> Rejected:
    return Rejected(
        f"Deployment {deployment[:64]!r} has no revision {revision}. Create it first, or list those there are.",
        status=404,
        code="revision_not_found",
        param="revision",
    )
