"""Admission, between the limits and the choice of a node: where a request runs, and when: now, queued, or never.

A pool has room while the tokens in flight there are below its capacity. Of that, serverless requests leave free what
reservations hold and do not use; reserved ones may use all of it and go before everybody else. Who finds no room waits
in the pool's queue, which is fair between orgs, and is shed as soon as its wait must become too long. How a region that
has lost its nodes hands on its requests is decided in crosslogic.domain.spill.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from api.inference.router import Pool, RouteTable
from api.inference.upstream import ClientGone
from crosslogic.domain.catalog import Catalog
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.fairness import Drain, FairQueue, Ticket
from crosslogic.domain.regions import RegionPlan
from crosslogic.domain.spill import Loss, may_relieve

# Where nobody has measured it yet: how long a node takes to come up, told as Retry-After.
USUAL_LEAD_TIME_S = 60.0
# A pool that others wait for is looked at so often besides, for what it does not tell: that it is lost, or back, or
# that another region has room now.
LOOK_INTERVAL_S = 0.1
# What nobody can foretell further than that.
LONGEST_RETRY_AFTER_S = 60.0


class Asked:
    """What a request asks for: `tokens` is the work that it may become, `deadline_at` is on the loop's clock."""

    __slots__ = ("deadline_at", "is_counted", "is_reserved", "model", "org_id", "plan", "tokens")

    def __init__(
        self, org_id: UUID, model: str, plan: RegionPlan, tokens: int, is_reserved: bool, deadline_at: float
    ) -> None:
        self.org_id = org_id
        self.model = model
        self.plan = plan
        self.tokens = tokens
        self.is_reserved = is_reserved
        self.deadline_at = deadline_at
        # In the traffic of a lost region: once, however often it is asked about.
        self.is_counted = False


class Waiting(NamedTuple):
    """What waits for the pool of one model in one region; held requests found no node there at all."""

    queued_requests: int
    queued_tokens: int
    entering_tokens: int
    held_requests: int


class Place:
    """A request's place in a pool, from its admission until it `leave`s.

    Its tokens are counted here until a node has taken them over and `taken` is called. `is_reserved` says whether it
    uses capacity that its org holds there.
    """

    __slots__ = ("_gate", "_is_entering", "asked", "is_reserved", "pool", "region")

    def __init__(self, asked: Asked, gate: _Gate, pool: Pool, is_reserved: bool) -> None:
        self.asked = asked
        self.pool = pool
        self.region = gate.region
        self.is_reserved = is_reserved
        self._gate: _Gate | None = gate
        self._is_entering = True
        gate.entering += asked.tokens
        if is_reserved:
            gate.reserved_tokens += asked.tokens

    def taken(self) -> None:
        """Its tokens are in flight on a node now."""
        if self._is_entering and self._gate is not None:
            self._is_entering = False
            self._gate.entering -= self.asked.tokens

    def leave(self) -> None:
        """It has ended, in whichever way: to be called in the same turn as the node gives its tokens back."""
        gate, self._gate = self._gate, None
        if gate is None:
            return
        if self._is_entering:
            gate.entering -= self.asked.tokens
        if self.is_reserved:
            gate.reserved_tokens -= self.asked.tokens
        if gate.waiting:
            gate.left(0 if self.is_reserved else self.asked.tokens)


class _Waiter:
    """A request in a queue; its future becomes a place, None (decide anew) or an error."""

    __slots__ = ("asked", "future", "gate", "is_reserved", "ticket")

    def __init__(self, asked: Asked, gate: _Gate, future: asyncio.Future[Place | None], is_reserved: bool) -> None:
        self.asked = asked
        self.gate = gate
        self.future = future
        self.is_reserved = is_reserved
        self.ticket = gate.queue(is_reserved).push(asked.org_id, asked.tokens, self)

    def end(self, outcome: Place | CrossLogicError | ClientGone | None) -> None:
        """Leave the queue with this outcome."""
        self.gate.remove(self)
        if self.future.done():
            # Cancelled in this very turn: nobody takes the place.
            if isinstance(outcome, Place):
                outcome.leave()
        elif isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    def client_gone(self, _: asyncio.Future[None]) -> None:
        """Nobody waits for the answer any more."""
        self.end(ClientGone())


