"""A fleet under test: a real worker on real Temporal, Postgres and Valkey; only the cloud behind it is made up.

The cloud's machines are real HTTP servers that answer like engines, so that probes, admissions and drains are real too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import asyncpg
import redis.asyncio as aioredis
from temporalio.client import Client, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError
from temporalio.worker import Worker

import worker as fleet_worker
from crosslogic.clients import temporal
from crosslogic.clients.engine import EngineClient
from crosslogic.clients.entities import Entities
from crosslogic.contracts import names
from crosslogic.contracts.node import Machine, NodeProvisioningInput, NodeSpec
from crosslogic.domain.errors import Rejected
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import Node, NodeState, RouteEntry
from crosslogic.hot import connection as hot
from crosslogic.hot.routes import RouteBoard
from crosslogic.settings import Settings
from crosslogic.store import database
from crosslogic.store.nodes import NodeStore

WAIT_S = 30.0


class EngineServer:
    """A machine's engine: as much of one as probes see. `load` is what its metrics say."""

    def __init__(self) -> None:
        self.is_well = True
        self.is_mute = False  # It accepts connections and never says a word.
        self.can_generate = True
        self.refusals = 0  # So many requests it fails, then it is well.
        self.is_full = False  # It refuses generations for its load.
        self.progress = 0  # Tokens that it says it has made so far.
        self.grows_by = 0  # Tokens more at every look at its metrics.
        self.has_metrics = True
        self.load = 0
        self.says = "hello"
        self.revision = 0
        self.requests: list[str] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Refuse connections from now on, as the port of a dead process does."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next(
                (int(line[16:]) for line in head.lower().split("\r\n") if line.startswith("content-length: ")), 0
            )
            await reader.readexactly(length)
            path = head.split(" ")[1]
            self.requests.append(path)
            if self.is_mute:
                await reader.read()
            status, body = self._answer(path)
            writer.write(
                f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
            )
            await writer.drain()
        writer.close()

    def _answer(self, path: str) -> tuple[int, bytes]:
        if self.refusals:
            self.refusals -= 1
            return 503, b"{}"
        if not self.is_well:
            return 503, b"{}"
        if path == "/health":
            return 200, b"{}"
        if path == "/metrics":
            if not self.has_metrics:
                return 404, b""
            self.progress += self.grows_by
            progress = f"llamacpp:tokens_predicted_total {self.progress}\n"
            return 200, f"llamacpp:requests_processing {self.load}\nllamacpp:requests_deferred 0\n{progress}".encode()
        if self.is_full:
            return 429, b"{}"
        if not self.can_generate:
            return 500, b"{}"
        usage = {"prompt_tokens": 5, "completion_tokens": 24}
        choice = {"message": {"content": self.says}, "text": self.says}
        return 200, json.dumps({"choices": [choice], "data": [{}], "usage": usage}).encode()


Fault = Callable[[], Awaitable[None]]


