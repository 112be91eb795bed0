"""Traces: whose id they have, how many there are, what reaches the engine and what a collector receives."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from api.inference.tracing import Marks, Trace, Tracer, Try, server_timing
from crosslogic.domain.ids import KEY, NODE, ORG, REQUEST
from crosslogic.domain.trace import Export, Span
from crosslogic.domain.usage import Outcome
from crosslogic.telemetry import SpanSender
from tests.api.inference.test_observing import record

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
ASKED = f"00-{TRACE_ID}-{PARENT_ID}-01".encode()
NOT_ASKED = f"00-{TRACE_ID}-{PARENT_ID}-00".encode()


@pytest.fixture
def spans() -> list[Span]:
    return []


def tracer(spans: list[Span], *, share: float = 0.0, asked: float = 0.0) -> Tracer:
    """One that is on."""
    export: Export = spans.extend
    return Tracer(export, share, asked)


def told(trace: Trace | None, attempt: int = 1) -> tuple[str, str, str]:
    """Trace id, parent id and flags that an engine is told."""
    assert trace is not None
    found = re.match(rb"traceparent: 00-([0-9a-f]{32})-([0-9a-f]{16})-(0[01])\r\n", trace.header_lines(attempt))
    assert found, trace.header_lines(attempt)
    return found[1].decode(), found[2].decode(), found[3].decode()


class TestBegin:
    def test_off_and_nothing_given_is_nothing(self) -> None:
        assert Tracer(None, 1.0, 5).begin(b"", b"") is None

    def test_off_passes_a_context_on_unchanged(self) -> None:
        trace = Tracer(None, 1.0, 5).begin(ASKED, b"vendor=1,other=2")
        assert trace is not None
        assert trace.header_lines() == b"traceparent: " + ASKED + b"\r\ntracestate: vendor=1,other=2\r\n"
        assert not trace.is_sampled

    def test_off_passes_on_what_a_later_version_says(self) -> None:
        later = b"cc" + ASKED[2:] + b"-what-the-future-brings"
        trace = Tracer(None, 1.0, 5).begin(later, b"")
        assert trace is not None
        assert trace.header_lines() == b"traceparent: " + later + b"\r\n"

    @pytest.mark.parametrize(
        "invalid",
        [
            b"nonsense",
            ASKED.upper(),
            ASKED + b"-more",
            ASKED + b"\r\nx: y",
            b"ff" + ASKED[2:],
            ASKED[:-3],
            b"00-" + b"0" * 32 + b"-" + PARENT_ID.encode() + b"-01",
            b"00-" + TRACE_ID.encode() + b"-" + b"0" * 16 + b"-01",
            b"cc" + ASKED[2:] + b"-\r\nx: y",
        ],
    )
    def test_an_invalid_context_is_nobody_s(self, invalid: bytes, spans: list[Span]) -> None:
        assert Tracer(None, 1.0, 5).begin(invalid, b"a=b") is None
        trace = tracer(spans, asked=100).begin(invalid, b"a=b")
        assert trace is not None
        assert told(trace)[0] != TRACE_ID
        assert not trace.is_sampled
        assert b"tracestate" not in trace.header_lines()

    @pytest.mark.parametrize("state", [b"a=b\r\nx: y", b"a" * 513, b"\xff"])
    def test_an_unfit_tracestate_is_dropped(self, state: bytes, spans: list[Span]) -> None:
        for one in (Tracer(None, 0, 0), tracer(spans), tracer(spans, asked=9)):
            trace = one.begin(ASKED, state)
            assert trace is not None
            assert trace.header_lines().count(b"\r\n") == 1

    def test_takes_the_client_s_id_and_is_the_engine_s_parent(self, spans: list[Span]) -> None:
        trace = tracer(spans).begin(NOT_ASKED, b"vendor=1")
        trace_id, parent_id, flags = told(trace)
        assert (trace_id, flags) == (TRACE_ID, "00")
        assert parent_id != PARENT_ID
        assert trace is not None
        assert trace.header_lines().endswith(b"tracestate: vendor=1\r\n")

    def test_makes_ids_of_its_own(self, spans: list[Span]) -> None:
        one = tracer(spans)
        assert len({told(one.begin(b"", b""))[:2] for _ in range(1000)}) == 1000


class TestSampling:
    def test_is_the_share(self, spans: list[Span]) -> None:
        one = tracer(spans, share=0.1)
        sampled = sum(trace.is_sampled for trace in (one.begin(b"", b"") for _ in range(20_000)) if trace)
        # Twenty standard deviations on either side.
        assert 1_150 < sampled < 2_850

    def test_no_client_forces_it(self, spans: list[Span]) -> None:
        one = tracer(spans, asked=5)
        began = time.monotonic()
        sampled = sum(trace.is_sampled for trace in (one.begin(ASKED, b"") for _ in range(5_000)) if trace)
        assert 5 <= sampled <= 5 + 5 * (time.monotonic() - began)

    def test_all_are_sampled_where_the_operator_says_so(self, spans: list[Span]) -> None:
        one = tracer(spans, share=1.0)
        for given in (b"", ASKED):
            assert all(trace.is_sampled for trace in (one.begin(given, b"") for _ in range(100)) if trace)

    def test_a_client_that_does_not_sample_is_not_sampled(self, spans: list[Span]) -> None:
        trace = tracer(spans, share=1.0, asked=100).begin(NOT_ASKED, b"")
        assert trace is not None
        trace.finish(record(), [])
        assert not trace.is_sampled
        assert spans == []


class TestFinish:
    def test_makes_a_server_span_and_one_for_each_try(self, spans: list[Span]) -> None:
        trace = tracer(spans, asked=5).begin(ASKED, b"vendor=1")
        assert trace is not None
        now, unix_ns = time.monotonic(), time.time_ns()
        tries = [
            Try("node_a", "in-mumbai", now, None, now + 0.25, failure="connect", decision="least-load"),
            Try("node_b", "us-east", now + 0.25, now + 0.75, now + 2.0, decision="only"),
        ]
        given = record(served_region="us-east", status=200)
        trace.finish(given, tries)
        server, first, second = spans
        assert (server.name, server.is_server) == ("POST /v1/chat/completions", True)
        assert server.trace_id == int(TRACE_ID, 16)
        assert (server.parent_id, server.is_parent_remote) == (int(PARENT_ID, 16), True)
        assert {span.parent_id for span in (first, second)} == {server.span_id}
        for attempt, span in enumerate((first, second), 1):
            assert told(trace, attempt) == (TRACE_ID, f"{span.span_id:016x}", "01")
            assert (span.name, span.is_server, span.tracestate) == ("chat llama-3-8b", False, "vendor=1")
        assert first.error == "connect"
        assert (first.attributes["crosslogic.node.id"], second.attributes["crosslogic.node.id"]) == ("node_a", "node_b")
        assert second.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.5)
        assert second.ended_ns - second.started_ns == pytest.approx(1.75e9, abs=1e3)
        assert first.started_ns == pytest.approx(unix_ns, abs=1e9)
        assert server.error == second.error == ""
        assert server.attributes["crosslogic.tries"] == 2

    def test_tells_the_facts_and_no_content(self, spans: list[Span]) -> None:
        trace = tracer(spans, share=1.0).begin(b"", b"")
        assert trace is not None
        trace.finish(record(client_request_id="canary"))
        attributes = dict(spans[0].attributes)
        assert spans[0].parent_id == 0
        assert attributes["crosslogic.request.id"] == REQUEST.show(UUID(int=1))
        assert attributes["crosslogic.org.id"] == ORG.show(UUID(int=2))
        assert attributes["crosslogic.key.id"] == KEY.show(UUID(int=4))
        assert attributes["crosslogic.node.id"] == NODE.show(UUID(int=5))
        assert attributes["gen_ai.usage.input_tokens"] == 100
        assert attributes["gen_ai.usage.output_tokens"] == 11
        assert attributes["http.response.status_code"] == 200
        assert "canary" not in str(spans)

    @pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CUT, Outcome.REJECTED])
    def test_says_when_it_went_wrong(self, outcome: Outcome, spans: list[Span]) -> None:
        trace = tracer(spans, share=1.0).begin(b"", b"")
        assert trace is not None
        trace.finish(record(outcome=outcome, node_id=None, ttft_ms=None))
        assert spans[0].error == outcome.value


class Collector:
    """An OTLP collector that remembers."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                collector.paths.add(self.path)
                collector.received.append(ExportTraceServiceRequest.FromString(raw))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def resources(self) -> list[Any]:
        return [resource for request in self.received for resource in request.resource_spans]

    @property
    def spans(self) -> list[Any]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
