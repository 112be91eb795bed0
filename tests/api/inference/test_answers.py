"""The main job through the official SDK: every endpoint, streamed and not, and the one usage record of each."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httpx
import openai
import pytest

from tests.api.inference.conftest import Api, MakeApi, chat_body
from tests.engines import Engine, Exchange, chat_chunk, fails, says, sse, usage_of

HI: Any = [{"role": "user", "content": "hi"}]
TEXT = "Hello there, how are you?"


def _events(text: str) -> list[Any]:
    return [
        part if part == "[DONE]" else json.loads(part)
        for line in text.split("\n\n")
        if (part := line.removeprefix("data: ").strip())
    ]


class TestChat:
    async def test_answers_the_async_sdk(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        async with api.client() as client:
            answer = await client.chat.completions.create(model="llama-7b", messages=HI)
        assert answer.choices[0].message.content == TEXT
        assert answer.model == "llama-3-8b"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        record = await api.fleet.record()
        assert (record["prompt_tokens"], record["completion_tokens"], record["cached_tokens"]) == (11, 7, 3)
        assert (record["token_source"], record["outcome"], record["status"]) == ("engine", "completed", 200)
        # (11 + 7) tokens × 500 × 0.7 in 10⁻¹⁰ USD is 0.63 microdollars, rounded up.
        assert record["list_price_microdollars"] == 1
        assert (record["home_region"], record["served_region"]) == ("in-mumbai", "in-mumbai")
        assert not record["is_streamed"]

    async def test_answers_the_sync_sdk_streamed(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)

        def ask() -> list[str]:
            with api.sync_client() as client:
                stream = client.chat.completions.create(model="llama-7b", messages=HI, stream=True)
                return [chunk.choices[0].delta.content or "" for chunk in stream]

        assert "".join(await asyncio.to_thread(ask)) == TEXT
        assert (await api.fleet.record())["completion_tokens"] == 7

    async def test_answers_the_sync_sdk(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)

        def ask() -> str | None:
            with api.sync_client() as client:
                return client.chat.completions.create(model="llama-7b", messages=HI).choices[0].message.content

        assert await asyncio.to_thread(ask) == TEXT

    @pytest.mark.parametrize("is_wanted", [True, False])
    async def test_shows_the_usage_chunk_only_to_those_who_asked_and_records_it_for_all(
        self, make_api: MakeApi, engine: Engine, is_wanted: bool
    ) -> None:
        api = await make_api(engine)
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if is_wanted else {}
        answer = await api.chat(stream=True, **more)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = _events(answer.text)
        assert events[-1] == "[DONE]"
        usages = [event["usage"] for event in events[:-1] if event.get("usage")]
        assert usages == ([usage_of(11, 7, 3)] if is_wanted else [])
        assert all(event["choices"] for event in events[:-1] if not event.get("usage"))
        record = await api.fleet.record()
        assert (record["prompt_tokens"], record["completion_tokens"], record["token_source"]) == (11, 7, "engine")
        assert record["is_streamed"]
        assert record["ttft_ms"] is not None

    async def test_counts_for_itself_what_an_engine_does_not_report(self, make_api: MakeApi, engine: Engine) -> None:
        engine.always = says(
            sse(chat_chunk(None, role=True)), sse(chat_chunk("a")), sse(chat_chunk("b")), b"data: [DONE]\n\n"
        )
        api = await make_api(engine)
        assert (await api.chat(stream=True)).status_code == 200
        record = await api.fleet.record()
        assert (record["completion_tokens"], record["token_source"]) == (2, "chunks")
        assert record["prompt_tokens"] > 0

    @pytest.mark.parametrize(
        "claimed", [usage_of(11, 1 << 39), usage_of(1 << 39, 1), usage_of(-1, 7), {"prompt_tokens": "x"}]
    )
    async def test_does_not_believe_an_engine_that_claims_the_impossible(
        self, make_api: MakeApi, engine: Engine, claimed: Any
    ) -> None:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "12345678"}}
        engine.always = fails(200, {"id": "1", "model": "llama-3-8b", "choices": [choice], "usage": claimed})
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        record = await api.fleet.record()
        assert record["token_source"] == "chunks"
        assert record["completion_tokens"] == 2
        assert record["prompt_tokens"] < 100

    async def test_passes_unknown_fields_on_and_sets_what_is_ours(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.chat(guided_choice=["a", "b"], seed=7, deep={"a": [1, None, "ü"]}, stream=True)
        sent = engine.requests[0].body
        assert sent["guided_choice"] == ["a", "b"]
        assert (sent["seed"], sent["deep"]) == (7, {"a": [1, None, "ü"]})
        assert (sent["model"], sent["max_tokens"]) == ("llama-3-8b", 1024)
        assert sent["stream_options"] == {"include_usage": True}

    async def test_tells_every_engine_the_limit_by_the_name_that_all_know(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine)
        await api.chat(max_completion_tokens=5, max_tokens=None)
        assert engine.requests[0].body["max_tokens"] == 5

    async def test_gives_the_engine_its_own_credential_and_not_the_key(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.chat(headers={"x-secret-of-client": "1", "cookie": "a=b"})
        headers = engine.requests[0].headers
        assert headers["authorization"].startswith("Bearer nc_")
        assert api.fleet.secret not in str(headers)
        assert "cookie" not in headers
        assert "x-secret-of-client" not in headers

    async def test_says_who_answered(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api()
        node = await api.fleet.add_node(engine)
        answer = await api.until(lambda: _ok(api), 3)
        assert answer.headers["x-crosslogic-node"] == node
        assert answer.headers["x-crosslogic-region"] == "in-mumbai"
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-request-id"] == engine.requests[-1].headers["x-request-id"]

    async def test_keeps_the_clients_request_id_beside_its_own(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        answer = await api.chat(headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] != "mine-1"
        assert (await api.fleet.record())["client_request_id"] == "mine-1"

    async def test_a_stream_is_a_stream(self, make_api: MakeApi, make_engine: Any) -> None:
        engine = await make_engine()
        api = await make_api(engine)
        has_arrived = asyncio.Event()

        async def one_by_one(exchange: Exchange) -> None:
            exchange.begin_stream()
            for word in ("one", "two", "three"):
                has_arrived.clear()
                exchange.event(chat_chunk(word))
                # The engine says the next word only when the client has this one.
                await has_arrived.wait()
            exchange.end_stream()

        engine.always = one_by_one
        words: list[str | None] = []
        async with api.client() as client, asyncio.timeout(10):
            async for chunk in await client.chat.completions.create(model="llama-7b", messages=HI, stream=True):
                words.append(chunk.choices[0].delta.content)
                has_arrived.set()
        assert words == ["one", "two", "three"]

    async def test_hides_how_fast_a_machine_is_and_what_the_engine_calls_the_model(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        path = "/models/secret.gguf"
        engine.next(
            says(
                sse({**chat_chunk("a"), "model": path}),
                sse({**chat_chunk("b"), "model": path, "timings": {"predicted_ms": 1}}),
                b"data: [DONE]\n\n",
            ),
            fails(200, {"model": path, "choices": [], "timings": {}, "usage": usage_of(1, 1)}),
        )
        api = await make_api(engine)
        for answer in (await api.chat(stream=True), await api.chat()):
            assert "llama-3-8b" in answer.text
            assert "secret" not in answer.text
            assert "timings" not in answer.text

    async def test_ends_an_answer_whose_engine_says_done_and_then_nothing(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        async def plan(exchange: Any) -> None:
            exchange.begin_stream()
            exchange.event(chat_chunk("a"))
            exchange.chunk(b"data: [DONE]\n\n")
            await exchange.closed(5)

        engine.next(plan)
        api = await make_api(engine)
        async with asyncio.timeout(1):
            answer = await api.chat(stream=True)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert (await api.fleet.record())["outcome"] == "completed"


async def _ok(api: Api) -> httpx.Response | None:
    answer = await api.chat()
    return answer if answer.status_code == 200 else None


class TestQueryForm:
    async def test_answers_the_newcomers_curl(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        answer = await api.http.post("/v1/chat/completions?model=llama-7b&region=ap-south-1&prompt=hello%20you")
        assert answer.status_code == 200
        document = answer.json()
        assert document["choices"][0]["message"]["content"] == TEXT
        assert document["crosslogic"] == {
            "node": answer.headers["x-crosslogic-node"],
            "region": answer.headers["x-crosslogic-region"],
        }
        assert engine.requests[0].body["messages"] == [{"role": "user", "content": "hello you"}]

    async def test_streams_too(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        answer = await api.http.post("/v1/chat/completions?model=llama-7b&prompt=hi&stream=true&max_tokens=3")
        assert answer.text.endswith("data: [DONE]\n\n")
        assert engine.requests[0].body["max_tokens"] == 3

    @pytest.mark.parametrize(
        ("query", "param"), [("model=llama-7b", "messages"), ("model=llama-7b&prompt=x&stream=1", "stream"),
                             ("model=llama-7b&prompt=x&max_tokens=-1", "max_tokens"), ("prompt=x", "model")]
    )  # fmt: skip
    async def test_names_the_field_that_is_wrong(self, make_api: MakeApi, query: str, param: str) -> None:
        api = await make_api()
        answer = await api.http.post(f"/v1/chat/completions?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


class TestOtherEndpoints:
    async def test_completions(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        async with api.client() as client:
            answer = await client.completions.create(model="llama-7b", prompt="Once")
            assert answer.choices[0].text == TEXT
            stream = await client.completions.create(model="llama-7b", prompt="Once", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
        assert [(row["endpoint_kind"], row["completion_tokens"]) for row in await api.fleet.records(2)] == [
            ("completion", 7)
        ] * 2

    async def test_embeddings(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api()
        await api.fleet.add_node(engine, model="bge-base-en")
        await api.until(lambda: _embeds(api))
        async with api.client() as client:
            answer = await client.embeddings.create(model="bge-base-en", input=["a", "b"], encoding_format="float")
        assert [item.embedding for item in answer.data] == [[0.5, -0.25]] * 2
        record = await api.fleet.sql.fetch("SELECT * FROM usage_records WHERE status = 200")
        assert {(row["prompt_tokens"], row["completion_tokens"]) for row in record} <= {(11, 0)}

    async def test_models(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        async with api.client() as client:
            listed = {model.id async for model in client.models.list()}
            one = await client.models.retrieve("llama-7b")
            assert {"llama-3-8b", "llama-7b", "bge-base-en"} <= listed
            assert (one.id, one.owned_by) == ("llama-7b", "crosslogic")
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-5")

    async def test_usage_is_summed_for_the_environment(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.chat()
        await api.chat(stream=True)
        await api.fleet.records(2)
        used = (await api.http.get("/v1/usage")).json()
        assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (2, 22, 14)

    async def test_the_document_lists_every_path_and_is_valid(self, make_api: MakeApi) -> None:
        api = await make_api()
        document = (await api.http.get("/openapi.json")).json()
        assert {
            "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/{model}",
            "/v1/usage", "/healthz", "/readyz", "/metrics",
        } <= set(document["paths"])  # fmt: skip
        assert document["openapi"].startswith("3.1")
        _check_references(document, document)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert method in ("get", "post", "put", "patch", "delete"), path
                assert operation["responses"], path
                named = {item["name"] for item in operation.get("parameters", []) if item["in"] == "path"}
                assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}, path

    async def test_metrics_count_what_was_served(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.chat()
        await api.http.post("/v1/chat/completions", json=chat_body(model="nope"))
        page = (await api.http.get("/metrics")).text
        assert 'crosslogic_requests_total{model="llama-3-8b",region="in-mumbai",outcome="completed"} 1.0' in page
        assert 'crosslogic_refused_total{code="model_not_found"} 1.0' in page


async def _embeds(api: Api) -> bool:
    answer = await api.http.post("/v1/embeddings", json={"model": "bge-base-en", "input": "a"})
    return answer.status_code == 200


def _check_references(node: Any, document: Any) -> None:
    if isinstance(node, dict):
        fields = cast("dict[str, Any]", node)
        reference = fields.get("$ref")
        if isinstance(reference, str):
            found = document
            for part in reference.removeprefix("#/").split("/"):
                found = found[part]
        for value in fields.values():
            _check_references(value, document)
    elif isinstance(node, list):
        for value in cast("list[Any]", node):
            _check_references(value, document)


class TestRegions:
    @pytest.mark.parametrize(
        ("headers", "query", "model"),
        [
            ({"x-crosslogic-region": "us-east-1"}, "", "llama-7b"),
            ({}, "?region=us-east", "llama-7b"),
            ({}, "", "llama-7b@US-EAST"),
            ({"x-crosslogic-region": "us-east"}, "?region=in-mumbai", "llama-7b@in-mumbai"),
        ],
    )
    async def test_goes_where_it_was_asked_to(
        self, make_api: MakeApi, make_engine: Any, fleet: Any, headers: Any, query: str, model: str
    ) -> None:
        home, east = await make_engine(), await make_engine()
        await fleet.add_node(east, region="us-east")
        api = await make_api(home)
        answer = await api.http.post(f"/v1/chat/completions{query}", json=chat_body(model=model), headers=headers)
        assert answer.headers["x-crosslogic-region"] == "us-east"
        assert (len(home.requests), len(east.requests)) == (0, 1)
        assert (await fleet.record())["home_region"] == "us-east"

    async def test_falls_back_unless_the_pin_is_strict(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        for asked, status in (("ap-southeast", 200), ("ap-southeast;strict", 503), ("us-east", 503)):
            answer = await api.chat(headers={"x-crosslogic-region": asked})
            assert answer.status_code == status, asked
            if status == 503:
                assert int(answer.headers["retry-after"]) > 0
        records = await api.fleet.records(3)
        assert [(row["home_region"], row["served_region"]) for row in records] == [
            ("ap-southeast", "in-mumbai"), ("ap-southeast", ""), ("us-east", ""),
        ]  # fmt: skip

    async def test_refuses_a_region_nobody_knows(self, make_api: MakeApi) -> None:
        api = await make_api()
        answer = await api.chat(headers={"x-crosslogic-region": "moon"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_region")
