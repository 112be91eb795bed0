from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from crosslogic.domain import keys

Made = Callable[..., Any]


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def org(made: Made) -> Any:
    return made("/orgs", name="acme", region_preferences=["ap-south-1", "us-east", "in-mumbai"])


@pytest.fixture
def environment(made: Made, org: Any) -> Any:
    return made("/environments", org="acme", name="prod")


@pytest.fixture
def key(made: Made, environment: Any) -> Any:
    return made("/keys", org="acme", environment="prod", name="laptop")


class TestOrgs:
    def test_aliases_become_our_names_each_once(self, org: Any) -> None:
        assert org["region_preferences"] == ["in-mumbai", "us-east"]
        assert org["id"].startswith("org_")
        assert (org["state"], org["plan"]) == ("active", "serverless")

    def test_are_found_by_id_and_by_name(self, api: httpx.Client, org: Any) -> None:
        assert api.get(f"/orgs/{org['id']}").json() == api.get("/orgs/acme").json() == org

    def test_a_repeated_creation_is_harmless_and_another_one_a_conflict(self, api: httpx.Client, org: Any) -> None:
        body = {"name": "acme", "region_preferences": ["in-mumbai", "us-east"]}
        again = api.post("/orgs", json=body)
        assert (again.status_code, again.json()) == (200, org)
        assert code_of(api.post("/orgs", json=body | {"plan": "enterprise"})) == (409, "org_exists")

    def test_change_one_thing_at_a_time(self, api: httpx.Client, org: Any) -> None:
        changed = api.patch("/orgs/acme", json={"state": "suspended"}).json()
        assert changed == org | {"state": "suspended"}
        changed = api.patch(f"/orgs/{org['id']}", json={"plan": "enterprise", "region_preferences": []}).json()
        assert changed == org | {"state": "suspended", "plan": "enterprise", "region_preferences": []}

    def test_an_operators_is_made_by_a_change(self, api: httpx.Client, org: Any) -> None:
        assert org["is_operator"] is False
        assert api.patch("/orgs/acme", json={"is_operator": True}).json() == org | {"is_operator": True}
        assert api.patch("/orgs/acme", json={"is_operator": None}).status_code == 400

    def test_null_is_no_state(self, api: httpx.Client, org: Any) -> None:
        answer = api.patch("/orgs/acme", json={"state": None})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "state")

    def test_pages_follow_each_other(self, api: httpx.Client, made: Made) -> None:
        names = [made("/orgs", name=f"org-{number}")["name"] for number in range(5)]
        found: list[str] = []
        after, pages = None, 0
        while True:
            page = api.get("/orgs", params={"limit": 2} | ({"after": after} if after else {})).json()
            found += [row["name"] for row in page["data"]]
            after, pages = page["next_after"], pages + 1
            if not page["has_more"]:
                break
        assert (found, pages, after) == (names, 3, None)


class TestEnvironments:
    def test_models_and_regions_become_our_names(self, made: Made, org: Any) -> None:
        made_one = made(
            "/environments",
            org=org["id"],
            name="dev",
            home_region="US-EAST-1",
            allowed_models=["llama-7b", "llama-3-8b"],
        )
        assert (made_one["home_region"], made_one["allowed_models"]) == ("us-east", ["llama-3-8b"])
        assert (made_one["org"], made_one["org_id"]) == ("acme", org["id"])

    def test_what_is_not_there_is_refused(self, api: httpx.Client, org: Any) -> None:
        cases: list[Any] = [
            ({"org": "nobody", "name": "dev"}, (404, "org_not_found")),
            ({"org": "acme", "name": "production"}, (400, "invalid_request")),
            ({"org": "acme", "name": "dev", "home_region": "atlantis"}, (400, "unknown_region")),
            ({"org": "acme", "name": "dev", "allowed_models": ["gpt-17"]}, (400, "model_not_found")),
        ]
        for body, expected in cases:
            assert code_of(api.post("/environments", json=body)) == expected, body

    def test_a_repeated_creation_is_harmless_and_another_one_a_conflict(
        self, api: httpx.Client, environment: Any
    ) -> None:
        again = api.post("/environments", json={"org": "acme", "name": "prod"})
        assert (again.status_code, again.json()) == (200, environment)
        other = api.post("/environments", json={"org": "acme", "name": "prod", "home_region": "us-east"})
        assert code_of(other) == (409, "environment_exists")

    def test_null_takes_a_restriction_away_and_absence_keeps_it(self, api: httpx.Client, environment: Any) -> None:
        path = f"/environments/{environment['id']}"
        changed = api.patch(path, json={"home_region": "eu-west", "allowed_models": []}).json()
        assert changed == environment | {"home_region": "eu-west", "allowed_models": []}
        assert api.patch(path, json={"home_region": None}).json() == environment | {"allowed_models": []}
        assert api.patch(path, json={"allowed_models": None, "state": "suspended"}).json() == environment | {
            "state": "suspended"
        }
        assert api.get(path).json()["state"] == "suspended"

    def test_are_listed_by_org_and_name(self, api: httpx.Client, made: Made, environment: Any) -> None:
        made("/orgs", name="other")
        other = made("/environments", org="other", name="prod")
        listed = api.get("/environments", params={"org": "other", "name": "prod"}).json()
        assert listed["data"] == [other]
        assert len(api.get("/environments", params={"name": "prod"}).json()["data"]) == 2


