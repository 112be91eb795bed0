"""H8: what is wrong with a request as bytes ends at our door; of its headers none but ours reach a node.

Written against a socket, so that it holds whatever reads it on our side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from tests.api.inference.conftest import Api, MakeApi, chat_body
from tests.engines import Engine

BODY = json.dumps(chat_body()).encode()
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """One answer, read to its end."""

    status: int
    version: str
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The code of an error in our shape."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["code"]


class Socket:
    """A connection on which a test says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def flood(self, piece: bytes, most: int = 128) -> int:
        """Send it again and again, as a slow client does: how often until the other side closed."""
        for count in range(most):
            if self._writer.is_closing() or self._reader.at_eof():
                return count
            self._writer.write(piece)
            await asyncio.sleep(0.002)
        return most

    def end(self) -> None:
        self._writer.write_eof()

    async def answer(self, *, has_body: bool = True, within_s: float = 5.0) -> Answer:
        """The next answer. Fails when there is none in time."""
        async with asyncio.timeout(within_s):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip("\r\n").split("\r\n")
            version, status, *_ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            return Answer(int(status), version, headers, await self._body(headers) if has_body else b"")

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self._reader.readline(), 16):
                body += (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readline()
            return body
        if "content-length" in headers:
            return await self._reader.readexactly(int(headers["content-length"]))
        return b"" if int(headers.get(":status", 0)) == 100 else await self._reader.read()

    async def rest(self, within_s: float = 5.0) -> bytes:
        """All that comes before the connection is closed. Fails when it stays open."""
        async with asyncio.timeout(within_s):
            with contextlib.suppress(ConnectionError):
                return await self._reader.read()
            return b""

    async def is_quiet(self, for_s: float = 0.2) -> bool:
        """Does nothing more come?"""
        try:
            async with asyncio.timeout(for_s):
                return await self._reader.read(1) == b""
        except TimeoutError:
            return True


@pytest.fixture
async def api(make_api: MakeApi, engine: Engine) -> Api:
    return await make_api(engine)


@pytest.fixture
async def wire(api: Api) -> AsyncIterator[Socket]:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    yield Socket(reader, writer)
    writer.close()


def request(api: Api, *lines: str, first: str = f"POST {CHAT} HTTP/1.1", body: bytes = b"") -> bytes:
    """A request with a key and these header lines, exactly as they are."""
    head = [first, "Host: x", f"Authorization: Bearer {api.fleet.secret}", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def length(body: bytes = BODY) -> str:
    return f"Content-Length: {len(body)}"


class TestFraming:
    @pytest.mark.parametrize(
        "lines",
        [
            ["Content-Length: {}", "Content-Length: {}"],
            ["Content-Length: {}", "Content-Length: 0"],
            ["Content-Length: {}, {}"],
            ["Content-Length: +{}"],
            ["Content-Length: 0x10"],
            ["Content-Length: {} 1"],
            ["Content-Length: "],
            ["Content-Length: 99999999999999999999999"],
            ["Content-Length : {}"],
            ["Content-Length: {}", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", "Content-Length: {}"],
            ["Transfer-Encoding: chunked, identity"],
            ["Transfer-Encoding: identity", "Content-Length: {}"],
            ["Transfer-Encoding: xchunked"],
            ["Transfer-Encoding: chunked", "Transfer-Encoding: xchunked"],
            ["Transfer-Encoding: \x0bchunked"],
            ["Content-Length: {}", "X-A: a", " folded"],
            ["Content-Length: {}", " folded: first"],
            ["Content-Length: {}", "X-A: a\x00b"],
            ["Content-Length: {}", "X-A: a\rb"],
            ["Content-Length: {}", "X-A: a\nX-B: b"],
            ["Content-Length: {}", "X\x00A: a"],
            ["Content-Length: {}", "X A: a"],
            ["Content-Length: {}", ": a"],
            ["Content-Length: {}", "no colon"],
        ],
    )
    async def test_h8_what_can_be_read_in_two_ways_is_refused_and_closed(
        self, api: Api, engine: Engine, wire: Socket, lines: Sequence[str]
    ) -> None:
        wire.send(request(api, *(line.replace("{}", str(len(BODY))) for line in lines), body=BODY))
        answer = await wire.answer()
        assert answer.status == 400, answer
        assert await wire.rest() == b""
        assert engine.requests == []

    @pytest.mark.parametrize(
        "chunks",
        [
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"-2\r\n{}\r\n0\r\n\r\n",
            b"0x2\r\n{}\r\n0\r\n\r\n",
            b"+2\r\n{}\r\n0\r\n\r\n",
            b" 2\r\n{}\r\n0\r\n\r\n",
            b"\r\n{}\r\n0\r\n\r\n",
            b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n",
            b"2\n{}\n0\n\n",
            b"2\r\n{}0\r\n\r\n",
            b"2;a\x00b\r\n{}\r\n0\r\n\r\n",
            b"1\r\n{}\r\n0\r\n\r\n",
        ],
    )
    async def test_h8_chunks_that_are_none_are_refused_and_closed(
        self, api: Api, engine: Engine, wire: Socket, chunks: bytes
    ) -> None:
        wire.send(request(api, "Transfer-Encoding: chunked", body=chunks))
        answer = await wire.answer()
        assert answer.status == 400, answer
        assert await wire.rest() == b""
        assert engine.requests == []

    @pytest.mark.parametrize(
        "first",
        [
            f"POST {CHAT} HTTP/3.0",
            f"POST {CHAT} HTTP/1.1 ",
            f"post {CHAT} HTTP/1.1",
            f"P\x00ST {CHAT} HTTP/1.1",
            f"POST {CHAT}\x00 HTTP/1.1",
            f"POST {CHAT} x HTTP/1.1",
            "\x16\x03\x01\x02",
        ],
    )
    async def test_h8_another_protocol_is_refused_and_closed(
        self, api: Api, engine: Engine, wire: Socket, first: str
    ) -> None:
        wire.send(request(api, length(), first=first, body=BODY))
        answer = await wire.answer()
        assert answer.status == 400, answer
        assert await wire.rest() == b""
        assert engine.requests == []

    @pytest.mark.parametrize(
        ("lines", "body"),
        [
            # By its length, a body of which the rest is another request; by its chunks, nothing and another request.
            (["Content-Length: {}", "Transfer-Encoding: chunked"], b"0\r\n\r\n{}"),
            (["Transfer-Encoding: chunked", "Content-Length: 4"], b"5c\r\n{}\r\n0\r\n\r\n"),
            (["Transfer-Encoding: chunked", "Transfer-encoding: cow"], b"5c\r\n{}\r\n0\r\n\r\n"),
            (["Transfer-Encoding : chunked", "Content-Length: 4"], b"5c\r\n{}\r\n0\r\n\r\n"),
            (["X: y\nTransfer-Encoding: chunked", "Content-Length: 4"], b"5c\r\n{}\r\n0\r\n\r\n"),
            (["Content-Length: 0", "Content-Length: {}"], b"{}"),
        ],
    )
    async def test_h8_no_request_is_smuggled_in_another(
        self, api: Api, engine: Engine, wire: Socket, lines: Sequence[str], body: bytes
    ) -> None:
        smuggled = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.fleet.secret}\r\n\r\n".encode()
        body = body.replace(b"{}", smuggled)
        wire.send(request(api, *(line.replace("{}", str(len(body))) for line in lines), body=body))
        assert (await wire.answer()).status == 400
        assert await wire.rest() == b"", "there is one answer"
        assert engine.requests == []

    async def test_a_body_in_chunks_is_one_body(self, api: Api, engine: Engine, wire: Socket) -> None:
        pieces = [BODY[:1], BODY[1:20], BODY[20:]]
        chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        wire.send(request(api, "Transfer-Encoding: chunked", body=chunks + b"0\r\nX-Trailer: 1\r\n\r\n"))
        assert (await wire.answer()).status == 200
        assert engine.requests[0].headers["content-length"] == str(len(engine.requests[0].raw))
        wire.send(request(api, length(), body=BODY))
        assert (await wire.answer()).status == 200

    @pytest.mark.parametrize("cut", [1, 20, 100, -1])
    async def test_a_request_that_is_cut_off_reaches_no_node(
        self, api: Api, engine: Engine, wire: Socket, cut: int
    ) -> None:
        wire.send(request(api, length(), body=BODY)[:cut])
        wire.end()
        await wire.rest(8)
        assert engine.requests == []


class TestBounds:
    """What a parser of the socket must not swallow without end."""

    @pytest.mark.parametrize("path", [CHAT, "/admin/orgs", "/healthz"])
    async def test_h8_an_upgrade_does_not_turn_the_body_into_another_request(
        self, api: Api, engine: Engine, wire: Socket, path: str
    ) -> None:
        # Parsers take what follows a request for an upgrade as another protocol's.
        smuggled = request(api, first="GET /v1/models HTTP/1.1")
        lines = ["Connection: upgrade", "Upgrade: h2c", length(smuggled)]
        wire.send(request(api, *lines, first=f"POST {path} HTTP/1.1"))
        assert (await wire.answer()).status >= 400
        wire.send(smuggled)
        assert await wire.is_quiet()

    @pytest.mark.parametrize(
        ("piece", "path"),
        [
            (b"a" * 8192, CHAT),
            (b"a" * 8192, "/healthz"),
            (b"X-A: " + b"a" * 8185 + b"\r\n", CHAT),
            (b"X-A: " + b"a" * 8185 + b"\r\n", "/healthz"),
            (b"a:\r\n" * 2048, CHAT),
        ],
    )
    async def test_h8_headers_without_end_are_cut_off(self, wire: Socket, piece: bytes, path: str) -> None:
        wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Long: ".encode())
        # 64 KiB, and what was on its way.
        assert await wire.flood(piece) < 64
        assert (await wire.rest()).split(b" ", 2)[1:2] in ([b"400"], [b"431"], [])

    async def test_h8_a_trailer_without_end_is_cut_off(self, api: Api, wire: Socket) -> None:
        wire.send(request(api, "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\nX-Long: "))
        assert await wire.flood(b"a" * 8192) < 64

    async def test_h8_a_target_without_end_is_cut_off(self, wire: Socket) -> None:
        wire.send(b"GET /v1/models?")
        assert await wire.flood(b"a" * 8192) < 64
        assert (await wire.rest()).split(b" ", 2)[1:2] in ([b"400"], [b"414"], [b"431"], [])


class TestHeaders:
    async def test_h8_only_ours_reach_the_engine(self, api: Api, engine: Engine, wire: Socket) -> None:
        wire.send(
            request(
                api,
                length(),
                "Connection: keep-alive, X-Private, TE",
                "Keep-Alive: timeout=5",
                "TE: trailers",
                "Trailer: X-A",
                "Proxy-Authorization: Basic eA==",
                "Proxy-Connection: keep-alive",
                "X-Private: 1",
                "Cookie: a=b",
                "Forwarded: for=1.2.3.4",
                "X-Forwarded-For: 1.2.3.4",
                "Accept-Encoding: gzip",
                "X-Request-Id: theirs",
                "OpenAI-Organization: org-1",
                "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                body=BODY,
            )
        )
        assert (await wire.answer()).status == 200
        seen = engine.requests[0].headers
        ours = {"host", "authorization", "content-type", "content-length", "accept", "accept-encoding", "connection"}
        assert seen.keys() <= ours | {"user-agent", "x-request-id", "traceparent"}
        assert "gzip" not in str(seen)
        assert api.fleet.secret not in str(seen)
        assert "theirs" not in str(seen)

    async def test_h8_the_engine_s_own_stay_with_us(self, api: Api, engine: Engine, wire: Socket) -> None:
        async def chatty(exchange: object) -> None:
            engine.requests[-1].json(
                {"choices": [], "usage": None}, 200, "Server: vllm", "X-Node: 10.0.0.1", "Via: 1.1 x"
            )

        engine.always = chatty
        wire.send(request(api, length(), body=BODY))
        answer = await wire.answer()
        assert answer.status == 200
        assert not {"x-node", "via"} & answer.headers.keys()
        assert "vllm" not in str(answer.headers)

    async def test_many_headers_are_read(self, api: Api, wire: Socket) -> None:
        wire.send(request(api, *(f"X-{number}: {number}" for number in range(500)), length(), body=BODY))
        assert (await wire.answer()).status == 200

    async def test_expecting_a_go_ahead_gets_one(self, api: Api, engine: Engine, wire: Socket) -> None:
        wire.send(request(api, length(), "Expect: 100-continue"))
        assert (await wire.answer(has_body=False)).status == 100
        assert engine.requests == []
        wire.send(BODY)
        assert (await wire.answer()).status == 200

    async def test_expecting_a_go_ahead_for_what_is_refused_gets_none(self, api: Api, wire: Socket) -> None:
        wire.send(request(api, "Content-Length: 99999999", "Expect: 100-continue"))
        assert (await wire.answer()).status == 413


class TestExchanges:
    async def test_pipelined_requests_are_answered_in_order(self, api: Api, engine: Engine, wire: Socket) -> None:
        models = request(api, first="GET /v1/models HTTP/1.1")
        wrong = request(api, length(b"{"), body=b"{")
        wire.send(request(api, length(), body=BODY) + models + wrong + request(api, length(), body=BODY) + models)
        answers = [await wire.answer() for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 400, 200, 200]
        assert [b"choices" in answer.body for answer in answers] == [True, False, False, True, False]
        assert await wire.is_quiet()
        assert len(engine.requests) == 2

    @pytest.mark.parametrize("is_streamed", [False, True])
    async def test_http_1_0_is_answered_and_closed(self, api: Api, wire: Socket, is_streamed: bool) -> None:
        body = json.dumps(chat_body(stream=is_streamed)).encode()
        wire.send(request(api, length(body), first=f"POST {CHAT} HTTP/1.0", body=body))
        answer = await wire.answer()
        assert answer.status == 200
        assert (b"[DONE]" if is_streamed else b"choices") in answer.body
        assert await wire.rest() == b""

    async def test_a_client_that_asks_for_the_end_gets_it(self, api: Api, wire: Socket) -> None:
        wire.send(request(api, length(), "Connection: close", body=BODY))
        assert (await wire.answer()).status == 200
        assert await wire.rest() == b""

    async def test_head_has_no_body(self, api: Api, wire: Socket) -> None:
        for path, status in (("/v1/models", 200), ("/v1/models/llama-7b", 200), (CHAT, 405), ("/v1/nothing", 404)):
            wire.send(request(api, first=f"HEAD {path} HTTP/1.1"))
            assert (await wire.answer(has_body=False)).status == status
        assert await wire.is_quiet()

    @pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
    async def test_other_methods_are_405(self, api: Api, engine: Engine, wire: Socket, method: str) -> None:
        wire.send(request(api, length(), first=f"{method} {CHAT} HTTP/1.1", body=BODY))
        answer = await wire.answer()
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        assert engine.requests == []

    @pytest.mark.parametrize(
        ("target", "status"),
        [
            ("http://other.example/v1/models", 200),
            ("HTTP://other.example/v1/models?x=y", 200),
            ("http://other.example", 400),
            ("/v1/%6dodels", 200),
            ("/v1/models/llama%2D7b", 200),
            ("/v1/models/%00", 404),
            ("/v1/models/%ff%fe", 404),
            ("/v1/models/%zz", 404),
            ("/v1/models/" + "a" * 8000, 404),
            ("/v1/models?" + "a" * 8000, 200),
            ("/v1/", 404),
            ("/v1//models", 404),
            ("/V1/models", 404),
            ("/v1/models/../../openapi.json", 404),
            ("*", 404),
            ("v1/models", 400),
        ],
    )
    async def test_targets_in_any_form(self, api: Api, wire: Socket, target: str, status: int) -> None:
        wire.send(request(api, first=f"GET {target} HTTP/1.1"))
        assert (await wire.answer()).status == status

    @pytest.mark.parametrize(
        "target",
        [
            "/v1/../admin/orgs",
            "/v1/%2e%2e/admin/orgs",
            "/v1/..%2fadmin/orgs",
            "/v1/..%252fadmin/orgs",
            "/v1/..;/admin/orgs",
            "/v1/\\..\\admin\\orgs",
            "//admin/orgs",
            "/./admin/orgs",
            "/%61dmin/orgs",
            "/admin/orgs/",
            "/admin//orgs",
            "/ADMIN/orgs",
            "/admin/orgs?/v1/models",
            "/admin/orgs#/v1/models",
            "http://x/admin/orgs",
            "http://admin/v1/../admin/orgs",
        ],
    )
    async def test_no_path_leads_to_admin_without_its_token(self, api: Api, wire: Socket, target: str) -> None:
        for key in (f"Authorization: Bearer {api.fleet.secret}", "X: y"):
            wire.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n{key}\r\n\r\n".encode())
            answer = await wire.answer()
            assert answer.status in (307, 401, 403, 404), answer
            assert "acme" not in answer.body.decode()
            if answer.status == 307:
                # A slash too many: to the same path without it, which is as closed.
                assert answer.headers["location"].endswith("/admin/orgs")
