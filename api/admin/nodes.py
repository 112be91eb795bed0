"""Nodes: what there is, and the workflows that start, join and drain them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from api.admin.catalog import resolve_model
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import After, Body, Label, Limit, Page, after_uuid, page
from crosslogic.clients.skypilot import SkyPilot, no_join_token
from crosslogic.contracts import names
from crosslogic.contracts.node import JOINED, NodeLifecycleInput, NodeProvisioningInput, NodeSpec
from crosslogic.domain import ids
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.lead_time import Eta
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, Node, NodeState, check_endpoint
from crosslogic.domain.spot import hazards
from crosslogic.new_ids import new_id

router = APIRouter(route_class=AdminRoute)

NodePath = Annotated[str, Path(max_length=64, description="A node's id.", examples=["node_01k5…"])]
ModelName = Annotated[str, Field(max_length=128, description="A model's name or alias.", examples=["llama-7b"])]
RegionName = Annotated[str, Field(max_length=64, description="A region's name or cloud alias.", examples=["in-mumbai"])]
NewNodeId = Annotated[
    str | None,
    Field(max_length=64, description="Left out: a new id. Give one of your own making to be able to repeat the call."),
]


class EtaOut(BaseModel):
    """How sure an ETA is."""

    p90_s: int = Field(description="In nine of ten cases it serves by then.")
    samples: int = Field(description="The nodes that it was learnt from.")
    basis: str = Field(
        description="What they have in common with this one; `usual`: nothing is known.", examples=["cloud, gpu, model"]
    )


class NodeOut(BaseModel):
    """A node as the registry has it."""

    id: str = Field(examples=["node_01k5…"])
    state: NodeState
    is_tombstoned: bool = Field(description="It is being undone and never comes back.")
    reason: str = Field(description="Why it is in this state.")
    model: str
    region: str
    deployment: str | None
    provider: str = Field(description="`joined`: no cloud behind it.")
    cluster: str = Field(description="The machine's name in its cloud.")
    gpu: str
    is_spot: bool
    is_pinned: bool = Field(description="Started or joined by hand: counted, never scaled away.")
    endpoint: str | None
    capacity_tokens_per_s: int = Field(description="Measured when it was admitted; 0: unknown.")
    price_microdollars_per_h: int = Field(description="What it costs while it runs; 0: unknown.")
    cloud: str = Field(description="Whose machine it is, once it runs; empty for one that is not rented.")
    zone: str = Field(description="The cloud's name of it.")
    instance_type: str
    eta_s: int | None = Field(description="Until it serves, in half of the cases. Null: it is not on its way.")
    eta_confidence: EtaOut | None
    generation: int
    workflow_id: str = Field(description="The workflow that is responsible for it now.")
    created_at: datetime
    changed_at: datetime
    ready_at: datetime | None
    ended_at: datetime | None


class NodeCost(BaseModel):
    """What a rented machine has cost, by SkyPilot's own account."""

    cluster: str = Field(description="The machine's name in its cloud.")
    place: str = Field(description="cloud/region/zone", examples=["aws/us-east-1/us-east-1a"])
    machine: str = Field(description="Its type, else its GPUs.", examples=["g6.xlarge"])
    is_spot: bool
    is_running: bool
    duration_s: int
    cost_microdollars: int


class NodeCosts(BaseModel):
    """The dearest first."""

    data: list[NodeCost]


class NodeIn(Body):
    """A node to start."""

    model: ModelName
    region: RegionName
    gpu: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{0,64}$", description="Empty: the cheapest that fits.")] = ""
    spot: bool = Field(default=True, strict=True, description="A spot machine, which the cloud may take back.")
    drain_timeout_s: int = Field(default=120, strict=True, ge=1, le=86_400)
    node_id: NewNodeId = None


class StartedOut(BaseModel):
    """A node that is on its way, and the workflow that brings it."""

    node_id: str = Field(examples=["node_01k5…"])
    workflow_id: str = Field(examples=["provision/node_01k5…"])


class JoinIn(Body):
    """A node that exists already: static, or on a customer's premises."""

    model: ModelName
    region: RegionName
    endpoint: Annotated[
        str, Field(max_length=500, description="Base URL of its engine.", examples=["https://gpu-7.example.org"])
    ]
    drain_timeout_s: int = Field(default=120, strict=True, ge=1, le=86_400)
    node_id: NewNodeId = None


class JoinedOut(StartedOut):
    """A node that is joining. It is admitted once its engine answers to the credential."""

    credential: str = Field(description="The bearer token (API key) that its engine must accept.", examples=["nc_…"])


class NodeChange(Body):
    """What an operator may say of a node."""

    price_microdollars_per_h: int = Field(
        ge=0, le=10**12, description="What it costs while it runs.", examples=[350_000]
    )


class HazardOut(BaseModel):
    """How soon a cloud takes spot machines back, at one place."""

    cloud: str
    zone: str = Field(description="The cloud's zone; empty: unknown.")
    gpu: str
    preemptions_per_h: float = Field(description="To expect per machine-hour, learnt from what was seen and a prior.")
    preemptions: int = Field(description="Seen in the window.")
    exposure_h: float = Field(description="Hours that spot machines have served there, in the window.")


