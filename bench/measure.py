"""The measures: each loads one system once and turns what was seen into figures."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from bench.load import PACED_TOKENS, Bench, Run, percentile
from bench.systems import Running

CONNECTIONS = 32
RATES = (200, 1000)  # requests a second
# Above this share of what a system can do at most, its queue grows for ever and a latency means nothing.
MOST_UTILIZATION = 0.75
SHARES = (0.5, 0.99, 0.999)
IDLE_CONNECTIONS = 10_000
# Descriptors that a gateway and the load need besides those of idle connections.
SPARE_DESCRIPTORS = 2_000
OPEN_STREAMS = 1_000
OPEN_STREAM_PACE_MS = 200
OPEN_STREAM_TOKENS = 25
SOAK_STEP = 100_000

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long each window is, in seconds, and how long each load runs before it."""

    warm_s: float
    closed_s: float
    open_s: float
    stream_s: float
    rates: tuple[int, ...] = RATES


FULL = Lengths(warm_s=1.0, closed_s=5.0, open_s=10.0, stream_s=5.0)
QUICK = Lengths(warm_s=0.3, closed_s=1.5, open_s=1.5, stream_s=1.5, rates=(1000,))


@dataclass(slots=True)
class Window:
    """What a system's processes use between two calls. Its servers' use is kept beside it, not in it."""

    running: Running
    cpu_s: float = 0.0
    beside_s: dict[str, float] = field(default_factory=dict[str, float])
    wall_s: float = 0.0
    rss_mib: float = 0.0

    def begin(self) -> None:
        """The window opens."""
        self._move(-1)

    def end(self) -> None:
        """The window closes."""
        self._move(1)
        if self.running.program is not None:
            self.rss_mib = self.running.program.rss_bytes() / 2**20

    def _move(self, sign: int) -> None:
        self.wall_s += sign * time.perf_counter()
        if self.running.program is not None:
            self.cpu_s += sign * self.running.program.cpu_s()
        for name, program in self.running.beside.items():
            self.beside_s[name] = self.beside_s.get(name, 0.0) + sign * program.cpu_s()


def closed(running: Running, lengths: Lengths, connections: int = CONNECTIONS) -> tuple[Figures, Run]:
    """Whole answers in closed loop: CPU a request, and how many a second."""
    run, window = _load(running, lambda bench: bench.closed(connections, lengths.warm_s, lengths.closed_s))
    figures = {
        "cpu_us_per_request": _each(window.cpu_s, run.requests),
        "requests_per_s": run.requests / run.window_s,
        "core_share": window.cpu_s / window.wall_s,
        "closed_ms_p50": 1000 * percentile(run.latencies_s, 0.5),
        "closed_ms_p99": 1000 * percentile(run.latencies_s, 0.99),
        "rss_mib": window.rss_mib,
    }
    figures |= {f"{name}_cpu_us_per_request": _each(cpu_s, run.requests) for name, cpu_s in window.beside_s.items()}
    return figures, run


def opened(running: Running, lengths: Lengths, rate: int) -> tuple[Figures, Run]:
    """Whole answers at a fixed rate: latency from the moment each request was meant to be sent."""
    run, window = _load(running, lambda bench: bench.opened(rate, lengths.warm_s, lengths.open_s))
    figures = _tails(f"ms_at_{rate}_per_s", run.latencies_s)
    figures[f"cpu_us_per_request_at_{rate}_per_s"] = _each(window.cpu_s, run.requests)
    return figures, run


def streamed(running: Running, lengths: Lengths) -> tuple[Figures, Run]:
    """Paced streams: CPU an event, how long the first one took, and whether the pace was kept."""
    load = _load(
        running,
        lambda bench: bench.closed(running.streams, lengths.warm_s, lengths.stream_s, tokens=PACED_TOKENS),
    )
    run, window = load
    figures = _tails("first_token_ms", run.first_token_s)
    figures["cpu_us_per_event"] = _each(window.cpu_s, run.events)
    figures["events_per_stream_and_s"] = run.events / run.window_s / running.streams
    figures |= {f"{name}_cpu_us_per_event": _each(cpu_s, run.events) for name, cpu_s in window.beside_s.items()}
    return figures, run


def idle(running: Running, before_mib: float) -> tuple[Figures, Run]:
    """Many silent connections: memory of each beyond what there was before, and CPU while they are there."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(IDLE_CONNECTIONS, descriptors - SPARE_DESCRIPTORS)
    run, window = _load(running, lambda bench: bench.idle(connections))
    figures = {
        "idle_connections": float(connections),
        "idle_kib_each": 1024 * (window.rss_mib - before_mib) / connections,
        "idle_core_share": window.cpu_s / window.wall_s,
    }
    return figures, run


def open_streams(running: Running, before_mib: float) -> tuple[Figures, Run]:
    """Many slow streams at a time: memory of each beyond what there was before, and CPU an event."""
    run, window = _load(
        running,
        lambda bench: bench.closed(OPEN_STREAMS, 2.0, 5.0, tokens=OPEN_STREAM_TOKENS, pace_ms=OPEN_STREAM_PACE_MS),
    )
    figures = {
        "open_streams": float(OPEN_STREAMS),
        "open_stream_kib_each": 1024 * (window.rss_mib - before_mib) / OPEN_STREAMS,
        "open_stream_cpu_us_per_event": _each(window.cpu_s, run.events),
        "open_stream_first_token_ms_p99": 1000 * percentile(run.first_token_s, 0.99),
    }
    return figures, run


def soak(running: Running) -> tuple[Figures, Run]:
    """Some seconds of the closed loop, for what they leave in memory."""
    run, window = _load(running, lambda bench: bench.closed(CONNECTIONS, 0.0, 5.0))
    return {"rss_mib": window.rss_mib}, run


def background(systems: Sequence[Running], seconds: float = 2.0) -> float:
    """The share of a core that all systems together use while nobody asks them anything."""
    windows = [Window(running) for running in systems]
    for window in windows:
        window.begin()
    time.sleep(seconds)
    for window in windows:
        window.end()
    return sum(window.cpu_s / window.wall_s for window in windows)


def _load(running: Running, load: Callable[[Bench], Coroutine[Any, Any, Run]]) -> tuple[Run, Window]:
    window = Window(running)

    async def run() -> Run:
        return await load(Bench(running.target, window.begin, window.end))

    return uvloop.run(run()), window


def _tails(name: str, values: Sequence[float]) -> Figures:
    return {f"{name}_p{100 * share:g}": 1000 * percentile(values, share) for share in SHARES}


def _each(cpu_s: float, count: int) -> float:
    return 1e6 * cpu_s / count if count else float("nan")
