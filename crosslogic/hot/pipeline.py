"""One connection to Valkey that all concurrent requests share: the hot path's way to it.

Commands that are issued in the same turn of the event loop leave in one write, replies come back in order, and nothing
is ever queued behind a connection that is down: a command then fails at once, and the caller does without. A client
with a pool costs several times as much CPU for each command, and this one is on the way of every request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from crosslogic.domain.errors import InvariantViolated, Unavailable

log = logging.getLogger(__name__)

# Valkey answers in well under a millisecond; one that needs this long is stopped, swapping or cut off.
DEADLINE_S: Final = 0.5
CONNECT_DEADLINE_S: Final = 2.0
SECOND_LOOK_S: Final = 0.02
# Between two attempts to connect: doubled each time, with jitter so that processes do not come back in step.
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
# Commands without a reply. At 50 000 commands a second, far more than one process issues, this is the deadline's worth.
MOST_WAITING: Final = 25_000

# Replies by which the server says that it cannot serve now, as opposed to "your command is wrong".
_PASSING = frozenset(
    "LOADING READONLY MASTERDOWN CLUSTERDOWN TRYAGAIN OOM BUSY MISCONF NOREPLICAS NOAUTH NOPERM".split()  # noqa: SIM905
)
# After these another connection, by the same name, may reach a server that can.
_WRONG_SERVER = frozenset({"READONLY", "MASTERDOWN"})

Argument = bytes | str | int


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is and how to enter, read from a URL as redis-py writes them.

    `redis://[user][:password@]host[:port][/database]`; `rediss://` for TLS, with `ssl_ca_certs`, `ssl_certfile`,
    `ssl_keyfile`, `ssl_cert_reqs=none` and `ssl_check_hostname=false` in the query; `unix://[user][:password@]/path[?db=N]`.
    Other options of the query belong to other clients and are ignored.
    """

    host: str
    port: int
    path: str
    user: str
    password: str = field(repr=False)
    database: int
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL. Raises ValueError; its message never holds the URL, which may hold a password."""
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(f"a Redis URL starts with redis://, rediss:// or unix://, not with {parts.scheme!r}")
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        is_unix = parts.scheme == "unix"
        database = options.get("db") or ("" if is_unix else parts.path.strip("/")) or "0"
        if not database.isdecimal():
            raise ValueError(f"a Redis database is a number, not {database!r}")
        return cls(
            host=parts.hostname or "localhost",
            port=parts.port or 6379,
            path=unquote(parts.path) if is_unix else "",
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            database=int(database),
            tls=_tls(options) if parts.scheme == "rediss" else None,
        )

    @property
    def shown(self) -> str:
        """For people: without the password."""
        return self.path or f"{self.host}:{self.port}"

    def handshake(self) -> list[Sequence[Argument]]:
        """The commands that open a connection; each must be answered without an error."""
        commands: list[Sequence[Argument]] = []
        if self.password:
            commands.append(("AUTH", self.user, self.password) if self.user else ("AUTH", self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        # A stopped server still lets the kernel accept connections; only an answer proves that it serves.
        commands.append(("PING",))
        return commands


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_check_hostname", "true").lower() == "false" or options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
    if options.get("ssl_cert_reqs") == "none":
        context.verify_mode = ssl.CERT_NONE
    if "ssl_certfile" in options:
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    return context


class Script:
    """A Lua script and the name by which the server remembers it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


# Its own annotation says a tuple of one.
_pack: Callable[[Sequence[Argument]], bytes] = cast(Any, hiredis).pack_command

OnReply = Callable[[Any], None]


def pack_but_last(*command: Argument) -> bytes:
    """A command as it is written, up to its last argument, which `pack_last` adds: for commands that begin alike."""
    count, rest = len(command), _pack(command).partition(b"\r\n")[2]
    return b"*%d\r\n%b" % (count + 1, rest)


def pack_last(begun: bytes, argument: bytes) -> bytes:
    """The whole command."""
    return b"%b$%d\r\n%b\r\n" % (begun, len(argument), argument)


