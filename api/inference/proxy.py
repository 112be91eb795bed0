"""The relay: one admitted call, from the choice of a node to the settled usage record.

Before the client has seen a byte, a node's failure costs it nothing but time: another node is tried, three tries in
all, within a budget of retries. The client hanging up closes the engine's connection at once, in every phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from uuid import UUID

import msgspec

from api.inference.calls import BYTES_PER_TOKEN, Call
from api.inference.events import DONE, EventStream, answer_bytes, usage_tokens
from api.inference.limits import Hold, Limits
from api.inference.metering import UsageLog
from api.inference.observing import Observer
from api.inference.router import Node, RouteTable
from api.inference.upstream import ClientGone, Connection, FailureKind, NodeFailure
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.regions import RegionPlan
from crosslogic.domain.usage import Intent, Outcome, Progress, TokenSource, UsageRecord, list_price_microdollars

log = logging.getLogger("crosslogic.relay")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MOST_TRIES = 3
RETRY_SHARE = 0.1
RETRIES_PER_S = 10.0
LONGEST_ANSWER_BYTES = 64 * 1024 * 1024
PROGRESS_INTERVAL_S = 0.5
# A non-streamed answer's first byte comes when its last token is made; an engine slower than this does not serve.
SLOWEST_TOKENS_PER_S = 10
# After `[DONE]`: how long an engine may take to end its answer before its connection is given up.
LAST_WORDS_S = 0.1
# Where nobody has measured it yet: how long a node takes to come up, told as Retry-After.
USUAL_LEAD_TIME_S = 60

# 401, 403, 404 and 405 mean that we and the engine do not fit together; the client's request is not at fault.
ENGINE_AT_FAULT = frozenset({401, 403, 404, 405})
BUSY = frozenset({408, 429})

OUR_FAILURES = frozenset({Outcome.FAILED, Outcome.CUT})

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_ADDRESS = re.compile(
    r"\w+://\S+"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|\[[0-9a-fA-F:.]*:[0-9a-fA-F:.]*\](?::\d+)?"
    r"|\b(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+):\d{2,5}\b"
    r"|(?:~|\.{1,2})?(?:/[\w.@+-]+){2,}/?"
    r"|[\w.@+-]+\.(?:gguf|safetensors)\b"
)
LONGEST_SHOWN_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Deadlines:
    """In seconds: to connect, to the first byte, between two chunks, for the whole request, and on hold for a node."""

    connect_s: float
    first_byte_s: float
    idle_s: float
    total_s: float
    hold_s: float


class RetryBudget:
    """Retries may be a tenth of the requests and ten a second besides, so that trouble is not multiplied (H2)."""

    def __init__(self, now: float) -> None:
        self._tokens = RETRIES_PER_S
        self._at = now

    def earn(self) -> None:
        """One request has come."""
        self._tokens = min(self._tokens + RETRY_SHARE, 10 * RETRIES_PER_S)

    def spend(self, now: float) -> bool:
        """May this retry go ahead?"""
        self._tokens = min(self._tokens + (now - self._at) * RETRIES_PER_S, 10 * RETRIES_PER_S)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Lifeline:
    """Watches for the client hanging up once its body is read."""

    __slots__ = ("is_gone", "on_gone")

    def __init__(self) -> None:
        self.is_gone = False
        self.on_gone: Callable[[], None] | None = None

    async def watch(self, receive: Receive) -> None:
        """Return when the client is gone, after `on_gone` was called."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        if self.on_gone is not None:
            self.on_gone()