class TestKeys:
    def test_the_secret_is_shown_once(self, api: httpx.Client, key: Any) -> None:
        assert keys.is_well_formed(key["secret"])
        assert key["secret"].startswith("sk_prod_")
        assert key["hint"] == key["secret"][-4:]
        shown = api.get(f"/keys/{key['id']}").json()
        assert shown == {name: value for name, value in key.items() if name != "secret"}

    def test_can_be_made_by_environment_id(self, made: Made, environment: Any) -> None:
        soon = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        made_one = made("/keys", environment_id=environment["id"], role="read-only", expires_at=soon)
        assert (made_one["role"], made_one["org"], made_one["environment"]) == ("read-only", "acme", "prod")
        assert datetime.fromisoformat(made_one["expires_at"]) == datetime.fromisoformat(soon)

    def test_what_cannot_be_is_refused(self, api: httpx.Client, environment: Any) -> None:
        cases: list[Any] = [
            ({}, (400, "which_environment")),
            ({"org": "acme"}, (400, "which_environment")),
            ({"org": "acme", "environment": "dev"}, (404, "environment_not_found")),
            ({"org": "nobody", "environment": "dev"}, (404, "org_not_found")),
            ({"environment_id": "env_01h455vb4pex5vsknk084sn02q"}, (404, "environment_not_found")),
            ({"environment_id": "env_7"}, (400, "invalid_id")),
            ({"org": "acme", "environment": "prod", "expires_at": "2020-01-01T00:00:00Z"}, (400, "invalid_request")),
            ({"org": "acme", "environment": "prod", "expires_at": "2030-01-01T00:00:00"}, (400, "invalid_request")),
            (
                {"org": "acme", "environment": "prod", "expires_at": "9999-12-31T23:59:59-14:00"},
                (400, "invalid_request"),
            ),
            ({"org": "acme", "environment": "prod", "name": "a\nb"}, (400, "invalid_request")),
            ({"org": "acme", "environment": "prod", "secret": "mine"}, (400, "invalid_request")),
        ]
        for body, expected in cases:
            assert code_of(api.post("/keys", json=body)) == expected, body
        assert api.get("/keys").json()["data"] == []

    def test_states_and_their_repetition(self, api: httpx.Client, key: Any) -> None:
        path = f"/keys/{key['id']}"
        for verb, state in (("suspend", "suspended"), ("resume", "active"), ("revoke", "revoked")):
            for _ in range(2):
                answer = api.post(f"{path}/{verb}")
                assert (answer.status_code, answer.json()["state"]) == (200, state)
        assert code_of(api.post(f"{path}/resume")) == (409, "key_revoked")
        assert code_of(api.post(f"{path}/rotate", json={})) == (409, "key_revoked")
        assert code_of(api.post("/keys/key_01h455vb4pex5vsknk084sn02q/suspend")) == (404, "key_not_found")

    def test_are_listed_by_org_and_environment(self, api: httpx.Client, made: Made, key: Any) -> None:
        made("/environments", org="acme", name="dev")
        other = made("/keys", org="acme", environment="dev")
        by_environment = api.get("/keys", params={"environment_id": other["environment_id"]}).json()["data"]
        assert [row["id"] for row in by_environment] == [other["id"]]
        assert [row["id"] for row in api.get("/keys", params={"org": "acme"}).json()["data"]] == [
            key["id"],
            other["id"],
        ]


class TestRotation:
    def test_old_and_new_overlap(self, api: httpx.Client, key: Any) -> None:
        answer = api.post(f"/keys/{key['id']}/rotate", json={"overlap_s": 3600})
        assert answer.status_code == 201
        old, new = answer.json()["old"], answer.json()["new"]
        assert (old["id"], old["state"]) == (key["id"], "active")
        left = datetime.fromisoformat(old["expires_at"]) - datetime.now(UTC)
        assert timedelta(minutes=59) < left <= timedelta(hours=1)
        assert (new["name"], new["role"], new["expires_at"]) == ("laptop", "developer", None)
        assert keys.is_well_formed(new["secret"])
        assert new["secret"] != key["secret"]
        assert "secret" not in old

    def test_a_key_that_expires_must_say_when_its_successor_does(self, api: httpx.Client, made: Made, key: Any) -> None:
        later = (datetime.now(UTC) + timedelta(days=30)).isoformat()
        expiring = made("/keys", org="acme", environment="prod", expires_at=later)
        path = f"/keys/{expiring['id']}/rotate"
        assert code_of(api.post(path, json={})) == (400, "missing_expiry")
        assert api.post(path, json={"expires_at": None}).json()["new"]["expires_at"] is None
        again = api.post(path, json={"expires_at": later}).json()["new"]["expires_at"]
        assert datetime.fromisoformat(again) == datetime.fromisoformat(later)


