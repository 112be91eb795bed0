"""The agent: registers the node, keeps its engine and its door, and tells the control plane how it is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from crosslogic.agent import VERSION, disk
from crosslogic.agent.config import BadConfig, Config
from crosslogic.agent.control import Control, Refused, Unreachable
from crosslogic.agent.gpu import Gpus
from crosslogic.agent.identity import (
    Identity,
    NoKey,
    forget_pending_key,
    make_context,
    make_key,
    make_request,
    pending_key,
    received,
)
from crosslogic.agent.metrics import EnginePage, median_ms, parse
from crosslogic.agent.relay import Relay
from crosslogic.agent.spot import Away, Aws, Azure, Gcp, Notice, Watcher
from crosslogic.agent.supervisor import Engine

T = TypeVar("T")

ENGINE_TIMEOUT_S = 3.0
# Between two attempts to reach a control plane that is away: doubled up to this.
LONGEST_PAUSE_S = 10.0
NOTICE_PAUSE_S = 0.2
LONGEST_NOTICE_PAUSE_S = 2.0
# A machine's cloud does not change; a metadata server that was slow to start is found with the next look.
DETECT_INTERVAL_S = 60.0
WATCHER_FAILURES = 10
RENEW_RETRY_S = 30.0
CLEAN_INTERVAL_S = 600.0
# Told to stop, the engine may finish what it is busy with.
STOP_PATIENCE_S = 30.0
MOST_LOG_BYTES = 400_000
_THREADS = 16


class Agent:
    """One node's agent. What blocks runs in threads of its own; the rest on the event loop."""

    def __init__(self, config: Config, control: Control, watchers: list[Watcher], gpus: Gpus) -> None:
        self._config = config
        self._control = control
        self._watchers = watchers
        self._gpus = gpus
        self._threads = ThreadPoolExecutor(_THREADS)
        self._context = make_context()
        self._identity: Identity | None = None
        self._engine: Engine | None = None
        self._stop = asyncio.Event()
        self._renew_now = asyncio.Event()
        self._notice: Notice | None = None
        self._notice_at = 0.0
        self._buckets: dict[str, Any] = {}
        self._load = 0
        self._is_draining = False

    async def run(self) -> int:
        """Serve until told to stop; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            identity = await self._enter()
        except (Refused, NoKey) as error:
            say(f"this node cannot join: {error}")
            return 1
        if identity is None:
            return 0
        relay = Relay(self._context, self._config.engine_port)
        try:
            await relay.listen(self._config.listen_host, self._config.listen_port)
        except OSError as error:
            say(f"cannot listen on {self._config.listen_host}:{self._config.listen_port}: {error}")
            return 1
        say(f"serving {self._config.node_id} on {self._config.listen_host}:{self._config.listen_port}")
        work: list[Coroutine[Any, Any, None]] = [self._keep_beating(), self._keep_renewing(), self._keep_clean()]
        work += [self._keep_watching(watcher) for watcher in self._watchers]
        if self._config.engine_command:
            self._engine = Engine(
                self._config.engine_command,
                self._config.engine_port,
                identity.credential,
                self._config.state_dir,
                self._is_engine_well,
                say,
            )
            work.append(self._engine.keep_running())
        tasks = [asyncio.ensure_future(one) for one in work]
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            # None of them ends by itself; one that fails is a mistake, and a supervisor starts us again.
            await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in tasks if task.done()]
            for task in failed:
                say(f"stopping, because of {task.exception()!r}")
            return 1 if failed else 0
        finally:
            for task in tasks:
                task.cancel()
            if self._engine is not None:
                await self._engine.stop()
            relay.close()

    # Trust

    async def _enter(self) -> Identity | None:
        """What was kept from the last run, or a registration; None when told to stop meanwhile."""
        identity = Identity.load(self._config.state_dir, self._config.node_id)
        if identity is None:
            if not self._config.join_token:
                raise Refused(401, "it is not registered, and CROSSLOGIC_AGENT_JOIN_TOKEN is not set")
            identity = await self._register()
        if identity is not None:
            self._take(identity)
        return identity

    async def _register(self) -> Identity | None:
        config = self._config
        key = await self._in_thread(lambda: pending_key(config.state_dir))
        csr = await self._in_thread(lambda: make_request(key, config.node_id, config.state_dir))
        body = {
            "node_id": config.node_id,
            "token": config.join_token,
            "csr": csr,
            "engine": config.engine,
            "endpoint": config.endpoint,
            "port": config.listen_port,
            "version": VERSION,
        }
        pause_s = 1.0
        while not self._stop.is_set():
            try:
                answer = await self._in_thread(lambda: self._control.post("/agent/register", body))
                identity = received(config.node_id, key, answer)
            except (Unreachable, ValueError) as error:
                say(f"cannot register yet: {error}")
                await self._pause(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                continue
            identity.save(config.state_dir)
            forget_pending_key(config.state_dir)
            return identity
        return None

    def _take(self, identity: Identity) -> None:
        self._identity = identity
        self._control.session = identity.session
        identity.load_into(self._context, self._config.state_dir)

    async def _keep_renewing(self) -> None:
        while True:
            assert self._identity is not None
            with contextlib.suppress(Exception):  # asyncio's own TimeoutError before Python 3.11.
                await asyncio.wait_for(self._renew_now.wait(), max(0.0, self._identity.renew_at - time.time()))
            try:
                await self._renew(self._identity)
            except (Unreachable, Refused, NoKey, ValueError) as error:
                say(f"the certificate cannot be renewed now: {error}")
                await self._pause(RENEW_RETRY_S)
            self._renew_now.clear()

    async def _renew(self, before: Identity) -> None:
        """A certificate for a new key, which is ours only once both are written down."""
        config = self._config
        key = await self._in_thread(lambda: make_key(config.state_dir))
        csr = await self._in_thread(lambda: make_request(key, config.node_id, config.state_dir))
        answer = await self._in_thread(lambda: self._control.post("/agent/renew", {"csr": csr}))
        identity = received(config.node_id, key, answer, before)
        identity.save(config.state_dir)
        self._take(identity)
        say("the certificate is renewed")

    async def _read_bundle(self, bundle_id: str) -> None:
        """There is a new authority: believe it before anybody shows a certificate of it."""
        assert self._identity is not None
        bundle = await self._in_thread(lambda: self._control.get("/agent/ca.pem"))
        identity = dataclasses.replace(self._identity, bundle=bundle, bundle_id=bundle_id)
        self._context.load_verify_locations(cadata=bundle)
        identity.save(self._config.state_dir)
        self._identity = identity

    # Telling

    async def _keep_beating(self) -> None:
        failures = 0
        while not self._stop.is_set():
            beat = await self._in_thread(self._measure)
            try:
                answer = await self._in_thread(lambda beat=beat: self._control.post("/agent/heartbeat", beat))
                if failures:
                    say("the control plane answers again")
                failures = 0
                await self._obey(answer)
            except Unreachable as error:
                if not failures:
                    say(f"the control plane is away, serving on: {error}")
                failures += 1
            except Refused as error:
                say(f"a heartbeat was refused: {error}")
                failures += 1
                if error.status == 410:
                    await self._stop_when_idle()
                elif error.status == 401 and self._config.join_token:
                    await self._register_again()
            pause_s = self._config.heartbeat_s
            if failures:
                pause_s = min(max(pause_s, LONGEST_PAUSE_S), pause_s * 2 ** min(failures, 10))
            # Agents that lost the control plane together must not come back together.
            await self._pause(pause_s * random.uniform(0.9, 1.1))

    async def _register_again(self) -> None:
        with contextlib.suppress(Refused, NoKey):
            identity = await self._register()
            if identity is not None:
                self._take(identity)

    async def _obey(self, answer: dict[str, Any]) -> None:
        commands: Any = answer.get("commands")
        for command in commands if isinstance(commands, list) else []:  # pyright: ignore[reportUnknownVariableType]
            if command == "drain":
                if not self._is_draining:
                    say("the node drains: no new requests come, running ones end")
                self._is_draining = True
            elif command == "renew":
                self._renew_now.set()
            elif command == "logs":
                await self._send_logs()
            elif command == "stop":
                await self._stop_when_idle()
        bundle_id = str(answer.get("bundle_id") or "")
        if bundle_id and self._identity is not None and bundle_id != self._identity.bundle_id:
            await self._read_bundle(bundle_id)

    async def _stop_when_idle(self) -> None:
        say("the node has ended: stopping")
        until = time.monotonic() + STOP_PATIENCE_S
        while self._load and time.monotonic() < until and not self._stop.is_set():
            await self._pause(0.5)
            await self._in_thread(self._measure)
        self._stop.set()

    async def _send_logs(self) -> None:
        lines = list(self._engine.lines) if self._engine is not None else []
        text = "\n".join(lines).encode()[-MOST_LOG_BYTES:].decode(errors="replace")
        await self._in_thread(lambda: self._control.post("/agent/logs", {"text": text}))

    async def _keep_watching(self, watcher: Watcher) -> None:
        """Ask one cloud's metadata server for as long as it is there."""
        told = ""
        while not self._stop.is_set():
            try:
                await self._in_thread(watcher.check)
            except Away:
                await self._pause(DETECT_INTERVAL_S)
                continue
            say(f"watching for spot notices of {watcher.name}")
            failures = 0
            while failures < WATCHER_FAILURES:
                try:
                    notice = await self._in_thread(watcher.poll)
                    failures = 0
                except Away:
                    failures += 1
                    notice = None
                if notice is not None and notice.text != told:
                    told = notice.text
                    await self._tell(notice)
                await self._pause(watcher.pause_s)

    async def _tell(self, notice: Notice) -> None:
        """At once, and again until it is taken: seconds count, and a notice that nobody heard costs answers."""
        say(f"notice: {notice.text}, {notice.left_s} s left")
        came_at = time.monotonic()
        if self._notice is None or notice.is_final:
            self._notice, self._notice_at = notice, came_at
        pause_s = NOTICE_PAUSE_S
        while not self._stop.is_set():
            body = {"notice": notice.text, "left_s": _left(notice, came_at), "is_final": notice.is_final}
            try:
                await self._in_thread(lambda body=body: self._control.post("/agent/notice", body))
                return
            except Unreachable as error:
                say(f"the notice was not taken yet: {error}")
            except Refused as error:
                say(f"the notice was refused: {error}")
                return
            await self._pause(pause_s)
            pause_s = min(LONGEST_NOTICE_PAUSE_S, pause_s * 2)

    # Measuring

    async def _is_engine_well(self) -> bool:
        return await self._in_thread(lambda: self._ask_engine("/health") is not None)

    def _ask_engine(self, path: str) -> bytes | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._config.engine_port, timeout=ENGINE_TIMEOUT_S)
        credential = self._identity.credential if self._identity is not None else ""
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {credential}"})
            answer = connection.getresponse()
            content = answer.read(2_000_000)
            return content if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _measure(self) -> dict[str, Any]:
        """A heartbeat: the fields of `crosslogic.domain.heartbeat.Heartbeat` but the node's id and when it came."""
        is_up = self._ask_engine("/health") is not None
        content = self._ask_engine("/metrics") if is_up else None
        page = parse(content.decode(errors="replace")) if content is not None else EnginePage({})
        medians = {
            word: median_ms(self._buckets.get(word, {}), page.buckets[word]) if word in self._buckets else None
            for word in page.buckets
        }
        self._buckets = dict(page.buckets)
        self._load = (page.number("running") or 0) + (page.number("waiting") or 0)
        gpu = self._gpus.read()
        engine = self._engine
        notice = self._notice
        return {
            "is_engine_up": is_up,
            "engine_started_at": engine.started_at if engine is not None else 0.0,
            "engine_restarts": engine.restarts if engine is not None else 0,
            "running": page.number("running"),
            "waiting": page.number("waiting"),
            "kv_cache_used": page.share("kv_cache_used"),
            "prompt_tokens": page.number("prompt_tokens") or 0,
            "completion_tokens": page.number("completion_tokens") or 0,
            "cached_tokens": page.number("cached_tokens") or 0,
            "preempted_requests": page.number("preempted_requests") or 0,
            "ttft_p50_ms": medians.get("ttft_p50_ms"),
            "inter_token_p50_ms": medians.get("inter_token_p50_ms"),
            "gpu_temperature_c": gpu.temperature_c,
            "gpu_memory_used_mb": gpu.memory_used_mb,
            "gpu_memory_total_mb": gpu.memory_total_mb,
            "out_of_memory": engine.out_of_memory if engine is not None else 0,
            "disk_free_mb": disk.free_mb(self._config.state_dir),
            "notice": notice.text if notice is not None else "",
            "notice_left_s": _left(notice, self._notice_at) if notice is not None else None,
            "agent_version": VERSION,
        }

    async def _keep_clean(self) -> None:
        while not self._stop.is_set():
            removed = await self._in_thread(
                lambda: disk.trim(self._config.cache_dirs, self._config.cache_limit_mb, time.time())
            )
            if removed:
                say(f"removed {removed // 1_000_000} MB of old cache files")
            await self._pause(CLEAN_INTERVAL_S)

    # Waiting

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the word to stop.

        Loops look for that word themselves: Python before 3.12 may drop a cancellation that comes while this returns.
        """
        with contextlib.suppress(Exception):  # asyncio's own TimeoutError before Python 3.11.
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _left(notice: Notice, came_at: float) -> float | None:
    """Seconds until the machine is taken, counted from when the notice came."""
    return None if notice.left_s is None else max(0.0, notice.left_s - (time.monotonic() - came_at))


def say(line: str) -> None:
    """One line of the agent's own log, on stderr."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} agent: {line}\n")
    sys.stderr.flush()


def main() -> int:
    """Run this machine's agent until it is told to stop."""
    try:
        config = Config.of_process()
    except BadConfig as error:
        say(str(error))
        return 2
    os.makedirs(config.state_dir, mode=0o700, exist_ok=True)
    control = Control(config.control_url, config.ca_sha256, config.state_dir)
    watchers: list[Watcher] = [Aws(config.aws_metadata), Gcp(config.gcp_metadata), Azure(config.azure_metadata)]

    async def run() -> int:
        return await Agent(config, control, watchers, Gpus()).run()

    code = asyncio.run(run())
    # A question that waits for GCP's answer would hold the process back.
    sys.stderr.flush()
    os._exit(code)
