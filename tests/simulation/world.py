"""The whole fleet in memory: `worker.assemble` and `worker.make_worker` with fakes for their clients.

A client that the worker gives to its activities, and for which STAND_INS has nothing, fails the run at its first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import Any, cast, get_type_hints
from unittest.mock import patch

from temporalio.client import (
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    WorkflowExecutionStatus,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import UnsandboxedWorkflowRunner

import worker
from activities import manners
from crosslogic.clients import temporal
from crosslogic.contracts import names
from crosslogic.domain.node import Node
from crosslogic.settings import Settings
from tests.conftest import make_settings
from tests.simulation import clock
from tests.simulation.made_up_cloud import MadeUpCloud, MadeUpEngines
from tests.simulation.memory_board import MemoryBoard, MemoryHeartbeats
from tests.simulation.memory_catalog import MODELS, REGIONS, MemoryCatalog
from tests.simulation.memory_nodes import MemoryNodes
from tests.simulation.memory_sweeps import MemorySweeps
from tests.simulation.network import Network, Reach
from tests.simulation.processes import Process, Registry
from tests.simulation.server import AlreadyRuns, NotFound, Run, Server

# Clients by their names in worker.py: which service they call, and which attribute of World stands for them.
STAND_INS = {
    "NodeStore": ("postgres", "nodes"),
    "CatalogStore": ("postgres", "catalog"),
    "EngineClient": ("engine", "engines"),
    "HeartbeatBoard": ("redis", "heartbeats"),
    "SweepStore": ("postgres", "sweeps"),
}

# A process that was killed is started again within this.
RESTART_S = (0.5, 15.0)


class Violation(AssertionError):
    """A law was broken; the message has the trace."""


class Nobody:
    """Stands for what a simulation does not have."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"an activity uses {self._what}.{name}, and the simulator has no stand-in: add one to STAND_INS in "
            "tests/simulation/world.py"
        )


def registry(*, is_sandboxed: bool = False) -> Registry:
    """What `worker.make_worker` registers. The sandbox of production costs 20 times the rest, so it is for a sample."""
    given: dict[str, Any] = {}

    def take(client: Any, **options: Any) -> None:
        given.update(options)

    with patch.object(worker, "Worker", take):
        worker.make_worker(cast(Any, None), names.FLEET_TASK_QUEUE, [])
    runner = given["workflow_runner"] if is_sandboxed else UnsandboxedWorkflowRunner()
    # A worker has its client's interceptors too.
    interceptors = [*temporal.interceptors(), *given["interceptors"]]
    return Registry(given["workflows"], runner, interceptors, temporal.DATA_CONVERTER)


