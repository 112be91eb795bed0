"""Effects on the registry of nodes and on the route table: Postgres first, then Redis, always."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from temporalio import activity

from crosslogic.contracts.names import node_workflow_id
from crosslogic.contracts.node import (
    JOINED,
    NodeAdmission,
    NodeChange,
    NodeEnding,
    NodeOrder,
    NodeProvisioningInput,
    NodeSpec,
)
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import InvariantViolated, Rejected, Unavailable
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import (
    FINAL_STATES,
    ON_THE_WAY,
    Intent,
    Node,
    NodeEvent,
    NodeState,
    check_endpoint,
    cluster_name,
)
from crosslogic.domain.placement import Gpus, fitting
from crosslogic.domain.revision import RevisionSpec

if TYPE_CHECKING:
    from crosslogic.hot.routes import RouteBoard
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.lead_times import LeadTimeStore
    from crosslogic.store.nodes import NodeStore

log = logging.getLogger(__name__)

# The local cloud's machines are processes of this computer.
NO_GPU = "cpu"
LOCAL = "local"

LONGEST_TIMEOUT_S = 86_400

_ENDS = {
    NodeState.TERMINATED: NodeEvent.TERMINATE,
    NodeState.FAILED: NodeEvent.FAIL,
    NodeState.LOST: NodeEvent.LOSE,
}


class NodeActivities:
    """What a node's workflows write down. Each is idempotent: finding its effect there already is success (T4)."""

    def __init__(
        self,
        nodes: NodeStore,
        catalog: CatalogStore,
        board: RouteBoard,
        *,
        providers: Collection[str],
        default_provider: str,
        is_loopback_allowed: bool,
        lead_times: LeadTimeStore | None = None,
        node_secret: str = "",
    ) -> None:
        self._lead_times = lead_times
        self._nodes = nodes
        self._catalog = catalog
        self._node_secret = node_secret
        self._board = board
        self._providers = providers
        self._default_provider = default_provider
        self._is_loopback_allowed = is_loopback_allowed

    @activity.defn
    async def resolve_node_spec(self, order: NodeOrder) -> NodeSpec:
        """Make every choice that the order left open. Raises Rejected for an order that cannot be understood."""
        node_id = _parse_node_id(order.node_id)
        existing = await self._nodes.find(node_id)
        catalog = await self._catalog.load()
        if existing is not None:
            spec = _spec_of_existing(existing, order.workflow_id, catalog)
            asked = order.order
            gpus = _gpus(asked, spec.serves, catalog.models[spec.model], spec.provider)
            return replace(spec, gpus=gpus, clouds=asked.clouds, zone=asked.zone, engine=asked.engine)
        return self._choose(order, catalog)

    @activity.defn
    async def intend_node(self, spec: NodeSpec) -> str | None:
        """Write the row that must be there before any cloud is called (F3); when it will serve, in words.

        Raises Rejected when the id belongs to another workflow or its node was undone already.
        """
        node = await self._nodes.intend(_intent(spec))
        _check_is_ours(node, spec.workflow_id)
        if self._lead_times is None:
            return None
        eta = (await self._lead_times.load()).eta(cloud=spec.provider, gpu=spec.gpu, model=spec.model)
        learnt = f"learnt from {eta.samples} nodes, {eta.basis}" if eta.samples else "a guess: nothing is learnt yet"
        return f"usually serves within {eta.p50_s:.0f} s, in nine of ten cases within {eta.p90_s:.0f} s ({learnt})"

    @activity.defn
    async def join_node(self, spec: NodeSpec) -> NodeSpec:
        """Write down a node that exists already, as if its machine had just come up. Raises Rejected if it cannot."""
        node_id = _parse_node_id(spec.node_id)
        endpoint = check_endpoint(spec.endpoint, is_loopback_allowed=self._is_loopback_allowed)
        node = await self._nodes.find(node_id)
        if node is None:
            for other in await self._nodes.list_alive():
                if other.endpoint == endpoint:
                    raise Rejected(
                        f"The endpoint is node {other.node_id}'s already; drain that node first.", code="joined"
                    )
            order = NodeProvisioningInput(
                spec.model, spec.region, spec.deployment, JOINED, spec.gpu, drain_timeout_s=spec.drain_timeout_s
            )
            workflow_id = node_workflow_id(spec.node_id)
            chosen = self._choose(NodeOrder(order, spec.node_id, workflow_id), await self._catalog.load(), endpoint)
            node = await self._nodes.intend(_intent(chosen))
        else:
            chosen = _spec_of_existing(node, node_workflow_id(spec.node_id), await self._catalog.load())
        while node.state in (NodeState.REQUESTED, NodeState.LAUNCHING):
            event = NodeEvent.LAUNCH if node.state is NodeState.REQUESTED else NodeEvent.BOOT
            try:
                node = await self._nodes.advance(node_id, event, "joining", endpoint=endpoint)
            except InvariantViolated:
                # Another attempt of this, thought dead, has moved it on since it was read.
                node = await self._nodes.get(node_id)
        return chosen

    @activity.defn
    async def admit_node(self, admission: NodeAdmission) -> None:
        """Make the node routable. Raises Rejected when it is tombstoned."""
        node = await self._nodes.advance(
            NODE.parse(admission.spec.node_id),
            NodeEvent.ADMIT,
            f"serving; measured {admission.capacity_tokens_per_s} tokens/s",
            capacity_tokens_per_s=admission.capacity_tokens_per_s,
        )
        await self._push(node)

    @activity.defn
    async def hand_over_node(self, spec: NodeSpec) -> None:
        """Make the node's lifecycle, which runs by now, responsible for it: whoever drains the node signals that."""
        await self._nodes.hand_over(NODE.parse(spec.node_id), node_workflow_id(spec.node_id))

    @activity.defn
    async def begin_drain(self, change: NodeChange) -> None:
        """Take the node out of routing. One that is not ready, or not any more, stays as it is."""
        node = await self._nodes.get(NODE.parse(change.spec.node_id))
        if node.state is NodeState.READY:
            node = await self._nodes.advance(node.id, NodeEvent.DRAIN, change.reason)
        await self._push(node)

    @activity.defn
    async def tombstone_node(self, change: NodeChange) -> None:
        """Forbid for ever that the node is launched or admitted; it leaves the route table too.

        Written before anything is undone, and for a node without a row as well (F4).
        """
        node = await self._nodes.tombstone(_intent(change.spec), change.reason)
        if node.state is NodeState.READY:
            node = await self._nodes.advance(node.id, NodeEvent.DRAIN, change.reason)
        await self._push(node)

    @activity.defn
    async def end_node(self, ending: NodeEnding) -> None:
        """Write down how the node ended; its machine is gone. One that has ended keeps its end."""
        node = await self._nodes.get(NODE.parse(ending.spec.node_id))
        if node.state not in FINAL_STATES:
            node = await self._nodes.advance(node.id, _ENDS[NodeState(ending.state)], ending.reason)
        await self._push(node)

    async def _push(self, node: Node) -> None:
        try:
            await self._board.publish(node.route_entry)
        except Unavailable as error:
            # Postgres has it, every API process polls Postgres, and the region's watch mends the board.
            log.warning("the route board missed node %s: %s", node.node_id, error.message)

    def _choose(self, order: NodeOrder, catalog: Catalog, endpoint: str = "") -> NodeSpec:
        asked = order.order
        model = _find_model(catalog, asked.model)
        region = catalog.regions.resolve(asked.region)
        provider = asked.provider or self._default_provider
        if provider not in self._providers and provider != JOINED:
            known = ", ".join(sorted(self._providers))
            choice = (
                f"use one of: {known}" if known else "no cloud is connected here; `nodes join` takes machines that run"
            )
            raise Rejected(f"Cannot launch through {provider!r}: {choice}.", code="unknown_provider")
        if provider == JOINED and not endpoint:
            raise Rejected("A node that exists already is not provisioned: use `nodes join`.", code="unknown_provider")
        for name in ("launch_timeout_s", "boot_timeout_s", "load_timeout_s", "drain_timeout_s"):
            if not (0 if name == "drain_timeout_s" else 1) <= getattr(asked, name) <= LONGEST_TIMEOUT_S:
                raise Rejected(f"{name} must be a number of seconds up to {LONGEST_TIMEOUT_S}.", param=name)
        deployment = _find_deployment(catalog, asked.deployment, model, region)
        promise = catalog.deployments.get(deployment)
        revision = order.revision or (promise.revision if promise else 1)
        serves = catalog.spec_of(deployment, revision)
        gpus = [] if endpoint else _gpus(asked, serves, model, provider)
        gpu = gpus[0] if gpus else asked.gpu
        return NodeSpec(
            node_id=order.node_id,
            model=model.name,
            region=region,
            deployment=deployment,
            provider=provider,
            gpu=gpu,
            spot=asked.spot and not endpoint,
            cluster=cluster_name(
                provider,
                region,
                gpu.replace(":", "x") or NO_GPU,
                asked.spot and not endpoint,
                order.node_id,
                self._node_secret,
            ),
            is_pinned=order.is_pinned,
            workflow_id=order.workflow_id,
            drain_timeout_s=asked.drain_timeout_s,
            endpoint=endpoint,
            kind=model.kind,
            gpus=gpus,
            clouds=asked.clouds,
            zone=asked.zone,
            engine=asked.engine,
            revision=revision,
            serves=serves,
            is_held=order.is_held,
        )