class HazardsOut(BaseModel):
    """All places that were tried, the safest first."""

    data: list[HazardOut]


class DrainIn(Body):
    """Why a node is drained."""

    reason: Label = Field(default="drained by an operator", examples=["kernel update"])


@router.get("/nodes")
async def list_nodes(
    admin: Admin,
    state: Annotated[list[NodeState] | None, Query(description="Repeat it for several.")] = None,
    region: Annotated[str | None, Query(max_length=64)] = None,
    model: Annotated[str | None, Query(max_length=128)] = None,
    include_ended: Annotated[bool, Query(description="Without `state`: nodes that have ended, too.")] = False,
    limit: Limit = 50,
    after: After = None,
) -> Page[NodeOut]:
    """Nodes, newest first; those that have ended only if asked for."""
    catalog = await admin.catalog.load() if region is not None or model is not None else None
    states = state or [known for known in NodeState if include_ended or known not in FINAL_STATES]
    rows = await admin.nodes.list_page(
        states=states,
        region=None if region is None or catalog is None else catalog.regions.resolve(region),
        model=None if model is None or catalog is None else resolve_model(catalog, model).name,
        before=after_uuid(ids.NODE, after),
        limit=limit + 1,
    )
    etas = await _etas(admin, rows)
    return page(rows, limit, lambda node: _show_node(node, etas.get(node.id)), lambda node: node.id)


@router.get("/nodes/costs")
async def list_costs(
    admin: Admin, days: Annotated[int, Query(ge=1, le=365, description="Of machines that ran within so many.")] = 30
) -> NodeCosts:
    """What rented machines have cost, ended ones too."""
    client = SkyPilot.of(admin.settings, no_join_token)
    try:
        costs = await client.costs(days=days)
    finally:
        await client.close()
    return NodeCosts(
        data=[
            NodeCost(
                cluster=cost.cluster,
                place=cost.place.infra,
                machine=cost.place.instance_type or cost.place.gpu,
                is_spot=cost.place.is_spot,
                is_running=cost.is_running,
                duration_s=cost.duration_s,
                cost_microdollars=cost.cost_microdollars,
            )
            for cost in sorted(costs, key=lambda cost: -cost.cost_microdollars)
            if cost.cluster.startswith("cic-")
        ]
    )


@router.get("/nodes/hazards")
async def list_hazards(
    admin: Admin, days: Annotated[int, Query(ge=1, le=365, description="The window to learn from.")] = 30
) -> HazardsOut:
    """Where spot machines live long, and where not: what placement weighs against the price."""
    found = hazards(await admin.preemptions.list_recent(days), await admin.preemptions.exposure_hours(days))
    return HazardsOut(
        data=[
            HazardOut(
                cloud=hazard.place.cloud,
                zone=hazard.place.zone,
                gpu=hazard.place.gpu,
                preemptions_per_h=round(hazard.per_hour, 5),
                preemptions=hazard.preemptions,
                exposure_h=round(hazard.exposure_hours, 2),
            )
            for hazard in found
        ]
    )


@router.get("/nodes/{node_id}")
async def get_node(node_id: NodePath, admin: Admin) -> NodeOut:
    """One node."""
    node = await admin.nodes.get(ids.NODE.parse(node_id))
    return _show_node(node, (await _etas(admin, [node])).get(node.id))


async def _etas(admin: Admin, nodes: Sequence[Node]) -> dict[UUID, Eta]:
    """When those will serve that are on their way."""
    coming = [node for node in nodes if node.state in ON_THE_WAY and not node.is_tombstoned]
    if not coming:
        return {}
    learnt = await admin.lead_times.load()
    ended = await admin.lead_times.ended_phases([node.id for node in coming])
    now = datetime.now(UTC).timestamp()
    return {node.id: learnt.eta_of(node, ended.get(node.id, {}), now) for node in coming}


@router.patch("/nodes/{node_id}")
async def update_node(node_id: NodePath, body: NodeChange, admin: Admin) -> NodeOut:
    """Say what a node costs: deployments of strategy `cost-weighted` fill cheaper nodes first."""
    return _show_node(await admin.nodes.set_price(ids.NODE.parse(node_id), body.price_microdollars_per_h, actor=ACTOR))


@router.post("/nodes", status_code=202)
async def start_node(body: NodeIn, admin: Admin) -> StartedOut:
    """Start a node of the configured cloud through the workflow `NodeProvisioning`."""
    catalog = await admin.catalog.load()
    model, region = resolve_model(catalog, body.model), catalog.regions.resolve(body.region)
    node_id = _node_id(body.node_id)
    workflow_id = names.provisioning_workflow_id(node_id)
    await admin.workflows.temporal()
    await admin.audit.record(
        actor=ACTOR,
        action="node.start",
        subject=node_id,
        details={"model": model.name, "region": region, "gpu": body.gpu, "spot": body.spot},
    )
    await admin.workflows.start(
        names.NODE_PROVISIONING,
        NodeProvisioningInput(
            model=model.name,
            region=region,
            gpu=body.gpu,
            spot=body.spot,
            node_id=node_id,
            drain_timeout_s=body.drain_timeout_s,
        ),
        workflow_id=workflow_id,
        task_queue=admin.settings.fleet_task_queue,
    )
    return StartedOut(node_id=node_id, workflow_id=workflow_id)


