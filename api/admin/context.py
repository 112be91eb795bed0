"""What the admin routes work with, and the door that every one of them stands behind."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import asyncpg
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from api.admin.temporal import Workflows
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.settings import Settings
from crosslogic.store.audit import AuditStore
from crosslogic.store.buckets import BucketStore
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.credits import CreditStore
from crosslogic.store.lead_times import LeadTimeStore
from crosslogic.store.ledger import LedgerStore
from crosslogic.store.nodes import NodeStore
from crosslogic.store.preemptions import PreemptionStore
from crosslogic.store.prices import PriceStore
from crosslogic.store.requests import RequestStore
from crosslogic.store.reservations import ReservationStore
from crosslogic.store.revisions import RevisionStore
from crosslogic.store.scaling import ScalingStore
from crosslogic.store.sweeps import SweepStore
from crosslogic.store.tenancy import TenancyStore
from crosslogic.store.usage import UsageStore
from crosslogic.store.usage_logs import UsageLogStore

if TYPE_CHECKING:
    from temporalio.client import Client

T = TypeVar("T")

# Who an audit row says it was. There is one service token, so the API cannot tell its holders apart.
ACTOR = "admin-api"


@dataclass(frozen=True)
class AdminContext:
    """Built once by the app and kept in `app.state.admin`. Temporal is connected to when it is first needed."""

    settings: Settings
    pool: asyncpg.Pool
    connect_temporal: Callable[[], Awaitable[Client]]

    tenancy: TenancyStore = field(init=False)
    catalog: CatalogStore = field(init=False)
    audit: AuditStore = field(init=False)
    nodes: NodeStore = field(init=False)
    preemptions: PreemptionStore = field(init=False)
    lead_times: LeadTimeStore = field(init=False)
    scaling: ScalingStore = field(init=False)
    reservations: ReservationStore = field(init=False)
    revisions: RevisionStore = field(init=False)
    sweeps: SweepStore = field(init=False)
    usage: UsageStore = field(init=False)
    requests: RequestStore = field(init=False)
    usage_logs: UsageLogStore = field(init=False)
    buckets: BucketStore = field(init=False)
    prices: PriceStore = field(init=False)
    ledger: LedgerStore = field(init=False)
    credits: CreditStore = field(init=False)
    workflows: Workflows = field(init=False)

    def __post_init__(self) -> None:
        for name, made in (
            ("tenancy", TenancyStore(self.pool)),
            ("catalog", CatalogStore(self.pool)),
            ("audit", AuditStore(self.pool)),
            ("nodes", NodeStore(self.pool)),
            ("preemptions", PreemptionStore(self.pool)),
            ("lead_times", LeadTimeStore(self.pool)),
            ("scaling", ScalingStore(self.pool)),
            ("reservations", ReservationStore(self.pool)),
            ("revisions", RevisionStore(self.pool)),
            ("sweeps", SweepStore(self.pool)),
            ("usage", UsageStore(self.pool)),
            ("requests", RequestStore(self.pool)),
            ("usage_logs", UsageLogStore(self.pool)),
            ("buckets", BucketStore(self.pool)),
            ("prices", PriceStore(self.pool)),
            ("ledger", LedgerStore(self.pool)),
            ("credits", CreditStore(self.pool)),
            ("workflows", Workflows(self.connect_temporal)),
        ):
            object.__setattr__(self, name, made)

    async def temporal(self) -> Client:
        """The client. Raises Unavailable while Temporal is away; the next call tries again."""
        return await self.workflows.temporal()


def _context(request: Request) -> AdminContext:
    context: AdminContext = request.app.state.admin
    return context


Admin = Annotated[AdminContext, Depends(_context)]

# Only documents the token; AdminRoute checks it, before a byte of the body is read.
bearer = HTTPBearer(auto_error=False, scheme_name="admin token", description="The service token, `adm_…`.")


# No connection, one that broke, a server that is stopping or starting, or one that is full.
_DATABASE_AWAY = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
)


class StoreRoute(APIRoute):
    """Turns a database that is away into a 503."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler with its errors told apart."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            return await guard_database(handle(request))

        return guarded


class AdminRoute(StoreRoute):
    """Lets a request in by the service token only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind the door."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            check_token(request.headers.get("authorization", ""), _context(request).settings)
            return await handle(request)

        return guarded


async def guard_database(work: Awaitable[T]) -> T:
    """The work's result. Raises Unavailable when the database is away."""
    try:
        return await work
    except asyncpg.DataError:
        raise  # An InterfaceError too, but our own mistake.
    except _DATABASE_AWAY as error:
        raise Unavailable("The database cannot be reached now; try again.", code="database_away") from error


def check_token(authorization: str, settings: Settings) -> None:
    """Raise Rejected unless the header holds the service token; compared in constant time."""
    scheme, _, given = authorization.partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given:
        raise Rejected(
            "No admin token was given. Send it as a header: Authorization: Bearer adm_…",
            status=401,
            code="missing_admin_token",
        )
    expected = settings.admin_token
    if expected is not None and hmac.compare_digest(given.encode(), expected.get_secret_value().encode()):
        return
    if given.startswith("sk_"):
        raise Rejected(
            "An API key cannot administer. Send the service token (CROSSLOGIC_ADMIN_TOKEN) instead.",
            status=403,
            code="not_an_admin_token",
        )
    raise Rejected(
        "That is not the admin token. It is the value of CROSSLOGIC_ADMIN_TOKEN that the API was started with.",
        status=401,
        code="wrong_admin_token",
    )
