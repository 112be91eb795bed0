"""The API process: `uvicorn api.app:app --http api.inference.server:HttpProtocol`.

The lifespan owns every connection and background task.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import signal
import ssl
import time
from collections.abc import AsyncGenerator, Coroutine, Generator
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from api import admin, agents, error_handlers, scraping, sweeping
from api.admin import stripe_webhooks
from api.admin.context import AdminContext
from api.admin.schemas import ErrorOut
from api.agents import AgentContext
from api.demand import Arrivals, DemandTeller, keep_showing
from api.feeds import Feeds
from api.inference import metering, openapi
from api.inference.admission import Admission
from api.inference.auth import KeyRing, within
from api.inference.limits import Limits
from api.inference.metering import Shipper, UsageLog
from api.inference.observing import Observer
from api.inference.proxy import Relay
from api.inference.relayed import Deadlines
from api.inference.router import RouteTable
from api.inference.routes import Inference
from api.inference.tracing import Tracer
from api.passive import PassiveView
from api.usage import summarize
from crosslogic import telemetry
from crosslogic.clients import temporal
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import encode
from crosslogic.domain.scheduling import Rules
from crosslogic.hot import connection as redis_connection
from crosslogic.hot.demand import DemandBoard
from crosslogic.hot.heartbeats import HeartbeatBoard
from crosslogic.hot.limits import LimitBook
from crosslogic.hot.passive import PassiveBoard
from crosslogic.hot.pipeline import PipelinedRedis
from crosslogic.hot.routes import RouteBoard
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.settings import settings as read_settings
from crosslogic.store import database
from crosslogic.store.agents import AgentStore
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.changes import ChangeStore
from crosslogic.store.lead_times import LeadTimeStore
from crosslogic.store.limit_sums import LimitSums
from crosslogic.store.nodes import NodeStore
from crosslogic.store.scaling import ScalingStore
from crosslogic.store.sweeps import SweepStore
from crosslogic.store.tenancy import TenancyStore
from crosslogic.store.usage import UsageStore
from crosslogic.store.usage_logs import UsageLogStore
from crosslogic.trust import Trust

log = logging.getLogger("crosslogic.api")


class CrossLogicAPI(FastAPI):
    """FastAPI for everything but `/v1`, which api.inference.server takes from the socket straight to `inference`."""

    inference: Inference | None = None

    def openapi(self) -> dict[str, Any]:
        """FastAPI's document with the hot path's part added."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.add_to(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> CrossLogicAPI:
    """The whole API for these settings; it connects when it is started, and starts with any server away."""
    app = CrossLogicAPI(
        title="CrossLogic Inference Cloud",
        version="0.1.0",
        description="OpenAI-compatible inference under /v1, administration under /admin, node agents under /agent.",
        lifespan=partial(_lifespan, settings),
        # Their pages load scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    error_handlers.install(app)
    app.include_router(admin.router)
    app.include_router(agents.router)
    app.include_router(stripe_webhooks.router)
    _add_operations(app, settings)
    return app


@contextlib.asynccontextmanager
async def _lifespan(settings: Settings, app: CrossLogicAPI) -> AsyncGenerator[None]:
    secret = settings.node_secret.get_secret_value() if settings.node_secret else ""
    pool = await database.connect(settings, at_once=0)
    redis = redis_connection.connect(settings)
    pipeline = PipelinedRedis(settings.redis_url.get_secret_value())
    observer = Observer()
    sender = telemetry.SpanSender(settings.otlp_endpoint, "crosslogic-api") if settings.otlp_endpoint else None
    usage_log = UsageLog(settings.usage_log_dir, encode(new_id()))
    rules = Rules(settings.full_load_s, settings.slow_start_s, settings.ejected_share)
    trust = Trust(AgentStore(pool), secret, "api.crosslogic.internal", _now)
    table = RouteTable(
        partial(node_credential, secret), _tls(), rules, agent_tls=trust.context, guard=settings.refuse_address
    )
    process = encode(new_id())
    book = LimitBook(pipeline, settings.redis_prefix, process, LimitSums(pool).read)
    arrivals = Arrivals(NodeStore(pool), LeadTimeStore(pool))
    limits = Limits(book, observer.would_refuse)
    deadlines = Deadlines(
        connect_s=settings.connect_timeout_s,
        first_byte_s=settings.first_byte_timeout_s,
        idle_s=settings.idle_timeout_s,
        total_s=settings.total_timeout_s,
    )
    admission = Admission(
        table,
        queue_s=settings.queue_timeout_s,
        queue_most=settings.queue_requests,
        hold_s=settings.hold_timeout_s,
        full_load_s=settings.full_load_s,
        processes=lambda: book.sharers,
        eta_s=arrivals.eta_s,
        on_shed=observer.shed,
    )
    relay = Relay(table, admission, usage_log, limits, observer, deadlines, settings.hold_timeout_s)
    tracer = Tracer(sender.send if sender else None, settings.trace_sample_share, settings.trace_asked_per_s)
    keys = KeyRing(TenancyStore(pool).find_principals, _now, is_demo_allowed=settings.is_dev)
    usage, logs = UsageStore(pool), UsageLogStore(pool)
    inference = Inference(
        keys=keys,
        limits=limits,
        table=table,
        relay=relay,
        usage_log=usage_log,
        observer=observer,
        read_usage=lambda principal, options: summarize(usage, principal, options, _now()),
        max_body_bytes=settings.max_body_bytes,
        tracer=tracer,
    )
    board = RouteBoard(redis, settings.redis_prefix)
    feeds = Feeds(
        changes=ChangeStore(pool),
        catalog=CatalogStore(pool),
        nodes=NodeStore(pool),
        board=board,
        keys=keys,
        table=table,
        inference=inference,
    )
    passive = PassiveView(table, PassiveBoard(redis, settings.redis_prefix), process)
    demand = DemandTeller(
        DemandBoard(redis, settings.redis_prefix), process, table=table, admission=admission, observer=observer
    )
    shipper = Shipper(usage_log, usage.add)
    app.state.admin = AdminContext(settings=settings, pool=pool, connect_temporal=partial(temporal.connect, settings))
    app.state.agents = AgentContext(app.state.admin, trust, HeartbeatBoard(redis, settings.redis_prefix), board)
    app.state.observe = partial(_observe, observer, table, relay, admission, usage_log, book)
    door = await scraping.listen(settings, app.state.observe)
    app.state.is_ready = lambda: feeds.is_ready
    app.inference = inference
    background: list[Coroutine[Any, Any, None]] = [
        pipeline.run(),
        usage_log.keep_synced(),
        shipper.run(),
        metering.keep_recovering(settings.usage_log_dir, usage_log.directory.name, usage.add, logs.forget),
        metering.keep_reporting(usage_log, logs.report, _now),
        metering.keep_pruning(usage.prune_decisions, _now),
        feeds.keep_polling(),
        feeds.keep_listening(),
        limits.keep_renewing(),
        relay.keep_progress(),
        table.keep_probing(),
        trust.keep_fresh(),
        passive.keep_telling(),
        observer.keep_measuring(),
        demand.keep_telling(),
        arrivals.keep_reading(),
        keep_showing(ScalingStore(pool), observer),
        sweeping.keep_showing(SweepStore(pool), observer, _now),
    ]
    tasks = [asyncio.create_task(coroutine, name=getattr(coroutine, "__qualname__", None)) for coroutine in background]
    for task in tasks:
        task.add_done_callback(_note_end)
    # What is allocated by now lives as long as the process: keep the collector from walking it (docs/performance.md).
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        with contextlib.suppress(TimeoutError):
            # Connections are taken from then on, perhaps from a socket that others share who know everything.
            await within(settings.start_patience_s, asyncio.gather(feeds.ready.wait(), trust.ready.wait()))
        with _ending_with_its_supervisor():
            yield
    finally:
        app.inference = None
        await relay.cut()
        with contextlib.suppress(Exception):
            # Otherwise the others would leave it a share of every region's capacity until it counts as dead.
            await within(1, limits.leave())
        with contextlib.suppress(Exception):
            await within(1, demand.leave())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=2)
        with contextlib.suppress(Exception):
            while await within(2, shipper.ship_once()):
                pass
            if usage_log.is_empty:
                # What was shipped keeps no hour open.
                await within(1, logs.forget(usage_log.directory.name))
        with contextlib.suppress(OSError):
            usage_log.close()
        table.close()
        if door is not None:
            door.close()
        if sender is not None:
            await sender.close()
        await redis.aclose()
        with contextlib.suppress(TimeoutError):
            await within(1, pool.close())
        pool.terminate()


