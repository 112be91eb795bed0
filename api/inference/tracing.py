"""Traces, and where the time of one request went. Nothing here knows OpenTelemetry: `api.app` hands in who sends spans.

A request that is not sampled costs a few ids and no span. The spans of a sampled one are made when it has ended, from
timestamps. What a client says of its own trace (W3C Trace Context) is taken over, and goes on to the engine; only so
many requests a second are sampled at clients' wish as the operator allows: no client decides what tracing costs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from api.inference.calls import PATHS
from api.inference.observing import ANSWERED, OPERATIONS, PROVIDER
from crosslogic.domain.ids import ENVIRONMENT, KEY, NODE, ORG, REQUEST
from crosslogic.domain.trace import Export, Span, Value
from crosslogic.domain.usage import UsageRecord

# Source: W3C Trace Context. Versions after 00 may say more behind what we read.
_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]{0,200})?"
)
_TRACESTATE = re.compile(rb"[ -~]{1,512}")
_SAMPLED: Final = 1
_SPAN_IDS: Final = (1 << 64) - 1
_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Try:
    """One try on a node. Times are those of `time.monotonic`; `failure` is the failure's kind, "" if it answered."""

    node_id: str
    region: str
    started_at: float
    first_byte_at: float | None
    ended_at: float
    failure: str = ""
    decision: str = ""


class Trace:
    """One request's place in a trace: what to tell the engine of it. This one is not sampled."""

    __slots__ = ("_lines",)
    is_sampled = False

    def __init__(self, lines: bytes) -> None:
        self._lines = lines

    def header_lines(self, attempt: int = 1) -> bytes:
        """Whole header lines for the engine's request; tries are numbered from 1."""
        return self._lines

    def finish(self, record: UsageRecord, tries: Sequence[Try] = ()) -> None:
        """The request has ended: hand its spans over."""


class SampledTrace(Trace):
    """A request whose spans are wanted."""

    __slots__ = ("_export", "_parent_id", "_span_id", "_started_at", "_started_ns", "_trace_id", "_tracestate")
    is_sampled = True

    def __init__(self, export: Export, trace_id: bytes, parent_id: int, span_id: int, tracestate: bytes) -> None:
        super().__init__(_tracestate_line(tracestate))
        self._export = export
        self._trace_id = trace_id
        self._parent_id = parent_id
        self._span_id = span_id
        self._tracestate = tracestate
        self._started_at = time.monotonic()
        self._started_ns = time.time_ns()

    def header_lines(self, attempt: int = 1) -> bytes:
        """The engine's parent is the try's own span."""
        return b"traceparent: 00-%b-%016x-01\r\n%b" % (self._trace_id, self._try_id(attempt), self._lines)

    def finish(self, record: UsageRecord, tries: Sequence[Try] = ()) -> None:
        """One span for the request, and below it one for each try."""
        trace_id, tracestate = int(self._trace_id, 16), self._tracestate.decode("ascii")
        common: dict[str, Value] = {
            "gen_ai.operation.name": OPERATIONS[record.endpoint_kind],
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": record.model,
        }
        error = "" if record.outcome in ANSWERED else record.outcome.value
        path = _PATH_OF[record.endpoint_kind]
        spans = [
            Span(
                f"POST {path}",
                True,
                trace_id,
                self._span_id,
                self._parent_id,
                True,
                tracestate,
                self._started_ns,
                self._unix_ns(time.monotonic()),
                {**common, **_facts(record, path), "crosslogic.tries": len(tries)},
                error,
            )
        ]
        for attempt, one in enumerate(tries, 1):
            attributes = {
                **common,
                "crosslogic.node.id": one.node_id,
                "crosslogic.region": one.region,
                "crosslogic.decision": one.decision,
            }
            if one.first_byte_at is not None:
                attributes["gen_ai.response.time_to_first_chunk"] = one.first_byte_at - one.started_at
            spans.append(
                Span(
                    f"{common['gen_ai.operation.name']} {record.model}",
                    False,
                    trace_id,
                    self._try_id(attempt),
                    self._span_id,
                    False,
                    tracestate,
                    self._unix_ns(one.started_at),
                    self._unix_ns(one.ended_at),
                    attributes,
                    one.failure,
                )
            )
        self._export(spans)

    def _try_id(self, attempt: int) -> int:
        return (self._span_id + attempt) & _SPAN_IDS or 1

    def _unix_ns(self, at: float) -> int:
        return self._started_ns + int((at - self._started_at) * _NS)