@router.post("/nodes/join", status_code=202)
async def join_node(body: JoinIn, admin: Admin) -> JoinedOut:
    """Put an engine that is running somewhere into service, through a `NodeLifecycle` without a cloud behind it.

    An endpoint that serves this model in this region already is answered with the node that it is.
    """
    endpoint = check_endpoint(body.endpoint, is_loopback_allowed=admin.settings.is_dev)
    catalog = await admin.catalog.load()
    model, region = resolve_model(catalog, body.model), catalog.regions.resolve(body.region)
    node_id = _node_id(body.node_id)
    for other in await admin.nodes.list_alive():
        if other.endpoint == endpoint and other.node_id != node_id:
            if body.node_id is not None or (other.model, other.region, other.provider) != (model.name, region, JOINED):
                raise Rejected(
                    f"That endpoint is node {other.node_id} ({other.model} in {other.region}). Drain it first.",
                    status=409,
                    code="endpoint_taken",
                    param="endpoint",
                )
            return _show_joined(admin, other.node_id)
    await admin.workflows.temporal()
    await admin.audit.record(
        actor=ACTOR,
        action="node.join",
        subject=node_id,
        details={"model": model.name, "region": region, "endpoint": endpoint},
    )
    # The workflow itself finds out the rest: the deployment that the node counts for, and the machine's name.
    spec = NodeSpec(
        node_id=node_id, model=model.name, region=region, endpoint=endpoint, drain_timeout_s=body.drain_timeout_s
    )
    await admin.workflows.start(
        names.NODE_LIFECYCLE,
        NodeLifecycleInput(spec=spec, is_admitted=False),
        workflow_id=names.node_workflow_id(node_id),
        task_queue=admin.settings.fleet_task_queue,
    )
    return _show_joined(admin, node_id)


@router.post("/nodes/{node_id}/drain", status_code=202)
async def drain_node(node_id: NodePath, admin: Admin, body: DrainIn | None = None) -> NodeOut:
    """No new requests; running ones end, or reach the node's deadline; then it is terminated. May be repeated."""
    reason = (body or DrainIn()).reason
    node = await admin.nodes.get(ids.NODE.parse(node_id))
    if node.state in FINAL_STATES:
        return _show_node(node)
    await admin.workflows.temporal()
    await admin.audit.record(actor=ACTOR, action="node.drain", subject=node.node_id, details={"reason": reason})
    for _ in range(2):
        if await admin.workflows.signal(node.workflow_id, names.DRAIN, reason):
            return _show_node(node)
        # Provisioning hands a node over to its lifecycle: look again who is responsible.
        node = await admin.nodes.get(node.id)
        if node.state in FINAL_STATES:
            return _show_node(node)
    raise Unavailable(
        f"Workflow {node.workflow_id}, which is responsible for {node_id}, is not running, so it cannot be told. "
        "Look at it in the Temporal UI.",
        code="workflow_not_running",
        retry_after_s=5,
    )


def _node_id(given: str | None) -> str:
    if given is None:
        return ids.NODE.show(new_id())
    uuid = ids.NODE.parse(given)
    if uuid.version != 7:
        raise Rejected(
            f"{given} is not made as node ids are (a UUIDv7). Leave it out, and a new one is made.",
            code="invalid_id",
            param="node_id",
        )
    return ids.NODE.show(uuid)


def _show_joined(admin: Admin, node_id: str) -> JoinedOut:
    secret = admin.settings.node_secret
    assert secret is not None, "settings without a node secret are not valid"
    return JoinedOut(
        node_id=node_id,
        workflow_id=names.node_workflow_id(node_id),
        credential=node_credential(secret.get_secret_value(), node_id),
    )


def _show_node(node: Node, eta: Eta | None = None) -> NodeOut:
    return NodeOut(
        id=node.node_id,
        state=node.state,
        is_tombstoned=node.is_tombstoned,
        reason=node.reason,
        model=node.model,
        region=node.region,
        deployment=node.deployment,
        provider=node.provider,
        cluster=node.cluster,
        gpu=node.gpu,
        is_spot=node.is_spot,
        is_pinned=node.is_pinned,
        endpoint=node.endpoint,
        capacity_tokens_per_s=node.capacity_tokens_per_s,
        price_microdollars_per_h=node.price_microdollars_per_h,
        cloud=node.cloud,
        zone=node.zone,
        instance_type=node.instance_type,
        eta_s=None if eta is None else round(eta.p50_s),
        eta_confidence=None if eta is None else EtaOut(p90_s=round(eta.p90_s), samples=eta.samples, basis=eta.basis),
        generation=node.generation,
        workflow_id=node.workflow_id,
        created_at=node.created_at,
        changed_at=node.changed_at,
        ready_at=node.ready_at,
        ended_at=node.ended_at,
    )
