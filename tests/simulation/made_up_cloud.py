"""A cloud and the engines on its machines, in memory: slow, full, forgetful, late with its lists."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from crosslogic.clients.engine import EngineLoad, Generation
from crosslogic.contracts.node import Machine, NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import MachineStatus


@dataclass
class Fate:
    """What becomes of a machine that is ordered: seconds from the order. None: it never comes to that."""

    runs_after_s: float | None = 5.0
    answers_after_s: float | None = 8.0
    generates: bool = True


@dataclass
class MadeUpMachine:
    """A machine and its engine. `busy_until` are the ends of the requests that run on it."""

    cluster: str
    region: str
    endpoint: str
    created_at: float
    fate: Fate
    gone_at: float | None = None
    reason: str = ""
    silent_until: float = 0.0
    busy_until: list[float] = field(default_factory=list[float])

    @property
    def is_gone(self) -> bool:
        """Does it cost nothing any more?"""
        return self.gone_at is not None


class MadeUpCloud:
    """The `Cloud` of activities.cloud. `clock` is in seconds; `on_create` and `on_end` look on."""

    def __init__(self, dice: random.Random, clock: Callable[[], float]) -> None:
        self._dice = dice
        self._clock = clock
        self._made = 0
        self.machines: dict[str, MadeUpMachine] = {}
        self.by_endpoint: dict[str, MadeUpMachine] = {}
        self.foreign: set[str] = set()
        self.is_full = False
        self.list_lag_s = 0.0
        self.find_lag_s = 0.0
        self.draw_fate: Callable[[], Fate] = Fate
        self.on_create: Callable[[str], None] = lambda cluster: None
        self.on_end: Callable[[MadeUpMachine], None] = lambda machine: None

    # The API.

    def ensure(self, spec: NodeSpec) -> None:
        found = self.machines.get(spec.cluster)
        if found is not None and not found.is_gone:
            return
        if self.is_full:
            raise Rejected(f"{spec.region} has no capacity for {spec.gpu} now.", code="no_capacity")
        self.on_create(spec.cluster)
        self.add(spec.cluster, spec.region)

    def find(self, cluster: str) -> Machine | None:
        machine = self.machines.get(cluster)
        if machine is None or (not machine.is_gone and self._clock() < machine.created_at + self.find_lag_s):
            return None
        return self._shown(machine, 0.0)

    def list_all(self, prefix: str) -> list[Machine]:
        now = self._clock()
        return [
            self._shown(machine, self.list_lag_s)
            for machine in self.machines.values()
            if machine.cluster.startswith(prefix) and now >= machine.created_at + self.list_lag_s
        ]

    def end(self, cluster: str) -> None:
        machine = self.machines.get(cluster)
        if machine is None or machine.is_gone:
            return
        self.on_end(machine)
        self._go(machine, "ended by order")

    # What happens to it.

    def add(self, cluster: str, region: str) -> MadeUpMachine:
        """A machine, whoever has ordered it."""
        self._made += 1
        host = f"http://127.0.0.1:{20_000 + self._made}"
        machine = MadeUpMachine(cluster, region, host, self._clock(), self.draw_fate())
        self.machines[cluster] = self.by_endpoint[host] = machine
        return machine

    def add_outside(self, name: str, region: str) -> MadeUpMachine:
        """A machine that is not the cloud's: somebody's own, with its engine."""
        machine = self.add(name, region)
        del self.machines[name]
        return machine

    def take(self, cluster: str) -> None:
        """The cloud takes the machine back, without a word."""
        machine = self.machines.get(cluster)
        if machine is not None and not machine.is_gone:
            self._go(machine, "preempted")

    def has_ever_been(self, cluster: str) -> bool:
        """Was there such a machine once?"""
        return cluster in self.machines

    @property
    def alive(self) -> set[str]:
        """Names of the machines that cost money."""
        return {cluster for cluster, machine in self.machines.items() if not machine.is_gone}

    def _go(self, machine: MadeUpMachine, reason: str) -> None:
        machine.gone_at, machine.reason = self._clock(), reason
        machine.busy_until.clear()

    def _shown(self, machine: MadeUpMachine, lag_s: float) -> Machine:
        now = self._clock()
        if machine.gone_at is not None and now >= machine.gone_at + lag_s:
            return Machine(machine.cluster, MachineStatus.GONE, "", machine.reason)
        after_s = machine.fate.runs_after_s
        if after_s is None or now < machine.created_at + after_s:
            return Machine(machine.cluster, MachineStatus.STARTING)
        return Machine(machine.cluster, MachineStatus.RUNNING, machine.endpoint)


class MadeUpEngines:
    """The `EngineClient` of the made-up cloud's machines."""

    def __init__(self, cloud: MadeUpCloud, clock: Callable[[], float]) -> None:
        self._cloud = cloud
        self._clock = clock

    def check_health(self, node_id: str, endpoint: str) -> None:
        self._reach(endpoint)

    def generate(
        self, node_id: str, endpoint: str, model: str, kind: str, max_tokens: int, timeout_s: float = 60.0
    ) -> Generation:
        if not self._reach(endpoint).fate.generates:
            raise Unavailable("The engine answered 500.")
        return Generation(max_tokens, 0.1)

    def read_load(self, node_id: str, endpoint: str) -> EngineLoad | None:
        machine = self._reach(endpoint)
        now = self._clock()
        machine.busy_until = [until for until in machine.busy_until if until > now]
        return EngineLoad(len(machine.busy_until), 0)

    def _reach(self, endpoint: str) -> MadeUpMachine:
        machine = self._cloud.by_endpoint.get(endpoint)
        now = self._clock()
        after_s = machine.fate.answers_after_s if machine else None
        if (
            machine is None
            or machine.is_gone
            or after_s is None
            or now < machine.created_at + after_s
            or now < machine.silent_until
        ):
            raise Unavailable("The engine did not answer (ConnectError).")
        return machine
