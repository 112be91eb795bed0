"""A fleet of nodes in virtual time: arrivals, continuous batching, nodes that come late and die early.

A node works off prompts and tokens at fixed rates, first come, first served: a request's first token comes when the
work before it and its own prompt are done, the rest of its tokens one after another while the node goes on. That is
chunked prefill with decode mixed in, seen from afar. The gateway hands a request to the node with the least work, and
keeps it in one queue while every node has more than `committed_s` of it.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

TRACE = Path(__file__).parent / "data" / "azure-llm-2023-code.csv"

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
# Requests an hour relative to the trace's own, by the hour of the day: a working day with a lunch break, and a night.
DAILY_PROFILE = (
    *(0.35, 0.25, 0.2, 0.2, 0.25, 0.4, 0.8, 1.5, 2.6, 3.4, 3.8, 3.6),
    *(3.0, 3.3, 3.9, 4.0, 3.7, 3.0, 2.2, 1.7, 1.4, 1.1, 0.8, 0.5),
)
# Once a day, at an hour that is drawn, everything is so many times as busy for so long.
CROWD_FACTOR, CROWD_S = 2.0, 900.0

# What routing counts a prompt's token as (docs/modules/scheduler.md).
PROMPT_TOKENS_PER_WORK = 10
BIN_S = 10.0


@dataclass(frozen=True)
class Machine:
    """One L4 with an 8B model, roughly: 2 500 prompt and 400 generated tokens/s, and what it costs as spot."""

    prompt_tokens_per_s: float = 2500.0
    tokens_per_s: float = 400.0
    token_s: float = 0.04  # Between two tokens of one stream.
    usd_per_h: float = 0.25
    committed_s: float = 2.0
    # From the order to the first request, lognormal; how long a spot machine lives, exponential.
    lead_s_p50: float = 240.0
    lead_sigma: float = 0.45
    life_s_mean: float = 8 * HOUR_S


@dataclass(frozen=True)
class Workload:
    """Requests by time: seconds from the start, prompt tokens, generated tokens."""

    at: list[float]
    prompt: list[int]
    generated: list[int]
    duration_s: float


def read_trace(path: Path = TRACE) -> list[tuple[float, int, int]]:
    """Azure's trace: seconds since its first request, prompt tokens, generated tokens."""
    with path.open(newline="") as file:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    first = rows[0][0]
    return [((at - first).total_seconds(), prompt, generated) for at, prompt, generated in rows]


def stretch(trace: Sequence[tuple[float, int, int]], days: float, seed: int) -> Workload:
    """The trace's hour, over and over, for days.

    Each hour is as many copies of the trace as the hour of the day is busier, each begun at another moment of it and
    one of them thinned, so that the bursts of the original stay as they are. A crowd adds copies of its own.
    """
    chance = random.Random(seed)
    length_s = trace[-1][0] + 1.0
    duration_s = days * DAY_S
    found: list[tuple[float, int, int]] = []

    def add(begin_s: float, end_s: float, factor: float) -> None:
        while factor > 0:
            share = min(1.0, factor)
            factor -= share
            shift = chance.uniform(0, length_s)
            for at, prompt, generated in trace:
                moment = begin_s + (at - shift) % length_s
                while moment < end_s:
                    if chance.random() < share:
                        found.append((moment, prompt, generated))
                    moment += length_s

    for hour in range(math.ceil(duration_s / HOUR_S)):
        add(hour * HOUR_S, min(duration_s, (hour + 1) * HOUR_S), DAILY_PROFILE[hour % 24])
    for day in range(math.ceil(days)):
        hour = chance.randrange(7, 20)
        begin_s = day * DAY_S + hour * HOUR_S + chance.uniform(0, HOUR_S - CROWD_S)
        add(begin_s, min(duration_s, begin_s + CROWD_S), (CROWD_FACTOR - 1) * DAILY_PROFILE[hour])
    found.sort()
    return Workload(
        [at for at, _, _ in found], [prompt for _, prompt, _ in found], [made for _, _, made in found], duration_s
    )


@dataclass(slots=True)
class Node:
    """A node of the model. `free_at` is when the work that it has been given is done."""

    number: int
    ordered_at: float
    ready_at: float
    dies_at: float
    is_ready: bool = False
    is_draining: bool = False
    free_at: float = 0.0
    # Of each request: when its first token comes, when its last one does, its work in tokens, and which it is.
    jobs: deque[tuple[float, float, float, int]] = field(default_factory=deque[tuple[float, float, float, int]])


@dataclass(frozen=True)
class Seen:
    """What a scaler may know at a tick."""

    now: float
    nodes: Sequence[Node]  # Ordered or ready, and not draining.
    requests_per_s: float
    arrival_tokens_per_s: float
    served_tokens_per_s: float
    tokens_in_flight: float
    queued_requests: int
    queued_tokens: float
    ttft_s_p50: float | None
    ttft_s_p99: float | None
    lead_s: Sequence[float]  # Of the nodes that have come so far.


