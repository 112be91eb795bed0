"""Reservations in Postgres, and how they reach the memory of an API process."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from api.feeds import Feeds
from crosslogic.domain.errors import Rejected
from crosslogic.domain.reservation import HOUR, Reservation, next_hour
from crosslogic.new_ids import new_id
from crosslogic.store.audit import AuditStore
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.changes import ChangeStore
from crosslogic.store.reservations import ReservationStore
from crosslogic.store.tenancy import TenancyStore

POOL = ("llama-3-8b", "in-mumbai")


@pytest.fixture
async def org_id(pool: asyncpg.Pool) -> UUID:
    org, _ = await TenancyStore(pool).create_org(new_id(), "acme", actor="test")
    return org.id


@pytest.fixture
def store(pool: asyncpg.Pool) -> ReservationStore:
    return ReservationStore(pool)


def reserve(org_id: UUID, units: int = 100, *, starts_at: datetime | None = None, **more: Any) -> Reservation:
    return Reservation(new_id(), org_id, *POOL, units, starts_at or next_hour(datetime.now(UTC)), **more)


class TestReservationStore:
    async def test_a_repeated_write_is_one(self, store: ReservationStore, pool: asyncpg.Pool, org_id: UUID) -> None:
        """H11."""
        reservation = reserve(org_id)
        assert await store.add(reservation, actor="test")
        assert not await store.add(reservation, actor="test")
        assert await store.list_reservations() == [reservation]
        entries = [one for one in await AuditStore(pool).list_entries() if one.action == "reservation.add"]
        assert [entry.details["capacity_units"] for entry in entries] == [100]
        with pytest.raises(Rejected, match="is another one") as caught:
            await store.add(Reservation(reservation.id, org_id, *POOL, 7, reservation.starts_at), actor="test")
        assert caught.value.status == 409

    @pytest.mark.parametrize(
        "values",
        [
            {"capacity_units": 0},
            {"starts_at": datetime(2026, 1, 1, 0, 30, tzinfo=UTC)},
            {"ends_at": datetime(2026, 1, 1, 1, 0, 1, tzinfo=UTC)},
            {"ends_at": datetime(2025, 1, 1, tzinfo=UTC)},
        ],
    )
    async def test_the_database_refuses_what_cannot_be(
        self, pool: asyncpg.Pool, org_id: UUID, values: dict[str, Any]
    ) -> None:
        row = {"capacity_units": 1, "starts_at": datetime(2026, 1, 1, tzinfo=UTC), "ends_at": None} | values
        with pytest.raises(asyncpg.CheckViolationError):
            await pool.execute(
                "INSERT INTO reservations (id, org_id, model, region, capacity_units, starts_at, ends_at) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7)",
                new_id(),
                org_id,
                *POOL,
                *row.values(),
            )

    async def test_an_end_may_be_moved_until_it_has_come(
        self, store: ReservationStore, pool: asyncpg.Pool, org_id: UUID
    ) -> None:
        now = datetime.now(UTC)
        soon = next_hour(now)
        reservation = reserve(org_id, starts_at=soon - 5 * HOUR)
        await store.add(reservation, actor="test")
        for ends_at in (soon, soon + 3 * HOUR, soon + 3 * HOUR):
            assert (await store.end(reservation.id, ends_at, now, actor="test")).ends_at == ends_at
        with pytest.raises(Rejected) as caught:
            await store.end(reservation.id, soon + 9 * HOUR, soon + 3 * HOUR, actor="test")
        assert (caught.value.status, caught.value.code) == (409, "reservation_has_ended")
        entries = [one for one in await AuditStore(pool).list_entries() if one.action == "reservation.end"]
        assert len(entries) == 2

    async def test_one_that_has_not_begun_never_does(self, store: ReservationStore, org_id: UUID) -> None:
        now = datetime.now(UTC)
        reservation = reserve(org_id, starts_at=next_hour(now) + 10 * HOUR)
        await store.add(reservation, actor="test")
        ended = await store.end(reservation.id, next_hour(now), now, actor="test")
        assert ended.ends_at == ended.starts_at == reservation.starts_at
        with pytest.raises(Rejected):
            await store.end(reservation.id, next_hour(now) + 20 * HOUR, now, actor="test")

    async def test_those_that_ended_are_listed_when_asked_for(self, store: ReservationStore, org_id: UUID) -> None:
        past = datetime(2026, 1, 1, tzinfo=UTC)
        first, second = sorted((new_id(), new_id()))
        ended = replace(reserve(org_id, starts_at=past, ends_at=past + HOUR), id=first)
        other = replace(reserve(org_id, 7), id=second)
        for one in (ended, other):
            await store.add(one, actor="test")
        assert await store.list_reservations() == [other]
        assert await store.list_reservations(with_ended=True, org_id=org_id) == [ended, other]
        assert await store.list_reservations(org_id=new_id()) == []
        assert await store.list_reservations(with_ended=True, after=ended.id) == [other]


class TestFeeds:
    async def test_a_reservation_begins_and_ends_by_the_clock_alone(
        self, store: ReservationStore, pool: asyncpg.Pool, org_id: UUID
    ) -> None:
        async def nothing() -> list[Any]:
            return []

        inference = SimpleNamespace(catalog=None)
        taken: list[Any] = []

        def ignored(_: object) -> None: ...

        others: Any = SimpleNamespace(
            refresh=nothing, route_entries=nothing, replace=taken.extend, set_strategies=ignored, set_splits=ignored
        )
        feeds = Feeds(
            changes=ChangeStore(pool),
            catalog=CatalogStore(pool),
            nodes=others,
            board=others,
            keys=others,
            table=others,
            inference=inference,  # pyright: ignore[reportArgumentType]
        )
        await feeds.poll_once()
        soon = next_hour(datetime.now(UTC))
        await store.add(reserve(org_id, 100, starts_at=soon - HOUR, ends_at=soon + HOUR), actor="test")
        await store.add(reserve(org_id, 20, starts_at=soon), actor="test")
        await feeds.poll_once()
        moment = timedelta(microseconds=1)
        for at, units in ((soon - moment, 100), (soon, 120), (soon + HOUR - moment, 120), (soon + HOUR, 20)):
            feeds.turn_reservations(at)
            assert inference.catalog.reserved_units == {POOL: units}
            assert inference.catalog.reservations[(org_id, *POOL)].capacity_units == units
