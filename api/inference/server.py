"""The way of `/v1` from the socket to the hot path: uvicorn's HTTP/1.1 protocol with a shortcut.

Start the API with `--http api.inference.server:HttpProtocol`. uvicorn then parses, times out, drains and supervises as
ever, and every path but `/v1` goes through ASGI to FastAPI. A `/v1` request becomes an `Exchange` that writes to the
transport itself: no scope, no receive and send, no queue between them, which together cost more than the rest of a
request (docs/performance.md, docs/decisions/0010-the-socket-and-the-hot-path.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

log = logging.getLogger("crosslogic.server")

PREFIX = b"/v1/"
# After SIGTERM a kept-alive connection may still carry a request that its client has just sent: it is answered, with
# `connection: close`. One that stays silent for so long, or for this share of the grace time, is closed: the longer,
# the fewer clients send their next request at the very moment.
LINGER_S = 5.0
LINGER_SHARE = 0.25
# Behind an early answer the rest of the body is read away, for closing at once would reset the connection and the
# answer might never be read: until the client is silent for so long, and for so long in all (nginx has 5 and 30 s).
UNWANTED_BODY_PAUSE_S = 2.0
UNWANTED_BODY_S = 30.0
# What a client may send of a body beyond what its handler has asked for.
UNASKED_BODY_BYTES = 64 * 1024
# More than any sane client sends; the parser itself knows no bound.
LONGEST_HEADERS_BYTES = 64 * 1024

# Takes a request as far as it goes at once, and sees to the rest. Must not raise.
Handle = Callable[["Exchange"], None]

_CLOSE = b"connection: close\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BodyTooLarge(Exception):
    """The body is larger than the reader allows."""


class _NoMoreRequests(Exception):
    """A request behind one whose answer ends the connection; its client asks again elsewhere (RFC 9112, 9.6)."""


class Exchange:
    """One `/v1` request and its answer. `on_gone` is called once if the client hangs up before the answer is whole."""

    # Attributes that uvicorn's protocol looks at on whatever is its current cycle.
    __slots__ = (
        "_body",
        "_body_bytes",
        "_head",
        "_is_chunked",
        "_most_body_bytes",
        "_protocol",
        "_waiter",
        "content_length",
        "disconnected",
        "headers",
        "is_complete",
        "is_expecting",
        "is_paused",
        "keep_alive",
        "method",
        "more_body",
        "on_gone",
        "on_pause",
        "on_resume",
        "path",
        "query",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        protocol: HttpProtocol,
        method: bytes,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        *,
        keep_alive: bool,
        is_expecting: bool,
        is_chunked: bool,
    ) -> None:
        self._protocol = protocol
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.keep_alive = keep_alive
        self.is_expecting = is_expecting
        self.on_gone: Callable[[], None] | None = None
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.more_body = True
        self.is_paused = False
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._most_body_bytes = UNASKED_BODY_BYTES
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""
        # HTTP/1.0 knows no chunks: the end of the connection is the end of the answer.
        self._is_chunked = is_chunked

    # The request

    async def read_body(self, most_bytes: int) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as more has come, ConnectionError when the client hangs up."""
        self._most_body_bytes = most_bytes
        while True:
            if self._body_bytes > most_bytes:
                raise BodyTooLarge
            if not self.more_body:
                return self.body
            if self.disconnected:
                raise ConnectionError("the client hung up before its request was complete")
            if self.is_expecting:
                self.is_expecting = False
                self._protocol.transport.write(_CONTINUE)
            self._protocol.flow.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            await self._waiter

    @property
    def body(self) -> bytes:
        """The body as far as it has come."""
        body = self._body
        return body[0] if len(body) == 1 else b"".join(body)

    def take_body(self, data: bytes) -> None:
        """Called by the protocol with a piece of the body."""
        if self.response_complete:
            self._protocol.heard()
            return
        self._body_bytes += len(data)
        if self._body_bytes > self._most_body_bytes:
            # Whoever reads decides what becomes of it; meanwhile nothing more is taken in.
            self._protocol.flow.pause_reading()
        self._body.append(data)
        self._wake()

    def end_body(self) -> None:
        """Called by the protocol at the end of the request."""
        self.more_body = False
        self._wake()

    def gone(self) -> None:
        """Called by the protocol when the client has hung up."""
        if self.disconnected or self.response_complete:
            return
        self.disconnected = True
        self._wake()
        if self.on_gone is not None:
            self.on_gone()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    # The answer

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """The whole answer. `headers` are complete lines."""
        protocol = self._protocol
        if self.disconnected or self.response_complete:
            return
        # What is left of a body that nobody wants is read away, and no further request is taken behind it.
        self.keep_alive = self.keep_alive and not self.more_body
        protocol.transport.write(
            b"%b%b%bcontent-length: %d\r\n%b\r\n%b"
            % (
                STATUS_LINE[status],
                protocol.default_lines(),
                headers,
                len(body),
                b"" if self.keep_alive else _CLOSE,
                b"" if self.method == b"HEAD" else body,
            )
        )
        self._complete()

    def begin(self, status: int, headers: bytes) -> None:
        """Begin an answer whose length is not known; the head leaves with the first write."""
        protocol = self._protocol
        self.response_started = True
        self._head = b"%b%b%b%b%b\r\n" % (
            STATUS_LINE[status],
            protocol.default_lines(),
            headers,
            _CHUNKED if self._is_chunked else b"",
            b"" if self.keep_alive else _CLOSE,
        )

    def write(self, data: bytes) -> None:
        """A piece of the answer, never empty. Where `is_paused` then holds, the client reads more slowly than this."""
        if self.disconnected or self.response_complete:
            return
        if self._is_chunked:
            data = b"%b%x\r\n%b\r\n" % (self._head, len(data), data)
        elif self._head:
            data = self._head + data
        self._head = b""
        self._protocol.transport.write(data)

    def end(self, data: bytes) -> None:
        """The last piece."""
        if self.disconnected or self.response_complete:
            return
        if self._is_chunked:
            data = b"%b%x\r\n%b\r\n0\r\n\r\n" % (self._head, len(data), data)
        elif self._head:
            data = self._head + data
        self._protocol.transport.write(data)
        self._complete()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Go on with this request in a task, which a shutdown waits for and at the end of its patience cancels."""
        protocol = self._protocol
        task = protocol.loop.create_task(work)
        protocol.tasks.add(task)
        task.add_done_callback(protocol.tasks.discard)

    def abort(self) -> None:
        """Break the connection: the answer cannot be completed."""
        self.keep_alive = False
        if not self._protocol.transport.is_closing():
            self._protocol.transport.abort()

    def _complete(self) -> None:
        self.response_complete = True
        self.on_gone = self.on_pause = self.on_resume = None
        # An idle connection keeps its last exchange, which must not be a large one.
        self._body.clear()
        self.headers.clear()
        self._protocol.completed(self)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol; `/v1` requests go to `app.inference`, everything else through ASGI."""

    # uvicorn drops the parser when the connection is lost, after which nothing is parsed.
    parser: Any
    app: Any

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # Any middleware that uvicorn wraps around the app is for ASGI; the hot path is found on the app itself.
        self._owner: Any = _innermost(self.app)
        self._running: Exchange | None = None
        # uvicorn's own cycle that was started last.
        self._asgi: Any = None
        self._header_bytes = 0
        self._kept_bytes = 0
        self._is_draining = False
        # When the last answer ended or the next request began, and how long the connection may be idle from then on.
        self._idle_since = 0.0
        self._idle_s = float(self.timeout_keep_alive)
        self._idle_timer: asyncio.TimerHandle | None = None
        self._read_away_until = 0.0
        self._defaults: list[tuple[bytes, bytes]] | None = None
        self._default_lines = b""
        # Accepted, and made a turn of the loop later: a shutdown in between must not miss it.
        self.connections.add(self)

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        self._be_idle_for(self._idle_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._cancel_idle_timer()
        running = self._running
        if running is not None:
            running.gone()
        cycle = cast(Any, self.cycle)
        if isinstance(cycle, Exchange):
            # Not one for uvicorn's own bookkeeping.
            cycle.gone()
            self.cycle = cast(Any, None)
        self.pipeline.clear()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn at SIGTERM: running requests end, and no further one begins after the next."""
        self._is_draining = True
        grace_s = self.config.timeout_graceful_shutdown
        linger_s = LINGER_S if grace_s is None else min(LINGER_S, LINGER_SHARE * grace_s)
        self._idle_s = min(self._idle_s, linger_s)
        if cast(Any, self.transport) is None:
            return
        cycle = cast(Any, self.cycle)
        # Where the head is out already its client believes that the connection stays, and may ask once more.
        if cycle is not None and not (cycle.response_started or cycle.response_complete):
            cycle.keep_alive = False
        self._be_idle_for(self._idle_s)

    def _be_idle_for(self, idle_s: float) -> None:
        """From now on, close when nothing runs and nothing comes for so long."""
        self._cancel_idle_timer()
        self._idle_s = idle_s
        self._idle_since = self.loop.time()
        self._idle_timer = self.loop.call_later(idle_s, self._close_idle)

    def _become_idle(self) -> None:
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self._idle_s, self._close_idle)

    def _close_idle(self) -> None:
        """One timer for many requests: it looks how long the connection has really been idle."""
        self._idle_timer = None
        if self.transport.is_closing():
            return
        left_s = self._idle_s
        cycle = cast(Any, self.cycle)
        if cycle is None or cycle.response_complete:
            left_s += self._idle_since - self.loop.time()
            if left_s <= 0.001:
                self.transport.close()
                return
        self._idle_timer = self.loop.call_later(left_s, self._close_idle)

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    # Requests come in

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._kept_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            cycle = cast(Any, self.cycle)
            # There is nothing to upgrade to: the request is answered as if it had not asked, and is the last one.
            cycle.keep_alive = False
            if isinstance(cycle, Exchange):
                cycle.end_body()
        except httptools.HttpParserError:
            self._refuse_framing()
            return
        if self._kept_bytes > LONGEST_HEADERS_BYTES:
            # The parser keeps a header, or a trailer, to itself until it has all of it.
            self._refuse_framing()
            return
        cycle = cast(Any, self.cycle)
        if isinstance(cycle, Exchange):
            self._start_if_due(cycle)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._header_bytes = 0
        self._idle_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self.url = self.url + url
        self._header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > LONGEST_HEADERS_BYTES:
            raise ValueError("endless headers")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._kept_bytes = 0
        existing = cast(Any, self.cycle)
        if existing is not None and not existing.keep_alive:
            raise _NoMoreRequests
        target, _, query = self.url.partition(b"?")
        if not target.startswith(b"/"):
            # The absolute form, which a proxy sends.
            target = httptools.parse_url(self.url).path or b"/"
        handle: Handle | None = self._owner.inference
        if not target.startswith(PREFIX) or handle is None:
            url, headers, is_expecting = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, is_expecting
            # The scope shares the list.
            self.headers.extend(headers)
            super().on_headers_complete()
            if self._is_draining and self.cycle is not existing:
                self.cycle.keep_alive = False
            return
        path = target.decode("ascii", "replace")
        is_http_1_1 = self.parser.get_http_version() == "1.1"
        exchange = Exchange(
            self,
            self.parser.get_method(),
            unquote(path) if "%" in path else path,
            query.partition(b"#")[0],
            self.headers,
            keep_alive=is_http_1_1 and not self._is_draining and self.parser.should_keep_alive(),
            is_expecting=is_http_1_1 and self.expect_100_continue,
            is_chunked=is_http_1_1,
        )
        # What comes behind a body in chunks are no headers of this request.
        self.headers = []
        self.cycle = cast(Any, exchange)
        if existing is not None and not existing.response_complete:
            # Pipelined: one after the other.
            self.flow.pause_reading()
            self.pipeline.appendleft((cast(Any, exchange), self.app))

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._kept_bytes = 0
        cycle = cast(Any, self.cycle)
        if isinstance(cycle, Exchange):
            cycle.take_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        cycle = cast(Any, self.cycle)
        if isinstance(cycle, Exchange):
            cycle.end_body()
            self._start_if_due(cycle)
        else:
            super().on_message_complete()

    def _start_if_due(self, exchange: Exchange) -> None:
        """Start it unless it runs, has run or waits for another: usually when all of it has come in one piece."""
        if self._running is None and not exchange.response_complete and not self.pipeline:
            self._start(exchange)
        elif exchange.response_complete and not exchange.more_body and not exchange.keep_alive:
            # Of what was not wanted all has been read away.
            self.transport.close()

    def _start(self, exchange: Exchange) -> None:
        self._running = exchange
        self._owner.inference(exchange)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Start what was parsed: uvicorn's own cycles, or an exchange that waited for its turn."""
        if isinstance(cycle, Exchange):
            self._start(cycle)
        else:
            self._asgi = cycle
            super()._start_asgi_task(cycle, app)

    # Answers go out

    def default_lines(self) -> bytes:
        """uvicorn's headers of every answer; their list is made anew once a second."""
        defaults = self.server_state.default_headers
        if defaults is not self._defaults:
            self._defaults = defaults
            self._default_lines = b"".join([b"%b: %b\r\n" % header for header in defaults])
        return self._default_lines

    def completed(self, exchange: Exchange) -> None:
        """Called by the exchange when its answer is written."""
        self._running = None
        if exchange.more_body:
            self._read_away()
            return
        if not exchange.keep_alive:
            self.transport.close()
            return
        if self.pipeline:
            self.on_response_complete()
            return
        self.server_state.total_requests += 1
        self._become_idle()

    def on_response_complete(self) -> None:
        """Called when an answer through ASGI is written, and where another request waits behind one of ours."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            # One timer for both ways.
            self._unset_keepalive_if_required()
            self._become_idle()

    def _read_away(self) -> None:
        """The answer is out and the body still comes: no more is said, and the rest is heard."""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._read_away_until = self.loop.time() + UNWANTED_BODY_S
        self._be_idle_for(UNWANTED_BODY_PAUSE_S)

    def heard(self) -> None:
        """Called by the exchange with each piece of a body that nobody wants."""
        now = self.loop.time()
        if now < self._read_away_until:
            self._idle_since = now

    def _refuse_framing(self) -> None:
        """What cannot be parsed has no request to answer: say so once, behind what came before, and close (H8)."""
        if self.transport.is_closing():
            return
        last = cast(Any, self.cycle)
        if last is not None and last.response_complete and not last.keep_alive:
            # It has had its answer.
            self.transport.close()
            return
        front: Any = self._running or self._asgi
        if front is not None and last is not None and not front.response_complete:
            if front is not last or not last.more_body:
                if last.more_body:
                    # The broken one waits for its turn, which it will not get.
                    self.pipeline.popleft()
                    self.cycle = last = self.pipeline[0][0] if self.pipeline else front
                last.keep_alive = False
                return
            if front.response_started:
                self.transport.abort()
                return
            if isinstance(front, Exchange):
                front.gone()
        self.send_400_response("Invalid HTTP request received.")

    def pause_writing(self) -> None:
        """Called by the loop: the client reads slowly."""
        super().pause_writing()
        running = self._running
        if running is not None:
            running.is_paused = True
            if running.on_pause is not None:
                running.on_pause()

    def resume_writing(self) -> None:
        """Called by the loop: the client has caught up."""
        super().resume_writing()
        running = self._running
        if running is not None:
            running.is_paused = False
            if running.on_resume is not None:
                running.on_resume()


def _innermost(app: Any) -> Any:
    """The app that has an `inference`, below whatever is wrapped around it."""
    while not hasattr(app, "inference") and hasattr(app, "app"):
        app = app.app
    if not hasattr(app, "inference"):
        raise TypeError("api.inference.server serves api.app; use uvicorn's own protocol for other apps")
    return app
