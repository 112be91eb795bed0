"""Node agents, as operators see them: who may join, who has, and what they are asked."""

from __future__ import annotations

import hashlib
import re
import secrets
import ssl
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.admin.catalog import resolve_model
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.nodes import ModelName, NodePath, RegionName
from api.admin.schemas import After, Body, Limit, Page, after_uuid, page
from api.admin.tenancy import find_org
from crosslogic.agent.build import build
from crosslogic.domain import ids
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.store.agents import Agent, AgentStore, Invitation

router = APIRouter(route_class=AdminRoute)

_FIRST_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class InviteIn(Body):
    """A node that somebody else will start an agent on."""

    model: ModelName
    region: RegionName
    org: str | None = Field(
        default=None, max_length=64, description="Id or name of the org that alone it serves; left out: everybody."
    )
    valid_for_h: int = Field(default=24, strict=True, ge=1, le=720, description="How long the token can be used.")


class InvitedOut(BaseModel):
    """What the agent must be started with."""

    node_id: str = Field(examples=["node_01k5…"])
    join_token: str = Field(description="Shown once. The first key that registers with it has used it.")
    expires_at: datetime
    agent_sha256: str = Field(description="Fingerprint of `/agent/crosslogic-agent.pyz`.")
    ca_sha256: str = Field(description="Fingerprint of the API's own authority; empty: a public one.")


class AgentOut(BaseModel):
    """An agent that has registered."""

    node_id: str = Field(examples=["node_01k5…"])
    node_state: str | None = Field(description="Null: the node's row is not there yet.")
    org: str | None
    endpoint: str
    engine: str
    version: str
    registered_at: datetime
    certificate_expires_at: datetime | None
    is_renewal_due: bool = Field(description="It was told to renew its certificate and has not yet.")
    notice: str = Field(description="The cloud's word that it takes the machine; empty: none.")


class LogsOut(BaseModel):
    """The engine's latest lines."""

    text: str
    at: datetime | None = Field(description="When they came; null: never.")
    is_asked: bool = Field(description="Newer ones were asked for and have not come yet.")


@router.post("/nodes/invite", status_code=201)
async def invite_node(body: InviteIn, admin: Admin) -> InvitedOut:
    """Make a join token for one node, perhaps of one org. Its agent registers with it and is joined by itself."""
    catalog = await admin.catalog.load()
    model, region = resolve_model(catalog, body.model), catalog.regions.resolve(body.region)
    org_id = None if body.org is None else (await find_org(admin, body.org, param="org")).id
    node_id = new_id()
    token = f"jt_{secrets.token_urlsafe(32)}"
    expires_at = datetime.now(UTC) + timedelta(hours=body.valid_for_h)
    await AgentStore(admin.pool).invite(token, Invitation(node_id, expires_at, org_id, model.name, region), actor=ACTOR)
    return InvitedOut(
        node_id=ids.NODE.show(node_id),
        join_token=token,
        expires_at=expires_at,
        agent_sha256=hashlib.sha256(build()).hexdigest(),
        ca_sha256=_fingerprint(admin.settings),
    )


@router.get("/agents")
async def list_agents(
    admin: Admin,
    include_ended: Annotated[bool, Query(description="Those of nodes that have ended, too.")] = False,
    limit: Limit = 50,
    after: After = None,
) -> Page[AgentOut]:
    """Agents, newest node first."""
    rows = await AgentStore(admin.pool).list_page(
        before=after_uuid(ids.NODE, after), limit=limit + 1, include_ended=include_ended
    )
    return page(rows, limit, _show_agent, lambda agent: agent.node_id)


@router.get("/agents/{node_id}/logs")
async def read_logs(node_id: NodePath, admin: Admin) -> LogsOut:
    """The lines that the agent sent last."""
    store, uuid = AgentStore(admin.pool), ids.NODE.parse(node_id)
    agent = await store.get(uuid)
    return LogsOut(text=await store.read_logs(uuid), at=agent.logs_at, is_asked=agent.owes_logs)


@router.post("/agents/{node_id}/logs", status_code=202)
async def ask_logs(node_id: NodePath, admin: Admin) -> AgentOut:
    """Ask for its engine's latest lines; they come with one of its next heartbeats."""
    store, agent = await _told(admin, node_id, "agent.ask_logs")
    await store.ask_logs(agent.node_id)
    return _show_agent(agent)


@router.post("/agents/{node_id}/renew", status_code=202)
async def ask_renewal(node_id: NodePath, admin: Admin) -> AgentOut:
    """Have it make a new key and get a new certificate, with one of its next heartbeats."""
    store, agent = await _told(admin, node_id, "agent.ask_renewal")
    await store.ask_renewal(agent.node_id)
    return _show_agent(await store.get(agent.node_id))


async def _told(admin: Admin, node_id: str, action: str) -> tuple[AgentStore, Agent]:
    store = AgentStore(admin.pool)
    agent = await store.get(ids.NODE.parse(node_id))
    await admin.audit.record(actor=ACTOR, action=action, subject=node_id, details={})
    return store, agent


def _fingerprint(settings: Settings) -> str:
    if settings.api_ca_file is None:
        return ""
    found = _FIRST_CERTIFICATE.search(settings.api_ca_file.read_text())
    return "" if found is None else hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0])).hexdigest()


def _show_agent(agent: Agent) -> AgentOut:
    return AgentOut(
        node_id=ids.NODE.show(agent.node_id),
        node_state=agent.node_state,
        org=None if agent.org_id is None else ids.ORG.show(agent.org_id),
        endpoint=agent.endpoint,
        engine=agent.engine,
        version=agent.version,
        registered_at=agent.registered_at,
        certificate_expires_at=agent.certificate_expires_at,
        is_renewal_due=agent.owes_renewal,
        notice=agent.notice,
    )
