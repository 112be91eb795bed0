"""Reservations: capacity that an org has prepaid."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from api.admin.catalog import resolve_model
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import After, Body, Instant, Limit, Page, after_uuid, page
from api.admin.tenancy import ModelName, RegionName, find_org
from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.reservation import Reservation, check_change, next_hour
from crosslogic.new_ids import new_id

router = APIRouter(route_class=AdminRoute)

ReservationPath = Annotated[str, Path(max_length=64, description="A reservation's id.", examples=["res_01k5…"])]

# Postgres's INTEGER; no fleet makes as many tokens a second.
MOST_UNITS = 2**31 - 1


class ReservationOut(BaseModel):
    """Capacity of one model in one region that an org has prepaid."""

    id: str = Field(examples=["res_01k5…"])
    org_id: str
    model: str = Field(examples=["llama-3-8b"])
    region: str = Field(examples=["in-mumbai"])
    capacity_units: int = Field(description="Tokens a second.")
    starts_at: datetime
    ends_at: datetime | None = Field(description="It holds until just before. Null: until it is ended.")
    overage: bool = Field(description="Are tokens beyond it served as serverless ones?")


class ReservationIn(Body):
    """A new reservation. It begins and ends at full hours (UTC) to come."""

    org: Annotated[str, Field(max_length=64, description="The org's id or name.", examples=["demo"])]
    model: ModelName
    region: RegionName
    capacity_units: int = Field(ge=1, le=MOST_UNITS, description="Tokens a second.", examples=[100])
    starts_at: Instant | None = Field(default=None, description="Left out: the next full hour.")
    ends_at: Instant | None = Field(default=None, description="Left out: until it is ended.")
    overage: bool = Field(default=True, description="Are tokens beyond it served as serverless ones?")
    reservation_id: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="An id of your own, to be able to repeat the request.", examples=["res_01k5…"]
    )


class ReservationEnd(Body):
    """When it ends: a full hour (UTC) to come."""

    ends_at: Instant | None = Field(default=None, description="Left out: the next full hour.")


@router.post(
    "/reservations", status_code=201, responses={200: {"description": "It was there already, just like this."}}
)
async def add_reservation(body: ReservationIn, admin: Admin, response: Response) -> ReservationOut:
    """Reserve capacity. Several reservations of an org for one model and region add up."""
    now = datetime.now(UTC)
    org = await find_org(admin, body.org, param="org")
    catalog = await admin.catalog.load()
    reservation = Reservation(
        id=new_id() if body.reservation_id is None else ids.RESERVATION.parse(body.reservation_id),
        org_id=org.id,
        model=resolve_model(catalog, body.model).name,
        region=catalog.regions.resolve(body.region),
        capacity_units=body.capacity_units,
        starts_at=body.starts_at or next_hour(now),
        ends_at=body.ends_at,
        overage=body.overage,
    )
    check_change(reservation.starts_at, now, "starts_at")
    if reservation.ends_at is not None:
        check_change(reservation.ends_at, now, "ends_at")
        if reservation.ends_at <= reservation.starts_at:
            raise Rejected("ends_at must be after starts_at.", code="invalid_request", param="ends_at")
    if not await admin.reservations.add(reservation, actor=ACTOR):
        response.status_code = 200
    return _show(reservation)


@router.get("/reservations")
async def list_reservations(
    admin: Admin,
    org: Annotated[str | None, Query(max_length=64, description="Only this org's, by id or name.")] = None,
    include_ended: bool = False,
    limit: Limit = 50,
    after: After = None,
) -> Page[ReservationOut]:
    """Reservations that have not ended, oldest first."""
    rows = await admin.reservations.list_reservations(
        after=after_uuid(ids.RESERVATION, after),
        org_id=None if org is None else (await find_org(admin, org, param="org")).id,
        with_ended=include_ended,
        limit=limit + 1,
    )
    return page(rows, limit, _show, lambda reservation: reservation.id)


@router.get("/reservations/{reservation_id}")
async def get_reservation(reservation_id: ReservationPath, admin: Admin) -> ReservationOut:
    """One reservation."""
    return _show(await admin.reservations.get(ids.RESERVATION.parse(reservation_id)))


@router.patch("/reservations/{reservation_id}")
async def end_reservation(reservation_id: ReservationPath, body: ReservationEnd, admin: Admin) -> ReservationOut:
    """Set when a reservation ends, while it has not. One that has not begun by then never does."""
    now = datetime.now(UTC)
    ends_at = body.ends_at or next_hour(now)
    return _show(await admin.reservations.end(ids.RESERVATION.parse(reservation_id), ends_at, now, actor=ACTOR))


def _show(reservation: Reservation) -> ReservationOut:
    shown = {"id": ids.RESERVATION.show(reservation.id), "org_id": ids.ORG.show(reservation.org_id)}
    return ReservationOut.model_validate(asdict(reservation) | shown)
