"""Looking one request up: what it used, and why it went where it went."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import msgspec

from crosslogic.domain import ids
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.store.usage import UsageStore

Made = Callable[..., Any]
DECISION = [
    [["node_x", "least-load", "least-load", 2, 0, [["node_x", 0.25, 7, 0.5, 1.0]], ""]],
    [[60, 59, 1000], None],
    [["key", "tokens_per_min"]],
    False,
]


async def add_request(dsn: str, org_id: UUID, environment_id: UUID, decision: list[Any] | None) -> UsageRecord:
    """A usage record, and perhaps the decision behind it."""
    record = UsageRecord(
        id=new_id(),
        client_request_id="mine",
        org_id=org_id,
        environment_id=environment_id,
        key_id=new_id(),
        home_region="in-mumbai",
        model="llama-3-8b",
        endpoint_kind="chat",
        is_streamed=True,
        served_region="ap-southeast",
        node_id=new_id(),
        prompt_tokens=11,
        completion_tokens=7,
        cached_tokens=3,
        token_source=TokenSource.ENGINE,
        latency_ms=900,
        ttft_ms=120,
        status=200,
        outcome=Outcome.COMPLETED,
        list_price_microdollars=5,
    )
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        await UsageStore(pool).add([msgspec.json.encode(record)])
        if decision is not None:
            await pool.execute(
                "INSERT INTO request_decisions (id, decision) VALUES ($1, $2::text::jsonb)",
                record.id,
                json.dumps(decision),
            )
    return record


class TestRequests:
    def test_are_shown_with_their_decision(self, api: httpx.Client, made: Made, settings: Settings) -> None:
        org = made("/orgs", name="acme")
        environment = made("/environments", org="acme", name="prod")
        dsn = settings.database_url.get_secret_value()
        owner = ids.ORG.parse(org["id"]), ids.ENVIRONMENT.parse(environment["id"])
        record = asyncio.run(add_request(dsn, *owner, DECISION))
        shown = api.get(f"/requests/{ids.REQUEST.show(record.id)}").json()
        assert (shown["org"], shown["org_id"]) == ("acme", org["id"])
        assert (shown["environment"], shown["environment_id"]) == ("prod", environment["id"])
        assert record.node_id is not None
        assert (shown["key_id"], shown["node"]) == (ids.KEY.show(record.key_id), ids.NODE.show(record.node_id))
        assert (shown["home_region"], shown["served_region"]) == ("in-mumbai", "ap-southeast")
        assert (shown["outcome"], shown["status"], shown["prompt_tokens"]) == ("completed", 200, 11)
        assert (shown["latency_ms"], shown["ttft_ms"], shown["client_request_id"]) == (900, 120, "mine")
        (only,) = shown["decision"]["tries"]
        assert (only["node"], only["reason"], only["failure"]) == ("node_x", "least-load", None)
        assert only["compared"] == [
            {"node": "node_x", "score_s": 0.25, "tokens_in_flight": 7, "ttft_ms": 500, "weight": 1.0}
        ]
        assert shown["decision"]["limits"] == {
            "requests": {"limit": 60, "remaining": 59, "reset_ms": 1000},
            "tokens": None,
        }
        assert shown["decision"]["would_refuse"] == [{"layer": "key", "limit": "tokens_per_min"}]

    def test_are_shown_without_one_and_without_an_org(self, api: httpx.Client, settings: Settings) -> None:
        record = asyncio.run(add_request(settings.database_url.get_secret_value(), new_id(), new_id(), None))
        shown = api.get(f"/requests/{ids.REQUEST.show(record.id)}").json()
        assert (shown["decision"], shown["org"], shown["environment"]) == (None, None, None)
        assert shown["org_id"] == ids.ORG.show(record.org_id)

    def test_one_that_is_not_there_is_a_404_that_helps(self, empty: httpx.Client) -> None:
        answer = empty.get(f"/requests/{ids.REQUEST.show(new_id())}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
        assert "within seconds" in answer.json()["error"]["message"]
        assert empty.get("/requests/chatcmpl-1").status_code == 400
