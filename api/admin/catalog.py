"""Models, regions and deployments."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field, model_validator

from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import Body, Limit, Page
from crosslogic.contracts import names
from crosslogic.contracts.deployment import DeploymentScalingInput
from crosslogic.domain.catalog import Catalog, Deployment, Model
from crosslogic.domain.deployment import Placement, RegionTarget
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.regions import Region

router = APIRouter(route_class=AdminRoute)

Strategy = Literal["round-robin", "least-load", "latency-weighted", "cost-weighted", "prefix-affinity"]
ModelPath = Annotated[str, Path(max_length=128, description="A model's name or alias.", examples=["llama-3-8b"])]
Timeout = Annotated[int | None, Field(ge=1, le=86_400_000, examples=[5000])]
DeploymentPath = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$", examples=["llama-7b"])]


class DeadlinesOut(BaseModel):
    """A model's own deadlines. Null: the API's setting."""

    connect_timeout_ms: int | None
    first_token_timeout_ms: int | None
    idle_timeout_ms: int | None
    total_timeout_ms: int | None


class ModelOut(BaseModel):
    """A model that clients can name, with its list prices before the region's multiplier."""

    name: str = Field(examples=["llama-3-8b"])
    aliases: list[str]
    family: str
    kind: Literal["chat", "completion", "embedding"]
    context_tokens: int
    vram_gb: int
    input_price_e10: int = Field(description="10⁻¹⁰ USD a token: 500 is $0.05 per 1M tokens.")
    output_price_e10: int | None = Field(description="Null: the model has no output tokens.")
    default_max_tokens: int
    metadata: dict[str, Any] = Field(description="As clients see it at /v1/models.")
    deadlines: DeadlinesOut


class ModelChange(Body):
    """What to change; what is left out stays. Null takes a deadline away: the API's setting holds then."""

    metadata: dict[str, Any] | None = Field(default=None, description="All of it, as clients see it at /v1/models.")
    connect_timeout_ms: Timeout = Field(default=None, description="To open a connection to a node.")
    first_token_timeout_ms: Timeout = Field(default=None, description="From the request to the engine's first byte.")
    idle_timeout_ms: Timeout = Field(default=None, description="Longest silence between two chunks of a stream.")
    total_timeout_ms: Timeout = Field(default=None, description="Longest life of one request.")


class RegionOut(BaseModel):
    """A region where we serve."""

    name: str = Field(examples=["in-mumbai"])
    title: str
    aliases: list[str] = Field(description="Cloud names that mean this region.")
    multiplier_bp: int = Field(description="Scales list prices, in basis points: 10 000 is 1.0×.")
    fallback: list[str] = Field(description="Where its requests go when it cannot serve them, best first.")


class TargetOut(BaseModel):
    """How many replicas a region has."""

    region: str = Field(examples=["in-mumbai"])
    replicas_min: int
    replicas_max: int


class ScalingOut(BaseModel):
    """What a deployment says of its own growth; it holds in each of its regions."""

    placement: Placement = Field(description="Replicas over zones, or close together.")
    on_demand_base: int = Field(description="So many replicas of a region are not spot machines.")
    ttft_target_ms: int | None = Field(description="What 99 % of the streams' first tokens keep. Null: no target.")
    spend_cap_microdollars_per_h: int | None = Field(
        description="All its machines together cost no more; nodes whose price is unknown count nothing. Null: no cap."
    )
    idle_s: int = Field(description="Where replicas_min is 0: without a request for so long, no node is kept.")
    gpus: list[str] = Field(
        description="Best first; one that cannot be had gives way to the next. Empty: the cheapest."
    )


class DeploymentOut(BaseModel):
    """The promise to serve one model in these regions."""

    name: str = Field(examples=["llama-7b"])
    model: str
    strategy: str
    regions: list[TargetOut]
    scaling: ScalingOut


