"""The local cloud: rents out engine processes of this machine as if they were GPU nodes.

A process of its own (`python -m crosslogic.dev.local_cloud`), so that kills, lost replies and lagging lists are real.
Its machines are processes of their own too: they live on when it is killed, and it takes them over again when it is
back. When it is stopped cleanly it powers them off, and its next start boots them again.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from crosslogic.bootstrap import ROOT
from crosslogic.dev.processes import ProcessId
from crosslogic.dev.state import read_json, write_json
from crosslogic.domain.errors import Rejected
from crosslogic.domain.health import MachineStatus
from crosslogic.settings import child_environment, settings

_log = logging.getLogger(__name__)

_TICK_S = 0.1  # A dead engine is noticed within this.
_BOOT_DEADLINE_S = 120.0  # An engine that has not reported by then never will.
_MEMORY_S = 600.0  # A machine that is gone stays in the list for this long, as in real clouds.

Operation = Literal["create", "list", "get", "delete"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Order(_Strict):
    """What a machine shall serve as. `credential` becomes the engine's API key, `engine_args` its command line."""

    model: str = Field(min_length=1, max_length=200)
    kind: Literal["chat", "embedding"] = "chat"
    region: str = Field(min_length=1, max_length=100)
    credential: str = Field(min_length=1, max_length=200)
    engine_args: list[str] = Field(default_factory=list[str], max_length=100)


class Fault(_Strict):
    """After `after` calls of an operation, `count` of them go wrong.

    `error` answers 500 before any effect; `lost_reply` has the effect and closes the connection without a word; `hang`
    has no effect and never answers; `no_capacity` refuses.
    """

    operation: Operation
    kind: Literal["error", "lost_reply", "hang", "no_capacity"]
    count: int = Field(default=1, ge=0)
    after: int = Field(default=0, ge=0)


class Behaviour(_Strict):
    """How the cloud misbehaves. `capacity` bounds a region's machines; a region that it does not name has no bound."""

    launch_latency_s: float = Field(default=0.0, ge=0, le=3600)
    list_lag_s: float = Field(default=0.0, ge=0, le=3600)
    capacity: dict[str, int] = Field(default_factory=dict)
    faults: list[Fault] = Field(default_factory=list[Fault])

    def next_fault(self, operation: Operation) -> str:
        """Count this call, and say which fault it meets; empty for none."""
        for fault in self.faults:
            if fault.operation != operation or not fault.count:
                continue
            if fault.after:
                fault.after -= 1
                continue
            fault.count -= 1
            return fault.kind
        return ""


@dataclass(slots=True)
class Machine:
    """One machine, as it is written to disk. Times are Unix seconds."""

    cluster: str
    model: str
    kind: str
    region: str
    credential: str
    created_at: float
    boots_at: float
    status: str = MachineStatus.STARTING
    port: int = 0  # Kept over reboots, as a wish.
    process: dict[str, Any] | None = None
    reason: str = ""
    gone_at: float | None = None
    is_ending: bool = False
    engine_args: list[str] = field(default_factory=list[str])

    @property
    def is_gone(self) -> bool:
        """Has it ended?"""
        return self.status == MachineStatus.GONE

    def show(self, status: str) -> dict[str, Any]:
        """What clients see, with the status that they are to believe."""
        return {
            "cluster": self.cluster,
            "region": self.region,
            "model": self.model,
            "status": status,
            "endpoint": f"http://127.0.0.1:{self.port}" if status == MachineStatus.RUNNING else "",
            "pid": self.process["pid"] if self.process else 0,
            "reason": self.reason,
            "created_at": self.created_at,
        }


