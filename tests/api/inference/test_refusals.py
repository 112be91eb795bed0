"""Who may not, and what cannot be read: refused with OpenAI's errors before any node hears of it (H8, H9, H10)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from crosslogic.domain import keys
from tests.api.inference.conftest import Api, Fleet, MakeApi, chat_body
from tests.engines import Engine, fails, hang, reset, streams_then

HI: Any = [{"role": "user", "content": "hi"}]
FORMS: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"model": "nope"}, {"stream": "x"})


async def _ask(api: Api, secret: str = "", model: str = "llama-7b") -> None:
    async with api.client(secret) as client:
        await client.chat.completions.create(model=model, messages=HI)


class TestKeys:
    async def test_the_sdk_raises_its_own_classes(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine, max_body_bytes=2000)
        stranger = keys.mint("dev", os.urandom(keys.RANDOM_BYTES))
        for secret in ("sk_dev_short", stranger, "sk_dev_demo"):
            with pytest.raises(openai.AuthenticationError) as unknown:
                await _ask(api, secret)
            assert unknown.value.code == "invalid_api_key"
        reader = await api.fleet.add_key(role="read-only")
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await _ask(api, reader)
        assert denied.value.code == "role_not_allowed"
        with pytest.raises(openai.NotFoundError) as missing:
            await _ask(api, model="gpt-5")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            await _ask(api, model="bge-base-en")
        assert wrong.value.code == "model_kind_mismatch"
        with pytest.raises(openai.APIStatusError) as large:
            await _ask(api, model="x" * 3000)
        assert large.value.status_code == 413
        assert engine.requests == []
        await asyncio.sleep(0.2)
        assert await api.fleet.records(0) == []

    @pytest.mark.parametrize("header", ["", "Bearer", "Basic c2s6", "sk_dev_demo"])
    async def test_a_header_that_holds_no_key_is_401(self, make_api: MakeApi, header: str) -> None:
        api = await make_api()
        answer = await api.chat(headers={"Authorization": header})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"

    async def test_the_demo_key_works_in_dev_mode_only(self, make_api: MakeApi, engine: Engine) -> None:
        production = {"mode": "production", "admin_token": "x" * 32, "node_secret": "y" * 32}
        api, strict = await make_api(engine), await make_api(**production)
        await api.fleet.add_key(secret=keys.DEMO_SECRET)
        assert (await api.chat(key=keys.DEMO_SECRET)).status_code == 200
        assert (await strict.chat(key=keys.DEMO_SECRET)).status_code == 401

    @pytest.mark.parametrize(
        ("change", "status", "code"),
        [
            ("UPDATE keys SET state = 'revoked'", 401, "revoked_api_key"),
            ("UPDATE keys SET state = 'suspended'", 403, "suspended"),
            ("UPDATE keys SET expires_at = now()", 401, "expired_api_key"),
            ("UPDATE environments SET state = 'suspended'", 403, "suspended"),
            ("UPDATE orgs SET state = 'suspended'", 403, "suspended"),
            ("DELETE FROM keys", 401, "invalid_api_key"),
            ("UPDATE environments SET allowed_models = '{gemma-7b}'", 403, "model_not_allowed"),
        ],
    )
    async def test_h10_plain_sql_acts_within_a_second(
        self, make_api: MakeApi, engine: Engine, change: str, status: int, code: str
    ) -> None:
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        await api.fleet.sql.execute(change)
        changed_at = time.monotonic()
        answer = await api.until(lambda: _refused(api), 2)
        assert time.monotonic() - changed_at < 1
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

    async def test_h10_works_while_the_catalog_cannot_be_read(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        await api.fleet.sql.execute("ALTER TABLE models RENAME COLUMN family TO broken")
        try:
            await api.fleet.sql.execute("UPDATE regions SET position = position")
            await asyncio.sleep(0.3)
            await api.fleet.sql.execute("UPDATE keys SET state = 'revoked'")
            assert (await api.until(lambda: _refused(api), 1)).status_code == 401
        finally:
            await api.fleet.sql.execute("ALTER TABLE models RENAME COLUMN broken TO family")

    async def test_a_new_key_works_within_a_second_of_its_refusal(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        secret = keys.mint("dev", os.urandom(keys.RANDOM_BYTES))
        assert (await api.chat(key=secret)).status_code == 401
        await api.fleet.add_key(secret=secret)
        made_at = time.monotonic()

        async def works() -> bool:
            return (await api.chat(key=secret)).status_code == 200

        await api.until(works, 2)
        assert time.monotonic() - made_at < 1

    async def test_h9_the_secret_is_nowhere(
        self, make_api: MakeApi, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        api = await make_api(engine)
        secret = api.fleet.secret
        mistyped = secret[:-1] + ("a" if secret[-1] != "a" else "b")
        shown: list[str] = []
        for key in (secret, mistyped, keys.mint("dev", os.urandom(keys.RANDOM_BYTES))):
            for fields in FORMS:
                answer = await api.chat(key=key, **fields)
                shown.append(answer.text + str(answer.headers))
        await api.fleet.records(2)
        shown += [caplog.text, (await api.http.get("/metrics")).text]
        shown += [str(dict(row)) for row in await api.fleet.sql.fetch("SELECT * FROM usage_records")]
        shown += [
            path.read_bytes().decode("latin-1") for path in api.settings.usage_log_dir.rglob("*") if path.is_file()
        ]
        shown += [str((request.headers, request.raw)) for request in engine.requests]
        everything = "".join(shown)
        assert "llama-3-8b" in everything
        for canary in (secret[7:], mistyped[7:], secret[7:33]):
            assert canary not in everything


async def _refused(api: Api) -> Any:
    answer = await api.chat()
    return answer if answer.status_code != 200 else None


class TestBodies:
    async def test_h8_an_oversize_body_is_413_with_and_without_a_length(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine, max_body_bytes=1000)

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"x" * 100

        told = await api.http.post("/v1/chat/completions", content=b"x" * 1001)
        untold = await api.http.post("/v1/chat/completions", content=pieces())
        for answer in (told, untold):
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        exact = json.dumps(chat_body(user="x")).encode()
        assert (await api.http.post("/v1/chat/completions", content=exact.ljust(1000))).status_code == 200
        assert len(engine.requests) == 1

    async def test_h8_a_413_does_not_wait_for_the_body(self, make_api: MakeApi) -> None:
        api = await make_api()
        client = await api.open(b"", "/v1/chat/completions")
        client.hang_up()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.fleet.secret}\r\n"
            "Content-Length: 99999999999\r\n\r\n".encode()
        )
        async with asyncio.timeout(2):
            assert b" 413 " in await reader.readline()
        writer.close()

    @pytest.mark.parametrize(
        "lengths",
        [
            ["Content-Length: 5", "Content-Length: 6"],
            ["Content-Length: 5", "Content-Length: 5"],
            ["Content-Length: x"],
            ["Content-Length: -1"],
            ["Content-Length: 5", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ],
    )
    async def test_h8_lengths_that_disagree_are_refused(
        self, make_api: MakeApi, engine: Engine, lengths: list[str]
    ) -> None:
        api = await make_api(engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {api.fleet.secret}", *lengths]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n{}}}}" + b"\r\n\r\n")
        async with asyncio.timeout(3):
            first = await reader.readline()
        assert b" 400 " in first, first
        writer.close()
        assert engine.requests == []

    @pytest.mark.parametrize("raw", [b"{", b"[" * 50_000, b'{"model":NaN}', b'{"model":"llama-7b","messages":1}', b""])
    async def test_h8_what_cannot_be_read_is_400(self, make_api: MakeApi, engine: Engine, raw: bytes) -> None:
        api = await make_api(engine)
        answer = await api.http.post("/v1/chat/completions", content=raw)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert engine.requests == []

    async def test_h8_depth_that_can_just_be_read_is_no_fault_of_ours(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        body = json.dumps(chat_body()).encode()[:-1]
        for depth in (*range(100, 900, 100), *range(900, 1030, 3)):
            answer = await api.http.post(
                "/v1/chat/completions", content=body + b',"x":' + b"[" * depth + b"]" * depth + b"}"
            )
            assert answer.status_code in (200, 400), (depth, answer.text)

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/models", 405),
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/models/%2e%2e%2fx", 404),
            ("GET", "/nothing", 404),
        ],
    )
    async def test_other_ways_are_refused_in_the_same_form(
        self, make_api: MakeApi, method: str, path: str, status: int
    ) -> None:
        api = await make_api()
        answer = await api.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def _seconds(shown: str) -> int:
    minutes, _, seconds = shown.rpartition("m")
    return 60 * int(minutes or 0) + int(seconds.removesuffix("s"))


class TestLimits:
    async def test_every_answer_to_a_known_key_says_how_its_limits_stand(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine)
        await api.fleet.limit("key", api.fleet.key_id, requests_per_min=9)
        await asyncio.sleep(0.6)
        untouched = await api.chat(model="nothing")
        assert (untouched.status_code, untouched.headers["x-ratelimit-remaining-requests"]) == (404, "9")
        await api.chat()
        for refused in (await api.chat(messages=1), await api.chat(model="nothing")):
            assert refused.status_code in (400, 404)
            assert refused.headers["x-ratelimit-limit-requests"] == "9"
            assert refused.headers["x-ratelimit-remaining-requests"] == "8"

    async def test_requests_beyond_the_limit_are_429_with_when_to_return(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine)
        await api.fleet.limit("key", api.fleet.key_id, requests_per_min=2)
        await asyncio.sleep(0.6)
        first = await api.chat()
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"]
        await _ask(api)
        with pytest.raises(openai.RateLimitError) as caught:
            await _ask(api)
        assert caught.value.code == "rate_limit_exceeded"
        assert "key" in caught.value.message
        headers = caught.value.response.headers
        assert int(headers["retry-after"]) >= 1
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 <= int(headers["retry-after"]) - _seconds(headers["x-ratelimit-reset-requests"]) <= 1
        assert len(await api.fleet.records(2)) == 2

    async def test_concurrency_is_given_back_on_every_way_out(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine, first_byte_timeout_s=0.2, idle_timeout_s=0.2)
        await api.fleet.limit("key", api.fleet.key_id, concurrency=1)
        await asyncio.sleep(0.6)
        for plan in (fails(400), fails(500), reset, hang, streams_then(reset, "a"), streams_then(hang, "a")):
            engine.next(plan)
            assert (await api.chat(stream=True)).status_code != 429
        engine.next(hang)
        client = await api.open(json.dumps(chat_body(stream=True)).encode())
        await engine.request(6)
        assert (await api.chat()).status_code == 429
        client.hang_up()

        async def free() -> bool:
            return (await api.chat()).status_code == 200

        await api.until(free, 1)

    async def test_a_daily_quota_is_403(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.fleet.limit("environment", api.fleet.environment_id, tokens_per_day=100)
        await asyncio.sleep(0.6)
        answer = await api.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
        shown = {name: answer.headers[f"x-ratelimit-{name}-tokens"] for name in ("limit", "remaining", "reset")}
        assert shown == {"limit": "100", "remaining": "100", "reset": "0ms"}

    async def test_a_dry_run_limit_refuses_nothing(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.fleet.limit("key", api.fleet.key_id, requests_per_min=0)
        await api.fleet.sql.execute("UPDATE limits SET dry_run = '{requests_per_min}' WHERE layer = 'key'")
        await asyncio.sleep(0.6)
        answer = await api.chat()
        assert answer.status_code == 200
        assert "x-ratelimit-limit-requests" not in answer.headers

    async def test_what_was_held_and_not_used_is_given_back(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        await api.fleet.limit("environment", api.fleet.environment_id, tokens_per_min=1200)
        await asyncio.sleep(0.6)
        for _ in range(4):
            # Each holds about 1 040 tokens and uses 18.
            assert (await api.chat()).status_code == 200


class TestHold:
    async def test_a_request_waits_for_a_node_on_its_way(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(hold_timeout_s=5)
        node = await api.fleet.add_node(engine, state="loading")
        await asyncio.sleep(0.5)
        held = asyncio.create_task(api.chat(stream=True))
        await asyncio.sleep(0.2)
        assert not held.done()
        await api.fleet.set_state(node, "ready")
        answer = await asyncio.wait_for(held, 2)
        assert answer.status_code == 200
        assert answer.headers["x-crosslogic-node"] == node

    async def test_its_patience_ends_with_503_and_when_to_return(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(hold_timeout_s=0.3)
        await api.fleet.add_node(engine, state="loading")
        await asyncio.sleep(0.5)
        began = time.monotonic()
        answer = await api.chat()
        assert 0.3 <= time.monotonic() - began < 1
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await api.fleet.record())["outcome"] == "failed"

    async def test_it_does_not_wait_when_nothing_will_come(self, make_api: MakeApi) -> None:
        api = await make_api(hold_timeout_s=5)
        began = time.monotonic()
        assert (await api.chat()).status_code == 503
        assert time.monotonic() - began < 1

    async def test_f2_f6_a_draining_node_gets_nothing_new(
        self, fleet: Fleet, make_api: MakeApi, make_engine: Any
    ) -> None:
        leaving, staying = await make_engine(), await make_engine()
        node = await fleet.add_node(leaving)
        api = await make_api(staying)

        async def is_used() -> bool:
            await api.chat()
            return bool(leaving.requests)

        await api.until(is_used)
        await api.fleet.set_state(node, "draining")
        await asyncio.sleep(0.6)
        seen = len(leaving.requests)
        for _ in range(4):
            await api.chat()
        assert len(leaving.requests) == seen
