"""Clients hang up in every phase: the engine hears of it at once, and they pay for what they got (H1, A3)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import pytest

from tests.api.inference.conftest import MakeApi, chat_body, tokens_in_flight
from tests.engines import Engine, Exchange, chat_chunk, fails, hang, hang_after_headers

STREAM = json.dumps(chat_body(stream=True)).encode()
WHOLE = json.dumps(chat_body()).encode()
WITHIN_S = 0.1


class TestH1:
    @pytest.mark.parametrize("body", [STREAM, WHOLE], ids=["streamed", "whole"])
    @pytest.mark.parametrize("plan", [hang, hang_after_headers])
    async def test_before_the_first_byte(self, make_api: MakeApi, engine: Engine, body: bytes, plan: Any) -> None:
        engine.always = plan
        api = await make_api(engine)
        client = await api.open(body)
        request = await engine.request()
        await asyncio.sleep(0.05)
        left_at = client.hang_up()
        assert await request.closed() - left_at < WITHIN_S
        record = await api.fleet.record()
        assert (record["outcome"], record["status"], record["completion_tokens"]) == ("client_gone", 499, 0)
        # The node had taken the prompt.
        assert record["prompt_tokens"] > 0
        assert tokens_in_flight(api) == [0]

    async def test_while_a_whole_answer_is_on_its_way(self, make_api: MakeApi, engine: Engine) -> None:
        async def half(exchange: Exchange) -> None:
            exchange.head(200, "Content-Type: application/json", "Content-Length: 1000")
            exchange.write(b'{"choices": [')
            await hang(exchange)

        engine.always = half
        api = await make_api(engine)
        client = await api.open(WHOLE)
        request = await engine.request()
        await asyncio.sleep(0.05)
        left_at = client.hang_up()
        assert await request.closed() - left_at < WITHIN_S
        assert (await api.fleet.record())["outcome"] == "client_gone"

    async def test_between_chunks_pays_the_prompt_and_what_it_got(self, make_api: MakeApi, engine: Engine) -> None:
        async def plan(exchange: Exchange) -> None:
            exchange.begin_stream()
            exchange.event(chat_chunk(None, role=True))
            for word in "abc":
                exchange.event(chat_chunk(word))
            await hang(exchange)

        engine.always = plan
        api = await make_api(engine)
        client = await api.open(STREAM)
        await client.read_until(b'"c"')
        left_at = client.hang_up()
        assert await (await engine.request()).closed() - left_at < WITHIN_S
        record = await api.fleet.record()
        assert (record["outcome"], record["status"], record["completion_tokens"]) == ("client_gone", 200, 3)
        assert (record["token_source"], record["node_id"] is not None) == ("chunks", True)
        assert record["prompt_tokens"] > 0
        assert tokens_in_flight(api) == [0]

    async def test_a_slow_reader_does_not_pay_for_what_it_never_got(self, make_api: MakeApi, engine: Engine) -> None:
        async def plan(exchange: Exchange) -> None:
            exchange.begin_stream()
            for _ in range(300):
                exchange.event(chat_chunk("x" * 60_000))
                await asyncio.sleep(0)
            exchange.end_stream()

        engine.always = plan
        api = await make_api(engine)
        client = await api.open(STREAM)
        await client.read_until(b"\r\n\r\n")
        client.stop_reading()
        await asyncio.sleep(0.3)
        client.hang_up()
        record = await api.fleet.record()
        assert record["outcome"] == "client_gone"
        assert 0 < record["completion_tokens"] < 300

    async def test_on_hold(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(hold_timeout_s=10)
        node = await api.fleet.add_node(engine, state="loading")
        await asyncio.sleep(0.5)
        client = await api.open(STREAM)
        await asyncio.sleep(0.1)
        client.hang_up()
        record = await api.fleet.record()
        assert (record["outcome"], record["status"]) == ("client_gone", 499)
        assert (record["prompt_tokens"], record["token_source"], record["node_id"]) == (0, "none", None)
        await api.fleet.set_state(node, "ready")
        await asyncio.sleep(0.4)
        assert engine.requests == []

    async def test_while_connecting(self, make_api: MakeApi, engine: Engine) -> None:
        # A listener whose queue is full drops what comes next: connecting takes until its deadline.
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            api = await make_api(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=30)
            client = await api.open(STREAM)
            await asyncio.sleep(0.2)
            client.hang_up()
            record = await api.fleet.record()
        assert (record["outcome"], record["prompt_tokens"]) == ("client_gone", 0)
        assert record["latency_ms"] < 1000

    async def test_with_half_a_body_costs_nothing(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        client = await api.open(b"", "/v1/chat/completions")
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.fleet.secret}\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        await asyncio.sleep(0.1)
        writer.transport.abort()
        client.hang_up()
        assert (await api.chat()).status_code == 200
        await asyncio.sleep(0.3)
        assert len(await api.fleet.records(1)) == 1
        assert reader is not None

    async def test_a_refusal_of_the_engine_is_free_after_a_hang_up_too(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        engine.next(fails(400))
        client = await api.open(WHOLE)
        await client.read_until(b"\r\n\r\n")
        client.hang_up()
        assert (await api.fleet.record())["prompt_tokens"] == 0