@dataclass
class MadeUpCloud:
    """A cloud that does what tests say: `before` and `after` hold faults for the next calls of an operation."""

    capacity: int = 100
    boots: bool = True  # False: machines stay "starting" for ever.
    lag_reads: int = 0  # A new machine is unknown to so many reads.
    machines: dict[str, Machine] = field(default_factory=dict[str, Machine])
    engines: dict[str, EngineServer] = field(default_factory=dict[str, EngineServer])
    listed: int = 0  # How often the list was asked for.
    ever: list[str] = field(default_factory=list[str])
    before: dict[str, deque[Fault]] = field(default_factory=dict[str, deque[Fault]])
    after: dict[str, deque[Fault]] = field(default_factory=dict[str, deque[Fault]])
    on_engine: Callable[[EngineServer], None] | None = None
    _hidden: dict[str, int] = field(default_factory=dict[str, int])

    @contextlib.asynccontextmanager
    async def _call(self, operation: str) -> AsyncGenerator[None]:
        if self.before.get(operation):
            await self.before[operation].popleft()()
        yield
        if self.after.get(operation):
            await self.after[operation].popleft()()

    async def ensure(self, spec: NodeSpec) -> None:
        # As with any server: an order that has reached it is carried out, whether the client still listens or not.
        await asyncio.shield(asyncio.ensure_future(self._ensure(spec)))

    async def _ensure(self, spec: NodeSpec) -> None:
        async with self._call("ensure"):
            known = self.machines.get(spec.cluster)
            if known is not None and known.status != MachineStatus.GONE:
                return
            alive = [machine for machine in self.machines.values() if machine.status != MachineStatus.GONE]
            if len(alive) >= self.capacity:
                raise Rejected(f"{spec.region} has no capacity for {spec.gpu} now.", code="no_capacity")
            engine = EngineServer()
            engine.revision = spec.revision
            if self.on_engine is not None:
                self.on_engine(engine)
            await engine.start()
            self.engines[spec.cluster] = engine
            self.ever.append(spec.cluster)
            self._hidden[spec.cluster] = self.lag_reads
            status = MachineStatus.RUNNING if self.boots else MachineStatus.STARTING
            self.machines[spec.cluster] = Machine(spec.cluster, status, engine.endpoint if self.boots else "")

    async def find(self, cluster: str) -> Machine | None:
        async with self._call("find"):
            if self._hidden.get(cluster, 0) > 0:
                self._hidden[cluster] -= 1
                return None
            return self.machines.get(cluster)

    async def list_all(self, prefix: str) -> list[Machine]:
        async with self._call("list_all"):
            self.listed += 1
            return [machine for cluster, machine in self.machines.items() if cluster.startswith(prefix)]

    async def end(self, cluster: str) -> None:
        async with self._call("end"):
            self.take(cluster, "ended by us")

    def plant(self, cluster: str) -> None:
        """A machine that nobody has ordered here."""
        self.engines[cluster] = EngineServer()
        self.machines[cluster] = Machine(cluster, MachineStatus.RUNNING)

    def take(self, cluster: str, reason: str = "preempted") -> None:
        """The machine and its engine are gone, as if its power had been cut."""
        if cluster in self.machines:
            self.machines[cluster] = Machine(cluster, MachineStatus.GONE, "", reason)
            self.engines[cluster].stop()

    @property
    def alive(self) -> set[str]:
        """Names of the machines that cost money."""
        return {cluster for cluster, machine in self.machines.items() if machine.status != MachineStatus.GONE}

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()