class LocalCloud:
    """The machines and what becomes of them. Everything is on disk before anybody is told of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stored = read_json(folder / "machines.json").get("machines", {})
        self._machines = {cluster: Machine(**machine) for cluster, machine in stored.items()}
        self.behaviour = Behaviour.model_validate(read_json(folder / "behaviour.json"))
        # Only of engines that this process started: their exit codes, and no zombies.
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        for machine in self._machines.values():
            if ProcessId.read(machine.process):
                _log.info("%s: taken over", machine.cluster)

    def behave(self, behaviour: Behaviour) -> None:
        """Change how the cloud misbehaves from now on."""
        self.behaviour = behaviour
        self.save_behaviour()

    def save_behaviour(self) -> None:
        """Write down how often each fault is still due."""
        write_json(self._folder / "behaviour.json", self.behaviour.model_dump())

    def create(self, cluster: str, order: Order) -> Machine:
        """Order a machine, or get the one of this name. Raises Rejected (no_capacity; name_taken by another order)."""
        found = self._machines.get(cluster)
        if found and not found.is_gone:
            if (found.model, found.kind, found.region) != (order.model, order.kind, order.region):
                raise Rejected(f"{cluster} exists and is something else.", status=409, code="name_taken")
            return found
        used = sum(machine.region == order.region and not machine.is_gone for machine in self._machines.values())
        if used >= self.behaviour.capacity.get(order.region, used + 1):
            raise _no_capacity(order.region)
        now = time.time()
        machine = Machine(
            cluster, order.model, order.kind, order.region, order.credential, now, now + self.behaviour.launch_latency_s
        )
        machine.engine_args = order.engine_args
        self._machines[cluster] = machine
        self._save()
        _log.info("%s: ordered for %s in %s", cluster, order.model, order.region)
        return machine

    def end(self, cluster: str) -> None:
        """Switch a machine off for good. It is gone as soon as its process is."""
        machine = self._machines.get(cluster)
        if machine is None or machine.is_gone or machine.is_ending:
            return
        machine.is_ending = True
        self._save()
        self._kill(machine)

    def find(self, cluster: str) -> Machine | None:
        """One machine as it is now."""
        return self._machines.get(cluster)

    def list_all(self, prefix: str) -> list[dict[str, Any]]:
        """What the list shows: as late with orders and ends as the behaviour says."""
        now, lag_s = time.time(), self.behaviour.list_lag_s
        shown: list[dict[str, Any]] = []
        for machine in self._machines.values():
            if not machine.cluster.startswith(prefix) or now < machine.created_at + lag_s:
                continue
            is_end_hidden = machine.gone_at is not None and now < machine.gone_at + lag_s and machine.port
            shown.append(machine.show(MachineStatus.RUNNING if is_end_hidden else machine.status))
        return shown

    async def run(self) -> None:
        """Look after the machines until cancelled."""
        while True:
            self._tick(time.time())
            await asyncio.sleep(_TICK_S)

    def power_off(self) -> None:
        """Stop every engine; the next start boots those machines again."""
        for machine in self._machines.values():
            if machine.is_gone or machine.is_ending:
                continue
            self._kill(machine)
            machine.status, machine.process = MachineStatus.STARTING, None
        self._save()
        for child in self._children.values():
            child.wait()

    def _tick(self, now: float) -> None:
        is_changed = False
        for machine in list(self._machines.values()):
            before = (machine.status, machine.process)
            self._advance(machine, now)
            is_changed |= before != (machine.status, machine.process)
            if machine.gone_at is not None and now > machine.gone_at + _MEMORY_S + self.behaviour.list_lag_s:
                del self._machines[machine.cluster]
                self._log_of(machine).unlink(missing_ok=True)
                is_changed = True
        if is_changed:
            self._save()

    def _advance(self, machine: Machine, now: float) -> None:
        if machine.is_gone:
            return
        process = ProcessId.read(machine.process)
        if process is None:
            if machine.is_ending:
                self._lose(machine, now, "ended by order")
            elif now >= machine.boots_at:
                self._boot(machine, now)
        elif not process.is_alive:
            self._lose(machine, now, "ended by order" if machine.is_ending else self._last_words(machine))
        elif machine.is_ending:
            process.kill()
        elif machine.status == MachineStatus.STARTING:
            port = read_json(self._report_of(machine)).get("port")
            if port:
                machine.port, machine.status = port, MachineStatus.RUNNING
                _log.info("%s: running on port %d", machine.cluster, port)
            elif now > machine.boots_at + _BOOT_DEADLINE_S:
                process.kill()

    def _boot(self, machine: Machine, now: float) -> None:
        self._report_of(machine).unlink(missing_ok=True)
        with self._log_of(machine).open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "crosslogic.dev.engine", str(self._report_of(machine))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=child_environment(),
                start_new_session=True,
            )
        self._children[machine.cluster] = child
        process = ProcessId.of(child.pid)
        if process is None:
            self._lose(machine, now, self._last_words(machine))
            return
        machine.process, machine.boots_at = process.write(), now
        # The engine waits for its order, and ends without one: killed here, we leave no engine that nobody knows of.
        self._save()
        order = {
            "model": machine.model,
            "kind": machine.kind,
            "credential": machine.credential,
            "port": machine.port,
            "engine_args": machine.engine_args,
        }
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(json.dumps(order).encode())

    def _lose(self, machine: Machine, now: float, reason: str) -> None:
        machine.status, machine.gone_at, machine.reason = MachineStatus.GONE, now, reason
        machine.process = None
        child = self._children.pop(machine.cluster, None)
        if child:
            child.wait()
        self._report_of(machine).unlink(missing_ok=True)
        _log.info("%s: gone: %s", machine.cluster, reason)

    def _last_words(self, machine: Machine) -> str:
        child = self._children.get(machine.cluster)
        if child is None:
            return "the machine died"
        code = child.wait()
        return f"the machine died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def _kill(self, machine: Machine) -> None:
        process = ProcessId.read(machine.process)
        if process:
            process.kill()

    def _save(self) -> None:
        write_json(
            self._folder / "machines.json",
            {"machines": {cluster: asdict(machine) for cluster, machine in self._machines.items()}},
        )

    def _report_of(self, machine: Machine) -> Path:
        return self._folder / f"{machine.cluster}.report.json"

    def _log_of(self, machine: Machine) -> Path:
        return self._folder / f"{machine.cluster}.log"


class Door:
    """The cloud's HTTP API, and the faults on the way."""

    def __init__(self, cloud: LocalCloud, token: str) -> None:
        self._cloud = cloud
        self._authorization = f"Bearer {token}".encode()
        self.server: uvicorn.Server | None = None

    def application(self) -> ASGIApp:
        """The ASGI application: everything behind the bearer token."""
        machine = "/machines/{cluster:path}"
        routes = [
            Route("/machines", self._faulty("list", self._list), methods=["GET"]),
            Route(machine, self._faulty("create", self._create), methods=["PUT"]),
            Route(machine, self._faulty("get", self._get), methods=["GET"]),
            Route(machine, self._faulty("delete", self._delete), methods=["DELETE"]),
            Route("/behaviour", self._show_behaviour, methods=["GET"]),
            Route("/behaviour", self._behave, methods=["PUT"]),
        ]
        handlers = {Rejected: _answer_rejected, ValidationError: _answer_invalid}
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                presented = dict(scope["headers"]).get(b"authorization", b"")
                if not hmac.compare_digest(presented, self._authorization):
                    await _error(401, "unauthorized", "The local cloud wants its token.")(scope, receive, send)
                    return
            await inner(scope, receive, send)

        return guarded

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        keeper = asyncio.create_task(self._cloud.run())
        # Nobody waits for the keeper until the end: if it fails, the process must, and be started again.
        keeper.add_done_callback(self._stop_with)
        yield
        keeper.remove_done_callback(self._stop_with)
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        self._cloud.power_off()

    def _stop_with(self, keeper: asyncio.Task[None]) -> None:
        _log.error("the keeper of the machines failed", exc_info=keeper.exception())
        if self.server:
            self.server.should_exit = True

    def _faulty(
        self, operation: Operation, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            fault = self._cloud.behaviour.next_fault(operation)
            if fault:
                self._cloud.save_behaviour()
                _log.info("fault: %s of %s %s", fault, request.method, request.url.path)
            if fault == "error":
                return _error(500, "internal", "The local cloud was told to fail.")
            if fault == "no_capacity":
                raise _no_capacity(request.path_params.get("cluster", "this region"))
            if fault == "hang":
                await _until_disconnected(request)
                return Response()
            response = await handler(request)
            if fault == "lost_reply":
                await self._hang_up(request)
            return response

        return handle

    async def _hang_up(self, request: Request) -> None:
        """Close the request's connection as a broken network would: no status, no body."""
        assert self.server is not None
        for connection in list(self.server.server_state.connections):
            if getattr(connection, "client", None) == request.scope["client"]:
                connection.transport.abort()  # type: ignore[union-attr]
        # Once the server has noticed, it sends nothing of what is returned.
        await _until_disconnected(request)

    async def _create(self, request: Request) -> Response:
        order = Order.model_validate_json(await request.body())
        machine = self._cloud.create(_cluster_of(request), order)
        return JSONResponse(machine.show(machine.status), status_code=202)

    async def _get(self, request: Request) -> Response:
        machine = self._cloud.find(_cluster_of(request))
        if machine is None:
            raise Rejected("The local cloud knows no machine of that name.", status=404, code="unknown_machine")
        return JSONResponse(machine.show(machine.status))

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"machines": self._cloud.list_all(request.query_params.get("prefix", ""))})

    async def _delete(self, request: Request) -> Response:
        cluster = _cluster_of(request)
        self._cloud.end(cluster)
        return JSONResponse({"cluster": cluster}, status_code=202)

    async def _show_behaviour(self, _: Request) -> Response:
        return JSONResponse(self._cloud.behaviour.model_dump())

    async def _behave(self, request: Request) -> Response:
        self._cloud.behave(Behaviour.model_validate_json(await request.body()))
        return JSONResponse(self._cloud.behaviour.model_dump())


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cluster_of(request: Request) -> str:
    """The machine's name; it becomes a file name, so it is held to what clouds allow."""
    cluster: str = request.path_params["cluster"]
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,127}", cluster):
        raise Rejected("A machine's name has 1–128 characters of a–z, 0–9, '.' and '-'.", code="invalid_name")
    return cluster


def _no_capacity(region: str) -> Rejected:
    return Rejected(f"No capacity left for {region}.", status=409, code="no_capacity")


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


def _answer_rejected(_: Request, error: Exception) -> Response:
    assert isinstance(error, Rejected)
    return _error(error.status, error.code, error.message)


def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
    return _error(400, "invalid_request", problems)


def main() -> None:
    """Serve on the port of `CROSSLOGIC_LOCAL_CLOUD_URL` until SIGTERM, then power the machines off."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = settings()
    if not config.is_dev or config.local_cloud_token is None:
        sys.exit("The local cloud is for dev mode: set CROSSLOGIC_MODE=dev and CROSSLOGIC_LOCAL_CLOUD_TOKEN.")
    folder = config.state_dir / "cloud"
    folder.mkdir(parents=True, exist_ok=True)
    door = Door(LocalCloud(folder), config.local_cloud_token.get_secret_value())
    # One second for calls that hang by order; nothing else takes that long.
    door.server = uvicorn.Server(
        uvicorn.Config(
            door.application(),
            host="127.0.0.1",
            port=urlsplit(config.local_cloud_url).port or 8790,
            lifespan="on",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    door.server.run()


if __name__ == "__main__":
    main()