async def sender(collector: Collector) -> AsyncIterator[SpanSender]:
    one = SpanSender(f"{collector.url}/", "crosslogic-test")
    yield one
    await one.close()


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as OTLP has them."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


class TestSpanSender:
    async def test_sends_what_a_collector_understands(self, collector: Collector, sender: SpanSender) -> None:
        trace = Tracer(sender.send, 1.0, 5).begin(ASKED, b"vendor=1")
        assert trace is not None
        now = time.monotonic()
        trace.finish(record(outcome=Outcome.CUT), [Try("node_a", "in-mumbai", now, None, now + 1, failure="reset")])
        await sender.close()
        assert collector.paths == {"/v1/traces"}
        assert values(collector.resources[0].resource.attributes)["service.name"] == "crosslogic-test"
        by_name = {span.name: span for span in collector.spans}
        server, child = by_name["POST /v1/chat/completions"], by_name["chat llama-3-8b"]
        assert server.trace_id.hex() == child.trace_id.hex() == TRACE_ID
        assert server.parent_span_id.hex() == PARENT_ID
        assert child.parent_span_id == server.span_id
        assert child.span_id.hex() == told(trace)[1]
        assert (server.kind, child.kind) == (server.SPAN_KIND_SERVER, server.SPAN_KIND_CLIENT)
        assert server.trace_state == "vendor=1"
        assert server.status.code == child.status.code == server.status.STATUS_CODE_ERROR
        assert values(server.attributes)["error.type"] == "cut"
        assert values(child.attributes)["error.type"] == "reset"
        assert values(server.attributes)["gen_ai.request.model"] == "llama-3-8b"
        assert child.end_time_unix_nano - child.start_time_unix_nano == pytest.approx(1e9, abs=1e3)

    async def test_a_collector_that_is_away_keeps_nobody(self) -> None:
        sender = SpanSender("http://127.0.0.1:1", "crosslogic-test")
        one = Tracer(sender.send, 1.0, 5)
        began = time.monotonic()
        for _ in range(10_000):
            trace = one.begin(b"", b"")
            assert trace is not None
            trace.finish(record())
        async with asyncio.timeout(10):
            await sender.close()
        assert time.monotonic() - began < 10


