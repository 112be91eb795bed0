"""The client that talks to engines: HTTP/1.1 over kept-alive connections, one small protocol object each.

A general HTTP client costs several times the rest of a request on this path (docs/performance.md), so this one is ours.
It does what a relay needs and nothing else: one request at a time on a connection, deadlines, abort at any moment, and
back-pressure towards the engine while the client reads slowly. A stream is *poured*: each piece goes from the engine's
socket to whoever takes it in one call, without waking a task.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from enum import StrEnum
from math import inf
from typing import cast
from urllib.parse import urlsplit

import httptools

IDLE_CONNECTIONS = 64
LONGEST_HEADERS_BYTES = 64 * 1024
# Timers of the loop are exact to about a millisecond; one that fires so much too early has fired.
EARLY_S = 0.001


class FailureKind(StrEnum):
    """How a node failed a request. `broke` kinds say that the connection, not the answer, was the trouble."""

    CONNECT = "connect"  # No connection within the deadline.
    RESET = "reset"  # The connection broke before the answer was complete.
    SILENT = "silent"  # No first byte, or no first token, within the deadline.
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


# Takes the next piece of a body; True when nothing more is wanted. May raise NodeFailure.
Sink = Callable[[bytes], bool]


class Connection(asyncio.Protocol):
    """One connection to an engine and the exchange that runs on it."""

    __slots__ = (
        "_chunks",
        "_deadline_at",
        "_error",
        "_idle_s",
        "_is_complete",
        "_is_enough",
        "_is_paused",
        "_late",
        "_late_at_most",
        "_loop",
        "_most_at",
        "_most_bytes",
        "_on_end",
        "_parser",
        "_received",
        "_sink",
        "_timer",
        "_timer_at",
        "_waiter",
        "_wants_all",
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
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._deadline_at = inf
        self._late = self._late_at_most = FailureKind.SILENT
        self._reset()

    def _reset(self) -> None:
        self._sink: Sink | None = None
        self._on_end: Callable[[], None] | None = None
        self._chunks: list[bytes] = []
        self._received = 0
        self._is_complete = False
        self._is_enough = False
        self._is_paused = False
        self._wants_all = False
        self._idle_s = self._most_at = inf
        self._most_bytes = inf
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
            if self._received > LONGEST_HEADERS_BYTES:
                self.fail(NodeFailure(FailureKind.GARBAGE, "endless headers"))
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.is_closed = True
            self.fail(NodeFailure(FailureKind.GARBAGE, str(error), is_fresh=self.is_fresh))
            return
        if self._sink is not None:
            self._pour_on()
        elif self._is_complete or (self._chunks and not self._wants_all):
            self._wake()
        elif self._received > self._most_bytes:
            self.fail(NodeFailure(FailureKind.GARBAGE, "endless answer"))

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._is_complete:
            raise ValueError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if len(name) == 12:
            if name.lower() == b"content-type":
                self.content_type = value
        elif len(name) == 11 and name.lower() == b"retry-after":
            self.retry_after = value

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()
        self.has_headers = True
        self._received = 0

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._chunks.append(body)
        self._received += len(body)

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
        self._sink = None
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
            await self._wait(deadline_at, late)
        return self._take()

    async def read_all(self, first_at: float, deadline_at: float, most_bytes: int) -> bytes:
        """The whole body, which must begin by `first_at`. Raises as `read` does; GARBAGE beyond `most_bytes`."""
        self._wants_all = True
        self._most_bytes = float(most_bytes)
        while not self._is_complete:
            if self._error is not None:
                raise self._error
            if self._received and self.has_headers:
                await self._wait(deadline_at, FailureKind.TOTAL)
            else:
                await self._wait(first_at, FailureKind.SILENT)
        if self._error is not None:
            raise self._error
        return self._take()

    def expect_all(self, deadline_at: float, most_bytes: int, on_end: Callable[[], None]) -> None:
        """Have `on_end` called once, when the whole body is there for `take_all` or the exchange has failed.

        It fails as SILENT at the deadline and as GARBAGE beyond `most_bytes`. `on_end` must not raise.
        """
        self._wants_all = True
        self._most_bytes = float(most_bytes)
        self._on_end = on_end
        self._set_deadline(deadline_at, FailureKind.SILENT)
        if self._is_complete or self._error is not None:
            self._wake()

    def take_all(self) -> bytes:
        """The whole body. Raises what the exchange failed with."""
        if self._error is not None:
            raise self._error
        return self._take()

    async def pour(self, sink: Sink, idle_s: float, most_at: float, late: FailureKind) -> None:
        """Hand the rest of the body to `sink`, each piece as it comes, until it wants no more or the body ends.

        A silence of `idle_s` fails as STALLED unless this is paused, `most_at` as `late`. Raises as `read` does, and
        what the sink raises.
        """
        self.postpone(idle_s, most_at, late)
        self._sink = sink
        self._set_deadline(min(self._loop.time() + idle_s, most_at), FailureKind.STALLED)
        if self._chunks:
            self._pour_on()
        while not (self._is_complete or self._is_enough):
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._sink = None
        self._deadline_at = inf
        if self._error is not None:
            raise self._error

    def _pour_on(self) -> None:
        sink = self._sink
        if self._chunks and sink is not None:
            try:
                self._is_enough = sink(self._take())
            except Exception as error:
                # Complete or not, this answer is worth nothing; what it was surfaces where the exchange is waited for.
                self.is_closed = True
                self.fail(error)
                return
            if not self._is_paused:
                at = self._loop.time() + self._idle_s
                if at > self._most_at:
                    at = self._most_at
                self._deadline_at = at
                if self._timer_at > at:
                    self._arm(at)
        if self._is_complete or self._is_enough:
            self._sink = None
            self._wake()

    def postpone(self, idle_s: float, most_at: float, late: FailureKind) -> None:
        """While pouring: other deadlines from the next piece on."""
        self._idle_s, self._most_at, self._late_at_most = idle_s, most_at, late

    def pause(self) -> None:
        """The client reads slowly: make the engine wait. Its silence is then no stall."""
        if not self._is_paused and not self.is_closed and not self._is_complete and self.transport is not None:
            self._is_paused = True
            self._set_deadline(self._most_at, self._late_at_most)
            self.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        if self._is_paused:
            self._is_paused = False
            if not self.is_closed and self.transport is not None:
                self._set_deadline(min(self._loop.time() + self._idle_s, self._most_at), FailureKind.STALLED)
                self.transport.resume_reading()

    def _take(self) -> bytes:
        chunks = self._chunks
        self._chunks = []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _wait(self, deadline_at: float, late: FailureKind) -> None:
        self._set_deadline(deadline_at, late)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._deadline_at = inf

    @property
    def is_reusable(self) -> bool:
        """Has the whole answer arrived and been read, and does the engine keep the connection?"""
        return self._is_complete and not self.is_closed and not self._is_paused

    # Deadlines: the timer stays where it is while the deadline moves on, and looks again when it fires.

    def _set_deadline(self, at: float, late: FailureKind) -> None:
        self._deadline_at = at
        self._late = late
        if self._timer_at > at:
            self._arm(at)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._timer_at = inf
        at = self._deadline_at
        if at == inf:
            return
        if self._loop.time() < at - EARLY_S:
            self._arm(at)
            return
        late = self._late_at_most if at >= self._most_at else self._late
        self.fail(NodeFailure(late, "deadline", is_fresh=True))

    def _wake(self) -> None:
        on_end = self._on_end
        if on_end is not None:
            self._on_end = None
            self._deadline_at = inf
            on_end()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def resolve(loop: asyncio.AbstractEventLoop, host: str, port: int, guard: Callable[[str], str | None]) -> str:
    """The address to connect to, looked up once and then used: it cannot change behind the check.

    Raises PermissionError, an OSError, when the guard lets none of the host's addresses pass.
    """
    problem: str | None = "it has no address"
    for *_, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        problem = guard(str(address[0]))
        if problem is None:
            return str(address[0])
    raise PermissionError(f"no connection to this node: {problem}")


class Upstream:
    """One node's engine: its address, credential and idle connections.

    `server_name` is the name in its certificate, if not the endpoint's host. `guard` says why an address must not be
    connected to, None for one that may be; it is asked for what the host resolves to at each connection (H7).
    """

    __slots__ = ("_guard", "_head", "_host", "_idle", "_is_closed", "_loop", "_port", "_server_name", "_tls")

    def __init__(
        self,
        endpoint: str,
        credential: str,
        tls: ssl.SSLContext | None,
        server_name: str = "",
        guard: Callable[[str], str | None] | None = None,
    ) -> None:
        parts = urlsplit(endpoint)
        self._loop = asyncio.get_running_loop()
        self._host = parts.hostname or ""
        self._server_name = server_name or self._host
        self._guard = guard
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

    @property
    def idle_connections(self) -> int:
        """How many connections are kept for the next requests."""
        return len(self._idle)

    async def connect(self) -> Connection:
        """A new connection, however long it takes. Raises OSError."""
        host = self._host if self._guard is None else await resolve(self._loop, self._host, self._port, self._guard)
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._loop),
            host,
            self._port,
            ssl=self._tls,
            server_hostname=self._server_name if self._tls else None,
        )
        return connection

    def request(self, path: bytes, body: bytes, extra: bytes) -> bytes:
        """The bytes of one POST; `extra` are whole further header lines."""
        return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path, self._head, extra, len(body), body)

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
