"""Models, regions and deployments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field, model_validator

from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import Body, Page
from crosslogic.contracts import names
from crosslogic.contracts.deployment import DeploymentScalingInput
from crosslogic.domain.catalog import Catalog, Deployment, Model
from crosslogic.domain.deployment import RegionTarget
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


class DeploymentOut(BaseModel):
    """The promise to serve one model in these regions."""

    name: str = Field(examples=["llama-7b"])
    model: str
    strategy: str
    regions: list[TargetOut]


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


class DeploymentIn(Body):
    """All of a deployment: regions that are left out are no part of it any more."""

    model: Annotated[str, Field(max_length=128, description="A model's name or alias.", examples=["llama-3-8b"])]
    strategy: Strategy | None = Field(default=None, description="Left out: as it is, `least-load` for a new one.")
    regions: list[TargetIn] = Field(max_length=64)


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
        raise Rejected(
            f"There is no deployment {name}. List the deployments to see which there are.",
            status=404,
            code="deployment_not_found",
        )
    return DeploymentOut(**_show_deployment(deployment))


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
    deployment, is_new = await admin.catalog.put_deployment(
        name, model=model.name, strategy=body.strategy, regions=targets, actor=ACTOR
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
    }
