"""What overload does to the goodput, and to whom: `python -m bench.overload --out FOLDER`.

The API as it runs in production, in a process of its own with real Postgres and Valkey, before two stub engines of a
fixed service rate. One tenant has reserved a fifth of the capacity and stays at its contract; two modest serverless
tenants ask a tenth each, a greedy one all the rest, from half of what can be served to three times as much. Nothing is
asserted: the table, `overload.json` and `overload.png` say what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crosslogic.dev.parts import Launch, Part, PythonPart
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.valkey import Valkey
from crosslogic.domain import keys
from crosslogic.domain.reservation import HOUR
from crosslogic.new_ids import new_id
from crosslogic.settings import child_environment
from crosslogic.store.migrations import migrate
from crosslogic.store.tenancy import TenancyStore

MODEL, REGION = "llama-3-8b", "us-east"
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)

# One engine: requests beyond its slots wait inside it.
ENGINES = 2
SLOTS = 16
SLOT_TOKENS_PER_S = 100
ANSWER_TOKENS = 100
PROMPT_TOKENS = 10
REQUEST_TOKENS = ANSWER_TOKENS + PROMPT_TOKENS
SERVICE_S = ANSWER_TOKENS / SLOT_TOKENS_PER_S
# What the fleet can serve, in requests a second.
CAPACITY_PER_S = ENGINES * SLOTS / SERVICE_S
# As measured at admission, prompts included. With one service time of work in flight every slot is busy and none waits.
NODE_TOKENS_PER_S = int(SLOTS * REQUEST_TOKENS / SERVICE_S)
FULL_LOAD_S = SERVICE_S
QUEUE_S = 2.0

RESERVED_SHARE = 0.2
MODEST_SHARE = 0.1
START_S = 60.0
# Goodput is counted from then on, when the first answers are there and queues are what they will be.
WARM_UP_S = 3.0
# uvicorn closes connections that are idle for 5 s.
KEPT_S = 2.0

_ADD_NODE = """
    INSERT INTO nodes (id, model, region, provider, cluster, state, endpoint, workflow_id, generation, ready_at,
                       capacity_tokens_per_s)
    VALUES ($1, $2, $3, 'joined', $4, 'ready', $5, 'bench', 3, now(), $6)
"""
_LIFT_LIMITS = """
    INSERT INTO limits (layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency)
    VALUES ('environment', $1, -1, -1, -1, -1), ('key', $2, -1, -1, -1, -1)
"""
_RESERVE = """
    INSERT INTO reservations (id, org_id, model, region, capacity_units, starts_at) VALUES ($1, $2, $3, $4, $5, $6)
"""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks, and how much: `share` is of the capacity; the greedy one's is what is left of the load."""

    name: str
    share: float | None
    secret: str
    is_steady: bool = False


@dataclass(slots=True)
class Seen:
    """What one tenant met with at one load; `in_window` was completed while goodput is counted. Latencies in s."""

    offered: int = 0
    completed: int = 0
    in_window: int = 0
    latencies: list[float] = field(default_factory=list[float])
    shed: int = 0
    without_retry_after: int = 0
    others: dict[str, int] = field(default_factory=dict[str, int])


# The engine


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slots: asyncio.Semaphore) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            asked: dict[str, Any] = json.loads(await reader.readexactly(length)) if length else {}
            tokens = asked.get("max_tokens", 0)
            async with slots:
                await asyncio.sleep(tokens / SLOT_TOKENS_PER_S)
            body = json.dumps(
                {
                    "id": "chatcmpl-1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": asked.get("model"),
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word " * 8}}
                    ],
                    "usage": {
                        "prompt_tokens": PROMPT_TOKENS,
                        "completion_tokens": tokens,
                        "total_tokens": PROMPT_TOKENS + tokens,
                    },
                }
            ).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
    writer.close()


async def serve_engines(ports: Sequence[int]) -> None:
    """Run one engine on each port."""
    for port in ports:
        slots = asyncio.Semaphore(SLOTS)

        async def answer(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slots: asyncio.Semaphore = slots
        ) -> None:
            await _answer(reader, writer, slots)

        await asyncio.start_server(answer, "127.0.0.1", port)
    await asyncio.Event().wait()


# What is needed around it


def _start(launch: Launch, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            list(launch.command),
            env=dict(launch.environment),
            cwd=launch.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=launch.user,
            start_new_session=True,
        )


