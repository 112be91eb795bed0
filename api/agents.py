"""What node agents call: under `/agent`, apart from the operators' API, with credentials that open nothing else.

An agent proves itself once with a join token, and from then on with its session, which is bound to its node. Nothing
that it says is believed beyond its own node: nodes are not trusted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

from api.admin.context import AdminContext, guard_database
from api.admin.schemas import Body, ErrorOut
from crosslogic.agent import build
from crosslogic.clients.authority import key_hash, read_request
from crosslogic.contracts import names
from crosslogic.contracts.node import NodeLifecycleInput, NodeSpec
from crosslogic.domain.certificates import join_token, read_session, renew_at, session_token
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, NodeEvent, NodeState, check_endpoint
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.hot.routes import RouteBoard
from crosslogic.store.agents import Agent, AgentStore, Invitation
from crosslogic.trust import Trust

log = logging.getLogger("crosslogic.agents")

MOST_BODY_BYTES = 16_000
MOST_LOG_BODY_BYTES = 1_000_000
BODY_TIMEOUT_S = 20.0
# A registration costs a signature; so many a second and process are enough for a fleet that starts all at once.
REGISTRATIONS_PER_S = 20
# Agents send every 5 s.
LEAST_HEARTBEAT_INTERVAL_S = 0.05
# A derived token is good for as long as its node is on its way, and no longer than this.
LAUNCH_TOKEN_LIFE = timedelta(hours=6)
# What is remembered of nodes' last heartbeats, for the interval.
MOST_REMEMBERED = 20_000

_HEARTBEAT_TYPES = {one.name: str(one.type) for one in fields(Heartbeat)}


@dataclass
class AgentContext:
    """Built once by the app and kept in `app.state.agents`."""

    admin: AdminContext
    trust: Trust
    heartbeats: HeartbeatBoard
    board: RouteBoard
    agents: AgentStore = field(init=False)
    _tokens: float = field(default=float(REGISTRATIONS_PER_S), init=False)
    _refilled_at: float = field(default=0.0, init=False)
    _heard_at: dict[str, float] = field(default_factory=dict[str, float], init=False)

    def __post_init__(self) -> None:
        self.agents = AgentStore(self.admin.pool)

    @property
    def secret(self) -> str:
        """The root of node credentials, join tokens and sessions."""
        secret = self.admin.settings.node_secret
        assert secret is not None, "settings without a node secret are not valid"
        return secret.get_secret_value()

    @cached_property
    def zipapp(self) -> bytes:
        """The agent, as nodes fetch it."""
        return build.build()

    @cached_property
    def zipapp_sha256(self) -> str:
        """Its fingerprint, in hexadecimal."""
        return hashlib.sha256(self.zipapp).hexdigest()

    def take_registration(self, now: float) -> None:
        """Raise Rejected (429) when registrations come too fast."""
        self._tokens = min(REGISTRATIONS_PER_S, self._tokens + (now - self._refilled_at) * REGISTRATIONS_PER_S)
        self._refilled_at = now
        if self._tokens < 1:
            raise Rejected(
                "Too many nodes register at once; try again.", status=429, code="too_many_agents", retry_after_s=1
            )
        self._tokens -= 1

    def take_heartbeat(self, node_id: str, now: float) -> None:
        """Raise Rejected (429) when one node sends without pause."""
        heard_at = self._heard_at.pop(node_id, -math.inf)
        if len(self._heard_at) >= MOST_REMEMBERED:
            self._heard_at.pop(next(iter(self._heard_at)))
        self._heard_at[node_id] = now
        if now - heard_at < LEAST_HEARTBEAT_INTERVAL_S:
            raise Rejected(
                "This node sends too often; every 5 s is enough.",
                status=429,
                code="too_many_heartbeats",
                retry_after_s=1,
            )


def _context(request: Request) -> AgentContext:
    context: AgentContext = request.app.state.agents
    return context


Agents = Annotated[AgentContext, Depends(_context)]


def _node_id(request: Request, agents: Agents) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise Rejected("No agent's session was given.", status=401, code="missing_session")
    return read_session(agents.secret, token.strip(), time.time())


# The node that a call comes from: by its session, never by what the body says.
Caller = Annotated[str, Depends(_node_id)]


class AgentRoute(APIRoute):
    """Bounds what is read of a body and for how long, and turns a database that is away into a 503."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind these bounds."""
        handle = super().get_route_handler()
        most = MOST_LOG_BODY_BYTES if self.path.endswith("/logs") else MOST_BODY_BYTES

        async def bounded(request: Request) -> Response:
            if request.method == "POST":
                if self.path != "/agent/register":
                    # Whoever is nobody's agent has no bytes of a body read.
                    _node_id(request, _context(request))
                await _read_body(request, most)
            return await guard_database(handle(request))

        return bounded


