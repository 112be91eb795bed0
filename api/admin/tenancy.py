"""Orgs, environments, keys and limits."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import After, Body, Instant, Label, Limit, Page, after_uuid, page
from crosslogic.domain import ids, keys
from crosslogic.domain.catalog import Catalog
from crosslogic.domain.errors import Rejected
from crosslogic.domain.tenancy import GLOBAL_SUBJECT, LIMITS, Environment, Key, LimitRow, Org
from crosslogic.new_ids import new_id

router = APIRouter(route_class=AdminRoute)

State = Literal["active", "suspended"]
Plan = Literal["serverless", "reserved", "enterprise"]
EnvironmentName = Literal["dev", "staging", "prod"]
Layer = Literal["global", "org", "environment", "key"]

OrgName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", examples=["demo"])]
OrgPath = Annotated[str, Path(max_length=64, description="An org's id or name.", examples=["demo"])]
EnvironmentPath = Annotated[str, Path(max_length=64, description="An environment's id.", examples=["env_01k5…"])]
KeyPath = Annotated[str, Path(max_length=64, description="A key's id.", examples=["key_01k5…"])]
RegionName = Annotated[str, Field(max_length=64, description="A region's name or cloud alias.", examples=["in-mumbai"])]
ModelName = Annotated[str, Field(max_length=128, description="A model's name or alias.", examples=["llama-3-8b"])]


# Orgs


class OrgOut(BaseModel):
    """An org: owns and pays."""

    id: str = Field(examples=["org_01k5…"])
    name: str = Field(examples=["demo"])
    state: State
    plan: Plan
    region_preferences: list[str] = Field(description="Best first; used where an environment has no home region.")
    is_operator: bool = Field(description="One of our own: its keys are shown why a node was chosen.")
    created_at: datetime


class OrgIn(Body):
    """A new org."""

    name: OrgName
    plan: Plan = "serverless"
    region_preferences: list[RegionName] = Field(default=[], max_length=16)


class OrgChange(Body):
    """What to change; what is left out stays."""

    state: State | None = Field(default=None, description="`suspended` refuses all its keys within 1 s.")
    plan: Plan | None = None
    region_preferences: list[RegionName] | None = Field(default=None, max_length=16)
    is_operator: bool | None = Field(default=None, description="Show its keys why a node was chosen; within 1 s.")


@router.post("/orgs", status_code=201, responses={200: {"description": "It was there already, just like this."}})
async def create_org(body: OrgIn, admin: Admin, response: Response) -> OrgOut:
    """Create an org. Repeating it is harmless; an org of that name with other values is a 409."""
    preferences = await _resolve_regions(admin, body.region_preferences)
    org, is_new = await admin.tenancy.create_org(
        new_id(), body.name, plan=body.plan, region_preferences=preferences, actor=ACTOR
    )
    if not is_new:
        _refuse_difference("org", org.name, org, {"plan": body.plan, "region_preferences": tuple(preferences)})
        response.status_code = 200
    return _show_org(org)


@router.get("/orgs")
async def list_orgs(admin: Admin, state: State | None = None, limit: Limit = 50, after: After = None) -> Page[OrgOut]:
    """Orgs, oldest first."""
    rows = await admin.tenancy.list_orgs(after=after_uuid(ids.ORG, after), state=state, limit=limit + 1)
    return page(rows, limit, _show_org, lambda org: org.id)


@router.get("/orgs/{org}")
async def get_org(org: OrgPath, admin: Admin) -> OrgOut:
    """One org."""
    return _show_org(await find_org(admin, org))


@router.patch("/orgs/{org}")
async def update_org(org: OrgPath, body: OrgChange, admin: Admin) -> OrgOut:
    """Suspend or resume an org, change its plan or its region preferences, or make it an operator's."""
    changes: dict[str, Any] = body.model_dump(exclude_unset=True)
    _refuse_nulls(changes, changes)
    if body.region_preferences is not None:
        changes["region_preferences"] = await _resolve_regions(admin, body.region_preferences)
    found = await find_org(admin, org)
    return _show_org(await admin.tenancy.update_org(found.id, changes, actor=ACTOR))


