"""What the hot path shows to Prometheus: plain integers, counted in place and put into words when somebody scrapes.

Names and buckets are those of OpenTelemetry's conventions for generative AI where they have one. Labels are models and
regions of the catalog and fixed words, never a tenant or anything that a client wrote; should some label be less fixed
than it looks, the series beyond MOST_SERIES of a metric are counted together as `other`.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import ClassVar, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from crosslogic.domain.usage import Outcome, UsageRecord

MOST_SERIES: Final = 1_000
OTHER: Final = "other"
LAG_INTERVAL_S: Final = 0.25

_MS, _US, _ONE = 1_000, 1_000_000, 1

# Bounds are whole milliseconds, microseconds or tokens, so that counting needs no fractions. Source of the gen_ai ones:
# OpenTelemetry, semantic conventions for generative AI metrics.
DURATION_MS: Final = (10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960, 81920)
FIRST_TOKEN_MS: Final = (1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)
PER_TOKEN_US: Final = tuple(ms * 1000 for ms in (10, 25, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000, 2500))
TOKENS: Final = tuple(4**power for power in range(14))
WAIT_MS: Final = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 20000)
LAG_US: Final = (500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 1000000)

# The operations of the conventions, by our kind of endpoint.
OPERATIONS: Final = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
PROVIDER: Final = "crosslogic"
ANSWERED: Final = frozenset({Outcome.COMPLETED, Outcome.CLIENT_GONE})

_GEN_AI = (
    "crosslogic_outcome",
    "crosslogic_region",
    "error_type",
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
)


class Metric(ABC):
    """One metric: its name, what it means, and its samples as lines of the text format."""

    kind: ClassVar[str]
    __slots__ = ("labels", "meaning", "name")

    def __init__(self, name: str, meaning: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.meaning = meaning
        self.labels = tuple(labels)

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """The samples as they stand."""

    def room_for(self, values: Sequence[str], taken: int) -> tuple[str, ...]:
        """The label values under which a new series is kept, `taken` being there already."""
        return tuple(values) if taken < MOST_SERIES else (OTHER,) * len(self.labels)


class Counter(Metric):
    """Counts upwards, by label values."""

    kind = "counter"
    __slots__ = ("values",)

    def __init__(self, name: str, meaning: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, meaning, labels)
        # A counter without labels is there from the start, so that its first increase can be seen.
        self.values: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, values: tuple[str, ...], amount: int = 1) -> None:
        """Count, under these label values."""
        try:
            self.values[values] += amount
        except KeyError:
            values = self.room_for(values, len(self.values))
            self.values[values] = self.values.get(values, 0) + amount

    def lines(self) -> Iterator[str]:
        """One line for each series."""
        for values, count in self.values.items():
            yield f"{self.name}{_braces(_pairs(self.labels, values))} {float(count)}\n"


class Gauge(Metric):
    """A level, set when somebody looks. What was never set is not shown."""

    kind = "gauge"
    __slots__ = ("values",)

    def __init__(self, name: str, meaning: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, meaning, labels)
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *values: str) -> None:
        """The level for these label values."""
        if values not in self.values:
            values = self.room_for(values, len(self.values))
        self.values[values] = value

    def clear(self) -> None:
        """Forget every series, before those that are left are set anew."""
        self.values.clear()

    def lines(self) -> Iterator[str]:
        """One line for each series."""
        for values, level in self.values.items():
            yield f"{self.name}{_braces(_pairs(self.labels, values))} {float(level)}\n"


class Histogram(Metric):
    """Spreads whole numbers over buckets; shown in units of `scale` of them.

    A series is a list: a count for each bound and one beyond them, and the sum of all values at the end.
    """

    kind = "histogram"
    __slots__ = ("_ends", "bounds", "scale", "series")

    def __init__(
        self, name: str, meaning: str, labels: Sequence[str], bounds: tuple[int, ...], scale: int = _ONE
    ) -> None:
        super().__init__(name, meaning, labels)
        self.bounds = bounds
        self.scale = scale
        self._ends = [f'le="{bound / scale}"}} ' for bound in bounds] + ['le="+Inf"} ']
        self.series: dict[tuple[str, ...], list[int]] = {} if labels else {(): self.empty()}

    def empty(self) -> list[int]:
        """A series without a value."""
        return [0] * (len(self.bounds) + 2)

    def observe(self, values: tuple[str, ...], value: int) -> None:
        """Count a value under these label values."""
        counts = self.series.get(values)
        if counts is None:
            counts = self.series.setdefault(self.room_for(values, len(self.series)), self.empty())
        counts[bisect_left(self.bounds, value)] += 1
        counts[-1] += value

    def lines(self) -> Iterator[str]:
        """The lines of every series."""
        for values, counts in self.series.items():
            yield self.lines_of(_pairs(self.labels, values), counts)

    def lines_of(self, pairs: str, counts: list[int]) -> str:
        """The lines of one series, whose labels are `pairs`."""
        begin = f"{self.name}_bucket{{{pairs}," if pairs else f"{self.name}_bucket{{"
        totals = list(accumulate(counts[:-1]))
        buckets = begin.join([f"{end}{total}.0\n" for end, total in zip(self._ends, totals, strict=True)])
        count = f"{self.name}_count{_braces(pairs)} {totals[-1]}.0\n"
        return f"{begin}{buckets}{count}{self.name}_sum{_braces(pairs)} {counts[-1] / self.scale}\n"


class Requests:
    """The ended requests of one model, region, kind of endpoint and outcome."""

    __slots__ = (
        "cached_tokens",
        "duration",
        "first_token",
        "input",
        "is_answered",
        "output",
        "pairs",
        "per_token",
        "place",
        "reserved",
    )

    def __init__(self, model: str, region: str, kind: str, outcome: str) -> None:
        self.place = (model, region, outcome)
        self.is_answered = outcome in ANSWERED
        operation = OPERATIONS.get(kind, OTHER)
        values = (outcome, region, "" if self.is_answered else outcome, operation, PROVIDER, model)
        self.pairs = _pairs(_GEN_AI, values)
        self.duration = [0] * (len(DURATION_MS) + 2)
        self.first_token = [0] * (len(FIRST_TOKEN_MS) + 2)
        self.per_token = [0] * (len(PER_TOKEN_US) + 2)
        self.input = [0] * (len(TOKENS) + 2)
        self.output = [0] * (len(TOKENS) + 2)
        self.cached_tokens = 0
        self.reserved = 0


# By model, region, kind of endpoint and outcome.
RequestsByPlace = dict[tuple[str, str, str, str], Requests]


class RequestHistogram(Histogram):
    """A histogram that is counted in `Requests`: its attributes, each with the labels that tell it from the others."""

    __slots__ = ("_attributes", "_requests")

    def __init__(
        self,
        requests: RequestsByPlace,
        name: str,
        meaning: str,
        bounds: tuple[int, ...],
        scale: int,
        attributes: Mapping[str, str],
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(name, meaning, (*_GEN_AI, *labels), bounds, scale)
        self._requests = requests
        self._attributes = attributes

    def lines(self) -> Iterator[str]:
        """The lines of every series that has a value."""
        for requests in self._requests.values():
            for attribute, pairs in self._attributes.items():
                counts: list[int] = getattr(requests, attribute)
                if any(counts):
                    yield self.lines_of(requests.pairs + pairs, counts)


class RequestCounter(Counter):
    """A counter that is derived from `Requests`; those of several kinds of endpoint add up."""

    __slots__ = ("_attribute", "_has_outcome", "_requests")

    def __init__(
        self,
        requests: RequestsByPlace,
        attribute: str,
        name: str,
        meaning: str,
        *,
        has_outcome: bool,
    ) -> None:
        super().__init__(name, meaning, ("model", "region", "outcome") if has_outcome else ("model", "region"))
        self._requests = requests
        self._attribute = attribute
        self._has_outcome = has_outcome

    def lines(self) -> Iterator[str]:
        """One line for each series."""
        self.values.clear()
        for requests in self._requests.values():
            counted: int | list[int] = getattr(requests, self._attribute)
            amount = counted if isinstance(counted, int) else sum(counted[:-1])
            values = requests.place if self._has_outcome else requests.place[:2]
            self.values[values] = self.values.get(values, 0) + amount
        return super().lines()


class Observer:
    """Counts and times requests. One object for each process; everything here is called on its event loop."""

    def __init__(self) -> None:
        self._requests: RequestsByPlace = {}
        requests, place = self._requests, ("model", "region")
        self._ended = RequestCounter(
            requests, "duration", "crosslogic_requests_total", "Admitted requests that ended, by how.", has_outcome=True
        )
        self._reserved = RequestCounter(
            requests,
            "reserved",
            "crosslogic_reserved_requests_total",
            "Those of them that ran inside a reservation.",
            has_outcome=False,
        )
        self._cached = RequestCounter(
            requests,
            "cached_tokens",
            "crosslogic_cached_tokens_total",
            "Prompt tokens that an engine had in its cache.",
            has_outcome=False,
        )
        self._duration = RequestHistogram(
            requests,
            "gen_ai_server_request_duration_seconds",
            "From a request's headers to its end.",
            DURATION_MS,
            _MS,
            {"duration": ""},
        )
        self._first_token = RequestHistogram(
            requests,
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's headers to the first token relayed; streams only.",
            FIRST_TOKEN_MS,
            _MS,
            {"first_token": ""},
        )
        self._per_token = RequestHistogram(
            requests,
            "gen_ai_server_time_per_output_token_seconds",
            "Between two tokens after the first, on average over one answer; streams only.",
            PER_TOKEN_US,
            _US,
            {"per_token": ""},
        )
        self._usage = RequestHistogram(
            requests,
            "gen_ai_client_token_usage",
            "Tokens charged for one request.",
            TOKENS,
            _ONE,
            {kind: f',gen_ai_token_type="{kind}"' for kind in ("input", "output")},
            ("gen_ai_token_type",),
        )
        self._refused = Counter(
            "crosslogic_refused_total", "Requests refused before admission, by error code.", ("code",)
        )
        self._holds_placed = Counter("crosslogic_holds_placed_total", "Holds placed.")
        self._holds_refused = Counter(
            "crosslogic_holds_refused_total", "Holds refused, by the layer and limit that refused.", ("layer", "limit")
        )
        self._would_refuse = Counter(
            "crosslogic_would_refuse_total",
            "Requests let through that a limit in dry run would have refused.",
            ("layer", "limit"),
        )
        self._decisions = Counter(
            "crosslogic_decisions_total",
            "Choices of a node, by the pool's strategy and the reason.",
            (*place, "strategy", "reason"),
        )
        self._node_failures = Counter(
            "crosslogic_node_failures_total", "Tries that a node failed, by how.", ("kind", *place)
        )
        self._ejections = Counter("crosslogic_ejections_total", "Nodes left out after failures.", place)
        self._returns = Counter("crosslogic_returns_total", "Nodes taken back after they were left out.", place)
        self._retries = Counter("crosslogic_retries_total", "Further tries, by the failure before them.", ("kind",))
        self._continuations = Counter(
            "crosslogic_continuations_total", "Broken streams, by what became of their continuation.", ("result",)
        )
        self._waste = Counter(
            "crosslogic_waste_tokens_total", "Tokens that nodes worked on and nobody was charged for.", ("token_type",)
        )
        self._shed = Counter("crosslogic_shed_total", "Requests turned away because a pool was full.", place)
        self._queue_wait = Histogram(
            "crosslogic_queue_wait_seconds", "How long requests that queued have waited.", place, WAIT_MS, _MS
        )
        self._lag = Histogram(
            "crosslogic_event_loop_lag_seconds", "How late the event loop was, four times a second.", (), LAG_US, _US
        )
        # The levels: whoever knows them sets them when the page is asked for.
        self.streams = Gauge("crosslogic_open_streams", "Streams being relayed.")
        self.open_holds = Gauge("crosslogic_open_holds", "Holds of requests that run.")
        self.queue_length = Gauge("crosslogic_queue_length", "Requests that queue for a pool.", place)
        self.routable_nodes = Gauge("crosslogic_routable_nodes", "Nodes this process would start a request on.", place)
        self.route_table_age = Gauge(
            "crosslogic_route_table_age_seconds", "Since the last full reading of the route table."
        )
        self.idle_connections = Gauge("crosslogic_idle_connections", "Connections to engines that are kept alive.")
        self.limits_alone = Gauge(
            "crosslogic_limits_alone", "1 while this process decides limits by itself because Valkey is away."
        )
        self.usage_pending = Gauge("crosslogic_usage_log_bytes", "Bytes of the usage log that are kept on disk.")
        self.usage_lag_records = Gauge("crosslogic_usage_lag_records", "Usage records that are not in Postgres yet.")
        self.usage_lag_age = Gauge(
            "crosslogic_usage_lag_seconds", "Age of the oldest usage record that is not in Postgres yet."
        )
        self.swept = Gauge(
            "crosslogic_sweep_machines",
            "Machines in the last sweep of all clouds, by what they are to us.",
            ("standing",),
        )
        self.sweep_age = Gauge("crosslogic_sweep_age_seconds", "Since the last sweep of all clouds began.")
        self._process = Gauge("crosslogic_process_info", "1; which process this page is of.", ("pid",))
        self._process.set(1, str(os.getpid()))
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

    @property
    def metrics(self) -> list[Metric]:
        """Every metric of ours, in the page's order."""
        return [value for value in vars(self).values() if isinstance(value, Metric)]

    # Per request

    def finished(self, record: UsageRecord, is_reserved: bool = False) -> None:
        """Count an admitted request that has ended."""
        try:
            seen = self._requests[(record.model, record.served_region, record.endpoint_kind, record.outcome)]
        except KeyError:
            seen = self._room_for(record)
        latency_ms = record.latency_ms
        counts = seen.duration
        counts[bisect_left(DURATION_MS, latency_ms)] += 1
        counts[-1] += latency_ms
        if is_reserved:
            seen.reserved += 1
        if not seen.is_answered:
            return
        prompt_tokens, completion_tokens = record.prompt_tokens, record.completion_tokens
        if prompt_tokens:
            counts = seen.input
            counts[bisect_left(TOKENS, prompt_tokens)] += 1
            counts[-1] += prompt_tokens
            seen.cached_tokens += record.cached_tokens
        if completion_tokens:
            counts = seen.output
            counts[bisect_left(TOKENS, completion_tokens)] += 1
            counts[-1] += completion_tokens
        first_ms = record.ttft_ms
        # A whole answer's first byte comes with its last token: it says nothing about the first.
        if first_ms is not None and record.is_streamed:
            counts = seen.first_token
            counts[bisect_left(FIRST_TOKEN_MS, first_ms)] += 1
            counts[-1] += first_ms
            if completion_tokens > 1:
                each_us = (latency_ms - first_ms) * 1000 // (completion_tokens - 1)
                counts = seen.per_token
                counts[bisect_left(PER_TOKEN_US, each_us)] += 1
                counts[-1] += each_us

    def _room_for(self, record: UsageRecord) -> Requests:
        key = (record.model, record.served_region, record.endpoint_kind, record.outcome.value)
        if len(self._requests) >= MOST_SERIES:
            key = (OTHER, OTHER, OTHER, record.outcome.value)
        return self._requests.setdefault(key, Requests(*key))

    def decided(self, model: str, region: str, reason: str, strategy: str = "") -> None:
        """Count a choice of a node."""
        self._decisions.add((model, region, strategy, reason))

    def hold_placed(self) -> None:
        """Count a hold."""
        self._holds_placed.add(())

    # When something is out of the ordinary

    def refused(self, code: str) -> None:
        """Count a request that was not admitted."""
        self._refused.add((code,))

    def hold_refused(self, layer: str, limit: str) -> None:
        """Count a hold that a limit refused."""
        self._holds_refused.add((layer, limit))

    def would_refuse(self, layer: str, limit: str) -> None:
        """Count a hold that a limit in dry run would have refused."""
        self._would_refuse.add((layer, limit))

    def node_failed(self, model: str, region: str, kind: str) -> None:
        """Count a try that a node failed."""
        self._node_failures.add((kind, model, region))

    def ejected(self, model: str, region: str) -> None:
        """Count a node that is left out from now on."""
        self._ejections.add((model, region))

    def returned(self, model: str, region: str) -> None:
        """Count a node that is taken back."""
        self._returns.add((model, region))

    def retried(self, kind: str) -> None:
        """Count a further try, by the failure that made it necessary."""
        self._retries.add((kind,))

    def continued(self, result: str) -> None:
        """Count a stream that broke off, by what became of its continuation."""
        self._continuations.add((result,))

    def wasted(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count tokens that a node worked on and nobody is charged for."""
        self._waste.add(("input",), prompt_tokens)
        self._waste.add(("output",), completion_tokens)

    def shed(self, model: str, region: str) -> None:
        """Count a request that was turned away because its pool was full."""
        self._shed.add((model, region))

    def queued(self, model: str, region: str, wait_s: float) -> None:
        """Note how long a request that queued has waited."""
        self._queue_wait.observe((model, region), int(wait_s * 1000))

    async def keep_measuring(self) -> None:
        """Run for the life of the process: how late does the event loop call us?"""
        while True:
            due_at = time.monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lag.observe((), max(0, int((time.monotonic() - due_at) * _US)))

    def page(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        parts: list[str] = []
        for metric in self.metrics:
            parts.append(f"# HELP {metric.name} {metric.meaning}\n# TYPE {metric.name} {metric.kind}\n")
            parts.extend(metric.lines())
        return "".join(parts).encode() + generate_latest(self._registry)


def _pairs(names: Sequence[str], values: Sequence[str]) -> str:
    """`a="1",b="2"`; an empty value is the same as no label."""
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True) if value])


def _braces(pairs: str) -> str:
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
