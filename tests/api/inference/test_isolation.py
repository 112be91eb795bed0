"""H6: a tenant sees nothing of another, on whichever route and with whatever key; H9 on the way of inference."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crosslogic.domain import ids, keys
from crosslogic.new_ids import new_id
from tests.api.admin.test_secrets import everything_in, pieces
from tests.api.inference.conftest import Api, Fleet, MakeApi, chat_body
from tests.engines import Engine

ROLES = ("developer", "admin", "read-only")
MODELS = {"acorn": "llama-3-8b", "birch": "gemma-7b"}


@dataclass
class Tenant:
    """An org with one environment that may use one model, and a key of each role."""

    name: str
    model: str
    org_id: UUID
    environment_id: UUID
    key_ids: list[UUID]
    secrets: dict[str, str]
    requests: Counter[str] = field(default_factory=Counter[str])

    @property
    def marks(self) -> list[str]:
        """What tells it apart wherever it is written: ids in both their forms, names, hints and its own words."""
        shown = [ids.ORG.show(self.org_id), ids.ENVIRONMENT.show(self.environment_id), *map(ids.KEY.show, self.key_ids)]
        plain = [str(one) for one in (self.org_id, self.environment_id, *self.key_ids)]
        return [*shown, *plain, self.name, *self.secrets.values(), f"request-of-{self.name}", f"words-of-{self.name}"]


async def make_tenant(fleet: Fleet, name: str) -> Tenant:
    org_id, environment_id = new_id(), new_id()
    await fleet.sql.execute(
        "INSERT INTO orgs (id, name, region_preferences) VALUES ($1, $2, '{in-mumbai}')", org_id, name
    )
    await fleet.sql.execute(
        "INSERT INTO environments (id, org_id, name, allowed_models) VALUES ($1, $2, 'prod', $3)",
        environment_id,
        org_id,
        [MODELS[name]],
    )
    key_ids = [new_id() for _ in ROLES]
    secrets: dict[str, str] = {}
    for key_id, role in zip(key_ids, ROLES, strict=True):
        secret = secrets[role] = keys.mint("prod", os.urandom(keys.RANDOM_BYTES))
        await fleet.sql.execute(
            "INSERT INTO keys (id, environment_id, secret_hash, hint, role) VALUES ($1, $2, $3, $4, $5)",
            key_id,
            environment_id,
            keys.hash_secret(secret),
            keys.hint_of(secret),
            role,
        )
        await fleet.limit("key", key_id)
    await fleet.limit("environment", environment_id)
    return Tenant(name, MODELS[name], org_id, environment_id, key_ids, secrets)


@dataclass
class Town:
    """Two tenants beside each other behind one API, each with an engine of its own that counts differently."""

    api: Api
    acorn: Tenant
    birch: Tenant
    engines: dict[str, Engine]

    async def ask(self, tenant: Tenant, role: str = "developer", **fields: Any) -> httpx.Response:
        """A request that carries its tenant's mark in every field that is kept or passed on."""
        words = f"words-of-{tenant.name}"
        answer = await self.api.http.post(
            "/v1/chat/completions",
            json=chat_body(
                **{"model": tenant.model, "user": words, "messages": [{"role": "user", "content": words}]} | fields
            ),
            headers={"Authorization": f"Bearer {tenant.secrets[role]}", "X-Request-Id": f"request-of-{tenant.name}"},
        )
        tenant.requests["requests"] += answer.status_code == 200
        return answer

    async def usage(self, tenant: Tenant) -> Any:
        answer = await self.api.http.get(
            "/v1/usage", headers={"Authorization": f"Bearer {tenant.secrets['read-only']}"}
        )
        assert answer.status_code == 200
        return answer.json()


@pytest.fixture
async def town(make_api: MakeApi, fleet: Fleet, make_engine: Any) -> Town:
    engines: dict[str, Engine] = {}
    for number, (name, model) in enumerate(MODELS.items()):
        engines[name] = await make_engine([f"said-to-{name}"])
        engines[name].prompt_tokens = 1009 + 4 * number
        await fleet.add_node(engines[name], model=model)
    acorn, birch = await make_tenant(fleet, "acorn"), await make_tenant(fleet, "birch")
    return Town(await make_api(), acorn, birch, engines)


