"""The fleet worker: `python worker.py`. Joins clients, activities and workflows, and keeps the entities running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg
import redis.asyncio as aioredis
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Interceptor, Worker

from activities.authority import AuthorityActivities
from activities.cloud import Cloud, CloudActivities
from activities.deployments import DeploymentActivities
from activities.interruptions import InterruptionActivities
from activities.ledger import LedgerActivities
from activities.manners import Manners
from activities.nodes import NodeActivities, spec_of
from activities.notifications import NotificationActivities
from activities.probes import ProbeActivities
from activities.rollouts import RolloutActivities
from activities.sweeps import SweepActivities
from crosslogic.clients import temporal
from crosslogic.clients.engine import EngineClient
from crosslogic.clients.entities import Entities, Kept
from crosslogic.clients.local_cloud import LocalCloud
from crosslogic.clients.notifier import Notifier
from crosslogic.clients.skypilot import SkyPilot
from crosslogic.contracts import names
from crosslogic.contracts.authority import CertificateRotationInput
from crosslogic.contracts.ledger import UsageSealingInput
from crosslogic.contracts.sweep import FleetSweepInput
from crosslogic.domain.autoscaling import ScalingRules
from crosslogic.domain.certificates import join_token
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.health import HealthPolicy
from crosslogic.hot import connection as hot
from crosslogic.hot.demand import DemandBoard
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.hot.passive import PassiveBoard
from crosslogic.hot.routes import RouteBoard
from crosslogic.settings import Settings, settings
from crosslogic.store import database
from crosslogic.store.agents import AgentStore
from crosslogic.store.buckets import BucketStore
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.lead_times import LeadTimeStore
from crosslogic.store.ledger import LedgerStore
from crosslogic.store.nodes import NodeStore
from crosslogic.store.notifications import NotificationStore
from crosslogic.store.placement import PlacementStore
from crosslogic.store.preemptions import PreemptionStore
from crosslogic.store.prices import PriceStore
from crosslogic.store.revisions import RevisionStore
from crosslogic.store.scaling import ScalingStore
from crosslogic.store.sweeps import SweepStore
from crosslogic.store.usage import UsageStore
from crosslogic.store.usage_logs import UsageLogStore
from crosslogic.telemetry import configure_logging
from crosslogic.trust import Trust
from workflows.certificate_rotation import CertificateRotation
from workflows.deployment_rollout import DeploymentRollout
from workflows.deployment_scaling import DeploymentScaling
from workflows.fleet_health import FleetHealth
from workflows.fleet_sweep import FleetSweep
from workflows.node_lifecycle import NodeLifecycle
from workflows.node_provisioning import NodeProvisioning
from workflows.usage_sealing import UsageSealing

log = logging.getLogger("crosslogic.worker")

T = TypeVar("T")

WORKFLOWS: Sequence[type[Any]] = (
    NodeProvisioning,
    NodeLifecycle,
    FleetHealth,
    DeploymentScaling,
    DeploymentRollout,
    CertificateRotation,
    FleetSweep,
    UsageSealing,
)

SCHEDULES = (
    temporal.Standing(
        "certificate-rotation",
        names.CERTIFICATE_ROTATION,
        CertificateRotationInput(),
        timedelta(days=1),
        "Authorities get successors in time; agents that have not renewed their certificates are told to.",
    ),
    temporal.Standing(
        "fleet-sweep",
        names.FLEET_SWEEP,
        FleetSweepInput(),
        timedelta(minutes=2),
        "Every machine in the clouds is one that we intended: the sweep proves it, and ends what is not.",
    ),
    temporal.Standing(
        "usage-sealing",
        names.USAGE_SEALING,
        UsageSealingInput(),
        timedelta(minutes=1),
        "Hours whose requests have all ended are sealed, rated and posted.",
    ),
)

# After SIGTERM: activities finish or are given back, then the process ends, whatever hangs.
GRACEFUL_SHUTDOWN = timedelta(seconds=2)
LONGEST_SHUTDOWN_S = 3.5
# Entities that were closed, and deployments that are new, are noticed within this.
KEEP_INTERVAL_S = 30.0
# How soon a request that waits for a first node is seen, and how long nobody is woken again after that.
WAKE_INTERVAL_S = 1.0
WOKEN_PAUSE_S = 5.0
# Between two attempts to reach what is not there yet, and between two lines that say so.
RETRY_INTERVAL_S = 0.5
COMPLAINT_INTERVAL_S = 10.0


@dataclass
class Fleet:
    """Everything that the fleet's activities hold."""

    nodes: NodeStore
    catalog: CatalogStore
    demand: DemandBoard
    activities: list[Callable[..., Any]]
    close: Callable[[], Awaitable[None]]
    trust: Trust