@dataclass
class FleetUnderTest:
    """What a test holds."""

    settings: Settings
    client: Client
    task_queue: str
    pool: asyncpg.Pool
    redis: aioredis.Redis
    cloud: MadeUpCloud
    board: RouteBoard
    nodes: NodeStore
    fleet: fleet_worker.Fleet

    async def provision(self, workflow_id: str = "", **fields: Any) -> WorkflowHandle[Any, Any]:
        """Start a NodeProvisioning as an operator does."""
        values: dict[str, Any] = {"model": "llama-7b", "region": "in-mumbai", "drain_timeout_s": 5, **fields}
        order = NodeProvisioningInput(**values)
        return await self.client.start_workflow(
            names.NODE_PROVISIONING, order, id=workflow_id or f"by-hand-{uuid4()}", task_queue=self.task_queue
        )

    async def serve_one(self, **fields: Any) -> Node:
        """Provision a node and return its row when it serves."""
        result = await (await self.provision(**fields)).result()
        assert result["state"] == "ready"
        return await self.nodes.get(NODE.parse(result["node_id"]))

    @property
    def fleet_engine(self) -> EngineClient:
        """A client of engines with the fleet's own secret."""
        secret = self.settings.node_secret
        return EngineClient(secret.get_secret_value() if secret else "", self.settings.probe_timeout_s)

    async def adopt_all(self) -> None:
        """Give every node that serves its lifecycle, as the worker's keeper does."""
        await fleet_worker.keep_nodes_once(Entities(self.client, self.task_queue, grace_s=0.0), self.fleet)

    def lifecycle(self, node: Node) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(names.node_workflow_id(node.node_id))

    async def add_deployment(self, name: str, model: str = "llama-3-8b", **regions: int) -> None:
        """Promise so many replicas; regions are written with underscores."""
        await self.pool.execute("INSERT INTO deployments (name, model) VALUES ($1, $2)", name, model)
        for region, replicas in regions.items():
            await self.pool.execute(
                "INSERT INTO deployment_regions VALUES ($1, $2, $3, $3)", name, region.replace("_", "-"), replicas
            )

    async def keep_deployment(self, name: str) -> WorkflowHandle[Any, Any]:
        return await self.client.start_workflow(
            names.DEPLOYMENT_SCALING,
            {"deployment": name},
            id=names.deployment_workflow_id(name),
            task_queue=self.task_queue,
            # Tests share the server, and the workflow's id derives from the deployment alone.
            id_conflict_policy=WorkflowIDConflictPolicy.TERMINATE_EXISTING,
        )

    async def watch(self, region: str = "in-mumbai") -> WorkflowHandle[Any, Any]:
        return await self.client.start_workflow(
            names.FLEET_HEALTH,
            {"region": region},
            id=names.fleet_health_workflow_id(region),
            task_queue=self.task_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.TERMINATE_EXISTING,
        )

    async def only_node(self) -> Node:
        """The one row there is."""
        rows = await self.nodes.list_all()
        assert len(rows) == 1, rows
        return rows[0]

    async def until(self, what: str, look: Callable[[], Awaitable[Any]], within_s: float = WAIT_S) -> Any:
        """The first true value of `look`."""
        last: Any = None
        try:
            async with asyncio.timeout(within_s):
                while not (last := await look()):  # noqa: ASYNC110 (the servers have no events to wait for)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            rows = [(node.state, node.reason) for node in await self.nodes.list_all()]
            raise AssertionError(f"not within {within_s} s: {what}; nodes: {rows}") from None
        return last

    async def until_state(self, state: NodeState, within_s: float = WAIT_S) -> Node:
        """The newest node, as soon as it is in that state."""

        async def look() -> Node | None:
            return next((node for node in await self.nodes.list_all() if node.state is state), None)

        return await self.until(f"a node is {state}", look, within_s)

    async def until_looked_after(self) -> Node:
        """The node that serves, as soon as its lifecycle runs."""
        node = await self.until_state(NodeState.READY)

        async def look() -> bool:
            try:
                await self.lifecycle(node).describe()
            except RPCError:
                return False
            return True

        await self.until("its lifecycle runs", look)
        return node

    async def check_books(self) -> None:
        """F1 at quiescence: machines = rows that have not ended = route table. F3: each machine had its row."""
        rows = await self.nodes.list_all()
        alive = [node for node in rows if node.ended_at is None]
        assert self.cloud.alive == {node.cluster for node in alive if node.provider != "joined"}
        assert {entry.node_id for entry in await self.board.read_all()} == {node.node_id for node in alive}
        assert set(self.cloud.ever) <= {node.cluster for node in rows}
        for entry in await self.board.read_all():
            assert entry == (await self.nodes.get(NODE.parse(entry.node_id))).route_entry

    async def routes(self) -> dict[str, RouteEntry]:
        return {entry.node_id: entry for entry in await self.board.read_all()}


@contextlib.asynccontextmanager
async def making_fleet(settings: Settings) -> AsyncGenerator[FleetUnderTest]:
    """A fleet on the servers and with the names that the settings give; its worker does not run yet."""
    client = await temporal.connect(settings)
    pool = await database.connect(settings)
    redis = hot.connect(settings)
    board = RouteBoard(redis, settings.redis_prefix)
    cloud = MadeUpCloud()
    fleet = fleet_worker.assemble(settings, pool, {"local": cloud}, redis)
    task_queue = settings.fleet_task_queue
    try:
        yield FleetUnderTest(settings, client, task_queue, pool, redis, cloud, board, NodeStore(pool), fleet)
    finally:
        await terminate_all(client, task_queue)
        cloud.stop()
        await fleet.close()
        await redis.aclose()
        await pool.close()


# Fast enough for tests; the ratios are those of the defaults.
FAST = {
    "probe_interval_s": 0.2,
    "probe_timeout_s": 1.0,
    "generation_interval_s": 0.8,
    "generation_timeout_s": 1.0,
    "silence_s": 1.5,
    "cloud_interval_s": 0.5,
}


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncGenerator[None]:
    """Run a worker for the life of the block."""
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        await worker.shutdown()
        await task


async def terminate_all(client: Client, task_queue: str) -> None:
    """End what a test has left running: entities of the same id must not meet the next test."""
    standing = [names.deployment_workflow_id("llama-7b"), names.fleet_health_workflow_id("in-mumbai")]
    # The list lags; the entities' ids are known.
    running = [found.id async for found in client.list_workflows(f"TaskQueue = '{task_queue}' AND CloseTime IS NULL")]
    for workflow_id in {*standing, *running}:
        with contextlib.suppress(RPCError):
            await client.get_workflow_handle(workflow_id).terminate("the test is over")