async def _read_body(request: Request, most: int) -> None:
    chunks: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                length += len(chunk)
                if length > most:
                    raise Rejected(f"The body is longer than {most} bytes.", status=413, code="body_too_large")
                chunks.append(chunk)
    except TimeoutError as error:
        raise Rejected("The body did not arrive in time.", status=408, code="body_timeout") from error
    # Where the framework looks for a body that was read already.
    request._body = b"".join(chunks)  # pyright: ignore[reportPrivateUsage]


router = APIRouter(
    prefix="/agent",
    route_class=AgentRoute,
    tags=["agents"],
    responses={
        "4XX": {"model": ErrorOut, "description": "The request cannot be granted; the message says why."},
        "5XX": {"model": ErrorOut, "description": "Something is away: send it again."},
    },
)

# Errors are JSON at these paths too.
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

Pem = Annotated[str, Field(min_length=1, max_length=4_000)]


class RegisterIn(Body):
    """A node that comes for the first time."""

    node_id: str = Field(max_length=64, examples=["node_01k5…"])
    token: str = Field(max_length=100, description="Its join token: good once.")
    csr: Pem = Field(description="Certificate signing request (PEM) for a P-256 key that was made on the node.")
    engine: Literal["vllm", "sglang", "llamacpp"]
    endpoint: str = Field(default="", max_length=500, description="How we reach it; empty: where the call comes from.")
    port: int = Field(default=8443, ge=1, le=65_535, description="The port of an endpoint that is left out.")
    version: str = Field(default="", max_length=32)


class RenewIn(Body):
    """A new key for the same node."""

    csr: Pem


class CertificateOut(BaseModel):
    """A certificate and what goes with it."""

    certificate: str = Field(description="PEM.")
    bundle: str = Field(description="The authorities whose client certificates the node must ask for, as PEM.")
    bundle_id: str
    session: str = Field(
        description="Bearer token for everything else under `/agent`, as long-lived as the certificate."
    )
    renew_in_s: float


class RegisteredOut(CertificateOut):
    """What a node needs to serve."""

    credential: str = Field(description="The API key that its engine must accept.")


class NoticeIn(Body):
    """The cloud's word that it will take the machine."""

    notice: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$", examples=["aws: terminate"])
    left_s: float | None = Field(default=None, ge=0, le=86_400, allow_inf_nan=False)
    is_final: bool = Field(default=True, description="False: it only becomes likelier.")


class LogsIn(Body):
    """The engine's latest lines."""

    text: str = Field(max_length=900_000)


class OrdersOut(BaseModel):
    """What an agent should do. Each is a fact of now: it is said again until it is done."""

    commands: list[Literal["drain", "renew", "logs", "stop"]] = []
    bundle_id: str = Field(default="", description="Of the authorities that are trusted now; another one: read them.")


@router.get("/crosslogic-agent.pyz", response_class=Response, responses=_FILE)
async def read_agent(agents: Agents) -> Response:
    """The agent: one file that any Python from 3.9 on runs."""
    return Response(agents.zipapp, media_type="application/octet-stream", headers={"etag": f'"{agents.zipapp_sha256}"'})


@router.get("/crosslogic-agent.pyz.sha256", response_class=Response, responses=_TEXT)
async def read_agent_sha256(agents: Agents) -> PlainTextResponse:
    """Its SHA-256, as `sha256sum -c` reads it."""
    return PlainTextResponse(f"{agents.zipapp_sha256}  {build.NAME}\n")


@router.get("/ca.pem", response_class=Response, responses=_TEXT)
async def read_bundle(agents: Agents) -> PlainTextResponse:
    """The authorities whose certificates nodes and control plane believe."""
    return PlainTextResponse(await agents.trust.bundle())


@router.get("/control-ca.pem", response_class=Response, responses=_TEXT)
async def read_control_authority(agents: Agents) -> PlainTextResponse:
    """The authority of the API's own certificate, where it is no public one. Agents take it by its fingerprint only."""
    path = agents.admin.settings.api_ca_file
    if path is None:
        raise Rejected("The API's certificate is a public one.", status=404, code="no_private_authority")
    return PlainTextResponse(await asyncio.to_thread(path.read_text))


