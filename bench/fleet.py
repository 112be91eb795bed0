"""What a fleet costs at rest, and how soon the dead are found: `python -m bench.fleet --nodes 1000`.

Real Temporal, Postgres and Valkey and one `python worker.py`, all with the default intervals; engines and their cloud
are stubs. It prints one table: history events per second, each process's CPU and memory, and how long killed nodes
stayed ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import asyncpg
from temporalio.client import Client
from temporalio.service import RPCError

from bench.fleet_stub import CLUSTER
from bench.processes import BenchError, Program
from crosslogic.bootstrap import ROOT
from crosslogic.clients import temporal
from crosslogic.contracts import names
from crosslogic.dev.parts import Launch, Part
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.domain.ids import NODE
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings, child_environment
from crosslogic.store.migrations import migrate

START_S = 120.0
# Longer than it takes one worker to start a thousand lifecycles and look at each node once.
SETTLE_S = 900.0
ASK_AT_ONCE = 32

_ADD_NODE = """
    INSERT INTO nodes (id, model, region, provider, cluster, state, endpoint, workflow_id, generation, ready_at,
                       changed_at, capacity_tokens_per_s, is_spot, gpu, deployment)
    VALUES ($1, 'llama-3-8b', $2, 'local', $3, 'ready', $4, $5, 3, now() - interval '1 hour',
            now() - interval '1 hour', 2000, TRUE, 'L4', 'bench')
"""
_REGIONS = ("in-mumbai", "us-east", "eu-west", "ap-southeast")


class Stub:
    """The machines' process."""

    def __init__(self, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.fleet_stub", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        self.ports: dict[str, int | list[int]] = json.loads(self._process.stdout.readline())

    def kill(self, number: int) -> None:
        """Cut a machine's power."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"kill {number}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Bed:
    """The servers, the stub and the worker of one run."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.count = count
        self.programs: dict[str, Program] = {}
        self.stub = Stub(count)
        self.temporal = Temporal(folder / "temporal", free_port(), free_port(), free_port(), free_port())
        self.postgres = Postgres(folder / "postgres", free_port(), secrets.token_hex(8))
        self.valkey = Valkey(folder / "valkey", free_port(), secrets.token_hex(8))

    def start_servers(self) -> None:
        """Return when all of them do their job."""
        for part in (self.postgres, self.valkey, self.temporal):
            self._start(part, part.prepare())

    def start_worker(self) -> None:
        """The one worker, with the settings of production but for its cloud."""
        environment = child_environment(
            CROSSLOGIC_MODE="dev",
            CROSSLOGIC_DATABASE_URL=self.database_url,
            CROSSLOGIC_REDIS_URL=self.valkey.url,
            CROSSLOGIC_TEMPORAL_ADDRESS=self.temporal.address,
            CROSSLOGIC_NODE_SECRET=secrets.token_hex(32),
            CROSSLOGIC_CLOUD_PROVIDER="local",
            CROSSLOGIC_LOCAL_CLOUD_TOKEN="bench",
            CROSSLOGIC_LOCAL_CLOUD_URL=f"http://127.0.0.1:{self.stub.ports['cloud']}",
            PYTHONUNBUFFERED="1",
        )
        self.programs["worker"] = Program(
            "worker", [sys.executable, "worker.py"], _cores(), self._log("worker"), environment=environment, cwd=ROOT
        )

    @property
    def database_url(self) -> str:
        """Where the fleet's rows are."""
        return self.postgres.url_of("postgres")

    def _start(self, part: Part, launch: Launch) -> None:
        program = Program(
            part.name,
            launch.command,
            _cores(),
            self._log(part.name),
            environment=launch.environment,
            cwd=launch.cwd,
            user=launch.user,
            stop_signal=part.stop_signal,
        )
        self.programs[part.name] = program
        program.wait_until(lambda: asyncio.run(part.is_ready()), START_S)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def stop(self) -> None:
        """End everything, the worker first."""
        for program in reversed(self.programs.values()):
            with contextlib.suppress(BenchError):
                program.stop()
        self.stub.stop()
        self.postgres.forget()


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0))


async def seed(pool: asyncpg.Pool, bed: Bed) -> list[UUID]:
    """Nodes that have served for an hour, spread over all regions, of a deployment that promises nothing."""
    await pool.execute("INSERT INTO deployments (name, model) VALUES ('bench', 'llama-3-8b')")
    ports = bed.stub.ports["engines"]
    assert isinstance(ports, list)
    made: list[UUID] = []
    for number, port in enumerate(ports):
        node_id = new_id()
        workflow_id = names.node_workflow_id(NODE.show(node_id))
        place = (_REGIONS[number % len(_REGIONS)], CLUSTER.format(number), f"http://127.0.0.1:{port}", workflow_id)
        await pool.execute(_ADD_NODE, node_id, *place)
        made.append(node_id)
    return made


