"""What every process tells of itself: its log, and traces where a collector is configured.

OpenTelemetry is imported only by who makes a `SpanSender`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from crosslogic.domain.keys import redact
from crosslogic.domain.trace import Span
from crosslogic.settings import Settings

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
# What every record has; anything else was given as `extra`.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
# They log each request, with its address.
_TALKATIVE = ("httpx", "httpcore")
# uvicorn gives its loggers handlers of their own.
_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access")

SEND_INTERVAL_MS = 2_000
# Beyond these the oldest span that waits is dropped; the collector's troubles are not the requests'.
MOST_WAITING_SPANS = 4_096
SPANS_AT_ONCE = 512
LONGEST_SEND_S = 5
LONGEST_CLOSE_S = 2.0


def configure_logging(settings: Settings) -> None:
    """Log to stderr in the form that the settings name, uvicorn's lines as well. No key's secret gets through (H9)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines(TEXT))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SERVERS:
        server = logging.getLogger(name)
        server.handlers.clear()
        server.propagate = True


class TextLines(logging.Formatter):
    """Lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, a traceback below it."""
        return redact(super().format(record))


class JsonLines(logging.Formatter):
    """One JSON object a line: `ts` (RFC 3339, UTC), `level`, `logger`, `message`, and what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is its field `exception`."""
        line: dict[str, Any] = {name: value for name, value in vars(record).items() if name not in _USUAL}
        line |= {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


class SpanSender:
    """Sends finished spans to a collector, in batches and from a thread of its own."""

    def __init__(self, endpoint: str, service: str) -> None:
        # Here and not above: most processes never trace.
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._api = trace
        self._span = ReadableSpan
        self._flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._resource = Resource.create({"service.name": service})
        self._scope = InstrumentationScope("crosslogic")
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=LONGEST_SEND_S),
            max_queue_size=MOST_WAITING_SPANS,
            schedule_delay_millis=SEND_INTERVAL_MS,
            max_export_batch_size=SPANS_AT_ONCE,
        )

    def send(self, spans: Sequence[Span]) -> None:
        """Put spans into the queue; never waits."""
        api = self._api
        for span in spans:
            state = api.TraceState.from_header([span.tracestate]) if span.tracestate else None
            context = api.SpanContext(span.trace_id, span.span_id, False, self._flags, state)
            parent = None
            if span.parent_id:
                parent = api.SpanContext(span.trace_id, span.parent_id, span.is_parent_remote, self._flags, state)
            attributes, status = dict(span.attributes), api.Status()
            if span.error:
                attributes["error.type"] = span.error
                status = api.Status(api.StatusCode.ERROR)
            self._processor.on_end(
                self._span(
                    name=span.name,
                    context=context,
                    parent=parent,
                    resource=self._resource,
                    attributes=attributes,
                    kind=api.SpanKind.SERVER if span.is_server else api.SpanKind.CLIENT,
                    status=status,
                    start_time=span.started_ns,
                    end_time=span.ended_ns,
                    instrumentation_scope=self._scope,
                )
            )

    async def close(self) -> None:
        """Send what waits, for a moment at most: a collector that is away must not keep the process."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, LONGEST_CLOSE_S)