def operations(api: Api) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Method, path and parameters of everything that there is."""
    paths: dict[str, Any] = api.app.openapi()["paths"]
    return [
        (method.upper(), path, operation.get("parameters", []))
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]


class TestRoutes:
    async def test_h6_no_route_shows_another_tenant(self, town: Town) -> None:
        api, acorn, birch = town.api, town.acorn, town.birch
        for _ in range(3):
            assert (await town.ask(birch)).status_code == 200
        assert (await town.ask(acorn)).status_code == 200
        await api.fleet.records(4)
        # Whatever is asked for, it is asked for by the other's names.
        bodies: list[Any] = [
            chat_body(model=birch.model),
            chat_body(model=acorn.model, user=str(birch.key_ids[0])),
            {"model": birch.model, "prompt": "a", "input": "a"},
            {"model": acorn.model, "prompt": "a"},
            {"name": birch.name, "org": birch.name, "environment_id": ids.ENVIRONMENT.show(birch.environment_id)},
        ]
        names = [
            birch.model,
            birch.name,
            ids.ORG.show(birch.org_id),
            ids.ENVIRONMENT.show(birch.environment_id),
            ids.KEY.show(birch.key_ids[0]),
            "all",
        ]
        seen = Counter[str]()
        for method, path, parameters in operations(api):
            in_path = re.findall(r"\{(\w+)\}", path)
            for index, name in enumerate(names if in_path or parameters else names[:1]):
                target = re.sub(r"\{layer\}", ("org", "environment", "key", "global")[index % 4], path)
                target = re.sub(r"\{\w+\}", name, target)
                query = {one["name"]: name for one in parameters if one["in"] == "query"}
                for role in ROLES:
                    for body in bodies if method != "GET" else [None]:
                        answer = await api.http.request(
                            method,
                            target,
                            params=query if index % 2 else None,
                            content=None if body is None else json.dumps(body),
                            headers={
                                "Authorization": f"Bearer {acorn.secrets[role]}",
                                "Content-Type": "application/json",
                            },
                        )
                        self._check(answer, acorn, birch, f"{method} {target} {role}", name)
                        seen[path] += 1
        assert len(seen) == len(api.app.openapi()["paths"])

    def _check(self, answer: httpx.Response, acorn: Tenant, birch: Tenant, asked: str, name: str) -> None:
        assert answer.status_code < 500, asked
        if asked.split(" ")[1].startswith("/admin"):
            # A tenant's key has no business here, whatever its role.
            assert answer.status_code in (401, 403), asked
        if asked.split(" ")[1] == "/metrics":
            # Sums over all tenants, for operators: see below.
            return
        shown = answer.text + str(answer.headers)
        for mark in birch.marks:
            # What was asked for may be repeated, nothing else.
            assert mark not in shown.replace(name, ""), (asked, mark)
        assert "said-to-birch" not in shown, asked
        # Three requests of 1 013 tokens.
        assert not re.search(r"\b(?:1013|3039)\b", shown), asked

    async def test_h6_metrics_know_no_tenant(self, town: Town) -> None:
        for tenant in (town.acorn, town.birch):
            await town.ask(tenant)
        await town.api.fleet.records(2)
        page = (await town.api.http.get("/metrics")).text
        assert "crosslogic_requests" in page
        for tenant in (town.acorn, town.birch):
            for mark in (*tenant.marks, *(keys.hint_of(secret) for secret in tenant.secrets.values())):
                assert mark not in page

    async def test_h6_outside_dev_mode_a_tenant_s_key_reads_no_metrics(self, fleet: Fleet, make_api: MakeApi) -> None:
        api = await make_api(mode="production", admin_token="x" * 32, node_secret="y" * 32)
        assert (await api.http.get("/metrics")).status_code == 401


class TestModels:
    async def test_h6_each_sees_and_uses_what_it_may(self, town: Town) -> None:
        for tenant, other in ((town.acorn, town.birch), (town.birch, town.acorn)):
            for role in ROLES:
                headers = {"Authorization": f"Bearer {tenant.secrets[role]}"}
                cards = (await town.api.http.get("/v1/models", headers=headers)).json()["data"]
                assert {card["canonical"] for card in cards} == {tenant.model}
                hidden = await town.api.http.get(f"/v1/models/{other.model}", headers=headers)
                unknown = await town.api.http.get("/v1/models/nothing", headers=headers)
                assert hidden.text.replace(other.model, "nothing") == unknown.text
            refused = await town.ask(tenant, model=other.model)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert town.engines["acorn"].requests == town.engines["birch"].requests == []


class TestCounters:
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["acorn", "birch"]), st.sampled_from(["developer", "admin"]), st.booleans()),
            min_size=1,
            max_size=10,
        )
    )
    async def test_h6_usage_is_each_tenant_s_own_in_any_order(
        self, town: Town, steps: list[tuple[str, str, bool]]
    ) -> None:
        tenants = {"acorn": town.acorn, "birch": town.birch}
        answers = await asyncio.gather(
            *(town.ask(tenants[name], role, stream=is_streamed) for name, role, is_streamed in steps)
        )
        for (name, _, _), answer in zip(steps, answers, strict=True):
            assert answer.status_code == 200
            assert f"said-to-{name}" in answer.text
        await town.api.fleet.records(town.acorn.requests["requests"] + town.birch.requests["requests"])
        for name, tenant in tenants.items():
            usage = await town.usage(tenant)
            count = tenant.requests["requests"]
            assert usage["requests"] == count
            assert usage["prompt_tokens"] == count * town.engines[name].prompt_tokens
            assert [row["model"] for row in usage["models"]] == ([tenant.model] if count else [])

    async def test_h6_one_s_limit_is_not_the_other_s(self, town: Town) -> None:
        fleet, acorn, birch = town.api.fleet, town.acorn, town.birch
        await fleet.limit("key", birch.key_ids[0], requests_per_min=2)
        await fleet.limit("environment", acorn.environment_id, requests_per_min=50)

        async def is_known() -> bool:
            return (await town.ask(birch)).status_code == 429

        await town.api.until(is_known)
        first = await town.ask(acorn)
        assert first.headers["x-ratelimit-limit-requests"] == "50"
        left = int(first.headers["x-ratelimit-remaining-requests"])
        for _ in range(5):
            assert (await town.ask(birch)).status_code == 429
        second = await town.ask(acorn)
        assert second.status_code == 200
        assert left - int(second.headers["x-ratelimit-remaining-requests"]) <= 1
        # Nor is one key's another's in the same environment.
        assert (await town.ask(birch, "admin")).status_code == 200


class TestCanary:
    async def test_h9_a_secret_that_strays_into_any_place_is_kept_nowhere(
        self, town: Town, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        api, tenant = town.api, town.acorn
        secret = tenant.secrets["developer"]
        own = {"Authorization": f"Bearer {secret}"}
        words = [{"role": "user", "content": "hi"}]
        shown: list[str] = []
        asked: list[tuple[str, str, Any, dict[str, str]]] = [
            ("POST", "/v1/chat/completions", chat_body(model=tenant.model), own),
            ("POST", "/v1/chat/completions", chat_body(model=secret), own),
            ("POST", "/v1/chat/completions", chat_body(model=f"{tenant.model}@{secret}"), own),
            ("POST", "/v1/chat/completions", chat_body(model=tenant.model, stream=secret), own),
            (
                "POST",
                "/v1/chat/completions",
                {"model": tenant.model, "messages": words, secret: {secret: [secret]}},
                own,
            ),
            ("POST", "/v1/chat/completions", f'{{"{secret}": 1, "{secret}": 2}}', own),
            ("POST", "/v1/chat/completions", secret, own),
            ("POST", f"/v1/chat/completions?region={secret}", chat_body(model=tenant.model), own),
            ("POST", f"/v1/chat/completions?{secret}=1&{secret}=2&prompt=x&model={secret}", "", own),
            ("POST", "/v1/embeddings", {"model": tenant.model, "input": "a", "encoding_format": secret}, own),
            ("GET", f"/v1/models/{secret}", "", own),
            ("GET", f"/v1/{secret}", "", own),
            ("GET", f"/v1/usage?start={secret}", "", own),
            ("GET", "/v1/models", "", {"Authorization": secret}),
            ("GET", "/v1/models", "", {"Authorization": f"Basic {secret}"}),
            ("GET", "/v1/models", "", {"Authorization": f"Bearer {secret}{secret}"}),
            *(
                ("POST", "/v1/chat/completions", chat_body(model=tenant.model), own | {name: secret})
                for name in (
                    "x-crosslogic-region",
                    "x-request-id",
                    "cookie",
                    "user-agent",
                    "x-api-key",
                    "referer",
                    "content-type",
                )
            ),
        ]
        for method, target, body, headers in asked:
            content = body if isinstance(body, str) else json.dumps(body)
            answer = await api.http.request(method, target, content=content, headers=headers)
            assert answer.status_code < 500, target
            shown.append(answer.text + str(answer.headers))
        admitted = sum(len(engine.requests) for engine in town.engines.values())
        assert admitted >= 3
        await api.fleet.records(admitted)
        stored = await everything_in(api.settings.database_url.get_secret_value())
        spooled = "".join(
            path.read_bytes().decode("latin-1") for path in api.settings.usage_log_dir.rglob("*") if path.is_file()
        )
        metrics = (await api.http.get("/metrics")).text
        ours = "\n".join(
            record.getMessage() + (record.exc_text or "")
            for record in caplog.records
            if not record.name.startswith(("httpx", "httpcore"))
        )
        places = {"answers": "".join(shown), "tables": stored, "log files": spooled, "metrics": metrics, "logs": ours}
        assert tenant.name in stored, "the scan reads tables"
        assert "model_not_found" in places["answers"], "the scan reads answers"
        assert "crosslogic_" in metrics, "the scan reads metrics"
        for place, text in places.items():
            for piece in pieces(secret):
                assert piece not in text, place
        for engine in town.engines.values():
            for exchange in engine.requests:
                assert secret not in str(exchange.headers), "an engine's credential is its own"
