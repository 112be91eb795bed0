"""The protocol between the socket and the hot path, byte by byte (H4, H8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from api.inference.server import UNWANTED_BODY_PAUSE_S, BodyTooLarge, Exchange, HttpProtocol
from tests.api.inference.conftest import MakeApi, RawClient, chat_body
from tests.engines import Engine, hang
from tests.engines import Exchange as Asked

GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
MOST_BYTES = 200_000


def post(path: str, body: bytes = b"", *lines: str, version: str = "1.1") -> bytes:
    """A request with a length."""
    head = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclass
class App:
    """Answers as a test wants it; `heard` is every `/v1` request that was begun, with its headers."""

    heard: list[tuple[str, dict[bytes, bytes]]] = field(default_factory=list[tuple[str, dict[bytes, bytes]]])
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    last: Exchange | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{what}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        if scope["path"] == "/slow":
            await self.gate.wait()
        await send({"type": "http.response.body", "body": b"asgi"})

    def inference(self, exchange: Exchange) -> None:
        exchange.spawn(self._answer(exchange))

    async def _answer(self, exchange: Exchange) -> None:
        self.heard.append((exchange.path, dict(exchange.headers)))
        self.last = exchange
        try:
            match exchange.path:
                case "/v1/refuse":
                    exchange.respond(401, b"", b"no")
                case "/v1/slow":
                    exchange.on_gone = self.left.set
                    await exchange.read_body(MOST_BYTES)
                    await self.gate.wait()
                    exchange.respond(200, b"", b"slow")
                case "/v1/stream":
                    exchange.begin(200, b"")
                    exchange.write(b"one")
                    await self.gate.wait()
                    exchange.end(b"two")
                case _:
                    body = await exchange.read_body(MOST_BYTES)
                    exchange.respond(200, b"", exchange.path.encode() + b":" + body)
        except BodyTooLarge:
            exchange.respond(413, b"", b"too large")
        except ConnectionError:
            pass


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are pytest's."""
        yield


