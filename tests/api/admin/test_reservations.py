"""Reservations through the admin API."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from crosslogic.domain import ids
from crosslogic.domain.reservation import HOUR, next_hour
from crosslogic.new_ids import new_id

Made = Callable[..., Any]

WANTED: dict[str, Any] = {"org": "acme", "model": "llama-7b", "region": "ap-south-1", "capacity_units": 100}
LATER = {**WANTED, "starts_at": "2098-01-01T00:00:00Z"}


@pytest.fixture
def acme(made: Made) -> Any:
    return made("/orgs", name="acme")


def code_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


class TestAdd:
    def test_begins_at_the_next_hour_by_our_names(self, api: httpx.Client, made: Made, acme: Any) -> None:
        added = made("/reservations", **WANTED)
        assert added == {
            "id": added["id"],
            "org_id": acme["id"],
            "model": "llama-3-8b",
            "region": "in-mumbai",
            "capacity_units": 100,
            "starts_at": added["starts_at"],
            "ends_at": None,
            "overage": True,
        }
        starts_at = datetime.fromisoformat(added["starts_at"])
        assert abs(starts_at - next_hour(datetime.now(UTC))) <= HOUR
        assert api.get(f"/reservations/{added['id']}").json() == added
        assert api.get("/reservations", params={"org": "acme"}).json()["data"] == [added]
        entry = api.get("/audit", params={"subject": added["id"]}).json()["data"][0]
        assert (entry["action"], entry["details"]["org"]) == ("reservation.add", acme["id"])

    @pytest.mark.usefixtures("acme")
    def test_can_be_repeated_with_an_id(self, api: httpx.Client) -> None:
        body = {
            **WANTED,
            "reservation_id": ids.RESERVATION.show(new_id()),
            "starts_at": (next_hour(datetime.now(UTC)) + HOUR).isoformat(),
        }
        answers = [api.post("/reservations", json=body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 200]
        assert answers[0].json() == answers[1].json()
        other = api.post("/reservations", json={**body, "capacity_units": 7})
        assert code_of(other) == (409, "reservation_exists", "reservation_id")
        assert len(api.get("/reservations").json()["data"]) == 1

    @pytest.mark.usefixtures("acme")
    @pytest.mark.parametrize(
        ("change", "status", "code", "param"),
        [
            ({"org": "nobody"}, 404, "org_not_found", "org"),
            ({"model": "gpt-9"}, 404, "model_not_found", "model"),
            ({"region": "atlantis"}, 400, "unknown_region", "region"),
            ({"capacity_units": 0}, 400, "invalid_request", "capacity_units"),
            ({"capacity_units": 2**31}, 400, "invalid_request", "capacity_units"),
            ({"starts_at": "2099-01-01T00:30:00Z"}, 400, "not_a_full_hour", "starts_at"),
            ({"starts_at": "2025-01-01T00:00:00Z"}, 400, "in_the_past", "starts_at"),
            ({"ends_at": "2025-01-01T00:00:00Z"}, 400, "in_the_past", "ends_at"),
            ({"ends_at": "2099-01-01T00:00:01Z"}, 400, "not_a_full_hour", "ends_at"),
            (
                {"starts_at": "2099-01-01T00:00:00Z", "ends_at": "2099-01-01T00:00:00Z"},
                400,
                "invalid_request",
                "ends_at",
            ),
            ({"starts_at": "2099-01-01T00:00:00"}, 400, "invalid_request", "starts_at"),
            ({"reservation_id": "key_1"}, 400, "invalid_id", None),
        ],
    )
    def test_refuses_with_a_reason(
        self, api: httpx.Client, change: dict[str, Any], status: int, code: str, param: str | None
    ) -> None:
        answer = api.post("/reservations", json=WANTED | change)
        assert code_of(answer) == (status, code, param)
        assert api.get("/reservations").json()["data"] == []


class TestEnd:
    @pytest.mark.usefixtures("acme")
    def test_at_the_next_hour_or_a_later_one(self, api: httpx.Client, made: Made) -> None:
        path = f"/reservations/{made('/reservations', **LATER)['id']}"
        later = api.patch(path, json={"ends_at": "2099-01-01T00:00:00Z"})
        assert later.json()["ends_at"] == "2099-01-01T00:00:00Z"
        ended = api.patch(path, json={}).json()
        # It had not begun: now it never will.
        assert ended["ends_at"] == ended["starts_at"]
        again = api.patch(path, json={})
        assert code_of(again) == (409, "reservation_has_ended", None)

    @pytest.mark.usefixtures("acme")
    def test_refuses_with_a_reason(self, api: httpx.Client, made: Made) -> None:
        path = f"/reservations/{made('/reservations', **LATER)['id']}"
        assert code_of(api.patch(path, json={"ends_at": "2025-01-01T00:00:00Z"}))[:2] == (400, "in_the_past")
        nobody = api.patch(f"/reservations/{ids.RESERVATION.show(new_id())}", json={})
        assert code_of(nobody)[:2] == (404, "reservation_not_found")
