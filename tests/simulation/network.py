"""The way from a worker process to what it calls, and everything that can go wrong on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import asyncpg
from temporalio.service import RPCError, RPCStatusCode

from crosslogic.domain.errors import Rejected, Unavailable
from tests.simulation.processes import Process


class Fault(Enum):
    """What may happen to one call."""

    REFUSED = "refused before it had an effect"
    LOST_REPLY = "had its effect, and the reply was lost"
    LATE = "arrived long after its caller had given up"
    SLOW = "was slow"
    KILL_BEFORE = "its process was killed before it was sent"
    KILL_AFTER = "had its effect, and its process was killed before the reply"
    STOP_BEFORE = "its process was stopped before it was sent, and went on much later"
    STOP_AFTER = "had its effect, and its process was stopped before the reply, and went on much later"


# For as long a zombie sleeps: past its heartbeat timeout (5 s), and past most of what follows.
SLEEP_S = 25.0
# A call of this length has timed out for its caller.
GIVE_UP_S = 5.0


@dataclass
class Service:
    """Something that is called over the network. The shares are of its calls."""

    name: str
    refusal: Callable[[], Exception]
    down_until: float = 0.0
    cut_off: dict[str, float] = field(default_factory=dict[str, float])  # By process: partitioned until then.
    shares: dict[Fault, float] = field(default_factory=dict[Fault, float])
    # Only these calls may arrive late: for the others a connection that breaks takes its request with it.
    late_calls: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call, as a plan of faults names it: the how-manieth of the whole run."""

    number: int
    process: str
    service: str
    operation: str


def services() -> dict[str, Service]:
    """All of them, with the error that their real clients raise when nobody answers."""
    return {
        service.name: service
        for service in (
            Service("postgres", lambda: asyncpg.ConnectionDoesNotExistError("connection was closed")),
            Service("redis", lambda: Unavailable("Redis does not answer.")),
            Service("cloud", lambda: Unavailable("The cloud did not answer."), late_calls=frozenset({"ensure"})),
            Service("engine", lambda: Unavailable("The engine did not answer (ReadTimeout).")),
            Service("temporal", lambda: RPCError("unavailable", RPCStatusCode.UNAVAILABLE, b"")),
        )
    }


class Network:
    """Carries calls from processes to services."""

    def __init__(self, dice: random.Random, tell: Callable[[str], None]) -> None:
        self._dice = dice
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self.services = services()
        self.calls: list[Call] = []
        self.plan: Callable[[Call], Fault | None] = lambda call: None
        # How long a call that arrives late is under way.
        self.late_s = 30.0

    async def call(self, process: Process, service: Service, operation: str, effect: Callable[[], Any]) -> Any:
        """Send a call and wait for its reply, as far as the process and the network let it."""
        if not process.is_running:
            await process.gate()
        call = Call(len(self.calls), process.name, service.name, operation)
        self.calls.append(call)
        fault = self.plan(call) or self._draw(service, operation)
        if fault is not None:
            self._tell(f"{process.name}: {service.name}.{operation} (call {call.number}) {fault.value}")
        if fault is Fault.KILL_BEFORE:
            process.kill()
        elif fault is Fault.STOP_BEFORE:
            self._put_to_sleep(process)
        if not process.is_running:
            await process.gate()
        reply: asyncio.Future[Any] = self._loop.create_future()
        transit_s = self._dice.uniform(0.001, 0.02)
        if fault is Fault.SLOW:
            transit_s = self._dice.uniform(1.0, GIVE_UP_S)
        if fault is Fault.LATE:
            transit_s = self._dice.uniform(GIVE_UP_S, self.late_s)
            self._loop.call_later(GIVE_UP_S, fail, reply, service.refusal())
        self._loop.call_later(transit_s, self._arrive, process, service, fault, effect, reply)
        # What was sent arrives, whether its sender still listens or not.
        try:
            return await reply
        finally:
            if not process.is_running:
                await process.gate()

    def _arrive(
        self,
        process: Process,
        service: Service,
        fault: Fault | None,
        effect: Callable[[], Any],
        reply: asyncio.Future[Any],
    ) -> None:
        now = self._loop.time()
        is_away = now < service.down_until or now < service.cut_off.get(process.name, 0.0)
        if fault is Fault.REFUSED or is_away:
            # Some are refused at once, some are heard nothing of.
            self._loop.call_later(self._dice.choice([0.0, GIVE_UP_S]), fail, reply, service.refusal())
            return
        try:
            result, error = effect(), None
        except (Rejected, Unavailable, RPCError) as refused:
            result, error = None, refused
        except Exception as broken:
            result, error = None, broken
        if fault is Fault.KILL_AFTER:
            process.kill()
        elif fault is Fault.STOP_AFTER:
            self._put_to_sleep(process)
        if fault is Fault.LOST_REPLY:
            self._loop.call_later(self._dice.choice([0.0, GIVE_UP_S]), fail, reply, service.refusal())
        elif not reply.done():
            if error is None:
                reply.set_result(result)
            else:
                fail(reply, error)

    def _draw(self, service: Service, operation: str) -> Fault | None:
        if not service.shares:
            return None
        draw = self._dice.random()
        for fault, share in service.shares.items():
            draw -= share
            if draw < 0:
                return None if fault is Fault.LATE and operation not in service.late_calls else fault
        return None

    def _put_to_sleep(self, process: Process) -> None:
        process.stop()
        self._loop.call_later(SLEEP_S, process.resume)


def fail(reply: asyncio.Future[Any], error: Exception) -> None:
    """Answer with an error, unless there is an answer already."""
    if not reply.done():
        reply.set_exception(error)
        reply.exception()  # It was looked at: a caller that is gone is no mistake.


class Reach:
    """A client in a process: the methods of `target`, each of them a call over the network."""

    def __init__(self, network: Network, process: Process, service: str, target: object) -> None:
        self._network = network
        self._process = process
        self._service = network.services[service]
        self._target = target

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(self._target, name, None)
        if method is None:
            raise NotImplementedError(
                f"{type(self._target).__name__} does not do {name!r} yet: write it in its file of tests/simulation"
            )

        async def call(*arguments: Any, **options: Any) -> Any:
            return await self._network.call(self._process, self._service, name, partial(method, *arguments, **options))

        setattr(self, name, call)
        return call
