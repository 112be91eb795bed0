"""Temporal's development server of the embedded stack, with its Web UI."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from crosslogic.contracts.names import SEARCH_ATTRIBUTES
from crosslogic.dev import binaries
from crosslogic.dev.parts import Launch, answers
from crosslogic.settings import child_environment


@dataclass(frozen=True, slots=True)
class Temporal:
    """A server whose histories survive in one SQLite file. It listens on 127.0.0.1 only."""

    folder: Path
    port: int
    ui_port: int
    http_port: int
    metrics_port: int
    name: str = "temporal"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """Where clients connect, HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def ui_url(self) -> str:
        """The Web UI."""
        return f"http://127.0.0.1:{self.ui_port}"

    def prepare(self) -> Launch:
        """The server creates its file by itself."""
        self.folder.mkdir(exist_ok=True)
        command = [str(binaries.temporal()), "server", "start-dev", "--ip", "127.0.0.1"]
        command += ["--port", str(self.port), "--ui-port", str(self.ui_port)]
        command += ["--http-port", str(self.http_port), "--metrics-port", str(self.metrics_port)]
        command += ["--db-filename", str(self.folder / "temporal.db"), "--log-level", "error"]
        # Without the write-ahead log every commit waits for the disk twice: half the throughput.
        command += ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=normal"]
        for attribute in SEARCH_ATTRIBUTES:
            command += ["--search-attribute", f"{attribute}=Keyword"]
        # A development machine has better uses for its memory than garbage that Go has not looked at yet. The server
        # wants to know its user's name, which a container's user may not have.
        return Launch(command, child_environment(GOGC="50", USER="crosslogic"))

    async def is_ready(self) -> bool:
        """Does the frontend know the namespace, and does the UI answer?"""
        namespace = f"http://127.0.0.1:{self.http_port}/api/v1/namespaces/default"
        return await answers(namespace) and await answers(self.ui_url)
