"""Revisions and roll-outs through the admin API."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.admin.test_fleet import code_of

GOLDEN = {"prompt": "What is 6 times 7?", "expected": "42"}


@pytest.fixture
def chat(api: httpx.Client) -> httpx.Client:
    """An API with a deployment."""
    assert api.put("/deployments/chat", json={"model": "llama-7b", "regions": []}).status_code == 201
    return api


class TestRevisions:
    def test_a_deployment_begins_with_one_and_they_are_numbered(self, chat: httpx.Client) -> None:
        first = chat.get("/deployments/chat/revisions").json()["data"]
        assert [(row["revision"], row["state"]) for row in first] == [(1, "serving")]
        made = chat.post("/deployments/chat/revisions", json={"engine": "vllm", "weights": "w", "golden": [GOLDEN]})
        assert made.status_code == 201
        shown = made.json()
        assert (shown["revision"], shown["state"], shown["golden_prompts"]) == (2, "candidate", 1)
        page = chat.get("/deployments/chat/revisions", params={"limit": 1}).json()
        assert page["data"] == [shown]
        rest = chat.get("/deployments/chat/revisions", params={"limit": 1, "after": page["next_after"]}).json()
        assert rest["data"] == first
        assert chat.get("/audit").json()["data"][0]["action"] == "revision.create"

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"engine": "ollama"}, (400, "invalid_request")),
            ({"golden": [{**GOLDEN, "match": "regex", "expected": "("}]}, (400, "invalid_golden_prompt")),
            ({"golden": [GOLDEN] * 51}, (400, "invalid_request")),
            ({"engin": "vllm"}, (400, "invalid_request")),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_what_cannot_be_is_refused(self, chat: httpx.Client, body: dict[str, Any], said: tuple[int, str]) -> None:
        assert code_of(chat.post("/deployments/chat/revisions", json=body)) == said

    def test_of_nothing_is_refused(self, api: httpx.Client) -> None:
        assert code_of(api.post("/deployments/nothing/revisions", json={})) == (404, "deployment_not_found")


class TestRollouts:
    def test_want_a_revision_that_is_there_and_steps_that_grow(self, chat: httpx.Client) -> None:
        assert code_of(chat.post("/deployments/chat/revisions/7/rollout")) == (404, "revision_not_found")
        chat.post("/deployments/chat/revisions", json={})
        wrong = chat.post("/deployments/chat/revisions/2/rollout", json={"steps_bp": [5000]})
        assert code_of(wrong) == (400, "invalid_policy")

    def test_that_is_not_on_cannot_be_told_anything(self, chat: httpx.Client) -> None:
        told = chat.post("/deployments/chat/rollout/signal", json={"signal": "abort"})
        assert code_of(told) == (404, "no_rollout")
