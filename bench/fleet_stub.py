"""A thousand machines in one process: engines that answer probes, and the cloud that rents them.

`python -m bench.fleet_stub N` prints one JSON line, `{"cloud": PORT, "engines": [PORT, …]}`, then reads lines
`kill I`: engine I and its machine are gone from then on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

CLUSTER: Final = "cic-local-bench-{}"
_GENERATED: Final = json.dumps({"choices": [{}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}).encode()


class Connection(asyncio.Protocol):
    """One kept-alive connection of a client that asks one thing after the other, each within one packet or so."""

    def __init__(self, machines: Machines, number: int | None) -> None:
        self._machines = machines
        self._number = number
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._number is not None:
            self._machines.connections[self._number].add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        if self._number is not None and self._transport is not None:
            self._machines.connections[self._number].discard(self._transport)

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1")
            length = next(
                (int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0
            )
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            method, target, _ = head.split("\r\n", 1)[0].split(" ")
            status, body = self._machines.answer(self._number, method, target)
            assert self._transport is not None
            self._transport.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


class Machines:
    """All of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.gone: set[int] = set()
        self.connections: list[set[asyncio.Transport]] = [set() for _ in range(count)]
        self._servers: list[asyncio.Server] = []

    async def start(self) -> dict[str, Any]:
        """Listen; the ports."""
        loop = asyncio.get_running_loop()
        cloud = await loop.create_server(lambda: Connection(self, None), "127.0.0.1", 0)
        for number in range(self.count):
            server = await loop.create_server(lambda number=number: Connection(self, number), "127.0.0.1", 0)
            self._servers.append(server)
        ports = [server.sockets[0].getsockname()[1] for server in self._servers]
        return {"cloud": cloud.sockets[0].getsockname()[1], "engines": ports}

    def kill(self, number: int) -> None:
        """As if the power of machine and engine had been cut."""
        self.gone.add(number)
        self._servers[number].close()
        for transport in list(self.connections[number]):
            transport.abort()

    def answer(self, number: int | None, method: str, target: str) -> tuple[int, bytes]:
        """The engine's answer, or the cloud's where there is no number."""
        if number is not None:
            return 200, _GENERATED if method == "POST" else b"{}"
        path = target.partition("?")[0]
        if path == "/machines":
            return 200, json.dumps({"machines": [self._machine(number) for number in range(self.count)]}).encode()
        wanted = int(path.rpartition("-")[2])
        if method == "DELETE" and wanted not in self.gone:
            self.kill(wanted)
        return 200, json.dumps(self._machine(wanted)).encode()

    def _machine(self, number: int) -> dict[str, str]:
        status = "gone" if number in self.gone else "running"
        return {"cluster": CLUSTER.format(number), "status": status, "endpoint": "", "reason": ""}


async def main(count: int) -> None:
    """Serve until stdin ends."""
    machines = Machines(count)
    sys.stdout.write(json.dumps(await machines.start()) + "\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        machines.kill(int(line.split()[1]))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
