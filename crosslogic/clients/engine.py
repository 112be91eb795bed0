"""An engine's own HTTP interface, as probes use it: is it well, can it generate, what is it busy with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast
from zlib import crc32

import httpx

from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable

# Nodes are not trusted. vLLM's metrics page has 50 kB; nothing that we ask for is larger than this.
MAX_ANSWER_BYTES = 2_000_000

# Gauges of requests that an engine has accepted and not finished: running, and waiting for a slot.
# Source: the metrics pages of llama.cpp's server and of vLLM 0.32.
RUNNING = frozenset({"llamacpp:requests_processing", "vllm:num_requests_running"})
WAITING = frozenset({"llamacpp:requests_deferred", "vllm:num_requests_waiting"})
# Counters that grow while an engine generates, whoever it generates for.
PROGRESS = frozenset({"llamacpp:n_decode_total", "llamacpp:tokens_predicted_total", "vllm:generation_tokens_total"})
# How an engine, or what stands before it, says that it has too much to do.
BUSY_STATUSES = frozenset({408, 429})

# A pool looks through all its connections for every request, so that one of a thousand takes ten times as long as these
# small ones. Each node has its place in one of them.
POOLS = 64
# In each pool, kept from one poll to the next: opening a connection costs more than asking.
MOST_CONNECTIONS = 40
KEEPALIVE_S = 90.0

_PROMPT = "Count from one to one hundred: one, two, three,"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Requests inside an engine; `progress` grows while it generates, 0 where its metrics do not tell."""

    running: int
    waiting: int
    progress: float = 0.0

    @property
    def total(self) -> int:
        """Requests that would be lost if the engine ended now."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Generation:
    """What one measured generation took. An embedding counts its prompt's tokens."""

    tokens: int
    duration_s: float


class NodeTrust(Protocol):
    """Tells nodes whose certificates are ours from those that have a public one."""

    async def tls_of(self, node_id: str) -> tuple[ssl.SSLContext, str] | None:
        """The context and the name to verify for a node with an agent, None for any other."""
        ...


