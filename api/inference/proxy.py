"""The relay: one admitted call, from the choice of a node to the settled usage record.

Before the client has seen a byte, a node's failure costs it nothing but time: another node is tried, three tries in
all, within a budget of retries. After it, another node goes on with the answer where that can be done exactly
(api.inference.continuation). The client hanging up closes the engine's connection at once, in every phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import msgspec

from api.inference.admission import Admission, Asked, Place
from api.inference.calls import BYTES_PER_TOKEN
from api.inference.continuation import ExtendedAnswer, RepeatedAnswer, Way, body_for, way_for
from api.inference.counting import count_tokens
from api.inference.events import DONE, EventStream, answer_bytes, usage_tokens
from api.inference.limits import Limits
from api.inference.metering import UsageLog
from api.inference.observing import Observer
from api.inference.relayed import Deadlines, Relayed, Tried
from api.inference.router import NOBODY, Node, RouteTable
from api.inference.tracing import Try
from api.inference.upstream import ClientGone, Connection, FailureKind, NodeFailure
from crosslogic.domain.affinity import prefix_blocks
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.scheduling import Choice
from crosslogic.domain.usage import Outcome, Progress, TokenSource, WasteReason

log = logging.getLogger("crosslogic.relay")

MOST_TRIES = 3
# How often one answer may change nodes once it has begun.
MOST_TAKEOVERS = 3
RETRY_SHARE = 0.1
RETRIES_PER_S = 10.0
LONGEST_ANSWER_BYTES = 64 * 1024 * 1024
PROGRESS_INTERVAL_S = 0.5
# A non-streamed answer's first byte comes when its last token is made; an engine slower than this does not serve.
SLOWEST_TOKENS_PER_S = 10
# After `[DONE]`: how long an engine may take to end its answer before its connection is given up.
LAST_WORDS_S = 0.1
# Prompt tokens that cost a node about as much as making one: reading is that much faster.
PROMPT_TOKENS_PER_WORK = 10
# How much one more answer changes what the usual one is.
USUAL_SHARE = 0.05
# Where nobody has measured it yet: how long a node takes to come up, told as Retry-After.
USUAL_LEAD_TIME_S = 60

# 401, 403, 404 and 405 mean that we and the engine do not fit together; the client's request is not at fault.
ENGINE_AT_FAULT = frozenset({401, 403, 404, 405})
BUSY = frozenset({408, 429})

# A node that fails so has read nothing.
UNREAD = frozenset({FailureKind.CONNECT, FailureKind.BUSY, FailureKind.ERROR})

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


class _Unextendable(NodeFailure):
    """The engine does not take the beginning of an answer as its own; the node is well."""


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


class Relay:
    """Runs admitted calls on nodes."""

    def __init__(
        self,
        table: RouteTable,
        admission: Admission,
        usage_log: UsageLog,
        limits: Limits,
        observer: Observer,
        deadlines: Deadlines,
        hold_s: float,
    ) -> None:
        self._table = table
        self._admission = admission
        self._usage_log = usage_log
        self._limits = limits
        self._observer = observer
        self._deadlines = deadlines
        self._hold_s = hold_s
        self._deadlines_of: dict[str, Deadlines] = {}
        # How long answers have been, by model: what another will probably be.
        self._usual_tokens: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self._budget = RetryBudget(self._loop.time())
        self._streams: set[Relayed] = set()
        # Those that no task runs for: an engine's answer will call back.
        self._waiting: set[Relayed] = set()
        # Told of a call that failed before its answer began; set by whoever answers clients.
        self.on_error: Callable[[Relayed, Exception], None] = _log_error

    def take_catalog(self, catalog: Catalog) -> None:
        """A new reading: what models have deadlines of their own."""
        self._admission.catalog = catalog
        self._deadlines_of = {name: _own_deadlines(model, self._deadlines) for name, model in catalog.models.items()}

    def begin(self, relayed: Relayed) -> None:
        """Answer an admitted call. Where a node can be asked at once no task is made: its answer calls back."""
        self._budget.earn()
        deadlines = self._deadlines_of.get(relayed.model.name, self._deadlines)
        relayed.deadlines = deadlines
        relayed.deadline_at = relayed.started_at + deadlines.total_s
        relayed.work_tokens = self._expected_work(relayed)
        relayed.asked = Asked(
            relayed.principal.org_id,
            relayed.model.name,
            relayed.plan,
            relayed.work_tokens,
            relayed.hold.is_reserved,
            relayed.deadline_at,
        )
        relayed.watch()
        if relayed.call.is_streamed or relayed.exchange.disconnected or not self._ask_at_once(relayed):
            relayed.exchange.spawn(self._go_on(relayed))

    def _ask_at_once(self, relayed: Relayed) -> bool:
        """Ask a node for a whole answer, if there is room and an open connection. False: it is for a task to begin."""
        asked = relayed.asked
        assert asked is not None
        place = self._admission.enter_now(asked)
        if place is None:
            return False
        relayed.place = place
        choice = self._choose(relayed, place, NOBODY)
        if choice is None:
            return False
        self._try(relayed, choice)
        connection = choice.node.upstream.idle()
        if connection is None:
            relayed.exchange.spawn(self._go_on(relayed, is_begun=True))
            return True
        try:
            self._send_whole(relayed, choice.node, connection, relayed.call.engine_body(relayed.model))
        except Exception as error:
            relayed.exchange.spawn(self._go_on(relayed, is_begun=True, failure=error))
            return True
        self._waiting.add(relayed)
        connection.expect_all(
            self._whole_by(relayed), LONGEST_ANSWER_BYTES, partial(self._answered, relayed, choice.node, connection)
        )
        return True

    def _answered(self, relayed: Relayed, node: Node, connection: Connection) -> None:
        """Called when the engine has answered, or failed to."""
        self._waiting.discard(relayed)
        failure: BaseException | None = None
        try:
            answer = connection.take_all()
            status = connection.status
            relayed.detach()
            node.upstream.release(connection)
            self._tell_whole(relayed, node, status, answer)
        except BaseException as error:
            failure = error
            if relayed.connection is not None:
                relayed.detach()
                node.upstream.release(connection)
            if isinstance(error, NodeFailure) and error.kind is FailureKind.RESET and not error.is_fresh:
                # A kept-alive connection that the engine had closed in the meantime is no failure of the node.
                failure = None
            relayed.exchange.spawn(self._go_on(relayed, is_begun=True, failure=failure))
            return
        this = relayed.tries[-1]
        this.ended_at = self._loop.time()
        self._note_health(relayed, node, was_out=this.was_out)
        node.give_back(relayed.work_tokens)
        if relayed.place is not None:
            relayed.place.leave()
        self._finish(relayed)

    async def _go_on(self, relayed: Relayed, *, is_begun: bool = False, failure: BaseException | None = None) -> None:
        """The rest of a call, from its beginning, or from its first try (`is_begun`) or that try's failure on."""
        try:
            await self._run(relayed, is_begun=is_begun, failure=failure)
        except Exception as error:
            self.on_error(relayed, error)
        finally:
            if not relayed.exchange.response_complete:
                # A broken connection is the one honest end of an answer that cannot be completed.
                relayed.exchange.abort()

    async def cut(self) -> None:
        """At the end of a shutdown's patience: end what still waits for engines. It is not charged."""
        for relayed in list(self._waiting):
            if relayed.connection is not None:
                relayed.connection.fail(asyncio.CancelledError())
        # Once for the tasks to begin, and end.
        await asyncio.sleep(0)

    async def _run(self, relayed: Relayed, *, is_begun: bool, failure: BaseException | None) -> None:
        """Errors before the first byte are raised, with the call settled; later ones are sent."""
        try:
            if relayed.exchange.disconnected and failure is None:
                raise ClientGone
            await self._relay(relayed, is_begun=is_begun, failure=failure)
        except ClientGone:
            relayed.outcome = Outcome.CLIENT_GONE
            relayed.status = relayed.status or 499
            if relayed.place is not None:
                # Now, and not after the engine's tokenizer has answered: others wait for the room.
                relayed.place.leave()
            if relayed.is_accepted or relayed.has_begun:
                await self._charge_gone(relayed)
        except CrossLogicError as error:
            relayed.charge_nothing()
            relayed.outcome = Outcome.REJECTED if isinstance(error, Rejected) else Outcome.FAILED
            relayed.status = getattr(error, "status", 500)
            raise
        except BaseException:
            # A shutdown past its grace time, or our own fault: what we cut is not charged.
            relayed.charge_nothing()
            relayed.outcome = Outcome.FAILED
            relayed.status = relayed.status or 500
            if relayed.has_begun:
                self._cut(relayed)
            raise
        finally:
            self._streams.discard(relayed)
            if relayed.place is not None:
                relayed.place.leave()
            self._finish(relayed)

    def _expected_work(self, relayed: Relayed) -> int:
        """Tokens that the answer will keep a node busy with; a prompt is read faster than an answer is made."""
        call = relayed.call
        work = call.estimated_prompt_tokens // PROMPT_TOKENS_PER_WORK
        if call.kind != "embedding":
            limit = call.completion_limit(relayed.model)
            usual = self._usual_tokens.get(relayed.model.name)
            work += call.choices * (limit if usual is None or usual > limit else int(usual))
        return work + 1

    async def _charge_gone(self, relayed: Relayed) -> None:
        """A client that hung up pays the prompt and what it got: as the engine said, else as its tokenizer counts."""
        events = relayed.events
        usage = None if events is None else usage_tokens(events.usage)
        if usage is None and relayed.node is not None and relayed.call.kind != "embedding":
            told = "" if events is None else "".join(events.told.text(channel) for channel in events.told.texts)
            counts = await count_tokens(relayed.node.upstream, relayed.call, told)
            if counts is not None:
                relayed.charge((*counts, 0), lambda: 0, TokenSource.TOKENIZER)
                return
        relayed.charge(usage, lambda: 0 if events is None else events.tokens)

    def _finish(self, relayed: Relayed) -> None:
        record = relayed.settled
        if record is None:
            record = relayed.record(self._loop.time())
            self._usage_log.settle_when_possible(record)
        for waste in record.waste:
            self._observer.wasted(waste.prompt_tokens, waste.completion_tokens)
        self._observer.finished(record, is_reserved=relayed.hold.is_reserved)
        if relayed.trace is not None and relayed.trace.is_sampled:
            relayed.trace.finish(record, _tries_of(relayed))
        if record.outcome is Outcome.COMPLETED and record.endpoint_kind != "embedding":
            usual = self._usual_tokens.get(record.model, float(record.completion_tokens))
            self._usual_tokens[record.model] = usual + USUAL_SHARE * (record.completion_tokens - usual)
        if record.outcome in OUR_FAILURES or not relayed.tries:
            # What no node has seen costs the client nothing, not even a request of its minute.
            self._limits.release(relayed.hold)
        else:
            tokens = record.prompt_tokens + record.completion_tokens
            self._limits.settle(relayed.hold, tokens, record.list_price_microdollars)

    def _settle(self, relayed: Relayed) -> None:
        """Put the usage record into the durable log, once. Raises OSError."""
        record = relayed.record(self._loop.time())
        self._usage_log.settle(record)
        relayed.settled = record

    async def _relay(self, relayed: Relayed, *, is_begun: bool, failure: BaseException | None) -> None:
        own_body = body = relayed.call.engine_body(relayed.model)
        way = Way.RESTART
        tried: list[Node] = []
        # A request that every node answers with 5xx may itself be at fault: it is theirs once another node has managed.
        suspects: list[Node] = []
        while True:
            if is_begun:
                is_begun = False
            else:
                try:
                    choice = await self._next(relayed, tried)
                except CrossLogicError:
                    if relayed.has_begun:
                        self._cut(relayed)
                        return
                    raise
                self._try(relayed, choice)
            this = relayed.tries[-1]
            node = this.node
            try:
                if failure is not None:
                    failed, failure = failure, None
                    raise failed
                if relayed.call.is_streamed:
                    await self._stream(relayed, node, body, way)
                else:
                    await self._whole(relayed, node, body)
                for suspect in suspects:
                    suspect.failed(FailureKind.ERROR, self._loop.time())
                self._note_health(relayed, node, was_out=this.was_out)
                return
            except NodeFailure as error:
                way = self._after(relayed, this, error, way, tried, suspects)
            finally:
                this.ended_at = self._loop.time()
                node.give_back(relayed.work_tokens)
            if way is Way.NONE:
                self._cut(relayed)
                return
            if way is Way.FINISH:
                await self._end_told(relayed, tried)
                return
            if relayed.has_begun:
                events = relayed.events
                assert events is not None
                is_extended = way is Way.EXTEND
                body = body_for(relayed.call, relayed.model, events.told) if is_extended else own_body

    def _after(
        self,
        relayed: Relayed,
        this: Tried,
        failure: NodeFailure,
        way: Way,
        tried: list[Node],
        suspects: list[Node],
    ) -> Way:
        """How to go on after a failed try. Raises Unavailable where nothing more helps and nothing was told yet."""
        node = this.node
        this.failure = failure.kind.value
        is_late = failure.kind is FailureKind.TOTAL or self._loop.time() >= relayed.deadline_at
        if not isinstance(failure, _Unextendable):
            self._blame(relayed, node, failure.kind, suspects, is_late=is_late)
            tried.append(node)
        if relayed.has_begun:
            following = self._way_on(relayed, way, failure, is_late=is_late)
            self._book_waste(relayed, node, way, following)
            self._observer.continued(following.value)
            return following
        relayed.is_accepted = False
        if failure.kind not in UNREAD:
            relayed.waste_on(node, WasteReason.FAILED_TRY, relayed.intent.estimated_prompt_tokens, 0)
        if is_late:
            raise Unavailable(
                f"{relayed.model.name} did not answer in time; ask for fewer tokens or stream the answer.",
                code="deadline_exceeded",
                retry_after_s=1,
            ) from failure
        if len(tried) >= MOST_TRIES or not self._budget.spend(self._loop.time()):
            raise Unavailable(
                f"{len(tried)} node(s) failed to answer for {relayed.model.name}; try again shortly.",
                code="nodes_failed",
                retry_after_s=2,
            ) from failure
        self._observer.retried(failure.kind)
        return Way.RESTART

    def _try(self, relayed: Relayed, choice: Choice[Node]) -> None:
        """Begin a try of the chosen node; it is given back when the try has ended."""
        relayed.choice = choice
        relayed.node = node = choice.node
        relayed.tries.append(Tried(node, choice, self._loop.time()))
        node.take(relayed.work_tokens)
        if relayed.place is not None:
            relayed.place.taken()

    def _note_health(self, relayed: Relayed, node: Node, *, was_out: bool) -> None:
        """A try has gone well: what is new about the node?"""
        if was_out and not node.is_out:
            self._observer.returned(relayed.model.name, node.entry.region)
        elif node.is_out and not was_out:
            # It answered, but too slowly to go on like that.
            self._observer.ejected(relayed.model.name, node.entry.region)

    def _choose(self, relayed: Relayed, place: Place, tried: Sequence[Node]) -> Choice[Node] | None:
        if relayed.marks is not None:
            relayed.marks.queued = time.monotonic()
        blocks = prefix_blocks(relayed.call.body) if place.pool.wants_prefix else ()
        choice = self._table.choose(place.pool, tried, blocks)
        if choice is not None:
            self._observer.decided(relayed.model.name, place.region, choice.reason, choice.strategy)
            if relayed.marks is not None:
                relayed.marks.routed = time.monotonic()
        return choice

    async def _next(self, relayed: Relayed, tried: list[Node]) -> Choice[Node]:
        """The node for the next try: at once where there is room, else when admission finds some.

        Raises what admission raises, and Unavailable where every node was tried before the answer began.
        """
        asked = relayed.asked
        assert asked is not None
        place = relayed.place
        if place is not None:
            place = self._admission.next_region(place, tried)
            if place is None and not relayed.has_begun:
                raise Unavailable(
                    f"No node could answer for {relayed.model.name}; try again shortly.",
                    code="nodes_failed",
                    retry_after_s=2,
                )
        gone: asyncio.Future[None] | None = None
        until = self._loop.time() + self._hold_s
        try:
            while True:
                if place is None:
                    if relayed.place is not None:
                        relayed.place.leave()
                        relayed.place = None
                    place = self._admission.enter_now(asked)
                if place is None:
                    if gone is None:
                        gone = self._watch_for_leaving(relayed)
                    began = self._loop.time()
                    place = await self._admission.enter(asked, gone)
                    self._observer.queued(asked.model, place.region, self._loop.time() - began)
                relayed.place = place
                choice = self._choose(relayed, place, tried)
                if choice is not None:
                    return choice
                # All that is there has failed this answer already: another node may come.
                place.leave()
                relayed.place = place = None
                if gone is None:
                    gone = self._watch_for_leaving(relayed)
                change = asyncio.ensure_future(self._table.next_change())
                left_s = min(until, relayed.deadline_at) - self._loop.time()
                try:
                    await asyncio.wait((change, gone), timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    is_changed = change.done()
                    change.cancel()
                if gone.done():
                    raise ClientGone
                if not is_changed:
                    raise Unavailable(
                        f"No other node serves {relayed.model.name} at the moment; try again shortly.",
                        code="model_unavailable",
                        retry_after_s=USUAL_LEAD_TIME_S,
                    )
        finally:
            if gone is not None:
                relayed.wait_with(None)

    def _watch_for_leaving(self, relayed: Relayed) -> asyncio.Future[None]:
        gone: asyncio.Future[None] = self._loop.create_future()
        relayed.wait_with(lambda: None if gone.done() else gone.set_result(None))
        return gone

    def _blame(self, relayed: Relayed, node: Node, kind: FailureKind, suspects: list[Node], *, is_late: bool) -> None:
        self._observer.node_failed(relayed.model.name, node.entry.region, kind)
        if kind is FailureKind.ERROR and not relayed.has_begun:
            suspects.append(node)
        elif not is_late and node.failed(kind, self._loop.time()):
            self._observer.ejected(relayed.model.name, node.entry.region)
            log.warning("node %s is left out for now: %s", node.entry.node_id, kind)

    def _book_waste(self, relayed: Relayed, node: Node, last: Way, way: Way) -> None:
        """A node broke off: what it did is in vain unless another extends it, and so is what it had read once more."""
        events = relayed.events
        assert events is not None
        prompt, told = relayed.intent.estimated_prompt_tokens, events.tokens
        if way in (Way.REPEAT, Way.RESTART, Way.NONE):
            relayed.waste_on(node, WasteReason.CUT_STREAM, prompt, told)
        elif last is Way.EXTEND:
            relayed.waste_on(node, WasteReason.REREAD_PREFIX, prompt + events.told_before, 0)

    def _way_on(self, relayed: Relayed, last: Way, failure: NodeFailure, *, is_late: bool) -> Way:
        """How the broken answer goes on, if it may at all (H2)."""
        assert relayed.events is not None
        way = way_for(relayed.call, relayed.model, relayed.events.told)
        if way is Way.FINISH:
            return way
        relayed.takeovers += 1
        if is_late or relayed.takeovers > MOST_TAKEOVERS or not self._budget.spend(self._loop.time()):
            return Way.NONE
        if failure.kind is FailureKind.GARBAGE and last is Way.REPEAT:
            # It was said differently this time, and would be the next.
            return Way.NONE
        if last is Way.EXTEND and isinstance(failure, _Unextendable):
            return Way.REPEAT
        return way

    async def _connect(self, relayed: Relayed, node: Node) -> Connection:
        """A new connection. Raises NodeFailure(CONNECT), or ClientGone as soon as nobody waits for it."""
        try:
            async with asyncio.timeout(relayed.deadlines.connect_s) as patience:
                relayed.wait_with(lambda: patience.reschedule(self._loop.time()))
                return await node.upstream.connect()
        except (OSError, TimeoutError) as error:
            if relayed.exchange.disconnected:
                raise ClientGone from error
            raise NodeFailure(FailureKind.CONNECT, repr(error)) from error
        finally:
            relayed.wait_with(None)

    def _request(self, relayed: Relayed, node: Node, body: bytes) -> bytes:
        extra = b"X-Request-Id: %b\r\n" % relayed.shown_id.encode()
        if relayed.trace is not None:
            extra += relayed.trace.header_lines(len(relayed.tries))
        return node.upstream.request(relayed.call.path.encode(), body, extra)

    def _check_status(self, status: int) -> None:
        if status in BUSY:
            raise NodeFailure(FailureKind.BUSY, str(status))
        if status >= 500 or status in ENGINE_AT_FAULT:
            raise NodeFailure(FailureKind.ERROR, str(status))
        if status < 200 or 300 <= status < 400:
            raise NodeFailure(FailureKind.GARBAGE, str(status))

    # Whole answers

    def _whole_by(self, relayed: Relayed) -> float:
        """When a whole answer must be there: its first byte comes with its last token."""
        patience_s = relayed.deadlines.first_byte_s
        if relayed.call.kind != "embedding":
            patience_s += relayed.call.completion_limit(relayed.model) / SLOWEST_TOKENS_PER_S
        return min(self._loop.time() + patience_s, relayed.deadline_at)

    def _send_whole(self, relayed: Relayed, node: Node, connection: Connection, body: bytes) -> None:
        """Send the call. Raises ClientGone."""
        relayed.attach(connection)
        if relayed.exchange.disconnected:
            raise ClientGone
        relayed.mark_connected()
        connection.send(self._request(relayed, node, body))
        relayed.is_accepted = True

    async def _whole(self, relayed: Relayed, node: Node, body: bytes) -> None:
        """A call with one JSON answer."""
        connection = node.upstream.idle()
        answer: bytes | None = None
        status = 0
        while answer is None:
            if connection is None:
                connection = await self._connect(relayed, node)
            try:
                self._send_whole(relayed, node, connection, body)
                answer = await connection.read_all(self._whole_by(relayed), relayed.deadline_at, LONGEST_ANSWER_BYTES)
                status = connection.status
            except NodeFailure as failure:
                if failure.kind is not FailureKind.RESET or failure.is_fresh:
                    raise
                # A kept-alive connection that the engine had closed in the meantime is no failure of the node.
            finally:
                relayed.detach()
                node.upstream.release(connection)
            connection = None
        self._tell_whole(relayed, node, status, answer)

    def _tell_whole(self, relayed: Relayed, node: Node, status: int, answer: bytes) -> None:
        """Settle the engine's answer and hand it on. Raises NodeFailure, and Rejected where it refuses the request."""
        relayed.mark_first_byte()
        self._check_status(status)
        if status >= 400:
            raise self._engine_rejection(status, answer)
        try:
            document = _decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NodeFailure(FailureKind.GARBAGE, "an answer that is not JSON") from error
        if not isinstance(document, dict):
            raise NodeFailure(FailureKind.GARBAGE, "an answer that is no object")
        now = self._loop.time()
        node.succeeded(now)
        document = cast("dict[str, Any]", document)
        usage = document.get("usage")
        relayed.ttft_s = now - relayed.started_at
        counts = usage_tokens(cast("dict[str, Any]", usage) if isinstance(usage, dict) else None)
        relayed.charge(counts, lambda: answer_bytes(document) // BYTES_PER_TOKEN)
        if "timings" in document or document.get("model") != relayed.model.name or relayed.call.is_query_form:
            document.pop("timings", None)
            document["model"] = relayed.model.name
            if relayed.call.is_query_form:
                document["crosslogic"] = {"node": node.entry.node_id, "region": node.entry.region}
            answer = _encode(document)
        relayed.outcome = Outcome.COMPLETED
        relayed.status = 200
        try:
            self._settle(relayed)
        except OSError as error:
            log.error("usage of %s could not be settled: %s", relayed.shown_id, error)
            raise Unavailable(
                "Usage cannot be recorded at the moment; try again later.", code="usage_log_failed"
            ) from error
        relayed.exchange.respond(200, relayed.head(b"application/json"), answer)

    # Streams

    async def _stream(self, relayed: Relayed, node: Node, body: bytes, way: Way) -> None:
        """A call whose answer is relayed as it comes, from its beginning or from where another node broke off."""
        request = self._request(relayed, node, body)
        connection = node.upstream.idle()
        while True:
            if connection is None:
                connection = await self._connect(relayed, node)
            try:
                relayed.attach(connection)
                if relayed.exchange.disconnected:
                    raise ClientGone
                relayed.mark_connected()
                connection.send(request)
                relayed.is_accepted = True
                await self._pour(relayed, node, connection, way)
                return
            except NodeFailure as failure:
                is_stale = failure.kind is FailureKind.RESET and not failure.is_fresh and not connection.has_headers
                if not is_stale:
                    raise
            finally:
                relayed.detach()
                node.upstream.release(connection)
            connection = None

    async def _pour(self, relayed: Relayed, node: Node, connection: Connection, way: Way) -> None:
        deadlines = relayed.deadlines
        first_at = min(self._loop.time() + deadlines.first_byte_s, relayed.deadline_at)
        late = FailureKind.TOTAL if first_at == relayed.deadline_at else FailureKind.SILENT
        data = await connection.read(first_at, late)
        relayed.mark_first_byte()
        self._check_status(connection.status)
        if connection.status >= 400:
            if data:
                data += await connection.read_all(relayed.deadline_at, relayed.deadline_at, LONGEST_ANSWER_BYTES)
            if relayed.has_begun:
                raise _Unextendable(FailureKind.GARBAGE, str(connection.status))
            raise self._engine_rejection(connection.status, data)
        if not connection.content_type.startswith(b"text/event-stream"):
            raise NodeFailure(FailureKind.GARBAGE, "no event stream")
        events = self._events_for(relayed, way)
        relayed.on_begin = self._streams.add
        relayed.expect_token(deadlines.idle_s)
        if data and not relayed.take(data):
            if events.has_token:
                await connection.pour(relayed.take, deadlines.idle_s, relayed.deadline_at, FailureKind.TOTAL)
            else:
                await connection.pour(relayed.take, deadlines.first_byte_s, first_at, late)
        if relayed.exchange.disconnected:
            # What the engine still had to say reaches nobody, so nobody pays for it.
            raise ClientGone
        if not events.is_done or not relayed.has_begun:
            raise NodeFailure(FailureKind.RESET, "the stream ended before it was done")
        node.succeeded(self._loop.time())
        with contextlib.suppress(NodeFailure):
            await connection.read(self._loop.time() + LAST_WORDS_S, FailureKind.STALLED)
        self._end(relayed, way)

    def _events_for(self, relayed: Relayed, way: Way) -> EventStream:
        events = relayed.events
        if events is None or not relayed.has_begun:
            events = relayed.events = EventStream(relayed.model.name, wants_usage=relayed.call.wants_usage_chunk)
        elif way is Way.EXTEND:
            events.go_on(ExtendedAnswer(events.told, relayed.call.kind))
            relayed.continuations += 1
        else:
            events.go_on(RepeatedAnswer(events.told))
            relayed.continuations += 1
        return events

    def _end(self, relayed: Relayed, way: Way = Way.FINISH, source: TokenSource = TokenSource.ENGINE) -> None:
        """The stream is complete: settle it, and only then send its last bytes (A1)."""
        events = relayed.events
        assert events is not None
        relayed.charge(usage_tokens(events.usage), lambda: events.tokens, source)
        if way is Way.EXTEND and relayed.node is not None:
            again = relayed.prompt_tokens + events.told_before
            relayed.waste_on(relayed.node, WasteReason.REREAD_PREFIX, again, 0)
        relayed.outcome = Outcome.COMPLETED
        try:
            self._settle(relayed)
        except OSError as error:
            log.error("usage of %s could not be settled: %s", relayed.shown_id, error)
            self._cut(relayed)
            return
        relayed.exchange.end(DONE)

    async def _end_told(self, relayed: Relayed, tried: list[Node]) -> None:
        """All was told but the end: say it for the engine that cannot any more."""
        events = relayed.events
        assert events is not None
        told = events.told
        base: dict[str, Any] = {
            "id": told.id,
            "object": "chat.completion.chunk" if relayed.call.kind == "chat" else "text_completion",
            "created": told.created,
            "model": relayed.model.name,
        }
        if not told.finish_reasons:
            piece: dict[str, Any] = {"delta": {}} if relayed.call.kind == "chat" else {"text": ""}
            last = {**base, "choices": [{"index": 0, **piece, "finish_reason": "length"}]}
            relayed.exchange.write(b"data: " + _encode(last) + b"\n\n")
        source = TokenSource.ENGINE
        if events.usage is None:
            other = self._table.choose_in(relayed.model.name, relayed.plan.candidates, tried)
            text = "".join(told.text(channel) for channel in told.texts)
            counts = None if other is None else await count_tokens(other.node.upstream, relayed.call, text)
            prompt, completion = counts or (relayed.intent.estimated_prompt_tokens, told.tokens)
            source = TokenSource.CHUNKS if counts is None else TokenSource.TOKENIZER
            events.usage = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
            if relayed.call.wants_usage_chunk:
                relayed.exchange.write(b"data: " + _encode({**base, "choices": [], "usage": events.usage}) + b"\n\n")
        self._end(relayed, source=source)

    def _cut(self, relayed: Relayed) -> None:
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
        relayed.exchange.end(b"data: " + _encode(event) + b"\n\n")

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
                if relayed.events is None or relayed.node is None:
                    continue
                tokens = relayed.events.tokens
                if tokens != relayed.reported_tokens:
                    relayed.reported_tokens = tokens
                    self._usage_log.progress(
                        Progress(
                            relayed.id,
                            relayed.node.id,
                            relayed.node.entry.region,
                            tokens,
                            tries=len(relayed.tries),
                            continuations=relayed.continuations,
                            waste=tuple(relayed.waste),
                        )
                    )

    @property
    def streams(self) -> int:
        """How many streams are being relayed."""
        return len(self._streams)


def _log_error(relayed: Relayed, error: Exception) -> None:
    log.error("request %s failed: %s", relayed.shown_id, error)


def _own_deadlines(model: Model, usual: Deadlines) -> Deadlines:
    """A model's own deadlines, and the usual ones where it has none."""
    own = model.deadlines

    def seconds(own_ms: int | None, usual_s: float) -> float:
        return usual_s if own_ms is None else own_ms / 1000

    return Deadlines(
        connect_s=seconds(own.connect_timeout_ms, usual.connect_s),
        first_byte_s=seconds(own.first_token_timeout_ms, usual.first_byte_s),
        idle_s=seconds(own.idle_timeout_ms, usual.idle_s),
        total_s=seconds(own.total_timeout_ms, usual.total_s),
    )


def _tries_of(relayed: Relayed) -> list[Try]:
    return [
        Try(
            tried.node.entry.node_id,
            tried.node.entry.region,
            tried.started_at,
            tried.first_at,
            tried.ended_at,
            tried.failure,
            tried.choice.reason,
        )
        for tried in relayed.tries
    ]


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