# Environments


class EnvironmentOut(BaseModel):
    """An environment: a partition of an org, with keys, limits and usage of its own."""

    id: str = Field(examples=["env_01k5…"])
    org: str = Field(description="The org's name.", examples=["demo"])
    org_id: str
    name: EnvironmentName
    state: State
    home_region: str | None = Field(description="Where its requests belong; null: the org's first preference.")
    allowed_models: list[str] | None = Field(description="Null: all models.")
    created_at: datetime


class EnvironmentIn(Body):
    """A new environment."""

    org: Annotated[str, Field(max_length=64, description="The org's id or name.", examples=["demo"])]
    name: EnvironmentName
    home_region: RegionName | None = None
    allowed_models: list[ModelName] | None = Field(default=None, max_length=1000)


class EnvironmentChange(Body):
    """What to change; what is left out stays. Null takes a home region or a list of models away."""

    state: State | None = None
    home_region: RegionName | None = None
    allowed_models: list[ModelName] | None = Field(default=None, max_length=1000)


@router.post(
    "/environments", status_code=201, responses={200: {"description": "It was there already, just like this."}}
)
async def create_environment(body: EnvironmentIn, admin: Admin, response: Response) -> EnvironmentOut:
    """Create an environment. Repeating it is harmless; one of that name with other values is a 409."""
    catalog = await admin.catalog.load()
    region = None if body.home_region is None else catalog.regions.resolve(body.home_region)
    models = None if body.allowed_models is None else _resolve_models(catalog, body.allowed_models)
    org = await find_org(admin, body.org, param="org")
    environment, is_new = await admin.tenancy.create_environment(
        new_id(), org.id, body.name, home_region=region, allowed_models=models, actor=ACTOR
    )
    if not is_new:
        asked = {"home_region": region, "allowed_models": None if models is None else tuple(models)}
        _refuse_difference("environment", f"{org.name}/{body.name}", environment, asked)
        response.status_code = 200
    return _show_environment(environment)


@router.get("/environments")
async def list_environments(
    admin: Admin,
    org: Annotated[str | None, Query(max_length=64, description="Only this org's, by id or name.")] = None,
    name: EnvironmentName | None = None,
    limit: Limit = 50,
    after: After = None,
) -> Page[EnvironmentOut]:
    """Environments, oldest first."""
    org_id = None if org is None else (await find_org(admin, org, param="org")).id
    rows = await admin.tenancy.list_environments(
        after=after_uuid(ids.ENVIRONMENT, after), org_id=org_id, name=name, limit=limit + 1
    )
    return page(rows, limit, _show_environment, lambda environment: environment.id)


@router.get("/environments/{environment_id}")
async def get_environment(environment_id: EnvironmentPath, admin: Admin) -> EnvironmentOut:
    """One environment."""
    return _show_environment(await admin.tenancy.get_environment(ids.ENVIRONMENT.parse(environment_id)))


@router.patch("/environments/{environment_id}")
async def update_environment(environment_id: EnvironmentPath, body: EnvironmentChange, admin: Admin) -> EnvironmentOut:
    """Suspend or resume an environment, change its home region or the models it may use."""
    changes: dict[str, Any] = body.model_dump(exclude_unset=True)
    _refuse_nulls(changes, ("state",))
    if body.home_region is not None or body.allowed_models is not None:
        catalog = await admin.catalog.load()
        if body.home_region is not None:
            changes["home_region"] = catalog.regions.resolve(body.home_region)
        if body.allowed_models is not None:
            changes["allowed_models"] = _resolve_models(catalog, body.allowed_models)
    return _show_environment(
        await admin.tenancy.update_environment(ids.ENVIRONMENT.parse(environment_id), changes, actor=ACTOR)
    )


# Keys