class TestLimits:
    def test_nothing_is_set_at_first(self, api: httpx.Client, key: Any, org: Any, environment: Any) -> None:
        for path in (
            f"/limits/key/{key['id']}",
            f"/limits/environment/{environment['id']}",
            f"/limits/org/{org['id']}",
            "/limits/org/acme",
            "/limits/global/all",
        ):
            answer = api.get(path)
            assert answer.status_code == 200, answer.text
            assert answer.json().pop("dry_run") == []
            kept = {"layer", "subject_id", "dry_run"}
            assert {value for name, value in answer.json().items() if name not in kept} == {None}

    def test_a_partial_update_keeps_the_others(self, api: httpx.Client, key: Any) -> None:
        path = f"/limits/key/{key['id']}"
        api.put(path, json={"requests_per_min": 10, "concurrency": 3})
        row = api.put(path, json={"concurrency": -1}).json()
        assert (row["requests_per_min"], row["concurrency"], row["tokens_per_min"]) == (10, -1, None)
        assert api.put(path, json={"requests_per_min": None}).json()["requests_per_min"] is None
        assert api.get(path).json()["concurrency"] == -1

    def test_dry_run_is_set_beside_the_limits(self, api: httpx.Client, key: Any) -> None:
        path = f"/limits/key/{key['id']}"
        row = api.put(path, json={"requests_per_min": 10, "dry_run": ["concurrency", "requests_per_min"]}).json()
        assert (row["requests_per_min"], row["dry_run"]) == (10, ["requests_per_min", "concurrency"])
        assert api.put(path, json={"requests_per_min": 11}).json()["dry_run"] == ["requests_per_min", "concurrency"]
        row = api.put(path, json={"dry_run": []}).json()
        assert (row["requests_per_min"], row["dry_run"]) == (11, [])
        assert api.get(path).json() == row

    def test_what_cannot_be_is_refused(self, api: httpx.Client, key: Any) -> None:
        cases: list[Any] = [
            ("/limits/key/{key}", {}, (400, "nothing_to_set")),
            ("/limits/key/{key}", {"dry_run": ["everything"]}, (400, "invalid_request")),
            ("/limits/key/{key}", {"requests_per_min": -2}, (400, "invalid_request")),
            ("/limits/key/{key}", {"requests_per_min": 10**16}, (400, "invalid_request")),
            ("/limits/key/{key}", {"requests_per_min": 1.5}, (400, "invalid_request")),
            ("/limits/key/{key}", {"requests_per_mim": 1}, (400, "invalid_request")),
            ("/limits/key/{key}", {"monthly_spend_microdollars": 1}, (400, "invalid_limit")),
            ("/limits/global/everyone", {"concurrency": 1}, (400, "invalid_id")),
            ("/limits/org/nobody", {"concurrency": 1}, (404, "org_not_found")),
            ("/limits/environment/{key}", {"concurrency": 1}, (400, "invalid_id")),
            ("/limits/team/{key}", {"concurrency": 1}, (400, "invalid_request")),
        ]
        for path, body, expected in cases:
            assert code_of(api.put(path.format(key=key["id"]), json=body)) == expected, body


class TestAudit:
    def test_lists_newest_first_and_by_subject(self, api: httpx.Client, key: Any) -> None:
        api.post(f"/keys/{key['id']}/suspend")
        page = api.get("/audit", params={"limit": 2}).json()
        assert [row["action"] for row in page["data"]] == ["key.update", "key.create"]
        older = api.get("/audit", params={"limit": 2, "after": page["next_after"]}).json()
        assert [row["action"] for row in older["data"]] == ["environment.create", "org.create"]
        assert older["next_after"] is None
        of_key = api.get("/audit", params={"subject": key["id"]}).json()["data"]
        assert of_key[0]["details"] == {"state": {"from": "active", "to": "suspended"}}
        assert {row["actor"] for row in of_key} == {"admin-api"}

    def test_verifies(self, api: httpx.Client, key: Any) -> None:
        verdict = api.get("/audit/verify").json()
        assert (verdict["is_intact"], verdict["records"], verdict["problem"]) == (True, 3, "")
        assert api.get("/audit/verify", params={"head": verdict["head"]}).json() == verdict
        missing = api.get("/audit/verify", params={"head": "ab" * 32}).json()
        assert not missing["is_intact"]
        assert api.get("/audit/verify", params={"head": "xyz"}).status_code == 400
