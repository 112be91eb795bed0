"""Valkey of the embedded stack."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from crosslogic.dev import binaries
from crosslogic.dev.parts import Launch
from crosslogic.dev.state import write_private


@dataclass(frozen=True, slots=True)
class Valkey:
    """An append-only Valkey on 127.0.0.1, behind a password: other users of the machine can reach the port, too."""

    folder: Path
    port: int
    password: str
    name: str = "valkey"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> Launch:
        """Write the configuration; the password is in it, because others can see arguments."""
        self.folder.mkdir(exist_ok=True)
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": _quoted(str(self.folder)),
            "requirepass": self.password,
            "appendonly": "yes",
            "save": '""',
            "loglevel": "warning",
            "maxmemory-policy": "noeviction",
        }
        configuration = self.folder / "valkey.conf"
        write_private(configuration, "".join(f"{name} {value}\n" for name, value in settings.items()))
        return Launch([str(binaries.valkey_server()), str(configuration)])

    async def is_ready(self) -> bool:
        """Does it answer a ping? It says LOADING until it has read its log."""
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
                    return await reader.readline() == b"+OK\r\n" and await reader.readline() == b"+PONG\r\n"
        except (OSError, TimeoutError):
            return False


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