class KeyOut(BaseModel):
    """A key without its secret, which nobody can show again."""

    id: str = Field(examples=["key_01k5…"])
    org: str = Field(description="The org's name.", examples=["demo"])
    org_id: str
    environment: EnvironmentName
    environment_id: str
    name: str
    role: Literal["admin", "developer", "read-only"]
    state: Literal["active", "suspended", "revoked"]
    hint: str = Field(description="The secret's last four characters.", examples=["X7fQ"])
    expires_at: datetime | None = Field(description="From then on it is refused; null: never.")
    created_at: datetime


class NewKeyOut(KeyOut):
    """A new key with its secret. This is the only time that it is shown."""

    secret: str = Field(description="Keep it: only a hash is stored.", examples=["sk_dev_…"])


class KeyIn(Body):
    """A new key, for an environment given by its id, or by org and name."""

    environment_id: str | None = Field(default=None, max_length=64, examples=["env_01k5…"])
    org: str | None = Field(default=None, max_length=64, description="The org's id or name.", examples=["demo"])
    environment: EnvironmentName | None = None
    name: Label = Field(default="", description="For people.", examples=["laptop"])
    role: Literal["admin", "developer", "read-only"] = Field(
        default="developer", description="`read-only` may list models and read usage, but not infer."
    )
    expires_at: Instant | None = None


class RotationIn(Body):
    """How a key is replaced by another."""

    overlap_s: int = Field(
        default=86_400,
        strict=True,
        ge=0,
        le=30 * 86_400,
        description="So long the old key goes on working.",
        examples=[86_400],
    )
    expires_at: Instant | None = Field(
        default=None,
        description="When the successor expires. Must be given, if only as null, where the old key has one.",
    )


class RotationOut(BaseModel):
    """Both keys of a rotation."""

    old: KeyOut
    new: NewKeyOut


@router.post("/keys", status_code=201)
async def create_key(body: KeyIn, admin: Admin) -> NewKeyOut:
    """Create a key. The answer shows its secret, once. Not idempotent: a lost answer's key should be revoked."""
    environment = await _find_environment(admin, body)
    _refuse_past(body.expires_at)
    secret = keys.mint(environment.name, secrets.token_bytes(keys.RANDOM_BYTES))
    key, _ = await admin.tenancy.create_key(
        new_id(),
        environment.id,
        secret_hash=keys.hash_secret(secret),
        hint=keys.hint_of(secret),
        name=body.name,
        role=body.role,
        expires_at=body.expires_at,
        actor=ACTOR,
    )
    return NewKeyOut(**_show_key(key).model_dump(), secret=secret)


@router.get("/keys")
async def list_keys(
    admin: Admin,
    org: Annotated[str | None, Query(max_length=64, description="Only this org's, by id or name.")] = None,
    environment_id: Annotated[str | None, Query(max_length=64)] = None,
    limit: Limit = 50,
    after: After = None,
) -> Page[KeyOut]:
    """Keys, oldest first."""
    rows = await admin.tenancy.list_keys(
        after=after_uuid(ids.KEY, after),
        org_id=None if org is None else (await find_org(admin, org, param="org")).id,
        environment_id=after_uuid(ids.ENVIRONMENT, environment_id),
        limit=limit + 1,
    )
    return page(rows, limit, _show_key, lambda key: key.id)


@router.get("/keys/{key_id}")
async def get_key(key_id: KeyPath, admin: Admin) -> KeyOut:
    """One key, without its secret."""
    return _show_key(await admin.tenancy.get_key(ids.KEY.parse(key_id)))


@router.post("/keys/{key_id}/revoke")
async def revoke_key(key_id: KeyPath, admin: Admin) -> KeyOut:
    """Refuse the key for ever, everywhere within 1 s."""
    return _show_key(await admin.tenancy.set_key_state(ids.KEY.parse(key_id), "revoked", actor=ACTOR))


@router.post("/keys/{key_id}/suspend")
async def suspend_key(key_id: KeyPath, admin: Admin) -> KeyOut:
    """Refuse the key until it is resumed, everywhere within 1 s."""
    return _show_key(await admin.tenancy.set_key_state(ids.KEY.parse(key_id), "suspended", actor=ACTOR))


