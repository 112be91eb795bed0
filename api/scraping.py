"""`/metrics` of one process on a port of its own, so that each of several processes behind one port can be scraped.

Counters of a process that is gone must not be missed in a sum, so Prometheus has to see each process as a target: the
first takes the first port, the next the next one, and a restarted process the one that has become free.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable

from crosslogic.settings import Settings

log = logging.getLogger("crosslogic.metrics")

MOST_PROCESSES = 64
TIMEOUT_S = 5.0
LONGEST_HEAD_BYTES = 16 * 1024
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def may_scrape(settings: Settings, authorization: str) -> bool:
    """Metrics are anybody's in dev mode, else for the admin token only."""
    token = settings.admin_token.get_secret_value() if settings.admin_token else ""
    given = authorization.removeprefix("Bearer ")
    return settings.is_dev or hmac.compare_digest(given.encode(), token.encode())


async def listen(settings: Settings, page: Callable[[], bytes]) -> asyncio.Server | None:
    """Answer on the first free port from `metrics_port` on; None when that is 0 or no port can be had."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(TIMEOUT_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                status, body = _answer(settings, head, page)
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        writer.close()

    first = settings.metrics_port
    if not first:
        return None
    error: OSError | None = None
    for port in range(first, min(first + MOST_PROCESSES, 65536)):
        try:
            server = await asyncio.start_server(answer, settings.metrics_host, port, limit=LONGEST_HEAD_BYTES)
        except OSError as found:
            error = found
        else:
            log.info("metrics of this process are at port %d", port)
            return server
    log.error("no port for metrics from %d on: %s", first, error)
    return None


def _answer(settings: Settings, head: str, page: Callable[[], bytes]) -> tuple[str, bytes]:
    request, *lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    method, _, rest = request.partition(" ")
    if method != "GET" or rest.partition(" ")[0].partition("?")[0] != "/metrics":
        return "404 Not Found", b"There is only GET /metrics.\n"
    if not may_scrape(settings, headers.get("authorization", "")):
        return "401 Unauthorized", "Send the admin token: Authorization: Bearer …\n".encode()
    return "200 OK", page()