async def count_events(client: Client, workflow_ids: Sequence[str]) -> int:
    """The length of all these histories together; workflows that are not there yet have none."""
    gate = asyncio.Semaphore(ASK_AT_ONCE)

    async def length(workflow_id: str) -> int:
        async with gate:
            try:
                return (await client.get_workflow_handle(workflow_id).describe()).history_length
            except RPCError:
                return 0

    return sum(await asyncio.gather(*(length(workflow_id) for workflow_id in workflow_ids)))


async def settle(client: Client, workflow_ids: Sequence[str]) -> int:
    """Wait until every history has begun and none grows; how many events there are then."""
    deadline = time.monotonic() + SETTLE_S
    before = -1
    while time.monotonic() < deadline:
        lengths = await count_events(client, workflow_ids)
        # A lifecycle at rest has looked once and waits: a dozen events.
        if lengths == before and lengths >= 10 * len(workflow_ids):
            return lengths
        before = lengths
        await asyncio.sleep(10)
    raise BenchError(
        f"the fleet was not at rest within {SETTLE_S:.0f} s: {before} events in {len(workflow_ids)} histories"
    )


async def until_found(pool: asyncpg.Pool, node_ids: Sequence[UUID], within_s: float = 120.0) -> list[float]:
    """Seconds until each of these nodes was not ready any more."""
    started, left, found = time.monotonic(), set(node_ids), list[float]()
    while left and time.monotonic() - started < within_s:
        rows = await pool.fetch("SELECT id FROM nodes WHERE id = ANY($1::uuid[]) AND state <> 'ready'", list(left))
        for row in rows:
            left.discard(row["id"])
            found.append(time.monotonic() - started)
        await asyncio.sleep(0.1)
    if left:
        raise BenchError(f"{len(left)} dead nodes were not found within {within_s:.0f} s")
    return sorted(found)


async def run(bed: Bed, rest_s: float, deaths: int) -> None:
    """The whole measurement, printed."""
    await migrate(bed.database_url)
    settings = Settings.model_validate(
        {"mode": "dev", "temporal_address": bed.temporal.address, "cloud_provider": "local", "local_cloud_token": "x"}
    )
    client = await temporal.connect(settings)
    async with asyncpg.create_pool(bed.database_url, min_size=1, max_size=4) as pool:
        node_ids = await seed(pool, bed)
        lifecycles = [names.node_workflow_id(NODE.show(node_id)) for node_id in node_ids]
        standing = [names.fleet_health_workflow_id(region) for region in _REGIONS]
        bed.start_worker()
        started = time.monotonic()
        first = await settle(client, lifecycles)
        print(f"| {len(lifecycles)} lifecycles started, each looked once | {time.monotonic() - started:.0f} s |")
        print(f"| events of one lifecycle's start and look | {first / len(lifecycles):.1f} |")
        before = await count_events(client, [*lifecycles, *standing])
        used = {name: program.cpu_s() for name, program in bed.programs.items()}
        at = time.monotonic()
        await asyncio.sleep(rest_s)
        took_s = time.monotonic() - at
        after = await count_events(client, [*lifecycles, *standing])
        print(f"| events/s at rest, over {took_s:.0f} s | {(after - before) / took_s:.2f} |")
        for name, program in bed.programs.items():
            share = (program.cpu_s() - used[name]) / took_s
            print(f"| {name} at rest | {share * 100:.1f} % of a core, {program.rss_bytes() / 2**20:.0f} MiB |")
        victims = [number * (bed.count // deaths) for number in range(deaths)]
        for number in victims:
            bed.stub.kill(number)
        found = await until_found(pool, [node_ids[number] for number in victims])
        middle, worst = found[len(found) // 2], found[-1]
        print(f"| {deaths} nodes killed, out of routing after | median {middle:.1f} s, worst {worst:.1f} s |")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rest", type=float, default=60.0, help="seconds at rest")
    parser.add_argument("--deaths", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        bed = Bed(folder, options.nodes)
        try:
            bed.start_servers()
            asyncio.run(run(bed, options.rest, options.deaths))
        except BenchError as error:
            print(f"bench: {error}\n{bed.programs['worker'].last_words() if 'worker' in bed.programs else ''}")
            return 1
        finally:
            bed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
