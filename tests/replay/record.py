"""Records the histories that tests/replay replays: `python -m tests.replay.record [NAME …]`.

Run it when a new kind of life is added. Never record an existing one again to make a failing replay pass: workflows
that run in production have those very histories, and a change to them goes through `workflow.patched`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import sys
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import asyncpg

import worker as fleet_worker
from crosslogic.clients.entities import Entities
from crosslogic.contracts import names
from crosslogic.contracts.ledger import UsageSealingInput
from crosslogic.contracts.node import NodeLifecycleInput, NodeSpec
from crosslogic.contracts.sweep import FleetSweepInput
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import NodeState, cluster_name
from crosslogic.domain.revision import GoldenPrompt, RevisionSpec
from crosslogic.domain.spot import successor_of
from crosslogic.new_ids import new_id
from crosslogic.store.migrations import migrate
from crosslogic.store.revisions import RevisionStore
from tests.conftest import make_settings, serving
from tests.workflows.fleet import FAST, EngineServer, FleetUnderTest, making_fleet, running
from tests.workflows.test_idempotency import used

HISTORIES = Path(__file__).parent / "histories"

Scenario = Callable[[FleetUnderTest], Awaitable[dict[str, str]]]


async def served_and_drained(fleet: FleetUnderTest) -> dict[str, str]:
    handle = await fleet.provision()
    node = await fleet.until_state(NodeState.READY)
    await handle.result()
    await fleet.lifecycle(node).signal(names.DRAIN, "maintenance")
    await fleet.lifecycle(node).result()
    return {"provisioning-served": handle.id, "lifecycle-drained": fleet.lifecycle(node).id}


async def failed(fleet: FleetUnderTest) -> dict[str, str]:
    fleet.cloud.capacity = 0
    refused = await fleet.provision()
    with contextlib.suppress(Exception):
        await refused.result()
    wrong = await fleet.provision(model="gpt-9")
    with contextlib.suppress(Exception):
        await wrong.result()
    return {"provisioning-no-capacity": refused.id, "provisioning-bad-order": wrong.id}


def mute(engine: EngineServer) -> None:
    engine.can_generate = False


async def drained_early(fleet: FleetUnderTest) -> dict[str, str]:
    fleet.cloud.on_engine = mute
    handle = await fleet.provision()
    await fleet.until_state(NodeState.LOADING)
    await handle.signal(names.DRAIN, "not needed any more")
    await handle.result()
    return {"provisioning-drained": handle.id}


async def cancelled_while_launching(fleet: FleetUnderTest) -> dict[str, str]:
    asked = asyncio.Event()
    gate = asyncio.Event()

    async def wait() -> None:
        asked.set()
        await gate.wait()
        raise Unavailable("the cloud was away for a moment")

    fleet.cloud.before["ensure"] = deque([wait])
    handle = await fleet.provision()
    await asked.wait()
    await handle.cancel()
    await asyncio.sleep(1)
    gate.set()
    with contextlib.suppress(Exception):
        await handle.result()
    return {"provisioning-cancelled": handle.id}


async def cancelled(fleet: FleetUnderTest) -> dict[str, str]:
    node = await fleet.serve_one(drain_timeout_s=600)
    fleet.cloud.engines[node.cluster].load = 1
    await fleet.lifecycle(node).signal(names.DRAIN)
    await fleet.until_state(NodeState.DRAINING)
    await fleet.lifecycle(node).cancel()
    with contextlib.suppress(Exception):
        await fleet.lifecycle(node).result()
    return {"lifecycle-cancelled": fleet.lifecycle(node).id}


async def joined(fleet: FleetUnderTest) -> dict[str, str]:
    engine = EngineServer()
    await engine.start()
    found: dict[str, str] = {}
    for name, endpoint in (("lifecycle-joined", engine.endpoint), ("lifecycle-not-joined", "http://example.com")):
        node_id = NODE.show(new_id())
        spec = NodeSpec(node_id, "llama-7b", "in-mumbai", drain_timeout_s=5, endpoint=endpoint)
        handle: Any = await fleet.client.start_workflow(
            names.NODE_LIFECYCLE,
            NodeLifecycleInput(spec, is_admitted=False),
            id=names.node_workflow_id(node_id),
            task_queue=fleet.task_queue,
        )
        found[name] = handle.id
        if name == "lifecycle-joined":
            await fleet.until_state(NodeState.READY)
            await handle.signal(names.DRAIN)
        with contextlib.suppress(Exception):
            await handle.result()
    engine.stop()
    return found


async def scaled(fleet: FleetUnderTest) -> dict[str, str]:
    await fleet.add_deployment("llama-7b", in_mumbai=2)
    handle = await fleet.keep_deployment("llama-7b")

    async def serve(count: int) -> bool:
        alive = await fleet.nodes.list_alive()
        return len(alive) == count and all(node.state is NodeState.READY for node in alive)

    await fleet.until("two nodes serve", lambda: serve(2))
    await fleet.pool.execute("UPDATE deployment_regions SET replicas_min = 1, replicas_max = 1")
    await handle.signal(names.LOOK_AGAIN)
    await fleet.until("one is left", lambda: serve(1))
    await handle.terminate()
    return {"scaling-shrunk": handle.id}


async def healed(fleet: FleetUnderTest) -> dict[str, str]:
    await fleet.add_deployment("llama-7b", in_mumbai=1)
    deployment = await fleet.keep_deployment("llama-7b")
    watch = await fleet.watch()
    lost = await fleet.until_looked_after()
    fleet.cloud.take(lost.cluster)
    await fleet.lifecycle(lost).result()
    hung = await fleet.until_looked_after()
    fleet.cloud.engines[hung.cluster].stop()
    await fleet.lifecycle(hung).result()
    await fleet.until_looked_after()
    await fleet.pool.execute("UPDATE nodes SET deployment = NULL")
    await fleet.pool.execute("DELETE FROM deployment_regions")
    await fleet.pool.execute("DELETE FROM deployments")
    await deployment.signal(names.LOOK_AGAIN)
    await deployment.result()
    await watch.cancel()
    with contextlib.suppress(Exception):
        await watch.result()
    return {
        "lifecycle-lost": fleet.lifecycle(lost).id,
        "lifecycle-broken": fleet.lifecycle(hung).id,
        "health-healed": watch.id,
        "scaling-healed": deployment.id,
    }


async def orphaned(fleet: FleetUnderTest) -> dict[str, str]:
    fleet.cloud.on_engine = mute
    handle = await fleet.provision()
    node = await fleet.until_state(NodeState.LOADING)
    await handle.terminate()
    await fleet_worker.keep_entities_once(Entities(fleet.client, fleet.task_queue, grace_s=0.0), fleet.fleet)
    await fleet.lifecycle(node).result()
    return {"lifecycle-orphaned": fleet.lifecycle(node).id}


async def rotated(fleet: FleetUnderTest) -> dict[str, str]:
    handle = await fleet.client.start_workflow(
        names.CERTIFICATE_ROTATION, {"new_authority": False}, id="rotation-by-hand", task_queue=fleet.task_queue
    )
    await handle.result()
    return {"rotation": handle.id}


async def interrupted(fleet: FleetUnderTest) -> dict[str, str]:
    node = await fleet.serve_one()
    await fleet.lifecycle(node).signal(names.SPOT_NOTICE, "aws: terminate")
    await fleet.lifecycle(node).result()
    successor = NODE.show(successor_of(node.id))
    await fleet.client.get_workflow_handle(names.provisioning_workflow_id(successor)).result()
    return {"lifecycle-interrupted": fleet.lifecycle(node).id}


async def rolled_out(fleet: FleetUnderTest) -> dict[str, str]:
    await fleet.add_deployment("llama-7b", in_mumbai=1)
    await fleet.serve_one(deployment="llama-7b", drain_timeout_s=1)
    revisions = RevisionStore(fleet.pool)
    found: dict[str, str] = {}
    for name, revision in (("rollout-completed", 2), ("rollout-aborted", 3), ("rollout-failed", 4)):
        golden = [GoldenPrompt("Say hello.", "goodbye" if name == "rollout-failed" else "hello")]
        await revisions.create("llama-7b", RevisionSpec(golden=golden), actor="test")
        order = {"deployment": "llama-7b", "revision": revision, "bake_s": 0, "longest_bake_s": 0}
        handle: Any = await fleet.client.start_workflow(
            names.DEPLOYMENT_ROLLOUT,
            {**order, "hold_at_bp": 1000 if name == "rollout-aborted" else 0},
            id=names.rollout_workflow_id("llama-7b", revision),
            task_queue=fleet.task_queue,
        )
        if name == "rollout-aborted":

            async def is_held(handle: Any = handle) -> bool:
                return await handle.query(names.STATE) == "hold"

            await fleet.until("a canary", is_held)
            await handle.signal(names.ABORT, "not wanted")
        with contextlib.suppress(Exception):
            await handle.result()
        found[name] = handle.id
    return found


async def sealed(fleet: FleetUnderTest) -> dict[str, str]:
    await used(fleet.pool)
    handle: Any = await fleet.client.start_workflow(
        names.USAGE_SEALING, UsageSealingInput(), id="sealing-recorded", task_queue=fleet.task_queue
    )
    await handle.result()
    return {"sealing-rated": handle.id}


async def swept(fleet: FleetUnderTest) -> dict[str, str]:
    node = await fleet.serve_one()
    fleet.cloud.plant(cluster_name("local", "in-mumbai", "cpu", True, NODE.show(new_id()), "of another installation"))
    await fleet.pool.execute("UPDATE nodes SET changed_at = now() - interval '1 hour'")
    ids: dict[str, str] = {}
    for name, provider in (("sweep-proven", ""), ("sweep-refused", "moon"), ("sweep-cancelled", "")):
        if name == "sweep-proven":
            secret = fleet.settings.node_secret
            assert secret is not None
            planted = cluster_name("local", "us-east", "cpu", True, NODE.show(new_id()), secret.get_secret_value())
            fleet.cloud.plant(planted)
        handle: Any = await fleet.client.start_workflow(
            names.FLEET_SWEEP,
            FleetSweepInput(provider, look_again_s=1.0),
            id=f"sweep/{name}",
            task_queue=fleet.task_queue,
        )
        if name == "sweep-cancelled":
            await asyncio.sleep(0.5)
            await handle.cancel()
        with contextlib.suppress(Exception):
            await handle.result()
        ids[name] = handle.id
        if name == "sweep-proven":
            # The next one finds a node whose machine the cloud has taken.
            fleet.cloud.take(node.cluster)
    return ids


SCENARIOS: tuple[Scenario, ...] = (
    served_and_drained, failed, drained_early, cancelled_while_launching, cancelled, joined, healed, scaled, orphaned,
    rotated, interrupted, rolled_out, sealed, swept,
)  # fmt: skip


def scrubbed(value: Any) -> Any:
    """Without what names a machine: who polled, on which queue of its own, and the files of stack traces."""
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        hidden = {"identity": "worker", "stackTrace": ""}
        return {key: hidden.get(key, scrubbed(item)) for key, item in entries.items()}
    if isinstance(value, list):
        return [scrubbed(item) for item in cast(list[Any], value)]
    return "worker" if isinstance(value, str) and _WORKER.fullmatch(value) else value


# PID@HOST, as the SDK names itself and its sticky queue.
_WORKER = re.compile(r"\d+@\S+")


async def record(fleet: FleetUnderTest, scenario: Scenario) -> None:
    """Live through one scenario and store its histories."""
    for name, workflow_id in (await scenario(fleet)).items():
        history = await fleet.client.get_workflow_handle(workflow_id).fetch_history()
        document = {"workflowId": workflow_id, **scrubbed(history.to_json_dict())}
        (HISTORIES / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {len(history.events)} events", flush=True)


async def main(postgres: Postgres, valkey: Valkey, temporal: Temporal, wanted: list[str]) -> None:
    """Each scenario on a database, a prefix and a task queue of its own."""
    for scenario in SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        name = f"record_{scenario.__name__}"
        admin = await asyncpg.connect(postgres.url_of("postgres"))
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        await migrate(postgres.url_of(name))
        settings = make_settings(
            database_url=postgres.url_of(name),
            redis_url=valkey.url,
            redis_prefix=f"{name}:",
            temporal_address=temporal.address,
            fleet_task_queue=name,
            **FAST,
        )
        async with making_fleet(settings) as fleet:
            made = fleet_worker.make_worker(fleet.client, fleet.task_queue, fleet.fleet.activities)
            async with running(made):
                await record(fleet, scenario)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        folder.chmod(0o755)
        servers = (
            Postgres(folder / "postgres", free_port(), secrets.token_hex(8)),
            Valkey(folder / "valkey", free_port(), secrets.token_hex(8)),
            Temporal(folder / "temporal", free_port(), free_port(), free_port(), free_port()),
        )
        for server in servers:
            stack.enter_context(serving(server, folder))
        asyncio.run(main(*servers, sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