class World:
    """One simulated installation: two worker processes and all that they call."""

    def __init__(self, seed: int, known: Registry, settings: Settings | None = None, processes: int = 2) -> None:
        self.seed = seed
        self.settings = settings or make_settings(probe_interval_s=8.0, cloud_interval_s=30.0)
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._on_defect)
        self.dice = random.Random(seed)
        self.trace: list[tuple[float, str]] = []
        self.broken: list[str] = []
        assert self.settings.node_secret is not None
        self.node_secret = self.settings.node_secret.get_secret_value()
        self.converter = known.converter
        self.server = Server(random.Random(self.dice.random()), known.converter, self.tell)
        self.network = Network(random.Random(self.dice.random()), self.tell)
        self.catalog = MemoryCatalog()
        self.cloud = MadeUpCloud(random.Random(self.dice.random()), self.loop.time)
        self.engines = MadeUpEngines(self.cloud, self.loop.time)
        self.board = MemoryBoard(self.loop.time)
        self.heartbeats = MemoryHeartbeats(self.loop.time)
        self.on_node: list[Callable[[Node | None, Node], None]] = []
        self.nodes = MemoryNodes(
            clock.now,
            models=[model.name for model in MODELS],
            regions=[region.name for region in REGIONS],
            deployments=lambda: self.catalog.deployments,
            on_change=self._changed,
        )
        self.sweeps = MemorySweeps()
        # Workflow types that no schedule starts.
        self.unscheduled: set[str] = set()
        self._schedules: set[str] = set()
        self._registry = known
        self._graveyard: list[Process] = []
        self.processes: list[Process] = []
        self.is_over = False
        self._own: list[asyncio.Task[Any]] = []
        self._started = 0
        for _ in range(processes):
            self.start_process()

    # Telling and breaking.

    def tell(self, line: str) -> None:
        """One more line of the trace."""
        self.trace.append((self.loop.time(), line))

    def broke(self, law: str) -> None:
        """A law was broken: the run ends here."""
        self.tell(f"BROKEN: {law}")
        self.broken.append(law)

    def _on_defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.is_over and context["message"].startswith("Exception in callback"):
            self.broke(str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}")

    def check(self) -> None:
        """Raise Violation if a law was broken so far."""
        if self.broken:
            raise Violation(self.broken[0])

    def story(self, most: int = 400) -> str:
        """The end of the trace, readable."""
        lines = [f"{at:9.3f}  {line}" for at, line in self.trace[-most:]]
        left = len(self.trace) - len(lines)
        return "\n".join([f"({left} lines before)"] * bool(left) + lines)

    def _changed(self, before: Node | None, after: Node) -> None:
        tombstone = ", tombstoned" if after.is_tombstoned else ""
        self.tell(f"{after.node_id[-6:]} row: {after.state} g{after.generation}{tombstone} ({after.reason})")
        for look in self.on_node:
            look(before, after)

    # Processes.

    def start_process(self) -> Process:
        """Start a worker process as `worker.run` does."""
        self._started += 1
        process = Process(f"worker-{self._started}", self._registry, self.server, self.tell, self.broke)
        assemble_in(self, process)
        self.processes.append(process)
        self.server.processes = list(self.processes)
        return process

    def restart_later(self, process: Process) -> None:
        """The supervisor starts another process in a killed one's place."""

        def replace() -> None:
            if process in self.processes and not self.is_over:
                self.processes.remove(process)
                self._graveyard.append(process)
                self.start_process()

        self.loop.call_later(self.dice.uniform(*RESTART_S), replace)

    async def supervise(self) -> None:
        """Start again whatever process was killed."""
        seen: set[str] = set()
        while True:
            for process in self.processes:
                if not process.is_alive and process.name not in seen:
                    seen.add(process.name)
                    self.restart_later(process)
            await asyncio.sleep(0.5)

    def spawn(self, coroutine: Any) -> None:
        """Run something of the world's own, until the world ends."""

        async def watched() -> None:
            try:
                await coroutine
            except Exception as error:
                self.broke(f"{type(error).__name__}: {error}")

        self._own.append(self.loop.create_task(watched()))

    def schedule(self, schedule_id: str, schedule: Schedule) -> None:
        """Start its workflow now and then again and again, unless the one before still runs."""
        if schedule_id in self._schedules:
            raise ScheduleAlreadyRunningError
        self._schedules.add(schedule_id)
        action = cast(ScheduleActionStartWorkflow, schedule.action)
        payloads = self.converter.payload_converter.to_payloads(list(action.args))

        async def keep() -> None:
            made = 0
            while True:
                if not self.server.is_down and f"{schedule_id}-{made}" not in self.server.runs:
                    made += 1
                    self.server.start(action.workflow, f"{schedule_id}-{made}", payloads)
                await asyncio.sleep(schedule.spec.intervals[0].every.total_seconds())

        if action.workflow not in self.unscheduled:
            self.spawn(keep())

    async def end(self) -> None:
        """Take everything down."""
        self.is_over = self.server.is_over = True
        processes = [*self._graveyard, *self.processes]
        for process in processes:
            process.vanish()
        while left := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            # Some have something to do before they end, and find that nothing is there any more.
            for task in left:
                task.cancel()
            await asyncio.sleep(0)


