"""The load: raw HTTP/1.1 clients on one event loop, in closed and open loop, for whole and streamed answers.

Every answer is checked to its last byte before it is counted. In open loop a latency runs from the moment at which the
request was *meant* to be sent: a system that makes its clients wait is not spared what waited behind.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import httptools
import uvloop

from bench.engine import ANSWER_TOKENS

CONNECT_TIMEOUT_S = 10.0
# After the window: how long what is under way may take to end. What has not ended by then has failed.
DRAIN_S = 30.0
# Connections that an open loop may open when every one it has is busy.
MOST_CONNECTIONS = 512
PACED_TOKENS = 100
IDLE_AT_ONCE = 50

_now = time.perf_counter


@dataclass(frozen=True, slots=True)
class Target:
    """Where a system listens, and what of a request is particular to it."""

    port: int
    model: str = "llama-3-8b"
    path: str = "/v1/chat/completions"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    tls: ssl.SSLContext | None = None

    def whole(self) -> bytes:
        """A request that is answered at once."""
        return self._request(b'"max_tokens":64')

    def streamed(self, tokens: int, pace_ms: int = 0) -> bytes:
        """A request for a stream of so many tokens with usage at its end; 0: at the engine's own pace."""
        pace = b',"seed":%d' % pace_ms if pace_ms else b""
        return self._request(
            b'"max_tokens":%d,"stream":true,"stream_options":{"include_usage":true}%b' % (tokens, pace)
        )

    def _request(self, options: bytes) -> bytes:
        prompt = "Explain in one sentence what the control plane of an inference service is for."
        messages = json.dumps([{"role": "user", "content": prompt}], separators=(",", ":")).encode()
        body = b'{"model":"%b","messages":%b,"temperature":0.7,%b}' % (self.model.encode(), messages, options)
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return f"{head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(slots=True)
class Run:
    """What one load has measured. `answered` counts every complete answer, warm-up and drain included."""

    window_s: float = 0.0
    requests: int = 0  # in the window
    events: int = 0  # in the window, all streams together
    answered: int = 0
    completion_tokens: int = 0  # of all that were answered
    failed: int = 0
    first_failure: str = ""
    latencies_s: list[float] = field(default_factory=list[float])
    first_token_s: list[float] = field(default_factory=list[float])

    def fail(self, why: str) -> None:
        """Note a request that was not answered as it should."""
        self.failed += 1
        self.first_failure = self.first_failure or why


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-round(share * 1e6) * len(ordered) // 1_000_000) - 1))]


class Client(asyncio.Protocol):
    """One connection, with one request at a time."""

    __slots__ = (
        "_body",
        "_end",
        "_failed",
        "_parser",
        "_transport",
        "asked_at",
        "connected",
        "done",
        "events",
        "expected_events",
        "first_at",
        "is_busy",
        "is_open",
        "run",
    )

    def __init__(self, run: Run, done: Callable[[Client, float], None], *, expected_events: int = 0) -> None:
        self.run = run
        self.done = done
        # Of a stream: one for each token, and the last. 0: an answer that is not streamed.
        self.expected_events = expected_events
        self.connected = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.is_open = False
        self.is_busy = False
        self._begin(0.0)

    def _begin(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.first_at = 0.0
        self.events = 0
        self._body = b""
        self._end = b""
        self._failed = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self.connected.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self.is_open = False
        if self.is_busy:
            self._finish(f"connection lost: {exc or 'closed'}")

    def ask(self, request: bytes, asked_at: float) -> None:
        """Send a request; `asked_at` is when it was meant to be sent."""
        assert self._transport is not None
        self._begin(asked_at)
        self.is_busy = True
        self._transport.write(request)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"not HTTP: {error}")
            self.close()

    def on_body(self, body: bytes) -> None:
        """Called by the parser, with a piece of it."""
        if not self.expected_events:
            self._body = self._body + body if self._body else body
            return
        if not self.first_at:
            self.first_at = _now()
        # A blank line ends an event; it may be cut in two by a read.
        count = body.count(b"\n\n") + (self._end[-1:] == b"\n" != self._end[-2:-1] and body[:1] == b"\n")
        self.events += count
        self.run.events += count
        self._end = (self._end + body)[-64:]

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.is_open = False
        if status != 200:
            self._finish(f"status {status}: {(self._body or self._end)[:200]!r}")
        elif self.expected_events:
            is_whole = self.events >= self.expected_events and self._end.rstrip().endswith(b"data: [DONE]")
            self._finish("" if is_whole else f"{self.events} events, ending in {self._end[-40:]!r}")
        else:
            is_whole = b'"usage"' in self._body and b"completion_tokens" in self._body
            self._finish("" if is_whole else f"no usage in {self._body[:200]!r}")

    def _finish(self, failure: str) -> None:
        if not self.is_busy:
            return
        self.is_busy = False
        at = _now()
        if failure:
            self.run.fail(failure)
        else:
            self.run.answered += 1
            self.run.completion_tokens += self.expected_events or ANSWER_TOKENS
        self.done(self, -1.0 if failure else at)


