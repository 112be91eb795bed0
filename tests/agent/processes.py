"""The control plane's API and a node's agent as processes of their own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from crosslogic.bootstrap import ROOT
from crosslogic.dev.state import free_port
from crosslogic.settings import Settings, child_environment

ADMIN = {"authorization": "Bearer adm_dev_demo"}


class Process:
    """A child with its log, which a test may end and start again."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command = command
        self._environment = environment
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def said(self, words: str) -> int:
        """How often it has said this."""
        return self.log.read_text(errors="replace").count(words)


def api_process(settings: Settings, folder: Path) -> tuple[Process, str]:
    """The API as in production, and its URL."""
    port = free_port()
    secret = settings.node_secret
    assert secret is not None
    environment = child_environment(
        CROSSLOGIC_MODE="dev",
        CROSSLOGIC_STATE_DIR=str(folder / "state"),
        CROSSLOGIC_DATABASE_URL=settings.database_url.get_secret_value(),
        CROSSLOGIC_REDIS_URL=settings.redis_url.get_secret_value(),
        CROSSLOGIC_REDIS_PREFIX=settings.redis_prefix,
        CROSSLOGIC_TEMPORAL_ADDRESS=settings.temporal_address,
        CROSSLOGIC_FLEET_TASK_QUEUE=settings.fleet_task_queue,
        CROSSLOGIC_NODE_SECRET=secret.get_secret_value(),
        CROSSLOGIC_SHUTDOWN_GRACE_S="1",
    )
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--http", "api.inference.server:HttpProtocol"]
    command += ["--port", str(port), "--timeout-graceful-shutdown", "1", "--no-access-log"]
    return Process(command, environment, folder / "api.log"), f"http://127.0.0.1:{port}"


def agent_process(folder: Path, zipapp: bytes, **orders: str) -> Process:
    """The agent from the file that the API serves, without any package of ours to lean on."""
    path = folder / "crosslogic-agent.pyz"
    path.write_bytes(zipapp)
    more = {name: value for name, value in orders.items() if name.startswith(("AWS_", "GCE_"))}
    environment = child_environment(
        **more, **{f"CROSSLOGIC_AGENT_{name}": value for name, value in orders.items() if name not in more}
    )
    return Process([sys.executable, "-S", str(path)], environment, folder / "agent.log")


async def until(what: str, look: Callable[[], Awaitable[Any]], *logs: Path, within_s: float = 60.0) -> Any:
    """The first true value of `look`; a request that fails counts as none."""
    last: Any = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    last = await look()
                except httpx.HTTPError as error:
                    last = None
                    _ = error
                if last:
                    return last
                await asyncio.sleep(0.05)
    except TimeoutError:
        tails = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())
        raise AssertionError(f"not within {within_s} s: {what}; last: {last!r}\n{tails}") from None