def _gpus(asked: NodeProvisioningInput, serves: RevisionSpec, model: Model, provider: str) -> list[str]:
    """What may hold the model: as asked, else as its revision says, else the fewest GPUs that do. Raises Rejected."""
    if provider == LOCAL:
        return [asked.gpu or NO_GPU]
    wanted = [asked.gpu] * bool(asked.gpu) + asked.gpus or serves.gpus
    return [str(Gpus.read(text)) for text in wanted] or [str(gpus) for gpus in fitting(model.vram_gb)]


def _parse_node_id(text: str) -> UUID:
    uuid = NODE.parse(text)
    if uuid.version != 7:
        raise Rejected(f"Node id {text} is not one of ours: leave it out, and a new one is made.", code="invalid_id")
    return uuid


def _find_model(catalog: Catalog, name: str) -> Model:
    model = catalog.resolve_model(name)
    if model is None:
        known = ", ".join(sorted(catalog.by_alias))
        raise Rejected(f"Unknown model {name[:64]!r}. Use one of: {known}.", code="unknown_model", param="model")
    return model


def _find_deployment(catalog: Catalog, name: str, model: Model, region: str) -> str:
    """The deployment asked for, else the first that promises the model in the region, else none."""
    promising = sorted(
        deployment.name
        for deployment in catalog.deployments.values()
        if deployment.model == model.name and any(target.region == region for target in deployment.regions)
    )
    if not name:
        return promising[0] if promising else ""
    if name not in promising:
        choice = f"use one of: {', '.join(promising)}, or leave it out" if promising else "leave it out"
        raise Rejected(
            f"Deployment {name[:64]!r} does not promise {model.name} in {region}; {choice}.",
            code="unknown_deployment",
            param="deployment",
        )
    return name


