"""The operators' API under `/admin`: tenancy, catalog, reservations, nodes, agents, requests, usage, billing, audit."""

from __future__ import annotations

from fastapi import APIRouter, Security

from api.admin import (
    agents,
    audit,
    billing,
    catalog,
    nodes,
    requests,
    reservations,
    revisions,
    sweeps,
    tenancy,
    usage,
)
from api.admin.context import bearer
from api.admin.schemas import ErrorOut

router = APIRouter(
    prefix="/admin",
    dependencies=[Security(bearer)],
    responses={
        "4XX": {"model": ErrorOut, "description": "The request cannot be granted; the message says why."},
        "5XX": {
            "model": ErrorOut,
            "description": "503 with Retry-After: Postgres or Temporal is away. 500: our mistake.",
        },
    },
)
router.include_router(tenancy.router, tags=["tenancy"])
router.include_router(catalog.router, tags=["catalog"])
router.include_router(revisions.router, tags=["catalog"])
router.include_router(reservations.router, tags=["reservations"])
router.include_router(agents.router, tags=["nodes"])
router.include_router(nodes.router, tags=["nodes"])
router.include_router(sweeps.router, tags=["nodes"])
router.include_router(usage.router, tags=["usage"])
router.include_router(requests.router, tags=["usage"])
router.include_router(billing.router, tags=["billing"])
router.include_router(audit.router, tags=["audit"])
