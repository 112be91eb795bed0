"""`./run`: starts every part of the embedded stack, keeps it running, and stops all of it.

One process with one state directory. Its parts are processes in sessions of their own, so that Ctrl-C reaches this
process alone, which then stops them in order. What a SIGKILL of this process leaves behind is stopped by its next
start; the local cloud's machines live on and are taken over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from crosslogic.dev.parts import Launch, Part, PartError, PythonPart, get
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.processes import ProcessId, end
from crosslogic.dev.state import DEFAULT, State, StateError, free_port, is_port_free
from crosslogic.dev.temporal import Temporal
from crosslogic.dev.valkey import Valkey
from crosslogic.domain.credentials import DEV_ADMIN_TOKEN
from crosslogic.settings import Settings, child_environment, given_environment

DEMO_KEY = "sk_dev_demo"

_START_DEADLINE_S = 90.0  # On a loaded machine a start has been seen to take 22 s.
_TRIES_AT_START = 3  # A part that has died this often without ever being ready will not come.
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_GOOD_LIFE_S = 30.0  # A part that has lived this long is started again without much of a pause.
_POLL_S = 0.05
_OURS_GRACE_S = 2  # For running requests and activities.
# Who uses a server stops before it does, each with its grace in seconds; everything is gone 5 s after the signal.
_STOP_ORDER = ((("api", "worker"), 3.0), (("local-cloud", "stripe-double", "temporal", "valkey", "postgres"), 1.9))
_API_PROCESSES: int = Settings.model_fields["api_processes"].default
_LARGEST_LOG = 20_000_000  # bytes; a larger one is put aside at the next start


class Screen:
    """What the user sees: whole lines, the same on a terminal and in a pipe; kept in logs/stack.log, too."""

    def __init__(self, log: Path) -> None:
        self._log = open_log(log)
        self._began = time.monotonic()

    def say(self, text: str = "") -> None:
        """Show lines. A reader that is gone must not stop the stack."""
        with suppress(OSError):
            print(text, flush=True)
        if text:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
            self._log.flush()

    def step(self, name: str, what: str, since: float) -> None:
        """Show one step of the start with its duration."""
        self.say(f"  {name:<12} {what:<28} {time.monotonic() - since:5.1f} s")

    @property
    def elapsed_s(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._began


class Keeper:
    """Keeps one part running until it is told to stop."""

    def __init__(self, part: Part, state: State, screen: Screen) -> None:
        self.part = part
        self.process: ProcessId | None = None
        self.is_ready = asyncio.Event()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._state = state
        self._screen = screen
        self._deaths_before_ready = 0
        self._was_ready = False
        self._child: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the part, and again whenever it dies."""
        self._task = asyncio.create_task(self._run(), name=self.part.name)

    async def ready(self, within_s: float) -> None:
        """Wait until the part does its job. Raises PartError with the end of its log."""
        waiting = asyncio.ensure_future(self.is_ready.wait())
        await asyncio.wait({waiting, self.failure}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return
        waiting.cancel()
        if self.failure.done():
            self.failure.result()
        raise PartError(f"{self.part.name} was not ready within {within_s:.0f} s.\n{self._last_words()}")

    async def stop(self, grace_s: float) -> None:
        """Stop the part for good: its signal first, SIGKILL when the grace is over."""
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})
        child, process = self._child, self.process
        if child is None or process is None:
            return
        process.signal(self.part.stop_signal)
        try:
            await asyncio.wait_for(child.wait(), grace_s)
        except TimeoutError:
            self._screen.say(f"  {self.part.name} did not stop within {grace_s:.1f} s: killed")
            process.kill()
            await child.wait()

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await self._live(began)
            except (PartError, OSError) as error:
                if not self._fail(PartError(f"{self.part.name} cannot start: {error}")):
                    self._screen.say(f"  {self.part.name} cannot start: {error}")
            else:
                died = f"{self.part.name} {_cause(self._child)}"
                if not self._was_ready:
                    self._deaths_before_ready += 1
                    if self._deaths_before_ready >= _TRIES_AT_START:
                        self._fail(PartError(f"{died}, {_TRIES_AT_START} times.\n{self._last_words()}"))
                if time.monotonic() - began > _GOOD_LIFE_S:
                    pause_s = _FIRST_PAUSE_S
                self._screen.say(f"  {died}; starting it again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _live(self, began: float) -> None:
        """One life: returns when the process has ended."""
        launch = await asyncio.to_thread(self.part.prepare)
        with open_log(self._log) as log:
            self._child = child = await _spawn(launch, log)
        self.process = ProcessId.of(child.pid)
        self._state.record(self.part.name, self.process)
        ended = asyncio.ensure_future(child.wait())
        try:
            while not ended.done():
                if await self.part.is_ready():
                    self._announce(began)
                    break
                await asyncio.wait({ended}, timeout=_POLL_S)
            await ended
        except PartError:
            child.kill()
            await child.wait()
            raise
        finally:
            ended.cancel()
            self.is_ready.clear()

    def _announce(self, began: float) -> None:
        if self._was_ready:
            self._screen.step(self.part.name, "is back", began)
        else:
            self._screen.step(self.part.name, "ready", began)
        self._was_ready = True
        self.is_ready.set()

    def _fail(self, error: PartError) -> bool:
        """Tell whoever waits for the part's first readiness; False if nobody does."""
        if self._was_ready or self.failure.done():
            return False
        self.failure.set_exception(error)
        self.failure.exception()  # Marks it as seen, in case the wait is over already.
        return True

    def _last_words(self) -> str:
        return last_lines(self._log)

    @property
    def _log(self) -> Path:
        return self._state.logs / f"{self.part.name}.log"


@dataclass(slots=True)
class Addresses:
    """Where every part listens: ports of 127.0.0.1, chosen once and kept in the state directory."""

    api: int
    postgres: int = 0
    valkey: int = 0
    temporal: int = 0
    temporal_ui: int = 0
    temporal_http: int = 0
    temporal_metrics: int = 0
    local_cloud: int = 0
    stripe: int = 0

    @classmethod
    def choose(cls, state: State, api: int) -> Addresses:
        """The ports of last time if they are free, else others."""
        remembered = state.read("ports.json")
        chosen = cls(api)
        taken = {api}
        for name in (
            "postgres",
            "valkey",
            "temporal",
            "temporal_ui",
            "temporal_http",
            "temporal_metrics",
            "local_cloud",
            "stripe",
        ):
            port = remembered.get(name)
            while not isinstance(port, int) or port in taken or not is_port_free(port):
                port = free_port()
            taken.add(port)
            setattr(chosen, name, port)
        state.write("ports.json", {name: getattr(chosen, name) for name in cls.__slots__ if name != "api"})
        return chosen


@dataclass(slots=True)
class Stack:
    """All parts of one state directory."""

    state: State
    screen: Screen
    addresses: Addresses
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    keepers: dict[str, Keeper] = field(default_factory=dict[str, Keeper])

    async def run(self) -> int:
        """Start everything, keep it running until SIGINT or SIGTERM, stop everything. The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stopping.set)
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self.stopping.wait())
        code = 0
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done() and (error := starting.exception()):
                if not isinstance(error, PartError):
                    raise error
                self.screen.say(f"\n{error}\n\n./run doctor looks for the usual causes; ./run --fresh starts over.\n")
                code = 1
            else:
                await stopping
        finally:
            # A second signal changes nothing: it is stopping already.
            starting.cancel()
            await asyncio.wait({starting})
            await self._stop()
        return code

    async def _start(self) -> None:
        environment, servers = self._servers()
        for server in servers:
            self._keep(server)
        await self._all_ready(servers)
        await self._set_up(environment)
        ours = self._processes(environment)
        for process in ours:
            self._keep(process)
        await self._all_ready(ours)
        await self._first_node()
        self._summarize()

    def _keep(self, part: Part) -> None:
        keeper = self.keepers[part.name] = Keeper(part, self.state, self.screen)
        keeper.start()

    async def _all_ready(self, parts: Sequence[Part]) -> None:
        await asyncio.gather(*(self.keepers[part.name].ready(_START_DEADLINE_S) for part in parts))

    def _servers(self) -> tuple[dict[str, str], list[Part]]:
        """The parts that are not ours, the local cloud, and the environment in which ours find them."""
        known = self.state.read("secrets.json")
        known.setdefault("stripe", f"sk_test_double_{secrets.token_hex(16)}")
        for name in ("postgres", "valkey", "local_cloud", "node"):
            known.setdefault(name, secrets.token_urlsafe(32))
        self.state.write("secrets.json", known)
        ports = self.addresses
        postgres = Postgres(self.state.path / "postgres", ports.postgres, known["postgres"])
        valkey = Valkey(self.state.path / "valkey", ports.valkey, known["valkey"])
        temporal = Temporal(
            self.state.path / "temporal",
            ports.temporal,
            ports.temporal_ui,
            ports.temporal_http,
            ports.temporal_metrics,
        )
        cloud_url = f"http://127.0.0.1:{ports.local_cloud}"
        defaults = {
            "CROSSLOGIC_DATABASE_URL": postgres.url,
            "CROSSLOGIC_REDIS_URL": valkey.url,
            "CROSSLOGIC_TEMPORAL_ADDRESS": temporal.address,
            "CROSSLOGIC_NODE_SECRET": known["node"],
            # Everything is on this machine: look often, so that a kill is noticed while one watches.
            "CROSSLOGIC_PROBE_INTERVAL_S": "1",
            "CROSSLOGIC_SILENCE_S": "5",
            "CROSSLOGIC_CLOUD_INTERVAL_S": "5",
            "CROSSLOGIC_SHUTDOWN_GRACE_S": str(_OURS_GRACE_S),
        }
        given = given_environment()
        if "CROSSLOGIC_TEMPORAL_ADDRESS" not in given:
            defaults["CROSSLOGIC_TEMPORAL_UI_URL"] = temporal.ui_url
        has_double = "CROSSLOGIC_STRIPE_API_KEY" not in given
        if has_double:
            # The account behind a key that is given is somebody's own; without one a double stands in.
            given = {name: value for name, value in given.items() if name != "CROSSLOGIC_STRIPE_URL"}
            defaults |= {
                "CROSSLOGIC_STRIPE_URL": f"http://127.0.0.1:{ports.stripe}",
                "CROSSLOGIC_STRIPE_API_KEY": known["stripe"],
                "CROSSLOGIC_STRIPE_WEBHOOK_URL": f"{self._api_url}/stripe/webhooks",
            }
        own = {
            "CROSSLOGIC_MODE": "dev",
            "CROSSLOGIC_STATE_DIR": str(self.state.path),
            "CROSSLOGIC_API_HOST": "127.0.0.1",
            "CROSSLOGIC_API_PORT": str(ports.api),
            "CROSSLOGIC_ADMIN_TOKEN": DEV_ADMIN_TOKEN,
            "CROSSLOGIC_CLOUD_PROVIDER": "local",
            "CROSSLOGIC_LOCAL_CLOUD_URL": cloud_url,
            "CROSSLOGIC_LOCAL_CLOUD_TOKEN": known["local_cloud"],
        }
        chosen = defaults | given | own
        self.state.write(
            "endpoints.json",
            {
                "api": self._api_url,
                "temporal": chosen["CROSSLOGIC_TEMPORAL_ADDRESS"],
                "temporal_ui": chosen.get("CROSSLOGIC_TEMPORAL_UI_URL", ""),
                "postgres": chosen["CROSSLOGIC_DATABASE_URL"],
                "redis": chosen["CROSSLOGIC_REDIS_URL"],
                "local_cloud": cloud_url,
                **({"stripe": defaults["CROSSLOGIC_STRIPE_URL"]} if has_double else {}),
            },
        )
        environment = child_environment(**chosen, PYTHONUNBUFFERED="1")
        cloud = PythonPart(
            "local-cloud",
            ["-m", "crosslogic.dev.local_cloud"],
            environment,
            sys.executable,
            health_url=f"{cloud_url}/behaviour",
            token=known["local_cloud"],
        )
        double = PythonPart(
            "stripe-double",
            ["-m", "crosslogic.dev.stripe_double"],
            environment,
            sys.executable,
            health_url=f"http://127.0.0.1:{ports.stripe}/control/clock",
            token=known["stripe"],
        )
        embedded: dict[str, Part] = {
            "CROSSLOGIC_DATABASE_URL": postgres,
            "CROSSLOGIC_REDIS_URL": valkey,
            "CROSSLOGIC_TEMPORAL_ADDRESS": temporal,
        }
        # A server that is given by its address is somebody else's to run.
        return environment, [
            *(part for name, part in embedded.items() if name not in given),
            cloud,
            *([double] if has_double else []),
        ]

    def _processes(self, environment: dict[str, str]) -> list[Part]:
        uvicorn = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(self.addresses.api)]
        uvicorn += ["--http", "api.inference.server:HttpProtocol"]
        uvicorn += ["--no-access-log", "--no-server-header", "--timeout-graceful-shutdown", str(_OURS_GRACE_S)]
        # Longer than clients keep connections, and shorter than `start_patience_s`: see docs/operating/restarts.md.
        uvicorn += ["--timeout-keep-alive", "75", "--timeout-worker-healthcheck", "15"]
        uvicorn += ["--workers", environment.get("CROSSLOGIC_API_PROCESSES", str(_API_PROCESSES))]
        return [
            PythonPart("worker", ["worker.py"], environment, sys.executable),
            PythonPart("api", uvicorn, environment, sys.executable, health_url=f"{self._api_url}/readyz"),
        ]

    async def _set_up(self, environment: dict[str, str]) -> None:
        """Bring the schema, the search attributes and the seeds up to date."""
        began = time.monotonic()
        log_path = self.state.logs / "set-up.log"
        with open_log(log_path) as log:
            child = await _spawn(Launch([sys.executable, "-m", "crosslogic.cli", "setup"], environment), log)
        try:
            code = await asyncio.wait_for(child.wait(), _START_DEADLINE_S)
        except (TimeoutError, asyncio.CancelledError):
            child.kill()
            await child.wait()
            raise
        if code:
            raise PartError(f"The set-up failed with exit code {code}.\n{last_lines(log_path)}")
        self.screen.step("set-up", "schema and seeds up to date", began)

    async def _first_node(self) -> None:
        """Wait for as long as it takes until a node serves; say every few seconds how far the nodes are."""
        began = said = time.monotonic()
        while True:
            states = await self._node_states()
            if "ready" in states:
                self.screen.step("first node", "ready", began)
                return
            if time.monotonic() - said > 5:
                said = time.monotonic()
                counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
                self.screen.say(f"  nodes        {counted}")
            await asyncio.sleep(0.1)

    async def _node_states(self) -> list[str]:
        body = await get(f"{self._api_url}/admin/nodes", DEV_ADMIN_TOKEN)
        return [node["state"] for node in json.loads(body)["data"]] if body else []

    def _summarize(self) -> None:
        endpoints = self.state.read("endpoints.json")
        stop = "Ctrl-C stops everything; ./run goes on where it was, ./run --fresh starts over."
        self.screen.say(
            f"""
CrossLogic Inference Cloud is up ({self.screen.elapsed_s:.1f} s).

  API          {endpoints["api"]}      (OpenAPI: {endpoints["api"]}/openapi.json)
  Temporal UI  {endpoints["temporal_ui"]}
  Demo key     {DEMO_KEY}
  Logs         {_shown(self.state.logs)}

Try:

  curl -X POST "{endpoints["api"]}/v1/chat/completions?model=llama-7b&region=ap-south-1&prompt=hello" \\
    -H "Authorization: Bearer {DEMO_KEY}"

{stop}
"""
        )

    async def _stop(self) -> None:
        """Stop every part: whoever uses a server before the server."""
        if not self.keepers:
            return
        began = time.monotonic()
        self.screen.say("Stopping …")
        for names, grace_s in _STOP_ORDER:
            await asyncio.gather(*(self.keepers[name].stop(grace_s) for name in names if name in self.keepers))
        # Only a local cloud that had to be killed leaves machines.
        end(dict.fromkeys(self.state.engines().values(), signal.SIGKILL), 0.2)
        for name in ("endpoints.json", "stack.json"):
            (self.state.path / name).unlink(missing_ok=True)
        self.screen.say(f"Stopped ({time.monotonic() - began:.1f} s). The state is kept in {_shown(self.state.path)}.")

    @property
    def _api_url(self) -> str:
        return f"http://127.0.0.1:{self.addresses.api}"


def open_log(path: Path) -> IO[bytes]:
    """A log to append to. One that has grown too large is put aside, so that there are two of them at most."""
    if path.exists() and path.stat().st_size > _LARGEST_LOG:
        path.replace(path.with_name(f"{path.name}.1"))
    return path.open("ab")


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, indented, and where the rest is."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8_000))
        lines = file.read().decode(errors="replace").splitlines()[-count:]
    return "\n".join([*(f"    {line[:300]}" for line in lines), f"  All of it: {_shown(path)}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stack in the foreground; the exit code."""
    parser = argparse.ArgumentParser(prog="./run", description="Start the embedded stack.")
    parser.add_argument("--state", default=str(DEFAULT), metavar="DIR", help="where everything is kept")
    parser.add_argument("--port", type=int, default=8080, help="the API's port on 127.0.0.1")
    parser.add_argument("--fresh", action="store_true", help="delete the state and start over")
    given = parser.parse_args(arguments)
    state = State.at(given.state)
    try:
        state.make()
        # Held until this process ends, however it ends.
        _hold(state)
        _stop_leftovers(state, with_machines=given.fresh)
        if given.fresh:
            Postgres(state.path / "postgres", 0, "").forget()
            state.clear()
        if not is_port_free(given.port):
            raise StateError(
                f"Port {given.port} is taken by another program (./run doctor --port {given.port} looks for it). Stop "
                "that program, or start with another port: ./run --port N."
            )
    except StateError as error:
        print(error, file=sys.stderr)
        return 1
    return asyncio.run(_run(state, given.port))


async def _run(state: State, port: int) -> int:
    screen = Screen(state.logs / "stack.log")
    screen.say(f"Starting CrossLogic Inference Cloud in {_shown(state.path)}")
    supervisor = ProcessId.of(os.getpid())
    state.write("stack.json", {"supervisor": supervisor.write() if supervisor else None, "parts": {}})
    return await Stack(state, screen, Addresses.choose(state, port)).run()


def _hold(state: State) -> None:
    for _ in range(10):  # A look at the lock by the doctor takes it for a moment.
        if state.acquire() is not None:
            return
        time.sleep(0.05)
    holder = state.supervisor()
    raise StateError(
        f"It is already running{f' (pid {holder.pid})' if holder else ''} on {_shown(state.path)}. For a second one "
        "name another directory and port: ./run --state DIR --port N."
    )


def _stop_leftovers(state: State, *, with_machines: bool) -> None:
    """Stop what a killed supervisor has left. The local cloud is killed: stopped, it would switch its machines off."""
    signals = {"postgres": signal.SIGINT, "local-cloud": signal.SIGKILL}
    left = {process: signals.get(name, signal.SIGTERM) for name, process in state.parts().items() if process.is_alive}
    if with_machines:
        left |= {process: signal.SIGKILL for process in state.engines().values() if process.is_alive}
    if left:
        print(f"Stopping {len(left)} processes that an earlier run left behind", flush=True)
        end({process: int(number) for process, number in left.items()}, 3.0)


async def _spawn(launch: Launch, log: IO[bytes]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *launch.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log,
        stderr=asyncio.subprocess.STDOUT,
        cwd=launch.cwd,
        env=launch.environment,
        start_new_session=True,
        user=launch.user,
        group=launch.user,
        extra_groups=None if launch.user is None else [],
    )


def _cause(child: asyncio.subprocess.Process | None) -> str:
    code = child.returncode if child else None
    if code is None:
        return "is gone"
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"


def _shown(path: Path) -> str:
    """A path as short as it can be told from where the user is."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Threads that still wait for an answer must not hold up the end.
    os._exit(status)
