"""What the hot path shows to Prometheus. Labels are models, regions and fixed words only: series stay bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from api.inference.upstream import FailureKind
from crosslogic.domain.usage import Outcome, UsageRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Observer:
    """Counts and times requests. One object for each process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[tuple[str, str, Outcome], tuple[Counter, Counter, Counter, Histogram]] = {}
        self._requests = Counter(
            "crosslogic_requests",
            "Admitted requests by how they ended.",
            ("model", "region", "outcome"),
            registry=self.registry,
        )
        self._refused = Counter(
            "crosslogic_refused", "Requests refused before admission, by error code.", ("code",), registry=self.registry
        )
        self._tokens = Counter(
            "crosslogic_tokens", "Tokens charged.", ("model", "region", "token_class"), registry=self.registry
        )
        self._first = Histogram(
            "crosslogic_time_to_first_token_seconds",
            "From admission to the first byte relayed.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._node_failures = Counter(
            "crosslogic_node_failures",
            "Tries that a node failed, by how.",
            ("model", "region", "kind"),
            registry=self.registry,
        )
        self.routable_nodes = Gauge(
            "crosslogic_routable_nodes", "Nodes this process would start a request on.", registry=self.registry
        )
        self.route_table_age = Gauge(
            "crosslogic_route_table_age_seconds",
            "Since the last full reading of the route table.",
            registry=self.registry,
        )
        self.streams = Gauge("crosslogic_open_streams", "Streams being relayed.", registry=self.registry)
        self.usage_pending = Gauge(
            "crosslogic_usage_log_bytes", "Bytes of the usage log that are kept on disk.", registry=self.registry
        )

    def finished(self, record: UsageRecord) -> None:
        """Count an admitted request that has ended."""
        model, region = record.model, record.served_region
        place = (model, region, record.outcome)
        counters = self._counters.get(place)
        if counters is None:
            # Looking a series up by its labels costs more than counting in it.
            counters = self._counters[place] = (
                self._requests.labels(model, region, record.outcome.value),
                self._tokens.labels(model, region, "prompt"),
                self._tokens.labels(model, region, "completion"),
                self._first.labels(model),
            )
        requests, prompt, completion, first = counters
        requests.inc()
        if record.prompt_tokens:
            prompt.inc(record.prompt_tokens)
        if record.completion_tokens:
            completion.inc(record.completion_tokens)
        if record.ttft_ms is not None:
            first.observe(record.ttft_ms / 1000)

    def refused(self, code: str) -> None:
        """Count a request that was not admitted."""
        self._refused.labels(code).inc()

    def node_failed(self, model: str, region: str, kind: FailureKind) -> None:
        """Count a try that a node failed."""
        self._node_failures.labels(model, region, kind.value).inc()

    def page(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return generate_latest(self.registry)
