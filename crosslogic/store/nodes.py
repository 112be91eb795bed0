"""The registry of nodes: what was intended, how far it is, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain.deployment import Replica
from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Intent, Node, NodeEvent, NodeState, RouteEntry, advance, sources_of
from crosslogic.domain.placement import Place
from crosslogic.store.audit import AuditStore


class NodeStore:
    """Every change of a node. State and generation only go forward, and a tombstone is permanent (F4)."""

    INTEND = """
        INSERT INTO nodes (id, deployment, model, region, provider, cluster, gpu, is_spot, is_pinned, workflow_id,
                           drain_timeout_s, revision, is_held)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        ON CONFLICT (id) DO NOTHING
    """
    SELECT = "SELECT * FROM nodes WHERE id = $1"
    SELECT_MANY = "SELECT * FROM nodes WHERE id = ANY($1::uuid[])"
    SELECT_ALIVE = "SELECT * FROM nodes WHERE ended_at IS NULL ORDER BY created_at, id"
    SELECT_ON_THE_WAY = """
        SELECT * FROM nodes
        WHERE state IN ('requested', 'launching', 'booting', 'loading') AND tombstoned_at IS NULL
        ORDER BY created_at, id
    """
    SELECT_BY_CLUSTER = "SELECT * FROM nodes WHERE cluster = ANY($1::text[])"
    SELECT_ALL = "SELECT * FROM nodes ORDER BY created_at DESC, id DESC LIMIT $1"
    SELECT_PAGE = """
        SELECT * FROM nodes
        WHERE state = ANY($1::text[]) AND ($2::text IS NULL OR region = $2) AND ($3::text IS NULL OR model = $3)
          AND ($4::uuid IS NULL OR id < $4)
        ORDER BY id DESC LIMIT $5
    """
    SELECT_OF_DEPLOYMENT = """
        SELECT id, region, state, tombstoned_at IS NOT NULL AS is_tombstoned,
               coalesce(extract(epoch FROM now() - ended_at), 0)::float8 AS ended_for_s,
               is_pinned, is_spot, gpu, coalesce(to_jsonb(nodes) ->> 'zone', '') AS zone, capacity_tokens_per_s,
               price_microdollars_per_h, greatest(0, extract(epoch FROM now() - created_at))::float8 AS age_s
        FROM nodes
        WHERE deployment = $1 AND (ended_at IS NULL OR ended_at > now() - make_interval(secs => $2))
        ORDER BY created_at DESC, id DESC
    """
    SELECT_ALIVE_IN_REGION = "SELECT * FROM nodes WHERE ended_at IS NULL AND region = $1 ORDER BY created_at, id"
    ADVANCE = """
        UPDATE nodes
        SET state = $3, generation = generation + 1, changed_at = now(),
            reason = $4, endpoint = coalesce($5, endpoint),
            capacity_tokens_per_s = coalesce($6, capacity_tokens_per_s),
            ready_at = CASE WHEN $3 = 'ready' THEN now() ELSE ready_at END,
            ended_at = CASE WHEN $3 IN ('terminated', 'failed', 'lost') THEN now() ELSE ended_at END
        WHERE id = $1 AND state = ANY($2::text[]) AND (tombstoned_at IS NULL OR NOT $7)
        RETURNING *
    """
    TOMBSTONE = """
        INSERT INTO nodes AS n (id, deployment, model, region, provider, cluster, gpu, is_spot, is_pinned, workflow_id,
                                drain_timeout_s, revision, is_held, reason, tombstoned_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, now())
        ON CONFLICT (id) DO UPDATE
        SET tombstoned_at = now(), generation = n.generation + 1, changed_at = now(), reason = $14
        WHERE n.tombstoned_at IS NULL
    """

    SET_PRICE = """
        UPDATE nodes SET price_microdollars_per_h = $2, generation = generation + 1, changed_at = now()
        WHERE id = $1 AND price_microdollars_per_h <> $2
        RETURNING *
    """
    SETTLE = """
        UPDATE nodes
        SET cloud = $2, cloud_region = $3, zone = $4, instance_type = $5, gpu = coalesce(nullif($6, ''), gpu),
            price_microdollars_per_h = CASE WHEN $7 > 0 THEN $7 ELSE price_microdollars_per_h END,
            generation = generation + 1, changed_at = now()
        WHERE id = $1
          AND (cloud, cloud_region, zone, instance_type) IS DISTINCT FROM ($2::text, $3::text, $4::text, $5::text)
    """
    RELEASE = """
        UPDATE nodes SET is_held = FALSE, generation = generation + 1, changed_at = now() WHERE id = $1 AND is_held
        RETURNING *
    """
    # No new generation: nothing that is routed by has changed.
    HAND_OVER = "UPDATE nodes SET workflow_id = $2 WHERE id = $1 AND workflow_id <> $2"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def intend(self, intent: Intent) -> Node:
        """Write the row that must exist before any cloud is called (F3). Repeating it changes nothing.

        Raises Rejected when the name of its machine or something it refers to is not free or not there.
        """
        try:
            await self._pool.execute(self.INTEND, *_columns(intent))
        except asyncpg.ForeignKeyViolationError as error:
            raise Rejected(
                f"Node {NODE.show(intent.id)} refers to a model, region or deployment that is not there any more "
                f"({error.constraint_name}); look it up and order the node again."
            ) from error
        except asyncpg.UniqueViolationError as error:
            raise Rejected(
                f"Another node has the machine {intent.cluster!r} already; order the node again under a new id."
            ) from error
        return await self.get(intent.id)

    async def find(self, node_id: UUID) -> Node | None:
        """The node's row, or None."""
        row = await self._pool.fetchrow(self.SELECT, node_id)
        return None if row is None else _node(row)

    async def get(self, node_id: UUID) -> Node:
        """The node's row. Raises Rejected (404) when there is none."""
        node = await self.find(node_id)
        if node is None:
            raise Rejected(
                f"There is no node {NODE.show(node_id)}; list them with `nodes list`.", status=404, code="unknown_node"
            )
        return node

    async def find_many(self, node_ids: Sequence[UUID]) -> list[Node]:
        """The rows of those ids that have one."""
        return [_node(row) for row in await self._pool.fetch(self.SELECT_MANY, list(node_ids))]

    async def find_by_cluster(self, clusters: Sequence[str]) -> dict[str, Node]:
        """The rows of those machines that a node has ever claimed, by the machine's name."""
        rows = await self._pool.fetch(self.SELECT_BY_CLUSTER, list(clusters))
        return {node.cluster: node for node in map(_node, rows)}

    async def list_alive(self, region: str | None = None) -> list[Node]:
        """All nodes that have not ended, oldest first."""
        if region is None:
            rows = await self._pool.fetch(self.SELECT_ALIVE)
        else:
            rows = await self._pool.fetch(self.SELECT_ALIVE_IN_REGION, region)
        return [_node(row) for row in rows]

    async def list_on_the_way(self) -> list[Node]:
        """All nodes that do not serve yet and are not being undone, oldest first."""
        return [_node(row) for row in await self._pool.fetch(self.SELECT_ON_THE_WAY)]

    async def list_all(self, limit: int = 1000) -> list[Node]:
        """The newest nodes, ended ones included, newest first."""
        return [_node(row) for row in await self._pool.fetch(self.SELECT_ALL, limit)]

    async def list_page(
        self,
        *,
        states: Sequence[NodeState],
        region: str | None = None,
        model: str | None = None,
        before: UUID | None = None,
        limit: int = 50,
    ) -> list[Node]:
        """Nodes in one of these states, newest first, with an id below `before`."""
        rows = await self._pool.fetch(self.SELECT_PAGE, list(states), region, model, before, limit)
        return [_node(row) for row in rows]

    async def list_replicas(self, deployment: str, ended_within_s: float) -> list[Replica]:
        """A deployment's nodes, newest first: those that have not ended, and recent ends."""
        return [
            Replica(
                NODE.show(row["id"]),
                row["region"],
                NodeState(row["state"]),
                row["is_tombstoned"],
                row["ended_for_s"],
                is_pinned=row["is_pinned"],
                is_spot=row["is_spot"],
                gpu=row["gpu"],
                zone=row["zone"],
                capacity_tokens_per_s=row["capacity_tokens_per_s"],
                price_microdollars_per_h=row["price_microdollars_per_h"],
                age_s=row["age_s"],
            )
            for row in await self._pool.fetch(self.SELECT_OF_DEPLOYMENT, deployment, ended_within_s)
        ]

    async def route_entries(self) -> list[RouteEntry]:
        """What the API must know of every node that has not ended."""
        return [node.route_entry for node in await self.list_alive()]

    async def advance(
        self,
        node_id: UUID,
        event: NodeEvent,
        reason: str,
        *,
        endpoint: str | None = None,
        capacity_tokens_per_s: int | None = None,
    ) -> Node:
        """Move the node along `TRANSITIONS`. Finding it there already is success, so a repeat changes nothing.

        A tombstoned node takes only events that lead out: anything else raises Rejected(code="tombstoned"). An event
        that its state does not know raises InvariantViolated.
        """
        sources = sources_of(event)
        target = advance(sources[0], event)
        row = await self._pool.fetchrow(
            self.ADVANCE,
            node_id,
            sources,
            target,
            reason,
            endpoint,
            capacity_tokens_per_s,
            event not in LEADING_OUT,
        )
        if row is not None:
            return _node(row)
        node = await self.get(node_id)
        if node.is_tombstoned and event not in LEADING_OUT:
            raise Rejected(f"Node {node.node_id} is tombstoned: it is being undone.", code="tombstoned", status=409)
        if node.state is not target:
            raise InvariantViolated(f"node {node.node_id} is {node.state} and cannot {event}")
        return node

    async def set_price(self, node_id: UUID, price_microdollars_per_h: int, *, actor: str) -> Node:
        """What the node costs while it runs, 0 for unknown. Raises Rejected (404) when there is none."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.SET_PRICE, node_id, price_microdollars_per_h)
            if row is not None:
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="node.set_price",
                    subject=NODE.show(node_id),
                    details={"price_microdollars_per_h": price_microdollars_per_h},
                )
        return await self.get(node_id) if row is None else _node(row)

    async def settle(self, node_id: UUID, place: Place) -> None:
        """Write down where the node's machine is and what it costs there. Repeating it changes nothing."""
        await self._pool.execute(
            self.SETTLE,
            node_id,
            place.cloud,
            place.region,
            place.zone,
            place.instance_type,
            place.gpu,
            place.price_microdollars_per_h,
        )

    async def release(self, node_id: UUID) -> Node:
        """Let requests start on a node that was held. Raises Rejected (404) when there is none."""
        row = await self._pool.fetchrow(self.RELEASE, node_id)
        return await self.get(node_id) if row is None else _node(row)

    async def hand_over(self, node_id: UUID, workflow_id: str) -> None:
        """Name the workflow that is responsible for the node from now on."""
        await self._pool.execute(self.HAND_OVER, node_id, workflow_id)

    async def tombstone(self, intent: Intent, reason: str) -> Node:
        """Forbid for ever that the node is launched or admitted. Written before anything of it is undone.

        It works without a row too, so that an intent which is still in flight finds the tombstone.
        """
        await self._pool.execute(self.TOMBSTONE, *_columns(intent), reason)
        return await self.get(intent.id)


# What a tombstoned node may still do.
LEADING_OUT = frozenset({NodeEvent.DRAIN, NodeEvent.TERMINATE, NodeEvent.FAIL, NodeEvent.LOSE})


def _columns(intent: Intent) -> tuple[object, ...]:
    return (
        intent.id,
        intent.deployment,
        intent.model,
        intent.region,
        intent.provider,
        intent.cluster,
        intent.gpu,
        intent.is_spot,
        intent.is_pinned,
        intent.workflow_id,
        intent.drain_timeout_s,
        intent.revision,
        intent.is_held,
    )


def _node(row: asyncpg.Record) -> Node:
    # A newer version's migration may have added columns already.
    fields: dict[str, Any] = {name: value for name, value in row.items() if name in Node.__dataclass_fields__}
    fields["state"] = NodeState(fields["state"])
    return Node(**fields)
