"""Usage, summed for operators. Tokens are the fact; money is the invoices' business."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from api.admin.catalog import resolve_model
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import After, Body, Instant, after_uuid
from api.admin.tenancy import find_org
from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.reservation import next_hour
from crosslogic.domain.usage import UsageRecord
from crosslogic.domain.usage_import import line_of, record_of

router = APIRouter(route_class=AdminRoute)

LONGEST_SPAN = timedelta(days=400)
MOST_ROWS = 10_000
# Of one page of records, or one import.
MOST_RECORDS = 1_000

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


class UsageRecords(Body):
    """Usage from elsewhere."""

    records: list[dict[str, Any]] = Field(
        min_length=1, max_length=MOST_RECORDS, description="Fields as `GET /admin/usage/records` shows them."
    )


class Imported(BaseModel):
    """How many records were new, and how many were known by their id."""

    new: int
    known: int


class RecordsOut(BaseModel):
    """Usage records as lines of a file, oldest first."""

    data: list[dict[str, Any]]
    next_after: str | None = Field(description="Cursor of the next page; null at the end.")


class LogOut(BaseModel):
    """One API process's usage log."""

    name: str
    complete_until: datetime = Field(description="All that it admitted before is in Postgres.")
    reported_at: datetime


class LogsOut(BaseModel):
    """Every log that may hold usage, the one that is furthest behind first: hours are sealed up to it."""

    data: list[LogOut]


@router.post("/usage/import")
async def import_usage(body: UsageRecords, admin: Admin) -> Imported:
    """Take usage from elsewhere; repeating it is harmless. A record of a sealed hour is billed in the open one."""
    now = datetime.now(UTC)
    catalog = await admin.catalog.load()
    given: list[tuple[UsageRecord, datetime | None]] = []
    for number, line in enumerate(body.records, 1):
        try:
            record, billed_hour = record_of(line, now)
            record.model = resolve_model(catalog, record.model).name
            record.home_region = catalog.regions.resolve(record.home_region)
        except Rejected as error:
            raise Rejected(
                f"Record {number}: {error.message}", code="invalid_usage", param=f"records.{number - 1}"
            ) from error
        given.append((record, billed_hour))
    await admin.audit.record(
        actor=ACTOR,
        action="usage.import",
        subject="usage",
        details={"records": len(given), "first": ids.REQUEST.show(given[0][0].id)},
    )
    new = await admin.usage.take(given)
    return Imported(new=new, known=len(given) - new)


@router.get("/usage/records")
async def list_records(
    admin: Admin,
    start: Annotated[Instant, Query(description="Of admission.")],
    end: Annotated[Instant, Query(description="Not included.")],
    org: Annotated[str | None, Query(max_length=64, description="Only this org's, by id or name.")] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MOST_RECORDS, description="Most records of one page.")] = MOST_RECORDS,
) -> RecordsOut:
    """Usage records as `POST /admin/usage/import` takes them."""
    org_id = None if org is None else (await find_org(admin, org, param="org")).id
    rows = await admin.usage.export(start, end, after=after_uuid(ids.REQUEST, after), org_id=org_id, limit=limit + 1)
    data = [line_of(row) for row in rows[:limit]]
    return RecordsOut(data=data, next_after=data[-1]["request_id"] if len(rows) > limit else None)


@router.get("/usage/logs")
async def list_logs(admin: Admin) -> LogsOut:
    """How far each API process's log is in Postgres."""
    return LogsOut(
        data=[LogOut.model_validate(one, from_attributes=True) for one in await admin.usage_logs.list_logs()]
    )


@router.post("/usage/logs/{name}/forget")
async def forget_log(name: Annotated[str, Path(max_length=64)], admin: Admin) -> LogsOut:
    """Give up a log that nobody will ever read: what it held is lost, and hours are sealed without it."""
    await admin.audit.record(actor=ACTOR, action="usage_log.forget", subject=name, details={})
    await admin.usage_logs.forget_known(name)
    return await list_logs(admin)


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
    org_id = None if org is None else (await find_org(admin, org, param="org")).id
    dimensions = by or ["org", "environment", "model"]
    # The hour that is running is read as a whole: nothing in it is later than now.
    rows = await admin.usage.sum_by(dimensions, start_at, end or next_hour(now), org_id=org_id, limit=MOST_ROWS + 1)
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