class DeploymentPutOut(DeploymentOut):
    """A deployment after a change."""

    is_workflow_told: bool = Field(
        description="False: Temporal could not be reached; the deployment's workflow sees it when it next looks."
    )


class TargetIn(Body):
    """How many replicas a region must have."""

    region: Annotated[str, Field(max_length=64, examples=["in-mumbai"])]
    replicas_min: int = Field(strict=True, ge=0, le=1000, examples=[2])
    replicas_max: int | None = Field(
        default=None, strict=True, ge=0, le=1000, description="Left out: replicas_min.", examples=[4]
    )

    @model_validator(mode="after")
    def _ordered(self) -> TargetIn:
        if self.replicas_max is not None and self.replicas_max < self.replicas_min:
            raise ValueError("replicas_max is below replicas_min")
        return self


class ScalingIn(Body):
    """What to change of its growth; what is left out stays as it is. Null takes a target or a cap away."""

    placement: Placement = Field(default=Placement.SPREAD, description="Replicas over zones, or close together.")
    on_demand_base: int = Field(default=0, strict=True, ge=0, le=1000)
    ttft_target_ms: int | None = Field(default=None, strict=True, ge=1, le=600_000, examples=[2000])
    spend_cap_microdollars_per_h: int | None = Field(
        default=None, strict=True, ge=0, le=10**12, examples=[5_000_000], description="5 000 000 are 5 USD an hour."
    )
    idle_s: int = Field(default=600, strict=True, ge=1, le=86_400)
    gpus: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", examples=["L4"])]] = Field(
        default_factory=list[str], max_length=8
    )


class DeploymentIn(Body):
    """All of a deployment: regions that are left out are no part of it any more."""

    model: Annotated[str, Field(max_length=128, description="A model's name or alias.", examples=["llama-3-8b"])]
    strategy: Strategy | None = Field(default=None, description="Left out: as it is, `least-load` for a new one.")
    regions: list[TargetIn] = Field(max_length=64)
    scaling: ScalingIn | None = Field(default=None, description="Left out: as it is.")


class DecisionOut(BaseModel):
    """What the autoscaler decided about one region, and why."""

    region: str = Field(examples=["in-mumbai"])
    at: datetime
    desired: int
    needed: int | None = Field(description="What the load alone needs. Null: it could not be seen.")
    present: int = Field(description="Nodes that serve or are on their way.")
    serving: int
    ordered: int
    drained: int
    reason: str = Field(
        examples=["2 of 4 replicas present, 2 serving; 900 tokens/s arrive, a node does 300; ordering 2"]
    )


@router.get("/models")
async def list_models(admin: Admin) -> Page[ModelOut]:
    """All models."""
    catalog = await admin.catalog.load()
    return Page(data=[_show_model(model) for model in catalog.models.values()], has_more=False)


@router.patch("/models/{name}")
async def update_model(name: ModelPath, body: ModelChange, admin: Admin) -> ModelOut:
    """Change what clients see of a model, or its deadlines; acts everywhere within 1 s."""
    changes: dict[str, Any] = body.model_dump(exclude_unset=True)
    if changes.get("metadata", {}) is None:
        raise Rejected("metadata cannot be null; leave it out to keep it.", code="invalid_request", param="metadata")
    model = resolve_model(await admin.catalog.load(), name)
    await admin.catalog.update_model(model.name, changes, actor=ACTOR)
    return _show_model((await admin.catalog.load()).models[model.name])


@router.get("/regions")
async def list_regions(admin: Admin) -> Page[RegionOut]:
    """All regions."""
    catalog = await admin.catalog.load()
    return Page(data=[_show_region(region) for region in catalog.regions.regions.values()], has_more=False)


@router.get("/deployments")
async def list_deployments(admin: Admin) -> Page[DeploymentOut]:
    """All deployments."""
    catalog = await admin.catalog.load()
    shown = [DeploymentOut(**_show_deployment(deployment)) for deployment in catalog.deployments.values()]
    return Page(data=shown, has_more=False)


