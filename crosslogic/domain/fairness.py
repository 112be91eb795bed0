"""Who is next when more is asked than can be served: fair between orgs, by tokens, and how long that will take.

Start-time fair queueing with equal weights (Goyal, Vin and Cheng, "Start-time Fair Queuing", 1996). Every flow has a
start tag: the virtual time at which its first waiting item may begin. The least start tag is served, virtual time moves
to it, and the flow's next item starts its cost later. So of two flows that wait all the time neither is ahead of the
other by more than one item, and a flow that comes late begins where the others are: it neither waits behind their
backlog nor gets back what it did not ask for earlier.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Flows that were served lately and wait for nothing; beyond so many, those that are not ahead any more are forgotten.
MOST_REMEMBERED = 1024

# How far back a drain looks: when so much has been watched, all of it counts half.
DRAIN_WINDOW_S = 10.0
# What a nominal rate weighs against what is observed.
NOMINAL_S = 1.0


class Ticket(Generic[K, T]):
    """A place in the queue. `cost` is above 0."""

    __slots__ = ("cost", "flow", "item")

    def __init__(self, flow: K, cost: int, item: T) -> None:
        self.flow = flow
        self.cost = cost
        self.item = item


class _Flow(Generic[K, T]):
    __slots__ = ("backlog", "entry", "key", "start", "tickets")

    def __init__(self, key: K, start: int) -> None:
        self.key = key
        self.start = start
        self.backlog = 0
        self.tickets: deque[Ticket[K, T]] = deque()
        # Number of the heap's entry that stands for it; others are left over from before.
        self.entry = -1


class FairQueue(Generic[K, T]):
    """Waiting items of many flows, in the order in which it is fair to serve them."""

    def __init__(self) -> None:
        self._flows: dict[K, _Flow[K, T]] = {}
        self._heap: list[tuple[int, int, _Flow[K, T]]] = []
        # Where flows that wait for nothing would go on, if that is ahead of virtual time.
        self._finished: dict[K, int] = {}
        self._now = 0
        self._number = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def backlog(self) -> int:
        """The cost of all that wait."""
        return sum(flow.backlog for flow in self._flows.values())

    def push(self, key: K, cost: int, item: T) -> Ticket[K, T]:
        """Wait in the flow of this key, behind its own items."""
        ticket = Ticket(key, cost, item)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key, max(self._now, self._finished.pop(key, 0)))
            self._enter(flow)
        flow.tickets.append(ticket)
        flow.backlog += cost
        self._length += 1
        return ticket

    def first(self) -> Ticket[K, T] | None:
        """The one to serve next; None when nobody waits."""
        heap = self._heap
        while heap:
            _, number, flow = heap[0]
            if number == flow.entry:
                return flow.tickets[0]
            heapq.heappop(heap)
        return None

    def pop(self) -> Ticket[K, T]:
        """Serve the first. Raises IndexError when nobody waits."""
        if self.first() is None:
            raise IndexError("nobody waits")
        _, _, flow = heapq.heappop(self._heap)
        ticket = flow.tickets.popleft()
        self._now = flow.start
        flow.start += ticket.cost
        self._left(flow, ticket)
        if flow.tickets:
            self._enter(flow)
        return ticket

    def remove(self, ticket: Ticket[K, T]) -> bool:
        """Leave without being served; False for one that waits no more. It costs its flow nothing."""
        flow = self._flows.get(ticket.flow)
        if flow is None or ticket not in flow.tickets:
            return False
        flow.tickets.remove(ticket)
        self._left(flow, ticket)
        return True

    def last(self, key: K) -> Ticket[K, T] | None:
        """The end of the longest backlog, to make room for an item of this flow; None where that one would be last."""
        start = self._next_start(key)
        last: Ticket[K, T] | None = None
        for flow in self._flows.values():
            ticket = flow.tickets[-1]
            if flow.start + flow.backlog - ticket.cost > start:
                start, last = flow.start + flow.backlog - ticket.cost, ticket
        return last

    def tokens_ahead(self, key: K, enough: float) -> int:
        """At least so much is served before an item that this flow pushed now; not counted on beyond `enough`."""
        own = self._flows.get(key)
        ahead = 0 if own is None else own.backlog
        start = self._next_start(key)
        for flow in self._flows.values():
            if ahead > enough:
                break
            if flow is not own and flow.start < start:
                ahead += min(flow.backlog, start - flow.start)
        return ahead

    def _next_start(self, key: K) -> int:
        flow = self._flows.get(key)
        return max(self._now, self._finished.get(key, 0)) if flow is None else flow.start + flow.backlog

    def _enter(self, flow: _Flow[K, T]) -> None:
        self._number += 1
        flow.entry = self._number
        heapq.heappush(self._heap, (flow.start, self._number, flow))

    def _left(self, flow: _Flow[K, T], ticket: Ticket[K, T]) -> None:
        flow.backlog -= ticket.cost
        self._length -= 1
        if not self._length:
            # Nobody waits, so nobody is owed anything.
            self._flows.clear()
            self._heap.clear()
            self._finished.clear()
            self._now = 0
            flow.entry = -1
        elif not flow.tickets:
            del self._flows[flow.key]
            flow.entry = -1
            if flow.start > self._now:
                self._finished[flow.key] = flow.start
                if len(self._finished) > MOST_REMEMBERED:
                    self._finished = {key: start for key, start in self._finished.items() if start > self._now}


class Drain:
    """How many tokens a second leave while others wait for their room.

    Only the time in which somebody waits counts; in any other, what leaves says nothing of what could. Times in seconds
    of one clock.
    """

    __slots__ = ("_at", "_seconds", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at: float | None = None

    def begin(self, now: float) -> None:
        """From now on somebody waits."""
        self._at = now

    def note(self, tokens: int, now: float) -> None:
        """So many tokens have left."""
        if self._at is None:
            return
        self._seconds += now - self._at
        self._at = now
        self._tokens += tokens
        if self._seconds > DRAIN_WINDOW_S:
            self._seconds /= 2
            self._tokens /= 2

    def end(self, now: float) -> None:
        """Nobody waits any more."""
        self.note(0, now)
        self._at = None

    def rate(self, nominal: float, now: float) -> float:
        """Tokens a second: what was observed, with `nominal` counting as one second of it."""
        seconds = self._seconds + (0.0 if self._at is None else now - self._at)
        return (self._tokens + nominal * NOMINAL_S) / (seconds + NOMINAL_S)