class Tracer:
    """Decides which requests are traced. Without `export` tracing is off, and a client's context passes unchanged.

    `share` of the requests that come without a context is sampled, and of those that a client sampled; of these
    `most_asked_per_s` more. What a client did not sample is not sampled here.
    """

    def __init__(self, export: Export | None, share: float, most_asked_per_s: float) -> None:
        self._export = export
        self._share = share
        self._most_asked_per_s = most_asked_per_s
        self._asked = most_asked_per_s
        self._asked_at = time.monotonic()
        # Ids need to be unlike each other, not unguessable.
        self._random = Random()

    def begin(self, traceparent: bytes, tracestate: bytes) -> Trace | None:
        """The trace of a request that has come with these headers, b"" for none; None when there is nothing to do."""
        export = self._export
        if not traceparent:
            if export is None:
                return None
            bits = self._random.getrandbits(192)
            trace_id, span_id = b"%032x" % (bits >> 64 or 1), bits & _SPAN_IDS or 1
            if self._random.random() < self._share:
                return SampledTrace(export, trace_id, 0, span_id, b"")
            return Trace(b"traceparent: 00-%b-%016x-00\r\n" % (trace_id, span_id))
        found = _TRACEPARENT.fullmatch(traceparent)
        if found is None or (found[1] == b"00" and found[5] is not None):
            # Nobody's trace: start anew, as if nothing had come.
            return self.begin(b"", b"")
        if _TRACESTATE.fullmatch(tracestate) is None:
            tracestate = b""
        if export is None:
            return Trace(b"traceparent: %b\r\n%b" % (traceparent, _tracestate_line(tracestate)))
        span_id = self._random.getrandbits(64) or 1
        if int(found[4], 16) & _SAMPLED and (self._random.random() < self._share or self._may_be_asked()):
            return SampledTrace(export, found[2], int(found[3], 16), span_id, tracestate)
        return Trace(b"traceparent: 00-%b-%016x-00\r\n%b" % (found[2], span_id, _tracestate_line(tracestate)))

    def _may_be_asked(self) -> bool:
        now = time.monotonic()
        self._asked = min(self._asked + (now - self._asked_at) * self._most_asked_per_s, self._most_asked_per_s)
        self._asked_at = now
        if self._asked < 1:
            return False
        self._asked -= 1
        return True


class Marks:
    """When one request passed which point, by `time.monotonic`; 0 where it did not. What an operator's key is told."""

    __slots__ = ("authenticated", "connected", "first_byte", "limited", "queued", "routed", "started")

    def __init__(self, started: float) -> None:
        self.started = started
        self.authenticated = 0.0
        self.limited = 0.0
        self.queued = 0.0
        self.routed = 0.0
        self.connected = 0.0
        self.first_byte = 0.0


def server_timing(marks: Marks) -> bytes:
    """The value of `Server-Timing`: milliseconds of each phase that was passed, and of our own work among them.

    `own` is what is neither queueing, nor connecting, nor the engine's.
    """
    parts: list[bytes] = []
    at, own = marks.started, 0.0
    for name, mark, is_own in (
        (b"auth", marks.authenticated, True),
        (b"limits", marks.limited, True),
        (b"queue", marks.queued, False),
        (b"route", marks.routed, True),
        (b"connect", marks.connected, False),
        (b"engine", marks.first_byte, False),
    ):
        if mark:
            took_ms = (mark - at) * 1000
            at = mark
            parts.append(b"%b;dur=%.3f" % (name, took_ms))
            if is_own:
                own += took_ms
    own += (time.monotonic() - at) * 1000
    parts.append(b"own;dur=%.3f" % own)
    return b", ".join(parts)


_PATH_OF: Final = {kind: path for path, kind in PATHS.items()}


def _tracestate_line(tracestate: bytes) -> bytes:
    return b"tracestate: %b\r\n" % tracestate if tracestate else b""


def _facts(record: UsageRecord, path: str) -> dict[str, Value]:
    """What an operator asks of a request; no content, no secret and no address."""
    facts: dict[str, Value] = {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": record.status,
        "gen_ai.request.stream": record.is_streamed,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "crosslogic.request.id": REQUEST.show(record.id),
        "crosslogic.org.id": ORG.show(record.org_id),
        "crosslogic.environment.id": ENVIRONMENT.show(record.environment_id),
        "crosslogic.key.id": KEY.show(record.key_id),
        "crosslogic.home_region": record.home_region,
        "crosslogic.region": record.served_region,
        "crosslogic.outcome": record.outcome.value,
    }
    if record.node_id is not None:
        facts["crosslogic.node.id"] = NODE.show(record.node_id)
    if record.ttft_ms is not None:
        facts["gen_ai.response.time_to_first_chunk"] = record.ttft_ms / 1000
    return facts