@router.get("/deployments/{name}")
async def get_deployment(name: DeploymentPath, admin: Admin) -> DeploymentOut:
    """One deployment."""
    deployment = (await admin.catalog.load()).deployments.get(name)
    if deployment is None:
        raise _no_deployment(name)
    return DeploymentOut(**_show_deployment(deployment))


@router.get("/deployments/{name}/scaling")
async def list_scaling_decisions(
    name: DeploymentPath,
    admin: Admin,
    region: Annotated[str | None, Query(max_length=64)] = None,
    limit: Limit = 50,
) -> Page[DecisionOut]:
    """What the autoscaler decided lately, newest first; it is kept for a week."""
    catalog = await admin.catalog.load()
    if name not in catalog.deployments:
        raise _no_deployment(name)
    found = await admin.scaling.list_decisions(
        name, region=None if region is None else catalog.regions.resolve(region), limit=limit + 1
    )
    shown = [DecisionOut.model_validate(one, from_attributes=True) for one in found[:limit]]
    return Page(data=shown, has_more=len(found) > limit)


@router.put("/deployments/{name}", responses={201: {"description": "It is new."}})
async def put_deployment(
    name: DeploymentPath, body: DeploymentIn, admin: Admin, response: Response
) -> DeploymentPutOut:
    """Create a deployment or change what it promises; its workflow starts and ends nodes until that is kept."""
    catalog = await admin.catalog.load()
    model = resolve_model(catalog, body.model)
    targets = [
        RegionTarget(
            catalog.regions.resolve(target.region),
            target.replicas_min,
            target.replicas_min if target.replicas_max is None else target.replicas_max,
        )
        for target in body.regions
    ]
    if len({target.region for target in targets}) < len(targets):
        raise Rejected("Give each region once.", code="invalid_request", param="regions")
    scaling: dict[str, Any] = {} if body.scaling is None else body.scaling.model_dump(exclude_unset=True)
    if "gpus" in scaling:
        scaling["gpus"] = tuple(scaling["gpus"])
    deployment, is_new = await admin.catalog.put_deployment(
        name, model=model.name, strategy=body.strategy, regions=targets, actor=ACTOR, scaling=scaling
    )
    if is_new:
        response.status_code = 201
    try:
        await admin.workflows.start(
            names.DEPLOYMENT_SCALING,
            DeploymentScalingInput(name),
            workflow_id=names.deployment_workflow_id(name),
            task_queue=admin.settings.fleet_task_queue,
            signal=names.LOOK_AGAIN,
        )
        is_told = True
    except Unavailable:
        is_told = False
    return DeploymentPutOut(**_show_deployment(deployment), is_workflow_told=is_told)


def resolve_model(catalog: Catalog, name: str) -> Model:
    """The model of that name or alias. Raises Rejected 404."""
    model = catalog.resolve_model(name)
    if model is None:
        raise Rejected(
            f"There is no model {name[:64]!r}. Use one of: {', '.join(catalog.models)}.",
            status=404,
            code="model_not_found",
            param="model",
        )
    return model


def _no_deployment(name: str) -> Rejected:
    return Rejected(
        f"There is no deployment {name}. List the deployments to see which there are.",
        status=404,
        code="deployment_not_found",
    )


def _show_model(model: Model) -> ModelOut:
    return ModelOut.model_validate(model, from_attributes=True)


def _show_region(region: Region) -> RegionOut:
    return RegionOut.model_validate(region, from_attributes=True)


def _show_deployment(deployment: Deployment) -> dict[str, Any]:
    return {
        "name": deployment.name,
        "model": deployment.model,
        "strategy": deployment.strategy,
        "regions": [TargetOut.model_validate(target, from_attributes=True) for target in deployment.regions],
        "scaling": ScalingOut.model_validate(deployment.scaling, from_attributes=True),
    }