@router.post("/register")
async def register(body: RegisterIn, request: Request, agents: Agents) -> RegisteredOut:
    """Let a node in: a certificate for its key, by a join token. The same key may ask again; no other one may.

    An invited node is joined by its `NodeLifecycle`, which this starts; one that we launch is awaited by its
    provisioning already.
    """
    agents.take_registration(asyncio.get_running_loop().time())
    uuid = NODE.parse(body.node_id)
    is_dev = agents.admin.settings.is_dev
    peer = request.client.host if request.client is not None else ""
    shown = f"[{peer}]" if ":" in peer else peer
    endpoint = check_endpoint(body.endpoint or f"https://{shown}:{body.port}", is_loopback_allowed=is_dev)
    if not endpoint.startswith("https://"):
        raise Rejected("An agent's endpoint is reached over https.", code="invalid_endpoint", param="endpoint")
    csr = read_request(body.csr)
    await _admit_launched(agents, uuid, body.token)
    invitation = await agents.agents.use_token(body.token, uuid, key_hash(csr))
    await _check_alive(agents, uuid)
    if invitation.model is not None:
        # Before anything is written: without its lifecycle the node would serve nobody.
        await agents.admin.workflows.temporal()
    made, issued = await agents.trust.issue(body.node_id, body.csr, endpoint)
    await agents.agents.register(
        uuid, issued, org_id=invitation.org_id, endpoint=endpoint, engine=body.engine, version=body.version
    )
    if invitation.model is not None:
        await _join(agents, invitation, endpoint)
    return RegisteredOut(
        **await _certificate_fields(agents, body.node_id, made.pem, issued.issued_at, issued.expires_at),
        credential=node_credential(agents.secret, body.node_id),
    )


@router.post("/renew")
async def renew(body: RenewIn, node_id: Caller, agents: Agents) -> CertificateOut:
    """A certificate for the node's new key, and a new session; the old ones end by themselves."""
    uuid = NODE.parse(node_id)
    agent = await agents.agents.get(uuid)
    _check_not_ended(agent)
    made, issued = await agents.trust.issue(node_id, body.csr, agent.endpoint)
    await agents.agents.add_certificate(uuid, issued)
    return CertificateOut(**await _certificate_fields(agents, node_id, made.pem, issued.issued_at, issued.expires_at))


@router.post("/heartbeat")
async def heartbeat(request: Request, node_id: Caller, agents: Agents) -> OrdersOut:
    """Take what a node says of itself, and answer with what it should do. Fields of a newer agent are ignored."""
    agents.take_heartbeat(node_id, asyncio.get_running_loop().time())
    beat = read_heartbeat(await request.json(), node_id, time.time())
    try:
        await agents.heartbeats.put(beat)
    except Unavailable as error:
        # The next one comes in seconds; the orders must arrive all the same.
        log.warning("a heartbeat of %s was not kept: %s", node_id, error.message)
    try:
        agent = await guard_database(agents.agents.get(NODE.parse(node_id)))
    except Unavailable:
        # Heard all the same; the orders come with a later one.
        return OrdersOut()
    commands: list[Literal["drain", "renew", "logs", "stop"]] = []
    if agent.is_ended:
        return OrdersOut(commands=["stop"])
    if agent.node_state is NodeState.DRAINING:
        commands.append("drain")
    if agent.owes_renewal:
        commands.append("renew")
    if agent.owes_logs:
        commands.append("logs")
    return OrdersOut(commands=commands, bundle_id=await agents.trust.bundle_id())


@router.post("/notice")
async def notice(body: NoticeIn, node_id: Caller, agents: Agents) -> OrdersOut:
    """Take a spot notice: out of routing at once (F9), and the node's workflow is told, which replaces it.

    Repeating it changes nothing; it is answered only when all of it is done, so that the agent sends it again if not.
    """
    uuid = NODE.parse(node_id)
    if body.is_final:
        node = await agents.admin.nodes.find(uuid)
        text = body.notice if body.left_s is None else f"{body.notice} in {body.left_s:.0f} s"
        if node is not None and node.state is NodeState.READY:
            node = await agents.admin.nodes.advance(uuid, NodeEvent.DRAIN, f"spot notice: {text}")
            await _publish(agents, node_id, agents.board.publish(node.route_entry))
    else:
        node, text = None, ""
    await _publish(agents, node_id, _keep_notice(agents, node_id, body))
    if body.is_final:
        await agents.agents.note_notice(uuid, text)
        if node is not None and node.state not in FINAL_STATES:
            await agents.admin.workflows.signal(node.workflow_id, names.SPOT_NOTICE, text)
    return OrdersOut()