class Relayed:
    """One admitted call while it runs, and what is known of its answer so far."""

    __slots__ = (
        "cached_tokens",
        "call",
        "completion_tokens",
        "deadline_at",
        "events",
        "has_begun",
        "hold",
        "id",
        "intent",
        "is_accepted",
        "is_settled",
        "lifeline",
        "model",
        "node",
        "outcome",
        "plan",
        "prompt_tokens",
        "reported_tokens",
        "shown_id",
        "source",
        "started_at",
        "status",
        "tries",
        "ttft_s",
    )

    def __init__(
        self,
        id: UUID,
        shown_id: str,
        call: Call,
        model: Model,
        plan: RegionPlan,
        hold: Hold,
        intent: Intent,
        now: float,
    ) -> None:
        self.id = id
        self.shown_id = shown_id
        self.call = call
        self.model = model
        self.plan = plan
        self.hold = hold
        self.intent = intent
        self.started_at = now
        self.deadline_at = now
        self.lifeline = Lifeline()
        self.node: Node | None = None
        self.events: EventStream | None = None
        self.tries = 0
        self.has_begun = False
        self.is_accepted = False
        self.is_settled = False
        self.reported_tokens = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.source = TokenSource.NONE
        self.status = 0
        self.outcome = Outcome.FAILED
        self.ttft_s: float | None = None

    def headers(self, content_type: bytes) -> Headers:
        """The answer's headers; the engine's own never pass."""
        headers = [(b"content-type", content_type), (b"x-request-id", self.shown_id.encode())]
        if self.node is not None:
            headers.append((b"x-crosslogic-node", self.node.shown_id))
            headers.append((b"x-crosslogic-region", self.node.shown_region))
        headers.extend(self.hold.standing.headers())
        return headers

    def charge(self, usage: tuple[int, int, int] | None, counted_tokens: int) -> None:
        """Set the tokens from the engine's usage where it can be believed, else from what we counted."""
        if self.call.kind == "embedding":
            counted_tokens = 0
            usage = None if usage is None else (usage[0], 0, usage[2])
        if usage is not None and self._is_possible(*usage):
            self.prompt_tokens, self.completion_tokens, self.cached_tokens = usage
            self.source = TokenSource.ENGINE
        else:
            self.prompt_tokens = self.intent.estimated_prompt_tokens
            self.completion_tokens = counted_tokens
            self.source = TokenSource.COUNTED

    def _is_possible(self, prompt: int, completion: int, cached: int) -> bool:
        """No engine can read more than its context and what was sent, or say more than it was allowed to."""
        call, model = self.call, self.model
        most_prompt = model.context_tokens * call.choices + BYTES_PER_TOKEN * call.estimated_prompt_tokens
        return cached <= prompt <= most_prompt and completion <= call.choices * call.completion_limit(model)

    def charge_nothing(self) -> None:
        """Our failures are not charged."""
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.source = TokenSource.NONE

    def record(self, now: float) -> UsageRecord:
        """The usage record of this call as it stands."""
        intent = self.intent
        return UsageRecord(
            id=intent.id,
            client_request_id=intent.client_request_id,
            org_id=intent.org_id,
            environment_id=intent.environment_id,
            key_id=intent.key_id,
            home_region=intent.home_region,
            model=intent.model,
            endpoint_kind=intent.endpoint_kind,
            is_streamed=intent.is_streamed,
            served_region=self.node.entry.region if self.node else "",
            node_id=self.node.id if self.node else None,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            token_source=self.source,
            latency_ms=int((now - self.started_at) * 1000),
            ttft_ms=None if self.ttft_s is None else int(self.ttft_s * 1000),
            status=self.status,
            outcome=self.outcome,
            list_price_microdollars=list_price_microdollars(
                self.prompt_tokens,
                self.completion_tokens,
                intent.input_price_e10,
                intent.output_price_e10,
                intent.multiplier_bp,
            ),
        )