class _Connection(asyncio.Protocol):
    """One connection's life: commands out, replies in order, until it is lost for whatever reason."""

    def __init__(self, deadline_s: float, on_write: Callable[[], None], on_lost: Callable[[_Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline_s = deadline_s
        self._on_write = on_write
        self._on_lost = on_lost
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[OnReply, float]] = deque()
        self._outgoing: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._late: tuple[OnReply, float] | None = None
        self._lost: Unavailable | None = None
        self.ended = asyncio.Event()

    def send(self, command: Sequence[Argument]) -> asyncio.Future[Any]:
        """Queue a command for this turn's write; its reply comes by the deadline or not at all. Raises Unavailable."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._expect(partial(_resolve, future))
        if not self._outgoing:
            self._loop.call_soon(self._write)
        self._outgoing.append(_pack(command))
        return future

    def post(self, command: bytes, on_reply: OnReply) -> None:
        """Write a command now, behind those that are queued. Raises Unavailable."""
        self._expect(on_reply)
        self._outgoing.append(command)
        self._write()

    def _expect(self, on_reply: OnReply) -> None:
        if self._lost is not None:
            raise Unavailable(self._lost.message)
        if len(self._waiting) >= MOST_WAITING:
            raise Unavailable(f"Valkey has {MOST_WAITING} commands to answer already.")
        due_at = self._loop.time() + self._deadline_s
        self._waiting.append((on_reply, due_at))
        if self._watchdog is None:
            self._watchdog = self._loop.call_at(due_at, self._watch)

    def _write(self) -> None:
        if self._outgoing and self._transport is not None and self._lost is None:
            self._transport.write(b"".join(self._outgoing))
            self._on_write()
        self._outgoing.clear()

    def _watch(self) -> None:
        """One timer for all commands: the oldest is always the first to be late."""
        self._watchdog = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        if oldest[1] > self._loop.time():
            self._watchdog = self._loop.call_at(oldest[1], self._watch)
        elif self._late is oldest:
            self.lose(f"Valkey did not answer within {self._deadline_s:g} s.")
        else:
            # Perhaps it was this process that stood still, and the reply is there but was not read yet.
            self._late = oldest
            self._watchdog = self._loop.call_later(SECOND_LOOK_S, self._watch)

    def lose(self, reason: str) -> None:
        """Give the connection up and fail whatever waits on it, at once."""
        if self._lost is None:
            self._lost = Unavailable(reason)
            self._on_lost(self)
            if self._transport is not None:
                self._transport.abort()
            if self._watchdog is not None:
                self._watchdog.cancel()
            while self._waiting:
                on_reply, _ = self._waiting.popleft()
                on_reply(Unavailable(reason))
            self.ended.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose("The connection to Valkey was lost.")

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                if not waiting:
                    self.lose("Valkey answered what nobody had asked.")
                    return
                on_reply, _ = waiting.popleft()
                on_reply(reply)
                if isinstance(reply, hiredis.ReplyError):
                    word = str(reply).partition(" ")[0]
                    if word in _WRONG_SERVER:
                        self.lose(f"This Valkey server says {word}.")
                        return
        except hiredis.ProtocolError:
            self.lose("Valkey sent what is not its protocol.")


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    # A future that is done belongs to a caller that went away; its reply is read all the same.
    if not future.done():
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)


class PipelinedRedis:
    """Commands over one shared connection that mends itself while `run` runs.

    Every method raises Unavailable at once while there is no connection, and after `deadline_s` when the server does
    not answer; the connection is then given up, because replies come in order and all behind the late one would be late
    too. What had been sent may or may not have been done.
    """

    def __init__(self, url: str, *, deadline_s: float = DEADLINE_S) -> None:
        self._address = Address.of(url)
        self._deadline_s = deadline_s
        self._connection: _Connection | None = None
        self._connected = asyncio.Event()
        self._is_down_logged = False
        self.writes = 0

    @property
    def is_connected(self) -> bool:
        """Whether commands are taken at this moment."""
        return self._connection is not None

    async def wait_connected(self) -> None:
        """Return as soon as commands are taken; waits for ever without `run`."""
        await self._connected.wait()

    async def run(self) -> None:
        """Keep a connection until cancelled; the first attempt is made at once."""
        pause_s = FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection = await self._connect()
            except (OSError, Unavailable, hiredis.ReplyError) as error:
                self._say_down(error)
            else:
                connected_at = loop.time()
                await self._hold(connection)
                if loop.time() - connected_at > LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
                    continue
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _connect(self) -> _Connection:
        address = self._address
        loop = asyncio.get_running_loop()

        def protocol() -> _Connection:
            return _Connection(self._deadline_s, self._count_write, self._drop)

        async with asyncio.timeout(CONNECT_DEADLINE_S):
            if address.path:
                _, connection = await loop.create_unix_connection(protocol, address.path)
            else:
                _, connection = await loop.create_connection(protocol, address.host, address.port, ssl=address.tls)
        try:
            await asyncio.gather(*[connection.send(command) for command in address.handshake()])
        except BaseException:
            connection.lose("The connection to Valkey could not be opened.")
            raise
        return connection

    async def _hold(self, connection: _Connection) -> None:
        log.log(
            logging.WARNING if self._is_down_logged else logging.INFO, "connected to Valkey at %s", self._address.shown
        )
        self._is_down_logged = False
        self._connection = connection
        self._connected.set()
        try:
            await connection.ended.wait()
        finally:
            connection.lose("This process is closing its connection to Valkey.")

    def _drop(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._connected.clear()

    def _say_down(self, error: Exception) -> None:
        if not self._is_down_logged:
            self._is_down_logged = True
            log.warning("no connection to Valkey at %s, trying on: %s", self._address.shown, error)

    def _count_write(self) -> None:
        self.writes += 1

    def send(self, *command: Argument) -> asyncio.Future[Any]:
        """Issue a command now; the future is its reply, or hiredis.ReplyError where the server refuses.

        Cancelling the future abandons the reply, never the command.
        """
        if self._connection is None:
            raise Unavailable("There is no connection to Valkey at the moment.")
        return self._connection.send(command)

    def post(self, command: bytes, on_reply: OnReply) -> None:
        """Write a packed command now and have `on_reply` called once: with its reply, or the exception in its place.

        For those who gather commands of their own and need no future for each. `on_reply` must not raise.
        """
        if self._connection is None:
            raise Unavailable("There is no connection to Valkey at the moment.")
        self._connection.post(command, on_reply)

    async def execute(self, *command: Argument) -> Any:
        """One command's reply. Raises Unavailable; InvariantViolated where the server calls the command wrong."""
        try:
            return await self.send(*command)
        except hiredis.ReplyError as error:
            raise translated(error) from error

    async def evaluate(self, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument]) -> Any:
        """A script's reply, by its SHA; a server that does not know it (yet, or after a restart) is sent the source."""
        try:
            return await self.send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except hiredis.ReplyError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise translated(error) from error
        return await self.execute("EVAL", script.source, len(keys), *keys, *arguments)


def translated(error: hiredis.ReplyError) -> Unavailable | InvariantViolated:
    """What a server's refusal means to us."""
    text = str(error)
    word = text.partition(" ")[0]
    if word in _PASSING:
        return Unavailable(f"Valkey cannot serve at the moment: {word}.")
    return InvariantViolated(f"Valkey refused a command: {text}")