@contextlib.asynccontextmanager
async def running(part: Part, folder: Path) -> AsyncGenerator[None]:
    """A server process, while it is needed."""
    launch = part.prepare()
    log = folder / f"{part.name}.log"
    process = _start(launch, log)
    try:
        until = time.monotonic() + START_S
        while not await part.is_ready():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{part.name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.1)
        yield
    finally:
        process.send_signal(part.stop_signal)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def seed(database_url: str, ports: Sequence[int]) -> list[Tenant]:
    """Tenants without limits, a reservation that holds already, and a ready node for each engine."""
    await migrate(database_url)
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=2)
    try:
        tenants: list[Tenant] = []
        store = TenancyStore(pool)
        for name, share in (
            ("reserved", RESERVED_SHARE),
            ("modest-a", MODEST_SHARE),
            ("modest-b", MODEST_SHARE),
            ("greedy", None),
        ):
            org, _ = await store.create_org(new_id(), name, region_preferences=(REGION,), actor="bench")
            environment, _ = await store.create_environment(new_id(), org.id, "prod", actor="bench")
            secret = keys.mint("prod", secrets.token_bytes(keys.RANDOM_BYTES))
            key, _ = await store.create_key(
                new_id(),
                environment.id,
                secret_hash=keys.hash_secret(secret),
                hint=keys.hint_of(secret),
                actor="bench",
            )
            await pool.execute(_LIFT_LIMITS, environment.id, key.id)
            if name == "reserved":
                await _reserve(pool, org.id)
            tenants.append(Tenant(name, share, secret, is_steady=name == "reserved"))
        for port in ports:
            node_id = new_id()
            endpoint = f"http://127.0.0.1:{port}"
            await pool.execute(_ADD_NODE, node_id, MODEL, REGION, str(node_id), endpoint, NODE_TOKENS_PER_S)
        return tenants
    finally:
        await pool.close()


async def _reserve(pool: asyncpg.Pool, org_id: UUID) -> None:
    # A quarter more than is asked on average: a contract is kept by staying below it.
    units = int(ENGINES * NODE_TOKENS_PER_S * RESERVED_SHARE * 1.25)
    since = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - HOUR
    await pool.execute(_RESERVE, new_id(), org_id, MODEL, REGION, units, since)


# The load


class Client:
    """Requests to the API over kept-alive connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def chat(self, secret: str) -> tuple[int, str, bool]:
        """Status, error code and whether there is a Retry-After."""
        body = json.dumps(
            {"model": MODEL, "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": "x" * 4}]}
        )
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {secret}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        now = asyncio.get_running_loop().time()
        if self._idle and now - self._idle[-1][2] < KEPT_S:
            reader, writer, _ = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write((head + body).encode())
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        document: dict[str, Any] = json.loads(await reader.readexactly(length))
        self._idle.append((reader, writer, asyncio.get_running_loop().time()))
        code: str = document["error"]["code"] if "error" in document else ""
        return int(answer[9:12]), code, b"\r\nretry-after:" in answer


async def offer(client: Client, tenant: Tenant, per_s: float, seconds: float, seen: Seen) -> None:
    """Ask at this rate, in the open: however long the answers take."""
    # The same arrivals in every run.
    dice = random.Random(f"{tenant.name} {per_s}")
    loop = asyncio.get_running_loop()
    began_at = at = loop.time()
    running: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        asked_at = loop.time()
        status, code, has_retry_after = await client.chat(tenant.secret)
        if status == 200:
            seen.latencies.append(loop.time() - asked_at)
            seen.completed += 1
            seen.in_window += began_at + WARM_UP_S <= loop.time() < began_at + WARM_UP_S + seconds
        elif code == "overloaded":
            seen.shed += 1
            seen.without_retry_after += not has_retry_after
        else:
            seen.others[f"{status} {code}"] = seen.others.get(f"{status} {code}", 0) + 1

    while True:
        at += dice.uniform(0.8, 1.2) / per_s if tenant.is_steady else dice.expovariate(per_s)
        if at > began_at + WARM_UP_S + seconds:
            break
        await asyncio.sleep(at - loop.time())
        seen.offered += 1
        task = asyncio.create_task(ask())
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running)


def percentile(latencies: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of none."""
    return round(sorted(latencies)[int(len(latencies) * share)] * 1000) if latencies else None


async def measure(client: Client, tenants: Sequence[Tenant], load: float, seconds: float) -> dict[str, Any]:
    """One load, for so long and until the last answer."""
    fixed = sum(tenant.share or 0.0 for tenant in tenants)
    seen = {tenant.name: Seen() for tenant in tenants}
    await asyncio.gather(
        *(
            offer(
                client,
                tenant,
                CAPACITY_PER_S * (max(0.01, load - fixed) if tenant.share is None else tenant.share),
                seconds,
                seen[tenant.name],
            )
            for tenant in tenants
        )
    )
    rows = {
        name: {key: value for key, value in asdict(one).items() if key != "latencies"}
        | {"p50_ms": percentile(one.latencies, 0.5), "p99_ms": percentile(one.latencies, 0.99)}
        for name, one in seen.items()
    }
    serverless = [latency for name, one in seen.items() if name != "reserved" for latency in one.latencies]
    return {
        "load": load,
        "offered_per_s": round(sum(one.offered for one in seen.values()) / (WARM_UP_S + seconds), 1),
        "goodput_per_s": round(sum(one.in_window for one in seen.values()) / seconds, 1),
        "shed": sum(one.shed for one in seen.values()),
        "shed_without_retry_after": sum(one.without_retry_after for one in seen.values()),
        "serverless_p50_ms": percentile(serverless, 0.5),
        "serverless_p99_ms": percentile(serverless, 0.99),
        "tenants": rows,
    }


