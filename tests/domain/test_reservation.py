"""Reservations: when they hold, how they add up, and when they may change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from crosslogic.domain.catalog import Catalog
from crosslogic.domain.errors import Rejected
from crosslogic.domain.regions import RegionMap
from crosslogic.domain.reservation import Reservation, check_change, next_hour

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MOMENT = timedelta(microseconds=1)
ACME, GLOBEX = UUID(int=1), UUID(int=2)


def reserve(
    number: int, units: int, *, org: UUID = ACME, hours: tuple[int, int | None] = (0, None), overage: bool = True
) -> Reservation:
    start, end = hours
    ends_at = None if end is None else NOON + end * HOUR
    return Reservation(UUID(int=number), org, "llama-3-8b", "in-mumbai", units, NOON + start * HOUR, ends_at, overage)


def catalog(*booked: Reservation) -> Catalog:
    return Catalog.of([], RegionMap.of([]), [], booked)


class TestCatalog:
    def test_a_reservation_holds_from_its_start_until_just_before_its_end(self) -> None:
        known = catalog(reserve(1, 100, hours=(0, 2)))
        pool, holder = ("llama-3-8b", "in-mumbai"), (ACME, "llama-3-8b", "in-mumbai")
        for at, units in ((NOON - MOMENT, 0), (NOON, 100), (NOON + 2 * HOUR - MOMENT, 100), (NOON + 2 * HOUR, 0)):
            then = known.at(at)
            assert then.reserved_units.get(pool, 0) == units
            assert (holder in then.reservations) is bool(units)

    def test_several_of_one_holder_add_up_under_the_eldest(self) -> None:
        known = catalog(reserve(2, 30, hours=(1, None)), reserve(3, 100, overage=False), reserve(4, 7, org=GLOBEX))
        then = known.at(NOON + HOUR)
        mine = then.reservations[(ACME, "llama-3-8b", "in-mumbai")]
        assert (mine.id, mine.capacity_units, mine.overage) == (UUID(int=3), 130, True)
        assert then.reservations[(GLOBEX, "llama-3-8b", "in-mumbai")].capacity_units == 7
        assert then.reserved_units == {("llama-3-8b", "in-mumbai"): 137}

    def test_says_when_it_changes_next(self) -> None:
        known = catalog(reserve(1, 1, hours=(0, 2)), reserve(2, 1, hours=(1, None)))
        changes: list[datetime] = []
        then = known.at(NOON - HOUR)
        while then.changes_at is not None:
            changes.append(then.changes_at)
            then = then.at(then.changes_at)
        assert changes == [NOON, NOON + HOUR, NOON + 2 * HOUR]

    def test_one_that_ended_before_it_began_never_holds(self) -> None:
        assert catalog(reserve(1, 5, hours=(3, 3))).at(NOON + 3 * HOUR).reserved_units == {}


class TestCheckChange:
    @pytest.mark.parametrize("at", [NOON + HOUR, NOON + 100 * HOUR, (NOON + HOUR).astimezone(timezone(-5 * HOUR))])
    def test_allows_full_hours_to_come(self, at: datetime) -> None:
        check_change(at, NOON + timedelta(minutes=59), "starts_at")

    @pytest.mark.parametrize(
        ("at", "code"),
        [
            (NOON + timedelta(minutes=30), "not_a_full_hour"),
            (NOON + HOUR + MOMENT, "not_a_full_hour"),
            ((NOON + HOUR).replace(tzinfo=timezone(timedelta(hours=5, minutes=30))), "not_a_full_hour"),
            (NOON, "in_the_past"),
            (NOON - HOUR, "in_the_past"),
        ],
    )
    def test_refuses_anything_else_and_names_the_next_hour(self, at: datetime, code: str) -> None:
        with pytest.raises(Rejected, match="2026-11-24T13:00:00Z") as caught:
            check_change(at, NOON, "ends_at")
        assert (caught.value.code, caught.value.param) == (code, "ends_at")

    def test_the_next_hour_is_after_now(self) -> None:
        assert next_hour(NOON) == NOON + HOUR
        assert next_hour(NOON - MOMENT) == NOON
