"""A scripted engine: a small HTTP/1.1 server that a test controls byte by byte.

It speaks as vLLM and llama.cpp do when left alone. A test hands it plans, one for each request to come, that say
otherwise; every request it got is kept in `requests`, with the moment its peer closed the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

WORDS = ("Hello", " there", ",", " how", " are", " you", "?")


@dataclass(eq=False)
class Exchange:
    """One request and the connection to answer it on."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    connection: _Connection
    came_at: float
    closed_at: float | None = None
    _closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that was asked."""
        return json.loads(self.raw)

    async def closed(self, within_s: float = 2.0) -> float:
        """The loop's time at which the peer closed; fails when it does not."""
        async with asyncio.timeout(within_s):
            await self._closed.wait()
        assert self.closed_at is not None
        return self.closed_at

    @property
    def is_closed(self) -> bool:
        """Has the peer closed the connection?"""
        return self._closed.is_set()

    def note_closed(self, at: float) -> None:
        if not self._closed.is_set():
            self.closed_at = at
            self._closed.set()

    # Answering

    def write(self, data: bytes) -> None:
        """These bytes, as they are."""
        self.connection.transport.write(data)

    def head(self, status: int, *headers: str) -> None:
        """Status line and headers."""
        self.write(f"HTTP/1.1 {status} Scripted\r\n".encode() + "".join(f"{line}\r\n" for line in headers).encode())
        self.write(b"\r\n")

    def json(self, document: Any, status: int = 200, *headers: str) -> None:
        """A whole JSON answer."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.head(status, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
        self.write(body)

    def begin_stream(self) -> None:
        """The head of an event stream."""
        self.head(200, "Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")

    def chunk(self, data: bytes) -> None:
        """One HTTP chunk."""
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, document: Any) -> None:
        """One event in a chunk of its own."""
        self.chunk(sse(document))

    def end_stream(self) -> None:
        """`[DONE]` and the last chunk."""
        self.chunk(b"data: [DONE]\n\n")
        self.write(b"0\r\n\r\n")

    def reset(self) -> None:
        """Break the connection with an RST."""
        raw = self.connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.transport.abort()

    def close(self) -> None:
        """Close the connection after what was written."""
        self.connection.transport.close()


Plan = Callable[[Exchange], Awaitable[None]]


def sse(document: Any) -> bytes:
    """An event as engines write it, without spaces."""
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chat_chunk(text: str | None, *, finish: str | None = None, role: bool = False, **more: Any) -> dict[str, Any]:
    """A piece of a streamed chat completion."""
    delta: dict[str, Any] = {"role": "assistant", "content": ""} if role else {"content": text} if text else {}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "llama-3-8b",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **more,
    }


def completion_chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    """A piece of a streamed completion."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "llama-3-8b",
        "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}],
    }