@router.post("/keys/{key_id}/resume")
async def resume_key(key_id: KeyPath, admin: Admin) -> KeyOut:
    """Accept a suspended key again."""
    return _show_key(await admin.tenancy.set_key_state(ids.KEY.parse(key_id), "active", actor=ACTOR))


@router.post("/keys/{key_id}/rotate", status_code=201)
async def rotate_key(key_id: KeyPath, body: RotationIn, admin: Admin) -> RotationOut:
    """Make a successor with the same environment, role and limits; the old key works on for `overlap_s`."""
    old = await admin.tenancy.get_key(ids.KEY.parse(key_id))
    if old.expires_at is not None and "expires_at" not in body.model_fields_set:
        raise Rejected(
            f"Key {key_id} expires at {old.expires_at.isoformat()}. Say when its successor does: expires_at, or null "
            "for never.",
            code="missing_expiry",
            param="expires_at",
        )
    _refuse_past(body.expires_at)
    secret = keys.mint(old.environment_name, secrets.token_bytes(keys.RANDOM_BYTES))
    old, new = await admin.tenancy.rotate_key(
        old.id,
        new_id(),
        secret_hash=keys.hash_secret(secret),
        hint=keys.hint_of(secret),
        overlap=timedelta(seconds=body.overlap_s),
        expires_at=body.expires_at,
        actor=ACTOR,
    )
    return RotationOut(old=_show_key(old), new=NewKeyOut(**_show_key(new).model_dump(), secret=secret))


# Limits

LimitValue = Annotated[
    int | None,
    Field(
        strict=True,
        ge=-1,
        le=10**15,
        description="Null: the layer's default. -1: no limit. 0: nothing passes.",
        examples=[120],
    ),
]


LimitName = Literal["requests_per_min", "tokens_per_min", "tokens_per_day", "concurrency", "monthly_spend_microdollars"]


class LimitsOut(BaseModel):
    """What is set for one subject of one layer. Null means the layer's default, -1 no limit."""

    layer: Layer
    subject_id: str = Field(description="An id; `all` for the global layer.", examples=["key_01k5…"])
    requests_per_min: int | None
    tokens_per_min: int | None
    tokens_per_day: int | None
    concurrency: int | None
    monthly_spend_microdollars: int | None = Field(description="Orgs only.")
    dry_run: list[LimitName] = Field(description="Limits that count and report but refuse nothing.")


class LimitsIn(Body):
    """The limits to set; those left out stay as they are."""

    requests_per_min: LimitValue = None
    tokens_per_min: LimitValue = None
    tokens_per_day: LimitValue = None
    concurrency: LimitValue = None
    monthly_spend_microdollars: LimitValue = Field(default=None, description="Orgs only; 1 000 000 is one dollar.")
    dry_run: list[LimitName] = Field(
        default=[], max_length=len(LIMITS), description="All limits that shall count and report but refuse nothing."
    )


SubjectPath = Annotated[
    str, Path(max_length=64, description="The subject's id (or org's name); `all` for the global layer.")
]


@router.get("/limits/{layer}/{subject_id}")
async def get_limits(layer: Layer, subject_id: SubjectPath, admin: Admin) -> LimitsOut:
    """What is set for a subject."""
    return _show_limits(await admin.tenancy.get_limits(layer, await _subject(admin, layer, subject_id)))


@router.put("/limits/{layer}/{subject_id}")
async def set_limits(layer: Layer, subject_id: SubjectPath, body: LimitsIn, admin: Admin) -> LimitsOut:
    """Set some of a subject's limits; acts everywhere within 1 s."""
    changes = body.model_dump(exclude_unset=True)
    if not changes:
        raise Rejected(f"Give at least one of: {', '.join(LIMITS)}, dry_run.", code="nothing_to_set")
    dry_run: list[str] | None = changes.pop("dry_run", None)
    subject = await _subject(admin, layer, subject_id)
    return _show_limits(await admin.tenancy.set_limits(layer, subject, changes, dry_run=dry_run, actor=ACTOR))


# Helpers