def assemble(settings: Settings, pool: asyncpg.Pool, clouds: dict[str, Cloud], redis: aioredis.Redis) -> Fleet:
    """Put activities together from their clients."""
    secret = settings.node_secret.get_secret_value() if settings.node_secret else ""
    agents = AgentStore(pool)
    trust = Trust(agents, secret, "worker.crosslogic.internal", _now)
    engine = EngineClient(secret, settings.probe_timeout_s, trust=trust, guard=settings.refuse_address)
    lead_times = LeadTimeStore(pool)
    nodes, catalog = NodeStore(pool), CatalogStore(pool)
    board = RouteBoard(redis, settings.redis_prefix)
    writer = NodeActivities(
        nodes,
        catalog,
        board,
        providers=frozenset(clouds),
        default_provider=settings.cloud_provider,
        is_loopback_allowed=settings.is_dev,
        lead_times=lead_times,
        node_secret=secret,
    )
    machines = CloudActivities(
        clouds, nodes, is_loopback_allowed=settings.is_dev, catalog=catalog, placement=PlacementStore(pool)
    )
    probes = ProbeActivities(
        engine,
        nodes,
        clouds,
        board,
        catalog,
        HeartbeatBoard(redis, settings.redis_prefix),
        PassiveBoard(redis, settings.redis_prefix),
        policy=HealthPolicy.scaled(settings.silence_s),
        probe_interval_s=settings.probe_interval_s,
        cloud_interval_s=settings.cloud_interval_s,
        generation_interval_s=settings.generation_interval_s,
        generation_timeout_s=settings.generation_timeout_s,
    )
    demand = DemandBoard(redis, settings.redis_prefix)
    deployments = DeploymentActivities(
        nodes,
        catalog,
        writer,
        decisions=ScalingStore(pool),
        lead_times=lead_times,
        demand=demand,
        heartbeats=HeartbeatBoard(redis, settings.redis_prefix),
        rules=ScalingRules(full_load_s=settings.full_load_s),
    )
    authority = AuthorityActivities(trust, agents)
    interruptions = InterruptionActivities(PreemptionStore(pool))
    rollouts = RolloutActivities(RevisionStore(pool), nodes, catalog, board, engine)
    sweeps = SweepActivities(clouds, nodes, SweepStore(pool), node_secret=secret)
    ledger = LedgerActivities(
        UsageStore(pool),
        UsageLogStore(pool),
        BucketStore(pool),
        PriceStore(pool),
        LedgerStore(pool),
        longest_request_s=settings.total_timeout_s,
        now=_now,
    )
    notifier = Notifier(settings)
    notifications = NotificationActivities(NotificationStore(pool), notifier, _now)
    held = (
        *(writer, machines, probes, deployments, authority, interruptions, rollouts, sweeps),
        *(ledger, notifications),
    )
    activities = [method for one in held for method in activities_of(one)]

    async def close() -> None:
        await engine.close()
        await notifier.close()

    return Fleet(nodes, catalog, demand, activities, close, trust)


def activities_of(holder: object) -> list[Callable[..., Any]]:
    """The bound activity methods of an object."""
    found = (getattr(holder, name) for name in dir(holder) if not name.startswith("_"))
    return [method for method in found if hasattr(method, "__temporal_activity_definition")]