def _spec_of_existing(node: Node, workflow_id: str, catalog: Catalog) -> NodeSpec:
    _check_is_ours(node, workflow_id)
    return spec_of(node, catalog)


def spec_of(node: Node, catalog: Catalog) -> NodeSpec:
    """The spec that a row stands for."""
    model = catalog.models.get(node.model)
    return NodeSpec(
        node_id=node.node_id,
        model=node.model,
        region=node.region,
        deployment=node.deployment or "",
        provider=node.provider,
        gpu=node.gpu,
        spot=node.is_spot,
        cluster=node.cluster,
        is_pinned=node.is_pinned,
        workflow_id=node.workflow_id,
        drain_timeout_s=node.drain_timeout_s,
        endpoint=(node.endpoint or "") if node.provider == JOINED else "",
        kind=model.kind if model else "chat",
        revision=node.revision,
        serves=catalog.spec_of(node.deployment or "", node.revision),
        is_held=node.is_held,
    )


def _check_is_ours(node: Node, workflow_id: str) -> None:
    """A node has one workflow at a time (F5)."""
    if node.workflow_id != workflow_id or node.is_tombstoned or node.state not in ON_THE_WAY:
        raise Rejected(
            f"Node id {node.node_id} is taken (that node is {node.state}, its workflow is {node.workflow_id!r}): "
            "leave node_id out, and a new one is made.",
            code="node_id_taken",
            status=409,
        )


def _intent(spec: NodeSpec) -> Intent:
    return Intent(
        id=NODE.parse(spec.node_id),
        model=spec.model,
        region=spec.region,
        provider=spec.provider,
        cluster=spec.cluster,
        workflow_id=spec.workflow_id,
        deployment=spec.deployment or None,
        gpu=spec.gpu,
        is_spot=spec.spot,
        is_pinned=spec.is_pinned,
        drain_timeout_s=spec.drain_timeout_s,
        revision=spec.revision,
        is_held=spec.is_held,
    )
