"""Usage, summed for operators. Tokens are the fact; money is the invoices' business."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.admin.context import Admin, AdminRoute
from api.admin.schemas import Instant
from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected

router = APIRouter(route_class=AdminRoute)

LONGEST_SPAN = timedelta(days=400)
MOST_ROWS = 10_000

Dimension = Literal["org", "environment", "model", "day"]


class UsageRow(BaseModel):
    """One sum. A dimension that was not asked for is null."""

    org: str | None
    org_id: str | None
    environment: str | None
    environment_id: str | None
    model: str | None
    day: date | None = Field(description="The UTC day of admission.")
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class UsageOut(BaseModel):
    """Sums over usage records admitted in [start, end)."""

    start: datetime
    end: datetime
    data: list[UsageRow]


@router.get("/usage")
async def get_usage(
    admin: Admin,
    start: Annotated[Instant | None, Query(description="Left out: the start of this month, UTC.")] = None,
    end: Annotated[Instant | None, Query(description="Left out: now. Not included.")] = None,
    by: Annotated[
        list[Dimension] | None, Query(description="What to sum by; repeat it. Left out: org, environment and model.")
    ] = None,
    org: Annotated[str | None, Query(max_length=64, description="Only this org's, by id or name.")] = None,
) -> UsageOut:
    """Requests and tokens, summed. Records arrive within seconds of their request."""
    now = datetime.now(UTC)
    start_at = start or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end_at = end or now + timedelta(seconds=1)
    if not start_at < end_at <= start_at + LONGEST_SPAN:
        raise Rejected(
            f"end must be after start, by at most {LONGEST_SPAN.days} days.", code="invalid_range", param="end"
        )
    org_id = None
    if org is not None:
        found = (
            await admin.tenancy.get_org(org_id=ids.ORG.parse(org))
            if "_" in org
            else await admin.tenancy.get_org(name=org.replace("\x00", ""))
        )
        org_id = found.id
    dimensions = by or ["org", "environment", "model"]
    rows = await admin.usage.sum_by(dimensions, start_at, end_at, org_id=org_id, limit=MOST_ROWS + 1)
    if len(rows) > MOST_ROWS:
        raise Rejected(
            f"That is more than {MOST_ROWS} rows. Ask for a shorter time, one org, or fewer dimensions.",
            code="too_many_rows",
        )
    return UsageOut(start=start_at, end=end_at, data=[_show(row) for row in rows])


def _show(row: dict[str, Any]) -> UsageRow:
    return UsageRow.model_validate(
        row
        | {
            "org_id": row["org_id"] and ids.ORG.show(row["org_id"]),
            "environment_id": row["environment_id"] and ids.ENVIRONMENT.show(row["environment_id"]),
        }
    )