def make_worker(
    client: Client,
    task_queue: str,
    activities: Sequence[Callable[..., Any]],
    interceptors: Sequence[Interceptor] = (),
) -> Worker:
    """The worker as it runs in production and in tests, which may look in with interceptors of their own."""
    return Worker(
        client,
        task_queue=task_queue,
        workflows=WORKFLOWS,
        activities=activities,
        interceptors=[*interceptors, Manners()],
        workflow_runner=temporal.workflow_runner(),
        # A killed worker's sticky queue would hold its workflows back for 10 s (T5).
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=1),
        # Heartbeats go out about once a second; the SDK would hold them back longer.
        max_heartbeat_throttle_interval=timedelta(seconds=2),
        default_heartbeat_throttle_interval=timedelta(seconds=2),
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        # A node's, and some to spare: one that is not cached is read again from its beginning.
        max_cached_workflows=2_000,
        max_concurrent_workflow_tasks=50,
        max_concurrent_activities=500,
    )


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Work until `stop` is set. Waits for servers that are not there; raises Rejected for what only people can mend."""
    pool = await _until(stop, "Postgres", lambda: _connect_database(settings))
    client = await _until(stop, "Temporal", lambda: temporal.connect(settings))
    if pool is None or client is None:
        return
    await _until(stop, "search attributes", lambda: _ensure_search_attributes(client, settings))
    redis = hot.connect(settings)
    clouds: dict[str, Cloud] = {}
    secret = settings.node_secret
    rented: list[LocalCloud | SkyPilot] = []
    if settings.cloud_provider == "local" or settings.local_cloud_token is not None:
        rented.append(local := LocalCloud.of(settings))
        clouds["local"] = local
    if settings.cloud_provider == "skypilot" or settings.agent_control_url:
        token_of = partial(join_token, secret.get_secret_value() if secret else "")
        rented.append(skypilot := SkyPilot.of(settings, token_of))
        clouds["skypilot"] = skypilot
    fleet = assemble(settings, pool, clouds, redis)
    keeping = asyncio.create_task(keep_entities(client, settings.fleet_task_queue, fleet))
    trusting = asyncio.create_task(fleet.trust.keep_fresh())
    waking = asyncio.create_task(keep_waking(client, fleet))
    try:
        await _work(client, settings, fleet, stop)
    finally:
        keeping.cancel()
        trusting.cancel()
        waking.cancel()
        with contextlib.suppress(Exception):
            await fleet.close()
            for cloud in rented:
                await cloud.close()
            await redis.aclose()
            pool.terminate()


async def _work(client: Client, settings: Settings, fleet: Fleet, stop: asyncio.Event) -> None:
    """Poll the task queue. A worker that fails is replaced by a new one: whatever it was, work must go on."""
    while not stop.is_set():
        worker = make_worker(client, settings.fleet_task_queue, fleet.activities)
        running = asyncio.create_task(worker.run())
        stopping = asyncio.create_task(stop.wait())
        log.info("working on task queue %r at %s", settings.fleet_task_queue, settings.temporal_address)
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            log.info("stopping")
            try:
                async with asyncio.timeout(LONGEST_SHUTDOWN_S):
                    await worker.shutdown()
                    await running
            except TimeoutError:
                log.warning("some activities did not end in time; another worker goes on with them")
            return
        log.error("the worker failed and is started again", exc_info=running.exception())
        await asyncio.sleep(RETRY_INTERVAL_S)


async def keep_entities_once(entities: Entities, fleet: Fleet) -> Kept:
    """One round of `keep_entities`. Raises what the servers that are away raise."""
    catalog = await fleet.catalog.load()
    await entities.keep_standing(catalog.regions.regions, catalog.deployments)
    await entities.keep_rollouts(catalog.deployments.values())
    return await keep_nodes_once(entities, fleet)


async def keep_nodes_once(entities: Entities, fleet: Fleet) -> Kept:
    """The nodes' part of `keep_entities_once`."""
    catalog = await fleet.catalog.load()
    return await entities.keep_nodes(
        await fleet.nodes.list_alive(), fleet.nodes.find, partial(spec_of, catalog=catalog), fleet.nodes.hand_over
    )