class TestServerTiming:
    def test_tells_every_phase_that_was_passed(self) -> None:
        now = time.monotonic()
        marks = Marks(now - 1)
        marks.authenticated = now - 0.999
        marks.limited = now - 0.997
        marks.queued = now - 0.897
        marks.routed = now - 0.893
        marks.connected = now - 0.793
        marks.first_byte = now
        names = [part.split(b";dur=") for part in server_timing(marks).split(b", ")]
        assert [name.decode() for name, _ in names] == ["auth", "limits", "queue", "route", "connect", "engine", "own"]
        took = {name.decode(): float(milliseconds) for name, milliseconds in names}
        assert took["auth"] == pytest.approx(1, abs=0.01)
        assert took["queue"] == pytest.approx(100, abs=0.01)
        assert took["engine"] == pytest.approx(793, abs=0.01)
        # 1 + 2 + 4 ms, and what has passed since.
        assert 7 <= took["own"] < 793

    def test_leaves_out_what_was_not(self) -> None:
        marks = Marks(time.monotonic())
        marks.authenticated = marks.routed = marks.first_byte = marks.started
        value = server_timing(marks).decode()
        assert re.sub(r"[\d.]+", "0", value) == "auth;dur=0, route;dur=0, engine;dur=0, own;dur=0"