# The report


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    best = max(row["goodput_per_s"] for row in rows)
    print(f"capacity {CAPACITY_PER_S:g} requests/s, {SERVICE_S * 1000:g} ms each; queue {QUEUE_S:g} s")
    print(
        f"{'load':>5} {'offered/s':>9} {'goodput/s':>9} {'of best':>7} {'shed':>6}"
        "  serverless p50/p99  reserved p50/p99"
    )
    for row in rows:
        reserved = row["tenants"]["reserved"]
        print(
            f"{row['load']:>4}× {row['offered_per_s']:>9} {row['goodput_per_s']:>9} {row['goodput_per_s'] / best:>7.0%}"
            f" {row['shed']:>6}  {row['serverless_p50_ms']:>7} / {row['serverless_p99_ms']} ms"
            f"   {reserved['p50_ms']:>7} / {reserved['p99_ms']} ms"
        )
        for name, tenant in row["tenants"].items():
            share = tenant["completed"] / tenant["offered"] if tenant["offered"] else 0.0
            others = f", others {tenant['others']}" if tenant["others"] else ""
            print(f"        {name}: {tenant['completed']} of {tenant['offered']} ({share:.0%}){others}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Goodput and latency over the offered load."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    goodput, latency = figure.subplots(1, 2)
    loads = [row["load"] for row in rows]
    goodput.plot(loads, [row["goodput_per_s"] for row in rows], "o-", label="goodput")
    goodput.plot(loads, [row["offered_per_s"] for row in rows], "--", color="grey", label="offered")
    goodput.axhline(CAPACITY_PER_S, color="black", linewidth=0.8, label="capacity")
    goodput.set(xlabel="offered load / capacity", ylabel="requests/s", title="Goodput", ylim=(0, None))
    for share in ("p50", "p99"):
        reserved = [row["tenants"]["reserved"][f"{share}_ms"] for row in rows]
        latency.plot(loads, reserved, "o-", label=f"reserved {share}")
        latency.plot(loads, [row[f"serverless_{share}_ms"] for row in rows], "o-", label=f"serverless {share}")
    latency.set(xlabel="offered load / capacity", ylabel="ms", title="Latency of admitted requests", ylim=(0, None))
    for axes in (goodput, latency):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)  # pyright: ignore[reportUnknownMemberType]


async def main(out: Path, seconds: float) -> None:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o755)  # Postgres may have to run as somebody else.
        postgres = Postgres(folder / "postgres", free_port(), secrets.token_hex(8))
        valkey = Valkey(folder / "valkey", free_port(), secrets.token_hex(8))
        ports = [free_port() for _ in range(ENGINES)]
        port = free_port()
        engines = PythonPart(
            "engines",
            ["-m", "bench.overload", "--engines", *map(str, ports)],
            child_environment(),
            sys.executable,
            health_url=f"http://127.0.0.1:{ports[-1]}/health",
        )
        async with contextlib.AsyncExitStack() as stack:
            for part in (postgres, valkey, engines):
                await stack.enter_async_context(running(part, folder))
            database_url = postgres.url_of("postgres")
            tenants = await seed(database_url, ports)
            environment = child_environment(
                CROSSLOGIC_MODE="dev",
                CROSSLOGIC_STATE_DIR=str(folder / "state"),
                CROSSLOGIC_DATABASE_URL=database_url,
                CROSSLOGIC_REDIS_URL=valkey.url,
                CROSSLOGIC_FULL_LOAD_S=str(FULL_LOAD_S),
                CROSSLOGIC_QUEUE_TIMEOUT_S=str(QUEUE_S),
            )
            api = PythonPart(
                "api",
                [
                    "-m",
                    "uvicorn",
                    "api.app:app",
                    "--http",
                    "api.inference.server:HttpProtocol",
                    "--port",
                    str(port),
                    "--no-access-log",
                ],
                environment,
                sys.executable,
                health_url=f"http://127.0.0.1:{port}/readyz",
            )
            await stack.enter_async_context(running(api, folder))
            rows = [await measure(Client(port), tenants, load, seconds) for load in LOADS]
        postgres.forget()
    report(rows, out)


def report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the table, write the figures and the plot."""
    show(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "overload.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, out / "overload.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("overload"), help="folder for overload.json and overload.png")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each load is offered")
    parser.add_argument("--engines", type=int, nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    asyncio.run(serve_engines(given.engines) if given.engines else main(given.out, given.seconds))
    sys.stdout.flush()
    os._exit(0)
