"""One admitted call while it runs: what is known of its answer, what the client has got, and what it is charged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from api.inference.admission import Asked, Place
from api.inference.calls import BYTES_PER_TOKEN, Call
from api.inference.events import EventStream
from api.inference.limits import Hold
from api.inference.router import Node
from api.inference.server import Exchange
from api.inference.tracing import Marks, Trace, server_timing
from api.inference.upstream import ClientGone, Connection, FailureKind
from crosslogic.domain.catalog import Model
from crosslogic.domain.regions import RegionPlan
from crosslogic.domain.scheduling import Choice
from crosslogic.domain.tenancy import Principal
from crosslogic.domain.usage import (
    Intent,
    Outcome,
    TokenSource,
    UsageRecord,
    Waste,
    WasteReason,
    list_price_microdollars,
)

_EVENT_STREAM = b"text/event-stream; charset=utf-8\r\ncache-control: no-cache"


@dataclass(slots=True)
class Deadlines:
    """In seconds: to connect, to the first token, between two chunks, and for the whole request."""

    connect_s: float
    first_byte_s: float
    idle_s: float
    total_s: float


NO_DEADLINES = Deadlines(0.0, 0.0, 0.0, 0.0)
NO_HOLD = Hold("", (), 0, 0, 0)


class Tried:
    """One try of a node. Times are the loop's; `failure` is "" unless the node failed."""

    __slots__ = ("choice", "ended_at", "failure", "first_at", "node", "started_at", "was_out")

    def __init__(self, node: Node, choice: Choice[Node], started_at: float) -> None:
        self.node = node
        self.choice = choice
        self.started_at = started_at
        self.first_at: float | None = None
        self.ended_at = started_at
        self.failure = ""
        self.was_out = node.is_out