def usage_of(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """An OpenAI usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Engine:
    """A running engine. `words` are what it says, `prompt_tokens` and `cached_tokens` what it reports."""

    def __init__(self, words: Sequence[str] = WORDS, *, pace_s: float = 0.0, name: str = "engine") -> None:
        self.name = name
        self.words = tuple(words)
        self.pace_s = pace_s
        self.prompt_tokens = 11
        self.cached_tokens = 3
        self.requests: list[Exchange] = []
        self.connections: set[_Connection] = set()
        self.accepted = 0
        self.plans: deque[Plan] = deque()
        self.always: Plan | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._came = asyncio.Event()

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> Engine:
        """Listen, on the port it had before if it had one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Refuse connections and break those there are, as a killed process does."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> Engine:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def next(self, *plans: Plan) -> None:
        """How to treat the next requests."""
        self.plans.extend(plans)

    async def request(self, number: int = 0, within_s: float = 5.0) -> Exchange:
        """The request of that number, as soon as it has come."""
        async with asyncio.timeout(within_s):
            while len(self.requests) <= number:
                self._came.clear()
                await self._came.wait()
        return self.requests[number]

    def take(self, exchange: Exchange) -> Plan:
        """Note a request; the plan for it."""
        self.requests.append(exchange)
        self._came.set()
        if self.plans:
            return self.plans.popleft()
        return self.always or self.answer

    # What it does when left alone

    async def answer(self, exchange: Exchange) -> None:
        """Answer like an engine that is well."""
        body = exchange.body
        if exchange.path == "/v1/embeddings":
            asked = body["input"]
            inputs = cast("list[Any]", asked) if isinstance(asked, list) else [asked]
            exchange.json(
                {
                    "object": "list",
                    "model": body["model"],
                    "data": [
                        {"object": "embedding", "index": index, "embedding": [0.5, -0.25]}
                        for index in range(len(inputs))
                    ],
                    "usage": {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens},
                }
            )
        elif body.get("stream"):
            await self.stream(exchange)
        else:
            is_chat = exchange.path == "/v1/chat/completions"
            text = "".join(self.words)
            choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            exchange.json(
                {
                    "id": "chatcmpl-1",
                    "object": "chat.completion" if is_chat else "text_completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", **choice}],
                    "usage": usage_of(self.prompt_tokens, len(self.words), self.cached_tokens),
                }
            )

    async def stream(self, exchange: Exchange) -> None:
        """Stream its words at its pace, each in an event of its own, then usage and `[DONE]`."""
        is_chat = exchange.path == "/v1/chat/completions"
        exchange.begin_stream()
        if is_chat:
            exchange.event(chat_chunk(None, role=True))
        for word in self.words:
            if exchange.is_closed:
                return
            exchange.event(chat_chunk(word) if is_chat else completion_chunk(word))
            if self.pace_s:
                await asyncio.sleep(self.pace_s)
        exchange.event(chat_chunk(None, finish="stop") if is_chat else completion_chunk("", "stop"))
        options: dict[str, Any] = exchange.body.get("stream_options") or {}
        if options.get("include_usage"):
            usage = usage_of(self.prompt_tokens, len(self.words), self.cached_tokens)
            exchange.event({**chat_chunk(None), "choices": [], "usage": usage})
        exchange.end_stream()


class _Connection(asyncio.Protocol):
    """One accepted connection: requests in, one at a time, each answered by its plan."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._current: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._engine.connections.add(self)
        self._engine.accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        if self._current is not None:
            self._current.note_closed(asyncio.get_running_loop().time())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        method, path, _ = first.split(" ")
        exchange = Exchange(method, path, headers, rest[:length], self, asyncio.get_running_loop().time())
        self._current = exchange
        plan = self._engine.take(exchange)
        self._task = asyncio.get_running_loop().create_task(self._run(plan, exchange))

    async def _run(self, plan: Plan, exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await plan(exchange)


# Plans


async def hang(exchange: Exchange) -> None:
    """Take the request and say nothing."""
    await exchange._closed.wait()  # pyright: ignore[reportPrivateUsage]


async def reset(exchange: Exchange) -> None:
    """Break the connection before a byte of an answer."""
    exchange.reset()


async def close(exchange: Exchange) -> None:
    """Close the connection before a byte of an answer."""
    exchange.close()


async def garbage(exchange: Exchange) -> None:
    """Answer in another protocol."""
    exchange.write(b"SSH-2.0-OpenSSH_9.2\r\n")


async def not_json(exchange: Exchange) -> None:
    """A page where JSON was asked for."""
    exchange.head(200, "Content-Type: text/html", "Content-Length: 13")
    exchange.write(b"<html></html>")


async def hang_after_headers(exchange: Exchange) -> None:
    """Headers of a stream, then nothing."""
    exchange.begin_stream()
    await hang(exchange)


def fails(status: int, document: Any = None, *headers: str) -> Plan:
    """An error answer."""

    async def plan(exchange: Exchange) -> None:
        exchange.json(document if document is not None else {"error": {"message": "scripted"}}, status, *headers)

    return plan


def says(*pieces: bytes, pause_s: float = 0.0, then: Plan | None = None) -> Plan:
    """A stream of exactly these bytes, each piece in a chunk of its own; ended properly unless `then` differs."""

    async def plan(exchange: Exchange) -> None:
        exchange.begin_stream()
        for piece in pieces:
            exchange.chunk(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        if then is None:
            exchange.write(b"0\r\n\r\n")
        else:
            await then(exchange)

    return plan


def streams_then(then: Plan, *words: str) -> Plan:
    """Begin a chat stream with these words, then something else."""
    events = [sse(chat_chunk(None, role=True)), *(sse(chat_chunk(word)) for word in words)]
    return says(*events, pause_s=0.005, then=then)