_Queue = FairQueue[UUID, _Waiter]


class _Gate:
    """What is admitted to the pool of one model in one region, and who waits for it."""

    __slots__ = (
        "_admission",
        "_is_waking",
        "_timer",
        "_was_routable",
        "drain",
        "entering",
        "held",
        "held_tokens",
        "loss",
        "model",
        "pool",
        "region",
        "reserved",
        "reserved_tokens",
        "serverless",
        "strayed",
        "waiting",
        "waiting_reserved",
    )

    def __init__(self, admission: Admission, model: str, region: str) -> None:
        self._admission = admission
        self.model = model
        self.region = region
        self.pool: Pool | None = None
        # What all processes together must leave to reservations.
        self.held_tokens = 0.0
        # Admitted, but on no node yet; and what is in flight of reserved requests, wherever they run.
        self.entering = 0
        self.reserved_tokens = 0
        # Requests that wait, at home, for a first node; and those that have gone elsewhere since somebody looked.
        self.held = 0
        self.strayed = 0
        self.loss: Loss | None = None
        self.drain = Drain()
        self.reserved: _Queue = FairQueue()
        self.serverless: _Queue = FairQueue()
        self.waiting = 0
        self.waiting_reserved = 0
        self._is_waking = False
        self._was_routable = False
        self._timer: asyncio.TimerHandle | None = None

    # Room

    def routable(self) -> Pool | None:
        """The pool, if a request can be started there."""
        pool = self.pool
        if pool is None:
            pool = self.pool = self._admission.table.pool(self.model, self.region)
        return pool if pool is not None and pool.routable_count else None

    def has_room(self, pool: Pool, tokens: int, is_reserved: bool) -> bool:
        """May so much more be in flight? A request that is larger than all there is may have it alone."""
        capacity = float(pool.capacity_tokens)
        if not capacity:
            return True
        processes = self._admission.processes()
        used = pool.tokens_in_flight + self.entering
        if is_reserved:
            capacity /= processes
        else:
            reserved, held = self.reserved_tokens, self.held_tokens / processes
            capacity = capacity / processes - (held if held > reserved else reserved)
            used -= reserved
            if capacity <= 0:
                return False
        return used + (tokens if tokens < capacity else capacity) <= capacity

    def serverless_share(self) -> tuple[float, float]:
        """What serverless requests may have in flight, and have. The share is infinite where no bound is known."""
        pool = self.pool
        if pool is None or not pool.capacity_tokens:
            return math.inf, 0.0
        processes = self._admission.processes()
        share = pool.capacity_tokens / processes - max(self.held_tokens / processes, self.reserved_tokens)
        return max(0.0, share), pool.tokens_in_flight + self.entering - self.reserved_tokens

    @property
    def load(self) -> float:
        """Which part of the serverless share is in use; 0 where no bound is known."""
        share, used = self.serverless_share()
        return used / share if share else math.inf

    def wait_s(self, asked: Asked, patience_s: float) -> float:
        """How long a serverless request that came now would wait, by what leaves and who is served before it.

        Not counted on much beyond the patience, since it is in vain there.
        """
        share, used = self.serverless_share()
        if share == math.inf:
            return 0.0
        now = self._admission.now()
        rate = self.drain.rate(share / self._admission.full_load_s, now)
        if not rate:
            return math.inf
        missing = min(asked.tokens, share) - max(0.0, share - used)
        return (self.serverless.tokens_ahead(asked.org_id, rate * patience_s - missing) + missing) / rate

    # Waiting

    def queue(self, is_reserved: bool) -> _Queue:
        """Where requests of that rank wait."""
        return self.reserved if is_reserved else self.serverless

    def recount(self) -> None:
        """Somebody has come or gone: the first one starts what wakes the others, the last one ends it."""
        waiting = len(self.reserved) + len(self.serverless)
        if waiting and not self.waiting:
            self._was_routable = self.routable() is not None
            if self.pool is not None:
                self.pool.on_room = self.wake
            self.drain.begin(self._admission.now())
            self._look_later()
        elif self.waiting and not waiting:
            if self.pool is not None:
                self.pool.on_room = None
            self.drain.end(self._admission.now())
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        self.waiting = waiting
        self.waiting_reserved = len(self.reserved)

    def remove(self, waiter: _Waiter) -> None:
        """Take one out of its queue, if it still is in it; whoever was behind it may be next."""
        if self.queue(waiter.is_reserved).remove(waiter.ticket):
            self.recount()
            if self.waiting:
                self.wake()

    def left(self, tokens: int) -> None:
        """A request has ended that held so many serverless tokens, and others wait."""
        self.drain.note(tokens, self._admission.now())
        self.wake()

    def wake(self) -> None:
        """Serve those who wait, at the end of this turn: only then all of what has ended is counted."""
        if not self._is_waking:
            self._is_waking = True
            self._admission.loop.call_soon(self._serve)

    def _look_later(self) -> None:
        self._timer = self._admission.loop.call_later(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        self._look_later()
        self._serve()

    def _serve(self) -> None:
        self._is_waking = False
        if not self.waiting:
            return
        pool = self.routable()
        if (pool is not None) != self._was_routable:
            # Lost, or back: what was decided for them holds no more.
            self._was_routable = pool is not None
            for queue in (self.reserved, self.serverless):
                while (ticket := queue.first()) is not None:
                    ticket.item.end(None)
            return
        for queue in (self.reserved, self.serverless):
            while (ticket := queue.first()) is not None:
                place = self._admission.place_waiting(ticket.item, self, pool)
                if place is None:
                    return
                queue.pop()
                self.recount()
                ticket.item.end(place)


class Admission:
    """Decides for every request of this process. `catalog` is set, and set anew, by whoever reads it."""

    def __init__(
        self,
        table: RouteTable,
        *,
        queue_s: float,
        queue_most: int,
        hold_s: float,
        full_load_s: float,
        processes: Callable[[], int] = lambda: 1,
        eta_s: Callable[[str, str], float] = lambda model, region: USUAL_LEAD_TIME_S,
        on_shed: Callable[[str, str], None] = lambda model, region: None,
    ) -> None:
        """`full_load_s` is the horizon of the pools' capacity, `processes` how many share them, `eta_s` how long until
        a model (the first argument) has a node in a region (the second); `on_shed` is told both.
        """
        self.table = table
        self.full_load_s = full_load_s
        self.processes = processes
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.shed = 0
        self.spilled = 0
        self._queue_s = queue_s
        self._queue_most = queue_most
        self._hold_s = hold_s
        self._eta_s = eta_s
        self._on_shed = on_shed
        self._gates: dict[tuple[str, str], _Gate] = {}
        # Where there are always nodes, and where there are some when they are asked for.
        self._promised: frozenset[tuple[str, str]] = frozenset()
        self._on_demand: frozenset[tuple[str, str]] = frozenset()
        self._catalog: Catalog | None = None

    @property
    def catalog(self) -> Catalog | None:
        """What is promised and reserved; None before the first reading."""
        return self._catalog

    @catalog.setter
    def catalog(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._promised = frozenset(
            (deployment.model, target.region)
            for deployment in catalog.deployments.values()
            for target in deployment.regions
            if target.replicas_min > 0
        )
        self._on_demand = frozenset(
            (deployment.model, target.region)
            for deployment in catalog.deployments.values()
            for target in deployment.regions
            if target.replicas_max > 0
        ).difference(self._promised)
        for gate in self._gates.values():
            self._set_held(gate)

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return sum(gate.waiting for gate in self._gates.values())

    @property
    def queues(self) -> dict[tuple[str, str], int]:
        """How many requests wait, by model and region."""
        return {place: gate.waiting for place, gate in self._gates.items()}

    def demand(self) -> dict[tuple[str, str], Waiting]:
        """What waits now, by model and region; requests that strayed are told once."""
        found: dict[tuple[str, str], Waiting] = {}
        for place, gate in self._gates.items():
            tokens = gate.reserved.backlog + gate.serverless.backlog if gate.waiting else 0
            # Without a node there, whoever queues waits for a first one, too.
            held = gate.held + gate.strayed + (gate.waiting if gate.routable() is None else 0)
            found[place] = Waiting(gate.waiting, tokens, gate.entering, held)
            gate.strayed = 0
        return found

    # Entering

    def enter_now(self, asked: Asked) -> Place | None:
        """A place, if there is one at once; None if it is `enter` that has to find one."""
        gate = self._gates.get((asked.model, asked.plan.home)) or self._gate(asked.model, asked.plan.home)
        pool = gate.pool
        if pool is None or not pool.routable_count:
            return self._elsewhere(asked, gate)
        is_reserved = asked.is_reserved
        # Nobody overtakes those of the same rank.
        if gate.waiting_reserved if is_reserved else gate.waiting:
            return None
        if gate.has_room(pool, asked.tokens, is_reserved):
            return Place(asked, gate, pool, is_reserved)
        return None if is_reserved else self._relieve(asked, gate)

    async def enter(self, asked: Asked, gone: asyncio.Future[None]) -> Place:
        """A place, as soon as there is one. `gone` is done when the client has hung up.

        Raises Rejected 429 `overloaded`, Unavailable `model_unavailable` or `region_lost`, or ClientGone.
        """
        came_at = self.now()
        queue_until = min(came_at + self._queue_s, asked.deadline_at)
        hold_until = min(came_at + self._hold_s, asked.deadline_at)
        while True:
            if gone.done():
                raise ClientGone
            place = self.enter_now(asked)
            if place is None:
                gate = self._gate_for(asked)
                if gate is None:
                    await self._hold(asked, gone, hold_until)
                    queue_until = min(self.now() + self._queue_s, asked.deadline_at)
                    continue
                place = await self._queue(asked, gate, gone, queue_until)
            if place is not None:
                return place

    def next_region(self, place: Place, tried: Sequence[Any]) -> Place | None:
        """The place for another try after these nodes have failed; None where there is none.

        It is the same one while its region has a node that was not tried; otherwise that one is left, for the first
        region in the plan's order that has such a node and may take the request.
        """
        asked = place.asked
        for region in asked.plan.candidates:
            gate = self._gate(asked.model, region)
            pool = gate.routable()
            if pool is None or not _has_untried(pool, tried):
                continue
            if region == place.region:
                return place
            if gate.waiting or not gate.has_room(pool, asked.tokens, False):
                continue
            if region != asked.plan.home and place.region == asked.plan.home:
                home = self._gate(asked.model, place.region)
                loss = None if home.routable() is not None else self._loss(home)
                if not (may_relieve(gate.load) if loss is None else self._may_spill(loss, gate)):
                    continue
            place.leave()
            return Place(asked, gate, pool, False)
        return None

    def place_waiting(self, waiter: _Waiter, gate: _Gate, pool: Pool | None) -> Place | None:
        """A place for the first in a gate's queue, there (in this pool, if it is routable) or elsewhere."""
        asked = waiter.asked
        if pool is None:
            loss = self._loss(gate)
            return None if loss is None else self._spill(asked, gate, loss)
        if gate.has_room(pool, asked.tokens, waiter.is_reserved):
            return Place(asked, gate, pool, waiter.is_reserved)
        return None if waiter.is_reserved else self._relieve(asked, gate)

    # Where

    def _gate(self, model: str, region: str) -> _Gate:
        gate = self._gates.get((model, region))
        if gate is None:
            gate = self._gates[(model, region)] = _Gate(self, model, region)
            self._set_held(gate)
        return gate

    def _set_held(self, gate: _Gate) -> None:
        if self._catalog is not None:
            units = self._catalog.reserved_units.get((gate.model, gate.region), 0)
            gate.held_tokens = units * self.full_load_s

    def _gate_for(self, asked: Asked) -> _Gate | None:
        """Where it waits: at home, or if home never had the model, in the first region that has; None: nowhere yet."""
        home = self._gate(asked.model, asked.plan.home)
        found = [gate for gate in self._candidates(asked) if gate.routable() is not None]
        if not found or found[0] is home or self._loss(home) is None:
            return found[0] if found else None
        return home

    def _candidates(self, asked: Asked) -> list[_Gate]:
        return [self._gate(asked.model, region) for region in asked.plan.candidates]

    def _elsewhere(self, asked: Asked, home: _Gate) -> Place | None:
        """A place for a request whose home has no node, as far as this process has looked."""
        pool = home.routable()
        if pool is not None:
            return self.enter_now(asked)
        loss = self._loss(home)
        if loss is not None:
            if not asked.is_counted:
                asked.is_counted = True
                loss.arrived += 1
            if home.waiting_reserved if asked.is_reserved else home.waiting:
                return None
            return self._spill(asked, home, loss)
        for gate in self._candidates(asked):
            pool = gate.routable()
            if pool is not None:
                if not asked.is_counted:
                    asked.is_counted = True
                    home.strayed += 1
                if gate.waiting:
                    return None
                if gate.has_room(pool, asked.tokens, False):
                    return Place(asked, gate, pool, False)
                return self._relieve(asked, gate)
        return None

    def _loss(self, gate: _Gate) -> Loss | None:
        """What is known of the loss of a region that has no node.

        None if it never had one, nor is promised any, or if it may be without one while nobody asks.
        """
        lost_at = None if gate.pool is None else gate.pool.lost_at
        if (gate.model, gate.region) in self._on_demand:
            return None
        if lost_at is None and (gate.model, gate.region) not in self._promised:
            return None
        if gate.loss is None or (lost_at is not None and gate.loss.at != lost_at):
            gate.loss = Loss(self.now() if lost_at is None else lost_at)
        return gate.loss

    def _spill(self, asked: Asked, home: _Gate, loss: Loss) -> Place | None:
        for gate in self._candidates(asked):
            pool = gate.routable()
            # What it holds at home it does not hold there.
            if pool is None or gate is home or gate.waiting or not gate.has_room(pool, asked.tokens, False):
                continue
            return Place(asked, gate, pool, False) if self._may_spill(loss, gate) else None
        return None

    def _may_spill(self, loss: Loss, gate: _Gate) -> bool:
        if not loss.may_spill(self.now(), gate.load, self.processes()):
            return False
        loss.spilled += 1
        self.spilled += 1
        return True

    def _relieve(self, asked: Asked, full: _Gate) -> Place | None:
        """A place in the next region behind one that is full, if that one has plenty."""
        regions = asked.plan.candidates
        for region in regions[regions.index(full.region) + 1 :]:
            gate = self._gate(asked.model, region)
            pool = gate.routable()
            if pool is not None:
                if gate.waiting or not may_relieve(gate.load) or not gate.has_room(pool, asked.tokens, False):
                    return None
                self.spilled += 1
                return Place(asked, gate, pool, False)
        return None

    # When

    async def _queue(self, asked: Asked, gate: _Gate, gone: asyncio.Future[None], until: float) -> Place | None:
        """Wait for a place; None when it is to be decided anew."""
        is_reserved = asked.is_reserved and gate.region == asked.plan.home
        patience_s = until - self.now()
        if patience_s <= 0:
            return self._give_up(asked, gate, is_reserved)
        if not is_reserved:
            if gate.routable() is not None and (wait_s := gate.wait_s(asked, patience_s)) > patience_s:
                raise self._overloaded(gate, wait_s)
            self._make_room(asked, gate)
        future: asyncio.Future[Place | None] = self.loop.create_future()
        waiter = _Waiter(asked, gate, future, is_reserved)
        gate.recount()
        timer = self.loop.call_at(until, self._expire, waiter)
        gone.add_done_callback(waiter.client_gone)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                place = future.result()
                if place is not None:
                    place.leave()
            raise
        finally:
            gone.remove_done_callback(waiter.client_gone)
            timer.cancel()
            gate.remove(waiter)

    def _make_room(self, asked: Asked, gate: _Gate) -> None:
        """Where the queue is full, the end of the longest backlog goes; raises Rejected if that is the request."""
        if len(gate.serverless) < self._queue_most:
            return
        last: Ticket[UUID, _Waiter] | None = gate.serverless.last(asked.org_id)
        loser = asked if last is None else last.item.asked
        error = self._give_up_error(loser, gate)
        if last is None:
            raise error
        last.item.end(error)

    def _expire(self, waiter: _Waiter) -> None:
        # Before it is told when to come again: then it does not wait behind itself.
        waiter.gate.remove(waiter)
        try:
            waiter.end(self._give_up(waiter.asked, waiter.gate, waiter.is_reserved))
        except CrossLogicError as error:
            waiter.end(error)

    def _give_up(self, asked: Asked, gate: _Gate, is_reserved: bool) -> Place:
        """At the end of the patience: what is reserved is never shed while there is a node. Raises as `enter` does."""
        pool = gate.routable()
        if is_reserved and pool is not None:
            return Place(asked, gate, pool, True)
        raise self._give_up_error(asked, gate)

    def _give_up_error(self, asked: Asked, gate: _Gate) -> CrossLogicError:
        if gate.routable() is not None:
            return self._overloaded(gate, gate.wait_s(asked, LONGEST_RETRY_AFTER_S))
        loss = self._loss(gate)
        eta_s = self._eta_s(asked.model, gate.region)
        more_in_s = 0.0 if loss is None else loss.first_ends_in_s(self.now())
        self.shed += 1
        self._on_shed(gate.model, gate.region)
        return Unavailable(
            f"{gate.region} has no node for {asked.model} now, and the next region cannot take more; try again when "
            "Retry-After has passed.",
            code="region_lost",
            retry_after_s=max(1.0, min(eta_s, more_in_s or eta_s)),
        )

    def _overloaded(self, gate: _Gate, wait_s: float) -> Rejected:
        self.shed += 1
        self._on_shed(gate.model, gate.region)
        retry_after_s = math.ceil(max(1.0, min(wait_s, LONGEST_RETRY_AFTER_S)))
        return Rejected(
            f"All capacity for {gate.model} in {gate.region} is in use. Try again in {retry_after_s} s.",
            status=429,
            code="overloaded",
            retry_after_s=retry_after_s,
        )

    async def _hold(self, asked: Asked, gone: asyncio.Future[None], until: float) -> None:
        """Wait until something changes, while a node is on its way. Raises Unavailable when none is, or it is late."""
        model, regions = asked.model, asked.plan.candidates
        left_s = until - self.now()
        if left_s <= 0 or not self._is_coming(model, regions):
            raise Unavailable(
                f"No node serves {model} in {', '.join(regions)} at the moment; try again when Retry-After has passed.",
                code="model_unavailable",
                retry_after_s=self._eta_s(model, asked.plan.home),
            )
        change = asyncio.ensure_future(self.table.next_change())
        home = self._gate(model, asked.plan.home)
        home.held += 1
        try:
            await asyncio.wait((change, gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            home.held -= 1
            change.cancel()

    def _is_coming(self, model: str, regions: Sequence[str]) -> bool:
        if self.table.is_any_on_the_way(model, regions) or self.table.is_any_routable(model, regions):
            return True
        return any((model, region) in self._promised or (model, region) in self._on_demand for region in regions)


def _has_untried(pool: Pool, tried: Sequence[Any]) -> bool:
    return any(node not in tried for node in pool.nodes) or any(node not in tried for node in pool.out)
