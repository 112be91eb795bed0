"""The registry of nodes in memory: what `crosslogic.store.nodes.NodeStore` does, statement by statement.

tests/simulation/test_memory_nodes.py holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from crosslogic.domain.deployment import Replica
from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import FINAL_STATES, Intent, Node, NodeEvent, NodeState, RouteEntry, advance, sources_of
from crosslogic.store.nodes import LEADING_OUT

_OF_INTENT = tuple(
    field.name for field in fields(Intent) if field.name in {known.name for known in fields(Node)}
)  # The rest of a row is the store's own.


class MemoryNodes:
    """Every change of a node, made at once. `on_change` is told of each, with the row before (None: it is new)."""

    def __init__(
        self,
        now: Callable[[], datetime],
        *,
        models: Collection[str],
        regions: Collection[str],
        deployments: Callable[[], Collection[str]],
        on_change: Callable[[Node | None, Node], None] = lambda before, after: None,
    ) -> None:
        self._now = now
        self._models = models
        self._regions = regions
        self._deployments = deployments
        self._on_change = on_change
        self.rows: dict[UUID, Node] = {}

    def intend(self, intent: Intent) -> Node:
        if intent.id not in self.rows:
            for name, value, known in (
                ("deployment", intent.deployment, self._deployments()),
                ("model", intent.model, self._models),
                ("region", intent.region, self._regions),
            ):
                if value is not None and value not in known:
                    raise Rejected(
                        f"Node {NODE.show(intent.id)} refers to a model, region or deployment that is not there any "
                        f"more (nodes_{name}_fkey); look it up and order the node again."
                    )
            self._check_cluster(intent)
            self._put(None, self._new(intent))
        return self.get(intent.id)

    def find(self, node_id: UUID) -> Node | None:
        return self.rows.get(node_id)

    def get(self, node_id: UUID) -> Node:
        node = self.rows.get(node_id)
        if node is None:
            raise Rejected(
                f"There is no node {NODE.show(node_id)}; list them with `nodes list`.", status=404, code="unknown_node"
            )
        return node

    def find_many(self, node_ids: Sequence[UUID]) -> list[Node]:
        return [self.rows[node_id] for node_id in dict.fromkeys(node_ids) if node_id in self.rows]

    def list_alive(self, region: str | None = None) -> list[Node]:
        return sorted(
            (node for node in self.rows.values() if node.ended_at is None and region in (None, node.region)),
            key=_age,
        )

    def list_all(self, limit: int = 1000) -> list[Node]:
        return sorted(self.rows.values(), key=_age, reverse=True)[:limit]

    def list_replicas(self, deployment: str, ended_within_s: float) -> list[Replica]:
        now = self._now()
        oldest = now - timedelta(seconds=ended_within_s)
        return [
            Replica(
                node.node_id,
                node.region,
                node.state,
                node.is_tombstoned,
                (now - node.ended_at).total_seconds() if node.ended_at else 0.0,
            )
            for node in self.list_all(len(self.rows))
            if node.deployment == deployment and (node.ended_at is None or node.ended_at > oldest)
        ]

    def route_entries(self) -> list[RouteEntry]:
        return [node.route_entry for node in self.list_alive()]

    def advance(
        self,
        node_id: UUID,
        event: NodeEvent,
        reason: str,
        *,
        endpoint: str | None = None,
        capacity_tokens_per_s: int | None = None,
        **columns: Any,
    ) -> Node:
        sources = sources_of(event)
        target = advance(sources[0], event)
        node = self.rows.get(node_id)
        is_leading_out = event in LEADING_OUT
        if node is not None and node.state in sources and (is_leading_out or not node.is_tombstoned):
            now = self._now()
            return self._put(
                node,
                replace(
                    node,
                    state=target,
                    generation=node.generation + 1,
                    changed_at=now,
                    reason=reason,
                    endpoint=node.endpoint if endpoint is None else endpoint,
                    capacity_tokens_per_s=(
                        node.capacity_tokens_per_s if capacity_tokens_per_s is None else capacity_tokens_per_s
                    ),
                    ready_at=now if target is NodeState.READY else node.ready_at,
                    ended_at=now if target in FINAL_STATES else node.ended_at,
                    **columns,
                ),
            )
        node = self.get(node_id)
        if node.is_tombstoned and not is_leading_out:
            raise Rejected(f"Node {node.node_id} is tombstoned: it is being undone.", code="tombstoned", status=409)
        if node.state is not target:
            raise InvariantViolated(f"node {node.node_id} is {node.state} and cannot {event}")
        return node

    def hand_over(self, node_id: UUID, workflow_id: str) -> None:
        node = self.rows.get(node_id)
        if node is not None and node.workflow_id != workflow_id:
            self._put(node, replace(node, workflow_id=workflow_id))

    def tombstone(self, intent: Intent, reason: str) -> Node:
        node = self.rows.get(intent.id)
        now = self._now()
        if node is None:
            self._put(None, replace(self._new(intent), reason=reason, tombstoned_at=now))
        elif not node.is_tombstoned:
            after = replace(node, tombstoned_at=now, generation=node.generation + 1, changed_at=now, reason=reason)
            self._put(node, after)
        return self.get(intent.id)

    def find_by_cluster(self, clusters: Sequence[str]) -> dict[str, Node]:
        return {node.cluster: node for node in self.rows.values() if node.cluster in clusters}

    def _check_cluster(self, intent: Intent) -> None:
        if any(node.cluster == intent.cluster for node in self.rows.values()):
            raise Rejected(
                f"Another node has the machine {intent.cluster!r} already; order the node again under a new id."
            )

    def _new(self, intent: Intent) -> Node:
        now = self._now()
        given: dict[str, Any] = {name: getattr(intent, name) for name in _OF_INTENT}
        return Node(
            **given,
            state=NodeState.REQUESTED,
            generation=1,
            reason="",
            endpoint=None,
            capacity_tokens_per_s=0,
            created_at=now,
            changed_at=now,
            ready_at=None,
            tombstoned_at=None,
            ended_at=None,
        )

    def _put(self, before: Node | None, after: Node) -> Node:
        self.rows[after.id] = after
        self._on_change(before, after)
        return after


def _age(node: Node) -> tuple[datetime, UUID]:
    return node.created_at, node.id