async def find_org(admin: Admin, shown: str, param: str | None = None) -> Org:
    """By id or name; names have no underscore and ids always do."""
    try:
        if "_" in shown:
            return await admin.tenancy.get_org(org_id=ids.ORG.parse(shown))
        return await admin.tenancy.get_org(name=shown.replace("\x00", ""))
    except Rejected as error:
        error.param = param
        raise


async def _find_environment(admin: Admin, body: KeyIn) -> Environment:
    if body.environment_id is not None and body.org is None and body.environment is None:
        return await admin.tenancy.get_environment(ids.ENVIRONMENT.parse(body.environment_id))
    if body.environment_id is not None or body.org is None or body.environment is None:
        raise Rejected("Give either environment_id, or both org and environment.", code="which_environment")
    org = await find_org(admin, body.org, param="org")
    found = await admin.tenancy.list_environments(org_id=org.id, name=body.environment, limit=1)
    if not found:
        raise Rejected(
            f"Org {org.name} has no environment {body.environment}. Create it first.",
            status=404,
            code="environment_not_found",
            param="environment",
        )
    return found[0]


async def _subject(admin: Admin, layer: str, shown: str) -> UUID:
    if layer == "global":
        if shown != "all":
            raise Rejected("The global layer has one subject: all.", code="invalid_id", param="subject_id")
        return GLOBAL_SUBJECT
    if layer == "org":
        return (await find_org(admin, shown)).id
    return (ids.KEY if layer == "key" else ids.ENVIRONMENT).parse(shown)


async def _resolve_regions(admin: Admin, names: list[str]) -> list[str]:
    """Our names, each once, in the given order. Raises Rejected for an unknown one."""
    if not names:
        return []
    regions = (await admin.catalog.load()).regions
    return list(dict.fromkeys(regions.resolve(name) for name in names))


def _resolve_models(catalog: Catalog, names: list[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        model = catalog.resolve_model(name)
        if model is None:
            raise Rejected(
                f"There is no model {name[:64]!r}. Use one of: {', '.join(catalog.models)}.",
                code="model_not_found",
                param="allowed_models",
            )
        found[model.name] = None
    return list(found)


def _refuse_difference(noun: str, shown: str, existing: Org | Environment, asked: dict[str, Any]) -> None:
    """A repeated creation must ask for what is there."""
    for name, value in asked.items():
        if getattr(existing, name) != value:
            raise Rejected(
                f"There is an {noun} {shown} already, with another {name}. Change it with PATCH.",
                status=409,
                code=f"{noun}_exists",
                param=name,
            )


def _refuse_nulls(changes: dict[str, Any], names: Any) -> None:
    for name in names:
        if name in changes and changes[name] is None:
            raise Rejected(f"{name} cannot be null; leave it out to keep it.", code="invalid_request", param=name)


def _refuse_past(expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise Rejected("expires_at is in the past.", code="invalid_request", param="expires_at")


def _show_org(org: Org) -> OrgOut:
    return OrgOut.model_validate(asdict(org) | {"id": ids.ORG.show(org.id)})


def _show_environment(environment: Environment) -> EnvironmentOut:
    return EnvironmentOut.model_validate(
        asdict(environment)
        | {
            "id": ids.ENVIRONMENT.show(environment.id),
            "org": environment.org_name,
            "org_id": ids.ORG.show(environment.org_id),
        }
    )


def _show_key(key: Key) -> KeyOut:
    return KeyOut.model_validate(
        asdict(key)
        | {
            "id": ids.KEY.show(key.id),
            "org": key.org_name,
            "org_id": ids.ORG.show(key.org_id),
            "environment": key.environment_name,
            "environment_id": ids.ENVIRONMENT.show(key.environment_id),
        }
    )


def _show_limits(row: LimitRow) -> LimitsOut:
    shown = {"org": ids.ORG.show, "environment": ids.ENVIRONMENT.show, "key": ids.KEY.show}.get(row.layer)
    return LimitsOut.model_validate(
        asdict(row)
        | {"subject_id": shown(row.subject_id) if shown else "all", "dry_run": sorted(row.dry_run, key=LIMITS.index)}
    )