def assemble_in(world: World, process: Process) -> None:
    """Give a process the activities that `worker.assemble` makes, with stand-ins for their clients."""
    reach = {
        name: Reach(world.network, process, service, getattr(world, attribute))
        for name, (service, attribute) in STAND_INS.items()
    }
    engine: Any = reach["EngineClient"]
    engine.close = _nothing

    def standing_in(name: str) -> Callable[..., Any]:
        return lambda *_, **__: reach[name]

    with contextlib.ExitStack() as stack:
        for name in STAND_INS:
            if hasattr(worker, name):
                stack.enter_context(patch.object(worker, name, standing_in(name)))
        clouds: dict[str, Any] = {"local": Reach(world.network, process, "cloud", world.cloud)}
        board: Any = Reach(world.network, process, "redis", world.board)
        pool: Any = Nobody("the pool")
        fleet = worker.assemble(world.settings, pool, clouds, board)
    process.register(fleet.activities)
    client: Any = Client(world, process)
    process.spawn(worker.keep_entities(client, names.FLEET_TASK_QUEUE, fleet))


async def _nothing() -> None:
    pass


class Client:
    """As much of Temporal's client as our processes use."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    async def start_workflow(self, type: str, argument: Any, **options: Any) -> None:
        payloads = self._world.converter.payload_converter.to_payloads([argument])

        def start() -> None:
            try:
                self._world.server.start(type, options["id"], payloads)
            except AlreadyRuns as error:
                if options.get("id_conflict_policy") is not WorkflowIDConflictPolicy.USE_EXISTING:
                    raise RPCError("it runs already", RPCStatusCode.ALREADY_EXISTS, b"") from error

        await self._call("start_workflow", start)

    async def create_schedule(self, schedule_id: str, schedule: Schedule, **_: Any) -> None:
        await self._call("create_schedule", lambda: self._world.schedule(schedule_id, schedule))

    def get_workflow_handle(self, workflow_id: str) -> Handle:
        return Handle(self, workflow_id)

    async def _call(self, operation: str, effect: Callable[[], Any]) -> Any:
        network, server = self._world.network, self._world.server
        service = network.services["temporal"]

        def if_up() -> Any:
            if server.is_down:
                raise service.refusal()
            return effect()

        return await network.call(self._process, service, operation, if_up)

    async def describe(self, workflow_id: str) -> Any:
        def look() -> Run:
            try:
                return self._world.server.find(workflow_id)
            except NotFound as error:
                raise RPCError("not found", RPCStatusCode.NOT_FOUND, b"") from error

        return await self._call("describe", look)


class Handle:
    """A workflow's handle."""

    status = WorkflowExecutionStatus.RUNNING

    def __init__(self, client: Client, workflow_id: str) -> None:
        self._client = client
        self._workflow_id = workflow_id

    async def describe(self, **_: Any) -> Handle:
        await self._client.describe(self._workflow_id)
        return self


@contextlib.contextmanager
def silence() -> Generator[None]:
    """What the fleet logs of the faults is not for whoever runs the tests."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# The SDK reads the same types again and again; a simulation has no time for that.
_hints = cache(get_type_hints)

# The SDK sends one at most every 2 s, whatever an activity does (worker.make_worker).
BEAT_INTERVAL_S = 2.0


def run_in_virtual_time(main: Callable[[], Any]) -> Any:
    """Run a coroutine function on a new virtual loop, with the clocks of our modules set to it."""
    with (
        silence(),
        clock.virtual_clocks(),
        patch.object(manners, "HEARTBEAT_INTERVAL_S", BEAT_INTERVAL_S),
        patch("temporalio.converter._payload_converter.get_type_hints", _hints),
        asyncio.Runner(loop_factory=clock.VirtualLoop) as runner,
    ):
        return runner.run(main())


__all__: Sequence[str] = ("Violation", "World", "registry", "run_in_virtual_time")