@router.post("/logs")
async def take_logs(body: LogsIn, node_id: Caller, agents: Agents) -> OrdersOut:
    """Keep the engine's latest lines, which an operator has asked for. Those that nobody asked for are refused."""
    uuid = NODE.parse(node_id)
    agent = await agents.agents.get(uuid)
    if not agent.owes_logs:
        raise Rejected("Nobody has asked for this node's logs.", status=409, code="logs_not_asked")
    # Postgres has no place for NUL in text.
    await agents.agents.put_logs(uuid, body.text.replace("\x00", ""))
    return OrdersOut()


def read_heartbeat(body: Any, node_id: str, received_at: float) -> Heartbeat:
    """A heartbeat from what a node sent. Raises Rejected for a field of the wrong type; nodes are not trusted."""
    if not isinstance(body, dict):
        raise Rejected("A heartbeat is a JSON object.", code="invalid_heartbeat")
    given, found = cast("dict[str, Any]", body), dict[str, Any]()
    for name, kind in _HEARTBEAT_TYPES.items():
        value = given.get(name)
        if name in ("node_id", "received_at") or value is None:
            continue
        if not _is_right(kind, value):
            raise Rejected(f"{name}: not what a heartbeat has there.", code="invalid_heartbeat", param=name)
        found[name] = int(value) if kind.startswith("int") else value
    found.setdefault("is_engine_up", False)
    return Heartbeat(node_id=node_id, received_at=received_at, **found)


def _is_right(kind: str, value: object) -> bool:
    if kind.startswith("bool"):
        return isinstance(value, bool)
    if kind.startswith("str"):
        return isinstance(value, str) and len(value) <= 100 and value.isprintable()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        return False
    return not kind.startswith("int") or value == int(value)


async def _admit_launched(agents: AgentContext, uuid: UUID, token: str) -> None:
    """The derived token of a node that we are launching counts as handed out: its intent is written (F3)."""
    if token != join_token(agents.secret, NODE.show(uuid)):
        return
    node = await agents.admin.nodes.find(uuid)
    if node is not None and node.state in ON_THE_WAY and not node.is_tombstoned:
        until = datetime.now(UTC) + LAUNCH_TOKEN_LIFE
        await agents.agents.invite(token, Invitation(uuid, until), actor=node.workflow_id)


async def _check_alive(agents: AgentContext, uuid: UUID) -> None:
    node = await agents.admin.nodes.find(uuid)
    if node is not None and (node.state in FINAL_STATES or node.is_tombstoned):
        raise Rejected(f"Node {node.node_id} has ended and never comes back.", status=410, code="node_ended")


def _check_not_ended(agent: Agent) -> None:
    if agent.is_ended:
        raise Rejected(
            f"Node {NODE.show(agent.node_id)} has ended and never comes back.", status=410, code="node_ended"
        )


async def _join(agents: AgentContext, invitation: Invitation, endpoint: str) -> None:
    node_id = NODE.show(invitation.node_id)
    assert invitation.model is not None
    assert invitation.region is not None
    await agents.admin.workflows.start(
        names.NODE_LIFECYCLE,
        NodeLifecycleInput(
            NodeSpec(node_id=node_id, model=invitation.model, region=invitation.region, endpoint=endpoint),
            is_admitted=False,
        ),
        workflow_id=names.node_workflow_id(node_id),
        task_queue=agents.admin.settings.fleet_task_queue,
    )


async def _certificate_fields(
    agents: AgentContext, node_id: str, pem: str, issued_at: datetime, expires_at: datetime
) -> dict[str, Any]:
    return {
        "certificate": pem,
        "bundle": await agents.trust.bundle(),
        "bundle_id": await agents.trust.bundle_id(),
        "session": session_token(agents.secret, node_id, int(issued_at.timestamp())),
        "renew_in_s": (renew_at(issued_at, expires_at) - issued_at).total_seconds(),
    }


async def _keep_notice(agents: AgentContext, node_id: str, body: NoticeIn) -> None:
    latest = (await agents.heartbeats.read_many([node_id])).get(node_id)
    latest = latest or Heartbeat(node_id, 0.0, is_engine_up=True)
    await agents.heartbeats.put(replace(latest, received_at=time.time(), notice=body.notice, notice_left_s=body.left_s))


async def _publish(agents: AgentContext, node_id: str, writing: Awaitable[object]) -> None:
    """Write to Redis if it is there: Postgres has what counts, and every API process polls it."""
    try:
        await writing
    except Unavailable as error:
        log.warning("Redis missed a notice of %s: %s", node_id, error.message)
