"""Nodes fail; clients do not notice before the first byte, and are told after it (H2, H5, F2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from tests.api.inference.conftest import MakeApi, tokens_in_flight
from tests.engines import (
    Engine,
    Exchange,
    Plan,
    chat_chunk,
    close,
    fails,
    garbage,
    hang,
    hang_after_headers,
    not_json,
    reset,
    says,
    sse,
    streams_then,
    usage_of,
)

MakeEngine = Callable[..., Awaitable[Engine]]
SHORT = {"first_byte_timeout_s": 0.3, "idle_timeout_s": 0.3, "connect_timeout_s": 0.3}
ERROR_EVENT = sse({"error": {"message": "CUDA out of memory on 10.0.0.7", "code": 500}})

BEFORE_THE_FIRST_BYTE: dict[str, Plan] = {
    "reset": reset,
    "closed": close,
    "silent": hang,
    "headers only": hang_after_headers,
    "500": fails(500),
    "401": fails(401),
    "404": fails(404),
    "429": fails(429),
    "garbage": garbage,
    "not JSON": not_json,
    "an error event": says(ERROR_EVENT),
    "an empty stream": says(),
    "an event that is not JSON": says(b'data: {"usage":{"a"\n\n'),
}


class TestBeforeTheFirstByte:
    @pytest.mark.parametrize("is_streamed", [True, False], ids=["streamed", "whole"])
    @pytest.mark.parametrize("name", BEFORE_THE_FIRST_BYTE)
    async def test_another_node_answers(
        self, make_api: MakeApi, make_engine: MakeEngine, name: str, is_streamed: bool
    ) -> None:
        bad, good = await make_engine(), await make_engine()
        bad.always = BEFORE_THE_FIRST_BYTE[name]
        api = await make_api(bad, good, **SHORT)
        for _ in range(2):
            answer = await api.chat(stream=is_streamed, max_tokens=7)
            assert answer.status_code == 200, answer.text
        assert len(good.requests) == 2
        assert 1 <= len(bad.requests) <= 2
        records = await api.fleet.records(2)
        assert {(row["outcome"], row["completion_tokens"]) for row in records} == {("completed", 7)}
        assert tokens_in_flight(api) == [0, 0]

    async def test_a_dead_node_is_routed_around_at_once(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        dead, good = await make_engine(), await make_engine()
        api = await make_api(dead, good)
        while not dead.requests:
            await api.chat()
        await dead.stop()
        accepted = len(good.requests)
        for _ in range(6):
            assert (await api.chat()).status_code == 200
        assert len(good.requests) == accepted + 6
        failures = (await api.http.get("/metrics")).text
        assert 'crosslogic_node_failures_total{kind="connect",model="llama-3-8b",region="in-mumbai"} 1.0' in failures

    async def test_at_most_three_nodes_are_tried(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(4)]
        for engine in engines:
            engine.always = fails(500)
        api = await make_api(*engines)
        async with api.client() as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="llama-7b", messages=[{"role": "user", "content": "x"}])
        assert caught.value.status_code == 503
        assert caught.value.code == "nodes_failed"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert sorted(len(engine.requests) for engine in engines) == [0, 1, 1, 1]
        record = await api.fleet.record()
        assert (record["outcome"], record["status"], record["prompt_tokens"]) == ("failed", 503, 0)

    async def test_h2_retries_are_a_budget_and_not_a_multiplier(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(3)]
        for engine in engines:
            engine.always = fails(500)
        began = asyncio.get_running_loop().time()
        api = await make_api(*engines)
        await asyncio.gather(*(api.chat() for _ in range(60)))
        seconds = asyncio.get_running_loop().time() - began
        retries = sum(len(engine.requests) for engine in engines) - 60
        # 10 % of the requests and 10 a second, with ten to begin with.
        assert 10 <= retries <= 6 + 10 * (seconds + 1)

    async def test_a_request_at_which_every_node_fails_ejects_none(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        home, away = await make_engine(), await make_engine()
        api = await make_api(home)
        await api.fleet.add_node(away, region="ap-southeast")
        await asyncio.sleep(0.5)
        for engine in (home, away):
            engine.next(*[fails(500)] * 3)
        for _ in range(3):
            assert (await api.chat()).status_code == 503
        assert (await api.chat()).headers["x-crosslogic-region"] == "in-mumbai"

    async def test_f2_nothing_is_started_after_the_third_failed_connection(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine, hold_timeout_s=3, total_timeout_s=10)
        await engine.stop()
        for _ in range(3):
            assert (await api.chat()).status_code == 503
        page = (await api.http.get("/metrics")).text
        assert 'kind="connect",model="llama-3-8b",region="in-mumbai"} 3.0' in page
        held = asyncio.create_task(api.chat())
        await asyncio.sleep(0.2)
        page = (await api.http.get("/metrics")).text
        assert 'kind="connect",model="llama-3-8b",region="in-mumbai"} 3.0' in page
        assert not held.done()
        await engine.start()
        assert (await held).status_code == 200

    async def test_a_kept_connection_that_was_closed_is_no_failure(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        for connection in list(engine.connections):
            # Closed by the engine at the very moment at which the next request comes.
            connection.transport.abort()
        assert (await api.chat()).status_code == 200
        engine.next(reset)
        assert (await api.chat()).status_code == 200
        assert len(engine.requests) == 4
        assert "crosslogic_node_failures_total{" not in (await api.http.get("/metrics")).text

    async def test_connections_are_kept(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        for is_streamed in (True, False) * 3:
            await api.chat(stream=is_streamed)
        assert engine.accepted == 1

    async def test_an_answer_nobody_asked_for_reaches_nobody(self, make_api: MakeApi, engine: Engine) -> None:
        async def twice(exchange: Exchange) -> None:
            await engine.answer(exchange)
            await asyncio.sleep(0.05)
            exchange.json({"model": "llama-3-8b", "choices": [], "stolen": True})

        api = await make_api(engine)
        engine.next(twice)
        assert (await api.chat()).status_code == 200
        await asyncio.sleep(0.1)
        answer = await api.chat()
        assert answer.status_code == 200
        assert "stolen" not in answer.text

    async def test_a_long_answer_does_not_wait_as_shortly_as_a_first_token(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        async def slow(exchange: Exchange) -> None:
            await asyncio.sleep(0.6)
            await engine.answer(exchange)

        engine.always = slow
        api = await make_api(engine, **SHORT)
        assert (await api.chat(max_tokens=10)).status_code == 200


class TestTheEnginesOwnRefusal:
    @pytest.mark.parametrize(("status", "shown"), [(400, 400), (413, 413), (422, 400)])
    @pytest.mark.parametrize("is_streamed", [True, False])
    async def test_is_handed_on_cleaned_and_never_retried(
        self, make_api: MakeApi, make_engine: MakeEngine, status: int, shown: int, is_streamed: bool
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        for engine in engines:
            message = (
                f"bad grammar at {engine.url}/v1 in /srv/models/llama.gguf on 10.1.2.3:8000, gpu-7.internal:8000 "
                "and [fd00::7]:80: llama-q4.gguf"
            )
            engine.always = fails(status, {"error": {"message": message, "type": "x"}})
        api = await make_api(*engines)
        answer = await api.chat(stream=is_streamed)
        assert answer.status_code == shown
        assert sum(len(engine.requests) for engine in engines) == 1
        told = answer.json()["error"]["message"]
        assert told.startswith("bad grammar at")
        for secret in ("127.0.0.1", "10.1.2.3", "gguf", "srv", "internal", "fd00", ":8000"):
            assert secret not in told
        record = await api.fleet.record()
        assert (record["outcome"], record["status"]) == ("rejected", shown)
        assert (record["prompt_tokens"], record["completion_tokens"]) == (0, 0)

    async def test_needs_no_form(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        for document in (b"<html>", b"[1]", {"error": "context length exceeded"}, {"detail": 1}, {"error": None}):
            engine.next(fails(400, document))
            answer = await api.chat()
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]


class TestAfterTheFirstByte:
    async def test_the_sdk_raises(self, make_api: MakeApi, engine: Engine) -> None:
        engine.always = streams_then(reset, "Hello")
        api = await make_api(engine, hold_timeout_s=0.1)
        async with api.client() as client:
            stream = await client.chat.completions.create(
                model="llama-7b", messages=[{"role": "user", "content": "x"}], stream=True
            )
            with pytest.raises(openai.APIError):
                async for _ in stream:
                    pass

    async def test_a_node_that_stalls_after_its_first_token_is_left_out(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        bad, good = await make_engine(), await make_engine()
        bad.always = streams_then(hang, "Hel")
        api = await make_api(bad, good, idle_timeout_s=0.1)
        for _ in range(8):
            await api.chat(stream=True)
        assert len(bad.requests) <= 2


class TestDeadlines:
    @pytest.mark.parametrize(
        ("plan", "setting", "status"),
        [
            (hang, {"first_byte_timeout_s": 0.4}, 503),
            (hang_after_headers, {"first_byte_timeout_s": 0.4}, 503),
            (streams_then(hang, "a"), {"idle_timeout_s": 0.4}, 200),
            (hang, {"total_timeout_s": 0.4}, 503),
            (streams_then(hang, "a"), {"total_timeout_s": 0.4}, 200),
        ],
        ids=["first byte", "first byte after headers", "between tokens", "total, silent", "total, streaming"],
    )
    async def test_h5_fires_in_time(
        self, make_api: MakeApi, engine: Engine, plan: Plan, setting: dict[str, Any], status: int
    ) -> None:
        engine.always = plan
        api = await make_api(engine, **setting)
        answer = await api.chat(stream=True)
        assert answer.status_code == status
        (request,) = engine.requests
        assert 0.35 <= await request.closed() - request.came_at < 0.5

    async def test_h5_a_stream_may_be_long_but_not_for_ever(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engine = await make_engine(["x"] * 1000, pace_s=0.02)
        api = await make_api(engine, total_timeout_s=0.5, idle_timeout_s=0.3)
        answer = await api.chat(stream=True)
        (request,) = engine.requests
        assert 0.45 <= await request.closed() - request.came_at < 0.6
        assert "stream_cut" in answer.text
        # It did all it could: the next request finds it in its place.
        assert api.app.inference._table.nodes[0].failures == 0

    async def test_a_request_out_of_time_blames_no_further_node(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(3)]
        for engine in engines:
            engine.always = hang
        api = await make_api(*engines, total_timeout_s=0.3)
        answer = await api.chat(stream=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
        assert sum(len(engine.requests) for engine in engines) == 1


class TestWireForms:
    async def test_any_split_of_the_wire_gives_the_same_answer(self, make_api: MakeApi, engine: Engine) -> None:
        body = b"".join(
            [
                sse(chat_chunk("Hé")),
                sse({**chat_chunk(None), "choices": [], "usage": usage_of(5, 1)}),
                b"data: [DONE]\n\n",
            ]
        )
        whole = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
            + b"0\r\n\r\n"
        )

        def in_pieces(size: int) -> Plan:
            async def plan(exchange: Exchange) -> None:
                for at in range(0, len(whole), size):
                    exchange.write(whole[at : at + size])
                    await asyncio.sleep(0)

            return plan

        api = await make_api(engine)
        sizes = (1, 2, 3, 5, 11, 64, len(whole))
        engine.next(*(in_pieces(size) for size in sizes))
        texts = {(await api.chat(stream=True)).text for _ in sizes}
        assert len(texts) == 1
        assert {(row["prompt_tokens"], row["completion_tokens"]) for row in await api.fleet.records(len(sizes))} == {
            (5, 1)
        }

    async def test_a_large_answer_waits_for_a_slow_client(self, make_api: MakeApi, engine: Engine) -> None:
        written = 0

        async def flood(exchange: Exchange) -> None:
            nonlocal written
            exchange.begin_stream()
            piece = sse(chat_chunk("x" * 60_000))
            for _ in range(400):
                if exchange.is_closed:
                    return
                if exchange.connection.transport.get_write_buffer_size() > 1_000_000:
                    break
                exchange.chunk(piece)
                written += len(piece)
                await asyncio.sleep(0)
            await hang(exchange)

        engine.always = flood
        api = await make_api(engine)
        client = await api.open(
            json.dumps({"model": "llama-7b", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        )
        await client.read_until(b"\r\n\r\n")
        client.stop_reading()
        await asyncio.sleep(0.7)
        assert written < 24_000_000
        client.hang_up()
        await (await engine.request()).closed(1)