class Relayed:
    """The state of one call. The relay drives it; `take` is called with each piece of a stream.

    Until it `is_admitted` it has no hold, and leaves no usage record.
    """

    __slots__ = (
        "_idle_s",
        "_loop",
        "_stop_waiting",
        "asked",
        "cached_tokens",
        "call",
        "choice",
        "completion_tokens",
        "connection",
        "continuations",
        "deadline_at",
        "deadlines",
        "events",
        "exchange",
        "has_begun",
        "hold",
        "id",
        "intent",
        "is_accepted",
        "is_admitted",
        "marks",
        "model",
        "node",
        "on_begin",
        "outcome",
        "place",
        "plan",
        "principal",
        "prompt_tokens",
        "reported_tokens",
        "sent_at",
        "settled",
        "shown_id",
        "source",
        "started_at",
        "status",
        "takeovers",
        "trace",
        "tries",
        "ttft_s",
        "waste",
        "work_tokens",
    )

    def __init__(
        self,
        exchange: Exchange,
        principal: Principal,
        id: UUID,
        shown_id: str,
        call: Call,
        model: Model,
        plan: RegionPlan,
        intent: Intent,
        loop: asyncio.AbstractEventLoop,
        now: float,
    ) -> None:
        self.exchange = exchange
        self.principal = principal
        self.id = id
        self.shown_id = shown_id
        self.call = call
        self.model = model
        self.plan = plan
        self.hold = NO_HOLD
        self.intent = intent
        self.is_admitted = False
        self._loop = loop
        self.started_at = now
        self.deadline_at = now
        self.deadlines = NO_DEADLINES
        self.sent_at = now
        self._idle_s = 0.0
        self.node: Node | None = None
        self.connection: Connection | None = None
        self._stop_waiting: Callable[[], None] | None = None
        self.events: EventStream | None = None
        self.asked: Asked | None = None
        self.place: Place | None = None
        self.choice: Choice[Node] | None = None
        self.tries: list[Tried] = []
        self.takeovers = 0
        self.continuations = 0
        self.waste: list[Waste] = []
        # What the answer will keep a node busy with: an expectation, where the hold is a bound.
        self.work_tokens = 0
        self.trace: Trace | None = None
        self.marks: Marks | None = None
        self.has_begun = False
        self.is_accepted = False
        self.settled: UsageRecord | None = None
        self.on_begin: Callable[[Relayed], None] | None = None
        self.reported_tokens = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.source = TokenSource.NONE
        self.status = 0
        self.outcome = Outcome.FAILED
        self.ttft_s: float | None = None

    # The client

    def watch(self) -> None:
        """From now on the client hanging up ends whatever this call waits for (H1)."""
        self.exchange.on_gone = self._hang_up

    def wait_with(self, stop: Callable[[], None] | None) -> None:
        """While the call waits for something other than an engine: how to stop that. Raises ClientGone."""
        self._stop_waiting = stop
        if stop is not None and self.exchange.disconnected:
            raise ClientGone

    def _hang_up(self) -> None:
        if self.connection is not None:
            self.connection.fail(ClientGone())
        if self._stop_waiting is not None:
            self._stop_waiting()

    def head(self, content_type: bytes) -> bytes:
        """The answer's header lines; the engine's own never pass."""
        node = self.node
        lines = b"content-type: %b\r\nx-request-id: %b\r\n%b%b" % (
            content_type,
            self.shown_id.encode(),
            b"" if node is None else node.head,
            self.hold.standing.lines(),
        )
        if self.marks is not None:
            lines += b"server-timing: %b\r\n" % server_timing(self.marks)
            if self.choice is not None:
                lines += b"x-crosslogic-decision: %b\r\n" % self.choice.header()
        return lines

    def mark_connected(self) -> None:
        """For `Server-Timing`, where its reader may know."""
        if self.marks is not None:
            self.marks.connected = time.monotonic()

    def mark_first_byte(self) -> None:
        """For `Server-Timing`, where its reader may know."""
        if self.marks is not None:
            self.marks.first_byte = time.monotonic()

    # A stream

    def attach(self, connection: Connection) -> None:
        """The connection that the answer comes on; a client that reads slowly makes its engine wait."""
        self.connection = connection
        self.sent_at = self._loop.time()
        self.exchange.on_pause = connection.pause
        self.exchange.on_resume = connection.resume
        if self.exchange.is_paused:
            connection.pause()

    def detach(self) -> None:
        """The connection is done with."""
        self.connection = None
        self.exchange.on_pause = self.exchange.on_resume = None

    def expect_token(self, idle_s: float) -> None:
        """The next token may take longer than a pause between tokens (`idle_s`)."""
        self._idle_s = idle_s

    def take(self, data: bytes) -> bool:
        """Relay a piece of a stream; True once the engine has said that it is done. Raises NodeFailure."""
        events = self.events
        assert events is not None
        had_token = events.has_token
        whole = events.feed(data)
        if whole:
            if not self.has_begun:
                self.has_begun = True
                self.status = 200
                self.exchange.begin(200, self.head(_EVENT_STREAM))
                if self.on_begin is not None:
                    self.on_begin(self)
            self.exchange.write(whole)
        if events.has_token and not had_token:
            now = self._loop.time()
            if self.ttft_s is None:
                self.ttft_s = now - self.started_at
            if self.tries:
                self.tries[-1].first_at = now
            if self.node is not None:
                self.node.first_token(now - self.sent_at, now)
            if self.connection is not None:
                self.connection.postpone(self._idle_s, self.deadline_at, FailureKind.TOTAL)
        return events.is_done

    # The account

    def charge(
        self,
        usage: tuple[int, int, int] | None,
        count: Callable[[], int],
        source: TokenSource = TokenSource.ENGINE,
    ) -> None:
        """Set the tokens from the engine's usage (or its tokenizer's) where it can be believed, else as we `count`."""
        is_embedding = self.call.kind == "embedding"
        if is_embedding:
            usage = None if usage is None else (usage[0], 0, usage[2])
        if usage is not None and self._is_possible(*usage):
            self.prompt_tokens, self.completion_tokens, self.cached_tokens = usage
            self.source = source
        else:
            self.prompt_tokens = self.intent.estimated_prompt_tokens
            self.completion_tokens = 0 if is_embedding else count()
            self.source = TokenSource.CHUNKS

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
        node = self.node
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
            served_region=node.entry.region if node else "",
            node_id=node.id if node else None,
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
            reservation_id=intent.reservation_id,
            tries=len(self.tries),
            continuations=self.continuations,
            waste=tuple(self.waste),
            decision=self.decision(),
        )

    def decision(self) -> list[Any]:
        """Why the request went where it went, as `explained_decision` reads it: short, for every request leaves one."""
        hold = self.hold
        return [
            [[*tried.choice.compact(), tried.failure] for tried in self.tries],
            hold.standing,
            hold.would_refuse,
            hold.is_reserved,
        ]

    def waste_on(self, node: Node, reason: WasteReason, prompt_tokens: int, completion_tokens: int) -> None:
        """What a node read and made that the client does not pay for (A3)."""
        self.waste.append(Waste(node.id, node.entry.region, reason, prompt_tokens, completion_tokens))
