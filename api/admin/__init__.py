"""The operators' API under `/admin`: tenancy, catalog, nodes, audit and usage."""

from __future__ import annotations

from fastapi import APIRouter, Security

from api.admin import audit, catalog, nodes, tenancy, usage
from api.admin.context import bearer

router = APIRouter(prefix="/admin", dependencies=[Security(bearer)])
router.include_router(tenancy.router, tags=["tenancy"])
router.include_router(catalog.router, tags=["catalog"])
router.include_router(nodes.router, tags=["nodes"])
router.include_router(usage.router, tags=["usage"])
router.include_router(audit.router, tags=["audit"])