class Served:
    """The app under uvicorn with our protocol."""

    def __init__(self, app: App, server: uvicorn.Server, port: int) -> None:
        self.app = app
        self.server = server
        self.port = port
        self._clients: list[RawClient] = []

    async def send(self, data: bytes) -> RawClient:
        """A new connection on which this was sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        self._clients.append(RawClient(reader, writer))
        return self._clients[-1]

    def drain(self) -> None:
        """As SIGTERM does."""
        self.server.should_exit = True

    async def until_draining(self) -> None:
        # The connections are told in the same turn of the loop.
        await eventually(lambda: not any(listener.is_serving() for listener in self.server.servers))

    async def until_heard(self, count: int) -> None:
        await eventually(lambda: len(self.app.heard) >= count)

    def hang_up(self) -> None:
        for client in self._clients:
            client.hang_up()


async def eventually(look: Callable[[], bool], within_s: float = 3.0) -> None:
    until = asyncio.get_running_loop().time() + within_s
    while not look():
        assert asyncio.get_running_loop().time() < until, f"not within {within_s} s"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncGenerator[Served]:
    app = App()
    listener = socket.create_server(("127.0.0.1", 0))
    given: dict[str, Any] = {"timeout_graceful_shutdown": 2, "log_config": None, "access_log": False, **options}
    server = _Server(uvicorn.Config(app, http=HttpProtocol, **given))
    running = asyncio.create_task(server.serve([listener]))
    served = Served(app, server, listener.getsockname()[1])
    try:
        await eventually(lambda: server.started)
        yield served
    finally:
        app.gate.set()
        served.hang_up()
        served.drain()
        await running


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


async def answer(client: RawClient) -> tuple[int, dict[str, str], bytes]:
    """One answer that has a length or comes in chunks."""
    head = (await client.read_until(b"\r\n\r\n")).decode().rstrip()
    line, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    status = int(line.split()[1])
    async with asyncio.timeout(5):
        if "content-length" in headers:
            return status, headers, await client.reader.readexactly(int(headers["content-length"]))
        text = b""
        while size := int(await client.reader.readuntil(b"\r\n"), 16):
            text += await client.reader.readexactly(size)
            await client.reader.readexactly(2)
        await client.reader.readexactly(2)
    return status, headers, text


async def bodies(client: RawClient, count: int) -> list[bytes]:
    return [(await answer(client))[2] for _ in range(count)]


class TestPipelining:
    async def test_answers_come_in_the_order_of_requests(self, served: Served) -> None:
        mixed = post("/v1/a", b"1") + GET_HEALTH + post("/v1/slow") + post("/v1/b", b"2") + GET_HEALTH + post("/v1/c")
        client = await served.send(mixed)
        assert await bodies(client, 2) == [b"/v1/a:1", b"asgi"]
        served.app.gate.set()
        assert await bodies(client, 4) == [b"slow", b"/v1/b:2", b"asgi", b"/v1/c:"]

    async def test_one_behind_a_slow_asgi_answer_waits_for_it(self, served: Served) -> None:
        client = await served.send(GET_HEALTH.replace(b"/healthz", b"/slow") + post("/v1/a", b"1") + GET_HEALTH)
        await client.read_until(b"\r\n\r\n")
        assert served.app.heard == []
        served.app.gate.set()
        await client.read_until(b"asgi")
        assert await bodies(client, 2) == [b"/v1/a:1", b"asgi"]

    async def test_a_body_that_is_still_coming_is_no_hindrance(self, served: Served) -> None:
        first, second = post("/v1/slow"), post("/v1/a", b"x" * 100_000)
        client = await served.send(first + second[:50_000])
        await served.until_heard(1)
        served.app.gate.set()
        assert (await answer(client))[2] == b"slow"
        client.writer.write(second[50_000:] + GET_HEALTH)
        assert await bodies(client, 2) == [b"/v1/a:" + b"x" * 100_000, b"asgi"]

    @pytest.mark.parametrize(
        "last", [post("/v1/slow", b"", "Connection: close"), post("/v1/refuse", b"", version="1.0")]
    )
    async def test_nothing_is_begun_behind_the_last_request(self, served: Served, last: bytes) -> None:
        client = await served.send(last + post("/v1/a") + GET_HEALTH)
        served.app.gate.set()
        status, headers, _ = await answer(client)
        assert (status in (200, 401), headers["connection"]) == (True, "close")
        assert await client.rest() == b""
        assert len(served.app.heard) == 1

    async def test_h8_what_came_before_garbage_is_answered_and_the_connection_ends(self, served: Served) -> None:
        client = await served.send(post("/v1/slow") + GET_HEALTH + post("/v1/a", b"1") + b"\x00garbage\r\n\r\n")
        await served.until_heard(1)
        served.app.gate.set()
        assert (await answer(client))[1].get("connection") is None
        await answer(client)
        _, headers, text = await answer(client)
        assert (headers["connection"], text) == ("close", b"/v1/a:1")
        assert await client.rest() == b""

    async def test_h8_garbage_within_an_asgi_answer_does_not_get_into_it(self, served: Served) -> None:
        client = await served.send(GET_HEALTH.replace(b"/healthz", b"/slow") + b"\x00garbage\r\n\r\n")
        await client.read_until(b"\r\n\r\n")
        served.app.gate.set()
        assert await client.rest() == b"asgi"

    async def test_h8_a_broken_request_that_waits_is_dropped(self, served: Served) -> None:
        broken = b"POST /v1/b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n"
        client = await served.send(post("/v1/slow") + post("/v1/a") + broken)
        await served.until_heard(1)
        served.app.gate.set()
        assert await bodies(client, 2) == [b"slow", b"/v1/a:"]
        assert await client.rest() == b""
        assert [path for path, _ in served.app.heard] == ["/v1/slow", "/v1/a"]

    async def test_h8_a_broken_body_is_400(self, served: Served) -> None:
        broken = b"POST /v1/b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nnot hex\r\n"
        client = await served.send(broken)
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")


class TestVersions:
    async def test_http_1_0_gets_the_whole_answer_and_the_end(self, served: Served) -> None:
        client = await served.send(post("/v1/a", b"1", "Connection: keep-alive", version="1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"\r\ncontent-length: 7\r\n" in head
        assert b"connection: close" in head
        assert body == b"/v1/a:1"

    async def test_http_1_0_gets_a_stream_without_chunks(self, served: Served) -> None:
        served.app.gate.set()
        client = await served.send(post("/v1/stream", version="1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == b"onetwo"

    async def test_http_1_0_is_not_told_to_continue(self, served: Served) -> None:
        whole = post("/v1/a", b"12", "Expect: 100-continue", version="1.0")
        client = await served.send(whole[:-2])
        await served.until_heard(1)
        client.writer.write(whole[-2:])
        assert (await client.rest()).startswith(b"HTTP/1.1 200 ")


class TestBodies:
    async def test_expect_continue_is_told_once(self, served: Served) -> None:
        whole = post("/v1/a", b"12", "Expect: 100-continue")
        client = await served.send(whole[:-2])
        assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(whole[-2:])
        assert await bodies(client, 1) == [b"/v1/a:12"]

    async def test_expect_continue_is_refused_before_the_body(self, served: Served) -> None:
        client = await served.send(post("/v1/refuse", b"12", "Expect: 100-continue")[:-2])
        status, headers, _ = await answer(client)
        assert (status, headers["connection"]) == (401, "close")
        assert await client.rest() == b""

    async def test_chunks_are_put_together_and_trailers_are_no_headers(self, served: Served) -> None:
        head = b"POST /v1/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        client = await served.send(head + b"3;ext=1\r\nabc\r\n")
        await served.until_heard(1)
        client.writer.write(b"2\r\nde\r\n0\r\nAuthorization: Bearer other\r\n\r\n" + GET_HEALTH)
        assert await bodies(client, 2) == [b"/v1/a:abcde", b"asgi"]
        client.writer.write(head + b"0\r\nAuthorization: Bearer other\r\n\r\n")
        assert await bodies(client, 1) == [b"/v1/a:"]
        assert all(b"authorization" not in headers for _, headers in served.app.heard)

    @pytest.mark.parametrize(("path", "status"), [("/v1/refuse", 401), ("/v1/a", 413)])
    async def test_an_early_answer_is_read_by_a_client_that_first_sends_all(
        self, served: Served, path: str, status: int
    ) -> None:
        """More than every buffer between the two holds, read only afterwards: without a reset on the way."""
        body = b"x" * 30_000_000
        client = await served.send(b"")
        async with asyncio.timeout(10):
            client.writer.write(post(path, body))
            await client.writer.drain()
        text = await client.rest()
        assert text.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nconnection: close\r\n" in text

    async def test_a_client_that_pauses_behind_an_early_answer_reads_it_and_the_end(self, served: Served) -> None:
        client = await served.send(post("/v1/refuse", b"x" * 1000)[:-500])
        assert (await answer(client))[0] == 401
        # The end is told at once, not when patience is over.
        assert await client.rest(within_s=UNWANTED_BODY_PAUSE_S / 2) == b""
        client.writer.write(b"x" * 500 + post("/v1/a"))
        await eventually(lambda: not served.server.server_state.connections)
        assert len(served.app.heard) == 1


class TestIdle:
    async def test_nothing_of_a_request_is_kept(self, served: Served) -> None:
        client = await served.send(post("/v1/a", b"x" * 100_000))
        await answer(client)
        kept = served.app.last
        assert kept is not None
        assert (kept.headers, await kept.read_body(MOST_BYTES)) == ([], b"")

    async def test_a_silent_connection_is_closed_in_time(self) -> None:
        async with serving(timeout_keep_alive=1) as served:
            # Never a word; after a /v1 answer; after an ASGI answer; in the middle of a head.
            clients = [await served.send(data) for data in (b"", post("/v1/a"), GET_HEALTH, GET_HEALTH + b"GET /v1/")]
            for client, answers in zip(clients, (0, 1, 1, 1), strict=True):
                assert len(await bodies(client, answers)) == answers
                assert await client.rest(within_s=4) == b""

    async def test_one_that_is_at_work_is_not(self) -> None:
        async with serving(timeout_keep_alive=1) as served:
            slow, again = await served.send(post("/v1/slow")), await served.send(post("/v1/a"))
            for _ in range(4):
                assert await bodies(again, 1) == [b"/v1/a:"]
                await asyncio.sleep(0.5)
                again.writer.write(post("/v1/a"))
            served.app.gate.set()
            assert await bodies(slow, 1) == [b"slow"]


class TestDraining:
    async def test_h4_a_request_that_was_just_sent_is_answered_as_the_last(self, served: Served) -> None:
        ours, asgi, new = await served.send(post("/v1/a")), await served.send(GET_HEALTH), await served.send(b"")
        await bodies(ours, 1)
        await bodies(asgi, 1)
        served.drain()
        await served.until_draining()
        for client, request in ((ours, post("/v1/a")), (asgi, GET_HEALTH), (new, post("/v1/a"))):
            client.writer.write(request)
            status, headers, _ = await answer(client)
            assert (status, headers["connection"]) == (200, "close")
            assert await client.rest() == b""

    @pytest.mark.parametrize("request_", [post("/v1/stream"), GET_HEALTH.replace(b"/healthz", b"/slow")])
    async def test_h4_who_was_not_told_that_the_connection_ends_may_ask_once_more(
        self, served: Served, request_: bytes
    ) -> None:
        client = await served.send(request_)
        head = await client.read_until(b"\r\n\r\n")
        assert b"connection" not in head
        served.drain()
        await served.until_draining()
        served.app.gate.set()
        await client.read_until(b"asgi" if b"/slow" in request_ else b"0\r\n\r\n")
        client.writer.write(post("/v1/a"))
        status, headers, _ = await answer(client)
        assert (status, headers["connection"]) == (200, "close")

    async def test_h4_a_head_that_is_still_coming_is_waited_for(self, served: Served) -> None:
        client, whole = await served.send(post("/v1/a")), post("/v1/a", b"1")
        await bodies(client, 1)
        served.drain()
        await served.until_draining()
        await asyncio.sleep(0.4)
        client.writer.write(whole[:10])
        await asyncio.sleep(0.3)
        client.writer.write(whole[10:])
        assert await bodies(client, 1) == [b"/v1/a:1"]

    async def test_h4_pipelined_requests_are_all_answered(self, served: Served) -> None:
        client = await served.send(post("/v1/slow") + GET_HEALTH + post("/v1/a", b"1"))
        await served.until_heard(1)
        served.drain()
        await served.until_draining()
        served.app.gate.set()
        assert await bodies(client, 2) == [b"slow", b"asgi"]
        _, headers, text = await answer(client)
        assert (headers["connection"], text) == ("close", b"/v1/a:1")
        assert await client.rest() == b""


class TestClients:
    async def test_a_half_close_is_a_hang_up(self, served: Served) -> None:
        """A client's FIN looks the same whether it still reads or not, and who has gone must not cost a node (H1)."""
        client = await served.send(post("/v1/slow"))
        await served.until_heard(1)
        client.writer.write_eof()
        async with asyncio.timeout(1):
            await served.app.left.wait()
        assert await client.rest() == b""

    async def test_h1_a_half_close_frees_the_engine(self, make_api: MakeApi, engine: Engine) -> None:
        engine.always = hang
        api = await make_api(engine)
        client = await api.open(json.dumps(chat_body()).encode())
        request: Asked = await engine.request()
        client.writer.write_eof()
        await request.closed(1)
        assert (await api.fleet.record())["outcome"] == "client_gone"

    async def test_head_has_the_length_of_get_and_no_body(self, make_api: MakeApi) -> None:
        api = await make_api()
        got, head = await api.http.get("/v1/models"), await api.http.head("/v1/models")
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        lines = f"Host: x\r\nAuthorization: Bearer {api.fleet.secret}\r\n\r\n"
        writer.write(f"HEAD /v1/models HTTP/1.1\r\n{lines}".encode() + GET_HEALTH)
        raw = RawClient(reader, writer)
        assert b"200 OK" in await raw.read_until(b"\r\n\r\n")
        # No byte of a body stands between the two answers.
        assert (await raw.reader.readexactly(12)) == b"HTTP/1.1 200"
        raw.hang_up()

    @pytest.mark.parametrize("refused", ["", "Bearer sk_dev_wrong"])
    async def test_h8_a_401_is_read_while_the_body_is_still_coming(self, make_api: MakeApi, refused: str) -> None:
        api = await make_api()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(post("/v1/chat/completions", b"x" * 5_000_000, f"Authorization: {refused}"))
        async with asyncio.timeout(5):
            await writer.drain()
        text = await RawClient(reader, writer).rest()
        assert text.startswith(b"HTTP/1.1 401 ")
        assert json.loads(text.partition(b"\r\n\r\n")[2])["error"]["code"]
        writer.close()
