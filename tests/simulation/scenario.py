"""What happens to a fleet in one simulation, drawn from its seed: orders, drains, cancellations, and every fault."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crosslogic.contracts import names
from crosslogic.contracts.node import NodeLifecycleInput, NodeProvisioningInput, NodeSpec
from crosslogic.domain.deployment import RegionTarget
from crosslogic.domain.ids import NODE, uuid7
from crosslogic.domain.node import Node, RouteEntry, cluster_name
from tests.simulation import clock
from tests.simulation.laws import Laws
from tests.simulation.made_up_cloud import Fate
from tests.simulation.network import Call, Fault
from tests.simulation.processes import Registry
from tests.simulation.server import NotFound, Run
from tests.simulation.world import Violation, World

# Faults and orders come for so long; then the world must find its rest within the second.
TROUBLE_S = 200.0
REST_WITHIN_S = 3_600.0
# What is at rest must still be so after this: long enough for a late call to arrive.
STILL_S = 45.0

# Calls that change something, and what may happen to the process that makes them.
EFFECTS = ("intend", "advance", "tombstone", "hand_over", "publish", "ensure", "end", "record", "start_workflow")
PROCESS_FAULTS = (Fault.KILL_BEFORE, Fault.KILL_AFTER, Fault.STOP_BEFORE, Fault.STOP_AFTER)
MET_SHARE = 0.15

MODELS = ("llama-7b", "llama-3-8b", "bge-base-en")
PLACES = ("in-mumbai", "us-east", "ap-south-1")


@dataclass(frozen=True)
class Profile:
    """Which kinds of trouble a seed has."""

    processes: bool  # a, b, c: kills, stops, SIGTERM.
    servers: bool  # d, e, f: Temporal, Postgres and Redis away; a flush.
    network: bool  # g, h: partitions, lost and slow replies.
    cloud: bool  # No capacity, machines that never come up, preemptions, lists that lag.
    engines: bool  # Engines that fall silent for a while.
    sweeps: bool  # The clouds are swept; therefore orders may arrive late, and machines be there that nobody ordered.
    people: bool  # i, l: signals twice and out of order, cancellations and terminations at any event.

    @classmethod
    def draw(cls, dice: random.Random) -> Profile:
        """Most seeds have most kinds; each kind is sometimes missing, so that it hides nothing."""
        return cls(*(dice.random() < share for share in (0.75, 0.6, 0.7, 0.7, 0.4, 0.4, 0.8)))


class Scenario:
    """Lives through one seed."""

    def __init__(self, world: World, profile: Profile | None = None, *, is_eager: bool = False) -> None:
        self.world = world
        self.dice = random.Random(world.dice.random())
        self.profile = profile or Profile.draw(self.dice)
        self.laws = Laws(world)
        self._is_eager = is_eager
        self._made = 0
        world.tell(f"seed {world.seed}: {self.profile}")

    async def live(self) -> None:
        """All of it. Raises Violation."""
        world, dice = self.world, self.dice
        world.spawn(world.supervise())
        world.spawn(self._serve_requests())
        if not self.profile.sweeps:
            world.unscheduled.add(names.FLEET_SWEEP)
        self._set_the_weather()
        self._plan_orders()
        for kind, plan in (
            (self.profile.processes, self._plan_process_faults),
            (self.profile.servers, self._plan_server_faults),
            (self.profile.network, self._plan_network_faults),
            (self.profile.cloud, self._plan_cloud_faults),
            (self.profile.engines, self._plan_engine_faults),
            (self.profile.sweeps, self._plant),
            (self.profile.people, self._plan_people),
        ):
            if kind:
                plan()
        await self._pass(TROUBLE_S * dice.uniform(0.5, 1.0))
        self._clear_up()
        await self.rest()

    async def rest(self) -> None:
        """Wait until all is at rest, and still so a while later. Raises Violation when that takes too long."""
        deadline = self.world.loop.time() + REST_WITHIN_S
        calm_since: float | None = None
        while True:
            await self._pass(15.0)
            broken = self.laws.at_rest()
            now = self.world.loop.time()
            if broken:
                calm_since = None
            elif calm_since is None:
                calm_since = now
            elif now - calm_since >= STILL_S:
                return
            if now > deadline:
                self.world.broke(f"{broken[0]} ({len(broken)} in all), {REST_WITHIN_S:.0f} s after the last fault")
                self.world.check()

    async def _pass(self, time_s: float) -> None:
        """Let time pass, and stop at once when a law breaks."""
        until = self.world.loop.time() + time_s
        while (left_s := until - self.world.loop.time()) > 0:
            await asyncio.sleep(min(5.0, left_s))
            self.world.check()

    def at(self, what: Callable[[], Any], earliest_s: float = 0.0, latest_s: float = TROUBLE_S) -> None:
        """Do something at a time that the dice choose."""
        self.world.loop.call_later(self.dice.uniform(earliest_s, latest_s), self._do, what)

    def _do(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except NotFound:
            self.world.tell("(its workflow does not run)")

    # Orders.

    def _plan_orders(self) -> None:
        dice = self.dice
        for _ in range(dice.randint(1, 3)):
            self.at(self.provision, 0, 100)
        for name in ("llama-7b", "bge")[: dice.randint(0, 2)]:
            self.at(lambda name=name: self._promise(name), 0, 60)
            if dice.random() < 0.5:
                self.at(lambda name=name: self._promise(name), 60, TROUBLE_S)
        if dice.random() < 0.3:
            self.at(self.join, 0, 120)
        if dice.random() < 0.15:
            self.at(lambda: self.provision(region="mars"))

    def provision(self, node_id: str = "", **fields: Any) -> str:
        """Start a NodeProvisioning as an operator does; its workflow id."""
        dice = self.dice
        self._made += 1
        values: dict[str, Any] = {
            "model": dice.choice(MODELS),
            "region": dice.choice(PLACES),
            "node_id": node_id or dice.choice(["", "", self.new_id()]),
            "launch_timeout_s": dice.choice([60, 120]),
            "boot_timeout_s": dice.choice([30, 90]),
            "load_timeout_s": dice.choice([30, 90]),
            "drain_timeout_s": dice.choice([0, 5, 30, 60]),
            **fields,
        }
        workflow_id = f"by-hand-{self._made}"
        order = NodeProvisioningInput(**values)
        self._start(names.NODE_PROVISIONING, workflow_id, order)
        if order.node_id and dice.random() < 0.2:
            # The same order again: the id is taken once.
            self.at(lambda: self._start(names.NODE_PROVISIONING, f"{workflow_id}-again", order), 0, 30)
        return workflow_id

    def join(self) -> None:
        """Join a node that exists already."""
        node_id = self.new_id()
        machine = self.world.cloud.add_outside(f"outside-{node_id}", "us-east")
        spec = NodeSpec(node_id, "llama-7b", "us-east", drain_timeout_s=10, endpoint=machine.endpoint)
        self._start(names.NODE_LIFECYCLE, names.node_workflow_id(node_id), NodeLifecycleInput(spec, is_admitted=False))

    def new_id(self) -> str:
        """A node's id, made by the operator."""
        return NODE.show(uuid7(int(clock.now().timestamp() * 1000), self.dice.getrandbits(80)))

    def _start(self, type: str, workflow_id: str, argument: Any) -> None:
        payloads = self.world.converter.payload_converter.to_payloads([argument])
        self.world.server.start(type, workflow_id, payloads)

    def _promise(self, name: str) -> None:
        model = "llama-3-8b" if name == "llama-7b" else "bge-base-en"
        targets: list[RegionTarget] = []
        for region in self.dice.sample(["in-mumbai", "us-east"], self.dice.randint(1, 2)):
            least = self.dice.randint(0, 2)
            targets.append(RegionTarget(region, least, least + self.dice.randint(0, 1)))
            place = (name, region)
            self.laws.most_replicas[place] = max(self.laws.most_replicas.get(place, 0), targets[-1].replicas_max)
        self.world.tell(f"deployment {name}: {targets}")
        self.world.catalog.put(name, model, *targets)

    # Requests: a gateway whose route table is up to a second and a half behind (F2 allows three).

    async def _serve_requests(self) -> None:
        world, dice = self.world, self.dice
        view: list[RouteEntry] = []
        while True:
            await asyncio.sleep(dice.uniform(0.5, 1.5))
            # What it starts now goes where it knew of at its last look.
            for entry in view:
                machine = world.cloud.by_endpoint.get(entry.endpoint)
                if machine is not None and not machine.is_gone and dice.random() < 0.2:
                    length_s = dice.choice([1.0, 5.0, 20.0, 300.0])
                    machine.busy_until.append(world.loop.time() + dice.expovariate(1 / length_s))
            view = [row.route_entry for row in world.nodes.rows.values() if row.route_entry.is_routable]

    # The weather: what is no fault but how clouds are.

    def _set_the_weather(self) -> None:
        dice, cloud = self.dice, self.world.cloud
        is_bad = self.profile.cloud
        cloud.list_lag_s = dice.choice([0.0, 5.0, 40.0]) if is_bad else 0.0
        cloud.find_lag_s = dice.choice([0.0, 0.0, 2.0]) if is_bad else 0.0

        def draw() -> Fate:
            runs_after_s = dice.choice([1.0, 3.0, 6.0, 30.0]) + dice.random()
            fate = Fate(runs_after_s, runs_after_s + dice.choice([0.5, 2.0, 12.0]) + dice.random())
            if is_bad and self.is_troubled:
                draw = dice.random()
                if draw < 0.08:
                    return Fate(None, None)
                if draw < 0.16:
                    return Fate(runs_after_s, None)
                if draw < 0.2:
                    fate.generates = False
            return fate

        cloud.draw_fate = draw

    is_troubled = True

    def _clear_up(self) -> None:
        """The faults are over."""
        world = self.world
        world.tell("the faults are over")
        self.is_troubled = False
        world.cloud.is_full = False
        for service in world.network.services.values():
            service.shares.clear()
            service.cut_off.clear()
            service.down_until = 0.0
        for process in world.processes:
            process.resume()

    # Faults.

    def _plan_process_faults(self) -> None:
        for _ in range(self.dice.randint(1, 6)):
            self.at(self.dice.choice([self._kill, self._kill, self._stop, self._end]))
        # Effects take milliseconds: a kill at any time seldom meets one, so some are met on purpose.
        met = {operation: self.dice.choice(PROCESS_FAULTS) for operation in EFFECTS if self.dice.random() < 0.4}

        def meet(call: Call) -> Fault | None:
            if self.is_troubled and call.operation in met and self.dice.random() < MET_SHARE:
                return met[call.operation]
            return None

        self.world.network.plan = meet

    def _kill(self) -> None:
        self.dice.choice(self.world.processes).kill()

    def _stop(self) -> None:
        process = self.dice.choice(self.world.processes)
        process.stop()
        self.world.loop.call_later(self.dice.uniform(3.0, 40.0), process.resume)

    def _end(self) -> None:
        process = self.dice.choice(self.world.processes)
        process.ask_to_end()
        self.world.loop.call_later(3.5, process.kill)

    def _plan_server_faults(self) -> None:
        for _ in range(self.dice.randint(1, 4)):
            self.at(self.dice.choice([self._temporal_away, self._away, self._away, self._flush]))

    def _temporal_away(self) -> None:
        for_s = self.dice.uniform(1.0, 30.0)
        self.world.tell(f"Temporal is away for {for_s:.0f} s")
        self.world.server.go_down(for_s)

    def _away(self) -> None:
        service = self.world.network.services[self.dice.choice(["postgres", "redis", "cloud"])]
        for_s = self.dice.uniform(1.0, 30.0)
        self.world.tell(f"{service.name} is away for {for_s:.0f} s")
        service.down_until = self.world.loop.time() + for_s

    def _flush(self) -> None:
        self.world.tell("Redis has lost its memory")
        self.world.board.flush()
        self.world.heartbeats.flush()

    def _plan_network_faults(self) -> None:
        dice, services = self.dice, self.world.network.services
        for name in ("postgres", "redis", "cloud"):
            services[name].shares = {
                Fault.REFUSED: dice.choice([0.0, 0.03]),
                Fault.LOST_REPLY: dice.choice([0.0, 0.03, 0.1]),
                Fault.SLOW: 0.2 if self._is_eager else dice.choice([0.0, 0.03]),
                Fault.LATE: dice.choice([0.0, 0.3]) if self.profile.sweeps else 0.0,
            }
        for _ in range(dice.randint(0, 3)):
            self.at(self._cut_off)

    def _cut_off(self) -> None:
        process = self.dice.choice(self.world.processes)
        service = self.world.network.services[self.dice.choice(["postgres", "redis", "cloud", "temporal"])]
        for_s = self.dice.uniform(1.0, 40.0)
        self.world.tell(f"{process.name} is cut off from {service.name} for {for_s:.0f} s")
        service.cut_off[process.name] = self.world.loop.time() + for_s

    def _plan_cloud_faults(self) -> None:
        for _ in range(self.dice.randint(0, 4)):
            self.at(self.dice.choice([self._take, self._take, self._fill]), 10)

    def _take(self) -> None:
        alive = sorted(self.world.cloud.alive - self.world.cloud.foreign)
        if alive:
            cluster = self.dice.choice(alive)
            self.world.tell(f"{cluster[-6:]} machine is taken back")
            self.world.cloud.take(cluster)

    def _fill(self) -> None:
        self.world.tell("the cloud is full for a while")
        self.world.cloud.is_full = True
        self.at(self._empty, 5, 60)

    def _empty(self) -> None:
        self.world.cloud.is_full = False

    def _plant(self) -> None:
        """Machines that no row claims: one with our mark, and one of another installation."""
        self.at(lambda: self._add_machine(self.world.node_secret))
        self.at(lambda: self.world.cloud.foreign.add(self._add_machine("another installation's secret")))

    def _add_machine(self, node_secret: str) -> str:
        cluster = cluster_name("local", "in-mumbai", "cpu", True, self.new_id(), node_secret)
        self.world.tell(f"{cluster[-6:]} machine appears")
        self.world.cloud.add(cluster, "in-mumbai")
        return cluster

    def _plan_engine_faults(self) -> None:
        self.laws.had_engine_faults = True
        self.world.network.services["engine"].shares = {Fault.REFUSED: 0.03, Fault.SLOW: 0.03}
        for _ in range(self.dice.randint(1, 3)):
            self.at(self._hush, 20)

    def _hush(self) -> None:
        alive = sorted(self.world.cloud.alive)
        if alive:
            machine = self.world.cloud.machines[self.dice.choice(alive)]
            for_s = self.dice.choice([4.0, 12.0, 60.0])
            self.world.tell(f"{machine.cluster[-6:]} engine is silent for {for_s:.0f} s")
            machine.silent_until = self.world.loop.time() + for_s

    # People.

    def _plan_people(self) -> None:
        for _ in range(self.dice.randint(1, 5) * (3 if self._is_eager else 1)):
            self.at(self._meddle, 1)

    def _meddle(self) -> None:
        dice, server = self.dice, self.world.server
        runs = [run for run in server.runs.values() if run.type in (names.NODE_PROVISIONING, names.NODE_LIFECYCLE)]
        if dice.random() < 0.1:
            runs = list(server.runs.values())
        if self._is_eager and dice.random() < 0.7:
            now = self.world.loop.time()
            runs = [run for run in runs if now - run.started_at < 15.0]
        if runs:
            self.meddle_with(dice.choice(runs), dice.choice(["drain", "drain", "drain", "cancel", "terminate"]))

    def meddle_with(self, run: Run, how: str) -> None:
        """Drain (sometimes twice, and with a nudge in between), cancel or terminate a workflow."""
        server = self.world.server
        if how == "drain":
            if run.type not in (names.NODE_PROVISIONING, names.NODE_LIFECYCLE):
                return
            server.signal(run.workflow_id, names.DRAIN, self.dice.choice([[], ["maintenance"], [{"not": "text"}]]))
            if self.dice.random() < 0.4:
                self.at(lambda: server.signal(run.workflow_id, names.DRAIN, ["again"]), 0, 5)
                self.at(lambda: server.signal(run.workflow_id, names.LOOK_AGAIN), 0, 5)
            return
        self.laws.is_hasty |= {node.node_id for node in self._nodes_of(run)}
        if how == "cancel":
            server.cancel(run.workflow_id)
        else:
            server.terminate(run.workflow_id)

    def _nodes_of(self, run: Run) -> list[Node]:
        rows = self.world.nodes.rows.values()
        return [
            row
            for row in rows
            if run.workflow_id
            in (row.workflow_id, names.node_workflow_id(row.node_id), names.provisioning_workflow_id(row.node_id))
        ]


async def live(seed: int, known: Registry, profile: Profile | None = None, *, is_eager: bool = False) -> World:
    """Live through one seed; the world, at rest. Raises Violation, whose message has the trace.

    Where people are eager, they drain, cancel and terminate far more, mostly what has only just begun, and the network
    is slow enough for much to be under way.
    """
    world = World(seed, known)
    try:
        await Scenario(world, profile, is_eager=is_eager).live()
    except Violation as error:
        raise Violation(f"{error}\n\n{world.story()}") from None
    finally:
        await world.end()
    return world
