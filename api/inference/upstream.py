"""The client that talks to engines: HTTP/1.1 over kept-alive connections, one small protocol object each.

A general HTTP client costs several times the rest of a request on this path (docs/performance.md), so this one is ours.
It does what a relay needs and nothing else: one request at a time on a connection, deadlines, abort at any moment, and
back-pressure towards the engine while the client reads slowly.
"""

from __future__ import annotations

import asyncio
import ssl
from enum import StrEnum
from typing import cast
from urllib.parse import urlsplit

import httptools

# Unread bytes of one answer beyond which the engine is made to wait, and below which it goes on.
HIGH_WATER_BYTES = 256 * 1024
LOW_WATER_BYTES = 64 * 1024
IDLE_CONNECTIONS = 64
LONGEST_HEADERS_BYTES = 64 * 1024


class FailureKind(StrEnum):
    """How a node failed us."""

    CONNECT = "connect"  # No connection within the deadline, or refused.
    RESET = "reset"  # The connection broke before the answer was complete.
    SILENT = "silent"  # No first byte within the deadline.
    STALLED = "stalled"  # A stream that stopped between two chunks.
    TOTAL = "total"  # Longer than one request may live.
    GARBAGE = "garbage"  # Not HTTP, or not what was asked for.
    BUSY = "busy"  # 408 or 429: full, not broken.
    ERROR = "error"  # 5xx.


class NodeFailure(Exception):
    """A node did not answer as it should. `is_fresh` tells whether the connection was made for this request."""

    def __init__(self, kind: FailureKind, detail: str = "", *, is_fresh: bool = True) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.is_fresh = is_fresh


class ClientGone(Exception):
    """The client hung up while its request ran."""


class Connection(asyncio.Protocol):
    """One connection to an engine and the exchange that runs on it."""

    __slots__ = (
        "_buffered",
        "_chunks",
        "_error",
        "_is_complete",
        "_is_paused",
        "_loop",
        "_parser",
        "_received",
        "_timer",
        "_waiter",
        "content_type",
        "has_headers",
        "is_closed",
        "is_fresh",
        "retry_after",
        "status",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self.is_closed = False
        self.is_fresh = True
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._received = 0
        self._is_complete = False
        self._is_paused = False
        self._error: BaseException | None = None
        self.has_headers = False
        self.status = 0
        self.content_type = b""
        self.retry_after = b""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        # uvloop's transports do not derive from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: whatever still waits fails."""
        self.is_closed = True
        self.fail(NodeFailure(FailureKind.RESET, str(exc or "closed by the engine"), is_fresh=self.is_fresh))

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._is_complete:
            # Nobody asked for this: whatever it is, it must not become the next request's answer.
            self.is_closed = True
            if self.transport is not None:
                self.transport.abort()
            return
        if not self.has_headers:
            self._received += len(data)
            if self._received > LONGEST_HEADERS_BYTES + HIGH_WATER_BYTES:
                self.fail(NodeFailure(FailureKind.GARBAGE, "endless headers"))
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.is_closed = True
            self.fail(NodeFailure(FailureKind.GARBAGE, str(error), is_fresh=self.is_fresh))
            return
        if self._buffered > HIGH_WATER_BYTES and not self._is_paused and self.transport is not None:
            self._is_paused = True
            self.transport.pause_reading()
        if self._chunks or self._is_complete:
            self._wake()

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._is_complete:
            raise ValueError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        lowered = name.lower()
        if lowered == b"content-type":
            self.content_type = value
        elif lowered == b"retry-after":
            self.retry_after = value

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()
        self.has_headers = True

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._chunks.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._is_complete = True
        if not self._parser.should_keep_alive():
            self.is_closed = True

    # The exchange

    def send(self, request: bytes) -> None:
        """Begin an exchange. The connection must be idle."""
        assert self.transport is not None
        self._reset()
        self.transport.write(request)

    def fail(self, error: BaseException) -> None:
        """End the exchange from outside: whoever reads gets `error`, the engine sees the connection close."""
        if self._is_complete and not self.is_closed:
            return
        if self._error is None:
            self._error = error
        self.is_closed = True
        if self.transport is not None:
            self.transport.abort()
        self._wake()

    async def read(self, deadline_at: float, late: FailureKind) -> bytes:
        """The next bytes of the body as they came, joined; b"" at its end. `deadline_at` is the loop's time.

        Raises NodeFailure (of kind `late` at the deadline) or what `fail` was given.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._is_complete:
                return b""
            self._waiter = self._loop.create_future()
            self._timer = self._loop.call_at(deadline_at, self._expire, late)
            try:
                await self._waiter
            finally:
                self._waiter = None
                self._timer.cancel()
        chunks, self._chunks, self._buffered = self._chunks, [], 0
        if self._is_paused and self.transport is not None and not self.is_closed:
            self._is_paused = False
            self.transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @property
    def is_reusable(self) -> bool:
        """Has the whole answer arrived and been read, and does the engine keep the connection?"""
        return self._is_complete and not self.is_closed and not self._is_paused

    def _expire(self, late: FailureKind) -> None:
        self.fail(NodeFailure(late, "deadline", is_fresh=True))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Upstream:
    """One node's engine: its address, credential and idle connections."""

    __slots__ = ("_head", "_host", "_idle", "_is_closed", "_loop", "_port", "_tls")

    def __init__(self, endpoint: str, credential: str, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(endpoint)
        self._loop = asyncio.get_running_loop()
        self._host = parts.hostname or ""
        self._tls = tls if parts.scheme == "https" else None
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._idle: list[Connection] = []
        self._is_closed = False
        self._head = (
            f"Host: {parts.netloc}\r\nAuthorization: Bearer {credential}\r\n"
            "Content-Type: application/json\r\nAccept-Encoding: identity\r\n"
        ).encode()

    def idle(self) -> Connection | None:
        """A kept-alive connection, or None."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                connection.is_fresh = False
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection, however long it takes. Raises OSError."""
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._loop),
            self._host,
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        return connection

    def request(self, path: str, body: bytes, trace: bytes) -> bytes:
        """The bytes of one POST; `trace` are whole extra header lines."""
        return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (
            path.encode(),
            self._head,
            trace,
            len(body),
            body,
        )

    def release(self, connection: Connection) -> None:
        """Give a connection back: kept when its answer is complete, closed otherwise."""
        if connection.is_reusable and not self._is_closed and len(self._idle) < IDLE_CONNECTIONS:
            self._idle.append(connection)
        elif connection.transport is not None:
            connection.is_closed = True
            connection.transport.abort()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they are given back."""
        self._is_closed = True
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.abort()
        self._idle.clear()