@dataclass(frozen=True)
class Step:
    """So many nodes to order, and those to drain."""

    order: int = 0
    drain: Sequence[Node] = ()


class Scaler(Protocol):
    """A policy."""

    name: str
    tick_s: float
    is_instant: bool  # Its nodes come at once and never die: what only a clairvoyant has.

    def step(self, seen: Seen) -> Step:
        """What to do now."""
        ...


@dataclass
class Result:
    """What became of a workload under a policy. Times to first token are in seconds, by request."""

    name: str
    ttft_s: list[float]
    node_h: float
    usd: float
    deaths: int
    orders: int
    # (second, ready nodes) at every tick.
    ready: list[tuple[float, int]]

    def ttft_s_at(self, share: float) -> float:
        """A quantile of the time to first token."""
        return quantile(self.ttft_s, share)

    def attained(self, slo_s: float) -> float:
        """The share of requests whose first token came in time."""
        return sum(ttft <= slo_s for ttft in self.ttft_s) / len(self.ttft_s)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def simulate(workload: Workload, scaler: Scaler, machine: Machine, seed: int, start_nodes: int = 2) -> Result:
    """Serve the workload with this policy. The nth node of every policy has the same luck."""
    return _Fleet(workload, scaler, machine, seed).run(start_nodes)