class EngineClient:
    """Asks engines, each with its own node's credential. Redirects are never followed and answers are bounded.

    Every method raises Unavailable when there is no answer in time, or not the expected one.
    """

    def __init__(
        self,
        node_secret: str,
        timeout_s: float,
        connections: int = MOST_CONNECTIONS,
        *,
        trust: NodeTrust | None = None,
        guard: Callable[[str], str | None] | None = None,
    ) -> None:
        self._secret = node_secret
        self._timeout_s = timeout_s
        self._trust = trust
        self._guard = guard
        self._connections = connections
        self._pools = self._make_pools(httpx.create_ssl_context(trust_env=False))
        # Nodes with an agent, whose certificates are ours. Made with the first of them.
        self._agents: list[httpx.AsyncClient] = []

    def _make_pools(self, verify: ssl.SSLContext) -> list[httpx.AsyncClient]:
        limits = httpx.Limits(
            max_connections=self._connections,
            max_keepalive_connections=self._connections,
            keepalive_expiry=KEEPALIVE_S,
        )
        return [
            httpx.AsyncClient(
                timeout=self._timeout_s, follow_redirects=False, trust_env=False, verify=verify, limits=limits
            )
            for _ in range(POOLS)
        ]

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(pool.aclose() for pool in (*self._pools, *self._agents)))

    async def check_health(self, node_id: str, endpoint: str) -> None:
        """Return when the engine says that it is well: it has loaded its model and takes requests."""
        await self._ask(node_id, "GET", f"{endpoint}/health")

    async def generate(
        self, node_id: str, endpoint: str, model: str, kind: str, max_tokens: int, timeout_s: float = 60.0
    ) -> Generation:
        """Generate up to `max_tokens` tokens (or embed a short text) and say how long that took."""
        body: dict[str, Any]
        if kind == "embedding":
            path, body = "/v1/embeddings", {"model": model, "input": _PROMPT}
        elif kind == "completion":
            path = "/v1/completions"
            body = {"model": model, "prompt": _PROMPT, "max_tokens": max_tokens, "temperature": 0}
        else:
            path = "/v1/chat/completions"
            body = {
                "model": model,
                "messages": [{"role": "user", "content": _PROMPT}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
        started = time.monotonic()
        answer = await self._ask_json(node_id, f"{endpoint}{path}", body, timeout_s)
        duration_s = time.monotonic() - started
        try:
            usage = answer["usage"]
            tokens = int(usage["prompt_tokens"] if kind == "embedding" else usage["completion_tokens"])
            has_output = bool(answer["data"] if kind == "embedding" else answer["choices"])
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable("The engine's answer to a trial generation is not an OpenAI answer.") from error
        if tokens < 1 or not has_output:
            raise Unavailable("The engine answered a trial generation without a single token.")
        return Generation(tokens, duration_s)

    async def answer(
        self, node_id: str, endpoint: str, model: str, kind: str, prompt: str, max_tokens: int, timeout_s: float
    ) -> str:
        """The engine's answer to a prompt at temperature 0; of an embedding, its number of dimensions."""
        body: dict[str, Any]
        if kind == "embedding":
            path, body = "/v1/embeddings", {"model": model, "input": prompt}
        else:
            asked = {"prompt": prompt} if kind == "completion" else {"messages": [{"role": "user", "content": prompt}]}
            path = "/v1/completions" if kind == "completion" else "/v1/chat/completions"
            body = {"model": model, **asked, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        document = await self._ask_json(node_id, f"{endpoint}{path}", body, timeout_s)
        try:
            if kind == "embedding":
                return str(len(document["data"][0]["embedding"]))
            choice = document["choices"][0]
            return str((choice["text"] if kind == "completion" else choice["message"]["content"]) or "")
        except (KeyError, TypeError, IndexError) as error:
            raise Unavailable("The engine's answer is not an OpenAI answer.") from error

    async def read_load(self, node_id: str, endpoint: str) -> EngineLoad | None:
        """The requests inside the engine, from its metrics; None when its metrics do not tell."""
        try:
            page = await self._ask(node_id, "GET", f"{endpoint}/metrics")
        except Rejected:
            return None
        return parse_load(page.decode(errors="replace"))

    async def _ask_json(self, node_id: str, url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = await self._ask(node_id, "POST", url, body, timeout_s)
        try:
            decoded: object = json.loads(answer)
        except ValueError as error:
            raise Unavailable("The engine's answer is not JSON.") from error
        if not isinstance(decoded, dict):
            raise Unavailable("The engine's answer is not a JSON object.")
        return cast(dict[str, Any], decoded)

    async def _ask(
        self, node_id: str, method: str, url: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> bytes:
        headers = {"authorization": f"Bearer {node_credential(self._secret, node_id)}"}
        total_s = timeout_s or self._timeout_s
        timeout = httpx.Timeout(total_s, connect=self._timeout_s)
        try:
            # httpx limits the silence between two chunks; a node that sends a byte a second must end too.
            async with asyncio.timeout(total_s), contextlib.AsyncExitStack() as stack:
                http, target, more, extensions = await self._way(node_id, httpx.URL(url))
                response = await stack.enter_async_context(
                    http.stream(
                        method, target, json=body, headers=headers | more, timeout=timeout, extensions=extensions
                    )
                )
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        raise Unavailable(f"The engine's answer is longer than {MAX_ANSWER_BYTES} bytes.")
                if response.status_code == 404:
                    raise Rejected("The engine does not know this path.", status=404, code="unknown_path")
                if response.status_code in BUSY_STATUSES:
                    raise Unavailable(f"The engine is busy ({response.status_code}).", code="engine_busy")
                if response.status_code != 200:
                    raise Unavailable(f"The engine answered {response.status_code}.")
                return bytes(content)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Unavailable(f"The engine did not answer ({type(error).__name__}).") from error

    async def _way(
        self, node_id: str, url: httpx.URL
    ) -> tuple[httpx.AsyncClient, httpx.URL, dict[str, str], dict[str, str]]:
        """Over which connections and to which address; the address is checked, and cannot change after that (H7).

        Raises OSError when the host has no address that may be a node's, and what the trust raises.
        """
        place = crc32(node_id.encode()) % POOLS
        http, extensions = self._pools[place], dict[str, str]()
        if url.scheme == "https":
            tls = await self._trust.tls_of(node_id) if self._trust is not None else None
            if tls is not None:
                self._agents = self._agents or self._make_pools(tls[0])
                http = self._agents[place]
            extensions["sni_hostname"] = tls[1] if tls is not None else url.host
        if self._guard is None:
            return http, url, {}, extensions
        loop = asyncio.get_running_loop()
        problem: str | None = "it has no address"
        for *_, address in await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM):
            problem = self._guard(str(address[0]))
            if problem is None:
                return http, url.copy_with(host=str(address[0])), {"host": url.netloc.decode("ascii")}, extensions
        raise PermissionError(f"no connection to this node: {problem}")


def parse_load(page: str) -> EngineLoad | None:
    """Read the load from a metrics page in Prometheus' text format; None when it has no gauge that we know."""
    running = waiting = progress = 0.0
    is_known = False
    for line in page.splitlines():
        name, _, rest = line.partition("{" if "{" in line else " ")
        if name not in RUNNING and name not in WAITING and name not in PROGRESS:
            continue
        sample = rest.rpartition("}")[2].split() or [""]
        try:
            value = float(sample[0])
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        if name in PROGRESS:
            progress += value
            continue
        is_known = True
        if name in RUNNING:
            running += value
        else:
            waiting += value
    return EngineLoad(round(running), round(waiting), progress) if is_known else None