class Bench:
    """Loads one target. `begin` and `end` are called where the window opens and closes."""

    def __init__(self, target: Target, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.target = target
        self._begin = begin
        self._end = end
        self._loop = asyncio.get_running_loop()

    async def _connect(
        self, run: Run, done: Callable[[Client, float], None], count: int, *, expected_events: int = 0
    ) -> list[Client]:
        return [await self._client(run, done, expected_events) for _ in range(count)]

    async def _client(self, run: Run, done: Callable[[Client, float], None], expected_events: int) -> Client:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, client = await self._loop.create_connection(
                lambda: Client(run, done, expected_events=expected_events),
                "127.0.0.1",
                self.target.port,
                ssl=self.target.tls,
                server_hostname="localhost" if self.target.tls else None,
            )
        return client

    async def closed(
        self, connections: int, warm_s: float, window_s: float, *, tokens: int = 0, pace_ms: int = 0
    ) -> Run:
        """Each connection asks again as soon as it has its answer; with `tokens`, for streams of that length."""
        run = Run()
        request = self.target.streamed(tokens, pace_ms) if tokens else self.target.whole()
        is_measuring = False
        is_over = False

        def done(client: Client, at: float) -> None:
            if is_measuring and at > 0:
                run.requests += 1
                run.latencies_s.append(at - client.asked_at)
                if client.first_at:
                    run.first_token_s.append(client.first_at - client.asked_at)
            if is_over:
                return
            if client.is_open:
                client.ask(request, _now())
            else:
                replace(client)

        def replace(client: Client) -> None:
            client.close()
            clients.remove(client)
            task = self._loop.create_task(again())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        async def again() -> None:
            try:
                client = await self._client(run, done, tokens)
            except OSError as error:
                run.fail(f"no connection: {error}")
                return
            clients.append(client)
            if not is_over:
                client.ask(request, _now())

        tasks: set[asyncio.Task[None]] = set()
        clients: list[Client] = []
        clients += await self._connect(run, done, connections, expected_events=tokens)
        for number, client in enumerate(list(clients)):
            client.ask(request, _now())
            if tokens and number % 8 == 7:
                # Streams that begin together would send together for ever.
                await asyncio.sleep((pace_ms or 5) / max(1, connections // 8) / 1000)
        await asyncio.sleep(warm_s)
        run.events = 0
        is_measuring = True
        self._begin()
        began = _now()
        await asyncio.sleep(window_s)
        run.window_s = _now() - began
        self._end()
        is_measuring = False
        is_over = True
        events = run.events
        await self._drain(run, clients)
        run.events = events
        return run

    async def opened(self, rate: int, warm_s: float, window_s: float) -> Run:
        """`rate` requests a second, evenly spaced, whatever becomes of the answers."""
        run = Run()
        request = self.target.whole()
        idle: deque[Client] = deque()
        waiting: deque[float] = deque()
        is_measuring = False

        def done(client: Client, at: float) -> None:
            if is_measuring and at > 0 and client.asked_at >= measured_from:
                run.requests += 1
                run.latencies_s.append(at - client.asked_at)
            if not client.is_open:
                clients.remove(client)
                client.close()
            elif waiting:
                client.ask(request, waiting.popleft())
            else:
                idle.append(client)

        def send(meant_at: float) -> None:
            while idle:
                client = idle.pop()
                if client.is_open:
                    client.ask(request, meant_at)
                    return
                clients.remove(client)
            waiting.append(meant_at)
            if len(clients) + len(tasks) < MOST_CONNECTIONS:
                task = self._loop.create_task(more())
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        async def more() -> None:
            try:
                client = await self._client(run, done, 0)
            except (OSError, TimeoutError) as error:
                run.fail(f"no connection: {error}")
                return
            clients.append(client)
            if waiting:
                client.ask(request, waiting.popleft())
            else:
                idle.append(client)

        tasks: set[asyncio.Task[None]] = set()
        clients = await self._connect(run, done, min(32, MOST_CONNECTIONS))
        idle.extend(clients)
        measured_from = _now() + warm_s
        with Ticker(rate, send):
            await asyncio.sleep(warm_s)
            is_measuring = True
            self._begin()
            began = _now()
            await asyncio.sleep(window_s)
            run.window_s = _now() - began
            self._end()
        await _until(lambda: not waiting, DRAIN_S)
        await self._drain(run, clients)
        for _ in waiting:
            run.fail("never sent: every connection was busy")
        return run

    async def idle(self, connections: int) -> Run:
        """Connections that ask once and then say nothing; the window lies where all of them are open and silent."""
        run = Run()
        request = self.target.whole()
        clients: list[Client] = []
        while len(clients) < connections:
            # Few at a time: what is measured is how many there are, not how fast they come.
            fresh = await asyncio.gather(*(self._client(run, _nothing, 0) for _ in range(IDLE_AT_ONCE)))
            for client in fresh:
                client.ask(request, _now())
            await _until(lambda asked=fresh: not any(client.is_busy for client in asked), DRAIN_S)
            clients += fresh
        self._begin()
        began = _now()
        await asyncio.sleep(1.0)
        run.window_s = _now() - began
        self._end()
        for client in clients:
            if not client.is_open:
                run.fail("an idle connection was closed")
        await self._drain(run, clients)
        return run

    async def _drain(self, run: Run, clients: Sequence[Client]) -> None:
        await _until(lambda: not any(client.is_busy for client in clients), DRAIN_S)
        for client in clients:
            if client.is_busy:
                client.is_busy = False
                run.fail(f"no end within {DRAIN_S:.0f} s")
            client.close()


def _nothing(client: Client, at: float) -> None:
    """Nothing follows an answer."""


async def _until(is_so: Callable[[], bool], within_s: float) -> None:
    """Return when it is so, or when the time is over."""
    deadline = _now() + within_s
    while True:
        if is_so() or _now() > deadline:
            return
        await asyncio.sleep(0.005)


class _Moment(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Interval(ctypes.Structure):
    _fields_ = (("every", _Moment), ("first", _Moment))


class Ticker:
    """Calls `send(meant_at)` so many times a second, by a timer of the kernel: an event loop's own has 1 ms steps."""

    _CLOCK_MONOTONIC = 1  # What perf_counter reads, too.
    _NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, rate: int, send: Callable[[float], None]) -> None:
        self._every_ns = 1_000_000_000 // rate
        self._send = send
        self._meant_at = 0.0
        self._descriptor = -1

    def __enter__(self) -> Ticker:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.timerfd_create(self._CLOCK_MONOTONIC, self._NONBLOCK)
        every = _Moment(self._every_ns // 1_000_000_000, self._every_ns % 1_000_000_000)
        self._meant_at = _now()
        if self._descriptor < 0 or libc.timerfd_settime(
            self._descriptor, 0, ctypes.byref(_Interval(every, every)), None
        ):
            raise OSError(ctypes.get_errno(), "timerfd")
        asyncio.get_running_loop().add_reader(self._descriptor, self._tick)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _tick(self) -> None:
        try:
            expired = int.from_bytes(os.read(self._descriptor, 8), sys.byteorder)
        except BlockingIOError:
            return
        for _ in range(expired):
            self._meant_at += self._every_ns / 1e9
            self._send(self._meant_at)


def summary(run: Run) -> dict[str, object]:
    """A run as JSON, latencies in milliseconds."""
    told = asdict(run)
    for name in ("latencies_s", "first_token_s"):
        values = cast("list[float]", told.pop(name))
        label = name.removesuffix("_s").replace("latencies", "latency")
        for share in (0.5, 0.9, 0.99, 0.999):
            if values:
                told[f"{label}_ms_p{100 * share:g}"] = round(1000 * percentile(values, share), 3)
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    """Load one address and print what was measured as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--key", default="", help="sent as bearer token")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=int, default=0, metavar="N", help="open loop with N requests a second")
    parser.add_argument("--stream", type=int, default=0, metavar="TOKENS", help="streams of so many tokens")
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args(arguments)
    headers = {"Authorization": f"Bearer {given.key}"} if given.key else {}
    target = Target(given.port, given.model, headers=headers)

    async def load() -> Run:
        bench = Bench(target, lambda: None, lambda: None)
        if given.rate:
            return await bench.opened(given.rate, 0.5, given.seconds)
        return await bench.closed(given.connections, 0.5, given.seconds, tokens=given.stream)

    print(json.dumps(summary(uvloop.run(load())), indent=1))


if __name__ == "__main__":
    main()