def _add_operations(app: CrossLogicAPI, settings: Settings) -> None:
    @app.get("/healthz", tags=["operations"], summary="Is the process up?")
    async def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="Has it read keys, models and nodes, so that it can answer?",
        responses={503: {"description": "Not yet."}},
    )
    async def readyz(request: Request) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        is_ready: bool = request.app.state.is_ready()
        return JSONResponse({"status": "ready" if is_ready else "starting"}, 200 if is_ready else 503)

    @app.get(
        "/metrics",
        tags=["operations"],
        summary="Prometheus metrics; outside dev mode for the admin token only",
        response_class=PlainTextResponse,
        responses={401: {"model": ErrorOut, "description": "Not the admin token."}},
    )
    async def metrics(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not scraping.may_scrape(settings, request.headers.get("authorization", "")):
            raise Rejected("Send the admin token: Authorization: Bearer …", status=401, code="invalid_token")
        return Response(request.app.state.observe(), media_type=scraping.CONTENT_TYPE)


def _observe(
    observer: Observer,
    table: RouteTable,
    relay: Relay,
    admission: Admission,
    usage_log: UsageLog,
    book: LimitBook,
) -> bytes:
    # A pool that has lost its nodes is shown with none, not left out.
    routable: dict[tuple[str, ...], int] = dict.fromkeys(observer.routable_nodes.values, 0)
    for node in table.nodes:
        place = (node.entry.model, node.entry.region)
        routable[place] = routable.get(place, 0) + node.entry.is_routable
    for place, count in routable.items():
        observer.routable_nodes.set(count, *place)
    observer.limits_alone.set(book.is_alone)
    observer.route_table_age.set(asyncio.get_running_loop().time() - table.refreshed_at)
    observer.streams.set(relay.streams)
    for place, waiting in admission.queues.items():
        observer.queue_length.set(waiting, *place)
    observer.open_holds.set(book.open_holds)
    observer.idle_connections.set(sum(node.upstream.idle_connections for node in table.nodes))
    observer.usage_pending.set(usage_log.kept_bytes)
    observer.usage_lag_records.set(usage_log.lag_records)
    observer.usage_lag_age.set(usage_log.lag_s(time.time()))
    return observer.page()


@cache
def _tls() -> ssl.SSLContext:
    """How nodes are verified; reading the machine's CAs takes a tenth of a second."""
    return ssl.create_default_context()


@contextlib.contextmanager
def _ending_with_its_supervisor() -> Generator[None]:
    """One of several processes ends as if told to when its supervisor dies: else the next one found its port taken."""
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(supervisor.sentinel)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(supervisor.sentinel, end)
    try:
        yield
    finally:
        loop.remove_reader(supervisor.sentinel)


def _note_end(task: asyncio.Task[None]) -> None:
    """A background task never ends by itself; without it the process would decay silently."""
    if not task.cancelled():
        log.critical("%s has ended; restart this process", task.get_name(), exc_info=task.exception())


def _now() -> datetime:
    return datetime.now(UTC)


def __getattr__(name: str) -> CrossLogicAPI:
    # Made on demand, so that importing this module needs no settings.
    if name == "app":
        settings = read_settings()
        telemetry.configure_logging(settings)
        globals()["app"] = app = create_app(settings)
        return app
    raise AttributeError(name)
