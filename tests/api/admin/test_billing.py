"""Billing through the admin API: usage in and out, months previewed exactly, prices, credits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from crosslogic.domain import ids
from crosslogic.new_ids import new_id

START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def acme(made: Any) -> dict[str, Any]:
    org = made("/orgs", name="acme")
    return {
        "org_id": org["id"],
        "environment_id": ids.ENVIRONMENT.show(new_id()),
        "key_id": ids.KEY.show(new_id()),
        "home_region": "us-east",
        "model": "llama-3-70b",
    }


def line(of: dict[str, Any], number: int, prompt: int, **changes: Any) -> dict[str, Any]:
    at = START + timedelta(hours=number, minutes=7)
    return {
        **of,
        "request_id": f"old-{number}",
        "admitted_at": at.isoformat(),
        "prompt_tokens": prompt,
        "completion_tokens": 0,
        **changes,
    }


def take(api: httpx.Client, *lines: dict[str, Any]) -> dict[str, int]:
    answer = api.post("/usage/import", json={"records": lines})
    assert answer.status_code == 200, answer.text
    return answer.json()


class TestImportUsage:
    def test_counts_each_request_id_once(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        lines = [line(acme, number, 10) for number in range(5)]
        assert take(api, *lines[:3]) == {"new": 3, "known": 0}
        assert take(api, *lines, lines[0]) == {"new": 2, "known": 4}
        (row,) = api.get("/usage", params={"by": "org", "start": "2026-03-01T00:00:00Z"}).json()["data"]
        assert (row["org"], row["requests"], row["prompt_tokens"]) == ("acme", 5, 50)
        actions = [entry["action"] for entry in api.get("/audit").json()["data"]]
        assert actions.count("usage.import") == 2

    def test_takes_aliases_and_texts_as_csv_has_them(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        texts = {"model": "llama-7b", "home_region": "ap-south-1", "prompt_tokens": "12", "is_streamed": "true"}
        take(api, {**line(acme, 1, 0), **texts})
        span = {"start": "2026-03-01T00:00:00Z", "end": "2026-04-01T00:00:00Z"}
        (record,) = api.get("/usage/records", params=span).json()["data"]
        assert (record["model"], record["home_region"], record["prompt_tokens"]) == ("llama-3-8b", "in-mumbai", 12)
        assert record["is_streamed"] is True

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model": "gpt-9"}, "Record 2: "),
            ({"home_region": "moon"}, "Record 2: "),
            ({"org_id": "acme"}, "org_id cannot be used"),
            ({"request_id": ""}, "request_id is missing"),
            ({"admitted_at": "yesterday"}, "admitted_at is not an instant"),
            ({"admitted_at": "2999-01-01T00:00:00Z"}, "lies in the future"),
            ({"prompt_tokens": -1}, "prompt_tokens must be a whole number"),
            ({"prompt_tokens": 1.5}, "prompt_tokens must be a whole number"),
            ({"prompt_tokens": True}, "prompt_tokens must be a whole number"),
            ({"outcome": "sold"}, "outcome must be one of"),
            ({"outcome": "failed"}, "never charged"),
            ({"tokens": 5}, "tokens is no field of usage"),
            ({"billed_hour": "2026-03-01T00:30:00Z"}, "billed_hour is not a full hour"),
            ({"request_id": ids.REQUEST.show(new_id())}, "not the instant that request_id carries"),
        ],
    )
    def test_takes_all_of_a_batch_or_none_and_says_why(
        self, api: httpx.Client, acme: dict[str, Any], changes: dict[str, Any], words: str
    ) -> None:
        answer = api.post("/usage/import", json={"records": [line(acme, 1, 5), {**line(acme, 2, 5), **changes}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "records.1"), answer.text
        assert words in answer.json()["error"]["message"]
        assert api.get("/usage", params={"start": "2026-03-01T00:00:00Z"}).json()["data"] == []


class TestExport:
    def test_pages_give_every_record_and_import_them_unchanged(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        take(api, *(line(acme, number, number) for number in range(7)))
        span = {"start": "2026-03-01T01:00:00Z", "end": "2026-03-01T06:00:00Z", "limit": 2}
        found: list[dict[str, Any]] = []
        after = None
        while after is not None or not found:
            answer = api.get("/usage/records", params=span | ({"after": after} if after else {})).json()
            found, after = found + answer["data"], answer["next_after"]
        assert [record["prompt_tokens"] for record in found] == [1, 2, 3, 4, 5]
        assert take(api, *found) == {"new": 0, "known": 5}


class TestPreview:
    def test_b11_shows_tokens_and_exact_amounts(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        take(api, line(acme, 1, 20_000), line(acme, 2, 10_000, model="gemma-7b", home_region="in-mumbai"))
        shown = api.get("/billing/acme/2026-03").json()
        assert [(one["model"], one["tokens"], one["free_tokens"], one["exact_e10"]) for one in shown["lines"]] == [
            ("gemma-7b", 10_000, 5_000, 5_000 * 210),
            ("llama-3-70b", 20_000, 20_000, 0),
        ]
        assert (shown["tokens"], shown["exact_e10"], shown["usage_microdollars"]) == (30_000, 1_050_000, 105)
        assert shown["is_final"] is False
        assert api.get("/billing/acme/2026-03").content == api.get(f"/billing/{acme['org_id']}/2026-03").content

    def test_the_sign_up_credit_pays_usage_but_no_flat_fee(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        month = datetime.now(UTC).strftime("%Y-%m")
        now = datetime.now(UTC) - timedelta(minutes=1)
        if now.strftime("%Y-%m") != month:
            now = datetime.now(UTC)
        take(api, line(acme, 0, 1_025_000, admitted_at=now.isoformat()))
        shown = api.get(f"/billing/acme/{month}").json()
        assert shown["usage_microdollars"] == 600_000
        assert (shown["credits"][0]["cents"], shown["credit_cents"], shown["due_cents"]) == (-60, -60, 0)

    @pytest.mark.parametrize("month", ["2026-13", "now", "1999-01"])
    def test_refuses_what_is_no_month(self, empty: httpx.Client, month: str) -> None:
        answer = empty.get(f"/billing/acme/{month}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "month")


class TestPriceBooks:
    BOOK: dict[str, Any] = {  # noqa: RUF012
        "name": "v2",
        "prices": [{"model": "llama-3-70b", "token_class": "prompt", "price_e10": 12_000}],
        "multipliers_bp": {"us-east": 10_000},
        "tiers": [],
        "free_tokens": 0,
        "capacity_unit_e10": 10**10,
    }

    def test_another_book_answers_what_if_without_changing_anything(
        self, api: httpx.Client, acme: dict[str, Any]
    ) -> None:
        take(api, line(acme, 1, 1_000_000))
        before = api.get("/billing/acme/2026-03").json()
        assert api.post("/price-books", json=self.BOOK).status_code == 201
        assert api.post("/price-books", json=self.BOOK).status_code == 200
        what_if = api.get("/billing/acme/2026-03", params={"price_book": "v2"}).json()
        assert (before["usage_microdollars"], what_if["usage_microdollars"]) == (585_000, 1_200_000)
        assert api.get("/billing/acme/2026-03").json() == before
        assert api.get("/billing/acme/2026-03", params={"price_book": "v3"}).status_code == 404

    def test_a_book_never_changes_and_starts_at_a_full_hour_to_come(self, api: httpx.Client) -> None:
        assert api.post("/price-books", json=self.BOOK).status_code == 201
        assert api.post("/price-books", json=self.BOOK | {"free_tokens": 1}).status_code == 409
        inexact = self.BOOK | {"name": "v3", "multipliers_bp": {"us-east": 10_001}}
        assert api.post("/price-books", json=inexact).json()["error"]["code"] == "invalid_price_book"
        start = "/price-books/v2/start"
        assert api.post(start, json={"starts_at": "2026-01-01T00:00:00Z"}).json()["error"]["code"] == "in_the_past"
        assert api.post(start, json={"starts_at": "2999-01-01T00:30:00Z"}).json()["error"]["code"] == "not_a_full_hour"
        made = api.post(start, json={"starts_at": "2999-01-01T00:00:00Z"}).json()
        assert api.post(start, json={"starts_at": "2999-01-01T00:00:00Z"}).json() == made
        assert api.post("/price-books/v1/start", json={"starts_at": "2999-01-01T00:00:00Z"}).status_code == 409
        assert api.post("/price-books/v9/start", json={}).status_code == 404
        starts = api.get("/price-books").json()["starts"]
        assert [one["price_book"] for one in starts] == ["v1", "v2"]

    def test_an_org_s_own_price_must_be_exact(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        own = {"model": "llama-7b", "token_class": "prompt", "price_e10": 100}
        assert api.post("/orgs/acme/prices", json=own | {"price_e10": 3}).json()["error"]["code"] == (
            "invalid_price_book"
        )
        made = api.post("/orgs/acme/prices", json=own)
        assert (made.status_code, made.json()["model"]) == (201, "llama-3-8b")
        assert api.post("/orgs/acme/prices", json=own).status_code == 409


class TestCredits:
    def test_a_reason_is_granted_once(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        credit = {"kind": "promotional", "cents": 250, "reason": "launch"}
        assert api.post("/orgs/acme/credits", json=credit).status_code == 201
        again = api.post("/orgs/acme/credits", json=credit)
        assert (again.status_code, again.json()["cents"]) == (200, 1_250)
        kinds = [one["kind"] for one in api.get("/orgs/acme/credits").json()["data"]]
        assert sorted(kinds) == ["promotional", "sign_up"]
        late = credit | {"reason": "other", "expires_at": "2020-01-01T00:00:00Z"}
        assert api.post("/orgs/acme/credits", json=late).json()["error"]["code"] == "in_the_past"


class TestLedger:
    def test_shows_accounts_and_how_far_hours_are_sealed(self, api: httpx.Client, acme: dict[str, Any]) -> None:
        shown = api.get("/ledger").json()
        assert {one["account"] for one in shown["data"]} >= {"generated", "waste", "revenue", "rounding"}
        assert shown["sealed_until"] == shown["rated_until"] == "1970-01-01T00:00:00Z"
        assert api.get("/ledger", params={"org": "acme"}).json()["data"] == []


class TestLogs:
    def test_one_that_is_not_known_cannot_be_forgotten(self, api: httpx.Client) -> None:
        assert api.get("/usage/logs").json()["data"] == []
        assert api.post("/usage/logs/gone/forget", json={}).status_code == 404