class _Fleet:
    """One run: events are (time, order, what to do); arrivals come between them."""

    def __init__(self, workload: Workload, scaler: Scaler, machine: Machine, seed: int) -> None:
        self.load = workload
        self.scaler = scaler
        self.machine = machine
        self.seed = seed
        self.now = 0.0
        self.nodes: dict[int, Node] = {}
        self.ready: list[Node] = []
        self.queue: deque[int] = deque()
        self.queued_tokens = 0.0
        self.ttft = [math.inf] * len(workload.at)
        self.work = [
            prompt / PROMPT_TOKENS_PER_WORK + made
            for prompt, made in zip(workload.prompt, workload.generated, strict=True)
        ]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.sequence = 0
        self.look_at = math.inf
        bins = math.ceil(workload.duration_s / BIN_S) + 1
        self.arrived = [0.0] * bins
        self.arrivals = [0] * bins
        self.served = [0.0] * bins
        self.first_tokens: list[list[float]] = [[] for _ in range(bins)]
        self.made = self.deaths = 0
        self.paid_s = 0.0
        self.leads: list[float] = []
        self.history: list[tuple[float, int]] = []

    def run(self, start_nodes: int) -> Result:
        for _ in range(start_nodes):
            self._order(at_once=True)
        self._after(0.0, self._tick)
        for index, at in enumerate(self.load.at):
            self._advance(at)
            self.arrived[int(at / BIN_S)] += self.work[index]
            self.arrivals[int(at / BIN_S)] += 1
            if self.queue or not self._start(index):
                self.queue.append(index)
                self.queued_tokens += self.work[index]
                self._look_later()
        self._advance(self.load.duration_s)
        for node in list(self.nodes.values()):
            self._end(node, self.load.duration_s)
        # What still waits has waited at least so long.
        ttft = [
            self.load.duration_s - self.load.at[index] if value == math.inf else value
            for index, value in enumerate(self.ttft)
        ]
        node_h = self.paid_s / HOUR_S
        return Result(
            self.scaler.name, ttft, node_h, node_h * self.machine.usd_per_h, self.deaths, self.made, self.history
        )

    # Events

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (self.now + delay_s, self.sequence, act))

    def _advance(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, act = heapq.heappop(self.events)
            act()
        self.now = until

    def _tick(self) -> None:
        step = self.scaler.step(self._see())
        for _ in range(step.order):
            self._order(at_once=self.scaler.is_instant)
        for node in step.drain:
            self._drain(node)
        self.history.append((self.now, len(self.ready)))
        self._after(self.scaler.tick_s, self._tick)

    # Requests

    def _start(self, index: int) -> bool:
        """Give a request to the node with the least work; False while all have enough."""
        node = min(self.ready, key=_free_at, default=None)
        now = self.now
        if node is None or node.free_at - now > self.machine.committed_s:
            return False
        prompt, made = self.load.prompt[index], self.load.generated[index]
        begin = max(now, node.free_at)
        first = begin + prompt / self.machine.prompt_tokens_per_s + self.machine.token_s
        node.free_at = begin + prompt / self.machine.prompt_tokens_per_s + made / self.machine.tokens_per_s
        end = max(node.free_at, first + made * self.machine.token_s)
        jobs = node.jobs
        while jobs and jobs[0][1] <= now:
            jobs.popleft()
        jobs.append((first, end, self.work[index], index))
        self._note(first, end, index)
        return True

    def _note(self, first: float, end: float, index: int) -> None:
        if self.ttft[index] == math.inf or self.ttft[index] + self.load.at[index] > self.now:
            # Not given yet: it may have been promised by a node that died.
            self.ttft[index] = first - self.load.at[index]
            if (place := int(first / BIN_S)) < len(self.first_tokens):
                self.first_tokens[place].append(self.ttft[index])
        if (place := int(end / BIN_S)) < len(self.served):
            self.served[place] += self.work[index]

    def _look_later(self) -> None:
        """Look at the queue when the first node has room again."""
        free_at = min((node.free_at for node in self.ready), default=math.inf)
        at = max(self.now, free_at - self.machine.committed_s)
        if at < self.look_at:
            self.look_at = at
            self._after(at - self.now, self._serve_queue)

    def _serve_queue(self) -> None:
        self.look_at = math.inf
        while self.queue and self._start(self.queue[0]):
            self.queued_tokens -= self.work[self.queue.popleft()]
        if self.queue and self.ready:
            self._look_later()

    # Nodes

    def _order(self, *, at_once: bool) -> None:
        luck = random.Random(f"{self.seed}/{self.made}")
        lead_s = luck.lognormvariate(math.log(self.machine.lead_s_p50), self.machine.lead_sigma)
        life_s = luck.expovariate(1 / self.machine.life_s_mean)
        ready_at = self.now if at_once else self.now + lead_s
        dies_at = math.inf if self.scaler.is_instant else ready_at + life_s
        node = Node(self.made, self.now, ready_at, dies_at)
        self.made += 1
        self.nodes[node.number] = node
        if at_once:
            self._admit(node)
        else:
            self._after(lead_s, lambda: self._admit(node))

    def _admit(self, node: Node) -> None:
        if node.number not in self.nodes or node.is_draining:
            return
        node.is_ready = True
        node.free_at = self.now
        self.ready.append(node)
        if node.ready_at > node.ordered_at:
            self.leads.append(node.ready_at - node.ordered_at)
        if node.dies_at < math.inf:
            self._after(node.dies_at - self.now, lambda: self._die(node))
        self._serve_queue()

    def _drain(self, node: Node) -> None:
        node.is_draining = True
        if node in self.ready:
            self.ready.remove(node)
        self._end(node, max([self.now, *(end for _, end, _, _ in node.jobs)]))

    def _die(self, node: Node) -> None:
        """The cloud takes it: what it had not finished begins anew on others, before those who wait."""
        if node.number not in self.nodes:
            return
        self.deaths += 1
        self.ready.remove(node)
        self._end(node, self.now)
        for _, end, work, index in reversed(node.jobs):
            if end > self.now:
                self.queue.appendleft(index)
                self.queued_tokens += work
        self._serve_queue()

    def _end(self, node: Node, at: float) -> None:
        if self.nodes.pop(node.number, None) is not None:
            self.paid_s += min(at, self.load.duration_s) - node.ordered_at

    # What a scaler sees

    def _see(self) -> Seen:
        here = int(self.now / BIN_S)
        window = range(max(0, here - 6), here)
        seconds = max(1, len(window)) * BIN_S
        first_tokens = [ttft for place in window for ttft in self.first_tokens[place]]
        in_flight = sum(work for node in self.nodes.values() for _, end, work, _ in node.jobs if end > self.now)
        return Seen(
            now=self.now,
            nodes=[node for node in self.nodes.values() if not node.is_draining],
            requests_per_s=sum(self.arrivals[place] for place in window) / seconds,
            arrival_tokens_per_s=sum(self.arrived[place] for place in window) / seconds,
            served_tokens_per_s=sum(self.served[place] for place in window) / seconds,
            tokens_in_flight=in_flight,
            queued_requests=len(self.queue),
            queued_tokens=self.queued_tokens,
            ttft_s_p50=quantile(first_tokens, 0.5) if len(first_tokens) >= 20 else None,
            ttft_s_p99=quantile(first_tokens, 0.99) if len(first_tokens) >= 20 else None,
            lead_s=self.leads,
        )


def _free_at(node: Node) -> float:
    return node.free_at


def work_by_bin(workload: Workload, machine: Machine, bin_s: float) -> Iterator[float]:
    """How many seconds of one node's time arrive in each bin."""
    bins = [0.0] * math.ceil(workload.duration_s / bin_s)
    for at, prompt, made in zip(workload.at, workload.prompt, workload.generated, strict=True):
        bins[int(at / bin_s)] += prompt / machine.prompt_tokens_per_s + made / machine.tokens_per_s
    return iter(bins)