class Relay:
    """Runs admitted calls on nodes."""

    def __init__(
        self, table: RouteTable, usage_log: UsageLog, limits: Limits, observer: Observer, deadlines: Deadlines
    ) -> None:
        self._table = table
        self._usage_log = usage_log
        self._limits = limits
        self._observer = observer
        self._deadlines = deadlines
        self._loop = asyncio.get_running_loop()
        self._budget = RetryBudget(self._loop.time())
        self._streams: set[Relayed] = set()
        self.catalog: Catalog | None = None

    async def run(self, relayed: Relayed, receive: Receive, send: Send) -> None:
        """Answer an admitted call. Errors before the first byte are raised, with the call settled; later are sent."""
        self._budget.earn()
        relayed.deadline_at = relayed.started_at + self._deadlines.total_s
        watcher = self._loop.create_task(relayed.lifeline.watch(receive))
        try:
            await self._relay(relayed, send)
        except ClientGone:
            relayed.outcome = Outcome.CLIENT_GONE
            relayed.status = relayed.status or 499
            if relayed.events is not None and relayed.has_begun:
                relayed.charge(usage_tokens(relayed.events.usage), relayed.events.tokens)
            elif relayed.is_accepted:
                relayed.charge(None, 0)
        except CrossLogicError as error:
            relayed.charge_nothing()
            relayed.outcome = Outcome.REJECTED if isinstance(error, Rejected) else Outcome.FAILED
            relayed.status = getattr(error, "status", 500)
            raise
        except BaseException:
            # A shutdown past its grace time, or our own fault: what we cut is not charged.
            relayed.charge_nothing()
            relayed.outcome = Outcome.CUT if relayed.has_begun else Outcome.FAILED
            relayed.status = relayed.status or 500
            raise
        finally:
            watcher.cancel()
            self._streams.discard(relayed)
            await self._finish(relayed)

    async def _finish(self, relayed: Relayed) -> None:
        record = relayed.record(self._loop.time())
        if not relayed.is_settled:
            try:
                self._usage_log.settle(record)
            except OSError as error:
                log.error("usage of %s could not be settled: %s", relayed.shown_id, error)
        self._observer.finished(record)
        if record.outcome in OUR_FAILURES:
            ending = self._limits.release(relayed.hold)
        else:
            tokens = record.prompt_tokens + record.completion_tokens
            ending = self._limits.settle(relayed.hold, tokens, record.list_price_microdollars)
        try:
            # Shielded: a request that is being cancelled must give its holds back all the same.
            await asyncio.shield(ending)
        except Exception:
            log.exception("the hold of %s was not given back; it expires", relayed.shown_id)

    def _settle(self, relayed: Relayed) -> None:
        """Put the usage record into the durable log, once. Raises OSError."""
        self._usage_log.settle(relayed.record(self._loop.time()))
        relayed.is_settled = True

    async def _relay(self, relayed: Relayed, send: Send) -> None:
        body = relayed.call.engine_body(relayed.model)
        tried: list[Node] = []
        # A request that every node answers with 5xx may itself be at fault: it is theirs once another node has managed.
        suspects: list[Node] = []
        while True:
            choice = self._table.choose_in(relayed.model.name, relayed.plan.candidates, tried, relayed.call.body)
            node = None if choice is None else choice.node
            if node is None:
                if tried:
                    raise Unavailable(
                        f"No node could answer for {relayed.model.name}; try again shortly.",
                        code="nodes_failed",
                        retry_after_s=2,
                    )
                node = await self._hold_for_node(relayed)
            relayed.node = node
            relayed.tries += 1
            node.take(relayed.hold.tokens)
            try:
                if relayed.call.is_streamed:
                    await self._stream(relayed, node, body, send)
                else:
                    await self._exchange(relayed, node, body, send)
                for suspect in suspects:
                    suspect.failed(FailureKind.ERROR, self._loop.time())
                return
            except NodeFailure as failure:
                relayed.is_accepted = False
                self._observer.node_failed(relayed.model.name, node.entry.region, failure.kind)
                is_late = self._loop.time() >= relayed.deadline_at
                if failure.kind is FailureKind.ERROR and not relayed.has_begun:
                    suspects.append(node)
                elif not is_late and node.failed(failure.kind, self._loop.time()):
                    log.warning("node %s is left out for now: %s", node.entry.node_id, failure.kind)
                if relayed.has_begun:
                    await self._cut(relayed, send)
                    return
                if is_late:
                    raise Unavailable(
                        f"{relayed.model.name} did not answer in time; ask for fewer tokens or stream the answer.",
                        code="deadline_exceeded",
                        retry_after_s=1,
                    ) from failure
                tried.append(node)
                if len(tried) >= MOST_TRIES or not self._budget.spend(self._loop.time()):
                    raise Unavailable(
                        f"{len(tried)} node(s) failed to answer for {relayed.model.name}; try again shortly.",
                        code="nodes_failed",
                        retry_after_s=2,
                    ) from failure
            finally:
                node.give_back(relayed.hold.tokens)

    async def _hold_for_node(self, relayed: Relayed) -> Node:
        """Wait for a node that is on its way. Raises Unavailable when none is, or at the end of the patience."""
        model, regions = relayed.model.name, relayed.plan.candidates
        until = min(self._loop.time() + self._deadlines.hold_s, relayed.deadline_at)
        gone = self._loop.create_future()
        relayed.lifeline.on_gone = lambda: None if gone.done() else gone.set_result(None)
        if relayed.lifeline.is_gone:
            raise ClientGone
        try:
            while self._is_coming(model, regions):
                left_s = until - self._loop.time()
                if left_s <= 0:
                    break
                change = asyncio.ensure_future(self._table.next_change())
                try:
                    await asyncio.wait((change, gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                if gone.done():
                    raise ClientGone
                choice = self._table.choose_in(model, regions)
                if choice is not None:
                    return choice.node
            raise Unavailable(
                f"No node serves {model} in {', '.join(regions)} at the moment; try again when Retry-After has passed.",
                code="model_unavailable",
                retry_after_s=USUAL_LEAD_TIME_S,
            )
        finally:
            relayed.lifeline.on_gone = None

    def _is_coming(self, model: str, regions: tuple[str, ...]) -> bool:
        if self._table.is_any_on_the_way(model, regions) or self._table.is_any_routable(model, regions):
            return True
        catalog = self.catalog
        return catalog is not None and any(
            deployment.model == model
            and any(target.region in regions and target.replicas_min > 0 for target in deployment.regions)
            for deployment in catalog.deployments.values()
        )

    async def _begin(self, relayed: Relayed, node: Node, body: bytes) -> tuple[Connection, bytes]:
        """Send the request to a node: its connection, and the first bytes of the answer's body.

        A kept-alive connection may have been closed by the engine in the meantime: that is no failure of the node, and
        the request goes out once more on a new one.
        """
        trace = b"X-Request-Id: %b\r\n" % relayed.shown_id.encode()
        request = node.upstream.request(relayed.call.path, body, trace)
        patience_s = self._deadlines.first_byte_s
        if not relayed.call.is_streamed and relayed.call.kind != "embedding":
            patience_s += relayed.call.completion_limit(relayed.model) / SLOWEST_TOKENS_PER_S
        connection = node.upstream.idle()
        while True:
            if connection is None:
                connection = await self._connect(relayed, node)
            relayed.lifeline.on_gone = partial(connection.fail, ClientGone())
            try:
                if relayed.lifeline.is_gone:
                    raise ClientGone
                connection.send(request)
                relayed.is_accepted = True
                deadline_at = min(self._loop.time() + patience_s, relayed.deadline_at)
                first = await connection.read(deadline_at, FailureKind.SILENT)
                self._check_status(connection.status)
                return connection, first
            except NodeFailure as failure:
                is_stale = failure.kind is FailureKind.RESET and not failure.is_fresh
                node.upstream.release(connection)
                if not is_stale:
                    raise
                connection = None
            except BaseException:
                node.upstream.release(connection)
                raise

    async def _connect(self, relayed: Relayed, node: Node) -> Connection:
        """A new connection. Raises NodeFailure(CONNECT), or ClientGone as soon as nobody waits for it."""
        try:
            async with asyncio.timeout(self._deadlines.connect_s) as patience:
                relayed.lifeline.on_gone = lambda: patience.reschedule(self._loop.time())
                if relayed.lifeline.is_gone:
                    raise ClientGone
                return await node.upstream.connect()
        except (OSError, TimeoutError) as error:
            if relayed.lifeline.is_gone:
                raise ClientGone from error
            raise NodeFailure(FailureKind.CONNECT, repr(error)) from error
        finally:
            relayed.lifeline.on_gone = None

    def _check_status(self, status: int) -> None:
        if status in BUSY:
            raise NodeFailure(FailureKind.BUSY, str(status))
        if status >= 500 or status in ENGINE_AT_FAULT:
            raise NodeFailure(FailureKind.ERROR, str(status))
        if status < 200 or 300 <= status < 400:
            raise NodeFailure(FailureKind.GARBAGE, str(status))

    async def _read_all(self, relayed: Relayed, connection: Connection, first: bytes) -> bytes:
        parts, size = [first], len(first)
        while first:
            first = await connection.read(relayed.deadline_at, FailureKind.TOTAL)
            parts.append(first)
            size += len(first)
            if size > LONGEST_ANSWER_BYTES:
                raise NodeFailure(FailureKind.GARBAGE, "endless answer")
        return b"".join(parts)

    async def _exchange(self, relayed: Relayed, node: Node, body: bytes, send: Send) -> None:
        """A call with one JSON answer."""
        connection, first = await self._begin(relayed, node, body)
        try:
            answer = await self._read_all(relayed, connection, first)
            status = connection.status
        finally:
            relayed.lifeline.on_gone = None
            node.upstream.release(connection)
        if status >= 400:
            raise self._engine_rejection(status, answer)
        try:
            document = _decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NodeFailure(FailureKind.GARBAGE, "an answer that is not JSON") from error
        if not isinstance(document, dict):
            raise NodeFailure(FailureKind.GARBAGE, "an answer that is no object")
        node.succeeded(self._loop.time())
        document = cast("dict[str, Any]", document)
        usage = document.get("usage")
        relayed.ttft_s = self._loop.time() - relayed.started_at
        counts = usage_tokens(cast("dict[str, Any]", usage) if isinstance(usage, dict) else None)
        relayed.charge(counts, answer_bytes(document) // BYTES_PER_TOKEN)
        if "timings" in document or document.get("model") != relayed.model.name or relayed.call.is_query_form:
            document.pop("timings", None)
            document["model"] = relayed.model.name
            if relayed.call.is_query_form:
                document["crosslogic"] = {"node": node.entry.node_id, "region": node.entry.region}
            answer = _encode(document)
        relayed.outcome = Outcome.COMPLETED
        relayed.status = 200
        self._settle_or_refuse(relayed)
        headers = relayed.headers(b"application/json")
        headers.append((b"content-length", b"%d" % len(answer)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _settle_or_refuse(self, relayed: Relayed) -> None:
        try:
            self._settle(relayed)
        except OSError as error:
            log.error("usage of %s could not be settled: %s", relayed.shown_id, error)
            raise Unavailable(
                "Usage cannot be recorded at the moment; try again later.", code="usage_log_failed"
            ) from error

    async def _stream(self, relayed: Relayed, node: Node, body: bytes, send: Send) -> None:
        """A call whose answer is relayed as it comes."""
        sent_at = self._loop.time()
        connection, data = await self._begin(relayed, node, body)
        try:
            if connection.status >= 400:
                answer = await self._read_all(relayed, connection, data)
                raise self._engine_rejection(connection.status, answer)
            if not connection.content_type.startswith(b"text/event-stream"):
                raise NodeFailure(FailureKind.GARBAGE, "no event stream")
            events = relayed.events = EventStream(relayed.model.name, wants_usage=relayed.call.wants_usage_chunk)
            while data:
                if relayed.lifeline.is_gone:
                    # What the engine still had to say reaches nobody, so nobody pays for it.
                    raise ClientGone
                whole = events.feed(data)
                if whole:
                    if not relayed.has_begun:
                        relayed.has_begun = True
                        relayed.status = 200
                        relayed.ttft_s = self._loop.time() - relayed.started_at
                        node.first_token(self._loop.time() - sent_at, self._loop.time())
                        self._streams.add(relayed)
                        headers = relayed.headers(b"text/event-stream; charset=utf-8")
                        headers.append((b"cache-control", b"no-cache"))
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": whole, "more_body": True})
                if events.is_done:
                    with contextlib.suppress(NodeFailure):
                        await connection.read(self._loop.time() + LAST_WORDS_S, FailureKind.STALLED)
                    break
                deadline_at = min(self._loop.time() + self._deadlines.idle_s, relayed.deadline_at)
                data = await connection.read(deadline_at, FailureKind.STALLED)
            if not events.is_done or not relayed.has_begun:
                raise NodeFailure(FailureKind.RESET, "the stream ended before it was done")
            node.succeeded(self._loop.time())
        finally:
            relayed.lifeline.on_gone = None
            node.upstream.release(connection)
        relayed.charge(usage_tokens(events.usage), events.tokens)
        relayed.outcome = Outcome.COMPLETED
        try:
            self._settle(relayed)
        except OSError as error:
            log.error("usage of %s could not be settled: %s", relayed.shown_id, error)
            await self._cut(relayed, send)
            return
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _cut(self, relayed: Relayed, send: Send) -> None:
        """Tell the client that its stream ends here by our fault: an error event, never a silent end."""
        relayed.charge_nothing()
        relayed.outcome = Outcome.CUT
        event = {
            "error": {
                "message": "The node that was answering failed and the answer is incomplete. You are not charged; "
                "send the request again.",
                "type": "server_error",
                "param": None,
                "code": "stream_cut",
            }
        }
        await send({"type": "http.response.body", "body": b"data: " + _encode(event) + b"\n\n", "more_body": False})

    def _engine_rejection(self, status: int, answer: bytes) -> Rejected:
        """The engine's own 4xx, as the client may see it: its message without addresses and paths."""
        message = "The model refused the request."
        code = "engine_rejected"
        try:
            document = _decode(answer)
            found: Any = cast("dict[str, Any]", document).get("error", document) if isinstance(document, dict) else None
            text: Any = cast("dict[str, Any]", found).get("message") if isinstance(found, dict) else found
            if isinstance(text, str) and text:
                message = _ADDRESS.sub("[…]", text[: 8 * LONGEST_SHOWN_MESSAGE])[:LONGEST_SHOWN_MESSAGE]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        if "context" in message and ("exceed" in message or "length" in message):
            code = "context_length_exceeded"
        return Rejected(message, status=400 if status == 422 else status, code=code)

    async def keep_progress(self) -> None:
        """Run for the life of the process: put into the log what running streams have relayed (A1)."""
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            for relayed in list(self._streams):
                if relayed.events is None or relayed.node is None or relayed.events.tokens == relayed.reported_tokens:
                    continue
                relayed.reported_tokens = relayed.events.tokens
                self._usage_log.progress(
                    Progress(relayed.id, relayed.node.id, relayed.node.entry.region, relayed.events.tokens)
                )

    @property
    def streams(self) -> int:
        """How many streams are being relayed."""
        return len(self._streams)


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
