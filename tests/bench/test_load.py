"""The load generator is honest: it counts only whole answers, and a stall is charged with all that waited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import load as load_module
from bench.engine import ANSWER_TOKENS, Engine, Script
from bench.load import Bench, Run, Target, percentile

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

TOKENS = 5
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@contextlib.asynccontextmanager
async def engine() -> AsyncGenerator[Target]:
    """The stub engine, in this process."""
    scripts: dict[tuple[str, str], Script] = {}
    server = await asyncio.get_running_loop().create_server(partial(Engine, scripts), "127.0.0.1", 0)
    async with server:
        yield Target(server.sockets[0].getsockname()[1])


@contextlib.asynccontextmanager
async def scripted(answer: Answer) -> AsyncGenerator[Target]:
    """A server that answers as a test says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                await answer(await reader.readexactly(length), writer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Target(server.sockets[0].getsockname()[1])
    finally:
        server.close()


def whole(body: bytes = b'{"usage":{"completion_tokens":16}}', status: int = 200) -> bytes:
    return b"HTTP/1.1 %d Any\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


async def load(target: Target, *, tokens: int = 0, seconds: float = 0.2) -> tuple[Run, list[str]]:
    """A closed loop of four, and the order in which its window was opened and closed."""
    calls: list[str] = []
    bench = Bench(target, lambda: calls.append("begin"), lambda: calls.append("end"))
    return await bench.closed(4, 0.05, seconds, tokens=tokens), calls


class TestClosed:
    async def test_counts_whole_answers_with_their_tokens(self) -> None:
        async with engine() as target:
            run, calls = await load(target)
        assert calls == ["begin", "end"]
        assert run.failed == 0
        assert 0 < run.requests == len(run.latencies_s) <= run.answered
        assert run.completion_tokens == ANSWER_TOKENS * run.answered

    async def test_counts_streams_with_every_event(self) -> None:
        async with engine() as target:
            run, _ = await load(target, tokens=TOKENS, seconds=0.3)
        assert run.failed == 0
        assert run.completion_tokens == TOKENS * run.answered
        # The role, the tokens, the end, the usage and [DONE].
        assert run.requests * (TOKENS + 4) <= run.events + 4 * (TOKENS + 4)
        assert len(run.first_token_s) == run.requests > 0
        assert all(first < last for first, last in zip(run.first_token_s, run.latencies_s, strict=True))

    @pytest.mark.parametrize(
        ("answer", "why"),
        [
            (whole(status=500), "status 500"),
            (whole(b"{}"), "no usage"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: nonsense\r\n\r\n", "not HTTP"),
        ],
    )
    async def test_what_is_no_answer_is_a_failure(self, answer: bytes, why: str) -> None:
        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(answer)

        async with scripted(say) as target:
            run, _ = await load(target, seconds=0.05)
        assert (run.answered, run.requests, run.latencies_s) == (0, 0, [])
        assert run.failed > 0
        assert why in run.first_failure

    async def test_a_connection_that_breaks_in_an_answer_is_a_failure(self) -> None:
        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(whole()[:-5])
            await writer.drain()
            writer.close()

        async with scripted(say) as target:
            run, _ = await load(target, seconds=0.05)
        assert run.answered == 0
        assert "connection lost" in run.first_failure

    async def test_the_next_request_goes_on_after_a_connection_that_was_closed(self) -> None:
        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(
                whole().replace(b"200 OK", b"200 OK\r\nconnection: close").replace(b"Any", b"Any\r\nconnection: close")
            )
            await writer.drain()
            writer.close()

        async with scripted(say) as target:
            run, _ = await load(target)
        assert run.failed == 0
        assert run.answered > 8

    @pytest.mark.parametrize("missing", [b"data: {}\n\n", b"data: [DONE]\n\n"])
    async def test_a_stream_that_lacks_an_event_is_a_failure(self, missing: bytes) -> None:
        events = b"data: {}\n\n" * (TOKENS - 1) + b"data: [DONE]\n\n"

        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD + chunk(events.replace(missing, b"", 1)) + b"0\r\n\r\n")

        async with scripted(say) as target:
            run, _ = await load(target, tokens=TOKENS, seconds=0.05)
        assert run.answered == 0
        assert run.failed > 0

    async def test_an_event_that_comes_in_pieces_is_one(self) -> None:
        events = b"data: {}\n\n" * (TOKENS - 1) + b"data: [DONE]\n\n"

        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD + b"".join(chunk(events[at : at + 1]) for at in range(len(events))) + b"0\r\n\r\n")

        async with scripted(say) as target:
            run, _ = await load(target, tokens=TOKENS, seconds=0.05)
        assert run.failed == 0
        assert run.answered > 0

    async def test_asks_for_what_it_then_counts(self) -> None:
        async with engine() as target:
            bench = Bench(target, lambda: None, lambda: None)
            run = await bench.closed(1, 0.0, 0.1, tokens=2, pace_ms=30)
        # The role after 5 ms, then two tokens at the pace that was asked for.
        assert min(run.latencies_s) > 0.055


class TestOpened:
    async def test_asks_as_often_as_it_says(self) -> None:
        async with engine() as target:
            run = await Bench(target, lambda: None, lambda: None).opened(200, 0.1, 0.5)
        assert run.failed == 0
        # All that was sent in 0.6 s, of which a timer owes nothing.
        assert 110 <= run.answered <= 125

    async def test_a_stall_is_charged_with_all_that_waited_behind_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # All that the load starts with, so that the rest has to wait.
        monkeypatch.setattr(load_module, "MOST_CONNECTIONS", 32)
        stalled_until = 0.0

        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            nonlocal stalled_until
            now = asyncio.get_running_loop().time()
            stalled_until = stalled_until or now + 0.6
            await asyncio.sleep(max(0.0, stalled_until - now))
            writer.write(whole())

        async with scripted(say) as target:
            run = await Bench(target, lambda: None, lambda: None).opened(100, 0.0, 1.0)
        assert run.failed == 0
        # Of 50 a closed loop would have seen 32, one for each connection.
        assert sum(latency > 0.1 for latency in run.latencies_s) >= 42


class TestIdle:
    async def test_every_connection_has_asked_once_and_is_open(self) -> None:
        async with engine() as target:
            run = await Bench(target, lambda: None, lambda: None).idle(100)
        assert (run.answered, run.failed) == (100, 0)

    async def test_one_that_is_closed_is_a_failure(self) -> None:
        async def say(body: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(whole())
            await writer.drain()
            writer.close()

        async with scripted(say) as target:
            run = await Bench(target, lambda: None, lambda: None).idle(50)
        assert run.first_failure == "an idle connection was closed"


class TestPercentile:
    def test_of_hundred_the_ninety_ninth_is_the_last_but_one(self) -> None:
        values = list(map(float, range(1, 101)))
        assert [percentile(values, share) for share in (0.5, 0.99, 0.999)] == [50, 99, 100]

    @given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 0.999, 1.0]))
    def test_is_the_smallest_that_so_many_do_not_exceed(self, values: list[float], share: float) -> None:
        found = percentile(values, share)
        assert found in values
        assert sum(value <= found for value in values) >= share * len(values) - 1e-6
        assert sum(value < found for value in values) < share * len(values)
