"""Revisions of a deployment, and the roll-out that replaces one with another."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from api.admin.catalog import DeploymentPath
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import Body, Label, Limit, Page
from crosslogic.contracts import names
from crosslogic.contracts.rollout import DeploymentRolloutInput
from crosslogic.domain.errors import Rejected
from crosslogic.domain.revision import GoldenPrompt, Match, RevisionSpec, check_spec
from crosslogic.store.revisions import Revision

router = APIRouter(route_class=AdminRoute)

RevisionPath = Annotated[int, Path(ge=1, le=2**31 - 1, examples=[2])]
Word = Annotated[str, Field(max_length=1000)]
ShareBp = Annotated[int, Field(strict=True, ge=1, le=10_000)]


class GoldenIn(Body):
    """A prompt with a known answer, asked of every new node at temperature 0."""

    prompt: Annotated[str, Field(min_length=1, max_length=20_000, examples=["What is 2 + 2? Answer with a number."])]
    expected: Annotated[str, Field(max_length=20_000, examples=["4"])]
    match: Match = Match.CONTAINS
    max_tokens: int = Field(default=64, strict=True, ge=1, le=1024)


class RevisionIn(Body):
    """What its nodes run; what is left out is up to their provider."""

    engine: Literal["", "vllm", "sglang", "llamacpp"] = ""
    engine_version: Word = ""
    weights: Word = Field(default="", description="What the engine is told to load.")
    engine_args: list[Word] = Field(default_factory=list[str], max_length=100)
    gpus: list[Word] = Field(default_factory=list[str], max_length=100, description="Tried in this order.")
    golden: list[GoldenIn] = Field(default_factory=list[GoldenIn], max_length=50)


class RevisionOut(BaseModel):
    """A revision as it was written; it never changes but for its state."""

    deployment: str
    revision: int
    state: Literal["candidate", "serving", "retired", "returned"] = Field(
        description="`retired`: it served before; `returned`: its roll-out went back."
    )
    engine: str
    engine_version: str
    weights: str
    engine_args: list[str]
    gpus: list[str]
    golden_prompts: int
    created_at: datetime
    created_by: str


class RolloutIn(Body):
    """How to roll a revision out; what is left out is the workflow's default."""

    steps_bp: list[ShareBp] = Field(
        default_factory=lambda: [500, 2500, 5000, 10000],
        min_length=1,
        max_length=100,
        description="Shares of the traffic in basis points, up to 10000.",
    )
    hold_at_bp: int = Field(default=0, strict=True, ge=0, le=10_000, description="No further until it is promoted.")
    bake_s: int = Field(default=300, strict=True, ge=0, le=86_400)
    max_surge_nodes: int = Field(default=0, strict=True, ge=0, le=1000, description="0: a quarter of the region's.")


class RolloutOut(BaseModel):
    """A roll-out that was begun, or told something."""

    workflow_id: str = Field(examples=["rollout/llama-7b/2"])


@router.get("/deployments/{name}/revisions")
async def list_revisions(
    name: DeploymentPath,
    admin: Admin,
    limit: Limit = 50,
    after: Annotated[str | None, Query(max_length=10, pattern=r"^[0-9]+$")] = None,
) -> Page[RevisionOut]:
    """A deployment's revisions, newest first."""
    rows = await admin.revisions.list_of(name, before=int(after) if after else None, limit=limit + 1)
    has_more = len(rows) > limit
    return Page(
        data=[_show(row) for row in rows[:limit]],
        has_more=has_more,
        next_after=str(rows[limit - 1].revision) if has_more else None,
    )


@router.post("/deployments/{name}/revisions", status_code=201)
async def create_revision(name: DeploymentPath, body: RevisionIn, admin: Admin) -> RevisionOut:
    """Write down the deployment's next revision. Nothing runs it until it is rolled out."""
    golden = [GoldenPrompt(one.prompt, one.expected, one.match, one.max_tokens) for one in body.golden]
    spec = RevisionSpec(body.engine, body.engine_version, body.weights, body.engine_args, body.gpus, golden)
    check_spec(spec)
    return _show(await admin.revisions.create(name, spec, actor=ACTOR))


@router.post("/deployments/{name}/revisions/{revision}/rollout", status_code=202)
async def start_rollout(
    name: DeploymentPath, revision: RevisionPath, admin: Admin, body: RolloutIn | None = None
) -> RolloutOut:
    """Begin to replace the revision that serves, through the workflow `DeploymentRollout`."""
    await admin.revisions.get(name, revision)
    asked = DeploymentRolloutInput(name, revision, **(body or RolloutIn()).model_dump())
    asked.policy.check()
    deployment = (await admin.catalog.load()).deployments[name]
    workflow_id = names.rollout_workflow_id(name, revision)
    if deployment.rollout_workflow_id not in (None, workflow_id):
        raise Rejected(
            f"Workflow {deployment.rollout_workflow_id!r} is rolling out revision {deployment.rollout_revision} of "
            f"{name}. Wait for it, or abort it.",
            status=409,
            code="rollout_in_progress",
        )
    await admin.workflows.temporal()
    await admin.audit.record(
        actor=ACTOR, action="rollout.start", subject=name, details={"revision": revision, **asdict(asked.policy)}
    )
    await admin.workflows.start(
        names.DEPLOYMENT_ROLLOUT, asked, workflow_id=workflow_id, task_queue=admin.settings.fleet_task_queue
    )
    return RolloutOut(workflow_id=workflow_id)


class SignalIn(Body):
    """What the roll-out that is on is told."""

    signal: Literal["abort", "pause", "resume", "promote"]
    reason: Label = Field(default="", description="Of an abort.", examples=["answers are too short"])


@router.post("/deployments/{name}/rollout/signal", status_code=202)
async def signal_rollout(name: DeploymentPath, body: SignalIn, admin: Admin) -> RolloutOut:
    """Abort, pause, resume or promote the roll-out that is on. May be repeated."""
    deployment = (await admin.catalog.load()).deployments.get(name)
    holder = deployment.rollout_workflow_id if deployment else None
    if holder is None:
        raise Rejected(f"No roll-out of {name} is on.", status=404, code="no_rollout")
    await admin.workflows.temporal()
    await admin.audit.record(
        actor=ACTOR, action=f"rollout.{body.signal}", subject=name, details={"reason": body.reason}
    )
    arguments = (body.reason,) if body.signal == names.ABORT and body.reason else ()
    if not await admin.workflows.signal(holder, body.signal, *arguments):
        raise Rejected(
            f"Workflow {holder!r} is not running. The worker takes the roll-out back within a minute.",
            status=409,
            code="workflow_not_running",
        )
    return RolloutOut(workflow_id=holder)


def _show(row: Revision) -> RevisionOut:
    spec = row.spec
    return RevisionOut(
        deployment=row.deployment,
        revision=row.revision,
        state=row.state,  # type: ignore[arg-type]
        engine=spec.engine,
        engine_version=spec.engine_version,
        weights=spec.weights,
        engine_args=list(spec.engine_args),
        gpus=list(spec.gpus),
        golden_prompts=len(spec.golden),
        created_at=row.created_at,
        created_by=row.created_by,
    )
