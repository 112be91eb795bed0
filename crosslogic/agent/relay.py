"""The node's door: ends TLS, lets only our control plane in, and carries bytes to the engine without reading them."""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

# More connections than an engine can answer are refused, before they cost a handshake's memory for long.
MOST_CONNECTIONS = 4096
HANDSHAKE_S = 10.0
CONNECT_S = 5.0


class Relay:
    """Listens with TLS and connects each caller to the engine on this machine."""

    def __init__(self, context: ssl.SSLContext, engine_port: int) -> None:
        self._context = context
        self._engine_port = engine_port
        self._server: asyncio.Server | None = None
        self.callers: set[Caller] = set()

    async def listen(self, host: str, port: int) -> int:
        """Take connections from now on; the port, which is a free one for 0. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = server = await loop.create_server(
            lambda: Caller(self, self._engine_port),
            host,
            port,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_S,
            backlog=1024,
        )
        return int(server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Take no more connections, and break those that there are."""
        if self._server is not None:
            self._server.close()
        for caller in list(self.callers):
            caller.abort()


class _Side(asyncio.Protocol):
    """One end of a pair: what comes in here goes out at the other, no faster than that one takes it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        """Called by the loop: this end takes no more, so the other is not read."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Called by the loop."""
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def abort(self) -> None:
        """Break this end at once."""
        if self.transport is not None:
            self.transport.abort()


class Caller(_Side):
    """The control plane's end."""

    def __init__(self, relay: Relay, engine_port: int) -> None:
        super().__init__()
        self._relay = relay
        self._engine_port = engine_port
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop, after the handshake: whoever is here has shown a certificate of ours."""
        super().connection_made(transport)
        if len(self._relay.callers) >= MOST_CONNECTIONS:
            self.abort()
            return
        self._relay.callers.add(self)
        # What is sent before the engine's end is there stays in the kernel.
        cast(asyncio.Transport, transport).pause_reading()
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, engine = await asyncio.wait_for(
                loop.create_connection(lambda: _Engine(self), "127.0.0.1", self._engine_port), CONNECT_S
            )
        except Exception:
            # Asyncio's own TimeoutError is no OSError before Python 3.11. The caller sees a connection that breaks.
            self.abort()
            return
        if self.transport is None or self.transport.is_closing():
            engine.abort()
            return
        self.other = engine
        self.transport.resume_reading()

    def eof_received(self) -> bool:
        """Called by the loop: TLS has no half-closed connections, so the caller has hung up."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: the engine must not go on for nobody."""
        self._relay.callers.discard(self)
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
        if self.other is not None:
            self.other.abort()


class _Engine(_Side):
    """The engine's end."""

    def __init__(self, caller: Caller) -> None:
        super().__init__()
        self.other = caller

    def eof_received(self) -> bool:
        """Called by the loop: the engine has said all; what is on its way to the caller still arrives."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()
        # This end closes with the caller's.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: an engine that broke must look broken."""
        if self.other is None or self.other.transport is None:
            return
        if exc is None:
            self.other.transport.close()
        else:
            self.other.abort()