async def keep_entities(client: Client, task_queue: str, fleet: Fleet, interval_s: float = KEEP_INTERVAL_S) -> None:
    """See to it, again and again, that every region, deployment and node has its workflow, and every schedule is."""
    entities = Entities(client, task_queue)
    while True:
        try:
            await keep_entities_once(entities, fleet)
            await temporal.ensure_schedules(client, SCHEDULES, task_queue)
        except Exception as error:
            # A server is away, or one of them speaks nonsense: the next round tries again either way.
            log.warning("the fleet's workflows cannot be looked after now: %s", error)
            await asyncio.sleep(min(interval_s, 2.0))
        else:
            await asyncio.sleep(interval_s)


async def wake_once(client: Client, fleet: Fleet) -> list[str]:
    """Nudge the deployments that requests wait for which found no node; their names. Raises what is away raises."""
    waited_for = {place for place, seen in (await fleet.demand.read() or {}).items() if seen.held_requests}
    if not waited_for:
        return []
    deployments = (await fleet.catalog.load()).deployments.values()
    woken = [
        deployment.name
        for deployment in deployments
        if any((deployment.model, target.region) in waited_for for target in deployment.regions)
    ]
    for name in woken:
        handle = client.get_workflow_handle(names.deployment_workflow_id(name))
        # One that is not there is started by `keep_entities`, and looks first of all.
        with contextlib.suppress(RPCError):
            await handle.signal(names.LOOK_AGAIN, rpc_timeout=timedelta(seconds=5))
    return woken


async def keep_waking(client: Client, fleet: Fleet) -> None:
    """See to it, again and again, that a deployment which was scaled to zero learns at once that it is wanted."""
    while True:
        try:
            is_anyone_woken = bool(await wake_once(client, fleet))
        except Exception as error:
            log.warning("whom requests wait for cannot be seen now: %s", error)
            is_anyone_woken = True
        # The node that was ordered takes longer than this.
        await asyncio.sleep(WOKEN_PAUSE_S if is_anyone_woken else WAKE_INTERVAL_S)


def _now() -> datetime:
    return datetime.now(UTC)


async def _connect_database(settings: Settings) -> asyncpg.Pool:
    pool = await database.connect(settings)
    try:
        await NodeStore(pool).list_alive()
    except (asyncpg.PostgresError, OSError) as error:
        pool.terminate()
        raise Unavailable(f"the schema is not there yet ({error}); run: python -m crosslogic.cli setup") from error
    return pool


async def _ensure_search_attributes(client: Client, settings: Settings) -> bool:
    try:
        await temporal.ensure_search_attributes(client, settings.temporal_namespace)
    except Rejected as error:
        # Somebody else may have registered them where we may not even ask.
        log.warning("%s", error.message)
    return True


async def _until(stop: asyncio.Event, what: str, attempt: Callable[[], Awaitable[T]]) -> T | None:
    """Try until it works; None when `stop` came first. Raises Rejected."""
    loop = asyncio.get_running_loop()
    complained_at = float("-inf")
    while not stop.is_set():
        try:
            return await attempt()
        except Unavailable as error:
            if loop.time() - complained_at >= COMPLAINT_INTERVAL_S:
                log.warning("waiting for %s: %s", what, error.message)
                complained_at = loop.time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RETRY_INTERVAL_S)
    return None


async def _main() -> int:
    try:
        configured = settings()
    except ValidationError as error:
        sys.stderr.write(f"The settings cannot be used:\n{error}\n")
        return 2
    configure_logging(configured)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await run(configured, stop)
    except CrossLogicError as error:
        log.error("%s", error.message)
        return 1
    return 0


def main() -> None:
    """Run until SIGTERM, then end at once: a process that used Temporal may crash while its interpreter ends."""
    code = asyncio.run(_main())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
