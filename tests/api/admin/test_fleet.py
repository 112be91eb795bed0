"""Catalog, nodes and usage; what starts or signals a workflow does so on a real Temporal server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from temporalio.client import Client

from crosslogic.contracts import names
from crosslogic.contracts.sweep import FleetSweepResult, SweepFinding
from crosslogic.dev.temporal import Temporal
from crosslogic.domain import ids
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.node import Intent, NodeEvent
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.store.nodes import NodeStore
from crosslogic.store.preemptions import PreemptionStore
from crosslogic.store.sweeps import SweepStore
from tests.api.admin.server import TOKEN, serving

Made = Callable[..., Any]


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def add_node(dsn: str, *, events: tuple[NodeEvent, ...] = (), **more: Any) -> str:
    """A row of the registry, moved along; its id."""
    node_id = new_id()
    options: dict[str, Any] = {"model": "llama-3-8b", "region": "in-mumbai", "provider": "local"} | more
    shown = ids.NODE.show(node_id)
    intent = Intent(id=node_id, cluster=f"cic-{shown}", workflow_id=names.node_workflow_id(shown), **options)
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        store = NodeStore(pool)
        await store.intend(intent)
        for event in events:
            await store.advance(node_id, event, f"it had to {event}", endpoint="http://127.0.0.1:1")
    return shown


READY = (NodeEvent.LAUNCH, NodeEvent.BOOT, NodeEvent.LOAD, NodeEvent.ADMIT)


@pytest.fixture
def fleet_settings(settings: Settings, temporal_server: Temporal, task_queue: str) -> Settings:
    """With a Temporal, and a task queue that nobody else looks at."""
    return settings.model_copy(
        update={
            "temporal_address": temporal_server.address,
            "fleet_task_queue": task_queue,
            "skypilot_url": "http://127.0.0.1:1",
        }
    )


@pytest.fixture
def fleet(fleet_settings: Settings) -> Iterator[httpx.Client]:
    """The admin API with a Temporal behind it. No worker runs: what was started stays as it was sent."""
    with serving(fleet_settings) as url, httpx.Client(base_url=f"{url}/admin", trust_env=False, timeout=20) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        yield client


async def first_event(settings: Settings, workflow_id: str) -> tuple[str, str, Any]:
    """Type, task queue and input of a workflow."""
    client = await Client.connect(settings.temporal_address)
    handle = client.get_workflow_handle(workflow_id)
    async for event in handle.fetch_history_events():
        started = event.workflow_execution_started_event_attributes
        sent = [json.loads(payload.data) for payload in started.input.payloads]
        return started.workflow_type.name, started.task_queue.name, sent
    raise AssertionError("a history without events")


async def signals(settings: Settings, workflow_id: str) -> list[tuple[str, Any]]:
    client = await Client.connect(settings.temporal_address)
    found: list[tuple[str, Any]] = []
    async for event in client.get_workflow_handle(workflow_id).fetch_history_events():
        if event.HasField("workflow_execution_signaled_event_attributes"):
            signaled = event.workflow_execution_signaled_event_attributes
            found.append((signaled.signal_name, [json.loads(payload.data) for payload in signaled.input.payloads]))
    return found


class TestHazards:
    def test_say_what_was_learnt_where(self, api: httpx.Client, settings: Settings) -> None:
        assert api.get("/nodes/hazards").json() == {"data": []}
        dsn = settings.database_url.get_secret_value()
        shown = asyncio.run(add_node(dsn, events=READY, gpu="L4", is_spot=True))

        async def take() -> None:
            async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
                await PreemptionStore(pool).record(ids.NODE.parse(shown), had_notice=True)

        asyncio.run(take())
        (hazard,) = api.get("/nodes/hazards", params={"days": 7}).json()["data"]
        assert (hazard["cloud"], hazard["gpu"], hazard["preemptions"]) == ("local", "L4", 1)
        assert 0.05 < hazard["preemptions_per_h"] < 1
        assert code_of(api.get("/nodes/hazards", params={"days": 0}))[0] == 400


class TestCatalog:
    def test_models_regions_and_their_prices(self, empty: httpx.Client) -> None:
        models = {row["name"]: row for row in empty.get("/models").json()["data"]}
        assert models["llama-3-8b"]["aliases"] == ["llama-7b"]
        assert models["bge-base-en"]["output_price_e10"] is None
        regions = {row["name"]: row for row in empty.get("/regions").json()["data"]}
        assert regions["in-mumbai"]["multiplier_bp"] == 7000
        assert regions["in-mumbai"]["fallback"] == ["ap-southeast", "eu-west", "us-east"]

    def test_a_models_deadlines_are_set_and_taken_away(self, api: httpx.Client) -> None:
        made = api.patch("/models/llama-7b", json={"first_token_timeout_ms": 5000, "idle_timeout_ms": 900}).json()
        assert made["name"] == "llama-3-8b"
        expected = {"connect_timeout_ms": None, "first_token_timeout_ms": 5000, "idle_timeout_ms": 900}
        assert made["deadlines"] == expected | {"total_timeout_ms": None}
        again = api.patch("/models/llama-3-8b", json={"idle_timeout_ms": None, "metadata": {"a": [1]}}).json()
        assert (again["deadlines"]["idle_timeout_ms"], again["metadata"]) == (None, {"a": [1]})
        assert again["deadlines"]["first_token_timeout_ms"] == 5000
        assert api.patch("/models/llama-3-8b", json={"metadata": {"a": [1]}}).json() == again
        audit = api.get("/audit").json()["data"]
        assert [(row["action"], row["subject"]) for row in audit] == [("model.update", "llama-3-8b")] * 2
        assert audit[0]["details"]["idle_timeout_ms"] == {"from": 900, "to": None}

    @pytest.mark.parametrize(
        "body", [{"idle_timeout_ms": 0}, {"idle_timeout_ms": 86_400_001}, {"metadata": None}, {"hold_timeout_ms": 5}]
    )
    def test_a_model_refuses_what_is_no_deadline(self, empty: httpx.Client, body: dict[str, Any]) -> None:
        assert empty.patch("/models/llama-3-8b", json=body).status_code == 400
        assert code_of(empty.patch("/models/gpt-17", json={})) == (404, "model_not_found")

    def test_a_deployment_is_what_was_put(self, api: httpx.Client) -> None:
        body = {
            "model": "llama-7b",
            "regions": [{"region": "us-east-1", "replicas_min": 1}, {"region": "in-mumbai", "replicas_min": 2}],
        }
        first = api.put("/deployments/chat", json=body)
        assert first.status_code == 201
        assert first.json() == {
            "name": "chat",
            "model": "llama-3-8b",
            "strategy": "least-load",
            "regions": [
                {"region": "in-mumbai", "replicas_min": 2, "replicas_max": 2},
                {"region": "us-east", "replicas_min": 1, "replicas_max": 1},
            ],
            "scaling": {
                "placement": "spread",
                "on_demand_base": 0,
                "ttft_target_ms": None,
                "spend_cap_microdollars_per_h": None,
                "idle_s": 600,
                "gpus": [],
            },
            "is_workflow_told": False,
        }
        change = {
            "model": "llama-3-8b",
            "strategy": "round-robin",
            "regions": [{"region": "eu-west", "replicas_min": 0}],
        }
        second = api.put("/deployments/chat", json=change)
        assert second.status_code == 200
        assert second.json()["regions"] == [{"region": "eu-west", "replicas_min": 0, "replicas_max": 0}]
        again = api.put("/deployments/chat", json={"model": "llama-3-8b", "regions": change["regions"]}).json()
        assert again["strategy"] == "round-robin", "a strategy that is left out stays"
        assert api.get("/deployments/chat").json() == {
            name: value for name, value in again.items() if name != "is_workflow_told"
        }
        assert [row["name"] for row in api.get("/deployments").json()["data"]] == ["chat"]
        actions = [row["action"] for row in api.get("/audit").json()["data"]]
        assert actions == ["deployment.put"] * 2, "the third changed nothing"

    def test_how_a_deployment_grows_is_changed_field_by_field(self, api: httpx.Client) -> None:
        body: dict[str, Any] = {"model": "llama-3-8b", "regions": []}
        grows = {"gpus": ["L4", "A100"], "ttft_target_ms": 2000, "placement": "packed"}
        first = api.put("/deployments/chat", json=body | {"scaling": grows}).json()["scaling"]
        assert first == {**first, **grows, "on_demand_base": 0}
        capped = {"spend_cap_microdollars_per_h": 5_000_000, "ttft_target_ms": None}
        second = api.put("/deployments/chat", json=body | {"scaling": capped}).json()["scaling"]
        assert second == {**first, **capped}
        assert api.put("/deployments/chat", json=body).json()["scaling"] == second
        for wrong in ({"idle_s": 0}, {"placement": "anywhere"}, {"gpus": ["L4; rm"]}, {"gpus": ["L4"] * 9}, {"cap": 1}):
            assert api.put("/deployments/chat", json=body | {"scaling": wrong}).status_code == 400, wrong

    def test_what_cannot_be_is_refused(self, api: httpx.Client) -> None:
        api.put("/deployments/chat", json={"model": "llama-3-8b", "regions": []})
        cases: list[tuple[str, Any, Any]] = [
            ("chat", {"model": "gpt-17", "regions": []}, (404, "model_not_found")),
            ("chat", {"model": "mistral-7b", "regions": []}, (409, "deployment_serves_another_model")),
            ("new", {"model": "mistral-7b"}, (400, "invalid_request")),
            ("No", {"model": "mistral-7b", "regions": []}, (400, "invalid_request")),
            (
                "new",
                {"model": "mistral-7b", "regions": [{"region": "atlantis", "replicas_min": 1}]},
                (400, "unknown_region"),
            ),
            (
                "new",
                {
                    "model": "mistral-7b",
                    "regions": [{"region": "us-east", "replicas_min": 1}, {"region": "us-east-1", "replicas_min": 1}],
                },
                (400, "invalid_request"),
            ),
            (
                "new",
                {"model": "mistral-7b", "regions": [{"region": "us-east", "replicas_min": 2, "replicas_max": 1}]},
                (400, "invalid_request"),
            ),
            (
                "new",
                {"model": "mistral-7b", "regions": [{"region": "us-east", "replicas_min": 1001}]},
                (400, "invalid_request"),
            ),
        ]
        for name, body, expected in cases:
            assert code_of(api.put(f"/deployments/{name}", json=body)) == expected, body
        assert len(api.get("/deployments").json()["data"]) == 1

    def test_its_workflow_is_started_or_nudged(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        name = f"chat-{new_id().hex[-12:]}"
        for _ in range(2):
            assert fleet.put(f"/deployments/{name}", json={"model": "llama-7b", "regions": []}).json()[
                "is_workflow_told"
            ]
        workflow_id = names.deployment_workflow_id(name)
        assert asyncio.run(first_event(fleet_settings, workflow_id)) == (
            names.DEPLOYMENT_SCALING,
            fleet_settings.fleet_task_queue,
            [{"deployment": name, "memories": []}],
        )
        assert asyncio.run(signals(fleet_settings, workflow_id)) == [(names.LOOK_AGAIN, [])] * 2


class TestNodes:
    def test_lists_what_was_asked_for(self, api: httpx.Client, settings: Settings) -> None:
        dsn = settings.database_url.get_secret_value()
        ready = asyncio.run(add_node(dsn, events=READY))
        coming = asyncio.run(add_node(dsn, region="us-east"))
        lost = asyncio.run(add_node(dsn, events=(NodeEvent.LOSE,), model="mistral-7b"))

        def listed(**query: Any) -> list[str]:
            answer = api.get("/nodes", params=query)
            assert answer.status_code == 200, answer.text
            return [row["id"] for row in answer.json()["data"]]

        assert listed() == [coming, ready]
        assert listed(include_ended=True) == [lost, coming, ready]
        assert listed(state="ready") == [ready]
        assert listed(state=["lost", "requested"]) == [lost, coming]
        assert listed(region="us-east-1") == [coming]
        assert listed(model="llama-7b") == [coming, ready]
        assert listed(model="mistral-7b") == []
        page = api.get("/nodes", params={"limit": 1}).json()
        assert (page["data"][0]["id"], page["has_more"]) == (coming, True)
        assert listed(limit=1, after=page["next_after"]) == [ready]
        assert api.get("/nodes", params={"state": "happy"}).status_code == 400

    def test_shows_all_of_one(self, api: httpx.Client, settings: Settings) -> None:
        node_id = asyncio.run(add_node(settings.database_url.get_secret_value(), events=READY, is_pinned=True))
        shown = api.get(f"/nodes/{node_id}").json()
        assert (shown["state"], shown["generation"], shown["reason"]) == ("ready", 5, "it had to admit")
        assert (shown["is_pinned"], shown["is_tombstoned"], shown["ended_at"]) == (True, False, None)
        assert code_of(api.get(f"/nodes/{ids.NODE.show(new_id())}"))[0] == 404

    def test_a_price_is_said_by_hand(self, api: httpx.Client, settings: Settings) -> None:
        node_id = asyncio.run(add_node(settings.database_url.get_secret_value(), events=READY))
        assert api.get(f"/nodes/{node_id}").json()["price_microdollars_per_h"] == 0
        priced = api.patch(f"/nodes/{node_id}", json={"price_microdollars_per_h": 350_000}).json()
        assert (priced["price_microdollars_per_h"], priced["generation"]) == (350_000, 6)
        assert api.get(f"/nodes/{node_id}").json() == priced
        assert api.patch(f"/nodes/{node_id}", json={"price_microdollars_per_h": -1}).status_code == 400

    def test_starting_one_starts_its_provisioning_once(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        body = {"model": "llama-7b", "region": "ap-south-1", "spot": False, "node_id": ids.NODE.show(new_id())}
        answers = [fleet.post("/nodes", json=body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202]
        assert answers[0].json() == answers[1].json()
        started = answers[0].json()
        assert started == {"node_id": body["node_id"], "workflow_id": f"provision/{body['node_id']}"}
        kind, queue, sent = asyncio.run(first_event(fleet_settings, started["workflow_id"]))
        assert (kind, queue) == (names.NODE_PROVISIONING, fleet_settings.fleet_task_queue)
        assert (sent[0]["model"], sent[0]["region"], sent[0]["spot"]) == ("llama-3-8b", "in-mumbai", False)
        assert sent[0]["node_id"] == body["node_id"]
        assert [row["action"] for row in fleet.get("/audit").json()["data"]] == ["node.start"] * 2

    def test_joining_one_starts_its_lifecycle(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        body = {"model": "llama-7b", "region": "us-east", "endpoint": "http://localhost:9999/v1/"}
        answer = fleet.post("/nodes/join", json=body)
        assert answer.status_code == 202, answer.text
        joined = answer.json()
        assert fleet_settings.node_secret is not None
        secret = fleet_settings.node_secret.get_secret_value()
        assert joined["credential"] == node_credential(secret, joined["node_id"])
        kind, _, sent = asyncio.run(first_event(fleet_settings, joined["workflow_id"]))
        assert (kind, joined["workflow_id"]) == (names.NODE_LIFECYCLE, f"node/{joined['node_id']}")
        assert sent[0]["is_admitted"] is False
        spec = sent[0]["spec"]
        assert (spec["model"], spec["region"], spec["endpoint"]) == ("llama-3-8b", "us-east", "http://localhost:9999")
        assert joined["credential"] not in json.dumps(sent)

    def test_joining_an_endpoint_twice(self, fleet: httpx.Client, settings: Settings) -> None:
        dsn = settings.database_url.get_secret_value()
        there = asyncio.run(add_node(dsn, events=READY, provider="joined", region="us-east"))
        body = {"model": "llama-7b", "region": "us-east", "endpoint": "http://127.0.0.1:1"}
        assert fleet.post("/nodes/join", json=body).json()["node_id"] == there
        other = fleet.post("/nodes/join", json=body | {"model": "mistral-7b"})
        assert code_of(other) == (409, "endpoint_taken")

    @pytest.mark.parametrize(
        ("endpoint", "hint"),
        [
            ("http://gpu-7.example.org", "https"),
            ("https://169.254.169.254", "cannot be a node's"),
            ("https://user:secret@gpu.example.org", "credentials"),
            ("https://gpu.example.org/admin", "path"),
            ("ftp://gpu.example.org", "https://HOST"),
            ("", "https://HOST"),
        ],
    )
    def test_an_address_that_no_node_can_have(self, empty: httpx.Client, endpoint: str, hint: str) -> None:
        answer = empty.post("/nodes/join", json={"model": "llama-7b", "region": "us-east", "endpoint": endpoint})
        assert code_of(answer) == (400, "invalid_endpoint")
        assert hint in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "endpoint"

    def test_loopback_is_for_dev_mode(self, settings: Settings) -> None:
        production = settings.model_copy(update={"mode": "production"})
        with serving(production) as url:
            answer = httpx.post(
                f"{url}/admin/nodes/join",
                json={"model": "llama-7b", "region": "us-east", "endpoint": "https://127.0.0.1"},
                headers={"authorization": f"Bearer {TOKEN}"},
                trust_env=False,
            )
        assert code_of(answer) == (400, "invalid_endpoint")

    @pytest.mark.parametrize("node_id", ["node_7", "key_01h455vb4pex5vsknk084sn02q", "node_0123456789abcdefghjkmnpqrs"])
    def test_an_id_that_cannot_be_ours(self, empty: httpx.Client, node_id: str) -> None:
        body = {"model": "llama-7b", "region": "us-east", "node_id": node_id}
        assert code_of(empty.post("/nodes", json=body)) == (400, "invalid_id")

    def test_draining_signals_who_is_responsible(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        joined = fleet.post(
            "/nodes/join", json={"model": "llama-7b", "region": "us-east", "endpoint": "http://127.0.0.1:1"}
        ).json()
        dsn = fleet_settings.database_url.get_secret_value()

        async def write_row() -> None:
            async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
                await NodeStore(pool).intend(
                    Intent(
                        id=ids.NODE.parse(joined["node_id"]),
                        model="llama-3-8b",
                        region="us-east",
                        provider="joined",
                        cluster="c",
                        workflow_id=joined["workflow_id"],
                    )
                )

        asyncio.run(write_row())
        path = f"/nodes/{joined['node_id']}/drain"
        assert fleet.post(path, json={"reason": "kernel update"}).status_code == 202
        assert fleet.post(path).status_code == 202
        assert asyncio.run(signals(fleet_settings, joined["workflow_id"])) == [
            (names.DRAIN, ["kernel update"]),
            (names.DRAIN, ["drained by an operator"]),
        ]
        last = fleet.get("/audit").json()["data"][0]
        assert (last["action"], last["subject"]) == ("node.drain", joined["node_id"])

    def test_draining_what_has_ended_changes_nothing(self, api: httpx.Client, settings: Settings) -> None:
        dsn = settings.database_url.get_secret_value()
        node_id = asyncio.run(add_node(dsn, events=(NodeEvent.FAIL,)))
        answer = api.post(f"/nodes/{node_id}/drain")
        assert (answer.status_code, answer.json()["state"]) == (202, "failed")

    def test_draining_without_a_workflow_says_so(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        node_id = asyncio.run(add_node(fleet_settings.database_url.get_secret_value(), events=READY))
        answer = fleet.post(f"/nodes/{node_id}/drain")
        assert code_of(answer) == (503, "workflow_not_running")
        assert f"node/{node_id}" in answer.json()["error"]["message"]

    def test_temporal_away_is_a_503_and_nothing_is_written(self, api: httpx.Client, settings: Settings) -> None:
        node_id = asyncio.run(add_node(settings.database_url.get_secret_value(), events=READY))
        where = {"model": "llama-7b", "region": "us-east"}
        for path, body in (
            ("/nodes", where),
            ("/nodes/join", where | {"endpoint": "http://127.0.0.1:9"}),
            (f"/nodes/{node_id}/drain", {}),
        ):
            answer = api.post(path, json=body)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "Temporal" in answer.json()["error"]["message"]
        assert api.get("/audit").json()["data"] == []


class TestUsage:
    @pytest.fixture
    def used(self, made: Made, settings: Settings) -> dict[str, Any]:
        """Three records of two orgs on two days of October 2026, and one of the month after."""
        made("/orgs", name="acme")
        made("/orgs", name="other")
        acme = made("/environments", org="acme", name="prod")
        other = made("/environments", org="other", name="dev")
        rows = [
            (acme, "llama-3-8b", datetime(2026, 10, 1, tzinfo=UTC), 10, 1),
            (acme, "llama-3-8b", datetime(2026, 10, 1, 23, 59, 59, 999_999, UTC), 20, 2),
            (acme, "bge-base-en", datetime(2026, 10, 31, 23, 59, 59, 999_999, UTC), 40, 0),
            (other, "llama-3-8b", datetime(2026, 10, 2, tzinfo=UTC), 80, 8),
            (other, "llama-3-8b", datetime(2026, 11, 1, tzinfo=UTC), 160, 16),
        ]

        async def insert() -> None:
            connection = await asyncpg.connect(settings.database_url.get_secret_value())
            for environment, model, at, prompt, completion in rows:
                await connection.execute(
                    """
                    INSERT INTO usage_records (id, admitted_at, org_id, environment_id, key_id, home_region, model,
                        endpoint_kind, is_streamed, prompt_tokens, completion_tokens, cached_tokens, token_source,
                        latency_ms, status, outcome, list_price_microdollars)
                    VALUES ($1, $2, $3, $4, $5, 'us-east', $6, 'chat', false, $7, $8, 3, 'engine', 1, 200,
                            'completed', 0)
                    """,
                    new_id(),
                    at,
                    ids.ORG.parse(environment["org_id"]),
                    ids.ENVIRONMENT.parse(environment["id"]),
                    new_id(),
                    model,
                    prompt,
                    completion,
                )
            await connection.close()

        asyncio.run(insert())
        return {"acme": acme, "other": other}

    OCTOBER = {"start": "2026-10-01T00:00:00Z", "end": "2026-11-01T00:00:00Z"}  # noqa: RUF012

    def test_sums_a_half_open_month(self, api: httpx.Client, used: Any) -> None:
        answer = api.get("/usage", params=self.OCTOBER)
        assert answer.status_code == 200, answer.text
        sums = [
            (
                row["org"],
                row["environment"],
                row["model"],
                row["requests"],
                row["prompt_tokens"],
                row["completion_tokens"],
            )
            for row in answer.json()["data"]
        ]
        assert sums == [
            ("acme", "prod", "bge-base-en", 1, 40, 0),
            ("acme", "prod", "llama-3-8b", 2, 30, 3),
            ("other", "dev", "llama-3-8b", 1, 80, 8),
        ]
        assert answer.json()["data"][0]["org_id"] == used["acme"]["org_id"]

    def test_by_day_in_utc(self, api: httpx.Client, used: Any) -> None:
        rows = api.get("/usage", params=self.OCTOBER | {"by": "day"}).json()["data"]
        assert [(row["day"], row["requests"], row["cached_tokens"]) for row in rows] == [
            ("2026-10-01", 2, 6),
            ("2026-10-02", 1, 3),
            ("2026-10-31", 1, 3),
        ]
        assert {row["org"] for row in rows} == {None}

    def test_of_one_org(self, api: httpx.Client, used: Any) -> None:
        rows = api.get("/usage", params=self.OCTOBER | {"by": ["org", "model"], "org": "other"}).json()["data"]
        assert [(row["org"], row["model"], row["prompt_tokens"]) for row in rows] == [("other", "llama-3-8b", 80)]

    def test_without_a_span_it_is_this_month(self, empty: httpx.Client) -> None:
        usage = empty.get("/usage").json()
        start, end = datetime.fromisoformat(usage["start"]), datetime.fromisoformat(usage["end"])
        assert (start.day, start.hour, start.minute) == (1, 0, 0)
        assert abs(end - datetime.now(UTC)) < timedelta(minutes=1)
        assert usage["data"] == []

    @pytest.mark.parametrize(
        "query",
        [
            {"start": "2026-11-01T00:00:00Z", "end": "2026-11-01T00:00:00Z"},
            {"start": "2024-01-01T00:00:00Z"},
            {"start": "2026-10-01T00:00:00"},
            {"start": "yesterday"},
            {"by": "region"},
        ],
    )
    def test_a_span_that_cannot_be(self, empty: httpx.Client, query: Any) -> None:
        assert empty.get("/usage", params=query).status_code == 400


class TestCosts:
    def test_of_a_skypilot_that_is_away_are_unavailable(self, fleet: httpx.Client) -> None:
        answer = fleet.get("/nodes/costs")
        assert answer.status_code == 503
        assert "SkyPilot's API server did not answer" in answer.json()["error"]["message"]

    def test_are_those_of_a_year_at_most(self, fleet: httpx.Client) -> None:
        assert fleet.get("/nodes/costs", params={"days": 366}).status_code == 400


class TestSweeps:
    def test_are_listed_with_what_they_found(self, api: httpx.Client, database: str) -> None:
        swept = FleetSweepResult(
            ids.SWEEP.show(new_id()), "", False, 3, 0, 1, 1, 1, 1, 0, 0,
            findings=[
                SweepFinding("local", "cic-x", "orphan", "its node is over", ids.NODE.show(new_id()), "ended"),
                SweepFinding("local", "cic-y", "foreign", "another installation's", "", "left alone"),
            ],
        )  # fmt: skip

        async def record() -> None:
            async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool:
                await SweepStore(pool).record(swept)

        asyncio.run(record())
        listed = api.get("/sweeps").json()
        (shown,) = listed["data"]
        assert (shown["id"], shown["machines"], shown["foreign"], shown["unexplained"]) == (swept.sweep_id, 3, 1, 0)
        assert [(found["cluster"], found["node_id"]) for found in shown["findings"]] == [
            ("cic-x", swept.findings[0].node_id),
            ("cic-y", None),
        ]
        assert api.get("/sweeps", params={"after": swept.sweep_id}).json()["data"] == []
        assert code_of(api.get("/sweeps", params={"after": "req_x"})) == (400, "invalid_id")

    def test_are_started_with_an_audit_row(self, fleet: httpx.Client, fleet_settings: Settings) -> None:
        answer = fleet.post("/sweeps", json={"provider": "local", "dry_run": True})
        assert answer.status_code == 202
        workflow_id = answer.json()["workflow_id"]
        type_, queue, (sent,) = asyncio.run(first_event(fleet_settings, workflow_id))
        assert (type_, queue) == (names.FLEET_SWEEP, fleet_settings.fleet_task_queue)
        assert (sent["provider"], sent["dry_run"], sent["end_all_unintended"]) == ("local", True, False)
        (entry,) = fleet.get("/audit", params={"subject": workflow_id}).json()["data"]
        assert (entry["action"], entry["details"]["dry_run"]) == ("sweep.start", True)
        assert fleet.post("/sweeps", json={"force": True}).status_code == 400
